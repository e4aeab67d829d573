// SPDX-License-Identifier: GPL-2.0-only

//! What a program's sockets did.

use std::{
    fmt::{Display, Formatter, Result},
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::Path,
};

use pmskb_uapi::{store::UNPLACED, Counters};
use rustix::fs::{memfd_create, MemfdFlags};

use crate::words;

/// Memory that the library in each of the program's processes counts in.
pub struct Counts(File);

impl Counts {
    /// All zero.
    pub fn new() -> io::Result<Self> {
        let file = File::from(memfd_create("pmskb-run", MemfdFlags::CLOEXEC)?);
        file.set_len(words::COUNTS_LEN as u64)?;
        Ok(Self(file))
    }

    /// Where others find it, as long as we live.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// What they have counted.
    pub fn read(&self) -> io::Result<[u64; words::COUNTS_NR]> {
        let mut bytes = [0; words::COUNTS_LEN];
        self.0.read_exact_at(&mut bytes, 0)?;
        let mut counts = [0; words::COUNTS_NR];
        for (count, bytes) in counts.iter_mut().zip(bytes.chunks_exact(8)) {
            *count = bytes
                .iter()
                .rev()
                .fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
        }
        Ok(counts)
    }
}

/// What is said after the program has ended.
pub struct Report<'a> {
    /// The store.
    pub store: &'a Path,
    /// What the library counted.
    pub counts: &'a [u64; words::COUNTS_NR],
    /// The store's counters at the start.
    pub before: &'a Counters,
    /// And now.
    pub after: &'a Counters,
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let count = |nr: usize| self.counts.get(nr).copied().unwrap_or(0);
        let grown = |of: fn(&Counters) -> u64| of(self.after).wrapping_sub(of(self.before));
        write!(
            f,
            "pmskb-run: {}: sockets attached {}, of no such kind {}, failed {}",
            self.store.display(),
            count(words::ATTACHED),
            count(words::PLAIN),
            count(words::FAILED),
        )?;
        if count(words::FAILED) > 0 {
            let errno = i32::try_from(count(words::ERRNO)).unwrap_or(0);
            write!(f, " ({})", io::Error::from_raw_os_error(errno))?;
        }
        writeln!(
            f,
            "\npmskb-run: placed {} packets, {} bytes; checksums derived {}, hardware {}, \
             computed {}, mismatches {}",
            grown(|c| c.placed),
            grown(|c| c.placed_bytes),
            grown(|c| c.derived),
            grown(|c| c.hardware),
            grown(|c| c.computed),
            grown(|c| c.mismatch),
        )?;
        write!(
            f,
            "pmskb-run: unplaced {} packets",
            grown(|c| c.unplaced.iter().sum())
        )?;
        for (name, nr) in UNPLACED {
            let of = |c: &Counters| c.unplaced.get(nr).copied().unwrap_or(0);
            let why = of(self.after).wrapping_sub(of(self.before));
            if why > 0 {
                write!(f, ", {name} {why}")?;
            }
        }
        writeln!(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_says_what_was_added_and_why_not() {
        let before = Counters {
            placed: 10,
            placed_bytes: 1000,
            ..Default::default()
        };
        let mut after = Counters {
            placed: 15,
            placed_bytes: 1777,
            derived: 2,
            computed: 3,
            ..before
        };
        after.unplaced[UNPLACED[2].1] = 4;
        let report = Report {
            store: Path::new("/dev/pmskb7"),
            counts: &[3, 2, 1, 13],
            before: &before,
            after: &after,
        };
        assert_eq!(
            report.to_string(),
            "pmskb-run: /dev/pmskb7: sockets attached 3, of no such kind 2, failed 1 \
             (Permission denied (os error 13))\n\
             pmskb-run: placed 5 packets, 777 bytes; checksums derived 2, hardware 0, \
             computed 3, mismatches 0\n\
             pmskb-run: unplaced 4 packets, shape 4\n"
        );
    }

    #[test]
    fn what_is_counted_by_path_is_read_here() {
        let counts = Counts::new().unwrap();
        let other = File::options().write(true).open(counts.path()).unwrap();
        other
            .write_all_at(&7u64.to_le_bytes(), 8 * words::PLAIN as u64)
            .unwrap();
        assert_eq!(counts.read().unwrap(), [0, 7, 0, 0]);
    }
}
