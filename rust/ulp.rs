// SPDX-License-Identifier: GPL-2.0

//! The TCP upper layer protocol `pmskb`: attach, clone, options, close.
//!
//! A socket becomes ours by `setsockopt(SOL_TCP, TCP_ULP, "pmskb")`, in any state but as long as
//! nobody else has changed its operations; then `PMSKB_ATTACH` names its store. `ioctl` of a store
//! does both ([`attach_fd`]). What a listening socket accepts inherits the store and the receive
//! mode.
//!
//! # States
//!
//! Any: before `connect()` or `listen()`, while listening, connected, half closed. What is in the
//! receive queue at that moment stays unplaced and is copied when it is received as descriptors.
//!
//! # References
//!
//! - Module: `tcp_set_ulp()` takes one, `tcp_cleanup_ulp()` puts it. A child has one too: the
//!   allocation of a socket takes one on `sk_prot->owner`, and since we point `sk_prot_creator`
//!   to TCP's own operations that one is for `tcp_cleanup_ulp()` to put, and neither the freeing
//!   of the socket nor its time-wait socket has to do with us.
//! - Store: an attached socket has one, and counts in `Store::socket_attached`.
//! - Both store and tokens go at `close()` already; the context goes when TCP is through.
//!
//! # Lock order
//!
//! 1. the hooks' list (`place.rs`), before the socket's lock
//! 2. the socket's lock
//! 3. `SOCKETS`, the list of attached sockets
//! 4. `Ctx::rx`, which softirqs take
//! 5. the locks of frames and heads

use crate::{
    bindings as ext,
    lock::{self, SpinLockBh},
    place::{Cursor, HookUse},
    receive,
    sock::{errno, Flow, Locked, Net, OptVal, SocketFile},
    store::{Counters, Store},
    submit,
    token::{Held, Tokens},
    uapi::Plain,
};
use core::{
    cell::UnsafeCell,
    mem::MaybeUninit,
    ptr::{self, NonNull},
};
use kernel::{
    bindings, c_str,
    error::from_result,
    ffi::{c_char, c_int, c_long, c_uint},
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{Atomic, Relaxed},
        rcu, Arc,
    },
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

/// Ranges in one `PMSKB_RELEASE`.
const MAX_RANGES: usize = 1024;
/// The attribute of `INET_DIAG_ULP_INFO` that carries `struct pmskb_sock_info`. Far from those
/// that the kernel may still give out.
const INFO_ATTR: c_int = 0x504d;

/// A static that C code wants a pointer to.
struct Static<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: Written at module init only, before C learns the address; then C's own rules hold.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    const fn new() -> Self {
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }

    const fn get(&self) -> *mut T {
        self.0.get().cast()
    }
}

static ULP: Static<ext::tcp_ulp_ops> = Static::new();
/// Our operations, IPv4 and IPv6.
static PROTOS: [Static<ext::proto>; 2] = [const { Static::new() }; 2];

/// TCP's own operations.
fn base(family: usize) -> *mut ext::proto {
    if family == 0 {
        &raw mut ext::tcp_prot
    } else {
        &raw mut ext::tcpv6_prot
    }
}

/// Which of our operations a socket has.
///
/// # Safety
///
/// `sk` is a full socket.
unsafe fn family_of(sk: *mut ext::sock) -> Option<usize> {
    // SAFETY: As the caller says.
    let prot = unsafe { ext::pmskb_sk_prot(sk) };
    PROTOS.iter().position(|ours| ptr::eq(ours.get(), prot))
}

/// What is under the socket's lock.
pub(crate) struct Own {
    /// The store, while attached.
    pub(crate) store: Option<Arc<Store>>,
    /// The store was removed under the socket.
    lost: bool,
    pub(crate) tokens: Tokens,
    /// Where receive copies what was not placed.
    pub(crate) cursor: Cursor,
}

impl Own {
    const fn new() -> Self {
        Self {
            store: None,
            lost: false,
            tokens: Tokens::new(),
            cursor: Cursor::new(),
        }
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
    sk: NonNull<ext::sock>,
    #[pin]
    pub(crate) rx: SpinLockBh<Rx>,
    own: UnsafeCell<Own>,
    mode: Atomic<u32>,
    tokens: Atomic<u32>,
    minor: Atomic<u32>,
    pub(crate) counters: Counters,
}

impl Ctx {
    /// The context of a full socket that is one of ours. For as long as RCU or the socket's lock
    /// is held.
    ///
    /// # Safety
    ///
    /// `sk` is a full socket, and stays for `'a`; so does either RCU or the socket's lock.
    pub(crate) unsafe fn of<'a>(sk: *mut ext::sock) -> Option<&'a Ctx> {
        // SAFETY: As the caller says. What has our operations is a TCP socket, its data is null or
        // a context that is freed under RCU, after the socket was destroyed.
        unsafe {
            family_of(sk)?;
            ext::pmskb_ulp_data(sk).cast::<Ctx>().as_ref()
        }
    }

    fn new(sk: NonNull<ext::sock>, mode: u32, flags: kernel::alloc::Flags) -> Result<*mut Ctx> {
        let rx = Rx {
            store: None,
            cursor: Cursor::new(),
            underived: 0,
            hooks: None,
        };
        let own = Own::new();
        let ctx = KBox::pin_init(
            pin_init!(Ctx {
                rcu: bindings::callback_head::default(),
                link: UnsafeCell::new(bindings::list_head::default()),
                sk,
                rx <- lock::new(rx, c_str!("pmskb_rx"), static_lock_class!()),
                own: UnsafeCell::new(own),
                mode: Atomic::new(mode),
                tokens: Atomic::new(0),
                minor: Atomic::new(u32::MAX),
                counters: Counters::default(),
            }),
            flags,
        )?;
        // SAFETY: It is not moved until it is freed.
        Ok(KBox::into_raw(unsafe { Pin::into_inner_unchecked(ctx) }))
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

    /// To be called when the number of tokens has changed.
    pub(crate) fn tokens_changed(&self, own: &Own) {
        let now = own.tokens.count() as u32;
        let before = self.tokens.xchg(now, Relaxed);
        if let Some(store) = &own.store {
            store.add_tokens(i64::from(now) - i64::from(before));
        }
    }

    fn info(&self) -> ext::pmskb_sock_info {
        ext::pmskb_sock_info {
            store: self.minor.load(Relaxed),
            rx_mode: self.mode(),
            tokens: self.tokens.load(Relaxed),
            reserved: 0,
            counters: self.counters.get(),
        }
    }

    /// Attaches an unattached socket. The socket is locked, or not known to anybody yet.
    fn set_store(&self, own: &mut Own, store: &Arc<Store>, hooks: HookUse) -> Result {
        store.socket_attached()?;
        own.store = Some(store.clone());
        own.lost = false;
        self.minor.store(store.minor(), Relaxed);
        {
            let mut rx = self.rx.lock();
            rx.store = Some(store.clone());
            rx.hooks = Some(hooks);
        }
        SOCKETS.add(self);
        // A removal that began meanwhile may have gone through the list before.
        if !store.is_live() {
            self.let_go(own);
            return Err(EIO);
        }
        Ok(())
    }

    /// Lets go of the store: tokens, frames, hooks. Any context but hard interrupts. The socket is
    /// locked, or dead.
    fn let_go(&self, own: &mut Own) {
        SOCKETS.remove(self);
        let (store, mut cursor, hooks) = {
            let mut rx = self.rx.lock();
            (rx.store.take(), rx.cursor.take(), rx.hooks.take())
        };
        let Some(store) = store else {
            return;
        };
        cursor.release(store.frames());
        own.cursor.release(store.frames());
        own.tokens.clear(store.frames());
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

/// The list of attached sockets, for the removal of a store.
struct Sockets {
    lock: Static<bindings::spinlock_t>,
    head: Static<bindings::list_head>,
}

static SOCKETS: Sockets = Sockets {
    lock: Static::new(),
    head: Static::new(),
};

impl Sockets {
    /// Once, at module init.
    fn init(&self) {
        // SAFETY: Called before anything else.
        unsafe {
            ext::pmskb_spin_lock_init(self.lock.get());
            let head = self.head.get();
            *head = bindings::list_head {
                next: head,
                prev: head,
            };
        }
    }

    fn locked<R>(&self, f: impl FnOnce(*mut bindings::list_head) -> R) -> R {
        // SAFETY: Initialised; released below.
        unsafe { ext::pmskb_spin_lock_bh(self.lock.get()) };
        let result = f(self.head.get());
        // SAFETY: Taken above.
        unsafe { ext::pmskb_spin_unlock_bh(self.lock.get()) };
        result
    }

    fn add(&self, ctx: &Ctx) {
        self.locked(|head| {
            let link = ctx.link.get();
            // SAFETY: The list's lock is held; `link` is on no list.
            unsafe {
                let last = (*head).prev;
                (*link).next = head;
                (*link).prev = last;
                (*last).next = link;
                (*head).prev = link;
            }
        });
    }

    fn remove(&self, ctx: &Ctx) {
        self.locked(|_| Self::unlink(ctx.link.get()));
    }

    /// Under the lock; nothing happens if it is on no list.
    fn unlink(link: *mut bindings::list_head) {
        // SAFETY: The list's lock is held; `link` is on the list or null.
        unsafe {
            let (next, prev) = ((*link).next, (*link).prev);
            if next.is_null() {
                return;
            }
            (*prev).next = next;
            (*next).prev = prev;
            (*link).next = ptr::null_mut();
            (*link).prev = ptr::null_mut();
        }
    }

    /// Takes a socket of a store off the list, with a reference.
    fn pop(&self, minor: u32) -> Option<NonNull<ext::sock>> {
        self.locked(|head| {
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
                        Self::unlink(link);
                        let sk = (*ctx).sk;
                        // One that is being destroyed lets go by itself.
                        if ext::pmskb_sock_tryget(sk.as_ptr()) {
                            return Some(sk);
                        }
                    }
                    link = next;
                }
            }
            None
        })
    }
}

/// The memory of a store is about to go: no socket may keep a page. What was received and not read
/// is lost, so such a connection is aborted with `EIO`; others go on as plain TCP.
fn store_removed(store: &Arc<Store>) {
    while let Some(sk) = SOCKETS.pop(store.minor()) {
        {
            // SAFETY: `pop` gave us a reference of a TCP socket.
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
            // SAFETY: The socket is locked, in both ways.
            let any = unsafe { ext::pmskb_sk_drop_queues(sk.as_ptr()) };
            // SAFETY: Locked above.
            unsafe { ext::pmskb_bh_unlock_sock(sk.as_ptr()) };
            if any {
                // SAFETY: The socket is locked by `locked`.
                unsafe { ext::pmskb_sk_abort(sk.as_ptr(), bindings::EIO as c_int) };
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

    /// Its addresses and ports.
    pub(crate) fn flow(&self) -> Flow {
        self.locked.flow()
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

/// Runs `f` on the attached socket that `fd` names, under its lock. Process context, sleeps.
///
/// `EBADF`, `ENOTSOCK`, `EOPNOTSUPP` if it is not TCP over IPv4 or IPv6, `EUNATCH` if it is not
/// attached, `EIO` if its store is gone; else what `f` answers.
pub(crate) fn with_attached<R>(
    fd: i32,
    f: impl FnOnce(&mut Attached<'_>) -> Result<R>,
) -> Result<R> {
    let file = SocketFile::get(fd)?;
    if !file.is_tcp() {
        return Err(EOPNOTSUPP());
    }
    // SAFETY: The socket stays as long as `file`; this thread has no socket locked.
    let mut attached = unsafe { attached(file.sk()?)? };
    f(&mut attached)
}

#[allow(non_snake_case)]
fn EOPNOTSUPP() -> Error {
    errno(bindings::EOPNOTSUPP)
}

/// Attaches the socket that `fd` names: `PMSKB_IOC_ATTACH_SOCKET`. Process context, sleeps.
///
/// `EBADF`, `ENOTSOCK`; `EOPNOTSUPP` if it is not TCP over IPv4 or IPv6 (MPTCP included); `EBUSY`
/// if it belongs to something else (kTLS, sockmap) or is attached to another store; `EALREADY` if
/// to this one; `EIO` if the store is going; `ENOMEM`. Where only the second half fails, the socket
/// is left unattached with the upper layer protocol set, which then does nothing.
pub(crate) fn attach_fd(store: &Arc<Store>, fd: i32) -> Result {
    let file = SocketFile::get(fd)?;
    if !file.is_tcp() {
        return Err(EOPNOTSUPP());
    }
    if store.read_only() {
        // Before the ULP, which a socket does not get rid of again.
        return Err(errno(bindings::EROFS));
    }
    let sk = file.sk()?;
    // SAFETY: A full TCP socket, and `file` keeps it.
    if unsafe { family_of(sk.as_ptr()) }.is_none() {
        match file.set_ulp() {
            // Somebody else's, or ours by another thread just now.
            Err(e) if e == EEXIST => {
                // SAFETY: As above.
                if unsafe { family_of(sk.as_ptr()) }.is_none() {
                    return Err(EBUSY);
                }
            }
            other => other?,
        }
    }
    // SAFETY: As above, and this thread has not locked it.
    unsafe { attach(sk, store) }
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
        None => ctx.set_store(own, store, hooks),
    }
}

// ---- socket options ----

/// # Safety
///
/// As [`Locked::new`].
unsafe fn set_option(sk: NonNull<ext::sock>, name: u32, value: &OptVal) -> Result<c_int> {
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

/// # Safety
///
/// As [`Locked::new`].
unsafe fn get_option(sk: NonNull<ext::sock>, name: u32, to: UserPtr, len: UserPtr) -> Result {
    let room = UserSlice::new(len, 4).reader().read::<i32>()?;
    let room = usize::try_from(room).map_err(|_| EINVAL)?;
    let info = {
        // SAFETY: As the caller says.
        let locked = unsafe { Locked::new(sk) };
        let ctx = locked.ctx().ok_or(errno(bindings::EUNATCH))?;
        ctx.info()
    };
    let size = match name {
        ext::PMSKB_RX_MODE => put(to, room, &info.rx_mode)?,
        ext::PMSKB_INFO => put(to, room, &Plain(info))?,
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

// ---- what TCP calls ----

/// The socket, which is locked, becomes ours.
///
/// # Safety
///
/// For `tcp_set_ulp()`.
unsafe extern "C" fn ulp_init(sk: *mut ext::sock) -> c_int {
    from_result(|| {
        let sk = NonNull::new(sk).ok_or(EINVAL)?;
        // SAFETY: `tcp_set_ulp()` calls this with the socket locked.
        unsafe {
            let prot = ext::pmskb_sk_prot(sk.as_ptr());
            if ext::pmskb_sk_is_mptcp(sk.as_ptr()) {
                return Err(EOPNOTSUPP());
            }
            let family = (0..PROTOS.len())
                .find(|family| ptr::eq(base(*family), prot))
                .ok_or(EBUSY)?;
            if ext::pmskb_sk_has_psock(sk.as_ptr()) {
                return Err(EBUSY);
            }
            let ctx = Ctx::new(sk, ext::pmskb_rx_mode_PMSKB_RX_BYTES, GFP_KERNEL)?;
            let ours = PROTOS.get(family).ok_or(EBUSY)?;
            ext::pmskb_ulp_install(sk.as_ptr(), ours.get(), ctx.cast(), ULP.get());
            ext::pmskb_sock_get_zc_back(sk.as_ptr());
        }
        Ok(0)
    })
}

/// The socket is being destroyed: nobody uses it any more but lookups that came too late. Any
/// context but hard interrupts.
///
/// # Safety
///
/// For `tcp_cleanup_ulp()`.
unsafe extern "C" fn ulp_release(sk: *mut ext::sock) {
    // SAFETY: `tcp_cleanup_ulp()` calls this with a TCP socket that has our upper layer protocol.
    // The context is freed after a grace period; nobody but us finds it any more.
    unsafe {
        let family = family_of(sk);
        let ctx = ext::pmskb_ulp_data(sk).cast::<Ctx>();
        ext::pmskb_ulp_data_set(sk, ptr::null_mut());
        if let Some(family) = family {
            // The module may go before the last of the socket does.
            ext::pmskb_sk_prot_set(sk, base(family));
        }
        if let Some(ctx_ref) = ctx.as_ref() {
            let own = &mut *ctx_ref.own.get();
            ctx_ref.let_go(own);
            ext::pmskb_kfree_rcu_ctx(&raw mut (*ctx).rcu, ctx.cast());
        }
    }
}

/// A connection was accepted by a socket of ours. Softirq mostly.
///
/// # Safety
///
/// For `inet_csk_clone_lock()`.
unsafe extern "C" fn ulp_clone(
    _req: *const ext::request_sock,
    newsk: *mut ext::sock,
    _priority: bindings::gfp_t,
) {
    let Some(sk) = NonNull::new(newsk) else {
        return;
    };
    // SAFETY: TCP calls this with a new socket that nobody else knows yet, a bitwise copy of the
    // listener, whose context (if any) stays: either RCU or the listener's lock is held.
    unsafe {
        // The listener may have come to us, or gone, while it was copied. The operations on which
        // the child has a reference of this module are in `sk_prot_creator`, and nowhere else.
        let counted = PROTOS
            .iter()
            .any(|ours| ptr::eq(ours.get(), (*newsk).sk_prot_creator.cast()));
        let family = family_of(newsk);
        let plain = match family {
            Some(family) => base(family),
            None => ext::pmskb_sk_prot(newsk).cast_mut(),
        };
        let parent = ext::pmskb_ulp_data(newsk).cast::<Ctx>().as_ref();
        ext::pmskb_ulp_data_set(newsk, ptr::null_mut());
        // See "References".
        (*newsk).sk_prot_creator = plain;
        match parent
            .filter(|_| counted && family.is_some())
            .and_then(|parent| child(sk, parent).ok())
        {
            Some(ctx) => ext::pmskb_ulp_data_set(newsk, ctx.cast()),
            None => {
                // No memory, or the listener is being closed: a plain TCP socket.
                ext::pmskb_ulp_forget(newsk, plain);
                if counted {
                    ext::pmskb_module_put(crate::this_module());
                }
            }
        }
    }
}

/// The context of an accepted socket.
fn child(sk: NonNull<ext::sock>, parent: &Ctx) -> Result<*mut Ctx> {
    // Dropped last: the reference on the store below is never the last one, see `let_go`.
    let _rcu = rcu::read_lock();
    let (store, hooks) = {
        let rx = parent.rx.lock();
        (rx.store.clone(), rx.hooks.clone())
    };
    let raw = Ctx::new(sk, parent.mode(), GFP_ATOMIC | __GFP_NOWARN)?;
    if let (Some(store), Some(hooks)) = (store, hooks) {
        // SAFETY: From `Ctx::new`, and nobody else knows it.
        let ctx = unsafe { &*raw };
        // SAFETY: As above.
        let own = unsafe { &mut *ctx.own.get() };
        if ctx.set_store(own, &store, hooks).is_err() {
            own.lost = true;
        }
    }
    Ok(raw)
}

/// What `ss -ti` is told, beside the name.
///
/// # Safety
///
/// For the socket diagnosing code.
unsafe extern "C" fn ulp_info(
    sk: *mut ext::sock,
    skb: *mut bindings::sk_buff,
    _admin: bool,
) -> c_int {
    let _rcu = rcu::read_lock();
    // SAFETY: The socket is a full one; RCU is held.
    let Some(ctx) = (unsafe { Ctx::of(sk) }) else {
        return 0;
    };
    let info = ctx.info();
    // SAFETY: The message is the diagnosing code's; `info` has that size.
    unsafe {
        ext::pmskb_nla_put(
            skb,
            INFO_ATTR,
            core::mem::size_of_val(&info) as c_int,
            (&raw const info).cast(),
        )
    }
}

/// How much room [`ulp_info`] needs.
///
/// # Safety
///
/// For the socket diagnosing code.
unsafe extern "C" fn ulp_info_size(_sk: *const ext::sock, _admin: bool) -> usize {
    // SAFETY: Arithmetic.
    unsafe { ext::pmskb_nla_size(core::mem::size_of::<ext::pmskb_sock_info>() as c_int) }
}

/// # Safety
///
/// As `proto.close` is called.
unsafe extern "C" fn proto_close<const FAMILY: usize>(sk: *mut ext::sock, timeout: c_long) {
    if let Some(sk) = NonNull::new(sk) {
        // SAFETY: The last descriptor is being closed; TCP has not locked the socket.
        let mut locked = unsafe { Locked::new(sk) };
        if let Some(ctx) = locked.ctx() {
            let own = ctx.own(&mut locked);
            ctx.let_go(own);
        }
    }
    // SAFETY: As we were called.
    unsafe {
        if let Some(close) = (*base(FAMILY)).close {
            close(sk, timeout);
        }
    }
}

/// # Safety
///
/// As `proto.setsockopt` is called.
unsafe extern "C" fn proto_setsockopt<const FAMILY: usize>(
    sk: *mut ext::sock,
    level: c_int,
    name: c_int,
    value: bindings::sockptr_t,
    len: c_uint,
) -> c_int {
    if level != ext::SOL_PMSKB as c_int {
        // SAFETY: As we were called.
        return unsafe {
            match (*base(FAMILY)).setsockopt {
                Some(set) => set(sk, level, name, value, len),
                None => ENOTSUPP.to_errno(),
            }
        };
    }
    from_result(|| {
        let sk = NonNull::new(sk).ok_or(EINVAL)?;
        // SAFETY: `setsockopt()` has a reference to the socket's file, and has not locked it.
        unsafe { set_option(sk, name as u32, &OptVal::new(value, len)) }
    })
}

/// # Safety
///
/// As `proto.getsockopt` is called.
unsafe extern "C" fn proto_getsockopt<const FAMILY: usize>(
    sk: *mut ext::sock,
    level: c_int,
    name: c_int,
    value: *mut c_char,
    len: *mut c_int,
) -> c_int {
    if level != ext::SOL_PMSKB as c_int {
        // SAFETY: As we were called.
        return unsafe {
            match (*base(FAMILY)).getsockopt {
                Some(get) => get(sk, level, name, value, len),
                None => ENOTSUPP.to_errno(),
            }
        };
    }
    from_result(|| {
        let sk = NonNull::new(sk).ok_or(EINVAL)?;
        let (value, len) = (
            UserPtr::from_ptr(value.cast()),
            UserPtr::from_ptr(len.cast()),
        );
        // SAFETY: As in `proto_setsockopt`.
        unsafe { get_option(sk, name as u32, value, len) }?;
        Ok(0)
    })
}

/// # Safety
///
/// As `proto.recvmsg` is called.
unsafe extern "C" fn proto_recvmsg<const FAMILY: usize>(
    sk: *mut ext::sock,
    msg: *mut bindings::msghdr,
    len: usize,
    flags: c_int,
) -> c_int {
    const BASE_FLAGS: c_int =
        (bindings::MSG_OOB | bindings::MSG_ERRQUEUE | bindings::MSG_TRUNC) as c_int;
    let descriptors = {
        let _rcu = rcu::read_lock();
        // SAFETY: A full socket; RCU is held.
        unsafe { Ctx::of(sk) }.is_some_and(|ctx| ctx.mode() == ext::pmskb_rx_mode_PMSKB_RX_DESC)
    };
    if !descriptors || flags & BASE_FLAGS != 0 {
        // SAFETY: As we were called.
        return unsafe {
            match (*base(FAMILY)).recvmsg {
                Some(recv) => recv(sk, msg, len, flags),
                None => ENOTSUPP.to_errno(),
            }
        };
    }
    from_result(|| {
        let (sk, msg) = NonNull::new(sk).zip(NonNull::new(msg)).ok_or(EINVAL)?;
        // SAFETY: `recvmsg()` has a reference to the socket's file, and has not locked it; `msg` is
        // its own.
        let n = unsafe { receive::recvmsg(sk, msg, len, flags) }?;
        Ok(n.min(c_int::MAX as usize) as c_int)
    })
}

// ---- module ----

/// The upper layer protocol, registered.
pub(crate) struct Registered(());

impl Registered {
    /// At module init, once. `ENOEXEC` if Rust and C do not agree on the layout of what they
    /// share, `EEXIST` if there is an upper layer protocol with this name.
    pub(crate) fn new() -> Result<Self> {
        check_layout()?;
        SOCKETS.init();
        crate::frame::set_idle_hook(crate::note::forget);
        crate::store::set_removal_hook(store_removed);
        fill::<0>();
        fill::<1>();
        // SAFETY: Nobody knows the static yet.
        unsafe {
            let mut name = [0; 16];
            for (to, from) in name.iter_mut().zip(ext::PMSKB_ULP_NAME) {
                *to = *from as c_char;
            }
            *ULP.get() = ext::tcp_ulp_ops {
                init: Some(ulp_init),
                release: Some(ulp_release),
                clone: Some(ulp_clone),
                get_info: Some(ulp_info),
                get_info_size: Some(ulp_info_size),
                name,
                owner: crate::this_module(),
                ..Default::default()
            };
        }
        crate::place::start()?;
        // SAFETY: Filled above.
        let res = unsafe { ext::tcp_register_ulp(ULP.get()) };
        if res < 0 {
            crate::place::stop();
            return Err(Error::from_errno(res));
        }
        Ok(Self(()))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: Registered in `new`; no socket has it, or the module could not go.
        unsafe { ext::tcp_unregister_ulp(ULP.get()) };
        crate::place::stop();
        // Contexts that are still waiting for their grace period are freed by the kernel's own
        // code; hooks that still run are ours.
        // SAFETY: May sleep here.
        unsafe { ext::pmskb_rcu_settle() };
    }
}

fn fill<const FAMILY: usize>() {
    let Some(proto) = PROTOS.get(FAMILY) else {
        return;
    };
    // SAFETY: Nobody knows the static yet; TCP's own operations do not change.
    unsafe {
        ptr::copy_nonoverlapping(base(FAMILY), proto.get(), 1);
        let proto = &mut *proto.get();
        proto.owner = crate::this_module();
        proto.close = Some(proto_close::<FAMILY>);
        proto.recvmsg = Some(proto_recvmsg::<FAMILY>);
        proto.setsockopt = Some(proto_setsockopt::<FAMILY>);
        proto.getsockopt = Some(proto_getsockopt::<FAMILY>);
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
