// SPDX-License-Identifier: GPL-2.0

//! `recvmsg()` of a TCP socket in descriptor mode.
//!
//! - The answer is the number of bytes described; they are consumed, and nothing is written to
//!   the iovec. Its length, if it is not 0, bounds how many bytes are described.
//! - Only whole control messages are written. `EMSGSIZE` if data is waiting and there is no room
//!   for one.
//! - Waiting, `SO_RCVLOWAT`, `SO_RCVTIMEO`, `MSG_DONTWAIT`, `MSG_WAITALL`, signals and errors are
//!   as in any receive; what has been described is never lost to an error.
//! - Urgent data ends a receive; out of line its byte is skipped, as `recv()` does.
//! - `EDQUOT`: the socket holds as many tokens as it may, or as many frames and has to copy.
//!   `ENOBUFS`: no frames to copy into. Nothing was consumed. `EIO`: the store is gone.
//!   `EOPNOTSUPP`: `MSG_PEEK`.
//!
//! Process context, under the socket's lock.

use crate::{
    attach::Ctx,
    auto, bindings as ext,
    descriptor::{Control, End, Pass, Source},
    skb::Queued,
    sock::{self, errno, Stream},
};
use core::ptr::NonNull;
use kernel::{bindings, ffi::c_int, prelude::*};

/// Describes what is in the receive queue now: bytes, and why it ended.
fn pass(
    locked: &mut Stream<'_>,
    ctx: &Ctx,
    control: &mut Control,
    mut limit: usize,
) -> Result<(usize, End)> {
    if ctx.auto() {
        let (ready, result) = auto::persist(locked, ctx);
        if ready == 0 {
            result?;
        }
        // An urgent byte that is passed over is one of them.
        limit = limit.min(ready.saturating_sub(usize::from(locked.passes_urgent())));
        if limit == 0 {
            return Ok((0, End::Drained));
        }
    }
    let Some(store) = ctx.own(locked).store.clone() else {
        return Err(EIO);
    };
    let _inside = store.enter()?;
    // Taken out while the lock is lent to the queue, and put back under the same lock.
    let mut own = ctx.take_own(locked);
    let mut pass = Pass {
        source: Source {
            ctx,
            store: &store,
            cursor: &mut own.cursor,
        },
        tokens: &mut own.tokens,
        control,
        flow: None,
        made: None,
        limit,
        end: End::Drained,
    };
    let mut actor = |skb: &Queued<'_>, off: u32, len: u32| match pass.end {
        End::Drained => Ok(pass.describe(skb, off, len)),
        _ => Ok(0),
    };
    let mut result = locked.read(&mut actor);
    if matches!(result, Ok(0)) && locked.at_urgent() {
        if locked.urgent_in_line() {
            result = locked.read_one(&mut actor);
            if let Ok(1) = result {
                // And what follows it, as `recv()` does.
                locked.urgent_passed();
                result = Ok(1 + locked.read(&mut actor).unwrap_or(0));
            }
        } else {
            // The byte is got with MSG_OOB, and is no part of the stream.
            locked.skip(1);
            locked.urgent_passed();
            result = locked.read(&mut actor);
        }
    }
    locked.urgent_passed();
    let end = pass.end;
    ctx.tokens_changed(&own);
    ctx.put_own(locked, own);
    Ok((result?, end))
}

/// `recvmsg()` in descriptor mode.
///
/// # Safety
///
/// `sk` is a TCP socket of ours that stays and that this thread has not locked; `msg` is valid.
pub(crate) unsafe fn recvmsg(
    sk: NonNull<ext::sock>,
    msg: NonNull<bindings::msghdr>,
    len: usize,
    flags: c_int,
) -> Result<usize> {
    let flags = flags as u32;
    if flags & bindings::MSG_PEEK != 0 {
        return Err(errno(bindings::EOPNOTSUPP));
    }
    // SAFETY: As the caller says.
    unsafe { ext::pmskb_sk_busy_loop(sk.as_ptr(), flags & bindings::MSG_DONTWAIT != 0) };
    // SAFETY: As the caller says; its file is open.
    let ctx = unsafe { Ctx::of(sk.as_ptr()) }.ok_or(EIO)?;
    let mut turn = ctx.auto().then(|| ctx.turn.lock());
    // SAFETY: As the caller says.
    let mut locked = unsafe { Stream::new(sk) };
    if locked.listens() {
        return Err(errno(bindings::ENOTCONN));
    }
    if locked.in_repair() {
        return Err(EPERM);
    }
    // SAFETY: `msg` is valid, says the caller.
    let mut control = unsafe { Control::new(msg) };
    let limit = match len {
        0 => c_int::MAX as usize,
        len => len.min(c_int::MAX as usize),
    };
    let target = if flags & bindings::MSG_WAITALL != 0 {
        limit
    } else {
        locked.low_water().min(limit)
    };
    let mut timeout = locked.timeout(flags & bindings::MSG_DONTWAIT != 0);
    let mut done = 0usize;
    loop {
        let urgent = done > 0 && locked.at_urgent();
        if !urgent {
            match pass(&mut locked, ctx, &mut control, limit - done) {
                Ok((n, end)) => {
                    done += n;
                    match end {
                        End::Drained => {}
                        End::Full if done > 0 => return Ok(done),
                        End::Full => return Err(errno(bindings::EMSGSIZE)),
                        End::Error(_) if done > 0 => return Ok(done),
                        End::Error(e) => return Err(e),
                    }
                }
                Err(_) if done > 0 => return Ok(done),
                Err(e) => return Err(e),
            }
        }
        if urgent || done >= target {
            return Ok(done);
        }
        if done > 0 {
            let ended = locked.has_error()
                || locked.is_closed()
                || locked.stopped()
                || timeout == 0
                || sock::interrupted(timeout).is_some();
            if ended {
                return Ok(done);
            }
        } else {
            if let Some(end) = locked.ended() {
                return end;
            }
            if timeout == 0 {
                return Err(EAGAIN);
            }
            if let Some(e) = sock::interrupted(timeout) {
                return Err(e);
            }
        }
        // Not while others wait for their turn.
        drop(turn.take());
        match locked.wait(&mut timeout) {
            Ok(()) => {}
            Err(_) if done > 0 => return Ok(done),
            Err(e) => return Err(e),
        }
        if ctx.auto() {
            drop(locked);
            turn = Some(ctx.turn.lock());
            // SAFETY: As the caller says.
            locked = unsafe { Stream::new(sk) };
        }
    }
}
