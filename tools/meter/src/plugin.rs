// SPDX-License-Identifier: GPL-2.0-only
//! The plugin: blocks, memory accesses, flushes and fences have callbacks, which count what
//! the server's vCPU does in a window: of two, the one that did not make the mark. Until the
//! guest says that windows will come, only marks have a callback, and it runs at full speed.
//!
//! With `-icount` QEMU runs its vCPUs in turn, and shares code between them. It then tells a
//! callback which vCPU translated the code, and not which one runs it. (accel/tcg/plugin-gen.c of
//! 10.0: the number is a constant without CF_PARALLEL.) So each block reads at which address the
//! kernel has the variables of its CPU. It also reads its own address: QEMU translates code by
//! its place in physical memory, and what several processes have mapped, at an address each, is
//! one block. QEMU could count executions by itself, without a callback; but with `-icount` it
//! then ends at the next `rdtsc` ("Bad icount read").
//!
//! A panic in a callback aborts QEMU: nothing unwinds through its frames, because
//! every callback is an `extern "C"` function.

use crate::args::{Accesses, Args};
use crate::cache::Cache;
use crate::lines::Lines;
use crate::mark::Mark;
use crate::window::{self, Memory, Window};
use libc::{c_char, c_int, c_uint, c_void};
use pmskb_tcg::decode::{self, Op};
use pmskb_tcg::qemu::{self, Access, Glass, Insn, Qemu, Regs, Tb};
use pmskb_tcg::vcpu::{
    GS_BASE, Handles, K_GS_BASE, RAX, REGISTERS, RIP, Site, Sites, Target, Translator,
};
use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// What QEMU reads to know the version of the API that is spoken here.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = qemu::API_VERSION;

/// QEMU loads a plugin once, and its callbacks carry no pointer of ours.
static PLUGIN: OnceLock<Plugin> = OnceLock::new();

/// Shorter accesses are not taken for payload, whatever they hold: a byte may be anything.
const SHORTEST: usize = 4;

/// A block of code at an address. One is never freed.
#[derive(Default)]
struct Block {
    runs: AtomicU64,
    pm: AtomicU64,
    stored: AtomicU64,
    loaded: AtomicU64,
    misses_dram: AtomicU64,
    misses_pm: AtomicU64,
}

impl Block {
    /// Everything but how often it ran.
    fn sums(&self) -> [&AtomicU64; 5] {
        let Self {
            runs: _,
            pm,
            stored,
            loaded,
            misses_dram,
            misses_pm,
        } = self;
        [pm, stored, loaded, misses_dram, misses_pm]
    }
}

macro_rules! sums {
    ($($name:ident,)*) => {
        /// The members of [`Memory`] that grow as things happen.
        #[derive(Default)]
        struct Sums { $($name: AtomicU64,)* }

        impl Sums {
            fn clear(&self) { $(self.$name.store(0, Ordering::Relaxed);)* }
            fn read(&self) -> Memory {
                Memory { $($name: self.$name.load(Ordering::Relaxed),)* ..Memory::default() }
            }
        }
    };
}

sums! {
    pm_stores, pm_bytes, pm_bytes_nt, flushes, fences, fences_empty,
    payload_stored, payload_stored_pm, payload_loaded, unresolved, misses_dram, misses_pm,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Everything.
struct Plugin {
    qemu: Qemu,
    id: qemu::Id,
    args: Args,
    registers: OnceLock<Handles>,
    glass: Mutex<Glass>,
    sites: Sites,
    translator: Translator,
    lines: Lines,
    /// What the counted vCPU has in its cache, also between windows.
    cache: Option<Mutex<Cache>>,
    sums: Sums,
    /// Where the kernel has the variables of the CPU that made the mark.
    marker: AtomicU64,
    /// Something waits for a fence of the counted vCPU.
    waits: AtomicBool,
    /// Whatever is translated gets callbacks.
    watching: AtomicBool,
    /// A window has begun.
    counting: AtomicBool,
    number: AtomicU64,
    /// Blocks that the counted vCPU ran, by address and length.
    blocks: Mutex<HashMap<(u64, u64), &'static Block>>,
    /// The one that runs now; null while the other vCPU does.
    current: AtomicPtr<Block>,
}

impl Plugin {
    fn new(id: qemu::Id, args: &[&str], info: &qemu::Info) -> Result<Self, String> {
        let args = Args::parse(args.iter().copied())?;
        let vcpus = info.vcpus()?;
        if vcpus != 2 {
            return Err(format!("needs two vCPUs, one for the server, not {vcpus}"));
        }
        let qemu = Qemu::find()?;
        Ok(Self {
            glass: Mutex::new(qemu.glass()),
            qemu,
            id,
            registers: OnceLock::new(),
            sites: Sites::default(),
            translator: Translator::default(),
            lines: Lines::new(args.size),
            cache: args
                .cache
                .and_then(|(size, ways)| Cache::new(size, ways))
                .map(Mutex::new),
            sums: Sums::default(),
            marker: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            watching: AtomicBool::new(false),
            counting: AtomicBool::new(false),
            number: AtomicU64::new(0),
            blocks: Mutex::default(),
            current: AtomicPtr::default(),
            args,
        })
    }

    /// Whether a window has begun.
    fn counting(&self) -> bool {
        self.counting.load(Ordering::Relaxed)
    }

    /// The offset in the persistent memory of a guest-physical address.
    fn offset(&self, physical: u64) -> Option<u64> {
        let offset = physical.checked_sub(self.args.base)?;
        (offset < self.args.size).then_some(offset)
    }

    /// Gives a block that is being translated what it needs.
    fn instrument(&self, tb: Tb) {
        let watching = self.watching.load(Ordering::Relaxed);
        let mut first = watching.then(|| length(self.qemu.block_len(tb)));
        for insn in self.qemu.instructions(tb) {
            if let Some(length) = first.take() {
                self.qemu.on_exec(insn, on_block, Regs::Read, length);
            }
            let mut buffer = [0; 16];
            match decode::decode(self.qemu.code(insn, &mut buffer)) {
                Some(Op::Mark) => self.qemu.on_exec(insn, on_mark, Regs::Read, &()),
                op if watching => self.instrument_insn(insn, op),
                _ => {}
            }
        }
    }

    fn instrument_insn(&self, insn: Insn, op: Option<Op>) {
        match op {
            Some(Op::Flush(kind, mem)) => {
                let site = self.sites.keep(&self.qemu, insn, kind, mem);
                self.qemu.on_exec(insn, on_flush, Regs::Read, site);
            }
            Some(Op::Fence) => self.qemu.on_exec(insn, on_fence, Regs::None, &()),
            Some(Op::NonTemporal) => self.qemu.on_access(insn, on_store_nt, Access::Write),
            _ => {}
        }
        let access = match self.args.memory {
            Accesses::All => Access::ReadWrite,
            Accesses::Stores => Access::Write,
            Accesses::None => return,
        };
        self.qemu.on_access(insn, on_access, access);
    }

    /// Where the kernel has the variables of the CPU that runs: in user mode the one base of
    /// `%gs` leads there, in kernel mode the other.
    fn cpu_variables(&self, glass: &mut Glass, registers: &Handles) -> Option<u64> {
        const KERNEL: u64 = 1 << 63;
        let now = glass.register(&self.qemu, registers[GS_BASE])?;
        match now >= KERNEL {
            true => Some(now),
            false => glass.register(&self.qemu, registers[K_GS_BASE]),
        }
    }

    /// A block of so many instructions runs.
    fn block(&self, insns: u64) {
        let mut glass = self.glass.lock().expect("a callback panicked");
        let found = self.registers.get().and_then(|registers| {
            let variables = self.cpu_variables(&mut glass, registers)?;
            let at = glass.register(&self.qemu, registers[RIP])?;
            Some((variables, at))
        });
        drop(glass);
        let Some((variables, at)) = found else {
            return add(&self.sums.unresolved, 1);
        };
        if variables == self.marker.load(Ordering::Relaxed) {
            return self.current.store(ptr::null_mut(), Ordering::Relaxed);
        }
        let mut blocks = self.blocks.lock().expect("a callback panicked");
        let block = *blocks
            .entry((at, insns))
            .or_insert_with(|| Box::leak(Box::default()));
        drop(blocks);
        add(&block.runs, 1);
        self.current
            .store(ptr::from_ref(block).cast_mut(), Ordering::Relaxed);
    }

    /// The block that the counted vCPU runs, in a window or not.
    fn running(&self) -> Option<&'static Block> {
        // SAFETY: null, or a block that is kept for good and changed by atomic operations only.
        unsafe { self.current.load(Ordering::Relaxed).as_ref() }
    }

    /// The block that runs, if it counts.
    fn current(&self) -> Option<&'static Block> {
        self.running().filter(|_| self.counting())
    }

    fn mark(&self) {
        let mut glass = self.glass.lock().expect("a callback panicked");
        let Some(registers) = self.registers.get() else {
            return;
        };
        let code = glass.register(&self.qemu, registers[RAX]);
        match code.and_then(Mark::from_code) {
            Some(Mark::Begin(number)) => match self.cpu_variables(&mut glass, registers) {
                Some(variables) => {
                    self.marker.store(variables, Ordering::Relaxed);
                    self.begin(number);
                }
                None => eprintln!("meter: whose mark this is cannot be known"),
            },
            Some(Mark::End) => self.end(),
            Some(Mark::Watch) => {
                // Whose mark this is, is known before the first window: the cache fills.
                if let Some(variables) = self.cpu_variables(&mut glass, registers) {
                    self.marker.store(variables, Ordering::Relaxed);
                }
                self.watch(true)
            }
            Some(Mark::Rest) => self.watch(false),
            None => eprintln!("meter: a mark that means nothing: {code:x?}"),
        }
    }

    fn watch(&self, on: bool) {
        if self.watching.swap(on, Ordering::Relaxed) != on {
            // Everything is translated anew.
            self.qemu.reset(self.id, on_reset);
        }
    }

    fn begin(&self, number: u64) {
        if !self.watching.load(Ordering::Relaxed) {
            return eprintln!("meter: a window begins that was not announced");
        }
        let blocks = self.blocks.lock().expect("a callback panicked");
        for block in blocks.values() {
            block.runs.store(0, Ordering::Relaxed);
            for counter in block.sums() {
                counter.store(0, Ordering::Relaxed);
            }
        }
        drop(blocks);
        self.current.store(ptr::null_mut(), Ordering::Relaxed);
        self.waits.store(false, Ordering::Relaxed);
        self.sums.clear();
        self.lines.clear();
        self.number.store(number, Ordering::Relaxed);
        self.counting.store(true, Ordering::Relaxed);
    }

    fn end(&self) {
        if !self.counting.swap(false, Ordering::Relaxed) {
            eprintln!("meter: a window ends that did not begin");
            return;
        }
        if let Err(error) = self.write() {
            eprintln!("meter: {error}");
            // SAFETY: ends the process: a guest that waits for what was counted waits in vain.
            unsafe { libc::_exit(1) }
        }
    }

    fn write(&self) -> Result<(), String> {
        let mut memory = self.sums.read();
        let lines = self.lines.sums();
        memory.pm_bytes_durable = lines.durable;
        memory.pm_bytes_volatile = lines.volatile;
        memory.lines = lines.lines;
        let blocks = self.blocks.lock().expect("a callback panicked");
        let ran = blocks.iter().filter_map(|(&(at, insns), block)| {
            let runs = block.runs.load(Ordering::Relaxed);
            let [pm, stored, loaded, misses_dram, misses_pm] =
                block.sums().map(|sum| sum.load(Ordering::Relaxed));
            (runs > 0).then_some(window::Block {
                at,
                insns,
                runs,
                pm,
                stored,
                loaded,
                misses_dram,
                misses_pm,
            })
        });
        let mut ran: Vec<_> = ran.collect();
        ran.sort_by_key(|block| (block.at, block.insns));
        let window = Window {
            format: 1,
            number: self.number.load(Ordering::Relaxed),
            memory,
            blocks: ran,
        };
        let mut name = self.args.out.clone().into_os_string();
        name.push(format!("{}.json", window.number));
        let mut new = name.clone();
        new.push(".new");
        let (name, new) = (PathBuf::from(name), PathBuf::from(new));
        let text = serde_json::to_vec(&window).map_err(|e| e.to_string())?;
        let written = fs::File::create(&new)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&new, &name));
        written.map_err(|e| format!("{}: {e}", new.display()))
    }

    fn flush(&self, site: &Site) {
        if self.current().is_none() {
            return;
        }
        let Some(registers) = self.registers.get() else {
            return add(&self.sums.unresolved, 1);
        };
        match self.translator.target(&self.qemu, registers, site) {
            Target::Physical(physical) => {
                if let Some(offset) = self.offset(physical) {
                    add(&self.sums.flushes, 1);
                    self.lines.write_back(offset);
                    self.waits.store(true, Ordering::Relaxed);
                }
            }
            Target::Unmapped | Target::Unresolved => add(&self.sums.unresolved, 1),
        }
    }

    fn fence(&self) {
        if self.current().is_some() {
            match self.waits.swap(false, Ordering::Relaxed) {
                true => add(&self.sums.fences, 1),
                false => add(&self.sums.fences_empty, 1),
            }
        }
    }

    fn store_nt(&self, info: u32, vaddr: u64) {
        if self.current().is_none() {
            return;
        }
        let Some(access) = self.qemu.access(info, vaddr) else {
            return; // a device's registers
        };
        if let Some(offset) = self.offset(access.physical) {
            add(&self.sums.pm_bytes_nt, access.len as u64);
            self.lines.write_back(offset);
            self.lines.write_back(offset + access.len as u64 - 1);
            self.waits.store(true, Ordering::Relaxed);
        }
    }

    /// The modelled cache sees an access, and fetches what it lacks.
    fn fetch(&self, cache: &Mutex<Cache>, info: u32, vaddr: u64, block: &Block) {
        let Some(access) = self.qemu.access(info, vaddr) else {
            return; // a device's registers
        };
        let mut cache = cache.lock().expect("a callback panicked");
        let missed = cache.touch(access.physical, access.len as u64);
        if missed == 0 || !self.counting() {
            return;
        }
        let (all, own) = match self.offset(access.physical) {
            Some(_) => (&self.sums.misses_pm, &block.misses_pm),
            None => (&self.sums.misses_dram, &block.misses_dram),
        };
        add(all, missed);
        add(own, missed);
    }

    fn access(&self, info: u32, vaddr: u64) {
        if let (Some(cache), Some(block)) = (&self.cache, self.running()) {
            self.fetch(cache, info, vaddr, block);
        }
        let Some(block) = self.current() else {
            return;
        };
        let (value, len) = self.qemu.value(info);
        let payload = match self.args.fill {
            Some(fill) if len >= SHORTEST => value == repeated(fill, len),
            _ => false,
        };
        let len = len as u64;
        if !self.qemu.is_store(info) {
            if payload {
                add(&self.sums.payload_loaded, len);
                add(&block.loaded, len);
            }
            return;
        }
        if payload {
            add(&self.sums.payload_stored, len);
            add(&block.stored, len);
        }
        let Some(access) = self.qemu.access(info, vaddr) else {
            return;
        };
        if let Some(offset) = self.offset(access.physical) {
            add(&self.sums.pm_stores, 1);
            add(&self.sums.pm_bytes, len);
            add(&block.pm, len);
            self.lines.store(offset, len);
            if payload {
                add(&self.sums.payload_stored_pm, len);
            }
        }
    }
}

/// The numbers up to the length of the longest block that QEMU makes.
static LENGTHS: [u64; 513] = {
    let mut all = [0; 513];
    let mut n = 0;
    while n < all.len() {
        all[n] = n as u64;
        n += 1;
    }
    all
};

/// A number that stays where it is, for a callback.
fn length(n: usize) -> &'static u64 {
    &LENGTHS[n.min(LENGTHS.len() - 1)]
}

/// A value of `len` bytes that are all the same.
fn repeated(byte: u8, len: usize) -> u128 {
    u128::from_ne_bytes([byte; 16]) >> (128 - 8 * len)
}

fn plugin() -> &'static Plugin {
    // QEMU calls back only after qemu_plugin_install() has set it.
    PLUGIN.get().expect("a callback before the installation")
}

extern "C" fn on_vcpu_init(_: qemu::Id, _: c_uint) {
    let plugin = plugin();
    match plugin.qemu.registers(REGISTERS) {
        // A handle is a register's number, the same for all.
        Ok(registers) => drop(plugin.registers.set(registers)),
        Err(error) => {
            eprintln!("meter: {error}");
            // SAFETY: ends the process; the guest has not run yet.
            unsafe { libc::_exit(1) }
        }
    }
}

extern "C" fn on_translate(_: qemu::Id, tb: Tb) {
    plugin().instrument(tb);
}

extern "C" fn on_reset(id: qemu::Id) {
    plugin().qemu.register_again(id, on_translate, on_exit);
}

extern "C" fn on_mark(_: c_uint, _: *mut c_void) {
    plugin().mark();
}

extern "C" fn on_block(_: c_uint, data: *mut c_void) {
    let plugin = plugin();
    if plugin.counting() || plugin.cache.is_some() {
        // SAFETY: instrument() passed a number of LENGTHS.
        let insns = unsafe { *data.cast_const().cast::<u64>() };
        plugin.block(insns);
    }
}

extern "C" fn on_flush(_: c_uint, data: *mut c_void) {
    // SAFETY: instrument_insn() passed a Site that is kept for good, and nothing ever changes
    // one.
    let site = unsafe { &*data.cast_const().cast::<Site>() };
    plugin().flush(site);
}

extern "C" fn on_fence(_: c_uint, _: *mut c_void) {
    plugin().fence();
}

extern "C" fn on_store_nt(_: c_uint, info: u32, vaddr: u64, _: *mut c_void) {
    plugin().store_nt(info, vaddr);
}

extern "C" fn on_access(_: c_uint, info: u32, vaddr: u64, _: *mut c_void) {
    plugin().access(info, vaddr);
}

extern "C" fn on_exit(_: qemu::Id, _: *mut c_void) {
    if plugin().counting.load(Ordering::Relaxed) {
        eprintln!("meter: the guest ended in a window, which is lost");
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
    let made = args.and_then(|args| Plugin::new(id, &args, info));
    let plugin = match made {
        Ok(plugin) => PLUGIN.get_or_init(|| plugin),
        Err(error) => {
            eprintln!("meter: {error}");
            return -1;
        }
    };
    plugin
        .qemu
        .register(id, on_vcpu_init, on_translate, on_exit);
    0
}
