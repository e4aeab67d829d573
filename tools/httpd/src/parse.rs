// SPDX-License-Identifier: GPL-2.0-only

//! HTTP/1.1 requests, found in a view of packets.

use crate::view::{Memory, Piece, View};

/// Longest request head, bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// Most header fields.
const MAX_FIELDS: usize = 100;
/// Empty lines that may come before a request.
const MAX_EMPTY_LINES: u8 = 4;
/// Longest line with a chunk's size and extensions, bytes.
const MAX_CHUNK_LINE: usize = 256;
/// Longest trailer, bytes.
const MAX_TRAILER: usize = 8 << 10;

/// A status code that refuses a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal(pub u16);

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Keep the body under a key.
    Put {
        /// Where the key is.
        key: KeyPlace,
        /// Which records may or must be there already.
        mode: Condition,
    },
    /// Remove an object.
    Delete {
        /// Its key.
        key: Vec<u8>,
        /// Which record must be there.
        mode: Condition,
    },
    /// An object.
    Get {
        /// Its key.
        key: Vec<u8>,
        /// Without the body.
        head: bool,
        /// `Range: bytes=`
        range: Option<Range>,
        /// `If-None-Match:`
        none_match: Option<Vec<u8>>,
    },
    /// Keys.
    List {
        /// That start with this.
        prefix: Vec<u8>,
        /// That come after this.
        after: Option<Vec<u8>>,
        /// At most so many.
        limit: usize,
        /// Without the body.
        head: bool,
    },
    /// Nothing that can be done. The body is read over.
    Refuse {
        /// The reply.
        refusal: Refusal,
        /// Without the reply's body.
        head: bool,
    },
}

/// Where a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPlace {
    /// Still in the packet.
    Packet(Piece, Vec<u8>),
    /// It was percent-encoded, or lay in several packets.
    Memory(Vec<u8>),
}

impl KeyPlace {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Packet(_, bytes) | Self::Memory(bytes) => bytes,
        }
    }
}

/// On which condition a put or a delete happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// On none.
    Always,
    /// `If-None-Match: *`
    New,
    /// `If-Match: *`
    Old,
    /// `If-Match: "N"`: the record with this sequence number.
    Seq(u64),
}

/// A byte range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// From the first to the last of these, or to the end.
    From(u64, Option<u64>),
    /// The last so many.
    Last(u64),
}

/// How a body's end is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// By its length.
    Length(u64),
    /// By an empty chunk.
    Chunked,
}

/// A request without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// What it asks for.
    pub ask: Ask,
    /// How its body ends.
    pub framing: Framing,
    /// Whether another request may follow.
    pub keep_alive: bool,
    /// The client waits for a go-ahead before it sends the body.
    pub expects_continue: bool,
}

/// Finds and parses request heads.
#[derive(Debug, Default)]
pub struct HeadParser {
    /// Bytes of the view known not to end the head.
    scanned: usize,
    /// 0: inside a line, 1: after LF, 2: after LF CR.
    line_state: u8,
    empty_lines: u8,
    scratch: Vec<u8>,
}

impl HeadParser {
    /// Takes a head off the front of the view. `None`: it is not complete.
    pub fn next(
        &mut self,
        view: &mut View,
        memory: &(impl Memory + ?Sized),
    ) -> Result<Option<Head>, Refusal> {
        if self.scanned == 0 {
            self.skip_empty_lines(view, memory)?;
        }
        let Some(len) = self.find_end(view, memory)? else {
            return Ok(None);
        };
        let run = view.run(memory, len);
        let in_place = run.len() >= len;
        let mut scratch = std::mem::take(&mut self.scratch);
        let bytes = if in_place {
            &run[..len]
        } else {
            scratch.clear();
            for slice in view.slices(memory, 0) {
                scratch.extend_from_slice(&slice[..slice.len().min(len - scratch.len())]);
                if scratch.len() == len {
                    break;
                }
            }
            &scratch[..]
        };
        let head = parse_head(bytes, |from, len| view.piece_at(from, len));
        self.scratch = scratch;
        self.scanned = 0;
        self.line_state = 0;
        self.empty_lines = 0;
        let head = head?;
        let keep = match &head.ask {
            Ask::Put {
                key: KeyPlace::Packet(piece, _),
                ..
            } => Some(*piece),
            _ => None,
        };
        view.discard(len, keep);
        Ok(Some(head))
    }

    /// Whether part of a head is there.
    pub fn has_begun(&self) -> bool {
        self.scanned > 0
    }

    fn skip_empty_lines(
        &mut self,
        view: &mut View,
        memory: &(impl Memory + ?Sized),
    ) -> Result<(), Refusal> {
        while let Some(b'\r' | b'\n') = view.front(memory).first() {
            self.empty_lines += 1;
            if self.empty_lines > 2 * MAX_EMPTY_LINES {
                return Err(Refusal(400));
            }
            view.discard(1, None);
        }
        Ok(())
    }

    /// Length of the head with the empty line that ends it.
    fn find_end(
        &mut self,
        view: &View,
        memory: &(impl Memory + ?Sized),
    ) -> Result<Option<usize>, Refusal> {
        let mut at = self.scanned;
        for slice in view.slices(memory, at) {
            for byte in slice {
                at += 1;
                self.line_state = match (byte, self.line_state) {
                    (b'\n', 1 | 2) => return self.limited(at).map(Some),
                    (b'\n', _) => 1,
                    (b'\r', 1) => 2,
                    _ => 0,
                };
            }
            self.limited(at)?;
        }
        self.scanned = self.limited(at)?;
        Ok(None)
    }

    fn limited(&self, len: usize) -> Result<usize, Refusal> {
        match len {
            0..=MAX_HEAD => Ok(len),
            _ => Err(Refusal(431)),
        }
    }
}

/// Parses a complete head. `piece_at` tells the piece of a part of it.
fn parse_head(
    bytes: &[u8],
    piece_at: impl Fn(usize, usize) -> Option<Piece>,
) -> Result<Head, Refusal> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(len)) if len == bytes.len() => {}
        Ok(_) => return Err(Refusal(400)),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal(431)),
        Err(httparse::Error::Version) => return Err(wrong_version(bytes)),
        Err(_) => return Err(Refusal(400)),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version)
    else {
        return Err(Refusal(400));
    };
    let fields = Fields::new(request.headers, minor)?;

    let target = target.as_bytes();
    let start = target.as_ptr() as usize - bytes.as_ptr() as usize;
    let path = path_of(target)?;
    let (path, query) = match target[path..].iter().position(|&b| b == b'?') {
        Some(q) => (path..path + q, Some(&target[path + q + 1..])),
        None => (path..target.len(), None),
    };
    let raw_key = target.get(path.start + 1..path.end).unwrap_or(&[]);
    let ask = match method {
        "PUT" | "POST" => put(raw_key, query, &fields, || {
            piece_at(start + path.start + 1, raw_key.len())
        }),
        "GET" | "HEAD" => get(raw_key, query, &fields, method == "HEAD"),
        "DELETE" => delete(raw_key, query, &fields),
        "PATCH" | "OPTIONS" | "TRACE" | "CONNECT" => Err(Refusal(405)),
        _ => Err(Refusal(501)),
    };
    let ask = ask.or_else(|refusal| match refusal.0 {
        // What follows may be anything.
        400 => Err(refusal),
        _ => Ok(Ask::Refuse {
            refusal,
            head: method == "HEAD",
        }),
    })?;
    Ok(Head {
        ask,
        framing: fields.framing,
        keep_alive: fields.keep_alive,
        expects_continue: fields.expects_continue,
    })
}

/// A request line that ends in `HTTP/` and a number is of another version; else
/// it is no HTTP at all.
fn wrong_version(bytes: &[u8]) -> Refusal {
    let line = bytes.split(|&b| b == b'\n').next().unwrap_or(&[]);
    let word = line.trim_ascii_end().rsplit(|&b| b == b' ').next();
    let digits = word.and_then(|w| w.strip_prefix(b"HTTP/"));
    match digits {
        Some([b'0'..=b'9'] | [b'0'..=b'9', b'.', b'0'..=b'9']) => Refusal(505),
        _ => Refusal(400),
    }
}

/// Where in a request target the path starts.
fn path_of(target: &[u8]) -> Result<usize, Refusal> {
    if target.first() == Some(&b'/') || target == b"*" {
        return Ok(0);
    }
    let scheme = target.get(..7).ok_or(Refusal(400))?;
    if !scheme.eq_ignore_ascii_case(b"http://") {
        return Err(Refusal(400));
    }
    match target[7..].iter().position(|&b| b == b'/') {
        Some(0) => Err(Refusal(400)),
        Some(n) => Ok(7 + n),
        // Only the authority: what is meant is "/".
        None => Ok(target.len()),
    }
}

fn put(
    raw: &[u8],
    query: Option<&[u8]>,
    fields: &Fields<'_>,
    piece: impl Fn() -> Option<Piece>,
) -> Result<Ask, Refusal> {
    if raw.is_empty() || query.is_some() {
        return Err(Refusal(400));
    }
    let bytes = decode_key(raw)?;
    let encoded = bytes.len() != raw.len();
    let key = match piece() {
        Some(piece) if !encoded => KeyPlace::Packet(piece, bytes),
        _ => KeyPlace::Memory(bytes),
    };
    let mode = match (fields.none_match, fields.matches) {
        (None, None) => Condition::Always,
        (Some(b"*"), None) => Condition::New,
        (None, Some(tags)) => if_match(tags)?,
        // That the record's tag is another one cannot be checked together with the
        // put.
        _ => return Err(Refusal(412)),
    };
    Ok(Ask::Put { key, mode })
}

fn delete(raw: &[u8], query: Option<&[u8]>, fields: &Fields<'_>) -> Result<Ask, Refusal> {
    if raw.is_empty() || query.is_some() {
        return Err(Refusal(400));
    }
    let mode = match (fields.none_match, fields.matches) {
        (None, None) => Condition::Always,
        (None, Some(tags)) => if_match(tags)?,
        _ => return Err(Refusal(412)),
    };
    let key = decode_key(raw)?;
    Ok(Ask::Delete { key, mode })
}

/// `If-Match:`. A tag that is none of this server's, or weak, is no record's
/// (RFC 9110, 13.1.1); of several only one can be asked for.
fn if_match(tags: &[u8]) -> Result<Condition, Refusal> {
    if tags == b"*" {
        return Ok(Condition::Old);
    }
    let seq = |tag: &[u8]| {
        let digits = tag.trim_ascii().strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        let canonical = digits.first().is_some_and(|d| *d != b'0');
        number(digits).filter(|_| canonical)
    };
    let mut seqs = tags.split(|&b| b == b',').filter_map(seq);
    match (seqs.next(), seqs.next()) {
        (Some(seq), None) => Ok(Condition::Seq(seq)),
        _ => Err(Refusal(412)),
    }
}

fn get(raw: &[u8], query: Option<&[u8]>, fields: &Fields<'_>, head: bool) -> Result<Ask, Refusal> {
    if raw.is_empty() {
        return list(query.unwrap_or(&[]), head);
    }
    if query.is_some() {
        return Err(Refusal(400));
    }
    Ok(Ask::Get {
        key: decode_key(raw)?,
        head,
        range: fields.range.and_then(parse_range),
        none_match: fields.none_match.map(<[u8]>::to_vec),
    })
}

/// Keys that a list names when it is not told how many.
pub const DEFAULT_LIMIT: usize = 1000;
/// Keys that a list names at most.
pub const MAX_LIMIT: usize = 10_000;

fn list(query: &[u8], head: bool) -> Result<Ask, Refusal> {
    let mut prefix = Vec::new();
    let mut after = None;
    let mut limit = DEFAULT_LIMIT;
    for part in query.split(|&b| b == b'&').filter(|p| !p.is_empty()) {
        let eq = part.iter().position(|&b| b == b'=').unwrap_or(part.len());
        let value = part.get(eq + 1..).unwrap_or(&[]);
        match &part[..eq] {
            b"prefix" => prefix = decode_key(value)?,
            b"after" => after = Some(decode_key(value)?),
            b"limit" => limit = number(value).ok_or(Refusal(400))?.min(MAX_LIMIT as u64) as usize,
            _ => return Err(Refusal(400)),
        }
    }
    Ok(Ask::List {
        prefix,
        after,
        limit,
        head,
    })
}

/// Percent-decoding. 414 if it is longer than a key can be.
fn decode_key(raw: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut key = Vec::with_capacity(raw.len().min(pmskb_uapi::MAX_KEY));
    let mut rest = raw.iter();
    while let Some(&byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let mut digit = || {
                    let d = char::from(*rest.next()?).to_digit(16)?;
                    Some(d as u8)
                };
                let (Some(high), Some(low)) = (digit(), digit()) else {
                    return Err(Refusal(400));
                };
                (high << 4) | low
            }
            b'#' => return Err(Refusal(400)),
            other => other,
        };
        if key.len() == pmskb_uapi::MAX_KEY {
            return Err(Refusal(414));
        }
        key.push(byte);
    }
    Ok(key)
}

/// A decimal number, of digits only.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// One range of bytes. Anything else is to be ignored (RFC 9110, 14.2).
fn parse_range(value: &[u8]) -> Option<Range> {
    let spec = value.strip_prefix(b"bytes=")?;
    let dash = spec.iter().position(|&b| b == b'-')?;
    let (first, last) = (&spec[..dash], &spec[dash + 1..]);
    match (first, last) {
        ([], last) => Some(Range::Last(number(last)?)),
        (first, []) => Some(Range::From(number(first)?, None)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Range::From(first, Some(last)))
        }
    }
}

/// The header fields that matter here.
struct Fields<'a> {
    framing: Framing,
    keep_alive: bool,
    expects_continue: bool,
    none_match: Option<&'a [u8]>,
    matches: Option<&'a [u8]>,
    range: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    fn new(fields: &[httparse::Header<'a>], minor: u8) -> Result<Self, Refusal> {
        let mut length = None;
        let mut chunked = false;
        let mut hosts = 0;
        let mut this = Self {
            framing: Framing::Length(0),
            keep_alive: minor >= 1,
            expects_continue: false,
            none_match: None,
            matches: None,
            range: None,
        };
        let mut close = false;
        for field in fields {
            let value = field.value.trim_ascii();
            let is = |name: &str| field.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                let n = number(value).ok_or(Refusal(400))?;
                if length.replace(n).is_some() {
                    return Err(Refusal(400));
                }
            } else if is("transfer-encoding") {
                if chunked || minor == 0 {
                    return Err(Refusal(400));
                }
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Refusal(501));
                }
                chunked = true;
            } else if is("connection") {
                for word in value.split(|&b| b == b',') {
                    let word = word.trim_ascii();
                    if word.eq_ignore_ascii_case(b"close") {
                        close = true;
                    } else if word.eq_ignore_ascii_case(b"keep-alive") {
                        this.keep_alive = true;
                    }
                }
            } else if is("expect") {
                if !value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Refusal(417));
                }
                this.expects_continue = minor >= 1;
            } else if is("host") {
                hosts += 1;
            } else if is("if-none-match") {
                this.none_match = Some(value);
            } else if is("if-match") {
                this.matches = Some(value);
            } else if is("range") {
                this.range = Some(value);
            } else if is("content-range") || is("content-encoding") {
                // A part of an object, or a form of it, is not the object.
                return Err(Refusal(if is("content-range") { 400 } else { 415 }));
            }
        }
        if close {
            this.keep_alive = false;
        }
        if hosts > 1 || (hosts == 0 && minor >= 1) || (chunked && length.is_some()) {
            return Err(Refusal(400));
        }
        this.framing = match length {
            _ if chunked => Framing::Chunked,
            Some(n) => Framing::Length(n),
            None => Framing::Length(0),
        };
        Ok(this)
    }
}

/// Takes a body off the front of the view.
#[derive(Debug)]
pub struct BodyParser {
    state: BodyState,
    /// Bytes of the object so far.
    len: u64,
    max: u64,
    line: Vec<u8>,
    trailer: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BodyState {
    /// So many bytes to the end.
    Length(u64),
    ChunkSize,
    /// So many bytes to the end of the chunk.
    Chunk(u64),
    ChunkEnd,
    Trailer,
    Done,
}

impl BodyParser {
    /// For a body of at most `max` bytes.
    pub fn new(framing: Framing, max: u64) -> Result<Self, Refusal> {
        let state = match framing {
            Framing::Length(n) if n > max => return Err(Refusal(413)),
            Framing::Length(n) => BodyState::Length(n),
            Framing::Chunked => BodyState::ChunkSize,
        };
        Ok(Self {
            state,
            len: 0,
            max,
            line: Vec::new(),
            trailer: 0,
        })
    }

    /// Takes what is there into `pieces`, or settles it if there are none to be
    /// had. True when the body is complete.
    pub fn advance(
        &mut self,
        view: &mut View,
        memory: &(impl Memory + ?Sized),
        mut pieces: Option<&mut Vec<Piece>>,
    ) -> Result<bool, Refusal> {
        loop {
            match self.state {
                BodyState::Length(0) => self.state = BodyState::Done,
                BodyState::Chunk(0) => self.state = BodyState::ChunkEnd,
                BodyState::Length(n) => {
                    let n = n - self.data(n, view, pieces.as_deref_mut())?;
                    self.state = BodyState::Length(n);
                    if n > 0 {
                        return Ok(false);
                    }
                }
                BodyState::Chunk(n) => {
                    let n = n - self.data(n, view, pieces.as_deref_mut())?;
                    self.state = BodyState::Chunk(n);
                    if n > 0 {
                        return Ok(false);
                    }
                }
                BodyState::ChunkSize => {
                    if !self.line(view, memory, MAX_CHUNK_LINE)? {
                        return Ok(false);
                    }
                    let n = chunk_size(&self.line)?;
                    if n > self.max - self.len {
                        return Err(Refusal(413));
                    }
                    self.state = match n {
                        0 => BodyState::Trailer,
                        n => BodyState::Chunk(n),
                    };
                    self.line.clear();
                }
                BodyState::ChunkEnd => {
                    if !self.line(view, memory, 2)? {
                        return Ok(false);
                    }
                    if !self.line.is_empty() {
                        return Err(Refusal(400));
                    }
                    self.state = BodyState::ChunkSize;
                }
                BodyState::Trailer => {
                    if !self.line(view, memory, MAX_TRAILER)? {
                        return Ok(false);
                    }
                    self.trailer += self.line.len() + 2;
                    if self.trailer > MAX_TRAILER {
                        return Err(Refusal(431));
                    }
                    if self.line.is_empty() {
                        self.state = BodyState::Done;
                    } else if self.line.iter().any(|&b| b == 0 || b == b'\r') {
                        return Err(Refusal(400));
                    }
                    self.line.clear();
                }
                BodyState::Done => return Ok(true),
            }
        }
    }

    fn data(
        &mut self,
        n: u64,
        view: &mut View,
        pieces: Option<&mut Vec<Piece>>,
    ) -> Result<u64, Refusal> {
        let n = usize::try_from(n).unwrap_or(usize::MAX).min(view.len());
        match pieces {
            Some(pieces) => {
                view.take(n, pieces);
                if pieces.len() > pmskb_uapi::sys::PMSKB_MAX_EXTENTS as usize {
                    return Err(Refusal(413));
                }
            }
            None => view.discard(n, None),
        }
        self.len += n as u64;
        Ok(n as u64)
    }

    /// Takes a line into `self.line`, without its end. True when it is complete.
    fn line(
        &mut self,
        view: &mut View,
        memory: &(impl Memory + ?Sized),
        max: usize,
    ) -> Result<bool, Refusal> {
        while !view.is_empty() {
            let slice = view.front(memory);
            let slice = &slice[..slice.len().min(max + 1)];
            let end = slice.iter().position(|&b| b == b'\n');
            let part = &slice[..end.map_or(slice.len(), |e| e + 1)];
            self.line.extend_from_slice(part);
            view.discard(part.len(), None);
            if self.line.len() > max {
                return Err(Refusal(400));
            }
            if end.is_some() {
                // A lone LF is no line end in chunk framing: others may see it
                // otherwise, and a request be smuggled past them.
                return match self.line.strip_suffix(b"\r\n") {
                    Some(line) => {
                        let len = line.len();
                        self.line.truncate(len);
                        Ok(true)
                    }
                    None => Err(Refusal(400)),
                };
            }
        }
        Ok(false)
    }
}

/// The size in a chunk's first line; extensions are read over.
fn chunk_size(line: &[u8]) -> Result<u64, Refusal> {
    let end = line
        .iter()
        .position(|b| !b.is_ascii_hexdigit())
        .unwrap_or(line.len());
    let (digits, extension) = line.split_at(end);
    let blank = extension.trim_ascii_start();
    if !(blank.is_empty() || blank[0] == b';')
        || extension
            .iter()
            .any(|&b| b != b'\t' && b.is_ascii_control())
    {
        return Err(Refusal(400));
    }
    if digits.is_empty() || digits.len() > 16 {
        return Err(Refusal(400));
    }
    let digits = std::str::from_utf8(digits).map_err(|_| Refusal(400))?;
    u64::from_str_radix(digits, 16).map_err(|_| Refusal(400))
}
