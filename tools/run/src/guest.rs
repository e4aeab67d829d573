// SPDX-License-Identifier: GPL-2.0-only

//! The program that we are in, as far as we have to do with it: its environment at the start,
//! the C library's functions behind ours, errno, system calls.
//!
//! All that is unsafe is here.

use std::{
    cell::UnsafeCell,
    ffi::{c_char, c_int, c_long, c_void, CStr},
    mem::{size_of, transmute, MaybeUninit},
    ptr::{self, null_mut},
    sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use libc::{sockaddr, socklen_t};
use pmskb_uapi::sys;

use crate::words;

// ---- errno ----

/// A number of errno.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub c_int);

impl Errno {
    /// What the last call that failed has left.
    pub fn last() -> Self {
        // SAFETY: the C library's, of this thread.
        Self(unsafe { *libc::__errno_location() })
    }

    /// Leaves it for the caller.
    pub fn set(self) {
        // SAFETY: the C library's, of this thread.
        unsafe { *libc::__errno_location() = self.0 }
    }
}

/// What `syscall()` answers. It is no point of cancellation, as `open()` and `close()` are.
fn answer(result: c_long) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::last())
}

// ---- what the launcher said ----

/// A path, or none. The strings that the program was started with are not left alone: programs
/// write their titles there.
struct Path {
    bytes: UnsafeCell<[u8; words::PATH_MAX]>,
    is_set: AtomicBool,
}

// SAFETY: Written before `is_set`, by the start, which runs once and alone; then only read.
unsafe impl Sync for Path {}

impl Path {
    const fn new() -> Self {
        Self {
            bytes: UnsafeCell::new([0; words::PATH_MAX]),
            is_set: AtomicBool::new(false),
        }
    }

    /// One that is too long is not set; the launcher has refused it.
    fn set(&self, path: &[u8]) {
        if self.is_set.load(Acquire) || path.is_empty() || path.len() >= words::PATH_MAX {
            return;
        }
        // SAFETY: nobody reads before `is_set`, and only the start writes. There is room, and
        // for a NUL behind it.
        unsafe {
            let to = self.bytes.get().cast::<u8>();
            ptr::copy_nonoverlapping(path.as_ptr(), to, path.len());
        }
        self.is_set.store(true, Release);
    }

    fn get(&self) -> Option<&CStr> {
        if !self.is_set.load(Acquire) {
            return None;
        }
        // SAFETY: nobody writes any more, and the last byte at least is a NUL.
        Some(unsafe { CStr::from_ptr(self.bytes.get().cast::<c_char>()) })
    }
}

static STORE: Path = Path::new();
static REQUIRE: AtomicBool = AtomicBool::new(false);
static VERBOSE: AtomicBool = AtomicBool::new(false);
static AUTO: AtomicBool = AtomicBool::new(false);
/// Of the file that was the standard error at the start. Later there may be anything.
static SAID_TO: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// The launcher's counters, mapped; null without.
static COUNTS: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());

/// The store's device node, if sockets are to be attached.
pub fn store() -> Option<&'static CStr> {
    STORE.get()
}

/// Whether an error of attaching is the program's.
pub fn requires() -> bool {
    REQUIRE.load(Relaxed)
}

/// What the dynamic linker calls before the program, with what that was started with.
#[used]
#[link_section = ".init_array"]
static START: unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) = start;

/// # Safety
///
/// As the dynamic linker calls a constructor, once: nobody else has a thread yet.
unsafe extern "C" fn start(_argc: c_int, _argv: *const *const c_char, envp: *const *const c_char) {
    let errno = Errno::last();
    let mut at = envp;
    // SAFETY: pointers to strings, the last of them null.
    while let Some(variable) = unsafe { at.as_ref().filter(|v| !v.is_null()) } {
        // SAFETY: one of those.
        let variable = unsafe { CStr::from_ptr(*variable) }.to_bytes();
        let value = |name: &str| {
            let rest = variable.strip_prefix(name.as_bytes())?;
            rest.strip_prefix(b"=")
        };
        if let Some(path) = value(words::STORE) {
            STORE.set(path);
        } else if value(words::REQUIRE).is_some() {
            REQUIRE.store(true, Relaxed);
        } else if value(words::AUTO).is_some() {
            AUTO.store(true, Relaxed);
        } else if value(words::VERBOSE).is_some() {
            VERBOSE.store(true, Relaxed);
        } else if let Some(path) = value(words::COUNTS) {
            map_counts(path);
        }
        // SAFETY: it is not the last.
        at = unsafe { at.add(1) };
    }
    for (next, name) in [
        (&NEXT_SOCKET, c"socket"),
        (&NEXT_LISTEN, c"listen"),
        (&NEXT_CONNECT, c"connect"),
    ] {
        // SAFETY: a name; looked up behind us.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
        next.store(found, Relaxed);
    }
    if let Some(stat) = Fd(libc::STDERR_FILENO).stat() {
        // A peer of the program's own must not be told anything: inetd's, for one.
        let of_network = Fd(libc::STDERR_FILENO)
            .family_and_type()
            .is_some_and(|(family, _)| family != libc::AF_UNIX);
        if !of_network {
            SAID_TO[0].store(stat.0, Relaxed);
            SAID_TO[1].store(stat.1, Relaxed);
        }
    }
    crate::started();
    errno.set();
}

// ---- the C library's functions behind ours ----

static NEXT_SOCKET: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
static NEXT_LISTEN: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
static NEXT_CONNECT: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

/// `socket()`. Before our start, or in a program without it, the system call.
pub fn next_socket(family: c_int, kind: c_int, protocol: c_int) -> c_int {
    let next = NEXT_SOCKET.load(Relaxed);
    if next.is_null() {
        // SAFETY: numbers only.
        return unsafe { libc::syscall(libc::SYS_socket, family, kind, protocol) as c_int };
    }
    // SAFETY: what `dlsym()` found by that name has that type.
    unsafe {
        let next: extern "C" fn(c_int, c_int, c_int) -> c_int = transmute(next);
        next(family, kind, protocol)
    }
}

/// `listen()`.
pub fn next_listen(fd: c_int, backlog: c_int) -> c_int {
    let next = NEXT_LISTEN.load(Relaxed);
    if next.is_null() {
        // SAFETY: numbers only.
        return unsafe { libc::syscall(libc::SYS_listen, fd, backlog) as c_int };
    }
    // SAFETY: what `dlsym()` found by that name has that type.
    unsafe {
        let next: extern "C" fn(c_int, c_int) -> c_int = transmute(next);
        next(fd, backlog)
    }
}

/// `connect()`.
///
/// # Safety
///
/// As of the C library's.
pub unsafe fn next_connect(fd: c_int, to: *const sockaddr, len: socklen_t) -> c_int {
    let next = NEXT_CONNECT.load(Relaxed);
    if next.is_null() {
        // SAFETY: as the caller says.
        return unsafe { libc::syscall(libc::SYS_connect, fd, to, len) as c_int };
    }
    // SAFETY: what `dlsym()` found by that name has that type; the rest is the caller's.
    unsafe {
        let next: unsafe extern "C" fn(c_int, *const sockaddr, socklen_t) -> c_int =
            transmute(next);
        next(fd, to, len)
    }
}

// ---- descriptors ----

/// A descriptor of the program's, or a number that it took for one.
#[derive(Clone, Copy)]
pub struct Fd(pub c_int);

fn open(path: &CStr, flags: c_int) -> Result<Fd, Errno> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY;
    // SAFETY: a string and numbers.
    let result = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags) };
    Ok(Fd(answer(result)? as c_int))
}

impl Fd {
    /// Closes it.
    pub fn close(self) {
        // SAFETY: those who call this opened it.
        unsafe { libc::syscall(libc::SYS_close, self.0) };
    }

    /// Attaches it to the store, which is opened for that: a program may close, or need, all
    /// numbers of descriptors, and may only do to the store what it may do to the node.
    pub fn attach(self, store: &CStr) -> Result<(), Errno> {
        let store = open(store, libc::O_RDWR)?;
        // SAFETY: the request reads an int.
        let result = unsafe {
            let request = sys::IOC_ATTACH_SOCKET as c_long;
            answer(libc::syscall(
                libc::SYS_ioctl,
                store.0,
                request,
                &raw const self.0,
            ))
        };
        store.close();
        result?;
        if AUTO.load(Relaxed) {
            self.persist_all()?;
        }
        Ok(())
    }

    /// What it receives is to be in the log before the program gets it.
    fn persist_all(self) -> Result<(), Errno> {
        let on = 1u32;
        // SAFETY: a number, and its size.
        answer(unsafe {
            libc::syscall(
                libc::SYS_setsockopt,
                self.0,
                sys::SOL_PMSKB as c_int,
                sys::PMSKB_AUTO_PERSIST as c_int,
                &raw const on,
                size_of_val(&on),
            )
        })
        .map(drop)
    }

    fn option<T: Default>(self, level: c_int, name: c_int) -> Option<T> {
        let mut value = T::default();
        let mut len = size_of::<T>() as socklen_t;
        // SAFETY: the kernel writes at most `len` bytes; who calls this names integers.
        let result = unsafe {
            libc::syscall(
                libc::SYS_getsockopt,
                self.0,
                level,
                name,
                &raw mut value,
                &raw mut len,
            )
        };
        (result == 0).then_some(value)
    }

    /// It is a socket of the module's already.
    pub fn is_attached(self) -> bool {
        let info: Option<sys::pmskb_sock_info> =
            self.option(sys::SOL_PMSKB as c_int, sys::PMSKB_INFO as c_int);
        info.is_some_and(|info| info.store != u32::MAX)
    }

    /// The family and type of a socket; none of anything else.
    pub fn family_and_type(self) -> Option<(c_int, c_int)> {
        let family = self.option(libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        Some((family, self.option(libc::SOL_SOCKET, libc::SO_TYPE)?))
    }

    /// Device and inode.
    fn stat(self) -> Option<(u64, u64)> {
        let mut stat = MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: the kernel fills it. Unlike `fstat()` this is the same in every C library.
        let result = unsafe { libc::syscall(libc::SYS_fstat, self.0, stat.as_mut_ptr()) };
        if result != 0 {
            return None;
        }
        // SAFETY: filled, and zeros would do.
        let stat = unsafe { stat.assume_init() };
        Some((stat.st_dev, stat.st_ino))
    }
}

/// Calls `f` for each descriptor that is open.
pub fn each_descriptor(mut f: impl FnMut(Fd)) {
    let Ok(dir) = open(c"/proc/self/fd", libc::O_RDONLY | libc::O_DIRECTORY) else {
        return;
    };
    let mut buffer = [0u64; 128];
    loop {
        // SAFETY: the kernel writes no more than there is room for.
        let result = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                dir.0,
                buffer.as_mut_ptr(),
                size_of_val(&buffer),
            )
        };
        let Ok(len @ 1..) = answer(result) else {
            break;
        };
        // SAFETY: bytes of the buffer.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), len) };
        let mut at = 0;
        // Inode, offset, length of the entry, type, and the name, which ends with a NUL.
        while let Some(entry) = bytes.get(at..) {
            let Some(&[low, high]) = entry.get(16..18) else {
                break;
            };
            let name = entry.get(19..).unwrap_or(&[]);
            let digits = name.iter().take_while(|b| b.is_ascii_digit());
            let number = digits.fold(None, |number: Option<c_int>, digit| {
                number
                    .unwrap_or(0)
                    .checked_mul(10)?
                    .checked_add(c_int::from(*digit - b'0'))
            });
            if let Some(number) = number.filter(|n| *n != dir.0) {
                f(Fd(number));
            }
            match u16::from_ne_bytes([low, high]) {
                0 => break,
                len => at += usize::from(len),
            }
        }
    }
    dir.close();
}

// ---- what is said ----

fn map_counts(path: &[u8]) {
    let copy = Path::new();
    copy.set(path);
    let Some(path) = copy.get() else {
        return;
    };
    // Of another user, or in a name space of processes of its own: not counted then.
    let Ok(file) = open(path, libc::O_RDWR) else {
        return;
    };
    // SAFETY: a new mapping, of a file that is as long and stays so.
    let map = unsafe {
        libc::mmap(
            null_mut(),
            words::COUNTS_LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.0,
            0,
        )
    };
    file.close();
    if map != libc::MAP_FAILED {
        COUNTS.store(map.cast(), Release);
    }
}

/// Counts a socket.
pub fn count(counter: usize, answer: Result<(), Errno>) {
    let counts = COUNTS.load(Acquire);
    if counts.is_null() {
        return;
    }
    // SAFETY: it is mapped for good, and `words` names its elements.
    let counts = unsafe { std::slice::from_raw_parts(counts, words::COUNTS_NR) };
    if let Some(counter) = counts.get(counter) {
        counter.fetch_add(1, Relaxed);
    }
    if let (Err(Errno(e)), Some(last)) = (answer, counts.get(words::ERRNO)) {
        last.store(e.unsigned_abs().into(), Relaxed);
    }
}

/// A line of text in the making; what finds no room is left out.
struct Line {
    bytes: [u8; 128],
    len: usize,
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(to) = self.bytes.get_mut(self.len) {
                *to = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u32) {
        let mut digits = [0u8; 10];
        let mut left = number;
        let mut first = digits.len();
        for (at, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + (left % 10) as u8;
            left /= 10;
            first = at;
            if left == 0 {
                break;
            }
        }
        self.text(digits.get(first..).unwrap_or(&[]));
    }
}

/// Says what became of a socket, if that was asked for: one line, in one write, to what was the
/// standard error at the start, if it still is.
pub fn say(fd: Fd, counter: usize, answer: Result<(), Errno>) {
    if !VERBOSE.load(Relaxed) {
        return;
    }
    let (device, inode) = (SAID_TO[0].load(Relaxed), SAID_TO[1].load(Relaxed));
    if (device, inode) == (0, 0) || Fd(libc::STDERR_FILENO).stat() != Some((device, inode)) {
        return;
    }
    let mut line = Line {
        bytes: [0; 128],
        len: 0,
    };
    // SAFETY: no arguments.
    let pid = unsafe { libc::syscall(libc::SYS_getpid) };
    line.text(b"pmskb-run: process ");
    line.number(pid as u32);
    line.text(b", descriptor ");
    line.number(fd.0.unsigned_abs());
    match (counter, answer) {
        (words::ATTACHED, _) => line.text(b": attached\n"),
        (_, Err(Errno(e))) => {
            line.text(b": not attached, errno ");
            line.number(e.unsigned_abs());
            line.text(b"\n");
        }
        _ => line.text(b": not of a kind that can be attached\n"),
    }
    // SAFETY: bytes of the line. What could not be said is not said.
    unsafe {
        libc::syscall(
            libc::SYS_write,
            libc::STDERR_FILENO,
            line.bytes.as_ptr(),
            line.len,
        )
    };
}
