// SPDX-License-Identifier: GPL-2.0

//! Frames of the data area: who needs them, and who still looks at their pages.
//!
//! Two counts decide what becomes of a frame. Its *holds* are ours: the socket that fills it,
//! tokens, records. Its page's *references* are the network stack's. The core's `FrameTable`
//! counts the holds; when the last one goes, a frame stays in limbo until its page is idle, which
//! nothing signals.
//!
//! Lock order: the table's lock is innermost but for what the idle hook takes. It is held for a
//! bounded time, with bottom halves disabled.

use crate::{
    lock::{self, SpinLockBh},
    page::Pages,
    pm::{self, Counts, FrameState, FrameTable, Need},
    quota::{self, Account, Denied, Ledger, Limits},
    region::{self, Region, PAGE},
};
use core::ptr::NonNull;
use kernel::{
    bindings, c_str,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, SetOnce,
    },
};

pub(crate) use crate::pm::Frame;

/// What is called when a frame leaves limbo. See [`set_idle_hook`].
static IDLE_HOOK: SetOnce<fn(&FrameArea, Frame)> = SetOnce::new();

/// Sets what is called each time that reclaim finds a frame idle, whether it becomes free or
/// stays held, and for each frame at detach: nobody looks at its page any more, and its notes can
/// go. Any context, mostly under the table's lock: it must not call back into [`FrameArea`] but
/// for [`FrameArea::note`]. At module init, once.
pub(crate) fn set_idle_hook(hook: fn(&FrameArea, Frame)) {
    IDLE_HOOK.populate(hook);
}

/// The core's table of frames, and to whom they are charged.
struct Table {
    frames: FrameTable<KVVec<u64>>,
    ledger: Ledger,
}

impl Table {
    /// As [`FrameTable::alloc`].
    fn alloc(
        &mut self,
        near: Option<Frame>,
        need: Need,
        mut idle: impl FnMut(Frame) -> bool,
    ) -> Option<Frame> {
        let ledger = &mut self.ledger;
        let frame = self
            .frames
            .alloc(near, need, |frame| ledger.look(frame, || idle(frame)));
        self.settle(frame);
        frame
    }

    /// As [`FrameTable::reclaim`].
    fn reclaim(&mut self, budget: u32, mut idle: impl FnMut(Frame) -> bool) {
        let ledger = &mut self.ledger;
        self.frames
            .reclaim(budget, |frame| ledger.look(frame, || idle(frame)));
        self.settle(None);
    }

    /// What was found idle is nobody's, unless it is held. `taken` was free for a moment.
    fn settle(&mut self, taken: Option<Frame>) {
        while let Some(frame) = self.ledger.next_found() {
            let state = self.frames.state(frame);
            if taken == Some(frame) || matches!(state, Some((FrameState::Free, _))) {
                self.ledger.forget(frame, false);
            }
        }
    }

    /// As [`FrameTable::hold`].
    fn hold(&mut self, frame: Frame, bytes: u32) -> pm::Result<()> {
        let before = self.frames.used(frame);
        self.frames.hold(frame, bytes)?;
        if before == 0 && bytes > 0 {
            self.ledger.used(frame);
        }
        Ok(())
    }

    /// As [`FrameTable::unhold`].
    fn unhold(&mut self, frame: Frame, bytes: u32) -> pm::Result<u32> {
        let before = self.frames.used(frame);
        let left = self.frames.unhold(frame, bytes)?;
        if before > 0 && self.frames.used(frame) == 0 {
            self.ledger.unused(frame, left > 0);
        }
        Ok(left)
    }

    /// As [`FrameTable::mark_bad`].
    fn mark_bad(&mut self, frame: Frame) -> pm::Result<()> {
        let used = self.frames.used(frame) > 0;
        self.frames.mark_bad(frame)?;
        self.ledger.forget(frame, used);
        Ok(())
    }
}

/// The frames of a store's data area.
#[pin_data]
pub(crate) struct FrameArea {
    first: u32,
    /// Before `pages` in the order of drops: it does not touch pages.
    #[pin]
    table: SpinLockBh<Table>,
    /// What sockets may have.
    pub(crate) limits: Limits,
    notes: KVVec<Atomic<usize>>,
    pages: Pages,
}

impl FrameArea {
    /// All frames free, each page with its base reference; bad ones never given out.
    ///
    /// Process context. Errors: those of [`Pages::new`], `ENOMEM`.
    pub(crate) fn new(region: &Arc<Region>, first: Frame, count: u32) -> Result<Arc<Self>> {
        Self::with(region, first, count, Pages::new)
    }

    /// [`Self::new`]; `pages` takes the base references.
    fn with(
        region: &Arc<Region>,
        first: Frame,
        count: u32,
        pages: impl FnOnce(Arc<Region>, u32, u32) -> Result<Pages>,
    ) -> Result<Arc<Self>> {
        let words = FrameTable::<KVVec<u64>>::words(count);
        let buf = KVVec::from_elem(0u64, words, GFP_KERNEL)?;
        let frames = FrameTable::new(buf, first, count).map_err(crate::errno)?;
        let mut table = Table {
            frames,
            ledger: Ledger::new(first.0, count)?,
        };
        region.set_data(first.0, count);
        for at in first.0..first.0.saturating_add(count) {
            if region.is_bad(at) {
                table.mark_bad(Frame(at)).map_err(crate::errno)?;
            }
        }
        let mut notes = KVVec::with_capacity(count as usize, GFP_KERNEL)?;
        for _ in 0..count {
            notes.push(Atomic::new(0), GFP_KERNEL)?;
        }
        let pages = pages(region.clone(), first.0, count)?;
        Arc::pin_init(
            pin_init!(Self {
                first: first.0,
                table <- lock::new(table, c_str!("pmskb_frames"), static_lock_class!()),
                limits: Limits::new(count),
                notes,
                pages,
            }),
            GFP_KERNEL,
        )
    }

    fn index(&self, frame: Frame) -> Option<u32> {
        let at = frame.0.checked_sub(self.first)?;
        (at < self.pages.count()).then_some(at)
    }

    fn idle(&self, frame: Frame) -> bool {
        self.index(frame).is_some_and(|at| {
            self.pages.if_idle(at, || {
                if let Some(hook) = IDLE_HOOK.as_ref() {
                    hook(self, frame);
                }
            })
        })
    }

    /// A free frame, Owned, with one hold: the one after `near` if that is free. None when the
    /// store is full but for its reserve. Any context but hard interrupts.
    pub(crate) fn alloc(&self, near: Option<Frame>) -> Option<Frame> {
        if crate::inject::no_frame() {
            return None;
        }
        self.table
            .lock()
            .alloc(near, Need::New, |frame| self.idle(frame))
    }

    /// As [`Self::alloc`], for a socket that is charged for it and needs `more` frames in all.
    /// `over` is for one that may go over its limits. Any context but hard interrupts.
    pub(crate) fn take(
        &self,
        near: Option<Frame>,
        account: &Arc<Account>,
        more: u32,
        over: bool,
    ) -> Result<Frame, Denied> {
        if crate::inject::no_frame() {
            return Err(Denied::NoFrame);
        }
        let mut table = self.table.lock();
        if !over && table.ledger.room(account, &self.limits, more).is_err() {
            table.reclaim(quota::LOOKS, |frame| self.idle(frame));
            table.ledger.room(account, &self.limits, more)?;
        }
        let frame = table
            .alloc(near, Need::New, |frame| self.idle(frame))
            .ok_or(Denied::NoFrame)?;
        table.ledger.charge(frame, account);
        Ok(frame)
    }

    /// Frames that are charged to sockets. Any context but hard interrupts.
    pub(crate) fn charged(&self) -> u32 {
        self.table.lock().ledger.charged()
    }

    /// Looks at every frame in limbo once, so that the numbers are right. Process context.
    pub(crate) fn reclaim_all(&self) {
        self.reclaim(u32::MAX);
    }

    /// Looks at frames in limbo, at most so many. Process context.
    pub(crate) fn reclaim(&self, most: u32) {
        let mut left = self.counts().limbo.min(most);
        while left > 0 {
            // No more than the ledger has room for.
            let now = left.min(64);
            self.table.lock().reclaim(now, |frame| self.idle(frame));
            left -= now;
        }
    }

    /// One more hold. Any context but hard interrupts. `EINVAL` if the frame is free or not of
    /// this store.
    pub(crate) fn hold(&self, frame: Frame) -> Result {
        self.table.lock().hold(frame, 0).map_err(crate::errno)
    }

    /// One hold less; how many are left. With the last, the frame enters limbo. Any context but
    /// hard interrupts. `EINVAL` if there was none.
    pub(crate) fn unhold(&self, frame: Frame) -> Result<u32> {
        self.table.lock().unhold(frame, 0).map_err(crate::errno)
    }

    /// The owner lets go of a frame: with that its notes may go too, whoever still holds it. Any
    /// context but hard interrupts.
    pub(crate) fn leave(&self, frame: Frame) -> Result<u32> {
        self.table.lock().frames.leave(frame).map_err(crate::errno)
    }

    /// State and holds of a frame of this store. Any context but hard interrupts.
    pub(crate) fn state(&self, frame: Frame) -> Option<(FrameState, u32)> {
        self.table.lock().frames.state(frame)
    }

    /// The frame is never given out again.
    pub(crate) fn mark_bad(&self, frame: Frame) {
        let _ = self.table.lock().mark_bad(frame);
    }

    /// Whether a frame has a media error: nothing may be put there any more. Any context.
    #[inline]
    pub(crate) fn is_bad(&self, frame: Frame) -> bool {
        self.index(frame).is_some_and(|at| self.pages.is_bad(at))
    }

    /// Frames by state.
    pub(crate) fn counts(&self) -> Counts {
        self.table.lock().frames.counts()
    }

    /// Frames that only deletes, compaction and recovery get.
    pub(crate) fn reserve(&self) -> u32 {
        self.table.lock().frames.reserve()
    }

    /// The frame that a page is, if it is one of this store's. Any context.
    pub(crate) fn frame_of(&self, page: *const bindings::page) -> Option<Frame> {
        let at = self.pages.index_of(page)?;
        self.first.checked_add(at).map(Frame)
    }

    /// Where a frame is mapped in the kernel, [`PAGE`] bytes. Any context. Touch it only while the store
    /// is live, or with a reference on its page.
    pub(crate) fn addr(&self, frame: Frame) -> Option<NonNull<u8>> {
        self.pages.addr(self.index(frame)?)
    }

    /// Byte offset of a frame in the region.
    pub(crate) fn offset(&self, frame: Frame) -> u64 {
        frame.off()
    }

    /// The frame that has the byte at `offset` of the region, and where in it.
    pub(crate) fn frame_at(&self, offset: u64) -> Option<(Frame, usize)> {
        let frame = Frame::of(offset)?;
        self.index(frame)?;
        Some((frame, (offset % PAGE as u64) as usize))
    }

    /// Takes a reference on the page of any frame, held or not, as a pipe's buffer has one. Whoever
    /// has it puts it as any page's. Any context but hard interrupts; the store must be live.
    pub(crate) fn get_any_page(&self, frame: Frame) -> Option<NonNull<bindings::page>> {
        // Reclaim freezes the count of an idle frame for a moment, and would overwrite what is
        // counted meanwhile. It does so under this lock.
        let _table = self.table.lock();
        self.pages.get(self.index(frame)?)
    }

    /// Takes a reference on the page of a frame that the caller owns: one which is not in limbo, so
    /// that reclaim does not look at it. Whoever has it puts it as any page's. Any context; the
    /// store must be live (`Store::is_live()` under RCU, or `Store::enter()`).
    pub(crate) fn get_page(&self, frame: Frame) -> Option<NonNull<bindings::page>> {
        self.pages.get(self.index(frame)?)
    }

    /// CRC32C of `len` bytes at `off` of a frame, just written there and still in the cache. None if
    /// they are not within it. Any context; the store must be live, and the frame the caller's.
    pub(crate) fn crc32c(&self, frame: Frame, off: u32, len: u32) -> Option<u32> {
        let end = off.checked_add(len).filter(|end| *end as usize <= PAGE)?;
        let addr = self.addr(frame)?;
        // SAFETY: Within the frame, which is mapped; nobody else writes to it.
        let bytes = unsafe { core::slice::from_raw_parts(addr.as_ptr(), end as usize) };
        let bytes = bytes.get(off as usize..)?;
        Some(region::crc32c(0, bytes))
    }

    /// A word for each frame that belongs to `note.rs`. Zero at attach. Any context.
    pub(crate) fn note(&self, frame: Frame) -> Option<&Atomic<usize>> {
        self.notes.get(self.index(frame)? as usize)
    }

    /// Frames whose page somebody uses. Process context.
    pub(crate) fn busy(&self) -> u32 {
        self.pages.busy()
    }

    /// Drops all base references if all frames are idle; else how many are not. Process context;
    /// nobody may be taking new references.
    pub(crate) fn release(&self) -> Result<(), u32> {
        // Without the table's lock: there may be many. Reclaim finds no page idle any more.
        self.pages.release()?;
        let owners = self.table.lock().ledger.close();
        drop(owners);
        if let Some(hook) = IDLE_HOOK.as_ref() {
            for at in 0..self.pages.count() {
                if self
                    .notes
                    .get(at as usize)
                    .is_some_and(|n| n.load(Relaxed) != 0)
                {
                    hook(self, Frame(self.first + at));
                }
            }
        }
        Ok(())
    }
}

impl pm::Frames for Arc<FrameArea> {
    fn alloc(&self, near: Option<Frame>, need: Need) -> Option<Frame> {
        if need == Need::New && crate::inject::no_frame() {
            return None;
        }
        self.table
            .lock()
            .alloc(near, need, |frame| self.idle(frame))
    }

    fn hold(&self, frame: Frame, bytes: u32) -> pm::Result<()> {
        self.table.lock().hold(frame, bytes)
    }

    fn unhold(&self, frame: Frame, bytes: u32) -> pm::Result<u32> {
        self.table.lock().unhold(frame, bytes)
    }

    fn claim(&self, frame: Frame, bytes: u32) -> pm::Result<()> {
        self.table.lock().frames.claim(frame, bytes)
    }

    fn used(&self, frame: Frame) -> u32 {
        self.table.lock().frames.used(frame)
    }

    fn holds(&self, frame: Frame) -> u32 {
        let state = self.table.lock().frames.state(frame);
        state.map_or(0, |(_, holds)| holds)
    }
}

#[kunit_tests(pmskb_frame)]
mod tests {
    use super::*;
    use crate::{
        note::{self, Note},
        region::synthetic::{references, region, PAGES},
    };

    const FIRST: u32 = 2;
    const COUNT: u32 = PAGES - FIRST;

    fn area() -> Result<(Arc<Region>, Arc<FrameArea>)> {
        let region = region()?;
        let area = FrameArea::with(&region, Frame(FIRST), COUNT, Pages::synthetic)?;
        Ok((region, area))
    }

    fn put(page: NonNull<bindings::page>) {
        // SAFETY: The caller has a reference over the base reference.
        unsafe { crate::bindings::pmskb_page_put(page.as_ptr()) };
    }

    #[test]
    fn each_frame_is_given_out_once_and_the_reserve_stays() -> Result {
        let (region, area) = area()?;
        let mut given = [false; PAGES as usize];
        let mut near = None;
        for nr in 0..COUNT - area.reserve() {
            let frame = area.alloc(near).ok_or(ENOMEM)?;
            assert!(frame.0 >= FIRST && !given[frame.0 as usize]);
            given[frame.0 as usize] = true;
            // In a row, as the bytes of a stream are.
            assert_eq!(frame.0, FIRST + nr);
            assert!(area.state(frame) == Some((FrameState::Owned, 1)));
            near = Some(frame);
        }
        assert!(area.alloc(near).is_none());
        assert!(area.alloc(None).is_none());
        assert_eq!(area.counts().free, area.reserve());
        assert!((FIRST..PAGES).all(|at| references(&region, at) == 1));
        assert!((0..FIRST).all(|at| references(&region, at) == 0));
        Ok(())
    }

    #[test]
    fn a_frame_is_free_when_its_last_hold_and_the_last_reference_on_its_page_are_gone() -> Result {
        let (_region, area) = area()?;
        let frame = area.alloc(None).ok_or(ENOMEM)?;
        area.hold(frame)?;
        let page = area.get_page(frame).ok_or(EINVAL)?;
        assert_eq!(area.frame_of(page.as_ptr()), Some(frame));
        assert_eq!(area.unhold(frame)?, 1);
        assert_eq!(area.unhold(frame)?, 0);
        assert!(area.unhold(frame) == Err(EINVAL));
        // The stack still looks at it.
        area.reclaim_all();
        assert!(area.state(frame) == Some((FrameState::Limbo, 0)));
        assert_eq!(area.busy(), 1);
        assert_eq!(area.release(), Err(1));
        // A hold that comes from there keeps it, whatever becomes of the page.
        area.hold(frame)?;
        put(page);
        area.reclaim_all();
        assert!(area.state(frame) == Some((FrameState::Held, 1)));
        assert_eq!(area.unhold(frame)?, 0);
        area.reclaim_all();
        assert!(area.state(frame) == Some((FrameState::Free, 0)));
        assert!(area.hold(frame) == Err(EINVAL));
        assert_eq!(area.counts().free, COUNT);
        // A pipe may have any frame's page, a free one's, too.
        let page = area.get_any_page(frame).ok_or(EINVAL)?;
        assert_eq!(area.busy(), 1);
        put(page);
        assert!(area.get_any_page(Frame(FIRST - 1)).is_none());
        assert!(area.get_any_page(Frame(PAGES)).is_none());
        assert_eq!(area.release(), Ok(()));
        assert!(area.get_page(frame).is_none());
        Ok(())
    }

    #[test]
    fn what_is_known_of_a_page_goes_when_nobody_looks_at_it_any_more() -> Result {
        let (_region, area) = area()?;
        let frame = area.alloc(None).ok_or(ENOMEM)?;
        let page = area.get_page(frame).ok_or(EINVAL)?;
        for nr in 0..note::MAX {
            assert!(note::reserve(&area, frame, nr));
            note::push(
                &area,
                frame,
                Note {
                    seq: nr,
                    offset: (100 * nr) as u16,
                    len: 90,
                    ..Note::default()
                },
            );
        }
        for nr in 0..note::MAX {
            let found = note::find(&area, frame, 100 * nr + 89).ok_or(EINVAL)?;
            assert_eq!(found.seq, nr);
            assert!(note::find(&area, frame, 100 * nr + 90).is_none());
        }
        area.leave(frame)?;
        area.reclaim_all();
        assert_eq!(note::find(&area, frame, 0).ok_or(EINVAL)?.seq, 0);
        put(page);
        area.reclaim_all();
        assert!(note::find(&area, frame, 0).is_none());
        assert!(area.note(frame).is_some_and(|word| word.load(Relaxed) == 0));
        // With the area, if it is not idle before.
        let frame = area.alloc(None).ok_or(ENOMEM)?;
        assert!(note::reserve(&area, frame, 0));
        assert_eq!(area.release(), Ok(()));
        assert!(area.note(frame).is_some_and(|word| word.load(Relaxed) == 0));
        Ok(())
    }

    #[test]
    fn a_frame_counts_for_who_took_it_until_it_is_free_or_a_records() -> Result {
        let (_region, area) = area()?;
        let (one, two) = (Account::new(GFP_KERNEL)?, Account::new(GFP_KERNEL)?);
        area.limits.socket_frames.store(4, Relaxed);
        area.limits.store_frames.store(6, Relaxed);
        let mut frames = [Frame(0); 4];
        for (nr, frame) in frames.iter_mut().enumerate() {
            assert_eq!(one.frames(), nr as u32);
            assert_eq!(area.take(None, &one, 5, false), Err(Denied::Socket));
            *frame = area.take(None, &one, 1, false).map_err(|_| ENOMEM)?;
        }
        assert_eq!(area.take(None, &one, 1, false), Err(Denied::Socket));
        assert_eq!(area.charged(), 4);
        // A limit of its own, above and below.
        one.set_max(5);
        let [a, b, c, d] = frames;
        let extra = area.take(None, &one, 1, false).map_err(|_| ENOMEM)?;
        assert_eq!(area.take(None, &two, 2, false), Err(Denied::Store));
        let other = area.take(None, &two, 1, false).map_err(|_| ENOMEM)?;
        assert_eq!(area.take(None, &two, 1, false), Err(Denied::Store));
        let over = area.take(None, &two, 1, true).map_err(|_| ENOMEM)?;
        assert_eq!((one.frames(), two.frames(), area.charged()), (5, 2, 7));
        // The stack looks at it.
        let page = area.get_page(a).ok_or(EINVAL)?;
        area.leave(a)?;
        area.reclaim_all();
        assert_eq!(one.frames(), 5);
        put(page);
        assert_eq!(one.frames(), 5);
        area.reclaim_all();
        assert_eq!(one.frames(), 4);
        // A token holds it, in limbo and after.
        area.hold(b)?;
        area.leave(b)?;
        area.reclaim_all();
        assert_eq!(one.frames(), 4);
        area.unhold(b)?;
        area.reclaim_all();
        assert_eq!(one.frames(), 3);
        // Records use it, two of them, while its cursor has it.
        for (bytes, left) in [(100, 2), (50, 2)] {
            pm::Frames::hold(&area, c, bytes).map_err(crate::errno)?;
            assert_eq!(one.frames(), left);
        }
        pm::Frames::unhold(&area, c, 100).map_err(crate::errno)?;
        assert_eq!(one.frames(), 2);
        pm::Frames::unhold(&area, c, 50).map_err(crate::errno)?;
        assert_eq!(one.frames(), 3);
        // And when nobody else does: then it is nobody's, free or not yet.
        pm::Frames::hold(&area, c, 10).map_err(crate::errno)?;
        area.leave(c)?;
        area.reclaim_all();
        assert_eq!(one.frames(), 2);
        pm::Frames::unhold(&area, c, 10).map_err(crate::errno)?;
        area.reclaim_all();
        assert_eq!(one.frames(), 2);
        assert!(area.state(c) == Some((FrameState::Free, 0)));
        // One with an error is never free, and counts for nobody.
        area.mark_bad(d);
        assert_eq!(one.frames(), 1);
        area.unhold(d)?;
        // Who is at a limit finds what is idle.
        area.leave(other)?;
        area.leave(over)?;
        two.set_max(2);
        assert!(area.take(None, &two, 2, false).is_ok());
        assert_eq!(two.frames(), 1);
        assert_eq!(area.charged(), 2);
        area.leave(extra)?;
        assert_eq!(area.release(), Ok(()));
        assert_eq!(area.charged(), 0);
        Ok(())
    }

    #[test]
    fn a_frame_with_an_error_is_not_given_out_again() -> Result {
        let region = region()?;
        region.set_bad(FIRST + 3);
        let area = FrameArea::with(&region, Frame(FIRST), COUNT, Pages::synthetic)?;
        assert!(area.is_bad(Frame(FIRST + 3)) && !area.is_bad(Frame(FIRST + 4)));
        assert_eq!(area.counts().bad, 1);
        // One that has an owner when it happens.
        let owned = area.alloc(None).ok_or(ENOMEM)?;
        area.mark_bad(owned);
        assert_eq!(area.counts().bad_held, 1);
        assert_eq!(area.unhold(owned)?, 0);
        area.reclaim_all();
        assert!(area.state(owned) == Some((FrameState::Bad, 0)));
        let mut nr = 0;
        while let Some(frame) = area.alloc(None) {
            assert!(frame != owned && frame != Frame(FIRST + 3));
            nr += 1;
        }
        assert_eq!(nr, COUNT - 2 - area.reserve());
        Ok(())
    }
}
