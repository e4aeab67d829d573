// SPDX-License-Identifier: GPL-2.0

//! What is remembered of each placed packet until it is received.
//!
//! An skb in a receive queue is not the skb that was placed: TCP merges, trims and splits them.
//! What survives is a fragment's page and offset, so that is how notes are found: each frame has
//! a chain of small blocks, one note for each part of a packet that lies in the frame, in the
//! order of their offsets. The chain hangs on the word that `frame.rs` keeps for the frame.
//!
//! # Who may do what
//!
//! - Only the cursor that fills a frame (`place.rs`) appends. It has a hold on the frame.
//! - Anybody with a reference on the frame's page may look.
//! - The chain is freed by the frame area's idle hook: no holds, no references, so neither of the
//!   two above.

use crate::frame::{Frame, FrameArea};
use kernel::{
    prelude::*,
    sync::atomic::{ordering, Atomic, Relaxed},
};

/// Notes in a block: 256 bytes with its header.
const BLOCK: usize = 6;
/// Blocks of a frame; a frame with that many notes is left for a fresh one.
const BLOCKS: usize = 6;
/// Notes of a frame at most.
pub(crate) const MAX: u32 = (BLOCK * BLOCKS) as u32;

/// A part of a packet's payload that lies in one frame.
#[derive(Clone, Copy, Default)]
pub(crate) struct Note {
    /// Nanoseconds since the epoch of the clock that `source` names.
    pub(crate) time: u64,
    /// TCP sequence number of the part's first byte.
    pub(crate) seq: u32,
    /// Payload bytes of the whole packet.
    pub(crate) pkt_len: u32,
    /// Where in that payload the part starts.
    pub(crate) pkt_off: u32,
    /// Where in the frame the part starts.
    pub(crate) offset: u16,
    /// Its bytes, 1 to 4096.
    pub(crate) len: u16,
    /// Internet checksum of the whole packet's payload, as a number (`pm::csum::Sum`).
    pub(crate) csum: u16,
    /// `PMSKB_CSUM_*`.
    pub(crate) kind: u8,
    /// `PMSKB_TIME_*`.
    pub(crate) source: u8,
    /// Copied into the frame by a receive call, not by placement.
    pub(crate) copied: bool,
    /// CRC32C of the part, if it was computed.
    pub(crate) crc: Option<u32>,
}

impl Note {
    /// The note of a part of this part: `skip` bytes into it, `len` bytes.
    pub(crate) fn part(&self, skip: u32, len: u32) -> Note {
        Note {
            seq: self.seq.wrapping_add(skip),
            pkt_off: self.pkt_off.saturating_add(skip),
            offset: self.offset.saturating_add(skip as u16),
            len: len as u16,
            crc: self.crc.filter(|_| skip == 0 && len == u32::from(self.len)),
            ..*self
        }
    }
}

struct Block {
    next: Atomic<usize>,
    used: Atomic<u32>,
    notes: [core::cell::UnsafeCell<Note>; BLOCK],
}

impl Block {
    /// The block that a word points to.
    ///
    /// # Safety
    ///
    /// The word is zero or from `KBox::into_raw` of a `Block`, which is not freed during `'a`.
    unsafe fn at<'a>(word: usize) -> Option<&'a Block> {
        // SAFETY: Valid or null, says the caller.
        unsafe { (word as *const Block).as_ref() }
    }

    fn get(&self, at: usize) -> Option<Note> {
        if at >= self.used.load(ordering::Acquire) as usize {
            return None;
        }
        // SAFETY: Notes below `used` have been written before `used` was raised, and are not
        // written again.
        self.notes.get(at).map(|note| unsafe { *note.get() })
    }
}

/// Makes room for one note more. Softirq. False if there is no memory.
///
/// Only for the cursor that fills the frame. `have` is how many the frame has.
pub(crate) fn reserve(area: &FrameArea, frame: Frame, have: u32) -> bool {
    let Some(mut word) = area.note(frame) else {
        return false;
    };
    for _ in 0..=have as usize / BLOCK {
        // SAFETY: The cursor has a hold on the frame, so the chain stays.
        match unsafe { Block::at(word.load(ordering::Acquire)) } {
            Some(block) => {
                if (block.used.load(Relaxed) as usize) < BLOCK {
                    return true;
                }
                word = &block.next;
            }
            None => {
                let block = KBox::new(
                    Block {
                        next: Atomic::new(0),
                        used: Atomic::new(0),
                        notes: Default::default(),
                    },
                    GFP_ATOMIC | __GFP_NOWARN,
                );
                let Ok(block) = block else {
                    return false;
                };
                word.store(KBox::into_raw(block) as usize, ordering::Release);
                return true;
            }
        }
    }
    false
}

/// Appends a note after [`reserve`] made room for it. Softirq.
///
/// Only for the cursor that fills the frame.
pub(crate) fn push(area: &FrameArea, frame: Frame, note: Note) {
    let Some(mut word) = area.note(frame) else {
        return;
    };
    for _ in 0..BLOCKS {
        // SAFETY: The cursor has a hold on the frame, so the chain stays.
        let Some(block) = (unsafe { Block::at(word.load(ordering::Acquire)) }) else {
            return;
        };
        let used = block.used.load(Relaxed) as usize;
        if let Some(slot) = block.notes.get(used) {
            // SAFETY: Nobody reads a note at or above `used`, and only we write.
            unsafe { *slot.get() = note };
            block.used.store(used as u32 + 1, ordering::Release);
            return;
        }
        word = &block.next;
    }
}

/// The note of the byte at `offset` of a frame. Any context; the caller has a reference on the
/// frame's page.
pub(crate) fn find(area: &FrameArea, frame: Frame, offset: u32) -> Option<Note> {
    let mut word = area.note(frame)?;
    for _ in 0..BLOCKS {
        // SAFETY: The page is not idle, so the idle hook does not free the chain.
        let block = unsafe { Block::at(word.load(ordering::Acquire)) }?;
        for at in 0..BLOCK {
            let note = block.get(at)?;
            let start = u32::from(note.offset);
            if offset < start {
                return None;
            }
            if offset < start + u32::from(note.len) {
                return Some(note);
            }
        }
        word = &block.next;
    }
    None
}

/// The idle hook of the frame area: frees a frame's notes. Any context, under the table's lock.
pub(crate) fn forget(area: &FrameArea, frame: Frame) {
    let Some(word) = area.note(frame) else {
        return;
    };
    let mut next = word.xchg(0, Relaxed);
    for _ in 0..BLOCKS {
        if next == 0 {
            return;
        }
        // SAFETY: From `KBox::into_raw` in `reserve`; off the frame's word now, and nobody looks
        // at a frame that is idle and not held.
        let block = unsafe { KBox::from_raw(next as *mut Block) };
        next = block.next.load(Relaxed);
    }
}
