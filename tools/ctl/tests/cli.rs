// SPDX-License-Identifier: GPL-2.0-only

//! `pmskbctl --image` on images that the core made.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use pmskb_core::{
    csum::Sum,
    format,
    host::{HostFrames, Memory},
    Addrs, CsumKind, Extent, Flow, FormatParams, Frames, HeadArea, Key, Meta, Pmem, PutArgs,
    PutMode, RecoverOptions, Store, TimeSource,
};

type Core = Store<Memory, HostFrames, Vec<u64>>;

const OBJECTS: [(&str, &[u8], u64); 4] = [
    ("a/1", b"first", 1_000_000_000),
    ("a/2", b"second object", 2_000_000_000),
    ("b\n", b"", 3_000_000_000),
    ("c", b"last", 4_000_000_000),
];

/// A region with the objects, and where the bytes of the second are.
fn region() -> (Vec<u8>, u64) {
    region_with(|_| {})
}

/// The same, with what `more` adds.
fn region_with(more: impl FnOnce(&mut Core)) -> (Vec<u8>, u64) {
    let pm = Memory::new(16 << 20);
    let params = FormatParams {
        uuid: [7; 16],
        label: b"test",
        heads: HeadArea::Default,
        salt: 1,
        time: 5,
    };
    let sb = format(&pm, &params).unwrap();
    let frames = HostFrames::new(&sb.geometry).unwrap();
    let work = vec![0; Core::WORK_WORDS];
    let (mut store, _) = Core::recover(
        pm,
        frames,
        work,
        pmskb_core::host::list,
        RecoverOptions::default(),
    )
    .unwrap();
    let mut second = 0;
    for (key, bytes, time) in OBJECTS {
        let frame = store.frames().alloc(None, pmskb_core::Need::New).unwrap();
        store.pm().write(frame.off(), bytes).unwrap();
        let extent = [Extent::new(frame.off(), bytes.len() as u32)];
        if key == "a/2" {
            second = frame.off();
        }
        let meta = Meta {
            time,
            time_source: TimeSource::Software,
            csum: Sum::of(bytes),
            csum_kind: CsumKind::Derived,
            flow: Some(Flow {
                addrs: Addrs::V4 {
                    remote: [10, 0, 2, 2],
                    local: [10, 0, 2, 15],
                },
                remote_port: 40000,
                local_port: 80,
                udp: false,
            }),
            ..Meta::default()
        };
        let extents = if bytes.is_empty() {
            &[][..]
        } else {
            &extent[..]
        };
        let args = PutArgs {
            key: Key::Bytes(key.as_bytes()),
            extents,
            meta,
            mode: PutMode::Upsert,
            if_seq: None,
        };
        store.put(&args).unwrap();
    }
    store.commit().unwrap();
    more(&mut store);
    store.commit().unwrap();
    let (closed, pm, ..) = store.close();
    closed.unwrap();
    let mut bytes = vec![0; pm.len() as usize];
    pm.read(0, &mut bytes).unwrap();
    (bytes, second)
}

struct Image(PathBuf);

impl Image {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("pmskbctl-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn run(image: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pmskbctl"));
    command
        .args(words)
        .arg("--image")
        .arg(image)
        .output()
        .unwrap()
}

fn text(image: &Image, words: &[&str]) -> String {
    let out = run(&image.0, words);
    assert!(
        out.status.success(),
        "{words:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// The keys in what `ls` printed.
fn keys(listing: &str) -> Vec<&str> {
    listing
        .lines()
        .skip(1)
        .filter_map(|l| l.split_whitespace().last())
        .collect()
}

#[test]
fn records_are_listed_filtered_and_got() {
    let image = Image::new("ls", &region().0);
    let all = text(&image, &["ls"]);
    assert_eq!(keys(&all), ["a/1", "a/2", "b\\x0a", "c"]);
    assert!(all.contains("1970-01-01 00:00:02.000000 software"), "{all}");
    assert!(all.contains("tcp 10.0.2.2:40000 > 10.0.2.15:80"), "{all}");
    assert_eq!(
        keys(&text(&image, &["ls", "--prefix", "a/"])),
        ["a/1", "a/2"]
    );
    assert_eq!(
        keys(&text(&image, &["ls", "--seq", "2-3"])),
        ["a/2", "b\\x0a"]
    );
    assert_eq!(
        keys(&text(&image, &["ls", "--reverse", "--limit", "2"])),
        ["c", "b\\x0a"]
    );
    let by_key = text(&image, &["ls", "--by-key", "--prefix", "a/"]);
    assert_eq!(keys(&by_key), ["a/1", "a/2"]);
    let back = ["ls", "--by-key", "--prefix", "a/", "--reverse"];
    assert_eq!(keys(&text(&image, &back)), ["a/2", "a/1"]);
    let range = ["ls", "--key-from", "a/2", "--key-to", "c"];
    assert_eq!(keys(&text(&image, &range)), ["a/2", "b\\x0a"]);
    let both = [&range[..], &["--by-key", "--reverse"]].concat();
    assert_eq!(keys(&text(&image, &both)), ["b\\x0a", "a/2"]);
    assert_eq!(text(&image, &["ls", "--count"]), "4 records, 22 B\n");
    let count = ["ls", "--count", "--json", "--prefix", "a/"];
    assert_eq!(text(&image, &count), "{\"records\":2,\"bytes\":18}\n");
    let reversed = text(&image, &["ls", "--by-key", "--reverse"]);
    assert_eq!(keys(&reversed), ["c", "b\\x0a", "a/2", "a/1"]);
    let some = [
        "ls",
        "--since",
        "1970-01-01T00:00:02Z",
        "--until",
        "1970-01-01T00:00:04Z",
    ];
    assert_eq!(keys(&text(&image, &some)), ["a/2", "b\\x0a"]);
    assert_eq!(
        keys(&text(&image, &["ls", "--since", "1h"])),
        Vec::<&str>::new()
    );
    let lines = text(&image, &["ls", "--json", "--limit", "1"]);
    let value: serde_json::Value = serde_json::from_str(&lines).unwrap();
    assert_eq!(
        (&value["key"], &value["length"]),
        (&"a/1".into(), &5.into())
    );
    assert_eq!(text(&image, &["get", "a/2"]), "second object");
    assert_eq!(text(&image, &["get", "b\\x0a"]), "");
    assert_eq!(text(&image, &["get", "--seq", "4"]), "last");
    assert_eq!(text(&image, &["get", "--key-hex", "612f31"]), "first");
    assert_eq!(run(&image.0, &["get", "nope"]).status.code(), Some(2));
}

/// Appends a record of a connection, without a key; without a sequence number, of a datagram.
fn log(store: &mut Core, port: u16, tcp_seq: impl Into<Option<u32>>, bytes: &[u8]) {
    let tcp_seq = tcp_seq.into();
    let frame = store.frames().alloc(None, pmskb_core::Need::New).unwrap();
    store.pm().write(frame.off(), bytes).unwrap();
    let meta = Meta {
        csum: Sum::of(bytes),
        csum_kind: CsumKind::Computed,
        flow: Some(Flow {
            addrs: Addrs::V4 {
                remote: [10, 0, 2, 2],
                local: [10, 0, 2, 15],
            },
            remote_port: port,
            local_port: 80,
            udp: tcp_seq.is_none(),
        }),
        tcp_seq: tcp_seq.unwrap_or(0),
        ..Meta::default()
    };
    let extent = Extent::new(frame.off(), bytes.len() as u32);
    let args = PutArgs {
        key: Key::None,
        extents: if bytes.is_empty() { &[] } else { &[extent] },
        meta,
        mode: PutMode::Upsert,
        if_seq: None,
    };
    store.put(&args).unwrap();
}

#[test]
fn a_connection_is_put_together_again() {
    let (bytes, _) = region_with(|store| {
        // Past the end of sequence numbers, with another connection's between.
        log(store, 5, u32::MAX - 3, b"GET / H");
        log(store, 6, 77, b"another");
        log(store, 5, 3, b"TTP/1.1\r\n");
        // Some of it, and all of it, is there already.
        log(store, 5, 8, b".1\r\nHost");
        log(store, 5, 13, b"ost");
        // A gap; and the same port again.
        log(store, 7, 100, b"first");
        log(store, 7, 106, b"second");
        log(store, 7, 5, b"third");
    });
    let image = Image::new("flow", &bytes);
    let get = |ends: &str, more: &[&str]| run(&image.0, &[&["get", "--flow", ends], more].concat());
    let out = get("10.0.2.2:5,10.0.2.15:80", &[]);
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "GET / HTTP/1.1\r\nHost"
    );
    // The other way around it was nobody's.
    assert_eq!(get("10.0.2.15:80,10.0.2.2:5", &[]).status.code(), Some(2));
    let printed = get("tcp 10.0.2.2:6 > 10.0.2.15:80", &["--json"]);
    let value: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!((&value["bytes"], &value["parts"]), (&7.into(), &1.into()));
    let parts = get("10.0.2.2:7,10.0.2.15:80", &[]);
    assert_eq!(parts.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&parts.stderr).contains("--part 3: records"));
    for (part, bytes) in [("1", "first"), ("2", "second"), ("3", "third")] {
        let out = get("10.0.2.2:7,10.0.2.15:80", &["--part", part]);
        assert_eq!(String::from_utf8_lossy(&out.stdout), bytes);
    }
    assert_eq!(
        get("10.0.2.2:7,10.0.2.15:80", &["--part", "4"])
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn datagrams_are_put_together_or_got_one_by_one() {
    let (bytes, _) = region_with(|store| {
        log(store, 5, None, b"one");
        log(store, 5, 9, b"a stream");
        log(store, 6, None, b"somebody else");
        log(store, 5, None, b"");
        log(store, 5, None, b"three");
    });
    let image = Image::new("datagrams", &bytes);
    let get = |more: &[&str]| {
        let flow = ["get", "--flow", "udp 10.0.2.2:5 > 10.0.2.15:80"];
        run(&image.0, &[&flow, more].concat())
    };
    assert_eq!(String::from_utf8_lossy(&get(&[]).stdout), "onethree");
    for (part, bytes) in [("1", "one"), ("2", ""), ("3", "three")] {
        let out = get(&["--part", part]);
        assert!(out.status.success());
        assert_eq!(String::from_utf8_lossy(&out.stdout), bytes);
    }
    assert_eq!(get(&["--part", "4"]).status.code(), Some(2));
    let value: serde_json::Value = serde_json::from_slice(&get(&["--json"]).stdout).unwrap();
    assert_eq!((&value["bytes"], &value["records"]), (&8.into(), &3.into()));
}

#[test]
fn verify_tells_good_from_bad() {
    let (mut bytes, second) = region();
    let image = Image::new("good", &bytes);
    assert!(text(&image, &["verify"]).starts_with("4 records, 22 B: 4 intact"));
    bytes[second as usize + 3] ^= 1;
    let image = Image::new("bad", &bytes);
    let out = run(&image.0, &["verify"]);
    assert_eq!(out.status.code(), Some(1));
    let out = String::from_utf8(out.stdout).unwrap();
    assert!(
        out.contains("record 2 a/2: its bytes do not have its checksum"),
        "{out}"
    );
    let image = Image::new("none", &vec![0; 16 << 20]);
    let out = run(&image.0, &["verify"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("no store found"));
}

#[test]
fn the_region_is_found_inside_of_an_nvdimm() {
    let (bytes, _) = region();
    let mut raw = vec![0xa5; 2 << 20];
    raw.extend(&bytes);
    raw.resize(raw.len() + (2 << 20), 0);
    let image = Image::new("nvdimm", &raw);
    assert_eq!(keys(&text(&image, &["ls"])).len(), 4);
    assert_eq!(keys(&text(&image, &["ls", "--offset", "2M"])).len(), 4);
    // Without its first superblock the last one leads to it: a cut in attach leaves that.
    raw[2 << 20..(2 << 20) + 4096].fill(0);
    let image = Image::new("damaged", &raw);
    assert_eq!(keys(&text(&image, &["ls"])).len(), 4);
    let place = ["--offset", "2M", "--length", "16M"];
    assert_eq!(
        keys(&text(&image, &[&["ls"], &place[..]].concat())).len(),
        4
    );
    let out = run(&image.0, &[&["verify"], &place[..]].concat());
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stdout).contains("first superblock"));
    assert!(
        text(&image, &[&["dump", "--json"], &place[..]].concat()).contains("\"uuid\":\"07070707-")
    );
}

/// What `fsck` says: its status, its findings by kind and record, its summary.
fn fsck(image: &Image, words: &[&str]) -> (i32, Vec<(String, Option<u64>)>, serde_json::Value) {
    let out = run(&image.0, &[&["fsck", "--json"], words].concat());
    let text = String::from_utf8(out.stdout).unwrap();
    let mut lines: Vec<serde_json::Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let summary = lines.pop().unwrap_or_default();
    let found = lines
        .iter()
        .map(|l| (l["finding"].as_str().unwrap().to_owned(), l["seq"].as_u64()))
        .collect();
    (out.status.code().unwrap(), found, summary)
}

/// Damages a copy of a region, and checks it: what is found; that nothing is written
/// without being asked to; what repairing without and with loss leads to; and which
/// keys are there afterwards.
fn damaged(
    name: &str,
    bytes: &[u8],
    damage: impl FnOnce(&mut [u8]),
    found: &[(&str, Option<u64>)],
    (plain, lossy): (i32, i32),
    left: &[&str],
) {
    let mut bad = bytes.to_vec();
    damage(&mut bad);
    assert_ne!(bad, bytes, "{name}");
    let image = Image::new(name, &bad);
    let (status, is, _) = fsck(&image, &[]);
    let right: Vec<_> = found.iter().map(|(k, s)| (k.to_string(), *s)).collect();
    assert_eq!((status, is), (4, right), "{name}");
    assert_eq!(std::fs::read(&image.0).unwrap(), bad, "{name}: written to");
    assert_eq!(fsck(&image, &["--repair"]).0, plain, "{name}");
    let again = if plain == 1 { 0 } else { lossy };
    assert_eq!(fsck(&image, &["--repair=records"]).0, again, "{name}");
    if plain == 1 || lossy == 1 {
        assert_eq!(fsck(&image, &[]).0, 0, "{name}");
        text(&image, &["verify"]);
        assert_eq!(keys(&text(&image, &["ls"])), left, "{name}");
    }
}

/// Everything that `dump` says, line by line.
fn dump(bytes: &[u8]) -> Vec<serde_json::Value> {
    let image = Image::new("dump", bytes);
    let text = text(&image, &["dump", "--json"]);
    let lines = text.lines();
    lines.map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn fsck_finds_and_mends() {
    const ALL: [&str; 4] = ["a/1", "a/2", "b\\x0a", "c"];
    let (bytes, second) = region();
    let image = Image::new("clean", &bytes);
    let (status, found, summary) = fsck(&image, &[]);
    assert_eq!((status, found.len()), (0, 0));
    assert_eq!(
        (&summary["records"], &summary["checked_bytes"]),
        (&4.into(), &22.into())
    );
    assert_eq!(fsck(&image, &["--repair=records"]).0, 0);
    assert_eq!(std::fs::read(&image.0).unwrap(), bytes);

    let dump = dump(&bytes);
    let sb = &dump[0]["superblock"];
    let of = |name: &str| sb[name].as_u64().unwrap() as usize;
    let last = of("region_len") - 4096;
    let record = dump[2]["offset"].as_u64().unwrap() as usize;
    let frame = record / 4096 * 4096;
    let bit = (of("map_off") + frame / 4096 / 8, 1u8 << (frame / 4096 % 8));

    damaged(
        "first",
        &bytes,
        |b| b[100] ^= 1,
        &[("superblock", None)],
        (1, 0),
        &ALL,
    );
    damaged(
        "last",
        &bytes,
        |b| b[last + 300] ^= 1,
        &[("superblock", None)],
        (1, 0),
        &ALL,
    );
    damaged(
        "bytes",
        &bytes,
        |b| b[second as usize + 3] ^= 1,
        &[("checksum", Some(2))],
        (4, 1),
        &["a/1", "b\\x0a", "c"],
    );
    damaged(
        "header",
        &bytes,
        |b| b[frame + 16] ^= 1,
        &[("frame_damaged", None)],
        (4, 1),
        &[],
    );
    damaged(
        "header_gone",
        &bytes,
        |b| b[frame..frame + 64].fill(0x55),
        &[("frame_damaged", None)],
        (4, 1),
        &[],
    );
    damaged(
        "unmapped",
        &bytes,
        |b| b[bit.0] ^= bit.1,
        &[("frame_unmapped", None)],
        (1, 0),
        &ALL,
    );
    let frame = second as usize / 4096;
    let bit = (of("map_off") + frame / 8, 1u8 << (frame % 8));
    // A crash leaves it before the first commit in a frame that had been a payload's.
    let mut mapped = bytes.clone();
    mapped[bit.0] ^= bit.1;
    let image = Image::new("mapped", &mapped);
    let (status, found, _) = fsck(&image, &[]);
    assert_eq!(found, [("frame_other".to_string(), None)]);
    assert_eq!(status, 0);
    text(&image, &["verify"]);
    assert_eq!(fsck(&image, &["--repair"]).0, 0);
    assert_eq!(fsck(&image, &[]).1, []);
    damaged(
        "batch",
        &bytes,
        |b| b[8192..8208].copy_from_slice(b"\x01\0\0\0PKba\x05\0\0\0\0\0\0\0"),
        &[("batch_damaged", None)],
        (1, 0),
        &ALL,
    );

    // A torn record cannot be told from one that was never acknowledged.
    let mut torn = bytes.clone();
    torn[record + 65] ^= 1;
    let image = Image::new("torn", &torn);
    let (status, found, summary) = fsck(&image, &[]);
    assert_eq!(found, [("line_torn".to_string(), Some(2))]);
    assert_eq!((status, &summary["torn"]), (0, &1.into()));

    // Only bytes of some records are looked at.
    let mut bad = bytes.clone();
    bad[second as usize] ^= 1;
    let image = Image::new("filter", &bad);
    assert_eq!(fsck(&image, &["--prefix", "a/"]).0, 4);
    let (status, _, summary) = fsck(&image, &["--prefix", "c"]);
    assert_eq!((status, &summary["checked"]), (0, &1.into()));

    let nothing = Image::new("nothing", &vec![0; 16 << 20]);
    assert_eq!(run(&nothing.0, &["fsck"]).status.code(), Some(8));
    let mut both = bytes.clone();
    (both[100], both[last + 100]) = (!both[100], !both[last + 100]);
    let both = Image::new("both", &both);
    assert_eq!(run(&both.0, &["fsck", "--repair"]).status.code(), Some(4));
}

#[test]
fn fsck_looks_at_extents_and_who_uses_them() {
    let put = |store: &mut Core, key: &[u8], extents: &[Extent]| {
        let args = PutArgs {
            key: Key::Bytes(key),
            extents,
            meta: Meta::default(),
            mode: PutMode::Upsert,
            if_seq: None,
        };
        store.put(&args).unwrap()
    };
    // Extents apart from each other, so many that they are in a list.
    let (bytes, _) = region_with(|store| {
        let frame = store.frames().alloc(None, pmskb_core::Need::New).unwrap();
        let apart = |n: u64| Extent::new(frame.off() + 32 * n, 8);
        let extents: Vec<_> = (0..100).map(apart).collect();
        put(store, b"many", &extents);
    });
    let list = bytes.windows(8).position(|w| &w[4..] == b"PKel").unwrap();
    const REST: [&str; 4] = ["a/1", "a/2", "b\\x0a", "c"];
    damaged(
        "list",
        &bytes,
        |b| b[list + 200] ^= 1,
        &[("extents", Some(5))],
        (4, 1),
        &REST,
    );

    // Bytes of another object may be shared, those of a record not. An older record
    // with the key does not come back when the damaged one goes.
    let (bytes, _) = region_with(|store| {
        let first = store.lookup(b"a/1").unwrap().unwrap();
        let theirs = store.record(first).unwrap();
        let extents: Vec<_> = theirs
            .extents(store.pm(), store.geometry())
            .map(|e| e.unwrap())
            .collect();
        put(store, b"shares", &extents);
        store.commit().unwrap();
        put(
            store,
            b"c",
            &[Extent::new(first.0 / 4096 * 4096 + 2048, 100)],
        );
    });
    let image = Image::new("overlap", &bytes);
    let (status, found, summary) = fsck(&image, &[]);
    assert_eq!((status, found), (4, vec![("overlap".to_string(), Some(6))]));
    assert_eq!(summary["shared_bytes"], 5);
    assert_eq!(fsck(&image, &["--repair=records"]).0, 1);
    assert_eq!(fsck(&image, &[]).0, 0);
    assert_eq!(
        keys(&text(&image, &["ls"])),
        ["a/1", "a/2", "b\\x0a", "shares"]
    );
}

/// Puts an object of no bytes.
fn put_empty(store: &mut Core, key: Key<'_>) -> pmskb_core::PutOutcome {
    let args = PutArgs {
        key,
        extents: &[],
        meta: Meta::default(),
        mode: PutMode::Upsert,
        if_seq: None,
    };
    store.put(&args).unwrap()
}

#[test]
fn fsck_tells_what_a_power_cut_leaves_from_damage() {
    // What is found, its status, and that repairing leads to a clean image, in which
    // these keys are.
    let noted = |name: &str, bytes: &[u8], kind: &str, left: &[&str]| {
        let image = Image::new(name, bytes);
        let (status, found, _) = fsck(&image, &[]);
        let kinds: Vec<_> = found.iter().map(|(kind, _)| kind.as_str()).collect();
        assert_eq!((status, kinds), (0, vec![kind]), "{name}");
        assert_eq!(std::fs::read(&image.0).unwrap(), bytes, "{name}");
        assert_eq!(keys(&text(&image, &["ls"])), left, "{name}");
        assert_ne!(fsck(&image, &["--repair"]).0, 4, "{name}");
        let (status, found, _) = fsck(&image, &[]);
        assert_eq!((status, found.len()), (0, 0), "{name}");
        assert_eq!(keys(&text(&image, &["ls"])), left, "{name}");
    };
    const ALL: [&str; 4] = ["a/1", "a/2", "b\\x0a", "c"];

    // Truncation writes the first superblock, then the last.
    let (old, _) = region_with(|_| {});
    let (mut bytes, _) = region_with(|store| store.truncate(u64::MAX).unwrap());
    let dumped = dump(&old);
    let sb = &dumped[0]["superblock"];
    let of = |name: &str| sb[name].as_u64().unwrap() as usize;
    let last = of("region_len") - 4096;
    assert_ne!(bytes[last..], old[last..]);
    bytes[last..].copy_from_slice(&old[last..]);
    noted("stale", &bytes, "superblock_stale", &ALL);

    // A frame's bit is set before it is a record frame's that is needed.
    let mut bytes = old.clone();
    let blank = of("region_len") / 4096 - 2;
    assert!(bytes[blank * 4096..last].iter().all(|b| *b == 0));
    bytes[of("map_off") + blank / 8] |= 1 << (blank % 8);
    noted("blank", &bytes, "frame_blank", &ALL);

    // An atomic array that is in force, one word of which is not in its place.
    let mut pending = vec![0; old.len()];
    region_with(|store| {
        store.begin_atomic().unwrap();
        put_empty(store, Key::Bytes(b"d"));
        let at = put_empty(store, Key::Bytes(b"e")).loc.0 as usize;
        store.commit().unwrap();
        store.pm().read(0, &mut pending).unwrap();
        pending[at..at + 8].fill(0);
    });
    let both = ["a/1", "a/2", "b\\x0a", "c", "d", "e"];
    noted("pending", &pending, "batch_pending", &both);

    // So much was committed after it that it was acknowledged.
    let mut at = 0;
    let (mut bytes, _) = region_with(|store| {
        at = put_empty(store, Key::None).loc.0 as usize;
        for _ in 0..1200 {
            put_empty(store, Key::None);
            store.commit().unwrap();
        }
    });
    bytes[at + 20] ^= 1;
    let image = Image::new("acknowledged", &bytes);
    let (status, found, _) = fsck(&image, &[]);
    assert_eq!(found, [("line_damaged".to_string(), Some(5))]);
    assert_eq!(status, 4);
    assert_eq!(fsck(&image, &["--repair"]).0, 4);
    assert_eq!(fsck(&image, &["--repair=records"]).0, 1);
    assert_eq!(fsck(&image, &[]).0, 0);
    text(&image, &["verify"]);
}
