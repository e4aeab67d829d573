// SPDX-License-Identifier: GPL-2.0

//! A formatted region, attached.
//!
//! # Going away
//!
//! A store ends in one of two ways. *Detach*: refused with `EBUSY` while a file is open or a
//! socket attached; then it waits a bounded time for frames that the stack or a pipe still has,
//! and after that nothing of the store is left. *Removal* (the driver is unbound): cannot be
//! refused, and when [`removed`] returns neither the memory nor its struct pages exist any more.
//! So the store turns first to stopping, where nothing new begins (placement sees it under RCU,
//! everybody else by [`Store::enter`]); then it waits for those inside, zaps all mappings, has
//! the sockets let go ([`set_removal_hook`]), waits until no page is referenced, however long,
//! and is dead. A dead store answers `EIO` and is there until it is detached, as a file system
//! whose disk went is there until it is unmounted.
//!
//! # Lock order
//!
//! 1. `ADMIN`: format, attach, detach, removal. Held long, never under a device lock that removal
//!    may hold: a region is claimed before `ADMIN` is taken.
//! 2. `STORES`: the list of stores. Held for a moment.
//! 3. `Store::core`: one writer of the store.
//! 4. The locks of frames and heads, with bottom halves disabled.

use crate::{
    bindings as ext,
    frame::FrameArea,
    head::HeadArea,
    host::sleep_ms,
    lock::SameCpu,
    pm,
    region::{Failure, Holder, Media, Region},
    vma::Mappings,
};
use core::ops::{Deref, DerefMut};
use kernel::{
    bindings, new_mutex,
    prelude::*,
    sync::{
        atomic::{Atomic, Full, Relaxed},
        Arc, Mutex, MutexGuard, SetOnce,
    },
    workqueue::{impl_has_work, new_work, Work},
};

/// The core's store over a region and its frames.
pub(crate) type Core = pm::Store<Media, Arc<FrameArea>, KVVec<u64>>;

/// Most stores at once.
const MAX_STORES: usize = 256;
/// What a detach waits for frames, unless told otherwise; and at most.
const DETACH_MS: u32 = 2000;
const DETACH_MAX_MS: u32 = 60_000;

/// In [`Store::files`]: none is open, and none can be opened.
const SHUT: i32 = i32::MIN / 2;

const LIVE: u32 = 0;
const STOPPING: u32 = 1;
const DEAD: u32 = 2;

kernel::sync::global_lock! {
    // SAFETY: Initialised by `init()`, at module init, before anything else here.
    /// One administrator at a time.
    unsafe(uninit) static ADMIN: Mutex<()> = ();
}

kernel::sync::global_lock! {
    // SAFETY: Initialised by `init()`, at module init, before anything else here.
    /// All stores.
    unsafe(uninit) static STORES: Mutex<KVec<Arc<Store>>> = KVec::new();
}

static REMOVAL_HOOK: SetOnce<fn(&Arc<Store>)> = SetOnce::new();

/// Sets what is called when a store's memory is about to go: sockets must give back every page
/// reference that they can (queued packets included); their holds do not matter. Process context,
/// may sleep, holds the lock of the store's device. At module init, once.
pub(crate) fn set_removal_hook(hook: fn(&Arc<Store>)) {
    REMOVAL_HOOK.populate(hook);
}

/// To be called once, at module init.
pub(crate) fn init() {
    crate::region::init();
    // SAFETY: Called once, says the comment.
    unsafe { ADMIN.init() };
    // SAFETY: As above.
    unsafe { STORES.init() };
}

/// To be called once, when the module goes: a static is never dropped.
pub(crate) fn exit() {
    *STORES.lock() = KVec::new();
    crate::region::exit();
}

/// What `struct pmskb_counters` has, of a socket or a store. Any context.
#[derive(Default)]
#[allow(missing_docs)]
pub(crate) struct Counters {
    pub(crate) placed: Count,
    pub(crate) placed_bytes: Count,
    pub(crate) unplaced: [Count; ext::pmskb_unplaced_PMSKB_UNPLACED_NR as usize],
    pub(crate) copied_bytes: Count,
    pub(crate) derived: Count,
    pub(crate) hardware: Count,
    pub(crate) computed: Count,
    pub(crate) computed_bytes: Count,
    pub(crate) mismatch: Count,
    pub(crate) refused: Count,
    pub(crate) logged_bytes: Count,
    pub(crate) heads_in_dram: Count,
}

/// A number that only grows, relaxed.
pub(crate) struct Count(Atomic<u64>);

impl Default for Count {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Count {
    /// Adds.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.add(n, Relaxed);
    }

    /// The number now.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Counters {
    /// A packet went on unplaced, for a reason (`enum pmskb_unplaced`).
    pub(crate) fn unplaced(&self, reason: u32) {
        if let Some(count) = self.unplaced.get(reason as usize) {
            count.add(1);
        }
    }

    /// All, as user space sees them.
    pub(crate) fn get(&self) -> ext::pmskb_counters {
        let mut out = ext::pmskb_counters {
            placed: self.placed.get(),
            placed_bytes: self.placed_bytes.get(),
            copied_bytes: self.copied_bytes.get(),
            derived: self.derived.get(),
            hardware: self.hardware.get(),
            computed: self.computed.get(),
            computed_bytes: self.computed_bytes.get(),
            mismatch: self.mismatch.get(),
            refused: self.refused.get(),
            logged_bytes: self.logged_bytes.get(),
            heads_in_dram: self.heads_in_dram.get(),
            ..Default::default()
        };
        for (to, from) in out.unplaced.iter_mut().zip(&self.unplaced) {
            *to = from.get();
        }
        out
    }
}

/// A formatted region, attached.
#[pin_data]
pub(crate) struct Store {
    minor: u32,
    geometry: pm::Geometry,
    uuid: [u8; 16],
    label: [u8; 32],
    /// [`LIVE`], [`STOPPING`] or [`DEAD`].
    state: Atomic<u32>,
    /// Those inside: [`Entered`].
    users: Atomic<i32>,
    /// Open files, or [`SHUT`].
    files: Atomic<i32>,
    /// Attached sockets.
    sockets: Atomic<i32>,
    /// Tokens that sockets hold.
    tokens: Atomic<i64>,
    /// Submit calls.
    pub(crate) submits: Count,
    /// Over all sockets.
    pub(crate) counters: Counters,
    /// It was attached to be read.
    read_only: bool,
    crc32c: bool,
    /// What the last compaction could not gain, bytes.
    pub(crate) left_over: Atomic<u64>,
    /// See `upkeep.rs`.
    #[pin]
    work: Work<Store>,
    mappings: Mappings,
    /// None once it was closed.
    #[pin]
    core: Mutex<Option<Core>>,
    // Dropped in this order: what touches pages before what keeps the region.
    frames: Arc<FrameArea>,
    heads: Option<Arc<HeadArea>>,
    region: Arc<Region>,
}

impl_has_work! {
    impl HasWork<Self> for Store { self.work }
}

/// Somebody inside a store that was live: its memory and pages stay until this is dropped.
///
/// Any context. May be nested, but then the inner one may fail where the outer did not.
pub(crate) struct Entered<'a>(&'a Store);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Full);
    }
}

/// The core's store, locked, of a store that was live.
pub(crate) struct CoreGuard<'a> {
    // In this order: the lock goes before the right to touch the memory.
    _cpu: SameCpu,
    core: MutexGuard<'a, Option<Core>>,
    _entered: Entered<'a>,
}

impl CoreGuard<'_> {
    /// The core's store; `EIO` if it was closed.
    pub(crate) fn get(&mut self) -> Result<&mut Core> {
        (*self.core).as_mut().ok_or(EIO)
    }
}

impl Drop for CoreGuard<'_> {
    fn drop(&mut self) {
        // The next one may be on another CPU, whose fences do not cover what this one wrote back.
        if let Some(core) = (*self.core).as_mut() {
            core.settle();
        }
    }
}

impl Store {
    /// N of `/dev/pmskbN`.
    pub(crate) fn minor(&self) -> u32 {
        self.minor
    }

    /// Name for machines.
    pub(crate) fn uuid(&self) -> &[u8; 16] {
        &self.uuid
    }

    /// Name for people, NUL padded.
    pub(crate) fn label(&self) -> &[u8; 32] {
        &self.label
    }

    /// Where the areas are.
    pub(crate) fn geometry(&self) -> &pm::Geometry {
        &self.geometry
    }

    /// The region. Touch it only inside ([`Store::enter`]).
    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The frames of the data area.
    pub(crate) fn frames(&self) -> &Arc<FrameArea> {
        &self.frames
    }

    /// The head area; none if heads are in DRAM.
    pub(crate) fn heads(&self) -> Option<&Arc<HeadArea>> {
        self.heads.as_ref()
    }

    /// Whether it was attached to be read.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether all puts have a CRC32C.
    pub(crate) fn crc32c(&self) -> bool {
        self.crc32c
    }

    /// All mappings.
    pub(crate) fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// Whether packets may be placed: frames and heads allocated, pages referenced. Any context,
    /// under RCU until that is done (as softirq and netfilter hooks are).
    #[inline]
    pub(crate) fn is_live(&self) -> bool {
        self.state.load(Relaxed) == LIVE
    }

    /// Goes inside, for everything that is not under RCU. Any context. `EIO` if the store is
    /// going or gone.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        // Who is refused anyway must not keep a removal waiting.
        if self.state.load(Relaxed) != LIVE {
            return Err(EIO);
        }
        self.users.fetch_add(1, Full);
        let entered = Entered(self);
        if self.state.load(Relaxed) == LIVE {
            Ok(entered)
        } else {
            Err(EIO)
        }
    }

    /// Goes inside and locks the core's store. Process context, sleeps. `EIO` as [`Self::enter`].
    pub(crate) fn core(&self) -> Result<CoreGuard<'_>> {
        let entered = self.enter()?;
        let core = self.core.lock();
        Ok(CoreGuard {
            _cpu: SameCpu::new(),
            core,
            _entered: entered,
        })
    }

    /// Whether somebody has the core's store locked now, so that who wants it would wait: for a
    /// commit of others, or a step of compaction. No promise for the moment after. Process context.
    pub(crate) fn is_busy(&self) -> bool {
        self.core.try_lock().is_none()
    }

    /// A socket (or the child of one) is attached: the store cannot be detached until
    /// [`Self::socket_detached`]. Any context. `EIO` if the store is going or gone, `EROFS` if it
    /// may only be read; then nothing was counted.
    pub(crate) fn socket_attached(&self) -> Result {
        if self.read_only {
            return Err(crate::errno(pm::Error::ReadOnly));
        }
        self.sockets.fetch_add(1, Full);
        if self.state.load(Relaxed) != LIVE {
            self.sockets.fetch_sub(1, Full);
            return Err(EIO);
        }
        Ok(())
    }

    /// The opposite of [`Self::socket_attached`]. Any context, as dropping the `Arc` is: the
    /// region is closed by the detach, and not by the last reference.
    pub(crate) fn socket_detached(&self) {
        self.sockets.fetch_sub(1, Full);
    }

    /// Tokens made (or, negative, gone). Any context.
    pub(crate) fn add_tokens(&self, n: i64) {
        self.tokens.add(n, Relaxed);
    }

    /// A file is opened. `ENODEV` if the store is going or gone.
    pub(crate) fn file_opened(&self) -> Result {
        if self.files.fetch_add(1, Full) < 0 || self.state.load(Relaxed) != LIVE {
            self.files.fetch_sub(1, Full);
            return Err(ENODEV);
        }
        Ok(())
    }

    /// A file is closed.
    pub(crate) fn file_closed(&self) {
        self.files.fetch_sub(1, Full);
    }

    /// The store that `fd` is open on, for writing.
    ///
    /// `EBADF` if it is not open, `EINVAL` if it is not a store, `EACCES` if it is not open for
    /// writing. Process context.
    pub(crate) fn from_fd(fd: i32) -> Result<Arc<Store>> {
        let fd = u32::try_from(fd).map_err(|_| EBADF)?;
        let file = kernel::fs::LocalFile::fget(fd).map_err(|_| EBADF)?;
        let store = crate::device::store_of(&file).ok_or(EINVAL)?;
        // SAFETY: `file` is a reference to an open file.
        if !unsafe { ext::pmskb_file_mode_has(file.as_ptr(), true) } {
            return Err(EACCES);
        }
        Ok(store)
    }

    /// All about the store, as user space sees it. Process context.
    pub(crate) fn info(&self) -> Result<ext::pmskb_store_info> {
        // To the end: counting looks at struct pages.
        let _inside = self.enter()?;
        // Nothing says when the stack lets go of a frame.
        self.frames.reclaim_all();
        if self.frames.counts().limbo > 0 {
            // What idle CPUs have freed, but not yet given back.
            flush_deferred();
            self.frames.reclaim_all();
        }
        let (stats, counts, failed) = {
            // Both under one lock: they are to add up.
            let mut core = self.core()?;
            let core: &mut Core = core.get()?;
            (core.stats(), self.frames.counts(), core.read_only())
        };
        let (heads_total, heads_free) = self.heads.as_ref().map_or((0, 0), |h| h.counts());
        let (lines, fences) = self.region.written_back();
        let used = stats.record_frames + stats.list_frames + stats.index_frames;
        let used = used + u64::from(counts.payload);
        let geo = &self.geometry;
        let limits = &self.frames.limits;
        let mut label = [0; 32];
        label.copy_from_slice(&self.label);
        Ok(ext::pmskb_store_info {
            uuid: self.uuid,
            label,
            minor: self.minor,
            flags: [
                (failed, ext::PMSKB_STORE_READ_ONLY),
                (self.crc32c, ext::PMSKB_STORE_CRC32C),
            ]
            .iter()
            .fold(0, |all, (set, flag)| if *set { all | flag } else { all }),
            region_len: geo.region_len,
            map_len: geo.region_len,
            head_off: geo.head_off,
            head_len: geo.head_len,
            data_off: geo.data_off,
            frames_total: counts.total.into(),
            frames_free: counts.free.into(),
            frames_payload: counts.payload.into(),
            frames_record: stats.record_frames,
            frames_list: stats.list_frames,
            frames_index: stats.index_frames,
            // A bad frame that is in use still is in `used`, too.
            frames_held: u64::from(counts.owned + counts.held + counts.bad_held)
                .saturating_sub(used),
            frames_limbo: counts.limbo.into(),
            frames_bad: counts.bad.into(),
            frames_reserve: self.frames.reserve().into(),
            heads_total: heads_total.into(),
            heads_free: heads_free.into(),
            records: stats.records,
            keys: stats.keys,
            live_bytes: stats.live_bytes,
            record_bytes: stats.record_lines * pm::LINE_SIZE,
            fragmented_bytes: counts.slack,
            reclaimable_bytes: stats.empty_frames * pm::FRAME_SIZE + stats.pending_bytes,
            trunc_seq: stats.trunc_seq,
            moved_records: stats.moved_records,
            moved_bytes: stats.moved_bytes,
            durable_seq: stats.durable_seq,
            sockets: self.sockets.load(Relaxed).max(0) as u64,
            tokens: self.tokens.load(Relaxed).max(0) as u64,
            lines_flushed: lines,
            fences,
            submits: self.submits.get(),
            counters: self.counters.get(),
            frames_sockets: self.frames.charged().into(),
            quota_store_frames: limits.store_frames.load(Relaxed).into(),
            quota_socket_frames: limits.socket_frames.load(Relaxed).into(),
            quota_socket_tokens: limits.socket_tokens.load(Relaxed).into(),
        })
    }

    /// Waits for all who are inside, and for placements under RCU. The state is not live.
    fn wait_for_users(&self) {
        // SAFETY: May sleep here.
        unsafe { ext::synchronize_net() };
        while self.users.load(Relaxed) > 0 {
            sleep_ms(1);
        }
    }

    /// Waits for what `upkeep.rs` has queued; none is queued any more. The state is not live.
    fn flush_work(&self) {
        // SAFETY: The work is part of `self`, and was initialised with it.
        unsafe { bindings::flush_work(Work::raw_get(&raw const self.work)) };
    }

    /// How many pages the stack, pipes or heads still have.
    fn busy(&self) -> u32 {
        self.frames.busy() + self.heads.as_ref().map_or(0, |h| h.busy())
    }

    /// Drops the base references of all pages. An error says that some are in use; those of the
    /// frames may be dropped then.
    fn release(&self) -> Result<(), u32> {
        self.frames.release()?;
        if let Some(heads) = &self.heads {
            heads.release()?;
        }
        Ok(())
    }

    /// The memory is about to go. See "Going away".
    fn remove(self: &Arc<Self>) {
        self.state.store(STOPPING, Relaxed);
        self.wait_for_users();
        self.mappings.zap_all();
        if let Some(hook) = REMOVAL_HOOK.as_ref() {
            hook(self);
        }
        let mut waited = 0u32;
        flush_deferred();
        while let Err(busy) = self.release() {
            flush_deferred();
            if waited % 10_000 == 0 && waited != 0 {
                pr_warn!(
                    "pmskb{}: device removed, {busy} pages still in use\n",
                    self.minor
                );
            }
            sleep_ms(50);
            waited = waited.saturating_add(50);
        }
        self.region.set_gone();
        self.state.store(DEAD, Relaxed);
        pr_info!("pmskb{}: device removed\n", self.minor);
    }
}

/// Gives back the pages of skbs that were freed, but only onto a CPU's list. May sleep.
fn flush_deferred() {
    // Without memory for it they come back with the next traffic.
    // SAFETY: Called where it may sleep.
    let _ = unsafe { ext::pmskb_flush_deferred_skbs() };
}

/// A region's memory failed. See `region.rs` for the context.
fn failed(holder: &Arc<Holder>, failure: Failure) {
    let admin = ADMIN.lock();
    let store = {
        let stores = STORES.lock();
        let found = stores.iter().find(|s| s.region.held_by(holder));
        found.cloned()
    };
    // Without a store: an attach in the making sees `is_removing()` when it gets `ADMIN`.
    let Some(store) = store else {
        return;
    };
    match failure {
        Failure::Removal => {
            // So that nobody detaches it meanwhile.
            store.state.store(STOPPING, Relaxed);
            // Others need not wait for its pages.
            drop(admin);
            store.remove();
        }
        Failure::Media(offset, len) => {
            let Some((first, count)) = store.region.overlap(offset, len) else {
                return;
            };
            pr_err!(
                "pmskb{}: media error in {count} pages from page {first}\n",
                store.minor
            );
            for page in first..first.saturating_add(count) {
                store.region.set_bad(page);
                store.frames.mark_bad(pm::Frame(page));
            }
            // What is mapped there faults from now on.
            store.mappings.zap(first.into(), count.into());
        }
    }
}

/// Claims a region for [`format`] or [`attach`]: by descriptor. Call it without locks.
pub(crate) fn claim(fd: i32) -> Result<Region> {
    Region::claim(fd, failed)
}

/// As [`claim`], by path.
pub(crate) fn claim_path(path: &CStr) -> Result<Region> {
    Region::claim_path(path, failed)
}

/// Formats a region. Durable on return. Process context.
///
/// `EEXIST` if it holds anything and `force` is not set; else as `pm::format`.
pub(crate) fn format(
    region: Region,
    params: &pm::FormatParams<'_>,
    force: bool,
) -> Result<pm::Superblock> {
    let _admin = ADMIN.lock();
    let _cpu = SameCpu::new();
    if region.is_removing() {
        return Err(ENODEV);
    }
    if !force {
        match pm::probe(&region) {
            Ok(_) | Err(pm::Error::Version) | Err(pm::Error::Damaged) => {
                pr_info!("not formatted: the region holds a store\n");
                return Err(EEXIST);
            }
            Err(pm::Error::Io) => return Err(EIO),
            Err(_) => {}
        }
        if !pm::looks_blank(&region).map_err(crate::errno)? {
            pr_info!("not formatted: the region is not blank\n");
            return Err(EEXIST);
        }
    }
    pm::format(&region, params).map_err(crate::errno)
}

/// How a region is to be attached.
#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    /// To be read only.
    pub(crate) read_only: bool,
    /// All puts have a CRC32C.
    pub(crate) crc32c: bool,
}

/// Attaches the store in a region. `publish` makes its device; if that fails, so does this.
/// Process context.
///
/// Errors: those of `pm::Store::recover` (`EMEDIUMTYPE` no store, `EUCLEAN` damaged, `EOPNOTSUPP`
/// too new), `EADDRINUSE`, `ENFILE` too many stores, `ENOMEM`.
pub(crate) fn attach<T>(
    region: Region,
    how: How,
    publish: impl FnOnce(&Arc<Store>) -> Result<T>,
) -> Result<T> {
    let region = Arc::new(region, GFP_KERNEL)?;
    let _admin = ADMIN.lock();
    if region.is_removing() {
        return Err(ENODEV);
    }
    let minor = {
        let stores = STORES.lock();
        let free = |minor: &u32| stores.iter().all(|store| store.minor != *minor);
        (0..MAX_STORES as u32).find(free).ok_or(ENFILE)?
    };
    let probe = pm::probe(&*region).map_err(crate::errno)?;
    let geo = probe.superblock.geometry;
    let frames = FrameArea::new(&region, geo.first_frame(), geo.data_frames())?;
    let heads = match geo.head_len {
        0 => None,
        len => {
            let first = pm::Frame::of(geo.head_off).ok_or(EINVAL)?;
            let count = u32::try_from(len / pm::FRAME_SIZE)?;
            Some(HeadArea::new(&region, first.0, count)?)
        }
    };
    let work = KVVec::from_elem(0u64, Core::WORK_WORDS, GFP_KERNEL)?;
    let options = pm::RecoverOptions {
        read_only: probe.read_only || how.read_only,
    };
    let media = Media(region.clone());
    let (core, report) = {
        let _cpu = SameCpu::new();
        let list = |count| KVVec::from_elem(pm::IndexEntry::default(), count, GFP_KERNEL).ok();
        Core::recover(media, frames.clone(), work, list, options).map_err(crate::errno)?
    };
    let mappings = Mappings::new()?;
    let store = Arc::pin_init(
        pin_init!(Store {
            minor,
            geometry: geo,
            uuid: probe.superblock.uuid,
            label: probe.superblock.label,
            state: Atomic::new(LIVE),
            users: Atomic::new(0),
            files: Atomic::new(0),
            sockets: Atomic::new(0),
            tokens: Atomic::new(0),
            submits: Count::default(),
            counters: Counters::default(),
            read_only: options.read_only,
            crc32c: how.crc32c,
            left_over: Atomic::new(0),
            work <- new_work!("pmskb_upkeep"),
            mappings,
            core <- new_mutex!(Some(core), "pmskb_core"),
            frames,
            heads,
            region,
        }),
        GFP_KERNEL,
    )?;
    STORES.lock().push(store.clone(), GFP_KERNEL)?;
    let published = publish(&store).inspect_err(|_| {
        forget(&store);
        if let Some(core) = store.core.lock().take() {
            let _cpu = SameCpu::new();
            // Nothing was staged; whatever it answers, the store is as it was.
            let _ = core.close();
        }
    })?;
    // Like a mounted file system: the module stays while there is a store.
    // SAFETY: We are running in it.
    unsafe { bindings::__module_get(crate::this_module()) };
    pr_info!(
        "pmskb{minor}: attached, {} records, {} MiB\n",
        report.records,
        geo.region_len >> 20
    );
    if report.damaged_frames + report.bad_extents + report.unreadable > 0 {
        pr_warn!(
            "pmskb{minor}: {} damaged frames, {} bad extents, {} unreadable\n",
            report.damaged_frames,
            report.bad_extents,
            report.unreadable
        );
    }
    Ok(published)
}

fn forget(store: &Arc<Store>) {
    STORES.lock().retain(|other| !Arc::ptr_eq(other, store));
}

/// Detaches a store. `unpublish` removes its device. Process context.
///
/// `ENODEV` if there is no such store; `EINTR`; `EBUSY` while it has open files or attached sockets, while
/// its device is being removed, or if frames are still in use after `timeout_ms`.
pub(crate) fn detach(minor: u32, timeout_ms: u32, unpublish: impl FnOnce(&Arc<Store>)) -> Result {
    let _admin = ADMIN.lock();
    let store = {
        let stores = STORES.lock();
        let found = stores.iter().find(|s| s.minor == minor);
        found.cloned().ok_or(ENODEV)?
    };
    let dead = match store.state.load(Relaxed) {
        LIVE => false,
        DEAD => true,
        _ => return Err(EBUSY),
    };
    let used = || store.sockets.load(Relaxed) > 0;
    // Before the state changes: whoever has the store open, or a socket of it, shall not notice a
    // detach that is refused. Sockets come by way of files, or of other sockets.
    if used() || store.files.cmpxchg(0, SHUT, Full).is_err() {
        return Err(EBUSY);
    }
    let back = |error| {
        if !dead {
            store.state.store(LIVE, Relaxed);
        }
        store.files.fetch_sub(SHUT, Full);
        Err(error)
    };
    if used() {
        return back(EBUSY);
    }
    if !dead {
        store.state.xchg(STOPPING, Full);
    }
    if used() {
        return back(EBUSY);
    }
    // A dead store's, too: whoever dropped a reference in a softirq was not the last.
    store.wait_for_users();
    store.flush_work();
    if !dead {
        let mut left = match timeout_ms {
            0 => DETACH_MS,
            ms => ms.min(DETACH_MAX_MS),
        };
        while store.busy() > 0 {
            flush_deferred();
            if store.busy() == 0 {
                break;
            }
            if left == 0 {
                pr_info!(
                    "pmskb{minor}: not detached: {} pages in use\n",
                    store.busy()
                );
                return back(EBUSY);
            }
            if kernel::current!().signal_pending() {
                return back(EINTR);
            }
            let now = left.min(20);
            sleep_ms(now);
            left -= now;
        }
    }
    let geo = store.geometry;
    unpublish(&store);
    if let Some(core) = store.core.lock().take() {
        if !dead {
            let _cpu = SameCpu::new();
            let (closed, _, _, _) = core.close();
            if closed.is_err() {
                pr_err!("pmskb{minor}: error on detach\n");
            }
        }
    }
    // Nobody takes references any more, so what may be seen here is only a glance.
    while let Err(busy) = store.release() {
        kernel::pr_warn_once!("pmskb{minor}: {busy} pages in use\n");
        sleep_ms(1);
    }
    forget(&store);
    if !dead && !store.read_only {
        // Kernel pointers are nobody else's business.
        store.region.clear(geo.head_off, geo.head_len);
    }
    store.region.close();
    pr_info!("pmskb{minor}: detached\n");
    // SAFETY: Taken at attach. The caller is in the module by an open control file.
    unsafe { bindings::module_put(crate::this_module()) };
    Ok(())
}

impl Deref for CoreGuard<'_> {
    type Target = Option<Core>;

    fn deref(&self) -> &Self::Target {
        &self.core
    }
}

impl DerefMut for CoreGuard<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.core
    }
}
