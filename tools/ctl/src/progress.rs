// SPDX-License-Identifier: GPL-2.0-only

//! How far something is, for whom waits for it; and how it is stopped.

use std::{
    io::{self, IsTerminal},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long something may take before it shows how far it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// A bar on a terminal, after a while.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    shown: bool,
}

impl Progress {
    /// Of `len` bytes.
    pub fn bytes(len: u64) -> Self {
        Self::new(
            len,
            "{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        )
    }

    /// Of `len` of something that `unit` names.
    pub fn of(len: u64, unit: &str) -> Self {
        Self::new(
            len,
            &format!("{{bar:40}} {{percent}}% of {{len}} {unit} {{eta}}"),
        )
    }

    fn new(len: u64, template: &str) -> Self {
        let bar = ProgressBar::hidden();
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_length(len);
        Self {
            bar,
            started: Instant::now(),
            shown: !io::stderr().is_terminal(),
        }
    }

    /// So much more is done.
    pub fn advance(&mut self, n: u64) {
        self.bar.inc(n);
        self.show();
    }

    /// So much is done.
    pub fn at(&mut self, n: u64) {
        self.bar.set_position(n);
        self.show();
    }

    fn show(&mut self) {
        if !self.shown && self.started.elapsed() > PATIENCE {
            self.shown = true;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    /// Prints a line above the bar.
    pub fn print(&self, line: impl std::fmt::Display) {
        self.bar.suspend(|| println!("{line}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Whether somebody wants it to end: SIGINT or SIGTERM came.
#[derive(Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on these signals do not end the process at once. A second one does.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())?;
            signal_hook::flag::register(signal, stop.clone())?;
        }
        Ok(Self(stop))
    }

    /// Whether one came.
    pub fn wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits, but no longer than until one comes.
    pub fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.wanted() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// Exit status of a command that was stopped.
pub const STOPPED: u8 = 130;
