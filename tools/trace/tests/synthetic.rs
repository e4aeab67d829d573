// SPDX-License-Identifier: GPL-2.0-only
//! Traces of the core on this host: crashes in them keep the promise, and traces in which a promise
//! is broken are seen to be so.

use indicatif::ProgressBar;
use pmskb_trace::crash::{Options, Outcome, Trace, crash};
use pmskb_trace::format::{CPUS, Event, Reader, Writer};
use pmskb_trace::mark::Mark;
use pmskb_trace::synth;
use std::path::{Path, PathBuf};

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("trace-{}-{name}", std::process::id()))
}

fn options(images: u64) -> Options {
    Options {
        images,
        seed: 1,
        jobs: 2,
        run: None,
        only: None,
        write: None,
        enough: 1,
        export: None,
    }
}

fn look(file: &Path, options: &Options) -> Outcome {
    let bar = ProgressBar::hidden();
    let trace = Trace::open(file, &bar).unwrap();
    crash(&trace, options, &bar).unwrap()
}

/// A trace with some of its events left out, or others put in.
fn changed(name: &str, mut each: impl FnMut(&Event) -> Vec<Event>) -> PathBuf {
    let whole = synth::run("whole", 120, 3, Vec::new()).unwrap();
    let mut reader = Reader::new(&whole[..]).unwrap();
    let mut out = Writer::new(Vec::new(), reader.header).unwrap();
    let mut end = None;
    while let Some(event) = reader.event().unwrap() {
        for event in each(&event) {
            match event {
                Event::Image { .. } => unreachable!("the memory was empty"),
                Event::Store {
                    cpu,
                    direct,
                    off,
                    len,
                    bytes,
                } => out
                    .store(cpu, direct, off, &bytes[..usize::from(len)])
                    .unwrap(),
                Event::Flush { cpu, ordered, line } => out.flush(cpu, ordered, line).unwrap(),
                Event::Fence { cpu } => out.fence(cpu).unwrap(),
                Event::Mark { cpu, mark } => out.mark(cpu, mark).unwrap(),
                Event::End { crc, unresolved } => end = Some((crc, unresolved)),
            }
        }
    }
    let (crc, unresolved) = end.unwrap();
    let file = path(name);
    std::fs::write(&file, out.finish(crc, unresolved).unwrap()).unwrap();
    file
}

/// What is wrong with a trace: the first violation.
fn wrong(name: &str, each: impl FnMut(&Event) -> Vec<Event>) -> Option<String> {
    let file = changed(name, each);
    let outcome = look(&file, &options(6000));
    std::fs::remove_file(&file).unwrap();
    outcome.violations.into_iter().next().map(|v| v.what)
}

#[test]
fn crashes_of_the_core_keep_the_promise() {
    let file = path("good");
    let mut images = 0;
    for seed in 0..3 {
        let trace = synth::run("good", 150, seed, Vec::new()).unwrap();
        std::fs::write(&file, trace).unwrap();
        let outcome = look(&file, &options(4000));
        assert!(outcome.violations.is_empty(), "{:?}", outcome.violations);
        assert!(outcome.torn > 500 && outcome.cut > 50 && outcome.again > 50);
        assert!(outcome.states > 1000, "{outcome:?}");
        images += outcome.images;
    }
    assert!(images > 8000, "{images}");
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn a_trace_without_its_fences_or_flushes_breaks_it() {
    assert_eq!(wrong("whole", |event| vec![*event]), None);
    // From the start of the run on: the store was formatted before.
    let mut within = false;
    let lost = wrong("fences", |event| {
        within |= matches!(
            event,
            Event::Mark {
                mark: Mark::Start(_),
                ..
            }
        );
        match event {
            // One of ten is not enough to hide it.
            Event::Fence { .. } if within => vec![],
            other => vec![*other],
        }
    });
    assert!(lost.is_some());
    let mut flushes = 0;
    let lost = wrong("flushes", |event| match event {
        Event::Flush { .. } => {
            flushes += 1;
            if flushes % 7 == 0 {
                vec![]
            } else {
                vec![*event]
            }
        }
        other => vec![*other],
    });
    assert!(lost.is_some());
}

#[test]
fn an_answer_that_comes_too_early_breaks_it() {
    // The last fence before an answer comes after it; the others stay where they are.
    let mut waits: Vec<Event> = Vec::new();
    let lost = wrong("early", |event| match event {
        Event::Fence { .. } => std::mem::replace(&mut waits, vec![*event]),
        Event::Store { .. } if !waits.is_empty() => {
            waits.push(*event);
            vec![]
        }
        Event::Mark {
            mark: Mark::Ack { .. } | Mark::End,
            ..
        } if !waits.is_empty() => {
            let mut out = std::mem::take(&mut waits);
            out.push(*event);
            out.rotate_left(1);
            out
        }
        other => {
            let mut out = std::mem::take(&mut waits);
            out.push(*other);
            out
        }
    });
    let lost = lost.expect("a violation");
    assert!(
        ["lost", "acknowledged", "given out again"]
            .iter()
            .any(|why| lost.contains(why)),
        "{lost}"
    );
}

#[test]
fn a_fence_of_another_cpu_is_no_fence() {
    let mut within = false;
    let lost = wrong("cpus", |event| {
        within |= matches!(
            event,
            Event::Mark {
                mark: Mark::Start(_),
                ..
            }
        );
        match event {
            Event::Fence { .. } if within => vec![Event::Fence {
                cpu: CPUS as u8 - 1,
            }],
            other => vec![*other],
        }
    });
    assert!(lost.is_some());
}

#[test]
fn a_trace_that_lacks_a_store_is_refused() {
    let mut stores = 0;
    let file = changed("holes", |event| match event {
        Event::Store { .. } => {
            stores += 1;
            if stores == 500 { vec![] } else { vec![*event] }
        }
        other => vec![*other],
    });
    let error = Trace::open(&file, &ProgressBar::hidden()).err().unwrap();
    assert!(error.to_string().contains("stores are missing"), "{error}");
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn a_violation_can_be_made_again() {
    let mut within = false;
    let file = changed("again", |event| {
        within |= matches!(
            event,
            Event::Mark {
                mark: Mark::Start(_),
                ..
            }
        );
        match event {
            Event::Flush { line, .. } if within && line % 3 == 0 => vec![],
            other => vec![*other],
        }
    });
    let outcome = look(&file, &options(3000));
    let first = outcome.violations.first().unwrap();
    let again = Options {
        only: Some((first.point, first.nr)),
        enough: 100,
        ..options(3000)
    };
    let repeated = look(&file, &again);
    let same = |v: &&pmskb_trace::crash::Violation| (v.point, v.nr) == (first.point, first.nr);
    let same = repeated.violations.iter().find(same);
    assert_eq!(same.map(|v| &v.what), Some(&first.what));
    std::fs::remove_file(&file).unwrap();
}
