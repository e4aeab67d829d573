// SPDX-License-Identifier: GPL-2.0-only

//! Attached sockets of all processes.
//!
//! `ss -ti` shows those of TCP; the kernel's UDP has no place for it. A socket is asked by a copy
//! of its descriptor (`pidfd_getfd(2)`), so it takes the right to trace the process.

use std::{
    collections::{btree_map::Entry, BTreeMap},
    fs, io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

use clap::Args;
use pmskb_uapi::{socket, store::UNPLACED, sys};
use rustix::{
    fs::fstat,
    io::Errno,
    net::{getpeername, getsockname, sockopt::socket_type, SocketType},
    process::{pidfd_getfd, pidfd_open, Pid, PidfdFlags, PidfdGetfdFlags},
};
use serde_json::{json, Value};

use crate::text;

/// Arguments of `sockets`.
#[derive(Args)]
pub struct Sockets {
    /// pmskbN; by default all
    #[arg(value_parser = text::parse_store)]
    store: Option<u32>,
    /// Sockets of this process only
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
}

/// An attached socket, and who has it.
struct Row {
    udp: bool,
    local: Option<SocketAddr>,
    peer: Option<SocketAddr>,
    info: sys::pmskb_sock_info,
    /// Process and descriptor.
    users: Vec<(u32, i32)>,
}

impl Row {
    /// Asks a socket; nothing if it is none that is attached.
    fn of(fd: &OwnedFd) -> Option<Self> {
        let info = socket::info(fd.as_fd()).ok()?;
        if info.store == u32::MAX {
            return None;
        }
        Some(Self {
            udp: socket_type(fd).ok()? == SocketType::DGRAM,
            local: getsockname(fd).ok().and_then(|a| a.try_into().ok()),
            peer: getpeername(fd)
                .ok()
                .flatten()
                .and_then(|a| a.try_into().ok()),
            info,
            users: Vec::new(),
        })
    }

    fn mode(&self) -> &'static str {
        if self.info.rx_mode == sys::PMSKB_RX_DESC {
            "desc"
        } else {
            "bytes"
        }
    }

    fn unplaced(&self) -> u64 {
        self.info.counters.unplaced.iter().sum()
    }

    fn value(&self) -> Value {
        let i = &self.info;
        let c = &i.counters;
        let unplaced: BTreeMap<_, _> = UNPLACED
            .iter()
            .map(|(name, at)| (*name, c.unplaced[*at]))
            .collect();
        let users: Vec<_> = self
            .users
            .iter()
            .map(|(pid, fd)| json!({ "pid": pid, "fd": fd, "comm": comm(*pid) }))
            .collect();
        json!({
            "protocol": if self.udp { "udp" } else { "tcp" },
            "local": self.local.map(|a| a.to_string()),
            "peer": self.peer.map(|a| a.to_string()),
            "store": format!("/dev/pmskb{}", i.store),
            "mode": self.mode(),
            "tokens": i.tokens,
            "frames": i.frames,
            "quota_tokens": i.quota_tokens,
            "quota_frames": i.quota_frames,
            "placed": c.placed,
            "placed_bytes": c.placed_bytes,
            "unplaced": unplaced,
            "copied_bytes": c.copied_bytes,
            "refused": c.refused,
            "logged_bytes": c.logged_bytes,
            "heads_in_dram": c.heads_in_dram,
            "users": users,
        })
    }
}

/// A process's name, which it chooses.
fn comm(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    text::key(name.strip_suffix(b"\n").unwrap_or(&name))
}

/// Adds a process's attached sockets to `found`, by inode. An error if it may not be looked into.
fn look(pid: u32, found: &mut BTreeMap<u64, Option<Row>>) -> Result<(), Errno> {
    let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let id = id.ok_or(Errno::SRCH)?;
    let errno = |e: &io::Error| Errno::from_io_error(e).unwrap_or(Errno::IO);
    // Before the directory is looked into: what it names is this process's.
    let process = pidfd_open(id, PidfdFlags::empty())?;
    let dir = fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| errno(&e))?;
    for entry in dir.flatten() {
        let link = match fs::read_link(entry.path()) {
            Ok(link) => link,
            // The directory may be listed by some who may not see what is in it.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(errno(&e)),
            // It was closed meanwhile.
            Err(_) => continue,
        };
        let link = link.to_string_lossy();
        let inode = link
            .strip_prefix("socket:[")
            .and_then(|rest| rest.strip_suffix(']')?.parse().ok());
        let fd = entry.file_name().to_str().and_then(|s| s.parse().ok());
        let (Some(inode), Some(fd)) = (inode, fd) else {
            continue;
        };
        if let Entry::Vacant(new) = found.entry(inode) {
            match pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()) {
                // Another file may be there by now.
                Ok(copy) if fstat(&copy)?.st_ino != inode => continue,
                Ok(copy) => {
                    new.insert(Row::of(&copy));
                }
                Err(Errno::BADF) => continue,
                Err(e) => return Err(e),
            }
        }
        if let Some(Some(row)) = found.get_mut(&inode) {
            row.users.push((pid, fd));
        }
    }
    Ok(())
}

/// Shows attached sockets.
pub fn sockets(a: &Sockets, json: bool) -> anyhow::Result<ExitCode> {
    let pids: Vec<u32> = match a.pid {
        Some(pid) => vec![pid],
        None => fs::read_dir("/proc")?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect(),
    };
    let mut found = BTreeMap::new();
    let mut hidden = 0;
    for pid in pids {
        match look(pid, &mut found) {
            Ok(()) => (),
            // It ended meanwhile.
            Err(Errno::NOENT | Errno::SRCH) if a.pid.is_none() => (),
            Err(Errno::ACCESS | Errno::PERM) if a.pid.is_none() => hidden += 1,
            Err(Errno::NOENT | Errno::SRCH) => anyhow::bail!("there is no process {pid}"),
            Err(Errno::ACCESS | Errno::PERM) => anyhow::bail!(
                "process {pid} may not be looked into: that takes the right to trace it; run as root"
            ),
            Err(e) => return Err(anyhow::Error::from(e).context(format!("process {pid}"))),
        }
    }
    let rows = found.into_values().flatten();
    let rows: Vec<Row> = rows
        .filter(|row| a.store.is_none_or(|store| store == row.info.store))
        .collect();
    if hidden > 0 {
        eprintln!(
            "pmskbctl: {hidden} processes may not be looked into; run as root to see their sockets"
        );
    }
    if json {
        let all: Vec<Value> = rows.iter().map(Row::value).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{:<5} {:<7} {:<5} {:>7} {:>7} {:>10} {:>10} {:>9} {:<22} {:<22} PID:FD NAME",
        "PROTO",
        "STORE",
        "MODE",
        "TOKENS",
        "FRAMES",
        "PLACED",
        "BYTES",
        "UNPLACED",
        "LOCAL",
        "PEER"
    );
    let address = |a: Option<SocketAddr>| a.map_or("*".into(), |a| a.to_string());
    for row in &rows {
        let users: Vec<_> = row
            .users
            .iter()
            .map(|(pid, fd)| {
                let name = comm(*pid).replace('"', "\\\"");
                format!("{pid}:{fd} \"{name}\"")
            })
            .collect();
        println!(
            "{:<5} {:<7} {:<5} {:>7} {:>7} {:>10} {:>10} {:>9} {:<22} {:<22} {}",
            if row.udp { "udp" } else { "tcp" },
            format!("pmskb{}", row.info.store),
            row.mode(),
            row.info.tokens,
            row.info.frames,
            row.info.counters.placed,
            text::size(row.info.counters.placed_bytes),
            row.unplaced(),
            address(row.local),
            address(row.peer),
            users.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}
