// SPDX-License-Identifier: GPL-2.0-only
//! What code lies at an address of the guest: the kernel's and its modules' from
//! `/proc/kallsyms`, a process's from `/proc/PID/maps` and the files that it names.

use anyhow::{Context, Result};
use object::{Object, ObjectSegment, ObjectSymbol, SymbolKind};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A function, or what goes for one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Symbol {
    /// `kernel`, a module's name in brackets, or a file's name.
    pub place: String,
    /// Its name, readable.
    pub name: String,
}

/// Functions in order of their addresses.
#[derive(Clone, Debug, Default)]
struct Table {
    /// Start, end, and number of a symbol.
    all: Vec<(u64, u64, Symbol)>,
}

impl Table {
    /// From starts and sizes; a size of 0 reaches to the next one. Of several at an address, the
    /// first in the alphabet counts, so that it does not depend on the file's order.
    fn new(mut all: Vec<(u64, u64, Symbol)>) -> Self {
        all.sort_by(|a, b| (a.0, &a.2.name).cmp(&(b.0, &b.2.name)));
        all.dedup_by_key(|a| a.0);
        for at in 0..all.len() {
            let next = all.get(at + 1).map_or(u64::MAX, |n| n.0);
            all[at].1 = match all[at].1 {
                0 => next,
                size => all[at].0.saturating_add(size).min(next),
            };
        }
        Self { all }
    }

    fn find(&self, at: u64) -> Option<(&Symbol, u64)> {
        let after = self.all.partition_point(|s| s.0 <= at);
        let (start, end, symbol) = self.all.get(after.checked_sub(1)?)?;
        (at < *end).then_some((symbol, *start))
    }
}

/// A mapping of code into a process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    path: String,
}

/// A file's functions, and where its code is loaded.
#[derive(Clone, Debug, Default)]
struct Image {
    table: Table,
    /// Offset in the file, length and address of each segment.
    segments: Vec<(u64, u64, u64)>,
}

/// Everything that can be named.
#[derive(Debug, Default)]
pub struct Symbols {
    kernel: Table,
    mappings: Vec<Mapping>,
    images: HashMap<String, Image>,
}

/// The first address of the half that is the kernel's.
const KERNEL: u64 = 1 << 63;

impl Symbols {
    /// From `kallsyms`, and the `maps` of a process; its files are looked for by their names in
    /// `directories`, since the guest may have them elsewhere.
    pub fn new(kallsyms: &str, maps: &str, directories: &[PathBuf]) -> Result<Self> {
        let mappings = parse_maps(maps);
        let mut images = HashMap::new();
        for mapping in &mappings {
            let name = file_name(&mapping.path);
            if images.contains_key(&name) || mapping.path.starts_with('[') {
                continue;
            }
            let found = directories.iter().map(|d| d.join(&name));
            let image = match found.into_iter().find(|p| p.is_file()) {
                Some(path) => Image::read(&path, &name, directories)
                    .with_context(|| format!("cannot read {}", path.display()))?,
                None => Image::default(),
            };
            images.insert(name, image);
        }
        Ok(Self {
            kernel: parse_kallsyms(kallsyms),
            mappings,
            images,
        })
    }

    /// The function at an address, and whether it begins there.
    pub fn find(&self, at: u64) -> (Symbol, bool) {
        let nameless = |place: &str| Symbol {
            place: place.into(),
            name: "?".into(),
        };
        if at >= KERNEL {
            return match self.kernel.find(at) {
                Some((symbol, start)) => (symbol.clone(), start == at),
                None => (nameless("kernel"), false),
            };
        }
        let mapping = self
            .mappings
            .iter()
            .find(|m| (m.start..m.end).contains(&at));
        let Some(mapping) = mapping else {
            return (nameless("another process"), false);
        };
        let name = file_name(&mapping.path);
        let offset = at - mapping.start + mapping.offset;
        let found = self.images.get(&name).and_then(|image| {
            let address = image.address(offset)?;
            let (symbol, start) = image.table.find(address)?;
            Some((symbol.clone(), start == address))
        });
        found.unwrap_or((nameless(&name), false))
    }
}

impl Image {
    /// Reads a file's functions; if a file of debugging information belongs to it, that one's,
    /// which also names those that nobody else may call.
    fn read(path: &Path, name: &str, directories: &[PathBuf]) -> Result<Self> {
        let bytes = fs::read(path)?;
        let file = object::File::parse(&*bytes)?;
        let segments = file.segments().map(|s| {
            let (offset, len) = s.file_range();
            (offset, len, s.address())
        });
        let segments = segments.collect();
        let mut functions = functions(&file, name);
        if let Some(id) = file.build_id()? {
            let mut debug = String::from("debug/.build-id/");
            for (at, byte) in id.iter().enumerate() {
                let slash = if at == 1 { "/" } else { "" };
                debug += &format!("{slash}{byte:02x}");
            }
            debug += ".debug";
            let found = directories
                .iter()
                .flat_map(|d| d.ancestors())
                .map(|d| d.join(&debug))
                .find(|p| p.is_file());
            if let Some(debug) = found {
                let bytes = fs::read(&debug)?;
                functions.extend(self::functions(&object::File::parse(&*bytes)?, name));
            }
        }
        Ok(Self {
            table: Table::new(functions),
            segments,
        })
    }

    fn address(&self, offset: u64) -> Option<u64> {
        let segment = self
            .segments
            .iter()
            .find(|(start, len, _)| (*start..start + len).contains(&offset));
        segment.map(|(start, _, address)| offset - start + address)
    }
}

fn functions(file: &object::File<'_>, place: &str) -> Vec<(u64, u64, Symbol)> {
    file.symbols()
        .chain(file.dynamic_symbols())
        .filter(|s| s.is_definition() && matches!(s.kind(), SymbolKind::Text))
        .filter_map(|s| {
            let name = s.name().ok().filter(|n| !n.is_empty())?;
            let symbol = Symbol {
                place: place.into(),
                name: readable(name),
            };
            Some((s.address(), s.size(), symbol))
        })
        .collect()
}

fn parse_kallsyms(text: &str) -> Table {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let at = u64::from_str_radix(words.next()?, 16).ok()?;
        if !matches!(words.next()?, "t" | "T" | "w" | "W") || at < KERNEL {
            return None;
        }
        let name = words.next()?;
        let symbol = Symbol {
            place: words.next().unwrap_or("kernel").into(),
            name: readable(name),
        };
        Some((at, 0, symbol))
    };
    Table::new(text.lines().filter_map(parse).collect())
}

fn parse_maps(text: &str) -> Vec<Mapping> {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let rights = words.next()?;
        let offset = u64::from_str_radix(words.next()?, 16).ok()?;
        let path = words.nth(2)?;
        rights.contains('x').then_some(())?;
        Some(Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            offset,
            path: path.into(),
        })
    };
    text.lines().filter_map(parse).collect()
}

fn file_name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).into()
}

/// A name as its programmer wrote it, if that was in Rust; without the hash, and without what
/// compilers add for parts and copies of functions.
fn readable(name: &str) -> String {
    let name = match name.split_once('.') {
        // Old names of Rust's have dots in them.
        Some((whole, _)) if !whole.is_empty() && !name.starts_with("_ZN") => whole,
        _ => name,
    };
    format!("{:#}", rustc_demangle::demangle(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KALLSYMS: &str = "\
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000100 T __x64_sys_read
ffffffff81000180 t copy_page.constprop.0
ffffffff81000200 D some_data
ffffffff82000000 R some_constant
ffffffffc0000000 t _RNvNtCs1234_5pmskb5frame4free\t[pmskb]
ffffffffc0000040 t e1000_clean\t[e1000e]
0000000000000000 A per_cpu_thing
";

    fn symbols(maps: &str, directories: &[PathBuf]) -> Symbols {
        Symbols::new(KALLSYMS, maps, directories).unwrap()
    }

    fn name(symbols: &Symbols, at: u64) -> (String, String, bool) {
        let (symbol, first) = symbols.find(at);
        (symbol.place, symbol.name, first)
    }

    #[test]
    fn the_kernel_and_its_modules() {
        let s = symbols("", &[]);
        let is = |place: &str, name: &str, first| (place.into(), name.into(), first);
        assert_eq!(name(&s, 0xffff_ffff_8100_0000), is("kernel", "_text", true));
        assert_eq!(
            name(&s, 0xffff_ffff_8100_0100),
            is("kernel", "__x64_sys_read", true)
        );
        assert_eq!(
            name(&s, 0xffff_ffff_8100_017f),
            is("kernel", "__x64_sys_read", false)
        );
        assert_eq!(
            name(&s, 0xffff_ffff_8100_0181),
            is("kernel", "copy_page", false)
        );
        assert_eq!(
            name(&s, 0xffff_ffff_c000_0001),
            is("[pmskb]", "pmskb::frame::free", false)
        );
        assert_eq!(
            name(&s, 0xffff_ffff_c000_0040),
            is("[e1000e]", "e1000_clean", true)
        );
        assert_eq!(name(&s, 0xffff_ffff_8000_0000), is("kernel", "?", false));
        assert_eq!(name(&s, 0x1000), is("another process", "?", false));
    }

    #[test]
    fn sizes_end_functions() {
        let symbol = |name: &str| Symbol {
            place: "x".into(),
            name: name.into(),
        };
        let table = Table::new(vec![
            (0x20, 8, symbol("b")),
            (0x10, 0x40, symbol("long")),
            (0x40, 0, symbol("last")),
        ]);
        assert_eq!(table.find(0xf), None);
        assert_eq!(table.find(0x1f).unwrap().0.name, "long");
        assert_eq!(table.find(0x27).unwrap().0.name, "b");
        assert_eq!(table.find(0x28), None);
        assert_eq!(table.find(u64::MAX - 1).unwrap().0.name, "last");
    }

    /// A function that has a name in this very program.
    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn pmskb_meter_landmark() -> u32 {
        std::hint::black_box(7)
    }

    #[test]
    fn a_process_finds_itself() {
        let program = std::env::current_exe().unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let s = symbols(&maps, &[program.parent().unwrap().into()]);
        let at = pmskb_meter_landmark as usize as u64;
        assert_eq!(pmskb_meter_landmark(), 7);
        let (symbol, first) = s.find(at);
        assert_eq!(symbol.name, "pmskb_meter_landmark");
        assert!(first);
        assert_eq!(symbol.place, program.file_name().unwrap().to_str().unwrap());
        assert!(!s.find(at + 1).1);
    }

    #[test]
    fn names_are_readable() {
        assert_eq!(readable("tcp_ack.part.0"), "tcp_ack");
        assert_eq!(readable("memcpy"), "memcpy");
        assert_eq!(
            readable(
                "_ZN58_$LT$alloc..string..String$u20$as$u20$core..fmt..Write$GT$9write_str17h0123456789abcdefE"
            ),
            "<alloc::string::String as core::fmt::Write>::write_str"
        );
        assert_eq!(
            readable("_ZN4core3ptr4read17h0123456789abcdefE"),
            "core::ptr::read"
        );
    }
}
