// SPDX-License-Identifier: GPL-2.0-only

//! The server's loop: one thread, one epoll, one submission a turn.

use std::{
    fs::File,
    io::{self, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use pmskb_uapi::{socket, Batch, RecvBuffer, RxMode};
use rustix::{
    buffer::spare_capacity,
    event::epoll,
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType},
};

use crate::{
    conn::{Conn, Limits, Next, Timeout},
    reply::Wire,
    store::Device,
    view::Packet,
};

/// Packet descriptors that one receive call returns at most.
const DESCS: usize = 256;
/// Events of one turn.
const EVENTS: usize = 256;
/// Connections accepted in one turn, so that those that are there get theirs.
const ACCEPTS: usize = 64;
/// How often time limits are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How long a receive that ran out of frames waits before it is tried again,
/// and how many times.
const RETRY_AFTER: Duration = Duration::from_millis(10);
const RETRIES: u32 = 200;
/// How long a server that is told to stop lets replies be sent.
const GRACE: Duration = Duration::from_secs(2);

/// Names of epoll's descriptors: a kind and an index.
const LISTENER: u64 = 1 << 62;
const STOP: u64 = 1 << 61;

/// A server.
pub struct Server {
    device: Device,
    limits: Limits,
    max_connections: usize,
    epoll: rustix::fd::OwnedFd,
    listeners: Vec<TcpListener>,
    accepting: bool,
    /// When to accept again, after the process ran out of something.
    accept_at: Option<Instant>,
    stop: UnixStream,
    clients: Vec<Option<Client>>,
    vacant: Vec<usize>,
    /// Counts clients, so that a late event does not hit a successor.
    generation: u32,
    batch: Batch,
    buffer: RecvBuffer,
    next_tick: Instant,
    parked: Vec<u64>,
}

struct Client {
    conn: Conn,
    stream: TcpStream,
    peer: SocketAddr,
    name: u64,
    interest: epoll::EventFlags,
    /// Receives have run out of frames this many times in a row.
    retries: u32,
    retry_at: Option<Instant>,
    close: bool,
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

impl Server {
    /// Listens on all addresses, with sockets that belong to the store.
    pub fn new(
        device: Device,
        addresses: &[SocketAddr],
        limits: Limits,
        max_connections: usize,
        stop: UnixStream,
    ) -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut listeners = Vec::new();
        for address in addresses {
            let listener =
                listen(*address).with_context(|| format!("cannot listen on {address}"))?;
            device.store().attach_socket(listener.as_fd())?;
            listeners.push(listener);
        }
        stop.set_nonblocking(true)?;
        epoll::add(
            &epoll,
            &stop,
            epoll::EventData::new_u64(STOP),
            epoll::EventFlags::IN,
        )?;
        let mut server = Self {
            device,
            limits,
            max_connections,
            epoll,
            listeners,
            accepting: false,
            accept_at: None,
            stop,
            clients: Vec::new(),
            vacant: Vec::new(),
            generation: 0,
            batch: Batch::new(),
            buffer: RecvBuffer::new(DESCS)?,
            next_tick: Instant::now() + TICK,
            parked: Vec::new(),
        };
        server.set_accepting(true)?;
        Ok(server)
    }

    /// Where it listens.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Serves until it is told to stop.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let mut stopping: Option<Instant> = None;
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let now = Instant::now();
            if let Some(deadline) = stopping {
                if now >= deadline || self.connections() == 0 {
                    return Ok(());
                }
            }
            let timeout = self.timeout(now, stopping);
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e).context("epoll_wait"),
            }
            if self.turn(&events)? && stopping.is_none() {
                tracing::info!("stopping");
                stopping = Some(Instant::now() + GRACE);
                self.listeners.clear();
                self.accepting = false;
                self.accept_at = None;
                self.close_idle();
            }
        }
    }

    fn connections(&self) -> usize {
        self.clients.len() - self.vacant.len()
    }

    fn timeout(&self, now: Instant, stopping: Option<Instant>) -> Option<rustix::time::Timespec> {
        let retry = self
            .parked
            .iter()
            .filter_map(|n| self.client(*n)?.retry_at)
            .min();
        let tick = (self.connections() > 0).then_some(self.next_tick);
        let until = [retry, tick, self.accept_at, stopping]
            .into_iter()
            .flatten()
            .min()?;
        let wait = until.saturating_duration_since(now);
        Some(rustix::time::Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: wait.subsec_nanos().into(),
        })
    }

    fn client(&self, name: u64) -> Option<&Client> {
        self.clients
            .get(name as u32 as usize)?
            .as_ref()
            .filter(|c| c.name == name)
    }

    /// One turn of the loop. True if the server is to stop.
    fn turn(&mut self, events: &[epoll::Event]) -> anyhow::Result<bool> {
        use epoll::EventFlags;
        let now = Instant::now();
        let mut stop = false;
        // Clients that something was done for.
        let mut touched: Vec<usize> = Vec::with_capacity(events.len());
        for event in events {
            let name = event.data.u64();
            if name == STOP {
                let mut byte = [0; 16];
                let _ = io::Read::read(&mut &self.stop, &mut byte);
                stop = true;
            } else if name & LISTENER != 0 {
                self.accept((name & !LISTENER) as usize, now)?;
            } else if self.client(name).is_some() {
                let index = name as u32 as usize;
                let flags = event.flags;
                if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
                    self.hung_up(index);
                } else if flags.contains(EventFlags::IN) {
                    self.receive(index, now);
                }
                touched.push(index);
            }
        }
        self.retry(now, &mut touched);
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.time_out(now, &mut touched);
        }
        if self.accept_at.is_some_and(|at| now >= at) {
            self.accept_at = None;
            self.set_accepting(true)?;
        }
        self.work(&touched, now);
        for index in touched {
            self.settle(index)?;
        }
        Ok(stop)
    }

    /// Carries out what the touched clients' packets ask for, until nothing is
    /// left to do: usually one submission.
    fn work(&mut self, touched: &[usize], now: Instant) {
        loop {
            let mut progress = false;
            for &index in touched {
                if let Some(client) = self.clients[index].as_mut() {
                    progress |= client.conn.advance(&self.device, &mut self.batch, now);
                }
            }
            // What can be sent need not wait for the batch.
            for &index in touched {
                self.send(index, now);
            }
            if !self.batch.is_empty() {
                use crate::store::Store as _;
                if let Err(e) = self.device.submit(&mut self.batch) {
                    tracing::error!("a submission failed: {e}");
                }
                for &index in touched {
                    if let Some(client) = self.clients[index].as_mut() {
                        client.conn.resolve(&self.batch);
                    }
                }
                self.batch.clear();
            }
            for &index in touched {
                self.send(index, now);
                if let Some(client) = self.clients[index].as_mut() {
                    progress |= client.conn.take_progress();
                }
            }
            if !progress {
                return;
            }
        }
    }

    fn receive(&mut self, index: usize, now: Instant) {
        let Some(client) = self.clients[index].as_mut() else {
            return;
        };
        match self.buffer.recv(client.stream.as_fd()) {
            Ok([]) => client.conn.end(),
            Ok(descs) => {
                client.retries = 0;
                let packets = descs.iter().map(|d| Packet {
                    token: d.token(),
                    offset: d.offset(),
                    len: d.len(),
                });
                if !client.conn.receive(packets, &self.device, now) {
                    tracing::error!(peer = %client.peer, "a packet lies outside of the store");
                    client.close = true;
                }
            }
            Err(e) => match Errno::from_io_error(&e) {
                Some(Errno::WOULDBLOCK | Errno::INTR) => {}
                Some(Errno::NOBUFS | Errno::NOMEM | Errno::NOSPC) => {
                    client.retries += 1;
                    if client.retries > RETRIES {
                        tracing::warn!(peer = %client.peer, "gave up: the store has no free frames");
                        client.conn.give_up(503);
                        // What it has sent cannot be received any more.
                        client.conn.end();
                    } else {
                        client.retry_at = Some(now + RETRY_AFTER);
                        self.parked.push(client.name);
                    }
                }
                Some(Errno::CONNRESET | Errno::PIPE | Errno::TIMEDOUT) => client.close = true,
                _ => {
                    tracing::warn!(peer = %client.peer, "cannot receive: {e}");
                    client.close = true;
                }
            },
        }
    }

    /// Tries those again that ran out of frames.
    fn retry(&mut self, now: Instant, touched: &mut Vec<usize>) {
        if self.parked.is_empty() {
            return;
        }
        for name in std::mem::take(&mut self.parked) {
            let Some(client) = self.client(name) else {
                continue;
            };
            if client.retry_at.is_some_and(|at| at > now) {
                self.parked.push(name);
                continue;
            }
            let index = name as u32 as usize;
            if let Some(client) = self.clients[index].as_mut() {
                client.retry_at = None;
            }
            self.receive(index, now);
            touched.push(index);
        }
    }

    fn hung_up(&mut self, index: usize) {
        if let Some(client) = self.clients[index].as_mut() {
            tracing::debug!(peer = %client.peer, "hung up");
            client.close = true;
        }
    }

    fn time_out(&mut self, now: Instant, touched: &mut Vec<usize>) {
        for (index, client) in self.clients.iter_mut().enumerate() {
            let Some(client) = client else { continue };
            match client.conn.timed_out(now) {
                None => continue,
                Some(Timeout::Slow) => client.conn.give_up(408),
                Some(Timeout::Dead) => client.close = true,
            }
            tracing::debug!(peer = %client.peer, "too slow");
            touched.push(index);
        }
    }

    /// Closes what has nothing to send.
    fn close_idle(&mut self) {
        let now = Instant::now();
        let mut touched = Vec::new();
        for (index, client) in self.clients.iter_mut().enumerate() {
            if let Some(client) = client {
                client.conn.end();
                touched.push(index);
            }
        }
        self.work(&touched, now);
        for index in touched {
            let _ = self.settle(index);
        }
    }

    fn send(&mut self, index: usize, now: Instant) {
        use epoll::EventFlags;
        let Some(client) = self.clients[index].as_mut() else {
            return;
        };
        if client.close {
            return;
        }
        let mut line = Line(client.stream.as_fd());
        let mut interest = EventFlags::empty();
        match client.conn.send(&mut line, now) {
            Next::Wait { read, write } => {
                interest.set(EventFlags::IN, read && client.retry_at.is_none());
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
        if interest != client.interest {
            let data = epoll::EventData::new_u64(client.name);
            match epoll::modify(&self.epoll, &client.stream, data, interest) {
                Ok(()) => client.interest = interest,
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
        if !self.clients[index].as_ref().is_some_and(|c| c.close) {
            return Ok(());
        }
        if let Some(client) = self.clients[index].take() {
            tracing::debug!(peer = %client.peer, "closed");
            self.vacant.push(index);
        }
        if !self.accepting && self.accept_at.is_none() && !self.listeners.is_empty() {
            self.set_accepting(true)?;
        }
        Ok(())
    }

    fn set_accepting(&mut self, on: bool) -> anyhow::Result<()> {
        if on == self.accepting {
            return Ok(());
        }
        for (index, listener) in self.listeners.iter().enumerate() {
            if on {
                let data = epoll::EventData::new_u64(LISTENER | index as u64);
                epoll::add(&self.epoll, listener, data, epoll::EventFlags::IN)?;
            } else {
                epoll::delete(&self.epoll, listener)?;
            }
        }
        self.accepting = on;
        Ok(())
    }

    fn accept(&mut self, listener: usize, now: Instant) -> anyhow::Result<()> {
        for _ in 0..ACCEPTS {
            if self.connections() >= self.max_connections {
                return self.set_accepting(false);
            }
            let Some(listener) = self.listeners.get(listener) else {
                return Ok(());
            };
            match listener.accept() {
                Ok((stream, peer)) => {
                    if let Err(e) = self.admit(stream, peer, now) {
                        tracing::warn!(%peer, "cannot serve: {e:#}");
                    }
                }
                Err(e) => match Errno::from_io_error(&e) {
                    Some(Errno::WOULDBLOCK) => return Ok(()),
                    Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        tracing::warn!("cannot accept: {e}");
                        self.accept_at = Some(now + 10 * RETRY_AFTER);
                        return self.set_accepting(false);
                    }
                    // Of the connection, not of the listener.
                    _ => tracing::debug!("a connection failed before it was accepted: {e}"),
                },
            }
        }
        Ok(())
    }

    fn admit(&mut self, stream: TcpStream, peer: SocketAddr, now: Instant) -> anyhow::Result<()> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        if let Err(e) = socket::set_rx_mode(stream.as_fd(), RxMode::Desc) {
            // The module had no memory for it when the connection came in.
            tracing::debug!(%peer, "not attached: {e}");
            let attached = self.device.store().attach_socket(stream.as_fd());
            let attached =
                attached.and_then(|()| socket::set_rx_mode(stream.as_fd(), RxMode::Desc));
            if let Err(e) = attached {
                let _ = (&stream).write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
                return Err(e.into());
            }
        }
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        self.generation = (self.generation + 1) & 0xff_ffff;
        let name = (u64::from(self.generation) << 32) | index as u64;
        let interest = epoll::EventFlags::IN;
        if let Err(e) = epoll::add(
            &self.epoll,
            &stream,
            epoll::EventData::new_u64(name),
            interest,
        ) {
            self.vacant.push(index);
            return Err(e.into());
        }
        tracing::debug!(%peer, "connected");
        let conn = Conn::new(stream.as_raw_fd(), self.limits, now);
        self.clients[index] = Some(Client {
            conn,
            stream,
            peer,
            name,
            interest,
            retries: 0,
            retry_at: None,
            close: false,
        });
        Ok(())
    }
}

/// A listening socket. IPv6 ones leave IPv4 to others.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    use rustix::net::sockopt;
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 4096)?;
    Ok(socket.into())
}
