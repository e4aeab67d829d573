// SPDX-License-Identifier: GPL-2.0-only
//! The plugin's arguments.

use pmskb_tcg::args::{self, number};
use std::path::PathBuf;

/// All arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// The NVDIMM's backing file.
    pub pm: PathBuf,
    /// The guest-physical address at which the file begins.
    pub base: u64,
    /// The length of the label area at the end of the file.
    pub label: u64,
    /// Where the trace is written.
    pub out: PathBuf,
    /// The start of the guest's direct map, for a guest with KASLR.
    pub directmap: Option<u64>,
}

impl Args {
    /// Parses the arguments as QEMU hands them over, each `key=value`.
    pub fn parse<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let (mut pm, mut out) = (None, None);
        let mut parsed = Self {
            pm: PathBuf::new(),
            base: 1 << 32,
            label: 128 << 10,
            out: PathBuf::new(),
            directmap: None,
        };
        for (key, value) in args::pairs(args)? {
            let number =
                || number(value).ok_or_else(|| format!("{key}={value}: not a number that fits"));
            match key {
                "pm" if !value.is_empty() => pm = Some(PathBuf::from(value)),
                "out" if !value.is_empty() => out = Some(PathBuf::from(value)),
                "base" => parsed.base = number()?,
                "label" => parsed.label = number()?,
                "directmap" => parsed.directmap = Some(number()?),
                _ => return Err(format!("{key}= is unknown, or empty")),
            }
        }
        parsed.pm = pm.ok_or("pm=FILE, the NVDIMM's backing file, is missing")?;
        parsed.out = out.ok_or("out=FILE, where the trace is written, is missing")?;
        if parsed.base % 64 != 0 {
            return Err(format!("base={:#x} is inside a cache line", parsed.base));
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
        let a =
            parse("pm=x.img,out=t,base=0x200000000,label=0,directmap=0xff20000000000000").unwrap();
        assert_eq!((a.base, a.label), (2 << 32, 0));
        assert_eq!(a.directmap, Some(0xff20_0000_0000_0000));
        let a = parse("pm=x.img,out=t").unwrap();
        assert_eq!((a.base, a.label, a.directmap), (1 << 32, 128 << 10, None));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, says) in [
            ("out=t", "pm=FILE"),
            ("pm=x", "out=FILE"),
            ("pm=,out=t", "pm="),
            ("pm=x,out=t,out=t", "twice"),
            ("pm=x,out=t,stray", "stray"),
            ("pm=x,out=t,lose=all", "lose= is unknown"),
            ("pm=x,out=t,base=33", "inside"),
            ("pm=x,out=t,label=-1", "label=-1"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
