// SPDX-License-Identifier: GPL-2.0

//! `recvmsg()` of a UDP socket in descriptor mode.
//!
//! - One call, one datagram, all of it: the answer is its length, and nothing is written to the
//!   iovec, whose length does not matter. One without payload has no descriptor.
//! - Descriptors come first in the control buffer, then what UDP has to tell. `EMSGSIZE` if there
//!   is not room for all descriptors; nothing was consumed. What else finds no room is lost, and
//!   `MSG_CTRUNC` says so, as in any receive.
//! - Waiting, `SO_RCVTIMEO`, `MSG_DONTWAIT`, signals, pending errors and wrong checksums are as
//!   with UDP's own.
//! - `EDQUOT`: the socket holds as many tokens as it may, or as many frames and has to copy.
//!   `ENOBUFS`: no frames to copy into. `EIO`: the store is gone. `EFAULT`. Nothing was consumed.
//!   `EOPNOTSUPP`: `MSG_PEEK`.
//!
//! A datagram stays in the queue until it has been described, so that whatever goes wrong before
//! does not lose it. If somebody who receives bytes takes it meanwhile, its tokens are taken back
//! and the next one is described.
//!
//! Process context. The socket's lock is held while one is described, and not while waiting.

use crate::{
    attach::Ctx,
    bindings as ext,
    descriptor::{Control, End, Made, Pass, Source},
    sock::{errno, Datagram, First, Locked},
};
use core::ptr::NonNull;
use kernel::{bindings, ffi::c_int, prelude::*};

/// Describes a datagram, which stays where it is: its length. What was made before an error is in
/// `made`, and in the control buffer.
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
    let len = queued.len();
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
        limit: len as usize,
        end: End::Drained,
    };
    let done = pass.describe(&queued, 0, len);
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

/// `recvmsg()` in descriptor mode.
///
/// # Safety
///
/// `sk` is a UDP socket of ours whose file stays open, and that this thread has not locked; `msg`
/// is what `recvmsg()` was called with.
pub(crate) unsafe fn recvmsg(
    sk: NonNull<ext::sock>,
    msg: NonNull<bindings::msghdr>,
    flags: c_int,
) -> Result<usize> {
    const DONTWAIT: c_int = bindings::MSG_DONTWAIT as c_int;
    if flags & bindings::MSG_PEEK as c_int != 0 {
        return Err(errno(bindings::EOPNOTSUPP));
    }
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
            if ctx.own(&mut locked).store.is_none() {
                return Err(EIO);
            }
            // SAFETY: As the caller says.
            match unsafe { Datagram::first(sk, flags | DONTWAIT) } {
                Ok(First::Datagram(datagram)) => {
                    if !datagram.is_right() {
                        datagram.discard();
                        drop(locked);
                        crate::host::resched();
                        continue;
                    }
                    let mut made = Made::new();
                    let described = describe(&mut locked, ctx, &datagram, &mut control, &mut made);
                    let len = match described {
                        Ok(len) => len,
                        Err(e) => {
                            take_back(&mut locked, ctx, &made);
                            control.rewind(start);
                            return Err(e);
                        }
                    };
                    let Some(received) = datagram.take() else {
                        take_back(&mut locked, ctx, &made);
                        control.rewind(start);
                        continue;
                    };
                    drop(locked);
                    // SAFETY: `msg` is what `recvmsg()` was called with.
                    unsafe { received.tell(msg) };
                    return Ok(len as usize);
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
