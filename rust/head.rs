// SPDX-License-Identifier: GPL-2.0

//! The head area: volatile memory for skb heads, in persistent memory.
//!
//! A head is a packet's headers and its `skb_shared_info`. It is made in order, lives as long as
//! the skb, is never flushed, and never mapped to user space, for it has kernel pointers. Heads
//! are carved one after the other from a page that the CPU has for itself, each with a reference
//! on it; `skb_free_head()` puts that reference (`head_frag`). A page that is full goes to the
//! end of a queue, and comes back from its front when all its heads are gone.
//!
//! Lock order: a CPU's lock, then the queue's.

use crate::{
    lock::{self, SpinLockBh},
    page::Pages,
    region::{Region, LINE, PAGE},
};
use core::ptr::NonNull;
use kernel::{c_str, prelude::*, static_lock_class, sync::Arc};

/// How many used pages are looked at before the answer is that there is none.
const SEARCH: usize = 32;

/// Memory for one skb head, with a reference on its page.
///
/// The reference belongs to whoever has this: give it to the skb (`head_frag`), or back with
/// [`HeadArea::put`].
pub(crate) struct HeadSlot {
    /// Where it starts; aligned to a cache line.
    pub(crate) addr: NonNull<u8>,
    /// Its size, a multiple of a cache line.
    pub(crate) size: usize,
}

/// The page that a CPU carves heads from.
struct Current {
    page: Option<u32>,
    used: usize,
}

/// Used pages, first in, first out: a ring.
struct Queue {
    ring: KVVec<u32>,
    head: usize,
    len: usize,
}

impl Queue {
    fn pop(&mut self) -> Option<u32> {
        if self.len == 0 {
            return None;
        }
        let page = self.ring.get(self.head).copied();
        self.head = (self.head + 1) % self.ring.len();
        self.len -= 1;
        page
    }

    fn push(&mut self, page: u32) {
        if self.len < self.ring.len() {
            let at = (self.head + self.len) % self.ring.len();
            if let Some(slot) = self.ring.get_mut(at) {
                *slot = page;
                self.len += 1;
            }
        }
    }
}

/// The head area of a store.
#[pin_data]
pub(crate) struct HeadArea {
    cpus: KVec<Pin<KBox<SpinLockBh<Current>>>>,
    #[pin]
    queue: SpinLockBh<Queue>,
    pages: Pages,
}

impl HeadArea {
    /// The head area of `count` pages from page `first` of the region. Process context.
    ///
    /// Errors: those of [`Pages::new`], `ENOMEM`.
    pub(crate) fn new(region: &Arc<Region>, first: u32, count: u32) -> Result<Arc<Self>> {
        let mut ring = KVVec::with_capacity(count as usize, GFP_KERNEL)?;
        for at in 0..count {
            // A bad page is no loss: it is left out.
            if !region.is_bad(first + at) {
                ring.push(at, GFP_KERNEL)?;
            }
        }
        let len = ring.len();
        // SAFETY: No requirements.
        let nr_cpus = unsafe { crate::bindings::pmskb_nr_cpus() } as usize;
        let mut cpus = KVec::with_capacity(nr_cpus, GFP_KERNEL)?;
        for _ in 0..nr_cpus {
            let current = Current {
                page: None,
                used: 0,
            };
            cpus.push(
                KBox::pin_init(
                    lock::new(current, c_str!("pmskb_head_cpu"), static_lock_class!()),
                    GFP_KERNEL,
                )?,
                GFP_KERNEL,
            )?;
        }
        let pages = Pages::new(region.clone(), first, count)?;
        let queue = Queue { ring, head: 0, len };
        Arc::pin_init(
            pin_init!(Self {
                cpus,
                queue <- lock::new(queue, c_str!("pmskb_heads"), static_lock_class!()),
                pages,
            }),
            GFP_KERNEL,
        )
    }

    /// Memory for a head of `size` bytes (everything that `build_skb()` is told), up to a page.
    /// None if all pages looked at are in use. Softirq, or process context; the store must be
    /// live.
    pub(crate) fn alloc(&self, size: usize) -> Option<HeadSlot> {
        let size = size.checked_next_multiple_of(LINE)?;
        if size == 0 || size > PAGE || crate::inject::no_frame() {
            return None;
        }
        // SAFETY: Any CPU's page will do: being moved meanwhile costs only locality.
        let cpu = unsafe { crate::bindings::pmskb_cpu() } as usize;
        let mut current = self.cpus.get(cpu)?.lock();
        let bad = current.page.is_some_and(|page| self.pages.is_bad(page));
        if current.page.is_none() || bad || current.used + size > PAGE {
            let next = self.next(current.page.take());
            current.page = next;
            current.used = 0;
        }
        let page = current.page?;
        let addr = self.pages.addr(page)?;
        self.pages.get(page)?;
        let at = current.used;
        current.used += size;
        // SAFETY: `at + size` is at most a page, and the page is mapped.
        let addr = unsafe { addr.add(at) };
        Some(HeadSlot { addr, size })
    }

    /// Gives a slot back that no skb got.
    pub(crate) fn put(&self, slot: HeadSlot) {
        // SAFETY: The slot is in a page of this area.
        let page = unsafe { crate::bindings::pmskb_virt_to_page(slot.addr.as_ptr().cast()) };
        // SAFETY: The slot has a reference on its page, over the base reference.
        unsafe { crate::bindings::pmskb_page_put(page) };
    }

    /// Queues the page that is full, and finds one that has no heads any more. Bad pages are left
    /// out from then on.
    fn next(&self, full: Option<u32>) -> Option<u32> {
        let mut queue = self.queue.lock();
        if let Some(full) = full {
            queue.push(full);
        }
        for _ in 0..SEARCH.min(queue.len) {
            let page = queue.pop()?;
            if self.pages.is_bad(page) {
                continue;
            }
            if self.pages.if_idle(page, || {}) {
                return Some(page);
            }
            queue.push(page);
        }
        None
    }

    /// Pages in all, and good ones without heads now. Process context.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let total = self.pages.count();
        let free = |at: &u32| self.pages.users(*at) == 0 && !self.pages.is_bad(*at);
        (total, (0..total).filter(free).count() as u32)
    }

    /// Pages with heads now. Process context.
    pub(crate) fn busy(&self) -> u32 {
        self.pages.busy()
    }

    /// As `FrameArea::release`.
    pub(crate) fn release(&self) -> Result<(), u32> {
        self.pages.release()
    }
}
