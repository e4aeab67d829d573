// SPDX-License-Identifier: GPL-2.0-only

//! Preloaded into a program, attaches its sockets to a store.
//!
//! | file | noun |
//! | --- | --- |
//! | `preload.rs` | the functions that replace the C library's |
//! | `guest.rs` | the program that we are in: its environment, errno, system calls |
//! | `words.rs` | what the launcher says |
//!
//! This runs inside programs that do not expect it, in their threads, signal handlers and
//! children between `fork()` and `exec()`. So after the start it allocates nothing, takes no
//! lock, keeps no descriptor open between two calls, makes no call that is a point of
//! cancellation but the one that it replaces, and leaves errno as that left it. It has no
//! panic: what it is given is passed on and not looked at.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

use libc::{c_int, sockaddr, socklen_t};

mod guest;
mod words;

use guest::{Errno, Fd};

/// Whether sockets of a family and type may be attached: TCP, and UDP where the module does.
/// The store decides; others are not even asked for.
fn may_be_attached(family: c_int, kind: c_int) -> bool {
    // The type has flags above it: SOCK_CLOEXEC, SOCK_NONBLOCK.
    const TYPE: c_int = 0xf;
    matches!(family, libc::AF_INET | libc::AF_INET6)
        && matches!(kind & TYPE, libc::SOCK_STREAM | libc::SOCK_DGRAM)
}

/// Attaches it. An error is the program's only if that was asked for.
fn attach(fd: Fd) -> Result<(), Errno> {
    let Some(store) = guest::store() else {
        return Ok(());
    };
    let (counter, answer) = match fd.attach(store) {
        Ok(()) => (words::ATTACHED, Ok(())),
        // By another thread, or by the program itself, to this store.
        Err(Errno(libc::EALREADY)) => return Ok(()),
        Err(Errno(libc::EOPNOTSUPP)) => (words::PLAIN, Ok(())),
        Err(e) => (words::FAILED, Err(e)),
    };
    guest::count(counter, answer);
    guest::say(fd, counter, answer);
    if guest::requires() {
        answer
    } else {
        Ok(())
    }
}

/// Attaches a socket that came another way than by `socket()`: from another process, or by a
/// system call of the program's own.
fn attach_late(fd: Fd) -> Result<(), Errno> {
    if guest::store().is_none() || fd.is_attached() {
        return Ok(());
    }
    match fd.family_and_type() {
        Some((family, kind)) if may_be_attached(family, kind) => attach(fd),
        _ => Ok(()),
    }
}

/// What the program's start does: sockets that it was given are attached as well, those of
/// socket activation for example.
fn started() {
    if guest::store().is_some() {
        guest::each_descriptor(|fd| {
            // There is nobody to tell.
            let _ = attach_late(fd);
        });
    }
}

/// Runs `f`, and then leaves errno as it was before.
fn silently<R>(f: impl FnOnce() -> R) -> R {
    let errno = Errno::last();
    let result = f();
    errno.set();
    result
}

/// As the C library's, and then the socket is attached.
#[no_mangle]
pub extern "C" fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int {
    let fd = guest::next_socket(family, kind, protocol);
    if fd < 0 || !may_be_attached(family, kind) {
        return fd;
    }
    match silently(|| attach(Fd(fd))) {
        Ok(()) => fd,
        Err(e) => {
            Fd(fd).close();
            e.set();
            -1
        }
    }
}

/// As the C library's, of a socket that is attached before.
#[no_mangle]
pub extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    match silently(|| attach_late(Fd(fd))) {
        Ok(()) => guest::next_listen(fd, backlog),
        Err(e) => {
            e.set();
            -1
        }
    }
}

/// As the C library's, of a socket that is attached before.
///
/// # Safety
///
/// As of the C library's.
#[no_mangle]
pub unsafe extern "C" fn connect(fd: c_int, to: *const sockaddr, len: socklen_t) -> c_int {
    match silently(|| attach_late(Fd(fd))) {
        // SAFETY: as the caller says.
        Ok(()) => unsafe { guest::next_connect(fd, to, len) },
        Err(e) => {
            e.set();
            -1
        }
    }
}
