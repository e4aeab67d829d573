// SPDX-License-Identifier: GPL-2.0-only
//! `make bench`: what persisting received data costs, with pmskb and with everything else.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `server.rs` | an HTTP server on one epoll, with pmskb-httpd's parser and replies |
//! | `store/` | what it does with a body: the contenders |
//! | `load.rs` | the client |
//! | `categories.rs` | which function is for what |
//! | `report.rs` | from windows of the meter to tables |
//! | `plot.rs` | to pictures |
//! | `check.rs` | to a verdict, for `make test` |

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod categories;
mod check;
mod load;
mod plot;
mod report;
mod server;
mod store;

use anyhow::Result;
use clap::{Parser, Subcommand};
use pmskb_meter::mark::Mark;

/// Servers, a client and a report for `make bench`.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves as one of the contenders
    Serve(server::Args),
    /// Sends POSTs, each connection one at a time, and marks the windows of the meter
    Load(load::Args),
    /// Says to the meter that windows will come, or none for now
    Mark {
        /// Which of the two
        what: Word,
    },
    /// Makes tables and plots of what a run left
    Report(report::Args),
    /// Says whether a counted run is as it must be, as TAP
    Check(check::Args),
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Word {
    Watch,
    Rest,
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Serve(args) => server::run(&args),
        Command::Load(args) => load::run(&args),
        Command::Mark { what } => {
            match what {
                Word::Watch => Mark::Watch.make(),
                Word::Rest => Mark::Rest.make(),
            }
            Ok(())
        }
        Command::Report(args) => report::run(&args),
        Command::Check(args) => check::run(&args),
    }
}
