// SPDX-License-Identifier: GPL-2.0-only
//! Counters, and the JSON that reports them.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Events since QEMU started.
        ///
        /// Atomic, because the cheap ones are counted without the model's lock.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        /// [`Counters`] at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Reads every counter.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl Snapshot {
            /// A JSON object with a member for each counter.
            pub fn json(&self) -> String {
                let mut out = String::new();
                $(member(&mut out, stringify!($name), self.$name);)*
                format!("{{{out}}}")
            }
        }
    };
}

counters! {
    /// Plain and non-temporal stores to the region (only if stores are counted).
    stores,
    /// Their bytes.
    store_bytes,
    /// Loads from the region (only if all accesses are counted).
    loads,
    /// Their bytes.
    load_bytes,
    /// Non-temporal stores to the region.
    nt_stores,
    /// Their bytes.
    nt_store_bytes,
    /// Lines of the region that `clwb` wrote back.
    clwb,
    /// The same for `clflushopt`.
    clflushopt,
    /// The same for `clflush`.
    clflush,
    /// Of these three, flushes of lines that were durable already.
    flushes_clean,
    /// Of these three, flushes repeated on one vCPU with nothing new in the line.
    flushes_repeated,
    /// Fences that committed something of the region.
    fences,
    /// Fences on a vCPU for which nothing of the region waited.
    fences_empty,
    /// Locked instructions that did so (only if they drain).
    drains_locked,
    /// Lines that fences and locked instructions committed.
    lines_fenced,
    /// Flushes of addresses that are not in the region.
    flushes_outside,
    /// Flushes of addresses that are not mapped, which hardware would refuse.
    flushes_unmapped,
    /// Flushes and parts of non-temporal stores whose physical address could not
    /// be found. They made nothing durable.
    unresolved,
    /// `wbinvd` and `wbnoinvd`, which make nothing durable here.
    wbinvd,
    /// Marks.
    marks,
}

impl Counters {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// What the cut did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Lines whose present contents were not durable.
    pub lines_dirty: u64,
    /// Lines for which a flush or a non-temporal store waited for its fence.
    pub lines_pending: u64,
    /// Lines of the image that differ from what the guest saw last.
    pub lines_lost: u64,
    /// Of these, lines that are neither as last seen nor as last made durable.
    pub lines_torn: u64,
}

impl Damage {
    /// A JSON object.
    pub fn json(&self) -> String {
        let mut out = String::new();
        member(&mut out, "lines_dirty", self.lines_dirty);
        member(&mut out, "lines_pending", self.lines_pending);
        member(&mut out, "lines_lost", self.lines_lost);
        member(&mut out, "lines_torn", self.lines_torn);
        format!("{{{out}}}")
    }
}

/// Everything that is reported.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// What cut the power: an event's name, or "exit".
    pub reason: &'a str,
    /// Whether events counted for the cut at the end.
    pub armed: bool,
    /// Events that counted for it.
    pub events: u64,
    /// The region: guest-physical base, length without labels, length of labels.
    pub region: (u64, u64, u64),
    /// What the cut did.
    pub damage: Damage,
    /// The counters at the end.
    pub total: Snapshot,
    /// The counters at each mark, before it was counted.
    pub marks: &'a [Snapshot],
}

impl Report<'_> {
    /// The JSON text.
    pub fn json(&self) -> String {
        let mut marks = String::new();
        for (i, m) in self.marks.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ = write!(marks, "{comma}\n    {}", m.json());
        }
        let (base, size, label) = self.region;
        format!(
            "{{\n  \"format\": 1,\n  \"reason\": \"{}\",\n  \"armed\": {},\n  \"events\": {},\n  \
             \"base\": {base},\n  \"size\": {size},\n  \"label\": {label},\n  \"damage\": {},\n  \
             \"total\": {},\n  \"marks\": [{marks}]\n}}\n",
            self.reason,
            self.armed,
            self.events,
            self.damage.json(),
            self.total.json(),
        )
    }
}

fn member(out: &mut String, name: &str, value: u64) {
    let comma = if out.is_empty() { "" } else { ", " };
    let _ = write!(out, "{comma}\"{name}\": {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json() {
        let counters = Counters::default();
        Counters::add(&counters.fences, 2);
        let mark = counters.snapshot();
        Counters::add(&counters.fences, 1);
        let report = Report {
            reason: "exit",
            armed: true,
            events: 3,
            region: (1 << 32, 4096, 128),
            damage: Damage {
                lines_lost: 5,
                ..Damage::default()
            },
            total: counters.snapshot(),
            marks: &[mark, mark],
        };
        let json = report.json();
        assert!(json.starts_with("{\n  \"format\": 1,\n  \"reason\": \"exit\",\n"));
        assert!(
            json.contains(
                "\"damage\": {\"lines_dirty\": 0, \"lines_pending\": 0, \"lines_lost\": 5,"
            )
        );
        assert!(json.contains("\"total\": {\"stores\": 0, "));
        assert_eq!(json.matches("\"fences\": 2").count(), 2);
        assert_eq!(json.matches("\"fences\": 3").count(), 1);
        assert_eq!(json.matches('{').count(), json.matches('}').count());
        assert!(json.ends_with("]\n}\n"));
    }
}
