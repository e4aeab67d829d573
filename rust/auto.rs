// SPDX-License-Identifier: GPL-2.0

//! `PMSKB_AUTO_PERSIST`: what the transport has accepted is in the log before anybody gets it.
//!
//! What is in TCP's receive queue was accepted: in order, checked, acknowledged. [`persist`] makes
//! log records of what is there and has none yet, one record a packet, with the packet's checksum,
//! stamp, flow and sequence number; where each call stands is a sequence number (`Own::logged`). A
//! receive in bytes persists first, and then lets TCP's own code give out as much as that was; one
//! in descriptors does the same under one lock (`receive.rs`).
//!
//! What is in UDP's was not always checked: [`persist_datagrams`] does it, and makes a record of each
//! that is right; of those that came as one packet, one each. Which of them have one is a reference
//! of the last that does (`Own::recorded`), which whoever takes datagrams out cannot make wrong; if
//! not all of one packet's could be made, the next try goes on with the next (`Own::begun`).
//! Receives of either kind are `datagram.rs`.
//!
//! - Calls that read from TCP take turns (`Ctx::turn`): what TCP's code gives out after ours has let
//!   go of the socket's lock must be what ours has persisted.
//! - For a socket that nobody reads there is a work item: the hook that sees a packet of TCP puts
//!   the socket on a list ([`attach::wait`]), as does UDP when it has queued one, and 10 ms later
//!   what came is persisted. A packet may still be on its way from the hook to the queue then, so a
//!   socket of TCP stays on the list for two ticks. One that somebody has locked, for as long as he
//!   likes, is passed over.
//! - `close()` and a disconnect persist what is left.
//! - If a record cannot be made, the receive fails with that errno (`ENOSPC`, `ENOBUFS`, `ENOMEM`),
//!   nothing is given out or lost, the window closes, and the work item tries again each second.
//!
//! Process context. The order: a turn, the socket's lock, the store's.

use crate::{
    attach::{self, Ctx, Own},
    bindings as ext,
    descriptor::{Control, Source},
    host, place, receive,
    skb::Queued,
    sock::{self, errno, Datagram, Locked, Received, Stream, Transport},
    store::Store,
    submit::{Log, Logged},
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    ffi::c_int,
    prelude::*,
    sync::{atomic::Relaxed, rcu},
};

/// From a packet's arrival to its record, if nobody reads: ms.
const DELAY: u32 = 10;
/// Until the next try, after one that failed: ms.
const RETRY: u32 = 1000;
/// Until the next look at a connection that nobody has accepted: ms.
const UNACCEPTED: u32 = 100;
/// Ticks that a packet may need from the hook to the receive queue.
const ON_ITS_WAY: usize = 2;
/// Batches of datagrams that are made records of in one go, while others wait for the socket.
const BATCHES: u32 = 8;
/// More than a receive buffer can have: what is in it stays there.
const MOST_BATCHES: u32 = 1 << 16;

/// `proto.recvmsg`.
pub(crate) type Recv =
    unsafe extern "C" fn(*mut ext::sock, *mut bindings::msghdr, usize, c_int) -> c_int;

/// Makes records of what is in the receive queue and has none. How many bytes from the next one to be
/// read on have theirs; the error, if that is not all of them.
pub(crate) fn persist(locked: &mut Stream<'_>, ctx: &Ctx) -> (usize, Result) {
    let start = locked.copied_seq();
    let end = locked.queue_end();
    let own = ctx.own(locked);
    // Others are behind, or of an earlier connection.
    let in_queue = |at: &u32| at.wrapping_sub(start) <= end.wrapping_sub(start);
    let mut at = own.logged.filter(in_queue).unwrap_or(start);
    let mut result = Ok(());
    while at != end && result.is_ok() {
        let done;
        (done, result) = batch(locked, ctx, at);
        at = at.wrapping_add(done);
        if done == 0 {
            break;
        }
    }
    ctx.own(locked).logged = Some(at);
    if result.is_err() {
        ctx.failing.store(1, Relaxed);
    }
    (at.wrapping_sub(start) as usize, result)
}

/// Makes some records, from sequence number `from` on; how many bytes they are of.
fn batch(locked: &mut Stream<'_>, ctx: &Ctx, from: u32) -> (u32, Result) {
    let Some(store) = ctx.own(locked).store.clone() else {
        return (0, Err(EIO));
    };
    let _inside = match store.enter() {
        Ok(inside) => inside,
        Err(e) => return (0, Err(e)),
    };
    let mut log = Log::of_stream(&store, &locked.flow(), ctx.crc32c(&store));
    // Taken out while the lock is lent to the queue, and put back under the same lock.
    let mut own = ctx.take_own(locked);
    // What has a record does not count, so it can always go on.
    let over = own.tokens.count() == 0;
    let mut source = Source {
        ctx,
        store: &store,
        cursor: &mut own.cursor,
    };
    let looked = locked.look(from, &mut |skb: &Queued<'_>, off, len| {
        // Between packets.
        if log.is_full() {
            return Ok(false);
        }
        let mut done = 0;
        while done < len {
            let over = over && log.len() == 0;
            let held = source.hold(skb, off + done, len - done, over)?;
            done += u32::from(held.note.len);
            log.add(held)?;
        }
        Ok(true)
    });
    ctx.put_own(locked, own);
    let (done, committed) = log.commit();
    count(ctx, &store, done);
    (done.bytes, committed.and(looked))
}

fn count(ctx: &Ctx, store: &Store, done: Logged) {
    for counters in [&ctx.counters, &store.counters] {
        counters.logged_bytes.add(u64::from(done.bytes));
    }
}

/// Whether a datagram in the queue has its record, if its checksum is right.
pub(crate) fn is_recorded(locked: &mut Locked<'_>, ctx: &Ctx, datagram: &Datagram<'_>) -> bool {
    let last = &ctx.own(locked).recorded;
    last.as_ref().is_some_and(|last| datagram.is_upto(last))
}

/// A datagram was taken out of the queue.
pub(crate) fn taken(locked: &mut Locked<'_>, ctx: &Ctx, received: &Received<'_>) {
    let recorded = &mut ctx.own(locked).recorded;
    if recorded.as_ref().is_some_and(|last| received.is(last)) {
        // Nothing of it is to stay; and no other has a record.
        *recorded = None;
    }
}

/// A datagram is about to be dropped, which is not the first one if it was only looked at: those
/// before it have their records all the same.
pub(crate) fn discarding(locked: &mut Locked<'_>, ctx: &Ctx, datagram: &Datagram<'_>) {
    let recorded = &mut ctx.own(locked).recorded;
    if recorded.as_ref().is_some_and(|last| datagram.is(last)) {
        *recorded = datagram.before();
    }
}

/// Makes records of some of the datagrams that have none yet, from the first of them on; whether
/// there were any. Those with a wrong checksum are passed over: they are the receiver's to drop.
/// The error, if not even the first one has its record now.
pub(crate) fn persist_datagrams(locked: &mut Locked<'_>, ctx: &Ctx) -> Result<bool> {
    let store = ctx.own(locked).store.clone().ok_or(EIO)?;
    let _inside = store.enter()?;
    let mut log = Log::of_datagrams(&store, ctx.crc32c(&store));
    // Those that have been looked at, and how many records there are up to each one.
    let mut seen = KVVec::with_capacity(Datagram::BATCH, GFP_KERNEL)?;
    let mut looked = Ok(());
    let mut any = false;
    let last = ctx.own(locked).recorded.take();
    let batch = locked.datagrams_after(last.as_ref());
    let own = ctx.own(locked);
    own.recorded = last;
    let begun = own.begun.take();
    for datagram in batch {
        any = true;
        if looked.is_err() || log.is_full() {
            break;
        }
        if datagram.is_right() {
            let begun = begun.as_ref().filter(|(kept, _)| datagram.is(kept));
            let skip = begun.map_or(0, |(_, records)| *records);
            looked = record(&mut log, ctx, own, &store, &datagram, skip);
        }
        let upto = if looked.is_ok() {
            log.len()
        } else {
            usize::MAX
        };
        // There is room.
        seen.push((datagram.keep(), upto), GFP_KERNEL)?;
    }
    let (done, committed) = log.commit();
    count(ctx, &store, done);
    let (mut last, mut next, mut more) = (None, None, done.records);
    for (kept, upto) in seen {
        if upto > done.records {
            next = Some(kept);
            break;
        }
        last = Some(kept);
        more = done.records - upto;
    }
    // Of several datagrams that came as one packet, some may have theirs.
    own.begun = next.and_then(|next| {
        let before = begun.filter(|(kept, _)| *kept == next);
        let records = more + before.map_or(0, |(_, records)| records);
        (records > 0).then_some((next, records))
    });
    if committed.is_err() || looked.is_err() {
        ctx.failing.store(1, Relaxed);
    }
    if last.is_none() && more == 0 {
        committed.and(looked)?;
    }
    if last.is_some() {
        own.recorded = last;
    }
    Ok(any)
}

/// The records of a packet that is one datagram or several, but the first `skip` of them. After an
/// error there are some of them.
fn record(
    log: &mut Log<'_>,
    ctx: &Ctx,
    own: &mut Own,
    store: &Store,
    datagram: &Datagram<'_>,
    skip: usize,
) -> Result {
    own.copied = own.copied.wrapping_add(1);
    let queued = datagram.queued(own.copied | 1 << 31);
    let over = own.tokens.count() == 0;
    let mut source = Source {
        ctx,
        store,
        cursor: &mut own.cursor,
    };
    let flow = datagram.flow();
    let (len, segment) = (queued.len(), queued.segment());
    if len == 0 {
        // What has bytes has their stamp.
        return log.datagram(&flow, Some(place::stamp(&queued.facts())));
    }
    for at in (0..len).step_by(segment.max(1) as usize).skip(skip) {
        let end = at.saturating_add(segment).min(len);
        let records = log.len();
        let added = log.datagram(&flow, None).and_then(|()| {
            let mut at = at;
            while at < end {
                // Over the quota for the first alone.
                let held = source.hold(&queued, at, end - at, over && records == 0)?;
                at += u32::from(held.note.len);
                log.add(held)?;
            }
            Ok(())
        });
        if added.is_err() {
            log.truncate(records);
            return added;
        }
    }
    Ok(())
}

/// `recvmsg()` in bytes of a socket with auto-persist; `base` is TCP's own.
///
/// # Safety
///
/// As `proto.recvmsg` is called.
pub(crate) unsafe fn recvmsg(
    sk: NonNull<ext::sock>,
    msg: NonNull<bindings::msghdr>,
    len: usize,
    flags: c_int,
    base: Recv,
) -> Result<usize> {
    const DONTWAIT: c_int = bindings::MSG_DONTWAIT as c_int;
    let flag = |flag: u32| flags & flag as c_int != 0;
    // SAFETY: As we were called.
    let call = |len: usize, flags: c_int| unsafe {
        match base(sk.as_ptr(), msg.as_ptr(), len, flags) {
            n if n < 0 => Err(Error::from_errno(n)),
            n => Ok(n as usize),
        }
    };
    if flag(bindings::MSG_ERRQUEUE) || len == 0 {
        return call(len, flags);
    }
    // SAFETY: `msg` is valid, and lent to `call` alone.
    let mut control = unsafe { Control::new(msg) };
    let start = control.mark();
    let peek = flag(bindings::MSG_PEEK);
    let mut timeout = None;
    let mut done = 0usize;
    // SAFETY: As we were called.
    unsafe { ext::pmskb_sk_busy_loop(sk.as_ptr(), flag(bindings::MSG_DONTWAIT)) };
    loop {
        // SAFETY: Its file is open.
        let ctx = unsafe { Ctx::of(sk.as_ptr()) }.ok_or(EIO)?;
        let turn = ctx.turn.lock();
        // SAFETY: A TCP socket whose file is open; this thread has not locked it.
        let mut locked = unsafe { Stream::new(sk) };
        if locked.in_repair() {
            return Err(EPERM);
        }
        let (mut ready, result) = persist(&mut locked, ctx);
        if flag(bindings::MSG_OOB) {
            // TCP knows it before the packet is accepted.
            if locked.urgent_is_beyond(ready) {
                result?;
                return Err(EAGAIN);
            }
            drop(locked);
            return call(len, flags);
        }
        let from = if peek { locked.peek_offset() } else { 0 };
        ready = ready.saturating_sub(from);
        if ready > 0 && locked.passes_urgent(from) {
            if done > 0 {
                return Ok(done);
            }
            if !peek {
                locked.skip(1);
                locked.urgent_passed();
                continue;
            }
            ready -= 1;
        }
        let target = match flag(bindings::MSG_WAITALL) {
            true => len,
            false => locked.low_water().min(len),
        };
        let left = timeout.get_or_insert_with(|| locked.timeout(flag(bindings::MSG_DONTWAIT)));
        let over = result.is_err() || receive::ended(&locked, *left);
        if ready > 0 && (!peek || ready >= target || over) {
            let want = ready.min(len - done);
            drop(locked);
            // The last one's are those that count.
            control.rewind(start);
            match call(want, flags | DONTWAIT) {
                Ok(n) if peek => return Ok(n),
                Ok(n) => {
                    done += n;
                    // Less: it ended at urgent data, or at the end of the user's memory.
                    if done >= target || n < want {
                        return Ok(done);
                    }
                    continue;
                }
                Err(_) if done > 0 => return Ok(done),
                Err(e) => return Err(e),
            }
        }
        if done > 0 && over {
            return Ok(done);
        }
        if ready == 0 {
            result?;
        }
        if done == 0 {
            if locked.listens() {
                return Err(errno(bindings::ENOTCONN));
            }
            if let Some(end) = locked.ended() {
                return end;
            }
            if *left == 0 {
                return Err(EAGAIN);
            }
            if let Some(e) = sock::interrupted(*left) {
                return Err(e);
            }
        }
        // Not while others wait for their turn.
        drop(turn);
        match locked.wait(left) {
            Ok(()) => {}
            Err(_) if done > 0 => return Ok(done),
            Err(e) => return Err(e),
        }
    }
}

/// `splice()` from a socket with auto-persist: persists, and has `call` give out at most so many
/// bytes, without waiting. Waits for the first one before, unless `noblock`.
///
/// # Safety
///
/// `sk` is a TCP socket of ours whose file is open, and that this thread has not locked.
pub(crate) unsafe fn splice(
    sk: NonNull<ext::sock>,
    len: usize,
    noblock: bool,
    call: impl Fn(usize) -> isize,
) -> Result<isize> {
    let mut timeout = None;
    loop {
        // SAFETY: Its file is open.
        let ctx = unsafe { Ctx::of(sk.as_ptr()) }.ok_or(EIO)?;
        let turn = ctx.turn.lock();
        // SAFETY: As the caller says.
        let mut locked = unsafe { Stream::new(sk) };
        if locked.listens() {
            return Err(errno(bindings::ENOTCONN));
        }
        let (ready, result) = persist(&mut locked, ctx);
        if ready > 0 {
            drop(locked);
            return Ok(call(ready.min(len)));
        }
        result?;
        if let Some(end) = locked.ended() {
            return end.map(|_| 0);
        }
        let left = timeout.get_or_insert_with(|| locked.timeout(noblock));
        if *left == 0 {
            return Err(EAGAIN);
        }
        if let Some(e) = sock::interrupted(*left) {
            return Err(e);
        }
        drop(turn);
        locked.wait(left)?;
    }
}

/// Persists what is left, before a UDP socket is closed.
pub(crate) fn finish_datagrams(locked: &mut Locked<'_>, ctx: &Ctx) {
    if ctx.auto() {
        // Who closes a socket gives up what is in it.
        let _ = more_datagrams(locked, ctx, MOST_BATCHES);
    }
}

/// Makes records of datagrams that have none, of so many batches; whether there may be more.
fn more_datagrams(locked: &mut Locked<'_>, ctx: &Ctx, batches: u32) -> Result<bool> {
    for _ in 0..batches {
        if !persist_datagrams(locked, ctx)? {
            return Ok(false);
        }
        host::resched();
    }
    Ok(true)
}

/// Persists what is left, before a TCP socket is closed or disconnected.
pub(crate) fn finish(locked: &mut Stream<'_>, ctx: &Ctx) {
    if ctx.auto() {
        // Who closes a socket gives up what is in it.
        let _ = persist(locked, ctx);
    }
}

/// A datagram is in the queue of a UDP socket of ours. Softirq mostly, under RCU.
///
/// # Safety
///
/// For `sk_data_ready`.
#[no_mangle]
unsafe extern "C" fn pmskb_auto_came(sk: *mut ext::sock) {
    let _rcu = rcu::read_lock();
    // SAFETY: A full socket; RCU is held.
    if let Some(ctx) = unsafe { Ctx::of(sk) }.filter(|ctx| ctx.auto()) {
        arrived(ctx);
    }
}

/// A packet for a socket with auto-persist has come, and goes to TCP next, or is in the queue of UDP.
/// Softirq, under RCU.
pub(crate) fn arrived(ctx: &Ctx) {
    ctx.came.store(host::jiffies(), Relaxed);
    if attach::wait(ctx) {
        // SAFETY: A socket is attached, so the module stays.
        unsafe { ext::pmskb_auto_queue(DELAY) };
    }
}

/// Not before so many milliseconds have passed.
fn put_off(ctx: &Ctx, ms: u32) {
    let then = host::jiffies().wrapping_add(host::ticks(ms));
    ctx.not_before.store(then, Relaxed);
}

/// What the work item does for one socket; whether it is to come back to it.
///
/// # Safety
///
/// The caller has a reference of `sk`, a TCP or UDP socket.
unsafe fn look_after(sk: NonNull<ext::sock>) -> bool {
    let transport = {
        let _rcu = rcu::read_lock();
        // SAFETY: As the caller says, and RCU is held.
        let Some(ctx) = (unsafe { Ctx::of(sk.as_ptr()) }) else {
            return false;
        };
        let early = ctx.not_before.load(Relaxed).wrapping_sub(host::jiffies()) as isize;
        if early > 0 {
            return true;
        }
        // One that nobody has accepted is its listener's, who may close it whoever has it locked.
        // SAFETY: As the caller says.
        if !unsafe { ext::pmskb_sk_has_socket(sk.as_ptr()) } {
            put_off(ctx, UNACCEPTED);
            return true;
        }
        ctx.transport()
    };
    match transport {
        Transport::Tcp => {
            // SAFETY: As the caller says, and it is one of TCP.
            let Some(mut locked) = (unsafe { Stream::try_new(sk) }) else {
                return true;
            };
            let Some(ctx) = locked.ctx().filter(|ctx| ctx.auto()) else {
                return false;
            };
            let (_, result) = persist(&mut locked, ctx);
            // It may be on its way still.
            let soon = host::jiffies().wrapping_sub(ctx.came.load(Relaxed)) <= ON_ITS_WAY;
            looked(&locked, ctx, result.map(|()| soon))
        }
        Transport::Udp => {
            // SAFETY: As the caller says.
            let Some(mut locked) = (unsafe { Locked::try_new(sk) }) else {
                return true;
            };
            let Some(ctx) = locked.ctx().filter(|ctx| ctx.auto()) else {
                return false;
            };
            let result = more_datagrams(&mut locked, ctx, BATCHES);
            looked(&locked, ctx, result)
        }
    }
}

/// Whether there is to be another look, and not too soon if this one failed.
fn looked(locked: &Locked<'_>, ctx: &Ctx, again: Result<bool>) -> bool {
    if again.is_ok() && ctx.failing.xchg(0, Relaxed) != 0 {
        // Those who were told of an error may receive now.
        locked.tell_ready();
    }
    again.unwrap_or_else(|_| {
        put_off(ctx, RETRY);
        true
    })
}

/// The work item.
#[no_mangle]
extern "C" fn pmskb_auto_run() {
    // Those that are put back are for the next time.
    for _ in 0..attach::waiting() {
        let Some(sk) = attach::next_waiting() else {
            break;
        };
        // SAFETY: `next_waiting` gave us a reference.
        let again = unsafe { look_after(sk) };
        if again {
            let _rcu = rcu::read_lock();
            // SAFETY: We have a reference, and RCU is held.
            if let Some(ctx) = unsafe { Ctx::of(sk.as_ptr()) } {
                attach::wait(ctx);
            }
        }
        // SAFETY: `next_waiting` gave us the reference.
        unsafe { ext::sock_gen_put(sk.as_ptr()) };
        host::resched();
    }
    if attach::waiting() > 0 {
        // SAFETY: As in `arrived`.
        unsafe { ext::pmskb_auto_queue(DELAY) };
    }
}

/// The work item may be queued while this lives.
pub(crate) struct Started(());

impl Started {
    /// At module init, once.
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // SAFETY: No socket is attached, or the module could not go: nobody queues it.
        unsafe { ext::pmskb_auto_stop() };
    }
}
