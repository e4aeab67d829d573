// SPDX-License-Identifier: GPL-2.0

//! Packet descriptors, from what is in a receive queue.
//!
//! Each control message says where some of the received bytes are, in one frame. Bytes that are
//! not in frames of the store (packets that came before the socket was attached, or could not be
//! placed) are copied into frames here, so that every descriptor has an extent.
//!
//! Process context, under the socket's lock.

use crate::{
    attach::Ctx,
    bindings as ext,
    frame::Frame,
    note::{self, Note},
    place::{self, Cursor},
    quota,
    skb::{Part, Queued},
    sock::{errno, Flow},
    store::Store,
    token::{Held, Tokens},
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_int, c_void},
    prelude::*,
};

/// A message's control buffer.
///
/// # Invariants
///
/// The message is valid, and nobody else changes it.
pub(crate) struct Control(NonNull<bindings::msghdr>);

/// Where the next control message goes, and the next byte.
#[derive(Clone, Copy)]
pub(crate) struct Mark {
    at: *mut c_void,
    left: usize,
    room: usize,
}

impl Control {
    const LEN: c_int = core::mem::size_of::<ext::pmskb_desc>() as c_int;

    /// # Safety
    ///
    /// `msg` is what `recvmsg()` was called with, and is not used otherwise as long as this lives,
    /// but by those who are lent it.
    pub(crate) unsafe fn new(msg: NonNull<bindings::msghdr>) -> Self {
        // INVARIANT: As the caller says.
        Self(msg)
    }

    /// Where the next control message goes, and the next byte.
    pub(crate) fn mark(&self) -> Mark {
        let room = self.room();
        // SAFETY: By the type invariants; all members of the union are pointers.
        unsafe {
            let msg = self.0.as_ref();
            Mark {
                at: msg.__bindgen_anon_1.msg_control,
                left: msg.msg_controllen,
                room,
            }
        }
    }

    /// Takes back the control messages that were written since [`Self::mark`].
    pub(crate) fn rewind(&mut self, mark: Mark) {
        // SAFETY: By the type invariants.
        let msg = unsafe { self.0.as_mut() };
        msg.__bindgen_anon_1.msg_control = mark.at;
        msg.msg_controllen = mark.left;
    }

    /// Takes back the bytes, too.
    pub(crate) fn take_back(&mut self, mark: Mark) {
        self.rewind(mark);
        let written = mark.room.saturating_sub(self.room());
        // SAFETY: By the type invariants; so many were written.
        unsafe { ext::pmskb_msg_revert(self.0.as_ptr(), written) };
    }

    /// How many bytes there is room for.
    pub(crate) fn room(&self) -> usize {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_msg_room(self.0.as_ptr()) }
    }

    /// Writes `len` bytes of a packet from `off`; there is room for them, or `EFAULT`.
    pub(crate) fn copy(&mut self, skb: &Queued<'_>, off: u32, len: u32) -> Result {
        // SAFETY: By the type invariants.
        unsafe { skb.copy_to(off, len, self.0) }
    }

    /// Says that there was more than could be received.
    pub(crate) fn truncated(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { self.0.as_mut() }.msg_flags |= bindings::MSG_TRUNC;
    }

    /// For C, which is lent it.
    pub(crate) fn raw(&mut self) -> NonNull<bindings::msghdr> {
        self.0
    }

    /// There is room for one more.
    fn has_room(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_cmsg_room(self.0.as_ptr(), Self::LEN) }
    }

    /// Writes one; there is room. `EFAULT`.
    fn put(&mut self, desc: &mut ext::pmskb_desc) -> Result {
        // SAFETY: By the type invariants; `desc` has that length and no padding.
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
pub(crate) enum End {
    /// There is no more, or urgent data comes next.
    Drained,
    /// No room for another control message, or as many bytes as were asked for.
    Full,
    /// This kept it from describing more.
    Error(Error),
}

/// Tokens of a datagram, which goes as a whole or not at all.
pub(crate) struct Made {
    tokens: [u32; Self::MAX],
    count: usize,
}

impl Made {
    /// More than a packet has fragments, with what is copied before, between and after them.
    const MAX: usize = 64;

    /// None yet.
    pub(crate) const fn new() -> Self {
        Self {
            tokens: [0; Self::MAX],
            count: 0,
        }
    }

    /// All of them.
    pub(crate) fn tokens(&self) -> &[u32] {
        self.tokens.get(..self.count).unwrap_or(&[])
    }

    /// Whether there is room for another.
    fn has_room(&self) -> bool {
        self.count < Self::MAX
    }

    fn push(&mut self, token: u32) {
        if let Some(slot) = self.tokens.get_mut(self.count) {
            *slot = token;
            self.count += 1;
        }
    }
}

/// Received bytes, as parts of frames.
pub(crate) struct Source<'a> {
    pub(crate) ctx: &'a Ctx,
    pub(crate) store: &'a Store,
    /// Where those that are in no frame are copied.
    pub(crate) cursor: &'a mut Cursor,
}

/// A pass over the receive queue.
pub(crate) struct Pass<'a> {
    pub(crate) source: Source<'a>,
    pub(crate) tokens: &'a mut Tokens,
    pub(crate) control: &'a mut Control,
    /// Of the datagram; of a stream it is the socket's.
    pub(crate) flow: Option<&'a Flow>,
    /// Of a datagram: what was made, so that it can be taken back.
    pub(crate) made: Option<&'a mut Made>,
    /// Bytes that are copied to the caller, too: the first ones that are described.
    pub(crate) first: usize,
    /// Bytes that may still be described.
    pub(crate) limit: usize,
    pub(crate) end: End,
}

impl Pass<'_> {
    /// Describes some of `len` bytes of a packet from `off`; how many.
    pub(crate) fn describe(&mut self, skb: &Queued<'_>, off: u32, len: u32) -> u32 {
        let mut done = 0;
        while done < len {
            let room = self.made.as_ref().is_none_or(|made| made.has_room());
            if self.limit == 0 || !room || !self.control.has_room() {
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
                    if e == errno(bindings::EDQUOT) {
                        let source = &self.source;
                        for counters in [&source.ctx.counters, &source.store.counters] {
                            counters.refused.add(1);
                        }
                    }
                    self.end = End::Error(e);
                    break;
                }
            }
        }
        done
    }

    /// One descriptor, for up to `len` bytes from `off`; there is room for it.
    fn one(&mut self, skb: &Queued<'_>, off: u32, len: u32) -> Result<u32> {
        // Before anything is copied.
        let source = &self.source;
        if self.tokens.count() >= source.ctx.max_tokens(source.store) as usize {
            return Err(errno(bindings::EDQUOT));
        }
        // Datagrams have none; what tells them apart is nobody else's business.
        let seq = match skb.is_datagram() {
            true => 0,
            false => skb.seq().wrapping_add(off),
        };
        let made = self.made.as_ref().map_or(0, |made| made.count);
        let over = self.tokens.count() == made;
        let held = self.source.hold(skb, off, len, over)?;
        let note = held.note;
        let store = self.source.store;
        let area = store.frames();
        let token = match self.tokens.add(held, self.flow) {
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
            store: store.minor(),
            flags,
            time: note.time,
            seq,
            pkt_len: note.pkt_len,
            pkt_off: note.pkt_off,
            csum: note.csum.to_be(),
            csum_kind: note.kind,
            time_source: note.source,
        };
        let mark = self.control.mark();
        let first = self.first.min(len as usize);
        let told = self.control.put(&mut desc).and_then(|()| match first {
            0 => Ok(()),
            n => self.control.copy(skb, off, n as u32),
        });
        if let Err(e) = told {
            self.control.rewind(mark);
            let _ = self.tokens.release(area, token);
            return Err(e);
        }
        self.first -= first;
        if let Some(made) = &mut self.made {
            made.push(token);
        }
        Ok(len)
    }
}

impl Source<'_> {
    /// Some of up to `len` bytes of a packet from `off`, in one frame; with a hold. `ENOBUFS` if
    /// they have to be copied, and there is no frame.
    ///
    /// With `over` the socket has nothing that it could release, and may go over its quota.
    pub(crate) fn hold(
        &mut self,
        skb: &Queued<'_>,
        off: u32,
        len: u32,
        over: bool,
    ) -> Result<Held> {
        match self.placed(skb, off, len)? {
            Some(held) => Ok(held),
            None => self.copy(skb, off, len, over),
        }
    }

    /// The note of a part's first byte, and where in what it is of that is, if that can be
    /// described: placement made the part.
    ///
    /// No part that it made goes on after its note. One that a program sent from the store may, and
    /// have a note for each handful of bytes: more than a datagram may have descriptors.
    fn noted(&self, skb: &Queued<'_>, part: &Part) -> Option<(Frame, Note, u32)> {
        let area = self.store.frames();
        let frame = area.frame_of(part.page?.as_ptr())?;
        // The skb has a reference on the page.
        let note = note::find(area, frame, part.off)?;
        let skip = part.off - u32::from(note.offset);
        let goes_on = part.len > u32::from(note.len) - skip;
        (!goes_on || !skb.is_datagram()).then_some((frame, note, skip))
    }

    /// What is known of the byte at `off`, if it is in one of the store's frames; with a hold.
    fn placed(&self, skb: &Queued<'_>, off: u32, len: u32) -> Result<Option<Held>> {
        let area = self.store.frames();
        let part = skb.part(off);
        // Bytes of this store's that another way brought here: sent from it over loopback. Not
        // written by placement, so what comes after them in the frame is not ours to describe
        // either: copy them.
        let Some((frame, note, skip)) = self.noted(skb, &part) else {
            return Ok(None);
        };
        let note = note.part(skip, len.min(part.len).min(u32::from(note.len) - skip));
        if area.hold(frame).is_err() {
            return Ok(None);
        }
        if skb.is_datagram() {
            return Ok(Some(Held { frame, note }));
        }
        let seq = skb.seq().wrapping_add(off);
        Ok(Some(Held {
            frame,
            note: Note { seq, ..note },
        }))
    }

    /// Copies bytes from `off` into a frame; with a hold. `EDQUOT` if the socket may not have
    /// another one, `ENOBUFS` if there is none.
    ///
    /// With a quota full of what comes later in the queue, a socket could never get there. So one
    /// that holds nothing that it could release may go over it.
    fn copy(&mut self, skb: &Queued<'_>, off: u32, len: u32, over: bool) -> Result<Held> {
        let area = self.store.frames();
        let facts = skb.facts();
        // Up to what is in a frame, and no more than one frame.
        let mut n = 0;
        let max = len.min(self.cursor.left());
        while n < max {
            let part = skb.part(off + n);
            if n > 0 && self.noted(skb, &part).is_some() {
                break;
            }
            n = n.saturating_add(part.len).min(max);
        }
        if facts.readable == 0 {
            return Err(EFAULT);
        }
        let mut room = self.cursor.reserve(area, n, over);
        if matches!(&room, Err(why) if why.is_quota()) {
            // Unlike placement, this may take its time to find what is idle.
            area.reclaim(quota::MORE_LOOKS);
            room = self.cursor.reserve(area, n, over);
        }
        let mut room = room.map_err(|why| why.errno())?;
        let mut sum = 0;
        let filled = room.fill(area, |at, bytes| {
            let run = skb.copy_and_sum(off + at, bytes)?;
            sum = place::add(sum, run, at);
            Ok(())
        });
        let crc32c = self.ctx.crc32c(self.store);
        if crc32c && filled.is_ok() {
            room.compute_crc32c(area);
        }
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
            crc: span.crc,
        };
        self.cursor.commit(area, room, &note);
        for counters in [&self.ctx.counters, &self.store.counters] {
            counters.copied_bytes.add(u64::from(n));
            counters
                .computed_bytes
                .add(u64::from(n) * (1 + u64::from(crc32c)));
        }
        Ok(Held {
            frame: span.frame,
            note,
        })
    }
}
