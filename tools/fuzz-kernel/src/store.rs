// SPDX-License-Identifier: GPL-2.0-only

//! A store by raw calls: attach, detach, counters, and put and get of what is made here.

use std::{ffi::CString, path::Path};

use anyhow::{bail, ensure, Context};
use pmskb_uapi::{core::csum::Sum, sys as uapi};

use crate::{
    sys::{self, bytes_of, Arena, Res},
    syscall,
};

/// Opens a file; the descriptor is the caller's to close.
pub fn open(path: &Path, flags: i32) -> anyhow::Result<i32> {
    let name = CString::new(path.to_string_lossy().as_bytes())?;
    let fd = syscall!(
        SYS_openat,
        libc::AT_FDCWD,
        name.as_ptr() as u64,
        flags | libc::O_CLOEXEC
    );
    match fd {
        Ok(fd) => Ok(fd as i32),
        Err(e) => bail!("cannot open {}: {}", path.display(), sys::name(e)),
    }
}

/// The control device and the memory that calls use.
pub struct Control {
    fd: i32,
}

impl Control {
    /// Opens it. The module must be loaded.
    pub fn open() -> anyhow::Result<Self> {
        let fd = open(Path::new("/dev/pmskb"), libc::O_RDWR).context("is the module loaded?")?;
        Ok(Control { fd })
    }

    /// Its descriptor.
    pub fn fd(&self) -> i32 {
        self.fd
    }

    /// Formats the device's region, over anything.
    pub fn format(&self, arena: &Arena, device: i32, flags: u32, head_bytes: u64) -> Res {
        let arg = uapi::pmskb_format {
            fd: device,
            flags: flags | uapi::PMSKB_FORMAT_FORCE,
            head_bytes,
            ..Default::default()
        };
        syscall!(
            SYS_ioctl,
            self.fd,
            uapi::IOC_FORMAT,
            arena.place(&bytes_of(&arg))
        )
    }

    /// Attaches the device's store: its number, or an errno.
    pub fn attach(&self, arena: &Arena, device: i32, flags: u32) -> Result<u32, i32> {
        let arg = uapi::pmskb_attach {
            fd: device,
            flags,
            ..Default::default()
        };
        let at = arena.place(&bytes_of(&arg));
        syscall!(SYS_ioctl, self.fd, uapi::IOC_ATTACH, at)?;
        Ok(arena.get_as::<uapi::pmskb_attach>(at).minor)
    }

    /// Detaches a store.
    pub fn detach(&self, arena: &Arena, minor: u32, timeout_ms: u32) -> Res {
        let arg = uapi::pmskb_detach {
            minor,
            timeout_ms,
            reserved: 0,
        };
        syscall!(
            SYS_ioctl,
            self.fd,
            uapi::IOC_DETACH,
            arena.place(&bytes_of(&arg))
        )
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = sys::close(self.fd);
    }
}

/// Opens a store's device.
pub fn node(minor: u32, flags: i32) -> anyhow::Result<i32> {
    open(Path::new(&format!("/dev/pmskb{minor}")), flags)
}

/// A store's counters.
pub fn info(arena: &Arena, store: i32) -> Result<uapi::pmskb_store_info, i32> {
    let at = arena.room(size_of::<uapi::pmskb_store_info>() as u64);
    syscall!(SYS_ioctl, store, uapi::IOC_INFO, at)?;
    Ok(arena.get_as(at))
}

/// Frames by use are all frames, as the documentation says of a store that nobody uses.
pub fn adds_up(i: &uapi::pmskb_store_info) -> anyhow::Result<()> {
    let parts = i.frames_free
        + i.frames_payload
        + i.frames_record
        + i.frames_list
        + i.frames_index
        + i.frames_held
        + i.frames_limbo
        + i.frames_bad;
    ensure!(
        parts == i.frames_total,
        "frames do not add up: {parts} of {}: {i:?}",
        i.frames_total
    );
    ensure!(
        i.frames_reserve <= i.frames_free,
        "the reserve is not free: {i:?}"
    );
    Ok(())
}

/// One operation, and its result.
pub fn submit_one(arena: &Arena, store: i32, op: &uapi::pmskb_op) -> Result<Res, i32> {
    let results = arena.room(size_of::<uapi::pmskb_result>() as u64);
    let s = uapi::pmskb_submit {
        ops: arena.place(&bytes_of(op)),
        results,
        nr: 1,
        ..Default::default()
    };
    syscall!(
        SYS_ioctl,
        store,
        uapi::IOC_SUBMIT,
        arena.place(&bytes_of(&s))
    )?;
    let res = arena.get_as::<uapi::pmskb_result>(results).res;
    Ok(if res < 0 { Err(-res as i32) } else { Ok(res) })
}

/// A buffer with these bytes; the descriptor is the caller's to close.
pub fn buffer(arena: &Arena, store: i32, bytes: &[u8]) -> Result<i32, i32> {
    let arg = uapi::pmskb_alloc {
        len: bytes.len() as u64,
        ..Default::default()
    };
    let at = arena.place(&bytes_of(&arg));
    syscall!(SYS_ioctl, store, uapi::IOC_ALLOC, at)?;
    let fd = arena.get_as::<uapi::pmskb_alloc>(at).fd;
    match sys::pwrite(fd, bytes, 0) {
        Ok(_) => Ok(fd),
        Err(e) => {
            let _ = sys::close(fd);
            Err(e)
        }
    }
}

/// Puts bytes by way of a buffer: the sequence number, or an errno.
pub fn put(arena: &Arena, store: i32, key: &[u8], bytes: &[u8], flags: u32) -> Res {
    let fd = buffer(arena, store, bytes)?;
    let ext = uapi::pmskb_ext {
        len: bytes.len() as u32,
        ..Default::default()
    };
    let op = uapi::pmskb_op {
        opcode: uapi::PMSKB_OP_PUT as u16,
        flags: flags as u16,
        fd,
        key: arena.place(key),
        key_len: key.len() as u32,
        nr_extents: 1,
        extents: arena.place(&bytes_of(&ext)),
        ..Default::default()
    };
    let res = submit_one(arena, store, &op);
    let _ = sys::close(fd);
    res?
}

/// An operation without extents.
pub fn plain(arena: &Arena, store: i32, opcode: u32, key: &[u8], seq: u64) -> Res {
    let op = uapi::pmskb_op {
        opcode: opcode as u16,
        fd: -1,
        key: if key.is_empty() { 0 } else { arena.place(key) },
        key_len: key.len() as u32,
        seq,
        ..Default::default()
    };
    submit_one(arena, store, &op)?
}

/// What a record that was opened says, and all of its bytes.
pub struct Got {
    /// As returned.
    pub said: uapi::pmskb_open,
    /// An errno, if they cannot be read.
    pub bytes: Result<Vec<u8>, i32>,
}

/// Opens a record by key, or without one by sequence number, and reads it.
pub fn get(arena: &Arena, store: i32, key: &[u8], seq: u64) -> Result<Got, i32> {
    let arg = uapi::pmskb_open {
        key: if key.is_empty() { 0 } else { arena.place(key) },
        key_len: key.len() as u32,
        flags: if key.is_empty() {
            uapi::PMSKB_OPEN_SEQ
        } else {
            0
        },
        seq: if key.is_empty() { seq } else { 0 },
        ..Default::default()
    };
    let at = arena.place(&bytes_of(&arg));
    syscall!(SYS_ioctl, store, uapi::IOC_OPEN, at)?;
    let said: uapi::pmskb_open = arena.get_as(at);
    let mut bytes = Ok(Vec::new());
    let mut part = [0; 8192];
    loop {
        let off = bytes.as_ref().map_or(0, Vec::len);
        match sys::pread(said.fd, &mut part, off as u64) {
            Ok(0) => break,
            Ok(n) => bytes
                .as_mut()
                .map_or((), |all| all.extend(&part[..n as usize])),
            Err(e) => bytes = Err(e),
        }
        if bytes.is_err() {
            break;
        }
    }
    let _ = sys::close(said.fd);
    Ok(Got { said, bytes })
}

impl Got {
    /// These bytes, and the right sum of them.
    pub fn is(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let got = match &self.bytes {
            Ok(got) => got,
            Err(e) => bail!("record {} cannot be read: {}", self.said.seq, sys::name(*e)),
        };
        ensure!(got == bytes, "record {} has other bytes", self.said.seq);
        self.sums_up()
    }

    /// Its sum is that of its bytes, if it has both.
    pub fn sums_up(&self) -> anyhow::Result<()> {
        let Ok(got) = &self.bytes else { return Ok(()) };
        ensure!(
            got.len() as u64 == self.said.len,
            "record {} has {} bytes, and says {}",
            self.said.seq,
            got.len(),
            self.said.len
        );
        if u32::from(self.said.csum_kind) != uapi::PMSKB_CSUM_NONE {
            let right = sum_of(got);
            ensure!(
                right == self.said.csum,
                "record {}: sum {:#06x}, its bytes have {right:#06x}",
                self.said.seq,
                self.said.csum
            );
        }
        Ok(())
    }
}

/// The Internet checksum as the interface has it.
pub fn sum_of(bytes: &[u8]) -> u16 {
    Sum::of(bytes).get().to_be()
}

/// A partition of a block device, in the kernel's memory only: its descriptor, O_DIRECT.
pub fn partition(
    arena: &Arena,
    device: &Path,
    nr: i32,
    start: u64,
    len: u64,
) -> anyhow::Result<i32> {
    let whole = open(device, libc::O_RDWR)?;
    let made = sys::partition(arena, whole, nr, start, len);
    let _ = sys::close(whole);
    if let Err(e) = made {
        bail!(
            "cannot make a partition of {}: {}",
            device.display(),
            sys::name(e)
        );
    }
    let node = format!("{}p{nr}", device.display());
    for _ in 0..100 {
        if Path::new(&node).exists() {
            return open(Path::new(&node), libc::O_RDWR | libc::O_DIRECT);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("{node} did not appear")
}
