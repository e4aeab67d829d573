// SPDX-License-Identifier: GPL-2.0

//! A socket's holds.
//!
//! A token names a part of one frame that a packet descriptor told the application about. It has
//! one of the frame's holds, so the bytes stay as they are until the token is released. Tokens
//! are numbers handed out in sequence; the table is a ring indexed by the number's low bits.
//!
//! All of this is under the socket's lock.

use crate::{
    frame::{Frame, FrameArea},
    note::Note,
    region::PAGE,
    sock::{errno, Flow},
};
use kernel::{bindings, prelude::*};

/// Tokens that a socket can have at once, whatever its quota.
pub(crate) const MAX: usize = 65_536;
/// Slots at first.
const FIRST: usize = 64;

/// What a token holds.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    /// The frame; one of its holds is the token's.
    pub(crate) frame: Frame,
    /// The bytes, `note.offset` and `note.len` in the frame, and what is known of them.
    pub(crate) note: Note,
}

#[derive(Clone, Copy)]
struct Slot {
    token: u32,
    held: Option<Held>,
}

const EMPTY: Slot = Slot {
    token: 0,
    held: None,
};

/// The tokens of one socket.
pub(crate) struct Tokens {
    slots: KVVec<Slot>,
    /// Where what each slot holds came from, if that is not the socket's own business: of a UDP
    /// socket. As many as slots, or none.
    flows: KVVec<Flow>,
    /// Slots in use.
    count: usize,
    next: u32,
}

impl Tokens {
    /// None, and no memory. Any context.
    pub(crate) const fn new() -> Self {
        Self {
            slots: KVVec::new(),
            flows: KVVec::new(),
            count: 0,
            // 0 is not handed out first, so that a structure left at zero is noticed.
            next: 1,
        }
    }

    /// Tokens held now.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn slot(&self, token: u32) -> Option<usize> {
        let mask = self.slots.len().checked_sub(1)?;
        Some(token as usize & mask)
    }

    fn grow(&mut self, flows: bool) -> Result {
        let size = (self.slots.len() * 2).max(FIRST);
        let mut slots = KVVec::from_elem(EMPTY, size, GFP_KERNEL_ACCOUNT)?;
        let mut to = match flows {
            true => KVVec::from_elem(Flow::default(), size, GFP_KERNEL_ACCOUNT)?,
            false => KVVec::new(),
        };
        for (at, old) in self.slots.iter().enumerate() {
            // Two that differ in the low bits of the small table differ in those of the large one.
            let new = old.token as usize & (size - 1);
            if let (Some(_), Some(slot)) = (&old.held, slots.get_mut(new)) {
                *slot = *old;
                if let (Some(to), Some(flow)) = (to.get_mut(new), self.flows.get(at)) {
                    *to = *flow;
                }
            }
        }
        self.slots = slots;
        self.flows = to;
        Ok(())
    }

    /// A token for `held`, whose hold it takes over; of a UDP socket with the datagram's addresses.
    /// Process context.
    ///
    /// `EDQUOT` if the socket has [`MAX`] tokens, `ENOMEM`; then the hold is still the caller's.
    pub(crate) fn add(&mut self, held: Held, flow: Option<&Flow>) -> Result<u32> {
        if self.count >= MAX {
            return Err(errno(bindings::EDQUOT));
        }
        // At most three quarters full, so that a free slot is near. Old tokens that are kept may
        // still lie in a row; it cannot be longer than the table.
        if (self.count + 1) * 4 > self.slots.len() * 3 {
            self.grow(flow.is_some())?;
        }
        for _ in 0..self.slots.len() {
            let token = self.next;
            self.next = self.next.wrapping_add(1);
            let at = self.slot(token).ok_or(EINVAL)?;
            if let Some(slot) = self.slots.get_mut(at).filter(|slot| slot.held.is_none()) {
                *slot = Slot {
                    token,
                    held: Some(held),
                };
                if let (Some(to), Some(flow)) = (self.flows.get_mut(at), flow) {
                    *to = *flow;
                }
                self.count += 1;
                return Ok(token);
            }
        }
        Err(errno(bindings::EDQUOT))
    }

    /// What a token holds. `ESTALE` if it is not one of this socket's.
    pub(crate) fn get(&self, token: u32) -> Result<&Held> {
        self.slot(token)
            .and_then(|at| self.slots.get(at))
            .filter(|slot| slot.token == token)
            .and_then(|slot| slot.held.as_ref())
            .ok_or(errno(bindings::ESTALE))
    }

    /// Where what a token holds came from, if it was told.
    pub(crate) fn flow(&self, token: u32) -> Option<&Flow> {
        self.get(token).ok()?;
        self.flows.get(self.slot(token)?)
    }

    /// Takes a token out. Its hold is the caller's then, who gives it back or makes it a record's.
    ///
    /// `ESTALE` if it is not one of this socket's.
    fn take(&mut self, token: u32) -> Result<Held> {
        let at = self.slot(token).ok_or(errno(bindings::ESTALE))?;
        let slot = self
            .slots
            .get_mut(at)
            .filter(|slot| slot.token == token)
            .ok_or(errno(bindings::ESTALE))?;
        let held = slot.held.take().ok_or(errno(bindings::ESTALE))?;
        self.count -= 1;
        Ok(held)
    }

    /// Releases one token. `ESTALE` if it is not one of this socket's.
    pub(crate) fn release(&mut self, area: &FrameArea, token: u32) -> Result {
        let held = self.take(token)?;
        area.unhold(held.frame).map(|_| ())
    }

    /// Releases those that exist of `count` tokens from `first`; how many. Bounded by the table's
    /// size whatever `count` is.
    pub(crate) fn release_range(&mut self, area: &FrameArea, first: u32, count: u32) -> u32 {
        let mut released = 0;
        if count as usize <= self.slots.len() {
            for n in 0..count {
                released += u32::from(self.release(area, first.wrapping_add(n)).is_ok());
            }
            return released;
        }
        for at in 0..self.slots.len() {
            let token = match self.slots.get(at) {
                Some(Slot {
                    token,
                    held: Some(_),
                }) => *token,
                _ => continue,
            };
            if token.wrapping_sub(first) < count {
                released += u32::from(self.release(area, token).is_ok());
            }
        }
        released
    }

    /// Releases all of them, and the table's memory. Any context but hard interrupts.
    pub(crate) fn clear(&mut self, area: &FrameArea) -> usize {
        let count = self.count;
        for slot in &mut self.slots {
            if let Some(held) = slot.held.take() {
                // It is of this area, so it has the hold.
                let _ = area.unhold(held.frame);
            }
        }
        self.count = 0;
        self.slots = KVVec::new();
        self.flows = KVVec::new();
        count
    }
}

/// A part of a frame fits a [`Note`]'s offset and length.
const _: () = assert!(PAGE <= u16::MAX as usize);

#[kunit_tests(pmskb_token)]
mod tests {
    use super::*;

    /// Frames are numbered by what they hold; none of them is given back here.
    fn held(number: u32) -> Held {
        Held {
            frame: Frame(number),
            note: Note::default(),
        }
    }

    fn is(error: u32, result: Result<impl Sized>) -> bool {
        result.err() == Some(errno(error))
    }

    #[test]
    fn a_token_holds_what_it_was_given_for_until_it_is_taken() -> Result {
        let mut tokens = Tokens::new();
        assert!(is(bindings::ESTALE, tokens.get(0)));
        assert!(is(bindings::ESTALE, tokens.get(1)));
        // Past several tables' ends.
        for n in 0..1000 {
            assert_eq!(tokens.add(held(n), None)?, n + 1);
            assert_eq!(tokens.count(), n as usize + 1);
        }
        for n in 0..1000 {
            assert_eq!(tokens.get(n + 1)?.frame.0, n);
        }
        for n in (0..1000).step_by(3) {
            assert_eq!(tokens.take(n + 1)?.frame.0, n);
            assert!(is(bindings::ESTALE, tokens.take(n + 1)));
            assert!(is(bindings::ESTALE, tokens.get(n + 1)));
        }
        assert_eq!(tokens.count(), 666);
        for n in 0..1000 {
            assert_eq!(tokens.get(n + 1).is_ok(), n % 3 != 0);
        }
        // Never handed out, though its slot is in use.
        for other in [0, 1001, 2 + 65_536, 2 + 2048, u32::MAX] {
            assert!(is(bindings::ESTALE, tokens.get(other)));
        }
        Ok(())
    }

    #[test]
    fn a_flow_stays_with_its_token_when_the_table_grows() -> Result {
        let flow = |n: u32| Flow {
            version: 4,
            peer_port: n as u16,
            ..Flow::default()
        };
        let mut tokens = Tokens::new();
        let mut given = KVec::new();
        for n in 0..1000 {
            // Not one after the other: slots of those that are kept are passed over.
            let token = tokens.add(held(n), Some(&flow(n)))?;
            given.push(token, GFP_KERNEL)?;
            if n % 3 == 0 {
                tokens.take(token)?;
                assert!(tokens.flow(token).is_none());
            }
        }
        for (n, token) in given.iter().enumerate() {
            let want = (n % 3 != 0).then(|| flow(n as u32));
            assert!(tokens.flow(*token).copied() == want);
        }
        assert!(tokens.flow(0).is_none());
        // A stream's tokens have none.
        let mut tokens = Tokens::new();
        let token = tokens.add(held(1), None)?;
        assert!(tokens.flow(token).is_none());
        Ok(())
    }

    #[test]
    fn one_that_is_kept_is_no_obstacle_when_the_numbers_come_around() -> Result {
        let mut tokens = Tokens::new();
        let kept = tokens.add(held(77), None)?;
        tokens.next = u32::MAX - 5;
        let mut last = 0;
        for n in 0..1000 {
            let token = tokens.add(held(n), None)?;
            assert!(token != kept && token != last);
            assert_eq!(tokens.take(token)?.frame.0, n);
            last = token;
        }
        assert_eq!(tokens.get(kept)?.frame.0, 77);
        assert_eq!(tokens.count(), 1);
        Ok(())
    }

    #[test]
    fn there_are_no_more_than_may_be() -> Result {
        let mut tokens = Tokens::new();
        for n in 0..MAX as u32 {
            tokens.add(held(n), None)?;
        }
        assert!(is(bindings::EDQUOT, tokens.add(held(0), None)));
        assert_eq!(tokens.count(), MAX);
        assert_eq!(tokens.take(4711)?.frame.0, 4710);
        let token = tokens.add(held(5), None)?;
        assert_eq!(tokens.get(token)?.frame.0, 5);
        assert!(is(bindings::EDQUOT, tokens.add(held(0), None)));
        Ok(())
    }
}
