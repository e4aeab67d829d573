// SPDX-License-Identifier: GPL-2.0-only

//! An HTTP key-value server whose objects are the packets that brought them.
//!
//! | file | noun |
//! | --- | --- |
//! | `view.rs` | bytes received and not yet used, where they lie in packets |
//! | `parse.rs` | requests in them: heads and bodies |
//! | `conn.rs` | a connection: from packets to operations and replies |
//! | `reply.rs` | replies, and the queue that they wait in |
//! | `store.rs` | what is needed of a store |
//! | `server.rs` | listeners, clients, time limits, a batch: whatever drives it |
//! | `epoll.rs` | drives it by epoll: system calls for each client, one submission a turn |
//! | `uring.rs` | drives it by io_uring: one system call a turn |
//!
//! `main.rs` is the program. The benchmark's other servers use `view.rs`, `parse.rs` and
//! `reply.rs` as they are: what they are compared by is not how they read HTTP.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod conn;
pub mod epoll;
#[cfg(test)]
mod fake;
pub mod parse;
pub mod reply;
pub mod server;
pub mod store;
pub mod uring;
pub mod view;
