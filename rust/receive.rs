// SPDX-License-Identifier: GPL-2.0

//! Packet descriptors: `recvmsg()` of a socket in descriptor mode.
//!
//! Each control message says where some of the received bytes are, in one frame. Bytes that are
//! not in frames of the store (packets that came before the socket was attached, or could not be
//! placed) are copied into frames here, so that every descriptor has an extent.
//!
//! - The answer is the number of bytes described; they are consumed, and nothing is written to
//!   the iovec. Its length, if it is not 0, bounds how many bytes are described.
//! - Only whole control messages are written. `EMSGSIZE` if data is waiting and there is no room
//!   for one.
//! - Waiting, `SO_RCVLOWAT`, `SO_RCVTIMEO`, `MSG_DONTWAIT`, `MSG_WAITALL`, signals and errors are
//!   as in any receive; what has been described is never lost to an error.
//! - Urgent data ends a receive; out of line its byte is skipped, as `recv()` does.
//! - `ENOBUFS`: no frames to copy into, or too many tokens. Nothing was consumed. `EIO`: the store
//!   is gone. `EOPNOTSUPP`: `MSG_PEEK`.
//!
//! Process context, under the socket's lock.

use crate::{
    bindings as ext,
    note::{self, Note},
    place::{self, Cursor},
    skb::Queued,
    sock::{self, errno, Locked},
    store::Store,
    token::{Held, Tokens},
    ulp::Ctx,
};
use core::ptr::NonNull;
use kernel::{bindings, error::to_result, ffi::c_int, prelude::*};

/// A message's control buffer.
struct Control(NonNull<bindings::msghdr>);

impl Control {
    const LEN: c_int = core::mem::size_of::<ext::pmskb_desc>() as c_int;

    /// There is room for one more.
    fn has_room(&self) -> bool {
        // SAFETY: `recvmsg` was called with a valid message.
        unsafe { ext::pmskb_cmsg_room(self.0.as_ptr(), Self::LEN) }
    }

    /// Writes one; there is room. `EFAULT`.
    fn put(&mut self, desc: &mut ext::pmskb_desc) -> Result {
        // SAFETY: As above; `desc` has that length and no padding.
        to_result(unsafe {
            ext::put_cmsg(
                self.0.as_ptr(),
                ext::SOL_PMSKB as c_int,
                ext::PMSKB_CMSG_DESC as c_int,
                Self::LEN,
                (&raw mut *desc).cast(),
            )
        })
    }
}

const _: () = assert!(core::mem::size_of::<ext::pmskb_desc>() == 48);

/// Why a pass over the receive queue ended.
enum End {
    /// There is no more, or urgent data comes next.
    Drained,
    /// No room for another control message, or as many bytes as were asked for.
    Full,
    /// This kept it from describing more.
    Error(Error),
}

/// A pass over the receive queue.
struct Pass<'a> {
    ctx: &'a Ctx,
    store: &'a Store,
    tokens: &'a mut Tokens,
    cursor: &'a mut Cursor,
    control: &'a mut Control,
    /// Bytes that may still be described.
    limit: usize,
    end: End,
}

impl Pass<'_> {
    /// Describes some of `len` bytes of a packet from `off`; how many.
    fn describe(&mut self, skb: &Queued<'_>, off: u32, len: u32) -> u32 {
        let mut done = 0;
        while done < len {
            if self.limit == 0 || !self.control.has_room() {
                self.end = End::Full;
                break;
            }
            let left = (len - done).min(u32::try_from(self.limit).unwrap_or(u32::MAX));
            match self.one(skb, off + done, left) {
                Ok(n) => {
                    done += n;
                    self.limit -= n as usize;
                }
                Err(e) => {
                    self.end = End::Error(e);
                    break;
                }
            }
        }
        done
    }

    /// One descriptor, for up to `len` bytes from `off`; there is room for it.
    fn one(&mut self, skb: &Queued<'_>, off: u32, len: u32) -> Result<u32> {
        let seq = skb.seq().wrapping_add(off);
        let held = match self.placed(skb, off, len)? {
            Some(held) => held,
            None => self.copy(skb, off, len)?,
        };
        let note = held.note;
        let area = self.store.frames();
        let token = match self.tokens.add(held) {
            Ok(token) => token,
            Err(e) => {
                // The hold is still ours.
                let _ = area.unhold(held.frame);
                return Err(if e == ENOMEM {
                    errno(bindings::ENOBUFS)
                } else {
                    e
                });
            }
        };
        let len = u32::from(note.len);
        let mut flags = 0;
        if note.copied {
            flags |= ext::PMSKB_DESC_COPIED;
        }
        if len != note.pkt_len {
            flags |= ext::PMSKB_DESC_PARTIAL;
        }
        let mut desc = ext::pmskb_desc {
            offset: area.offset(held.frame) + u64::from(note.offset),
            len,
            token,
            store: self.store.minor(),
            flags,
            time: note.time,
            seq,
            pkt_len: note.pkt_len,
            pkt_off: note.pkt_off,
            csum: note.csum.to_be(),
            csum_kind: note.kind,
            time_source: note.source,
        };
        if let Err(e) = self.control.put(&mut desc) {
            let _ = self.tokens.release(area, token);
            return Err(e);
        }
        Ok(len)
    }

    /// What is known of the byte at `off`, if it is in one of the store's frames; with a hold.
    fn placed(&self, skb: &Queued<'_>, off: u32, len: u32) -> Result<Option<Held>> {
        let area = self.store.frames();
        let part = skb.part(off);
        let Some(page) = part.page else {
            return Ok(None);
        };
        let Some(frame) = area.frame_of(page.as_ptr()) else {
            return Ok(None);
        };
        let mut len = len.min(part.len);
        // The skb has a reference on the page.
        let note = match note::find(area, frame, part.off) {
            Some(note) => {
                let skip = part.off - u32::from(note.offset);
                len = len.min(u32::from(note.len) - skip);
                note.part(skip, len)
            }
            // Bytes of this store's that another way brought here: sent from it over loopback.
            // Not written by placement, so what comes after them in the frame is not ours to
            // describe either: copy them.
            None => return Ok(None),
        };
        if area.hold(frame).is_err() {
            return Ok(None);
        }
        let seq = skb.seq().wrapping_add(off);
        Ok(Some(Held {
            frame,
            note: Note { seq, ..note },
        }))
    }

    /// Copies bytes from `off` into a frame; with a hold. `ENOBUFS` if there is none.
    fn copy(&mut self, skb: &Queued<'_>, off: u32, len: u32) -> Result<Held> {
        let area = self.store.frames();
        let facts = skb.facts();
        // Up to what is in a frame, and no more than one frame.
        let mut n = 0;
        let max = len.min(self.cursor.left());
        while n < max {
            let part = skb.part(off + n);
            let ours = part
                .page
                .and_then(|page| Some((area.frame_of(page.as_ptr())?, part.off)))
                .is_some_and(|(frame, at)| note::find(area, frame, at).is_some());
            if n > 0 && ours {
                break;
            }
            n = n.saturating_add(part.len).min(max);
        }
        if facts.readable == 0 {
            return Err(EFAULT);
        }
        let room = self
            .cursor
            .reserve(area, n)
            .map_err(|_| errno(bindings::ENOBUFS))?;
        let mut sum = 0;
        let filled = room.fill(area, |at, bytes| {
            let run = skb.copy_and_sum(off + at, bytes)?;
            sum = place::add(sum, run, at);
            Ok(())
        });
        let span = match (filled, room.spans()) {
            (Ok(()), [span]) => *span,
            (filled, _) => {
                self.cursor.cancel(area, room);
                return Err(filled.err().unwrap_or(EFAULT));
            }
        };
        if let Err(e) = area.hold(span.frame) {
            self.cursor.cancel(area, room);
            return Err(e);
        }
        let (time, source) = place::stamp(&facts);
        let note = Note {
            time,
            seq: skb.seq().wrapping_add(off),
            pkt_len: n,
            pkt_off: 0,
            offset: span.off as u16,
            len: n as u16,
            csum: place::sum(sum).get(),
            kind: ext::pmskb_csum_kind_PMSKB_CSUM_COMPUTED as u8,
            source,
            copied: true,
        };
        self.cursor.commit(area, room, &note);
        for counters in [&self.ctx.counters, &self.store.counters] {
            counters.copied_bytes.add(u64::from(n));
            counters.computed_bytes.add(u64::from(n));
        }
        Ok(Held {
            frame: span.frame,
            note,
        })
    }
}

/// Describes what is in the receive queue now: bytes, and why it ended.
fn pass(
    locked: &mut Locked<'_>,
    ctx: &Ctx,
    control: &mut Control,
    limit: usize,
) -> Result<(usize, End)> {
    let Some(store) = ctx.own(locked).store.clone() else {
        return Err(EIO);
    };
    let _inside = store.enter()?;
    // Taken out while the lock is lent to the queue, and put back under the same lock.
    let mut own = ctx.take_own(locked);
    let mut pass = Pass {
        ctx,
        store: &store,
        tokens: &mut own.tokens,
        cursor: &mut own.cursor,
        control,
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
    let mut locked = unsafe { Locked::new(sk) };
    let ctx = locked.ctx().ok_or(EIO)?;
    if locked.listens() {
        return Err(errno(bindings::ENOTCONN));
    }
    if locked.in_repair() {
        return Err(EPERM);
    }
    let mut control = Control(msg);
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
        match locked.wait(&mut timeout) {
            Ok(()) => {}
            Err(_) if done > 0 => return Ok(done),
            Err(e) => return Err(e),
        }
    }
}
