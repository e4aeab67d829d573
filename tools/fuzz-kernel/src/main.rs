// SPDX-License-Identifier: GPL-2.0-only

//! Fuzzers for the module itself. They run in a virtual machine: what they find may be the end of
//! the kernel. All of it follows from a seed; a round depends on its number and the seed only.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod calls;
mod images;
mod packets;
mod run;
mod store;
mod sys;
mod wire;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fuzzes the pmskb module of the kernel that this runs on.
///
/// Destroys what is on the devices that it is given. Prints TAP.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Calls of the interface, right and wrong ones, by one thread and by several
    Calls(calls::Calls),
    /// Damaged images are attached; what is attached is read and changed
    Images(images::Images),
    /// Packets that nobody sends, at attached sockets behind a tun device
    Packets(packets::Packets),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Calls(a) => calls::calls(&a),
        Command::Images(a) => images::images(&a),
        Command::Packets(a) => packets::packets(&a),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            println!("Bail out! {e:#}");
            ExitCode::from(2)
        }
    }
}
