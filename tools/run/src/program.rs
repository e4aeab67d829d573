// SPDX-License-Identifier: GPL-2.0-only

//! A program's file: where it is, and whether a library can be preloaded into it.

use std::{
    ffi::OsStr,
    fs::File,
    io::Read as _,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

/// The file that a command names, as a shell finds it.
pub fn find(name: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| {
            file.metadata()
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

/// Why nothing can be preloaded, if that is so. Of a script this is its interpreter's answer.
pub fn why_not(file: &Path) -> Option<&'static str> {
    let head = head(file)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next()?;
        let mut words = line.split(|b| b.is_ascii_whitespace());
        let interpreter = words.find(|word| !word.is_empty())?;
        let interpreter = PathBuf::from(OsStr::from_bytes(interpreter));
        return examine(&self::head(&interpreter)?, &interpreter);
    }
    examine(&head, file)
}

/// Enough of it: the headers of a program are at its beginning.
fn head(file: &Path) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    File::open(file)
        .ok()?
        .take(4096)
        .read_to_end(&mut head)
        .ok()?;
    Some(head)
}

fn examine(head: &[u8], file: &Path) -> Option<&'static str> {
    if !head.starts_with(b"\x7fELF") {
        return None;
    }
    let rights = file.metadata().ok()?;
    let me = rustix::process::geteuid();
    if rights.mode() & 0o4000 != 0 && rights.uid() != me.as_raw() {
        return Some("is run as another user");
    }
    match interpreter(head) {
        Ok(Some(linker)) if linker.starts_with(b"/lib64/ld-linux-x86-64.so") => None,
        Ok(Some(_)) => Some("is not for this machine's usual C library"),
        Ok(None) => Some("is statically linked"),
        Err(what) => Some(what),
    }
}

/// The dynamic linker that a 64-bit program names.
fn interpreter(head: &[u8]) -> Result<Option<&[u8]>, &'static str> {
    // Class, byte order, machine.
    if head.get(4..6) != Some(&[2, 1]) || head.get(18..20) != Some(&[62, 0]) {
        return Err("is not a program for x86-64");
    }
    let number = |at: usize, len: usize| {
        let bytes = head.get(at..at.checked_add(len)?)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0u64, |v, b| (v << 8) | u64::from(*b));
        usize::try_from(value).ok()
    };
    const PT_INTERP: usize = 3;
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2))
    else {
        return Err("is damaged");
    };
    for nr in 0..count {
        let Some(at) = nr.checked_mul(size).and_then(|at| at.checked_add(table)) else {
            return Err("is damaged");
        };
        if number(at, 4) == Some(PT_INTERP) {
            let (Some(from), Some(len)) = (number(at + 8, 8), number(at + 32, 8)) else {
                return Err("is damaged");
            };
            // Farther back in the file: there is one, and it is an unusual program.
            let name = from.checked_add(len).and_then(|to| head.get(from..to));
            return Ok(Some(name.unwrap_or(b"")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An x86-64 program with one entry in its table of segments.
    fn program(kind: u32) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        let linker = b"/lib64/ld-linux-x86-64.so.2\0";
        let mut segment = vec![0; 56];
        segment[..4].copy_from_slice(&kind.to_le_bytes());
        segment[8] = 120;
        segment[32] = linker.len() as u8;
        elf.extend_from_slice(&segment);
        elf.extend_from_slice(linker);
        elf
    }

    #[test]
    fn a_program_that_no_library_can_be_preloaded_into_is_told() {
        let here = Path::new("/");
        assert_eq!(examine(&program(3), here), None);
        assert_eq!(examine(&program(1), here), Some("is statically linked"));
        let mut other = program(3);
        other[4] = 1;
        assert_eq!(examine(&other, here), Some("is not a program for x86-64"));
        let mut other = program(3);
        other[120 + 8] = b'm';
        let want = Some("is not for this machine's usual C library");
        assert_eq!(examine(&other, here), want);
        // A script without a known interpreter is the kernel's to refuse.
        assert_eq!(why_not(Path::new("/dev/null")), None);
    }

    #[test]
    fn nonsense_in_a_programs_headers_is_no_panic() {
        let good = program(3);
        for at in 4..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = interpreter(&bad);
                let _ = interpreter(&bad[..at]);
            }
        }
    }

    #[test]
    fn a_script_is_judged_by_its_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let (linked, script) = (dir.path().join("p"), dir.path().join("s"));
        std::fs::write(&linked, program(1)).unwrap();
        std::fs::write(&script, format!("#! {} -x\nrest\n", linked.display())).unwrap();
        assert_eq!(why_not(&script), Some("is statically linked"));
    }
}
