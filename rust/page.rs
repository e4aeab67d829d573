// SPDX-License-Identifier: GPL-2.0

//! The struct pages of a run of frames, and their base references.
//!
//! A DAX page that nobody uses has a reference count of 0. While a region is attached, each page
//! of its head and data areas has a base reference more: the network stack takes and puts
//! references on top of it as on any page, and what it puts last never brings the count to 0,
//! where `page_frag_free()` would hand a page of persistent memory to the buddy allocator. A page
//! whose count is 1 is idle: nobody but us can see it.

use crate::{bindings as ext, region::Region};
use core::ptr::NonNull;
use kernel::{
    bindings,
    prelude::*,
    sync::{
        atomic::{AtomicFlag, Relaxed},
        Arc,
    },
};

/// A run of pages, each with its base reference.
///
/// # Invariants
///
/// - Pages `first..first + count` are in the region.
/// - While `based` is set, the struct pages exist and each has its base reference.
pub(crate) struct Pages {
    region: Arc<Region>,
    first: u32,
    count: u32,
    based: AtomicFlag,
}

impl Pages {
    /// Takes the base references. Process context.
    ///
    /// Errors: `EINVAL` if the pages are not in the region, `EADDRINUSE` if somebody uses one of
    /// them, or it is part of a larger one.
    pub(crate) fn new(region: Arc<Region>, first: u32, count: u32) -> Result<Self> {
        // SAFETY: The page exists, by `take`.
        Self::take(region, first, count, |page| unsafe {
            ext::pmskb_page_is_idle_dax(page)
        })
    }

    /// [`Self::new`], if all pages are idle.
    fn take(
        region: Arc<Region>,
        first: u32,
        count: u32,
        idle: impl Fn(*mut bindings::page) -> bool,
    ) -> Result<Self> {
        let end = first.checked_add(count).ok_or(EINVAL)?;
        if end as usize > region.pages() {
            return Err(EINVAL);
        }
        let pages = Self {
            region,
            first,
            count,
            based: AtomicFlag::new(false),
        };
        for at in 0..count {
            let page = pages.raw(at);
            // The region is claimed and its driver bound, so it has struct pages.
            if !idle(page) {
                for done in 0..at {
                    // SAFETY: There are struct pages; we took it just now.
                    unsafe { ext::pmskb_page_give_back(pages.raw(done)) };
                }
                return Err(Error::from_errno(-(bindings::EADDRINUSE as i32)));
            }
            // SAFETY: There are struct pages; with a count of 0 it is nobody's, and the region is ours.
            unsafe { ext::pmskb_page_take(page) };
        }
        // INVARIANT: All pages have their base reference.
        pages.based.store(true, Relaxed);
        Ok(pages)
    }

    /// Address of a struct page; follow it only while `based` is set.
    fn raw(&self, at: u32) -> *mut bindings::page {
        let pfn = self.region.pfn() + self.first as usize + at as usize;
        // SAFETY: Arithmetic.
        unsafe { ext::pmskb_pfn_to_page(pfn) }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// The page of number `at`; none if out of range. Any context.
    pub(crate) fn page(&self, at: u32) -> Option<NonNull<bindings::page>> {
        (at < self.count).then(|| NonNull::new(self.raw(at)))?
    }

    /// Which of these a page is. Any context.
    pub(crate) fn index_of(&self, page: *const bindings::page) -> Option<u32> {
        // SAFETY: Arithmetic: pages are found in one virtual array (SPARSEMEM_VMEMMAP, on which
        // ZONE_DEVICE depends).
        let pfn = unsafe { ext::pmskb_page_to_pfn(page) };
        let at = pfn.checked_sub(self.region.pfn() + self.first as usize)?;
        u32::try_from(at).ok().filter(|at| *at < self.count)
    }

    /// Where a page is mapped. Any context.
    pub(crate) fn addr(&self, at: u32) -> Option<NonNull<u8>> {
        (at < self.count).then(|| {
            self.region
                .addr((self.first as usize + at as usize) * crate::region::PAGE)
        })?
    }

    /// Whether a page has a media error. Any context.
    #[inline]
    pub(crate) fn is_bad(&self, at: u32) -> bool {
        self.region.is_bad(self.first + at)
    }

    /// References on a page over the base reference; 0 if it is not one of these.
    pub(crate) fn users(&self, at: u32) -> u32 {
        let Some(page) = self.page(at).filter(|_| self.based.load(Relaxed)) else {
            return 0;
        };
        // SAFETY: `based` is set, so the struct page exists.
        let count = unsafe { ext::pmskb_page_ref_count(page.as_ptr()) };
        u32::try_from(count.saturating_sub(1)).unwrap_or(0)
    }

    /// Whether nobody but us can see a page; then runs `then` while nobody can take a reference.
    /// Any context; must not race with [`Pages::release`].
    pub(crate) fn if_idle(&self, at: u32, then: impl FnOnce()) -> bool {
        let Some(page) = self.page(at).filter(|_| self.based.load(Relaxed)) else {
            return false;
        };
        // SAFETY: The struct page exists.
        if !unsafe { ext::pmskb_page_ref_freeze(page.as_ptr(), 1) } {
            return false;
        }
        then();
        // SAFETY: Frozen above, by us.
        unsafe { ext::pmskb_page_ref_unfreeze(page.as_ptr(), 1) };
        true
    }

    /// Takes a reference on a page, for a fragment of an skb, a head, or a pipe. Any context.
    ///
    /// The caller knows that the store is live, or has a reference already.
    pub(crate) fn get(&self, at: u32) -> Option<NonNull<bindings::page>> {
        let page = self.page(at).filter(|_| self.based.load(Relaxed))?;
        // SAFETY: The struct page exists and has at least its base reference.
        unsafe { ext::pmskb_page_get(page.as_ptr()) };
        Some(page)
    }

    /// Pages that somebody uses.
    pub(crate) fn busy(&self) -> u32 {
        (0..self.count).filter(|at| self.users(*at) > 0).count() as u32
    }

    /// Drops the base references, if all pages are idle; else how many are not. Process context.
    /// The caller sees to it that nobody takes new ones.
    pub(crate) fn release(&self) -> Result<(), u32> {
        if !self.based.load(Relaxed) {
            return Ok(());
        }
        for at in 0..self.count {
            // SAFETY: `based` is set, so the struct page exists.
            if !unsafe { ext::pmskb_page_ref_freeze(self.raw(at), 1) } {
                for done in 0..at {
                    // SAFETY: Frozen above, by us.
                    unsafe { ext::pmskb_page_ref_unfreeze(self.raw(done), 1) };
                }
                return Err(self.busy().max(1));
            }
        }
        for at in 0..self.count {
            // SAFETY: As above; frozen is what an unused DAX page is, its count is 0.
            unsafe { ext::pmskb_page_give_back(self.raw(at)) };
        }
        self.based.store(false, Relaxed);
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Err(busy) = self.release() {
            // Nothing that we could do: whoever holds them keeps a page that will be reused.
            pr_err!("{busy} pages still referenced\n");
        }
    }
}

#[cfg(CONFIG_KUNIT = "y")]
impl Pages {
    /// Of a synthetic region, whose pages are no DAX device's.
    pub(crate) fn synthetic(region: Arc<Region>, first: u32, count: u32) -> Result<Self> {
        // SAFETY: The page exists, by `take`.
        Self::take(region, first, count, |page| unsafe {
            ext::pmskb_page_ref_count(page) == 0
        })
    }
}

#[kunit_tests(pmskb_page)]
mod tests {
    use super::*;
    use crate::region::synthetic::{references, region, PAGES};

    fn put(page: NonNull<bindings::page>) {
        // SAFETY: The caller has a reference over the base reference.
        unsafe { ext::pmskb_page_put(page.as_ptr()) };
    }

    #[test]
    fn base_references_are_taken_of_all_pages_or_of_none() -> Result {
        let region = region()?;
        assert!(matches!(Pages::synthetic(region.clone(), 1, PAGES), Err(e) if e == EINVAL));
        assert!(Pages::synthetic(region.clone(), u32::MAX, 2).is_err());
        {
            let some = Pages::synthetic(region.clone(), 10, 3)?;
            assert_eq!(some.count(), 3);
            for at in 0..PAGES {
                let ours = (10..13).contains(&at);
                assert_eq!(references(&region, at), i32::from(ours));
            }
            // They are in use, says whoever wants them as well.
            let busy = Error::from_errno(-(bindings::EADDRINUSE as i32));
            assert!(matches!(Pages::synthetic(region.clone(), 8, 8), Err(e) if e == busy));
            for at in 0..PAGES {
                assert_eq!(references(&region, at), i32::from((10..13).contains(&at)));
            }
        }
        assert!((0..PAGES).all(|at| references(&region, at) == 0));
        Ok(())
    }

    #[test]
    fn a_page_is_idle_while_nobody_but_us_has_it() -> Result {
        let region = region()?;
        let pages = Pages::synthetic(region.clone(), 2, 8)?;
        let page = pages.get(5).ok_or(EINVAL)?;
        assert_eq!(pages.users(5), 1);
        assert_eq!(pages.busy(), 1);
        assert!(!pages.if_idle(5, || unreachable!()));
        let again = pages.get(5).ok_or(EINVAL)?;
        assert_eq!(again, page);
        assert_eq!(pages.users(5), 2);
        put(page);
        assert!(!pages.if_idle(5, || unreachable!()));
        put(again);
        assert_eq!(pages.users(5), 0);
        // Meanwhile nobody can take one.
        let mut frozen = -1;
        assert!(pages.if_idle(5, || frozen = references(&region, 7)));
        assert_eq!(frozen, 0);
        assert_eq!(references(&region, 7), 1);
        // None of these pages.
        assert!(pages.get(8).is_none());
        assert!(!pages.if_idle(8, || unreachable!()));
        assert_eq!(pages.users(8), 0);
        Ok(())
    }

    #[test]
    fn base_references_go_when_all_pages_are_idle_and_not_before() -> Result {
        let region = region()?;
        let pages = Pages::synthetic(region.clone(), 0, PAGES)?;
        let one = pages.get(3).ok_or(EINVAL)?;
        let other = pages.get(PAGES - 1).ok_or(EINVAL)?;
        assert_eq!(pages.release(), Err(2));
        put(one);
        assert_eq!(pages.release(), Err(1));
        assert!((0..PAGES - 1).all(|at| references(&region, at) == 1));
        assert_eq!(references(&region, PAGES - 1), 2);
        put(other);
        assert_eq!(pages.release(), Ok(()));
        assert!((0..PAGES).all(|at| references(&region, at) == 0));
        // They are somebody else's now.
        assert!(pages.get(3).is_none());
        assert!(!pages.if_idle(3, || unreachable!()));
        assert_eq!(pages.users(3), 0);
        assert_eq!(pages.release(), Ok(()));
        Ok(())
    }

    #[test]
    fn pages_are_told_from_those_beside_them() -> Result {
        let region = region()?;
        let pages = Pages::synthetic(region.clone(), 4, 4)?;
        for at in 0..PAGES {
            // SAFETY: Arithmetic.
            let page = unsafe { ext::pmskb_pfn_to_page(region.pfn() + at as usize) };
            assert_eq!(pages.index_of(page), at.checked_sub(4).filter(|at| *at < 4));
        }
        for at in 0..4 {
            assert_eq!(
                pages.page(at).map(|page| pages.index_of(page.as_ptr())),
                Some(Some(at))
            );
            assert_eq!(
                pages.addr(at),
                region.addr((4 + at as usize) * crate::region::PAGE)
            );
        }
        assert!(pages.page(4).is_none() && pages.addr(4).is_none());
        region.set_bad(5);
        assert!((0..4).all(|at| pages.is_bad(at) == (at == 1)));
        Ok(())
    }
}
