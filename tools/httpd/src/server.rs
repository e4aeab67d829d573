// SPDX-License-Identifier: GPL-2.0-only

//! What a server has and does, whichever engine drives it: listening sockets, clients, their
//! time limits, and a batch for what they ask for.
//!
//! An engine (`epoll.rs`, `uring.rs`) waits for things to happen and tells the server; what it
//! needs of its own for each client is in [`Client::line`].

use std::{
    io::{self, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use pmskb_uapi::{socket, Batch, Desc, RxMode};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType},
};

use crate::{
    conn::{Conn, Limits, Timeout},
    store::Device,
    view::Packet,
};

/// Packet descriptors that one receive returns at most.
pub const DESCS: usize = 256;
/// How often time limits are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How long a receive that ran out of frames waits before it is tried again,
/// and how many times.
const RETRY_AFTER: Duration = Duration::from_millis(10);
const RETRIES: u32 = 200;
/// How long nothing is accepted after the process ran out of something.
const ACCEPT_AFTER: Duration = Duration::from_millis(100);
/// How long a server that is told to stop lets replies be sent.
const GRACE: Duration = Duration::from_secs(2);

/// How a server is driven.
pub trait Engine {
    /// Where it listens.
    fn addresses(&self) -> io::Result<Vec<SocketAddr>>;
    /// Serves until it is told to stop.
    fn run(&mut self) -> anyhow::Result<()>;
}

/// A server's own part. `L` is what its engine keeps for each client.
pub struct Server<L> {
    /// The store.
    pub device: Device,
    /// Where it listens.
    pub listeners: Vec<TcpListener>,
    /// Tells it to stop.
    pub stop: UnixStream,
    /// What the clients have asked for and was not submitted yet.
    pub batch: Batch,
    /// When to accept again, after the process ran out of something.
    pub accept_at: Option<Instant>,
    limits: Limits,
    max_connections: usize,
    clients: Vec<Option<Client<L>>>,
    vacant: Vec<usize>,
    /// Counts clients, so that a late event does not hit a successor.
    generation: u32,
    next_tick: Instant,
    parked: Vec<u64>,
    stopping: Option<Instant>,
}

/// A client.
pub struct Client<L> {
    /// Its requests and replies.
    pub conn: Conn,
    /// Its socket.
    pub stream: TcpStream,
    /// Its address.
    pub peer: SocketAddr,
    /// Its name, which no later client has.
    pub name: u64,
    /// It is to be closed.
    pub close: bool,
    /// What the engine keeps.
    pub line: L,
    /// Receives have run out of frames this many times in a row.
    retries: u32,
    retry_at: Option<Instant>,
}

impl<L> Client<L> {
    /// Nothing is to be received now: frames have run out.
    pub fn is_parked(&self) -> bool {
        self.retry_at.is_some()
    }
}

/// A client's place, from its name.
pub fn index_of(name: u64) -> usize {
    name as u32 as usize
}

impl<L> Server<L> {
    /// Listens on all addresses, with sockets that belong to the store.
    pub fn new(
        device: Device,
        addresses: &[SocketAddr],
        limits: Limits,
        max_connections: usize,
        stop: UnixStream,
    ) -> anyhow::Result<Self> {
        let mut listeners = Vec::new();
        for address in addresses {
            let listener =
                listen(*address).with_context(|| format!("cannot listen on {address}"))?;
            device.store().attach_socket(listener.as_fd())?;
            listeners.push(listener);
        }
        stop.set_nonblocking(true)?;
        Ok(Self {
            device,
            listeners,
            stop,
            batch: Batch::new(),
            accept_at: None,
            limits,
            max_connections,
            clients: Vec::new(),
            vacant: Vec::new(),
            generation: 0,
            next_tick: Instant::now() + TICK,
            parked: Vec::new(),
            stopping: None,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Clients now.
    pub fn connections(&self) -> usize {
        self.clients.len() - self.vacant.len()
    }

    /// Whether there may be another client.
    pub fn has_room(&self) -> bool {
        self.connections() < self.max_connections
    }

    /// Whether it was told to stop, and has done what it then has to.
    pub fn is_done(&self, now: Instant) -> bool {
        self.stopping
            .is_some_and(|until| now >= until || self.connections() == 0)
    }

    /// It is told to stop: whoever has nothing to send is closed. All clients, to be looked at.
    pub fn begin_stop(&mut self) -> Vec<usize> {
        let mut byte = [0; 16];
        let _ = io::Read::read(&mut &self.stop, &mut byte);
        if self.stopping.is_some() {
            return Vec::new();
        }
        tracing::info!("stopping");
        self.stopping = Some(Instant::now() + GRACE);
        self.listeners.clear();
        self.accept_at = None;
        let mut all = Vec::new();
        for (index, client) in self.clients.iter_mut().enumerate() {
            if let Some(client) = client {
                client.conn.end();
                all.push(index);
            }
        }
        all
    }

    /// How long nothing has to be done unless something happens. `None`: for ever.
    pub fn timeout(&self, now: Instant) -> Option<Duration> {
        let retry = self
            .parked
            .iter()
            .filter_map(|n| self.named(*n)?.retry_at)
            .min();
        let tick = (self.connections() > 0).then_some(self.next_tick);
        [retry, tick, self.accept_at, self.stopping]
            .into_iter()
            .flatten()
            .min()
            .map(|until| until.saturating_duration_since(now))
    }

    /// The client with a name, if it is still there.
    pub fn named(&self, name: u64) -> Option<&Client<L>> {
        self.clients
            .get(index_of(name))?
            .as_ref()
            .filter(|c| c.name == name)
    }

    /// The client at a place.
    pub fn client(&mut self, index: usize) -> Option<&mut Client<L>> {
        self.clients.get_mut(index)?.as_mut()
    }

    /// Goes on with what the clients have asked for: true if there was anything.
    pub fn advance(&mut self, clients: &[usize], now: Instant) -> bool {
        let mut progress = false;
        for &index in clients {
            if let Some(client) = self.clients[index].as_mut() {
                progress |= client.conn.advance(&self.device, &mut self.batch, now);
            }
        }
        progress
    }

    /// A batch was submitted.
    pub fn resolve(&mut self, clients: &[usize], batch: &Batch) {
        for &index in clients {
            if let Some(client) = self.clients[index].as_mut() {
                client.conn.resolve(batch);
            }
        }
    }

    /// A receive has returned: what it describes, and how many bytes that is.
    pub fn received(
        &mut self,
        index: usize,
        bytes: io::Result<usize>,
        descs: &[Desc],
        now: Instant,
    ) {
        let Some(client) = self.clients[index].as_mut() else {
            return;
        };
        match bytes {
            Ok(0) => client.conn.end(),
            Ok(_) => {
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
                Some(Errno::WOULDBLOCK | Errno::INTR | Errno::CANCELED) => {}
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

    /// Those who ran out of frames and may be tried again.
    pub fn retries(&mut self, now: Instant) -> Vec<usize> {
        let mut ready = Vec::new();
        for name in std::mem::take(&mut self.parked) {
            let Some(client) = self.named(name) else {
                continue;
            };
            if client.retry_at.is_some_and(|at| at > now) {
                self.parked.push(name);
                continue;
            }
            if let Some(client) = self.client(index_of(name)) {
                client.retry_at = None;
                ready.push(index_of(name));
            }
        }
        ready
    }

    /// Those who take too long, once in a while.
    pub fn time_out(&mut self, now: Instant) -> Vec<usize> {
        let mut slow = Vec::new();
        if now < self.next_tick {
            return slow;
        }
        self.next_tick = now + TICK;
        for (index, client) in self.clients.iter_mut().enumerate() {
            let Some(client) = client else { continue };
            match client.conn.timed_out(now) {
                None => continue,
                Some(Timeout::Slow) => client.conn.give_up(408),
                Some(Timeout::Dead) => client.close = true,
            }
            tracing::debug!(peer = %client.peer, "too slow");
            slow.push(index);
        }
        slow
    }

    /// The client goes. True if there was one.
    pub fn remove(&mut self, index: usize) -> bool {
        let Some(client) = self.clients[index].take() else {
            return false;
        };
        tracing::debug!(peer = %client.peer, "closed");
        self.vacant.push(index);
        true
    }

    /// An accept failed. True if none should be tried for a while.
    pub fn refused(&mut self, e: &io::Error, now: Instant) -> bool {
        match Errno::from_io_error(e) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                tracing::warn!("cannot accept: {e}");
                self.accept_at = Some(now + ACCEPT_AFTER);
                true
            }
            // Of the connection, not of the listener.
            _ => {
                tracing::debug!("a connection failed before it was accepted: {e}");
                false
            }
        }
    }

    /// Whether it is time to accept again.
    pub fn accepts_again(&mut self, now: Instant) -> bool {
        let again = self.accept_at.is_some_and(|at| now >= at);
        if again {
            self.accept_at = None;
        }
        again
    }

    /// A connection that does not block becomes a client: its place. On an error, which is said,
    /// it is closed.
    pub fn admit(
        &mut self,
        stream: TcpStream,
        peer: SocketAddr,
        line: L,
        now: Instant,
    ) -> Option<usize> {
        if let Err(e) = self.prepare(&stream, peer) {
            tracing::warn!(%peer, "cannot serve: {e:#}");
            return None;
        }
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        self.generation = (self.generation + 1) & 0xff_ffff;
        tracing::debug!(%peer, "connected");
        let conn = Conn::new(stream.as_raw_fd(), self.limits, now);
        self.clients[index] = Some(Client {
            conn,
            stream,
            peer,
            name: (u64::from(self.generation) << 32) | index as u64,
            close: false,
            line,
            retries: 0,
            retry_at: None,
        });
        Some(index)
    }

    fn prepare(&self, stream: &TcpStream, peer: SocketAddr) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        if let Err(e) = socket::set_rx_mode(stream.as_fd(), RxMode::Desc) {
            // The module had no memory for it when the connection came in.
            tracing::debug!(%peer, "not attached: {e}");
            let attached = self.device.store().attach_socket(stream.as_fd());
            let attached =
                attached.and_then(|()| socket::set_rx_mode(stream.as_fd(), RxMode::Desc));
            if let Err(e) = attached {
                let mut stream = stream;
                let _ = stream.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
                return Err(e.into());
            }
        }
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
