// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/pmskbN`: a store.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use crate::{error, sys, Batch, Buffer, Error, Mapping, Object, Result};

/// A store, open.
#[derive(Debug)]
pub struct Store {
    file: File,
    path: PathBuf,
}

/// A store's counters, in words.
#[derive(Debug, Clone)]
pub struct StoreInfo {
    /// The numbers as the module gives them.
    pub raw: sys::pmskb_store_info,
}

/// What a call of [`Store::compact`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted {
    /// Where to go on; `None` at the end of the log.
    pub next: Option<u64>,
    /// Records moved.
    pub records: u64,
    /// Their payload bytes.
    pub bytes: u64,
}

/// What a call of [`Store::scrub`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scrubbed {
    /// Sequence number to go on with; `None` at the end of the log.
    pub next: Option<u64>,
    /// Records checked.
    pub records: u64,
    /// Payload bytes read.
    pub bytes: u64,
    /// Sequence numbers of bad records, and what is wrong with them: EBADMSG their
    /// bytes have another checksum, EIO the media cannot be read, EUCLEAN their
    /// extents are damaged.
    pub bad: Vec<(u64, i32)>,
}

/// Bad records that one call of [`Store::scrub`] can tell of.
const SCRUB_BAD: usize = 256;

/// Names of the reasons why a packet was not placed, by `enum pmskb_unplaced`.
pub const UNPLACED: [(&str, usize); 7] = [
    ("no_frame", sys::PMSKB_UNPLACED_NO_FRAME as usize),
    ("no_mem", sys::PMSKB_UNPLACED_NO_MEM as usize),
    ("shape", sys::PMSKB_UNPLACED_SHAPE as usize),
    ("size", sys::PMSKB_UNPLACED_SIZE as usize),
    ("copy", sys::PMSKB_UNPLACED_COPY as usize),
    ("quota", sys::PMSKB_UNPLACED_QUOTA as usize),
    ("store_quota", sys::PMSKB_UNPLACED_STORE_QUOTA as usize),
];

/// `struct pmskb_counters`.
pub type Counters = sys::pmskb_counters;

impl StoreInfo {
    /// The label, as text.
    pub fn label(&self) -> String {
        text(&self.raw.label)
    }
}

/// A NUL-padded label as text.
pub fn text(label: &[u8]) -> String {
    let end = label.iter().position(|&b| b == 0).unwrap_or(label.len());
    String::from_utf8_lossy(&label[..end]).into_owned()
}

/// `pmskb3`, `/dev/pmskb3` or `3` as the number of a store.
pub fn minor_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("/dev/").unwrap_or(name);
    let digits = digits.strip_prefix("pmskb").unwrap_or(digits);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// The numbers of all attached stores, in order.
pub fn attached() -> Vec<u32> {
    let mut minors: Vec<u32> = std::fs::read_dir("/dev")
        .into_iter()
        .flatten()
        .filter_map(|e| {
            let name = e.ok()?.file_name();
            minor_of(name.to_str()?.strip_prefix("pmskb")?)
        })
        .collect();
    minors.sort_unstable();
    minors
}

impl Store {
    /// Opens `/dev/pmskb{minor}`.
    pub fn open_minor(minor: u32) -> Result<Self> {
        Self::open(Path::new(&format!("/dev/pmskb{minor}")))
    }

    /// Opens a store's device node.
    ///
    /// For reading and writing, if that is allowed: only who may write can submit.
    pub fn open(path: &Path) -> Result<Self> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => File::open(path),
            r => r,
        };
        let file = file.map_err(|e| {
            Error::new(
                format!("cannot open {}", path.display()),
                e,
                error::OPEN_STORE,
            )
        })?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// The path that it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its numbers, now.
    pub fn info(&self) -> Result<StoreInfo> {
        let mut raw = sys::pmskb_store_info::default();
        // SAFETY: the request writes a struct pmskb_store_info.
        unsafe { self.ioctl(sys::IOC_INFO, std::ptr::from_mut(&mut raw)) }.map_err(|e| {
            const NO_STORE: (i32, &str) = (
                libc::ENOTTY,
                "this is not a store's device node: give /dev/pmskbN",
            );
            Error::new(
                format!("cannot read the counters of {}", self.path.display()),
                e,
                &[NO_STORE],
            )
        })?;
        Ok(StoreInfo { raw })
    }

    /// Maps what of it can be mapped, to be read.
    pub fn map(&self) -> Result<Mapping> {
        let len = self.info()?.raw.map_len;
        Mapping::new(&self.file, len).map_err(|e| {
            Error::new(
                format!("cannot map {}", self.path.display()),
                e,
                error::SUBMIT,
            )
        })
    }

    /// Attaches a TCP socket, connected or listening. What a listening one
    /// accepts from then on is attached, too.
    pub fn attach_socket(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let mut fd = socket.as_raw_fd();
        // SAFETY: the request reads an int.
        unsafe { self.ioctl(sys::IOC_ATTACH_SOCKET, std::ptr::from_mut(&mut fd)) }.map_err(|e| {
            let what = format!("cannot attach a socket to {}", self.path.display());
            Error::new(what, e, error::ATTACH_SOCKET)
        })
    }

    /// Submits a batch. When this returns, what succeeded is durable;
    /// [`Batch::outcome`] tells what did. An error means that (a part of) the
    /// array was refused; its operations' outcomes are that error.
    pub fn submit(&self, batch: &mut Batch) -> Result<()> {
        let call = |arg: &mut sys::pmskb_submit| {
            // SAFETY: the request takes a struct pmskb_submit, whose arrays the batch
            // has just described, and keeps for the length of the call.
            unsafe { self.ioctl(sys::IOC_SUBMIT, std::ptr::from_mut(arg)) }
        };
        batch.submit_with(call).map_err(|e| {
            let what = format!("cannot submit to {}", self.path.display());
            Error::new(what, e, error::SUBMIT)
        })
    }

    /// Frames for at least `len` bytes, 1 to 64 MiB, to fill and put.
    pub fn alloc(&self, len: u64) -> Result<Buffer> {
        let mut raw = sys::pmskb_alloc {
            len,
            ..Default::default()
        };
        // SAFETY: the request fills a struct pmskb_alloc.
        unsafe { self.ioctl(sys::IOC_ALLOC, std::ptr::from_mut(&mut raw)) }
            // SAFETY: just filled.
            .and_then(|()| unsafe { Buffer::new(&raw) })
            .map_err(|e| {
                let what = format!("cannot allocate {len} bytes of {}", self.path.display());
                Error::new(what, e, error::ALLOC)
            })
    }

    /// Opens the record with a key, if there is one.
    pub fn open_key(&self, key: &[u8]) -> Result<Option<Object>> {
        self.open_record(sys::pmskb_open {
            key: key.as_ptr() as u64,
            // One that is too long for the field is too long for a key.
            key_len: u32::try_from(key.len()).unwrap_or(u32::MAX),
            ..Default::default()
        })
    }

    /// Opens the record with a sequence number, if there is one.
    pub fn open_seq(&self, seq: u64) -> Result<Option<Object>> {
        self.open_record(sys::pmskb_open {
            flags: sys::PMSKB_OPEN_SEQ,
            seq,
            ..Default::default()
        })
    }

    /// `raw.key`, if it is not 0, is of a slice that outlives the call.
    fn open_record(&self, mut raw: sys::pmskb_open) -> Result<Option<Object>> {
        // SAFETY: the request reads the key, and fills a struct pmskb_open.
        match unsafe { self.ioctl(sys::IOC_OPEN, std::ptr::from_mut(&mut raw)) } {
            // SAFETY: just filled.
            Ok(()) => Ok(Some(unsafe { Object::new(raw) })),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => {
                let what = format!("cannot open a record of {}", self.path.display());
                Err(Error::new(what, e, error::OPEN_RECORD))
            }
        }
    }

    /// Moves what is alive out of frames with little in them, in at most `steps`
    /// steps (0: 16), from the place on that the call before said, 0 at first. Each
    /// step is whole after a crash; EINTR if a signal came before the first.
    pub fn compact(&self, from: u64, steps: u32) -> Result<Compacted> {
        let mut arg = sys::pmskb_compact {
            from,
            steps,
            ..Default::default()
        };
        // SAFETY: the request takes a struct pmskb_compact, which `arg` is.
        unsafe { self.ioctl(sys::IOC_COMPACT, std::ptr::from_mut(&mut arg)) }.map_err(|e| {
            let what = format!("cannot compact {}", self.path.display());
            Error::new(what, e, error::UPKEEP)
        })?;
        Ok(Compacted {
            next: (arg.done == 0).then_some(arg.from),
            records: arg.records,
            bytes: arg.bytes,
        })
    }

    /// Checks about `max_bytes` (0: 4 MiB) of records against their checksums, in
    /// the order of their sequence numbers, from `from` on. EINTR if a signal came
    /// before anything was checked.
    pub fn scrub(&self, from: u64, max_bytes: u64) -> Result<Scrubbed> {
        let mut bad = vec![sys::pmskb_scrub_bad::default(); SCRUB_BAD];
        let mut arg = sys::pmskb_scrub {
            from,
            max_bytes,
            bad: bad.as_mut_ptr() as u64,
            nr_bad: SCRUB_BAD as u32,
            ..Default::default()
        };
        // SAFETY: the request takes a struct pmskb_scrub, which `arg` is, and fills at
        // most as many elements of `bad` as that has.
        unsafe { self.ioctl(sys::IOC_SCRUB, std::ptr::from_mut(&mut arg)) }.map_err(|e| {
            let what = format!("cannot scrub {}", self.path.display());
            Error::new(what, e, error::UPKEEP)
        })?;
        let bad = bad.iter().take(arg.nr_bad as usize);
        Ok(Scrubbed {
            next: (arg.done == 0).then_some(arg.from),
            records: arg.records,
            bytes: arg.bytes,
            bad: bad.map(|b| (b.seq, b.error)).collect(),
        })
    }

    /// # Safety
    ///
    /// `arg` must be valid for what the request does with it.
    unsafe fn ioctl<T>(&self, request: u32, arg: *mut T) -> io::Result<()> {
        // SAFETY: as promised by the caller.
        let r = unsafe { libc::ioctl(self.file.as_raw_fd(), request as libc::Ioctl, arg) };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_have_names_with_and_without_dev() {
        for name in ["3", "pmskb3", "/dev/pmskb3"] {
            assert_eq!(minor_of(name), Some(3), "{name}");
        }
        for name in [
            "",
            "pmskb",
            "/dev/pmskb",
            "pmem0",
            "pmskb-1",
            "pmskb3x",
            "+3",
        ] {
            assert_eq!(minor_of(name), None, "{name}");
        }
    }

    #[test]
    fn a_missing_store_says_how_to_attach_one() {
        let e = Store::open(Path::new("/dev/pmskb999999")).unwrap_err();
        assert!(e.to_string().contains("pmskbctl attach"), "{e}");
        assert_eq!(e.errno(), libc::ENOENT);
    }
}
