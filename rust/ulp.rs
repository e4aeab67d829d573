// SPDX-License-Identifier: GPL-2.0

//! The TCP upper layer protocol `pmskb`: init, clone, close, and calls of TCP sockets.
//!
//! A socket becomes ours by `setsockopt(SOL_TCP, TCP_ULP, "pmskb")`, in any state but as long as
//! nobody else has changed its operations; then `PMSKB_ATTACH` names its store. `ioctl` of a store
//! does both ([`adopt`]). What a listening socket accepts inherits the store and the receive
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
//! - Store and tokens go at `close()` already (`attach.rs`); the context goes when TCP is through.

use crate::{
    attach::{self, Ctx},
    auto, bindings as ext,
    cell::Static,
    receive,
    send::{self, Payload},
    sock::{errno, OptVal, SocketFile, Stream, Transport},
};
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    error::{from_result, to_result},
    ffi::{c_char, c_int, c_long, c_uint, c_void},
    prelude::*,
    sync::rcu,
    uaccess::UserPtr,
};

/// The attribute of `INET_DIAG_ULP_INFO` that carries `struct pmskb_sock_info`. Far from those
/// that the kernel may still give out.
const INFO_ATTR: c_int = 0x504d;

static ULP: Static<ext::tcp_ulp_ops> = Static::new();
/// Our operations, IPv4 and IPv6.
static PROTOS: [Static<ext::proto>; 2] = [const { Static::new() }; 2];
/// Those of the `socket` with auto-persist: what reads past `recvmsg()`.
static OPS: [Static<bindings::proto_ops>; 2] = [const { Static::new() }; 2];

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

/// The data of a socket that has our operations: a context, or null while it is being made or
/// destroyed.
///
/// # Safety
///
/// `sk` is a full socket.
pub(crate) unsafe fn data(sk: *mut ext::sock) -> Option<*mut c_void> {
    // SAFETY: As the caller says; what has our operations is a TCP socket.
    unsafe {
        family_of(sk)?;
        Some(ext::pmskb_ulp_data(sk))
    }
}

/// Makes a TCP socket ours, unless it is. Process context, sleeps.
///
/// `EBUSY` if it belongs to something else, `EOPNOTSUPP`, `ENOMEM`.
pub(crate) fn adopt(file: &SocketFile) -> Result {
    let sk = file.sk()?;
    // SAFETY: A full TCP socket, and `file` keeps it.
    let ours = || unsafe { family_of(sk.as_ptr()) }.is_some();
    if ours() {
        return Ok(());
    }
    match file.set_ulp() {
        // Somebody else's, or ours by another thread just now.
        Err(e) if e == EEXIST && ours() => Ok(()),
        Err(e) if e == EEXIST => Err(EBUSY),
        other => other,
    }
}

/// The way to what a socket has received is by our calls alone, from here on; what it accepts
/// inherits that. `EBUSY` if the way is somebody else's.
///
/// # Safety
///
/// `sk` is a TCP socket of ours, which is locked, and its file is open.
pub(crate) unsafe fn guard(sk: NonNull<ext::sock>) -> Result {
    // SAFETY: As the caller says; our operations are filled, and stay as long as the module, on
    // which the socket gets a reference.
    unsafe {
        let family = family_of(sk.as_ptr()).ok_or(EBUSY)?;
        let ops = OPS.get(family).ok_or(EBUSY)?;
        to_result(ext::pmskb_tcp_guard(sk.as_ptr(), family != 0, ops.get()))
    }
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
                return Err(errno(bindings::EOPNOTSUPP));
            }
            let family = (0..PROTOS.len())
                .find(|family| ptr::eq(base(*family), prot))
                .ok_or(EBUSY)?;
            if ext::pmskb_sk_has_psock(sk.as_ptr()) {
                return Err(EBUSY);
            }
            // Whether or not it becomes ours.
            ext::pmskb_sock_get_zc_back(sk.as_ptr());
            let ctx = Ctx::new(sk, Transport::Tcp, GFP_KERNEL_ACCOUNT)?;
            let ours = PROTOS.get(family).ok_or(EBUSY)?;
            ext::pmskb_ulp_install(sk.as_ptr(), ours.get(), ctx.cast(), ULP.get());
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
        if !ctx.is_null() {
            Ctx::dispose(ctx);
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
            .and_then(|parent| parent.child(sk).ok())
        {
            Some(ctx) => {
                ext::pmskb_ulp_data_set(newsk, ctx.cast());
                // The packet that makes the connection may bring data.
                if let Some(ctx) = ctx.as_ref().filter(|ctx| ctx.auto()) {
                    auto::arrived(ctx);
                }
            }
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
        let mut locked = unsafe { Stream::new(sk) };
        if let Some(ctx) = locked.ctx() {
            auto::finish(&mut locked, ctx);
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
/// As `proto.disconnect` is called.
unsafe extern "C" fn proto_disconnect<const FAMILY: usize>(
    sk: *mut ext::sock,
    flags: c_int,
) -> c_int {
    // SAFETY: As we were called. One without a `socket` was never accepted, and its listener is
    // being closed: nothing may sleep. Others are locked, and their file is open.
    unsafe {
        if let Some(raw) = NonNull::new(sk).filter(|_| ext::pmskb_sk_has_socket(sk)) {
            let mut lent = Stream::lent(raw);
            if let Some(ctx) = lent.ctx() {
                auto::finish(&mut lent, ctx);
                // The next connection has sequence numbers of its own.
                ctx.own(&mut lent).logged = None;
            }
        }
        match (*base(FAMILY)).disconnect {
            Some(disconnect) => disconnect(sk, flags),
            None => ENOTSUPP.to_errno(),
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
        unsafe { attach::set_option(sk, name as u32, &OptVal::new(value, len)) }
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
        let maps = level == ext::PMSKB_SOL_TCP as c_int
            && name == ext::PMSKB_TCP_ZEROCOPY_RECEIVE as c_int;
        // SAFETY: A full socket, which stays: its file is open.
        if maps && unsafe { Ctx::of(sk) }.is_some_and(Ctx::auto) {
            // It gives out what comes while it runs, too.
            return errno(bindings::EOPNOTSUPP).to_errno();
        }
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
        unsafe { attach::get_option(sk, name as u32, value, len) }?;
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
    // SAFETY: A full socket, which stays: its file is open.
    let bytes = flags & BASE_FLAGS != 0 || !unsafe { Ctx::describes(sk) };
    // SAFETY: As above.
    let auto = unsafe { Ctx::of(sk) }.is_some_and(Ctx::auto);
    // SAFETY: TCP's own operations do not change.
    let Some(base) = (unsafe { (*base(FAMILY)).recvmsg }) else {
        return ENOTSUPP.to_errno();
    };
    if bytes && !auto {
        // SAFETY: As we were called.
        return unsafe { base(sk, msg, len, flags) };
    }
    from_result(|| {
        let (sk, msg) = NonNull::new(sk).zip(NonNull::new(msg)).ok_or(EINVAL)?;
        if bytes {
            // SAFETY: As we were called.
            let n = unsafe { auto::recvmsg(sk, msg, len, flags, base) }?;
            return Ok(n.min(c_int::MAX as usize) as c_int);
        }
        // SAFETY: `recvmsg()` has a reference to the socket's file, and has not locked it; `msg` is
        // its own.
        let n = unsafe { receive::recvmsg(sk, msg, len, flags) }?;
        Ok(n.min(c_int::MAX as usize) as c_int)
    })
}

/// # Safety
///
/// As `proto.sendmsg` is called.
unsafe extern "C" fn proto_sendmsg<const FAMILY: usize>(
    sk: *mut ext::sock,
    msg: *mut bindings::msghdr,
    len: usize,
) -> c_int {
    // SAFETY: As we were called; `msg` is the caller's.
    let payload = unsafe {
        if (*msg).msg_controllen == 0 {
            None
        } else {
            Payload::of(&mut *msg).transpose()
        }
    };
    let Some(payload) = payload else {
        // SAFETY: As we were called.
        return unsafe {
            match (*base(FAMILY)).sendmsg {
                Some(send) => send(sk, msg, len),
                None => ENOTSUPP.to_errno(),
            }
        };
    };
    from_result(|| {
        let sk = NonNull::new(sk).ok_or(EINVAL)?;
        // SAFETY: `sendmsg()` has a reference to the socket's file, and has not locked it; `msg` is
        // its own, for sending `len` bytes.
        let n = unsafe { send::sendmsg(sk, &mut *msg, len, payload?) }?;
        Ok(n.min(c_int::MAX as usize) as c_int)
    })
}

/// TCP's own operations of the `socket`.
fn base_ops(family: usize) -> *const bindings::proto_ops {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_tcp_ops(family != 0) }
}

/// # Safety
///
/// As `proto_ops.splice_read` is called.
unsafe extern "C" fn ops_splice_read<const FAMILY: usize>(
    sock: *mut bindings::socket,
    pos: *mut bindings::loff_t,
    pipe: *mut bindings::pipe_inode_info,
    len: usize,
    flags: c_uint,
) -> isize {
    // SAFETY: TCP's own operations do not change.
    let Some(base) = (unsafe { (*base_ops(FAMILY)).splice_read }) else {
        return EINVAL.to_errno() as isize;
    };
    // SAFETY: As we were called.
    let call = |len| unsafe { base(sock, pos, pipe, len, flags) };
    // SAFETY: The socket is open, so it has a sock; that is one of TCP.
    let sk = unsafe { ext::pmskb_socket_sk(sock.cast()) };
    // SAFETY: As above.
    if !unsafe { Ctx::of(sk) }.is_some_and(Ctx::auto) {
        return call(len);
    }
    let spliced = NonNull::new(sk).ok_or(EINVAL).and_then(|sk| {
        // SAFETY: As above; `splice()` has not locked it.
        unsafe { auto::splice(sk, len, ext::pmskb_socket_nonblock(sock.cast()), call) }
    });
    spliced.unwrap_or_else(|e| e.to_errno() as isize)
}

/// What other parts of the kernel read with: they have no need to wait for us.
///
/// # Safety
///
/// As `proto_ops.read_sock` is called.
unsafe extern "C" fn ops_read_sock<const FAMILY: usize>(
    sk: *mut bindings::sock,
    desc: *mut bindings::read_descriptor_t,
    actor: bindings::sk_read_actor_t,
) -> c_int {
    // SAFETY: As we were called: the socket stays.
    if unsafe { Ctx::of(sk.cast()) }.is_some_and(Ctx::auto) {
        return errno(bindings::EOPNOTSUPP).to_errno();
    }
    // SAFETY: As we were called.
    unsafe {
        match (*base_ops(FAMILY)).read_sock {
            Some(read) => read(sk, desc, actor),
            None => errno(bindings::EOPNOTSUPP).to_errno(),
        }
    }
}

/// As [`ops_read_sock`].
///
/// # Safety
///
/// As `proto_ops.read_skb` is called.
unsafe extern "C" fn ops_read_skb<const FAMILY: usize>(
    sk: *mut bindings::sock,
    actor: bindings::skb_read_actor_t,
) -> c_int {
    // SAFETY: As we were called: the socket stays.
    if unsafe { Ctx::of(sk.cast()) }.is_some_and(Ctx::auto) {
        return errno(bindings::EOPNOTSUPP).to_errno();
    }
    // SAFETY: As we were called.
    unsafe {
        match (*base_ops(FAMILY)).read_skb {
            Some(read) => read(sk, actor),
            None => errno(bindings::EOPNOTSUPP).to_errno(),
        }
    }
}

// ---- module ----

/// The upper layer protocol, registered.
pub(crate) struct Registered(());

impl Registered {
    /// At module init, once. `EEXIST` if there is an upper layer protocol with this name.
    pub(crate) fn new() -> Result<Self> {
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
        // SAFETY: Filled above.
        to_result(unsafe { ext::tcp_register_ulp(ULP.get()) })?;
        Ok(Self(()))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: Registered in `new`; no socket has it, or the module could not go.
        unsafe { ext::tcp_unregister_ulp(ULP.get()) };
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
        proto.disconnect = Some(proto_disconnect::<FAMILY>);
        proto.sendmsg = Some(proto_sendmsg::<FAMILY>);
        proto.recvmsg = Some(proto_recvmsg::<FAMILY>);
        proto.setsockopt = Some(proto_setsockopt::<FAMILY>);
        proto.getsockopt = Some(proto_getsockopt::<FAMILY>);
    }
    let Some(ops) = OPS.get(FAMILY) else {
        return;
    };
    // SAFETY: As above.
    unsafe {
        ptr::copy_nonoverlapping(base_ops(FAMILY), ops.get(), 1);
        let ops = &mut *ops.get();
        ops.owner = crate::this_module();
        ops.splice_read = Some(ops_splice_read::<FAMILY>);
        ops.read_sock = Some(ops_read_sock::<FAMILY>);
        ops.read_skb = Some(ops_read_skb::<FAMILY>);
    }
}
