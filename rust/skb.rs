// SPDX-License-Identifier: GPL-2.0

//! `sk_buff`, wrapped.
//!
//! Three types, for three sets of rights: a packet [`Arriving`] at the hook is ours alone and can
//! be given a new body; a [`Fresh`] one is a body in the making; a [`Queued`] one lies in a
//! socket's receive queue and is only read.

use crate::{bindings as ext, head::HeadSlot, sock::Family};
use core::{marker::PhantomData, mem::MaybeUninit, ptr::NonNull, slice};
use kernel::{
    bindings,
    ffi::{c_int, c_void},
    prelude::*,
};

/// What placement asks of a packet, read at once.
pub(crate) use ext::pmskb_skb_facts as Facts;

/// `ip_summed`: nothing was checked.
pub(crate) const CHECKSUM_NONE: u8 = 0;
/// `ip_summed`: the device says that the transport checksum is right.
pub(crate) const CHECKSUM_UNNECESSARY: u8 = 1;
/// `ip_summed`: `csum` is the sum from the network header on.
pub(crate) const CHECKSUM_COMPLETE: u8 = 2;

/// Bytes of `skb_shared_info`, as they count at the end of a head.
pub(crate) fn shinfo_size() -> usize {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_shinfo_size() as usize }
}

/// Fragments that an skb can have.
pub(crate) fn max_frags() -> usize {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_max_skb_frags() as usize }
}

/// A packet in the LOCAL_IN hook.
///
/// # Invariants
///
/// `skb` is a valid skb that the hook owns, on no list, with its data at the network header; RCU
/// is held.
pub(crate) struct Arriving<'a> {
    skb: NonNull<bindings::sk_buff>,
    _hook: PhantomData<&'a mut bindings::sk_buff>,
}

impl Arriving<'_> {
    /// # Safety
    ///
    /// `skb` is what netfilter passed to a LOCAL_IN hook, which has not returned yet when the
    /// value goes.
    pub(crate) unsafe fn new(skb: *mut bindings::sk_buff) -> Option<Self> {
        // INVARIANT: As the caller says.
        NonNull::new(skb).map(|skb| Self {
            skb,
            _hook: PhantomData,
        })
    }

    fn raw(&self) -> &bindings::sk_buff {
        // SAFETY: By the type invariants; shared reads of fields only.
        unsafe { self.skb.as_ref() }
    }

    pub(crate) fn as_ptr(&self) -> *mut bindings::sk_buff {
        self.skb.as_ptr()
    }

    /// Bytes from the network header to the end.
    pub(crate) fn len(&self) -> u32 {
        self.raw().len
    }

    /// What there is to know about it.
    pub(crate) fn facts(&self, family: Family) -> Facts {
        let mut facts = Facts::default();
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_skb_facts(self.skb.as_ptr(), family == Family::V6, &mut facts) };
        facts
    }

    /// `N` bytes at `off` from the network header, wherever they lie. None if there are fewer.
    pub(crate) fn header<const N: usize>(&self, off: u32) -> Option<[u8; N]> {
        let mut buf = [0u8; N];
        let off = c_int::try_from(off).ok()?;
        // SAFETY: By the type invariants; `buf` has `N` bytes.
        let at = unsafe {
            ext::pmskb_skb_header_pointer(
                self.skb.as_ptr(),
                off,
                N as c_int,
                buf.as_mut_ptr().cast::<c_void>(),
            )
        };
        if at.is_null() {
            return None;
        }
        if at.cast::<u8>() != buf.as_mut_ptr() {
            // SAFETY: `skb_header_pointer` answers with `N` bytes of the packet.
            buf.copy_from_slice(unsafe { slice::from_raw_parts(at.cast::<u8>(), N) });
        }
        Some(buf)
    }

    /// Follows the extension headers of an IPv6 packet from `next` at `off`: the protocol, and
    /// where its header is. None if there is none here, or it is a fragment.
    pub(crate) fn skip_extensions(&self, off: u32, next: u8) -> Option<(u8, u32)> {
        let mut next = next;
        let mut frag = 0u16;
        let off = c_int::try_from(off).ok()?;
        // SAFETY: By the type invariants.
        let at = unsafe { ext::ipv6_skip_exthdr(self.skb.as_ptr(), off, &mut next, &mut frag) };
        if frag != 0 {
            return None;
        }
        Some((next, u32::try_from(at).ok()?))
    }

    /// Makes the first `len` bytes linear. False if there are fewer, or no memory.
    pub(crate) fn pull(&mut self, len: u32) -> bool {
        // SAFETY: By the type invariants; nobody has pointers into the data.
        unsafe { ext::pmskb_pskb_may_pull(self.skb.as_ptr(), len) }
    }

    /// Makes `headers` bytes linear and the data start at the transport header, `off` bytes on, as
    /// where TCP looks for a listener. False if there are fewer; else undo it by
    /// [`Self::start_at_network`].
    pub(crate) fn start_at_transport(&mut self, off: u32, headers: u32) -> bool {
        // SAFETY: By the type invariants; `off` is within what is made linear.
        unsafe { ext::pmskb_skb_to_transport(self.skb.as_ptr(), off, headers) }
    }

    /// Undoes [`Self::start_at_transport`].
    pub(crate) fn start_at_network(&mut self, off: u32) {
        // SAFETY: By the type invariants; the bytes were pulled before.
        unsafe { ext::pmskb_skb_to_network(self.skb.as_ptr(), off) }
    }

    /// Bytes of the link layer's header before the network header; none if they are not there.
    pub(crate) fn link_len(&self, facts: &Facts) -> Option<usize> {
        if facts.mac_set == 0 {
            return Some(0);
        }
        let skb = self.raw();
        // SAFETY: The anonymous union has one layout for both of its members.
        let headers = unsafe { skb.__bindgen_anon_4.headers.as_ref() };
        let (network, mac) = (headers.network_header, headers.mac_header);
        network.checked_sub(mac).map(usize::from)
    }

    /// The first `front` bytes before the network header and `len` after it. They have been
    /// pulled.
    fn linear(&self, front: usize, len: usize) -> Option<&[u8]> {
        let skb = self.raw();
        let headroom = (skb.data as usize).checked_sub(skb.head as usize)?;
        let linear = skb.len.checked_sub(skb.data_len)? as usize;
        if front > headroom || len > linear {
            return None;
        }
        // SAFETY: The bytes are in the skb's head, by the checks above, and are not written while
        // `self` is borrowed.
        Some(unsafe { slice::from_raw_parts(skb.data.sub(front), front + len) })
    }

    /// The first `len` bytes, if they are linear.
    pub(crate) fn front(&self, len: u32) -> Option<&[u8]> {
        self.linear(0, len as usize)
    }

    /// Copies bytes out, from `off` after the network header. `EFAULT` if there are fewer.
    pub(crate) fn copy(&self, off: u32, to: &mut [MaybeUninit<u8>]) -> Result {
        copy_bits(self.skb.as_ptr(), off, to)
    }

    /// As [`Self::copy`], and sums the bytes in the same pass: a `__wsum`.
    pub(crate) fn copy_and_sum(&self, off: u32, to: &mut [MaybeUninit<u8>]) -> Result<u32> {
        copy_and_sum_bits(self.skb.as_ptr(), off, to)
    }

    /// The socket that early demultiplexing left.
    pub(crate) fn owner(&self) -> *mut ext::sock {
        self.raw().sk.cast()
    }

    /// Leaves a socket with a reference of it in the skb, as early demultiplexing does, so that
    /// TCP need not look for it again. Only if there is no owner yet.
    ///
    /// # Safety
    ///
    /// `sk` is a socket, a request or a time-wait socket; one reference of it becomes the skb's.
    pub(crate) unsafe fn set_owner(&mut self, sk: *mut ext::sock) {
        // SAFETY: By the type invariants, and there is nothing in these fields that would be lost.
        let skb = unsafe { self.skb.as_mut() };
        skb.sk = sk.cast();
        skb.__bindgen_anon_3.__bindgen_anon_1.destructor = Some(ext::sock_edemux);
    }

    /// Tells the stack that the transport checksum has been found right.
    pub(crate) fn set_verified(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_skb_set_verified(self.skb.as_ptr()) };
    }

    /// Gives the packet a new body: from here on it is `fresh`, and everybody who goes on with
    /// this skb (later hooks, TCP) goes on with that. What was its body is freed.
    pub(crate) fn become_of(&mut self, fresh: Fresh) {
        let new = fresh.into_raw();
        let skb = self.skb.as_ptr();
        // SAFETY: Both are valid; `skb` is on no list and nobody else's. Its socket and destructor
        // are taken out first, or the morph would drop them. `skb_morph` makes `skb` a clone of
        // `new`, and `new` goes at once, so the data is not shared afterwards.
        unsafe {
            let sk = (*skb).sk;
            let destructor = (*skb).__bindgen_anon_3.__bindgen_anon_1.destructor;
            (*skb).sk = core::ptr::null_mut();
            (*skb).__bindgen_anon_3.__bindgen_anon_1.destructor = None;
            ext::skb_morph(skb, new);
            (*skb).sk = sk;
            (*skb).__bindgen_anon_3.__bindgen_anon_1.destructor = destructor;
            bindings::consume_skb(new);
        }
    }
}

/// Memory for a head.
pub(crate) enum Head {
    /// In the head area.
    Pm(HeadSlot),
    /// In DRAM, of that size.
    Dram(usize),
}

/// A body in the making: headers copied, payload being added.
pub(crate) struct Fresh {
    skb: NonNull<bindings::sk_buff>,
    frags: usize,
}

impl Fresh {
    /// Headers, metadata and state of `from`, no payload. `front` bytes before the network header
    /// and `len` after it go into the head, at its very end: a head with tailroom would get its
    /// payload back by `skb_condense()`.
    ///
    /// Softirq, or bottom halves disabled. Gives the head back if there is no memory for an skb or
    /// the headers do not fit.
    pub(crate) fn new(
        from: &Arriving<'_>,
        head: Head,
        front: usize,
        len: usize,
    ) -> Result<Self, Head> {
        let Some(headers) = from.linear(front, len) else {
            return Err(head);
        };
        if crate::inject::fails() {
            return Err(head);
        }
        let raw = match &head {
            Head::Pm(slot) => {
                // SAFETY: The slot is ours, `size` bytes, with a reference on its page, which
                // `head_frag` makes the skb put. Bottom halves are disabled.
                unsafe {
                    bindings::napi_build_skb(slot.addr.as_ptr().cast::<c_void>(), slot.size as u32)
                }
            }
            Head::Dram(size) => {
                // SAFETY: No requirements.
                let data = unsafe { ext::pmskb_kmalloc_atomic(*size) };
                if data.is_null() {
                    return Err(head);
                }
                // SAFETY: `data` is from kmalloc.
                let raw = unsafe { bindings::slab_build_skb(data) };
                if raw.is_null() {
                    // SAFETY: As above, and it has not become an skb's.
                    unsafe { bindings::kfree(data) };
                }
                raw
            }
        };
        let Some(skb) = NonNull::new(raw) else {
            return Err(head);
        };
        let fresh = Self { skb, frags: 0 };
        let raw = skb.as_ptr();
        // SAFETY: `raw` is a new skb with an empty head of `end` bytes that only we know.
        let end = unsafe { (*raw).end } as usize;
        let Some(room) = end.checked_sub(front + len) else {
            // The skb frees the head; the caller asked for too small a one.
            return Err(Head::Dram(0));
        };
        let old_off = (from.raw().data as usize).wrapping_sub(from.raw().head as usize);
        let new_off = room + front;
        // SAFETY: `room + front + len` is `end`, so all of this is within the head. The header
        // offsets move by the difference of the data's offsets. `skb_copy_header` takes the
        // references that the copied fields need.
        unsafe {
            let to = (*raw).head.add(room);
            core::ptr::copy_nonoverlapping(headers.as_ptr(), to, headers.len());
            (*raw).data = (*raw).head.add(new_off);
            (*raw).tail = end as u32;
            (*raw).len = len as u32;
            ext::skb_copy_header(raw, from.skb.as_ptr());
            ext::skb_headers_offset_update(raw, new_off as c_int - old_off as c_int);
            ext::pmskb_skb_take_stamps(raw, from.skb.as_ptr());
        }
        Ok(fresh)
    }

    /// Adds `len` bytes at `off` of a page.
    ///
    /// # Safety
    ///
    /// The page has a reference for the skb, and the bytes are within it.
    pub(crate) unsafe fn add(&mut self, page: NonNull<bindings::page>, off: u32, len: u32) {
        let truesize = len.next_multiple_of(64);
        // SAFETY: The skb is ours; the caller keeps the number of frags within `max_frags()`.
        unsafe {
            ext::pmskb_skb_add_rx_frag(
                self.skb.as_ptr(),
                self.frags as c_int,
                page.as_ptr(),
                off as c_int,
                len as c_int,
                truesize,
            )
        };
        self.frags += 1;
    }

    fn into_raw(self) -> *mut bindings::sk_buff {
        let raw = self.skb.as_ptr();
        core::mem::forget(self);
        raw
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: Ours, and never given away.
        unsafe { bindings::consume_skb(self.skb.as_ptr()) };
    }
}

/// Where a byte of a queued packet lies.
pub(crate) struct Part {
    /// The page, if it is in a page fragment.
    pub(crate) page: Option<NonNull<bindings::page>>,
    /// Where in the page.
    pub(crate) off: u32,
    /// How many bytes lie there in a row; more than the packet has, if it cannot be known.
    pub(crate) len: u32,
}

/// A packet in a socket's receive queue.
///
/// # Invariants
///
/// `skb` is valid and in the queue of a socket that is locked.
pub(crate) struct Queued<'a> {
    skb: NonNull<bindings::sk_buff>,
    _locked: PhantomData<&'a bindings::sk_buff>,
}

impl Queued<'_> {
    /// # Safety
    ///
    /// `skb` stays in the receive queue of a socket that stays locked while the value lives.
    pub(crate) unsafe fn new(skb: *mut bindings::sk_buff) -> Option<Self> {
        // INVARIANT: As the caller says.
        NonNull::new(skb).map(|skb| Self {
            skb,
            _locked: PhantomData,
        })
    }

    /// Bytes of payload.
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: By the type invariants.
        unsafe { (*self.skb.as_ptr()).len }
    }

    /// TCP sequence number of the first byte.
    pub(crate) fn seq(&self) -> u32 {
        // SAFETY: By the type invariants; TCP keeps it in the control block.
        unsafe { ext::pmskb_skb_seq(self.skb.as_ptr()) }
    }

    /// What there is to know about it. Only the time and `readable` mean something here.
    pub(crate) fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_skb_queued_facts(self.skb.as_ptr(), &mut facts) };
        facts
    }

    /// Where the byte at `off` lies.
    pub(crate) fn part(&self, off: u32) -> Part {
        let mut part = ext::pmskb_skb_part::default();
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_skb_part(self.skb.as_ptr(), off, &mut part) };
        Part {
            page: NonNull::new(part.page),
            off: part.off,
            len: part.len,
        }
    }

    /// As [`Arriving::copy_and_sum`].
    pub(crate) fn copy_and_sum(&self, off: u32, to: &mut [MaybeUninit<u8>]) -> Result<u32> {
        copy_and_sum_bits(self.skb.as_ptr(), off, to)
    }
}

fn within(skb: *const bindings::sk_buff, off: u32, len: usize) -> Result<(c_int, c_int)> {
    // SAFETY: The callers have a valid skb.
    let have = unsafe { (*skb).len };
    let len = u32::try_from(len).map_err(|_| EFAULT)?;
    let end = off.checked_add(len).ok_or(EFAULT)?;
    if end > have || end > i32::MAX as u32 {
        return Err(EFAULT);
    }
    Ok((off as c_int, len as c_int))
}

fn copy_bits(skb: *const bindings::sk_buff, off: u32, to: &mut [MaybeUninit<u8>]) -> Result {
    let (off, len) = within(skb, off, to.len())?;
    // SAFETY: The callers have a valid skb; `to` has `len` bytes.
    let res = unsafe { ext::skb_copy_bits(skb, off, to.as_mut_ptr().cast::<c_void>(), len) };
    kernel::error::to_result(res)
}

fn copy_and_sum_bits(
    skb: *const bindings::sk_buff,
    off: u32,
    to: &mut [MaybeUninit<u8>],
) -> Result<u32> {
    let (off, len) = within(skb, off, to.len())?;
    // SAFETY: The callers have a valid skb that has the bytes (it is a BUG to ask for more); `to`
    // has `len` bytes.
    Ok(unsafe { ext::skb_copy_and_csum_bits(skb, off, to.as_mut_ptr().cast::<u8>(), len) })
}
