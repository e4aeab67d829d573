// SPDX-License-Identifier: GPL-2.0-only
//! The plugin's arguments.

use crate::model::{LINE, Lose};
use pmskb_tcg::args;
use std::path::PathBuf;

/// A kind of event that a cut can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fence that commits something.
    Fence,
    /// A write-back of a line of the region.
    Flush,
    /// A store to the region.
    Store,
    /// A mark.
    Mark,
}

impl Event {
    /// The name that `cut=` and the statistics use.
    pub fn name(self) -> &'static str {
        match self {
            Event::Fence => "fence",
            Event::Flush => "flush",
            Event::Store => "store",
            Event::Mark => "mark",
        }
    }
}

/// When the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The kind of event.
    pub event: Event,
    /// The cut comes right after this many of them.
    pub after: u64,
}

/// Which plain memory accesses get a callback, only to be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub enum Count {
    /// None: the cheap way.
    None,
    /// Stores.
    Stores,
    /// Stores and loads.
    All,
}

/// All arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// The NVDIMM's backing file.
    pub pm: PathBuf,
    /// The guest-physical address at which the file begins.
    pub base: u64,
    /// The length of the label area at the end of the file.
    pub label: u64,
    /// Where the image that the cut leaves is written.
    pub out: Option<PathBuf>,
    /// Where the statistics are written.
    pub stats: Option<PathBuf>,
    /// What is lost.
    pub lose: Lose,
    /// The seed of [`Lose::Random`].
    pub seed: u64,
    /// Further outcomes of the same cut, and their seeds: an image each.
    pub more: Vec<(Lose, u64)>,
    /// When the power goes; without it, when QEMU exits.
    pub cut: Option<Cut>,
    /// Whether events count for the cut only from the first mark on.
    pub arm: bool,
    /// What is counted at a price.
    pub count: Count,
    /// Whether locked instructions drain as fences do, as they do on hardware.
    pub locked: bool,
    /// The start of the guest's direct map, for a guest with KASLR.
    pub directmap: Option<u64>,
}

impl Args {
    /// Parses the arguments as QEMU hands them over, each `key=value`.
    pub fn parse<'a>(args: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut pm = None;
        let mut parsed = Self {
            pm: PathBuf::new(),
            base: 1 << 32,
            label: 128 << 10,
            out: None,
            stats: None,
            lose: Lose::All,
            seed: 0,
            more: Vec::new(),
            cut: None,
            arm: false,
            count: Count::None,
            locked: false,
            directmap: None,
        };
        for (key, value) in args::pairs(args)? {
            match key {
                "pm" => pm = Some(path(key, value)?),
                "out" => parsed.out = Some(path(key, value)?),
                "stats" => parsed.stats = Some(path(key, value)?),
                "base" => parsed.base = number(key, value)?,
                "label" => parsed.label = number(key, value)?,
                "seed" => parsed.seed = number(key, value)?,
                "directmap" => parsed.directmap = Some(number(key, value)?),
                "lose" => parsed.lose = lose(key, value)?,
                "more" => {
                    for one in value.split('+') {
                        let (how, seed) = one.split_once(':').unwrap_or((one, "0"));
                        parsed.more.push((lose(key, how)?, number(key, seed)?));
                    }
                }
                "count" => {
                    parsed.count = match value {
                        "none" => Count::None,
                        "stores" => Count::Stores,
                        "all" => Count::All,
                        _ => return Err(format!("count={value}: none, stores or all")),
                    }
                }
                "drain" => {
                    parsed.locked = match value {
                        "fences" => false,
                        "locked" => true,
                        _ => return Err(format!("drain={value}: fences or locked")),
                    }
                }
                "arm" => {
                    if value != "mark" {
                        return Err(format!("arm={value}: mark is all there is"));
                    }
                    parsed.arm = true;
                }
                "cut" => parsed.cut = Some(cut(value)?),
                _ => return Err(format!("{key}= is unknown")),
            }
        }
        parsed.pm = pm.ok_or("pm=FILE, the NVDIMM's backing file, is missing")?;
        if parsed.out.is_none() && !parsed.more.is_empty() {
            return Err("more= does nothing without out=".into());
        }
        if parsed.base % LINE as u64 != 0 {
            return Err(format!("base={:#x} is inside a cache line", parsed.base));
        }
        if parsed.arm && parsed.cut.is_none() {
            return Err("arm=mark does nothing without cut=".into());
        }
        if parsed.cut.is_some_and(|c| c.event == Event::Store) {
            // Without callbacks for stores that event would never come.
            parsed.count = match parsed.count {
                Count::None => Count::Stores,
                more => more,
            };
        }
        Ok(parsed)
    }
}

fn lose(key: &str, value: &str) -> Result<Lose, String> {
    match value {
        "all" => Ok(Lose::All),
        "none" => Ok(Lose::None),
        "random" => Ok(Lose::Random),
        _ => Err(format!("{key}={value}: all, none or random")),
    }
}

fn cut(value: &str) -> Result<Cut, String> {
    let bad = || format!("cut={value}: fence:N, flush:N, store:N or mark:N with N > 0");
    let (event, after) = value.split_once(':').ok_or_else(bad)?;
    let event = match event {
        "fence" => Event::Fence,
        "flush" => Event::Flush,
        "store" => Event::Store,
        "mark" => Event::Mark,
        _ => return Err(bad()),
    };
    let after = after.parse().map_err(|_| bad())?;
    if after == 0 {
        return Err(bad());
    }
    Ok(Cut { event, after })
}

fn path(key: &str, value: &str) -> Result<PathBuf, String> {
    if value.is_empty() {
        return Err(format!("{key}= is empty"));
    }
    Ok(PathBuf::from(value))
}

fn number(key: &str, value: &str) -> Result<u64, String> {
    args::number(value).ok_or_else(|| format!("{key}={value}: not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split(','))
    }

    #[test]
    fn defaults() {
        let a = parse("pm=x.img").unwrap();
        assert_eq!((a.base, a.label, a.seed), (0x1_0000_0000, 0x2_0000, 0));
        assert_eq!(
            (a.lose, a.count, a.cut, a.arm),
            (Lose::All, Count::None, None, false)
        );
    }

    #[test]
    fn all_of_them() {
        let a = parse(
            "pm=x,out=o,stats=s,base=0x200000000,label=0,lose=random,seed=7,cut=fence:12,arm=mark,\
             count=all,drain=locked,directmap=0xff20000000000000,more=none+random:3",
        )
        .unwrap();
        assert_eq!(a.base, 0x2_0000_0000);
        assert!(a.locked);
        assert_eq!(a.more, [(Lose::None, 0), (Lose::Random, 3)]);
        assert_eq!(
            a.cut,
            Some(Cut {
                event: Event::Fence,
                after: 12
            })
        );
        assert_eq!(a.directmap, Some(0xff20_0000_0000_0000));
        assert_eq!(
            (a.lose, a.seed, a.arm, a.count),
            (Lose::Random, 7, true, Count::All)
        );
    }

    #[test]
    fn a_cut_at_a_store_counts_stores() {
        assert_eq!(parse("pm=x,cut=store:1").unwrap().count, Count::Stores);
        assert_eq!(
            parse("pm=x,cut=store:1,count=all").unwrap().count,
            Count::All
        );
        assert_eq!(parse("pm=x,cut=flush:1").unwrap().count, Count::None);
    }

    #[test]
    fn mistakes_are_named() {
        for (line, says) in [
            ("out=x", "pm=FILE"),
            ("pm=", "empty"),
            ("pm=x,pm=y", "twice"),
            ("pm=x,loose=all", "loose= is unknown"),
            ("pm=x,stray", "stray"),
            ("pm=x,lose=some", "lose=some"),
            ("pm=x,out=o,more=none+some", "more=some"),
            ("pm=x,out=o,more=random:x", "more=x"),
            ("pm=x,more=none", "without out="),
            ("pm=x,seed=-1", "seed=-1"),
            ("pm=x,seed=", "seed="),
            ("pm=x,base=33", "inside"),
            ("pm=x,base=20000000000000G", "not a number"),
            ("pm=x,cut=fence", "cut=fence"),
            ("pm=x,cut=fence:0", "N > 0"),
            ("pm=x,cut=load:1", "cut=load"),
            ("pm=x,count=loads", "count=loads"),
            ("pm=x,drain=all", "drain=all"),
            ("pm=x,arm=now,cut=mark:1", "arm=now"),
            ("pm=x,arm=mark", "without cut="),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
