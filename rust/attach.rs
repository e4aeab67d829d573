// SPDX-License-Identifier: GPL-2.0

//! Attached sockets: what they have, what may be asked of them, how they let go.
//!
//! The two protocols have this in common. How a socket comes to us, and what its calls do, is in
//! `ulp.rs` (TCP) and `udp.rs`: both replace `sk_prot`, and keep the context in a place of their
//! own.
//!
//! # References
//!
//! - Store: an attached socket has one, and counts in `Store::socket_attached`.
//! - Both store and tokens go at `close()`; the context goes with the protocol's last use of it,
//!   and is freed under RCU.
//!
//! # Lock order
//!
//! 1. the hooks' list (`place.rs`), before the socket's lock
//! 2. `Ctx::turn`, of those who read from a socket with auto-persist
//! 3. the socket's lock
//! 4. `SOCKETS`, the list of attached sockets
//! 5. `Ctx::rx`, which softirqs take
//! 6. the locks of frames and heads

use crate::{
    auto, bindings as ext,
    cell::Static,
    lock::{self, SpinLockBh},
    place::{self, Cursor, HookUse},
    quota::{self, Account},
    sock::{errno, Flow, Kept, Locked, Net, OptVal, SocketFile, Transport},
    store::{Counters, Store},
    submit,
    token::{self, Held, Tokens},
    uapi::Plain,
    udp, ulp,
};
use core::{
    cell::UnsafeCell,
    ptr::{self, NonNull},
};
use kernel::{
    bindings, c_str,
    ffi::c_int,
    new_mutex,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{Atomic, Relaxed},
        rcu, Arc, Mutex,
    },
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

/// Ranges in one `PMSKB_RELEASE`.
const MAX_RANGES: usize = 1024;

/// What is under the socket's lock.
pub(crate) struct Own {
    /// The store, while attached.
    pub(crate) store: Option<Arc<Store>>,
    /// The store was removed under the socket.
    lost: bool,
    pub(crate) tokens: Tokens,
    /// Where receive copies what was not placed.
    pub(crate) cursor: Cursor,
    /// Datagrams copied so far.
    pub(crate) copied: u32,
    /// With auto-persist, of TCP: the sequence number up to which there are records, if there are
    /// any.
    pub(crate) logged: Option<u32>,
    /// Of UDP: the last datagram that was looked at. While it is in the queue, it and those before
    /// have a record, if their checksum is right.
    pub(crate) recorded: Option<Kept>,
    /// Of those that came as one packet and come next, how many have.
    pub(crate) begun: Option<(Kept, usize)>,
}

impl Own {
    const fn new() -> Self {
        Self {
            store: None,
            lost: false,
            tokens: Tokens::new(),
            cursor: Cursor::new(),
            copied: 0,
            logged: None,
            recorded: None,
            begun: None,
        }
    }
}

impl Own {
    /// Which datagrams have a record, with auto-persist. Any context but hard interrupts.
    fn forget_datagrams(&mut self) {
        self.recorded = None;
        self.begun = None;
    }
}

/// What placement uses, in softirq.
pub(crate) struct Rx {
    /// The store, while attached.
    pub(crate) store: Option<Arc<Store>>,
    /// Where the next byte goes.
    pub(crate) cursor: Cursor,
    /// Packets whose checksum could be had without reading them, for sampling.
    pub(crate) underived: u64,
    /// Datagrams placed so far: that tells those apart that are alike.
    pub(crate) datagrams: u32,
    /// Keeps the hooks registered.
    hooks: Option<HookUse>,
}

/// What a socket of ours has. Freed under RCU, after everything in it has been let go.
#[repr(C)]
#[pin_data]
pub(crate) struct Ctx {
    /// First, for `kvfree_call_rcu()`.
    rcu: bindings::callback_head,
    link: UnsafeCell<bindings::list_head>,
    /// In the list of those that have received something that may have no record yet.
    waiting: UnsafeCell<bindings::list_head>,
    sk: NonNull<ext::sock>,
    transport: Transport,
    #[pin]
    pub(crate) rx: SpinLockBh<Rx>,
    own: UnsafeCell<Own>,
    /// Who reads, with auto-persist.
    #[pin]
    pub(crate) turn: Mutex<()>,
    /// `PMSKB_AUTO_PERSIST`.
    auto: Atomic<u32>,
    /// When the last packet came, and before when the work item need not look: jiffies.
    pub(crate) came: Atomic<usize>,
    pub(crate) not_before: Atomic<usize>,
    /// There was an error when records were to be made of what it has.
    pub(crate) failing: Atomic<u32>,
    /// It is in the list of those that wait.
    listed: Atomic<u32>,
    mode: Atomic<u32>,
    /// `PMSKB_CRC32C`.
    crc32c: Atomic<u32>,
    /// `PMSKB_RX_COPY`.
    copy: Atomic<u32>,
    /// `PMSKB_QUOTA`: of frames and tokens; 0: what the store says.
    quota: [Atomic<u32>; 2],
    tokens: Atomic<u32>,
    minor: Atomic<u32>,
    pub(crate) counters: Counters,
}

impl Ctx {
    /// The context of a full socket that is one of ours. For as long as RCU or the socket's lock
    /// is held, or its file is open.
    ///
    /// # Safety
    ///
    /// `sk` is a full socket, and stays for `'a`; so does RCU, or the socket's lock, or (of TCP) the
    /// socket's file.
    pub(crate) unsafe fn of<'a>(sk: *mut ext::sock) -> Option<&'a Ctx> {
        // SAFETY: As the caller says. Both answer with null or a context, which is freed under RCU,
        // after the socket was closed.
        unsafe {
            let data = ulp::data(sk).or_else(|| udp::data(sk))?;
            data.cast::<Ctx>().as_ref()
        }
    }

    /// One that is not attached. It is the caller's, to be given up by [`Self::dispose`].
    pub(crate) fn new(
        sk: NonNull<ext::sock>,
        transport: Transport,
        flags: kernel::alloc::Flags,
    ) -> Result<*mut Ctx> {
        let rx = Rx {
            store: None,
            cursor: Cursor::new(),
            underived: 0,
            datagrams: 0,
            hooks: None,
        };
        let own = Own::new();
        let ctx = KBox::pin_init(
            pin_init!(Ctx {
                rcu: bindings::callback_head::default(),
                link: UnsafeCell::new(bindings::list_head::default()),
                waiting: UnsafeCell::new(bindings::list_head::default()),
                sk,
                transport,
                rx <- lock::new(rx, c_str!("pmskb_rx"), static_lock_class!()),
                own: UnsafeCell::new(own),
                turn <- new_mutex!((), "pmskb_turn"),
                auto: Atomic::new(0),
                came: Atomic::new(0),
                not_before: Atomic::new(crate::host::jiffies()),
                failing: Atomic::new(0),
                listed: Atomic::new(0),
                mode: Atomic::new(ext::pmskb_rx_mode_PMSKB_RX_BYTES),
                crc32c: Atomic::new(0),
                copy: Atomic::new(0),
                quota: [const { Atomic::new(0) }; 2],
                tokens: Atomic::new(0),
                minor: Atomic::new(u32::MAX),
                counters: Counters::default(),
            }),
            flags,
        )?;
        // SAFETY: It is not moved until it is freed.
        Ok(KBox::into_raw(unsafe { Pin::into_inner_unchecked(ctx) }))
    }

    /// Lets go of everything, and frees it after a grace period. Any context but hard interrupts.
    ///
    /// # Safety
    ///
    /// `raw` is from [`Self::new`]; nobody finds it any more, or has it but under RCU. The socket
    /// is locked, or dead, or not known to anybody yet.
    pub(crate) unsafe fn dispose(raw: *mut Ctx) {
        // SAFETY: As the caller says: what is under the socket's lock is ours.
        unsafe {
            let own = &mut *(*raw).own.get();
            (*raw).let_go(own);
            ext::pmskb_kfree_rcu_ctx(&raw mut (*raw).rcu, raw.cast());
        }
    }

    /// The context of a socket that this one has accepted: the same store, the same mode. Under
    /// RCU, or with the socket locked.
    pub(crate) fn child(&self, sk: NonNull<ext::sock>) -> Result<*mut Ctx> {
        // Dropped last: the reference on the store below is never the last one, see `let_go`.
        let _rcu = rcu::read_lock();
        let (store, hooks) = {
            let rx = self.rx.lock();
            (rx.store.clone(), rx.hooks.clone())
        };
        let account = Account::new(GFP_ATOMIC | __GFP_NOWARN)?;
        let raw = Ctx::new(sk, self.transport, GFP_ATOMIC | __GFP_NOWARN)?;
        // SAFETY: From `Ctx::new`, and nobody else knows it.
        let ctx = unsafe { &*raw };
        ctx.mode.store(self.mode(), Relaxed);
        ctx.crc32c.store(self.crc32c.load(Relaxed), Relaxed);
        ctx.copy.store(self.copy.load(Relaxed), Relaxed);
        ctx.auto.store(self.auto.load(Relaxed), Relaxed);
        for (to, from) in ctx.quota.iter().zip(&self.quota) {
            to.store(from.load(Relaxed), Relaxed);
        }
        if let (Some(store), Some(hooks)) = (store, hooks) {
            // SAFETY: As above.
            let own = unsafe { &mut *ctx.own.get() };
            if ctx.set_store(own, &store, hooks, account).is_err() {
                own.lost = true;
            }
        }
        Ok(raw)
    }

    /// Attaches a context that nobody knows yet. Errors as [`Self::set_store`]; `ENOMEM`.
    ///
    /// # Safety
    ///
    /// `raw` is from [`Self::new`], and nobody else knows it.
    pub(crate) unsafe fn set_first_store(
        raw: *mut Ctx,
        store: &Arc<Store>,
        hooks: HookUse,
    ) -> Result {
        // SAFETY: As the caller says.
        unsafe {
            let own = &mut *(*raw).own.get();
            let account = Account::new(GFP_KERNEL)?;
            (*raw).set_store(own, store, hooks, account)
        }
    }

    /// What is under the socket's lock.
    pub(crate) fn own<'b>(&'b self, _locked: &'b mut Locked<'_>) -> &'b mut Own {
        // SAFETY: The caller has the socket locked, and lends us that for `'b`. It is this
        // context's socket: that is where contexts are found.
        unsafe { &mut *self.own.get() }
    }

    /// Takes out what is under the socket's lock; [`Self::put_own`] it back under the same lock.
    pub(crate) fn take_own(&self, locked: &mut Locked<'_>) -> Own {
        core::mem::replace(self.own(locked), Own::new())
    }

    /// See [`Self::take_own`].
    pub(crate) fn put_own(&self, locked: &mut Locked<'_>, own: Own) {
        *self.own(locked) = own;
    }

    /// `PMSKB_RX_DESC` or `PMSKB_RX_BYTES`. Any context.
    fn mode(&self) -> u32 {
        self.mode.load(Relaxed)
    }

    /// Whether what is received has a record before anybody gets it. Any context.
    #[inline]
    pub(crate) fn auto(&self) -> bool {
        self.auto.load(Relaxed) != 0
    }

    /// Which protocol it is of. Any context.
    pub(crate) fn transport(&self) -> Transport {
        self.transport
    }

    /// How many of the first bytes that a receive describes are copied, too. Any context.
    pub(crate) fn copies(&self) -> usize {
        self.copy.load(Relaxed) as usize
    }

    /// Whether packets get a CRC32C, and puts of them. Any context.
    pub(crate) fn crc32c(&self, store: &Store) -> bool {
        store.crc32c() || self.crc32c.load(Relaxed) != 0
    }

    /// Whether `recvmsg()` of a full socket is to answer with descriptors. Any context.
    ///
    /// # Safety
    ///
    /// `sk` is a full socket that stays meanwhile.
    pub(crate) unsafe fn describes(sk: *mut ext::sock) -> bool {
        let _rcu = rcu::read_lock();
        // SAFETY: As the caller says; RCU is held.
        unsafe { Ctx::of(sk) }.is_some_and(|ctx| ctx.mode() == ext::pmskb_rx_mode_PMSKB_RX_DESC)
    }

    /// How many frames and tokens it may hold of `store`. Any context.
    fn quota(&self, store: &Store) -> [u32; 2] {
        let limits = &store.frames().limits;
        let [frames, tokens] = &self.quota;
        [
            (frames, &limits.socket_frames),
            (tokens, &limits.socket_tokens),
        ]
        .map(|(own, default)| match own.load(Relaxed) {
            0 => default.load(Relaxed),
            own => own,
        })
    }

    /// How many tokens it may hold of `store`. Any context.
    pub(crate) fn max_tokens(&self, store: &Store) -> u32 {
        let [_, tokens] = self.quota(store);
        tokens
    }

    /// `PMSKB_QUOTA`. `EINVAL`; `EPERM` if it is more than may be had.
    fn set_quota(&self, own: &Own, store: &Store, new: [u32; 2]) -> Result {
        let [frames, tokens] = new;
        let fits = |n: u32, min: u32, max: usize| n == 0 || (n >= min && n as usize <= max);
        if !fits(frames, quota::MIN_FRAMES, usize::MAX)
            || !fits(tokens, quota::MIN_TOKENS, token::MAX)
        {
            return Err(EINVAL);
        }
        let limits = &store.frames().limits;
        let [max_frames, max_tokens] = self.quota(store);
        let more = frames > max_frames.max(limits.socket_frames.load(Relaxed))
            || tokens > max_tokens.max(limits.socket_tokens.load(Relaxed));
        // The store is the whole host's.
        // SAFETY: No requirements.
        if more && !unsafe { bindings::capable(bindings::CAP_NET_ADMIN as c_int) } {
            return Err(EPERM);
        }
        for (to, new) in self.quota.iter().zip(new) {
            to.store(new, Relaxed);
        }
        if let Some(account) = own.cursor.account() {
            account.set_max(frames);
        }
        Ok(())
    }

    /// To be called when the number of tokens has changed.
    pub(crate) fn tokens_changed(&self, own: &Own) {
        let now = own.tokens.count() as u32;
        let before = self.tokens.xchg(now, Relaxed);
        if let Some(store) = &own.store {
            store.add_tokens(i64::from(now) - i64::from(before));
        }
    }

    /// What `PMSKB_INFO` answers. Any context but hard interrupts; under RCU, or with the socket
    /// locked.
    pub(crate) fn info(&self) -> ext::pmskb_sock_info {
        let (frames, [quota_frames, quota_tokens]) = {
            let rx = self.rx.lock();
            let frames = rx.cursor.account().map_or(0, |account| account.frames());
            let quota = rx.store.as_ref().map(|store| self.quota(store));
            (frames, quota.unwrap_or_default())
        };
        ext::pmskb_sock_info {
            store: self.minor.load(Relaxed),
            rx_mode: self.mode(),
            tokens: self.tokens.load(Relaxed),
            frames,
            quota_frames,
            quota_tokens,
            counters: self.counters.get(),
        }
    }

    /// Attaches an unattached socket. The socket is locked, or not known to anybody yet.
    ///
    /// `EIO` if the store is going, `EROFS` if it may only be read; then nothing has happened.
    fn set_store(
        &self,
        own: &mut Own,
        store: &Arc<Store>,
        hooks: HookUse,
        account: Arc<Account>,
    ) -> Result {
        store.socket_attached()?;
        own.store = Some(store.clone());
        own.lost = false;
        let [frames, _] = &self.quota;
        account.set_max(frames.load(Relaxed));
        own.cursor = Cursor::of(account.clone());
        self.minor.store(store.minor(), Relaxed);
        {
            let mut rx = self.rx.lock();
            rx.store = Some(store.clone());
            rx.cursor = Cursor::of(account);
            rx.hooks = Some(hooks);
        }
        SOCKETS.add(self);
        if self.transport == Transport::Udp {
            udp::attached(1);
        }
        // A removal that began meanwhile may have gone through the list before.
        if !store.is_live() {
            self.let_go(own);
            return Err(EIO);
        }
        Ok(())
    }

    /// Lets go of the store: tokens, frames, hooks. Any context but hard interrupts. The socket is
    /// locked, or dead.
    pub(crate) fn let_go(&self, own: &mut Own) {
        SOCKETS.remove(self);
        let (store, mut cursor, hooks) = {
            let mut rx = self.rx.lock();
            (rx.store.take(), rx.cursor.take(), rx.hooks.take())
        };
        let Some(store) = store else {
            return;
        };
        if self.transport == Transport::Udp {
            udp::attached(-1);
        }
        cursor.release(store.frames());
        own.cursor.release(store.frames());
        own.tokens.clear(store.frames());
        own.forget_datagrams();
        self.tokens_changed(own);
        self.minor.store(u32::MAX, Relaxed);
        {
            // Detach waits for readers after it has seen that there is no socket, so these are
            // never the last references, which only process context may drop.
            let _rcu = rcu::read_lock();
            store.socket_detached();
            own.store = None;
            drop(store);
        }
        drop(hooks);
    }
}

/// The list of attached sockets, for the removal of a store; and of some of them that have received
/// what auto-persist may have to make records of.
struct Sockets {
    lock: Static<bindings::spinlock_t>,
    head: Static<bindings::list_head>,
    waiting: Static<bindings::list_head>,
    /// How many of those.
    nr_waiting: Atomic<u32>,
}

static SOCKETS: Sockets = Sockets {
    lock: Static::new(),
    head: Static::new(),
    waiting: Static::new(),
    nr_waiting: Atomic::new(0),
};

impl Sockets {
    /// Once, at module init.
    fn init(&self) {
        // SAFETY: Called before anything else.
        unsafe {
            ext::pmskb_spin_lock_init(self.lock.get());
            for head in [self.head.get(), self.waiting.get()] {
                *head = bindings::list_head {
                    next: head,
                    prev: head,
                };
            }
        }
    }

    fn locked<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: Initialised; released below.
        unsafe { ext::pmskb_spin_lock_bh(self.lock.get()) };
        let result = f();
        // SAFETY: Taken above.
        unsafe { ext::pmskb_spin_unlock_bh(self.lock.get()) };
        result
    }

    fn add(&self, ctx: &Ctx) {
        // SAFETY: The list's lock is held; `link` is on no list.
        self.locked(|| unsafe { Self::append(self.head.get(), ctx.link.get()) });
    }

    fn remove(&self, ctx: &Ctx) {
        // SAFETY: The list's lock is held.
        self.locked(|| unsafe { self.take_off(ctx) });
    }

    /// # Safety
    ///
    /// The list's lock is held; `link` is on no list.
    unsafe fn append(head: *mut bindings::list_head, link: *mut bindings::list_head) {
        // SAFETY: As the caller says.
        unsafe {
            let last = (*head).prev;
            (*link).next = head;
            (*link).prev = last;
            (*last).next = link;
            (*head).prev = link;
        }
    }

    /// Whether it was on a list.
    ///
    /// # Safety
    ///
    /// The list's lock is held; the link is on the list, or null.
    unsafe fn unlink(link: *mut bindings::list_head) -> bool {
        // SAFETY: As the caller says.
        unsafe {
            let (next, prev) = ((*link).next, (*link).prev);
            if next.is_null() {
                return false;
            }
            (*prev).next = next;
            (*next).prev = prev;
            (*link).next = ptr::null_mut();
            (*link).prev = ptr::null_mut();
        }
        true
    }

    /// Off both lists.
    ///
    /// # Safety
    ///
    /// The list's lock is held; `ctx` stays meanwhile.
    unsafe fn take_off(&self, ctx: *const Ctx) {
        // SAFETY: As the caller says.
        unsafe {
            Self::unlink((*ctx).link.get());
            if Self::unlink((*ctx).waiting.get()) {
                (*ctx).listed.store(0, Relaxed);
                self.nr_waiting.fetch_sub(1, Relaxed);
            }
        }
    }

    /// Takes a socket of a store off the lists, with a reference.
    fn pop(&self, minor: u32) -> Option<(NonNull<ext::sock>, Transport)> {
        let head = self.head.get();
        self.locked(|| {
            // SAFETY: The list's lock is held. What is on the list is a context's link, and a
            // context on the list is not freed, nor its socket.
            unsafe {
                let mut link = (*head).next;
                while !ptr::eq(link, head) {
                    let next = (*link).next;
                    let ctx = link
                        .byte_sub(core::mem::offset_of!(Ctx, link))
                        .cast::<Ctx>();
                    if (*ctx).minor.load(Relaxed) == minor {
                        self.take_off(ctx);
                        let (sk, transport) = ((*ctx).sk, (*ctx).transport);
                        // One that is being destroyed lets go by itself.
                        if ext::pmskb_sock_tryget(sk.as_ptr()) {
                            return Some((sk, transport));
                        }
                    }
                    link = next;
                }
            }
            None
        })
    }
}

/// Remembers that a socket has received something; whether it was not known, and is attached. Any
/// context but hard interrupts.
pub(crate) fn wait(ctx: &Ctx) -> bool {
    // What came before this is seen by whoever takes it off the list, or this sees that it is off:
    // pairs with the one in `next_waiting`.
    // SAFETY: No requirements.
    unsafe { ext::pmskb_mb() };
    if ctx.listed.load(Relaxed) != 0 {
        return false;
    }
    SOCKETS.locked(|| {
        // SAFETY: The list's lock is held. What is on the first list is taken off both before it
        // is freed.
        unsafe {
            if (*ctx.link.get()).next.is_null() || !(*ctx.waiting.get()).next.is_null() {
                return false;
            }
            Sockets::append(SOCKETS.waiting.get(), ctx.waiting.get());
        }
        ctx.listed.store(1, Relaxed);
        SOCKETS.nr_waiting.add(1, Relaxed);
        true
    })
}

/// How many sockets [`wait`].
pub(crate) fn waiting() -> u32 {
    SOCKETS.nr_waiting.load(Relaxed)
}

/// Takes the first of those that [`wait`] off that list, with a reference; none is left: `None`.
pub(crate) fn next_waiting() -> Option<NonNull<ext::sock>> {
    let head = SOCKETS.waiting.get();
    SOCKETS.locked(|| {
        // SAFETY: As in `Sockets::pop`; each turn takes one off.
        unsafe {
            while !ptr::eq((*head).next, head) {
                let link = (*head).next;
                Sockets::unlink(link);
                SOCKETS.nr_waiting.fetch_sub(1, Relaxed);
                let ctx = link
                    .byte_sub(core::mem::offset_of!(Ctx, waiting))
                    .cast::<Ctx>();
                (*ctx).listed.store(0, Relaxed);
                ext::pmskb_mb();
                let sk = (*ctx).sk;
                if ext::pmskb_sock_tryget(sk.as_ptr()) {
                    return Some(sk);
                }
            }
        }
        None
    })
}

/// The memory of a store is about to go: no socket may keep a page. What was received and not read
/// is lost, which the socket is told as `EIO`; then, or if there was nothing, it goes on as a plain
/// one. A TCP connection that has lost something is aborted.
fn store_removed(store: &Arc<Store>) {
    while let Some((sk, transport)) = SOCKETS.pop(store.minor()) {
        {
            // SAFETY: `pop` gave us a reference of a socket.
            let mut locked = unsafe { Locked::new(sk) };
            // One that is not accepted yet may be closed by its listener, whoever owns it; and with
            // bottom halves off no grace period ends, so that the context stays.
            // SAFETY: The reference; undone below.
            unsafe { ext::pmskb_bh_lock_sock(sk.as_ptr()) };
            if let Some(ctx) = locked.ctx() {
                let own = ctx.own(&mut locked);
                ctx.let_go(own);
                own.lost = true;
            }
            // SAFETY: The socket is locked, in both ways, and of that protocol.
            let any = unsafe {
                match transport {
                    Transport::Tcp => ext::pmskb_sk_drop_queues(sk.as_ptr()),
                    Transport::Udp => ext::pmskb_udp_drop_queues(sk.as_ptr()),
                }
            };
            // SAFETY: Locked above.
            unsafe { ext::pmskb_bh_unlock_sock(sk.as_ptr()) };
            if any {
                // SAFETY: The socket is locked by `locked`.
                unsafe {
                    match transport {
                        Transport::Tcp => ext::pmskb_sk_abort(sk.as_ptr(), bindings::EIO as c_int),
                        Transport::Udp => {
                            ext::pmskb_sk_set_error(sk.as_ptr(), bindings::EIO as c_int)
                        }
                    }
                }
            }
        }
        // SAFETY: `pop` gave us the reference.
        unsafe { ext::sock_gen_put(sk.as_ptr()) };
    }
}

// ---- what others may ask of a socket ----

/// An attached socket, locked: what `submit.rs` works on.
pub(crate) struct Attached<'a> {
    locked: Locked<'a>,
    ctx: &'a Ctx,
    store: Arc<Store>,
}

impl Attached<'_> {
    /// Its store.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Which protocol it is of.
    pub(crate) fn transport(&self) -> Transport {
        self.ctx.transport
    }

    /// Whether its puts have a CRC32C.
    pub(crate) fn crc32c(&self) -> bool {
        self.ctx.crc32c(&self.store)
    }

    /// Addresses and ports of what a token holds: the socket's, or those of the datagram.
    pub(crate) fn flow(&mut self, token: u32) -> Flow {
        let own = self.ctx.own(&mut self.locked);
        let flow = own.tokens.flow(token).copied();
        flow.unwrap_or_else(|| self.locked.flow())
    }

    /// What a token holds. `ESTALE`.
    pub(crate) fn get(&mut self, token: u32) -> Result<Held> {
        self.ctx.own(&mut self.locked).tokens.get(token).copied()
    }

    /// Gives a token back. `ESTALE` if the socket does not have it.
    pub(crate) fn release(&mut self, token: u32) -> Result {
        let own = self.ctx.own(&mut self.locked);
        own.tokens.release(self.store.frames(), token)?;
        self.ctx.tokens_changed(own);
        Ok(())
    }

    /// Gives back what exists of `count` tokens from `first`; how many.
    pub(crate) fn release_range(&mut self, first: u32, count: u32) -> u32 {
        let own = self.ctx.own(&mut self.locked);
        let released = own.tokens.release_range(self.store.frames(), first, count);
        self.ctx.tokens_changed(own);
        released
    }
}

/// Locks a socket of ours that is attached. `EUNATCH` if it is not, `EIO` if its store is gone.
///
/// # Safety
///
/// As [`Locked::new`].
unsafe fn attached<'a>(sk: NonNull<ext::sock>) -> Result<Attached<'a>> {
    // SAFETY: As the caller says.
    let mut locked = unsafe { Locked::new(sk) };
    let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
    let own = ctx.own(&mut locked);
    let store = match &own.store {
        Some(store) => store.clone(),
        None if own.lost => return Err(EIO),
        None => return Err(errno(bindings::EUNATCH)),
    };
    Ok(Attached { locked, ctx, store })
}

/// Runs `f` on an attached socket, under its lock. Process context, sleeps.
///
/// `EOPNOTSUPP` if it is neither TCP nor UDP over IPv4 or IPv6, `EUNATCH` if it
/// is not attached, `EIO` if its store is gone; else what `f` answers.
pub(crate) fn with_attached<R>(
    file: &SocketFile,
    f: impl FnOnce(&mut Attached<'_>) -> Result<R>,
) -> Result<R> {
    if file.transport().is_none() {
        return Err(errno(bindings::EOPNOTSUPP));
    }
    // SAFETY: The socket stays as long as `file`; this thread has no socket locked.
    let mut attached = unsafe { attached(file.sk()?)? };
    f(&mut attached)
}

/// Attaches the socket that `fd` names: `PMSKB_IOC_ATTACH_SOCKET`. Process context, sleeps.
///
/// `EBADF`, `ENOTSOCK`; `EOPNOTSUPP` if it is neither TCP (MPTCP is not) nor UDP over IPv4 or IPv6;
/// `EBUSY` if it belongs to something else (kTLS, sockmap, a tunnel) or is attached to another
/// store; `EALREADY` if to this one; `EROFS`; `EIO` if the store is going; `ENOMEM`. Where only the
/// second half fails, a TCP socket is left unattached with the upper layer protocol set, which then
/// does nothing.
pub(crate) fn attach_fd(store: &Arc<Store>, fd: i32) -> Result {
    let file = SocketFile::get(fd)?;
    let transport = file.transport().ok_or(errno(bindings::EOPNOTSUPP))?;
    if store.read_only() {
        // Before the ULP, which a socket does not get rid of again.
        return Err(errno(bindings::EROFS));
    }
    match transport {
        Transport::Tcp => ulp::adopt(&file)?,
        Transport::Udp => {
            if udp::adopt(&file, store)? {
                return Ok(());
            }
        }
    }
    // SAFETY: `file` keeps the socket, which this thread has not locked.
    unsafe { attach(file.sk()?, store) }
}

/// Attaches a socket of ours.
///
/// # Safety
///
/// As [`Locked::new`].
unsafe fn attach(sk: NonNull<ext::sock>, store: &Arc<Store>) -> Result {
    // Before the socket's lock: registering sleeps on locks under which others lock sockets.
    // SAFETY: As the caller says.
    let hooks = HookUse::get(unsafe { Net::of(sk) })?;
    // SAFETY: As the caller says.
    let mut locked = unsafe { Locked::new(sk) };
    let ctx = locked.ctx().ok_or(EBUSY)?;
    let own = ctx.own(&mut locked);
    match &own.store {
        Some(now) if Arc::ptr_eq(now, store) => Err(errno(bindings::EALREADY)),
        Some(_) => Err(EBUSY),
        None => {
            let account = Account::new(GFP_KERNEL)?;
            ctx.set_store(own, store, hooks, account)?;
            if ctx.auto() {
                // Since it lost another one.
                auto::arrived(ctx);
            }
            Ok(())
        }
    }
}

// ---- socket options ----

/// `setsockopt()` at level `SOL_PMSKB`. Process context, sleeps.
///
/// # Safety
///
/// As [`Locked::new`].
pub(crate) unsafe fn set_option(
    sk: NonNull<ext::sock>,
    name: u32,
    value: &OptVal,
) -> Result<c_int> {
    match name {
        ext::PMSKB_ATTACH => {
            let fd = value.read::<i32>()?;
            let store = Store::from_fd(fd)?;
            // SAFETY: As the caller says.
            unsafe { attach(sk, &store)? };
            Ok(0)
        }
        ext::PMSKB_RX_MODE => {
            let mode = value.read::<u32>()?;
            if mode != ext::pmskb_rx_mode_PMSKB_RX_BYTES && mode != ext::pmskb_rx_mode_PMSKB_RX_DESC
            {
                return Err(EINVAL);
            }
            // SAFETY: As the caller says.
            let mut locked = unsafe { Locked::new(sk) };
            let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
            let own = ctx.own(&mut locked);
            if mode == ext::pmskb_rx_mode_PMSKB_RX_DESC && own.store.is_none() {
                return Err(if own.lost {
                    EIO
                } else {
                    errno(bindings::EUNATCH)
                });
            }
            ctx.mode.store(mode, Relaxed);
            Ok(0)
        }
        ext::PMSKB_CRC32C => {
            let on = value.read::<u32>()?;
            if on > 1 {
                return Err(EINVAL);
            }
            // SAFETY: As the caller says.
            let locked = unsafe { Locked::new(sk) };
            let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
            ctx.crc32c.store(on, Relaxed);
            Ok(0)
        }
        ext::PMSKB_RX_COPY => {
            let bytes = value.read::<u32>()?;
            if bytes > ext::PMSKB_MAX_RX_COPY {
                return Err(EINVAL);
            }
            // SAFETY: As the caller says.
            let locked = unsafe { Locked::new(sk) };
            let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
            ctx.copy.store(bytes, Relaxed);
            Ok(0)
        }
        ext::PMSKB_AUTO_PERSIST => {
            let on = value.read::<u32>()?;
            if on > 1 {
                return Err(EINVAL);
            }
            if on == 0 {
                // Whatever became of its store.
                // SAFETY: As the caller says.
                let mut locked = unsafe { Locked::new(sk) };
                let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
                ctx.auto.store(0, Relaxed);
                ctx.own(&mut locked).forget_datagrams();
                return Ok(0);
            }
            // SAFETY: As the caller says.
            let mut attached = unsafe { attached(sk)? };
            match attached.transport() {
                // SAFETY: It is a TCP socket of ours, locked, and its file is open.
                Transport::Tcp => unsafe { ulp::guard(sk) }?,
                // SAFETY: It is a UDP socket of ours, locked.
                Transport::Udp => unsafe { udp::listen(sk) }?,
            }
            let ctx = attached.ctx;
            if ctx.auto.xchg(1, Relaxed) == 0 {
                // What is there already counts, too.
                let own = ctx.own(&mut attached.locked);
                own.logged = None;
                own.forget_datagrams();
                auto::arrived(ctx);
            }
            Ok(0)
        }
        ext::PMSKB_QUOTA => {
            let Plain(new) = value.read::<Plain<ext::pmskb_quota>>()?;
            if new.reserved != 0 {
                return Err(EINVAL);
            }
            // SAFETY: As the caller says.
            let mut attached = unsafe { attached(sk)? };
            let own = attached.ctx.own(&mut attached.locked);
            let quota = [new.frames, new.tokens];
            attached.ctx.set_quota(own, &attached.store, quota)?;
            Ok(0)
        }
        ext::PMSKB_RELEASE => {
            const SIZE: usize = core::mem::size_of::<ext::pmskb_token_range>();
            if value.len() == 0 || value.len() % SIZE != 0 {
                return Err(EINVAL);
            }
            if value.len() / SIZE > MAX_RANGES {
                return Err(E2BIG);
            }
            // SAFETY: As the caller says.
            let mut attached = unsafe { attached(sk)? };
            // All are read, and checked, before anything is released.
            let mut ranges = KVec::with_capacity(value.len() / SIZE, GFP_KERNEL)?;
            for at in (0..value.len()).step_by(SIZE) {
                let first = value.read_at::<u32>(at)?;
                let count = value.read_at::<u32>(at + 4)?;
                if count == 0 {
                    return Err(EINVAL);
                }
                ranges.push((first, count), GFP_KERNEL)?;
            }
            let mut released = 0u32;
            for (first, count) in ranges {
                released += attached.release_range(first, count);
            }
            if released == 0 {
                return Err(errno(bindings::ESTALE));
            }
            Ok(released as c_int)
        }
        ext::PMSKB_PERSIST => {
            // SAFETY: As the caller says.
            let mut attached = unsafe { attached(sk)? };
            // The socket stays locked, as it does while other calls copy from user memory.
            submit::persist(&mut attached, value)
        }
        _ => Err(errno(bindings::ENOPROTOOPT)),
    }
}

/// `getsockopt()` at level `SOL_PMSKB`. Process context, sleeps.
///
/// # Safety
///
/// As [`Locked::new`].
pub(crate) unsafe fn get_option(
    sk: NonNull<ext::sock>,
    name: u32,
    to: UserPtr,
    len: UserPtr,
) -> Result {
    let room = UserSlice::new(len, 4).reader().read::<i32>()?;
    let room = usize::try_from(room).map_err(|_| EINVAL)?;
    let (info, crc32c, auto, copy) = {
        // SAFETY: As the caller says.
        let locked = unsafe { Locked::new(sk) };
        let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
        let relaxed = |flag: &Atomic<u32>| flag.load(Relaxed);
        let [crc32c, auto, copy] = [&ctx.crc32c, &ctx.auto, &ctx.copy].map(relaxed);
        (ctx.info(), crc32c, auto, copy)
    };
    let size = match name {
        ext::PMSKB_CRC32C => put(to, room, &crc32c)?,
        ext::PMSKB_AUTO_PERSIST => put(to, room, &auto)?,
        ext::PMSKB_RX_COPY => put(to, room, &copy)?,
        ext::PMSKB_RX_MODE => put(to, room, &info.rx_mode)?,
        ext::PMSKB_INFO => put(to, room, &Plain(info))?,
        ext::PMSKB_QUOTA if info.store == u32::MAX => return Err(errno(bindings::EUNATCH)),
        ext::PMSKB_QUOTA => {
            let quota = ext::pmskb_quota {
                frames: info.quota_frames,
                tokens: info.quota_tokens,
                reserved: 0,
            };
            put(to, room, &Plain(quota))?
        }
        _ => return Err(errno(bindings::ENOPROTOOPT)),
    };
    UserSlice::new(len, 4).writer().write(&(size as i32))
}

fn put<T: AsBytes>(to: UserPtr, room: usize, value: &T) -> Result<usize> {
    let size = core::mem::size_of::<T>();
    if room < size {
        return Err(EINVAL);
    }
    UserSlice::new(to, size).writer().write(value)?;
    Ok(size)
}

// ---- module ----

/// All that the module has registered for sockets.
pub(crate) struct Registered {
    // In this order: nobody comes to us any more, then nobody places.
    _ulp: ulp::Registered,
    _hooks: place::Started,
    _auto: auto::Started,
}

impl Registered {
    /// At module init, once. `ENOEXEC` if Rust and C do not agree on the layout of what they
    /// share, `EEXIST` if there is an upper layer protocol with our name.
    pub(crate) fn new() -> Result<Self> {
        check_layout()?;
        SOCKETS.init();
        crate::frame::set_idle_hook(crate::note::forget);
        crate::store::set_removal_hook(store_removed);
        udp::start()?;
        let hooks = place::start()?;
        Ok(Self {
            _ulp: ulp::Registered::new()?,
            _hooks: hooks,
            _auto: auto::Started::new(),
        })
    }
}

/// The bindings are made by another compiler than the kernel: they must agree.
fn check_layout() -> Result {
    use core::mem::{offset_of, size_of};
    let rust: [usize; ext::PMSKB_LAYOUT_NR as usize] = [
        size_of::<ext::sock>(),
        offset_of!(ext::sock, sk_receive_queue),
        offset_of!(ext::sock, sk_rcvlowat),
        offset_of!(ext::sock, sk_shutdown),
        offset_of!(ext::sock, sk_err),
        offset_of!(ext::sock, sk_protocol),
        offset_of!(ext::sock, sk_prot_creator),
        size_of::<ext::inet_connection_sock>(),
        offset_of!(ext::inet_connection_sock, icsk_ulp_ops),
        offset_of!(ext::inet_connection_sock, icsk_ulp_data),
        size_of::<ext::tcp_sock>(),
        offset_of!(ext::tcp_sock, copied_seq),
        size_of::<ext::proto>(),
        offset_of!(ext::proto, recvmsg),
        offset_of!(ext::proto, setsockopt),
        offset_of!(ext::proto, owner),
        size_of::<ext::tcp_ulp_ops>(),
        offset_of!(ext::tcp_ulp_ops, owner),
        size_of::<ext::nf_hook_state>(),
        offset_of!(ext::nf_hook_state, net),
        size_of::<bindings::proto_ops>(),
        offset_of!(bindings::proto_ops, owner),
    ];
    let mut c = [0u32; ext::PMSKB_LAYOUT_NR as usize];
    // SAFETY: `c` has as many elements as C fills.
    unsafe { ext::pmskb_layout(c.as_mut_ptr()) };
    for (at, (rust, c)) in rust.iter().zip(&c).enumerate() {
        if *rust != *c as usize {
            pr_err!("layout {at} of a kernel structure: {rust} in Rust, {c} in C; not loaded\n");
            return Err(errno(bindings::ENOEXEC));
        }
    }
    Ok(())
}

/// For a value read from user memory.
const fn _any_bytes<T: FromBytes>() {}
const _: () = {
    _any_bytes::<u32>();
    _any_bytes::<i32>();
};
