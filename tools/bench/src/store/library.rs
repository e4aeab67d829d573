// SPDX-License-Identifier: GPL-2.0-only
//! A shared library that is looked up when the program runs: the program is built, and
//! measures everything else, where it is not installed.

use anyhow::{Result, bail};
use std::ffi::{CStr, CString, c_void};
use std::mem;

/// A library, open for good.
pub struct Library(*mut c_void);

impl Library {
    /// Opens the first of these that is there.
    pub fn open(names: &[&CStr]) -> Result<Self> {
        for name in names {
            // SAFETY: a terminated string; the libraries named here do nothing odd when they are
            // loaded.
            let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
            if !handle.is_null() {
                return Ok(Self(handle));
            }
        }
        // SAFETY: after a failure it returns a terminated string, valid until the next call.
        let error = unsafe { CStr::from_ptr(libc::dlerror()) };
        bail!("{}", error.to_string_lossy())
    }

    /// A function of it.
    ///
    /// # Safety
    ///
    /// `F` must be the type of a pointer to the function.
    pub unsafe fn function<F: Copy>(&self, name: &str) -> Result<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let symbol = CString::new(name)?;
        // SAFETY: the handle is open, the string is terminated.
        let found = unsafe { libc::dlsym(self.0, symbol.as_ptr()) };
        if found.is_null() {
            bail!("the library has no {name}");
        }
        // SAFETY: of the same size, and the caller knows the type.
        Ok(unsafe { mem::transmute_copy(&found) })
    }
}
