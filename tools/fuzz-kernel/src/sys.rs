// SPDX-License-Identifier: GPL-2.0-only

//! System calls with numbers for everything, right or wrong, and memory for the kernel to
//! read and write that no Rust reference points to.

use std::{cell::Cell, io, ptr};

/// What a call returned, or its errno.
pub type Res = Result<i64, i32>;

/// A system call as it is.
///
/// What the kernel may write to is never memory of Rust's: addresses are those of an
/// [`Arena`], of mappings of a store or a buffer, of nothing, or of the kernel. The few that are
/// given a local variable are wrapped below.
pub fn call(nr: libc::c_long, args: [u64; 6]) -> Res {
    // SAFETY: as said above; all else that a call does is to descriptors and mappings that
    // nothing of Rust's owns.
    let r = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) };
    if r == -1 {
        Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(r)
    }
}

/// Up to six arguments.
#[macro_export]
macro_rules! syscall {
    ($nr:ident $(, $arg:expr)* $(,)?) => {{
        let mut args = [0u64; 6];
        let given = [$($arg as u64),*];
        args[..given.len()].copy_from_slice(&given);
        $crate::sys::call(libc::$nr, args)
    }};
}

/// Bytes of a structure.
pub fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    let at = ptr::from_ref(value).cast();
    // SAFETY: it is initialised as a whole: structures of the interface have no padding, and
    // those of libc are made of zeroes.
    unsafe { std::slice::from_raw_parts(at, size_of::<T>()) }.to_vec()
}

/// A structure of zeroes, of libc or of the interface.
pub trait Zeroed: Copy {
    /// All zero.
    fn zeroed() -> Self {
        // SAFETY: only implemented for structures of integers and pointers.
        unsafe { std::mem::zeroed() }
    }
}
impl Zeroed for libc::msghdr {}
impl Zeroed for libc::mmsghdr {}
impl Zeroed for libc::cmsghdr {}
impl Zeroed for libc::sockaddr_in {}
impl Zeroed for libc::sockaddr_in6 {}

/// Memory that the kernel reads and writes: pages that can be written, with one that cannot be
/// touched on either side, a page that can only be read, and single ones.
pub struct Arena {
    base: u64,
    next: Cell<u64>,
    last: Cell<u64>,
}

const PAGE: u64 = 4096;
/// Pages that can be written.
const PAGES: u64 = 256;
/// Single pages that can be written, with nothing behind each; before them one to be read only.
const ENDS: u64 = 64;

impl Arena {
    /// A new one. It stays for good, as requests that are under way may write to it.
    pub fn new() -> io::Result<Self> {
        let len = (PAGES + 4 + 2 * ENDS) * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let map = syscall!(SYS_mmap, 0, len, libc::PROT_NONE, flags, -1i64, 0);
        let at = map.map_err(io::Error::from_raw_os_error)? as u64;
        let both = libc::PROT_READ | libc::PROT_WRITE;
        for (from, pages, prot) in [(1, PAGES, both), (PAGES + 2, 1, libc::PROT_READ)] {
            syscall!(SYS_mprotect, at + from * PAGE, pages * PAGE, prot)
                .map_err(io::Error::from_raw_os_error)?;
        }
        for end in 0..ENDS {
            let page = at + (PAGES + 4 + 2 * end) * PAGE;
            syscall!(SYS_mprotect, page, PAGE, both).map_err(io::Error::from_raw_os_error)?;
        }
        Ok(Arena {
            base: at + PAGE,
            next: Cell::new(0),
            last: Cell::new(0),
        })
    }

    /// Room for so many bytes, aligned to 8. It begins anew when it is full.
    pub fn room(&self, len: u64) -> u64 {
        assert!(len <= PAGES * PAGE);
        let mut at = self.next.get();
        if at + len > PAGES * PAGE {
            at = 0;
        }
        self.next.set((at + len).next_multiple_of(8));
        self.base + at
    }

    /// Bytes, somewhere in it.
    pub fn place(&self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len() as u64);
        self.put(at, bytes);
        at
    }

    /// Bytes behind which is nothing, if they fit a page.
    pub fn place_last(&self, bytes: &[u8]) -> u64 {
        if bytes.len() as u64 > PAGE {
            return self.place(bytes);
        }
        let nr = self.last.get() % ENDS;
        self.last.set(nr + 1);
        let at = self.base + (PAGES + 4 + 2 * nr) * PAGE - bytes.len() as u64;
        self.put(at, bytes);
        at
    }

    /// A page that can be read.
    pub fn read_only(&self) -> u64 {
        self.base + (PAGES + 1) * PAGE
    }

    /// What cannot be touched.
    pub fn nothing(&self) -> u64 {
        self.base + PAGES * PAGE
    }

    fn inside(&self, at: u64, len: usize) -> bool {
        let end = at + len as u64;
        let many = at >= self.base && end <= self.base + PAGES * PAGE;
        // Of the single ones, all within the same.
        let first = self.base + (PAGES + 3) * PAGE;
        let one = at >= first
            && end <= first + 2 * ENDS * PAGE
            && (at - first) % (2 * PAGE) + len as u64 <= PAGE;
        many || one
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.inside(at, bytes.len()));
        // SAFETY: within the pages that can be written, which nothing refers to.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) }
    }

    /// A copy of what is there.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(self.inside(at, len));
        let mut out = vec![0; len];
        // SAFETY: as in put().
        unsafe { ptr::copy_nonoverlapping(at as *const u8, out.as_mut_ptr(), len) }
        out
    }

    /// A structure that is there.
    pub fn get_as<T: Copy>(&self, at: u64) -> T {
        assert!(self.inside(at, size_of::<T>()));
        // SAFETY: within the pages that can be read; the interface's structures are of
        // integers, for which any bytes are right.
        unsafe { ptr::read_unaligned(at as *const T) }
    }
}

/// Reads from a descriptor, at an offset.
pub fn pread(fd: i32, to: &mut [u8], off: u64) -> Res {
    syscall!(SYS_pread64, fd, to.as_mut_ptr() as u64, to.len(), off)
}

/// Writes to a descriptor, at an offset.
pub fn pwrite(fd: i32, from: &[u8], off: u64) -> Res {
    syscall!(SYS_pwrite64, fd, from.as_ptr() as u64, from.len(), off)
}

/// Closes a descriptor.
pub fn close(fd: i32) -> Res {
    syscall!(SYS_close, fd)
}

/// Packets on every CPU: what was freed elsewhere and waits there, goes.
pub fn nudge(arena: &Arena) {
    let Ok(s) = crate::syscall!(SYS_socket, libc::AF_INET, libc::SOCK_DGRAM, 0) else {
        return;
    };
    let mut to = libc::sockaddr_in::zeroed();
    to.sin_family = libc::AF_INET as u16;
    to.sin_port = 9u16.to_be();
    to.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    let at = arena.place(&bytes_of(&to));
    let mask = arena.room(128);
    let size = crate::syscall!(SYS_sched_getaffinity, 0, 128, mask).unwrap_or(8);
    let all = arena.get(mask, size as usize);
    for cpu in 0..all.len() * 8 {
        if (all[cpu / 8] >> (cpu % 8)) & 1 == 0 {
            continue;
        }
        let mut one = vec![0; all.len()];
        one[cpu / 8] = 1 << (cpu % 8);
        let _ = crate::syscall!(SYS_sched_setaffinity, 0, one.len(), arena.place(&one));
        for _ in 0..2 {
            let _ = crate::syscall!(SYS_sendto, s, at, 1, 0, at, size_of::<libc::sockaddr_in>());
        }
    }
    let _ = crate::syscall!(SYS_sched_setaffinity, 0, all.len(), arena.place(&all));
    let _ = close(s as i32);
}

/// The name of an errno.
pub fn name(errno: i32) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::E2BIG, "E2BIG"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::EXDEV, "EXDEV"),
        (libc::ENODEV, "ENODEV"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENFILE, "ENFILE"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EFBIG, "EFBIG"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::ESPIPE, "ESPIPE"),
        (libc::EROFS, "EROFS"),
        (libc::EPIPE, "EPIPE"),
        (libc::ERANGE, "ERANGE"),
        (libc::ENAMETOOLONG, "ENAMETOOLONG"),
        (libc::EUNATCH, "EUNATCH"),
        (libc::EBADMSG, "EBADMSG"),
        (libc::EUCLEAN, "EUCLEAN"),
        (libc::ENOTSOCK, "ENOTSOCK"),
        (libc::EDESTADDRREQ, "EDESTADDRREQ"),
        (libc::EMSGSIZE, "EMSGSIZE"),
        (libc::ENOPROTOOPT, "ENOPROTOOPT"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EADDRINUSE, "EADDRINUSE"),
        (libc::ENOBUFS, "ENOBUFS"),
        (libc::EISCONN, "EISCONN"),
        (libc::ENOTCONN, "ENOTCONN"),
        (libc::ECONNRESET, "ECONNRESET"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
        (libc::EALREADY, "EALREADY"),
        (libc::EINPROGRESS, "EINPROGRESS"),
        (libc::ESTALE, "ESTALE"),
        (libc::EDQUOT, "EDQUOT"),
        (libc::EMEDIUMTYPE, "EMEDIUMTYPE"),
        (libc::ECANCELED, "ECANCELED"),
    ];
    let known = names.iter().find(|known| known.0 == errno);
    known.map_or(format!("errno {errno}"), |known| known.1.into())
}

/// A result in words.
pub fn shown(res: Res) -> String {
    match res {
        Ok(n) => n.to_string(),
        Err(e) => name(e),
    }
}

const BLKPG: u64 = 0x1269;

#[repr(C)]
#[derive(Clone, Copy)]
struct BlkpgArg {
    op: i32,
    flags: i32,
    len: i32,
    pad: i32,
    data: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BlkpgPartition {
    start: i64,
    len: i64,
    nr: i32,
    names: [u8; 128],
    pad: i32,
}

/// Makes partition `nr` of a block device, which is only in the kernel's memory. One of that
/// number goes.
pub fn partition(arena: &Arena, device: i32, nr: i32, start: u64, len: u64) -> Res {
    let part = BlkpgPartition {
        start: start as i64,
        len: len as i64,
        nr,
        names: [0; 128],
        pad: 0,
    };
    let data = arena.place(&bytes_of(&part));
    let arg = |op| BlkpgArg {
        op,
        flags: 0,
        len: size_of::<BlkpgPartition>() as i32,
        pad: 0,
        data,
    };
    let ioctl = |op| syscall!(SYS_ioctl, device, BLKPG, arena.place(&bytes_of(&arg(op))));
    let _ = ioctl(2);
    ioctl(1)
}

/// An io_uring of which one request at a time is waited for.
pub struct Ring(io_uring::IoUring);

impl Ring {
    /// A small one.
    pub fn new() -> io::Result<Self> {
        io_uring::IoUring::builder().build(16).map(Ring)
    }

    /// Carries requests out, in order if they are linked, and waits for so many completions, but
    /// not for longer than that. Their results, of those that there are.
    pub fn run(
        &mut self,
        requests: &[io_uring::squeue::Entry],
        wait: usize,
        ms: u32,
    ) -> Vec<(u64, i32)> {
        // SAFETY: requests point into an arena, which stays for good, or nowhere.
        if unsafe { self.0.submission().push_multiple(requests) }.is_err() {
            return Vec::new();
        }
        let limit = io_uring::types::Timespec::new()
            .sec(u64::from(ms / 1000))
            .nsec(ms % 1000 * 1_000_000);
        let args = io_uring::types::SubmitArgs::new().timespec(&limit);
        let _ = self.0.submitter().submit_with_args(wait, &args);
        self.0
            .completion()
            .map(|c| (c.user_data(), c.result()))
            .collect()
    }
}
