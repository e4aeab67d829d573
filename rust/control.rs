// SPDX-License-Identifier: GPL-2.0

//! `/dev/pmskb`: makes stores of regions, attaches and detaches them.
//!
//! For administrators only (`CAP_SYS_ADMIN`): a store is as good as the region it takes.

use crate::{
    bindings as ext, device, pm, region,
    store::{self, Store},
    uapi::Plain,
    vma::Operations,
};
use kernel::{
    bindings, c_str,
    error::{from_result, to_result},
    ffi::{c_long, c_uint, c_ulong},
    prelude::*,
    sync::Arc,
    transmute::{AsBytes, FromBytes},
    types::Opaque,
    uaccess::{UserPtr, UserSlice},
};

/// The control device.
///
/// # Invariants
///
/// `misc` is registered from [`Control::new`] until this is dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct Control {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
}

// SAFETY: Only touched by the misc device's own code.
unsafe impl Send for Control {}
// SAFETY: As above.
unsafe impl Sync for Control {}

static FOPS: Operations<bindings::file_operations> = Operations(bindings::file_operations {
    owner: crate::this_module(),
    llseek: Some(bindings::noop_llseek),
    unlocked_ioctl: Some(ioctl),
    compat_ioctl: bindings::compat_ptr_ioctl,
    ..pin_init::zeroed()
});

impl Control {
    /// Makes `/dev/pmskb`.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            misc <- Opaque::try_ffi_init(|slot: *mut bindings::miscdevice| {
                // SAFETY: The slot is valid for writes and pinned; name and operations are
                // static. Once registered, it has a device.
                unsafe {
                    slot.write(bindings::miscdevice {
                        minor: bindings::MISC_DYNAMIC_MINOR as i32,
                        name: c_str!("pmskb").as_char_ptr(),
                        fops: &FOPS.0,
                        mode: 0o600,
                        ..Default::default()
                    });
                    to_result(bindings::misc_register(slot))?;
                    region::learn_device_type((*slot).this_device);
                }
                Ok::<(), Error>(())
            }),
        }? Error)
    }
}

#[pinned_drop]
impl PinnedDrop for Control {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariant.
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}

fn read<T>(arg: usize) -> Result<T>
where
    Plain<T>: FromBytes,
{
    let from = UserSlice::new(UserPtr::from_addr(arg), core::mem::size_of::<T>());
    from.reader().read::<Plain<T>>().map(|plain| plain.0)
}

fn write<T>(arg: usize, value: T) -> Result
where
    Plain<T>: AsBytes,
{
    let to = UserSlice::new(UserPtr::from_addr(arg), core::mem::size_of::<T>());
    to.writer().write(&Plain(value))
}

/// # Safety
///
/// An ioctl of an open control file.
unsafe extern "C" fn ioctl(_file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    from_result(|| {
        if !matches!(
            cmd,
            ext::pmskb_cmd_PMSKB_CMD_FORMAT
                | ext::pmskb_cmd_PMSKB_CMD_ATTACH
                | ext::pmskb_cmd_PMSKB_CMD_DETACH
        ) {
            return Err(ENOTTY);
        }
        // SAFETY: No requirements.
        if !unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as i32) } {
            return Err(EPERM);
        }
        match cmd {
            ext::pmskb_cmd_PMSKB_CMD_FORMAT => format(arg),
            ext::pmskb_cmd_PMSKB_CMD_ATTACH => attach(arg),
            _ => detach(arg),
        }?;
        Ok(0)
    })
}

/// `PMSKB_IOC_FORMAT`.
fn format(arg: usize) -> Result {
    let mut args: ext::pmskb_format = read(arg)?;
    let known = ext::PMSKB_FORMAT_FORCE | ext::PMSKB_FORMAT_HEADS_DRAM;
    if args.flags & !known != 0 || args.reserved.iter().any(|word| *word != 0) {
        return Err(EINVAL);
    }
    let heads = match (
        args.flags & ext::PMSKB_FORMAT_HEADS_DRAM != 0,
        args.head_bytes,
    ) {
        (true, 0) => pm::HeadArea::Dram,
        (true, _) => return Err(EINVAL),
        (false, 0) => pm::HeadArea::Default,
        (false, bytes) => pm::HeadArea::Bytes(bytes),
    };
    if args.uuid == [0; 16] {
        // SAFETY: 16 bytes are written.
        unsafe { bindings::generate_random_uuid(args.uuid.as_mut_ptr()) };
    }
    // Up to the first NUL; nothing may follow it.
    let label = args.label;
    let len = label.iter().position(|c| *c == 0).unwrap_or(label.len());
    let (label, rest) = label.split_at(len);
    if rest.iter().any(|c| *c != 0) {
        return Err(EINVAL);
    }
    let mut salt = [0u8; 8];
    crate::host::random(&mut salt);
    let time = crate::host::now();

    let params = pm::FormatParams {
        uuid: args.uuid,
        label,
        heads,
        salt: u64::from_ne_bytes(salt),
        time,
    };
    let region = store::claim(args.fd)?;
    store::format(region, &params, args.flags & ext::PMSKB_FORMAT_FORCE != 0)?;
    write(arg, args)
}

fn publish(store: &Arc<Store>) -> Result<(u32, [u8; 16])> {
    device::publish(store)?;
    Ok((store.minor(), *store.uuid()))
}

/// `PMSKB_IOC_ATTACH`.
fn attach(arg: usize) -> Result {
    let mut args: ext::pmskb_attach = read(arg)?;
    const FLAGS: u32 = ext::PMSKB_ATTACH_READ_ONLY | ext::PMSKB_ATTACH_CRC32C;
    if args.flags & !FLAGS != 0 || args.reserved != 0 {
        return Err(EINVAL);
    }
    let how = store::How {
        read_only: args.flags & ext::PMSKB_ATTACH_READ_ONLY != 0,
        crc32c: args.flags & ext::PMSKB_ATTACH_CRC32C != 0,
    };
    let region = store::claim(args.fd)?;
    let (minor, uuid) = store::attach(region, how, publish)?;
    (args.minor, args.uuid) = (minor, uuid);
    // Whoever is not told which store it is has none.
    write(arg, args).inspect_err(|_| {
        if store::detach(minor, 0, device::unpublish).is_err() {
            pr_info!("pmskb{minor}: attached, but its caller was not told\n");
        }
    })
}

/// `PMSKB_IOC_DETACH`.
fn detach(arg: usize) -> Result {
    let args: ext::pmskb_detach = read(arg)?;
    if args.reserved != 0 {
        return Err(EINVAL);
    }
    store::detach(args.minor, args.timeout_ms, device::unpublish)
}

/// Attaches what the module parameter names. What cannot be attached is reported and left out.
pub(crate) fn attach_param() {
    // SAFETY: No requirements.
    let param = unsafe { ext::pmskb_attach_param() };
    if param.is_null() {
        return;
    }
    // SAFETY: The parameter is a NUL-terminated string that stays.
    let param = unsafe { CStr::from_char_ptr(param) };
    for path in param.to_bytes().split(|c| *c == b',') {
        if path.is_empty() {
            continue;
        }
        let attached = attach_path(path);
        if let Err(e) = attached {
            pr_err!("attach={}: {:?}\n", kernel::str::BStr::from_bytes(path), e);
        }
    }
}

fn attach_path(path: &[u8]) -> Result {
    let mut name = KVec::with_capacity(path.len() + 1, GFP_KERNEL)?;
    name.extend_from_slice(path, GFP_KERNEL)?;
    name.push(0, GFP_KERNEL)?;
    let path = CStr::from_bytes_with_nul(&name).map_err(|_| EINVAL)?;
    let region = store::claim_path(path)?;
    store::attach(region, store::How::default(), publish).map(|_| ())
}
