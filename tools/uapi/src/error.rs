// SPDX-License-Identifier: GPL-2.0-only

//! Errors that say what to do next.

use std::io;

/// What a call of this crate may answer.
pub type Result<T> = std::result::Result<T, Error>;

/// A system call that failed: what was tried, the errno, and advice.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {}{}", text(.cause), advice(.hint))]
pub struct Error {
    /// What was tried, with the names of what it was tried on.
    pub what: String,
    /// The system's answer. Not the error's source: it is part of its text.
    pub cause: io::Error,
    /// What to do about it, if something can be said.
    pub hint: Option<&'static str>,
}

/// `No such device`, without the number.
fn text(cause: &io::Error) -> String {
    let text = cause.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
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
        cause: io::Error,
        hints: &[(i32, &'static str)],
    ) -> Self {
        let errno = cause.raw_os_error();
        let hint = hints
            .iter()
            .find(|(e, _)| Some(*e) == errno)
            .map(|(_, h)| *h);
        Self {
            what: what.into(),
            cause,
            hint,
        }
    }

    /// The errno, 0 if there is none.
    pub fn errno(&self) -> i32 {
        self.cause.raw_os_error().unwrap_or(0)
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> Self {
        io::Error::new(e.cause.kind(), e)
    }
}

pub(crate) const OPEN_CONTROL: &[(i32, &str)] = &[
    (
        libc::ENOENT,
        "the module is not loaded: run `modprobe pmskb`, or `insmod pmskb.ko`",
    ),
    (
        libc::EACCES,
        "only root may format, attach and detach: run it with sudo",
    ),
    (
        libc::EPERM,
        "only root may format, attach and detach: run it with sudo",
    ),
];

pub(crate) const OPEN_STORE: &[(i32, &str)] = &[
    (
        libc::ENOENT,
        "no such store is attached: `pmskbctl list` shows those that are, \
         `pmskbctl attach DEVICE` attaches one",
    ),
    (
        libc::EACCES,
        "the owner and mode of the device node decide who may use a store",
    ),
    (
        libc::ENODEV,
        "the store was detached; attach it again with `pmskbctl attach DEVICE`",
    ),
];

pub(crate) const OPEN_DEVICE: &[(i32, &str)] = &[
    (
        libc::ENOENT,
        "there is no such device: `ndctl list -N` shows /dev/pmemN (fsdax), \
         `daxctl list` shows /dev/daxN.M",
    ),
    (
        libc::EACCES,
        "only root may open the device of a region: run it with sudo",
    ),
    (
        libc::EBUSY,
        "the device is in use: unmount it, or detach the store that holds it",
    ),
];

/// What is wrong with a device, whatever it is wanted for.
macro_rules! device_hints {
    ($($more:expr),* $(,)?) => {
        &[
            (libc::EPERM, "this needs CAP_SYS_ADMIN: run it with sudo"),
            (
                libc::EBUSY,
                "something else holds the region: unmount the file system on it, or see with \
                 `pmskbctl list` whether it is attached already",
            ),
            (
                libc::ENOTBLK,
                "this is not the device of a DAX region: give /dev/pmemN (fsdax) or /dev/daxN.M",
            ),
            (
                libc::ENODEV,
                "this device is no DAX memory: give /dev/pmemN (fsdax) or /dev/daxN.M",
            ),
            (
                libc::EUNATCH,
                "a /dev/daxN.M must belong to the driver fsdev_dax: unbind it from device_dax, then \
                 `echo daxN.M > /sys/bus/dax/drivers/fsdev_dax/new_id`",
            ),
            (
                libc::ENXIO,
                "the region's writes are durable only after a flush by the host (virtio-pmem): use \
                 an NVDIMM, or memory reserved with memmap= on the kernel command line",
            ),
            (libc::EXDEV, "the region consists of several ranges that are not adjacent"),
            (libc::ERANGE, "the partition does not start and end at a multiple of 4 KiB"),
            (libc::EFBIG, "the region is larger than a store can be"),
            (
                libc::EIO,
                "the media cannot be read or written: see the kernel log, and `ndctl list -M` for \
                 bad blocks",
            ),
            (libc::EROFS, "the device is read-only"),
            $($more),*
        ]
    };
}

pub(crate) const FORMAT: &[(i32, &str)] = device_hints!(
    (
        libc::EEXIST,
        "the region is not blank: what it holds would be lost. If that is what you want, give \
         --force",
    ),
    (
        libc::EOPNOTSUPP,
        "the namespace is raw or in sector mode, or has no struct pages: make it over with \
         `ndctl create-namespace -f -e namespaceX.Y -m fsdax -M mem`",
    ),
    (
        libc::EINVAL,
        "the region is too small (a store needs at least 8 MiB), or --head-size leaves no room \
         for data",
    ),
);

pub(crate) const ATTACH: &[(i32, &str)] = device_hints!(
    (libc::EEXIST, "a store with this uuid is attached already (`pmskbctl list` tells)"),
    (libc::EADDRINUSE, "a store with this uuid is attached already (`pmskbctl list` tells)"),
    (libc::ENFILE, "too many stores are attached"),
    (libc::EMEDIUMTYPE, "the region holds no store: `pmskbctl format DEVICE` makes one"),
    (
        libc::EUCLEAN,
        "the store is damaged; nothing was changed. `pmskbctl fsck --image DEVICE` says where, and \
         with --repair mends what can be",
    ),
    (
        libc::EOPNOTSUPP,
        "the store needs a newer module; or the namespace is raw or in sector mode: then make it \
         over with `ndctl create-namespace -f -e namespaceX.Y -m fsdax -M mem`",
    ),
);

pub(crate) const DETACH: &[(i32, &str)] = &[
    (
        libc::EPERM,
        "detaching needs CAP_SYS_ADMIN: run it with sudo",
    ),
    (
        libc::ENODEV,
        "no such store is attached: `pmskbctl list` shows those that are",
    ),
    (
        libc::ENOENT,
        "no such store is attached: `pmskbctl list` shows those that are",
    ),
    (
        libc::EBUSY,
        "it is in use: stop the programs that have it open or mapped, close their sockets \
         (`fuser -v /dev/pmskbN`), or give the stack longer with --timeout",
    ),
];

pub(crate) const ATTACH_SOCKET: &[(i32, &str)] = &[
    (
        libc::EBUSY,
        "the socket belongs to something else already (kTLS, sockmap, MPTCP)",
    ),
    (
        libc::EEXIST,
        "the socket has an upper layer protocol or is attached already",
    ),
    (libc::EOPNOTSUPP, "only TCP sockets can be attached"),
    (libc::ENOTSOCK, "not a socket"),
    (libc::ENOTCONN, "the socket must be connected or listening"),
    (
        libc::EIO,
        "the store's device is gone or failing: see the kernel log",
    ),
    (
        libc::EROFS,
        "the store may only be read: detach it, and attach it without --read-only",
    ),
];

pub(crate) const SUBMIT: &[(i32, &str)] = &[
    (libc::ENODEV, "the store was detached"),
    (libc::EROFS, READ_ONLY),
    (libc::EACCES, NOT_WRITABLE),
    (
        libc::E2BIG,
        "an atomic array has at most 1024 operations and 262144 extents; make it smaller",
    ),
    (
        libc::EIO,
        "the store's device is gone or failing: see the kernel log",
    ),
];

const READ_ONLY: &str = "the store may only be read: it was attached with --read-only, or has a \
    feature that this module only can read";

const NOT_WRITABLE: &str = "the device node is open for reading only: its owner and mode decide \
    who may change the store";

/// Of one operation.
pub(crate) const OUTCOME: &[(i32, &str)] = &[
    (
        libc::ENOENT,
        "`pmskbctl ls` shows the records that are there",
    ),
    (
        libc::EEXIST,
        "the key has a record: leave out the condition to replace it",
    ),
    (
        libc::ESTALE,
        "the key's record has another sequence number by now (`pmskbctl ls` shows it), or a token \
         was given back already",
    ),
    (
        libc::ECANCELED,
        "another operation of the atomic array failed, so nothing of it was done",
    ),
    (
        libc::ENOSPC,
        "the store is full: delete records, or `pmskbctl compact` it",
    ),
    (libc::EROFS, READ_ONLY),
    (libc::EACCES, NOT_WRITABLE),
    (libc::ENAMETOOLONG, "a key has at most 1024 bytes"),
    (libc::EFBIG, "an object has at most 1 GiB"),
    (
        libc::EIO,
        "the store's device is gone or failing: see the kernel log",
    ),
];

pub(crate) const UPKEEP: &[(i32, &str)] = &[
    (libc::ENODEV, "the store was detached"),
    (
        libc::ENOTTY,
        "this is not a store's device node, or the module is an older one",
    ),
    (libc::EROFS, READ_ONLY),
    (libc::EACCES, NOT_WRITABLE),
    (
        libc::ENOSPC,
        "there is no free frame to move anything to: delete something first",
    ),
    (
        libc::EIO,
        "the store's device is gone or failing: see the kernel log",
    ),
];

pub(crate) const OPEN_RECORD: &[(i32, &str)] = &[
    (
        libc::EMFILE,
        "the process has too many files open: close records that are done with, or raise its \
         limit (`ulimit -n`)",
    ),
    (libc::EACCES, "the store is open for writing only"),
    (
        libc::EUCLEAN,
        "the record is damaged: `pmskbctl verify` tells what else is",
    ),
    (libc::ENODEV, "the store was detached"),
    (
        libc::EIO,
        "the store's device is gone or failing: see the kernel log",
    ),
];

pub(crate) const ALLOC: &[(i32, &str)] = &[
    (
        libc::ENOSPC,
        "the store has not that many free frames (`pmskbctl status` tells): delete records, or \
         ask for less",
    ),
    (libc::EINVAL, "a buffer has 1 byte to 64 MiB"),
    (libc::EACCES, "the store is open for reading only"),
    (
        libc::EMFILE,
        "the process has too many files open: drop buffers that are done with, or raise its \
         limit (`ulimit -n`)",
    ),
    (libc::ENODEV, "the store was detached"),
    (
        libc::EIO,
        "the store's device is gone or failing: see the kernel log",
    ),
];
