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

    /// As [`Self::set_owner`], of a UDP socket, in the cheapest way that keeps UDP from looking
    /// again. Only if there is no owner yet.
    ///
    /// # Safety
    ///
    /// `sk` is a UDP socket that was found under RCU, which is held until UDP has the skb.
    pub(crate) unsafe fn lend_owner(&mut self, sk: *mut ext::sock) {
        // SAFETY: By the type invariants, and as the caller says.
        unsafe { ext::pmskb_skb_lend_sock(self.skb.as_ptr(), sk) };
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
/// `skb` is valid for `'a`, from a socket's receive queue, and its data does not change; it is a
/// TCP socket's if `number` is none.
pub(crate) struct Queued<'a> {
    skb: NonNull<bindings::sk_buff>,
    number: Option<u32>,
    _locked: PhantomData<&'a bindings::sk_buff>,
}

impl Queued<'_> {
    /// Some of a stream.
    ///
    /// # Safety
    ///
    /// `skb` stays in the receive queue of a TCP socket that stays locked while the value lives.
    pub(crate) unsafe fn new(skb: *mut bindings::sk_buff) -> Option<Self> {
        // INVARIANT: As the caller says.
        NonNull::new(skb).map(|skb| Self {
            skb,
            number: None,
            _locked: PhantomData,
        })
    }

    /// A datagram; `number` tells it apart from others that are alike.
    ///
    /// # Safety
    ///
    /// There is a reference of the skb, which is from the receive queue of a UDP socket, while the
    /// value lives.
    pub(crate) unsafe fn datagram(skb: NonNull<bindings::sk_buff>, number: u32) -> Self {
        // INVARIANT: As the caller says.
        Self {
            skb,
            number: Some(number),
            _locked: PhantomData,
        }
    }

    /// Bytes of payload.
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: By the type invariants.
        unsafe { (*self.skb.as_ptr()).len }
    }

    /// TCP sequence number of the first byte; of a datagram the number that it was given.
    pub(crate) fn seq(&self) -> u32 {
        match self.number {
            Some(number) => number,
            // SAFETY: By the type invariants; TCP keeps it in the control block.
            None => unsafe { ext::pmskb_skb_seq(self.skb.as_ptr()) },
        }
    }

    /// It is a datagram.
    pub(crate) fn is_datagram(&self) -> bool {
        self.number.is_some()
    }

    /// What there is to know about it. Only the time and `readable` mean something here.
    pub(crate) fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        let tcp = !self.is_datagram();
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_skb_queued_facts(self.skb.as_ptr(), tcp, &mut facts) };
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

    /// Writes `len` bytes from `off` to where a receive wants them, or nothing: `EFAULT`. Process
    /// context, sleeps.
    ///
    /// # Safety
    ///
    /// `msg` is what `recvmsg()` was called with, and the caller's.
    pub(crate) unsafe fn copy_to(
        &self,
        off: u32,
        len: u32,
        msg: NonNull<bindings::msghdr>,
    ) -> Result {
        let (off, len) = within(self.skb.as_ptr(), off, len as usize)?;
        // SAFETY: By the type invariants it is a valid skb, which has the bytes; `msg` as the
        // caller says.
        kernel::error::to_result(unsafe {
            ext::pmskb_skb_copy_to(self.skb.as_ptr(), off, msg.as_ptr(), len)
        })
    }

    /// Of datagrams that came as one packet, payload bytes of each but the last; of others all of
    /// them. Of no more datagrams than UDP sends as one.
    pub(crate) fn segment(&self) -> u32 {
        // SAFETY: By the type invariants.
        match unsafe { ext::pmskb_skb_segment(self.skb.as_ptr()) } {
            0 => self.len(),
            segment => segment,
        }
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

/// Packets made up for unit tests.
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod synthetic {
    use super::*;

    /// A packet that is nobody else's.
    pub(crate) struct Packet(NonNull<bindings::sk_buff>);

    impl Packet {
        /// Of these bytes, the network header first; `linear` of them in the head.
        pub(crate) fn new(bytes: &[u8], linear: usize) -> Result<Self> {
            let linear = linear.min(bytes.len());
            // SAFETY: The bytes are there, `linear` is not more than they are.
            let skb = unsafe { ext::pmskb_test_skb(bytes.as_ptr().cast(), bytes.len(), linear) };
            NonNull::new(skb).map(Self).ok_or(ENOMEM)
        }

        /// What a device would have said of the checksum.
        pub(crate) fn summed(self, ip_summed: u8, wsum: u32) -> Self {
            // SAFETY: The skb is ours.
            unsafe { ext::pmskb_test_skb_checksum(self.0.as_ptr(), ip_summed, wsum) };
            self
        }

        /// As the hook sees it.
        pub(crate) fn arriving(&mut self) -> Arriving<'_> {
            // INVARIANT: It is ours while `self` is borrowed, on no list, and its data is at the
            // network header. Nothing that the tests call relies on RCU.
            Arriving {
                skb: self.0,
                _hook: PhantomData,
            }
        }
    }

    impl Drop for Packet {
        fn drop(&mut self) {
            // SAFETY: Ours.
            unsafe { bindings::consume_skb(self.0.as_ptr()) };
        }
    }
}

#[kunit_tests(pmskb_skb)]
mod tests {
    use super::{synthetic::Packet, *};
    use crate::pm::csum::Sum;
    use kernel::page::Page;

    /// Bytes that are all different for a while.
    fn bytes<const N: usize>() -> [u8; N] {
        core::array::from_fn(|at| (at * 7 + at / 256) as u8)
    }

    #[test]
    fn a_header_is_read_wherever_it_lies() -> Result {
        let all = bytes::<300>();
        for linear in [0, 1, 10, 19, 20, 21, 299, 300] {
            let mut packet = Packet::new(&all, linear)?;
            let skb = packet.arriving();
            assert_eq!(skb.len(), 300);
            for off in [0usize, 1, 10, 20, 200, 280] {
                let header = skb.header::<20>(off as u32).ok_or(EINVAL)?;
                assert!(header.as_slice() == &all[off..off + 20]);
            }
            assert!(skb.header::<20>(281).is_none());
            assert!(skb.header::<20>(u32::MAX).is_none());
            assert!(skb.front(linear as u32).is_some());
            assert!(skb.front(linear as u32 + 1).is_none());
        }
        Ok(())
    }

    #[test]
    fn copies_are_exact_and_so_is_their_sum() -> Result {
        let all = bytes::<301>();
        for linear in [0, 33, 301] {
            let mut packet = Packet::new(&all, linear)?;
            let skb = packet.arriving();
            for (off, len) in [
                (0usize, 301usize),
                (1, 300),
                (20, 33),
                (32, 3),
                (300, 1),
                (301, 0),
            ] {
                let mut plain = [const { MaybeUninit::new(0xa5u8) }; 301];
                let mut summed = plain;
                skb.copy(off as u32, &mut plain[..len])?;
                let sum = skb.copy_and_sum(off as u32, &mut summed[..len])?;
                for at in 0..301 {
                    let want = if at < len { all[off + at] } else { 0xa5 };
                    // SAFETY: All bytes were initialised above.
                    let (p, s) = unsafe { (plain[at].assume_init(), summed[at].assume_init()) };
                    assert!(p == want && s == want);
                }
                assert!(Sum::from_wsum(sum) == Sum::of(&all[off..off + len]));
            }
            let mut one = [MaybeUninit::uninit(); 1];
            assert!(skb.copy(301, &mut one) == Err(EFAULT));
            assert!(skb.copy_and_sum(u32::MAX, &mut one) == Err(EFAULT));
        }
        Ok(())
    }

    #[test]
    fn a_new_body_has_the_headers_at_the_end_of_its_head_and_the_payload_in_pages() -> Result {
        let all = bytes::<900>();
        let mut packet = Packet::new(&all, 60)?;
        let payload = Page::alloc_page(GFP_KERNEL)?;
        // SAFETY: The page is ours, and `all` has what is written.
        unsafe { payload.write_raw(all[40..].as_ptr(), 100, 860)? };
        let page = NonNull::new(payload.as_ptr()).ok_or(EINVAL)?;
        let mut skb = packet.arriving();
        // Headers that are not linear.
        assert!(Fresh::new(&skb, Head::Dram(shinfo_size() + 128), 0, 61).is_err());

        let head = Head::Dram(64 + shinfo_size());
        let mut fresh = Fresh::new(&skb, head, 14, 40).map_err(|_| ENOMEM)?;
        // In two parts, the second at an odd offset.
        // SAFETY: Each reference that is taken becomes the skb's; the bytes are within the page.
        unsafe {
            ext::pmskb_page_get(page.as_ptr());
            fresh.add(page, 100, 333);
            ext::pmskb_page_get(page.as_ptr());
            fresh.add(page, 433, 527);
        }
        skb.become_of(fresh);
        assert_eq!(skb.len(), 900);
        // The head ends where the headers do: nothing can be put back there.
        assert!(skb.front(40) == Some(&all[..40]));
        assert!(skb.raw().tail == skb.raw().end);
        let mut copy = [const { MaybeUninit::new(0u8) }; 900];
        let sum = skb.copy_and_sum(0, &mut copy)?;
        // SAFETY: All bytes are initialised.
        assert!((0..900).all(|at| unsafe { copy[at].assume_init() } == all[at]));
        assert!(Sum::from_wsum(sum) == Sum::of(&all));
        // SAFETY: The page is there.
        assert_eq!(unsafe { ext::pmskb_page_ref_count(page.as_ptr()) }, 3);
        drop(packet);
        // SAFETY: As above.
        assert_eq!(unsafe { ext::pmskb_page_ref_count(page.as_ptr()) }, 1);
        Ok(())
    }

    #[test]
    fn headers_that_do_not_fit_a_head_are_refused() -> Result {
        let all = bytes::<900>();
        let mut packet = Packet::new(&all, 900)?;
        let skb = packet.arriving();
        let size = 128 + shinfo_size();
        assert!(Fresh::new(&skb, Head::Dram(size), 0, 900).is_err());
        assert!(Fresh::new(&skb, Head::Dram(size), 65, 20).is_err());
        assert!(Fresh::new(&skb, Head::Dram(size), 64, 20).is_ok());
        assert!(Fresh::new(&skb, Head::Dram(size), 0, 901).is_err());
        Ok(())
    }

    #[test]
    fn a_body_that_is_not_used_gives_everything_back() -> Result {
        let all = bytes::<100>();
        let mut packet = Packet::new(&all, 100)?;
        let payload = Page::alloc_page(GFP_KERNEL)?;
        let page = NonNull::new(payload.as_ptr()).ok_or(EINVAL)?;
        let skb = packet.arriving();
        let head = Head::Dram(64 + shinfo_size());
        let mut fresh = Fresh::new(&skb, head, 0, 40).map_err(|_| ENOMEM)?;
        // SAFETY: The reference becomes the skb's.
        unsafe {
            ext::pmskb_page_get(page.as_ptr());
            fresh.add(page, 0, 60);
        }
        drop(fresh);
        // SAFETY: The page is there.
        assert_eq!(unsafe { ext::pmskb_page_ref_count(page.as_ptr()) }, 1);
        assert!(skb.front(100) == Some(&all[..]));
        Ok(())
    }
}
