// SPDX-License-Identifier: GPL-2.0

//! A record, open as a file: `PMSKB_IOC_OPEN`.
//!
//! The file has a hold on each frame of the record's extents, taken under the lock that the
//! record was found under. So its bytes stay what they are until the last close, whatever becomes
//! of the record: a record that is deleted or replaced gives its own holds back, and the frames
//! stay. The list of extents is copied, because that of the record is reused with it.

use crate::{
    bindings as ext,
    file::{self, OpenStore},
    frame::FrameArea,
    host,
    pm::{self, Extent},
    read::{self, Frame, Part, Ranges},
    region::PAGE,
    sock::errno,
    store::{Core, Store},
    uapi::Plain,
    vma::Operations,
};
use core::mem::size_of;
use kernel::{
    bindings, c_str,
    ffi::c_uint,
    fs::{file::FileDescriptorReservation, LocalFile},
    prelude::*,
    sync::Arc,
    uaccess::{UserPtr, UserSlice},
};

/// One extent: where it lies, and where in the object it ends.
struct Span {
    off: u64,
    end: u32,
}

/// A record's object.
pub(crate) struct Object {
    /// In the object's order; each has a hold on each of its frames.
    spans: KVVec<Span>,
    /// After the holds in the order of drops: without files the store may be detached.
    store: OpenStore,
}

/// What to open.
enum Wanted {
    Key(KVec<u8>),
    Seq(u64),
}

impl Wanted {
    fn read(open: &ext::pmskb_open) -> Result<Self> {
        if open.flags & !ext::PMSKB_OPEN_SEQ != 0 || open.reserved != [0; 2] {
            return Err(EINVAL);
        }
        if open.flags & ext::PMSKB_OPEN_SEQ != 0 {
            return match open.key_len {
                0 => Ok(Wanted::Seq(open.seq)),
                _ => Err(EINVAL),
            };
        }
        if open.key_len == 0 {
            return Err(EINVAL);
        }
        if open.key_len > ext::PMSKB_MAX_KEY {
            return Err(errno(bindings::ENAMETOOLONG));
        }
        let len = open.key_len as usize;
        let mut key = KVec::from_elem(0u8, len, GFP_KERNEL)?;
        let from = UserSlice::new(UserPtr::from_addr(open.key as usize), len);
        from.reader().read_slice(&mut key)?;
        Ok(Wanted::Key(key))
    }

    /// The live record. `ENOENT` if there is none.
    fn find(&self, core: &Core) -> Result<pm::Record> {
        let found = match self {
            Wanted::Key(key) => match core.lookup(key).map_err(crate::errno)? {
                Some(loc) => Some(core.record(loc).map_err(crate::errno)?),
                None => None,
            },
            Wanted::Seq(seq) => {
                let next = core.log_from(*seq).map_err(crate::errno)?;
                next.filter(|record| record.seq == *seq)
            }
        };
        found.ok_or(ENOENT)
    }
}

impl Object {
    /// Opens a record; also what it says.
    fn open(store: &Arc<Store>, wanted: &Wanted) -> Result<(Self, pm::Record)> {
        let mut object = Object {
            spans: KVVec::new(),
            store: OpenStore::new(store)?,
        };
        let mut core = store.core()?;
        let core: &Core = core.get()?;
        let record = wanted.find(core)?;
        object.hold(core, &record)?;
        Ok((object, record))
    }

    /// The record that `fd` is open on. `EBADF` if it is not open, `EINVAL` if it is something else.
    pub(crate) fn of_fd(fd: i32) -> Result<Arc<Self>> {
        let fd = u32::try_from(fd).map_err(|_| EBADF)?;
        let file = LocalFile::fget(fd).map_err(|_| EBADF)?;
        file::of(&file).ok_or(EINVAL)
    }

    /// Takes the holds. What was taken before an error goes with the object.
    fn hold(&mut self, core: &Core, record: &pm::Record) -> Result {
        self.spans
            .reserve(record.nr_extents as usize, GFP_KERNEL_ACCOUNT)?;
        let mut end = 0u32;
        for extent in record.extents(core.pm(), core.geometry()) {
            let extent = extent.map_err(crate::errno)?;
            end = end
                .checked_add(extent.len)
                .filter(|end| *end <= record.len)
                .ok_or(errno(bindings::EUCLEAN))?;
            // A frame that is free: the extent cannot be right.
            hold(self.store.frames(), extent).map_err(|_| errno(bindings::EUCLEAN))?;
            let span = Span {
                off: extent.off,
                end,
            };
            // Room was reserved above.
            self.spans.push(span, GFP_KERNEL)?;
            host::resched();
        }
        if end != record.len {
            return Err(errno(bindings::EUCLEAN));
        }
        Ok(())
    }
}

/// One hold on each frame of an extent, or on an error none.
fn hold(frames: &FrameArea, extent: Extent) -> Result {
    for (done, frame) in extent.frames().enumerate() {
        if let Err(error) = frames.hold(frame) {
            extent.frames().take(done).for_each(|frame| {
                let _ = frames.unhold(frame);
            });
            return Err(error);
        }
    }
    Ok(())
}

impl Drop for Object {
    fn drop(&mut self) {
        let mut start = 0;
        for span in &self.spans {
            for frame in Extent::new(span.off, span.end - start).frames() {
                // It was held by `hold`, so it cannot fail.
                let _ = self.store.frames().unhold(frame);
            }
            start = span.end;
            host::resched();
        }
    }
}

impl Ranges for Object {
    fn store(&self) -> &Store {
        &self.store
    }

    fn part(&self, pos: u64, len: u64) -> Option<(Part, usize)> {
        let at = self
            .spans
            .partition_point(|span| u64::from(span.end) <= pos);
        let span = self.spans.get(at)?;
        let before = at.checked_sub(1).and_then(|at| self.spans.get(at));
        let start = before.map_or(0, |span| u64::from(span.end));
        let off = span.off.checked_add(pos.checked_sub(start)?)?;
        let page = PAGE as u64;
        let len = len
            .min(page - off % page)
            .min(u64::from(span.end).checked_sub(pos)?);
        Some((Part::data(&self.store, Frame::of(off)?, off), len as usize))
    }
}

static FOPS: Operations<bindings::file_operations> = Operations(bindings::file_operations {
    owner: crate::this_module(),
    llseek: Some(file::llseek::<Object>),
    read_iter: Some(read_iter),
    splice_read: Some(splice_read),
    release: Some(file::release::<Object>),
    ..pin_init::zeroed()
});

// SAFETY: The operations are used for this only, and have its `release`.
unsafe impl file::Kind for Object {
    const NAME: &'static CStr = c_str!("[pmskb-record]");
    const MODE: u32 = bindings::O_RDONLY;

    fn operations() -> &'static Operations<bindings::file_operations> {
        &FOPS
    }

    fn size(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.end.into())
    }
}

/// # Safety
///
/// A read of an open record.
unsafe extern "C" fn read_iter(
    kiocb: *mut bindings::kiocb,
    iter: *mut bindings::iov_iter,
) -> isize {
    // SAFETY: A read of an open record.
    let object = unsafe { file::behind::<Object>((*kiocb).ki_filp) };
    // SAFETY: Both pointers are ours for the call.
    unsafe { read::read_iter(&*object, kiocb, iter) }
}

/// # Safety
///
/// A splice of an open record; the caller holds the mutex of the pipe.
unsafe extern "C" fn splice_read(
    file: *mut bindings::file,
    ppos: *mut i64,
    pipe: *mut bindings::pipe_inode_info,
    len: usize,
    flags: c_uint,
) -> isize {
    // SAFETY: An open record.
    let object = unsafe { file::behind::<Object>(file) };
    // SAFETY: As we were called.
    unsafe { read::splice_read(&*object, file, ppos, pipe, len, flags) }
}

/// `PMSKB_IOC_OPEN`, with the structure at `arg`. Process context.
///
/// `EINVAL`, `ENAMETOOLONG`, `EFAULT`; `ENOENT` if there is no such record; `EMFILE`, `ENFILE`,
/// `ENOMEM`; `EUCLEAN` if the record is damaged, `EIO` if it cannot be read or the store is gone.
pub(crate) fn ioctl(store: &Arc<Store>, arg: UserPtr) -> Result {
    let user = || UserSlice::new(arg, size_of::<ext::pmskb_open>());
    let mut open = user().reader().read::<Plain<ext::pmskb_open>>()?.0;
    let wanted = Wanted::read(&open)?;
    let fd = FileDescriptorReservation::get_unused_fd_flags(bindings::O_CLOEXEC)?;
    let (object, record) = Object::open(store, &wanted)?;
    let file = file::create(Arc::new(object, GFP_KERNEL_ACCOUNT)?)?;
    open.seq = record.seq;
    open.fd = fd.reserved_fd() as i32;
    open.csum = record.meta.csum.get().to_be();
    open.csum_kind = record.meta.csum_kind as u8;
    open.time_source = record.meta.time_source as u8;
    open.len = record.len.into();
    open.time = record.meta.time;
    user().writer().write(&Plain(open))?;
    // Only now can somebody else see it.
    fd.fd_install(file);
    Ok(())
}
