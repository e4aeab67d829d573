// SPDX-License-Identifier: GPL-2.0-only

//! Makes, attaches and reads pmskb stores.
//!
//! | file | noun |
//! | --- | --- |
//! | `admin.rs` | format, attach, detach |
//! | `status.rs` | list, info |
//! | `sockets.rs` | sockets |
//! | `records.rs` | ls, get |
//! | `change.rs` | del, truncate |
//! | `upkeep.rs` | compact, scrub |
//! | `check.rs` | verify, dump |
//! | `fsck.rs` | fsck |
//! | `examine.rs` | what is on the media, and what is wrong with it |
//! | `progress.rs` | how far something is, and how it is stopped |
//! | `source.rs` | where records come from: a store or an image |
//! | `select.rs` | which records: prefix, time, sequence |
//! | `text.rs` | numbers, times, keys and flows as people read them |

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod admin;
mod change;
mod check;
mod examine;
mod flow;
mod fsck;
mod progress;
mod records;
mod select;
mod sockets;
mod source;
mod status;
mod text;
mod upkeep;

/// Makes, attaches and reads pmskb stores.
///
/// A store is the persistent memory of one device, formatted; attached, it is
/// /dev/pmskbN. Commands that read work on an attached store or, with --image, on
/// a copy of the memory.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Print JSON: one object, or one a line where there may be many
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Make an empty store of a device's persistent memory
    Format(admin::Format),
    /// Attach a device's store
    Attach(admin::Attach),
    /// Detach a store
    Detach(admin::Detach),
    /// Show the stores that are attached
    List,
    /// Show a store's sizes and counters
    Info(status::Info),
    /// Show attached sockets, of TCP and UDP, and whose they are
    Sockets(sockets::Sockets),
    /// Show records
    Ls(records::Ls),
    /// Write an object's bytes
    Get(records::Get),
    /// Delete records by their keys, or all that filters name
    ///
    /// Exit status: 0 done, 1 some had no record (any more), 2 it could not be done.
    Del(change::Del),
    /// Remove all records without a key up to a sequence number
    Truncate(change::Truncate),
    /// Move what is alive out of frames with little in them
    Compact(upkeep::Compact),
    /// Check every record against its checksums, in the kernel
    ///
    /// Exit status: 0 all is well, 1 some are bad, 2 it could not be checked.
    Scrub(upkeep::Scrub),
    /// Check the media piece by piece, and mend what can be
    ///
    /// Exit status, as of fsck(8): 0 all is well, 1 problems were mended, 4 problems
    /// are left, 8 it could not be done.
    Fsck(fsck::Fsck),
    /// Check every record against its checksums
    ///
    /// Exit status: 0 all is well, 1 something is wrong, 2 it could not be checked.
    Verify(check::Verify),
    /// Show superblocks and records in all detail
    Dump(check::Dump),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let json = args.json;
    pmskb_uapi::explain_bus_errors(match args.command {
        Command::Fsck(_) => fsck::OPERATIONAL.into(),
        _ => 2,
    });
    let result = match &args.command {
        Command::Format(a) => admin::format(a, json),
        Command::Attach(a) => admin::attach(a, json),
        Command::Detach(a) => admin::detach(a, json),
        Command::List => status::list(json),
        Command::Info(a) => status::info(a, json),
        Command::Sockets(a) => sockets::sockets(a, json),
        Command::Ls(a) => records::ls(a, json),
        Command::Get(a) => records::get(a, json),
        Command::Del(a) => change::del(a, json),
        Command::Truncate(a) => change::truncate(a, json),
        Command::Compact(a) => upkeep::compact(a, json),
        Command::Scrub(a) => upkeep::scrub(a, json),
        Command::Fsck(a) => fsck::fsck(a, json),
        Command::Verify(a) => check::verify(a, json),
        Command::Dump(a) => check::dump(a, json),
    };
    match result {
        Ok(status) => status,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pmskbctl: {e:#}");
            ExitCode::from(match args.command {
                Command::Fsck(_) => fsck::OPERATIONAL,
                _ => 2,
            })
        }
    }
}

/// A reader that has seen enough (`| head`) is no reason to complain.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    let broken = std::io::ErrorKind::BrokenPipe;
    e.chain().any(|e| {
        e.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == broken)
    })
}
