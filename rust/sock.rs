// SPDX-License-Identifier: GPL-2.0

//! `sock`, wrapped.
//!
//! A [`Found`] socket came out of a lookup in the hook, with a reference. A [`Locked`] one is
//! under `lock_sock()`, and only there can its tokens be touched; a [`Stream`] is one of TCP, with
//! its receive queue. A [`Datagram`] is the first in the receive queue of a UDP socket. A
//! [`SocketFile`] is an open descriptor.

use crate::{
    attach::Ctx,
    bindings as ext,
    skb::{Arriving, Queued},
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_int, c_long, c_void},
    prelude::*,
    types::NotThreadSafe,
};

/// Address family.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What a socket of ours may be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// A byte stream.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Where a socket's packets come from and go to; addresses as on the wire, IPv4 ones in the first
/// four bytes, ports as numbers.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Flow {
    /// 4 or 6.
    pub(crate) version: u8,
    /// Address of the peer.
    pub(crate) peer: [u8; 16],
    /// Address of this end.
    pub(crate) local: [u8; 16],
    /// Port of the peer.
    pub(crate) peer_port: u16,
    /// Port of this end.
    pub(crate) local_port: u16,
}

impl From<&ext::pmskb_flow> for Flow {
    fn from(raw: &ext::pmskb_flow) -> Self {
        Self {
            version: raw.version,
            peer: raw.peer,
            local: raw.local,
            peer_port: raw.peer_port,
            local_port: raw.local_port,
        }
    }
}

/// A network namespace, by address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Net(*mut c_void);

// SAFETY: An address; whoever follows it knows that the namespace is there.
unsafe impl Send for Net {}
// SAFETY: As above.
unsafe impl Sync for Net {}

impl Net {
    /// From C's pointer, whichever bindings it came by.
    pub(crate) fn new<T>(net: *mut T) -> Self {
        Self(net.cast())
    }

    /// The namespace of a socket.
    ///
    /// # Safety
    ///
    /// `sk` is a valid full socket.
    pub(crate) unsafe fn of(sk: NonNull<ext::sock>) -> Self {
        // SAFETY: As the caller says.
        Self::new(unsafe { ext::pmskb_sock_net(sk.as_ptr()) })
    }

    /// C's pointer.
    pub(crate) fn raw<T>(self) -> *mut T {
        self.0.cast()
    }

    /// The address, to tell namespaces apart.
    pub(crate) fn addr(self) -> usize {
        self.0 as usize
    }
}

/// What a lookup needs of a segment, as on the wire.
pub(crate) struct Tuple {
    pub(crate) family: Family,
    pub(crate) src: [u8; 16],
    pub(crate) dst: [u8; 16],
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
    pub(crate) iif: c_int,
    pub(crate) sdif: c_int,
}

/// A socket found in the established table, with a reference: a full socket, a request or a
/// time-wait one.
pub(crate) struct Found(NonNull<ext::sock>);

impl Found {
    /// Looks in the established table. Softirq, under RCU.
    pub(crate) fn established(net: Net, tuple: &Tuple) -> Option<Self> {
        let sport = tuple.src_port.to_be();
        // SAFETY: `net` is the hook's, RCU is held, the addresses are as long as the family's.
        let sk = unsafe {
            match tuple.family {
                Family::V4 => ext::__inet_lookup_established(
                    net.raw(),
                    v4(&tuple.src),
                    sport,
                    v4(&tuple.dst),
                    tuple.dst_port,
                    tuple.iif,
                    tuple.sdif,
                ),
                Family::V6 => ext::__inet6_lookup_established(
                    net.raw(),
                    tuple.src.as_ptr().cast(),
                    sport,
                    tuple.dst.as_ptr().cast(),
                    tuple.dst_port,
                    tuple.iif,
                    tuple.sdif,
                ),
            }
        };
        NonNull::new(sk).map(Self)
    }

    /// Leaves it in the packet, so that TCP need not look again.
    pub(crate) fn leave_in(self, skb: &mut Arriving<'_>) {
        // SAFETY: It is from a lookup; its reference becomes the skb's.
        unsafe { skb.set_owner(self.0.as_ptr()) };
        core::mem::forget(self);
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        // SAFETY: The lookup took the reference.
        unsafe { ext::sock_gen_put(self.0.as_ptr()) };
    }
}

fn v4(addr: &[u8; 16]) -> u32 {
    let [a, b, c, d, ..] = *addr;
    u32::from_ne_bytes([a, b, c, d])
}

/// The listener that a segment is for; without a reference, valid under RCU. `doff` is the length
/// of the TCP header. Softirq, under RCU.
pub(crate) fn listener(
    net: Net,
    skb: &mut Arriving<'_>,
    tuple: &Tuple,
    doff: u32,
) -> *mut ext::sock {
    let sport = tuple.src_port.to_be();
    // SAFETY: As in `Found::established`. A program that selects among SO_REUSEPORT sockets is
    // shown the skb, with its data at the transport header, which is linear.
    unsafe {
        match tuple.family {
            Family::V4 => ext::__inet_lookup_listener(
                net.raw(),
                skb.as_ptr(),
                doff as c_int,
                v4(&tuple.src),
                sport,
                v4(&tuple.dst),
                tuple.dst_port,
                tuple.iif,
                tuple.sdif,
            ),
            Family::V6 => ext::inet6_lookup_listener(
                net.raw(),
                skb.as_ptr(),
                doff as c_int,
                tuple.src.as_ptr().cast(),
                sport,
                tuple.dst.as_ptr().cast(),
                tuple.dst_port,
                tuple.iif,
                tuple.sdif,
            ),
        }
    }
}

/// The UDP socket that a datagram is for, if it is for one only; it is left in the packet, so that
/// UDP does not look again, and BPF programs that select one are asked once. Null if there is none.
/// Valid under RCU. Softirq, under RCU; the packet's data is at the transport header, which is
/// linear, and it has no owner.
pub(crate) fn datagram_socket(net: Net, skb: &mut Arriving<'_>, tuple: &Tuple) -> *mut ext::sock {
    let (sport, dport) = (tuple.src_port.to_be(), tuple.dst_port.to_be());
    // SAFETY: `net` is the hook's, RCU is held, the addresses are as long as the family's.
    let sk = unsafe {
        match tuple.family {
            Family::V4 => ext::pmskb_udp4_lookup(
                net.raw(),
                skb.as_ptr(),
                v4(&tuple.src),
                sport,
                v4(&tuple.dst),
                dport,
                tuple.iif,
                tuple.sdif,
            ),
            Family::V6 => ext::pmskb_udp6_lookup(
                net.raw(),
                skb.as_ptr(),
                tuple.src.as_ptr().cast(),
                sport,
                tuple.dst.as_ptr().cast(),
                dport,
                tuple.iif,
                tuple.sdif,
            ),
        }
    };
    if !sk.is_null() {
        // SAFETY: Just found, under RCU, which netfilter holds until the protocol has the packet.
        unsafe { skb.lend_owner(sk) };
    }
    sk
}

/// The context of the socket that a packet is for: the socket's own, or for a request its
/// listener's. None if it is not one of ours. Under RCU, for as long as the answer is used.
///
/// # Safety
///
/// `sk` is null, or a socket, request or time-wait socket that stays while RCU is held.
pub(crate) unsafe fn ctx_of<'rcu>(sk: *mut ext::sock) -> Option<&'rcu Ctx> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: As the caller says.
    let full = unsafe { ext::pmskb_full_sock(sk) };
    if full.is_null() {
        return None;
    }
    // SAFETY: A full socket; a request's listener stays as long as the request.
    unsafe { Ctx::of(full) }
}

/// A socket under `lock_sock()`. Process context.
///
/// # Invariants
///
/// `sk` is a valid full socket, locked by this thread.
pub(crate) struct Locked<'a> {
    sk: NonNull<ext::sock>,
    _sk: PhantomData<&'a mut ext::sock>,
    _thread: NotThreadSafe,
}

impl<'a> Locked<'a> {
    /// Locks a socket; sleeps.
    ///
    /// # Safety
    ///
    /// `sk` is a valid TCP or UDP socket for `'a`, and this thread has not locked it.
    pub(crate) unsafe fn new(sk: NonNull<ext::sock>) -> Self {
        // SAFETY: As the caller says.
        unsafe { ext::pmskb_lock_sock(sk.as_ptr()) };
        // INVARIANT: Locked just now.
        Self {
            sk,
            _sk: PhantomData,
            _thread: NotThreadSafe,
        }
    }

    /// Locks a socket, unless somebody else has it locked.
    ///
    /// # Safety
    ///
    /// `sk` is a valid TCP or UDP socket for `'a`.
    pub(crate) unsafe fn try_new(sk: NonNull<ext::sock>) -> Option<Self> {
        // SAFETY: As the caller says.
        let locked = unsafe { ext::pmskb_trylock_sock(sk.as_ptr()) };
        // Not made before: what is made unlocks when it goes.
        // INVARIANT: Locked just now.
        locked.then(|| Self {
            sk,
            _sk: PhantomData,
            _thread: NotThreadSafe,
        })
    }

    /// Its context, if it is one of ours.
    pub(crate) fn ctx(&self) -> Option<&'a Ctx> {
        // SAFETY: A full socket by the type invariants; a context goes when its socket is closed,
        // with the socket locked, or later: a UDP socket is locked all the time, or its file is
        // open.
        unsafe { Ctx::of(self.sk.as_ptr()) }
    }

    /// Of a UDP socket, the datagrams after `last`, as [`Datagram::after`]; of others none.
    pub(crate) fn datagrams_after(
        &self,
        last: Option<&Kept>,
    ) -> impl Iterator<Item = Datagram<'a>> {
        // SAFETY: By the type invariants; one that is no UDP socket has none.
        unsafe { Datagram::after(self.sk, last) }
    }

    /// Tells who waits that there is something to receive, though nothing has come.
    pub(crate) fn tell_ready(&self) {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sk_tell_ready(self.sk.as_ptr()) };
    }

    /// Its addresses and ports.
    pub(crate) fn flow(&self) -> Flow {
        let mut raw = ext::pmskb_flow::default();
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_flow(self.sk.as_ptr(), &mut raw) };
        Flow::from(&raw)
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { ext::release_sock(self.sk.as_ptr()) };
    }
}

/// A TCP socket under `lock_sock()`, with its receive queue. Process context.
///
/// # Invariants
///
/// It is a TCP socket.
pub(crate) struct Stream<'a>(Locked<'a>);

impl<'a> Deref for Stream<'a> {
    type Target = Locked<'a>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Stream<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Stream<'_> {
    /// Locks a socket; sleeps.
    ///
    /// # Safety
    ///
    /// As [`Locked::new`], and it is a TCP socket.
    pub(crate) unsafe fn new(sk: NonNull<ext::sock>) -> Self {
        // SAFETY: As the caller says.
        // INVARIANT: As the caller says.
        Self(unsafe { Locked::new(sk) })
    }

    /// Locks a socket, unless somebody else has it locked.
    ///
    /// # Safety
    ///
    /// `sk` is a valid TCP socket for `'a`.
    pub(crate) unsafe fn try_new(sk: NonNull<ext::sock>) -> Option<Self> {
        // SAFETY: As the caller says.
        // INVARIANT: As the caller says.
        unsafe { Locked::try_new(sk) }.map(Self)
    }

    /// One that is locked already; it stays so.
    ///
    /// # Safety
    ///
    /// `sk` is a valid TCP socket for `'a`, and this thread has it locked.
    pub(crate) unsafe fn lent(sk: NonNull<ext::sock>) -> ManuallyDrop<Self> {
        // INVARIANT: As the caller says.
        ManuallyDrop::new(Self(Locked {
            sk,
            _sk: PhantomData,
            _thread: NotThreadSafe,
        }))
    }

    fn raw(&self) -> &ext::sock {
        // SAFETY: By the type invariants.
        unsafe { self.0.sk.as_ref() }
    }

    fn tcp(&self) -> &ext::tcp_sock {
        // SAFETY: By the type invariants it is a TCP socket, which starts with the `sock`.
        unsafe { self.0.sk.cast::<ext::tcp_sock>().as_ref() }
    }

    fn state(&self) -> u32 {
        // SAFETY: By the type invariants.
        u32::from(unsafe { ext::pmskb_sk_state(self.0.sk.as_ptr()) })
    }

    /// It is listening.
    pub(crate) fn listens(&self) -> bool {
        self.state() == ext::PMSKB_TCP_LISTEN
    }

    /// It is not connected, or not any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.state() == ext::PMSKB_TCP_CLOSE
    }

    /// Sequence number of the next byte to be received by the application.
    pub(crate) fn copied_seq(&self) -> u32 {
        self.tcp().copied_seq
    }

    /// The next byte is the urgent one.
    pub(crate) fn at_urgent(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_tcp_at_urg(self.0.sk.as_ptr()) }
    }

    /// The byte that is so far from the next one is the urgent one, and not to be received in line.
    pub(crate) fn passes_urgent(&self, off: usize) -> bool {
        let at = self.copied_seq().wrapping_add(off as u32);
        self.before_urgent(at) == 0 && !self.urgent_in_line()
    }

    /// Where a look begins, from the next byte on (`SO_PEEK_OFF`).
    pub(crate) fn peek_offset(&self) -> usize {
        // SAFETY: By the type invariants.
        let off = unsafe { ext::pmskb_sk_peek_off(self.0.sk.as_ptr()) };
        off.max(0) as usize
    }

    /// So many bytes were received, or with `peek` looked at: where the next look begins.
    pub(crate) fn peek_moved(&mut self, n: usize, peek: bool) {
        let n = c_int::try_from(n).unwrap_or(c_int::MAX);
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sk_peek_moved(self.0.sk.as_ptr(), if peek { -n } else { n }) };
    }

    /// How many bytes from sequence number `seq` on there are before the urgent one; `u32::MAX` if
    /// there is none.
    pub(crate) fn before_urgent(&self, seq: u32) -> u32 {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_tcp_urg_after(self.0.sk.as_ptr(), seq) }
    }

    /// There is an urgent byte that is not to be received in line, and is not one of the next `count`
    /// bytes.
    pub(crate) fn urgent_is_beyond(&self, count: usize) -> bool {
        let end = self.copied_seq().wrapping_add(count as u32);
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_tcp_urg_beyond(self.0.sk.as_ptr(), end) }
    }

    /// Urgent data is to be received in line.
    pub(crate) fn urgent_in_line(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sock_urginline(self.0.sk.as_ptr()) }
    }

    /// Forgets the urgent mark, if it has been passed.
    pub(crate) fn urgent_passed(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_tcp_urg_passed(self.0.sk.as_ptr()) };
    }

    /// Its queues are being repaired (TCP_REPAIR).
    pub(crate) fn in_repair(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_tcp_in_repair(self.0.sk.as_ptr()) }
    }

    /// What a receive answers when there is nothing to receive, and there will be nothing: bytes
    /// (0), or an errno. None if it is worth waiting.
    pub(crate) fn ended(&mut self) -> Option<Result<usize>> {
        // SAFETY: By the type invariants.
        if unsafe { ext::pmskb_sock_flag_done(self.0.sk.as_ptr()) } {
            return Some(Ok(0));
        }
        // SAFETY: By the type invariants.
        let error = unsafe { ext::pmskb_sock_error(self.0.sk.as_ptr()) };
        if error != 0 {
            return Some(Err(Error::from_errno(error)));
        }
        if self.stopped() {
            return Some(Ok(0));
        }
        if self.is_closed() {
            // Never connected.
            return Some(Err(errno(bindings::ENOTCONN)));
        }
        None
    }

    /// Receiving was shut down.
    pub(crate) fn stopped(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sk_rcv_shutdown(self.0.sk.as_ptr()) }
    }

    /// An error is pending; it stays pending.
    pub(crate) fn has_error(&self) -> bool {
        self.raw().sk_err != 0
    }

    /// How long a receive may wait, jiffies.
    pub(crate) fn timeout(&self, noblock: bool) -> c_long {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sock_rcvtimeo(self.0.sk.as_ptr(), noblock) }
    }

    /// How many bytes a receive waits for, at least 1.
    pub(crate) fn low_water(&self) -> usize {
        self.raw().sk_rcvlowat.max(1) as usize
    }

    /// Sleeps until the receive queue changes, `timeout` passes or a signal comes. The lock is
    /// given up meanwhile.
    pub(crate) fn wait(&mut self, timeout: &mut c_long) -> Result {
        // SAFETY: By the type invariants; nothing of the queue is borrowed.
        to_result(unsafe {
            let tail = ext::pmskb_rx_tail(self.0.sk.as_ptr());
            ext::sk_wait_data(self.0.sk.as_ptr(), timeout, tail)
        })
    }

    /// Sends as `sendmsg()` does with `msg`: how many bytes. The lock is given up while it waits.
    ///
    /// # Safety
    ///
    /// `msg` is for sending `len` bytes.
    pub(crate) unsafe fn send(&mut self, msg: &mut bindings::msghdr, len: usize) -> Result<usize> {
        // SAFETY: By the type invariants; `msg` as the caller says.
        let sent = unsafe { ext::tcp_sendmsg_locked(self.0.sk.as_ptr(), msg, len) };
        usize::try_from(sent).map_err(|_| Error::from_errno(sent))
    }

    /// Lets in what came for it while it was locked.
    pub(crate) fn flush_backlog(&mut self) {
        // SAFETY: By the type invariants; nothing of the queues is borrowed.
        unsafe { ext::pmskb_sk_flush_backlog(self.0.sk.as_ptr()) };
    }

    /// A send answers with an error now.
    pub(crate) fn sends_no_more(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sk_sends_no_more(self.0.sk.as_ptr()) }
    }

    /// How long a send may wait, jiffies.
    pub(crate) fn send_timeout(&self, noblock: bool) -> c_long {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_sock_sndtimeo(self.0.sk.as_ptr(), noblock) }
    }

    /// Sleeps until there is room in the send buffer, `timeout` passes, a signal comes or the
    /// connection ends. The lock is given up meanwhile. Errors are for [`Self::send_error`].
    pub(crate) fn wait_for_room(&mut self, timeout: &mut c_long) -> Result {
        // SAFETY: By the type invariants; nothing of the queue is borrowed.
        to_result(unsafe { ext::sk_stream_wait_memory(self.0.sk.as_ptr(), timeout) })
    }

    /// What a send with these flags answers to an error: the socket's own, if there is one; it sends
    /// `SIGPIPE`.
    pub(crate) fn send_error(&mut self, flags: c_int, error: Error) -> Error {
        // SAFETY: By the type invariants.
        Error::from_errno(unsafe {
            ext::sk_stream_error(self.0.sk.as_ptr(), flags, error.to_errno())
        })
    }

    /// Shows the bytes of the receive queue to `actor` as `tcp_read_sock()` does: a packet, an
    /// offset in it, how many bytes from there; the actor answers how many of them it took, or
    /// an error, which is the answer if nothing at all was taken. Stops before urgent data.
    pub(crate) fn read(
        &mut self,
        actor: &mut dyn FnMut(&Queued<'_>, u32, u32) -> Result<u32>,
    ) -> Result<usize> {
        struct Arg<'b> {
            actor: &'b mut dyn FnMut(&Queued<'_>, u32, u32) -> Result<u32>,
        }
        /// # Safety
        ///
        /// For `tcp_read_sock()`, with the descriptor below.
        unsafe extern "C" fn shim(
            desc: *mut bindings::read_descriptor_t,
            skb: *mut bindings::sk_buff,
            off: u32,
            len: usize,
        ) -> c_int {
            // SAFETY: `tcp_read_sock` passes on the descriptor below, and a packet of the locked
            // socket's queue.
            let (arg, queued) = unsafe {
                let arg = (*desc).arg.data.cast::<Arg<'_>>();
                (&mut *arg, Queued::new(skb))
            };
            let len = u32::try_from(len)
                .unwrap_or(u32::MAX)
                .min(c_int::MAX as u32);
            let Some(queued) = queued else {
                return 0;
            };
            match (arg.actor)(&queued, off, len) {
                Ok(n) => n.min(len) as c_int,
                Err(e) => e.to_errno(),
            }
        }
        let mut arg = Arg { actor };
        let mut desc = bindings::read_descriptor_t {
            count: 1,
            ..Default::default()
        };
        desc.arg.data = (&raw mut arg).cast::<c_void>();
        // SAFETY: By the type invariants; the actor does not give up the lock.
        let res = unsafe { ext::tcp_read_sock(self.0.sk.as_ptr(), &mut desc, Some(shim)) };
        if res < 0 {
            return Err(Error::from_errno(res));
        }
        Ok(res as usize)
    }

    /// Sequence number after the last byte in the receive queue; if there is none, of the next byte
    /// to be received.
    pub(crate) fn queue_end(&self) -> u32 {
        let start = self.copied_seq();
        // SAFETY: By the type invariants; nothing changes the queue meanwhile.
        let last = unsafe { Queued::new(ext::pmskb_rx_tail(self.0.sk.as_ptr())) };
        let end = last.map_or(start, |last| last.seq().wrapping_add(last.len()));
        match end.wrapping_sub(start) as i32 {
            ..0 => start,
            _ => end,
        }
    }

    /// Shows what is in the receive queue from sequence number `from` on to `look`, each byte once,
    /// and leaves it there: a packet, an offset in it, how many bytes from there; whether to go on,
    /// or an error, which is the answer then.
    pub(crate) fn look(
        &self,
        from: u32,
        look: &mut dyn FnMut(&Queued<'_>, u32, u32) -> Result<bool>,
    ) -> Result {
        let mut skb = core::ptr::null_mut();
        let mut at = from;
        loop {
            // SAFETY: By the type invariants; `skb` is null or in the queue, which nothing changes
            // meanwhile.
            skb = unsafe { ext::pmskb_rx_next(self.0.sk.as_ptr(), skb) };
            // SAFETY: As above.
            let Some(queued) = (unsafe { Queued::new(skb) }) else {
                return Ok(());
            };
            // One may begin with bytes that the one before has, too.
            let off = (at.wrapping_sub(queued.seq()) as i32).max(0) as u32;
            if off < queued.len() {
                if !look(&queued, off, queued.len() - off)? {
                    return Ok(());
                }
                at = queued.seq().wrapping_add(queued.len());
            }
        }
    }

    /// Shows the next byte alone to `actor`, as [`Self::read`], even if it is the urgent one.
    pub(crate) fn read_one(
        &mut self,
        actor: &mut dyn FnMut(&Queued<'_>, u32, u32) -> Result<u32>,
    ) -> Result<usize> {
        let mut off = 0;
        let seq = self.copied_seq();
        // SAFETY: By the type invariants.
        let skb = unsafe { ext::tcp_recv_skb(self.0.sk.as_ptr(), seq, &mut off) };
        // SAFETY: It is in the locked socket's queue, and nothing removes it here.
        let Some(queued) = (unsafe { Queued::new(skb) }) else {
            return Ok(0);
        };
        if off >= queued.len() {
            return Ok(0);
        }
        let n = actor(&queued, off, 1)?.min(1) as usize;
        self.skip(n);
        Ok(n)
    }

    /// Consumes `n` bytes that are in the queue.
    pub(crate) fn skip(&mut self, n: usize) {
        // SAFETY: By the type invariants.
        unsafe { ext::tcp_read_done(self.0.sk.as_ptr(), n) };
    }
}

/// A reference of a datagram that is or was in a queue.
///
/// # Invariants
///
/// It is ours.
#[derive(PartialEq, Eq)]
pub(crate) struct Kept(NonNull<bindings::sk_buff>);

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::consume_skb(self.0.as_ptr()) };
    }
}

/// A datagram in the receive queue of a UDP socket. It is still in the queue; [`Datagram::take`] it
/// out.
///
/// # Invariants
///
/// `sk` is a UDP socket that stays for `'a`; `skb` is or was in its queue.
pub(crate) struct Datagram<'a> {
    sk: NonNull<ext::sock>,
    skb: Kept,
    /// Where a look at it begins.
    off: u32,
    _sk: PhantomData<&'a ext::sock>,
}

/// What is in a UDP socket's queue.
pub(crate) enum First<'a> {
    /// This one.
    Datagram(Datagram<'a>),
    /// Nothing, and there will be nothing: receiving was shut down.
    End,
}

impl<'a> Datagram<'a> {
    /// Most that [`Self::after`] answers.
    pub(crate) const BATCH: usize = 64;

    /// The first one, or with `MSG_PEEK` the one at `SO_PEEK_OFF`; as a receive with these flags
    /// waits for it (`MSG_DONTWAIT`, the socket's timeout, signals). Errors as such a receive,
    /// pending ones of the socket among them. Process context; sleeps without `MSG_DONTWAIT`.
    ///
    /// # Safety
    ///
    /// `sk` is a valid UDP socket for `'a`.
    pub(crate) unsafe fn first(sk: NonNull<ext::sock>, flags: c_int) -> Result<First<'a>> {
        let (mut off, mut err) = (0, 0);
        // SAFETY: As the caller says.
        let skb = unsafe { ext::pmskb_udp_peek(sk.as_ptr(), flags, &mut off, &mut err) };
        match NonNull::new(skb) {
            // INVARIANT: As the caller says; peeking takes a reference.
            Some(skb) => Ok(First::Datagram(Self {
                sk,
                skb: Kept(skb),
                off: u32::try_from(off).unwrap_or(0),
                _sk: PhantomData,
            })),
            None if err == 0 => Ok(First::End),
            None => Err(Error::from_errno(err)),
        }
    }

    /// Those that come after `last`: from the first one on, if that is none or not in the queue any
    /// more. [`Self::BATCH`] at most, and none if it is no UDP socket. Process context.
    ///
    /// # Safety
    ///
    /// `sk` is a valid full socket for `'a`.
    unsafe fn after(
        sk: NonNull<ext::sock>,
        last: Option<&Kept>,
    ) -> impl Iterator<Item = Datagram<'a>> {
        /// The rest goes with it.
        struct Batch<'a> {
            skbs: [*mut bindings::sk_buff; Datagram::BATCH],
            at: usize,
            sk: NonNull<ext::sock>,
            _sk: PhantomData<&'a ext::sock>,
        }
        impl<'a> Iterator for Batch<'a> {
            type Item = Datagram<'a>;

            fn next(&mut self) -> Option<Datagram<'a>> {
                let skb = NonNull::new(*self.skbs.get(self.at)?)?;
                self.at += 1;
                // INVARIANT: C took a reference of each; as the caller of `after` says.
                Some(Datagram {
                    sk: self.sk,
                    skb: Kept(skb),
                    off: 0,
                    _sk: PhantomData,
                })
            }
        }
        impl Drop for Batch<'_> {
            fn drop(&mut self) {
                self.for_each(drop);
            }
        }
        let mut skbs = [core::ptr::null_mut(); Datagram::BATCH];
        let last = last.map_or(core::ptr::null(), |last| last.0.as_ptr().cast_const());
        // SAFETY: As the caller says; there is room for as many.
        unsafe {
            ext::pmskb_udp_after(sk.as_ptr(), last, skbs.as_mut_ptr(), Datagram::BATCH as u32)
        };
        Batch {
            skbs,
            at: 0,
            sk,
            _sk: PhantomData,
        }
    }

    /// Whether it is this one.
    pub(crate) fn is(&self, kept: &Kept) -> bool {
        self.skb.0 == kept.0
    }

    /// The one before it in the queue.
    pub(crate) fn before(&self) -> Option<Kept> {
        // SAFETY: By the type invariants.
        let before = unsafe { ext::pmskb_udp_before(self.sk.as_ptr(), self.skb.0.as_ptr()) };
        // INVARIANT: C took the reference.
        NonNull::new(before).map(Kept)
    }

    /// Whether it comes before `last`, or is it, and that is still in the queue.
    pub(crate) fn is_upto(&self, last: &Kept) -> bool {
        // SAFETY: By the type invariants; there are references of both.
        unsafe {
            let (skb, last) = (self.skb.0.as_ptr(), last.0.as_ptr());
            ext::pmskb_udp_is_upto(self.sk.as_ptr(), skb, last)
        }
    }

    /// What it is made of. `number` tells it apart from others that are alike.
    pub(crate) fn queued(&self, number: u32) -> Queued<'_> {
        // SAFETY: By the type invariants.
        unsafe { Queued::datagram(self.skb.0, number) }
    }

    /// Where in it a look begins.
    pub(crate) fn off(&self) -> u32 {
        self.off
    }

    /// Its addresses and ports, the local ones as the packet has them.
    pub(crate) fn flow(&self) -> Flow {
        let mut raw = ext::pmskb_flow::default();
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_udp_flow(self.skb.0.as_ptr(), &mut raw) };
        Flow::from(&raw)
    }

    /// Whether its checksum is right, if that is not known yet.
    pub(crate) fn is_right(&self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_udp_is_right(self.skb.0.as_ptr()) }
    }

    /// Drops it and counts it, as UDP does with one whose checksum is not right.
    pub(crate) fn discard(self) {
        // SAFETY: By the type invariants.
        unsafe { ext::pmskb_udp_discard(self.sk.as_ptr(), self.skb.0.as_ptr()) };
    }

    /// Leaves it in the queue, but keeps it.
    pub(crate) fn keep(self) -> Kept {
        self.skb
    }

    /// Leaves it in the queue, and receives it all the same: `MSG_PEEK`.
    pub(crate) fn peek(self) -> Received<'a> {
        // INVARIANT: It was peeked at.
        Received {
            datagram: self,
            peeked: true,
        }
    }

    /// Takes it out of the queue. None if somebody else has.
    pub(crate) fn take(self) -> Option<Received<'a>> {
        // SAFETY: By the type invariants.
        // INVARIANT: It was in the queue, so nobody else takes it from there.
        let taken = unsafe { ext::pmskb_udp_take(self.sk.as_ptr(), self.skb.0.as_ptr()) };
        taken.then(|| Received {
            datagram: self,
            peeked: false,
        })
    }
}

/// A datagram that was received.
///
/// # Invariants
///
/// We took it out of the queue, or peeked at it.
pub(crate) struct Received<'a> {
    datagram: Datagram<'a>,
    peeked: bool,
}

impl Received<'_> {
    /// Whether it is this one.
    pub(crate) fn is(&self, kept: &Kept) -> bool {
        self.datagram.is(kept)
    }

    /// Its bytes, from where the look begins.
    pub(crate) fn left(&self) -> u32 {
        let len = self.datagram.queued(0).len();
        len.saturating_sub(self.datagram.off)
    }

    /// What it is made of.
    pub(crate) fn queued(&self) -> Queued<'_> {
        self.datagram.queued(0)
    }

    /// Where in it a look begins.
    pub(crate) fn off(&self) -> u32 {
        self.datagram.off
    }

    /// Counts it, and tells what UDP's own `recvmsg()` would beside its bytes, of which `len` were
    /// received: the sender's address, control messages. Process context, sleeps, the socket not
    /// locked.
    ///
    /// # Safety
    ///
    /// `msg` is what `recvmsg()` was called with.
    pub(crate) unsafe fn tell(self, msg: NonNull<bindings::msghdr>, len: usize) {
        let Datagram { sk, skb, off, .. } = &self.datagram;
        let len = c_int::try_from(len).unwrap_or(c_int::MAX);
        // SAFETY: By the type invariants; `msg` as the caller says. A datagram has 64 KiB at most.
        unsafe {
            let (sk, skb) = (sk.as_ptr(), skb.0.as_ptr());
            ext::pmskb_udp_tell(sk, msg.as_ptr(), skb, *off as c_int, len, self.peeked);
        }
    }

    /// Its bytes could not be given out: counts it, if it is lost.
    pub(crate) fn lost(self) {
        if !self.peeked {
            let Datagram { sk, skb, .. } = &self.datagram;
            // SAFETY: By the type invariants.
            unsafe { ext::pmskb_udp_lost(sk.as_ptr(), skb.0.as_ptr()) };
        }
    }
}

/// What a waiting receive answers to a signal; none is pending: `None`.
pub(crate) fn interrupted(timeout: c_long) -> Option<Error> {
    crate::host::signal_pending().then(|| {
        // SAFETY: No requirements.
        Error::from_errno(unsafe { ext::pmskb_sock_intr_errno(timeout) })
    })
}

/// An open socket, by descriptor.
pub(crate) struct SocketFile(NonNull<bindings::socket>);

impl SocketFile {
    /// `EBADF` if `fd` is not open, `ENOTSOCK` if it is not a socket. Process context.
    pub(crate) fn get(fd: i32) -> Result<Self> {
        let mut err = 0;
        // SAFETY: `err` is valid.
        let sock = unsafe { ext::pmskb_socket_get(fd, &mut err) };
        match NonNull::new(sock) {
            Some(sock) => Ok(Self(sock.cast())),
            None => Err(Error::from_errno(err)),
        }
    }

    /// What it is, if it is TCP or UDP over IPv4 or IPv6.
    pub(crate) fn transport(&self) -> Option<Transport> {
        // SAFETY: We have a reference to the file.
        unsafe {
            if ext::pmskb_is_tcp(self.0.as_ptr().cast()) {
                Some(Transport::Tcp)
            } else if ext::pmskb_is_udp(self.0.as_ptr().cast()) {
                Some(Transport::Udp)
            } else {
                None
            }
        }
    }

    /// The socket, for C.
    pub(crate) fn as_ptr<T>(&self) -> *mut T {
        self.0.as_ptr().cast()
    }

    /// The sock. It stays as long as the descriptor's file, to which we have a reference.
    pub(crate) fn sk(&self) -> Result<NonNull<ext::sock>> {
        // SAFETY: As above.
        let sk = unsafe { ext::pmskb_socket_sk(self.0.as_ptr().cast()) };
        NonNull::new(sk).ok_or(errno(bindings::ENOTCONN))
    }

    /// `setsockopt(fd, SOL_TCP, TCP_ULP, "pmskb")`.
    pub(crate) fn set_ulp(&self) -> Result {
        // SAFETY: As above; no lock is held.
        to_result(unsafe { ext::pmskb_set_ulp(self.0.as_ptr().cast()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // SAFETY: `get` took the reference.
        unsafe { ext::pmskb_socket_put(self.0.as_ptr().cast()) };
    }
}

/// What `setsockopt()` is given: user or kernel memory, read at most once each byte.
pub(crate) struct OptVal {
    ptr: bindings::sockptr_t,
    len: usize,
}

impl OptVal {
    /// # Safety
    ///
    /// `ptr` and `len` are what `proto.setsockopt` was called with.
    pub(crate) unsafe fn new(ptr: bindings::sockptr_t, len: u32) -> Self {
        Self {
            ptr,
            len: len as usize,
        }
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Reads a value at `off`. `EINVAL` if there are fewer bytes, `EFAULT`.
    pub(crate) fn read_at<T: kernel::transmute::FromBytes + Default>(
        &self,
        off: usize,
    ) -> Result<T> {
        let size = core::mem::size_of::<T>();
        if off.checked_add(size).is_none_or(|end| end > self.len) {
            return Err(EINVAL);
        }
        let mut value = T::default();
        // SAFETY: `value` has `size` bytes, and any bytes are a value of its type.
        to_result(unsafe {
            ext::pmskb_copy_from_sockptr((&raw mut value).cast::<c_void>(), self.ptr, off, size)
        })?;
        Ok(value)
    }

    /// Reads the only value. `EINVAL` if the length is another, `EFAULT`.
    pub(crate) fn read<T: kernel::transmute::FromBytes + Default>(&self) -> Result<T> {
        if self.len != core::mem::size_of::<T>() {
            return Err(EINVAL);
        }
        self.read_at(0)
    }
}

/// From one of `kernel::bindings`' errno constants.
pub(crate) fn errno(e: u32) -> Error {
    Error::from_errno(-(e as i32))
}
