// SPDX-License-Identifier: GPL-2.0

//! The image that is damaged: small, always the same, with one of each kind in it.

use crate::common::{bytes_of, params};
use pmskb_core::host::{HostFrames, Memory};
use pmskb_core::sim::Rng;
use pmskb_core::*;

/// Bytes of the region.
pub const LEN: u64 = 8 << 20;
/// Of its format: what a nonce is made of.
pub const SALT: u64 = 0x5eed_5eed_1234_5678;
/// Where the batch areas start; they end where the frame map starts.
pub const BATCHES: u64 = 8192;

type MemoryStore<'a> = Store<&'a Memory, HostFrames, Vec<u64>>;

/// Which state the store was left in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Closed: nothing is pending.
    Closed,
    /// Attached, with a batch staged, and replaced records not killed.
    Attached,
    /// A batch area is in force, and none of its words are in their places.
    InForce,
    /// As closed, its log truncated; only the second superblock says so, and the first is torn.
    Second,
}

impl Left {
    /// All of them.
    pub const ALL: [Left; 4] = [Left::Closed, Left::Attached, Left::InForce, Left::Second];
}

/// A store's image.
pub fn image(left: Left) -> Vec<u8> {
    let memory = Memory::new(LEN);
    format(&memory, &params()).unwrap();
    let geo = probe(&memory).unwrap().superblock.geometry;
    let frames = HostFrames::new(&geo).unwrap();
    let work = vec![0; MemoryStore::WORK_WORDS];
    let (mut store, _) =
        Store::recover(&memory, frames, work, host::list, RecoverOptions::default()).unwrap();
    fill(&mut store);
    let now = || {
        let mut bytes = vec![0; LEN as usize];
        memory.read(0, &mut bytes).unwrap();
        bytes
    };
    match left {
        Left::Closed => {
            store.close().0.unwrap();
            now()
        }
        Left::Attached => {
            // Staged for ever.
            put(&mut store, 600, Some("never committed"), &mut Rng(2));
            now()
        }
        Left::Second => {
            let before = now();
            store.truncate(6).unwrap();
            while store.drain(16).unwrap() {}
            store.close().0.unwrap();
            let mut bytes = now();
            // Half of it is what was there before.
            bytes[64..512].copy_from_slice(&before[64..512]);
            assert_ne!(bytes[..512], now()[..512], "or it is not torn");
            bytes
        }
        Left::InForce => {
            store.sync_pending().unwrap();
            stage_batch(&mut store, 2);
            let mut bytes = now();
            store.commit().unwrap();
            let areas = BATCHES as usize..geo.map_off as usize;
            bytes[areas.clone()].copy_from_slice(&now()[areas]);
            bytes
        }
    }
}

/// Puts, a replace and a delete, to be committed at once.
fn stage_batch(store: &mut MemoryStore<'_>, nr: u64) {
    let mut rng = Rng(10 + nr);
    store.begin_atomic().unwrap();
    for n in 0..4 {
        put(store, 700 + n, Some(&format!("batch {nr}, {n}")), &mut rng);
    }
    put(store, 710 + nr, None, &mut rng);
    put(store, 720 + nr, Some(&format!("key {}", 3 + nr)), &mut rng);
    let old = format!("key {}", 43 + 5 * nr);
    store.delete(old.as_bytes(), None).unwrap();
}

fn fill(store: &mut MemoryStore<'_>) {
    let mut rng = Rng(1);
    for n in 0..90u64 {
        let key = match n % 5 {
            0 => format!("a/rather/long/common/prefix/{n:04}"),
            1 => format!("{n}"),
            2 => format!("{:0100}", n),
            _ => format!("key {n}"),
        };
        let key = (n % 7 != 0).then_some(key);
        put(store, n, key.as_deref(), &mut rng);
        if n % 20 == 19 {
            store.commit().unwrap();
        }
    }
    // Lists: one that is not full, and two.
    for (n, pieces, keyed) in [(300, 70, true), (301, 600, true), (302, 80, false)] {
        scattered(store, n, pieces, keyed);
    }
    for n in 60..75 {
        let _ = store.delete(format!("key {n}").as_bytes(), None);
    }
    store.commit().unwrap();
    for n in 30..40 {
        put(store, 500 + n, Some(&format!("key {n}")), &mut rng);
    }
    store.commit().unwrap();
    // So that there is something in both batch areas.
    for nr in 0..2 {
        stage_batch(store, nr);
        store.commit().unwrap();
    }
}

fn meta(n: u64, bytes: &[u8]) -> Meta {
    let addrs = match n % 3 {
        0 => None,
        1 => Some(Addrs::V4 {
            remote: [192, 0, 2, 1],
            local: [192, 0, 2, 2],
        }),
        _ => Some(Addrs::V6 {
            remote: [1; 16],
            local: [2; 16],
        }),
    };
    Meta {
        time: n,
        time_source: TimeSource::Software,
        csum: csum::Sum::of(bytes),
        csum_kind: CsumKind::Derived,
        flow: addrs.map(|addrs| Flow {
            addrs,
            remote_port: 1000,
            local_port: 80,
            udp: n % 2 == 0,
        }),
        payload_crc: (n % 4 == 0).then(|| crc32c_software(0, bytes)),
        ..Meta::default()
    }
}

fn put(store: &mut MemoryStore<'_>, n: u64, key: Option<&str>, rng: &mut Rng) {
    let frame = store.frames().alloc(None, Need::New).unwrap();
    let len = [0, 1, 63, 64, 1000][rng.below(5) as usize];
    let bytes = bytes_of(n, len);
    store.pm().write(frame.off(), &bytes).unwrap();
    let extents = [Extent::new(frame.off(), len as u32)];
    let at = Extent::new(frame.off() + 2048, key.map_or(0, str::len) as u32);
    if let Some(key) = key {
        store.pm().write(at.off, key.as_bytes()).unwrap();
    }
    let args = PutArgs {
        key: match key {
            None => Key::None,
            Some(_) if n % 4 == 0 => Key::Extent(at),
            Some(key) => Key::Bytes(key.as_bytes()),
        },
        extents: if len == 0 { &[] } else { &extents },
        meta: meta(n, &bytes),
        mode: PutMode::Upsert,
        if_seq: None,
    };
    store.put(&args).unwrap();
    store.frames().unhold(frame, 0).unwrap();
}

/// An object of many extents that do not touch.
fn scattered(store: &mut MemoryStore<'_>, n: u64, pieces: usize, keyed: bool) {
    let bytes = bytes_of(n, pieces * 8);
    let mut frames = Vec::new();
    let mut extents = Vec::new();
    for (piece, part) in bytes.chunks(8).enumerate() {
        if piece % 128 == 0 {
            frames.push(store.frames().alloc(None, Need::New).unwrap());
        }
        let off = frames.last().unwrap().off() + (piece % 128) as u64 * 32;
        store.pm().write(off, part).unwrap();
        extents.push(Extent::new(off, 8));
    }
    let key = format!("scattered {n}");
    let args = PutArgs {
        key: if keyed {
            Key::Bytes(key.as_bytes())
        } else {
            Key::None
        },
        extents: &extents,
        meta: meta(n, &bytes),
        mode: if keyed {
            PutMode::Create
        } else {
            PutMode::Upsert
        },
        if_seq: None,
    };
    store.put(&args).unwrap();
    for frame in frames {
        store.frames().unhold(frame, 0).unwrap();
    }
}
