// SPDX-License-Identifier: GPL-2.0

//! `recvmsg()` of a UDP socket in descriptor mode, or with auto-persist.
//!
//! With auto-persist a datagram has its record before anything of it is given out. In bytes that is
//! then as UDP's own; in descriptors:
//!
//! - One call, one datagram, all of it: the answer is its length. Nothing is written to the iovec,
//!   but the first bytes if `PMSKB_RX_COPY` says so. One without payload has no descriptor.
//! - Descriptors come first in the control buffer, then what UDP has to tell. `EMSGSIZE` if there
//!   is not room for all descriptors; nothing was consumed. What else finds no room is lost, and
//!   `MSG_CTRUNC` says so, as in any receive.
//! - Waiting, `SO_RCVTIMEO`, `MSG_DONTWAIT`, signals, pending errors and wrong checksums are as
//!   with UDP's own.
//! - `EDQUOT`: the socket holds as many tokens as it may, or as many frames and has to copy.
//!   `ENOBUFS`: no frames to copy into. `EIO`: the store is gone. `EFAULT`. Nothing was consumed.
//! - `MSG_PEEK` leaves the datagram where it is, with tokens of the call's own.
//!
//! A datagram stays in the queue until it has been described, so that whatever goes wrong before
//! does not lose it. If somebody who receives bytes takes it meanwhile, its tokens are taken back
//! and the next one is described.
//!
//! Process context. The socket's lock is held while one is described, and not while waiting.

use crate::{
    attach::Ctx,
    auto, bindings as ext,
    descriptor::{Control, End, Made, Pass, Source},
    sock::{errno, Datagram, First, Locked, Received},
};
use core::ptr::NonNull;
use kernel::{bindings, ffi::c_int, prelude::*};

/// Describes a datagram, which stays where it is: how many bytes. What was made before an error is
/// in `made`, and in the control buffer.
fn describe(
    locked: &mut Locked<'_>,
    ctx: &Ctx,
    datagram: &Datagram<'_>,
    control: &mut Control,
    made: &mut Made,
) -> Result<u32> {
    let Some(store) = ctx.own(locked).store.clone() else {
        return Err(EIO);
    };
    let own = ctx.own(locked);
    let queued = datagram.queued(own.copied | 1 << 31);
    let off = datagram.off();
    let len = queued.len().saturating_sub(off);
    if len == 0 {
        return Ok(0);
    }
    let _inside = store.enter()?;
    own.copied = own.copied.wrapping_add(1);
    let flow = datagram.flow();
    let mut pass = Pass {
        source: Source {
            ctx,
            store: &store,
            cursor: &mut own.cursor,
        },
        tokens: &mut own.tokens,
        control,
        flow: Some(&flow),
        made: Some(made),
        first: ctx.copies(),
        limit: len as usize,
        end: End::Drained,
    };
    let room = pass.control.room();
    pass.first = pass.first.min(room);
    let done = pass.describe(&queued, off, len);
    let end = pass.end;
    ctx.tokens_changed(own);
    match end {
        End::Error(e) => Err(e),
        _ if done < len => Err(errno(bindings::EMSGSIZE)),
        _ => Ok(len),
    }
}

/// Gives back what was made for a datagram that is not received after all.
fn take_back(locked: &mut Locked<'_>, ctx: &Ctx, made: &Made) {
    let own = ctx.own(locked);
    if let Some(store) = own.store.clone() {
        for token in made.tokens() {
            let _ = own.tokens.release(store.frames(), *token);
        }
        ctx.tokens_changed(own);
    }
}

/// Gives out the bytes of a datagram as UDP does: what the call answers. `EFAULT`: they are lost, as
/// with UDP.
///
/// # Safety
///
/// `msg`, of which `control` is, is what `recvmsg()` was called with; `len` is of its iovec. The
/// socket is not locked.
unsafe fn give(
    received: Received<'_>,
    control: &mut Control,
    len: usize,
    flags: c_int,
) -> Result<usize> {
    let whole = received.queued().len() as usize;
    let left = received.left() as usize;
    let n = len.min(left);
    if len <= left && n < whole {
        control.truncated();
    }
    if let Err(e) = control.copy(&received.queued(), received.off(), n as u32) {
        received.lost();
        return Err(e);
    }
    let answer = match flags & bindings::MSG_TRUNC as c_int {
        0 => n,
        _ => whole,
    };
    // SAFETY: As the caller says.
    unsafe { received.tell(control.raw(), answer) };
    Ok(answer)
}

/// `recvmsg()` in descriptor mode (`describes`), or in bytes with auto-persist.
///
/// # Safety
///
/// `sk` is a UDP socket of ours whose file stays open, and that this thread has not locked; `msg`
/// is what `recvmsg()` was called with, `len` the length of its iovec.
pub(crate) unsafe fn recvmsg(
    sk: NonNull<ext::sock>,
    msg: NonNull<bindings::msghdr>,
    len: usize,
    flags: c_int,
    describes: bool,
) -> Result<usize> {
    const DONTWAIT: c_int = bindings::MSG_DONTWAIT as c_int;
    let peek = flags & bindings::MSG_PEEK as c_int != 0;
    // SAFETY: As the caller says.
    if unsafe { ext::pmskb_udp_tell_mtu(sk.as_ptr(), msg.as_ptr()) } {
        return Ok(0);
    }
    // SAFETY: As the caller says; it is lent to `tell` below only after its last use.
    let mut control = unsafe { Control::new(msg) };
    let start = control.mark();
    loop {
        {
            // SAFETY: As the caller says.
            let mut locked = unsafe { Locked::new(sk) };
            let ctx = locked.ctx().ok_or(EIO)?;
            if describes && ctx.own(&mut locked).store.is_none() {
                return Err(EIO);
            }
            // SAFETY: As the caller says.
            match unsafe { Datagram::first(sk, flags | DONTWAIT) } {
                Ok(First::Datagram(datagram)) => {
                    if !datagram.is_right() {
                        auto::discarding(&mut locked, ctx, &datagram);
                        datagram.discard();
                        drop(locked);
                        crate::host::resched();
                        continue;
                    }
                    if ctx.auto() && !auto::is_recorded(&mut locked, ctx, &datagram) {
                        drop(datagram);
                        auto::persist_datagrams(&mut locked, ctx)?;
                        drop(locked);
                        crate::host::resched();
                        continue;
                    }
                    let mut made = Made::new();
                    let mut described = Ok(0);
                    if describes {
                        described = describe(&mut locked, ctx, &datagram, &mut control, &mut made);
                    }
                    let received = match (&described, peek) {
                        (Err(_), _) => None,
                        (_, true) => Some(datagram.peek()),
                        (_, false) => datagram.take(),
                    };
                    let Some(received) = received else {
                        take_back(&mut locked, ctx, &made);
                        control.take_back(start);
                        // Or somebody else has taken it.
                        described?;
                        continue;
                    };
                    if !peek {
                        auto::taken(&mut locked, ctx, &received);
                    }
                    drop(locked);
                    if !describes {
                        // SAFETY: As the caller says.
                        return unsafe { give(received, &mut control, len, flags) };
                    }
                    let len = described? as usize;
                    // SAFETY: `msg` is what `recvmsg()` was called with.
                    unsafe { received.tell(msg, len) };
                    return Ok(len);
                }
                Ok(First::End) => return Ok(0),
                Err(e) if e == EAGAIN && flags & DONTWAIT == 0 => {}
                Err(e) => return Err(e),
            }
        }
        // Waits as UDP does; what it finds may be somebody else's by the time that we have it.
        // SAFETY: As the caller says.
        match unsafe { Datagram::first(sk, flags) }? {
            First::Datagram(_) => {}
            First::End => return Ok(0),
        }
    }
}
