// SPDX-License-Identifier: GPL-2.0

//! Time, by the median of many short rounds: a store changes as it is measured, so
//! that what criterion does, more and more iterations of one thing, does not fit.

use std::time::Instant;

/// Nanoseconds for each of `count` operations.
pub fn per_op<T>(count: u64, run: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let out = run();
    (start.elapsed().as_nanos() as f64 / count.max(1) as f64, out)
}

/// The median, and the quarters around it.
#[derive(Clone, Copy)]
pub struct Median {
    pub low: f64,
    pub mid: f64,
    pub high: f64,
}

pub fn median(mut values: Vec<f64>) -> Median {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values.get((values.len().saturating_sub(1)) * part / 4);
    let at = |part| at(part).copied().unwrap_or(f64::NAN);
    Median {
        low: at(1),
        mid: at(2),
        high: at(3),
    }
}
