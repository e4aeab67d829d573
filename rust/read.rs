// SPDX-License-Identifier: GPL-2.0

//! From ranges of a region to who reads, splices or sends them: the one way for all files.

use crate::{
    bindings as ext,
    pm::{FrameState, Pmem},
    region::PAGE,
    store::Store,
};
use core::mem::ManuallyDrop;
use kernel::{bindings, ffi::c_uint, iov::IovIterDest, prelude::*};

pub(crate) use crate::frame::Frame;

/// What is at a position of a file, within one page of the region.
pub(crate) enum Part {
    /// Reads as zeros.
    Zeros,
    /// Of no frame: superblocks, map, live page. The offset in the region.
    Meta(u64),
    /// In a frame of the data area. The offset in the region.
    Data(Frame, u64),
    /// In a frame with a media error.
    Bad,
}

impl Part {
    /// The part at an offset of the data area.
    pub(crate) fn data(store: &Store, frame: Frame, off: u64) -> Self {
        match store.frames().state(frame) {
            Some((FrameState::Bad, _)) => Part::Bad,
            _ => Part::Data(frame, off),
        }
    }
}

/// A file whose bytes are in a region.
pub(crate) trait Ranges {
    /// The store of the region.
    fn store(&self) -> &Store;

    /// What is at `pos` of the file, and how many of `len` bytes from there are of one kind, in
    /// one page of the region. None at the end.
    fn part(&self, pos: u64, len: u64) -> Option<(Part, usize)>;
}

/// Bytes in one page of a region, for whoever sends them on.
///
/// # Invariants
///
/// They are within the page, on which one reference is ours. `bio_vec` is what the kernel names
/// such bytes by.
#[repr(transparent)]
pub(crate) struct PagePart(bindings::bio_vec);

impl PagePart {
    /// How many bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.bv_len as usize
    }

    /// Puts them into a pipe.
    ///
    /// # Safety
    ///
    /// The caller holds the pipe's mutex.
    unsafe fn splice(self, pipe: *mut bindings::pipe_inode_info) -> Result {
        let part = ManuallyDrop::new(self).0;
        // SAFETY: As the caller says. The reference goes with the page, whatever the answer.
        let ret = unsafe {
            ext::pmskb_splice_page(pipe.cast(), part.bv_page, part.bv_offset, part.bv_len)
        };
        if ret < 0 {
            return Err(Error::from_errno(ret as i32));
        }
        Ok(())
    }
}

impl Drop for PagePart {
    fn drop(&mut self) {
        // SAFETY: The reference is ours.
        unsafe { ext::pmskb_page_put(self.0.bv_page) };
    }
}

/// What is at a position of a file, for whoever sends it on.
pub(crate) enum Piece {
    /// In a frame.
    Page(PagePart),
    /// In no frame, so many bytes.
    Elsewhere(usize),
}

/// What is at `pos` of a file, `len` bytes at most. None at the end. `EIO` if the media cannot be
/// read there, or the store is gone. Process context.
pub(crate) fn piece(from: &impl Ranges, pos: u64, len: u64) -> Result<Option<Piece>> {
    let store = from.store();
    let _entered = store.enter()?;
    let Some((part, bytes)) = from.part(pos, len) else {
        return Ok(None);
    };
    let (frame, off) = match part {
        Part::Bad => return Err(EIO),
        Part::Zeros | Part::Meta(_) => return Ok(Some(Piece::Elsewhere(bytes))),
        Part::Data(frame, off) => (frame, off),
    };
    let page = store.frames().get_any_page(frame).ok_or(EIO)?;
    // INVARIANT: A part is within one page; the reference was just taken.
    Ok(Some(Piece::Page(PagePart(bindings::bio_vec {
        bv_page: page.as_ptr(),
        bv_len: bytes as c_uint,
        bv_offset: (off % PAGE as u64) as c_uint,
    }))))
}

/// `file_operations::read_iter`.
///
/// # Safety
///
/// Both pointers are the caller's for the call; the iterator is a destination.
pub(crate) unsafe fn read_iter(
    from: &impl Ranges,
    kiocb: *mut bindings::kiocb,
    iter: *mut bindings::iov_iter,
) -> isize {
    // SAFETY: The caller's.
    let (kiocb, iter) = unsafe { (&mut *kiocb, IovIterDest::from_raw(iter)) };
    let store = from.store();
    let mut done = 0usize;
    let result = (|| {
        while !iter.is_empty() {
            if done != 0 && crate::host::signal_pending() {
                break;
            }
            let _entered = store.enter()?;
            let pos = u64::try_from(kiocb.ki_pos).map_err(|_| EINVAL)?;
            let Some((part, len)) = from.part(pos, iter.len() as u64) else {
                break;
            };
            let (copied, off) = match part {
                Part::Bad => return Err(EIO),
                // SAFETY: `iter` is valid.
                Part::Zeros => (unsafe { bindings::iov_iter_zero(len, iter.as_raw()) }, None),
                Part::Meta(off) | Part::Data(_, off) => {
                    let addr = store.region().addr(off as usize).ok_or(EINVAL)?;
                    // SAFETY: `len` bytes are in one page, which is mapped while we are inside.
                    // A machine check ends the copy early.
                    let copied =
                        unsafe { ext::_copy_mc_to_iter(addr.as_ptr().cast(), len, iter.as_raw()) };
                    (copied, Some(off))
                }
            };
            done += copied;
            kiocb.ki_pos += copied as i64;
            if copied < len {
                // Either the source cannot be read or the destination not be written.
                let next = off.map(|off| off.saturating_add(copied as u64));
                return match next.map(|next| store.region().read(next, &mut [0; 1])) {
                    Some(Err(_)) => Err(EIO),
                    _ => Err(EFAULT),
                };
            }
        }
        Ok(())
    })();
    answer(done, result)
}

/// `file_operations::splice_read`.
///
/// # Safety
///
/// A splice of a file that `from` is of, which reads by [`read_iter`]; the caller holds the mutex
/// of the pipe, and `ppos` is the caller's for the call.
pub(crate) unsafe fn splice_read(
    from: &impl Ranges,
    file: *mut bindings::file,
    ppos: *mut i64,
    pipe: *mut bindings::pipe_inode_info,
    len: usize,
    flags: c_uint,
) -> isize {
    // SAFETY: The caller's.
    let pos = unsafe { &mut *ppos };
    let mut done = 0usize;
    let result = (|| {
        // SAFETY: The caller holds the pipe's mutex.
        let mut room = unsafe { ext::pmskb_pipe_room(pipe.cast()) };
        while done < len && room > 0 {
            let at = u64::try_from(*pos).map_err(|_| EINVAL)?;
            let bytes = match piece(from, at, (len - done) as u64)? {
                None => break,
                Some(Piece::Page(page)) => {
                    let bytes = page.len();
                    // SAFETY: The caller holds the pipe's mutex.
                    unsafe { page.splice(pipe) }?;
                    bytes
                }
                Some(Piece::Elsewhere(_)) if done > 0 => break,
                // Not for long in one place: copied.
                Some(Piece::Elsewhere(bytes)) => {
                    // SAFETY: As we were called, for the rest of the page.
                    let ret = unsafe { bindings::copy_splice_read(file, pos, pipe, bytes, flags) };
                    if ret < 0 {
                        return Err(Error::from_errno(ret as i32));
                    }
                    done += ret as usize;
                    break;
                }
            };
            room -= 1;
            done += bytes;
            *pos += bytes as i64;
        }
        Ok(())
    })();
    answer(done, result)
}

/// What a read or write answers that did so much before it ended so.
pub(crate) fn answer(done: usize, result: Result) -> isize {
    match result {
        Err(e) if done == 0 => e.to_errno() as isize,
        _ => done as isize,
    }
}
