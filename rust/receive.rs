// SPDX-License-Identifier: GPL-2.0

//! `recvmsg()` of a TCP socket in descriptor mode.
//!
//! - The answer is the number of bytes described; they are consumed, unless this is a `MSG_PEEK`,
//!   whose tokens are its own. Nothing is written to the iovec, but the first bytes if
//!   `PMSKB_RX_COPY` says so; if it does not, its length bounds how many bytes are described, if it
//!   is not 0.
//! - Only whole control messages are written. `EMSGSIZE` if data is waiting and there is no room
//!   for one.
//! - Waiting, `SO_RCVLOWAT`, `SO_RCVTIMEO`, `MSG_DONTWAIT`, `MSG_WAITALL`, signals and errors are
//!   as in any receive; what has been described is never lost to an error.
//! - Urgent data ends a receive; out of line its byte is skipped, as `recv()` does.
//! - `EDQUOT`: the socket holds as many tokens as it may, or as many frames and has to copy.
//!   `ENOBUFS`: no frames to copy into. Nothing was consumed. `EIO`: the store is gone.
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
use kernel::{
    bindings,
    ffi::{c_int, c_long},
    prelude::*,
};

/// Where a receive stands.
struct Progress {
    /// Bytes described.
    done: usize,
    /// Bytes that are still to be copied, too.
    first: usize,
    /// Of a peek, how far from the next byte on it has come: an urgent byte may be between.
    peeked: Option<usize>,
}

/// Describes what is in the receive queue now, at most `limit` bytes: why it ended.
fn pass(
    locked: &mut Stream<'_>,
    ctx: &Ctx,
    control: &mut Control,
    progress: &mut Progress,
    mut limit: usize,
) -> Result<End> {
    let peeked = progress.peeked;
    if ctx.auto() {
        let (ready, result) = auto::persist(locked, ctx);
        let from = peeked.unwrap_or(0);
        // An urgent byte that is passed over is one of them.
        let from = from.saturating_add(usize::from(locked.passes_urgent(from)));
        if ready <= from {
            result?;
        }
        limit = limit.min(ready.saturating_sub(from));
        if limit == 0 {
            return Ok(End::Drained);
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
        first: progress.first,
        limit,
        end: End::Drained,
    };
    let result = match &mut progress.peeked {
        None => consume(locked, &mut pass),
        Some(peeked) => peek(locked, &mut pass, peeked),
    };
    progress.first = pass.first;
    let end = pass.end;
    ctx.tokens_changed(&own);
    ctx.put_own(locked, own);
    progress.done += result?;
    Ok(end)
}

/// Describes bytes and takes them out of the queue: how many.
fn consume(locked: &mut Stream<'_>, pass: &mut Pass<'_>) -> Result<usize> {
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
    result
}

/// Describes bytes from `peeked` on, which moves, and leaves them where they are: how many.
fn peek(locked: &mut Stream<'_>, pass: &mut Pass<'_>, peeked: &mut usize) -> Result<usize> {
    let start = locked.copied_seq();
    let queued = locked.queue_end().wrapping_sub(start) as usize;
    let urgent = locked.before_urgent(start) as usize;
    // As `recv()` does, it ends before the urgent byte, or begins with it, or after it.
    let mut from = *peeked;
    if from == urgent && !locked.urgent_in_line() {
        from += 1;
    }
    if from < urgent {
        pass.limit = pass.limit.min(urgent - from);
    }
    let from = u32::try_from(from.min(queued)).map_err(|_| EINVAL)?;
    let mut done = 0;
    let looked = locked.look(start.wrapping_add(from), &mut |skb, off, len| {
        let n = pass.describe(skb, off, len);
        done += n as usize;
        Ok(n == len && matches!(pass.end, End::Drained))
    });
    if done > 0 {
        *peeked = from as usize + done;
    }
    looked.map(|()| done)
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
    let peek = flags & bindings::MSG_PEEK != 0;
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
        len if len > 0 && ctx.copies() == 0 => len.min(c_int::MAX as usize),
        _ => c_int::MAX as usize,
    };
    let target = if flags & bindings::MSG_WAITALL != 0 {
        limit
    } else {
        locked.low_water().min(limit)
    };
    let mut timeout = locked.timeout(flags & bindings::MSG_DONTWAIT != 0);
    let mut progress = Progress {
        done: 0,
        first: ctx.copies().min(control.room()),
        peeked: peek.then(|| locked.peek_offset()),
    };
    let done = loop {
        let at = locked.copied_seq() as usize + progress.peeked.unwrap_or(0);
        let end = match progress.done > 0 && locked.before_urgent(at as u32) == 0 {
            true => End::Full,
            false => {
                let left = limit - progress.done;
                pass(&mut locked, ctx, &mut control, &mut progress, left).unwrap_or_else(End::Error)
            }
        };
        let done = progress.done;
        let over = match end {
            End::Drained => done >= target || (done > 0 && ended(&locked, timeout)),
            End::Full if done == 0 => return Err(errno(bindings::EMSGSIZE)),
            End::Error(e) if done == 0 => return Err(e),
            End::Full | End::Error(_) => true,
        };
        if over {
            break done;
        }
        if done == 0 {
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
            Err(_) if done > 0 => break done,
            Err(e) => return Err(e),
        }
        if ctx.auto() {
            drop(locked);
            turn = Some(ctx.turn.lock());
            // SAFETY: As the caller says.
            locked = unsafe { Stream::new(sk) };
        }
    };
    locked.peek_moved(done, peek);
    Ok(done)
}

/// There is no use in waiting for more.
pub(crate) fn ended(locked: &Stream<'_>, timeout: c_long) -> bool {
    timeout == 0
        || locked.has_error()
        || locked.is_closed()
        || locked.stopped()
        || sock::interrupted(timeout).is_some()
}
