// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/pmskb`: makes stores of regions, attaches and detaches them. Needs
//! CAP_SYS_ADMIN.

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use crate::{error, sys, Error, Result};

/// The control device.
pub const CONTROL: &str = "/dev/pmskb";

/// The control device, open.
#[derive(Debug)]
pub struct Control(File);

/// How a region is made a store.
#[derive(Debug, Clone, Default)]
pub struct FormatOptions {
    /// A name for people, at most 32 bytes of UTF-8.
    pub label: String,
    /// The store's uuid; random if `None`.
    pub uuid: Option<[u8; 16]>,
    /// Over whatever the region holds.
    pub force: bool,
    /// Packet heads stay in DRAM.
    pub heads_dram: bool,
    /// Bytes of the head area; 0 for the default.
    pub head_bytes: u64,
}

impl Control {
    /// Opens the control device.
    pub fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL);
        file.map(Self)
            .map_err(|e| Error::new(format!("cannot open {CONTROL}"), e, error::OPEN_CONTROL))
    }

    /// Makes a store of `device`'s region. Returns its uuid.
    pub fn format(&self, device: &Path, options: &FormatOptions) -> Result<[u8; 16]> {
        let what = || format!("cannot format {}", device.display());
        let mut label = [0; sys::PMSKB_LABEL_LEN as usize];
        let Some(room) = label.get_mut(..options.label.len()) else {
            return Err(Error {
                what: what(),
                cause: std::io::Error::from_raw_os_error(libc::ENAMETOOLONG),
                hint: Some("a label has at most 32 bytes"),
            });
        };
        room.copy_from_slice(options.label.as_bytes());
        let region = open_region(device)?;
        let mut flags = 0;
        if options.force {
            flags |= sys::PMSKB_FORMAT_FORCE;
        }
        if options.heads_dram {
            flags |= sys::PMSKB_FORMAT_HEADS_DRAM;
        }
        let mut arg = sys::pmskb_format {
            fd: region.as_raw_fd(),
            flags,
            uuid: options.uuid.unwrap_or_default(),
            label,
            head_bytes: options.head_bytes,
            reserved: [0; 4],
        };
        // SAFETY: the request takes a struct pmskb_format, which `arg` is.
        unsafe { self.ioctl(sys::IOC_FORMAT, &mut arg) }
            .map_err(|e| Error::new(what(), e, error::FORMAT))?;
        Ok(arg.uuid)
    }

    /// Attaches `device`'s store, so that it can only be read if `read_only`; with `crc32c`
    /// all its new records have a CRC32C. Returns
    /// N of `/dev/pmskbN`, and the uuid.
    pub fn attach(&self, device: &Path, read_only: bool, crc32c: bool) -> Result<(u32, [u8; 16])> {
        let region = open_region(device)?;
        let mut flags = 0;
        if read_only {
            flags |= sys::PMSKB_ATTACH_READ_ONLY;
        }
        if crc32c {
            flags |= sys::PMSKB_ATTACH_CRC32C;
        }
        let mut arg = sys::pmskb_attach {
            fd: region.as_raw_fd(),
            flags,
            ..Default::default()
        };
        // SAFETY: the request takes a struct pmskb_attach, which `arg` is.
        unsafe { self.ioctl(sys::IOC_ATTACH, &mut arg) }.map_err(|e| {
            Error::new(
                format!("cannot attach {}", device.display()),
                e,
                error::ATTACH,
            )
        })?;
        Ok((arg.minor, arg.uuid))
    }

    /// Detaches `/dev/pmskb{minor}`. `None`: the module's own time limit.
    pub fn detach(&self, minor: u32, timeout: Option<Duration>) -> Result<()> {
        // 0 stands for the default, so that no wait at all is the shortest.
        let timeout_ms = timeout.map_or(0, |t| {
            u32::try_from(t.as_millis()).unwrap_or(u32::MAX).max(1)
        });
        let mut arg = sys::pmskb_detach {
            minor,
            timeout_ms,
            reserved: 0,
        };
        // SAFETY: the request takes a struct pmskb_detach, which `arg` is.
        unsafe { self.ioctl(sys::IOC_DETACH, &mut arg) }
            .map_err(|e| Error::new(format!("cannot detach pmskb{minor}"), e, error::DETACH))
    }

    /// # Safety
    ///
    /// `request` must be one that takes a `T`.
    unsafe fn ioctl<T>(&self, request: u32, arg: &mut T) -> std::io::Result<()> {
        // SAFETY: `arg` is valid for reads and writes of what the request takes.
        let r = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                request as libc::Ioctl,
                std::ptr::from_mut(arg),
            )
        };
        if r < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Opens a region's device. Not exclusively: the module claims it itself.
fn open_region(device: &Path) -> Result<OwnedFd> {
    let what = || format!("cannot open {}", device.display());
    let name = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
        .map_err(|e| Error::new(what(), e.into(), &[]))?;
    // SAFETY: `name` is a C string.
    let fd = unsafe { libc::open(name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(Error::last(what(), error::OPEN_DEVICE));
    }
    // SAFETY: the descriptor was just opened, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
