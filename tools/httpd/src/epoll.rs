// SPDX-License-Identifier: GPL-2.0-only

//! The epoll engine: one epoll, a receive and a send for each client that has something, and
//! one submission a turn.

use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use anyhow::Context;
use pmskb_uapi::RecvBuffer;
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, EventFlags},
    io::Errno,
};

use crate::{
    conn::Next,
    reply::Wire,
    server::{index_of, Engine, Server, DESCS},
    store::Store as _,
};

/// Events of one turn.
const EVENTS: usize = 256;
/// Connections accepted in one turn, so that those that are there get theirs.
const ACCEPTS: usize = 64;

/// Names of epoll's descriptors: a kind and an index.
const LISTENER: u64 = 1 << 62;
const STOP: u64 = 1 << 61;

/// A server on epoll. Of each client it knows what it waits for.
pub struct Epoll {
    server: Server<EventFlags>,
    epoll: rustix::fd::OwnedFd,
    accepting: bool,
    buffer: RecvBuffer,
}

/// A client's socket.
struct Line<'a>(BorrowedFd<'a>);

impl Wire for Line<'_> {
    fn send(&mut self, bytes: &[u8], more: bool) -> io::Result<usize> {
        use rustix::net::SendFlags;
        let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if more {
            flags |= SendFlags::MORE;
        }
        Ok(rustix::net::send(self.0, bytes, flags)?)
    }

    fn send_file(&mut self, object: &File, offset: u64, len: usize) -> io::Result<usize> {
        let mut offset = offset;
        Ok(rustix::fs::sendfile(
            self.0,
            object,
            Some(&mut offset),
            len,
        )?)
    }
}

impl Engine for Epoll {
    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.server.addresses()
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let now = Instant::now();
            if self.server.is_done(now) {
                return Ok(());
            }
            let timeout = self.server.timeout(now).map(|wait| rustix::time::Timespec {
                tv_sec: wait.as_secs() as i64,
                tv_nsec: wait.subsec_nanos().into(),
            });
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e).context("epoll_wait"),
            }
            self.turn(&events)?;
        }
    }
}

impl Epoll {
    /// An engine for a server that listens.
    pub fn new(server: Server<EventFlags>) -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = epoll::EventData::new_u64(STOP);
        epoll::add(&epoll, &server.stop, stop, EventFlags::IN)?;
        let mut engine = Self {
            server,
            epoll,
            accepting: false,
            buffer: RecvBuffer::new(DESCS)?,
        };
        engine.set_accepting(true)?;
        Ok(engine)
    }

    /// One turn of the loop.
    fn turn(&mut self, events: &[epoll::Event]) -> anyhow::Result<()> {
        let now = Instant::now();
        // Clients that something was done for.
        let mut touched: Vec<usize> = Vec::with_capacity(events.len());
        for event in events {
            let name = event.data.u64();
            if name == STOP {
                touched.extend(self.server.begin_stop());
                self.accepting = false;
            } else if name & LISTENER != 0 {
                self.accept((name & !LISTENER) as usize, now)?;
            } else if self.server.named(name).is_some() {
                let index = index_of(name);
                let flags = event.flags;
                if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
                    if let Some(client) = self.server.client(index) {
                        tracing::debug!(peer = %client.peer, "hung up");
                        client.close = true;
                    }
                } else if flags.contains(EventFlags::IN) {
                    self.receive(index, now);
                }
                touched.push(index);
            }
        }
        for index in self.server.retries(now) {
            self.receive(index, now);
            touched.push(index);
        }
        touched.extend(self.server.time_out(now));
        if self.server.accepts_again(now) {
            self.set_accepting(true)?;
        }
        self.work(&touched, now);
        for index in touched {
            self.settle(index)?;
        }
        Ok(())
    }

    /// Carries out what the touched clients' packets ask for, until nothing is
    /// left to do: usually one submission.
    fn work(&mut self, touched: &[usize], now: Instant) {
        loop {
            let mut progress = self.server.advance(touched, now);
            // What can be sent need not wait for the batch.
            for &index in touched {
                self.send(index, now);
            }
            if !self.server.batch.is_empty() {
                let mut batch = std::mem::take(&mut self.server.batch);
                if let Err(e) = self.server.device.submit(&mut batch) {
                    tracing::error!("a submission failed: {e}");
                }
                self.server.resolve(touched, &batch);
                batch.clear();
                self.server.batch = batch;
            }
            for &index in touched {
                self.send(index, now);
                if let Some(client) = self.server.client(index) {
                    progress |= client.conn.take_progress();
                }
            }
            if !progress {
                return;
            }
        }
    }

    fn receive(&mut self, index: usize, now: Instant) {
        let Some(client) = self.server.client(index) else {
            return;
        };
        match self.buffer.recv(client.stream.as_fd()) {
            Ok(descs) => {
                let bytes = descs.iter().map(|d| d.len() as usize).sum();
                self.server.received(index, Ok(bytes), descs, now);
            }
            Err(e) => self.server.received(index, Err(e), &[], now),
        }
    }

    fn send(&mut self, index: usize, now: Instant) {
        let Some(client) = self.server.client(index) else {
            return;
        };
        if client.close {
            return;
        }
        let mut line = Line(client.stream.as_fd());
        let mut interest = EventFlags::empty();
        match client.conn.send(&mut line, now) {
            Next::Wait { read, write } => {
                interest.set(EventFlags::IN, read && !client.is_parked());
                interest.set(EventFlags::OUT, write);
            }
            Next::Pending => return,
            Next::ShutDown => {
                let _ = client.stream.shutdown(std::net::Shutdown::Write);
                interest = EventFlags::IN;
            }
            Next::Close => {
                client.close = true;
                return;
            }
        }
        if interest != client.line {
            let data = epoll::EventData::new_u64(client.name);
            match epoll::modify(&self.epoll, &client.stream, data, interest) {
                Ok(()) => client.line = interest,
                Err(e) => {
                    tracing::error!("epoll_ctl: {e}");
                    client.close = true;
                }
            }
        }
    }

    /// At the end of a turn: closes a client that is done. Not before, because the
    /// batch names its socket.
    fn settle(&mut self, index: usize) -> anyhow::Result<()> {
        if !self.server.client(index).is_some_and(|c| c.close) {
            return Ok(());
        }
        self.server.remove(index);
        if !self.accepting && self.server.accept_at.is_none() && !self.server.listeners.is_empty() {
            self.set_accepting(true)?;
        }
        Ok(())
    }

    fn set_accepting(&mut self, on: bool) -> anyhow::Result<()> {
        if on == self.accepting {
            return Ok(());
        }
        for (index, listener) in self.server.listeners.iter().enumerate() {
            if on {
                let data = epoll::EventData::new_u64(LISTENER | index as u64);
                epoll::add(&self.epoll, listener, data, EventFlags::IN)?;
            } else {
                epoll::delete(&self.epoll, listener)?;
            }
        }
        self.accepting = on;
        Ok(())
    }

    fn accept(&mut self, listener: usize, now: Instant) -> anyhow::Result<()> {
        for _ in 0..ACCEPTS {
            if !self.server.has_room() {
                return self.set_accepting(false);
            }
            let Some(accepted) = self.server.listeners.get(listener).map(TcpListener::accept)
            else {
                return Ok(());
            };
            match accepted {
                Ok((stream, peer)) => {
                    stream.set_nonblocking(true)?;
                    let wants = EventFlags::IN;
                    if let Some(index) = self.server.admit(stream, peer, wants, now) {
                        self.watch(index);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => {
                    if self.server.refused(&e, now) {
                        return self.set_accepting(false);
                    }
                }
            }
        }
        Ok(())
    }

    fn watch(&mut self, index: usize) {
        let Some(client) = self.server.client(index) else {
            return;
        };
        let data = epoll::EventData::new_u64(client.name);
        if let Err(e) = epoll::add(&self.epoll, &client.stream, data, client.line) {
            tracing::warn!(peer = %client.peer, "cannot serve: {e}");
            self.server.remove(index);
        }
    }
}
