// SPDX-License-Identifier: GPL-2.0

//! UDP sockets: how they come to us, their calls, how they go.
//!
//! There is no upper layer protocol for UDP. A socket becomes ours by `PMSKB_IOC_ATTACH_SOCKET`:
//! under its lock, and as long as nobody else has changed its operations or uses `sk_user_data`,
//! `sk_prot` is replaced by a copy with our `close`, `sendmsg`, `recvmsg`, `setsockopt` and
//! `getsockopt`. How datagrams reach the queue, and what ICMP errors do, stays UDP's: this is no
//! encapsulation.
//!
//! # States
//!
//! Any: before `bind()`, bound, connected. What is in the receive queue at that moment stays
//! unplaced and is copied when it is received as descriptors.
//!
//! # References
//!
//! - Module: a socket's `ops` are replaced too, by a copy with our module as its owner. One
//!   reference is taken then; the kernel puts it when `close()` is through, from its own code.
//! - Context: in `sk_user_data`, without flags, so that who asks for a psock or a reuseport array
//!   there sees that it is somebody else's. It goes at `close()`, under the socket's lock and
//!   before UDP closes it. If our operations have been replaced by then (an `IPV6_ADDRFORM` that was
//!   under way when they came), it goes with the socket: by `sk_destruct`, which is ours as well,
//!   and by which a socket of ours is known.
//!
//! # Others who want the socket
//!
//! What would change its operations or its encapsulation afterwards is `EBUSY`: `IPV6_ADDRFORM` and
//! `UDP_ENCAP` here; sockmap, l2tp and other tunnels, and reuseport arrays since `sk_user_data` is
//! not null.

use crate::{
    attach::{self, Ctx},
    auto, bindings as ext,
    cell::Static,
    datagram,
    place::HookUse,
    send,
    sock::{errno, Locked, Net, OptVal, SocketFile, Transport},
    store::Store,
};
use core::ptr::{self, NonNull};
use kernel::{
    bindings,
    error::{from_result, to_result},
    ffi::{c_char, c_int, c_long, c_uint, c_void},
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        rcu, Arc,
    },
    uaccess::UserPtr,
};

/// Our operations, IPv4 and IPv6.
static PROTOS: [Static<ext::proto>; 2] = [const { Static::new() }; 2];
/// Those of the `socket`: UDP's own, but the owner.
static OPS: [Static<bindings::proto_ops>; 2] = [const { Static::new() }; 2];
/// UDP's own `sk_prot` and `ops`; null if the kernel has no IPv6, or it is switched off. Written at
/// module init only.
static BASES: [[Atomic<usize>; 2]; 2] = [const { [const { Atomic::new(0) }; 2] }; 2];
/// Attached sockets.
static ATTACHED: Atomic<i32> = Atomic::new(0);

/// Counts attached sockets. Any context.
pub(crate) fn attached(n: i32) {
    ATTACHED.add(n, Relaxed);
}

/// Whether there are any: without, no datagram need be looked at. Any context.
#[inline]
pub(crate) fn any_attached() -> bool {
    ATTACHED.load(Relaxed) != 0
}

/// UDP's own operations.
fn base(family: usize) -> *mut ext::proto {
    BASES.get(family).map_or(ptr::null_mut(), |[prot, _]| {
        prot.load(Relaxed) as *mut ext::proto
    })
}

/// The data of a socket that is one of ours: a context, or null if it is being closed.
///
/// # Safety
///
/// `sk` is a full socket.
pub(crate) unsafe fn data(sk: *mut ext::sock) -> Option<*mut c_void> {
    let mut data = ptr::null_mut();
    // SAFETY: As the caller says.
    unsafe { ext::pmskb_udp_data(sk, &mut data) }.then_some(data)
}

/// A socket ends that had a context, and other operations than ours since: nobody has closed it.
///
/// # Safety
///
/// For `sk_destruct`, with what the socket's data was; the socket is dead.
#[no_mangle]
unsafe extern "C" fn pmskb_udp_gone(data: *mut c_void) {
    if !data.is_null() {
        // SAFETY: As the caller says; who finds it by the list does not get the socket any more.
        unsafe { Ctx::dispose(data.cast()) };
    }
}

/// Makes a UDP socket ours and attaches it, unless it is ours; whether it did. Process context,
/// sleeps.
///
/// `EBUSY` if it belongs to something else, `EIO` if the store is going, `ENOMEM`.
pub(crate) fn adopt(file: &SocketFile, store: &Arc<Store>) -> Result<bool> {
    let sk = file.sk()?;
    // Before the socket's lock: registering sleeps on locks under which others lock sockets.
    // SAFETY: `file` keeps the socket.
    let hooks = HookUse::get(unsafe { Net::of(sk) })?;
    // SAFETY: As above, and this thread has not locked it.
    let locked = unsafe { Locked::new(sk) };
    if locked.ctx().is_some() {
        return Ok(false);
    }
    // SAFETY: As above.
    let prot = unsafe { ext::pmskb_sk_prot(sk.as_ptr()) };
    let family = (0..PROTOS.len())
        .find(|family| ptr::eq(base(*family), prot))
        .ok_or(EBUSY)?;
    let (Some([_, ops]), Some(our_prot), Some(our_ops)) =
        (BASES.get(family), PROTOS.get(family), OPS.get(family))
    else {
        return Err(EBUSY);
    };
    let udp = ext::pmskb_udp_calls {
        prot: prot.cast_mut(),
        ops: ops.load(Relaxed) as *const bindings::proto_ops,
    };
    let ours = ext::pmskb_udp_calls {
        prot: our_prot.get(),
        ops: our_ops.get(),
    };
    let ctx = Ctx::new(sk, Transport::Udp, GFP_KERNEL_ACCOUNT)?;
    // The store before anybody finds the context. A removal that does, by the list, waits for the
    // socket's lock, and finds it by the socket then, or not at all.
    // SAFETY: `ctx` is new. The socket is locked; `udp` and `ours` are of one family.
    let installed = unsafe {
        Ctx::set_first_store(ctx, store, hooks).and_then(|()| {
            to_result(ext::pmskb_udp_install(
                file.as_ptr(),
                &udp,
                &ours,
                ctx.cast(),
            ))
        })
    };
    if let Err(e) = installed {
        // SAFETY: Nobody has found it, and the socket is locked.
        unsafe { Ctx::dispose(ctx) };
        return Err(e);
    }
    Ok(true)
}

/// Auto-persist hears of each datagram from here on. `EBUSY` if somebody else does.
///
/// # Safety
///
/// `sk` is a UDP socket of ours, which is locked.
pub(crate) unsafe fn listen(sk: NonNull<ext::sock>) -> Result {
    // SAFETY: As the caller says. The socket has a reference of the module; what runs when it has
    // none any more is under RCU, for which the module's end waits.
    to_result(unsafe { ext::pmskb_udp_listen(sk.as_ptr()) })
}

// ---- what the kernel calls ----

/// # Safety
///
/// As `proto.close` is called.
unsafe extern "C" fn proto_close<const FAMILY: usize>(sk: *mut ext::sock, timeout: c_long) {
    if let Some(sk) = NonNull::new(sk) {
        // SAFETY: The last descriptor is being closed; nobody has locked the socket.
        let mut locked = unsafe { Locked::new(sk) };
        if let Some(ctx) = locked.ctx() {
            auto::finish_datagrams(&mut locked, ctx);
        }
        // SAFETY: It is locked, and has our operations, or this would not be called. Whoever found
        // the context before is under RCU, or waits for the lock and will not find it any more.
        unsafe {
            let ctx = data(sk.as_ptr()).unwrap_or(ptr::null_mut()).cast::<Ctx>();
            ext::pmskb_udp_restore(sk.as_ptr(), base(FAMILY));
            if !ctx.is_null() {
                Ctx::dispose(ctx);
            }
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
    let ours = level == ext::SOL_PMSKB as c_int;
    // They would replace what we have replaced; or take the datagrams.
    let busy = (level == ext::PMSKB_SOL_IPV6 as c_int && name == ext::PMSKB_IPV6_ADDRFORM as c_int)
        || (level == ext::PMSKB_SOL_UDP as c_int && name == ext::PMSKB_UDP_ENCAP as c_int);
    if !ours && !busy {
        // SAFETY: As we were called.
        return unsafe {
            match (*base(FAMILY)).setsockopt {
                Some(set) => set(sk, level, name, value, len),
                None => ENOTSUPP.to_errno(),
            }
        };
    }
    from_result(|| {
        if busy {
            return Err(EBUSY);
        }
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
    // SAFETY: A full socket, which stays: its file is open.
    let (describes, auto) = unsafe {
        let _rcu = rcu::read_lock();
        (Ctx::describes(sk), Ctx::of(sk).is_some_and(Ctx::auto))
    };
    if flags & bindings::MSG_ERRQUEUE as c_int != 0 || !(describes || auto) {
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
        let n = unsafe { datagram::recvmsg(sk, msg, len, flags, describes) }?;
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
    if unsafe { (*msg).msg_controllen != 0 && send::is_asked(&mut *msg) } {
        // A datagram has room for few pages, and where a record lies is not for the sender to know.
        return errno(bindings::EOPNOTSUPP).to_errno();
    }
    // SAFETY: As we were called.
    unsafe {
        match (*base(FAMILY)).sendmsg {
            Some(send) => send(sk, msg, len),
            None => ENOTSUPP.to_errno(),
        }
    }
}

// ---- module ----

/// Learns UDP's operations and makes ours. At module init, once. Without IPv6 there are none for
/// it. `ENOMEM`.
pub(crate) fn start() -> Result {
    fill::<0>(false)?;
    match fill::<1>(true) {
        Err(e) if e == errno(bindings::EAFNOSUPPORT) => Ok(()),
        other => other,
    }
}

fn fill<const FAMILY: usize>(v6: bool) -> Result {
    let (Some(proto), Some(ops), Some([base_prot, base_ops])) =
        (PROTOS.get(FAMILY), OPS.get(FAMILY), BASES.get(FAMILY))
    else {
        return Err(EINVAL);
    };
    let mut udp = ext::pmskb_udp_calls::default();
    // SAFETY: At module init; may sleep.
    to_result(unsafe { ext::pmskb_udp_learn(v6, &mut udp) })?;
    // SAFETY: Nobody knows the statics yet; UDP's own operations do not change.
    unsafe {
        ptr::copy_nonoverlapping(udp.ops, ops.get(), 1);
        (*ops.get()).owner = crate::this_module();
        ptr::copy_nonoverlapping(udp.prot, proto.get(), 1);
        let proto = &mut *proto.get();
        proto.owner = crate::this_module();
        proto.close = Some(proto_close::<FAMILY>);
        proto.sendmsg = Some(proto_sendmsg::<FAMILY>);
        proto.recvmsg = Some(proto_recvmsg::<FAMILY>);
        proto.setsockopt = Some(proto_setsockopt::<FAMILY>);
        proto.getsockopt = Some(proto_getsockopt::<FAMILY>);
    }
    base_prot.store(udp.prot as usize, Relaxed);
    base_ops.store(udp.ops as usize, Relaxed);
    Ok(())
}
