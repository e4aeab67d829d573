// SPDX-License-Identifier: GPL-2.0-only

//! Packets that no well-behaved host sends, written to a tun device, at attached sockets.
//!
//! Each byte of payload says what packet it came in: one whose checksum is right (`HONEST`), one
//! that the transport must reject (`POISON`), or one of which nobody can say (`GRAY`). What is
//! received, and what is in the log, must have no poison. Half of the rounds have no gray packets:
//! then each byte of a stream must be the right one, and each sum.

use std::{path::PathBuf, process::Command};

use anyhow::{bail, ensure, Context};
use clap::Args;
use pmskb_uapi::{core::sim::Rng, sys as uapi, Catalog, Store};

use crate::{
    run::{one_in, pick, random, Options, Run},
    store::{self, Control},
    sys::{self, bytes_of, Arena, Zeroed},
    syscall,
    wire::{self, Around, Check, Path, Vnet},
};

/// Options of `packets`.
#[derive(Args)]
pub struct Packets {
    /// The device that the store is made on; a partition of it, which is made for that
    #[arg(long, default_value = "/dev/pmem0")]
    device: PathBuf,
    #[command(flatten)]
    options: Options,
}

const HONEST: u8 = 0;
const GRAY: u8 = 0x40;
const POISON: u8 = 0x80;
/// Of a byte, what says which packet it came in.
const KIND: u8 = 0xc0;
const LEN: u64 = 16 << 20;
/// More descriptors than a call gives.
const ROOM: usize = 64;

/// A byte of a stream.
fn letter(at: u64, kind: u8) -> u8 {
    (Rng(at).next() as u8) & !KIND | kind
}

struct Tun {
    fd: i32,
    paths: [Path; 2],
}

#[derive(Default)]
struct Tally {
    packets: u64,
    refused: u64,
    received: u64,
    logged: u64,
    records: u64,
    puts: u64,
    tcp: u64,
    udp: u64,
}

struct Fuzzer {
    arena: Arena,
    tuns: Vec<Tun>,
    node: i32,
    catalog: Catalog,
    /// Counters before the first packet.
    before: uapi::pmskb_store_info,
    tally: Tally,
}

/// Runs it; whether nothing was wrong.
pub fn packets(a: &Packets) -> anyhow::Result<bool> {
    let arena = Arena::new()?;
    let control = Control::open()?;
    let device = store::partition(&arena, &a.device, 6, 2 << 20, LEN)?;
    let formatted = control.format(&arena, device, 0, 0);
    ensure!(formatted.is_ok(), "FORMAT: {}", sys::shown(formatted));
    let minor = match control.attach(&arena, device, 0) {
        Ok(minor) => minor,
        Err(e) => bail!("ATTACH: {}", sys::name(e)),
    };
    let tuns = vec![Tun::new(&arena, 0)?, Tun::new(&arena, 1)?];
    let node = store::node(minor, libc::O_RDWR)?;
    let catalog = Catalog::of_store(&Store::open_minor(minor)?)?;
    let before = info(&arena, node)?;
    let mut fuzzer = Fuzzer {
        arena,
        tuns,
        node,
        catalog,
        before,
        tally: Tally::default(),
    };
    let mut run = Run::new("packets", &a.options)?;
    let mut right = true;
    while let Some((nr, mut rng)) = run.round() {
        if let Err(e) = fuzzer.round(nr, &mut rng, &run) {
            run.failed(&e);
            right = false;
            break;
        }
    }
    let t = &fuzzer.tally;
    let after = info(&fuzzer.arena, node)?.counters;
    println!(
        "{} - packets # {} connections, {} UDP sockets; {} packets, {} refused by the device; placed {}, \
         unplaced {:?}; {} bytes received, {} logged in {} records, {} puts; checksums derived {}, \
         computed {}",
        if right { "ok" } else { "not ok" },
        t.tcp,
        t.udp,
        t.packets,
        t.refused,
        after.placed,
        after.unplaced,
        t.received,
        t.logged,
        t.records,
        t.puts,
        after.derived,
        after.computed
    );
    if !right {
        return Ok(false);
    }
    let Fuzzer { arena, catalog, .. } = fuzzer;
    drop(catalog);
    let _ = sys::close(node);
    let gone = control.detach(&arena, minor, 10_000);
    println!(
        "{} - packets: detach # {}",
        if gone == Ok(0) { "ok" } else { "not ok" },
        sys::shown(gone)
    );
    let fsck = Command::new("pmskbctl")
        .args(["fsck", "--image"])
        .arg(format!("{}p6", a.device.display()))
        .output()?;
    let clean = fsck.status.success();
    if !clean {
        for line in String::from_utf8_lossy(&fsck.stdout).lines() {
            println!("# {line}");
        }
    }
    println!("{} - packets: fsck", if clean { "ok" } else { "not ok" });
    Ok(gone == Ok(0) && clean)
}

fn info(arena: &Arena, node: i32) -> anyhow::Result<uapi::pmskb_store_info> {
    store::info(arena, node).map_err(|e| anyhow::anyhow!("INFO: {}", sys::name(e)))
}

impl Tun {
    /// A device of its own network. The second one has NAPI, and merges packets as a driver does.
    fn new(arena: &Arena, nr: u8) -> anyhow::Result<Self> {
        let _ = Command::new("modprobe").args(["-q", "tun"]).status();
        let fd = store::open(
            std::path::Path::new("/dev/net/tun"),
            libc::O_RDWR | libc::O_NONBLOCK,
        )?;
        let name = format!("fuzz{nr}");
        let mut request = [0u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags: u16 = 1 | 0x1000 | 0x4000 | if nr == 1 { 0x10 } else { 0 };
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        const TUNSETIFF: u64 = 0x4004_54ca;
        const TUNSETOFFLOAD: u64 = 0x4004_54d0;
        let made = syscall!(SYS_ioctl, fd, TUNSETIFF, arena.place(&request));
        ensure!(
            made.is_ok(),
            "cannot make a tun device: {}",
            sys::shown(made)
        );
        let offload = syscall!(SYS_ioctl, fd, TUNSETOFFLOAD, 0x6f);
        ensure!(
            offload.is_ok(),
            "cannot set its offloads: {}",
            sys::shown(offload)
        );
        let net = 3 + nr;
        let v4 = |host| [10, 77, net, host, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let v6 = |host| [0xfd, 0x77, 0, net, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host];
        for args in [
            format!("addr add 10.77.{net}.1/24 dev {name}"),
            format!("addr add fd77:{net}::1/64 dev {name} nodad"),
            format!("link set {name} up"),
        ] {
            let status = Command::new("ip").args(args.split(' ')).status()?;
            ensure!(status.success(), "ip {args}");
        }
        let mut fixed = v6(1);
        let mut peer = v6(2);
        // fd77:N::1 has N in its second word.
        for a in [&mut fixed, &mut peer] {
            (a[1], a[2], a[3]) = (0x77, 0, net);
        }
        let paths = [
            Path {
                v4: true,
                peer: v4(2),
                host: v4(1),
            },
            Path {
                v4: false,
                peer,
                host: fixed,
            },
        ];
        Ok(Tun { fd, paths })
    }
}

/// The socket under test, and what is known of it.
struct Under {
    tun: usize,
    path: Path,
    tcp: bool,
    fd: i32,
    ports: (u16, u16),
    desc: bool,
    auto: bool,
    /// No packets of which nobody can say whether they are right.
    strict: bool,
    /// A device vouched for a sum that is wrong: sums tell nothing any more.
    lies: bool,
    /// An urgent byte may be missing in what is received.
    gaps: bool,
    /// What was received; of UDP the datagrams one after the other.
    got: Vec<u8>,
    datagrams: u64,
    held: Vec<(uapi::pmskb_desc, Vec<u8>)>,
    /// The sequence number before that of the stream's first byte, and what is expected there.
    iss: u32,
    next: u32,
    acked: u32,
    ended: bool,
    id: u16,
}

impl Under {
    /// Where there are bytes from a packet with a wrong checksum. What was made wrong on purpose
    /// has some bytes of that kind, too, but not many in a row.
    fn poison(&self, bytes: &[u8]) -> Option<usize> {
        let row = if self.strict { 1 } else { 12 };
        bytes
            .windows(row)
            .position(|all| all.iter().all(|b| b & KIND == POISON))
    }
}

impl Fuzzer {
    fn round(&mut self, nr: u64, rng: &mut Rng, run: &Run) -> anyhow::Result<()> {
        let tun = rng.below(2) as usize;
        let path = *pick(rng, &self.tuns[tun].paths);
        let mut u = Under {
            tun,
            path,
            tcp: !one_in(rng, 3),
            fd: -1,
            ports: (1024 + rng.below(60000) as u16, 2000 + (nr % 30000) as u16),
            desc: one_in(rng, 2),
            auto: one_in(rng, 2),
            strict: one_in(rng, 2),
            lies: false,
            gaps: one_in(rng, 8),
            got: Vec::new(),
            datagrams: 0,
            held: Vec::new(),
            iss: rng.next() as u32,
            next: 0,
            acked: 0,
            ended: false,
            id: rng.next() as u16,
        };
        let from = info(&self.arena, self.node)?.durable_seq + 1;
        run.log.note(&format!(
            "{} {} tun {tun} strict {} desc {} auto {}",
            if u.tcp { "TCP" } else { "UDP" },
            if path.v4 { 4 } else { 6 },
            u.strict,
            u.desc,
            u.auto
        ));
        let done = self.open(&mut u, rng).and_then(|()| {
            let most = *pick(rng, &[20, 60, 60, 400]);
            for _ in 0..4 + rng.below(most) {
                self.step(&mut u, rng, run)?;
            }
            self.drain(&mut u, rng)?;
            if u.auto {
                self.compare(&u, from)?;
            }
            Ok(())
        });
        run.log.note("end");
        if !u.held.is_empty() && one_in(rng, 2) {
            let _ = self.release(&mut u);
        }
        if u.fd >= 0 {
            let _ = sys::close(u.fd);
        }
        if u.tcp {
            // Or it stays for a while on its own, with what came out of order.
            self.listen(&mut u);
            let seq = u.iss.wrapping_add(1).wrapping_add(u.acked);
            let body = wire::tcp(u.ports, seq, u.next, wire::RST | wire::ACK, 0, &[], &[]);
            self.send(
                &mut u,
                6,
                body,
                Check::Right,
                &Around::default(),
                0,
                None,
                run,
            );
        }
        done?;
        self.empty(run)
    }

    /// A socket with what the round wants of it; of TCP a connection.
    fn open(&mut self, u: &mut Under, rng: &mut Rng) -> anyhow::Result<()> {
        let family = if u.path.v4 {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let kind = if u.tcp {
            libc::SOCK_STREAM
        } else {
            libc::SOCK_DGRAM
        };
        let s = syscall!(
            SYS_socket,
            family,
            kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0
        );
        let s = s.map_err(|e| anyhow::anyhow!("socket: {}", sys::name(e)))? as i32;
        u.fd = s;
        let address = if u.path.v4 {
            let mut a = libc::sockaddr_in::zeroed();
            a.sin_family = libc::AF_INET as u16;
            a.sin_port = u.ports.1.to_be();
            a.sin_addr.s_addr = u32::from_ne_bytes([
                u.path.host[0],
                u.path.host[1],
                u.path.host[2],
                u.path.host[3],
            ]);
            bytes_of(&a)
        } else {
            let mut a = libc::sockaddr_in6::zeroed();
            a.sin6_family = libc::AF_INET6 as u16;
            a.sin6_port = u.ports.1.to_be();
            a.sin6_addr.s6_addr = u.path.host;
            bytes_of(&a)
        };
        self.option(s, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if one_in(rng, 4) {
            self.option(
                s,
                libc::SOL_SOCKET,
                libc::SO_RCVBUF,
                *pick(rng, &[1, 8192, 1 << 20]),
            )?;
        }
        let bound = syscall!(SYS_bind, s, self.arena.place(&address), address.len());
        ensure!(bound.is_ok(), "bind: {}", sys::shown(bound));
        if u.tcp {
            let listens = syscall!(SYS_listen, s, 4);
            ensure!(listens.is_ok(), "listen: {}", sys::shown(listens));
            if !u.gaps {
                self.option(s, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
            }
        } else if one_in(rng, 4) {
            self.option(s, libc::SOL_UDP, libc::UDP_GRO, 1)?;
        }
        let late = u.tcp && one_in(rng, 4);
        if !late {
            self.attach(u, s, rng)?;
        }
        if !u.tcp {
            self.tally.udp += 1;
            return Ok(());
        }
        self.tally.tcp += 1;
        let syn = [2, 4, 5, 0xb4, 4, 2, 3, 3, 7, 1, 1, 1];
        let syn: &[u8] = if one_in(rng, 3) { &[] } else { &syn };
        let around = Around::default();
        let (iss, ports) = (u.iss, u.ports);
        for _ in 0..3 {
            let body = wire::tcp(ports, iss, 0, wire::SYN, 0, syn, &[]);
            self.write(u, 6, body, Check::Right, &around, 0, None);
            self.listen(u);
            let body = wire::tcp(ports, iss.wrapping_add(1), u.next, wire::ACK, 0, &[], &[]);
            self.write(u, 6, body, Check::Right, &around, 0, None);
            if let Ok(accepted) = syscall!(
                SYS_accept4,
                s,
                0,
                0,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC
            ) {
                let _ = sys::close(s);
                u.fd = accepted as i32;
                if late {
                    self.attach(u, accepted as i32, rng)?;
                }
                u.acked = 0;
                return Ok(());
            }
        }
        bail!("the connection is not accepted");
    }

    fn option(&self, fd: i32, level: i32, name: i32, value: u32) -> anyhow::Result<()> {
        let at = self.arena.place(&value.to_ne_bytes());
        let res = syscall!(SYS_setsockopt, fd, level, name, at, 4);
        ensure!(
            res.is_ok(),
            "option {level} {name} {value}: {}",
            sys::shown(res)
        );
        Ok(())
    }

    fn attach(&self, u: &Under, fd: i32, rng: &mut Rng) -> anyhow::Result<()> {
        let at = self.arena.place(&fd.to_ne_bytes());
        let res = syscall!(SYS_ioctl, self.node, uapi::IOC_ATTACH_SOCKET, at);
        ensure!(res.is_ok(), "ATTACH_SOCKET: {}", sys::shown(res));
        let level = uapi::SOL_PMSKB as i32;
        if u.auto {
            self.option(fd, level, uapi::PMSKB_AUTO_PERSIST as i32, 1)?;
        }
        if one_in(rng, 4) {
            self.option(fd, level, uapi::PMSKB_CRC32C as i32, 1)?;
        }
        if u.desc {
            self.option(fd, level, uapi::PMSKB_RX_MODE as i32, uapi::PMSKB_RX_DESC)?;
        }
        if one_in(rng, 4) {
            let quota = uapi::pmskb_quota {
                frames: 32,
                tokens: 64,
                reserved: 0,
            };
            let at = self.arena.place(&bytes_of(&quota));
            let res = syscall!(SYS_setsockopt, fd, level, uapi::PMSKB_QUOTA, at, 16);
            ensure!(res.is_ok(), "QUOTA: {}", sys::shown(res));
        }
        Ok(())
    }

    /// Writes a packet to the device, or its fragments; with `hurt` they are made wrong first.
    #[allow(clippy::too_many_arguments)]
    fn write(
        &mut self,
        u: &mut Under,
        protocol: u8,
        body: Vec<u8>,
        check: Check,
        around: &Around,
        segment: u16,
        mut hurt: Option<(&mut Rng, bool)>,
    ) {
        u.id = u.id.wrapping_add(1);
        for (mut vnet, mut packet) in
            wire::packets(&u.path, protocol, body, check, around, u.id, segment)
        {
            match &mut hurt {
                Some((rng, true)) => vnet.hostile(rng, packet.len()),
                Some((rng, false)) => wire::hurt(rng, &mut packet),
                None => (),
            }
            if hurt.is_some() {
                u.lies |= vnet.flags & 2 != 0;
            }
            self.raw(u.tun, &vnet, &packet);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn send(
        &mut self,
        u: &mut Under,
        protocol: u8,
        body: Vec<u8>,
        check: Check,
        around: &Around,
        segment: u16,
        hurt: Option<(&mut Rng, bool)>,
        run: &Run,
    ) {
        run.log.note(&format!(
            "packet {} {check:?} f{} g{segment} {}",
            body.len(),
            around.fragment,
            match hurt {
                None => "",
                Some((_, true)) => "vnet",
                Some((_, false)) => "hurt",
            }
        ));
        self.write(u, protocol, body, check, around, segment, hurt);
    }

    fn raw(&mut self, tun: usize, vnet: &Vnet, packet: &[u8]) {
        let bytes = wire::framed(vnet, packet);
        let at = self.arena.place(&bytes);
        self.tally.packets += 1;
        let res = syscall!(SYS_write, self.tuns[tun].fd, at, bytes.len());
        self.tally.refused += u64::from(res.is_err());
    }

    /// What TCP says to the peer.
    fn listen(&mut self, u: &mut Under) {
        let at = self.arena.room(70000);
        while let Ok(n) = syscall!(SYS_read, self.tuns[u.tun].fd, at, 70000) {
            let Some(said) = wire::heard(&self.arena.get(at, n as usize), u.ports) else {
                continue;
            };
            u.next = said.next;
            u.ended |= said.flags & wire::RST != 0;
            if let Some(acked) = said.acked {
                u.acked = acked.wrapping_sub(u.iss).wrapping_sub(1);
            }
        }
    }

    fn step(&mut self, u: &mut Under, rng: &mut Rng, run: &Run) -> anyhow::Result<()> {
        if one_in(rng, 5) {
            run.log.note("use");
            return self.act(u, rng);
        }
        if !u.strict && one_in(rng, 40) {
            let len = 1 + rng.below(200) as usize;
            let mut junk = random(rng, len);
            junk[0] = *pick(rng, &[0x45, 0x46, 0x60, 0x4f, junk[0]]);
            let mut vnet = Vnet::default();
            vnet.hostile(rng, junk.len());
            u.lies = true;
            run.log.note("junk");
            self.raw(u.tun, &vnet, &junk);
            return Ok(());
        }
        let mut check = *pick(
            rng,
            &[
                Check::Right,
                Check::Right,
                Check::Partial,
                Check::Partial,
                Check::Wrong,
            ],
        );
        if !u.strict && one_in(rng, 12) {
            check = Check::Vouched;
        }
        let mut around = Around::default();
        if one_in(rng, 6) {
            around.options = wire::options(rng, u.path.v4);
        }
        if one_in(rng, 8) {
            around.fragment = *pick(rng, &[8, 16, 24, 256, 1000, 1400]);
            around.backwards = one_in(rng, 2);
            around.overlap = if one_in(rng, 4) { 8 } else { 0 };
            if check != Check::Wrong {
                check = Check::Right;
            }
        }
        let mut hurt = (!u.strict && one_in(rng, 4)).then(|| one_in(rng, 2));
        // What is there of a fragment says nothing of the rest.
        if around.fragment > 0 {
            hurt = None;
        }
        let kind = match (check, hurt) {
            (_, Some(_)) | (Check::Vouched, _) => GRAY,
            (Check::Wrong, _) => POISON,
            _ => HONEST,
        };
        u.lies |= check == Check::Vouched;
        let big = check == Check::Partial && around.fragment == 0;
        let most = if big && one_in(rng, 2) { 16000 } else { 1400 };
        let len = *pick(
            rng,
            &[0, 1, 2, 7, 100, 999, 1400, most, rng.clone().below(most)],
        );
        let segment = if big && one_in(rng, 2) {
            *pick(rng, &[1u16, 8, 200, 536, 1360, 1448])
        } else {
            0
        };
        // So many pieces is all that the kernel takes.
        let segment = if segment > 0 && len / u64::from(segment) > 60 {
            536
        } else {
            segment
        };
        if u.tcp {
            self.listen(u);
            let acked = i64::from(u.acked);
            let at = match rng.below(12) {
                0 => acked + rng.below(4000) as i64,
                1 => acked - rng.below(4000) as i64,
                2 => acked + *pick(rng, &[1i64 << 20, 1 << 30, 1 << 31, -1 << 20, 65535, -1, 1]),
                _ => acked,
            };
            let payload: Vec<u8> = (0..len)
                .map(|n| letter((at as u64).wrapping_add(n) & 0xffff_ffff, kind))
                .collect();
            let mut flags = wire::ACK | 8;
            let mut urgent = 0;
            if one_in(rng, 12) {
                flags |= wire::URG;
                urgent = *pick(rng, &[0, 1, len as u16, len as u16 + 1, 0xffff, 100]);
            }
            if one_in(rng, 60) {
                flags = *pick(
                    rng,
                    &[
                        wire::ACK | wire::FIN,
                        wire::ACK | wire::RST,
                        wire::SYN,
                        0,
                        0xff,
                        wire::RST,
                    ],
                );
            }
            let options = match rng.below(10) {
                0 => vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0],
                1 => random(rng, *pick(&mut rng.clone(), &[4, 8, 40])),
                _ => Vec::new(),
            };
            let ack = if one_in(rng, 20) {
                rng.next() as u32
            } else {
                u.next
            };
            let seq = u.iss.wrapping_add(1).wrapping_add(at as u32);
            let body = wire::tcp(u.ports, seq, ack, flags, urgent, &options, &payload);
            self.send(
                u,
                6,
                body,
                check,
                &around,
                segment,
                hurt.map(|h| (rng, h)),
                run,
            );
        } else {
            if check == Check::Right && one_in(rng, 10) && u.path.v4 {
                check = Check::None;
            }
            let payload: Vec<u8> = (0..len).map(|n| letter(n, kind)).collect();
            let says = 8 + if hurt.is_some() && one_in(rng, 2) {
                rng.below(2000)
            } else {
                len
            };
            let body = wire::udp(u.ports, says as u16, &payload);
            self.send(
                u,
                17,
                body,
                check,
                &around,
                segment,
                hurt.map(|h| (rng, h)),
                run,
            );
        }
        Ok(())
    }

    /// The application does something.
    fn act(&mut self, u: &mut Under, rng: &mut Rng) -> anyhow::Result<()> {
        match rng.below(12) {
            0 => {
                // Between any two bytes.
                u.desc = !u.desc;
                self.option(
                    u.fd,
                    uapi::SOL_PMSKB as i32,
                    uapi::PMSKB_RX_MODE as i32,
                    u32::from(u.desc),
                )
            }
            1 | 8..=10 => self.put(u, rng),
            2 => self.release(u),
            3 => {
                let n = *pick(rng, &[0, 1, 100, 65536]);
                self.option(u.fd, uapi::SOL_PMSKB as i32, uapi::PMSKB_RX_COPY as i32, n)
            }
            4 => {
                let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
                self.receive(u, *pick(rng, &[1, 4, ROOM]), 70000, flags)
                    .map(|_| ())
            }
            _ => {
                let (room, bytes) = (
                    *pick(rng, &[0, 1, 2, ROOM]),
                    *pick(rng, &[1, 100, 5000, 70000]),
                );
                let bytes = if u.tcp { bytes } else { 70000 };
                self.receive(u, room, bytes, libc::MSG_DONTWAIT).map(|_| ())
            }
        }
    }

    /// One receive: whether there may be more.
    fn receive(
        &mut self,
        u: &mut Under,
        room: usize,
        bytes: u64,
        flags: i32,
    ) -> anyhow::Result<bool> {
        let space =
            (size_of::<libc::cmsghdr>() + size_of::<uapi::pmskb_desc>()).next_multiple_of(8);
        let (control, to) = (
            self.arena.room((space * room) as u64),
            self.arena.room(bytes),
        );
        let iov = libc::iovec {
            iov_base: to as *mut libc::c_void,
            iov_len: bytes as usize,
        };
        let mut msg = libc::msghdr::zeroed();
        msg.msg_iov = self.arena.place(&bytes_of(&iov)) as *mut libc::iovec;
        msg.msg_iovlen = 1;
        msg.msg_control = control as *mut libc::c_void;
        msg.msg_controllen = (space * room) as _;
        let at = self.arena.place(&bytes_of(&msg));
        let n = match syscall!(SYS_recvmsg, u.fd, at, flags) {
            Ok(n) => n as usize,
            Err(libc::EAGAIN) => return Ok(false),
            Err(libc::EDQUOT) => {
                ensure!(u.desc || u.auto, "EDQUOT of a receive of bytes");
                self.release(u)?;
                return Ok(true);
            }
            Err(libc::EMSGSIZE) if u.desc && room < ROOM => return Ok(true),
            Err(libc::ENOBUFS | libc::ENOSPC) => {
                self.release(u)?;
                self.make_room()?;
                return Ok(false);
            }
            Err(libc::ECONNRESET | libc::EPIPE | libc::ETIMEDOUT) if u.tcp => {
                u.ended = true;
                return Ok(true);
            }
            Err(e) => bail!("recvmsg: {}", sys::name(e)),
        };
        let peek = flags & libc::MSG_PEEK != 0;
        let mut got = Vec::new();
        if u.desc {
            let said: libc::msghdr = self.arena.get_as(at);
            let raw = self.arena.get(control, said.msg_controllen as _);
            let mut at = 0;
            while at + space <= raw.len() {
                let d = self
                    .arena
                    .get_as::<uapi::pmskb_desc>(control + at as u64 + 16);
                at += space;
                let mut part = vec![0; d.len as usize];
                let read = sys::pread(self.node, &mut part, d.offset);
                ensure!(
                    read == Ok(i64::from(d.len)),
                    "what is described: {}",
                    sys::shown(read)
                );
                if d.flags & uapi::PMSKB_DESC_PARTIAL == 0 {
                    ensure!(
                        d.len == d.pkt_len && d.pkt_off == 0,
                        "not partial, but it is: {d:?}"
                    );
                    if !u.lies && u32::from(d.csum_kind) != uapi::PMSKB_CSUM_NONE {
                        let right = store::sum_of(&part);
                        ensure!(
                            d.csum == right,
                            "a packet's sum is {right:#x}, and not that of {d:?}"
                        );
                    }
                }
                got.extend(&part);
                u.held.push((d, part));
            }
            ensure!(
                got.len() == n,
                "{n} bytes were returned, {} described",
                got.len()
            );
        } else {
            got = self.arena.get(to, n);
        }
        if let Some(at) = u.poison(&got) {
            bail!("byte {at} of {n} is from a packet with a wrong checksum");
        }
        if !peek {
            self.tally.received += n as u64;
            u.got.extend(&got);
            u.datagrams += 1;
            if u.tcp && u.strict && !u.gaps {
                let start = u.got.len() - got.len();
                for (k, b) in got.iter().enumerate() {
                    let right = letter((start + k) as u64, HONEST);
                    ensure!(
                        *b == right,
                        "byte {} of the stream is another one",
                        start + k
                    );
                }
            }
        }
        Ok(if u.tcp { n > 0 } else { true })
    }

    fn drain(&mut self, u: &mut Under, rng: &mut Rng) -> anyhow::Result<()> {
        let mut ends = 0;
        for k in 0..20_000 {
            if !self.receive(u, ROOM, 70000, libc::MSG_DONTWAIT)? {
                // It said that there is no room, and there is now; or nothing has come.
                ends += 1;
                if ends == 2 {
                    return Ok(());
                }
            }
            if u.held.len() > 40 {
                if one_in(rng, 4) {
                    self.put(u, rng)?;
                }
                self.release(u)?;
            }
            ensure!(k < 19_999, "receiving makes no end");
        }
        Ok(())
    }

    fn release(&mut self, u: &mut Under) -> anyhow::Result<()> {
        let tokens: Vec<u32> = u.held.drain(..).map(|(d, _)| d.token).collect();
        for some in tokens.chunks(1000) {
            let ranges: Vec<u8> = some
                .iter()
                .flat_map(|t| [t.to_ne_bytes(), 1u32.to_ne_bytes()].concat())
                .collect();
            let at = self.arena.place(&ranges);
            let res = syscall!(
                SYS_setsockopt,
                u.fd,
                uapi::SOL_PMSKB,
                uapi::PMSKB_RELEASE,
                at,
                ranges.len()
            );
            ensure!(
                res == Ok(some.len() as i64),
                "RELEASE of {}: {}",
                some.len(),
                sys::shown(res)
            );
        }
        Ok(())
    }

    /// Some of what is held becomes a record, and is read back.
    fn put(&mut self, u: &mut Under, rng: &mut Rng) -> anyhow::Result<()> {
        let nr = (1 + rng.below(6) as usize).min(u.held.len());
        if nr == 0 {
            return Ok(());
        }
        let taken: Vec<_> = u.held.drain(..nr).collect();
        let (mut exts, mut bytes, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        for (d, all) in &taken {
            let from = if one_in(rng, 3) {
                rng.below(u64::from(d.len))
            } else {
                0
            } as usize;
            let len = if one_in(rng, 3) {
                1 + rng.below((all.len() - from) as u64) as usize
            } else {
                all.len() - from
            };
            let ext = uapi::pmskb_ext {
                token: d.token,
                offset: from as u32,
                len: len as u32,
                reserved: 0,
            };
            exts.extend(bytes_of(&ext));
            ranges.push(d.offset + from as u64..d.offset + (from + len) as u64);
            bytes.extend(&all[from..from + len]);
        }
        let key = format!("k{}", rng.below(20)).into_bytes();
        let op = uapi::pmskb_op {
            opcode: uapi::PMSKB_OP_PUT as u16,
            flags: if one_in(rng, 4) {
                uapi::PMSKB_OP_CRC32C as u16
            } else {
                0
            },
            fd: u.fd,
            key: self.arena.place(&key),
            key_len: key.len() as u32,
            nr_extents: nr as u32,
            extents: self.arena.place(&exts),
            ..Default::default()
        };
        // Of what was only looked at there are several tokens.
        ranges.sort_by_key(|r| r.start);
        let overlap = ranges.windows(2).any(|two| two[0].end > two[1].start);
        match store::submit_one(&self.arena, self.node, &op) {
            Ok(Err(libc::EINVAL)) if overlap => u.held.extend(taken),
            Ok(Ok(_)) if overlap => bail!("a put of extents that overlap: {ranges:?}"),
            Ok(Ok(seq)) => {
                self.tally.puts += 1;
                let got = store::get(&self.arena, self.node, &key, 0);
                let got = got.map_err(|e| anyhow::anyhow!("put {seq}: {}", sys::name(e)))?;
                ensure!(got.said.seq == seq as u64, "another record has the key");
                if u.lies {
                    ensure!(
                        got.bytes.as_ref() == Ok(&bytes),
                        "record {seq} has other bytes"
                    );
                } else {
                    got.is(&bytes)?;
                }
            }
            Ok(Err(libc::ENOSPC)) => {
                u.held.extend(taken);
                self.make_room()?;
            }
            other => bail!("put: {other:?}"),
        }
        Ok(())
    }

    /// Nothing that the log still has is needed.
    fn make_room(&mut self) -> anyhow::Result<()> {
        for n in 0..20 {
            let key = format!("k{n}").into_bytes();
            let _ = store::plain(&self.arena, self.node, uapi::PMSKB_OP_DELETE, &key, 0);
        }
        Ok(())
    }

    /// The log has what was received: each byte once, and nothing that the transport rejected.
    fn compare(&mut self, u: &Under, from: u64) -> anyhow::Result<()> {
        let (mut logged, mut records) = (Vec::new(), 0);
        for record in self.catalog.log(from) {
            let record = record.map_err(|e| anyhow::anyhow!("the log: {e:?}"))?;
            if record.keyed() {
                continue;
            }
            records += 1;
            let start = logged.len();
            let read = self.catalog.read(&record, |part| logged.extend(part));
            ensure!(read == Ok(true), "record {}: {read:?}", record.seq);
            if !u.lies {
                let (right, said) = (
                    store::sum_of(&logged[start..]),
                    record.meta.csum.get().to_be(),
                );
                ensure!(
                    right == said,
                    "record {}: its bytes have the sum {right:#x}, it says {said:#x}",
                    record.seq
                );
            }
        }
        self.tally.records += records;
        self.tally.logged += logged.len() as u64;
        if let Some(at) = u.poison(&logged) {
            bail!("byte {at} of the log is from a packet with a wrong checksum");
        }
        if u.gaps && u.tcp {
            ensure!(
                logged.len() >= u.got.len(),
                "{} bytes logged, {} received",
                logged.len(),
                u.got.len()
            );
            return Ok(());
        }
        let same = logged.iter().zip(&u.got).position(|(a, b)| a != b);
        ensure!(
            same.is_none() && logged.len() == u.got.len(),
            "{} bytes logged in {records} records, {} received; they differ at {same:?}",
            logged.len(),
            u.got.len()
        );
        Ok(())
    }

    /// Nothing is left of a round: sockets, tokens, frames; the log is made empty.
    fn empty(&mut self, run: &Run) -> anyhow::Result<()> {
        self.make_room()?;
        let res = store::plain(
            &self.arena,
            self.node,
            uapi::PMSKB_OP_TRUNCATE,
            &[],
            u64::MAX,
        );
        ensure!(res.is_ok(), "TRUNCATE: {}", sys::shown(res));
        let mut last = None;
        for nr in 0..400 {
            let i = info(&self.arena, self.node)?;
            let left = (
                i.sockets,
                i.tokens,
                i.frames_held,
                i.frames_limbo,
                i.frames_sockets,
                i.records,
            );
            let heads = self.before.heads_free - i.heads_free.min(self.before.heads_free);
            if left == (0, 0, 0, 0, 0, 0) && heads == 0 {
                return store::adds_up(&i).context("at the end of a round");
            }
            last = Some((left, heads));
            if nr % 20 == 10 {
                sys::nudge(&self.arena);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            run.log.tick();
        }
        bail!("left: (sockets, tokens, held, limbo, counted, records), heads: {last:?}");
    }
}
