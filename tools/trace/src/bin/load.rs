// SPDX-License-Identifier: GPL-2.0-only
//! In the guest: uses a store through sockets and its device, and says what it does, for the
//! plugin. And: compares a store with what a crash's image may hold.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, Subcommand};
use pmskb_trace::ledger::{Found, Ledger, State};
use pmskb_trace::mark::{Begin, Kind, Mark};
use pmskb_trace::work::{Rng, bytes_of, key_of};
use pmskb_uapi::{
    Batch, Catalog, Control, Ext, Key, Mode, Outcome, RecvBuffer, RxMode, Store, socket,
};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Uses a store, with marks for libpmskb_trace.so.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Several threads: put, replace, delete, arrays, truncate, compact, send
    Mix(Mix),
    /// One operation after the other, of one thread, to be counted
    Costs {
        /// The store's device, such as /dev/pmem0; its store is attached
        device: PathBuf,
        /// Of each kind so many
        #[arg(long, default_value_t = 20)]
        count: u64,
    },
    /// Compare an attached store with what it may hold
    Verify {
        /// /dev/pmskbN
        store: PathBuf,
        /// Ledger that pmskb-trace wrote
        ledger: PathBuf,
    },
}

#[derive(Args)]
struct Mix {
    /// The store's device, such as /dev/pmem0; its store is attached, and empty
    device: PathBuf,
    /// Name of the run
    #[arg(long, default_value = "mix")]
    name: String,
    /// Steps of each thread, of all rounds
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Threads; every other has a UDP socket
    #[arg(long, default_value_t = 3)]
    workers: u64,
    /// Between rounds the store is detached and attached
    #[arg(long, default_value_t = 2)]
    rounds: u64,
    /// Keys of each thread
    #[arg(long, default_value_t = 24)]
    keys: u64,
    /// What is drawn depends on it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Errors of calls are no failure: something was taken out of the module
    #[arg(long)]
    broken: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Mix(args) => mix(&args),
        Command::Costs { device, count } => costs(&device, count),
        Command::Verify { store, ledger } => verify(&store, &ledger),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pmskb-trace-load: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn the_store() -> anyhow::Result<Store> {
    match pmskb_uapi::store::attached()[..] {
        [minor] => Ok(Store::open_minor(minor)?),
        ref other => bail!("{} stores are attached, not one", other.len()),
    }
}

/// Detaches the store and attaches it again.
fn attach_again(device: &std::path::Path, op: u64) -> anyhow::Result<()> {
    let minor = match pmskb_uapi::store::attached()[..] {
        [minor] => minor,
        _ => bail!("one store is to be attached"),
    };
    begin(op, Kind::Attach, 0, &[], 0, 0);
    let control = Control::open()?;
    control.detach(minor, Some(Duration::from_secs(20)))?;
    control.attach(device, false, false)?;
    Mark::Ack { op, result: 0 }.make();
    Ok(())
}

fn begin(op: u64, kind: Kind, key: u64, bytes: &[u8], group: u64, seq: u64) {
    Mark::Begin(Begin {
        op,
        kind,
        key,
        len: bytes.len() as u32,
        crc: crc32c::crc32c(bytes),
        group,
        seq,
    })
    .make();
}

fn mix(args: &Mix) -> anyhow::Result<()> {
    Mark::start(&args.name).make();
    let mut workers: Vec<_> = (0..args.workers)
        .map(|number| Worker::new(number + 1, args.keys, Rng::of(args.seed, &[number])))
        .collect();
    for round in 0..args.rounds {
        if round > 0 {
            attach_again(&args.device, round)?;
        }
        let steps = args.steps / args.rounds;
        let done: Vec<anyhow::Result<()>> = std::thread::scope(|scope| {
            let threads: Vec<_> = workers
                .iter_mut()
                .map(|worker| {
                    scope.spawn(move || {
                        let store = the_store()?;
                        let mut place = Place::new(&store, worker.number % 2 == 0)?;
                        (0..steps).try_for_each(|_| worker.step(&mut place))
                    })
                })
                .collect();
            let join = |t: std::thread::ScopedJoinHandle<'_, _>| t.join().expect("it panicked");
            threads.into_iter().map(join).collect()
        });
        for result in done {
            match result {
                Err(e) if args.broken => eprintln!("a thread ended: {e:#}"),
                other => other?,
            }
        }
    }
    Mark::End.make();
    let count: u64 = workers.iter().map(|worker| worker.next & 0xffff_ffff).sum();
    println!(
        "{count} operations, {} sent",
        workers.iter().map(|w| w.sent).sum::<u64>()
    );
    Ok(())
}

fn costs(device: &std::path::Path, count: u64) -> anyhow::Result<()> {
    Mark::start("costs").make();
    let mut worker = Worker::new(1, count * 16, Rng::of(7, &[7]));
    let store = the_store()?;
    let mut place = Place::new(&store, false)?;
    let puts = |first: u64, n: u64| (first..first + n).map(|key| (Kind::Put, key, 1024));
    for n in 0..count {
        let all: Vec<_> = puts(n, 1).collect();
        worker.array(&mut place, &all, false, false)?;
    }
    for n in 0..count {
        worker.array(&mut place, &[(Kind::Put, n, 1024)], false, false)?;
    }
    for _ in 0..count {
        worker.array(&mut place, &[(Kind::Append, 0, 1024)], false, false)?;
    }
    for n in 0..count {
        let all: Vec<_> = puts(count + n * 4, 4).collect();
        worker.array(&mut place, &all, false, false)?;
    }
    for n in 0..count {
        let all: Vec<_> = puts(count * 5 + n * 4, 4).collect();
        worker.array(&mut place, &all, true, false)?;
    }
    for n in 0..count {
        worker.array(&mut place, &[(Kind::Delete, n, 0)], false, false)?;
    }
    worker.truncate(&mut place)?;
    for n in (count..count * 9).filter(|n| n % 8 != 0) {
        worker.array(&mut place, &[(Kind::Delete, n, 0)], false, false)?;
    }
    worker.compact(&mut place)?;
    drop(place);
    drop(store);
    attach_again(device, 1)?;
    Mark::End.make();
    Ok(())
}

/// What a mark says that a call answered.
fn answer(outcome: &std::io::Result<Outcome>) -> i64 {
    match outcome {
        Ok(outcome) => outcome.seq as i64,
        Err(e) => -i64::from(e.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// Where a thread works.
struct Place<'a> {
    store: &'a Store,
    /// What is written there is received at `here`.
    far: Far,
    here: Here,
    segs: VecDeque<Seg>,
    done: Vec<u32>,
    buffer: RecvBuffer,
    /// For records to be sent: what is written to the first comes out of the second.
    pair: (TcpStream, TcpStream),
}

enum Far {
    Stream(TcpStream),
    Datagrams(UdpSocket),
}

enum Here {
    Stream(TcpStream),
    Datagrams(UdpSocket),
}

/// Bytes of a packet that are not used yet.
struct Seg {
    token: u32,
    at: u32,
    len: u32,
}

impl Here {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Here::Stream(s) => s.as_fd(),
            Here::Datagrams(s) => s.as_fd(),
        }
    }
}

fn stream_pair(store: Option<&Store>) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
    if let Some(store) = store {
        store.attach_socket(listener.as_fd())?;
    }
    let far = TcpStream::connect(listener.local_addr()?).context("cannot connect")?;
    far.set_nodelay(true)?;
    Ok((far, listener.accept()?.0))
}

impl<'a> Place<'a> {
    fn new(store: &'a Store, datagrams: bool) -> anyhow::Result<Self> {
        let (far, here) = if datagrams {
            let here = UdpSocket::bind("127.0.0.1:0").context("cannot bind")?;
            let far = UdpSocket::bind("127.0.0.1:0").context("cannot bind")?;
            far.connect(here.local_addr()?)?;
            here.connect(far.local_addr()?)?;
            store.attach_socket(here.as_fd())?;
            (Far::Datagrams(far), Here::Datagrams(here))
        } else {
            let (far, here) = stream_pair(Some(store))?;
            (Far::Stream(far), Here::Stream(here))
        };
        socket::set_rx_mode(here.fd(), RxMode::Desc)?;
        Ok(Self {
            store,
            far,
            here,
            segs: VecDeque::new(),
            done: Vec::new(),
            buffer: RecvBuffer::new(256)?,
            pair: stream_pair(None)?,
        })
    }

    /// Bytes go through the network, and are then where the answer says.
    fn receive(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match &mut self.far {
            Far::Stream(far) => far.write_all(bytes)?,
            Far::Datagrams(far) => {
                for part in bytes.chunks(1400) {
                    far.send(part)?;
                }
            }
        }
        let mut got = 0;
        while got < bytes.len() {
            match self.buffer.recv(self.here.fd()) {
                Ok([]) => bail!("the connection ended"),
                Ok(descs) => {
                    for d in descs {
                        got += d.len() as usize;
                        self.segs.push_back(Seg {
                            token: d.token(),
                            at: 0,
                            len: d.len(),
                        });
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let fd = self.here.fd();
                    poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
                }
                Err(e) => return Err(e).context("cannot receive"),
            }
        }
        Ok(())
    }

    /// The places of the next `n` bytes.
    fn take(&mut self, n: usize) -> anyhow::Result<Vec<Ext>> {
        let mut left = n as u32;
        let mut extents = Vec::new();
        while left > 0 {
            let seg = self.segs.front_mut().context("too little was received")?;
            let len = left.min(seg.len - seg.at);
            extents.push(Ext {
                token: seg.token,
                offset: seg.at,
                len,
            });
            seg.at += len;
            left -= len;
            if seg.at == seg.len {
                self.done.push(seg.token);
                self.segs.pop_front();
            }
        }
        Ok(extents)
    }

    fn release(&mut self) -> anyhow::Result<()> {
        if !self.done.is_empty() {
            let mut batch = Batch::new();
            batch.release(self.here.fd().as_raw_fd(), &self.done);
            self.done.clear();
            self.store.submit(&mut batch)?;
        }
        Ok(())
    }
}

/// A thread, and the keys that only it uses.
struct Worker {
    number: u64,
    next: u64,
    rng: Rng,
    there: Vec<bool>,
    last_append: u64,
    sent: u64,
}

impl Worker {
    fn new(number: u64, keys: u64, rng: Rng) -> Self {
        Self {
            number,
            next: (number << 32) + 1,
            rng,
            there: vec![false; keys as usize],
            last_append: 0,
            sent: 0,
        }
    }

    fn op(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn key(&self, key: u64) -> u64 {
        (self.number << 32) | key
    }

    fn step(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        match self.rng.below(100) {
            0..48 => {
                let many = self.rng.chance(1, 3);
                let count = if many { 1 + self.rng.below(6) } else { 1 };
                self.random_array(place, count, false)
            }
            48..70 => {
                let count = 2 + self.rng.below(6);
                self.random_array(place, count, true)
            }
            70..73 => self.put_buffer(place),
            73..76 => self.put_scattered(place),
            76..80 => self.truncate(place),
            80..84 => self.compact(place),
            84..88 => self.forget_some(place),
            _ => self.send(place),
        }
    }

    fn random_array(
        &mut self,
        place: &mut Place<'_>,
        count: u64,
        atomic: bool,
    ) -> anyhow::Result<()> {
        let keys = self.there.len() as u64;
        let first = self.rng.below(keys);
        let what: Vec<(Kind, u64, usize)> = (0..count)
            .map(|n| {
                let key = (first + n) % keys;
                let kind = match self.rng.below(10) {
                    0..2 if self.there[key as usize] => Kind::Delete,
                    2..5 => Kind::Append,
                    _ => Kind::Put,
                };
                let len = match self.rng.below(8) {
                    0 => 1 + self.rng.below(6000),
                    1..3 => 64,
                    _ => 1 + self.rng.below(700),
                };
                (kind, key, len as usize)
            })
            .collect();
        let through_socket = self.rng.chance(1, 2);
        self.array(place, &what, atomic, through_socket)
    }

    /// One call with operations on different keys.
    fn array(
        &mut self,
        place: &mut Place<'_>,
        what: &[(Kind, u64, usize)],
        atomic: bool,
        through_socket: bool,
    ) -> anyhow::Result<()> {
        let group = if atomic { self.next } else { 0 };
        let ops: Vec<(u64, Vec<u8>)> = what
            .iter()
            .map(|(kind, _, len)| {
                let op = self.op();
                let len = if *kind == Kind::Delete { 0 } else { *len };
                (op, bytes_of(op, len))
            })
            .collect();
        // Some keys lie in the packets, before the object.
        let in_packet: Vec<bool> = what
            .iter()
            .map(|(kind, key, _)| {
                *kind == Kind::Put && key_of(self.key(*key)).len() > 40 && self.rng.chance(2, 3)
            })
            .collect();
        let mut all = Vec::new();
        for (((_, key, _), (_, bytes)), lies) in what.iter().zip(&ops).zip(&in_packet) {
            if *lies {
                all.extend(key_of(self.key(*key)));
            }
            all.extend(bytes);
        }
        let receive = self.op();
        begin(receive, Kind::Receive, 0, &[], 0, 0);
        place.receive(&all)?;
        Mark::Ack {
            op: receive,
            result: 0,
        }
        .make();
        let mut batch = Batch::new();
        if atomic {
            batch.set_atomic();
        }
        // Of the call on the socket, its own tokens.
        let fd = if through_socket {
            -1
        } else {
            place.here.fd().as_raw_fd()
        };
        for (((kind, key, _), (_, bytes)), lies) in what.iter().zip(&ops).zip(&in_packet) {
            let name = key_of(self.key(*key));
            if *kind == Kind::Delete {
                batch.delete(&name);
                continue;
            }
            let at = if *lies {
                place.take(name.len())?
            } else {
                Vec::new()
            };
            let extents = place.take(bytes.len())?;
            let key = match (*kind, *lies) {
                (Kind::Append, _) => Key::None,
                (_, true) => Key::Extents(&at),
                _ => Key::Bytes(&name),
            };
            batch.put(fd, key, &extents, Mode::Upsert, true);
        }
        for ((kind, key, _), (op, bytes)) in what.iter().zip(&ops) {
            let key = match kind {
                Kind::Append => 0,
                _ => self.key(*key),
            };
            begin(*op, *kind, key, bytes, group, 0);
        }
        let done = if through_socket {
            socket::persist(place.here.fd(), &mut batch)
        } else {
            place.store.submit(&mut batch)
        };
        for (n, (op, _)) in ops.iter().enumerate() {
            let result = answer(&batch.outcome(n));
            Mark::Ack { op: *op, result }.make();
            let (kind, key, _) = what[n];
            match (kind, result) {
                (_, ..0) => {}
                (Kind::Append, seq) => self.last_append = seq as u64,
                (kind, _) => self.there[key as usize] = kind == Kind::Put,
            }
        }
        done?;
        (0..what.len()).try_for_each(|n| self.full(batch.outcome(n).map(|_| ())))?;
        place.release()
    }

    /// A store that is full is no failure; some keys are given up.
    fn full(&mut self, result: std::io::Result<()>) -> anyhow::Result<()> {
        match result {
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ECANCELED) => Ok(()),
            other => Ok(other?),
        }
    }

    fn put_buffer(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        let key = self.rng.below(self.there.len() as u64);
        let op = self.op();
        let bytes = bytes_of(op, 1 + self.rng.below(9000) as usize);
        let mut buffer = match place.store.alloc(bytes.len() as u64) {
            Err(e) if e.errno() == libc::ENOSPC => return Ok(()),
            other => other?,
        };
        // A store across two pages is one of which the plugin is told half.
        for (to, from) in buffer.bytes_mut().chunks_mut(4096).zip(bytes.chunks(4096)) {
            to[..from.len()].copy_from_slice(from);
        }
        let mut batch = Batch::new();
        let name = key_of(self.key(key));
        let ext = buffer.ext(0..bytes.len() as u32);
        batch.put(buffer.fd(), Key::Bytes(&name), &[ext], Mode::Upsert, false);
        begin(op, Kind::Put, self.key(key), &bytes, 0, 0);
        let outcome = self.submit_one(place, &mut batch, op)?;
        self.there[key as usize] |= outcome.is_ok();
        self.full(outcome.map(|_| ()))
    }

    /// An object of so many pieces that its record has a list of them.
    fn put_scattered(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        const PIECE: usize = 40;
        let key = self.rng.below(self.there.len() as u64);
        let op = self.op();
        let bytes = bytes_of(op, PIECE * (66 + self.rng.below(40) as usize));
        // What lies between the pieces is nobody's.
        let all: Vec<u8> = bytes
            .chunks(PIECE)
            .flat_map(|piece| [piece, &[0x55; 24]].concat())
            .collect();
        place.receive(&all)?;
        let mut extents = Vec::new();
        for _ in bytes.chunks(PIECE) {
            extents.extend(place.take(PIECE)?);
            place.take(24)?;
        }
        let mut batch = Batch::new();
        let name = key_of(self.key(key));
        let fd = place.here.fd().as_raw_fd();
        batch.put(fd, Key::Bytes(&name), &extents, Mode::Upsert, true);
        begin(op, Kind::Put, self.key(key), &bytes, 0, 0);
        let outcome = self.submit_one(place, &mut batch, op)?;
        self.there[key as usize] |= outcome.is_ok();
        self.full(outcome.map(|_| ()))?;
        place.release()
    }

    /// A call with one operation, and what it answered.
    fn submit_one(
        &mut self,
        place: &Place<'_>,
        batch: &mut Batch,
        op: u64,
    ) -> anyhow::Result<std::io::Result<Outcome>> {
        let done = place.store.submit(batch);
        let outcome = batch.outcome(0);
        Mark::Ack {
            op,
            result: answer(&outcome),
        }
        .make();
        done?;
        Ok(outcome)
    }

    fn truncate(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        let (op, upto) = (self.op(), self.last_append);
        let mut batch = Batch::new();
        batch.truncate(upto);
        begin(op, Kind::Truncate, 0, &[], 0, upto);
        let outcome = self.submit_one(place, &mut batch, op)?;
        Ok(outcome.map(|_| ())?)
    }

    fn compact(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        let op = self.op();
        begin(op, Kind::Compact, 0, &[], 0, 0);
        let mut from = Some(0);
        while let Some(at) = from {
            from = match place.store.compact(at, 4) {
                Err(e) if e.errno() == libc::ENOSPC => None,
                other => other?.next,
            };
        }
        Mark::Ack { op, result: 0 }.make();
        Ok(())
    }

    fn forget_some(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        for key in 0..self.there.len() as u64 {
            if self.there[key as usize] && self.rng.chance(1, 2) {
                self.array(place, &[(Kind::Delete, key, 0)], false, false)?;
            }
        }
        Ok(())
    }

    /// sendfile() of an object, which arrives whole.
    fn send(&mut self, place: &mut Place<'_>) -> anyhow::Result<()> {
        let key = self.rng.below(self.there.len() as u64);
        let Some(object) = place.store.open_key(&key_of(self.key(key)))? else {
            ensure!(!self.there[key as usize], "a key has no object");
            return Ok(());
        };
        let len = object.len() as usize;
        let op = self.op();
        begin(op, Kind::Send, 0, &[], 0, 0);
        let mut offset = 0u64;
        while (offset as usize) < len {
            let left = len - offset as usize;
            let n = rustix::fs::sendfile(&place.pair.0, object.file(), Some(&mut offset), left)?;
            ensure!(n > 0, "an object ends early");
        }
        Mark::Ack { op, result: 0 }.make();
        let mut got = vec![0; len];
        place.pair.1.read_exact(&mut got)?;
        let mut want = vec![0; len];
        object.file().read_exact(&mut want)?;
        ensure!(got == want, "other bytes arrived than were sent");
        self.sent += 1;
        Ok(())
    }
}

fn verify(store: &std::path::Path, ledger: &std::path::Path) -> anyhow::Result<()> {
    let name = || ledger.display().to_string();
    let text = std::fs::read(ledger).with_context(name)?;
    let ledger: Ledger = serde_json::from_slice(&text).with_context(name)?;
    let ledger = ledger.restored();
    let store = Store::open(store)?;
    let catalog = Catalog::of_store(&store)?;
    let mut state = State {
        truncated: catalog.superblock().trunc_seq,
        last: catalog.superblock().seq_floor,
        found: Vec::new(),
    };
    let wrong = |e| anyhow::anyhow!("reading: {}", pmskb_uapi::catalog::describe(e));
    for record in catalog.log(0) {
        let record = record.map_err(wrong)?;
        let mut crc = 0;
        let whole = catalog
            .read(&record, |part| crc = crc32c::crc32c_append(crc, part))
            .map_err(wrong)?;
        ensure!(whole, "record {} is gone while it is read", record.seq);
        let key = catalog.key(&record).map_err(wrong)?;
        let found = Found {
            key: key.filter(|_| record.keyed()),
            seq: record.seq,
            len: record.len,
            crc,
        };
        if let Some(key) = &found.key {
            let there = catalog.get(key).map_err(wrong)?;
            ensure!(
                there.is_some_and(|there| there.seq == record.seq),
                "the index does not lead to record {}",
                record.seq
            );
        }
        state.found.push(found);
    }
    if let Err(what) = ledger.check(&state) {
        bail!("{}: {what}", name());
    }
    println!("{}: {} records, as they may be", name(), state.found.len());
    Ok(())
}
