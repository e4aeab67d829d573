// SPDX-License-Identifier: GPL-2.0

//! `/dev/pmskbN`: a store, to map, to read, to splice, and to submit to.
//!
//! The file is the region, byte for byte, but for the head area: that reads as zeros and cannot
//! be mapped, for it has kernel pointers. Nothing can be written through it.

use crate::{
    bindings as ext, buffer, object, quota,
    read::{self, Part, Ranges},
    region::PAGE,
    sock::errno,
    store::Store,
    token,
    uapi::Plain,
    vma::{self, Operations},
};
use core::{ops::RangeInclusive, ptr};
use kernel::{
    bindings,
    error::{from_result, to_result},
    ffi::{c_int, c_long, c_uint, c_ulong},
    fs::LocalFile,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, ArcBorrow,
    },
    types::{ForeignOwnable, Opaque},
    uaccess::{UserPtr, UserSlice},
};

/// Bytes that one page table entry of the second level maps.
const HUGE: usize = 2 << 20;

/// The device of a store.
///
/// # Invariants
///
/// `raw.misc` is registered from [`Node::new`] until this is dropped.
#[pin_data(PinnedDrop)]
#[repr(C)]
pub(crate) struct Node {
    /// First, so that a pointer to it (or to its first field, `misc`) is one to the node.
    #[pin]
    raw: Opaque<ext::pmskb_node>,
    store: Arc<Store>,
}

// SAFETY: `raw` is only read after it was registered, but by the misc device's own code.
unsafe impl Send for Node {}
// SAFETY: As above.
unsafe impl Sync for Node {}

impl Node {
    /// Makes `/dev/pmskbN`, readable and writable by root and its group. Process context.
    pub(crate) fn new(store: Arc<Store>) -> impl PinInit<Self, Error> {
        let minor = store.minor();
        let (uuid, label) = (*store.uuid(), *store.label());
        // The store first: the device may be opened before `misc_register()` returns.
        try_pin_init!(Self {
            store,
            raw <- Opaque::try_ffi_init(move |slot: *mut ext::pmskb_node| {
                let mut node = ext::pmskb_node {
                    uuid,
                    ..Default::default()
                };
                // The NUL after each is there from the start.
                for (to, from) in node.label.iter_mut().zip(&label) {
                    *to = *from;
                }
                let mut digits = [0u8; 10];
                for (to, from) in node.name.iter_mut().zip(name(minor, &mut digits)) {
                    *to = from;
                }
                node.misc = bindings::miscdevice {
                    minor: bindings::MISC_DYNAMIC_MINOR as c_int,
                    fops: &FOPS.0,
                    // SAFETY: No requirements.
                    groups: unsafe { ext::pmskb_node_groups() },
                    mode: 0o660,
                    ..Default::default()
                };
                // SAFETY: The slot is valid for writes, and pinned. The name lives in it.
                unsafe {
                    slot.write(node);
                    (*slot).misc.name = ptr::addr_of!((*slot).name).cast();
                    to_result(bindings::misc_register(ptr::addr_of_mut!((*slot).misc)))
                }
            }),
        }? Error)
    }
}

kernel::sync::global_lock! {
    // SAFETY: Initialised by `init()`, at module init, before anything else here.
    /// All nodes. Held for a moment, under `ADMIN`.
    unsafe(uninit) static NODES: Mutex<KVec<Pin<KBox<Node>>>> = KVec::new();
}

/// To be called once, at module init.
pub(crate) fn init() {
    // SAFETY: Called once, says the comment.
    unsafe { NODES.init() };
}

/// To be called once, when the module goes: a static is never dropped.
pub(crate) fn exit() {
    *NODES.lock() = KVec::new();
}

/// Makes the device of a store. Process context.
pub(crate) fn publish(store: &Arc<Store>) -> Result {
    // Room first: a device that is there can be opened, and must not go by an error. Only one
    // store is published at a time.
    NODES.lock().reserve(1, GFP_KERNEL)?;
    let node = KBox::pin_init(Node::new(store.clone()), GFP_KERNEL)?;
    NODES.lock().push(node, GFP_KERNEL)?;
    Ok(())
}

/// Removes the device of a store. Process context.
pub(crate) fn unpublish(store: &Arc<Store>) {
    let node = {
        let mut nodes = NODES.lock();
        let at = nodes
            .iter()
            .position(|node| Arc::ptr_eq(&node.store, store));
        at.and_then(|at| nodes.remove(at).ok())
    };
    // Without the lock: this waits for who reads its attributes.
    drop(node);
}

/// `pmskbN`, in bytes.
fn name(minor: u32, digits: &mut [u8; 10]) -> impl Iterator<Item = u8> + '_ {
    let mut left = minor;
    let mut nr = 0;
    for slot in digits.iter_mut() {
        *slot = b'0' + (left % 10) as u8;
        left /= 10;
        nr += 1;
        if left == 0 {
            break;
        }
    }
    let digits = digits.iter().take(nr).rev();
    Iterator::chain(b"pmskb".iter(), digits).copied()
}

#[pinned_drop]
impl PinnedDrop for Node {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariant.
        unsafe { bindings::misc_deregister(ptr::addr_of_mut!((*self.raw.get()).misc)) };
    }
}

/// A limit of a node's store, and what it may be.
///
/// # Safety
///
/// `node` is the start of a [`Node`], which stays for `'a`.
unsafe fn limit<'a>(
    node: *mut ext::pmskb_node,
    which: c_uint,
) -> Option<(&'a Atomic<u32>, RangeInclusive<u32>)> {
    // SAFETY: As the caller says.
    let store = unsafe { &(*node.cast::<Node>()).store };
    let limits = &store.frames().limits;
    match which {
        ext::pmskb_limit_PMSKB_LIMIT_STORE_FRAMES => {
            Some((&limits.store_frames, quota::MIN_FRAMES..=u32::MAX))
        }
        ext::pmskb_limit_PMSKB_LIMIT_SOCKET_FRAMES => {
            Some((&limits.socket_frames, quota::MIN_FRAMES..=u32::MAX))
        }
        ext::pmskb_limit_PMSKB_LIMIT_SOCKET_TOKENS => {
            Some((&limits.socket_tokens, quota::MIN_TOKENS..=token::MAX as u32))
        }
        _ => None,
    }
}

/// An attribute of a node is read.
///
/// # Safety
///
/// `node` is a registered node's.
#[no_mangle]
unsafe extern "C" fn pmskb_limit_get(node: *mut ext::pmskb_node, which: c_uint) -> c_uint {
    // SAFETY: The device is not removed before this returns.
    unsafe { limit(node, which) }.map_or(0, |(limit, _)| limit.load(Relaxed))
}

/// An attribute of a node is written. `EINVAL` if it may not be that.
///
/// # Safety
///
/// `node` is a registered node's.
#[no_mangle]
unsafe extern "C" fn pmskb_limit_set(
    node: *mut ext::pmskb_node,
    which: c_uint,
    value: c_uint,
) -> c_int {
    // SAFETY: The device is not removed before this returns.
    match unsafe { limit(node, which) } {
        Some((limit, may)) if may.contains(&value) => {
            limit.store(value, Relaxed);
            0
        }
        _ => EINVAL.to_errno(),
    }
}

static FOPS: Operations<bindings::file_operations> = Operations(bindings::file_operations {
    owner: crate::this_module(),
    llseek: Some(llseek),
    read_iter: Some(read_iter),
    splice_read: Some(splice_read),
    mmap: Some(mmap),
    get_unmapped_area: Some(ext::thp_get_unmapped_area),
    open: Some(open),
    release: Some(release),
    unlocked_ioctl: Some(ioctl),
    compat_ioctl: bindings::compat_ptr_ioctl,
    uring_cmd: Some(uring_cmd),
    ..pin_init::zeroed()
});

static VM_OPS: Operations<bindings::vm_operations_struct> =
    Operations(bindings::vm_operations_struct {
        fault: Some(fault),
        huge_fault: Some(huge_fault),
        ..pin_init::zeroed()
    });

/// The store that a file is open on, if it is one of these. Any context.
pub(crate) fn store_of(file: &LocalFile) -> Option<Arc<Store>> {
    // SAFETY: `file` is open, so it has operations.
    let ours = unsafe { ptr::eq((*file.as_ptr()).f_op, &FOPS.0) };
    // SAFETY: With our operations, the file was opened by `open()`.
    ours.then(|| unsafe { store(file.as_ptr()) }.into())
}

/// The store of an open file.
///
/// # Safety
///
/// `file` was opened by [`open`], and is not closed for the life of the result.
unsafe fn store<'a>(file: *mut bindings::file) -> ArcBorrow<'a, Store> {
    // SAFETY: `open()` put it there, and `release()` has not taken it.
    unsafe { <Arc<Store> as ForeignOwnable>::borrow((*file).private_data) }
}

/// # Safety
///
/// The open of a node.
unsafe extern "C" fn open(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    from_result(|| {
        // SAFETY: `misc_open()` leaves the misc device there, which cannot be unregistered
        // before this returns; it is at the start of a node.
        let node = unsafe { &*(*file).private_data.cast::<Node>() };
        let store = node.store.clone();
        store.file_opened()?;
        // SAFETY: The file is being opened, and counted, so that the store outlives it.
        unsafe { store.mappings().adopt(file) };
        // SAFETY: Private data belongs to us.
        unsafe { (*file).private_data = store.into_foreign() };
        Ok(0)
    })
}

/// # Safety
///
/// The last close of a file that [`open`] opened.
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: Put there by `open()`; this is its end.
    let store = unsafe { <Arc<Store> as ForeignOwnable>::from_foreign((*file).private_data) };
    store.file_closed();
    0
}

/// # Safety
///
/// A seek of an open file of ours.
unsafe extern "C" fn llseek(file: *mut bindings::file, off: i64, whence: c_int) -> i64 {
    // SAFETY: An open file of ours.
    let len = unsafe { store(file) }.geometry().region_len;
    // SAFETY: As above.
    unsafe { bindings::fixed_size_llseek(file, off, whence, len as i64) }
}

/// A store's file: the region, byte for byte.
struct Whole<'a>(&'a Store);

impl Ranges for Whole<'_> {
    fn store(&self) -> &Store {
        self.0
    }

    fn part(&self, off: u64, len: u64) -> Option<(Part, usize)> {
        let store = self.0;
        let geo = store.geometry();
        if off >= geo.region_len {
            return None;
        }
        let page = PAGE as u64;
        let len = len.min(page - off % page).min(geo.region_len - off) as usize;
        let number = u32::try_from(off / page).ok()?;
        if off >= geo.head_off && off - geo.head_off < geo.head_len {
            return Some((Part::Zeros, len));
        }
        let what = match store.frames().frame_at(off) {
            Some((frame, _)) => Part::data(store, frame, off),
            None if store.region().is_bad(number) => Part::Bad,
            None => Part::Meta(off),
        };
        Some((what, len))
    }
}

/// # Safety
///
/// A read of an open file of ours.
unsafe extern "C" fn read_iter(
    kiocb: *mut bindings::kiocb,
    iter: *mut bindings::iov_iter,
) -> isize {
    // SAFETY: A read of an open file of ours.
    let store = unsafe { store((*kiocb).ki_filp) };
    // SAFETY: Both pointers are ours for the call.
    unsafe { read::read_iter(&Whole(&store), kiocb, iter) }
}

/// # Safety
///
/// A splice of an open file of ours; the caller holds the mutex of the pipe.
unsafe extern "C" fn splice_read(
    file: *mut bindings::file,
    ppos: *mut i64,
    pipe: *mut bindings::pipe_inode_info,
    len: usize,
    flags: c_uint,
) -> isize {
    // SAFETY: An open file of ours.
    let store = unsafe { store(file) };
    // SAFETY: As we were called.
    unsafe { read::splice_read(&Whole(&store), file, ppos, pipe, len, flags) }
}

/// # Safety
///
/// `vma` is being set up for an open file of ours.
unsafe extern "C" fn mmap(file: *mut bindings::file, vma: *mut bindings::vm_area_struct) -> c_int {
    from_result(|| {
        // SAFETY: An open file of ours.
        let store = unsafe { store(file) };
        let _entered = store.enter()?;
        // SAFETY: `vma` is being set up.
        unsafe { vma::make_readonly(vma)? };
        // SAFETY: As above. The file, which the mapping keeps open, keeps the store.
        unsafe { (*vma).vm_ops = &VM_OPS.0 };
        Ok(0)
    })
}

/// The page frame of page `pgoff` of a store, if `nr` pages from there may be mapped.
fn mappable(store: &Store, pgoff: u64, nr: u64) -> Option<usize> {
    let geo = store.geometry();
    let off = pgoff.checked_mul(PAGE as u64)?;
    let end = off.checked_add(nr.checked_mul(PAGE as u64)?)?;
    let head_end = geo.head_off.checked_add(geo.head_len)?;
    if end > geo.region_len || (off < head_end && end > geo.head_off) {
        return None;
    }
    store.region().pfn().checked_add(pgoff as usize)
}

/// A page's fault: the page, or SIGBUS where there is none to map.
///
/// # Safety
///
/// A fault of one of our mappings.
unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: A fault of one of our mappings, whose file is open.
    let (store, file, pgoff) = unsafe {
        let at = (*vmf).__bindgen_anon_1;
        let file = (*at.vma).vm_file;
        (store(file), LocalFile::from_raw_file(file), at.pgoff)
    };
    let sigbus = bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    let Ok(_entered) = store.enter() else {
        return sigbus;
    };
    let inserted = match mappable(&store, pgoff as u64, 1) {
        // SAFETY: Inside, the page exists, and removal zaps after all are outside.
        Some(pfn) if !is_bad(&store, pgoff as u64) => unsafe { vma::insert(vmf, pfn) },
        _ => return sigbus,
    };
    if is_bad(&store, pgoff as u64) {
        // The error came meanwhile, and may have been too early to find the entry.
        if let Ok(at) = u32::try_from(pgoff) {
            vma::zap_file(file, at, 1);
        }
        return sigbus;
    }
    inserted
}

fn is_bad(store: &Store, pgoff: u64) -> bool {
    matches!(
        Whole(store).part(pgoff.saturating_mul(PAGE as u64), 1),
        None | Some((Part::Bad, _))
    )
}

/// 2 MiB at once, where offset and memory are aligned to that and all of it is data.
///
/// # Safety
///
/// A fault of one of our mappings.
unsafe extern "C" fn huge_fault(
    vmf: *mut bindings::vm_fault,
    order: c_uint,
) -> bindings::vm_fault_t {
    let fallback = bindings::vm_fault_reason_VM_FAULT_FALLBACK;
    let pages = HUGE / PAGE;
    if 1usize.checked_shl(order) != Some(pages) {
        return fallback;
    }
    // SAFETY: A fault of one of our mappings, whose file is open.
    let (store, file, pgoff, address, start, end) = unsafe {
        let at = (*vmf).__bindgen_anon_1;
        let range = (*at.vma).__bindgen_anon_1.__bindgen_anon_1;
        let file = LocalFile::from_raw_file((*at.vma).vm_file);
        let store = store((*at.vma).vm_file);
        (
            store,
            file,
            at.pgoff,
            at.address,
            range.vm_start,
            range.vm_end,
        )
    };
    let (base, within) = (address & !(HUGE - 1), (address & (HUGE - 1)) / PAGE);
    let Some(first) = pgoff.checked_sub(within) else {
        return fallback;
    };
    if base < start || base.checked_add(HUGE).is_none_or(|e| e > end) {
        return fallback;
    }
    let Ok(_entered) = store.enter() else {
        return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
    };
    let geo = store.geometry();
    let off = (first as u64).saturating_mul(PAGE as u64);
    let data = off >= geo.data_off && off.saturating_add(HUGE as u64) <= geo.data_end();
    // With a bad page anywhere, page by page.
    let bad = || store.frames().counts().bad > 0;
    let inserted = match mappable(&store, first as u64, pages as u64) {
        // SAFETY: As in `fault()`; aligned.
        Some(pfn) if data && pfn % pages == 0 && !bad() => unsafe { vma::insert_huge(vmf, pfn) },
        _ => return fallback,
    };
    if bad() {
        // As in `fault()`.
        if let Ok(first) = u32::try_from(first) {
            vma::zap_file(file, first, pages as u32);
        }
        return bindings::vm_fault_reason_VM_FAULT_NOPAGE;
    }
    inserted
}

/// # Safety
///
/// An ioctl of an open file of ours.
unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    from_result(|| {
        // SAFETY: An open file of ours.
        let store: Arc<Store> = unsafe { store(file) }.into();
        // SAFETY: As above.
        let (readable, writable) = unsafe {
            (
                ext::pmskb_file_mode_has(file, false),
                ext::pmskb_file_mode_has(file, true),
            )
        };
        match cmd {
            ext::pmskb_cmd_PMSKB_CMD_INFO => {
                let info = Plain(store.info()?);
                let size = core::mem::size_of_val(&info);
                let mut to = UserSlice::new(UserPtr::from_addr(arg), size).writer();
                to.write(&info)?;
                Ok(0)
            }
            ext::pmskb_cmd_PMSKB_CMD_ATTACH_SOCKET
            | ext::pmskb_cmd_PMSKB_CMD_SUBMIT
            | ext::pmskb_cmd_PMSKB_CMD_COMPACT
            | ext::pmskb_cmd_PMSKB_CMD_ALLOC
                if !writable =>
            {
                Err(EACCES)
            }
            ext::pmskb_cmd_PMSKB_CMD_ATTACH_SOCKET => {
                let fd = UserSlice::new(UserPtr::from_addr(arg), 4).reader().read()?;
                attach_socket(store, fd)
            }
            ext::pmskb_cmd_PMSKB_CMD_COMPACT => {
                let mut args: Plain<ext::pmskb_compact> = read_arg(arg)?;
                store.compact(&mut args.0)?;
                write_arg(arg, &args)
            }
            ext::pmskb_cmd_PMSKB_CMD_SCRUB => {
                let mut args: Plain<ext::pmskb_scrub> = read_arg(arg)?;
                let mut bad = KVVec::new();
                let to = UserPtr::from_addr(args.0.bad as usize);
                store.scrub(&mut args.0, &mut bad)?;
                let size = bad.len() * core::mem::size_of::<ext::pmskb_scrub_bad>();
                let mut to = UserSlice::new(to, size).writer();
                for found in &bad {
                    to.write(found)?;
                }
                write_arg(arg, &args)
            }
            ext::pmskb_cmd_PMSKB_CMD_OPEN if !readable => Err(EACCES),
            ext::pmskb_cmd_PMSKB_CMD_OPEN => {
                object::ioctl(&store, UserPtr::from_addr(arg))?;
                Ok(0)
            }
            ext::pmskb_cmd_PMSKB_CMD_ALLOC => {
                buffer::ioctl(&store, UserPtr::from_addr(arg))?;
                Ok(0)
            }
            ext::pmskb_cmd_PMSKB_CMD_SUBMIT => {
                crate::submit::ioctl(&store, UserPtr::from_addr(arg))?;
                Ok(0)
            }
            _ => Err(ENOTTY),
        }
    })
}

/// `PMSKB_IOC_SUBMIT` as a command of io_uring, done when this returns.
///
/// It runs in the task that submits, under the mutex of its ring; or in one of io_uring's threads,
/// a worker or the one that polls the ring. Those threads share memory and descriptors with the
/// task that made them, so that pointers mean what they mean there, and `fd` of an operation is a
/// descriptor of that task. With the ring's mutex held other locks are taken as `ioctl()` takes
/// them, and nobody takes the ring's under one of ours.
///
/// `EAGAIN`, when the ring's task should not wait, makes io_uring call again from a worker: only
/// before anything was done, and only if there is something to wait for.
///
/// # Safety
///
/// A command of an open file of ours, which is being issued.
unsafe extern "C" fn uring_cmd(cmd: *mut bindings::io_uring_cmd, issue_flags: c_uint) -> c_int {
    from_result(|| {
        let mut facts = ext::pmskb_uring_facts::default();
        // SAFETY: It is being issued, so its sqe is there to be read.
        unsafe { ext::pmskb_uring_facts(cmd.cast(), issue_flags, &mut facts) };
        if facts.op != ext::pmskb_cmd_PMSKB_CMD_SUBMIT {
            return Err(errno(bindings::EOPNOTSUPP));
        }
        if facts.flags != 0 || facts.reserved != 0 {
            return Err(EINVAL);
        }
        // SAFETY: The request has a reference to the file until it is done, wherever it runs.
        if !unsafe { ext::pmskb_file_mode_has(facts.file, true) } {
            return Err(EACCES);
        }
        // SAFETY: An open file of ours.
        let store: Arc<Store> = unsafe { store(facts.file) }.into();
        if !facts.may_wait && store.is_busy() {
            return Err(EAGAIN);
        }
        crate::submit::ioctl(&store, UserPtr::from_addr(facts.arg as usize))?;
        Ok(0)
    })
}

/// The structure that an ioctl's argument points to.
fn read_arg<T>(arg: c_ulong) -> Result<Plain<T>>
where
    Plain<T>: kernel::transmute::FromBytes,
{
    let size = core::mem::size_of::<T>();
    UserSlice::new(UserPtr::from_addr(arg), size)
        .reader()
        .read()
}

/// Gives the structure back.
fn write_arg<T>(arg: c_ulong, value: &Plain<T>) -> Result<c_long>
where
    Plain<T>: kernel::transmute::AsBytes,
{
    let size = core::mem::size_of::<T>();
    UserSlice::new(UserPtr::from_addr(arg), size)
        .writer()
        .write(value)?;
    Ok(0)
}

/// `PMSKB_IOC_ATTACH_SOCKET`.
fn attach_socket(store: Arc<Store>, fd: i32) -> Result<c_long> {
    crate::attach::attach_fd(&store, fd)?;
    Ok(0)
}
