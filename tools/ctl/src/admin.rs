// SPDX-License-Identifier: GPL-2.0-only

//! Format, attach, detach.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Args;
use pmskb_uapi::{store, Control, FormatOptions};
use serde_json::json;

use crate::text;

/// Arguments of `format`.
#[derive(Args)]
pub struct Format {
    /// /dev/pmemN or /dev/daxN.M
    device: PathBuf,
    /// A name for people, at most 32 bytes
    #[arg(long, default_value = "")]
    label: String,
    /// The store's uuid; random by default
    #[arg(long, value_parser = text::parse_uuid)]
    uuid: Option<[u8; 16]>,
    /// Whatever the region holds now: it is lost
    #[arg(long)]
    force: bool,
    /// Keep packet heads in DRAM
    #[arg(long, conflicts_with = "head_size")]
    heads_dram: bool,
    /// Size of the area for packet heads, bytes or with K, M, G; 1/16 of the region
    /// by default
    #[arg(long, value_name = "SIZE", value_parser = text::parse_size)]
    head_size: Option<u64>,
}

/// Arguments of `attach`.
#[derive(Args)]
pub struct Attach {
    /// /dev/pmemN or /dev/daxN.M
    device: PathBuf,
    /// Only to be read: nothing is changed, and no socket can be attached
    #[arg(long)]
    read_only: bool,
    /// Every object that is put gets a CRC32C, beside its Internet checksum
    #[arg(long)]
    crc32c: bool,
}

/// Arguments of `detach`.
#[derive(Args)]
pub struct Detach {
    /// pmskbN
    #[arg(value_parser = text::parse_store)]
    store: u32,
    /// How long to wait for packets that the network stack still holds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
}

/// `pmem0` as `/dev/pmem0`.
fn device_path(device: &std::path::Path) -> PathBuf {
    if device.exists() || device.components().count() > 1 {
        return device.to_owned();
    }
    std::path::Path::new("/dev").join(device)
}

/// Makes a store.
pub fn format(a: &Format, json: bool) -> anyhow::Result<ExitCode> {
    let device = device_path(&a.device);
    let options = FormatOptions {
        label: a.label.clone(),
        uuid: a.uuid,
        force: a.force,
        heads_dram: a.heads_dram,
        head_bytes: a.head_size.unwrap_or(0),
    };
    let uuid = Control::open()?.format(&device, &options)?;
    let uuid = text::uuid(&uuid);
    if json {
        println!(
            "{}",
            json!({ "device": device, "uuid": uuid, "label": a.label })
        );
    } else {
        println!("{}: formatted, uuid {uuid}", device.display());
        println!("  `pmskbctl attach {}` makes it usable", device.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Attaches a store.
pub fn attach(a: &Attach, json: bool) -> anyhow::Result<ExitCode> {
    let device = device_path(&a.device);
    let (minor, uuid) = Control::open()?.attach(&device, a.read_only, a.crc32c)?;
    let uuid = text::uuid(&uuid);
    let node = format!("/dev/pmskb{minor}");
    // udev makes the node, which may take a moment.
    for _ in 0..50 {
        if std::path::Path::new(&node).exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if json {
        println!(
            "{}",
            json!({ "device": device, "store": node, "uuid": uuid, "read_only": a.read_only })
        );
    } else {
        let how = if a.read_only { ", read-only" } else { "" };
        println!("{}: attached as {node}{how}, uuid {uuid}", device.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Detaches a store.
pub fn detach(a: &Detach, json: bool) -> anyhow::Result<ExitCode> {
    let timeout = a
        .timeout
        .map(Duration::try_from_secs_f64)
        .transpose()
        .context("--timeout is a number of seconds")?;
    Control::open()?.detach(a.store, timeout)?;
    if json {
        println!(
            "{}",
            json!({ "store": format!("/dev/pmskb{}", a.store), "detached": true })
        );
    } else {
        println!("pmskb{}: detached", a.store);
    }
    Ok(ExitCode::SUCCESS)
}

/// The store that is meant: the one named, or the only one.
pub fn the_store(named: Option<u32>) -> anyhow::Result<u32> {
    match (named, &store::attached()[..]) {
        (Some(minor), _) => Ok(minor),
        (None, [minor]) => Ok(*minor),
        (None, []) => {
            anyhow::bail!("no store is attached\n  `pmskbctl attach DEVICE` attaches one")
        }
        (None, several) => {
            let names: Vec<String> = several.iter().map(|n| format!("pmskb{n}")).collect();
            anyhow::bail!(
                "more than one store is attached\n  say which: {}",
                names.join(", ")
            )
        }
    }
}
