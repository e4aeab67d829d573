// SPDX-License-Identifier: GPL-2.0-only

//! Runs a program on attached sockets that knows nothing of them.
//!
//! | file | noun |
//! | --- | --- |
//! | `main.rs` | options; the program is run in our place, or beside us if there is something to say after it |
//! | `program.rs` | the program's file: where it is, and whether a library can be preloaded |
//! | `stats.rs` | what its sockets did |
//! | `words.rs` | what the library is told |
//! | `preload.rs`, `guest.rs` | the library, which is not part of this program |

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::{
    ffi::{OsStr, OsString},
    io::{self, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus},
};

use anyhow::{bail, Context as _};
use clap::Parser;
use pmskb_uapi::Store;
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

mod program;
mod stats;
mod words;

/// Runs a program with all its sockets attached to a store.
///
/// For programs that know nothing of pmskb: what they receive is placed in the store, and read
/// from there as bytes. Exit status: the program's; 125 if it was not run for a reason of
/// pmskb-run's, 126 if it cannot be executed, 127 if there is none.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    /// The store: pmskbN; by default the only one that is attached
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// Say of each socket whether it was attached, on the standard error
    #[arg(long, short)]
    verbose: bool,
    /// Say afterwards what was placed, on the standard error
    #[arg(long)]
    stats: bool,
    /// A socket that cannot be attached is an error of the call that made it, and no plain socket
    #[arg(long)]
    require: bool,
    /// What sockets receive is made durable in the store's log before the program gets it
    #[arg(long)]
    auto_persist: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Of pmskb-run itself, as of env(1).
const FAILED: u8 = 125;
const CANNOT_EXECUTE: u8 = 126;
const NOT_FOUND: u8 = 127;

const LIBRARY: &str = "libpmskb_preload.so";

fn main() -> ExitCode {
    // An option that is wrong is a failure of ours, and 2 may be the program's status.
    let args = Args::try_parse().unwrap_or_else(|e| {
        let status = if e.use_stderr() { FAILED } else { 0 };
        // Where there is nobody to read it, there is nobody.
        let _ = e.print();
        std::process::exit(status.into());
    });
    match run(&args) {
        Ok(status) => status,
        Err(e) => {
            eprintln!("pmskb-run: {e:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let [name, arguments @ ..] = args.command.as_slice() else {
        bail!("no program");
    };
    let store = open_store(args.store.as_deref())?;
    let path = store.path().to_owned();
    check_length(&path)?;
    let library = library()?;

    if let Some(why) = program::find(name).and_then(|file| program::why_not(&file)) {
        let name = Path::new(name).display();
        if args.require {
            bail!("{name} {why}: its sockets cannot be attached");
        }
        eprintln!("pmskb-run: {name} {why}: its sockets are not attached");
    }

    let mut command = Command::new(name);
    command.args(arguments);
    command.env(words::STORE, &path);
    command.env("LD_PRELOAD", preload(&library)?);
    for (word, is_set) in [
        (words::VERBOSE, args.verbose),
        (words::REQUIRE, args.require),
        (words::AUTO, args.auto_persist),
    ] {
        if is_set {
            command.env(word, "1");
        } else {
            command.env_remove(word);
        }
    }
    command.env_remove(words::COUNTS);
    if !args.stats {
        // It is this process from here on: signals, status and place in the terminal are its own.
        drop(store);
        return Ok(not_run(name, &command.exec()));
    }

    let counts = stats::Counts::new()?;
    command.env(words::COUNTS, counts.path());
    let before = store.info()?;
    // A terminal's interrupt goes to both, and is for the program to decide on.
    let signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGQUIT, SIGHUP, SIGTERM, SIGUSR1, SIGUSR2])?;
    let child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return Ok(not_run(name, &e)),
    };
    let status = wait(child, signals)?;
    let report = stats::Report {
        store: &path,
        counts: &counts.read()?,
        before: &before.raw.counters,
        after: &store.info()?.raw.counters,
    }
    .to_string();
    // In one write, for there may be others like us.
    let _ = io::stderr().write_all(report.as_bytes());
    // As a shell has it.
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(FAILED)))
}

fn not_run(name: &OsStr, e: &io::Error) -> ExitCode {
    eprintln!("pmskb-run: cannot run {}: {e}", Path::new(name).display());
    ExitCode::from(match e.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        _ => CANNOT_EXECUTE,
    })
}

/// Waits for the program; passes on what somebody sends to us and means it.
fn wait(mut child: Child, mut signals: signal_hook::iterator::Signals) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // By number it might be somebody else by now.
    let child_fd = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let handle = signals.handle();
    let thread = std::thread::spawn(move || {
        for signal in signals.forever() {
            if matches!(signal, SIGINT | SIGQUIT) {
                continue;
            }
            if let (Some(Ok(fd)), Some(signal)) = (&child_fd, Signal::from_named_raw(signal)) {
                // It may have ended.
                let _ = pidfd_send_signal(fd, signal);
            }
        }
    });
    let status = child.wait();
    handle.close();
    let _ = thread.join();
    status
}

fn open_store(name: Option<&str>) -> anyhow::Result<Store> {
    let minor = match name {
        Some(name) => match pmskb_uapi::store::minor_of(name) {
            Some(minor) => minor,
            None => return check(Store::open(Path::new(name))?),
        },
        None => match pmskb_uapi::store::attached()[..] {
            [minor] => minor,
            [] => bail!("no store is attached\n  `pmskbctl attach DEVICE` attaches one"),
            _ => bail!("more than one store is attached\n  say which with --store pmskbN"),
        },
    };
    check(Store::open_minor(minor)?)
}

/// That it is one.
fn check(store: Store) -> anyhow::Result<Store> {
    store.info()?;
    Ok(store)
}

fn check_length(path: &Path) -> anyhow::Result<()> {
    if !path.is_absolute() {
        bail!("the store's path has to begin with /: {}", path.display());
    }
    if path.as_os_str().len() >= words::PATH_MAX {
        bail!("the store's path is too long: {}", path.display());
    }
    Ok(())
}

/// The library that is preloaded: beside this program, or where libraries are.
fn library() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("cannot find this program's own file")?;
    let dir = me.parent().unwrap_or(Path::new("/"));
    let places = [
        dir.to_owned(),
        dir.join("../lib/pmskb"),
        PathBuf::from("/usr/local/lib/pmskb"),
        PathBuf::from("/usr/lib/pmskb"),
    ];
    let found = places
        .iter()
        .map(|place| place.join(LIBRARY))
        .find(|file| file.is_file());
    found
        .and_then(|file| file.canonicalize().ok())
        .with_context(|| {
            format!(
                "there is no {LIBRARY} in {}, nor in ../lib/pmskb from there, /usr/local/lib/pmskb \
                 or /usr/lib/pmskb",
                dir.display()
            )
        })
}

/// LD_PRELOAD with it, before what is there already.
fn preload(library: &Path) -> anyhow::Result<OsString> {
    // The dynamic linker takes these for the end of a name, and has no way to quote them.
    if library
        .as_os_str()
        .as_bytes()
        .iter()
        .any(|b| matches!(b, b' ' | b':' | b'$'))
    {
        bail!(
            "a path with a space, a colon or a dollar sign cannot be preloaded: {}",
            library.display()
        );
    }
    let mut all = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        all.push(":");
        all.push(others);
    }
    Ok(all)
}
