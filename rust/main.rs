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
//! | `ulp.rs` | the TCP upper layer protocol: attach, clone, options, close |
//! | `receive.rs` | packet descriptors |
//! | `token.rs` | a socket's holds |
//! | `submit.rs` | arrays of operations: put, delete, release |
//! | `control.rs` | `/dev/pmskb`: format, attach, detach |
//! | `device.rs` | `/dev/pmskbN`: map, read, splice, ioctl |
//! | `store.rs` | a formatted region, attached |
//! | `frame.rs` | frames of the data area and their references |
//! | `head.rs` | the head area: volatile skb heads |
//! | `region.rs` | the DAX memory of one device |
//! | `core/` | format, log, index, commit, recovery: the same files as in user space |

use kernel::prelude::*;

mod bindings;

struct Pmskb;

module! {
    type: Pmskb,
    name: "pmskb",
    authors: ["pmskb developers"],
    description: "Received packets as the durable form of application data",
    license: "GPL",
}

impl kernel::Module for Pmskb {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Pmskb)
    }
}
