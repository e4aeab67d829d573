// SPDX-License-Identifier: GPL-2.0-only
//! LMDB, by its C interface: a turn is a transaction, synced when it commits.

use super::Store;
use super::library::Library;
use anyhow::{Context, Result, bail};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

type Handle = *mut c_void;

/// `MDB_val`.
#[repr(C)]
struct Val {
    size: usize,
    data: *const c_void,
}

impl Val {
    fn of(bytes: &[u8]) -> Self {
        Self {
            size: bytes.len(),
            data: bytes.as_ptr().cast(),
        }
    }
}

const NOT_FOUND: c_int = -30798;
const READ_ONLY: c_uint = 0x20000;

macro_rules! interface {
    ($($name:ident: $type:ty,)*) => {
        struct Interface { $($name: $type,)* }

        impl Interface {
            fn find(library: &Library) -> Result<Self> {
                Ok(Self {
                    // SAFETY: lmdb.h declares the functions so.
                    $($name: unsafe { library.function(concat!("mdb_", stringify!($name)))? },)*
                })
            }
        }
    };
}

interface! {
    env_create: unsafe extern "C" fn(*mut Handle) -> c_int,
    env_set_mapsize: unsafe extern "C" fn(Handle, usize) -> c_int,
    env_open: unsafe extern "C" fn(Handle, *const c_char, c_uint, c_uint) -> c_int,
    txn_begin: unsafe extern "C" fn(Handle, Handle, c_uint, *mut Handle) -> c_int,
    txn_commit: unsafe extern "C" fn(Handle) -> c_int,
    txn_abort: unsafe extern "C" fn(Handle),
    dbi_open: unsafe extern "C" fn(Handle, *const c_char, c_uint, *mut c_uint) -> c_int,
    put: unsafe extern "C" fn(Handle, c_uint, *mut Val, *mut Val, c_uint) -> c_int,
    get: unsafe extern "C" fn(Handle, c_uint, *mut Val, *mut Val) -> c_int,
}

/// The one database of an environment. Closed by the end of the process.
pub struct Lmdb {
    call: Interface,
    env: Handle,
    db: c_uint,
    /// The transaction of this turn, or null.
    txn: Handle,
}

impl Lmdb {
    pub fn new(directory: &Path, size: u64) -> Result<Self> {
        let library =
            Library::open(&[c"liblmdb.so.0", c"liblmdb.so"]).context("no LMDB is installed")?;
        let call = Interface::find(&library)?;
        let path = directory.join("lmdb");
        std::fs::create_dir_all(&path)?;
        let path = CString::new(path.as_os_str().as_bytes())?;
        let (mut env, mut txn, mut db) = (ptr::null_mut(), ptr::null_mut(), 0);
        // SAFETY: as lmdb.h asks for it: handles from its own functions, terminated strings.
        unsafe {
            check((call.env_create)(&mut env))?;
            check((call.env_set_mapsize)(env, usize::try_from(size)?))?;
            check((call.env_open)(env, path.as_ptr(), 0, 0o644))?;
            check((call.txn_begin)(env, ptr::null_mut(), 0, &mut txn))?;
            check((call.dbi_open)(txn, ptr::null(), 0, &mut db))?;
            check((call.txn_commit)(txn))?;
        }
        Ok(Self {
            call,
            env,
            db,
            txn: ptr::null_mut(),
        })
    }
}

fn check(code: c_int) -> Result<()> {
    if code != 0 {
        bail!("LMDB answers {code}");
    }
    Ok(())
}

impl Store for Lmdb {
    fn put(&mut self, key: &[u8], body: &[u8]) -> Result<()> {
        let (mut key, mut body) = (Val::of(key), Val::of(body));
        // SAFETY: open handles; the values are read, and copied, before it returns.
        unsafe {
            if self.txn.is_null() {
                let none = ptr::null_mut();
                check((self.call.txn_begin)(self.env, none, 0, &mut self.txn))?;
            }
            check((self.call.put)(self.txn, self.db, &mut key, &mut body, 0))
        }
    }

    fn commit(&mut self) -> Result<()> {
        let txn = std::mem::replace(&mut self.txn, ptr::null_mut());
        if txn.is_null() {
            return Ok(());
        }
        // SAFETY: an open transaction, which is gone then.
        check(unsafe { (self.call.txn_commit)(txn) })
    }

    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let (mut key, mut body) = (Val::of(key), Val::of(&[]));
        let mut txn = ptr::null_mut();
        // SAFETY: open handles; the value is valid until the transaction ends.
        unsafe {
            check((self.call.txn_begin)(
                self.env,
                ptr::null_mut(),
                READ_ONLY,
                &mut txn,
            ))?;
            let code = (self.call.get)(txn, self.db, &mut key, &mut body);
            let found = match code {
                0 => Some(std::slice::from_raw_parts(body.data.cast(), body.size).to_vec()),
                _ => None,
            };
            (self.call.txn_abort)(txn);
            match code {
                0 | NOT_FOUND => Ok(found),
                code => check(code).map(|()| None),
            }
        }
    }
}
