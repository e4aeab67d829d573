// SPDX-License-Identifier: GPL-2.0-only

//! Checks a store's media, and mends what can be.

use std::{collections::HashSet, path::Path, process::ExitCode, time::Duration};

use anyhow::{bail, Context};
use clap::{Args, ValueEnum};
use pmskb_uapi::{
    catalog::{describe, find},
    core::{Error, Inspector, Pmem},
    Direct, Store,
};
use serde_json::{json, Value};

use crate::{
    admin::the_store,
    examine::{examine, Examined, Finding, Fix, What},
    select::Filter,
    source::Source,
    status::device_of,
    text,
};

/// Arguments of `fsck`.
#[derive(Args)]
pub struct Fsck {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store, conflicts_with = "image")]
    store: Option<u32>,
    /// Mend what can be; of an image, or of a device whose store is not attached
    ///
    /// "structure" loses nothing that could still be read: superblocks, batches, the
    /// map. "records" also removes records that are damaged, and says which.
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "WHAT",
          default_missing_value = "structure")]
    repair: Option<Repair>,
    /// Only say what is wrong
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    source: Source,
}

/// What may be mended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, ValueEnum)]
enum Repair {
    /// What loses nothing
    Structure,
    /// Also what loses damaged records
    Records,
}

/// Exit statuses, as of fsck(8).
const REPAIRED: u8 = 1;
const UNCORRECTED: u8 = 4;
/// It could not be done.
pub const OPERATIONAL: u8 = 8;

/// Checks, and mends if that is wanted.
pub fn fsck(a: &Fsck, json: bool) -> anyhow::Result<ExitCode> {
    match &a.source.image {
        Some(path) => offline(a, path, json),
        None => attached(a, json),
    }
}

/// Of an attached store: only looks.
fn attached(a: &Fsck, json: bool) -> anyhow::Result<ExitCode> {
    let minor = the_store(a.store)?;
    let device = device_of(minor).map_or("DEVICE".into(), |d| format!("/dev/{d}"));
    if a.repair.is_some() {
        bail!(
            "pmskb{minor} is attached, and is not repaired like that\n  `pmskbctl detach pmskb{minor}`, \
             then `pmskbctl fsck --image {device} --repair`"
        );
    }
    let store = Store::open_minor(minor)?;
    let info = store.info()?.raw;
    let read_only = info.flags & pmskb_uapi::sys::PMSKB_STORE_READ_ONLY != 0;
    let what = What {
        filter: &a.filter,
        changing: !read_only,
        attached: true,
    };
    let open = || {
        Direct::open(store.path(), false)
            .with_context(|| format!("cannot read {}", store.path().display()))
    };
    let failed = |e| anyhow::anyhow!("{}: {}", store.path().display(), describe(e));
    let mut found = examine(open()?, &what).map_err(failed)?;
    if what.changing && !found.findings.is_empty() {
        // What was being written when it was looked at is right the next time.
        std::thread::sleep(Duration::from_millis(100));
        let name = |f: &Finding| (f.kind, f.offset, f.seq);
        let before: HashSet<_> = found.findings.iter().map(name).collect();
        found = examine(open()?, &what).map_err(failed)?;
        found.findings.retain(|f| before.contains(&name(f)));
    }
    for finding in &found.findings {
        show(a, finding, "", json);
    }
    let problems = found.findings.iter().filter(|f| f.problem).count() as u64;
    summary(a, &found, problems, 0, json);
    if problems > 0 && !json {
        eprintln!(
            "pmskbctl: to mend what can be: `pmskbctl detach pmskb{minor}`, then \
             `pmskbctl fsck --image {device} --repair`"
        );
    }
    Ok(ExitCode::from(if problems > 0 { UNCORRECTED } else { 0 }))
}

/// Of an image, or a device whose store is not attached.
fn offline(a: &Fsck, path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let what = What {
        filter: &a.filter,
        changing: false,
        attached: false,
    };
    // What is done to look at it stays in memory.
    let Some(found) = look(a, path, &what, json)? else {
        return Ok(ExitCode::from(UNCORRECTED));
    };
    let problems = found.findings.iter().filter(|f| f.problem).count() as u64;
    let Some(repair) = a.repair else {
        for finding in &found.findings {
            show(a, finding, "", json);
        }
        summary(a, &found, problems, 0, json);
        if problems > 0 && !json {
            eprintln!("pmskbctl: --repair mends what can be");
        }
        return Ok(ExitCode::from(if problems > 0 { UNCORRECTED } else { 0 }));
    };
    let cannot = || format!("cannot repair {}", path.display());
    let file = Direct::open(path, true).with_context(cannot)?;
    let failed = |e| anyhow::anyhow!("{}: {}", cannot(), describe(e));
    let (media, _) = find(&file, a.source.place()).map_err(failed)?;
    mend(media, &found, repair).map_err(failed)?;
    file.sync().with_context(cannot)?;
    drop(file);
    // Whether it is as it should be is for another look to say.
    let Some(now) = look(a, path, &what, json)? else {
        return Ok(ExitCode::from(UNCORRECTED));
    };
    let name = |f: &Finding| (f.kind, f.offset);
    let left: HashSet<_> = now.findings.iter().map(name).collect();
    for finding in &found.findings {
        let kept = left.contains(&name(finding));
        show(
            a,
            finding,
            if kept { "left" } else { outcome(&finding.fix) },
            json,
        );
    }
    let before: HashSet<_> = found.findings.iter().map(name).collect();
    for finding in now.findings.iter().filter(|f| !before.contains(&name(f))) {
        show(a, finding, "left", json);
    }
    let uncorrected = now.findings.iter().filter(|f| f.problem).count() as u64;
    let repaired = problems.saturating_sub(uncorrected);
    summary(a, &now, uncorrected, repaired, json);
    if uncorrected > 0 && repair < Repair::Records && !json {
        eprintln!(
            "pmskbctl: --repair=records also removes records that are damaged; `pmskbctl get` writes \
             what can be read of them"
        );
    }
    Ok(ExitCode::from(match (uncorrected, problems) {
        (0, 0) => 0,
        (0, _) => REPAIRED,
        _ => UNCORRECTED,
    }))
}

/// Looks at an image. `None` if it has no superblock to begin with, which is said.
fn look(a: &Fsck, path: &Path, what: &What<'_>, json: bool) -> anyhow::Result<Option<Examined>> {
    let file = Direct::open(path, false).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => anyhow::anyhow!(
            "{} is in use\n  if its store is attached, `pmskbctl list` tells its name: check that",
            path.display()
        ),
        _ => anyhow::anyhow!("cannot read {}: {e}", path.display()),
    })?;
    let media = match find(&file, a.source.place()) {
        Ok((media, _)) => media,
        Err(e @ (Error::Damaged | Error::Io)) => {
            let meaning = "no superblock can be used: nothing tells where anything is";
            if json {
                println!(
                    "{}",
                    json!({ "finding": "superblocks", "problem": true, "meaning": meaning, "error": describe(e) })
                );
            } else {
                println!("{meaning}: {}", describe(e));
            }
            return Ok(None);
        }
        Err(Error::NotFormatted) => bail!(
            "{}: no store found\n  if its first superblock is damaged, say where the region is with \
             --offset and --length",
            path.display()
        ),
        Err(e) => bail!("{}: {}", path.display(), describe(e)),
    };
    let found = examine(media, what);
    found
        .map(Some)
        .map_err(|e| anyhow::anyhow!("{}: {}", path.display(), describe(e)))
}

/// What a fix has done, when it worked.
fn outcome(fix: &Fix) -> &'static str {
    match fix {
        Fix::None => "gone",
        Fix::Kill(..) | Fix::Unmap(_, true) => "removed",
        _ => "repaired",
    }
}

/// Mends what may be.
fn mend<P: Pmem>(media: P, found: &Examined, repair: Repair) -> pmskb_uapi::core::Result<()> {
    let (mut inspector, _) = Inspector::new(media)?;
    let fixes = || found.findings.iter().map(|f| f.fix);
    if fixes().any(|fix| matches!(fix, Fix::Superblocks)) {
        inspector.rewrite_superblocks()?;
    }
    // Always: the map and records are to be changed as they are afterwards.
    inspector.end_batches()?;
    for fix in fixes() {
        match fix {
            Fix::Unmap(frame, lost) if !lost || repair == Repair::Records => {
                inspector.set_mapped(frame, false)?;
            }
            Fix::Map(frame) => inspector.set_mapped(frame, true)?,
            _ => {}
        }
    }
    inspector.pm().fence();
    if repair < Repair::Records || !fixes().any(|fix| matches!(fix, Fix::Kill(..))) {
        return Ok(());
    }
    // Older records with a key first, so that none comes back.
    for (frame, line) in &found.replaced {
        inspector.kill(frame, *line)?;
    }
    inspector.pm().fence();
    for fix in fixes() {
        if let Fix::Kill(frame, line) = fix {
            inspector.kill(&frame, line)?;
        }
    }
    inspector.pm().fence();
    Ok(())
}

/// Prints a finding. `done`: what became of it.
fn show(a: &Fsck, f: &Finding, done: &str, json: bool) {
    let key = f.key.as_deref();
    if json {
        println!(
            "{}",
            json!({
                "finding": f.kind,
                "problem": f.problem,
                "meaning": f.meaning,
                "offset": f.offset,
                "seq": f.seq,
                "key": key.map(text::key),
                "key_hex": key.map(text::hex),
                "outcome": if done.is_empty() { Value::Null } else { done.into() },
            })
        );
        return;
    }
    if a.quiet && !f.problem {
        return;
    }
    let mut line = format!("{:#x}: ", f.offset);
    if let Some(seq) = f.seq {
        let key = key.map_or("(no key)".into(), text::key);
        line += &format!("record {seq} {key}: ");
    }
    line += &f.meaning;
    if !done.is_empty() {
        line += &format!(": {done}");
    }
    println!("{line}");
}

fn summary(a: &Fsck, e: &Examined, problems: u64, repaired: u64, json: bool) {
    if json {
        println!(
            "{}",
            json!({
                "record_frames": e.frames,
                "records": e.records,
                "keys": e.keys,
                "live_bytes": e.live_bytes,
                "superseded": e.superseded,
                "truncated": e.truncated,
                "killed": e.killed,
                "torn": e.torn,
                "checked": e.checked,
                "checked_bytes": e.checked_bytes,
                "shared_bytes": e.shared_bytes,
                "problems": problems,
                "repaired": repaired,
            })
        );
    } else if !a.quiet || problems > 0 || repaired > 0 {
        println!(
            "{} records in {} frames, {}; {} checked, {}: {} problems{}",
            text::count(e.records),
            text::count(e.frames),
            text::size(e.live_bytes),
            text::count(e.checked),
            text::size(e.checked_bytes),
            text::count(problems),
            match repaired {
                0 => String::new(),
                n => format!(", {} mended", text::count(n)),
            },
        );
    }
}
