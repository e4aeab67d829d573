// SPDX-License-Identifier: GPL-2.0-only

//! A store and a client in memory, and what must hold of a connection between
//! them.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use pmskb_uapi::{sys, Batch, Ext, Outcome};
use proptest::prelude::*;

use crate::{
    conn::{Conn, Limits, Next, Timeout},
    reply::Wire,
    store::{Found, Store},
    view::{Memory, Packet},
};

/// Offset and length of an object's parts.
type Places = Vec<(u64, u64)>;

/// A store in memory. Packets are put at ever higher offsets; objects are kept
/// by their place, as in the real one.
#[derive(Default)]
struct Fake {
    bytes: Vec<u8>,
    records: BTreeMap<Vec<u8>, (Found, Places)>,
    /// Tokens handed out, and whether they are held.
    tokens: HashMap<u32, (u64, u32, bool)>,
    seq: u64,
    submits: usize,
    puts: usize,
    keys_in_packets: usize,
    /// Errno of the next puts.
    failure: Option<i32>,
}

impl Fake {
    /// Receives a packet: `gap` bytes after the one before.
    fn packet(&mut self, bytes: &[u8], gap: usize) -> Packet {
        self.bytes.resize(self.bytes.len() + gap, b'#');
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        let token = self.tokens.len() as u32 + 1;
        self.tokens
            .insert(token, (offset, bytes.len() as u32, true));
        Packet {
            token,
            offset,
            len: bytes.len() as u32,
        }
    }

    fn held(&self) -> usize {
        self.tokens.values().filter(|t| t.2).count()
    }

    fn place(&self, ext: &Ext) -> (u64, u64) {
        let (offset, len, held) = self.tokens[&ext.token];
        assert!(held, "token {} was released before it was used", ext.token);
        assert!(
            ext.len >= 1 && ext.offset + ext.len <= len,
            "{ext:?} is not within its token"
        );
        (offset + u64::from(ext.offset), ext.len.into())
    }

    fn gather(&self, places: &[(u64, u64)]) -> Vec<u8> {
        places
            .iter()
            .flat_map(|&(o, l)| self.bytes[o as usize..(o + l) as usize].to_vec())
            .collect()
    }

    fn object(&self, key: &[u8]) -> Option<Vec<u8>> {
        Some(self.gather(&self.records.get(key)?.1))
    }
}

impl Memory for Fake {
    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        self.bytes.get(offset as usize..(offset + len) as usize)
    }
}

impl Store for Fake {
    fn find(&self, key: &[u8]) -> io::Result<Option<Found>> {
        Ok(self.records.get(key).map(|r| r.0.clone()))
    }

    fn open(&self, key: &[u8]) -> io::Result<Option<(Found, File)>> {
        let Some(found) = self.find(key)? else {
            return Ok(None);
        };
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::memfd_create("object", flags)?);
        file.write_all(&self.object(key).unwrap())?;
        Ok(Some((found, file)))
    }

    fn list(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> io::Result<Vec<Vec<u8>>> {
        let keys = self.records.keys().filter(|k| k.starts_with(prefix));
        let keys = keys.filter(|k| after.is_none_or(|a| k.as_slice() > a));
        Ok(keys.take(limit).cloned().collect())
    }

    fn submit(&mut self, batch: &mut Batch) -> io::Result<()> {
        self.submits += 1;
        let mut outcomes = Vec::new();
        for op in batch.ops() {
            let any = op.opcode == sys::PMSKB_OP_DELETE;
            assert_eq!(op.fd, if any { -1 } else { 7 });
            if op.opcode == sys::PMSKB_OP_RELEASE {
                for ext in &op.extents {
                    let token = self.tokens.get_mut(&ext.token).unwrap();
                    assert!(token.2, "token {} was released twice", ext.token);
                    token.2 = false;
                }
                outcomes.push(Ok(Outcome {
                    seq: op.extents.len() as u64,
                    replaced: false,
                    copied: false,
                    csum: 0,
                    csum_kind: 0,
                }));
                continue;
            }
            // What IF_SEQ asks for: 0 is no record.
            let stale = |seq: Option<u64>| {
                op.flags & sys::PMSKB_OP_IF_SEQ != 0 && seq.unwrap_or(0) != op.seq
            };
            let seq_of = |key: &[u8]| self.records.get(key).map(|(found, _)| found.seq);
            if op.opcode == sys::PMSKB_OP_DELETE {
                assert!((1..=1024).contains(&op.key.len()));
                let done = match self.records.get(&op.key) {
                    None => Err(io::Error::from_raw_os_error(2)),
                    Some((found, _)) if stale(Some(found.seq)) => {
                        Err(io::Error::from_raw_os_error(116))
                    }
                    Some((found, _)) => Ok(Outcome {
                        seq: found.seq,
                        replaced: false,
                        copied: false,
                        csum: 0,
                        csum_kind: 0,
                    }),
                };
                if done.is_ok() {
                    self.records.remove(&op.key);
                }
                outcomes.push(done);
                continue;
            }
            assert_eq!(op.opcode, sys::PMSKB_OP_PUT);
            self.puts += 1;
            let extents: Vec<_> = op.extents.iter().map(|e| self.place(e)).collect();
            let key = if op.key_extents.is_empty() {
                op.key.clone()
            } else {
                self.keys_in_packets += 1;
                let places: Vec<_> = op.key_extents.iter().map(|e| self.place(e)).collect();
                self.gather(&places)
            };
            assert!((1..=1024).contains(&key.len()));
            if let Some(errno) = self.failure {
                outcomes.push(Err(io::Error::from_raw_os_error(errno)));
                continue;
            }
            if op.flags & sys::PMSKB_OP_CREATE != 0 && self.records.contains_key(&key) {
                outcomes.push(Err(io::Error::from_raw_os_error(17)));
                continue;
            }
            if op.flags & sys::PMSKB_OP_REPLACE != 0 && !self.records.contains_key(&key) {
                outcomes.push(Err(io::Error::from_raw_os_error(2)));
                continue;
            }
            if stale(seq_of(&key)) {
                outcomes.push(Err(io::Error::from_raw_os_error(116)));
                continue;
            }
            self.seq += 1;
            let len = extents.iter().map(|e| e.1).sum();
            let found = Found {
                seq: self.seq,
                len,
                modified: None,
            };
            let replaced = self.records.insert(key, (found, extents)).is_some();
            outcomes.push(Ok(Outcome {
                seq: self.seq,
                replaced,
                copied: false,
                csum: 0,
                csum_kind: 0,
            }));
        }
        batch.set_outcomes(outcomes);
        Ok(())
    }
}

/// A client's end, which takes so many bytes at a time.
struct End {
    out: Vec<u8>,
    room: usize,
    /// Calls until the next that would block.
    calls: usize,
}

impl Wire for End {
    fn send(&mut self, bytes: &[u8], _more: bool) -> io::Result<usize> {
        if self.calls == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.calls -= 1;
        let n = bytes.len().min(self.room);
        self.out.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn send_file(&mut self, object: &File, offset: u64, len: usize) -> io::Result<usize> {
        let mut bytes = vec![0; len];
        object.read_exact_at(&mut bytes, offset)?;
        self.send(&bytes, false)
    }
}

/// A connection with everything around it.
struct World {
    store: Fake,
    conn: Conn,
    batch: Batch,
    now: Instant,
    out: Vec<u8>,
    room: usize,
    next: Next,
    shut: bool,
}

impl World {
    fn new() -> Self {
        Self::with_max(1 << 20)
    }

    fn with_max(max_body: u64) -> Self {
        let now = Instant::now();
        let limits = Limits {
            max_body,
            ..Limits::default()
        };
        Self {
            store: Fake::default(),
            conn: Conn::new(7, limits, now),
            batch: Batch::new(),
            now,
            out: Vec::new(),
            room: usize::MAX,
            next: Next::Wait {
                read: true,
                write: false,
            },
            shut: false,
        }
    }

    /// What the server does with a packet.
    fn packets(&mut self, parts: &[(&[u8], usize)]) {
        let packets: Vec<_> = parts
            .iter()
            .map(|(b, gap)| self.store.packet(b, *gap))
            .collect();
        assert!(self.conn.receive(packets, &self.store, self.now));
        self.turn();
    }

    fn turn(&mut self) {
        for _ in 0..10_000 {
            let mut progress = self.conn.advance(&self.store, &mut self.batch, self.now);
            self.send();
            if !self.batch.is_empty() {
                self.store.submit(&mut self.batch).unwrap();
                self.conn.resolve(&self.batch);
                self.batch.clear();
            }
            self.send();
            progress |= self.conn.take_progress();
            let blocked = matches!(self.next, Next::Wait { write: true, .. });
            if !progress && !blocked {
                return;
            }
        }
        panic!("the connection never comes to rest");
    }

    fn send(&mut self) {
        let mut end = End {
            out: std::mem::take(&mut self.out),
            room: self.room,
            calls: if self.room == usize::MAX {
                usize::MAX
            } else {
                1
            },
        };
        self.next = self.conn.send(&mut end, self.now);
        self.shut |= self.next == Next::ShutDown;
        self.out = end.out;
    }

    fn end(&mut self) {
        self.conn.end();
        self.turn();
    }

    /// Replies as status and body.
    fn replies(&self) -> Vec<(u16, Vec<u8>)> {
        let mut replies = Vec::new();
        let mut rest = &self.out[..];
        while !rest.is_empty() {
            let mut fields = [httparse::EMPTY_HEADER; 20];
            let mut reply = httparse::Response::new(&mut fields);
            let httparse::Status::Complete(n) = reply.parse(rest).unwrap() else {
                panic!("half a reply: {:?}", String::from_utf8_lossy(rest));
            };
            let field = reply.headers.iter().find(|h| h.name == "Content-Length");
            let len = field.map_or(0, |h| {
                std::str::from_utf8(h.value).unwrap().parse().unwrap()
            });
            replies.push((reply.code.unwrap(), rest[n..n + len].to_vec()));
            rest = &rest[n + len..];
        }
        replies
    }

    fn statuses(&self) -> Vec<u16> {
        self.replies().iter().map(|r| r.0).collect()
    }
}

/// What one request, alone on a connection, is answered.
fn answer(request: &[u8]) -> Vec<u16> {
    let mut world = World::new();
    world.packets(&[(request, 0)]);
    world.end();
    assert_eq!(
        world.next,
        Next::Close,
        "{:?}",
        String::from_utf8_lossy(request)
    );
    assert_eq!(
        world.store.held(),
        0,
        "{:?}",
        String::from_utf8_lossy(request)
    );
    world.statuses()
}

fn put(key: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "PUT /{key} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn get(key: &str) -> Vec<u8> {
    format!("GET /{key} HTTP/1.1\r\nHost: h\r\n\r\n").into_bytes()
}

#[test]
fn an_object_is_kept_where_it_lies() {
    let mut world = World::new();
    world.packets(&[(&put("a", b"hello"), 0)]);
    assert_eq!(world.statuses(), [201]);
    assert_eq!(world.store.object(b"a").unwrap(), b"hello");
    assert_eq!(world.store.keys_in_packets, 1);
    assert_eq!(world.store.held(), 0);
    let text = String::from_utf8(world.out.clone()).unwrap();
    assert!(text.contains("\r\nLocation: /a\r\n"), "{text}");
    assert!(text.contains("\r\nETag: \"1\"\r\n"), "{text}");
    world.packets(&[(&put("a", b""), 0)]);
    assert_eq!(world.statuses(), [201, 200]);
    assert_eq!(world.store.object(b"a").unwrap(), b"");
}

#[test]
fn many_requests_of_a_packet_share_a_submission() {
    let mut world = World::new();
    let all: Vec<u8> = (0..50)
        .flat_map(|i| put(&format!("k{i}"), &[i; 10]))
        .collect();
    world.packets(&[(&all, 0)]);
    assert_eq!(world.statuses(), [201; 50]);
    assert_eq!(world.store.submits, 1);
    assert_eq!(world.store.held(), 0);
    assert_eq!(world.store.object(b"k49").unwrap(), [49; 10]);
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let mut world = World::new();
    for byte in put("key", b"body").chunks(1) {
        world.packets(&[(byte, 3)]);
    }
    assert_eq!(world.statuses(), [201]);
    assert_eq!(world.store.object(b"key").unwrap(), b"body");
    assert_eq!(
        world.store.keys_in_packets, 0,
        "the key lay in several packets"
    );
    assert_eq!(world.store.held(), 0);
}

#[test]
fn a_get_sees_the_put_before_it() {
    let mut world = World::new();
    world.packets(&[(
        &[put("a", b"one"), get("a"), put("a", b"two"), get("a")].concat(),
        0,
    )]);
    let replies = world.replies();
    assert_eq!(replies[1], (200, b"one".to_vec()));
    assert_eq!(replies[3], (200, b"two".to_vec()));
}

#[test]
fn chunks_are_joined_and_their_framing_left_out() {
    let mut world = World::new();
    let request = b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n1;x=\"y\"\r\n \r\n0A\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n";
    world.packets(&[(&[&request[..], &get("c")].concat(), 0)]);
    assert_eq!(world.replies()[1], (200, b"hello 0123456789".to_vec()));
    assert_eq!(world.store.held(), 0);
    let empty = b"PUT /e HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    world.packets(&[(empty, 0)]);
    assert_eq!(world.store.object(b"e").unwrap(), b"");
}

#[test]
fn encoded_keys_are_decoded() {
    let mut world = World::new();
    world.packets(&[(&put("a%20b%2Fc/d", b"x"), 0)]);
    assert_eq!(world.store.object(b"a b/c/d").unwrap(), b"x");
    assert!(String::from_utf8_lossy(&world.out).contains("Location: /a%20b/c/d\r\n"));
    world.packets(&[(b"GET http://host/a%20b/c/d HTTP/1.1\r\nHost: h\r\n\r\n", 0)]);
    assert_eq!(world.replies()[1], (200, b"x".to_vec()));
}

#[test]
fn keys_are_listed_in_order() {
    let mut world = World::new();
    for key in ["b/2", "a", "b/1", "b/3%0A", "c"] {
        world.packets(&[(&put(key, b"x"), 0)]);
    }
    world.out.clear();
    for query in [
        "?prefix=b/",
        "?prefix=b/&limit=1",
        "?prefix=b%2F&after=b/1",
        "",
    ] {
        world.packets(&[(&get(query), 0)]);
    }
    let bodies: Vec<_> = world
        .replies()
        .into_iter()
        .map(|r| String::from_utf8(r.1).unwrap())
        .collect();
    let expected = [
        "b/1\nb/2\nb/3%0A\n",
        "b/1\n",
        "b/2\nb/3%0A\n",
        "a\nb/1\nb/2\nb/3%0A\nc\n",
    ];
    assert_eq!(bodies, expected);
}

#[test]
fn ranges_and_tags() {
    let mut world = World::new();
    world.packets(&[(&put("r", b"01234"), 0)]);
    // The object lies in two parts.
    let parts = put("s", b"0123456789");
    world.packets(&[
        (&parts[..parts.len() - 6], 5),
        (&parts[parts.len() - 6..], 9),
    ]);
    world.out.clear();
    let with = |key: &str, field: &str| {
        format!("GET /{key} HTTP/1.1\r\nHost: h\r\n{field}\r\n\r\n").into_bytes()
    };
    for (field, status, body) in [
        ("Range: bytes=1-2", 206, "12"),
        ("Range: bytes=3-6", 206, "3456"),
        ("Range: bytes=5-", 206, "56789"),
        ("Range: bytes=-3", 206, "789"),
        ("Range: bytes=4-99", 206, "456789"),
        ("Range: bytes=10-", 416, "416 Range Not Satisfiable\n"),
        ("Range: bytes=2-1", 200, "0123456789"),
        ("Range: lines=1-2", 200, "0123456789"),
        ("If-None-Match: \"2\"", 304, ""),
        ("If-None-Match: W/\"7\", \"2\"", 304, ""),
        ("If-None-Match: \"1\"", 200, "0123456789"),
    ] {
        world.out.clear();
        world.packets(&[(&with("s", field), 0)]);
        assert_eq!(
            world.replies(),
            [(status, body.as_bytes().to_vec())],
            "{field}"
        );
    }
}

#[test]
fn heads_have_no_body() {
    let mut world = World::new();
    world.packets(&[(&put("a", b"hello"), 0)]);
    world.out.clear();
    for key in ["a", "none", &"x".repeat(2000)] {
        let request = format!("HEAD /{key} HTTP/1.1\r\nHost: h\r\n\r\n");
        world.packets(&[(request.as_bytes(), 0)]);
    }
    let text = String::from_utf8(world.out).unwrap();
    let heads: Vec<&str> = text.split_terminator("\r\n\r\n").collect();
    assert_eq!(heads.len(), 3, "{text}");
    assert!(heads.iter().all(|h| h.starts_with("HTTP/1.1 ")), "{text}");
}

#[test]
fn conditions() {
    let mut world = World::new();
    let put = |field: &str| {
        format!("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n{field}\r\n\r\nx").into_bytes()
    };
    world.packets(&[(&put("If-None-Match: *"), 0)]);
    world.packets(&[(&put("If-None-Match: *"), 0)]);
    world.packets(&[(&put("If-None-Match: \"1\""), 0)]);
    assert_eq!(world.statuses(), [201, 412, 412]);
    assert_eq!(world.store.held(), 0);
    // The record is 1, then 2, then 3.
    world.out.clear();
    for (field, status) in [
        ("If-Match: \"1\"", 200),
        ("If-Match: \"1\"", 412),
        ("If-Match: \"2\", \"other\"", 200),
        ("If-Match: W/\"3\"", 412),
        ("If-Match: \"3\", \"4\"", 412),
        ("If-Match: \"0\"", 412),
        ("If-Match: \"03\"", 412),
        ("If-Match: 3", 412),
        ("If-Match: *", 200),
    ] {
        world.out.clear();
        world.packets(&[(&put(field), 0)]);
        assert_eq!(world.statuses(), [status], "{field}");
    }
    world.store.records.clear();
    for field in ["If-Match: *", "If-Match: \"4\""] {
        world.out.clear();
        world.packets(&[(&put(field), 0)]);
        assert_eq!(world.statuses(), [412], "{field}");
    }
    assert_eq!(world.store.held(), 0);
}

fn delete(key: &str, field: &str) -> Vec<u8> {
    format!("DELETE /{key} HTTP/1.1\r\nHost: h\r\n{field}\r\n").into_bytes()
}

#[test]
fn objects_are_deleted() {
    let mut world = World::new();
    let all = [
        put("a%20b", b"one"),
        delete("a%20b", ""),
        delete("a%20b", ""),
        put("a%20b", b"two"),
        get("a%20b"),
    ];
    world.packets(&[(&all.concat(), 0)]);
    assert_eq!(world.statuses(), [201, 204, 404, 201, 200]);
    assert_eq!(world.replies()[4].1, b"two");
    assert_eq!(
        world.store.submits, 1,
        "puts and deletes share a submission"
    );
    let text = String::from_utf8(world.out.clone()).unwrap();
    let head = text.split("\r\n\r\n").nth(1).unwrap();
    assert!(head.starts_with("HTTP/1.1 204 No Content\r\n"), "{head}");
    assert!(!head.contains("Content-Length"), "{head}");

    for (field, status) in [
        ("If-None-Match: *\r\n", 412),
        ("If-Match: \"1\"\r\n", 412),
        ("If-Match: \"2\"\r\n", 204),
        ("If-Match: \"2\"\r\n", 412),
        ("If-Match: *\r\n", 412),
        ("Content-Length: 3\r\n", 400),
    ] {
        world.out.clear();
        let body: &[u8] = if status == 400 { b"xyz" } else { b"" };
        let request = match status {
            400 => [&delete("", field)[..], body].concat(),
            _ => delete("a%20b", field),
        };
        world.packets(&[(&request, 0)]);
        assert_eq!(world.statuses(), [status], "{field}");
    }
    assert_eq!(world.store.held(), 0);
    // A body is read over.
    let request = [&delete("a", "Content-Length: 3\r\n")[..], b"xyz"].concat();
    assert_eq!(answer(&[request, get("a")].concat()), [404, 404]);
}

#[test]
fn what_cannot_be_done_is_refused_and_the_next_request_served() {
    for (request, status) in [
        ("DELETE /a HTTP/1.1\r\nHost: h\r\n\r\n", 404),
        (
            "PATCH /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc",
            405,
        ),
        ("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 405),
        ("BREW /a HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        ("GET /none HTTP/1.1\r\nHost: h\r\n\r\n", 404),
        ("GET /none HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 404),
        ("\r\n\r\nGET /none HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    ] {
        let both = [request.as_bytes(), b"GET /none HTTP/1.1\r\nHost: h\r\n\r\n"].concat();
        assert_eq!(answer(&both), [status, 404], "{request:?}");
    }
    let long = format!("PUT /{} HTTP/1.1\r\nHost: h\r\n\r\n", "x".repeat(1025));
    assert_eq!(
        answer(&[long.as_bytes(), &get("none")].concat()),
        [414, 404]
    );
    let fits = format!("PUT /{} HTTP/1.1\r\nHost: h\r\n\r\n", "x".repeat(1024));
    assert_eq!(answer(fits.as_bytes()), [201]);
}

#[test]
fn what_cannot_be_understood_is_refused_and_the_connection_closed() {
    let chunked = "PUT /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let cases = [
        ("GARBAGE\r\n\r\n".to_string(), 400),
        ("GET / HTTP/2.0\r\n\r\n".into(), 505),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), 505),
        ("GET / HTTP/1.1\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".into(), 400),
        ("GET / SMTP/1.1\r\n\r\n".into(), 400),
        ("GET a HTTP/1.1\r\nHost: h\r\n\r\n".into(), 400),
        ("GET /%4 HTTP/1.1\r\nHost: h\r\n\r\n".into(), 400),
        ("GET /%zz HTTP/1.1\r\nHost: h\r\n\r\n".into(), 400),
        ("GET /?x=1 HTTP/1.1\r\nHost: h\r\n\r\n".into(), 400),
        ("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx".into(), 400),
        ("PUT /a?b HTTP/1.1\r\nHost: h\r\n\r\n".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1, 1\r\n\r\nx".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\nx".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\n\r\nx".into(), 413),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n".into(), 501),
        ("PUT /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\n\r\n".into(), 415),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nExpect: tea\r\n\r\n".into(), 417),
        ("PUT /a HTTP/1.1\r\nHost : h\r\n\r\n".into(), 400),
        ("PUT /a HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n".into(), 400),
        (format!("{chunked}x\r\n"), 400),
        (format!("{chunked}-1\r\n"), 400),
        (format!("{chunked}1 x\r\n"), 400),
        (format!("{chunked}5\nhello\r\n"), 400),
        (format!("{chunked}5\r\nhelloworld\r\n"), 400),
        (format!("{chunked}{}\r\n", "0".repeat(17)), 400),
        (format!("{chunked}1;{}\r\n", "x".repeat(300)), 400),
        (format!("{chunked}ffffffffffffffff\r\n"), 413),
        (format!("{chunked}0\r\n{}", "A: b\r\n".repeat(2000)), 431),
        (format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "x".repeat(20_000)), 431),
        (format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "A: b\r\n".repeat(101)), 431),
        ("\r\n".repeat(9), 400),
    ];
    for (request, status) in cases {
        let both = [request.as_bytes(), b"GET /none HTTP/1.1\r\nHost: h\r\n\r\n"].concat();
        assert_eq!(answer(&both), [status], "{request:?}");
    }
}

#[test]
fn a_body_is_waited_for_if_the_client_waits() {
    let head = "PUT /a HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
    let mut world = World::new();
    world.packets(&[(head.as_bytes(), 0)]);
    assert_eq!(world.statuses(), [100]);
    world.packets(&[(b"ab", 0)]);
    assert_eq!(world.statuses(), [100, 201]);
    // It is there already.
    world.packets(&[(format!("{head}ab").as_bytes(), 0)]);
    assert_eq!(world.statuses(), [100, 201, 200]);
    // It is not wanted.
    world.packets(&[(head.replace("PUT", "PATCH").as_bytes(), 0)]);
    assert_eq!(world.statuses(), [100, 201, 200, 405]);
    assert!(world.shut);
    let large = head.replace(" 2\r", " 2000000\r");
    assert_eq!(answer(large.as_bytes()), [413]);
}

#[test]
fn a_full_store_is_said_so_and_served_on() {
    let mut world = World::new();
    world.store.failure = Some(28);
    world.packets(&[(&put("a", b"x"), 0)]);
    world.store.failure = Some(105);
    world.packets(&[(&put("a", b"x"), 0)]);
    world.store.failure = None;
    world.packets(&[(&put("a", b"x"), 0)]);
    assert_eq!(world.statuses(), [507, 503, 201]);
    assert_eq!(world.store.held(), 0);
}

#[test]
fn the_end_of_the_stream_ends_the_connection_when_all_is_answered() {
    let mut world = World::new();
    world.packets(&[(&put("a", b"x"), 0)]);
    world.end();
    assert_eq!((world.statuses(), world.next), (vec![201], Next::Close));
    // Half a request is no request.
    let request = put("b", b"body");
    for len in 1..request.len() {
        let mut world = World::new();
        world.packets(&[(&request[..len], 0)]);
        world.end();
        assert_eq!((world.statuses(), world.next), (vec![], Next::Close));
        assert_eq!((world.store.held(), world.store.puts), (0, 0));
    }
}

#[test]
fn close_is_honoured() {
    let mut world = World::new();
    let request = "GET /a HTTP/1.1\r\nHost: h\r\nConnection: x, Close\r\n\r\n";
    world.packets(&[(request.as_bytes(), 0), (&get("b"), 0)]);
    assert_eq!(world.statuses(), [404]);
    assert!(world.shut);
    assert_eq!(world.store.held(), 0);
    world.packets(&[(&get("b"), 0)]);
    assert_eq!((world.statuses().len(), world.store.held()), (1, 0));
}

#[test]
fn an_object_that_is_replaced_while_it_is_sent_is_sent_as_it_was() {
    let mut world = World::new();
    world.packets(&[(&put("a", &[b'x'; 1000]), 0)]);
    world.room = 100;
    let packet = world.store.packet(&get("a"), 0);
    world.conn.receive([packet], &world.store, world.now);
    world
        .conn
        .advance(&world.store, &mut world.batch, world.now);
    world.batch.clear();
    let mut end = End {
        out: vec![],
        room: 100,
        calls: 4,
    };
    let next = world.conn.send(&mut end, world.now);
    assert!(matches!(next, Next::Wait { write: true, .. }));
    world.store.records.clear();
    world.store.bytes.fill(b'!');
    end.calls = 20;
    let next = world.conn.send(&mut end, world.now);
    assert!(matches!(next, Next::Wait { write: false, .. }));
    assert!(end.out.ends_with(&[b'x'; 1000]));
}

#[test]
fn slow_clients_are_given_up() {
    let minute = Duration::from_secs(60);
    let mut world = World::new();
    assert_eq!(world.conn.timed_out(world.now), None);
    assert_eq!(
        world.conn.timed_out(world.now + 2 * minute),
        Some(Timeout::Dead)
    );
    world.packets(&[(b"GET /", 0)]);
    assert_eq!(
        world.conn.timed_out(world.now + minute),
        Some(Timeout::Slow)
    );
    // A byte now and then does not help.
    world.now += Duration::from_secs(15);
    world.packets(&[(b"a", 0)]);
    assert_eq!(
        world.conn.timed_out(world.now + Duration::from_secs(6)),
        Some(Timeout::Slow)
    );
    world.conn.give_up(408);
    world.turn();
    assert_eq!(world.statuses(), [408]);
    let mut world = World::new();
    let request = put("a", b"body");
    world.packets(&[(&request[..request.len() - 1], 0)]);
    assert_eq!(
        world.conn.timed_out(world.now + minute),
        Some(Timeout::Slow)
    );
    assert!(world.conn.held() > 0);
    world.conn.give_up(408);
    world.turn();
    assert_eq!((world.store.held(), world.store.puts), (0, 0));
}

#[test]
fn replies_that_are_not_taken_stop_the_reading() {
    let mut world = World::new();
    world.packets(&[(&put("a", &[b'x'; 100]), 0)]);
    world.out.clear();
    let all = get("a").repeat(1000);
    let packet = world.store.packet(&all, 0);
    world.conn.receive([packet], &world.store, world.now);
    world
        .conn
        .advance(&world.store, &mut world.batch, world.now);
    world.batch.clear();
    let mut end = End {
        out: vec![],
        room: 10,
        calls: 1,
    };
    let next = world.conn.send(&mut end, world.now);
    assert_eq!(
        next,
        Next::Wait {
            read: false,
            write: true
        }
    );
    let waited = world.now + Duration::from_secs(31);
    assert_eq!(world.conn.timed_out(waited), Some(Timeout::Dead));
    world.out = end.out;
    world.turn();
    assert_eq!(world.statuses(), [200; 1000]);
}

/// A request, and what is answered if it is the first of its key.
fn any_request() -> impl Strategy<Value = (Vec<u8>, Vec<u8>, Vec<u8>)> {
    let body = proptest::collection::vec(any::<u8>(), 0..300);
    let key = "[a-c]{1,3}|[a-c]{0,2}%2[0f]";
    let chunks = proptest::collection::vec(1usize..50, 1..8);
    (key, body, proptest::option::of(chunks)).prop_map(|(key, body, chunks)| {
        let mut out = format!("PUT /{key} HTTP/1.1\r\nHost: h\r\n").into_bytes();
        match chunks {
            None => {
                out.extend(format!("Content-Length: {}\r\n\r\n", body.len()).bytes());
                out.extend(&body);
            }
            Some(sizes) => {
                out.extend(b"Transfer-Encoding: chunked\r\n\r\n");
                let mut rest = &body[..];
                for size in sizes.iter().cycle() {
                    let (chunk, tail) = rest.split_at(rest.len().min(*size));
                    out.extend(format!("{:x}\r\n", chunk.len()).bytes());
                    out.extend(chunk);
                    out.extend(b"\r\n");
                    rest = tail;
                    if chunk.is_empty() {
                        break;
                    }
                }
            }
        }
        let decoded = key.replace("%20", " ").replace("%2f", "/").into_bytes();
        (out, decoded, body)
    })
}

/// Cuts a stream into packets at the given places, with gaps in memory, and
/// several packets to a turn.
fn feed(world: &mut World, stream: &[u8], cuts: &[(usize, usize, bool)]) {
    let mut rest = stream;
    let mut turn: Vec<(&[u8], usize)> = Vec::new();
    for &(len, gap, ends) in cuts.iter().cycle() {
        let (part, tail) = rest.split_at(rest.len().min(len));
        turn.push((part, gap));
        rest = tail;
        if ends || rest.is_empty() {
            world.packets(&std::mem::take(&mut turn));
        }
        if rest.is_empty() {
            return;
        }
    }
}

fn any_cuts() -> impl Strategy<Value = Vec<(usize, usize, bool)>> {
    let cut = (
        1usize..400,
        prop_oneof![Just(0usize), 1usize..20],
        any::<bool>(),
    );
    proptest::collection::vec(cut, 1..20)
}

proptest! {
    #[test]
    fn however_requests_are_cut_into_packets_the_objects_are_the_same(
        requests in proptest::collection::vec(any_request(), 1..12),
        cuts in any_cuts(),
        room in prop_oneof![Just(usize::MAX), 1usize..200],
    ) {
        let mut world = World::new();
        world.room = room;
        let stream: Vec<u8> = requests.iter().flat_map(|r| r.0.clone()).collect();
        feed(&mut world, &stream, &cuts);
        let mut objects = BTreeMap::new();
        let mut statuses = Vec::new();
        for (_, key, body) in &requests {
            statuses.push(if objects.insert(key, body).is_some() { 200 } else { 201 });
        }
        prop_assert_eq!(world.statuses(), statuses);
        for (key, body) in objects {
            prop_assert_eq!(&world.store.object(key).unwrap(), body);
        }
        prop_assert_eq!(world.store.held(), 0);
    }

    #[test]
    fn hostile_bytes_do_no_harm(
        requests in proptest::collection::vec(any_request(), 1..6),
        harm in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
        cuts in any_cuts(),
    ) {
        let mut stream: Vec<u8> = requests.iter().flat_map(|r| r.0.clone()).collect();
        for (at, byte, how) in harm {
            let at = at.index(stream.len());
            match how {
                0 => stream[at] = byte,
                1 => stream.insert(at, byte),
                _ => { stream.remove(at); }
            }
            if stream.is_empty() {
                stream.push(0);
            }
        }
        let mut world = World::new();
        feed(&mut world, &stream, &cuts);
        world.end();
        prop_assert_eq!(world.next, Next::Close);
        prop_assert_eq!(world.store.held(), 0);
        world.replies();
    }

    #[test]
    fn noise_is_refused(
        stream in proptest::collection::vec(any::<u8>(), 1..3000),
        cuts in any_cuts(),
    ) {
        let mut world = World::new();
        feed(&mut world, &stream, &cuts);
        world.end();
        prop_assert_eq!(world.next, Next::Close);
        prop_assert_eq!((world.store.held(), world.store.puts), (0, 0));
    }
}
