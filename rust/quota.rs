// SPDX-License-Identifier: GPL-2.0

//! Quotas: how many of a store's frames its sockets may hold.
//!
//! What a socket's cursors take is charged to the socket's [`Account`], and to the store, frame by
//! frame. A frame is charged for as long as the socket may be the reason that it is not free: from
//! when it is taken until it is free again, but not while a record has bytes in it. So what counts
//! is what was received and not read yet, and what tokens hold; it does not matter who holds a
//! frame, and how often.
//!
//! # Who knows
//!
//! [`Ledger`] has the owner of each frame, and is under the lock of the frames' table (`frame.rs`),
//! where all that matters happens: frames are taken, found idle, used by records, and given back
//! by them. An owner is a reference on the account, which may outlive its socket.
//!
//! Nothing signals that a frame is idle. Whoever is at a limit looks at some of limbo first.
//!
//! # Lock order
//!
//! `Ctx::rx` or the socket's lock, then the table's, which is innermost. Limits, and the number of
//! an account's frames, are read without a lock.

use crate::pm::Frame;
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc,
    },
};

/// Least frames of a socket: the largest packet, and what two cursors are at.
pub(crate) const MIN_FRAMES: u32 = 32;
/// Least tokens of a socket: the largest datagram, however it is cut.
pub(crate) const MIN_TOKENS: u32 = 64;
/// A socket's frames by default, if 1/8 of the store is less: 4 MiB.
const SMALL: u32 = 1024;
/// How many frames in limbo who is at a limit looks at; and in process context.
pub(crate) const LOOKS: u32 = 32;
pub(crate) const MORE_LOOKS: u32 = 4096;
/// How many frames of a socket can be found idle at a time.
const FOUND: usize = 64;

/// Why a frame is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// There is none.
    NoFrame,
    /// The socket has its share.
    Socket,
    /// All sockets together have theirs.
    Store,
}

/// What a store allows. Read and changed in any context.
pub(crate) struct Limits {
    /// Frames of a socket, unless it has a limit of its own.
    pub(crate) socket_frames: Atomic<u32>,
    /// Tokens of a socket, likewise.
    pub(crate) socket_tokens: Atomic<u32>,
    /// Frames of all sockets.
    pub(crate) store_frames: Atomic<u32>,
}

impl Limits {
    /// Of a store of so many frames.
    pub(crate) fn new(total: u32) -> Self {
        let all = (total / 2).max(MIN_FRAMES);
        Self {
            socket_frames: Atomic::new((total / 8).max(SMALL).min(all)),
            socket_tokens: Atomic::new(crate::token::MAX as u32),
            store_frames: Atomic::new(all),
        }
    }
}

/// What one socket has of its store.
pub(crate) struct Account {
    /// Frames that are charged to it. Changed under the table's lock.
    frames: Atomic<u32>,
    /// The most that may be; 0: what the store says.
    max: Atomic<u32>,
}

impl Account {
    /// Nothing yet, and the store's limit.
    pub(crate) fn new(flags: kernel::alloc::Flags) -> Result<Arc<Self>> {
        let account = Self {
            frames: Atomic::new(0),
            max: Atomic::new(0),
        };
        Ok(Arc::new(account, flags)?)
    }

    /// Frames that are charged to it. Any context.
    pub(crate) fn frames(&self) -> u32 {
        self.frames.load(Relaxed)
    }

    /// Sets its limit; 0: the store's. Any context.
    pub(crate) fn set_max(&self, max: u32) {
        self.max.store(max, Relaxed);
    }
}

/// Whom each frame is charged to.
///
/// # Invariants
///
/// - A free frame has no owner.
/// - A frame with an owner is charged exactly if no record has bytes in it. `charged` is the
///   number of those, and [`Account::frames`] of those that have this owner.
pub(crate) struct Ledger {
    first: u32,
    owners: KVVec<Option<Arc<Account>>>,
    charged: u32,
    /// Frames that reclaim has found idle, of those with an owner: they may be free now.
    found: [Frame; FOUND],
    nr_found: usize,
}

impl Ledger {
    /// Of `count` frames from `first`, which nobody has.
    pub(crate) fn new(first: u32, count: u32) -> Result<Self> {
        let mut owners = KVVec::with_capacity(count as usize, GFP_KERNEL)?;
        for _ in 0..count {
            owners.push(None, GFP_KERNEL)?;
        }
        Ok(Self {
            first,
            owners,
            charged: 0,
            found: [Frame(0); FOUND],
            nr_found: 0,
        })
    }

    /// Frames that are charged to anybody.
    pub(crate) fn charged(&self) -> u32 {
        self.charged
    }

    fn owner(&mut self, frame: Frame) -> Option<&mut Option<Arc<Account>>> {
        let at = frame.0.checked_sub(self.first)?;
        self.owners.get_mut(at as usize)
    }

    fn add(charged: &mut u32, account: &Account) {
        *charged = charged.saturating_add(1);
        account
            .frames
            .store(account.frames().saturating_add(1), Relaxed);
    }

    fn sub(charged: &mut u32, account: &Account) {
        *charged = charged.saturating_sub(1);
        account
            .frames
            .store(account.frames().saturating_sub(1), Relaxed);
    }

    /// Whether `account` may have `more` frames.
    pub(crate) fn room(&self, account: &Account, limits: &Limits, more: u32) -> Result<(), Denied> {
        let max = match account.max.load(Relaxed) {
            0 => limits.socket_frames.load(Relaxed),
            max => max,
        };
        if account.frames().saturating_add(more) > max {
            return Err(Denied::Socket);
        }
        if self.charged.saturating_add(more) > limits.store_frames.load(Relaxed) {
            return Err(Denied::Store);
        }
        Ok(())
    }

    /// A frame that was free is charged to `account`.
    pub(crate) fn charge(&mut self, frame: Frame, account: &Arc<Account>) {
        if let Some(owner) = self.owner(frame) {
            *owner = Some(account.clone());
            Self::add(&mut self.charged, account);
        }
    }

    /// A record has bytes in the frame, and none had before.
    pub(crate) fn used(&mut self, frame: Frame) {
        let mut charged = self.charged;
        if let Some(Some(account)) = self.owner(frame) {
            Self::sub(&mut charged, account);
        }
        self.charged = charged;
    }

    /// No record has bytes in the frame any more. `held` says whether somebody else holds it: if
    /// not, it is on its way to be free, and nobody's.
    pub(crate) fn unused(&mut self, frame: Frame, held: bool) {
        let mut charged = self.charged;
        match self.owner(frame) {
            Some(Some(account)) if held => Self::add(&mut charged, account),
            Some(owner) => *owner = None,
            None => {}
        }
        self.charged = charged;
    }

    /// The frame is free, or will never be. `used` says whether records have bytes in it.
    pub(crate) fn forget(&mut self, frame: Frame, used: bool) {
        let owner = self.owner(frame).and_then(Option::take);
        if let Some(account) = owner.filter(|_| !used) {
            Self::sub(&mut self.charged, &account);
        }
    }

    /// Whether reclaim may take a frame for idle, which `idle` finds out. Those with an owner are
    /// to be looked at afterwards, one after the other by [`Self::next_found`]; with no room for
    /// them they stay in limbo.
    pub(crate) fn look(&mut self, frame: Frame, idle: impl FnOnce() -> bool) -> bool {
        if !matches!(self.owner(frame), Some(Some(_))) {
            return idle();
        }
        let at = self.nr_found;
        let Some(slot) = self.found.get_mut(at) else {
            return false;
        };
        let idle = idle();
        if idle {
            *slot = frame;
            self.nr_found = at + 1;
        }
        idle
    }

    /// A frame that was found idle; each is given once.
    pub(crate) fn next_found(&mut self) -> Option<Frame> {
        self.nr_found = self.nr_found.checked_sub(1)?;
        self.found.get(self.nr_found).copied()
    }

    /// All owners, for the caller to drop without a lock: nothing is charged any more, for good.
    pub(crate) fn close(&mut self) -> KVVec<Option<Arc<Account>>> {
        self.charged = 0;
        core::mem::replace(&mut self.owners, KVVec::new())
    }
}
