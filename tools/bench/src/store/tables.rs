// SPDX-License-Identifier: GPL-2.0-only
//! LevelDB and RocksDB, by their C interfaces, which are the same but for a prefix. A turn is
//! one batch, written with sync.

use super::Store;
use super::library::Library;
use anyhow::{Context, Result, bail};
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

type Handle = *mut c_void;

macro_rules! interface {
    ($($name:ident: $type:ty,)*) => {
        struct Interface { $($name: $type,)* }

        impl Interface {
            fn find(library: &Library, prefix: &str) -> Result<Self> {
                Ok(Self {
                    // SAFETY: leveldb/c.h and rocksdb/c.h declare the functions so.
                    $($name: unsafe { library.function(&format!("{prefix}_{}", stringify!($name)))? },)*
                })
            }
        }
    };
}

interface! {
    options_create: unsafe extern "C" fn() -> Handle,
    options_set_create_if_missing: unsafe extern "C" fn(Handle, c_uchar),
    options_set_compression: unsafe extern "C" fn(Handle, c_int),
    options_set_write_buffer_size: unsafe extern "C" fn(Handle, usize),
    open: unsafe extern "C" fn(Handle, *const c_char, *mut *mut c_char) -> Handle,
    writeoptions_create: unsafe extern "C" fn() -> Handle,
    writeoptions_set_sync: unsafe extern "C" fn(Handle, c_uchar),
    readoptions_create: unsafe extern "C" fn() -> Handle,
    writebatch_create: unsafe extern "C" fn() -> Handle,
    writebatch_clear: unsafe extern "C" fn(Handle),
    writebatch_put: unsafe extern "C" fn(Handle, *const u8, usize, *const u8, usize),
    write: unsafe extern "C" fn(Handle, Handle, Handle, *mut *mut c_char),
    get: unsafe extern "C" fn(Handle, Handle, *const u8, usize, *mut usize, *mut *mut c_char) -> *mut u8,
    free: unsafe extern "C" fn(*mut c_void),
}

/// One of the two. Closed by the end of the process.
pub struct Tables {
    call: Interface,
    db: Handle,
    sync: Handle,
    read: Handle,
    batch: Handle,
}

impl Tables {
    pub fn leveldb(directory: &Path) -> Result<Self> {
        Self::new(
            directory,
            "leveldb",
            &[c"libleveldb.so.1d", c"libleveldb.so.1", c"libleveldb.so"],
        )
    }

    pub fn rocksdb(directory: &Path) -> Result<Self> {
        Self::new(
            directory,
            "rocksdb",
            &[c"librocksdb.so.9.10", c"librocksdb.so"],
        )
    }

    fn new(directory: &Path, name: &str, files: &[&CStr]) -> Result<Self> {
        let library = Library::open(files).with_context(|| format!("no {name} is installed"))?;
        let call = Interface::find(&library, name)?;
        let path = directory.join(name);
        std::fs::create_dir_all(&path)?;
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut error = ptr::null_mut();
        // SAFETY: as the interface asks for it: handles from its own functions, terminated
        // strings, and an error that was set to null. What is made here is kept for good.
        unsafe {
            let options = (call.options_create)();
            (call.options_set_create_if_missing)(options, 1);
            (call.options_set_compression)(options, 0);
            // Large enough for a run: what is measured is the way to the log and the table in
            // memory, without the compactions that follow.
            (call.options_set_write_buffer_size)(options, 256 << 20);
            let db = (call.open)(options, path.as_ptr(), &mut error);
            check(&call, error)?;
            let sync = (call.writeoptions_create)();
            (call.writeoptions_set_sync)(sync, 1);
            let read = (call.readoptions_create)();
            let batch = (call.writebatch_create)();
            Ok(Self {
                call,
                db,
                sync,
                read,
                batch,
            })
        }
    }
}

/// # Safety
///
/// `error` must be null or a string of the library's.
unsafe fn check(call: &Interface, error: *mut c_char) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: terminated, and freed once.
    let text = unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        (call.free)(error.cast());
        text
    };
    bail!("{text}")
}

impl Store for Tables {
    fn put(&mut self, key: &[u8], body: &[u8]) -> Result<()> {
        // SAFETY: the batch is open; bytes are copied before it returns.
        unsafe {
            (self.call.writebatch_put)(
                self.batch,
                key.as_ptr(),
                key.len(),
                body.as_ptr(),
                body.len(),
            );
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        let mut error = ptr::null_mut();
        // SAFETY: open handles, and an error that was set to null.
        unsafe {
            (self.call.write)(self.db, self.sync, self.batch, &mut error);
            (self.call.writebatch_clear)(self.batch);
            check(&self.call, error)
        }
    }

    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let (mut len, mut error) = (0, ptr::null_mut());
        // SAFETY: open handles; what is returned has `len` bytes and is freed once.
        unsafe {
            let (at, size) = (key.as_ptr(), key.len());
            let found = (self.call.get)(self.db, self.read, at, size, &mut len, &mut error);
            check(&self.call, error)?;
            if found.is_null() {
                return Ok(None);
            }
            let body = std::slice::from_raw_parts(found, len).to_vec();
            (self.call.free)(found.cast());
            Ok(Some(body))
        }
    }
}
