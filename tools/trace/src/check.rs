// SPDX-License-Identifier: GPL-2.0-only
//! Recovers an image, as the module would, and compares what is there with the ledger.

use crate::ledger::{Found, Ledger, State};
use crate::media::Media;
use crate::work::Rng;
use pmskb_core::host::{self, HostFrames};
use pmskb_core::{
    AreaState, Direction, FRAME_SIZE, Frame, FrameFound, Inspector, LineFound, Record,
    RecoverOptions, Store, Verdict, probe,
};
use std::collections::BTreeSet;

type Recovered<'a> = Store<&'a Media, HostFrames, Vec<u64>>;

/// Memory that checks use again and again.
#[derive(Default)]
pub struct Scratch {
    object: Vec<u8>,
    used: BTreeSet<u64>,
}

/// Recovers an image and compares; what was wrong. The image is left as recovery left it. If
/// `closes`, it is closed, looked at piece by piece, and recovered again.
///
/// What recovery read is told by `media` afterwards, see [`Media::seen`].
pub fn check(
    media: &Media,
    ledger: &Ledger,
    closes: bool,
    scratch: &mut Scratch,
) -> Result<(), String> {
    media.watch();
    let store = recover(media)?;
    let state = look(&store, scratch)?;
    media.look_away();
    ledger.check(&state)?;
    space(&store, scratch)?;
    if closes {
        again(store, media, &state, scratch)?;
    }
    Ok(())
}

/// Cuts the recovery of an image short, and checks what that leaves; `stores` and `fences` are
/// those that a whole recovery makes.
pub fn check_cut(
    media: &Media,
    ledger: &Ledger,
    (stores, fences): (u64, u64),
    rng: &mut Rng,
    scratch: &mut Scratch,
) -> Result<(), String> {
    media.watch();
    media.look_away();
    // Before a fence there is most to lose.
    if rng.chance(1, 2) {
        media.stop_after_fences(rng.below(fences));
    } else {
        media.stop_after(rng.below(stores + 1));
    }
    // What it leaves is what matters.
    drop(recover(media));
    let all = rng.chance(1, 3);
    media.crash(|| all || rng.chance(1, 2));
    let after = |error| format!("after a crash in recovery: {error}");
    let store = recover(media).map_err(after)?;
    let state = look(&store, scratch).map_err(after)?;
    ledger.check(&state).map_err(after)?;
    space(&store, scratch).map_err(after)
}

fn recover(media: &Media) -> Result<Recovered<'_>, String> {
    let fail = |error| format!("recovery: {error:?}");
    let geo = probe(media).map_err(fail)?.superblock.geometry;
    let frames = HostFrames::new(&geo).map_err(fail)?;
    let work = vec![0; Recovered::WORK_WORDS];
    let (store, report) =
        Store::recover(media, frames, work, host::list, RecoverOptions::default()).map_err(fail)?;
    if report.damaged_frames + report.bad_extents + report.unreadable > 0 {
        return Err(format!("a crash is taken for damage: {report:?}"));
    }
    Ok(store)
}

/// All records, in the order of the log; each is intact, and the index leads to it.
fn look(store: &Recovered<'_>, scratch: &mut Scratch) -> Result<State, String> {
    let fail = |error| format!("reading: {error:?}");
    let (pm, geo) = (store.pm(), store.geometry());
    let mut state = State {
        truncated: store.stats().trunc_seq,
        last: store.stats().durable_seq,
        found: Vec::new(),
    };
    let mut part = [0; 4096];
    let mut keys = 0;
    let mut next = store.log_from(0).map_err(fail)?;
    while let Some(record) = next {
        if state
            .found
            .last()
            .is_some_and(|last| last.seq >= record.seq)
        {
            return Err(format!("the log goes back at {}", record.seq));
        }
        match record.verify(pm, geo, &mut part) {
            Ok(Verdict::Intact) => {}
            other => return Err(format!("record {} is torn: {other:?}", record.seq)),
        }
        scratch.object.resize(record.len as usize, 0);
        let read = record.read(pm, geo, 0, &mut scratch.object);
        if read != Ok(record.len as usize) {
            return Err(format!("record {} cannot be read: {read:?}", record.seq));
        }
        let key = record.keyed().then(|| key_of(store, &record)).transpose()?;
        if let Some(key) = &key {
            keys += 1;
            if store.lookup(key) != Ok(Some(record.loc)) {
                return Err(format!("the index does not lead to record {}", record.seq));
            }
        }
        state.found.push(Found {
            key,
            seq: record.seq,
            len: record.len,
            crc: crc32c::crc32c(&scratch.object),
        });
        next = store.log_after(&record).map_err(fail)?;
    }
    // The index has those keys, in order, and no other.
    let mut at: Option<Vec<u8>> = None;
    while let Some(loc) = store
        .seek(at.as_deref(), false, Direction::Forward)
        .map_err(fail)?
    {
        let key = key_of(store, &store.record(loc).map_err(fail)?)?;
        if at.as_ref().is_some_and(|at| *at >= key) {
            return Err("the index is out of order".into());
        }
        keys -= 1;
        at = Some(key);
    }
    if keys != 0 {
        return Err("the index has other keys than the log".into());
    }
    Ok(state)
}

fn key_of(store: &Recovered<'_>, record: &Record) -> Result<Vec<u8>, String> {
    let mut key = vec![0; usize::from(record.key_len.unwrap_or(0))];
    match record.read_key(store.pm(), 0, &mut key) {
        Ok(n) if n == key.len() => Ok(key),
        other => Err(format!(
            "a key of record {} cannot be read: {other:?}",
            record.seq
        )),
    }
}

/// Whether each frame is free or has a reason not to be.
fn space(store: &Recovered<'_>, scratch: &mut Scratch) -> Result<(), String> {
    let fail = |error| format!("adding up the space: {error:?}");
    let used = &mut scratch.used;
    used.clear();
    let (mut records, mut bytes, mut keys) = (0, 0, 0);
    let mut next = store.log_from(0).map_err(fail)?;
    while let Some(record) = next {
        used.insert(record.loc.0 / FRAME_SIZE);
        for extent in record.extents(store.pm(), store.geometry()) {
            let extent = extent.map_err(fail)?;
            used.extend(extent.frames().map(|frame| u64::from(frame.0)));
        }
        if let Some(extent) = record.key_extent(store.pm()).map_err(fail)? {
            used.extend(extent.frames().map(|frame| u64::from(frame.0)));
            keys += u64::from(extent.len);
        }
        records += 1;
        bytes += u64::from(record.len);
        next = store.log_after(&record).map_err(fail)?;
    }
    let stats = store.stats();
    let counts = store.frames().0.borrow().counts();
    if (stats.records, stats.live_bytes) != (records, bytes) {
        return Err(format!("{stats:?}, but {records} records, {bytes} bytes"));
    }
    // No two records of the load share bytes.
    let payload = u64::from(counts.payload) * FRAME_SIZE;
    if payload != bytes + keys + counts.slack {
        return Err(format!(
            "{payload} bytes in payload frames: {bytes} of records, {keys} of keys, {} of none",
            counts.slack
        ));
    }
    let busy = u64::from(counts.owned + counts.held);
    let right = used.len() as u64 + stats.list_frames + stats.index_frames;
    if busy != right + stats.empty_frames {
        return Err(format!(
            "frames leak: {busy} are in use, {right} have a reason: {stats:?}"
        ));
    }
    Ok(())
}

/// Closes it, looks at what is on the media piece by piece, and recovers it again: it holds what
/// it held.
fn again(
    store: Recovered<'_>,
    media: &Media,
    before: &State,
    scratch: &mut Scratch,
) -> Result<(), String> {
    let (closed, ..) = store.close();
    closed.map_err(|error| format!("closing: {error:?}"))?;
    inspect(media)?;
    let store = recover(media).map_err(|error| format!("again: {error}"))?;
    let now = look(&store, scratch).map_err(|error| format!("again: {error}"))?;
    if now != *before {
        return Err("another recovery finds something else".into());
    }
    space(&store, scratch)
}

/// What a checker looks at: superblocks, batch areas, map, headers, lines.
fn inspect(media: &Media) -> Result<(), String> {
    let fail = |error| format!("inspecting: {error:?}");
    let (inspector, found) = Inspector::new(media).map_err(fail)?;
    if found.first.or(found.last).is_some() || found.stale {
        return Err(format!(
            "after recovery the superblocks are {:?} and {:?}",
            found.first, found.last
        ));
    }
    for state in inspector.areas().map_err(fail)? {
        if !matches!(state, AreaState::Ended | AreaState::InForce(0)) {
            return Err(format!("after recovery a batch area is {state:?}"));
        }
    }
    let mut from = inspector.geometry().first_frame();
    while let Some(frame) = inspector.next_mapped(from).map_err(fail)? {
        from = Frame(frame.0 + 1);
        let FrameFound::Records(records) = inspector.frame(frame).map_err(fail)? else {
            return Err(format!("after recovery the map names {frame:?}"));
        };
        let mut wrong = None;
        let each = |line, found| {
            if matches!(found, LineFound::Unreadable) {
                wrong = Some(line);
            }
            true
        };
        inspector.lines(&records, each).map_err(fail)?;
        if let Some(line) = wrong {
            return Err(format!("line {line} of {frame:?} cannot be read"));
        }
    }
    Ok(())
}
