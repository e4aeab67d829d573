// SPDX-License-Identifier: GPL-2.0

//! `sendmsg()` of a TCP socket with `PMSKB_CMSG_SEND`: after the bytes of the iovec, ranges of
//! records.
//!
//! What TCP is given are pages, as `sendfile()` of an open record gives it (`read.rs`), so its
//! packets have references on them, and the frames stay as long. The records themselves need to
//! be open until their pages are with TCP, and are: [`Payload`] has them.
//!
//! - It is several sends to TCP, one of the iovec and one for each [`PAGES`] pages, under one lock
//!   of the socket. As with TCP's own, the lock is given up only to wait for room, so that the
//!   bytes of others come between only there.
//! - All but the last have `MSG_MORE`, and no timestamp. If the call ends before, what was kept
//!   back for that is sent then.
//! - Pages are sent without waiting; the waiting is done here, so that there is one timeout, and so
//!   that no page is referenced meanwhile which TCP does not have yet. A removal would wait for it.
//! - Errors that come after bytes were sent stay with the socket, for its next call.
//!
//! Process context, sleeps.

use crate::{
    bindings as ext,
    file::Kind,
    host,
    object::Object,
    read::{self, PagePart, Piece},
    region::PAGE,
    sock::{errno, Stream},
};
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_int, c_long, c_uint},
    prelude::*,
    sync::Arc,
};

/// Pages that TCP is given at once.
const PAGES: usize = 64;
/// Bytes that one call sends, as any call of the kernel (`MAX_RW_COUNT`).
const MOST: usize = c_int::MAX as usize & !(PAGE - 1);

/// A range of a record, of which less and less is left.
struct Range {
    object: Arc<Object>,
    pos: u64,
    end: u64,
}

impl Range {
    /// `EBADF`; `EINVAL` if it is no record, or not within it.
    fn new(send: &ext::pmskb_send) -> Result<Self> {
        if send.reserved != 0 || send.len == 0 {
            return Err(EINVAL);
        }
        let object = Object::of_fd(send.fd)?;
        let end = send.offset.checked_add(send.len);
        let end = end.filter(|end| *end <= object.size()).ok_or(EINVAL)?;
        Ok(Self {
            object,
            pos: send.offset,
            end,
        })
    }

    fn left(&self) -> u64 {
        self.end.saturating_sub(self.pos)
    }
}

/// What a message names to be sent after its own bytes.
pub(crate) struct Payload(KVec<Range>);

/// The control messages of ours.
fn asked(msg: &mut bindings::msghdr) -> impl Iterator<Item = NonNull<bindings::cmsghdr>> + '_ {
    let mut at = ptr::null_mut();
    core::iter::from_fn(move || {
        // SAFETY: `sendmsg()` has copied them to the kernel; `at` is one of them, or null.
        at = unsafe { ext::pmskb_cmsg_next(msg, at) };
        NonNull::new(at)
    })
}

/// Whether a message has a control message of ours.
pub(crate) fn is_asked(msg: &mut bindings::msghdr) -> bool {
    asked(msg).next().is_some()
}

impl Payload {
    /// That of a message, if it has any.
    ///
    /// `EINVAL` for a control message of ours that is not well formed, or not for sending; `E2BIG`
    /// for too many; those of [`Range::new`]; `ENOMEM`.
    pub(crate) fn of(msg: &mut bindings::msghdr) -> Result<Option<Self>> {
        const LEN: usize = size_of::<bindings::cmsghdr>() + size_of::<ext::pmskb_send>();
        let mut ranges = KVec::new();
        for asked in asked(msg) {
            // SAFETY: It is within the control buffer, by its own length.
            let head = unsafe { asked.read_unaligned() };
            if head.cmsg_type as u32 != ext::PMSKB_CMSG_SEND || head.cmsg_len != LEN {
                return Err(EINVAL);
            }
            if ranges.len() == ext::PMSKB_MAX_SENDS as usize {
                return Err(E2BIG);
            }
            // SAFETY: As above; the header has a size that needs no alignment after it.
            let send = unsafe { asked.add(1).cast::<ext::pmskb_send>().read_unaligned() };
            ranges.push(Range::new(&send)?, GFP_KERNEL)?;
        }
        Ok((!ranges.is_empty()).then_some(Self(ranges)))
    }

    /// Bytes that have not been sent.
    fn left(&self) -> u64 {
        let left = self.0.iter().map(Range::left);
        left.fold(0, u64::saturating_add)
    }

    /// So many have.
    fn advance(&mut self, bytes: usize) {
        let mut bytes = bytes as u64;
        for range in self.0.iter_mut() {
            let step = bytes.min(range.left());
            range.pos += step;
            bytes -= step;
        }
    }

    /// Takes the pages with what comes next, at most `most` bytes: how many. An error is for the
    /// first of them.
    fn take(&self, pages: &mut KVec<PagePart>, most: u64) -> Result<usize> {
        let mut bytes = 0u64;
        for range in &self.0 {
            let mut pos = range.pos;
            while pos < range.end && bytes < most && pages.len() < PAGES {
                let part = match piece(range, pos, most - bytes) {
                    Err(_) if bytes > 0 => return Ok(bytes as usize),
                    part => part?,
                };
                let len = part.len() as u64;
                pages.push(part, GFP_KERNEL)?;
                pos += len;
                bytes += len;
            }
        }
        Ok(bytes as usize)
    }
}

/// What is at `pos` of a range, `most` bytes at most.
fn piece(range: &Range, pos: u64, most: u64) -> Result<PagePart> {
    let len = range.end.saturating_sub(pos).min(most);
    match read::piece(&*range.object, pos, len)? {
        Some(Piece::Page(part)) => Ok(part),
        // All of a record is in frames.
        _ => Err(EIO),
    }
}

/// The control messages of a message.
fn control(msg: &bindings::msghdr) -> (bindings::msghdr__bindgen_ty_1, usize) {
    (msg.__bindgen_anon_1, msg.msg_controllen)
}

fn set_control(
    msg: &mut bindings::msghdr,
    (control, len): (bindings::msghdr__bindgen_ty_1, usize),
) {
    msg.__bindgen_anon_1 = control;
    msg.msg_controllen = len;
}

/// `sendmsg()` with ranges of records. Answers as TCP's own; `EOPNOTSUPP` for `MSG_OOB`, `EIO` if
/// the media cannot be read or the store is gone, `ENOMEM`.
///
/// # Safety
///
/// `sk` is a TCP socket of ours, and its file is open; this thread has not locked it. `msg` is what
/// `sendmsg()` was called with, for sending `len` bytes, and `payload` of it.
pub(crate) unsafe fn sendmsg(
    sk: NonNull<ext::sock>,
    msg: &mut bindings::msghdr,
    len: usize,
    mut payload: Payload,
) -> Result<usize> {
    if msg.msg_flags & bindings::MSG_OOB != 0 {
        return Err(errno(bindings::EOPNOTSUPP));
    }
    // SAFETY: As the caller says.
    to_result(unsafe { ext::pmskb_cmsg_check(sk.as_ptr(), msg) })?;
    let mut pages = KVec::with_capacity(PAGES, GFP_KERNEL)?;
    let result = {
        // SAFETY: As the caller says.
        let mut stream = unsafe { Stream::new(sk) };
        // SAFETY: As the caller says.
        unsafe { send(&mut stream, msg, len, &mut payload, &mut pages) }
    };
    let kept_back = payload.left() > 0 && msg.msg_flags & bindings::MSG_MORE == 0;
    if kept_back && result.as_ref().is_ok_and(|sent| *sent > 0) {
        // SAFETY: As the caller says; it was unlocked above.
        unsafe { ext::pmskb_tcp_push(sk.as_ptr()) };
    }
    result
}

/// [`sendmsg`], with the socket locked.
///
/// # Safety
///
/// `msg` is for sending `len` bytes.
unsafe fn send(
    stream: &mut Stream<'_>,
    msg: &mut bindings::msghdr,
    len: usize,
    payload: &mut Payload,
    pages: &mut KVec<PagePart>,
) -> Result<usize> {
    /// What goes for the iovec, or for the last byte, only.
    const OF_HEADER: c_uint = bindings::MSG_FASTOPEN | bindings::MSG_ZEROCOPY;
    const OF_LAST: c_uint = bindings::MSG_MORE | bindings::MSG_EOR;
    let flags = msg.msg_flags;
    let theirs = control(msg);
    let mut timeout = stream.send_timeout(flags & bindings::MSG_DONTWAIT != 0);
    let begun = host::jiffies();

    // Even of no bytes: it makes the connection, or says why there is none.
    msg.msg_flags = flags & !bindings::MSG_EOR | bindings::MSG_MORE;
    // SAFETY: `msg` is ours for the call.
    unsafe { ext::pmskb_cmsg_no_stamps(msg) };
    // SAFETY: As the caller says.
    let header = unsafe { stream.send(msg, len) };
    msg.msg_flags = flags;
    set_control(msg, theirs);
    let mut sent = header?;
    if sent < len {
        return Ok(sent);
    }
    if timeout != c_long::MAX {
        let waited = host::jiffies().wrapping_sub(begun) as c_long;
        timeout = timeout.saturating_sub(waited).max(0);
    }

    loop {
        let left = payload.left().min(MOST.saturating_sub(sent) as u64);
        // What is wrong now is for the next call.
        if left == 0 || (sent > 0 && stream.sends_no_more()) {
            return Ok(sent);
        }
        pages.clear();
        let bytes = match payload.take(pages, left) {
            Err(_) if sent > 0 => return Ok(sent),
            bytes => bytes?,
        };
        let mut part = bindings::msghdr {
            msg_flags: flags & !OF_HEADER | bindings::MSG_SPLICE_PAGES | bindings::MSG_DONTWAIT,
            ..Default::default()
        };
        if bytes as u64 == payload.left() {
            set_control(&mut part, theirs);
        } else {
            part.msg_flags = part.msg_flags & !OF_LAST | bindings::MSG_MORE;
            // SAFETY: `part` is ours.
            unsafe { ext::pmskb_cmsg_no_stamps(&mut part) };
        }
        // SAFETY: `PagePart` is a `bio_vec`; the pages stay until they are cleared, when TCP has
        // references of its own on those that it took.
        let outcome = unsafe {
            bindings::iov_iter_bvec(
                &mut part.msg_iter,
                bindings::ITER_SOURCE,
                pages.as_ptr().cast(),
                pages.len(),
                bytes,
            );
            stream.send(&mut part, bytes)
        };
        match outcome {
            // It cannot be, and would not end.
            Ok(0) => return Ok(sent),
            Ok(now) => {
                payload.advance(now);
                sent += now;
                if payload.left() > 0 {
                    // As TCP does while it sends for long.
                    stream.flush_backlog();
                }
            }
            // At once, if it may not wait.
            Err(e) if e == EAGAIN => {
                pages.clear();
                if let Err(e) = stream.wait_for_room(&mut timeout) {
                    return match sent {
                        0 => Err(stream.send_error(flags as c_int, e)),
                        _ => Ok(sent),
                    };
                }
            }
            Err(_) if sent > 0 => return Ok(sent),
            Err(e) => return Err(e),
        }
    }
}
