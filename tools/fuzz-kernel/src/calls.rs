// SPDX-License-Identifier: GPL-2.0-only

//! Calls of the interface, right ones and those in which something is wrong, in any order: by
//! one thread, whose results are compared with a model, or by three that race.
//!
//! A round has stores, sockets, buffers, records and mappings of its own. At its end all of them
//! are closed, and nothing may be left; the store is detached, checked, attached and read again.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{bail, ensure, Context};
use clap::Args;
use io_uring::{opcode, squeue, types};
use pmskb_uapi::{core::sim::Rng, sys as uapi};

use crate::{
    run::{one_in, pick, Log, Options, Run},
    store::{self, Control},
    sys::{self, bytes_of, Arena, Res, Ring, Zeroed},
    syscall,
};

/// Options of `calls`.
#[derive(Args)]
pub struct Calls {
    /// The device that the store is made on; a partition of it, which is made for that
    #[arg(long, default_value = "/dev/pmem0")]
    device: PathBuf,
    /// Another one, for a store that is a stranger
    #[arg(long, default_value = "/dev/pmem1")]
    other: PathBuf,
    /// Calls of a round
    #[arg(long, default_value_t = 300)]
    ops: u64,
    /// Calls to leave out, by their numbers: what is left does what it did
    #[arg(long, value_delimiter = ',')]
    skip: Vec<u64>,
    /// How long to wait for what is left of a round, ms
    #[arg(long, default_value_t = 6000)]
    patience: u64,
    /// Threads: 1 compares with a model. Without it the round says
    #[arg(long)]
    threads: Option<u64>,
    #[command(flatten)]
    options: Options,
}

const SOL: i32 = uapi::SOL_PMSKB as i32;
/// Room for a descriptor among control messages.
const SPACE: usize = 64;

/// A byte of what is sent.
fn letter(at: u64) -> u8 {
    Rng(at).next() as u8
}

#[derive(Clone)]
struct Sock {
    fd: i32,
    peer: i32,
    tcp: bool,
    /// What was sent by the peer, and received, as far as anybody knows.
    sent: u64,
    received: Option<u64>,
}

struct Buf {
    fd: i32,
    /// What is in it.
    bytes: Vec<u8>,
    map: u64,
}

#[derive(Clone)]
struct Token {
    fd: i32,
    number: u32,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Pool {
    nodes: Vec<i32>,
    socks: Vec<Sock>,
    bufs: Vec<Buf>,
    objects: Vec<i32>,
    tokens: Vec<Token>,
    /// Those that were given back.
    stale: Vec<Token>,
    maps: Vec<(u64, u64)>,
    keys: BTreeMap<Vec<u8>, (u64, Vec<u8>)>,
    log: BTreeMap<u64, Vec<u8>>,
    seqs: Vec<u64>,
}

/// What the threads of a round share.
struct World {
    control: i32,
    devices: [i32; 2],
    minors: [u32; 2],
    /// Others: a pipe, a socket of another family, a file.
    others: Vec<i32>,
    pipe: [i32; 2],
    /// A file of letters.
    letters: i32,
    pool: Mutex<Pool>,
    /// One thread: results are compared.
    strict: bool,
    seen: Mutex<BTreeSet<(&'static str, i32)>>,
}

impl World {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Thread<'a> {
    world: &'a World,
    arena: &'a Arena,
    rng: Rng,
    ring: Option<Ring>,
    log: &'a Log,
    nr: u64,
}

/// Runs it; whether nothing was wrong.
pub fn calls(a: &Calls) -> anyhow::Result<bool> {
    let arenas = [Arena::new()?, Arena::new()?, Arena::new()?];
    let control = Control::open()?;
    // Small, so that it gets full.
    let devices = [
        store::partition(&arenas[0], &a.device, 4, 2 << 20, 12 << 20)?,
        store::partition(&arenas[0], &a.other, 5, 14 << 20, 8 << 20)?,
    ];
    let mut run = Run::new("calls", &a.options)?;
    let mut seen = BTreeSet::new();
    let mut right = true;
    while let Some((nr, rng)) = run.round() {
        let image = format!("{}p4", a.device.display());
        let done = round(a, nr, rng, &arenas, &control, devices, &run, &image);
        match done {
            Ok(more) => seen.extend(more),
            Err(e) => {
                run.failed(&e);
                right = false;
                break;
            }
        }
    }
    println!(
        "{} - calls # {} rounds, {} calls, {} kinds of call and result",
        if right { "ok" } else { "not ok" },
        run.rounds(),
        run.log.count(),
        seen.len()
    );
    let mut by_call: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (call, errno) in &seen {
        let what = if *errno == 0 {
            "0".into()
        } else {
            sys::name(*errno)
        };
        by_call.entry(call).or_default().push(what);
    }
    for (call, results) in by_call {
        println!("#   {call}: {}", results.join(" "));
    }
    Ok(right)
}

#[allow(clippy::too_many_arguments)]
fn round(
    a: &Calls,
    nr: u64,
    mut rng: Rng,
    arenas: &[Arena; 3],
    control: &Control,
    devices: [i32; 2],
    run: &Run,
    image: &str,
) -> anyhow::Result<BTreeSet<(&'static str, i32)>> {
    let arena = &arenas[0];
    let mut minors = [0; 2];
    for (device, minor) in devices.iter().zip(&mut minors) {
        let flags = if one_in(&mut rng, 4) {
            uapi::PMSKB_FORMAT_HEADS_DRAM
        } else {
            0
        };
        let res = control.format(arena, *device, flags, 0);
        ensure!(res.is_ok(), "FORMAT: {}", sys::shown(res));
        let flags = if one_in(&mut rng, 6) {
            uapi::PMSKB_ATTACH_CRC32C
        } else {
            0
        };
        *minor = control
            .attach(arena, *device, flags)
            .map_err(|e| anyhow::anyhow!("ATTACH: {}", sys::name(e)))?;
    }
    let threads = a
        .threads
        .unwrap_or(if one_in(&mut rng, 3) { 3 } else { 1 })
        .clamp(1, 3);
    run.log.note(&format!("{threads} threads"));
    let at = arena.room(8);
    let pipe = syscall!(SYS_pipe2, at, libc::O_NONBLOCK | libc::O_CLOEXEC);
    ensure!(pipe.is_ok(), "pipe: {}", sys::shown(pipe));
    let pipe = [arena.get_as::<i32>(at), arena.get_as::<i32>(at + 4)];
    let letters = syscall!(
        SYS_memfd_create,
        arena.place(b"letters\0"),
        libc::MFD_CLOEXEC
    );
    let letters = letters.map_err(|e| anyhow::anyhow!("memfd: {}", sys::name(e)))? as i32;
    let all: Vec<u8> = (0..65536).map(letter).collect();
    let _ = sys::pwrite(letters, &all, 0);
    let unix = syscall!(
        SYS_socket,
        libc::AF_UNIX,
        libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
        0
    )
    .unwrap_or(-1) as i32;
    let world = World {
        control: control.fd(),
        devices,
        minors,
        others: vec![pipe[0], unix, letters, -1, 1 << 20],
        pipe,
        letters,
        pool: Mutex::default(),
        strict: threads == 1,
        seen: Mutex::default(),
    };
    for flags in [libc::O_RDWR, libc::O_RDWR, libc::O_RDONLY, libc::O_WRONLY] {
        world.pool().nodes.push(store::node(minors[0], flags)?);
    }
    world
        .pool()
        .nodes
        .push(store::node(minors[1], libc::O_RDWR)?);
    let results: Vec<anyhow::Result<()>> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|t| {
                let (world, arena, log) = (&world, &arenas[t as usize], &run.log);
                let rng = Rng(rng.next());
                // An arena is one thread's.
                let arena = Mine(arena);
                scope.spawn(move || {
                    let arena = arena;
                    let ring = Ring::new().ok();
                    let mut thread = Thread {
                        world,
                        arena: arena.0,
                        rng,
                        ring,
                        log,
                        nr: t,
                    };
                    let first = thread.rng.next();
                    for nr in 0..a.ops / threads {
                        // A call does not depend on how many numbers those before it took.
                        thread.rng = Rng(Rng(first ^ nr).next());
                        if a.skip.contains(&nr) {
                            continue;
                        }
                        thread.step()?;
                    }
                    Ok(())
                })
            })
            .collect();
        all.into_iter()
            .map(|t| {
                t.join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
            })
            .collect()
    });
    run.log.note("end");
    let checked = if world.strict {
        check(&world, arena)
    } else {
        Ok(())
    };
    close_all(&world);
    for fd in [pipe[0], pipe[1], letters, unix] {
        let _ = sys::close(fd);
    }
    for result in results {
        result?;
    }
    checked.context("at the end")?;
    for minor in minors {
        empty(arena, minor, run, a.patience)?;
    }
    for minor in minors {
        let mut gone = Err(0);
        // A ring that was closed lets go a moment later.
        for _ in 0..10 {
            gone = control.detach(arena, minor, 2000);
            if gone != Err(libc::EBUSY) {
                break;
            }
            sys::nudge(arena);
        }
        ensure!(gone == Ok(0), "detach of {minor}: {}", sys::shown(gone));
    }
    if nr % 4 == 0 {
        run.log.note("fsck");
        let fsck = Command::new("pmskbctl")
            .args(["fsck", "--image", image])
            .output()?;
        ensure!(
            fsck.status.success(),
            "fsck: {}",
            String::from_utf8_lossy(&fsck.stdout)
        );
    }
    if world.strict {
        run.log.note("again");
        let minor = control
            .attach(arena, devices[0], 0)
            .map_err(|e| anyhow::anyhow!("ATTACH: {}", sys::name(e)))?;
        let node = store::node(minor, libc::O_RDONLY)?;
        world.pool().nodes.push(node);
        let checked = check(&world, arena);
        let _ = sys::close(node);
        let gone = control.detach(arena, minor, 2000);
        checked.context("after another attach")?;
        ensure!(gone == Ok(0), "detach again: {}", sys::shown(gone));
    }
    let seen = world
        .seen
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    Ok(seen)
}

/// A thread's own arena.
struct Mine<'a>(&'a Arena);
// SAFETY: each thread has another one, and the caller waits for all of them.
unsafe impl Send for Mine<'_> {}

/// All that was acknowledged is there, with the right bytes.
fn check(world: &World, arena: &Arena) -> anyhow::Result<()> {
    let pool = world.pool();
    // One of ours that can be read; by then others may have gone.
    let node = store::node(world.minors[0], libc::O_RDONLY)?;
    let look = || -> anyhow::Result<()> {
        for (key, (seq, bytes)) in &pool.keys {
            let got = store::get(arena, node, key, 0);
            let got =
                got.map_err(|e| anyhow::anyhow!("key {key:x?}, put {seq}: {}", sys::name(e)))?;
            ensure!(
                got.said.seq == *seq,
                "key {key:x?} has record {}, not {seq}",
                got.said.seq
            );
            got.is(bytes)?;
        }
        for (seq, bytes) in &pool.log {
            let got = store::get(arena, node, &[], *seq);
            got.map_err(|e| anyhow::anyhow!("put {seq}: {}", sys::name(e)))?
                .is(bytes)?;
        }
        Ok(())
    };
    let looked = look();
    let _ = sys::close(node);
    looked
}

fn close_all(world: &World) {
    let mut pool = world.pool();
    for (at, len) in std::mem::take(&mut pool.maps) {
        let _ = syscall!(SYS_munmap, at, len);
    }
    let mut fds: Vec<i32> = std::mem::take(&mut pool.nodes);
    fds.append(&mut pool.objects);
    fds.extend(pool.bufs.drain(..).map(|b| b.fd));
    for sock in std::mem::take(&mut pool.socks) {
        // A reset: nothing is left of it in the stack.
        let linger = [1u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
        for fd in [sock.fd, sock.peer] {
            let at = linger.as_ptr() as u64;
            let _ = syscall!(SYS_setsockopt, fd, libc::SOL_SOCKET, libc::SO_LINGER, at, 8);
        }
        fds.extend([sock.peer, sock.fd]);
    }
    for fd in fds {
        let _ = sys::close(fd);
    }
}

/// What this process still has of the module's, which would be a mistake of the fuzzer's.
fn ours() -> String {
    let links = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten();
    let fds = links.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let fds: Vec<String> = fds.map(|to| to.to_string_lossy().into_owned()).collect();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let maps: Vec<&str> = maps.lines().filter(|line| line.contains("pmskb")).collect();
    format!("descriptors {fds:?}, mappings {maps:?}")
}

/// Nothing is left of a round.
fn empty(arena: &Arena, minor: u32, run: &Run, patience: u64) -> anyhow::Result<()> {
    let node = store::node(minor, libc::O_RDWR)?;
    let mut left = String::new();
    for nr in 0..=patience / 10 {
        let i = store::info(arena, node).map_err(|e| anyhow::anyhow!("INFO: {}", sys::name(e)))?;
        // What compaction moves bytes into is held until it is full.
        let filling = u64::from(i.moved_bytes > 0);
        let left_over = i.sockets + i.tokens + i.frames_limbo + i.frames_sockets;
        if left_over == 0 && i.frames_held <= filling {
            let _ = sys::close(node);
            return store::adds_up(&i).context("at the end of a round");
        }
        left = format!(
            "{} sockets, {} tokens, {} frames held, {} in limbo, {} counted for sockets",
            i.sockets, i.tokens, i.frames_held, i.frames_limbo, i.frames_sockets
        );
        if nr % 20 == 19 {
            sys::nudge(arena);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        run.log.tick();
    }
    let _ = sys::close(node);
    bail!("left in store {minor}: {left}; {}", ours())
}

use libc::{
    E2BIG, EACCES, EAGAIN, EALREADY, EBADF, EBUSY, ECANCELED, ECONNRESET, EDQUOT, EEXIST, EFAULT,
    EFBIG, EINVAL, EIO, EISCONN, EMSGSIZE, ENAMETOOLONG, ENOBUFS, ENODEV, ENOENT, ENOMEM,
    ENOPROTOOPT, ENOSPC, ENOTBLK, ENOTCONN, ENOTSOCK, ENOTTY, EOPNOTSUPP, EPERM, EPIPE, ESPIPE,
    ESTALE, EUNATCH, EXDEV,
};

/// What is said of the wrong kind of descriptor, of any call.
const OF_ANY: &[i32] = &[
    EBADF,
    ENOTSOCK,
    ENOTTY,
    EOPNOTSUPP,
    ENOPROTOOPT,
    EINVAL,
    ESPIPE,
    ENODEV,
    EACCES,
    EPERM,
];
const SUBMIT: &[i32] = &[EINVAL, E2BIG, EFAULT, EACCES];
const OP: &[i32] = &[
    EINVAL,
    EFAULT,
    ESTALE,
    EAGAIN,
    ECANCELED,
    ENAMETOOLONG,
    E2BIG,
    EFBIG,
    EEXIST,
    ENOENT,
    ENOSPC,
    EBADF,
    ENOTSOCK,
    EOPNOTSUPP,
    EUNATCH,
    EXDEV,
];
const RECV: &[i32] = &[
    EAGAIN, EMSGSIZE, EDQUOT, ENOBUFS, EFAULT, ENOSPC, EINVAL, ECONNRESET, ENOTCONN, EUNATCH,
];

impl Thread<'_> {
    /// A result that the documentation has of that call, or none of any.
    fn expect(
        &self,
        what: &'static str,
        res: Res,
        may: &[&[i32]],
        wrong: bool,
    ) -> anyhow::Result<()> {
        self.world
            .seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((what, res.err().unwrap_or(0)));
        let Err(e) = res else { return Ok(()) };
        let known = may.iter().any(|some| some.contains(&e));
        // With others at work, a descriptor may be anything by now.
        let other = (wrong || !self.world.strict) && OF_ANY.contains(&e);
        let race = !self.world.strict
            && [
                EPIPE, ECONNRESET, ENOTCONN, EISCONN, EUNATCH, EBUSY, EFAULT, EAGAIN,
            ]
            .contains(&e);
        ensure!(known || other || race, "{what}: {}", sys::name(e));
        Ok(())
    }

    fn note(&self, what: &str) {
        if self.log.wanted() {
            self.log.note(&format!("{} {what}", self.nr));
        } else {
            self.log.tick();
        }
    }

    fn wrong(&mut self) -> bool {
        one_in(&mut self.rng, 6)
    }

    /// A number, perhaps another one.
    fn odd(&mut self, right: u64, wrong: bool) -> u64 {
        if !wrong || one_in(&mut self.rng, 3) {
            return right;
        }
        let near = [
            0,
            1,
            right.wrapping_sub(1),
            right + 1,
            right * 2,
            4096,
            0xffff_ffff,
            1 << 31,
            u64::MAX,
            7,
        ];
        *pick(&mut self.rng, &near)
    }

    /// Bytes for the kernel to read, or an address that it cannot read.
    fn place(&mut self, bytes: &[u8], wrong: bool) -> u64 {
        if wrong && one_in(&mut self.rng, 4) {
            let half = bytes.len() as u64 / 2;
            let nothing = self.arena.nothing();
            return *pick(
                &mut self.rng,
                &[
                    0,
                    1,
                    nothing,
                    nothing - half,
                    0xffff_8880_0000_0000,
                    u64::MAX - 7,
                ],
            );
        }
        if one_in(&mut self.rng, 8) {
            return self.arena.place_last(bytes);
        }
        self.arena.place(bytes)
    }

    fn node(&mut self, wrong: bool) -> i32 {
        let pool = self.world.pool();
        if wrong && one_in(&mut self.rng, 2) {
            let mut all = self.world.others.clone();
            all.push(self.world.control);
            all.extend(pool.objects.first());
            all.extend(pool.bufs.first().map(|b| b.fd));
            return *pick(&mut self.rng, &all);
        }
        if pool.nodes.is_empty() {
            return -1;
        }
        if wrong {
            return *pick(&mut self.rng, &pool.nodes);
        }
        pool.nodes[0]
    }

    fn sock(&mut self) -> Option<Sock> {
        let pool = self.world.pool();
        (!pool.socks.is_empty()).then(|| pick(&mut self.rng, &pool.socks).clone())
    }

    fn sock_fd(&mut self, wrong: bool) -> i32 {
        if wrong && one_in(&mut self.rng, 3) {
            let mut all = self.world.others.clone();
            all.extend(self.world.pool().nodes.first());
            return *pick(&mut self.rng, &all);
        }
        self.sock().map_or(-1, |s| s.fd)
    }

    /// Most often one that holds something.
    fn holder(&mut self, wrong: bool) -> i32 {
        let pool = self.world.pool();
        if pool.tokens.is_empty() || one_in(&mut self.rng, 4) {
            drop(pool);
            return self.sock_fd(wrong);
        }
        pick(&mut self.rng, &pool.tokens).fd
    }

    fn step(&mut self) -> anyhow::Result<()> {
        match self.rng.below(64) {
            0 => self.open_node(),
            1..=2 => self.close_one(),
            3 => self.duplicate(),
            4..=7 => self.connect(),
            8..=10 => self.attach(),
            11..=16 => self.set(),
            17 => self.get_option(),
            18..=26 => self.send(),
            27..=33 => self.receive(),
            34 => self.receive_otherwise(),
            35..=37 => self.release(),
            38..=46 => self.submit(),
            47..=48 => self.alloc(),
            49..=51 => self.fill(),
            52..=53 => self.open_record(),
            54 => self.use_record(),
            55 => self.send_records(),
            56 => self.upkeep(),
            57 => self.administer(),
            58..=59 => self.map(),
            60 => self.remap(),
            61 => self.pass(),
            62 => self.ring_receive(),
            _ => self.odds(),
        }
    }

    fn open_node(&mut self) -> anyhow::Result<()> {
        let minor = self.world.minors[usize::from(one_in(&mut self.rng, 4))];
        let flags = *pick(
            &mut self.rng,
            &[libc::O_RDWR, libc::O_RDONLY, libc::O_WRONLY],
        );
        self.note("open");
        let mut pool = self.world.pool();
        if pool.nodes.len() < 8 {
            pool.nodes.push(store::node(minor, flags)?);
        }
        Ok(())
    }

    /// Closes something; others may be using it.
    fn close_one(&mut self) -> anyhow::Result<()> {
        let mut pool = self.world.pool();
        let mut fds = Vec::new();
        let n = |rng: &mut Rng, len: usize| rng.below(len as u64) as usize;
        match self.rng.below(6) {
            0 if pool.nodes.len() > 5 => {
                // The first one can do everything.
                let at = 1 + n(&mut self.rng, pool.nodes.len() - 1);
                fds.push(pool.nodes.remove(at));
            }
            1..=2 if pool.socks.len() > 3 => {
                let at = n(&mut self.rng, pool.socks.len());
                let sock = pool.socks.remove(at);
                pool.tokens.retain(|t| t.fd != sock.fd);
                pool.stale.retain(|t| t.fd != sock.fd);
                fds.extend([sock.fd, sock.peer]);
            }
            3 if !pool.bufs.is_empty() => {
                let at = n(&mut self.rng, pool.bufs.len());
                fds.push(pool.bufs.remove(at).fd);
            }
            4 if !pool.objects.is_empty() => {
                let at = n(&mut self.rng, pool.objects.len());
                fds.push(pool.objects.remove(at));
            }
            _ => (),
        }
        drop(pool);
        if one_in(&mut self.rng, 2) {
            fds.reverse();
        }
        for fd in fds {
            self.note(&format!("close {fd}"));
            self.expect("close", sys::close(fd), &[], false)?;
        }
        Ok(())
    }

    /// The same again under another number; what has the first may be closed.
    fn duplicate(&mut self) -> anyhow::Result<()> {
        let mut pool = self.world.pool();
        let again = |fd: i32| syscall!(SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, 0).map(|fd| fd as i32);
        match self.rng.below(3) {
            0 if !pool.socks.is_empty() => {
                let at = self.rng.below(pool.socks.len() as u64) as usize;
                let old = pool.socks[at].fd;
                if let Ok(fd) = again(old) {
                    pool.socks[at].fd = fd;
                    for token in pool.tokens.iter_mut().filter(|t| t.fd == old) {
                        token.fd = fd;
                    }
                    pool.stale.retain(|t| t.fd != old);
                    let _ = sys::close(old);
                }
            }
            1 if !pool.objects.is_empty() => {
                let fd = *pick(&mut self.rng, &pool.objects);
                if let Ok(fd) = again(fd) {
                    pool.objects.push(fd);
                }
            }
            _ => {
                let last = pool.nodes.len() - 1;
                if let Ok(fd) = again(pool.nodes[last]) {
                    let old = std::mem::replace(&mut pool.nodes[last], fd);
                    let _ = sys::close(old);
                }
            }
        }
        drop(pool);
        self.note("dup");
        Ok(())
    }

    /// A socket and its peer over lo.
    fn connect(&mut self) -> anyhow::Result<()> {
        if self.world.pool().socks.len() >= 8 {
            return self.send();
        }
        let (tcp, v4) = (!one_in(&mut self.rng, 3), one_in(&mut self.rng, 2));
        self.note(&format!("connect {tcp} {v4}"));
        let family = if v4 { libc::AF_INET } else { libc::AF_INET6 };
        let kind = if tcp {
            libc::SOCK_STREAM
        } else {
            libc::SOCK_DGRAM
        } | libc::SOCK_CLOEXEC;
        let address = if v4 {
            let mut a = libc::sockaddr_in::zeroed();
            a.sin_family = libc::AF_INET as u16;
            a.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
            bytes_of(&a)
        } else {
            let mut a = libc::sockaddr_in6::zeroed();
            a.sin6_family = libc::AF_INET6 as u16;
            a.sin6_addr.s6_addr[15] = 1;
            bytes_of(&a)
        };
        let setup = || -> Result<(i32, i32), i32> {
            let s = syscall!(SYS_socket, family, kind, 0)? as i32;
            let at = self.arena.place(&address);
            syscall!(SYS_bind, s, at, address.len())?;
            let len = self.arena.place(&(address.len() as u32).to_ne_bytes());
            syscall!(SYS_getsockname, s, at, len)?;
            if tcp {
                syscall!(SYS_listen, s, 2)?;
            }
            let peer = syscall!(SYS_socket, family, kind, 0)? as i32;
            syscall!(SYS_connect, peer, at, address.len())?;
            if !tcp {
                return Ok((s, peer));
            }
            let accepted = syscall!(SYS_accept4, s, 0, 0, libc::SOCK_CLOEXEC)? as i32;
            let _ = sys::close(s);
            Ok((accepted, peer))
        };
        // A descriptor that somebody else has closed and a number given again: no pair.
        let (fd, peer) = match setup() {
            Ok(pair) => pair,
            Err(e) if self.world.strict => bail!("a pair of sockets: {}", sys::name(e)),
            Err(_) => return Ok(()),
        };
        // A splice that finds nothing waits for so long.
        let at = self
            .arena
            .place(&[0u64.to_ne_bytes(), 20_000u64.to_ne_bytes()].concat());
        let _ = syscall!(
            SYS_setsockopt,
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            at,
            16
        );
        // Most are to be attached.
        if !one_in(&mut self.rng, 4) {
            let node = self.world.pool().nodes.first().copied().unwrap_or(-1);
            let at = self.arena.place(&fd.to_ne_bytes());
            let res = syscall!(SYS_ioctl, node, uapi::IOC_ATTACH_SOCKET, at);
            self.expect("ATTACH_SOCKET", res, &[], false)?;
            if !one_in(&mut self.rng, 4) {
                let at = self.arena.place(&uapi::PMSKB_RX_DESC.to_ne_bytes());
                let res = syscall!(SYS_setsockopt, fd, SOL, uapi::PMSKB_RX_MODE, at, 4);
                self.expect("RX_MODE", res, &[], false)?;
            }
        }
        self.world.pool().socks.push(Sock {
            fd,
            peer,
            tcp,
            sent: 0,
            received: Some(0),
        });
        Ok(())
    }

    fn attach(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let fd = self.sock_fd(wrong);
        let wrong = wrong || fd < 0;
        let node = self.node(wrong);
        match self.rng.below(3) {
            0 => {
                let names: [&[u8]; 5] =
                    [b"pmskb", b"pmskb\0", b"tls", b"pmskbpmskbpmskbpmskb", b""];
                let name = *pick(&mut self.rng, &names);
                let at = self.place(name, wrong);
                self.note(&format!("ULP {fd} {name:?}"));
                let res = syscall!(
                    SYS_setsockopt,
                    fd,
                    libc::SOL_TCP,
                    libc::TCP_ULP,
                    at,
                    name.len()
                );
                // The last two are of UDP, and of no such name.
                let may = &[
                    EEXIST,
                    EBUSY,
                    EINVAL,
                    EFAULT,
                    ENOPROTOOPT,
                    ENOENT,
                    ENOTCONN,
                    EOPNOTSUPP,
                ];
                self.expect("TCP_ULP", res, &[may], true)
            }
            1 => {
                let at = self.place(&node.to_ne_bytes(), wrong);
                let len = self.odd(4, wrong);
                self.note(&format!("ATTACH {fd} {node} {len}"));
                let res = syscall!(SYS_setsockopt, fd, SOL, uapi::PMSKB_ATTACH, at, len as u32);
                let may = &[
                    EBADF,
                    EBUSY,
                    EALREADY,
                    EINVAL,
                    EACCES,
                    ENOPROTOOPT,
                    EFAULT,
                    EOPNOTSUPP,
                ];
                self.expect("ATTACH", res, &[may], wrong)
            }
            _ => {
                let at = self.place(&fd.to_ne_bytes(), wrong);
                self.note(&format!("ATTACH_SOCKET {node} {fd}"));
                let res = syscall!(SYS_ioctl, node, uapi::IOC_ATTACH_SOCKET, at);
                let may = &[
                    EBADF, ENOTSOCK, EOPNOTSUPP, EBUSY, EALREADY, EACCES, EFAULT, EINVAL,
                ];
                self.expect("ATTACH_SOCKET", res, &[may], wrong)
            }
        }
    }

    /// An option, with a value that it may have or not.
    fn set(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let fd = self.sock_fd(wrong);
        let wrong = wrong || fd < 0;
        let word = |v: u32| v.to_ne_bytes().to_vec();
        let (name, value, may): (&'static str, Vec<u8>, &[i32]) = match self.rng.below(6) {
            0..=1 => (
                "RX_MODE",
                word(*pick(&mut self.rng, &[0, 1, 1, if wrong { 2 } else { 1 }])),
                &[],
            ),
            2 => ("CRC32C", word(self.odd(1, wrong) as u32), &[]),
            3 => (
                "AUTO_PERSIST",
                word(*pick(&mut self.rng, &[0, 1, if wrong { 2 } else { 0 }])),
                &[EBUSY],
            ),
            4 => (
                "RX_COPY",
                word(*pick(
                    &mut self.rng,
                    &[0, 1, 100, 65536, 65537, 0xffff_ffff],
                )),
                &[],
            ),
            _ => {
                let quota = uapi::pmskb_quota {
                    frames: *pick(&mut self.rng, &[0, 0, 31, 32, 33, 100, 1 << 30]),
                    tokens: *pick(&mut self.rng, &[0, 0, 63, 64, 65, 65536, 65537]),
                    reserved: u64::from(wrong && one_in(&mut self.rng, 2)),
                };
                ("QUOTA", bytes_of(&quota), &[EPERM])
            }
        };
        let number = match name {
            "RX_MODE" => uapi::PMSKB_RX_MODE,
            "CRC32C" => uapi::PMSKB_CRC32C,
            "AUTO_PERSIST" => uapi::PMSKB_AUTO_PERSIST,
            "RX_COPY" => uapi::PMSKB_RX_COPY,
            _ => uapi::PMSKB_QUOTA,
        };
        let at = self.place(&value, wrong);
        let len = self.odd(value.len() as u64, wrong);
        self.note(&format!("{name} {fd} {value:?} {len}"));
        let res = syscall!(SYS_setsockopt, fd, SOL, number, at, len as u32);
        self.expect(
            name,
            res,
            &[&[EINVAL, EFAULT, EUNATCH, ENOPROTOOPT, EOPNOTSUPP], may],
            wrong,
        )
    }

    fn get_option(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let fd = self.sock_fd(wrong);
        let wrong = wrong || fd < 0;
        let name = self.rng.below(12) as u32;
        let room = *pick(&mut self.rng, &[0u32, 3, 4, 8, 16, 200, 4000, 0xffff_ffff]);
        let len = self.place(&room.to_ne_bytes(), wrong);
        let at = if wrong {
            self.arena.read_only()
        } else {
            self.arena.room(4000)
        };
        self.note(&format!("getsockopt {fd} {name} {room}"));
        let res = syscall!(SYS_getsockopt, fd, SOL, name, at, len);
        self.expect(
            "getsockopt",
            res,
            &[&[EINVAL, EFAULT, EUNATCH, ENOPROTOOPT, EOPNOTSUPP]],
            wrong,
        )
    }

    /// The peer sends.
    fn send(&mut self) -> anyhow::Result<()> {
        let mut pool = self.world.pool();
        if pool.socks.is_empty() {
            drop(pool);
            return self.connect();
        }
        let at = self.rng.below(pool.socks.len() as u64) as usize;
        let sock = &mut pool.socks[at];
        let most = if sock.tcp { 40000 } else { 9000 };
        let len = *pick(&mut self.rng, &[1, 8, 100, 1448, 4096, 4097, most]);
        let from = sock.sent;
        let bytes: Vec<u8> = if sock.tcp {
            (from..from + len).map(letter).collect()
        } else {
            // The first eight say where the others are from.
            let tail = (8..len).map(|n| letter(from.wrapping_mul(77) + n));
            from.to_ne_bytes()
                .into_iter()
                .chain(tail)
                .take(len as usize)
                .collect()
        };
        let to = self.arena.place(&bytes);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let res = syscall!(SYS_sendto, sock.peer, to, len, flags, 0, 0);
        if let Ok(n) = res {
            sock.sent += if sock.tcp { n as u64 } else { 1 };
        }
        let note = format!("send {} {len} {}", sock.peer, sys::shown(res));
        drop(pool);
        self.note(&note);
        self.expect(
            "send",
            res,
            &[&[EAGAIN, EPIPE, ECONNRESET, libc::ECONNREFUSED, ENOBUFS]],
            false,
        )
    }

    /// Reads what a record or a token has, from the store.
    fn at_store(&self, off: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let node = self.world.pool().nodes.first().copied().unwrap_or(-1);
        let mut done = 0;
        while done < bytes.len() {
            match sys::pread(node, &mut bytes[done..], off + done as u64) {
                Ok(n) if n > 0 => done += n as usize,
                _ => break,
            }
        }
        bytes
    }

    fn receive(&mut self) -> anyhow::Result<()> {
        let Some(sock) = self.sock() else {
            return self.connect();
        };
        let wrong = self.wrong();
        let room = *pick(&mut self.rng, &[0usize, 1, 2, 16, 64]) * SPACE;
        let want = *pick(&mut self.rng, &[0u64, 1, 1000, 9000, 70000]);
        let mut room_said = room as u64;
        let (mut control, to) = (self.arena.room(room as u64 + 16), self.arena.room(want));
        let mut control_right = true;
        if wrong {
            match self.rng.below(4) {
                0 => room_said = self.rng.below(room as u64 + 1),
                1 => {
                    control += self.rng.below(9);
                    control_right = false;
                }
                2 => {
                    control = *pick(
                        &mut self.rng,
                        &[0, self.arena.nothing(), self.arena.read_only()],
                    );
                    control_right = false;
                }
                _ => (),
            }
        }
        let iov_at = if wrong && one_in(&mut self.rng, 3) {
            self.arena.nothing()
        } else {
            to
        };
        let iov = libc::iovec {
            iov_base: iov_at as *mut libc::c_void,
            iov_len: want as usize,
        };
        let mut msg = libc::msghdr::zeroed();
        msg.msg_iov = self.arena.place(&bytes_of(&iov)) as *mut libc::iovec;
        msg.msg_iovlen = usize::from(!(want == 0 && one_in(&mut self.rng, 2))) as _;
        msg.msg_control = control as *mut libc::c_void;
        msg.msg_controllen = room_said as _;
        let at = self.arena.place(&bytes_of(&msg));
        let peek = one_in(&mut self.rng, 8);
        let mut flags = libc::MSG_DONTWAIT | if peek { libc::MSG_PEEK } else { 0 };
        if wrong && one_in(&mut self.rng, 3) {
            flags |= *pick(
                &mut self.rng,
                &[
                    libc::MSG_OOB,
                    libc::MSG_ERRQUEUE,
                    libc::MSG_TRUNC,
                    libc::MSG_WAITALL,
                ],
            );
        }
        self.note(&format!(
            "recvmsg {} {room_said} {want} {flags:x} {}",
            sock.fd,
            iov_at == to && control_right
        ));
        let many = one_in(&mut self.rng, 8);
        let res = if many {
            let mut two = libc::mmsghdr::zeroed();
            two.msg_hdr = msg;
            let at = self.arena.place(&[bytes_of(&two), bytes_of(&two)].concat());
            syscall!(SYS_recvmmsg, sock.fd, at, 2, flags, 0)
        } else {
            syscall!(SYS_recvmsg, sock.fd, at, flags)
        };
        self.expect("recvmsg", res, &[RECV], wrong)?;
        let plain = flags & !(libc::MSG_PEEK | libc::MSG_DONTWAIT) == 0 && iov_at == to;
        if many || !plain || !control_right || !self.world.strict {
            // Nobody knows what was received, or who has it.
            if !peek && (res.is_ok() || res == Err(EFAULT)) {
                self.lost(sock.fd);
            }
            if self.world.strict {
                return Ok(());
            }
        }
        let Ok(n) = res else { return Ok(()) };
        let said: libc::msghdr = self.arena.get_as(at);
        if many || !control_right || said.msg_controllen as u64 > room_said {
            return Ok(());
        }
        let mut got = Vec::new();
        let mut found = Vec::new();
        let step = (size_of::<libc::cmsghdr>() + size_of::<uapi::pmskb_desc>()) as u64;
        let mut off = 0;
        while off + step <= said.msg_controllen as u64 {
            let head: libc::cmsghdr = self.arena.get_as(control + off);
            if head.cmsg_level != SOL || head.cmsg_type != uapi::PMSKB_CMSG_DESC as i32 {
                break;
            }
            let d: uapi::pmskb_desc = self.arena.get_as(control + off + 16);
            off += step.next_multiple_of(8);
            if d.store != self.world.minors[0] {
                self.lost(sock.fd);
                return Ok(());
            }
            let bytes = self.at_store(d.offset, d.len);
            if self.world.strict
                && d.flags & uapi::PMSKB_DESC_PARTIAL == 0
                && u32::from(d.csum_kind) != 0
            {
                let right = store::sum_of(&bytes);
                ensure!(
                    right == d.csum,
                    "the sum is {right:#x}, and not that of {d:?}"
                );
            }
            got.extend(&bytes);
            found.push(Token {
                fd: sock.fd,
                number: d.token,
                bytes,
            });
        }
        let described = !found.is_empty();
        let mut pool = self.world.pool();
        pool.tokens.extend(found);
        let excess = pool.tokens.len().saturating_sub(200);
        pool.tokens.drain(..excess);
        if !self.world.strict || !plain {
            return Ok(());
        }
        if !described {
            // Of an empty datagram there is nothing, and of the stream's end.
            got = self.arena.get(to, (n as u64).min(want) as usize);
        }
        let Some(known) = pool.socks.iter_mut().find(|s| s.fd == sock.fd) else {
            return Ok(());
        };
        if sock.tcp {
            ensure!(
                got.len() as i64 == n,
                "{n} bytes, {} of them known",
                got.len()
            );
            if let Some(start) = known.received {
                let same = got
                    .iter()
                    .enumerate()
                    .position(|(k, b)| *b != letter(start + k as u64));
                ensure!(
                    same.is_none(),
                    "byte {start} + {same:?} is not what was sent"
                );
                if !peek {
                    known.received = Some(start + n as u64);
                }
            }
        } else if got.len() >= 8 {
            let from = u64::from_ne_bytes(got[..8].try_into()?);
            let same =
                (8..got.len()).position(|k| got[k] != letter(from.wrapping_mul(77) + k as u64));
            ensure!(
                same.is_none(),
                "a datagram is not what was sent at {same:?}"
            );
        }
        Ok(())
    }

    fn lost(&self, fd: i32) {
        if let Some(sock) = self.world.pool().socks.iter_mut().find(|s| s.fd == fd) {
            sock.received = None;
        }
    }

    /// By other calls, which do not say what.
    fn receive_otherwise(&mut self) -> anyhow::Result<()> {
        let Some(sock) = self.sock() else {
            return Ok(());
        };
        self.lost(sock.fd);
        let to = self.arena.room(9000);
        let p = self.world.pipe;
        self.note(&format!("read {}", sock.fd));
        let res = match self.rng.below(4) {
            0 => syscall!(SYS_recvfrom, sock.fd, to, 9000, libc::MSG_DONTWAIT, 0, 0),
            1 => {
                let flags = libc::SPLICE_F_NONBLOCK;
                let res = syscall!(SYS_splice, sock.fd, 0, p[1], 0, 9000, flags);
                while syscall!(SYS_read, p[0], to, 9000).is_ok_and(|n| n > 0) {}
                return self.expect("splice", res, &[RECV, &[EINVAL]], false);
            }
            2 => {
                let polls = [sock.fd.to_ne_bytes(), 0x7ffu32.to_ne_bytes()].concat();
                syscall!(SYS_poll, self.arena.place(&polls), 1, 0)
            }
            _ => syscall!(
                SYS_recvfrom,
                sock.fd,
                to,
                0,
                libc::MSG_DONTWAIT | libc::MSG_PEEK,
                0,
                0
            ),
        };
        self.expect("recv", res, &[RECV], false)
    }

    fn release(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let fd = self.holder(wrong);
        let wrong = wrong || fd < 0;
        let mut pool = self.world.pool();
        let (mut mine, others): (Vec<Token>, Vec<Token>) = std::mem::take(&mut pool.tokens)
            .into_iter()
            .partition(|t| t.fd == fd);
        pool.tokens = others;
        let keep = self.rng.below(mine.len() as u64 + 1) as usize;
        let go = mine.split_off(keep.min(mine.len()));
        pool.tokens.extend(mine);
        let mut ranges: Vec<[u32; 2]> = go.iter().map(|t| [t.number, 1]).collect();
        if wrong || ranges.is_empty() {
            let stale = pool
                .stale
                .iter()
                .filter(|t| t.fd == fd)
                .map(|t| [t.number, 1]);
            ranges.extend(stale.take(3));
            let any = [[0, 1], [0, 0], [1, 0xffff_ffff], [0xffff_ffff, 1], [5, 3]];
            ranges.push(*pick(&mut self.rng, &any));
            // What that gave back, nobody knows.
            pool.tokens.retain(|t| t.fd != fd);
        }
        pool.stale.extend(go);
        let excess = pool.stale.len().saturating_sub(50);
        pool.stale.drain(..excess);
        drop(pool);
        let bytes: Vec<u8> = ranges
            .iter()
            .flatten()
            .flat_map(|n| n.to_ne_bytes())
            .collect();
        let at = self.place(&bytes, wrong);
        let len = self.odd(bytes.len() as u64, wrong);
        self.note(&format!("RELEASE {fd} {ranges:?} {len}"));
        let res = syscall!(SYS_setsockopt, fd, SOL, uapi::PMSKB_RELEASE, at, len as u32);
        let may = &[EUNATCH, EINVAL, E2BIG, ESTALE, EFAULT, ENOPROTOOPT, ENOMEM];
        self.expect("RELEASE", res, &[may], wrong)
    }

    fn key(&mut self) -> Vec<u8> {
        let len = *pick(&mut self.rng, &[1usize, 3, 3, 3, 16, 24, 200, 1024]);
        let n = self.rng.below(12) as u8;
        let mut key = vec![b'a' + n; len];
        key[0] = n;
        key
    }

    /// An array of operations, by ioctl, by option, or by io_uring.
    fn submit(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let by_option = one_in(&mut self.rng, 3);
        let fd = self.holder(wrong);
        let wrong = wrong || fd < 0;
        let most = *pick(&mut self.rng, &[2, 2, 2, 8]);
        let nr = 1 + self.rng.below(most);
        let mut ops = Vec::new();
        for _ in 0..nr {
            ops.push(self.operation(by_option, fd, wrong)?);
        }
        let flags = *pick(&mut self.rng, &[0, 0, 0, 1, 2, 3]);
        let raw: Vec<u8> = ops.iter().flat_map(|op| bytes_of(&op.raw)).collect();
        let results = if wrong && one_in(&mut self.rng, 5) {
            *pick(
                &mut self.rng,
                &[0, self.arena.read_only(), self.arena.nothing()],
            )
        } else {
            // All zero: whether anything was written shows.
            self.arena.place(&vec![0; 16 * nr as usize])
        };
        let s = uapi::pmskb_submit {
            ops: self.place(&raw, wrong),
            results,
            nr: if one_in(&mut self.rng, 5) {
                self.odd(nr, wrong) as u32
            } else {
                nr as u32
            },
            flags: if one_in(&mut self.rng, 5) {
                self.odd(flags, wrong) as u32
            } else {
                flags as u32
            },
            reserved: 0,
        };
        // So many as were said, from memory that may have others' bytes.
        let sane = u64::from(s.nr) <= nr;
        let at = self.place(&bytes_of(&s), wrong);
        let node = self.node(wrong);
        let by_ring = one_in(&mut self.rng, 4) && self.ring.is_some();
        let short: Vec<String> = ops.iter().map(Planned::short).collect();
        self.note(&format!(
            "submit {} {} flags {:x} nr {}: {}",
            if by_option { fd } else { node },
            by_ring,
            s.flags,
            s.nr,
            short.join("; ")
        ));
        let res = match (by_option, by_ring) {
            (true, false) => syscall!(SYS_setsockopt, fd, SOL, uapi::PMSKB_PERSIST, at, 32),
            (false, false) => syscall!(SYS_ioctl, node, uapi::IOC_SUBMIT, at),
            (true, true) => {
                let value = at as *const libc::c_void;
                let request = opcode::SetSockOpt::new(
                    types::Fd(fd),
                    SOL as u32,
                    uapi::PMSKB_PERSIST,
                    value,
                    32,
                )
                .build();
                self.by_ring(request)
            }
            (false, true) => {
                let mut cmd = [0; 16];
                cmd[..8].copy_from_slice(&at.to_ne_bytes());
                cmd[8] = u8::from(wrong && one_in(&mut self.rng, 4));
                let nr = if wrong && one_in(&mut self.rng, 4) {
                    uapi::IOC_INFO
                } else {
                    uapi::IOC_SUBMIT
                };
                let mut request = opcode::UringCmd16::new(types::Fd(node), nr)
                    .cmd(cmd)
                    .build();
                if one_in(&mut self.rng, 3) {
                    request = request.flags(squeue::Flags::ASYNC);
                }
                self.by_ring(request)
            }
        };
        let fail: &[i32] = if s.flags & uapi::PMSKB_SUBMIT_FAIL != 0 {
            OP
        } else {
            &[]
        };
        self.expect(
            "submit",
            res,
            &[SUBMIT, fail, &[EUNATCH, ENOPROTOOPT, EOPNOTSUPP, EBUSY]],
            wrong,
        )?;
        if sane && results >= 4096 && results < self.arena.nothing() && self.log.wanted() {
            let said = (0..nr).map(|n| {
                self.arena
                    .get_as::<uapi::pmskb_result>(results + 16 * n)
                    .res
            });
            let said: Vec<String> = said.map(|res| res.to_string()).collect();
            self.note(&format!("= {}: {}", sys::shown(res), said.join(" ")));
        }
        // The stranger's store has a model of nobody's.
        if self.world.strict
            && self.store_of(by_option, if by_option { fd } else { node })
                != Some(self.world.minors[0])
        {
            self.forget(&ops, fd);
            return Ok(());
        }
        let carried_out = res.is_ok() || s.flags & uapi::PMSKB_SUBMIT_FAIL != 0;
        if !carried_out || !sane || results < 4096 || results >= self.arena.nothing() {
            self.forget(&ops, fd);
            return Ok(());
        }
        for (n, op) in ops.iter().enumerate().take(s.nr as usize) {
            let result: uapi::pmskb_result = self.arena.get_as(results + 16 * n as u64);
            let one = if result.res < 0 {
                Err(-result.res as i32)
            } else {
                Ok(result.res)
            };
            // Cleared, and never filled: the call was refused as a whole.
            if one == Ok(0) && res.is_err() {
                continue;
            }
            self.expect(op.name(), one, &[OP], wrong)?;
            if self.world.strict {
                self.apply(op, one, &result)?;
            }
        }
        Ok(())
    }

    /// Which store a socket is attached to, or a descriptor is of.
    fn store_of(&self, socket: bool, fd: i32) -> Option<u32> {
        if !socket {
            return store::info(self.arena, fd).ok().map(|info| info.minor);
        }
        let size = size_of::<uapi::pmskb_sock_info>() as u32;
        let (at, len) = (
            self.arena.room(u64::from(size)),
            self.arena.place(&size.to_ne_bytes()),
        );
        syscall!(SYS_getsockopt, fd, SOL, uapi::PMSKB_INFO, at, len).ok()?;
        Some(self.arena.get_as::<uapi::pmskb_sock_info>(at).store)
    }

    fn by_ring(&mut self, request: squeue::Entry) -> Res {
        let Some(ring) = &mut self.ring else {
            return Err(EINVAL);
        };
        let done = ring.run(&[request.user_data(7)], 1, 5_000);
        match done.iter().find(|c| c.0 == 7) {
            Some((_, res)) if *res < 0 => Err(-res),
            Some((_, res)) => Ok(i64::from(*res)),
            // It is still under way: what it does is not known.
            None => {
                self.ring = Ring::new().ok();
                Err(EBUSY)
            }
        }
    }

    /// What an array had is not known any more.
    fn forget(&self, ops: &[Planned], fd: i32) {
        if !self.world.strict {
            return;
        }
        let mut pool = self.world.pool();
        pool.tokens.retain(|t| t.fd != fd);
        for op in ops {
            pool.keys.remove(&op.key);
            if u32::from(op.raw.opcode) == uapi::PMSKB_OP_TRUNCATE {
                pool.log.clear();
            }
        }
    }

    /// One operation, with what it would do.
    fn operation(&mut self, by_option: bool, sock: i32, wrong: bool) -> anyhow::Result<Planned> {
        let mut p = Planned {
            raw: uapi::pmskb_op {
                fd: -1,
                ..Default::default()
            },
            key: Vec::new(),
            bytes: Vec::new(),
            tokens: Vec::new(),
            spoilt: false,
            ranges: Vec::new(),
        };
        let kind = self.rng.below(10);
        let mut exts: Vec<uapi::pmskb_ext> = Vec::new();
        match kind {
            0..=6 => {
                p.raw.opcode = uapi::PMSKB_OP_PUT as u16;
                let buffer = !by_option && one_in(&mut self.rng, 2);
                let pool = self.world.pool();
                if buffer && !pool.bufs.is_empty() {
                    let buf = pick(&mut self.rng, &pool.bufs);
                    p.raw.fd = buf.fd;
                    for _ in 0..1 + self.rng.below(2) {
                        let from = self.rng.below(buf.bytes.len() as u64);
                        let len = 1 + self.rng.below((buf.bytes.len() as u64 - from).min(9000));
                        exts.push(uapi::pmskb_ext {
                            token: 0,
                            offset: from as u32,
                            len: len as u32,
                            reserved: 0,
                        });
                        p.bytes
                            .extend(&buf.bytes[from as usize..(from + len) as usize]);
                    }
                } else {
                    p.raw.fd = if by_option { -1 } else { sock };
                    let mine: Vec<&Token> = pool.tokens.iter().filter(|t| t.fd == sock).collect();
                    let stale: Vec<&Token> = pool.stale.iter().filter(|t| t.fd == sock).collect();
                    for _ in 0..1 + self.rng.below(4) {
                        let from: &[&Token] = if wrong && one_in(&mut self.rng, 3) {
                            &stale
                        } else {
                            &mine
                        };
                        if from.is_empty() {
                            continue;
                        }
                        let t = *pick(&mut self.rng, from);
                        let all = t.bytes.len() as u64;
                        let from = if one_in(&mut self.rng, 3) {
                            self.rng.below(all)
                        } else {
                            0
                        };
                        let len = if one_in(&mut self.rng, 3) {
                            1 + self.rng.below(all - from)
                        } else {
                            all - from
                        };
                        exts.push(uapi::pmskb_ext {
                            token: t.number,
                            offset: from as u32,
                            len: len as u32,
                            reserved: 0,
                        });
                        p.bytes
                            .extend(&t.bytes[from as usize..(from + len) as usize]);
                        p.tokens.push(t.number);
                    }
                }
                drop(pool);
                let keyed = !one_in(&mut self.rng, 4);
                let flags = [
                    0,
                    0,
                    0,
                    uapi::PMSKB_OP_CREATE,
                    uapi::PMSKB_OP_REPLACE,
                    uapi::PMSKB_OP_KEEP,
                    uapi::PMSKB_OP_CRC32C,
                    uapi::PMSKB_OP_IF_SEQ,
                ];
                p.raw.flags = (*pick(&mut self.rng, &flags) | *pick(&mut self.rng, &flags)) as u16;
                if keyed && !exts.is_empty() && one_in(&mut self.rng, 5) {
                    // The key is in what was received itself.
                    let first = exts[0];
                    let len = first.len.min(1 + self.rng.below(40) as u32);
                    let key = uapi::pmskb_ext { len, ..first };
                    p.key = p.bytes[..len as usize].to_vec();
                    p.raw.flags |= uapi::PMSKB_OP_KEY_EXTENTS as u16;
                    p.raw.key = self.place(&bytes_of(&key), wrong);
                    p.raw.key_len = 1;
                } else if keyed {
                    p.key = self.key();
                }
            }
            7 => {
                p.raw.opcode = uapi::PMSKB_OP_DELETE as u16;
                p.key = self.key();
                p.raw.flags = *pick(&mut self.rng, &[0, 0, uapi::PMSKB_OP_IF_SEQ as u16]);
            }
            8 => {
                p.raw.opcode = uapi::PMSKB_OP_RELEASE as u16;
                p.raw.fd = if by_option { -1 } else { sock };
                let pool = self.world.pool();
                let mine: Vec<u32> = pool
                    .tokens
                    .iter()
                    .filter(|t| t.fd == sock)
                    .map(|t| t.number)
                    .collect();
                for _ in 0..self.rng.below(4).min(mine.len() as u64) {
                    let token = *pick(&mut self.rng, &mine);
                    exts.push(uapi::pmskb_ext {
                        token,
                        ..Default::default()
                    });
                    p.tokens.push(token);
                }
            }
            _ => {
                p.raw.opcode = uapi::PMSKB_OP_TRUNCATE as u16;
                let pool = self.world.pool();
                p.raw.seq = pool.seqs.last().map_or(0, |last| self.rng.below(last + 2));
            }
        }
        if u32::from(p.raw.flags) & uapi::PMSKB_OP_IF_SEQ != 0 {
            let known = self.world.pool().keys.get(&p.key).map_or(0, |k| k.0);
            p.raw.seq = if one_in(&mut self.rng, 4) {
                self.rng.below(100)
            } else {
                known
            };
        }
        if !p.key.is_empty() && p.raw.key == 0 {
            p.raw.key = self.place(&p.key.clone(), wrong);
            p.raw.key_len = p.key.len() as u32;
        }
        p.raw.nr_extents = exts.len() as u32;
        if wrong && one_in(&mut self.rng, 2) {
            p.spoil(&mut self.rng, &mut exts);
        }
        p.ranges = exts.iter().map(|e| (e.token, e.offset, e.len)).collect();
        let raw: Vec<u8> = exts.iter().flat_map(bytes_of).collect();
        p.raw.extents = if raw.is_empty() {
            0
        } else {
            self.place(&raw, wrong)
        };
        Ok(p)
    }

    /// What an operation has done, to the model.
    fn apply(&mut self, op: &Planned, res: Res, result: &uapi::pmskb_result) -> anyhow::Result<()> {
        let opcode = u32::from(op.raw.opcode);
        let flags = u32::from(op.raw.flags);
        let Ok(n) = res else { return Ok(()) };
        let seq = n as u64;
        let mut pool = self.world.pool();
        let ours = op.raw.key_len > 0;
        if opcode == uapi::PMSKB_OP_PUT {
            ensure!(n > 0, "a put returned {n}");
            ensure!(
                pool.seqs.last().is_none_or(|last| *last < seq),
                "sequence numbers go back: {seq}"
            );
            pool.seqs.push(seq);
            let old = pool.keys.get(&op.key).map(|k| k.0);
            // Of what was spoilt nobody knows the bytes.
            let known = !op.tampered();
            if known && ours {
                let had = old.is_some();
                if flags & uapi::PMSKB_OP_IF_SEQ != 0 {
                    ensure!(
                        old.unwrap_or(0) == op.raw.seq || !op.sure(),
                        "IF_SEQ {} with {old:?}",
                        op.raw.seq
                    );
                }
                let replaced = result.flags & uapi::PMSKB_RES_REPLACED != 0;
                ensure!(
                    !had || replaced,
                    "a put of a key that was there does not say so"
                );
                ensure!(
                    !had || flags & uapi::PMSKB_OP_CREATE == 0,
                    "CREATE of a key that was there"
                );
            }
            let right = store::sum_of(&op.bytes);
            if known && u32::from(result.csum_kind) != 0 && result.csum != right {
                let node = pool.nodes.first().copied().unwrap_or(-1);
                let got = store::get(self.arena, node, &[], seq)
                    .ok()
                    .and_then(|got| got.bytes.ok());
                let differ = got
                    .as_ref()
                    .map(|got| got.iter().zip(&op.bytes).position(|(a, b)| a != b));
                let there = got.as_ref().map(|got| (got.len(), store::sum_of(got)));
                bail!(
                    "put {seq} says {:#x}, {} bytes have {right:#x}; there are, with the sum, {there:x?}; \
                     they differ at {differ:?}; extents {:?}",
                    result.csum,
                    op.bytes.len(),
                    op.ranges
                );
            }
            if flags & uapi::PMSKB_OP_KEEP == 0 {
                let used: BTreeSet<u32> = op.tokens.iter().copied().collect();
                let gone = |t: &Token| used.contains(&t.number);
                let stale: Vec<Token> = pool.tokens.iter().filter(|t| gone(t)).cloned().collect();
                pool.tokens.retain(|t| !gone(t));
                pool.stale.extend(stale);
            }
            if ours {
                pool.keys.remove(&op.key);
            }
            if known && ours {
                pool.keys.insert(op.key.clone(), (seq, op.bytes.clone()));
            } else if known {
                pool.log.insert(seq, op.bytes.clone());
            } else {
                // Whatever key it has.
                pool.keys.clear();
            }
            let node = pool.nodes.first().copied().unwrap_or(-1);
            drop(pool);
            if known && one_in(&mut self.rng, 2) {
                match store::get(self.arena, node, &[], seq) {
                    Ok(got) => got.is(&op.bytes)?,
                    // A later operation of the array may have replaced it.
                    Err(ENOENT) => (),
                    Err(e) => bail!("put {seq}: {}", sys::name(e)),
                }
            }
        } else if opcode == uapi::PMSKB_OP_DELETE {
            if op.tampered() {
                pool.keys.clear();
            } else if let Some((had, _)) = pool.keys.remove(&op.key) {
                ensure!(had == seq, "a delete of record {seq}, the key has {had}");
            }
        } else if opcode == uapi::PMSKB_OP_TRUNCATE {
            pool.log.retain(|other, _| *other > seq);
        } else {
            let used: BTreeSet<u32> = op.tokens.iter().copied().collect();
            pool.tokens.retain(|t| !used.contains(&t.number));
        }
        Ok(())
    }

    fn alloc(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let len = *pick(&mut self.rng, &[1u64, 4096, 4097, 20000, 100_000]);
        let len = if wrong {
            *pick(&mut self.rng, &[0, 1 << 26, (1 << 26) + 1, u64::MAX, len])
        } else {
            len
        };
        let arg = uapi::pmskb_alloc {
            len,
            flags: u32::from(wrong && one_in(&mut self.rng, 3)),
            ..Default::default()
        };
        let at = self.place(&bytes_of(&arg), wrong);
        let node = self.node(wrong);
        self.note(&format!("ALLOC {node} {len}"));
        let res = syscall!(SYS_ioctl, node, uapi::IOC_ALLOC, at);
        self.expect("ALLOC", res, &[&[EINVAL, EFAULT, EACCES, ENOSPC]], wrong)?;
        if res.is_err() {
            return Ok(());
        }
        let said: uapi::pmskb_alloc = self.arena.get_as(at);
        ensure!(
            said.len == len.next_multiple_of(4096),
            "a buffer of {len} has {}",
            said.len
        );
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let map = syscall!(SYS_mmap, 0, said.len, prot, libc::MAP_SHARED, said.fd, 0);
        self.expect("mmap buffer", map, &[], false)?;
        let mut pool = self.world.pool();
        let map = map.unwrap_or(0) as u64;
        pool.maps.push((map, said.len));
        pool.bufs.push(Buf {
            fd: said.fd,
            bytes: vec![0; said.len as usize],
            map,
        });
        if pool.bufs.len() > 6 {
            let old = pool.bufs.remove(0);
            let _ = sys::close(old.fd);
        }
        Ok(())
    }

    /// Writes to a buffer: by call or through the mapping.
    fn fill(&mut self) -> anyhow::Result<()> {
        let mut pool = self.world.pool();
        if pool.bufs.is_empty() {
            drop(pool);
            return self.alloc();
        }
        let at = self.rng.below(pool.bufs.len() as u64) as usize;
        let (fd, map, all) = (
            pool.bufs[at].fd,
            pool.bufs[at].map,
            pool.bufs[at].bytes.len() as u64,
        );
        let mapped = pool.maps.iter().any(|m| m.0 == map && m.1 == all);
        let off = self.rng.below(all);
        let len = 1 + self.rng.below((all - off).min(9000));
        let src = self.rng.below(50_000);
        let by_map = mapped && one_in(&mut self.rng, 2);
        let res = if by_map {
            syscall!(SYS_pread64, self.world.letters, map + off, len, src)
        } else {
            let bytes: Vec<u8> = (src..src + len).map(letter).collect();
            let from = self.arena.place(&bytes);
            syscall!(SYS_pwrite64, fd, from, len, off)
        };
        if let Ok(n) = res {
            for k in 0..n as u64 {
                pool.bufs[at].bytes[(off + k) as usize] = letter(src + k);
            }
        }
        drop(pool);
        self.note(&format!(
            "fill {fd} {by_map} {off} {len} {}",
            sys::shown(res)
        ));
        if by_map {
            // One that was put cannot be written; to where the fault was, bytes may have come.
            self.expect("fill map", res, &[&[EFAULT]], false)
        } else {
            self.expect("fill", res, &[&[EPERM, ENOSPC]], false)
        }
    }

    fn open_record(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let key = self.key();
        let by_seq = one_in(&mut self.rng, 3);
        let seq = self
            .world
            .pool()
            .seqs
            .last()
            .map_or(1, |last| self.rng.below(last + 2));
        let arg = uapi::pmskb_open {
            key: if by_seq { 0 } else { self.place(&key, wrong) },
            key_len: if by_seq {
                0
            } else {
                self.odd(key.len() as u64, wrong) as u32
            },
            flags: self.odd(u64::from(by_seq), wrong) as u32,
            seq: if by_seq { seq } else { 0 },
            ..Default::default()
        };
        let at = self.place(&bytes_of(&arg), wrong);
        let node = self.node(wrong);
        self.note(&format!("OPEN {node} {by_seq} {seq}"));
        let res = syscall!(SYS_ioctl, node, uapi::IOC_OPEN, at);
        self.expect(
            "OPEN",
            res,
            &[&[EINVAL, EFAULT, ENAMETOOLONG, ENOENT, EACCES]],
            wrong,
        )?;
        if res.is_ok() {
            let said: uapi::pmskb_open = self.arena.get_as(at);
            let mut pool = self.world.pool();
            pool.objects.push(said.fd);
            if pool.objects.len() > 8 {
                let _ = sys::close(pool.objects.remove(0));
            }
        }
        Ok(())
    }

    fn object(&mut self) -> Option<i32> {
        let pool = self.world.pool();
        (!pool.objects.is_empty()).then(|| *pick(&mut self.rng, &pool.objects))
    }

    fn use_record(&mut self) -> anyhow::Result<()> {
        let Some(fd) = self.object() else {
            return self.open_record();
        };
        let off = *pick(&mut self.rng, &[0u64, 1, 4095, 100_000, 1 << 40, u64::MAX]);
        let to = self.arena.room(9000);
        let p = self.world.pipe;
        let flags = libc::SPLICE_F_NONBLOCK;
        self.note(&format!("use {fd} {off}"));
        let (what, res) = match self.rng.below(5) {
            0 => ("pread", syscall!(SYS_pread64, fd, to, 9000, off)),
            1 => ("lseek", syscall!(SYS_lseek, fd, off, self.rng.below(6))),
            2 => {
                let at = self.arena.place(&off.to_ne_bytes());
                let res = syscall!(SYS_splice, fd, at, p[1], 0, 9000, flags);
                while syscall!(SYS_read, p[0], to, 9000).is_ok_and(|n| n > 0) {}
                ("splice", res)
            }
            3 => {
                // To the other side, which does not read.
                let peer = self.sock().map_or(-1, |s| s.fd);
                let at = self.arena.place(&(off & 0xffff).to_ne_bytes());
                let own = syscall!(SYS_fcntl, peer, libc::F_GETFL, 0).unwrap_or(0);
                let _ = syscall!(
                    SYS_fcntl,
                    peer,
                    libc::F_SETFL,
                    own as i32 | libc::O_NONBLOCK
                );
                ("sendfile", syscall!(SYS_sendfile, peer, fd, at, 9000))
            }
            _ => (
                "mmap",
                syscall!(SYS_mmap, 0, 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0),
            ),
        };
        self.expect(
            what,
            res,
            &[&[
                EINVAL,
                ENODEV,
                EAGAIN,
                EPIPE,
                ECONNRESET,
                EBADF,
                libc::EDESTADDRREQ,
                libc::EOVERFLOW,
                EMSGSIZE,
                ENOTCONN,
            ]],
            true,
        )
    }

    fn send_records(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let Some(sock) = self.sock() else {
            return Ok(());
        };
        let nr = 1 + self.rng.below(if wrong { 70 } else { 3 });
        let mut control = Vec::new();
        for _ in 0..nr {
            let mut head = libc::cmsghdr::zeroed();
            head.cmsg_level = SOL;
            head.cmsg_type = if wrong && one_in(&mut self.rng, 9) {
                7
            } else {
                uapi::PMSKB_CMSG_SEND as i32
            };
            head.cmsg_len = self.odd(16 + 24, wrong && nr < 4) as _;
            let fd = if wrong && one_in(&mut self.rng, 4) {
                self.node(true)
            } else {
                self.object().unwrap_or(-1)
            };
            let send = uapi::pmskb_send {
                fd,
                reserved: 0,
                offset: self.odd(0, wrong),
                len: self.odd(1, true),
            };
            control.extend(bytes_of(&head));
            control.extend(bytes_of(&send));
        }
        let bytes = self.arena.place(&[b'h'; 100]);
        let iov = libc::iovec {
            iov_base: bytes as *mut libc::c_void,
            iov_len: self.rng.below(100) as usize,
        };
        let mut msg = libc::msghdr::zeroed();
        msg.msg_iov = self.arena.place(&bytes_of(&iov)) as *mut libc::iovec;
        msg.msg_iovlen = 1;
        msg.msg_control = self.place(&control, wrong) as *mut libc::c_void;
        msg.msg_controllen = control.len() as _;
        let at = self.place(&bytes_of(&msg), wrong);
        let mut flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        if wrong {
            flags |= *pick(
                &mut self.rng,
                &[
                    0,
                    libc::MSG_OOB,
                    libc::MSG_MORE,
                    libc::MSG_ZEROCOPY,
                    libc::MSG_FASTOPEN,
                ],
            );
        }
        self.note(&format!("sendmsg {} {nr} {flags:x}", sock.fd));
        let res = syscall!(SYS_sendmsg, sock.fd, at, flags);
        let may = &[
            EBADF,
            EINVAL,
            E2BIG,
            EOPNOTSUPP,
            EAGAIN,
            EPIPE,
            ECONNRESET,
            EFAULT,
            libc::EDESTADDRREQ,
            ENOBUFS,
            EISCONN,
            ENOTCONN,
        ];
        self.expect("sendmsg", res, &[may], wrong)?;
        // The peer takes what came, for there to be room.
        let to = self.arena.room(70000);
        while syscall!(SYS_recvfrom, sock.peer, to, 70000, libc::MSG_DONTWAIT, 0, 0)
            .is_ok_and(|n| n > 0)
        {}
        Ok(())
    }

    fn upkeep(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let node = self.node(wrong);
        match self.rng.below(3) {
            0 => {
                let arg = uapi::pmskb_compact {
                    from: if wrong { self.rng.next() } else { 0 },
                    steps: self.odd(64, wrong) as u32,
                    ..Default::default()
                };
                let at = self.place(&bytes_of(&arg), wrong);
                self.note(&format!("COMPACT {node}"));
                let res = syscall!(SYS_ioctl, node, uapi::IOC_COMPACT, at);
                self.expect("COMPACT", res, &[&[EINVAL, EFAULT, EACCES, ENOSPC]], wrong)
            }
            1 => {
                let room = self.arena.room(16 * 8);
                let many = wrong && one_in(&mut self.rng, 2);
                let arg = uapi::pmskb_scrub {
                    from: self.odd(0, wrong),
                    max_bytes: 0,
                    bad: if wrong { self.arena.read_only() } else { room },
                    nr_bad: self.odd(8, many) as u32,
                    ..Default::default()
                };
                let at = self.place(&bytes_of(&arg), wrong);
                self.note(&format!("SCRUB {node}"));
                let res = syscall!(SYS_ioctl, node, uapi::IOC_SCRUB, at);
                self.expect("SCRUB", res, &[&[EINVAL, EFAULT]], wrong)?;
                if self.world.strict && !wrong && res.is_ok() {
                    let said: uapi::pmskb_scrub = self.arena.get_as(at);
                    let bad: uapi::pmskb_scrub_bad = self.arena.get_as(room);
                    ensure!(said.nr_bad == 0, "scrub finds {bad:?}");
                }
                Ok(())
            }
            _ => {
                let at = if wrong {
                    self.arena.read_only()
                } else {
                    self.arena.room(1000)
                };
                let res = syscall!(SYS_ioctl, node, uapi::IOC_INFO, at);
                self.expect("INFO", res, &[&[EFAULT]], wrong)
            }
        }
    }

    /// The control device, while the stores are in use; and settings in sysfs.
    fn administer(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let device = if wrong {
            self.node(true)
        } else {
            self.world.devices[self.rng.below(2) as usize]
        };
        let c = self.world.control;
        match self.rng.below(4) {
            0 => {
                let arg = uapi::pmskb_format {
                    fd: device,
                    flags: self.odd(1, wrong) as u32,
                    ..Default::default()
                };
                let at = self.place(&bytes_of(&arg), wrong);
                self.note(&format!("FORMAT {device}"));
                let res = syscall!(SYS_ioctl, c, uapi::IOC_FORMAT, at);
                ensure!(res.is_err(), "a store that is attached was formatted");
                self.expect(
                    "FORMAT",
                    res,
                    &[&[EBUSY, EFAULT, EINVAL, EBADF, EACCES, ENOTBLK, ENODEV]],
                    wrong,
                )
            }
            1 => {
                let arg = uapi::pmskb_attach {
                    fd: device,
                    flags: self.odd(0, wrong) as u32,
                    ..Default::default()
                };
                let at = self.place(&bytes_of(&arg), wrong);
                self.note(&format!("ATTACH region {device}"));
                let res = syscall!(SYS_ioctl, c, uapi::IOC_ATTACH, at);
                ensure!(res.is_err(), "a store that is attached was attached");
                self.expect(
                    "ATTACH region",
                    res,
                    &[&[EBUSY, EFAULT, EINVAL, EBADF, EACCES, ENOTBLK, ENODEV]],
                    wrong,
                )
            }
            2 => {
                let minor = self.odd(u64::from(self.world.minors[0]), wrong) as u32;
                // Not one that may be another test's.
                // The first is always open; the second may have no descriptor any more.
                let ours = minor == self.world.minors[0] || minor > 1000;
                let arg = uapi::pmskb_detach {
                    minor: if ours { minor } else { self.world.minors[0] },
                    timeout_ms: 1,
                    reserved: 0,
                };
                let at = self.place(&bytes_of(&arg), wrong);
                self.note(&format!("DETACH {minor}"));
                let res = syscall!(SYS_ioctl, c, uapi::IOC_DETACH, at);
                ensure!(res.is_err(), "a store that is open was detached");
                self.expect("DETACH", res, &[&[EBUSY, EFAULT, EINVAL, ENODEV]], wrong)
            }
            _ => {
                let name = *pick(
                    &mut self.rng,
                    &[
                        "quota_socket_frames",
                        "quota_socket_tokens",
                        "quota_store_frames",
                    ],
                );
                let value = *pick(
                    &mut self.rng,
                    &[
                        "0",
                        "32",
                        "64",
                        "100",
                        "65536",
                        "-1",
                        "x",
                        "99999999999999999999",
                    ],
                );
                self.note(&format!("{name} {value}"));
                let path = format!("/sys/class/misc/pmskb{}/{name}", self.world.minors[0]);
                let res = std::fs::write(&path, value)
                    .map(|()| 0)
                    .map_err(|e| e.raw_os_error().unwrap_or(0));
                self.expect("quota", res, &[&[EINVAL, libc::ERANGE]], false)
            }
        }
    }

    /// Maps a store, or a buffer, in odd ways, and touches it.
    fn map(&mut self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        let node = if one_in(&mut self.rng, 3) {
            self.world.pool().bufs.first().map_or(-1, |b| b.fd)
        } else {
            self.node(wrong)
        };
        let len = *pick(&mut self.rng, &[1u64, 4096, 65536, 12 << 20, 64 << 20, 0]);
        let off = *pick(
            &mut self.rng,
            &[
                0u64,
                4096,
                8192,
                53248,
                1 << 20,
                12 << 20,
                1 << 40,
                u64::MAX & !4095,
                1,
            ],
        );
        let prot = if wrong {
            self.rng.below(8) as i32
        } else {
            libc::PROT_READ
        };
        let flags = *pick(
            &mut self.rng,
            &[
                libc::MAP_SHARED,
                libc::MAP_PRIVATE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
            ],
        );
        self.note(&format!("mmap {node} {len} {off} {prot} {flags:x}"));
        let res = syscall!(SYS_mmap, 0, len, prot, flags, node, off);
        let may = &[
            EPERM,
            EINVAL,
            EACCES,
            ENODEV,
            EBADF,
            libc::EOVERFLOW,
            ENOMEM,
            libc::ENXIO,
        ];
        self.expect("mmap", res, &[may], true)?;
        if let Ok(at) = res {
            let len = len.next_multiple_of(4096);
            self.world.pool().maps.push((at as u64, len));
            self.touch(at as u64, len)?;
        }
        Ok(())
    }

    /// Reads from a mapping: what raises a signal is EFAULT for a call.
    fn touch(&mut self, at: u64, len: u64) -> anyhow::Result<()> {
        let p = self.world.pipe;
        let to = self.arena.room(64);
        for _ in 0..4 {
            let off = self.rng.below(len / 64) * 64;
            let res = syscall!(SYS_write, p[1], at + off, 64);
            let _ = syscall!(SYS_read, p[0], to, 64);
            self.expect("touch", res, &[&[EFAULT, EAGAIN]], false)?;
        }
        Ok(())
    }

    fn remap(&mut self) -> anyhow::Result<()> {
        let mut pool = self.world.pool();
        if pool.maps.is_empty() {
            drop(pool);
            return self.map();
        }
        let nr = self.rng.below(pool.maps.len() as u64) as usize;
        let (at, len) = pool.maps[nr];
        let part = (self.rng.below(len / 4096 + 1) * 4096).min(len);
        // Somebody else's may be there soon.
        for buf in pool.bufs.iter_mut().filter(|buf| buf.map == at) {
            buf.map = 0;
        }
        let (what, res): (&'static str, Res) = match self.rng.below(7) {
            0 => {
                pool.maps.remove(nr);
                ("munmap", syscall!(SYS_munmap, at, len))
            }
            1 if part > 0 && part < len => {
                // The end of it.
                pool.maps[nr].1 = part;
                ("munmap", syscall!(SYS_munmap, at + part, len - part))
            }
            2 => (
                "mprotect",
                syscall!(SYS_mprotect, at, len, self.rng.below(8)),
            ),
            3 => {
                let new = *pick(&mut self.rng, &[4096, len, len * 2]);
                let res = syscall!(SYS_mremap, at, len, new, libc::MREMAP_MAYMOVE);
                if let Ok(moved) = res {
                    pool.maps[nr] = (moved as u64, new);
                }
                ("mremap", res)
            }
            4 => {
                let advice = *pick(
                    &mut self.rng,
                    &[
                        libc::MADV_DONTNEED,
                        libc::MADV_WILLNEED,
                        libc::MADV_POPULATE_READ,
                        libc::MADV_REMOVE,
                        libc::MADV_PAGEOUT,
                        libc::MADV_DONTFORK,
                        libc::MADV_POPULATE_WRITE,
                    ],
                );
                ("madvise", syscall!(SYS_madvise, at, len, advice))
            }
            5 => ("mlock", syscall!(SYS_mlock, at, part.max(4096).min(len))),
            _ => {
                // A child that reads it, and goes with all that it has.
                let p = self.world.pipe;
                let child = syscall!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
                if child == Ok(0) {
                    let _ = syscall!(SYS_write, p[1], at, 64);
                    let _ = syscall!(SYS_munmap, at, len);
                    loop {
                        let _ = syscall!(SYS_exit_group, 0);
                    }
                }
                if let Ok(pid) = child {
                    let _ = syscall!(SYS_wait4, pid, 0, libc::__WALL, 0);
                }
                let to = self.arena.room(64);
                let _ = syscall!(SYS_read, p[0], to, 64);
                ("fork", child)
            }
        };
        drop(pool);
        self.note(&format!("{what} {at:x} {len} {}", sys::shown(res)));
        self.expect(
            what,
            res,
            &[&[
                EACCES, EINVAL, ENOMEM, EFAULT, EPERM, EAGAIN, EIO, EOPNOTSUPP, EBUSY,
            ]],
            true,
        )
    }

    /// A descriptor takes a way through a UNIX socket; or stays there.
    fn pass(&mut self) -> anyhow::Result<()> {
        let at = self.arena.room(8);
        if syscall!(
            SYS_socketpair,
            libc::AF_UNIX,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            0,
            at
        )
        .is_err()
        {
            return Ok(());
        }
        let pair = [
            self.arena.get_as::<i32>(at),
            self.arena.get_as::<i32>(at + 4),
        ];
        let fd = match self.rng.below(4) {
            0 => self.node(false),
            1 => self.object().unwrap_or(-1),
            2 => self.world.pool().bufs.first().map_or(-1, |b| b.fd),
            _ => self.sock().map_or(-1, |s| s.fd),
        };
        let mut head = libc::cmsghdr::zeroed();
        head.cmsg_level = libc::SOL_SOCKET;
        head.cmsg_type = libc::SCM_RIGHTS;
        head.cmsg_len = 20;
        let control = [bytes_of(&head), fd.to_ne_bytes().to_vec(), vec![0; 4]].concat();
        let byte = self.arena.place(b"x");
        let iov = libc::iovec {
            iov_base: byte as *mut libc::c_void,
            iov_len: 1,
        };
        let mut msg = libc::msghdr::zeroed();
        msg.msg_iov = self.arena.place(&bytes_of(&iov)) as *mut libc::iovec;
        msg.msg_iovlen = 1;
        let control = self.arena.place(&control);
        msg.msg_control = control as *mut libc::c_void;
        msg.msg_controllen = 24;
        let at = self.arena.place(&bytes_of(&msg));
        self.note(&format!("pass {fd}"));
        let sent = syscall!(SYS_sendmsg, pair[0], at, 0);
        if sent.is_ok() && one_in(&mut self.rng, 2) {
            let got = syscall!(
                SYS_recvmsg,
                pair[1],
                at,
                libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC
            );
            if got.is_ok() {
                let new = self.arena.get_as::<i32>(control + 16);
                let _ = sys::close(new);
            }
        }
        for fd in pair {
            let _ = sys::close(fd);
        }
        self.expect("pass", sent, &[&[EBADF]], false)
    }

    /// Receives by io_uring; also with more than one answer, and cancelled.
    fn ring_receive(&mut self) -> anyhow::Result<()> {
        let Some(sock) = self.sock() else {
            return Ok(());
        };
        self.lost(sock.fd);
        let multi = one_in(&mut self.rng, 2);
        let (control, to) = (self.arena.room(4096), self.arena.room(4096));
        let iov = libc::iovec {
            iov_base: to as *mut libc::c_void,
            iov_len: if multi { 0 } else { 4096 },
        };
        let mut msg = libc::msghdr::zeroed();
        msg.msg_iov = self.arena.place(&bytes_of(&iov)) as *mut libc::iovec;
        msg.msg_iovlen = usize::from(!multi) as _;
        msg.msg_control = if multi { 0 } else { control } as *mut libc::c_void;
        msg.msg_controllen = *pick(&mut self.rng, &[0, SPACE, 4096, 10]) as _;
        let at = self.arena.place(&bytes_of(&msg));
        let rooms = self.arena.room(4 * 8192);
        self.note(&format!(
            "ring recvmsg {} {multi} {}",
            sock.fd, msg.msg_controllen
        ));
        let fd = types::Fd(sock.fd);
        let group = self.rng.below(60000) as u16;
        let request = if multi {
            opcode::RecvMsgMulti::new(fd, at as *const libc::msghdr, group).build()
        } else {
            opcode::RecvMsg::new(fd, at as *mut libc::msghdr)
                .flags(libc::MSG_DONTWAIT as u32)
                .build()
        };
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        let mut requests = Vec::new();
        if multi {
            requests.push(
                opcode::ProvideBuffers::new(rooms as *mut u8, 8192, 4, group, 0)
                    .build()
                    .user_data(1),
            );
        }
        requests.push(request.user_data(2));
        let mut done = ring.run(&requests, requests.len(), 20);
        if multi {
            done.extend(ring.run(&[opcode::AsyncCancel::new(2).build().user_data(3)], 2, 20));
        }
        for (_, res) in done.iter().filter(|d| d.0 == 2 && d.1 < 0) {
            let may = &[ECANCELED, EBADF];
            self.expect("ring recvmsg", Err(-res), &[RECV, may], true)?;
        }
        Ok(())
    }

    /// Everything else.
    fn odds(&mut self) -> anyhow::Result<()> {
        let Some(sock) = self.sock() else {
            return Ok(());
        };
        let node = self.node(true);
        match self.rng.below(7) {
            0 => {
                let nr = 0xbc00
                    | self.rng.below(0x20)
                    | (self.rng.below(4) << 30)
                    | (self.rng.below(300) << 16);
                // Not those that would detach, format, or make descriptors that nobody closes.
                let at = self.arena.room(4000);
                self.note(&format!("ioctl {node} {nr:x}"));
                let known = [
                    uapi::IOC_DETACH,
                    uapi::IOC_FORMAT,
                    uapi::IOC_ATTACH,
                    uapi::IOC_ALLOC,
                    uapi::IOC_OPEN,
                ]
                .contains(&(nr as u32));
                if !known {
                    let fd = if one_in(&mut self.rng, 3) {
                        sock.fd
                    } else {
                        node
                    };
                    let res = syscall!(SYS_ioctl, fd, nr, at);
                    self.expect("ioctl", res, &[&[ENOENT, EFAULT, E2BIG, EINVAL]], true)?;
                }
                Ok(())
            }
            1 => {
                self.note(&format!("shutdown {}", sock.fd));
                let how = self.rng.below(4);
                let res = syscall!(SYS_shutdown, sock.fd, how);
                self.expect("shutdown", res, &[&[ENOTCONN, EINVAL]], false)
            }
            2 => {
                // A disconnect; kTLS, which a socket may have by now, has none.
                self.lost(sock.fd);
                let mut a = libc::sockaddr_in6::zeroed();
                a.sin6_family = libc::AF_UNSPEC as u16;
                let at = self.arena.place(&bytes_of(&a));
                self.note(&format!("disconnect {}", sock.fd));
                let res = syscall!(SYS_connect, sock.fd, at, size_of::<libc::sockaddr_in6>());
                self.expect("disconnect", res, &[&[EOPNOTSUPP]], false)
            }
            3 => {
                let (name, value) = *pick(
                    &mut self.rng,
                    &[
                        (libc::SO_RCVBUF, 1i32),
                        (libc::SO_RCVBUF, 1 << 20),
                        (libc::SO_RCVLOWAT, 100),
                        (libc::SO_PEEK_OFF, 0),
                        (libc::SO_PEEK_OFF, -1),
                    ],
                );
                self.note(&format!("SO {} {name} {value}", sock.fd));
                let at = self.arena.place(&value.to_ne_bytes());
                let _ = syscall!(SYS_setsockopt, sock.fd, libc::SOL_SOCKET, name, at, 4);
                // Looks have a place of their own then.
                self.lost(sock.fd);
                Ok(())
            }
            4 => {
                let to = self.arena.room(9000);
                let off = *pick(
                    &mut self.rng,
                    &[0u64, 1, 8190, 1 << 20, 12 << 20, 1 << 40, u64::MAX],
                );
                self.note(&format!("pread {node} {off}"));
                let res = syscall!(SYS_pread64, node, to, 9000, off);
                self.expect("pread store", res, &[&[EINVAL, libc::EOVERFLOW]], true)
            }
            5 => {
                let to = self.arena.room(16);
                self.note(&format!("pwrite {node}"));
                let fd = if node == self.world.letters { -1 } else { node };
                let strict_buffer = self.world.pool().bufs.iter().any(|b| b.fd == fd);
                if strict_buffer {
                    return Ok(());
                }
                let res = syscall!(SYS_pwrite64, fd, to, 16, 0);
                self.expect("pwrite store", res, &[&[EINVAL]], true)
            }
            _ => {
                let p = self.world.pipe;
                let to = self.arena.room(9000);
                let off = *pick(&mut self.rng, &[0u64, 8192, 1 << 20, 3 << 20]);
                let at = self.arena.place(&off.to_ne_bytes());
                self.note(&format!("splice store {node}"));
                let res = syscall!(SYS_splice, node, at, p[1], 0, 9000, libc::SPLICE_F_NONBLOCK);
                while syscall!(SYS_read, p[0], to, 9000).is_ok_and(|n| n > 0) {}
                self.expect("splice store", res, &[&[EAGAIN, EINVAL]], true)
            }
        }
    }
}

/// An operation, and what it means.
struct Planned {
    raw: uapi::pmskb_op,
    key: Vec<u8>,
    bytes: Vec<u8>,
    tokens: Vec<u32>,
    spoilt: bool,
    /// Of its extents, what they say.
    ranges: Vec<(u32, u32, u32)>,
}

impl Planned {
    fn name(&self) -> &'static str {
        match u32::from(self.raw.opcode) {
            uapi::PMSKB_OP_PUT => "put",
            uapi::PMSKB_OP_DELETE => "delete",
            uapi::PMSKB_OP_RELEASE => "release",
            uapi::PMSKB_OP_TRUNCATE => "truncate",
            _ => "operation",
        }
    }

    fn short(&self) -> String {
        format!(
            "{} fd {} flags {:x} key {} exts {} seq {} {:?}",
            self.name(),
            self.raw.fd,
            self.raw.flags,
            self.raw.key_len,
            self.raw.nr_extents,
            self.raw.seq,
            self.ranges
        )
    }

    /// What it says is not what was planned, and it may work all the same.
    fn tampered(&self) -> bool {
        self.spoilt
    }

    /// Its condition is known.
    fn sure(&self) -> bool {
        !self.tampered()
    }

    /// Makes something wrong in it.
    fn spoil(&mut self, rng: &mut Rng, exts: &mut [uapi::pmskb_ext]) {
        self.spoilt = true;
        match rng.below(9) {
            0 => self.raw.opcode = *pick(rng, &[0, 1, 2, 3, 4, 5, 0xffff]),
            1 => self.raw.flags = rng.next() as u16 & 0xff,
            2 => self.raw.fd = *pick(rng, &[-1, 0, 1, 1 << 20, i32::MIN]),
            3 => self.raw.key_len = *pick(rng, &[0, 1, 1024, 1025, u32::MAX]),
            4 => {
                self.raw.nr_extents = *pick(rng, &[0, 1, 2, 100, 1 << 18, (1 << 18) + 1, u32::MAX])
            }
            5 => self.raw.seq = rng.next(),
            6 => self.raw.reserved[rng.below(3) as usize] = 1,
            _ => {
                for ext in exts {
                    match rng.below(4) {
                        0 => ext.token = *pick(rng, &[0, 1, u32::MAX, ext.token ^ 1]),
                        1 => ext.offset = *pick(rng, &[1, 4096, u32::MAX]),
                        2 => ext.len = *pick(rng, &[0, 1, 1 << 30, u32::MAX]),
                        _ => ext.reserved = 1,
                    }
                }
            }
        }
    }
}
