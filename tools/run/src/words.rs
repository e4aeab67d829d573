// SPDX-License-Identifier: GPL-2.0-only

//! What the launcher tells the preloaded library, by the environment.

/// The store's device node. Without it the library does nothing.
pub const STORE: &str = "PMSKB_RUN_STORE";
/// Set: a socket that should have been attached and was not is the caller's error.
pub const REQUIRE: &str = "PMSKB_RUN_REQUIRE";
/// Set: a line on the standard error for each socket.
pub const VERBOSE: &str = "PMSKB_RUN_VERBOSE";
/// Set: sockets get auto-persist.
pub const AUTO: &str = "PMSKB_RUN_AUTO";
/// A file of [`COUNTS_LEN`] bytes to count sockets in.
pub const COUNTS: &str = "PMSKB_RUN_COUNTS";

/// Longest path of either file, with its NUL.
pub const PATH_MAX: usize = 256;

/// Counters in the file, 8 bytes each: sockets that were attached.
pub const ATTACHED: usize = 0;
/// Sockets that are not of a kind that can be attached.
pub const PLAIN: usize = 1;
/// Sockets that could not be attached.
pub const FAILED: usize = 2;
/// The last errno of those.
pub const ERRNO: usize = 3;
/// How many there are.
pub const COUNTS_NR: usize = 4;
/// Bytes of them.
pub const COUNTS_LEN: usize = COUNTS_NR * 8;
