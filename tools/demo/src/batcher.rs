// SPDX-License-Identifier: GPL-2.0-only

//! A server of the demo: writes arrays of objects, each all or nothing, from the
//! packets that bring them.
//!
//! A request is a line, `put ID NAME COUNT LENGTH` or `del ID NAME COUNT`, and for a
//! put COUNT times LENGTH bytes: those of the objects NAME/0, NAME/1, ... The reply
//! is `ok ID` when all of them are durable, or `error ID WHY` when nothing was done.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::{
    collections::VecDeque,
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{bail, Context};
use clap::Parser;
use pmskb_uapi::{socket, Batch, Ext, Key, Mapping, Mode, RecvBuffer, RxMode, Store, MAX_OPS};
use rustix::event::{poll, PollFd, PollFlags};

/// Writes atomic arrays of objects that a client sends.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// /dev/pmskbN
    #[arg(long)]
    store: PathBuf,
    /// Address and port to listen on
    #[arg(long)]
    listen: SocketAddr,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let store = Arc::new(Store::open(&args.store)?);
    let mapping = Arc::new(store.map()?);
    let listener = TcpListener::bind(args.listen)
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    store.attach_socket(listener.as_fd())?;
    loop {
        let (stream, peer) = listener.accept()?;
        let (store, mapping) = (store.clone(), mapping.clone());
        std::thread::spawn(move || {
            if let Err(e) = serve(&store, &mapping, &stream) {
                eprintln!("pmskb-batcher: {peer}: {e:#}");
            }
        });
    }
}

/// Bytes of a packet that are not used yet.
struct Seg {
    token: u32,
    /// Offset of the token's first byte in the store.
    base: u64,
    at: u32,
    len: u32,
}

/// What a client has sent and was not used yet.
struct Stream<'a> {
    socket: &'a TcpStream,
    mapping: &'a Mapping,
    buffer: RecvBuffer,
    segs: VecDeque<Seg>,
    /// Packets that are used up.
    done: Vec<u32>,
}

impl Stream<'_> {
    /// Waits for packets. False at the end of the stream.
    fn fill(&mut self) -> anyhow::Result<bool> {
        loop {
            match self.buffer.recv(self.socket.as_fd()) {
                Ok([]) => return Ok(false),
                Ok(descs) => {
                    let segs = descs.iter().map(|d| Seg {
                        token: d.token(),
                        base: d.offset(),
                        at: 0,
                        len: d.len(),
                    });
                    self.segs.extend(segs);
                    return Ok(true);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.socket, PollFlags::IN)];
                    poll(&mut fds, None)?;
                }
                // No free frame, for now.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The next line. `None` at the end of the stream.
    fn line(&mut self) -> anyhow::Result<Option<String>> {
        let mut line = Vec::new();
        loop {
            let Some(seg) = self.segs.front_mut() else {
                if self.fill()? {
                    continue;
                }
                if line.is_empty() {
                    return Ok(None);
                }
                bail!("the stream ends in a line");
            };
            let from = seg.base + u64::from(seg.at);
            let bytes = self
                .mapping
                .range(from, (seg.len - seg.at).into())
                .context("a packet outside of the store")?;
            let end = bytes.iter().position(|b| *b == b'\n');
            let used = end.map_or(bytes.len(), |e| e + 1);
            line.extend_from_slice(&bytes[..used]);
            seg.at += used as u32;
            self.settle();
            if end.is_some() {
                line.pop();
                return Ok(Some(String::from_utf8(line)?));
            }
            if line.len() > 4096 {
                bail!("a line without an end");
            }
        }
    }

    /// The places of the next `n` bytes.
    fn take(&mut self, n: u32) -> anyhow::Result<Vec<Ext>> {
        let mut left = n;
        let mut extents = Vec::new();
        while left > 0 {
            let Some(seg) = self.segs.front_mut() else {
                if self.fill()? {
                    continue;
                }
                bail!("the stream ends in an object");
            };
            let len = left.min(seg.len - seg.at);
            extents.push(Ext {
                token: seg.token,
                offset: seg.at,
                len,
            });
            seg.at += len;
            left -= len;
            self.settle();
        }
        Ok(extents)
    }

    fn settle(&mut self) {
        while self.segs.front().is_some_and(|s| s.at == s.len) {
            let seg = self.segs.pop_front();
            self.done.extend(seg.map(|s| s.token));
        }
    }
}

fn serve(store: &Store, mapping: &Mapping, socket: &TcpStream) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    socket::set_rx_mode(socket.as_fd(), RxMode::Desc)?;
    let mut stream = Stream {
        socket,
        mapping,
        buffer: RecvBuffer::new(256)?,
        segs: VecDeque::new(),
        done: Vec::new(),
    };
    let mut batch = Batch::new();
    while let Some(line) = stream.line()? {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u32>().context("not a number");
        batch.clear();
        batch.set_atomic();
        let (id, count) = match words[..] {
            ["put", id, name, count, len] => {
                let (count, len) = (number(count)?, number(len)?);
                for n in 0..count {
                    let extents = stream.take(len)?;
                    let key = format!("{name}/{n}");
                    let fd = socket.as_raw_fd();
                    batch.put(fd, Key::Bytes(key.as_bytes()), &extents, Mode::Upsert, true);
                }
                (id, count)
            }
            ["del", id, name, count] => {
                let count = number(count)?;
                for n in 0..count {
                    batch.delete(format!("{name}/{n}").as_bytes());
                }
                (id, count)
            }
            _ => bail!("no request: {line:?}"),
        };
        if count == 0 || count as usize > MAX_OPS {
            bail!("no number of objects: {line:?}");
        }
        let done = store.submit(&mut batch);
        let outcomes: Result<Vec<_>, _> = (0..count as usize).map(|n| batch.outcome(n)).collect();
        let reply = match (done, outcomes) {
            (Ok(()), Ok(_)) => format!("ok {id}\n"),
            (Err(e), _) => format!("error {id} {}\n", e.cause),
            (_, Err(e)) => format!("error {id} {e}\n"),
        };
        (&mut &*socket).write_all(reply.as_bytes())?;
        // What arrays used was kept: several may lie in one packet.
        if !stream.done.is_empty() {
            batch.clear();
            batch.release(socket.as_raw_fd(), &stream.done);
            store.submit(&mut batch)?;
            stream.done.clear();
        }
    }
    Ok(())
}
