// SPDX-License-Identifier: GPL-2.0

//! Writes images of stores with everything that the on-media form has, for other
//! readers than this one to be tried on: `images DIR`. The same ones each time.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{bytes_of, formatted, params, recover, Driver, Op, SimStore, LEN};
use pmskb_core::csum::Sum;
use pmskb_core::sim::{Rng, SimPm};
use pmskb_core::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const TIME: u64 = 1_700_000_000_123_456_789;

fn main() {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: images DIR");
        std::process::exit(2);
    };
    std::fs::create_dir_all(&dir).unwrap();
    let out = Out(dir);
    let features = features();
    out.image("features", features.store.pm());
    out.nvdimm("nvdimm", features.store.pm());
    superblocks(&out, features.store.pm());
    harm(&out, &features);
    orders(&out);
    out.image("heads-dram", heads_dram().store.pm());
    batches(&out);
    compactions(&out);
    crashes(&out);
}

/// Where images go.
struct Out(PathBuf);

impl Out {
    fn write(&self, name: &str, len: u64, start: u64, pm: &SimPm) {
        let path: &Path = &self.0.join(format!("{name}.img"));
        let file = File::create(path).unwrap();
        file.set_len(len).unwrap();
        each_page(pm, |at, page| file.write_all_at(page, start + at).unwrap());
    }

    /// The region as it is now, with what caches have.
    fn image(&self, name: &str, pm: &SimPm) {
        self.write(name, pm.len(), 0, pm);
    }

    /// An image in which the region is in the middle of other things.
    fn nvdimm(&self, name: &str, pm: &SimPm) {
        self.write(name, pm.len() + (5 << 20), 2 << 20, pm);
    }
}

/// A copy that can be damaged.
fn copy(pm: &SimPm) -> SimPm {
    let out = SimPm::new(pm.len());
    each_page(pm, |at, page| out.damage(at, page));
    out
}

/// The pages that are not all zero.
fn each_page(pm: &SimPm, mut each: impl FnMut(u64, &[u8])) {
    for at in (0..pm.len()).step_by(FRAME_SIZE as usize) {
        let mut page = vec![0; (pm.len() - at).min(FRAME_SIZE) as usize];
        pm.read(at, &mut page).unwrap();
        if page.iter().any(|byte| *byte != 0) {
            each(at, &page);
        }
    }
}

/// A store and the frames that the next put is to be made of.
struct Maker {
    store: SimStore,
    held: Vec<Frame>,
    tag: u64,
}

impl Maker {
    fn new(pm: SimPm) -> Self {
        let store = recover(pm).unwrap().0;
        Maker {
            store,
            held: Vec::new(),
            tag: 0,
        }
    }

    /// Adjacent frames, and where they begin.
    fn space(&mut self, bytes: u64) -> u64 {
        let mut run: Vec<Frame> = Vec::new();
        while (run.len() as u64) < bytes.div_ceil(FRAME_SIZE) {
            let frame = self.store.frames().alloc(None, Need::New).unwrap();
            self.held.push(frame);
            if run.last().is_some_and(|last| last.0 + 1 != frame.0) {
                run.clear();
            }
            run.push(frame);
        }
        run[0].off()
    }

    /// Extents with these offsets and lengths in newly filled space.
    fn filled(&mut self, parts: &[(u64, u32)]) -> Vec<Extent> {
        let end = parts
            .iter()
            .map(|(off, len)| off + u64::from(*len))
            .max()
            .unwrap_or(0);
        let base = self.space(end);
        self.tag += 1;
        let bytes = bytes_of(self.tag, end as usize);
        self.store.pm().write(base, &bytes).unwrap();
        let extent = |(off, len): &(u64, u32)| Extent::new(base + off, *len);
        parts.iter().map(extent).collect()
    }

    /// So many extents that do not touch, of odd lengths too.
    fn scattered(&mut self, count: u64) -> Vec<Extent> {
        let part = |n| (n * 64, 1 + (n % 60) as u32);
        self.filled(&(0..count).map(part).collect::<Vec<_>>())
    }

    fn bytes(&self, extents: &[Extent]) -> Vec<u8> {
        let mut out = Vec::new();
        for extent in extents {
            let mut part = vec![0; extent.len as usize];
            self.store.pm().read(extent.off, &mut part).unwrap();
            out.extend(part);
        }
        out
    }

    fn put(&mut self, key: Key<'_>, extents: &[Extent], meta: Meta) -> PutOutcome {
        let bytes = self.bytes(extents);
        let meta = Meta {
            csum: if meta.csum_kind == CsumKind::None {
                Sum::ZERO
            } else {
                Sum::of(&bytes)
            },
            payload_crc: meta.payload_crc.map(|_| crc32c_software(0, &bytes)),
            ..meta
        };
        let args = PutArgs {
            key,
            extents,
            meta,
            mode: PutMode::Upsert,
            if_seq: None,
        };
        let done = self.store.put(&args).unwrap();
        for frame in self.held.drain(..) {
            self.store.frames().unhold(frame, 0).unwrap();
        }
        done
    }

    /// A small object, if nothing but the key matters.
    fn small(&mut self, key: &[u8]) -> PutOutcome {
        let extents = self.filled(&[(3, 77)]);
        self.put(Key::Bytes(key), &extents, checked())
    }

    fn commit(&mut self) {
        self.store.commit().unwrap();
    }
}

/// With all checksums.
fn checked() -> Meta {
    Meta {
        time: TIME,
        time_source: TimeSource::Placement,
        csum_kind: CsumKind::Computed,
        payload_crc: Some(0),
        ..Meta::default()
    }
}

fn v4() -> Flow {
    Flow {
        addrs: Addrs::V4 {
            remote: [192, 0, 2, 1],
            local: [198, 51, 100, 255],
        },
        remote_port: 65535,
        local_port: 80,
        udp: false,
    }
}

fn v6(udp: bool) -> Flow {
    Flow {
        addrs: Addrs::V6 {
            remote: *b"\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01",
            local: *b"\xfe\x80\0\0\0\0\0\0\x02\x11\x22\xff\xfe\x33\x44\x55",
        },
        remote_port: 53,
        local_port: 4433,
        udp,
    }
}

/// Every feature; at the end one record is replaced and not killed, one put is
/// staged and not committed.
fn features() -> Maker {
    let mut maker = Maker::new(formatted());
    let flows = [None, Some(v4()), Some(v6(false)), Some(v6(true))];
    let kinds = [
        CsumKind::None,
        CsumKind::Derived,
        CsumKind::Hardware,
        CsumKind::Computed,
    ];
    let times = [
        TimeSource::None,
        TimeSource::Hardware,
        TimeSource::Software,
        TimeSource::Placement,
    ];
    // Each with each, with keys of no, some and many bytes, or none at all.
    for (n, flow) in flows.iter().enumerate() {
        for (m, kind) in kinds.iter().enumerate() {
            let meta = Meta {
                time: TIME + (n * 4 + m) as u64,
                time_source: times[(n + m) % 4],
                csum_kind: *kind,
                copied: m == 1,
                flow: *flow,
                tcp_seq: u32::MAX - m as u32,
                payload_crc: (n % 2 == 0).then_some(0),
                ..Meta::default()
            };
            let key = bytes_of(1000 + (n * 4 + m) as u64, [0, 13, 700, 1024][m]);
            let extents = maker.filled(&[(0, 100 + m as u32), (200, 1), (202, 9)]);
            match (n, m) {
                (0, 0) => maker.put(Key::Bytes(b""), &extents, meta),
                (_, 0) => maker.put(Key::None, &extents, meta),
                _ => maker.put(Key::Bytes(&key), &extents, meta),
            };
        }
    }
    // Keys to print.
    for key in [
        &b"a\\b\"c'\x7f\n\xff"[..],
        "s\u{e9}\u{20ac}".as_bytes(),
        b" ",
    ] {
        maker.small(key);
    }
    // Empty objects.
    maker.put(Key::None, &[], checked());
    maker.put(Key::Bytes(b"empty"), &[], Meta::default());
    // Bytes whose sum is a zero.
    let extents = maker.filled(&[(0, 4)]);
    maker
        .store
        .pm()
        .write(extents[0].off, b"\xff\xff\0\0")
        .unwrap();
    maker.put(Key::Bytes(b"zero"), &extents, checked());
    // From a frame into the next, split at the longest extent, at its end exactly.
    let across = maker.filled(&[(4000, 200)]);
    maker.put(Key::Bytes(b"across"), &across, checked());
    for (name, len) in [("long", MAX_EXTENT as u32), ("longer", (1 << 20) + 5)] {
        let extents = maker.filled(&[(1, len)]);
        maker.put(Key::Bytes(name.as_bytes()), &extents, checked());
    }
    // Keys in the payload, some across two frames.
    for (at, flow) in [(10, None), (4090, Some(v6(false)))] {
        let extents = maker.filled(&[(at, 25), (at + 25, 500)]);
        let meta = Meta { flow, ..checked() };
        maker.put(Key::Extent(extents[0]), &extents[1..], meta);
    }
    // The largest record, and lists around their limits.
    let largest = bytes_of(2000, 1024);
    for count in [63, 64, 65, 72, 504, 505, 1008, 1009] {
        let extents = maker.scattered(count);
        let key = format!("list {count}");
        let meta = Meta {
            flow: (count != 65).then(|| v6(false)),
            ..checked()
        };
        match count {
            64 => maker.put(Key::Bytes(&largest), &extents, meta),
            _ => maker.put(Key::Bytes(key.as_bytes()), &extents, meta),
        };
    }
    maker.commit();
    // Replaced and killed, deleted; some of them of many lines.
    for n in 0..40u8 {
        let key = [&[n; 3][..], &bytes_of(n.into(), usize::from(n) * 20)].concat();
        maker.small(&key);
    }
    maker.commit();
    for n in (0..40u8).step_by(3) {
        let key = [&[n; 3][..], &bytes_of(n.into(), usize::from(n) * 20)].concat();
        maker.small(&key);
        let key = [
            &[n + 1; 3][..],
            &bytes_of((n + 1).into(), usize::from(n + 1) * 20),
        ]
        .concat();
        if n < 39 {
            maker.store.delete(&key, None).unwrap();
        }
    }
    maker.commit();
    maker.store.sync_pending().unwrap();
    // Replaced and not yet killed.
    maker.small(b"empty");
    maker.commit();
    maker.small(b"staged only");
    maker
}

/// Superblocks: one damaged, one older, features, no store at all.
fn superblocks(out: &Out, pm: &SimPm) {
    let last = LEN - FRAME_SIZE;
    let smash = |name: &str, offs: &[u64], at: u64| {
        let pm = copy(pm);
        for off in offs {
            pm.damage(off + at, b"!?");
        }
        out.image(name, &pm);
    };
    smash("first-damaged", &[0], 300);
    smash("last-damaged", &[last], 300);
    smash("first-gone", &[0], 0);
    smash("last-gone", &[last], 0);
    smash("refuse-damaged", &[0, last], 8);
    smash("refuse-gone", &[0, last], 0);
    out.image("refuse-blank", &SimPm::new(LEN));
    // Edits of words, with a right crc, in one copy or in both.
    let edit_bytes = |name: &str, copies: &[u64], at: usize, value: &[u8]| {
        let pm = copy(pm);
        for off in copies {
            let mut bytes = [0; 512];
            pm.read(*off, &mut bytes).unwrap();
            bytes[at..at + value.len()].copy_from_slice(value);
            let crc = crc32c_software(0, &bytes[12..]);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            pm.damage(*off, &bytes);
        }
        out.image(name, &pm);
    };
    let edit = |name: &str, copies: &[u64], at: usize, value: u64| {
        edit_bytes(name, copies, at, &value.to_le_bytes());
    };
    let update = pm.load(152).unwrap();
    edit("first-newer", &[0], 152, update + 7);
    edit("last-newer", &[last], 152, update + 7);
    // Above it are records without a key, and below it some with one.
    edit("truncated", &[0, last], 176, 20);
    edit("compat", &[0, last], 16, 1 << 63);
    edit("ro-compat", &[0, last], 24, 1);
    edit("refuse-incompat", &[0, last], 32, 1 << 40);
    edit("last-misplaced", &[last], 200, 0);
    edit("first-geometry", &[0], 136, 4 << 20);
    edit("refuse-full", &[0, last], 192, (1 << 63) - 1);
    let versions = |name: &str, copies: &[u64], number: u32| {
        edit_bytes(name, copies, 12, &number.to_le_bytes());
    };
    versions("refuse-version", &[0, last], 3);
    versions("refuse-version-1", &[0, last], 1);
    versions("refuse-first-version-0", &[0], 0);
    versions("last-version-0", &[last], 0);
    versions("refuse-version-0", &[0, last], 0);
}

/// Damage of other things, each by itself and all together.
fn harm(out: &Out, maker: &Maker) {
    let store = &maker.store;
    let pm = store.pm();
    let loc = |key: &[u8]| store.lookup(key).unwrap().unwrap();
    let long = store.record(loc(b"list 1009")).unwrap();
    let extents: Vec<Extent> = long
        .extents(pm, store.geometry())
        .map(Result::unwrap)
        .collect();
    let first_list = pm.load(long.loc.0 + 32).unwrap();
    let second_list = pm.load(first_list + 24).unwrap();
    let third_list = pm.load(second_list + 24).unwrap();
    let geo = store.geometry();
    let free = store.frames().alloc(None, Need::New).unwrap();
    store.frames().unhold(free, 0).unwrap();
    // A frame that held payload, with lines that look like records of this store
    // but for what the salt decides.
    let forged = |pm: &SimPm| {
        let mut frame = [0; FRAME_SIZE as usize];
        pm.read(long.loc.0 / FRAME_SIZE * FRAME_SIZE, &mut frame)
            .unwrap();
        frame[8..16].copy_from_slice(&free.off().to_le_bytes());
        let crc = crc32c_software(0, &frame[4..64]);
        frame[..4].copy_from_slice(&crc.to_le_bytes());
        pm.damage(free.off(), &frame);
        let word = geo.map_off + u64::from(free.0) / 64 * 8;
        let bits = pm.load(word).unwrap() | (1 << (free.0 % 64));
        pm.damage(word, &bits.to_le_bytes());
    };
    type Harm<'a> = (&'a str, Box<dyn Fn(&SimPm) + 'a>);
    let flip = |off: u64| {
        Box::new(move |pm: &SimPm| {
            let mut byte = [0];
            pm.read(off, &mut byte).unwrap();
            pm.damage(off, &[byte[0] ^ 0x10]);
        })
    };
    let newest = loc(b"empty");
    let kinds: Vec<Harm<'_>> = vec![
        ("payload", flip(extents[700].off)),
        ("list-extent", flip(second_list + 64 + 8 * 100)),
        ("list-magic", flip(second_list + 5)),
        ("list-last-next", flip(third_list + 24 + 3)),
        ("record-first-line", flip(loc(b"across").0 + 17)),
        ("record-later-line", flip(loc(b"list 63").0 + 200)),
        ("record-newest", flip(newest.0 + 40)),
        ("killed", flip(killed(store) + 8)),
        ("header", flip(long.loc.0 / FRAME_SIZE * FRAME_SIZE + 16)),
        ("forged", Box::new(forged)),
        (
            "map-bit-lost",
            Box::new(|pm: &SimPm| {
                let frame = newest.0 / FRAME_SIZE;
                let word = geo.map_off + frame / 64 * 8;
                let bits = pm.load(word).unwrap() & !(1 << (frame % 64));
                pm.damage(word, &bits.to_le_bytes());
            }),
        ),
    ];
    let all = copy(pm);
    for (name, harm) in &kinds {
        let one = copy(pm);
        harm(&one);
        out.image(&format!("harm-{name}"), &one);
        if !["header", "map-bit-lost"].contains(name) {
            harm(&all);
        }
    }
    out.image("harm-all", &all);
    reforged(out, pm, store, &long, newest);
}

/// Records with right checksums that no writer makes: only the list of checks in
/// the document says what a reader does about them.
fn reforged(out: &Out, pm: &SimPm, store: &SimStore, long: &Record, newest: Locator) {
    let forge = |name: &str, loc: Locator, change: &dyn Fn(&mut [u8])| {
        let pm = copy(pm);
        let mut head = [0; 64];
        pm.read(loc.0 / FRAME_SIZE * FRAME_SIZE, &mut head).unwrap();
        let nonce = u32::from_le_bytes(head[48..52].try_into().unwrap());
        let lines = usize::from((pm.load(loc.0).unwrap() >> 40) as u8);
        let mut raw = vec![0; lines * 64];
        pm.read(loc.0, &mut raw).unwrap();
        change(&mut raw);
        let crc = crc32c_software(nonce, &raw[4..]);
        raw[..4].copy_from_slice(&crc.to_le_bytes());
        pm.damage(loc.0, &raw);
        out.image(&format!("forged-{name}"), &pm);
    };
    let across = store.lookup(b"across").unwrap().unwrap();
    let add = |at: usize, n: u8| move |raw: &mut [u8]| raw[at] = raw[at].wrapping_add(n);
    // The newest of its key, so that an older one is there.
    forge("newest-extent", newest, &|raw| raw[32..40].fill(0xff));
    forge("length", newest, &add(24, 1));
    forge("flags", newest, &|raw| raw[7] |= 0x80);
    forge("addresses", newest, &|raw| raw[6] |= 0x30);
    forge("reserved-batch", newest, &|raw| raw[7] |= 0x08);
    forge("type", newest, &|raw| raw[4] = 2);
    forge("not-keyed", newest, &|raw| raw[7] &= !0x10);
    forge("key-len", newest, &add(30, 1));
    forge("key-too-long", newest, &|raw| raw[31] = 0x40);
    forge("lines", across, &|raw| raw[5] += 1);
    forge("no-extents", across, &|raw| raw[40] = 0);
    forge("sum-ffff", across, &|raw| raw[28..30].fill(0xff));
    forge("list-flag", long.loc, &|raw| raw[6] &= !0x80);
    forge("list-needless", across, &|raw| raw[6] |= 0x80);
    forge("list-count", long.loc, &add(40, 1));
    forge("list-fewer", long.loc, &|raw| {
        raw[40..44].copy_from_slice(&1008u32.to_le_bytes());
    });
    forge("list-seq", long.loc, &add(8, 1));
    let zero = store.lookup(b"zero").unwrap().unwrap();
    forge("sum-zero-ffff", zero, &|raw| raw[28..30].fill(0xff));
    forge("dirty-zeros", zero, &|raw| {
        raw[52..60].fill(0x55);
        let end = raw.len();
        raw[end - 8..].fill(0x66);
    });
}

/// Where a killed record is.
fn killed(store: &SimStore) -> u64 {
    let pm = store.pm();
    let geo = store.geometry();
    (geo.data_off..geo.data_end())
        .step_by(64)
        .find(|off| {
            let frame = off / FRAME_SIZE * FRAME_SIZE;
            off % FRAME_SIZE != 0
                && pm.load(frame).unwrap() >> 32 == u64::from(u32::from_le_bytes(*b"PKrf"))
                && (pm.load(*off).unwrap() >> 32) as u8 == 0xdd
        })
        .expect("there are killed records")
}

/// A record that is replaced and not killed, in a frame below and in one above
/// that of the record that counts.
fn orders(out: &Out) {
    for low in [false, true] {
        let mut maker = Maker::new(formatted());
        // Room below the first record frame, which is free after the next attach.
        for _ in 0..if low { 8 } else { 0 } {
            maker.store.frames().alloc(None, Need::New).unwrap();
        }
        maker.small(b"key");
        maker.commit();
        let first = maker.store.lookup(b"key").unwrap().unwrap();
        maker = Maker::new(copy(maker.store.pm()));
        maker.small(b"key");
        maker.commit();
        let second = maker.store.lookup(b"key").unwrap().unwrap();
        assert_eq!(second < first, low, "{first:?} {second:?}");
        let name = if low { "order-down" } else { "order-up" };
        out.image(name, maker.store.pm());
    }
}

fn heads_dram() -> Maker {
    let pm = SimPm::new(LEN + 3 * FRAME_SIZE + 100);
    let params = FormatParams {
        heads: HeadArea::Dram,
        label: b"12345678901234567890123456789012",
        ..params()
    };
    format(&pm, &params).unwrap();
    let mut maker = Maker::new(pm);
    maker.small(b"key");
    maker.commit();
    maker
}

/// The batch areas, and how their words are found.
const AREAS: [u64; 2] = [8192, 28672];

/// An area that is in force, as the core writes them: where it is, number, pairs.
type Area = (u64, u64, Vec<(u64, u64)>);

fn areas(pm: &SimPm) -> Vec<Area> {
    let area = |off: &u64| {
        let word = |at: u64| pm.load(off + at).unwrap();
        let pairs = (0..word(16) & 0xffff_ffff).map(|n| (word(64 + n * 16), word(72 + n * 16)));
        (word(0) != 0).then(|| (*off, word(8), pairs.collect()))
    };
    AREAS.iter().filter_map(area).collect()
}

/// How far a batch had got when the power was cut: areas in force, and whether none,
/// some or all of the last one's words were in their places.
type Stage = (usize, usize);
const NOT_YET: Stage = (0, 0);
const IN_FORCE: Stage = (1, 0);
const HALF: Stage = (1, 1);
const APPLIED: Stage = (1, 2);
const BOTH: Stage = (2, 0);

fn stage(pm: &SimPm) -> Stage {
    let found = areas(pm);
    let Some((_, _, pairs)) = found.iter().max_by_key(|(_, number, _)| number) else {
        return NOT_YET;
    };
    let placed = pairs
        .iter()
        .filter(|(off, word)| pm.load(*off).unwrap() == *word);
    match placed.count() {
        0 => (found.len(), 0),
        count if count == pairs.len() => (found.len(), 2),
        _ => (found.len(), 1),
    }
}

/// What power cuts leave of `change`, with words torn: one image of each stage asked for,
/// which has to be found, and `some` of instants far apart.
fn cuts(
    out: &Out,
    name: &str,
    wanted: &[(&str, Stage)],
    some: u64,
    before: impl Fn() -> Maker,
    change: impl Fn(&mut Maker) -> Result<()>,
) -> Vec<SimPm> {
    let run = |stop: u64| {
        let mut maker = before();
        maker.store.pm().reset_counts();
        maker.store.pm().stop_at(stop);
        let done = change(&mut maker);
        assert_eq!(done.is_ok(), stop == u64::MAX, "{name}: {done:?} at {stop}");
        maker
    };
    let whole = run(u64::MAX);
    let events = whole.store.pm().counts().events;
    for n in 0..some {
        let cut = run(n * events / some).store.pm().crash_torn(&mut Rng(n));
        out.image(&format!("{name}-cut-{n:02}"), &cut);
    }
    // The event that puts the batch in force: it stays so to the end.
    let newest = |pm: &SimPm| areas(pm).iter().map(|area| area.1).max();
    let batch = newest(whole.store.pm());
    let (mut before, mut sealed) = (0, events);
    while before < sealed {
        let middle = (before + sealed) / 2;
        if newest(run(middle).store.pm()) == batch {
            sealed = middle;
        } else {
            before = middle + 1;
        }
    }
    let mut found: Vec<Option<SimPm>> = wanted.iter().map(|_| None).collect();
    for event in [events - 1].into_iter().chain(sealed - 3..events) {
        if found.iter().all(Option::is_some) {
            break;
        }
        let maker = run(event);
        let mut rng = Rng(event);
        for n in 0..8 {
            // All that was stored may have been written back.
            let cut = match n {
                0 => copy(maker.store.pm()),
                _ => maker.store.pm().crash_torn(&mut rng),
            };
            let at = stage(&cut);
            let slot = wanted.iter().position(|(_, stage)| *stage == at);
            if let Some(slot) = slot.and_then(|slot| found.get_mut(slot)) {
                slot.get_or_insert(cut);
            }
        }
    }
    let found = found.into_iter().zip(wanted).map(|(cut, (part, stage))| {
        let cut = cut.unwrap_or_else(|| panic!("{name}: no cut leaves {part}, {stage:?}"));
        out.image(&format!("{name}-{part}"), &cut);
        cut
    });
    found.collect()
}

/// A store with so many batches over, to begin with.
fn batched(over: u64) -> Maker {
    let mut maker = Maker::new(formatted());
    for n in 0..20u64 {
        maker.small(format!("key {n}").as_bytes());
        let extents = maker.filled(&[(0, 50)]);
        maker.put(Key::None, &extents, checked());
    }
    maker.commit();
    for n in 0..over {
        batch(&mut maker, n).unwrap();
    }
    maker.store.sync_pending().unwrap();
    maker
}

/// An atomic batch: new keys, replaced ones, deleted ones, some without a key. What one
/// puts is deleted by the next.
fn batch(maker: &mut Maker, tag: u64) -> Result<()> {
    maker.store.begin_atomic()?;
    let mut put = |key: &[u8]| {
        let key = if key.is_empty() {
            Key::None
        } else {
            Key::Bytes(key)
        };
        let args = PutArgs {
            key,
            extents: &[],
            meta: checked(),
            mode: PutMode::Upsert,
            if_seq: None,
        };
        maker.store.put(&args)
    };
    for n in 0..6 {
        put(format!("new {tag}.{n}").as_bytes())?;
        put(format!("key {n}").as_bytes())?;
        put(b"")?;
    }
    let gone = if tag == 0 {
        "key 10".into()
    } else {
        format!("new {}.1", tag - 1)
    };
    for key in [gone, format!("key {}", 11 + tag)] {
        match maker.store.delete(key.as_bytes(), None) {
            Ok(_) | Err(Error::NotFound) => (),
            Err(error) => return Err(error),
        }
    }
    maker.store.commit()
}

/// Atomic batches that were cut, and areas that no writer leaves.
fn batches(out: &Out) {
    let fresh = batched(0);
    let alone = cuts(
        out,
        "batch",
        &[
            ("not-yet", NOT_YET),
            ("in-force", IN_FORCE),
            ("half", HALF),
            ("applied", APPLIED),
        ],
        8,
        || Maker::new(fresh.store.pm().clone()),
        |maker| batch(maker, 0),
    );
    // The one before is in force still; its number is in the first area, or the second.
    let mut both = Vec::new();
    for over in [1, 2] {
        let base = batched(over - 1);
        let before = || {
            let mut maker = Maker::new(base.store.pm().clone());
            batch(&mut maker, over - 1).unwrap();
            maker
        };
        let name = format!("batch-after-{over}");
        let wanted = [("both", BOTH), ("half", HALF)];
        both = cuts(out, &name, &wanted, 4, before, |maker| batch(maker, over));
    }

    let change = |name: &str, pm: &SimPm, change: &dyn Fn(&SimPm, &[Area])| {
        let pm = copy(pm);
        change(&pm, &areas(&pm));
        out.image(name, &pm);
    };
    let flip = |pm: &SimPm, off: u64| {
        let mut byte = [0];
        pm.read(off, &mut byte).unwrap();
        pm.damage(off, &[byte[0] ^ 4]);
    };
    for (name, at) in [
        ("crc", 1),
        ("magic", 6),
        ("number", 9),
        ("count", 16),
        ("zeros", 40),
        ("pair", 64 + 5 * 16 + 9),
    ] {
        for (which, pm) in [("in-force", &alone[1]), ("half", &alone[2])] {
            change(&format!("batch-{which}-bad-{name}"), pm, &|pm, areas| {
                flip(pm, areas[0].0 + at);
            });
        }
    }
    for area in 0..2 {
        change(&format!("batch-both-bad-{area}"), &both[0], &|pm, areas| {
            flip(pm, areas[area].0 + 70);
        });
    }
    // With right checksums: only the document says what a reader does about them.
    let forge = |name: &str, pm: &SimPm, which: usize, edit: &dyn Fn(&mut Vec<u8>)| {
        change(name, pm, &|pm, areas| {
            let (off, _, pairs) = &areas[which];
            let mut raw = vec![0; 64 + pairs.len() * 16];
            pm.read(*off, &mut raw).unwrap();
            edit(&mut raw);
            let all = crc32c_software(0, &raw[64..]);
            let crc = crc32c_software(0, &params().salt.to_le_bytes());
            let crc = crc32c_software(crc, &raw[4..64]);
            let crc = crc32c_software(crc, &all.to_le_bytes());
            raw[..4].copy_from_slice(&crc.to_le_bytes());
            pm.damage(*off, &raw);
        });
    };
    let set = |at: usize, value: u64| {
        move |raw: &mut Vec<u8>| raw[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    let (first, end) = (64 + 3 * 16, LEN - FRAME_SIZE);
    forge("batch-word-in-map", &alone[1], 0, &set(first, 49152 + 64));
    forge("batch-word-in-superblock", &alone[1], 0, &set(first, 192));
    forge("batch-word-in-last", &alone[1], 0, &set(first, end));
    forge("batch-word-unaligned", &alone[1], 0, &|raw| raw[first] |= 4);
    forge("batch-word-outside", &alone[1], 0, &set(first, 1 << 50));
    forge("batch-word-twice", &alone[1], 0, &|raw| {
        let off = raw[64..72].to_vec();
        raw[first..first + 8].copy_from_slice(&off);
    });
    forge("batch-empty", &alone[1], 0, &|raw| {
        raw.truncate(64);
        raw[16..20].fill(0);
    });
    forge("batch-too-long", &alone[1], 0, &|raw| {
        raw.resize(64 + 1277 * 16, 0);
        raw[16..20].copy_from_slice(&1277u32.to_le_bytes());
    });
    forge("batch-longest", &alone[1], 0, &|raw| {
        raw.resize(64 + 1276 * 16, 0);
        raw[16..20].copy_from_slice(&1276u32.to_le_bytes());
    });
    // In the wrong area; the same number in both; the last one there is.
    forge("batch-both-turned", &both[0], 0, &set(8, 1000));
    forge("batch-both-equal", &both[0], 0, &|raw| {
        raw[8..16].copy_from_slice(&areas(&both[0])[1].1.to_le_bytes());
    });
    forge("batch-number-last", &alone[1], 0, &set(8, u64::MAX));
    forge("batch-number", &alone[1], 0, &set(8, u64::MAX - 1));
}

/// A store of which little is alive, in many frames: what compaction moves. Keys in
/// payload, lists, records without a key, some truncated.
fn sparse() -> Maker {
    let mut maker = Maker::new(formatted());
    for n in 0..150u64 {
        let key = format!("key {n}");
        match n % 5 {
            0 => {
                let extents = maker.filled(&[(0, 90)]);
                maker.put(Key::None, &extents, checked());
            }
            1 => {
                let extents = maker.filled(&[(8, 20), (28, 300)]);
                maker.put(Key::Extent(extents[0]), &extents[1..], checked());
            }
            _ if n == 42 => {
                let extents = maker.scattered(70);
                maker.put(Key::Bytes(key.as_bytes()), &extents, checked());
            }
            _ => drop(maker.small(key.as_bytes())),
        }
    }
    maker.commit();
    for n in 0..150u64 {
        if n % 5 > 1 && n % 7 > 0 {
            let _ = maker.store.delete(format!("key {n}").as_bytes(), None);
        }
    }
    maker.commit();
    maker.store.truncate(40).unwrap();
    while maker.store.drain(100).unwrap() {}
    maker.store.sync_pending().unwrap();
    maker
}

/// All steps of a compaction.
fn compact(maker: &mut Maker) {
    let mut from = Some(0);
    while let Some(at) = from {
        let mut scratch = [Extent::new(0, 0); 100];
        from = maker.store.compact(at, &mut scratch).unwrap().next;
    }
}

/// Compaction, cut at every few events, and when it was over.
fn compactions(out: &Out) {
    let step = |maker: &mut Maker| {
        let mut scratch = [Extent::new(0, 0); 100];
        maker.store.compact(0, &mut scratch)
    };
    let base = sparse();
    let moved = cuts(
        out,
        "compact",
        &[
            ("not-yet", NOT_YET),
            ("in-force", IN_FORCE),
            ("half", HALF),
            ("applied", APPLIED),
        ],
        24,
        || Maker::new(base.store.pm().clone()),
        |maker| step(maker).map(|done| assert!(done.records > 20, "{done:?}")),
    );
    // Not in force any more, it is as if it had not been begun.
    let damaged = copy(&moved[1]);
    damaged.damage(areas(&damaged)[0].0 + 80, b"!?");
    out.image("compact-bad", &damaged);
    let mut maker = base;
    compact(&mut maker);
    out.image("compacted", maker.store.pm());
    far(out);
    batch(&mut maker, 0).unwrap();
    out.image("compacted-batch", maker.store.pm());
}

/// Damaged records whose numbers are far above the frame's lowest: as compaction leaves
/// them, and at the limit of what counts as torn.
fn far(out: &Out) {
    let mut maker = sparse();
    maker.store.truncate(u64::MAX).unwrap();
    compact(&mut maker);
    let pm = maker.store.pm();
    let base = |loc: Locator| pm.load(loc.0 / FRAME_SIZE * FRAME_SIZE + 16).unwrap();
    let mut next = maker.store.log_from(0).unwrap();
    while let Some(record) = next {
        if record.seq > base(record.loc) + 64 {
            break;
        }
        next = maker.store.log_after(&record).unwrap();
    }
    let loc = next.expect("compaction leaves a far number").loc;
    let at_limit = base(loc) + (1 << 32);
    for (name, at, value) in [
        ("far", 16, 0),
        ("furthest", 8, at_limit - 1),
        ("too-far", 8, at_limit),
    ] {
        let pm = copy(pm);
        pm.damage(loc.0 + at, &u64::to_le_bytes(value));
        out.image(&format!("compacted-{name}"), &pm);
    }
}

/// What power cuts leave of a store in use, at stores, flushes and fences; those with
/// something torn are looked for, as few instants leave that.
fn crashes(out: &Out) {
    for seed in 0..20 {
        let first = 300 + seed * 60;
        let cut = (first..first + 12).find_map(|event| {
            let store = cut_at(seed, event);
            let mut rng = Rng(event);
            (0..3)
                .map(|_| store.pm().crash_torn(&mut rng))
                .find(|cut| recover(cut.clone()).unwrap().1.torn > 0)
        });
        let cut = cut.unwrap_or_else(|| cut_at(seed, first).pm().crash_torn(&mut Rng(seed)));
        out.image(&format!("crash-{seed:02}"), &cut);
    }
}

/// A store in use that is stopped at an event.
fn cut_at(seed: u64, event: u64) -> SimStore {
    let mut rng = Rng(seed);
    let mut driver = Driver::new(recover(formatted()).unwrap().0);
    driver.store.pm().stop_at(event);
    let mut count = 0;
    loop {
        let op = match rng.below(14) {
            0 => Op::Atomic((0..1 + rng.below(6)).map(|_| change(&mut rng)).collect()),
            1 => Op::Sync,
            2..=3 => Op::Commit,
            // Not before there is something to do it to.
            4 if count > 20 => Op::Compact,
            5 if count > 20 => Op::Truncate,
            _ => change(&mut rng),
        };
        count += 1;
        if driver.run(&op).is_err() {
            return driver.store;
        }
    }
}

/// A put or a delete.
fn change(rng: &mut Rng) -> Op {
    let key = bytes_of(rng.below(12), 1 + (rng.below(12) * 9) as usize % 100);
    let (tag, len) = (rng.next(), rng.below(9000) as usize);
    match rng.below(6) {
        0..=2 => Op::Put { key, tag, len },
        3 => Op::PutKeyExtent { key, tag, len },
        4 => Op::Append { tag, len },
        _ => Op::Delete { key },
    }
}
