// SPDX-License-Identifier: GPL-2.0-only
//! The plugin's arguments.

use crate::cache::Cache;
use pmskb_tcg::args::{self, number};
use std::path::PathBuf;

/// All arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// The windows' files: this, the window's number and `.json`.
    pub out: PathBuf,
    /// The guest-physical address at which the persistent memory begins.
    pub base: u64,
    /// Its length.
    pub size: u64,
    /// The byte that payload is made of.
    pub fill: Option<u8>,
    /// Which accesses are looked at.
    pub memory: Accesses,
    /// Size of the modelled cache, if there is one, and its ways.
    pub cache: Option<(u64, usize)>,
}

/// Which accesses to memory are looked at: the more, the slower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accesses {
    /// Loads and stores.
    All,
    /// Stores.
    Stores,
    /// None: what is counted is instructions, flushes and fences.
    None,
}

impl Args {
    /// Parses the arguments as QEMU hands them over, each `key=value`.
    pub fn parse<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut out = None;
        let mut parsed = Self {
            out: PathBuf::new(),
            base: 1 << 32,
            size: 256 << 20,
            fill: None,
            memory: Accesses::All,
            cache: None,
        };
        let (mut size, mut ways) = (None, 16);
        for (key, value) in args::pairs(args)? {
            let bad = || format!("{key}={value}: not a number that fits");
            let number = || number(value).ok_or_else(bad);
            match key {
                "out" if !value.is_empty() => out = Some(PathBuf::from(value)),
                "base" => parsed.base = number()?,
                "size" => parsed.size = number()?,
                "fill" => parsed.fill = Some(number()?.try_into().map_err(|_| bad())?),
                "cache" => size = Some(number()?),
                "ways" => ways = number()?.try_into().map_err(|_| bad())?,
                "memory" => {
                    parsed.memory = match value {
                        "all" => Accesses::All,
                        "stores" => Accesses::Stores,
                        "none" => Accesses::None,
                        _ => return Err(format!("memory={value}: all, stores or none")),
                    }
                }
                _ => return Err(format!("{key}= is unknown, or empty")),
            }
        }
        parsed.out = out.ok_or("out=PREFIX, where windows are written, is missing")?;
        if (parsed.base | parsed.size) % 64 != 0 || parsed.size == 0 {
            return Err("the persistent memory is not whole cache lines".into());
        }
        if let Some(size) = size {
            if Cache::new(size, ways).is_none() {
                return Err(format!(
                    "cache={size},ways={ways}: not whole lines in each way"
                ));
            }
            if parsed.memory != Accesses::All {
                return Err("cache= needs memory=all".into());
            }
            parsed.cache = Some((size, ways));
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split(','))
    }

    #[test]
    fn all_of_them() {
        let a = parse("out=/x/w,base=0x200000000,size=512M,fill=0x7e,memory=stores").unwrap();
        assert_eq!((a.base, a.size), (2 << 32, 512 << 20));
        assert_eq!((a.fill, a.memory), (Some(0x7e), Accesses::Stores));
        let a = parse("out=w").unwrap();
        assert_eq!((a.base, a.fill), (1 << 32, None));
        assert_eq!(a.memory, Accesses::All);
        assert_eq!(a.cache, None);
        let a = parse("out=w,cache=2M").unwrap();
        assert_eq!(a.cache, Some((2 << 20, 16)));
        let a = parse("out=w,ways=8,cache=1M").unwrap();
        assert_eq!(a.cache, Some((1 << 20, 8)));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, says) in [
            ("size=1M", "out=PREFIX"),
            ("out=", "out="),
            ("out=w,out=w", "twice"),
            ("out=w,fill=300", "fill=300"),
            ("out=w,size=-1", "size=-1"),
            ("out=w,size=0", "whole cache lines"),
            ("out=w,base=33", "whole cache lines"),
            ("out=w,size=20000000000000G", "not a number"),
            ("out=w,memory=some", "memory=some"),
            ("out=w,cache=1000", "whole lines"),
            ("out=w,cache=1M,ways=0", "whole lines"),
            ("out=w,cache=1M,memory=stores", "memory=all"),
            ("out=w,stray", "stray"),
            ("out=w,pm=x", "pm= is unknown"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
