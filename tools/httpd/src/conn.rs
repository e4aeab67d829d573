// SPDX-License-Identifier: GPL-2.0-only

//! A connection: from packets to operations and replies. Does no input or output
//! itself.

use std::{
    io,
    os::fd::RawFd,
    time::{Duration, Instant},
};

use pmskb_uapi::{Batch, Key, Mode};

use crate::{
    parse::{Ask, BodyParser, Condition, Framing, Head, HeadParser, KeyPlace, Range, Refusal},
    reply::{encode_key, Queue, Sent, Wire},
    store::Store,
    view::{Packet, Piece, View},
};

/// Parts of replies that may wait before no more requests are read.
const MAX_QUEUE: usize = 64;
/// How long a closed connection is read on, so that the client sees the reply.
const LINGER: Duration = Duration::from_secs(2);

/// How long a client may take, and how much it may send.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest body, bytes.
    pub max_body: u64,
    /// For a request's head.
    pub head: Duration,
    /// Without any byte of a body, or of a reply taken.
    pub stall: Duration,
    /// Between requests.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body: 16 << 20,
            head: Duration::from_secs(20),
            stall: Duration::from_secs(30),
            idle: Duration::from_secs(75),
        }
    }
}

#[derive(Debug)]
enum State {
    /// Between requests, or in a request's head.
    Head,
    /// In a body.
    Body(Request, BodyParser),
    /// A request is complete, but waits until the puts before it are done.
    Ready(Request),
    /// No more requests: what is still to come is thrown away.
    Refusing,
}

#[derive(Debug)]
struct Request {
    ask: Ask,
    keep_alive: bool,
    body: Vec<Piece>,
}

/// A connection.
#[derive(Debug)]
pub struct Conn {
    fd: RawFd,
    limits: Limits,
    view: View,
    head: HeadParser,
    state: State,
    queue: Queue,
    /// The client has sent all that it will.
    ended: bool,
    /// The sending side is shut.
    shut: bool,
    /// When the current phase began, or last got on.
    since: Instant,
    /// When the queue last got shorter, or was empty.
    taken: Instant,
    progress: bool,
}

/// What to do with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Wait for the batch.
    Pending,
    /// Wait until it can be read, or written, or both.
    Wait {
        /// More packets are wanted.
        read: bool,
        /// The socket took less than there is.
        write: bool,
    },
    /// Tell the client that nothing more will come, and wait for its end.
    ShutDown,
    /// Close it.
    Close,
}

impl Conn {
    /// A new connection. `fd` is the name that the batch knows it by.
    pub fn new(fd: RawFd, limits: Limits, now: Instant) -> Self {
        Self {
            fd,
            limits,
            view: View::default(),
            head: HeadParser::default(),
            state: State::Head,
            queue: Queue::default(),
            ended: false,
            shut: false,
            since: now,
            taken: now,
            progress: false,
        }
    }

    /// Takes packets in. False if one cannot be of the store.
    pub fn receive(
        &mut self,
        packets: impl IntoIterator<Item = Packet>,
        store: &dyn Store,
        now: Instant,
    ) -> bool {
        for packet in packets {
            if store.bytes(packet.offset, packet.len.into()).is_none() {
                return false;
            }
            match self.state {
                State::Head if self.view.is_empty() => self.since = now,
                State::Body(..) => self.since = now,
                _ => {}
            }
            self.view.push(packet);
        }
        true
    }

    /// The client will send no more.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The batch was submitted.
    pub fn resolve(&mut self, batch: &Batch) {
        self.queue.resolve(|op| batch.outcome(op));
    }

    /// Gives up on the client, with a reply if it can still be one.
    pub fn give_up(&mut self, status: u16) {
        if !matches!(self.state, State::Refusing) {
            self.refuse(Refusal(status));
        }
    }

    /// Bytes that were received and are of no use yet.
    pub fn ahead(&self) -> usize {
        self.view.len()
    }

    /// Whether the queue got shorter since this was last asked: requests that
    /// waited for that can be looked at.
    pub fn take_progress(&mut self) -> bool {
        std::mem::take(&mut self.progress)
    }

    /// Goes on as far as the packets that are there allow: adds operations to the
    /// batch and replies to the queue. True if anything was done.
    ///
    /// An object that waits to be sent stops it, so that a connection has one file
    /// open, and frames of one object held, at a time.
    pub fn advance(&mut self, store: &dyn Store, batch: &mut Batch, now: Instant) -> bool {
        let mut done = false;
        while self.queue.len() < MAX_QUEUE && !self.queue.has_object() {
            match self.step(store, batch, now) {
                Ok(true) => done = true,
                Ok(false) => break,
                Err(refusal) => {
                    tracing::debug!(fd = self.fd, status = refusal.0, "refused");
                    self.refuse(refusal);
                    done = true;
                }
            }
        }
        if self.ended && self.incomplete() {
            // Half a request will never be a whole one.
            self.drop_request();
            self.state = State::Refusing;
            self.view.clear();
        }
        let free = self.view.free();
        if !free.is_empty() {
            batch.release(self.fd, free);
            free.clear();
            done = true;
        }
        done
    }

    /// One step. True if there may be another.
    fn step(
        &mut self,
        store: &dyn Store,
        batch: &mut Batch,
        now: Instant,
    ) -> Result<bool, Refusal> {
        match &mut self.state {
            State::Head => {
                if self.view.is_empty() {
                    return Ok(false);
                }
                let Some(head) = self.head.next(&mut self.view, store)? else {
                    return Ok(false);
                };
                self.since = now;
                self.begin(head)?;
                Ok(true)
            }
            State::Body(request, body) => {
                let pieces = match request.ask {
                    Ask::Put { .. } => Some(&mut request.body),
                    _ => None,
                };
                if !body.advance(&mut self.view, store, pieces)? {
                    return Ok(false);
                }
                match std::mem::replace(&mut self.state, State::Head) {
                    State::Body(request, _) => self.state = State::Ready(request),
                    other => self.state = other,
                }
                Ok(true)
            }
            State::Ready(request) => {
                let changes = matches!(
                    request.ask,
                    Ask::Put { .. } | Ask::Delete { .. } | Ask::Refuse { .. }
                );
                if !changes && self.queue.pending() > 0 {
                    return Ok(false);
                }
                if let State::Ready(request) = std::mem::replace(&mut self.state, State::Head) {
                    self.since = now;
                    self.carry_out(request, store, batch);
                }
                Ok(true)
            }
            State::Refusing => {
                self.view.clear();
                Ok(false)
            }
        }
    }

    /// A head is there: goes on to the body.
    fn begin(&mut self, head: Head) -> Result<(), Refusal> {
        let has_body = head.framing != Framing::Length(0);
        let request = Request {
            ask: head.ask,
            keep_alive: head.keep_alive,
            body: Vec::new(),
        };
        if head.expects_continue && has_body && self.view.is_empty() {
            if let Ask::Refuse { refusal, .. } = request.ask {
                // Whether the body will come after all is not known.
                return Err(refusal);
            }
        }
        let body = BodyParser::new(head.framing, self.limits.max_body);
        let body = match body {
            Ok(body) => body,
            Err(refusal) => {
                self.state = State::Ready(request);
                return Err(refusal);
            }
        };
        if head.expects_continue && has_body && self.view.is_empty() {
            self.queue.push_continue();
        }
        self.state = State::Body(request, body);
        Ok(())
    }

    fn carry_out(&mut self, mut request: Request, store: &dyn Store, batch: &mut Batch) {
        let keep_alive = request.keep_alive;
        match &request.ask {
            Ask::Put { key, mode } => self.put(key, *mode, &request.body, keep_alive, batch),
            Ask::Delete { key, mode } => {
                let op = batch.delete(key);
                if let Condition::Seq(seq) = mode {
                    batch.if_seq(op, *seq);
                }
                let conditional = *mode != Condition::Always;
                self.queue.push_pending_delete(op, conditional, keep_alive);
            }
            Ask::Get {
                key,
                head,
                range,
                none_match,
            } => {
                let got = self.get(key, *head, *range, none_match.as_deref(), keep_alive, store);
                if let Err(e) = got {
                    self.failed(e, keep_alive, *head);
                }
            }
            Ask::List {
                prefix,
                after,
                limit,
                head,
            } => match store.list(prefix, after.as_deref(), *limit) {
                Ok(keys) => {
                    let mut text = Vec::new();
                    for key in keys {
                        encode_key(&key, &mut text);
                        text.push(b'\n');
                    }
                    self.queue.push_text(&text, keep_alive, *head);
                }
                Err(e) => self.failed(e, keep_alive, *head),
            },
            Ask::Refuse { refusal, head } => self.queue.push_status(refusal.0, keep_alive, *head),
        }
        request.body.clear();
        if !keep_alive {
            self.state = State::Refusing;
        }
    }

    fn put(
        &mut self,
        key: &KeyPlace,
        mode: Condition,
        body: &[Piece],
        keep_alive: bool,
        batch: &mut Batch,
    ) {
        let (mode, if_seq) = match mode {
            Condition::Always => (Mode::Upsert, None),
            Condition::New => (Mode::Create, None),
            Condition::Old => (Mode::Replace, None),
            Condition::Seq(seq) => (Mode::Upsert, Some(seq)),
        };
        let extents: Vec<_> = body.iter().map(|piece| self.view.ext(piece)).collect();
        // Tokens are kept here and released behind the puts of the batch: the
        // same packet may be part of several objects.
        let op = match key {
            KeyPlace::Packet(piece, _) => {
                let key = [self.view.ext(piece)];
                batch.put(self.fd, Key::Extents(&key), &extents, mode, true)
            }
            KeyPlace::Memory(bytes) => batch.put(self.fd, Key::Bytes(bytes), &extents, mode, true),
        };
        if let Some(seq) = if_seq {
            batch.if_seq(op, seq);
        }
        if let KeyPlace::Packet(piece, _) = key {
            self.view.settle(piece);
        }
        for piece in body {
            self.view.settle(piece);
        }
        self.queue.push_pending(op, key.bytes(), keep_alive);
    }

    fn get(
        &mut self,
        key: &[u8],
        head: bool,
        range: Option<Range>,
        none_match: Option<&[u8]>,
        keep_alive: bool,
        store: &dyn Store,
    ) -> io::Result<()> {
        // What may be answered without bytes is looked up in the mapping.
        let found = if head || none_match.is_some() {
            let Some(found) = store.find(key)? else {
                self.queue.push_status(404, keep_alive, head);
                return Ok(());
            };
            if none_match.is_some_and(|tags| matches_tag(tags, found.seq)) {
                self.queue.push_not_modified(found.seq, keep_alive);
                return Ok(());
            }
            Some((found, None))
        } else {
            None
        };
        let found = match found {
            Some(found) if head => Some(found),
            _ => store.open(key)?.map(|(found, file)| (found, Some(file))),
        };
        let Some((found, object)) = found else {
            self.queue.push_status(404, keep_alive, head);
            return Ok(());
        };
        match range.map(|range| resolve_range(range, found.len)) {
            Some(None) => self.queue.push_bad_range(found.len, keep_alive, head),
            range => self
                .queue
                .push_object(&found, object, range.flatten(), keep_alive),
        }
        Ok(())
    }

    fn failed(&mut self, e: io::Error, keep_alive: bool, head: bool) {
        use rustix::io::Errno;
        tracing::error!("a look-up failed: {e}");
        let status = match Errno::from_io_error(&e) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => 503,
            _ if e.kind() == io::ErrorKind::ResourceBusy => 503,
            _ => 500,
        };
        self.queue.push_status(status, keep_alive, head);
    }

    /// Replies and reads no more requests.
    fn refuse(&mut self, refusal: Refusal) {
        self.drop_request();
        self.queue.push_status(refusal.0, false, false);
        self.state = State::Refusing;
        self.view.clear();
    }

    /// Gives back what a request holds that will not be carried out.
    fn drop_request(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Refusing);
        if let State::Body(request, _) | State::Ready(request) = state {
            if let Ask::Put {
                key: KeyPlace::Packet(piece, _),
                ..
            } = &request.ask
            {
                self.view.settle(piece);
            }
            for piece in &request.body {
                self.view.settle(piece);
            }
        }
    }

    /// Whether the end of the stream would cut a request short, or there is none.
    fn incomplete(&self) -> bool {
        matches!(self.state, State::Head | State::Body(..))
            && self.queue.len() < MAX_QUEUE
            && !self.queue.has_object()
    }

    /// Sends what can be sent, and says what to do next.
    pub fn send(&mut self, wire: &mut dyn Wire, now: Instant) -> Next {
        let (sent, progress) = match self.queue.send(wire) {
            Ok(sent) => sent,
            Err(e) => {
                tracing::debug!(fd = self.fd, "cannot send: {e}");
                return Next::Close;
            }
        };
        if progress || sent == Sent::All {
            self.taken = now;
        }
        self.progress |= progress;
        let refusing = matches!(self.state, State::Refusing);
        match sent {
            Sent::Blocked => Next::Wait {
                read: !self.ended && self.wants_packets(),
                write: true,
            },
            Sent::Pending => Next::Pending,
            Sent::All if refusing && self.ended => Next::Close,
            Sent::All if refusing && !self.shut => {
                self.shut = true;
                self.since = now;
                Next::ShutDown
            }
            Sent::All => Next::Wait {
                read: !self.ended,
                write: false,
            },
        }
    }

    /// Whether packets would be of use now.
    fn wants_packets(&self) -> bool {
        self.queue.len() < MAX_QUEUE
            && !self.queue.has_object()
            && !matches!(self.state, State::Ready(_))
    }

    /// Looks whether the client takes too long.
    pub fn timed_out(&mut self, now: Instant) -> Option<Timeout> {
        let waited = now.saturating_duration_since(self.since);
        if !self.queue.is_empty() {
            let stalled = now.saturating_duration_since(self.taken) > self.limits.stall;
            return stalled.then_some(Timeout::Dead);
        }
        match self.state {
            State::Refusing => (waited > LINGER).then_some(Timeout::Dead),
            State::Head if self.head.has_begun() => {
                (waited > self.limits.head).then_some(Timeout::Slow)
            }
            State::Head => (waited > self.limits.idle).then_some(Timeout::Dead),
            State::Body(..) => (waited > self.limits.stall).then_some(Timeout::Slow),
            State::Ready(_) => None,
        }
    }

    /// Tokens that the connection holds.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.view.held()
    }
}

/// How a client takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// It may still be told.
    Slow,
    /// Nothing can be expected of it.
    Dead,
}

/// Whether a list of entity tags has that of a record.
fn matches_tag(tags: &[u8], seq: u64) -> bool {
    let tag = format!("\"{seq}\"");
    tags == b"*"
        || tags.split(|&b| b == b',').any(|t| {
            let t = t.trim_ascii();
            t.strip_prefix(b"W/").unwrap_or(t) == tag.as_bytes()
        })
}

/// A range as what it means for an object of `len` bytes. `None`: it has none of
/// these bytes.
fn resolve_range(range: Range, len: u64) -> Option<std::ops::Range<u64>> {
    let (start, end) = match range {
        Range::From(first, last) => (first, last.map_or(len, |l| l.saturating_add(1).min(len))),
        Range::Last(n) => (len.saturating_sub(n), len),
    };
    (start < end).then_some(start..end)
}
