// SPDX-License-Identifier: GPL-2.0-only

//! Replies, and the queue that they wait in.

use std::{cell::RefCell, collections::VecDeque, fmt::Write as _, fs::File, io};

use crate::store::Found;

/// A socket, to write to.
pub trait Wire {
    /// Sends bytes; how many. `more`: others follow at once.
    fn send(&mut self, bytes: &[u8], more: bool) -> io::Result<usize>;
    /// Sends bytes of an object; how many.
    fn send_file(&mut self, object: &File, offset: u64, len: usize) -> io::Result<usize>;
}

/// A part of a reply.
#[derive(Debug)]
enum Part {
    /// Bytes.
    Bytes(Vec<u8>),
    /// A part of an object: where in it the next byte is, and how many are left.
    Object { object: File, at: u64, left: u64 },
    /// A change whose outcome is not known yet: which operation of the batch.
    Pending {
        op: usize,
        change: Change,
        keep_alive: bool,
    },
}

/// What was asked for.
#[derive(Debug)]
enum Change {
    /// A put, and where its object will be.
    Put(Vec<u8>),
    /// A delete.
    Delete { conditional: bool },
}

/// What is to be sent on a connection, in order.
#[derive(Debug, Default)]
pub struct Queue {
    parts: VecDeque<Part>,
    /// Bytes of the first part already sent, if it is bytes.
    sent: usize,
    pending: usize,
    objects: usize,
}

/// What became of an attempt to send the queue.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    /// All of it.
    All,
    /// The socket takes no more now.
    Blocked,
    /// The rest waits for the batch.
    Pending,
}

impl Queue {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Parts of replies that wait.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// Changes whose outcome is not known yet.
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Whether an object waits, with an open file and frames that are held for it.
    pub fn has_object(&self) -> bool {
        self.objects > 0
    }

    /// Bytes to be appended to.
    fn tail(&mut self) -> &mut Vec<u8> {
        if !matches!(self.parts.back(), Some(Part::Bytes(_))) {
            self.parts.push_back(Part::Bytes(Vec::new()));
        }
        match self.parts.back_mut() {
            Some(Part::Bytes(bytes)) => bytes,
            _ => unreachable!("just pushed"),
        }
    }

    /// The go-ahead for a body.
    pub fn push_continue(&mut self) {
        self.tail()
            .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
    }

    /// A reply with a short text.
    pub fn push_status(&mut self, status: u16, keep_alive: bool, head: bool) {
        write_status(self.tail(), status, keep_alive, head);
    }

    /// A reply with a text.
    pub fn push_text(&mut self, text: &[u8], keep_alive: bool, head: bool) {
        let out = self.tail();
        let mut reply = Head::new(out, 200, keep_alive);
        reply.field("Content-Type", "text/plain; charset=utf-8");
        reply.field("Content-Length", text.len());
        reply.end();
        if !head {
            out.extend_from_slice(text);
        }
    }

    /// A reply with an object, or a part of it. Without a file it is the head only.
    pub fn push_object(
        &mut self,
        found: &Found,
        object: Option<File>,
        range: Option<std::ops::Range<u64>>,
        keep_alive: bool,
    ) {
        let status = if range.is_some() { 206 } else { 200 };
        let part = range.clone().unwrap_or(0..found.len);
        let mut reply = Head::new(self.tail(), status, keep_alive);
        reply.field("Content-Type", "application/octet-stream");
        reply.field("Content-Length", part.end - part.start);
        reply.field("Accept-Ranges", "bytes");
        reply.field("ETag", format_args!("\"{}\"", found.seq));
        if let Some(time) = found.modified {
            reply.field("Last-Modified", http_date(time));
        }
        if let Some(range) = range {
            let (first, last) = (range.start, range.end - 1);
            reply.field(
                "Content-Range",
                format_args!("bytes {first}-{last}/{}", found.len),
            );
        }
        reply.end();
        let Some(object) = object.filter(|_| !part.is_empty()) else {
            return;
        };
        self.objects += 1;
        self.parts.push_back(Part::Object {
            object,
            at: part.start,
            left: part.end - part.start,
        });
    }

    /// Says that the object is the one that the client has.
    pub fn push_not_modified(&mut self, seq: u64, keep_alive: bool) {
        let mut reply = Head::new(self.tail(), 304, keep_alive);
        reply.field("ETag", format_args!("\"{seq}\""));
        reply.end();
    }

    /// Says that there is no such part of an object.
    pub fn push_bad_range(&mut self, len: u64, keep_alive: bool, head: bool) {
        let text = "416 Range Not Satisfiable\n";
        let out = self.tail();
        let mut reply = Head::new(out, 416, keep_alive);
        reply.field("Content-Range", format_args!("bytes */{len}"));
        reply.field("Content-Length", text.len());
        reply.end();
        if !head {
            out.extend_from_slice(text.as_bytes());
        }
    }

    /// The reply to a put that is operation `op` of the batch.
    pub fn push_pending(&mut self, op: usize, key: &[u8], keep_alive: bool) {
        let mut location = Vec::with_capacity(key.len() + 1);
        encode_key(key, &mut location);
        self.push_change(op, Change::Put(location), keep_alive);
    }

    /// The reply to a delete that is operation `op` of the batch.
    pub fn push_pending_delete(&mut self, op: usize, conditional: bool, keep_alive: bool) {
        self.push_change(op, Change::Delete { conditional }, keep_alive);
    }

    fn push_change(&mut self, op: usize, change: Change, keep_alive: bool) {
        self.pending += 1;
        self.parts.push_back(Part::Pending {
            op,
            change,
            keep_alive,
        });
    }

    /// The batch was submitted: `outcome` tells what became of an operation.
    pub fn resolve(&mut self, outcome: impl Fn(usize) -> io::Result<pmskb_uapi::Outcome>) {
        if self.pending == 0 {
            return;
        }
        let parts = std::mem::take(&mut self.parts);
        for part in parts {
            match part {
                Part::Pending {
                    op,
                    change,
                    keep_alive,
                } => {
                    let (out, done) = (self.tail(), outcome(op));
                    match change {
                        Change::Put(location) => write_put(out, done, &location, keep_alive),
                        Change::Delete { conditional } => {
                            write_delete(out, done, conditional, keep_alive);
                        }
                    }
                }
                // Only the first part may have been sent in part; it stays the
                // first, and those that follow may be joined to it.
                Part::Bytes(bytes) => match self.parts.back_mut() {
                    Some(Part::Bytes(tail)) => tail.extend_from_slice(&bytes),
                    _ => self.parts.push_back(Part::Bytes(bytes)),
                },
                other => self.parts.push_back(other),
            }
        }
        self.pending = 0;
    }

    /// Sends as much as the socket takes. Also whether it took any.
    pub fn send(&mut self, wire: &mut dyn Wire) -> io::Result<(Sent, bool)> {
        let mut progress = false;
        loop {
            let more = self.parts.len() > 1;
            let done = match self.parts.front_mut() {
                None => return Ok((Sent::All, progress)),
                Some(Part::Pending { .. }) => return Ok((Sent::Pending, progress)),
                Some(Part::Bytes(bytes)) => {
                    match wire.send(&bytes[self.sent..], more) {
                        Ok(n) => self.sent += n,
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                            return Ok((Sent::Blocked, progress))
                        }
                        Err(e) => return Err(e),
                    }
                    self.sent == bytes.len()
                }
                Some(Part::Object { object, at, left }) => {
                    let want = (*left).min(1 << 30) as usize;
                    match wire.send_file(object, *at, want) {
                        Ok(0) => return Err(io::Error::other("the object ends too early")),
                        Ok(n) => {
                            *at += n as u64;
                            *left -= n as u64;
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                            return Ok((Sent::Blocked, progress))
                        }
                        Err(e) => return Err(e),
                    }
                    *left == 0
                }
            };
            progress = true;
            if done {
                if let Some(Part::Object { .. }) = self.parts.pop_front() {
                    self.objects -= 1;
                }
                self.sent = 0;
            }
        }
    }
}

/// The head of a reply.
struct Head<'a>(&'a mut Vec<u8>);

impl<'a> Head<'a> {
    fn new(out: &'a mut Vec<u8>, status: u16, keep_alive: bool) -> Self {
        let mut head = Self(out);
        head.line(format_args!("HTTP/1.1 {status} {}", reason(status)));
        with_date(|date| head.field("Date", date));
        if !keep_alive {
            head.field("Connection", "close");
        }
        head
    }

    fn field(&mut self, name: &str, value: impl std::fmt::Display) {
        self.line(format_args!("{name}: {value}"));
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        use io::Write as _;
        let _ = write!(self.0, "{text}\r\n");
    }

    fn end(self) {
        self.0.extend_from_slice(b"\r\n");
    }
}

fn write_status(out: &mut Vec<u8>, status: u16, keep_alive: bool, head: bool) {
    let mut text = String::new();
    let _ = writeln!(text, "{status} {}", reason(status));
    let mut reply = Head::new(out, status, keep_alive);
    match status {
        405 => reply.field("Allow", "GET, HEAD, PUT, POST, DELETE"),
        503 => reply.field("Retry-After", 1),
        _ => {}
    }
    reply.field("Content-Type", "text/plain; charset=utf-8");
    reply.field("Content-Length", text.len());
    reply.end();
    if !head {
        out.extend_from_slice(text.as_bytes());
    }
}

fn write_put(
    out: &mut Vec<u8>,
    outcome: io::Result<pmskb_uapi::Outcome>,
    location: &[u8],
    keep_alive: bool,
) {
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(e) => {
            let status = status_of(&e);
            if status == 500 {
                tracing::error!("a put failed: {e}");
            }
            return write_status(out, status, keep_alive, false);
        }
    };
    // RFC 9110, 9.3.4: created, or successfully modified.
    let status = if outcome.replaced { 200 } else { 201 };
    let mut reply = Head::new(out, status, keep_alive);
    // All ASCII: that is what the encoding is for.
    reply.field(
        "Location",
        format_args!("/{}", String::from_utf8_lossy(location)),
    );
    reply.field("ETag", format_args!("\"{}\"", outcome.seq));
    reply.field("Content-Length", 0);
    reply.end();
}

fn write_delete(
    out: &mut Vec<u8>,
    outcome: io::Result<pmskb_uapi::Outcome>,
    conditional: bool,
    keep_alive: bool,
) {
    use rustix::io::Errno;
    match outcome {
        Ok(_) => Head::new(out, 204, keep_alive).end(),
        Err(e) => {
            let missing = Errno::from_io_error(&e) == Some(Errno::NOENT);
            let status = match missing && !conditional {
                true => 404,
                false => status_of(&e),
            };
            if status == 500 {
                tracing::error!("a delete failed: {e}");
            }
            write_status(out, status, keep_alive, false);
        }
    }
}

/// What a change's errno means to the client.
fn status_of(e: &io::Error) -> u16 {
    use rustix::io::Errno;
    match Errno::from_io_error(e) {
        Some(Errno::NOSPC | Errno::DQUOT) => 507,
        Some(Errno::NOBUFS | Errno::NOMEM | Errno::AGAIN | Errno::BUSY) => 503,
        Some(Errno::EXIST | Errno::NOENT | Errno::STALE) => 412,
        Some(Errno::FBIG | Errno::TOOBIG) => 413,
        Some(Errno::NAMETOOLONG) => 414,
        _ => 500,
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        206 => "Partial Content",
        304 => "Not Modified",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "Unknown",
    }
}

/// A key as it is written in a URL's path.
pub fn encode_key(key: &[u8], out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for &byte in key {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => out.push(byte),
            b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b'@' | b'!' | b'$' | b'&' | b'\'' | b'('
            | b')' | b'*' | b'+' | b',' | b';' | b'=' => out.push(byte),
            _ => out.extend([
                b'%',
                HEX[usize::from(byte >> 4)],
                HEX[usize::from(byte & 15)],
            ]),
        }
    }
}

/// Passes on the date of now. It is written once a second, and the clock is one that is read
/// without a system call on any machine.
fn with_date(then: impl FnOnce(&str)) {
    use rustix::time::{clock_gettime, ClockId};
    thread_local! {
        static DATE: RefCell<(i64, String)> = const { RefCell::new((i64::MIN, String::new())) };
    }
    let now = clock_gettime(ClockId::RealtimeCoarse).tv_sec;
    DATE.with_borrow_mut(|(second, date)| {
        if *second != now {
            let since = std::time::Duration::from_secs(now.try_into().unwrap_or(0));
            *date = http_date(std::time::UNIX_EPOCH + since);
            *second = now;
        }
        then(date);
    });
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`
fn http_date(time: std::time::SystemTime) -> String {
    let since = time
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs())
        .ok()
        .and_then(|s| jiff::Timestamp::from_second(s).ok())
        .unwrap_or_default()
        .strftime("%a, %d %b %Y %H:%M:%S GMT")
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_as_rfc_9110_has_them() {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(784111777);
        assert_eq!(http_date(time), "Sun, 06 Nov 1994 08:49:37 GMT");
    }

    #[test]
    fn keys_are_encoded_where_a_path_needs_it() {
        let mut out = Vec::new();
        encode_key(b"a/b c%\xff\n", &mut out);
        assert_eq!(out, b"a/b%20c%25%FF%0A");
    }
}
