// SPDX-License-Identifier: GPL-2.0

//! Files of ours that are no device's: each an anonymous inode of its own, so that it has a size
//! and an `address_space`. Its operations keep the module, and what it is keeps the store, as an
//! open device node does.

use crate::{bindings as ext, store::Store, vma::Operations};
use core::{ops::Deref, ptr, ptr::NonNull};
use kernel::{
    bindings,
    error::from_err_ptr,
    ffi::c_int,
    fs::{File, LocalFile},
    prelude::*,
    sync::{aref::ARef, Arc, ArcBorrow},
    types::ForeignOwnable,
};

/// A store with one more open file, for as long as this is.
pub(crate) struct OpenStore(Arc<Store>);

impl OpenStore {
    /// Counts a file. `EIO` if the store is going or gone.
    pub(crate) fn new(store: &Arc<Store>) -> Result<Self> {
        store.file_opened().map_err(|_| EIO)?;
        Ok(Self(store.clone()))
    }
}

impl Deref for OpenStore {
    type Target = Arc<Store>;

    fn deref(&self) -> &Arc<Store> {
        &self.0
    }
}

impl Drop for OpenStore {
    fn drop(&mut self) {
        self.0.file_closed();
    }
}

/// A kind of file: what is behind each of them.
///
/// # Safety
///
/// [`Kind::operations`] are those of this kind only, and have [`release::<Self>`](release).
pub(crate) unsafe trait Kind: Send + Sync + Sized + 'static {
    /// What `/proc/PID/fd` shows.
    const NAME: &'static CStr;
    /// `O_RDONLY` or `O_RDWR`.
    const MODE: u32;

    /// What can be done with it.
    fn operations() -> &'static Operations<bindings::file_operations>;

    /// Its size.
    fn size(&self) -> u64;
}

/// A new file that no descriptor names yet. Process context.
pub(crate) fn create<K: Kind>(inner: Arc<K>) -> Result<ARef<File>> {
    let size = i64::try_from(inner.size()).map_err(|_| EFBIG)?;
    let private = inner.into_foreign();
    // SAFETY: Name and operations are static; the operations know what `private` is.
    let file = from_err_ptr(unsafe {
        ext::anon_inode_create_getfile(
            K::NAME.as_char_ptr(),
            &K::operations().0,
            private,
            K::MODE as c_int,
            ptr::null(),
        )
    });
    let file = file.inspect_err(|_| {
        // SAFETY: From `into_foreign()` above; no file has it.
        drop(unsafe { <Arc<K> as ForeignOwnable>::from_foreign(private) });
    })?;
    // SAFETY: A new file, which nobody else has seen.
    unsafe { ext::pmskb_file_by_position(file, size) };
    let file = NonNull::new(file.cast::<File>()).ok_or(ENOMEM)?;
    // SAFETY: Our reference is handed over; `File` has the layout of `struct file`, and nobody
    // has the file's position.
    Ok(unsafe { ARef::from_raw(file) })
}

/// What is behind a file, if it is of this kind.
pub(crate) fn of<K: Kind>(file: &LocalFile) -> Option<Arc<K>> {
    // SAFETY: `file` is open, so it has operations.
    let ours = unsafe { ptr::eq((*file.as_ptr()).f_op, &K::operations().0) };
    // SAFETY: By its operations it is of this kind.
    ours.then(|| unsafe { behind::<K>(file.as_ptr()) }.into())
}

/// What is behind an open file.
///
/// # Safety
///
/// `file` is of this kind, and is not closed for the life of the result.
pub(crate) unsafe fn behind<'a, K: Kind>(file: *mut bindings::file) -> ArcBorrow<'a, K> {
    // SAFETY: `create()` put it there, and `release()` has not taken it.
    unsafe { <Arc<K> as ForeignOwnable>::borrow((*file).private_data) }
}

/// `file_operations::release`.
///
/// # Safety
///
/// The last close of a file of this kind.
pub(crate) unsafe extern "C" fn release<K: Kind>(
    _inode: *mut bindings::inode,
    file: *mut bindings::file,
) -> c_int {
    // SAFETY: Put there by `create()`; this is its end.
    drop(unsafe { <Arc<K> as ForeignOwnable>::from_foreign((*file).private_data) });
    0
}

/// `file_operations::llseek`.
///
/// # Safety
///
/// A seek of an open file of this kind.
pub(crate) unsafe extern "C" fn llseek<K: Kind>(
    file: *mut bindings::file,
    off: i64,
    whence: c_int,
) -> i64 {
    // SAFETY: An open file of this kind.
    let size = unsafe { behind::<K>(file) }.size();
    // SAFETY: As above.
    unsafe { bindings::fixed_size_llseek(file, off, whence, size as i64) }
}
