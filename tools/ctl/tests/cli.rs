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
    // Without its first superblock, only who knows the place finds it.
    raw[2 << 20..(2 << 20) + 4096].fill(0);
    let image = Image::new("damaged", &raw);
    assert_eq!(run(&image.0, &["ls"]).status.code(), Some(2));
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
