// SPDX-License-Identifier: GPL-2.0-only
//! The part of QEMU's plugin API (version 4) that is needed, and no more.
//!
//! The functions are looked up in the running program when the plugin is loaded
//! rather than linked: so the crate's tests, which run without QEMU, link too. (The
//! crate `qemu-plugin` needs a newer rustc than this project's.)

use libc::{c_char, c_int, c_uint, c_void};
use std::ffi::CStr;
use std::mem;
use std::ops::Range;
use std::ptr;

/// The version of the API that this module speaks; QEMU refuses to load a plugin
/// that wants one which it does not have.
pub const API_VERSION: c_int = 4;

/// Identifies a plugin to QEMU.
pub type Id = u64;
/// A translation block. Only QEMU makes one, for the callback that it passes it to.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Tb(*mut c_void);
/// An instruction in a translation block, valid as long as that.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Insn(*mut c_void);

/// What a callback does with registers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub enum Regs {
    /// Nothing.
    None = 0,
    /// Reads them.
    Read = 1,
}

/// Which accesses get a callback.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub enum Access {
    /// Stores.
    Write = 2,
    /// Loads and stores.
    ReadWrite = 3,
}

/// `qemu_info_t`.
#[repr(C)]
pub struct Info {
    target_name: *const c_char,
    version_min: c_int,
    version_cur: c_int,
    system_emulation: bool,
    smp_vcpus: c_int,
    max_vcpus: c_int,
}

impl Info {
    /// The most vCPUs that the machine can have, if it is an x86-64 system.
    pub fn vcpus(&self) -> Result<usize, String> {
        // SAFETY: QEMU passes a terminated string that lives as long as it does.
        let target = unsafe { CStr::from_ptr(self.target_name) };
        if target != c"x86_64" || !self.system_emulation {
            return Err(format!("needs qemu-system-x86_64, not {target:?}"));
        }
        usize::try_from(self.max_vcpus).map_err(|e| e.to_string())
    }
}

/// GLib's `GArray` and `GByteArray`, which begin alike.
#[repr(C)]
pub struct GArray {
    data: *mut c_void,
    len: c_uint,
}

/// `qemu_plugin_reg_descriptor`.
#[repr(C)]
struct RegDescriptor {
    handle: *mut c_void,
    name: *const c_char,
    feature: *const c_char,
}

/// A register's handle.
#[derive(Clone, Copy, Debug)]
pub struct Register(*mut c_void);

// SAFETY: QEMU's handle is a number dressed as a pointer; it is only handed back.
unsafe impl Send for Register {}
// SAFETY: as above.
unsafe impl Sync for Register {}

/// `qemu_plugin_mem_value`.
#[repr(C)]
struct MemValue {
    kind: c_int,
    low: u64,
    high: u64,
}

/// `qemu_plugin_simple_cb_t`.
pub type SimpleCb = extern "C" fn(Id);
/// `qemu_plugin_vcpu_simple_cb_t`.
pub type VcpuCb = extern "C" fn(Id, c_uint);
/// `qemu_plugin_vcpu_udata_cb_t`.
pub type ExecCb = extern "C" fn(c_uint, *mut c_void);
/// `qemu_plugin_vcpu_mem_cb_t`.
pub type MemCb = extern "C" fn(c_uint, u32, u64, *mut c_void);
/// `qemu_plugin_vcpu_tb_trans_cb_t`.
pub type TransCb = extern "C" fn(Id, Tb);
/// `qemu_plugin_udata_cb_t`.
pub type ExitCb = extern "C" fn(Id, *mut c_void);

macro_rules! functions {
    ($($name:ident: $type:ty = $symbol:literal,)*) => {
        /// The functions, as found.
        pub struct Qemu { $($name: $type,)* }

        impl Qemu {
            /// Looks all of them up.
            pub fn find() -> Result<Self, String> {
                Ok(Self {
                    $($name: {
                        let found = symbol($symbol)?;
                        // SAFETY: QEMU's qemu-plugin.h of API_VERSION, or GLib's
                        // stable ABI, declares the symbol with this type.
                        unsafe { mem::transmute::<*mut c_void, $type>(found) }
                    },)*
                })
            }
        }
    };
}

functions! {
    register_vcpu_init: unsafe extern "C" fn(Id, VcpuCb)
        = c"qemu_plugin_register_vcpu_init_cb",
    register_trans: unsafe extern "C" fn(Id, TransCb)
        = c"qemu_plugin_register_vcpu_tb_trans_cb",
    register_atexit: unsafe extern "C" fn(Id, ExitCb, *mut c_void)
        = c"qemu_plugin_register_atexit_cb",
    register_exec: unsafe extern "C" fn(Insn, ExecCb, Regs, *mut c_void)
        = c"qemu_plugin_register_vcpu_insn_exec_cb",
    register_mem: unsafe extern "C" fn(Insn, MemCb, Regs, Access, *mut c_void)
        = c"qemu_plugin_register_vcpu_mem_cb",
    mem_get_value: unsafe extern "C" fn(u32) -> MemValue
        = c"qemu_plugin_mem_get_value",
    reset: unsafe extern "C" fn(Id, SimpleCb)
        = c"qemu_plugin_reset",
    tb_n_insns: unsafe extern "C" fn(Tb) -> usize
        = c"qemu_plugin_tb_n_insns",
    tb_get_insn: unsafe extern "C" fn(Tb, usize) -> Insn
        = c"qemu_plugin_tb_get_insn",
    insn_data: unsafe extern "C" fn(Insn, *mut c_void, usize) -> usize
        = c"qemu_plugin_insn_data",
    insn_size: unsafe extern "C" fn(Insn) -> usize
        = c"qemu_plugin_insn_size",
    insn_vaddr: unsafe extern "C" fn(Insn) -> u64
        = c"qemu_plugin_insn_vaddr",
    mem_size_shift: unsafe extern "C" fn(u32) -> c_uint
        = c"qemu_plugin_mem_size_shift",
    mem_is_store: unsafe extern "C" fn(u32) -> bool
        = c"qemu_plugin_mem_is_store",
    get_hwaddr: unsafe extern "C" fn(u32, u64) -> *mut c_void
        = c"qemu_plugin_get_hwaddr",
    hwaddr_is_io: unsafe extern "C" fn(*const c_void) -> bool
        = c"qemu_plugin_hwaddr_is_io",
    hwaddr_phys_addr: unsafe extern "C" fn(*const c_void) -> u64
        = c"qemu_plugin_hwaddr_phys_addr",
    get_registers: unsafe extern "C" fn() -> *mut GArray
        = c"qemu_plugin_get_registers",
    read_register: unsafe extern "C" fn(*mut c_void, *mut GArray) -> c_int
        = c"qemu_plugin_read_register",
    read_memory: unsafe extern "C" fn(u64, *mut GArray, usize) -> bool
        = c"qemu_plugin_read_memory_vaddr",
    array_free: unsafe extern "C" fn(*mut GArray, c_int) -> *mut c_char
        = c"g_array_free",
    bytes_new: unsafe extern "C" fn() -> *mut GArray
        = c"g_byte_array_new",
    bytes_free: unsafe extern "C" fn(*mut GArray, c_int) -> *mut u8
        = c"g_byte_array_free",
    bytes_resize: unsafe extern "C" fn(*mut GArray, c_uint) -> *mut GArray
        = c"g_byte_array_set_size",
}

fn symbol(name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: the name is a terminated string; the lookup has no other demands.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if found.is_null() {
        return Err(format!("this QEMU has no {}", name.to_string_lossy()));
    }
    Ok(found)
}

/// One memory access, valid in the callback that received it.
#[derive(Clone, Copy, Debug)]
pub struct MemAccess {
    /// The guest-physical address of its first byte.
    pub physical: u64,
    /// Its length in bytes.
    pub len: usize,
    /// Whether it is a store.
    pub store: bool,
}

impl Qemu {
    /// Registers the callbacks that hold for the whole run.
    pub fn register(&self, id: Id, init: VcpuCb, trans: TransCb, exit: ExitCb) {
        // SAFETY: `id` is ours, and the callbacks live as long as the library,
        // which is never unloaded because nothing uninstalls it.
        unsafe {
            (self.register_vcpu_init)(id, init);
            (self.register_trans)(id, trans);
            (self.register_atexit)(id, exit, ptr::null_mut());
        }
    }

    /// How many instructions a block has that is being translated.
    pub fn block_len(&self, tb: Tb) -> usize {
        // SAFETY: `tb` comes from the translation callback that is running.
        unsafe { (self.tb_n_insns)(tb) }
    }

    /// Whether an access is a store.
    pub fn is_store(&self, info: u32) -> bool {
        // SAFETY: `info` is as the running memory callback got it.
        unsafe { (self.mem_is_store)(info) }
    }

    /// The value that an access moved, and its length in bytes.
    pub fn value(&self, info: u32) -> (u128, usize) {
        // SAFETY: `info` is as the running memory callback got it.
        let value = unsafe { (self.mem_get_value)(info) };
        let all = u128::from(value.low) | (u128::from(value.high) << 64);
        let len = 1 << value.kind.clamp(0, 4);
        (all & (u128::MAX >> (128 - 8 * len)), len)
    }

    /// Takes all callbacks away, and what was translated with them; then `then` is called, and
    /// may register others.
    pub fn reset(&self, id: Id, then: SimpleCb) {
        // SAFETY: `id` is ours; called from a callback, as QEMU allows; `then` lives on.
        unsafe { (self.reset)(id, then) }
    }

    /// Registers the callbacks for translation and exit again, after a reset.
    pub fn register_again(&self, id: Id, trans: TransCb, exit: ExitCb) {
        // SAFETY: as in register().
        unsafe {
            (self.register_trans)(id, trans);
            (self.register_atexit)(id, exit, ptr::null_mut());
        }
    }

    /// The handles of the instructions in a block that is being translated.
    pub fn instructions(&self, tb: Tb) -> impl Iterator<Item = Insn> + '_ {
        // SAFETY: `tb` comes from the translation callback that is running, and
        // the indices are below the number that QEMU gives.
        let all: Range<usize> = 0..unsafe { (self.tb_n_insns)(tb) };
        // SAFETY: as above.
        all.map(move |i| unsafe { (self.tb_get_insn)(tb, i) })
    }

    /// Copies an instruction's bytes to `buffer`; returns those that it has.
    pub fn code<'b>(&self, insn: Insn, buffer: &'b mut [u8; 16]) -> &'b [u8] {
        // SAFETY: `insn` comes from instructions() in the callback that is
        // running, and QEMU writes no more than the length of the buffer.
        let len = unsafe { (self.insn_data)(insn, buffer.as_mut_ptr().cast(), buffer.len()) };
        &buffer[..len.min(16)]
    }

    /// The linear address of the instruction that follows.
    pub fn next_address(&self, insn: Insn) -> u64 {
        // SAFETY: as in code().
        unsafe { (self.insn_vaddr)(insn).wrapping_add((self.insn_size)(insn) as u64) }
    }

    /// Asks for a callback before each execution of an instruction, which gets a
    /// pointer to `data`, to read only.
    pub fn on_exec<T: Sync>(&self, insn: Insn, cb: ExecCb, regs: Regs, data: &'static T) {
        let data = ptr::from_ref(data).cast_mut().cast();
        // SAFETY: as in code(); the callback lives on, see register().
        unsafe { (self.register_exec)(insn, cb, regs, data) }
    }

    /// Asks for a callback after each memory access of an instruction.
    pub fn on_access(&self, insn: Insn, cb: MemCb, access: Access) {
        // SAFETY: as in on_exec().
        unsafe { (self.register_mem)(insn, cb, Regs::None, access, ptr::null_mut()) }
    }

    /// The same, with a pointer to `data`, to read only.
    pub fn on_access_with<T: Sync>(&self, insn: Insn, cb: MemCb, access: Access, data: &'static T) {
        let data = ptr::from_ref(data).cast_mut().cast();
        // SAFETY: as in on_exec().
        unsafe { (self.register_mem)(insn, cb, Regs::None, access, data) }
    }

    /// What a memory callback is about; `None` if it is not RAM.
    pub fn access(&self, info: u32, vaddr: u64) -> Option<MemAccess> {
        // SAFETY: `info` and `vaddr` are as the running memory callback got them;
        // the handle is used before that callback returns.
        unsafe {
            let hwaddr = (self.get_hwaddr)(info, vaddr);
            if hwaddr.is_null() || (self.hwaddr_is_io)(hwaddr) {
                return None;
            }
            Some(MemAccess {
                physical: (self.hwaddr_phys_addr)(hwaddr),
                len: 1 << (self.mem_size_shift)(info),
                store: (self.mem_is_store)(info),
            })
        }
    }

    /// The handles of the named registers, in the vCPU that is being initialised.
    pub fn registers<const N: usize>(&self, names: [&str; N]) -> Result<[Register; N], String> {
        // SAFETY: called from the vCPU initialisation callback, as QEMU demands.
        let array = unsafe { (self.get_registers)() };
        if array.is_null() {
            return Err("QEMU names no registers".into());
        }
        let mut found = [Register(ptr::null_mut()); N];
        // SAFETY: QEMU documents an array of `len` descriptors; names are constant
        // strings. The array is ours to free, and it is not used afterwards.
        unsafe {
            let first = (*array).data.cast::<RegDescriptor>();
            for i in 0..(*array).len as usize {
                let descriptor = &*first.add(i);
                let name = CStr::from_ptr(descriptor.name).to_bytes();
                if let Some(at) = names.iter().position(|n| n.as_bytes() == name) {
                    found[at] = Register(descriptor.handle);
                }
            }
            (self.array_free)(array, 1);
        }
        match found.iter().position(|r| r.0.is_null()) {
            Some(missing) => Err(format!("QEMU names no register {}", names[missing])),
            None => Ok(found),
        }
    }

    /// Memory for a [`Look`] that is made often.
    pub fn glass(&self) -> Glass {
        // SAFETY: allocates, and aborts where it cannot.
        Glass(unsafe { (self.bytes_new)() })
    }

    /// Begins to look at the state of the vCPU whose callback is running, which
    /// must have been registered with [`Regs::Read`].
    pub fn look(&self) -> Look<'_> {
        Look {
            qemu: self,
            // SAFETY: allocates, and aborts where it cannot.
            bytes: unsafe { (self.bytes_new)() },
        }
    }
}

/// Memory that a register is read into; kept for good.
pub struct Glass(*mut GArray);

// SAFETY: the array belongs to whoever has the value; it is of no thread.
unsafe impl Send for Glass {}

impl Glass {
    /// A register's 64 bits, as [`Look::register`] has them, in a callback that was registered
    /// with [`Regs::Read`].
    pub fn register(&mut self, qemu: &Qemu, register: Register) -> Option<u64> {
        let look = std::mem::ManuallyDrop::new(Look {
            qemu,
            bytes: self.0,
        });
        look.register(register)
    }
}

/// Reads registers and memory of the vCPU whose callback is running.
pub struct Look<'a> {
    qemu: &'a Qemu,
    bytes: *mut GArray,
}

impl Look<'_> {
    /// A register's 64 bits; `None` for one that is shown with fewer, as QEMU
    /// shows all of them while the vCPU runs other than 64-bit code.
    pub fn register(&self, register: Register) -> Option<u64> {
        // SAFETY: the array is ours; the handle comes from registers(), and the
        // contract of look() gives a callback that may read registers.
        let len = unsafe {
            (self.qemu.bytes_resize)(self.bytes, 0);
            (self.qemu.read_register)(register.0, self.bytes)
        };
        if len == 8 { self.word() } else { None }
    }

    /// Eight bytes of memory at a linear address.
    pub fn memory(&self, linear: u64) -> Option<u64> {
        // SAFETY: as in register(); QEMU resizes the array to what it reads.
        let read = unsafe { (self.qemu.read_memory)(linear, self.bytes, 8) };
        if read { self.word() } else { None }
    }

    fn word(&self) -> Option<u64> {
        // SAFETY: the array is ours; its length is checked before its bytes are
        // read, and bytes need no alignment.
        unsafe {
            let array = &*self.bytes;
            (array.len == 8).then(|| u64::from_le_bytes(*array.data.cast::<[u8; 8]>()))
        }
    }
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        // SAFETY: made by look(), freed once, here.
        unsafe { (self.qemu.bytes_free)(self.bytes, 1) };
    }
}
