// SPDX-License-Identifier: GPL-2.0-only
//! An HTTP server on one epoll and one thread: a receive and a send for each client that has
//! something, and one commit a turn, as in pmskb-httpd's epoll engine. Parser and replies are
//! pmskb-httpd's own; of what it does besides, time limits and conditions on puts are left out
//! here.

use crate::store::{self, Kind, Store};
use anyhow::{Context, Result, bail};
use pmskb_httpd::parse::{Ask, BodyParser, Head, HeadParser, Refusal};
use pmskb_httpd::reply::{Queue, Sent, Wire};
use pmskb_httpd::view::{Memory, Packet, Piece, View};
use pmskb_uapi::Outcome;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Events of one turn.
const EVENTS: usize = 256;
/// The name of the listener.
const LISTENER: u64 = u64::MAX;
/// Bytes that a receive asks for at least.
const RECEIVE: usize = 64 << 10;
/// Largest body.
const MAX_BODY: u64 = 16 << 20;

/// What `serve` is told.
#[derive(clap::Args)]
pub struct Args {
    /// Which contender
    #[arg(long, value_enum)]
    store: Kind,
    /// Where it keeps its files
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    directory: PathBuf,
    /// Bytes that it may take there
    #[arg(long, value_name = "BYTES", default_value_t = 128 << 20)]
    size: u64,
    /// Where to listen
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// A pmskb store that is to have a log record of all that is received: auto-persist
    #[arg(long, value_name = "DEVICE")]
    auto: Option<PathBuf>,
    /// A file that is made when it listens
    #[arg(long, value_name = "FILE")]
    ready: Option<PathBuf>,
}

/// Bytes that were received: one after the other, from the beginning again when none of them is
/// needed any more.
#[derive(Default)]
struct Buffer(Vec<u8>);

impl Memory for Buffer {
    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        self.0.get(offset as usize..(offset + len) as usize)
    }
}

/// A request whose body is on its way.
struct Request {
    ask: Ask,
    keep_alive: bool,
    pieces: Vec<Piece>,
    body: BodyParser,
}

struct Client {
    stream: TcpStream,
    buffer: Buffer,
    view: View,
    head: HeadParser,
    request: Option<Request>,
    queue: Queue,
    /// No more requests are read.
    last: bool,
    close: bool,
    interest: EventFlags,
}

impl Client {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            buffer: Buffer(Vec::with_capacity(2 * RECEIVE)),
            view: View::default(),
            head: HeadParser::default(),
            request: None,
            queue: Queue::default(),
            last: false,
            close: false,
            interest: EventFlags::IN,
        }
    }

    fn receive(&mut self) {
        if self.view.is_empty() && self.request.is_none() {
            self.buffer.0.clear();
        }
        self.buffer.0.reserve(RECEIVE);
        let at = self.buffer.0.len();
        let flags = rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.stream, spare_capacity(&mut self.buffer.0), flags) {
            Ok((_, 0)) => self.close = true,
            Ok((_, len)) => self.view.push(Packet {
                token: 0,
                offset: at as u64,
                len: len as u32,
            }),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.close = true,
        }
    }

    /// Carries out the requests that are complete.
    fn advance(&mut self, store: &mut dyn Store, seq: &mut u64) -> Result<()> {
        while !self.last {
            match self.step(store, seq) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Failure::Refused(refusal)) => {
                    self.queue.push_status(refusal.0, false, false);
                    self.last = true;
                }
                Err(Failure::Store(error)) => return Err(error),
            }
        }
        // Nobody holds what they name.
        self.view.free().clear();
        Ok(())
    }

    /// One step. True if there may be another.
    fn step(&mut self, store: &mut dyn Store, seq: &mut u64) -> Result<bool, Failure> {
        let Some(request) = &mut self.request else {
            if self.view.is_empty() {
                return Ok(false);
            }
            let Some(head) = self.head.next(&mut self.view, &self.buffer)? else {
                return Ok(false);
            };
            let Head {
                ask,
                framing,
                keep_alive,
                expects_continue,
            } = head;
            if expects_continue {
                self.queue.push_continue();
            }
            let body = BodyParser::new(framing, MAX_BODY)?;
            self.request = Some(Request {
                ask,
                keep_alive,
                pieces: Vec::new(),
                body,
            });
            return Ok(true);
        };
        let pieces = Some(&mut request.pieces);
        if !request.body.advance(&mut self.view, &self.buffer, pieces)? {
            return Ok(false);
        }
        if let Some(request) = self.request.take() {
            self.last = !request.keep_alive;
            self.carry_out(&request, store, seq)?;
        }
        Ok(true)
    }

    fn carry_out(
        &mut self,
        request: &Request,
        store: &mut dyn Store,
        seq: &mut u64,
    ) -> Result<(), Failure> {
        match &request.ask {
            Ask::Put { key, .. } => {
                // Of one body they lie side by side, unless it came in chunks.
                let mut joined = Vec::new();
                let mut all = 0..0;
                for piece in &request.pieces {
                    let range = self.view.memory_of(piece);
                    if all.is_empty() {
                        all = range;
                    } else if all.end == range.start {
                        all.end = range.end;
                    } else {
                        joined.extend_from_slice(slice(&self.buffer, &all));
                        all = range;
                    }
                }
                let mut body = slice(&self.buffer, &all);
                if !joined.is_empty() {
                    joined.extend_from_slice(body);
                    body = &joined;
                }
                store.put(key.bytes(), body).map_err(Failure::Store)?;
                *seq += 1;
                let op = *seq as usize;
                self.queue.push_pending(op, key.bytes(), request.keep_alive);
                if let pmskb_httpd::parse::KeyPlace::Packet(piece, _) = key {
                    self.view.settle(piece);
                }
            }
            Ask::Get { key, head, .. } => {
                // What was put in this turn is to be seen.
                store.commit().map_err(Failure::Store)?;
                match store.get(key) {
                    Ok(Some(body)) => self.queue.push_text(&body, request.keep_alive, *head),
                    Ok(None) => self.queue.push_status(404, request.keep_alive, *head),
                    Err(_) => self.queue.push_status(501, request.keep_alive, *head),
                }
            }
            Ask::Refuse { refusal, head } => {
                self.queue.push_status(refusal.0, request.keep_alive, *head);
            }
            Ask::Delete { .. } | Ask::List { .. } => {
                self.queue.push_status(501, request.keep_alive, false);
            }
        }
        for piece in &request.pieces {
            self.view.settle(piece);
        }
        Ok(())
    }

    /// Sends what can be sent; what to wait for then.
    fn send(&mut self) -> EventFlags {
        let mut line = Line(&self.stream);
        match self.queue.send(&mut line) {
            Ok((Sent::Blocked, _)) => EventFlags::OUT,
            Ok((Sent::All, _)) if self.last => {
                self.close = true;
                EventFlags::empty()
            }
            Ok((Sent::All | Sent::Pending, _)) => EventFlags::IN,
            Err(_) => {
                self.close = true;
                EventFlags::empty()
            }
        }
    }
}

fn slice<'b>(buffer: &'b Buffer, range: &std::ops::Range<u64>) -> &'b [u8] {
    let found = buffer.bytes(range.start, range.end - range.start);
    found.unwrap_or_default()
}

enum Failure {
    Refused(Refusal),
    Store(anyhow::Error),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Failure::Refused(refusal)
    }
}

/// A client's socket.
struct Line<'a>(&'a TcpStream);

impl Wire for Line<'_> {
    fn send(&mut self, bytes: &[u8], more: bool) -> io::Result<usize> {
        use rustix::net::SendFlags;
        let mut flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if more {
            flags |= SendFlags::MORE;
        }
        Ok(rustix::net::send(self.0, bytes, flags)?)
    }

    fn send_file(&mut self, _: &File, _: u64, _: usize) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Server {
    store: Box<dyn Store>,
    epoll: OwnedFd,
    listener: TcpListener,
    clients: Vec<Option<Client>>,
    seq: u64,
    touched: Vec<usize>,
}

impl Server {
    fn new(args: &Args) -> Result<Self> {
        let store = store::open(args.store, &args.directory, args.size)?;
        let listener = listen(args.listen)?;
        if let Some(device) = &args.auto {
            let device = pmskb_uapi::Store::open(device)?;
            device.attach_socket(listener.as_fd())?;
            // What it accepts has the same.
            pmskb_uapi::socket::set_auto_persist(listener.as_fd(), true)?;
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let name = epoll::EventData::new_u64(LISTENER);
        epoll::add(&epoll, &listener, name, EventFlags::IN)?;
        Ok(Self {
            store,
            epoll,
            listener,
            clients: Vec::new(),
            seq: 0,
            touched: Vec::new(),
        })
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).context("accept"),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let vacant = self.clients.iter().position(Option::is_none);
            let index = vacant.unwrap_or_else(|| {
                self.clients.push(None);
                self.clients.len() - 1
            });
            let name = epoll::EventData::new_u64(index as u64);
            epoll::add(&self.epoll, &stream, name, EventFlags::IN)?;
            self.clients[index] = Some(Client::new(stream));
        }
    }

    /// One turn: receives, carries out, makes durable, replies.
    fn turn(&mut self, events: &[epoll::Event]) -> Result<()> {
        let before = self.seq;
        self.touched.clear();
        for event in events {
            if event.data.u64() == LISTENER {
                self.accept()?;
                continue;
            }
            let index = event.data.u64() as usize;
            let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else {
                continue;
            };
            let flags = event.flags;
            if flags.intersects(EventFlags::IN | EventFlags::ERR | EventFlags::HUP) {
                client.receive();
            }
            client.advance(&mut *self.store, &mut self.seq)?;
            self.touched.push(index);
        }
        if self.seq != before {
            self.store.commit()?;
        }
        for &index in &self.touched {
            let Some(client) = self.clients[index].as_mut() else {
                continue;
            };
            client.queue.resolve(|op| {
                Ok(Outcome {
                    seq: op as u64,
                    replaced: false,
                    copied: false,
                    csum: 0,
                    csum_kind: 0,
                })
            });
            let interest = client.send();
            if client.close {
                self.clients[index] = None;
            } else if interest != client.interest {
                let name = epoll::EventData::new_u64(index as u64);
                epoll::modify(&self.epoll, &client.stream, name, interest)?;
                client.interest = interest;
            }
        }
        Ok(())
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address).with_context(|| format!("cannot bind {address}"))?;
    rustix::net::listen(&socket, 4096)?;
    Ok(socket.into())
}

/// Serves until it is killed.
pub fn run(args: &Args) -> Result<()> {
    let mut server = Server::new(args)?;
    println!("listening on {}", server.listener.local_addr()?);
    io::stdout().flush()?;
    if let Some(ready) = &args.ready {
        File::create(ready)?;
    }
    let mut events = Vec::with_capacity(EVENTS);
    loop {
        events.clear();
        match epoll::wait(&server.epoll, spare_capacity(&mut events), None) {
            Ok(_) => server.turn(&events)?,
            Err(Errno::INTR) => {}
            Err(e) => bail!("epoll_wait: {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read as _;
    use std::sync::{Arc, Mutex};

    /// Keeps bodies in a map, and counts commits.
    #[derive(Default)]
    struct Map {
        staged: Vec<(Vec<u8>, Vec<u8>)>,
        kept: BTreeMap<Vec<u8>, Vec<u8>>,
        commits: usize,
    }

    struct Shared(Arc<Mutex<Map>>);

    impl Store for Shared {
        fn put(&mut self, key: &[u8], body: &[u8]) -> Result<()> {
            self.0
                .lock()
                .unwrap()
                .staged
                .push((key.into(), body.into()));
            Ok(())
        }
        fn commit(&mut self) -> Result<()> {
            let mut map = self.0.lock().unwrap();
            let staged = std::mem::take(&mut map.staged);
            map.kept.extend(staged);
            map.commits += 1;
            Ok(())
        }
        fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
            Ok(self.0.lock().unwrap().kept.get(key).cloned())
        }
    }

    /// A client's side, and what the server's side kept. Every step of the stream is a receive.
    struct Pair {
        client: Client,
        peer: TcpStream,
        store: Shared,
        seq: u64,
    }

    impl Pair {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, _) = listener.accept().unwrap();
            Self {
                client: Client::new(stream),
                peer,
                store: Shared(Arc::default()),
                seq: 0,
            }
        }

        fn say(&mut self, bytes: &[u8]) {
            self.peer.write_all(bytes).unwrap();
            // On one host what was sent is there.
            self.client.receive();
            self.client.advance(&mut self.store, &mut self.seq).unwrap();
        }

        fn reply(&mut self) -> String {
            self.store.commit().unwrap();
            self.client.queue.resolve(|op| {
                Ok(Outcome {
                    seq: op as u64,
                    replaced: false,
                    copied: false,
                    csum: 0,
                    csum_kind: 0,
                })
            });
            self.client.send();
            let mut buffer = [0; 4096];
            let len = self.peer.read(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..len]).into_owned()
        }

        fn kept(&self, key: &str) -> Option<Vec<u8>> {
            self.store
                .0
                .lock()
                .unwrap()
                .kept
                .get(key.as_bytes())
                .cloned()
        }
    }

    #[test]
    fn a_body_is_kept_under_its_key_and_then_confirmed() {
        let mut pair = Pair::new();
        pair.say(b"POST /k1 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello");
        assert_eq!(pair.kept("k1"), None, "before the commit");
        let reply = pair.reply();
        assert!(reply.starts_with("HTTP/1.1 201 Created\r\n"), "{reply}");
        assert!(reply.contains("Location: /k1\r\n"), "{reply}");
        assert_eq!(pair.kept("k1").unwrap(), b"hello");
    }

    #[test]
    fn requests_come_in_parts_and_several_at_once() {
        let mut pair = Pair::new();
        pair.say(b"PUT /a HTTP/1.1\r\nHo");
        pair.say(b"st: h\r\nContent-Length: 10\r\n\r\n0123");
        pair.say(b"456789PUT /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde");
        pair.say(b"\r\n0\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n");
        let reply = pair.reply();
        assert_eq!(reply.matches("201 Created").count(), 2, "{reply}");
        assert!(reply.ends_with("\r\n\r\n0123456789"), "{reply}");
        assert_eq!(pair.kept("a").unwrap(), b"0123456789");
        assert_eq!(pair.kept("b").unwrap(), b"abcde");
        // With nothing left over, the buffer begins anew.
        pair.say(b"PUT /c HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nc");
        assert!(pair.client.buffer.0.len() < 60);
        assert!(pair.reply().contains("201"));
    }

    #[test]
    fn nonsense_is_refused_and_ends_the_connection() {
        let mut pair = Pair::new();
        pair.say(b"EHLO example.org\r\n\r\n");
        assert!(pair.reply().starts_with("HTTP/1.1 400"));
        assert!(pair.client.close);
    }
}
