// SPDX-License-Identifier: GPL-2.0

//! pmskb: received packets as the durable form of application data.
//!
//! The rooms, from the network down to the media; a layer calls those below it:
//!
//! | file | noun |
//! | --- | --- |
//! | `place.rs` | the LOCAL_IN hook: moves a packet's bytes into frames |
//! | `skb.rs` | `sk_buff`, wrapped |
//! | `note.rs` | what is remembered of each placed packet until it is received |
//! | `sock.rs` | `sock`, wrapped |
//! | `attach.rs` | attached sockets: what they have, options, letting go |
//! | `ulp.rs` | the TCP upper layer protocol: init, clone, calls of TCP sockets |
//! | `udp.rs` | UDP sockets: coming to us, calls |
//! | `descriptor.rs` | packet descriptors, from what is in a receive queue |
//! | `receive.rs` | TCP's `recvmsg()` in descriptor mode |
//! | `datagram.rs` | UDP's `recvmsg()` in descriptor mode |
//! | `send.rs` | TCP's `sendmsg()` with records among what it sends |
//! | `token.rs` | a socket's holds |
//! | `submit.rs` | arrays of operations: put, delete, release |
//! | `uapi.rs` | structures of the interface |
//! | `control.rs` | `/dev/pmskb`: format, attach, detach |
//! | `device.rs` | `/dev/pmskbN`: map, read, splice, ioctl |
//! | `buffer.rs` | frames for the application's own data |
//! | `object.rs` | a record, open as a file |
//! | `read.rs` | from ranges of a region to iov, pipe and socket |
//! | `file.rs` | files of ours that are no device's |
//! | `store.rs` | a formatted region, attached |
//! | `quota.rs` | how many frames sockets may hold |
//! | `frame.rs` | frames of the data area and their references |
//! | `head.rs` | the head area: volatile skb heads |
//! | `page.rs` | struct pages of a run of frames, and their base references |
//! | `region.rs` | the DAX memory of one device |
//! | `vma.rs` | mappings in user space |
//! | `cell.rs` | statics that C code wants pointers to |
//! | `lock.rs` | a spinlock that softirqs may take |
//! | `inject.rs`, `failing.c` | what fails on purpose, in builds for tests only |
//! | `core/` | format, log, index, commit, recovery: the same files as in user space |

use kernel::prelude::*;

mod attach;
mod auto;
mod bindings;
mod buffer;
mod cell;
mod control;
mod datagram;
mod descriptor;
mod device;
mod file;
mod frame;
mod head;
mod host;
mod inject;
mod lock;
mod note;
mod object;
mod page;
mod place;
// What only the other host uses (readers, offline images) is no dead code of the core's.
#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "core/mod.rs"]
mod pm;
mod quota;
mod read;
mod receive;
mod region;
mod send;
mod skb;
mod sock;
mod store;
mod submit;
mod token;
mod uapi;
mod udp;
mod ulp;
mod upkeep;
mod vma;

#[pin_data]
struct Pmskb {
    /// Goes first: nobody places packets any more.
    sockets: attach::Registered,
    #[pin]
    control: control::Control,
    /// Goes last: the others use them.
    lists: Lists,
}

/// The memory of the lists in statics.
struct Lists;

impl Drop for Lists {
    fn drop(&mut self) {
        device::exit();
        store::exit();
    }
}

module! {
    type: Pmskb,
    name: "pmskb",
    authors: ["pmskb developers"],
    description: "Received packets as the durable form of application data",
    license: "GPL",
}

impl kernel::InPlaceModule for Pmskb {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        store::init();
        device::init();
        try_pin_init!(Self {
            sockets: attach::Registered::new()?,
            control <- control::Control::new(),
            lists: Lists,
            // Last: it cannot be undone if the module fails to load after it.
            _: { control::attach_param() },
        }? Error)
    }
}

/// `THIS_MODULE` of C; null if built in. The kernel crate's own is in a different place in each
/// series.
const fn this_module() -> *mut kernel::bindings::module {
    #[cfg(MODULE)]
    return core::ptr::addr_of!(kernel::bindings::__this_module).cast_mut();
    #[cfg(not(MODULE))]
    return core::ptr::null_mut();
}

/// The errno of an error of the core.
fn errno(error: pm::Error) -> Error {
    use kernel::bindings as c;
    let number = match error {
        pm::Error::NoSpace => c::ENOSPC,
        pm::Error::Exists => c::EEXIST,
        pm::Error::NotFound => c::ENOENT,
        pm::Error::TooLong => c::ENAMETOOLONG,
        pm::Error::TooBig => c::EFBIG,
        pm::Error::TooSmall => c::ENOSPC,
        pm::Error::Invalid => c::EINVAL,
        pm::Error::Damaged => c::EUCLEAN,
        pm::Error::Version => c::EOPNOTSUPP,
        pm::Error::NotFormatted => c::EMEDIUMTYPE,
        pm::Error::Busy => c::EBUSY,
        pm::Error::Io => c::EIO,
        pm::Error::ReadOnly => c::EROFS,
        pm::Error::Stale => c::ESTALE,
        pm::Error::NoMemory => c::ENOMEM,
        pm::Error::Interrupted => c::EINTR,
    };
    Error::from_errno(-(number as i32))
}
