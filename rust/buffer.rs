// SPDX-License-Identifier: GPL-2.0

//! Frames for the application's own data: `PMSKB_IOC_ALLOC`.
//!
//! A buffer is a file whose pages are frames that nobody else has. They are zeroed when they are
//! allocated, mapped writable, filled, and put: then they are a record's as packets are.
//!
//! # Nobody changes what is put
//!
//! A put first *seals* the pages that it names, in this order: it says so in the page's entry,
//! under the lock that faults and writes take; then it removes the page from all mappings, and
//! waits until no CPU has it; then the bytes are summed. A fault that saw the entry before has
//! mapped the page by then, so it is removed; one that comes later sees the seal. Entries for
//! writing are made by [`fault`] only, and [`pfn_mkwrite`] never lets the kernel make one of an
//! entry for reading.
//!
//! | page | a fault | when |
//! | --- | --- | --- |
//! | open | maps it as the mapping is | until it is put; again if that put failed |
//! | sealed to be kept, kept | maps it for reading; to write is `SIGBUS` | a put with `PMSKB_OP_KEEP`, and after it |
//! | sealed to be taken, gone | `SIGBUS` | a put without, and after it |
//!
//! The buffer has one hold on each frame, until the page is gone and no put of it is in flight,
//! or until it is closed for the last time.
//!
//! Lock order: `mmap_lock`, then a buffer's, then the frame table's. No user memory is touched
//! under a buffer's lock.

use crate::{
    bindings as ext,
    file::{self, OpenStore},
    host,
    pm::{FrameState, Pmem},
    read::{answer, Frame},
    region::PAGE,
    sock::errno,
    store::Store,
    uapi::Plain,
    vma::{self, Operations},
};
use core::mem::size_of;
use kernel::{
    bindings, c_str,
    ffi::c_int,
    fs::{file::FileDescriptorReservation, LocalFile},
    iov::IovIterSource,
    new_mutex,
    prelude::*,
    sync::{aref::ARef, Arc, Mutex},
    uaccess::{UserPtr, UserSlice},
};

/// Largest buffer, bytes.
const MAX: u64 = ext::PMSKB_MAX_BUFFER as u64;
const SIGBUS: bindings::vm_fault_t = bindings::vm_fault_reason_VM_FAULT_SIGBUS;

/// What has become of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nothing yet.
    Open,
    /// It is part of a record, and of the buffer.
    Kept,
    /// It is a record's alone.
    Gone,
}

/// A page of a buffer.
#[derive(Clone, Copy)]
struct Page {
    frame: Frame,
    fate: Fate,
    /// Seals: pieces of puts in flight that will keep the page, and that will take it.
    keeps: u32,
    takes: u32,
}

impl Page {
    /// Whether it may be read, and written, by who maps it.
    fn access(&self) -> (bool, bool) {
        let read = self.fate != Fate::Gone && self.takes == 0;
        (read, read && self.fate == Fate::Open && self.keeps == 0)
    }

    /// The seals of puts that keep it, or of those that do not.
    fn seals(&mut self, keep: bool) -> &mut u32 {
        if keep {
            &mut self.keeps
        } else {
            &mut self.takes
        }
    }

    /// Whether it has its hold on the frame.
    fn held(&self) -> bool {
        self.fate != Fate::Gone || self.keeps != 0 || self.takes != 0
    }
}

/// Frames that an application fills.
#[pin_data(PinnedDrop)]
pub(crate) struct Buffer {
    #[pin]
    pages: Mutex<KVVec<Page>>,
    nr: u32,
    store: OpenStore,
}

impl Buffer {
    /// A buffer of `len` bytes, a multiple of a page, all zeros.
    ///
    /// `ENOSPC` if there are not that many free frames, `ENOMEM`, `EIO` if the store is gone.
    fn new(store: &Arc<Store>, len: u64) -> Result<Arc<Self>> {
        let open = OpenStore::new(store)?;
        let nr = u32::try_from(len / PAGE as u64)?;
        let buffer = Arc::pin_init(
            pin_init!(Self {
                pages <- new_mutex!(KVVec::new(), "pmskb_buffer"),
                nr,
                store: open,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        // On an error the frames that it has go with it.
        buffer.fill()?;
        Ok(buffer)
    }

    fn fill(&self) -> Result {
        let _inside = self.store.enter()?;
        let frames = self.store.frames();
        let mut pages = self.pages.lock();
        pages.reserve(self.nr as usize, GFP_KERNEL_ACCOUNT)?;
        let mut near = None;
        for _ in 0..self.nr {
            let mut frame = frames.alloc(near);
            if frame.is_none() {
                // It looks at a few of those that the stack had last; now at all.
                frames.reclaim_all();
                frame = frames.alloc(near);
            }
            let frame = frame.ok_or(ENOSPC)?;
            let page = Page {
                frame,
                fate: Fate::Open,
                keeps: 0,
                takes: 0,
            };
            // Room was reserved above.
            pages.push(page, GFP_KERNEL_ACCOUNT)?;
            // What it had before is nobody's business, mapped or put without being written.
            self.store.region().clear(frame.off(), PAGE as u64);
            near = Some(frame);
            host::resched();
        }
        Ok(())
    }

    /// The buffer that `fd` is open on, if it is one; with its file.
    pub(crate) fn of_fd(fd: i32) -> Option<(Arc<Self>, ARef<LocalFile>)> {
        let file = LocalFile::fget(u32::try_from(fd).ok()?).ok()?;
        Some((file::of::<Self>(&file)?, file))
    }

    /// The store that its frames are of.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Seals the pages of some ranges, byte offset and length, for a put that keeps them or not,
    /// and removes them from all mappings. `file` is the buffer's. Process context, sleeps.
    ///
    /// `EINVAL` for a range that is not within the buffer, `E2BIG` for more than `most` pages,
    /// `ESTALE` if a page of it is gone, `EAGAIN` if too many puts of a page are in flight, `ENOMEM`.
    pub(crate) fn seal(
        self: &Arc<Self>,
        file: &LocalFile,
        ranges: impl ExactSizeIterator<Item = (u32, u32)>,
        keep: bool,
        most: usize,
    ) -> Result<Sealed> {
        let mut sealed = Sealed {
            ranges: KVVec::with_capacity(ranges.len(), GFP_KERNEL)?,
            buffer: self.clone(),
            keep,
        };
        // On an error this is dropped before `sealed`, which needs it.
        let mut pages = self.pages.lock();
        let mut left = u32::try_from(most).unwrap_or(u32::MAX);
        for (offset, len) in ranges {
            let range = Range::of(offset, len).ok_or(EINVAL)?;
            let count = range.last - range.first + 1;
            left = left.checked_sub(count).ok_or(E2BIG)?;
            let those = pages.get_mut(range.all()).ok_or(EINVAL)?;
            if those.iter().any(|page| page.fate == Fate::Gone) {
                return Err(errno(bindings::ESTALE));
            }
            let full = |page: &Page| page.keeps == u32::MAX || page.takes == u32::MAX;
            if those.iter().any(full) {
                return Err(EAGAIN);
            }
            // Room is there.
            sealed.ranges.push(range, GFP_KERNEL)?;
            for page in those {
                let seals = page.seals(keep);
                *seals += 1;
            }
            host::resched();
        }
        drop(pages);
        sealed.zap(file);
        Ok(sealed)
    }
}

#[pinned_drop]
impl PinnedDrop for Buffer {
    fn drop(self: Pin<&mut Self>) {
        for page in self.pages.lock().iter().filter(|page| page.held()) {
            // It has the hold from `fill`, so it cannot fail.
            let _ = self.store.frames().unhold(page.frame);
            host::resched();
        }
    }
}

/// Pages of a buffer, from the first to the last.
#[derive(Clone, Copy)]
struct Range {
    first: u32,
    last: u32,
}

impl Range {
    /// Those that some bytes touch; none if there are no bytes.
    fn of(offset: u32, len: u32) -> Option<Self> {
        let last = offset.checked_add(len.checked_sub(1)?)?;
        let page = PAGE as u32;
        Some(Self {
            first: offset / page,
            last: last / page,
        })
    }

    fn all(&self) -> core::ops::RangeInclusive<usize> {
        self.first as usize..=self.last as usize
    }
}

/// Seals on pages of a buffer: nobody writes to them until this is dropped. What the put that it
/// was for means for the pages is said by [`Sealed::finish`]; without it they are as before.
pub(crate) struct Sealed {
    /// Each has been counted in each of its pages.
    ranges: KVVec<Range>,
    buffer: Arc<Buffer>,
    keep: bool,
}

impl Sealed {
    /// Removes the pages from all mappings, and what lies between them, which is mapped again
    /// when it is touched: one walk, however many ranges the caller made.
    fn zap(&self, file: &LocalFile) {
        let first = self.ranges.iter().map(|range| range.first).min();
        let last = self.ranges.iter().map(|range| range.last).max();
        if let (Some(first), Some(last)) = (first, last) {
            vma::zap_file(file, first, last - first + 1);
        }
    }

    /// Calls `each` with offset in the region and length of each part of some bytes of the buffer
    /// that lies in one frame. The bytes are of a range that was sealed.
    pub(crate) fn places(
        &self,
        offset: u32,
        len: u32,
        mut each: impl FnMut(Frame, u64, u32) -> Result,
    ) -> Result {
        let page_len = PAGE as u32;
        let (mut offset, mut left) = (offset, len);
        while left > 0 {
            let within = offset % page_len;
            let now = left.min(page_len - within);
            let frame = {
                let pages = self.buffer.pages.lock();
                pages.get((offset / page_len) as usize).ok_or(EINVAL)?.frame
            };
            each(frame, frame.off() + u64::from(within), now)?;
            offset = offset.saturating_add(now);
            left -= now;
            host::resched();
        }
        Ok(())
    }

    /// The put is done: its pages are a record's.
    pub(crate) fn finish(mut self) {
        let fate = if self.keep { Fate::Kept } else { Fate::Gone };
        self.end(Some(fate));
    }

    /// Takes the seals off.
    fn end(&mut self, fate: Option<Fate>) {
        let frames = self.buffer.store.frames();
        let mut pages = self.buffer.pages.lock();
        for range in &self.ranges {
            for page in pages.get_mut(range.all()).unwrap_or_default() {
                match fate {
                    // What another put took in the meantime is not there to be kept.
                    Some(Fate::Kept) if page.fate == Fate::Gone => {}
                    Some(fate) => page.fate = fate,
                    None => {}
                }
                let seals = page.seals(self.keep);
                *seals = seals.saturating_sub(1);
                if !page.held() {
                    // The buffer had it until now.
                    let _ = frames.unhold(page.frame);
                }
            }
            host::resched();
        }
        drop(pages);
        self.ranges.clear();
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        self.end(None);
    }
}

static FOPS: Operations<bindings::file_operations> = Operations(bindings::file_operations {
    owner: crate::this_module(),
    llseek: Some(file::llseek::<Buffer>),
    write_iter: Some(write_iter),
    mmap: Some(mmap),
    release: Some(release),
    ..pin_init::zeroed()
});

static VM_OPS: Operations<bindings::vm_operations_struct> =
    Operations(bindings::vm_operations_struct {
        fault: Some(fault),
        pfn_mkwrite: Some(pfn_mkwrite),
        ..pin_init::zeroed()
    });

// SAFETY: The operations are used for this only; their `release` ends in the one of `file`.
unsafe impl file::Kind for Buffer {
    const NAME: &'static CStr = c_str!("[pmskb-buffer]");
    const MODE: u32 = bindings::O_RDWR;

    fn operations() -> &'static Operations<bindings::file_operations> {
        &FOPS
    }

    fn size(&self) -> u64 {
        u64::from(self.nr) * PAGE as u64
    }
}

/// # Safety
///
/// The last close of a buffer: it is not mapped any more.
unsafe extern "C" fn release(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: A buffer, which is open until this returns.
    unsafe {
        let buffer = file::behind::<Buffer>(file);
        buffer.store.mappings().remove(file);
    }
    // SAFETY: As we were called.
    unsafe { file::release::<Buffer>(inode, file) }
}

/// A write: by copy, page by page, of what was copied from user space before.
///
/// `ENOSPC` at the end of the buffer, `EPERM` for what was put, `EFAULT`, `EIO`.
///
/// # Safety
///
/// A write to an open buffer.
unsafe extern "C" fn write_iter(
    kiocb: *mut bindings::kiocb,
    iter: *mut bindings::iov_iter,
) -> isize {
    // SAFETY: A write to an open buffer; both pointers are ours for the call.
    let (buffer, kiocb, iter) = unsafe {
        (
            file::behind::<Buffer>((*kiocb).ki_filp),
            &mut *kiocb,
            IovIterSource::from_raw(iter),
        )
    };
    let mut done = 0usize;
    let result = (|| {
        let mut copy = KVec::from_elem(0u8, PAGE, GFP_KERNEL)?;
        while !iter.is_empty() {
            if done != 0 && host::signal_pending() {
                break;
            }
            let pos = u64::try_from(kiocb.ki_pos).map_err(|_| EINVAL)?;
            let at = usize::try_from(pos / PAGE as u64)?;
            let within = pos % PAGE as u64;
            let room = PAGE - within as usize;
            // Before anything is taken from the caller.
            buffer.writable(at)?;
            let len = iter.len().min(room);
            let part = copy.get_mut(..len).ok_or(EINVAL)?;
            let copied = iter.copy_from_iter(part);
            let part = part.get(..copied).ok_or(EINVAL)?;
            let _inside = buffer.store.enter()?;
            let pages = buffer.pages.lock();
            let page = pages.get(at).ok_or(ENOSPC)?;
            if !page.access().1 {
                return Err(EPERM);
            }
            let off = page.frame.off() + within;
            let written = buffer.store.region().write(off, part);
            drop(pages);
            written.map_err(crate::errno)?;
            done += copied;
            kiocb.ki_pos += copied as i64;
            if copied < len {
                return Err(EFAULT);
            }
        }
        Ok(())
    })();
    answer(done, result)
}

impl Buffer {
    /// Whether a page may be written to now. `ENOSPC` if there is none, `EPERM` if it was put.
    fn writable(&self, at: usize) -> Result {
        let pages = self.pages.lock();
        match pages.get(at).ok_or(ENOSPC)?.access() {
            (_, true) => Ok(()),
            _ => Err(EPERM),
        }
    }
}

/// `EPERM` to execute it, `EINVAL` if it is private or goes beyond the end.
///
/// # Safety
///
/// `vma` is being set up for an open buffer.
unsafe extern "C" fn mmap(file: *mut bindings::file, vma: *mut bindings::vm_area_struct) -> c_int {
    kernel::error::from_result(|| {
        // SAFETY: An open buffer.
        let buffer = unsafe { file::behind::<Buffer>(file) };
        let _inside = buffer.store.enter()?;
        // SAFETY: `vma` is being set up.
        unsafe { vma::make_shared(vma, buffer.nr)? };
        // SAFETY: As above. The file, which the mapping keeps open, keeps the buffer.
        unsafe { (*vma).vm_ops = &VM_OPS.0 };
        Ok(0)
    })
}

/// A page's fault.
///
/// # Safety
///
/// A fault of a mapping of a buffer.
unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: A fault of one of our mappings, whose file is open.
    let (buffer, pgoff) = unsafe {
        let at = (*vmf).__bindgen_anon_1;
        (file::behind::<Buffer>((*at.vma).vm_file), at.pgoff)
    };
    let Ok(_inside) = buffer.store.enter() else {
        return SIGBUS;
    };
    // Until the entry is made: who seals the page afterwards finds it.
    let pages = buffer.pages.lock();
    let Some(page) = pages.get(pgoff) else {
        return SIGBUS;
    };
    let (read, write) = page.access();
    let bad = matches!(
        buffer.store.frames().state(page.frame),
        None | Some((FrameState::Bad, _))
    );
    if !read || bad {
        return SIGBUS;
    }
    let pfn = buffer.store.region().pfn() + page.frame.0 as usize;
    // SAFETY: A mapping that `make_shared` made. The page exists, and is the buffer's; removal
    // zaps after all are outside, and a put of the page after it has the lock.
    let inserted = unsafe { vma::insert_shared(vmf, pfn, write) };
    if matches!(
        buffer.store.frames().state(page.frame),
        Some((FrameState::Bad, _))
    ) {
        // The error came meanwhile, and may have been too early to find the entry.
        drop(pages);
        // SAFETY: The fault is one of a mapping of this file, which keeps it open.
        let file = unsafe { LocalFile::from_raw_file((*(*vmf).__bindgen_anon_1.vma).vm_file) };
        if let Ok(at) = u32::try_from(pgoff) {
            vma::zap_file(file, at, 1);
        }
        return SIGBUS;
    }
    inserted
}

/// A write to a page that is mapped for reading: it was mapped while it was sealed, or by a
/// mapping that could not write then.
///
/// # Safety
///
/// A fault of a mapping of a buffer.
unsafe extern "C" fn pfn_mkwrite(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: A fault of one of our mappings, whose file is open.
    let (buffer, file, pgoff) = unsafe {
        let at = (*vmf).__bindgen_anon_1;
        let file = (*at.vma).vm_file;
        (
            file::behind::<Buffer>(file),
            LocalFile::from_raw_file(file),
            at.pgoff,
        )
    };
    let Ok(at) = u32::try_from(pgoff) else {
        return SIGBUS;
    };
    if buffer.writable(pgoff).is_err() {
        return SIGBUS;
    }
    // Not 0, upon which the kernel would make the entry writable without our lock: the page may
    // have been sealed, and mapped again for reading, by then. It faults once more, for writing.
    vma::zap_file(file, at, 1);
    bindings::vm_fault_reason_VM_FAULT_NOPAGE
}

/// `PMSKB_IOC_ALLOC`, with the structure at `arg`. Process context.
///
/// `EINVAL`, `EFAULT`, `ENOSPC`, `EMFILE`, `ENFILE`, `ENOMEM`; `EROFS` if the store may only be
/// read, `EIO` if it is gone.
pub(crate) fn ioctl(store: &Arc<Store>, arg: UserPtr) -> Result {
    if store.read_only() {
        return Err(errno(bindings::EROFS));
    }
    let user = || UserSlice::new(arg, size_of::<ext::pmskb_alloc>());
    let mut alloc = user().reader().read::<Plain<ext::pmskb_alloc>>()?.0;
    if alloc.flags != 0 || alloc.reserved != [0; 2] || !(1..=MAX).contains(&alloc.len) {
        return Err(EINVAL);
    }
    let len = alloc.len.next_multiple_of(PAGE as u64);
    let fd = FileDescriptorReservation::get_unused_fd_flags(bindings::O_CLOEXEC)?;
    let file = file::create(Buffer::new(store, len)?)?;
    // A removal that comes before this waits for us, and finds it then.
    let inside = store.enter()?;
    store.mappings().add(&file)?;
    drop(inside);
    alloc.len = len;
    alloc.fd = fd.reserved_fd() as i32;
    user().writer().write(&Plain(alloc))?;
    // Only now can somebody else see it.
    fd.fd_install(file);
    Ok(())
}
