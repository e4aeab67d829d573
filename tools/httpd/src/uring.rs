// SPDX-License-Identifier: GPL-2.0-only

//! The io_uring engine: everything that a turn has to do is handed over, and everything that
//! has happened meanwhile taken, by one system call, however many clients there are.
//!
//! Connections and packets come by requests that go on. A batch is submitted as a command on
//! the store and owned by the ring until it is done; there is one at a time, and while it is
//! under way what comes for its clients waits. Replies are sent when it is done, since they
//! tell what became of each operation: with the same call that submits the next batch.
//!
//! An object is sent by `sendfile`, one call for as much of it as the socket takes. io_uring has
//! no such request: its splice always goes to a worker thread and needs a pipe between, and a
//! read would copy what is in memory already.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::Context;
use pmskb_uapi::{Desc, Done, Ring};

use crate::{
    conn::Next,
    reply::Wire,
    server::{index_of, Client, Engine, Server, DESCS},
};

/// Receives whose packets were not looked at yet; more wait.
const ROOMS: u16 = 512;
/// Bytes of a reply that are handed over at once.
const MAX_SEND: usize = 64 << 10;
/// How long to wait, when replies were sent, for something else to happen than that they are.
const PAUSE: Duration = Duration::from_micros(50);
/// Bytes that a client may send ahead of what can be answered before nothing more is received.
const AHEAD: usize = 256 << 10;

/// Names of what is no client: a kind and an index.
const LISTENER: u64 = 1 << 59;
const STOP: u64 = 1 << 58;

/// A server on io_uring.
pub struct Uring {
    server: Server<Line>,
    ring: Ring,
    /// How long to wait for more than one client.
    gather: Duration,
    /// Clients that something is to be done for.
    touched: Vec<usize>,
    /// Clients with operations in the batch that is under way.
    waiting: Option<Vec<usize>>,
    /// For each listener, whether it accepts.
    accepting: Vec<bool>,
    /// Accepted before there was room for them.
    early: VecDeque<TcpStream>,
    descs: Vec<Desc>,
}

/// What is under way for a client.
#[derive(Default)]
pub struct Line {
    receiving: bool,
    /// A receive was told to end.
    stopping: bool,
    sending: Sending,
    /// Waits until the socket takes more of an object.
    polling: bool,
    /// All of it was told to end.
    cancelled: bool,
    touched: bool,
    /// Memory for what is sent.
    spare: Vec<u8>,
}

#[derive(Default)]
enum Sending {
    #[default]
    Nothing,
    UnderWay,
    /// Some was sent, which the reply has not heard of.
    Done(io::Result<usize>),
}

impl Line {
    fn is_idle(&self) -> bool {
        !self.receiving && !self.polling && !matches!(self.sending, Sending::UnderWay)
    }
}

/// A client's socket. What is to be sent is taken by a request, and the call says that the
/// socket takes nothing now; with the same bytes again, when the request is complete, it says
/// what was sent.
struct Ends<'a> {
    ring: &'a mut Ring,
    stream: &'a TcpStream,
    name: u64,
    line: &'a mut Line,
}

impl Wire for Ends<'_> {
    fn send(&mut self, bytes: &[u8], more: bool) -> io::Result<usize> {
        match std::mem::take(&mut self.line.sending) {
            Sending::Done(sent) => return sent,
            Sending::UnderWay => self.line.sending = Sending::UnderWay,
            Sending::Nothing if self.line.polling => {}
            Sending::Nothing => {
                let part = &bytes[..bytes.len().min(MAX_SEND)];
                let mut buffer = std::mem::take(&mut self.line.spare);
                buffer.clear();
                buffer.extend_from_slice(part);
                let more = more || part.len() < bytes.len();
                self.ring
                    .send(self.stream.as_fd(), self.name, buffer, more)?;
                self.line.sending = Sending::UnderWay;
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send_file(&mut self, object: &File, offset: u64, len: usize) -> io::Result<usize> {
        if self.line.polling || matches!(self.line.sending, Sending::UnderWay) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut offset = offset;
        let sent = rustix::fs::sendfile(self.stream, object, Some(&mut offset), len);
        let sent = sent.map_err(io::Error::from);
        if matches!(&sent, Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
            self.ring.poll(self.stream.as_fd(), self.name, true)?;
            self.line.polling = true;
        }
        sent
    }
}

impl Engine for Uring {
    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.server.addresses()
    }

    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            let now = Instant::now();
            if self.server.is_done(now) {
                tracing::debug!(calls = self.ring.enters(), "io_uring_enter");
                return Ok(());
            }
            // That replies are sent, and a batch is done, is usually known when the call returns.
            let expected = self.ring.sends() + usize::from(self.waiting.is_some());
            let some = self.server.connections().div_ceil(4).max(1);
            let (want, gather) = match self.waiting {
                _ if !self.gather.is_zero() => (expected + some, self.gather),
                // It is to be answered.
                Some(_) => (1, Duration::ZERO),
                None => (expected + 1, PAUSE),
            };
            self.ring
                .enter(want, gather, self.server.timeout(now))
                .context("io_uring_enter")?;
            self.turn()?;
        }
    }
}

impl Uring {
    /// An engine for a server that listens. `gather`: how long a turn waits until a quarter of
    /// the clients have something.
    pub fn new(server: Server<Line>, gather: Duration) -> anyhow::Result<Self> {
        let ring = Ring::new(ROOMS, DESCS).context("there is no io_uring, or not for this user")?;
        let accepting = vec![false; server.listeners.len()];
        let mut engine = Self {
            server,
            ring,
            gather,
            touched: Vec::new(),
            waiting: None,
            accepting,
            early: VecDeque::new(),
            descs: Vec::new(),
        };
        let stop = engine.server.stop.as_fd();
        engine.ring.poll(stop, STOP, false)?;
        engine.accept()?;
        Ok(engine)
    }

    fn touch(&mut self, index: usize) {
        if let Some(client) = self.server.client(index) {
            if !client.line.touched {
                client.line.touched = true;
                self.touched.push(index);
            }
        }
    }

    /// One turn of the loop: what has happened, and what follows from it.
    fn turn(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let mut descs = std::mem::take(&mut self.descs);
        while let Some(done) = self.ring.next(&mut descs) {
            self.take(done, &descs, now)?;
        }
        self.descs = descs;
        let mut others = self.server.retries(now);
        others.extend(self.server.time_out(now));
        for index in others {
            self.touch(index);
        }
        if self.server.accepts_again(now) {
            self.accept()?;
        }
        let touched = std::mem::take(&mut self.touched);
        for &index in &touched {
            if let Some(client) = self.server.client(index) {
                client.line.touched = false;
            }
        }
        self.work(&touched, now)?;
        for index in touched {
            self.settle(index)?;
        }
        Ok(())
    }

    fn take(&mut self, done: Done, descs: &[Desc], now: Instant) -> anyhow::Result<()> {
        match done {
            Done::Ready { name: STOP } => {
                self.stop_accepting()?;
                self.early.clear();
                for index in self.server.begin_stop() {
                    self.touch(index);
                }
            }
            Done::Ready { name } => {
                if let Some(client) = self.named(name) {
                    client.line.polling = false;
                }
                self.touch(index_of(name));
            }
            Done::Accepted { name, socket, more } => {
                if let Some(accepting) = self.accepting.get_mut((name & !LISTENER) as usize) {
                    *accepting = more;
                }
                match socket {
                    Ok(socket) if self.server.has_room() => self.admit(socket.into(), now),
                    Ok(socket) => {
                        self.early.push_back(socket.into());
                        self.stop_accepting()?;
                    }
                    Err(e) => {
                        self.server.refused(&e, now);
                    }
                }
                self.accept()?;
            }
            Done::Received { name, bytes, more } => {
                let Some(client) = self.named(name) else {
                    return Ok(());
                };
                client.line.receiving = more;
                client.line.stopping &= more;
                let close = client.close;
                if !close {
                    self.server.received(index_of(name), bytes, descs, now);
                }
                self.touch(index_of(name));
            }
            Done::Sent {
                name,
                bytes,
                buffer,
            } => {
                if let Some(client) = self.named(name) {
                    client.line.sending = Sending::Done(bytes);
                    client.line.spare = buffer;
                }
                self.touch(index_of(name));
            }
            Done::Submitted { mut batch, error } => {
                if let Some(e) = error {
                    tracing::error!("a submission failed: {e}");
                }
                let waiting = self.waiting.take().unwrap_or_default();
                self.server.resolve(&waiting, &batch);
                batch.clear();
                self.server.batch = batch;
                for index in waiting {
                    self.touch(index);
                }
            }
        }
        Ok(())
    }

    fn named(&mut self, name: u64) -> Option<&mut Client<Line>> {
        self.server.named(name)?;
        self.server.client(index_of(name))
    }

    /// Carries out what the touched clients' packets ask for, until a batch is under way or
    /// nothing is left to do.
    fn work(&mut self, touched: &[usize], now: Instant) -> anyhow::Result<()> {
        loop {
            let mut progress = false;
            if self.waiting.is_none() {
                progress = self.server.advance(touched, now);
            }
            for &index in touched {
                self.send(index, now);
                if let Some(client) = self.server.client(index) {
                    progress |= client.conn.take_progress();
                }
            }
            if self.waiting.is_some() {
                // Their packets are looked at when it is done.
                for &index in touched {
                    self.touch(index);
                }
                return Ok(());
            }
            if !self.server.batch.is_empty() {
                let batch = std::mem::take(&mut self.server.batch);
                self.ring
                    .submit(self.server.device.store(), batch)
                    .context("cannot submit")?;
                self.waiting = Some(touched.to_vec());
                return Ok(());
            }
            if !progress {
                return Ok(());
            }
        }
    }

    fn send(&mut self, index: usize, now: Instant) {
        let Some(client) = self.server.client(index) else {
            return;
        };
        if client.close {
            return;
        }
        let mut ends = Ends {
            ring: &mut self.ring,
            stream: &client.stream,
            name: client.name,
            line: &mut client.line,
        };
        let read = match client.conn.send(&mut ends, now) {
            Next::Wait { read, .. } => read,
            Next::Pending => return,
            Next::ShutDown => {
                let _ = client.stream.shutdown(std::net::Shutdown::Write);
                true
            }
            Next::Close => {
                client.close = true;
                return;
            }
        };
        let parked = client.is_parked();
        let line = &mut client.line;
        let told = if read && !line.receiving && !parked {
            line.receiving = true;
            self.ring.receive(client.stream.as_fd(), client.name)
        } else if !read && line.receiving && !line.stopping && client.conn.ahead() > AHEAD {
            line.stopping = true;
            self.ring.stop_receiving(client.name)
        } else {
            Ok(())
        };
        if let Err(e) = told {
            tracing::error!("io_uring: {e}");
            client.close = true;
        }
    }

    /// At the end of a turn: closes a client that is done. Not before, because the batch names
    /// its socket; nor while anything is under way for it, which is told to end.
    fn settle(&mut self, index: usize) -> anyhow::Result<()> {
        let Some(client) = self.server.client(index).filter(|c| c.close) else {
            return Ok(());
        };
        if !client.line.is_idle() {
            if !client.line.cancelled {
                client.line.cancelled = true;
                self.ring.cancel(client.stream.as_fd())?;
            }
            return Ok(());
        }
        if self.waiting.is_some() {
            // When the batch is done.
            self.touch(index);
            return Ok(());
        }
        self.server.remove(index);
        if let Some(stream) = self.early.pop_front() {
            self.admit(stream, Instant::now());
        }
        self.accept()
    }

    /// Lets the listeners accept, those that do not.
    fn accept(&mut self) -> anyhow::Result<()> {
        if !self.server.has_room() || !self.early.is_empty() || self.server.accept_at.is_some() {
            return Ok(());
        }
        for (index, accepting) in self.accepting.iter_mut().enumerate() {
            let Some(listener) = self.server.listeners.get(index).filter(|_| !*accepting) else {
                continue;
            };
            self.ring
                .accept(listener.as_fd(), LISTENER | index as u64)?;
            *accepting = true;
        }
        Ok(())
    }

    fn stop_accepting(&mut self) -> anyhow::Result<()> {
        for (index, _) in self.accepting.iter().enumerate().filter(|(_, on)| **on) {
            self.ring.stop_accepting(LISTENER | index as u64)?;
        }
        Ok(())
    }

    fn admit(&mut self, stream: TcpStream, now: Instant) {
        // Without an address it is gone already.
        let Ok(peer) = stream.peer_addr() else { return };
        let line = Line {
            receiving: true,
            ..Line::default()
        };
        let Some(index) = self.server.admit(stream, peer, line, now) else {
            return;
        };
        if let Some(client) = self.server.client(index) {
            if let Err(e) = self.ring.receive(client.stream.as_fd(), client.name) {
                tracing::error!("io_uring: {e}");
                client.line.receiving = false;
                client.close = true;
                self.touch(index);
            }
        }
    }
}
