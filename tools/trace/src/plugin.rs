// SPDX-License-Identifier: GPL-2.0-only
//! The plugin: which instructions get a callback, and what the callbacks write.
//!
//! All that reaches the NVDIMM is written under one lock, in the order in which the vCPUs take
//! it: a store after it happened, a write-back or a fence before. What two vCPUs store to one
//! word at one time may be in the other order than it was; the end of the trace says what the
//! memory held at last, and whoever reads it compares.
//!
//! A panic in a callback aborts QEMU: nothing unwinds through its frames, because
//! every callback is an `extern "C"` function.

use crate::args::Args;
use crate::format::{CPUS, Header, Writer};
use crate::mark::Mark;
use libc::{c_char, c_int, c_uint, c_void};
use pmskb_tcg::decode::{self, FlushKind, Op};
use pmskb_tcg::model::{LINE, Memory};
use pmskb_tcg::qemu::{self, Access, Insn, Qemu, Regs, Tb};
use pmskb_tcg::region::Region;
use pmskb_tcg::vcpu::{Handles, RAX, REGISTERS, Site, Sites, Target, Translator};
use std::fs::File;
use std::io::BufWriter;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// What QEMU reads to know the version of the API that is spoken here.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = qemu::API_VERSION;

/// QEMU loads a plugin once, and its callbacks carry no pointer of ours.
static PLUGIN: OnceLock<Plugin> = OnceLock::new();

/// The places of `%rdi`, `%rsi`, `%rdx`, `%r8` and `%r9` among the registers.
const DATA: [usize; 5] = [7, 6, 2, 8, 9];

/// One virtual CPU.
#[derive(Default)]
struct Vcpu {
    registers: OnceLock<Handles>,
    /// Whether something may wait for this vCPU's fence. Set and cleared by that vCPU only.
    waits: AtomicBool,
}

/// Everything.
struct Plugin {
    qemu: Qemu,
    base: u64,
    region: Region,
    vcpus: Vec<Vcpu>,
    sites: Sites,
    translator: Translator,
    /// Flushes whose address, or stores of which a part, could not be found out.
    unresolved: AtomicU64,
    out: Mutex<Option<Writer<BufWriter<File>>>>,
}

impl Plugin {
    fn new(args: &[&str], info: &qemu::Info) -> Result<Self, String> {
        let args = Args::parse(args.iter().copied())?;
        let qemu = Qemu::find()?;
        let vcpus = info.vcpus()?;
        if vcpus > CPUS {
            return Err(format!("{vcpus} vCPUs are more than {CPUS}"));
        }
        let region = Region::open(&args.pm, args.label)?;
        let fail = |e: std::io::Error| format!("{}: {e}", args.out.display());
        let file = BufWriter::with_capacity(1 << 20, File::create(&args.out).map_err(fail)?);
        let header = Header {
            base: args.base,
            size: region.size() as u64,
        };
        let mut out = Writer::new(file, header).map_err(fail)?;
        out.image(&region.copy()).map_err(fail)?;
        Ok(Self {
            qemu,
            base: args.base,
            region,
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            sites: Sites::default(),
            translator: Translator::new(args.directmap),
            unresolved: AtomicU64::new(0),
            out: Mutex::new(Some(out)),
        })
    }

    /// Writes an event. After the end there are none.
    fn write(&self, event: impl FnOnce(&mut Writer<BufWriter<File>>) -> std::io::Result<()>) {
        // Never poisoned: a panic in a callback aborts.
        let mut out = self.out.lock().expect("a callback panicked");
        let Some(writer) = out.as_mut() else { return };
        if let Err(error) = event(writer) {
            eprintln!("trace: cannot write the trace: {error}");
            // SAFETY: ends the process: a trace with a hole is worth nothing.
            unsafe { libc::_exit(1) }
        }
    }

    /// The offset in the region of a guest-physical address.
    fn offset(&self, physical: u64) -> Option<u64> {
        let offset = physical.checked_sub(self.base)?;
        (offset < self.region.size() as u64).then_some(offset)
    }

    /// Gives an instruction that is being translated its callbacks.
    fn instrument(&self, insn: Insn) {
        let mut buffer = [0; 16];
        match decode::decode(self.qemu.code(insn, &mut buffer)) {
            Some(Op::Flush(kind, mem)) => {
                let site = self.sites.keep(&self.qemu, insn, kind, mem);
                self.qemu.on_exec(insn, on_flush, Regs::Read, site);
            }
            Some(Op::Fence) => self.qemu.on_exec(insn, on_fence, Regs::None, &()),
            Some(Op::Mark) => self.qemu.on_exec(insn, on_mark, Regs::Read, &()),
            Some(Op::NonTemporal) => {
                return self.qemu.on_access(insn, on_store_nt, Access::Write);
            }
            Some(Op::Locked | Op::WriteBackAll) | None => {}
        }
        self.qemu.on_access(insn, on_store, Access::Write);
    }

    fn note_waiting(&self, cpu: usize) {
        if let Some(vcpu) = self.vcpus.get(cpu) {
            vcpu.waits.store(true, Ordering::Relaxed);
        }
    }

    fn flush(&self, cpu: usize, site: &Site) {
        let registers = self.vcpus.get(cpu).and_then(|v| v.registers.get());
        let target = registers.map_or(Target::Unresolved, |registers| {
            self.translator.target(&self.qemu, registers, site)
        });
        match target {
            Target::Physical(physical) => {
                if let Some(offset) = self.offset(physical) {
                    let ordered = site.kind == FlushKind::Clflush;
                    self.write(|out| out.flush(cpu as u8, ordered, offset / LINE as u64));
                    self.note_waiting(cpu);
                }
            }
            Target::Unmapped => {}
            Target::Unresolved => {
                self.unresolved.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn fence(&self, cpu: usize) {
        let Some(vcpu) = self.vcpus.get(cpu) else {
            return;
        };
        if vcpu.waits.load(Ordering::Relaxed) {
            vcpu.waits.store(false, Ordering::Relaxed);
            self.write(|out| out.fence(cpu as u8));
        }
    }

    fn store(&self, cpu: usize, direct: bool, info: u32, vaddr: u64) {
        let Some(access) = self.qemu.access(info, vaddr) else {
            return; // a device's registers
        };
        let Some(offset) = self.offset(access.physical) else {
            return;
        };
        let (value, len) = self.qemu.value(info);
        let mut bytes = &value.to_le_bytes()[..len];
        let room = 4096 - (access.physical % 4096) as usize;
        // QEMU tells the address of the first page only. The kernel's direct map goes on.
        if len > room && vaddr >> 63 == 0 {
            self.unresolved.fetch_add(1, Ordering::Relaxed);
            bytes = &bytes[..room];
        }
        self.write(|out| out.store(cpu as u8, direct, offset, bytes));
        if direct {
            self.note_waiting(cpu);
        }
    }

    fn mark(&self, cpu: usize) {
        let Some(registers) = self.vcpus.get(cpu).and_then(|v| v.registers.get()) else {
            return;
        };
        let look = self.qemu.look();
        let read = |place: usize| look.register(registers[place]).unwrap_or(0);
        let mark = Mark::decode(read(RAX), DATA.map(read));
        self.write(|out| out.mark(cpu as u8, mark));
    }

    /// Ends the trace.
    fn finish(&self) -> std::io::Result<()> {
        let Some(out) = self.out.lock().expect("a callback panicked").take() else {
            return Ok(());
        };
        let events = out.events;
        let crc = (0..self.region.size() / LINE).fold(0, |crc, line| {
            crc32c::crc32c_append(crc, &self.region.line(line))
        });
        let unresolved = self.unresolved.load(Ordering::Relaxed);
        out.finish(crc, unresolved)?;
        eprintln!("trace: {events} events, {unresolved} unresolved");
        Ok(())
    }
}

fn plugin() -> &'static Plugin {
    // QEMU calls back only after qemu_plugin_install() has set it.
    PLUGIN.get().expect("a callback before the installation")
}

extern "C" fn on_vcpu_init(_: qemu::Id, vcpu: c_uint) {
    let plugin = plugin();
    match (
        plugin.vcpus.get(vcpu as usize),
        plugin.qemu.registers(REGISTERS),
    ) {
        (Some(slot), Ok(registers)) => drop(slot.registers.set(registers)),
        (None, _) => eprintln!("trace: vCPU {vcpu} is one more than the machine may have"),
        // Without registers a flush says nothing: no use in going on.
        (_, Err(error)) => {
            eprintln!("trace: {error}");
            // SAFETY: ends the process; the guest has not run yet.
            unsafe { libc::_exit(1) }
        }
    }
}

extern "C" fn on_translate(_: qemu::Id, tb: Tb) {
    let plugin = plugin();
    for insn in plugin.qemu.instructions(tb) {
        plugin.instrument(insn);
    }
}

extern "C" fn on_flush(vcpu: c_uint, data: *mut c_void) {
    // SAFETY: instrument() passed a Site that Sites keeps for good, and nothing
    // ever changes one.
    let site = unsafe { &*data.cast_const().cast::<Site>() };
    plugin().flush(vcpu as usize, site);
}

extern "C" fn on_fence(vcpu: c_uint, _: *mut c_void) {
    plugin().fence(vcpu as usize);
}

extern "C" fn on_mark(vcpu: c_uint, _: *mut c_void) {
    plugin().mark(vcpu as usize);
}

extern "C" fn on_store(vcpu: c_uint, info: u32, vaddr: u64, _: *mut c_void) {
    plugin().store(vcpu as usize, false, info, vaddr);
}

extern "C" fn on_store_nt(vcpu: c_uint, info: u32, vaddr: u64, _: *mut c_void) {
    plugin().store(vcpu as usize, true, info, vaddr);
}

extern "C" fn on_exit(_: qemu::Id, _: *mut c_void) {
    if let Err(error) = plugin().finish() {
        eprintln!("trace: cannot write the trace: {error}");
        // SAFETY: ends the process, which is about to end; only so can QEMU's
        // exit status say that the trace is not whole.
        unsafe { libc::_exit(1) }
    }
}

/// QEMU's entry point.
///
/// # Safety
///
/// `info` must point to QEMU's description of itself and `argv` to `argc`
/// terminated strings, as `qemu-plugin.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: qemu::Id,
    info: *const qemu::Info,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    // SAFETY: QEMU's strings, which it keeps.
    let args = unsafe { pmskb_tcg::args::strings(argc, argv) };
    // SAFETY: the caller's promise.
    let info = unsafe { &*info };
    let made = args.and_then(|args| Plugin::new(&args, info));
    let plugin = match made {
        Ok(plugin) => PLUGIN.get_or_init(|| plugin),
        Err(error) => {
            eprintln!("trace: {error}");
            return -1;
        }
    };
    plugin
        .qemu
        .register(id, on_vcpu_init, on_translate, on_exit);
    0
}
