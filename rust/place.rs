// SPDX-License-Identifier: GPL-2.0

//! The LOCAL_IN hook: moves a packet's bytes into frames.
//!
//! One pass over the payload: the copy, and with it the checksum where it cannot be had without.
//! The skb stays the same, so every later hook, TCP and UDP go on with it; it only gets a new body:
//! a head without tailroom, and one fragment a frame. Whatever does not work out leaves the packet
//! as it was, and is counted; nothing is dropped.
//!
//! # Where the hook is
//!
//! After source NAT at LOCAL_IN, because a socket is looked up by the addresses that it has
//! then; before connection tracking's helpers and confirm, which see the placed packet. Rules
//! that drop packets mostly come earlier, so what they drop costs no frames.
//!
//! # Checksums
//!
//! A segment that arrived alone and whose checksum the device found right tells its payload's
//! sum by its headers ([`derive`]). The first ones of a socket, and then one in 64, are computed
//! too; if they differ, that device's word is not taken any more ([`Distrusted`]). Where no device
//! has looked, the sum is computed in the copy and held against the headers: the stack need not
//! read the payload again, and the sum is the sender's as well. All else is computed, and so is
//! a datagram that says that it has no checksum.
//!
//! # Lock order
//!
//! `Ctx::rx`, then the locks of frames and heads. `HOOKS` before any socket's lock.

use crate::{
    attach::Rx,
    auto, bindings as ext,
    frame::{Frame, FrameArea},
    note::{self, Note},
    pm::csum::{self, Sum},
    quota::{Account, Denied},
    region::PAGE,
    skb::{
        self, Arriving, Facts, Fresh, Head, CHECKSUM_COMPLETE, CHECKSUM_NONE, CHECKSUM_UNNECESSARY,
    },
    sock::{self, errno, Family, Found, Net, Transport, Tuple},
    store::Store,
    udp,
};
use core::mem::MaybeUninit;
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_uint, c_void},
    prelude::*,
    sync::{
        atomic::{Atomic, Full, Relaxed},
        Arc,
    },
};

/// Fragments that we give a packet, at most: 64 KiB that start anywhere in a frame.
const MAX_PIECES: usize = 17;
/// Headers that we copy: the longest IPv4 and TCP headers and more; and of the link layer.
const MAX_HEADERS: u32 = 512;
const MAX_LINK: usize = 128;
/// Of those that need not be computed, the first so many of a socket are, and then one in so many.
const SAMPLE_FIRST: u64 = 8;
const SAMPLE_EVERY: u64 = 64;

/// Why a packet was not placed: `enum pmskb_unplaced`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unplaced(u32);

impl Unplaced {
    const NO_FRAME: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_NO_FRAME);
    const NO_MEM: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_NO_MEM);
    const SHAPE: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_SHAPE);
    const SIZE: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_SIZE);
    const COPY: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_COPY);
    const QUOTA: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_QUOTA);
    const STORE_QUOTA: Self = Self(ext::pmskb_unplaced_PMSKB_UNPLACED_STORE_QUOTA);

    /// Whether there are frames, but not for this socket.
    pub(crate) fn is_quota(self) -> bool {
        matches!(self, Self::QUOTA | Self::STORE_QUOTA)
    }

    /// What a receive that has to copy answers.
    pub(crate) fn errno(self) -> Error {
        match self {
            Self::QUOTA => errno(bindings::EDQUOT),
            _ => errno(bindings::ENOBUFS),
        }
    }
}

impl From<Denied> for Unplaced {
    fn from(why: Denied) -> Self {
        match why {
            Denied::NoFrame => Self::NO_FRAME,
            Denied::Socket => Self::QUOTA,
            Denied::Store => Self::STORE_QUOTA,
        }
    }
}

// ---- the cursor ----

/// Where a socket's next byte goes: a frame, held, and a position in it.
pub(crate) struct Cursor {
    /// What its frames are charged to; none if the socket has no store.
    account: Option<Arc<Account>>,
    frame: Option<Frame>,
    pos: u32,
    notes: u32,
    /// The frame that was filled last; the next should be the one after it.
    last: Option<Frame>,
}

/// A part of a frame, for a part of a packet.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub(crate) frame: Frame,
    pub(crate) off: u32,
    pub(crate) len: u32,
    /// CRC32C of its bytes, if it was asked for.
    pub(crate) crc: Option<u32>,
}

/// Room for one packet. Its new frames are held; [`Cursor::commit`] or [`Cursor::cancel`] it.
pub(crate) struct Room {
    spans: [Span; MAX_PIECES],
    count: usize,
    /// The first span is in the cursor's frame, where it was.
    continues: bool,
}

impl Room {
    pub(crate) fn spans(&self) -> &[Span] {
        self.spans.get(..self.count).unwrap_or(&[])
    }

    /// The spans as runs of memory: `f` is given the bytes of each run and its offset in the
    /// packet. Frames that follow each other are one run.
    ///
    /// The caller has the spans for itself: nobody looks at a frame's bytes before a packet or a
    /// descriptor says that they are there.
    pub(crate) fn fill(
        &self,
        area: &FrameArea,
        mut f: impl FnMut(u32, &mut [MaybeUninit<u8>]) -> Result,
    ) -> Result {
        let mut done = 0;
        let mut at = 0;
        while let Some(first) = self.spans().get(at) {
            let start = area.addr(first.frame).ok_or(EFAULT)?;
            let mut len = first.len as usize;
            at += 1;
            while let Some(next) = self.spans().get(at) {
                let addr = area.addr(next.frame).ok_or(EFAULT)?;
                if start.as_ptr() as usize + first.off as usize + len != addr.as_ptr() as usize {
                    break;
                }
                len += next.len as usize;
                at += 1;
            }
            // SAFETY: The spans are within their frames, which are mapped one after the other, are
            // held, and lie above what the cursor has given out before.
            let bytes = unsafe {
                core::slice::from_raw_parts_mut(
                    start
                        .as_ptr()
                        .add(first.off as usize)
                        .cast::<MaybeUninit<u8>>(),
                    len,
                )
            };
            f(done, bytes)?;
            done += len as u32;
        }
        Ok(())
    }
}

impl Cursor {
    /// Of no store.
    pub(crate) const fn new() -> Self {
        Self {
            account: None,
            frame: None,
            pos: 0,
            notes: 0,
            last: None,
        }
    }

    /// One that has no frame yet.
    pub(crate) fn of(account: Arc<Account>) -> Self {
        Self {
            account: Some(account),
            ..Self::new()
        }
    }

    /// What its frames are charged to.
    pub(crate) fn account(&self) -> Option<&Account> {
        self.account.as_deref()
    }

    /// The cursor, leaving one of no store.
    pub(crate) fn take(&mut self) -> Self {
        core::mem::replace(self, Self::new())
    }

    /// Bytes that fit into one frame, the cursor's or a fresh one.
    pub(crate) fn left(&self) -> u32 {
        if self.frame.is_some() && self.pos < PAGE as u32 && self.notes < note::MAX {
            PAGE as u32 - self.pos
        } else {
            PAGE as u32
        }
    }

    /// Lets go of the frame. Any context but hard interrupts.
    pub(crate) fn release(&mut self, area: &FrameArea) {
        if let Some(frame) = self.frame.take() {
            // It has our hold.
            let _ = area.leave(frame);
        }
        *self = Self::new();
    }

    /// Finds room for `len` bytes, memory for the notes included; with `over` even if that is more
    /// than the socket may have. Softirq, or process context.
    pub(crate) fn reserve(
        &mut self,
        area: &FrameArea,
        len: u32,
        over: bool,
    ) -> Result<Room, Unplaced> {
        let account = self.account.as_ref().ok_or(Unplaced::NO_FRAME)?;
        let max = MAX_PIECES.min(skb::max_frags());
        let mut room = Room {
            spans: [Span {
                frame: Frame(0),
                off: 0,
                len: 0,
                crc: None,
            }; MAX_PIECES],
            count: 0,
            continues: false,
        };
        let mut left = len;
        let mut near = self.last;
        if let Some(frame) = self.frame {
            near = Some(frame);
            // One that went bad is left for a fresh one.
            let bad = area.is_bad(frame);
            if self.pos < PAGE as u32 && self.notes < note::MAX && !bad {
                if !note::reserve(area, frame, self.notes) {
                    return Err(Unplaced::NO_MEM);
                }
                let len = left.min(PAGE as u32 - self.pos);
                room.push(frame, self.pos, len);
                room.continues = true;
                left -= len;
            }
        }
        while left > 0 {
            if room.count == max {
                self.cancel(area, room);
                return Err(Unplaced::SIZE);
            }
            let more = left.div_ceil(PAGE as u32);
            let frame = match area.take(near, account, more, over) {
                Ok(frame) => frame,
                Err(why) => {
                    self.cancel(area, room);
                    return Err(why.into());
                }
            };
            let len = left.min(PAGE as u32);
            room.push(frame, 0, len);
            if !note::reserve(area, frame, 0) {
                self.cancel(area, room);
                return Err(Unplaced::NO_MEM);
            }
            near = Some(frame);
            left -= len;
        }
        Ok(room)
    }

    /// Gives room back that was not used.
    pub(crate) fn cancel(&self, area: &FrameArea, room: Room) {
        for span in room.spans().iter().skip(usize::from(room.continues)) {
            // `alloc` gave the hold.
            let _ = area.unhold(span.frame);
        }
    }

    /// The room is used: notes its parts, and goes on after it. `note` is the whole packet's.
    /// References on the pages have been taken: frames that are full are let go of here.
    pub(crate) fn commit(&mut self, area: &FrameArea, room: Room, note: &Note) {
        let mut done = 0;
        for (at, span) in room.spans().iter().enumerate() {
            let mut part = note.part(done, span.len);
            part.offset = span.off as u16;
            part.crc = span.crc;
            note::push(area, span.frame, part);
            done += span.len;
            if at == 0 && room.continues {
                self.notes += 1;
            } else {
                if let Some(full) = self.frame.replace(span.frame) {
                    let _ = area.leave(full);
                }
                self.notes = 1;
            }
            self.pos = span.off + span.len;
        }
        self.last = self.frame;
    }
}

impl Room {
    fn push(&mut self, frame: Frame, off: u32, len: u32) {
        if let Some(span) = self.spans.get_mut(self.count) {
            *span = Span {
                frame,
                off,
                len,
                crc: None,
            };
            self.count += 1;
        }
    }

    /// Computes the CRC32C of each span. To be called when they have been filled.
    pub(crate) fn compute_crc32c(&mut self, area: &FrameArea) {
        for span in self.spans.iter_mut().take(self.count) {
            span.crc = area.crc32c(span.frame, span.off, span.len);
        }
    }
}

// ---- devices whose word is not taken ----

/// Devices that called a wrong checksum right. A device is its interface's number and its network
/// namespace's address, mixed; if two of them look the same, both are computed.
struct Distrusted {
    keys: [Atomic<u64>; 16],
    /// There were more than that: nobody is trusted.
    all: Atomic<u32>,
}

static DISTRUSTED: Distrusted = Distrusted {
    keys: [const { Atomic::new(0) }; 16],
    all: Atomic::new(0),
};

impl Distrusted {
    fn key(net: Net, ifindex: i32) -> u64 {
        (net.addr() as u64 ^ (u64::from(ifindex as u32) << 40)) | 1
    }

    fn has(&self, key: u64) -> bool {
        self.all.load(Relaxed) != 0 || self.keys.iter().any(|k| k.load(Relaxed) == key)
    }

    fn add(&self, key: u64) {
        for slot in &self.keys {
            match slot.cmpxchg(0, key, Relaxed) {
                Ok(_) => return,
                Err(now) if now == key => return,
                Err(_) => {}
            }
        }
        self.all.store(1, Relaxed);
    }
}

// ---- one segment ----

/// A TCP segment, or a UDP datagram, with payload.
struct Segment {
    tuple: Tuple,
    protocol: u8,
    /// From the network header: where the transport header starts, and where the payload does.
    transport: u32,
    payload: u32,
    /// Bytes of payload.
    len: u32,
    /// TCP's number of the first of them.
    seq: u32,
    /// TCP resets the connection.
    reset: bool,
    /// The header has a checksum: of UDP it may say that there is none.
    has_sum: bool,
}

impl Segment {
    /// None if it is neither. Trusts no length of the packet's.
    fn parse(skb: &Arriving<'_>, family: Family) -> Option<Self> {
        let mut src = [0; 16];
        let mut dst = [0; 16];
        let (protocol, transport) = match family {
            Family::V4 => {
                let ip = skb.header::<20>(0)?;
                let [vihl, .., protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] = ip;
                if vihl & 15 < 5 {
                    return None;
                }
                for (to, from) in src.iter_mut().zip([s0, s1, s2, s3]) {
                    *to = from;
                }
                for (to, from) in dst.iter_mut().zip([d0, d1, d2, d3]) {
                    *to = from;
                }
                (protocol, u32::from(vihl & 15) * 4)
            }
            Family::V6 => {
                let ip = skb.header::<40>(0)?;
                src.copy_from_slice(ip.get(8..24)?);
                dst.copy_from_slice(ip.get(24..40)?);
                match ip[6] {
                    protocol @ (TCP | UDP) => (protocol, 40),
                    next => skb.skip_extensions(40, next)?,
                }
            }
        };
        let segment = Self {
            tuple: Tuple {
                family,
                src,
                dst,
                src_port: 0,
                dst_port: 0,
                iif: 0,
                sdif: 0,
            },
            protocol,
            transport,
            payload: 0,
            len: 0,
            seq: 0,
            reset: false,
            has_sum: true,
        };
        match protocol {
            TCP => segment.tcp(skb),
            UDP => segment.udp(skb),
            _ => None,
        }
    }

    fn tcp(mut self, skb: &Arriving<'_>) -> Option<Self> {
        let tcp = skb.header::<20>(self.transport)?;
        let [sp0, sp1, dp0, dp1, q0, q1, q2, q3, _, _, _, _, doff, flags, ..] = tcp;
        if doff >> 4 < 5 {
            return None;
        }
        self.tuple.src_port = u16::from_be_bytes([sp0, sp1]);
        self.tuple.dst_port = u16::from_be_bytes([dp0, dp1]);
        self.payload = self.transport.checked_add(u32::from(doff >> 4) * 4)?;
        // IP has trimmed what is beyond its own length.
        self.len = skb.len().checked_sub(self.payload).filter(|len| *len > 0)?;
        let syn = u32::from(flags >> 1 & 1);
        // A SYN takes a number itself.
        self.seq = u32::from_be_bytes([q0, q1, q2, q3]).wrapping_add(syn);
        self.reset = flags & 4 != 0;
        Some(self)
    }

    fn udp(mut self, skb: &Arriving<'_>) -> Option<Self> {
        let [sp0, sp1, dp0, dp1, l0, l1, c0, c1] = skb.header::<8>(self.transport)?;
        self.tuple.src_port = u16::from_be_bytes([sp0, sp1]);
        self.tuple.dst_port = u16::from_be_bytes([dp0, dp1]);
        self.payload = self.transport.checked_add(8)?;
        self.len = skb.len().checked_sub(self.payload).filter(|len| *len > 0)?;
        // UDP trims what is beyond its own length and drops what is shorter, which is left to it,
        // as are jumbograms. Where datagrams were merged it is that of all.
        let length = u32::from(u16::from_be_bytes([l0, l1]));
        if length != self.len.checked_add(8)? {
            return None;
        }
        self.has_sum = [c0, c1] != [0, 0];
        Some(self)
    }

    fn pseudo(&self) -> Sum {
        let len = (self.payload - self.transport).saturating_add(self.len);
        match self.tuple.family {
            Family::V4 => {
                let [s0, s1, s2, s3, ..] = self.tuple.src;
                let [d0, d1, d2, d3, ..] = self.tuple.dst;
                csum::pseudo_v4([s0, s1, s2, s3], [d0, d1, d2, d3], self.protocol, len)
            }
            Family::V6 => csum::pseudo_v6(&self.tuple.src, &self.tuple.dst, self.protocol, len),
        }
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What is known of a payload's sum without reading it.
enum Sums {
    /// Nothing.
    Nothing,
    /// Nothing, and the stack would read it to verify the segment.
    Unverified,
    /// By the sender's checksum, which the device says is right.
    Derived(Sum),
    /// By the sum of all the packet's bytes that the device delivered.
    Hardware(Sum),
}

/// What the headers and the device say of the payload's sum. The headers are linear.
fn derive(skb: &Arriving<'_>, segment: &Segment, facts: &Facts) -> Sums {
    if facts.merged != 0 || !segment.has_sum {
        return Sums::Nothing;
    }
    let Some(headers) = skb.front(segment.payload) else {
        return Sums::Nothing;
    };
    let Some((network, transport)) = headers.split_at_checked(segment.transport as usize) else {
        return Sums::Nothing;
    };
    match facts.ip_summed {
        CHECKSUM_NONE => Sums::Unverified,
        // The device saw no more than the fragments.
        _ if facts.fragments != 0 => Sums::Nothing,
        CHECKSUM_UNNECESSARY => Sums::Derived(csum::payload_of(segment.pseudo(), transport)),
        // Summed by software it is no more than what we could compute.
        CHECKSUM_COMPLETE if facts.csum_complete_sw == 0 => {
            let all = Sum::from_wsum(facts.csum);
            let headers = Sum::of(network).then(network.len() as u64, Sum::of(transport));
            Sums::Hardware(all.after(u64::from(segment.payload), headers))
        }
        _ => Sums::Nothing,
    }
}

/// Time of a packet, and where it is from.
pub(crate) fn stamp(facts: &Facts) -> (u64, u8) {
    if facts.hwtstamp != 0 {
        return (
            facts.hwtstamp,
            ext::pmskb_time_source_PMSKB_TIME_HARDWARE as u8,
        );
    }
    if facts.tstamp != 0 {
        return (
            facts.tstamp,
            ext::pmskb_time_source_PMSKB_TIME_SOFTWARE as u8,
        );
    }
    let now = crate::host::now();
    (now, ext::pmskb_time_source_PMSKB_TIME_PLACEMENT as u8)
}

/// Adds the `__wsum` of a run at `at` to a sum. Internet sums are kept as C has them until the end.
pub(crate) fn add(sum: u32, run: u32, at: u32) -> u32 {
    // SAFETY: Arithmetic; `at` is less than a packet's length.
    unsafe { ext::pmskb_wsum_add(sum, run, at as i32) }
}

/// A sum of runs, as it is kept.
pub(crate) fn sum(sum: u32) -> Sum {
    Sum::from_wsum(sum)
}

/// What a placement is to do, and has read, for checksums.
#[derive(Default)]
struct Work {
    /// A CRC32C is wanted, too.
    crc32c: bool,
    computed_bytes: u64,
    mismatch: bool,
    /// The head area had no room for the head.
    head_in_dram: bool,
}

/// Moves a segment's payload into frames. Softirq; under RCU, with the store live, and `Ctx::rx`.
fn place(
    skb: &mut Arriving<'_>,
    segment: &Segment,
    facts: &Facts,
    distrust: u64,
    store: &Store,
    rx: &mut Rx,
    work: &mut Work,
) -> Result<Note, Unplaced> {
    if facts.readable == 0
        || facts.fraglist_gso != 0
        || facts.encapsulated != 0
        || facts.shared != 0
    {
        return Err(Unplaced::SHAPE);
    }
    if segment.payload > MAX_HEADERS {
        return Err(Unplaced::SHAPE);
    }
    let front = skb.link_len(facts).filter(|len| *len <= MAX_LINK);
    let front = front.ok_or(Unplaced::SHAPE)?;
    if !skb.pull(segment.payload) {
        return Err(Unplaced::NO_MEM);
    }
    let headers = segment.payload as usize;

    let sums = match derive(skb, segment, facts) {
        // The stack goes on as the device says; we do not.
        Sums::Derived(_) | Sums::Hardware(_) if DISTRUSTED.has(distrust) => Sums::Nothing,
        sums => sums,
    };
    let read = match sums {
        Sums::Nothing | Sums::Unverified => true,
        Sums::Derived(_) | Sums::Hardware(_) => {
            let n = rx.underived;
            rx.underived = n.wrapping_add(1);
            n < SAMPLE_FIRST || n % SAMPLE_EVERY == 0
        }
    };

    let area = store.frames();
    let mut room = rx.cursor.reserve(area, segment.len, false)?;
    let filled = fill(skb, segment, &room, area, read).and_then(|sum| {
        let (fresh, dram) = body(skb, front, headers, store, &room)?;
        work.head_in_dram = dram;
        Ok((sum, fresh))
    });
    let (sum, fresh) = match filled {
        Ok(filled) => filled,
        Err(why) => {
            rx.cursor.cancel(area, room);
            return Err(why);
        }
    };
    if read {
        work.computed_bytes = u64::from(segment.len);
    }
    if work.crc32c {
        room.compute_crc32c(area);
        work.computed_bytes += u64::from(segment.len);
    }

    const DERIVED: u8 = ext::pmskb_csum_kind_PMSKB_CSUM_DERIVED as u8;
    const COMPUTED: u8 = ext::pmskb_csum_kind_PMSKB_CSUM_COMPUTED as u8;
    let mut verified = false;
    let (csum, kind) = match sums {
        Sums::Nothing => (sum, COMPUTED),
        Sums::Unverified => {
            let headers = skb.front(segment.payload).unwrap_or(&[]);
            let transport = headers.get(segment.transport as usize..).unwrap_or(&[]);
            verified = csum::payload_of(segment.pseudo(), transport) == sum;
            if verified {
                // It is the sender's as much as if a device had verified it.
                (sum, DERIVED)
            } else {
                // The stack finds out by itself, and counts it.
                (sum, COMPUTED)
            }
        }
        Sums::Derived(known) | Sums::Hardware(known) if read && known != sum => {
            work.mismatch = true;
            (sum, COMPUTED)
        }
        Sums::Derived(known) => (known, DERIVED),
        Sums::Hardware(known) => (known, ext::pmskb_csum_kind_PMSKB_CSUM_HARDWARE as u8),
    };
    let (time, source) = stamp(facts);
    let seq = if segment.protocol == UDP {
        rx.datagrams = rx.datagrams.wrapping_add(1);
        rx.datagrams
    } else {
        segment.seq
    };
    let note = Note {
        time,
        seq,
        pkt_len: segment.len,
        pkt_off: 0,
        offset: 0,
        len: 0,
        csum: csum.get(),
        kind,
        source,
        copied: false,
        crc: None,
    };
    rx.cursor.commit(area, room, &note);
    skb.become_of(fresh);
    if verified {
        skb.set_verified();
    }
    Ok(note)
}

/// Copies the payload into `room`; the sum of what it read, if it was to.
fn fill(
    skb: &Arriving<'_>,
    segment: &Segment,
    room: &Room,
    area: &FrameArea,
    read: bool,
) -> Result<Sum, Unplaced> {
    let mut sum = 0;
    room.fill(area, |at, bytes| {
        let from = segment.payload.checked_add(at).ok_or(EFAULT)?;
        if read {
            sum = add(sum, skb.copy_and_sum(from, bytes)?, at);
            Ok(())
        } else {
            skb.copy(from, bytes)
        }
    })
    .map_err(|_| Unplaced::COPY)?;
    Ok(Sum::from_wsum(sum))
}

/// A body with the packet's headers, and the bytes of `room`; and whether its head is in DRAM because
/// the head area is full: whoever leaves packets unread takes no heads from the others.
fn body(
    skb: &Arriving<'_>,
    front: usize,
    headers: usize,
    store: &Store,
    room: &Room,
) -> Result<(Fresh, bool), Unplaced> {
    let size = (front + headers).next_multiple_of(64) + skb::shinfo_size();
    let slot = store.heads().and_then(|heads| heads.alloc(size));
    let full = slot.is_none() && store.heads().is_some();
    let head = slot.map_or(Head::Dram(size), Head::Pm);
    let mut fresh = match Fresh::new(skb, head, front, headers) {
        Ok(fresh) => fresh,
        Err(head) => {
            if let (Head::Pm(slot), Some(heads)) = (head, store.heads()) {
                heads.put(slot);
            }
            return Err(Unplaced::NO_MEM);
        }
    };
    for span in room.spans() {
        let page = store.frames().get_page(span.frame);
        let page = page.ok_or(Unplaced::NO_FRAME)?;
        // SAFETY: The reference is for this; a span is within its frame.
        unsafe { fresh.add(page, span.off, span.len) };
    }
    Ok((fresh, full))
}

/// A packet at LOCAL_IN. Softirq, under RCU.
fn arrived(skb: &mut Arriving<'_>, net: Net, family: Family) {
    let Some(mut segment) = Segment::parse(skb, family) else {
        return;
    };
    if segment.protocol == UDP && !udp::any_attached() {
        return;
    }
    let facts = skb.facts(family);
    segment.tuple.iif = facts.iif;
    segment.tuple.sdif = facts.sdif;
    let mut owner = skb.owner();
    if owner.is_null() && segment.protocol == UDP {
        if !skb.start_at_transport(segment.transport, segment.payload) {
            return;
        }
        owner = sock::datagram_socket(net, skb, &segment.tuple);
        skb.start_at_network(segment.transport);
    } else if owner.is_null() {
        if let Some(found) = Found::established(net, &segment.tuple) {
            found.leave_in(skb);
            owner = skb.owner();
        } else if segment.reset {
            return;
        } else {
            // Data that completes a handshake by cookie, or comes with the SYN.
            let doff = segment.payload - segment.transport;
            if !skb.start_at_transport(segment.transport, segment.payload) {
                return;
            }
            owner = sock::listener(net, skb, &segment.tuple, doff);
            skb.start_at_network(segment.transport);
        }
    }
    // SAFETY: The skb has a reference of it, or it is a listener, which goes under RCU.
    let Some(ctx) = (unsafe { sock::ctx_of(owner) }) else {
        return;
    };
    let mut work = Work::default();
    let mut rx = ctx.rx.lock();
    let Some(store) = rx.store.clone() else {
        return;
    };
    if !store.is_live() {
        return;
    }
    work.crc32c = ctx.crc32c(&store);
    let distrust = Distrusted::key(net, facts.ifindex);
    let placed = place(skb, &segment, &facts, distrust, &store, &mut rx, &mut work);
    drop(rx);
    // UDP says when it has queued one.
    if ctx.auto() && ctx.transport() == Transport::Tcp {
        auto::arrived(ctx);
    }
    if work.mismatch {
        DISTRUSTED.add(distrust);
        pr_warn_ratelimited(facts.ifindex);
    }
    for counters in [&ctx.counters, &store.counters] {
        counters.computed_bytes.add(work.computed_bytes);
        counters.mismatch.add(u64::from(work.mismatch));
        match &placed {
            Ok(note) => {
                counters.placed.add(1);
                counters.heads_in_dram.add(u64::from(work.head_in_dram));
                counters.placed_bytes.add(u64::from(note.pkt_len));
                match u32::from(note.kind) {
                    ext::pmskb_csum_kind_PMSKB_CSUM_DERIVED => counters.derived.add(1),
                    ext::pmskb_csum_kind_PMSKB_CSUM_HARDWARE => counters.hardware.add(1),
                    _ => counters.computed.add(1),
                }
            }
            Err(why) => counters.unplaced(why.0),
        }
    }
}

/// Once for a device, since it is not asked again.
fn pr_warn_ratelimited(ifindex: i32) {
    pr_warn!("interface {ifindex} called a wrong checksum right; computing them from here on\n");
}

/// What netfilter calls.
///
/// # Safety
///
/// As netfilter calls a LOCAL_IN hook.
unsafe fn hook(
    skb: *mut bindings::sk_buff,
    state: *const ext::nf_hook_state,
    family: Family,
) -> c_uint {
    // SAFETY: As the caller says; it is ours until we return.
    if let (Some(mut skb), Some(state)) = unsafe { (Arriving::new(skb), state.as_ref()) } {
        arrived(&mut skb, Net::new(state.net), family);
    }
    ext::NF_ACCEPT
}

/// IPv4.
///
/// # Safety
///
/// For netfilter.
#[no_mangle]
unsafe extern "C" fn pmskb_hook_v4(
    _priv: *mut c_void,
    skb: *mut bindings::sk_buff,
    state: *const ext::nf_hook_state,
) -> c_uint {
    // SAFETY: Netfilter calls this.
    unsafe { hook(skb, state, Family::V4) }
}

/// IPv6.
///
/// # Safety
///
/// For netfilter.
#[no_mangle]
unsafe extern "C" fn pmskb_hook_v6(
    _priv: *mut c_void,
    skb: *mut bindings::sk_buff,
    state: *const ext::nf_hook_state,
) -> c_uint {
    // SAFETY: Netfilter calls this.
    unsafe { hook(skb, state, Family::V6) }
}

// ---- hooks, by network namespace ----

/// A network namespace with our hooks.
struct Hooked {
    net: Net,
    users: Atomic<i32>,
}

kernel::sync::global_lock! {
    // SAFETY: Initialised by `start()`, at module init, before anything else here.
    /// Network namespaces with our hooks.
    unsafe(uninit) static HOOKS: Mutex<KVec<Arc<Hooked>>> = KVec::new();
}

/// Keeps the hooks of a network namespace registered. Cloned and dropped in any context.
pub(crate) struct HookUse(Arc<Hooked>);

impl HookUse {
    /// Registers the hooks, unless they are. Process context, sleeps, no socket locked; `net`
    /// stays, since a socket of it does.
    pub(crate) fn get(net: Net) -> Result<Self> {
        let mut hooks = HOOKS.lock();
        if let Some(hooked) = hooks.iter().find(|hooked| hooked.net == net) {
            hooked.users.fetch_add(1, Full);
            return Ok(Self(hooked.clone()));
        }
        let hooked = Arc::new(
            Hooked {
                net,
                users: Atomic::new(1),
            },
            GFP_KERNEL,
        )?;
        hooks.reserve(1, GFP_KERNEL)?;
        // SAFETY: The caller's socket keeps the namespace.
        to_result(unsafe { ext::pmskb_hooks_register(net.raw()) })?;
        hooks.push(hooked.clone(), GFP_KERNEL)?;
        Ok(Self(hooked))
    }
}

impl Clone for HookUse {
    fn clone(&self) -> Self {
        self.0.users.fetch_add(1, Full);
        Self(self.0.clone())
    }
}

impl Drop for HookUse {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Full) == 1 {
            // SAFETY: No requirements.
            unsafe { ext::pmskb_net_reap_later() };
        }
    }
}

/// Unregisters the hooks that nobody uses. Process context, from a work item.
#[no_mangle]
extern "C" fn pmskb_net_reap() {
    unhook(|hooked| hooked.users.load(Relaxed) == 0);
}

/// A network namespace is going; no socket of it is left.
#[no_mangle]
extern "C" fn pmskb_net_gone(net: *mut c_void) {
    unhook(|hooked| hooked.net == Net::new(net));
}

fn unhook(mut which: impl FnMut(&Hooked) -> bool) {
    let mut hooks = HOOKS.lock();
    hooks.retain(|hooked| {
        if which(hooked) {
            // SAFETY: It is still there: if it were going, `pmskb_net_gone` would have taken it off
            // the list before.
            unsafe { ext::pmskb_hooks_unregister(hooked.net.raw()) };
            return false;
        }
        true
    });
}

/// Hooks may be registered while this lives.
pub(crate) struct Started(());

/// At module init, once.
pub(crate) fn start() -> Result<Started> {
    // SAFETY: Called once, says the comment.
    unsafe { HOOKS.init() };
    // SAFETY: At module init.
    to_result(unsafe { ext::pmskb_net_start() })?;
    Ok(Started(()))
}

impl Drop for Started {
    /// At module exit: afterwards no hook is registered, or runs.
    fn drop(&mut self) {
        // SAFETY: May sleep here.
        unsafe { ext::pmskb_net_stop() };
        *HOOKS.lock() = KVec::new();
        // Contexts that are still waiting for their grace period are freed by the kernel's own
        // code; what still runs under RCU is ours.
        // SAFETY: May sleep here.
        unsafe { ext::pmskb_rcu_settle() };
    }
}

#[kunit_tests(pmskb_place)]
mod tests {
    use super::*;
    use crate::skb::synthetic::Packet;

    const PAYLOAD: [u8; 777] = {
        let mut bytes = [0; 777];
        let mut at = 0;
        while at < bytes.len() {
            bytes[at] = (at * 31 + at / 200) as u8;
            at += 1;
        }
        bytes
    };

    /// A segment on the wire.
    struct Wire {
        bytes: KVec<u8>,
        transport: usize,
        payload: usize,
    }

    impl Wire {
        /// The header of IP; where it ends. `options`: words of IPv4 options.
        fn network(
            bytes: &mut KVec<u8>,
            family: Family,
            protocol: u8,
            options: usize,
            len: usize,
        ) -> Result<usize> {
            Ok(match family {
                Family::V4 => {
                    let total = (20 + options * 4 + len) as u16;
                    bytes.extend_from_slice(&[0x45 + options as u8, 0], GFP_KERNEL)?;
                    bytes.extend_from_slice(&total.to_be_bytes(), GFP_KERNEL)?;
                    bytes.extend_from_slice(&[0, 0, 0, 0, 64, protocol, 0, 0], GFP_KERNEL)?;
                    bytes.extend_from_slice(&[10, 1, 2, 3, 10, 4, 5, 6], GFP_KERNEL)?;
                    for _ in 0..options {
                        bytes.extend_from_slice(&[1, 1, 1, 1], GFP_KERNEL)?;
                    }
                    20 + options * 4
                }
                Family::V6 => {
                    bytes.extend_from_slice(&[0x60, 0, 0, 0], GFP_KERNEL)?;
                    bytes.extend_from_slice(&(len as u16).to_be_bytes(), GFP_KERNEL)?;
                    bytes.extend_from_slice(&[protocol, 64], GFP_KERNEL)?;
                    for at in 0..32 {
                        bytes.push(0xe0 ^ at, GFP_KERNEL)?;
                    }
                    40
                }
            })
        }

        /// Its checksum, not by what is tested: by its definition. Its field is 0.
        fn checksum(bytes: &[u8], family: Family, protocol: u8, transport: usize) -> Result<u16> {
            let mut all = KVec::new();
            let addresses = if family == Family::V4 { 12..20 } else { 8..40 };
            let len = (bytes.len() - transport) as u16;
            all.extend_from_slice(&bytes[addresses], GFP_KERNEL)?;
            all.extend_from_slice(&[0, protocol], GFP_KERNEL)?;
            all.extend_from_slice(&len.to_be_bytes(), GFP_KERNEL)?;
            all.extend_from_slice(&bytes[transport..], GFP_KERNEL)?;
            Ok(!reference(&all))
        }

        /// A datagram with a right checksum. `options`: words of IPv4 options.
        fn datagram(family: Family, options: usize, payload: &[u8]) -> Result<Self> {
            let mut bytes = KVec::new();
            let len = 8 + payload.len();
            let transport = Self::network(&mut bytes, family, UDP, options, len)?;
            bytes.extend_from_slice(&[0x12, 0x34, 0, 53], GFP_KERNEL)?;
            bytes.extend_from_slice(&(len as u16).to_be_bytes(), GFP_KERNEL)?;
            bytes.extend_from_slice(&[0, 0], GFP_KERNEL)?;
            bytes.extend_from_slice(payload, GFP_KERNEL)?;
            // 0 would say that there is none.
            let field = match Self::checksum(&bytes, family, UDP, transport)? {
                0 => 0xffff,
                field => field,
            };
            bytes[transport + 6..transport + 8].copy_from_slice(&field.to_be_bytes());
            Ok(Self {
                bytes,
                transport,
                payload: transport + 8,
            })
        }

        /// A segment with a right checksum. `options`: words of TCP options, and of IPv4 options.
        fn new(family: Family, options: usize, len: usize) -> Result<Self> {
            let mut bytes = KVec::new();
            let tcp_len = 20 + options * 4 + len;
            let transport = Self::network(&mut bytes, family, TCP, options, tcp_len)?;
            bytes.extend_from_slice(&[0x12, 0x34, 0, 80], GFP_KERNEL)?;
            bytes.extend_from_slice(&[0xff, 0xff, 0xff, 0xfe, 1, 2, 3, 4], GFP_KERNEL)?;
            bytes.extend_from_slice(&[(5 + options as u8) << 4, 0x18, 7, 7], GFP_KERNEL)?;
            bytes.extend_from_slice(&[0, 0, 0, 0], GFP_KERNEL)?;
            for _ in 0..options {
                bytes.extend_from_slice(&[1, 1, 8, 10], GFP_KERNEL)?;
            }
            let payload = bytes.len();
            bytes.extend_from_slice(&PAYLOAD[..len], GFP_KERNEL)?;
            let field = Self::checksum(&bytes, family, TCP, transport)?;
            bytes[transport + 16..transport + 18].copy_from_slice(&field.to_be_bytes());
            Ok(Self {
                bytes,
                transport,
                payload,
            })
        }

        fn packet(&self) -> Result<Packet> {
            Packet::new(&self.bytes, self.payload)
        }
    }

    /// RFC 1071, word by word.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    const SHAPES: [(Family, usize, usize); 8] = [
        (Family::V4, 0, 1),
        (Family::V4, 0, 777),
        (Family::V4, 3, 500),
        (Family::V4, 10, 3),
        (Family::V6, 0, 1),
        (Family::V6, 0, 776),
        (Family::V6, 3, 501),
        (Family::V6, 10, 64),
    ];

    #[test]
    fn segments_are_told_from_what_is_none() -> Result {
        for (family, options, len) in SHAPES {
            let wire = Wire::new(family, options, len)?;
            let mut packet = wire.packet()?;
            let segment = Segment::parse(&packet.arriving(), family).ok_or(EINVAL)?;
            assert_eq!(segment.transport as usize, wire.transport);
            assert_eq!(segment.payload as usize, wire.payload);
            assert_eq!(segment.len as usize, len);
            assert_eq!(segment.seq, 0xffff_fffe);
            assert_eq!(segment.tuple.src_port, 0x1234);
            assert_eq!(segment.tuple.dst_port, 80);
            assert!(!segment.reset);

            let parses = |at: usize, byte: u8, cut: usize| -> Result<Option<Segment>> {
                let mut bytes = KVec::new();
                bytes.extend_from_slice(&wire.bytes[..wire.bytes.len() - cut], GFP_KERNEL)?;
                bytes[at] = byte;
                let mut packet = Packet::new(&bytes, 20)?;
                let segment = Segment::parse(&packet.arriving(), family);
                Ok(segment)
            };
            let first = wire.bytes[0];
            // No payload; half a TCP header; TCP headers too short or longer than the packet.
            assert!(parses(0, first, len)?.is_none());
            assert!(parses(0, first, wire.bytes.len() - wire.transport - 19)?.is_none());
            assert!(parses(wire.transport + 12, 0x4f, 0)?.is_none());
            if 60 > 20 + options * 4 + len {
                assert!(parses(wire.transport + 12, 0xf0, 0)?.is_none());
            }
            // SCTP; and UDP, whose length is not where TCP has a sequence number.
            let protocol = if family == Family::V4 { 9 } else { 6 };
            assert!(parses(protocol, 132, 0)?.is_none());
            assert!(parses(protocol, UDP, 0)?.is_none());
            if family == Family::V4 {
                assert!(parses(0, 0x44, 0)?.is_none());
            }
            // A SYN takes a number itself, here the last one but one.
            let syn = parses(wire.transport + 13, 0x1a, 0)?.ok_or(EINVAL)?;
            assert_eq!(syn.seq, 0xffff_ffff);
            assert!(parses(wire.transport + 13, 0x1c, 0)?.ok_or(EINVAL)?.reset);
        }
        Ok(())
    }

    #[test]
    fn datagrams_are_told_from_what_is_none() -> Result {
        for (family, options, len) in SHAPES {
            let wire = Wire::datagram(family, options, &PAYLOAD[..len])?;
            let mut packet = wire.packet()?;
            let datagram = Segment::parse(&packet.arriving(), family).ok_or(EINVAL)?;
            assert_eq!(datagram.protocol, UDP);
            assert_eq!(datagram.transport as usize, wire.transport);
            assert_eq!(datagram.payload as usize, wire.payload);
            assert_eq!(datagram.len as usize, len);
            assert_eq!(datagram.tuple.src_port, 0x1234);
            assert_eq!(datagram.tuple.dst_port, 53);
            assert!(datagram.has_sum && !datagram.reset);

            // With other bytes at `at`, and `cut` fewer or one more at the end.
            let parses = |at: usize, new: [u8; 2], cut: usize| -> Result<Option<Segment>> {
                let mut bytes = KVec::new();
                bytes.extend_from_slice(&wire.bytes, GFP_KERNEL)?;
                bytes[at..at + 2].copy_from_slice(&new);
                bytes.truncate(wire.bytes.len() - cut);
                let mut packet = Packet::new(&bytes, 20)?;
                let datagram = Segment::parse(&packet.arriving(), family);
                Ok(datagram)
            };
            let at = wire.transport + 4;
            let length = |n: usize| (n as u16).to_be_bytes();
            assert!(parses(at, length(8 + len), 0)?.is_some());
            // No payload; half a header; lengths that are not those of the packet.
            assert!(parses(at, length(8), len)?.is_none());
            assert!(parses(at, length(8 + len), len + 1)?.is_none());
            for wrong in [0, 7, 8, 7 + len, 9 + len, 0xffff] {
                assert!(parses(at, length(wrong), 0)?.is_none());
            }
            // No checksum.
            assert!(!parses(at + 2, [0, 0], 0)?.ok_or(EINVAL)?.has_sum);
            assert!(parses(at + 2, [0, 1], 0)?.ok_or(EINVAL)?.has_sum);
        }
        Ok(())
    }

    #[test]
    fn a_datagrams_sum_is_derived_unless_it_has_none() -> Result {
        // The last is one whose checksum comes out as 0, and is written 0xffff.
        let mut zero = [1, 2, 0, 0];
        let wire = Wire::datagram(Family::V4, 0, &zero)?;
        zero[2..].copy_from_slice(&wire.bytes[26..28]);
        let wire = Wire::datagram(Family::V4, 0, &zero)?;
        assert!(wire.bytes[26..28] == [0xff, 0xff]);
        // The shapes, and then that one.
        for at in 0..=SHAPES.len() {
            let (family, options, payload) = match SHAPES.get(at) {
                Some((family, options, len)) => (*family, *options, &PAYLOAD[..*len]),
                None => (Family::V4, 0, &zero[..]),
            };
            let mut wire = Wire::datagram(family, options, payload)?;
            let want = Sum::new(reference(payload));
            let derived = |packet: &mut Packet| -> Result<Sums> {
                let skb = packet.arriving();
                let facts = skb.facts(family);
                let datagram = Segment::parse(&skb, family).ok_or(EINVAL)?;
                Ok(derive(&skb, &datagram, &facts))
            };
            let mut packet = wire.packet()?.summed(CHECKSUM_UNNECESSARY, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Derived(sum) if sum == want));
            let all = u32::from(reference(&wire.bytes).to_be());
            let mut packet = wire.packet()?.summed(CHECKSUM_COMPLETE, all);
            assert!(matches!(derived(&mut packet)?, Sums::Hardware(sum) if sum == want));
            let mut packet = wire.packet()?.summed(CHECKSUM_NONE, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Unverified));
            let mut packet = wire.packet()?.summed(3, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Nothing));
            // Whatever the device says of one without: it may only have meant that.
            let field = wire.transport + 6;
            wire.bytes[field..field + 2].copy_from_slice(&[0, 0]);
            for says in [CHECKSUM_NONE, CHECKSUM_UNNECESSARY, CHECKSUM_COMPLETE, 3] {
                let mut packet = wire.packet()?.summed(says, all);
                assert!(matches!(derived(&mut packet)?, Sums::Nothing));
            }
        }
        Ok(())
    }

    #[test]
    fn the_payloads_sum_is_derived_from_headers_alone() -> Result {
        for (family, options, len) in SHAPES {
            let wire = Wire::new(family, options, len)?;
            let want = Sum::new(reference(&PAYLOAD[..len]));
            let derived = |packet: &mut Packet| -> Result<Sums> {
                let skb = packet.arriving();
                let facts = skb.facts(family);
                let segment = Segment::parse(&skb, family).ok_or(EINVAL)?;
                Ok(derive(&skb, &segment, &facts))
            };
            let mut packet = wire.packet()?.summed(CHECKSUM_UNNECESSARY, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Derived(sum) if sum == want));
            // What a device sums, as C keeps it.
            let all = u32::from(reference(&wire.bytes).to_be());
            let mut packet = wire.packet()?.summed(CHECKSUM_COMPLETE, all);
            assert!(matches!(derived(&mut packet)?, Sums::Hardware(sum) if sum == want));
            let mut packet = wire.packet()?.summed(CHECKSUM_NONE, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Unverified));
            // CHECKSUM_PARTIAL: the field has the pseudo header's sum.
            let mut packet = wire.packet()?.summed(3, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Nothing));
            // Headers that are not linear are not read.
            let mut packet =
                Packet::new(&wire.bytes, wire.payload - 1)?.summed(CHECKSUM_UNNECESSARY, 0);
            assert!(matches!(derived(&mut packet)?, Sums::Nothing));
        }
        Ok(())
    }

    #[test]
    fn the_sum_of_runs_is_that_of_the_whole() {
        let want = Sum::new(reference(&PAYLOAD));
        for cuts in [[1, 2], [3, 700], [128, 129], [776, 777], [0, 777]] {
            let mut kept = 0;
            for (from, to) in [(0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], 777)] {
                let run = u32::from(reference(&PAYLOAD[from..to]).to_be());
                kept = add(kept, run, from as u32);
            }
            assert!(sum(kept) == want);
        }
    }
}
