// SPDX-License-Identifier: GPL-2.0

//! The DAX memory of one device.
//!
//! A region is claimed by an open file descriptor of its device, so whoever claims it could open
//! it. What can go wrong has an errno of its own:
//!
//! | errno | meaning |
//! | --- | --- |
//! | `EBADF` | the descriptor is not open |
//! | `EACCES` | it is not open for reading and writing, or the device is read-only |
//! | `ENOTBLK` | it is not a device at all |
//! | `ENODEV` | it is a device, but not DAX, or its driver is gone |
//! | `EUNATCH` | `/dev/daxN.M` is bound to `device_dax`; bind it to `fsdev_dax` |
//! | `EOPNOTSUPP` | the namespace has no struct pages (raw or sector mode; use `fsdax`) |
//! | `ENXIO` | writes need a host-side flush (`!dax_synchronous()`, such as virtio-pmem) |
//! | `ERANGE` | the partition does not start and end at a page boundary |
//! | `EXDEV` | several ranges that are not adjacent |
//! | `EBUSY` | somebody else has claimed it |
//! | `EADDRINUSE` | somebody still references its pages (`frame.rs`) |
//! | `EIO` | the memory cannot be reached |
//!
//! # Lifetime of the mapping
//!
//! The mapping and its struct pages exist until the driver is unbound. The driver announces that
//! with `MF_MEM_PRE_REMOVE` and goes on when `notify_failure` returns, so `store.rs` lets nobody
//! touch a region from then on (see "Going away" there). [`Region`] itself only checks its `gone`
//! flag, as a second line.

use crate::{bindings as ext, pm};
use core::ptr::{self, NonNull};
// Programs map the region and use its words, so these are Rust's atomics, which are C11's, and not
// the kernel's, which only the kernel knows. (And the kernel's are calls: there are some fifty loads
// to a put.)
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_int, c_ulong, c_void},
    fs::LocalFile,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{ordering, Atomic, AtomicFlag, Full, Relaxed},
        Arc, SetOnce,
    },
};

/// Bytes of a page, and of a frame.
pub(crate) const PAGE: usize = kernel::page::PAGE_SIZE;
/// Its logarithm.
pub(crate) const PAGE_SHIFT: u32 = PAGE.trailing_zeros();
/// Bytes written back at once.
pub(crate) const LINE: usize = 64;
/// No device is larger, and no page number of ours overflows.
const MAX_PAGES: usize = 1 << 36;

/// What a `kobject` of a `struct device` has as its type; it is not exported. Learnt from the
/// control device by [`learn_device_type`].
static DEVICE_KTYPE: Atomic<usize> = Atomic::new(0);

/// Remembers what type the `kobject` of any `struct device` has.
///
/// # Safety
///
/// `device` is a registered device.
pub(crate) unsafe fn learn_device_type(device: *const bindings::device) {
    // SAFETY: A registered device's kobject has been initialised.
    let ktype = unsafe { (*device).kobj.ktype };
    DEVICE_KTYPE.store(ktype as usize, Relaxed);
}

/// A bit for each of so many pages, none set.
fn bits(pages: usize) -> Result<KVVec<Atomic<u64>>> {
    let words = pages.div_ceil(64);
    let mut bits = KVVec::with_capacity(words, GFP_KERNEL)?;
    for _ in 0..words {
        bits.push(Atomic::new(0), GFP_KERNEL)?;
    }
    Ok(bits)
}

/// Whether a bit is set.
fn bit(words: &[Atomic<u64>], at: u32) -> bool {
    let word = words.get(at as usize / 64);
    word.is_some_and(|word| word.load(Relaxed) >> (at % 64) & 1 != 0)
}

/// Sets a bit. Not two at once.
fn set_bit(words: &[Atomic<u64>], at: u32) {
    if let Some(word) = words.get(at as usize / 64) {
        word.store(word.load(Relaxed) | 1 << (at % 64), Relaxed);
    }
}

fn errno(e: u32) -> Error {
    Error::from_errno(-(e as i32))
}

/// What happened to a region's memory.
pub(crate) enum Failure {
    /// It is about to go away, for good: when the hook returns, nobody may touch it, nor its
    /// struct pages.
    Removal,
    /// Bytes of the DAX device went bad: offset and length.
    Media(u64, u64),
}

/// The holder of a claim, as the DAX device knows it: by address only.
pub(crate) struct Holder {
    removing: AtomicFlag,
    hook: fn(&Arc<Holder>, Failure),
}

impl Holder {
    /// Whether the memory has gone, or is about to.
    pub(crate) fn is_removing(&self) -> bool {
        self.removing.load(ordering::Acquire)
    }

    fn as_ptr(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

kernel::sync::global_lock! {
    // SAFETY: Initialised by `init()`, at module init, before anything else here.
    /// All holders. Innermost; held for a moment.
    unsafe(uninit) static HOLDERS: Mutex<KVec<Arc<Holder>>> = KVec::new();
}

/// To be called once, at module init.
pub(crate) fn init() {
    // SAFETY: Called once, says the comment.
    unsafe { HOLDERS.init() };
}

/// To be called once, when the module goes: a static is never dropped.
pub(crate) fn exit() {
    *HOLDERS.lock() = KVec::new();
}

/// Calls of a DAX device to its holder.
static HOLDER_OPS: ext::dax_holder_operations = ext::dax_holder_operations {
    notify_failure: Some(notify_failure),
};

/// The DAX device says that its memory failed. May sleep; holds `dax_read_lock()`, and for
/// removals the device lock.
///
/// # Safety
///
/// `dax` is a DAX device.
unsafe extern "C" fn notify_failure(
    dax: *mut ext::dax_device,
    offset: u64,
    len: u64,
    flags: c_int,
) -> c_int {
    // The claim may end at the same time: take the holder for an address until it is found.
    // SAFETY: `dax` is a DAX device.
    let address = unsafe { ext::dax_holder(dax) };
    let holder = {
        let holders = HOLDERS.lock();
        let found = holders.iter().find(|h| ptr::eq(h.as_ptr(), address));
        found.cloned()
    };
    let Some(holder) = holder else {
        return ENODEV.to_errno();
    };
    if flags as u32 & bindings::mf_flags_MF_MEM_PRE_REMOVE != 0 {
        holder.removing.store(true, ordering::Release);
        (holder.hook)(&holder, Failure::Removal);
        return 0;
    }
    (holder.hook)(&holder, Failure::Media(offset, len));
    // With 0 the kernel may take the page out of its direct map, while packets are still being
    // written to it; with `EOPNOTSUPP` it would handle it by itself.
    EIO.to_errno()
}

/// Ends a claim: the other end of `fs_dax_get()`.
///
/// # Safety
///
/// `dax` was claimed by `holder`, and this is called once.
unsafe fn put(dax: NonNull<ext::dax_device>, holder: &Holder) {
    if holder.removing.load(ordering::Acquire) {
        // `kill_dax()` has ended the claim, or is about to. Somebody else may have the next one,
        // which `fs_put_dax()` would disarm.
        // SAFETY: The reference is the claim's.
        unsafe { ext::put_dax(dax.as_ptr()) }
    } else {
        // SAFETY: As the caller says.
        unsafe { ext::fs_put_dax(dax.as_ptr(), holder.as_ptr()) }
    }
}

/// A [`Holder`] in the list of holders, for as long as this is.
struct Listed(Arc<Holder>, AtomicFlag);

impl Listed {
    fn new(hook: fn(&Arc<Holder>, Failure)) -> Result<Self> {
        let holder = Arc::new(
            Holder {
                removing: AtomicFlag::new(false),
                hook,
            },
            GFP_KERNEL,
        )?;
        HOLDERS.lock().push(holder.clone(), GFP_KERNEL)?;
        Ok(Self(holder, AtomicFlag::new(true)))
    }

    /// Takes it off the list. May sleep the first time.
    fn remove(&self) {
        if self.1.xchg(false, Full) {
            HOLDERS.lock().retain(|h| !Arc::ptr_eq(h, &self.0));
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.remove();
    }
}

/// What the region's device is.
enum Device {
    /// An exclusively opened block device.
    Block(NonNull<bindings::file>),
    /// `/dev/daxN.M`; the file that named it keeps its driver's module.
    Char(#[allow(dead_code)] ARef<LocalFile>),
    /// None: memory made up for unit tests.
    #[cfg(CONFIG_KUNIT = "y")]
    Synthetic(#[allow(dead_code)] synthetic::Memory),
}

/// The DAX memory of one device, claimed.
///
/// # Invariants
///
/// - `dax` is held with `holder` as its holder until this is dropped.
/// - `base` is the kernel's mapping of `len` bytes, a multiple of [`PAGE`], and `pfn` the first of
///   as many page frames, all with struct pages; both hold until `gone` is set.
pub(crate) struct Region {
    dax: NonNull<ext::dax_device>,
    holder: Listed,
    base: NonNull<u8>,
    pfn: usize,
    len: usize,
    /// First page of the region in the DAX device.
    start: usize,
    /// A bit for each page: it has a media error. Never cleared.
    bad: KVVec<Atomic<u64>>,
    /// The same, of errors since the claim.
    hit: KVVec<Atomic<u64>>,
    /// The pages of the data area, if they are known yet: first, and the one after the last.
    data: SetOnce<(u32, u32)>,
    gone: AtomicFlag,
    /// `gone`, or any of `bad`: what is touched must be looked at first.
    trouble: AtomicBool,
    closed: AtomicFlag,
    lines: Atomic<u64>,
    fences: Atomic<u64>,
    device: Device,
}

// SAFETY: The pointers are to kernel objects that any thread may use, and to memory whose users
// synchronise among themselves (`Pmem`'s contract).
unsafe impl Send for Region {}
// SAFETY: As above; all fields that change are atomic.
unsafe impl Sync for Region {}

/// A half-made claim, undone on drop unless it becomes a [`Region`], which takes `device`.
struct Claim {
    dax: NonNull<ext::dax_device>,
    holder: Option<Listed>,
    /// First page of the region in the DAX device.
    start: usize,
    /// Length in pages, if the device says.
    pages: Option<usize>,
    device: Option<Device>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(device) = self.device.take() else {
            return;
        };
        if let Some(holder) = self.holder.take() {
            // SAFETY: `dax` is held by `holder`, which goes with this.
            unsafe { put(self.dax, &holder.0) };
        }
        device.close();
    }
}

impl Device {
    fn close(self) {
        match self {
            // SAFETY: The file came from `bdev_file_open_by_dev()` and is closed once.
            Device::Block(file) => unsafe { bindings::bdev_fput(file.as_ptr()) },
            Device::Char(file) => drop(file),
            #[cfg(CONFIG_KUNIT = "y")]
            Device::Synthetic(memory) => drop(memory),
        }
    }
}

/// Holds `dax_read_lock()`.
struct DaxReadLock(c_int);

impl DaxReadLock {
    fn new() -> Self {
        // SAFETY: No requirements.
        Self(unsafe { ext::dax_read_lock() })
    }
}

impl Drop for DaxReadLock {
    fn drop(&mut self) {
        // SAFETY: Taken in `new()`, given back once.
        unsafe { ext::dax_read_unlock(self.0) };
    }
}

impl Claim {
    /// `dax_direct_access()`: how many of `nr` pages from page `start + at` are adjacent, where
    /// they are mapped, and their first page frame.
    fn access(&self, at: usize, nr: usize, mode: u32) -> Result<(usize, *mut u8, usize)> {
        let mut addr: *mut c_void = ptr::null_mut();
        let mut pfn: c_ulong = 0;
        let _lock = DaxReadLock::new();
        // SAFETY: `dax` is a DAX device that is held; the out pointers are valid.
        let got = unsafe {
            ext::dax_direct_access(
                self.dax.as_ptr(),
                self.start + at,
                nr as isize,
                mode,
                &mut addr,
                &mut pfn,
            )
        };
        if got < 0 {
            return Err(Error::from_errno(got as i32));
        }
        Ok((got as usize, addr.cast(), pfn))
    }

    /// How many pages the device has from page `at` in one range. Some drivers fail a request
    /// that goes past the end of a range, others shorten it.
    fn extent(&self, at: usize) -> usize {
        let fits = |nr: usize| {
            self.access(at, nr, ext::dax_access_mode_DAX_RECOVERY_WRITE)
                .is_ok_and(|(got, _, _)| got == nr)
        };
        if !fits(1) {
            return 0;
        }
        // Largest power of two that fits, then the bits below it.
        let mut nr = 1;
        while nr < MAX_PAGES && fits(nr * 2) {
            nr *= 2;
        }
        let mut bit = nr / 2;
        while bit > 0 {
            if fits(nr + bit) {
                nr += bit;
            }
            bit /= 2;
        }
        nr
    }

    /// Finds the pages of `at..at + nr` that the driver refuses because of media errors.
    fn find_bad(&self, at: usize, nr: usize, bad: &mut KVVec<u32>) -> Result {
        // Depth-first over halves, in address order; the stack is as deep as `nr` has bits.
        let mut todo = KVec::with_capacity(64, GFP_KERNEL)?;
        todo.push((at, nr), GFP_KERNEL)?;
        while let Some((at, nr)) = todo.pop() {
            match self.access(at, nr, ext::dax_access_mode_DAX_ACCESS) {
                Ok(_) => {}
                Err(e) if e.to_errno() == -(bindings::EHWPOISON as i32) => {
                    if nr == 1 {
                        bad.push(u32::try_from(at)?, GFP_KERNEL)?;
                    } else {
                        let half = nr / 2;
                        todo.push((at + half, nr - half), GFP_KERNEL)?;
                        todo.push((at, half), GFP_KERNEL)?;
                    }
                }
                Err(_) => return Err(EIO),
            }
        }
        Ok(())
    }
}

/// An exclusively opened block device's name, for messages and to recognise pmem.
fn disk_name(bdev: *mut bindings::block_device) -> KVec<u8> {
    let mut name = KVec::new();
    // SAFETY: The block device is open, so its disk exists; the name is an array in it.
    let raw = unsafe { (*(*bdev).bd_disk).disk_name };
    for c in raw.iter().take_while(|c| **c != 0) {
        if name.push(*c, GFP_KERNEL).is_err() {
            break;
        }
    }
    name
}

impl Region {
    /// Claims the device that `fd` is open on, and maps it.
    ///
    /// `hook` is called on failures, also while this function runs; it may sleep. It knows the
    /// region by [`Region::held_by`].
    ///
    /// Errors: see the table above. May sleep; takes the device lock, so the caller must hold no
    /// lock that `hook` takes.
    pub(crate) fn claim(fd: i32, hook: fn(&Arc<Holder>, Failure)) -> Result<Self> {
        let fd = u32::try_from(fd).map_err(|_| EBADF)?;
        let file = LocalFile::fget(fd).map_err(|_| EBADF)?;
        Self::claim_file(file, hook)
    }

    /// As [`Region::claim`], by path; for the module parameter.
    pub(crate) fn claim_path(path: &CStr, hook: fn(&Arc<Holder>, Failure)) -> Result<Self> {
        // SAFETY: `path` is NUL terminated.
        let file = unsafe {
            bindings::filp_open(
                path.as_char_ptr(),
                (bindings::O_RDWR | bindings::O_LARGEFILE) as c_int,
                0,
            )
        };
        let file = kernel::error::from_err_ptr(file)?;
        // SAFETY: `filp_open()` returned a file with a reference that is handed over; `LocalFile`
        // has the layout of `struct file`.
        let file = unsafe { ARef::from_raw(NonNull::new(file.cast::<LocalFile>()).ok_or(EBADF)?) };
        Self::claim_file(file, hook)
    }

    fn claim_file(file: ARef<LocalFile>, hook: fn(&Arc<Holder>, Failure)) -> Result<Self> {
        let raw = file.as_ptr();
        // SAFETY: `file` is a reference to an open file.
        let (read, write, blk, chr) = unsafe {
            (
                ext::pmskb_file_mode_has(raw, false),
                ext::pmskb_file_mode_has(raw, true),
                ext::pmskb_file_is_blk(raw),
                ext::pmskb_file_is_chr(raw),
            )
        };
        if !blk && !chr {
            return Err(errno(bindings::ENOTBLK));
        }
        if !read || !write {
            return Err(EACCES);
        }
        let holder = Listed::new(hook)?;
        let claim = if blk {
            Self::claim_block(&file, holder)?
        } else {
            Self::claim_char(file, holder)?
        };
        Self::map(claim)
    }

    fn claim_block(file: &LocalFile, holder: Listed) -> Result<Claim> {
        // SAFETY: The file is open, so it has an inode; of a block device, so `i_rdev` counts.
        let dev = unsafe { (*(*file.as_ptr()).f_inode).i_rdev };
        // SAFETY: No holder operations: the DAX device's are what tells us of removal. `holder`
        // is an address that is not followed.
        let bfile = unsafe {
            bindings::bdev_file_open_by_dev(
                dev,
                ext::PMSKB_BLK_OPEN_RW,
                holder.0.as_ptr(),
                ptr::null(),
            )
        };
        let bfile = kernel::error::from_err_ptr(bfile)?;
        let device = Device::Block(NonNull::new(bfile).ok_or(EIO)?);

        let claim = (|| {
            // SAFETY: `bfile` is an open block device.
            let bdev = unsafe { ext::file_bdev(bfile) };
            // SAFETY: `bdev` is open.
            let (start, len) =
                unsafe { (ext::pmskb_bdev_start(bdev), ext::pmskb_bdev_bytes(bdev)) };
            // SAFETY: `bdev` is open.
            if !unsafe { ext::pmskb_bdev_is_dax(bdev) } {
                // A pmem namespace that does not do DAX is raw or in sector mode.
                return Err(if disk_name(bdev).starts_with(b"pmem") {
                    errno(bindings::EOPNOTSUPP)
                } else {
                    ENODEV
                });
            }
            // SAFETY: `bdev` is open.
            if unsafe { ext::pmskb_bdev_is_async(bdev) } {
                return Err(ENXIO);
            }
            if start % PAGE as u64 != 0 || len % PAGE as u64 != 0 {
                return Err(ERANGE);
            }
            let mut off = 0;
            // What the page cache still has of the device must not be written over the region.
            // SAFETY: `bdev` is open, exclusively.
            to_result(unsafe { ext::sync_blockdev(bdev) })?;
            // SAFETY: As above.
            unsafe { ext::invalidate_bdev(bdev) };
            // SAFETY: `bdev` is open, the operations static.
            let dax =
                unsafe { ext::fs_dax_get_by_bdev(bdev, &mut off, holder.0.as_ptr(), &HOLDER_OPS) };
            // What remains is that it is going away, or that another holds it.
            let dax = NonNull::new(dax).ok_or(EBUSY)?;
            Ok((dax, off, len))
        })();
        match claim {
            Ok((dax, off, len)) => Ok(Claim {
                dax,
                holder: Some(holder),
                start: (off >> PAGE_SHIFT) as usize,
                pages: Some((len >> PAGE_SHIFT) as usize),
                device: Some(device),
            }),
            Err(e) => {
                device.close();
                Err(e)
            }
        }
    }

    fn claim_char(file: ARef<LocalFile>, holder: Listed) -> Result<Claim> {
        // `dax_dev_get()` makes a DAX device of any number that it is given, so first see that
        // the file is one's: its cdev's parent is a device on the bus named "dax".
        // SAFETY: The file is an open character device; its inode's cdev and the cdev's parent
        // are referenced by that.
        let dev = unsafe {
            let inode = (*file.as_ptr()).f_inode;
            let cdev = (*inode).__bindgen_anon_5.i_cdev;
            if cdev.is_null() {
                return Err(ENODEV);
            }
            let parent = (*cdev).kobj.parent;
            if parent.is_null() || (*parent).ktype as usize != DEVICE_KTYPE.load(Relaxed) {
                return Err(ENODEV);
            }
            let dev = kernel::container_of!(parent, bindings::device, kobj);
            if (*dev).devt != (*inode).i_rdev || (*dev).bus.is_null() {
                return Err(ENODEV);
            }
            if CStr::from_char_ptr((*(*dev).bus).name).to_bytes() != b"dax" {
                return Err(ENODEV);
            }
            (*inode).i_rdev
        };
        // SAFETY: The number is that of a DAX device.
        let dax = NonNull::new(unsafe { ext::dax_dev_get(dev) }).ok_or(ENODEV)?;
        // SAFETY: `dax` is a DAX device that is referenced, the operations static.
        let ret = unsafe { ext::fs_dax_get(dax.as_ptr(), holder.0.as_ptr(), &HOLDER_OPS) };
        // SAFETY: `fs_dax_get()` took its own reference; this is the one from `dax_dev_get()`.
        unsafe { ext::put_dax(dax.as_ptr()) };
        to_result(ret).map_err(|e| {
            if e.to_errno() == -(bindings::EOPNOTSUPP as i32) {
                errno(bindings::EUNATCH)
            } else {
                e
            }
        })?;
        Ok(Claim {
            dax,
            holder: Some(holder),
            start: 0,
            pages: None,
            device: Some(Device::Char(file)),
        })
    }

    fn map(mut claim: Claim) -> Result<Self> {
        // SAFETY: `dax` is held.
        if !unsafe { ext::dax_synchronous(claim.dax.as_ptr()) } {
            return Err(ENXIO);
        }
        let mode = ext::dax_access_mode_DAX_RECOVERY_WRITE;
        let (_, base, pfn) = claim.access(0, 1, mode).map_err(|_| EIO)?;

        // The whole length must be one run of addresses and of page frames. Recovery mode
        // answers for bad pages too.
        let mut at = 0;
        loop {
            let left = claim.pages.map_or(MAX_PAGES, |pages| pages - at);
            if left == 0 {
                break;
            }
            let nr = if claim.pages.is_some() {
                match claim.access(at, left, mode) {
                    Ok((got, _, _)) => got.min(left),
                    Err(_) => return Err(EIO),
                }
            } else {
                claim.extent(at)
            };
            if nr == 0 {
                break;
            }
            let (_, addr, first) = claim.access(at, 1, mode).map_err(|_| EIO)?;
            if addr != base.wrapping_add(at << PAGE_SHIFT) || first != pfn + at {
                return Err(EXDEV);
            }
            at += nr;
            if at >= MAX_PAGES {
                return Err(EFBIG);
            }
        }
        let pages = at;
        // Nothing else keeps the driver, and with it the struct pages, until the store is known
        // to whom `notify_failure` tells: `kill_dax()` waits for the end of this.
        let alive = DaxReadLock::new();
        claim.access(0, 1, mode)?;
        // SAFETY: Only asks whether there are struct pages.
        let has_pages =
            unsafe { ext::pmskb_pfn_has_page(pfn) && ext::pmskb_pfn_has_page(pfn + pages - 1) };
        if !has_pages {
            return Err(errno(bindings::EOPNOTSUPP));
        }
        u32::try_from(pages).map_err(|_| EFBIG)?;

        let mut refused = KVVec::new();
        claim.find_bad(0, pages, &mut refused)?;
        // Not every driver looks, but memory that failed since boot is marked.
        let (bad, hit) = (bits(pages)?, bits(pages)?);
        let mut any_bad = false;
        for at in 0..pages {
            // SAFETY: There are struct pages.
            let poisoned = unsafe { ext::pmskb_page_is_poisoned(ext::pmskb_pfn_to_page(pfn + at)) };
            let at = at as u32;
            if poisoned || refused.binary_search(&at).is_ok() {
                any_bad = true;
                set_bit(&bad, at);
            }
        }
        drop(alive);

        let base = NonNull::new(base).ok_or(EIO)?;
        let holder = claim.holder.take().ok_or(EIO)?;
        let device = claim.device.take().ok_or(EIO)?;
        // INVARIANT: The claim goes on as the region; without a device, `claim` drops nothing.
        Ok(Self {
            dax: claim.dax,
            holder,
            base,
            pfn,
            len: pages << PAGE_SHIFT,
            start: claim.start,
            bad,
            hit,
            data: SetOnce::new(),
            gone: AtomicFlag::new(false),
            trouble: AtomicBool::new(any_bad),
            closed: AtomicFlag::new(false),
            lines: Atomic::new(0),
            fences: Atomic::new(0),
            device,
        })
    }

    /// Whether this is the region that `holder` holds.
    pub(crate) fn held_by(&self, holder: &Arc<Holder>) -> bool {
        Arc::ptr_eq(&self.holder.0, holder)
    }

    /// Whether the memory has gone, or is about to.
    pub(crate) fn is_removing(&self) -> bool {
        self.holder.0.is_removing()
    }

    /// Length in pages.
    pub(crate) fn pages(&self) -> usize {
        self.len / PAGE
    }

    /// Page frame number of the first page.
    pub(crate) fn pfn(&self) -> usize {
        self.pfn
    }

    /// Whether a page has a media error. Any context.
    #[inline]
    pub(crate) fn is_bad(&self, page: u32) -> bool {
        self.trouble() && bit(&self.bad, page)
    }

    /// A page has a media error, from now on. Any context; not two at once.
    pub(crate) fn set_bad(&self, page: u32) {
        set_bit(&self.bad, page);
        set_bit(&self.hit, page);
        self.trouble.store(true, Ordering::Release);
    }

    /// Which pages are the data area's. Of these the module does not touch any more what is hit by
    /// an error: it loads words of records and nodes that it has read before, and a machine check
    /// in that is fatal. (Outside there is nothing to fall back on but what the memory says: a copy
    /// survives a machine check, and a write may mend it. So it is for errors from before the
    /// claim: recovery copies what it goes by, and only lines that are bad are lost.)
    pub(crate) fn set_data(&self, first: u32, count: u32) {
        self.data.populate((first, first.saturating_add(count)));
    }

    /// Where the byte at `off` is mapped.
    pub(crate) fn addr(&self, off: usize) -> Option<NonNull<u8>> {
        // SAFETY: The mapping has `len` bytes, so the sum is inside it.
        (off < self.len).then(|| unsafe { self.base.add(off) })
    }

    /// Byte offset in the region of a range of the DAX device, as failures are reported; none if
    /// it is not wholly before or after the region.
    pub(crate) fn overlap(&self, offset: u64, len: u64) -> Option<(u32, u32)> {
        let start = (self.start as u64) << PAGE_SHIFT;
        let end = offset.saturating_add(len).min(start + self.len as u64);
        let offset = offset.max(start);
        if offset >= end {
            return None;
        }
        let first = (offset - start) >> PAGE_SHIFT;
        let last = (end - start - 1) >> PAGE_SHIFT;
        Some((first as u32, (last - first + 1) as u32))
    }

    /// Cache lines written back and fences, since the claim.
    pub(crate) fn written_back(&self) -> (u64, u64) {
        (self.lines.load(Relaxed), self.fences.load(Relaxed))
    }

    /// Fills a range with zeros, which need not be durable. Process context.
    pub(crate) fn clear(&self, off: u64, len: u64) {
        let Ok(len) = usize::try_from(len) else {
            return;
        };
        if let Ok(to) = self.range(off, len) {
            // SAFETY: In the mapping.
            unsafe { ptr::write_bytes(to, 0, len) };
        }
    }

    /// The memory is about to go: every access fails from now on.
    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Relaxed);
        self.trouble.store(true, Ordering::Release);
    }

    #[inline]
    fn trouble(&self) -> bool {
        self.trouble.load(Ordering::Relaxed)
    }

    /// Whether bytes may be touched, in a region where not all may.
    #[cold]
    fn check(&self, off: usize, end: usize) -> pm::Result<()> {
        if self.gone.load(Relaxed) {
            return Err(pm::Error::Io);
        }
        let Some((first, after)) = self.data.copy() else {
            return Ok(());
        };
        let pages = (off >> PAGE_SHIFT) as u32..end.div_ceil(PAGE) as u32;
        let mut pages = pages.start.max(first)..pages.end.min(after);
        match pages.any(|page| bit(&self.hit, page)) {
            true => Err(pm::Error::Io),
            false => Ok(()),
        }
    }

    /// Where `len` bytes at `off` are mapped, if they may be touched.
    fn range(&self, off: u64, len: usize) -> pm::Result<*mut u8> {
        let off = usize::try_from(off).map_err(|_| pm::Error::Invalid)?;
        let end = off.checked_add(len).ok_or(pm::Error::Invalid)?;
        if end > self.len {
            return Err(pm::Error::Invalid);
        }
        if self.trouble() {
            self.check(off, end)?;
        }
        Ok(self.base.as_ptr().wrapping_add(off))
    }

    /// Reads 8 bytes where an error is known, so that a load of them does no harm.
    #[cold]
    fn try_word(&self, off: u64) -> pm::Result<()> {
        match self.is_bad((off >> PAGE_SHIFT) as u32) {
            true => pm::Pmem::read(self, off, &mut [0; 8]),
            false => Ok(()),
        }
    }

    /// The 8 bytes at `off`, as an atomic.
    #[inline(always)]
    fn word(&self, off: u64) -> pm::Result<&AtomicU64> {
        if off % 8 != 0 || off >= self.len as u64 {
            return Err(pm::Error::Invalid);
        }
        if self.trouble() {
            self.range(off, 8)?;
        }
        // SAFETY: In the mapping, whose length is a multiple of 8, aligned (it starts at a page),
        // and accessed as an atomic by all who share it.
        Ok(unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(off as usize).cast()) })
    }

    /// So many words from `off`, as atomics.
    fn words(&self, off: u64, count: usize) -> pm::Result<&[AtomicU64]> {
        let len = count.checked_mul(8).ok_or(pm::Error::Invalid)?;
        if off % 8 != 0 {
            return Err(pm::Error::Invalid);
        }
        let addr = self.range(off, len)?;
        // SAFETY: `range()` found them in the mapping, which stays as long as the region; aligned,
        // and accessed as atomics by all who share them.
        Ok(unsafe { core::slice::from_raw_parts(addr.cast(), count) })
    }
}

impl Region {
    /// Ends the claim. May sleep the first time; after that, dropping the region does not.
    /// Nobody may touch the memory any more.
    pub(crate) fn close(&self) {
        if self.closed.xchg(true, Full) {
            return;
        }
        self.set_gone();
        // SAFETY: Held by `holder`; once, by `closed`.
        unsafe { put(self.dax, &self.holder.0) };
        self.holder.remove();
        if let Device::Block(file) = &self.device {
            // SAFETY: The file came from `bdev_file_open_by_dev()` and is closed once.
            unsafe { bindings::bdev_fput(file.as_ptr()) };
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the core knows of the region. Any context; callers synchronise.
impl pm::Pmem for Region {
    fn len(&self) -> u64 {
        self.len as u64
    }

    fn read(&self, off: u64, to: &mut [u8]) -> pm::Result<()> {
        let from = self.range(off, to.len())?;
        let len = u32::try_from(to.len()).map_err(|_| pm::Error::Invalid)?;
        // SAFETY: Both are valid for that many bytes. A machine check is recovered from.
        let left = unsafe { bindings::copy_mc_to_kernel(to.as_mut_ptr().cast(), from.cast(), len) };
        if left != 0 {
            return Err(pm::Error::Io);
        }
        Ok(())
    }

    // A plain load, and not `copy_mc_to_kernel()`: that may copy byte by byte, and the core wants
    // the 8 bytes of one instant. A machine check here is fatal, as in any kernel memory; so where
    // an error is known, a copy goes first.
    #[inline(always)]
    fn load(&self, off: u64) -> pm::Result<u64> {
        if self.trouble() {
            self.try_word(off)?;
        }
        Ok(u64::from_le(self.word(off)?.load(Ordering::Acquire)))
    }

    fn write(&self, off: u64, from: &[u8]) -> pm::Result<()> {
        let to = self.range(off, from.len())?;
        // SAFETY: Both are valid for that many bytes, and kernel memory is not in the region.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    #[inline]
    fn store(&self, off: u64, value: u64) -> pm::Result<()> {
        self.word(off)?.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    fn shift(&self, from: u64, to: u64, words: usize) -> pm::Result<()> {
        let pairs = self.words(from, words)?.iter().zip(self.words(to, words)?);
        let one = |(from, to): (&AtomicU64, &AtomicU64)| {
            to.store(from.load(Ordering::Acquire), Ordering::Release)
        };
        if to <= from {
            pairs.for_each(one);
        } else {
            pairs.rev().for_each(one);
        }
        Ok(())
    }

    fn lower_bound(&self, off: u64, stride: usize, count: usize, value: u64) -> pm::Result<usize> {
        let Some(last) = count.checked_sub(1) else {
            return Ok(0);
        };
        let words = last.checked_mul(stride).and_then(|n| n.checked_add(1));
        let words = self.words(off, words.ok_or(pm::Error::Invalid)?)?;
        let (mut low, mut high) = (0, count);
        while low < high {
            let mid = low + (high - low) / 2;
            let word = words.get(mid * stride).ok_or(pm::Error::Invalid)?;
            if u64::from_le(word.load(Ordering::Acquire)) < value {
                low = mid + 1;
            } else {
                high = mid;
            }
        }
        Ok(low)
    }

    fn prefetch(&self, off: u64, len: u64) {
        let Ok(len) = usize::try_from(len) else {
            return;
        };
        if let Ok(addr) = self.range(off, len) {
            // SAFETY: In the mapping. A line that has an error raises a machine check when it is
            // used, not when it is fetched.
            unsafe { ext::pmskb_prefetch(addr.cast(), len) };
        }
    }

    fn go_on(&self) -> pm::Result<()> {
        if crate::host::killed() {
            return Err(pm::Error::Interrupted);
        }
        Ok(())
    }

    fn flush(&self, off: u64, len: u64) -> pm::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let bytes = usize::try_from(len).map_err(|_| pm::Error::Invalid)?;
        let addr = self.range(off, bytes)?;
        // Not `dax_flush()`: it does nothing on /dev/dax.
        // SAFETY: In the mapping.
        unsafe { ext::arch_wb_cache_pmem(addr.cast(), bytes) };
        let lines = (off + len - 1) / LINE as u64 - off / LINE as u64 + 1;
        self.lines.add(lines, Relaxed);
        Ok(())
    }

    fn fence(&self) {
        // SAFETY: No requirements.
        unsafe { ext::pmskb_wmb() };
        self.fences.add(1, Relaxed);
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c(crc, data)
    }
}

/// CRC32C, continued from `crc` as `Pmem::crc32c()` does. Any context.
pub(crate) fn crc32c(crc: u32, data: &[u8]) -> u32 {
    // The kernel's leaves the complements to the caller.
    // SAFETY: The slice is valid for reads.
    !unsafe { ext::crc32c(!crc, data.as_ptr().cast(), data.len()) }
}

/// The core's view of a region that is shared.
#[derive(Clone)]
pub(crate) struct Media(pub(crate) Arc<Region>);

impl pm::Pmem for Media {
    fn len(&self) -> u64 {
        pm::Pmem::len(&*self.0)
    }
    fn read(&self, off: u64, to: &mut [u8]) -> pm::Result<()> {
        self.0.read(off, to)
    }
    #[inline(always)]
    fn load(&self, off: u64) -> pm::Result<u64> {
        self.0.load(off)
    }
    fn write(&self, off: u64, from: &[u8]) -> pm::Result<()> {
        self.0.write(off, from)
    }
    #[inline]
    fn store(&self, off: u64, value: u64) -> pm::Result<()> {
        self.0.store(off, value)
    }
    fn shift(&self, from: u64, to: u64, words: usize) -> pm::Result<()> {
        self.0.shift(from, to, words)
    }
    fn lower_bound(&self, off: u64, stride: usize, count: usize, value: u64) -> pm::Result<usize> {
        self.0.lower_bound(off, stride, count, value)
    }
    fn prefetch(&self, off: u64, len: u64) {
        self.0.prefetch(off, len)
    }
    fn flush(&self, off: u64, len: u64) -> pm::Result<()> {
        self.0.flush(off, len)
    }
    fn go_on(&self) -> pm::Result<()> {
        self.0.go_on()
    }
    fn fence(&self) {
        self.0.fence()
    }
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        self.0.crc32c(crc, data)
    }
}

/// Regions made up for unit tests: ordinary memory, whose pages nobody references.
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod synthetic {
    use super::*;

    /// Pages of ordinary memory, each on its own. All have a reference count of 0 again when this
    /// is dropped.
    pub(crate) struct Memory(*mut bindings::page);

    /// Pages of a region.
    pub(crate) const PAGES: u32 = ext::PMSKB_TEST_PAGES;

    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: From `pmskb_test_pages()`, freed once.
            unsafe { ext::pmskb_test_pages_free(self.0) };
        }
    }

    fn hook(_holder: &Arc<Holder>, _failure: Failure) {}

    /// A region of [`PAGES`] pages.
    pub(crate) fn region() -> Result<Arc<Region>> {
        // SAFETY: No requirements.
        let first = NonNull::new(unsafe { ext::pmskb_test_pages() }).ok_or(ENOMEM)?;
        let memory = Memory(first.as_ptr());
        // SAFETY: The first of the pages, which are in the direct map.
        let (base, pfn) = unsafe {
            (
                ext::pmskb_page_address(first.as_ptr()),
                ext::pmskb_page_to_pfn(first.as_ptr()),
            )
        };
        // INVARIANT: There is no DAX device, and `closed` says that nothing is to be put; the
        // pages are `memory`'s, which goes last.
        let region = Region {
            dax: NonNull::dangling(),
            holder: Listed::new(hook)?,
            base: NonNull::new(base.cast()).ok_or(ENOMEM)?,
            pfn,
            len: PAGES as usize * PAGE,
            start: 0,
            bad: bits(PAGES as usize)?,
            hit: bits(PAGES as usize)?,
            data: SetOnce::new(),
            gone: AtomicFlag::new(false),
            trouble: AtomicBool::new(false),
            closed: AtomicFlag::new(true),
            lines: Atomic::new(0),
            fences: Atomic::new(0),
            device: Device::Synthetic(memory),
        };
        Ok(Arc::new(region, GFP_KERNEL)?)
    }

    /// References on page `at` of a region.
    pub(crate) fn references(region: &Region, at: u32) -> i32 {
        // SAFETY: The page is there.
        unsafe { ext::pmskb_page_ref_count(ext::pmskb_pfn_to_page(region.pfn() + at as usize)) }
    }
}
