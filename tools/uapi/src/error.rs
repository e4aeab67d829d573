// SPDX-License-Identifier: GPL-2.0-only

//! Errors that say what to do next.

use std::io;

/// What a call of this crate may answer.
pub type Result<T> = std::result::Result<T, Error>;

/// A system call that failed: what was tried, the errno, and advice.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}{}", advice(.hint))]
pub struct Error {
    /// What was tried, with the names of what it was tried on.
    pub what: String,
    /// The system's answer.
    pub source: io::Error,
    /// What to do about it, if something can be said.
    pub hint: Option<&'static str>,
}

fn advice(hint: &Option<&'static str>) -> String {
    hint.map(|h| format!("\n  {h}")).unwrap_or_default()
}

impl Error {
    /// From the last errno; `hints` is consulted for its advice.
    pub(crate) fn last(what: impl Into<String>, hints: &[(i32, &'static str)]) -> Self {
        Self::new(what, io::Error::last_os_error(), hints)
    }

    pub(crate) fn new(
        what: impl Into<String>,
        source: io::Error,
        hints: &[(i32, &'static str)],
    ) -> Self {
        let errno = source.raw_os_error();
        let hint = hints.iter().find(|(e, _)| Some(*e) == errno).map(|(_, h)| *h);
        Self { what: what.into(), source, hint }
    }

    /// The errno, 0 if there is none.
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        io::Error::new(e.source.kind(), e)
    }
}

pub(crate) const OPEN_CONTROL: &[(i32, &str)] = &[
    (libc::ENOENT, "the module is not loaded: run `modprobe pmskb`, or `insmod pmskb.ko`"),
    (libc::EACCES, "only root may format, attach and detach: run it with sudo"),
    (libc::EPERM, "only root may format, attach and detach: run it with sudo"),
];

pub(crate) const OPEN_STORE: &[(i32, &str)] = &[
    (
        libc::ENOENT,
        "no such store is attached: `pmskbctl list` shows those that are, \
         `pmskbctl attach DEVICE` attaches one",
    ),
    (libc::EACCES, "the owner and mode of the device node decide who may use a store"),
    (libc::ENODEV, "the store was detached; attach it again with `pmskbctl attach DEVICE`"),
];

pub(crate) const OPEN_DEVICE: &[(i32, &str)] = &[
    (
        libc::ENOENT,
        "there is no such device: `ndctl list -N` shows /dev/pmemN (fsdax), \
         `daxctl list` shows /dev/daxN.M",
    ),
    (libc::EACCES, "only root may open the device of a region: run it with sudo"),
    (libc::EBUSY, "the device is in use: unmount it, or detach the store that holds it"),
];

pub(crate) const FORMAT: &[(i32, &str)] = &[
    (libc::EPERM, "formatting needs CAP_SYS_ADMIN: run it with sudo"),
    (
        libc::EBUSY,
        "something else holds the region: unmount the file system on it, \
         or detach the store with `pmskbctl detach pmskbN`",
    ),
    (
        libc::EEXIST,
        "the region is not blank: what it holds would be lost. If that is what you want, \
         give --force",
    ),
    (
        libc::ENOTEMPTY,
        "the region is not blank: what it holds would be lost. If that is what you want, \
         give --force",
    ),
    (
        libc::ENODEV,
        "the device cannot be used as memory: a raw or sector namespace must be made over with \
         `ndctl create-namespace -f -e namespaceX.Y -m fsdax -M mem`",
    ),
    (
        libc::ENOTBLK,
        "this is not the device of a DAX region: give /dev/pmemN (fsdax) or /dev/daxN.M",
    ),
    (
        libc::ENOTTY,
        "this is not the device of a DAX region: give /dev/pmemN (fsdax) or /dev/daxN.M",
    ),
    (
        libc::ENXIO,
        "the device is not ready for use by a file system: bind /dev/daxN.M to the fsdev_dax \
         driver",
    ),
    (
        libc::EOPNOTSUPP,
        "the region's writes need a flush by the host (virtio-pmem) or it has no struct pages: \
         use an NVDIMM, or memory reserved with memmap= on the kernel command line",
    ),
    (libc::ERANGE, "the region consists of several ranges that are not adjacent"),
    (libc::ENOSPC, "the region is too small for a store; 16 MiB are enough"),
    (libc::EINVAL, "check --head-size: it must leave room for data, and be a multiple of 4 KiB"),
];

pub(crate) const ATTACH: &[(i32, &str)] = &[
    (libc::EPERM, "attaching needs CAP_SYS_ADMIN: run it with sudo"),
    (
        libc::EBUSY,
        "something else holds the region: a mounted file system, or it is attached already \
         (`pmskbctl list` tells)",
    ),
    (
        libc::EEXIST,
        "a store is attached already from this region, or with this uuid (`pmskbctl list` tells)",
    ),
    (
        libc::ENODATA,
        "the region is not formatted: `pmskbctl format DEVICE` makes a store of it",
    ),
    (libc::EINVAL, "the region is not formatted: `pmskbctl format DEVICE` makes a store of it"),
    (
        libc::EUCLEAN,
        "the store is damaged. `pmskbctl dump --image DEVICE` shows what can still be read; \
         nothing was changed",
    ),
    (
        libc::EBADMSG,
        "the store is damaged. `pmskbctl dump --image DEVICE` shows what can still be read; \
         nothing was changed",
    ),
    (
        libc::EPROTONOSUPPORT,
        "the store has a feature that this module does not know: load a newer module",
    ),
    (
        libc::ENODEV,
        "the device cannot be used as memory: a raw or sector namespace must be made over with \
         `ndctl create-namespace -f -e namespaceX.Y -m fsdax -M mem`",
    ),
    (
        libc::ENXIO,
        "the device is not ready for use by a file system: bind /dev/daxN.M to the fsdev_dax \
         driver",
    ),
    (
        libc::EOPNOTSUPP,
        "the region's writes need a flush by the host (virtio-pmem), or the store has a feature \
         that this module does not know",
    ),
];

pub(crate) const DETACH: &[(i32, &str)] = &[
    (libc::EPERM, "detaching needs CAP_SYS_ADMIN: run it with sudo"),
    (libc::ENODEV, "no such store is attached: `pmskbctl list` shows those that are"),
    (libc::ENOENT, "no such store is attached: `pmskbctl list` shows those that are"),
    (
        libc::EBUSY,
        "it is in use: stop the programs that have it open or mapped, close their sockets \
         (`fuser -v /dev/pmskbN`), or give the stack longer with --timeout",
    ),
];

pub(crate) const ATTACH_SOCKET: &[(i32, &str)] = &[
    (libc::EBUSY, "the socket belongs to something else already (kTLS, sockmap, MPTCP)"),
    (libc::EEXIST, "the socket has an upper layer protocol or is attached already"),
    (libc::EOPNOTSUPP, "only TCP sockets can be attached"),
    (libc::ENOTSOCK, "not a socket"),
    (libc::ENOTCONN, "the socket must be connected or listening"),
    (libc::EIO, "the store's device is gone or failing: see the kernel log"),
];

pub(crate) const SUBMIT: &[(i32, &str)] = &[
    (libc::ENODEV, "the store was detached"),
    (libc::EIO, "the store's device is gone or failing: see the kernel log"),
];
