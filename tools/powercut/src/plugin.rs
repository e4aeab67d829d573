// SPDX-License-Identifier: GPL-2.0-only
//! The plugin: which instructions get a callback, and what the callbacks do.
//!
//! A panic in a callback aborts QEMU: nothing unwinds through its frames, because
//! every callback is an `extern "C"` function.

use crate::args::{Args, Count, Event};
use crate::image;
use crate::model::{Flush, LINE, Lose, Model};
use crate::region::Region;
use crate::stats::{Counters, Report, Snapshot};
use libc::{c_char, c_int, c_uint, c_void};
use pmskb_tcg::decode::{self, FlushKind, Op};
use pmskb_tcg::qemu::{self, Access, Insn, Qemu, Regs, Tb};
use pmskb_tcg::vcpu::{self, Handles, REGISTERS, Site, Sites, Translator};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// What QEMU reads to know the version of the API that is spoken here.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = qemu::API_VERSION;

/// QEMU loads a plugin once, and its callbacks carry no pointer of ours.
static PLUGIN: OnceLock<Plugin> = OnceLock::new();

/// Marks whose counters are kept; a guest that marks more often gets only these.
const MARKS: usize = 4096;

/// One virtual CPU.
#[derive(Default)]
struct Vcpu {
    registers: OnceLock<Handles>,
    /// Whether something waits for this vCPU's fence. Set and cleared by that
    /// vCPU only; it spares the lock at the many fences that have nothing to do.
    waits: AtomicBool,
}

/// What the lock protects.
struct State {
    model: Model<Region>,
    armed: bool,
    events: u64,
    marks: Vec<Snapshot>,
}

/// Everything.
struct Plugin {
    qemu: Qemu,
    args: Args,
    size: u64,
    vcpus: Vec<Vcpu>,
    counters: Counters,
    sites: Sites,
    translator: Translator,
    state: Mutex<State>,
}

/// Where a linear address leads.
enum Target {
    Region(u64),
    Outside,
    Unmapped,
    Unresolved,
}

impl Plugin {
    fn new(args: &[&str], info: &qemu::Info) -> Result<Self, String> {
        let args = Args::parse(args.iter().copied())?;
        let qemu = Qemu::find()?;
        let vcpus = info.vcpus()?;
        let region = Region::open(&args.pm, args.label)?;
        let durable = region.copy();
        let armed = !args.arm;
        Ok(Self {
            qemu,
            size: region.size() as u64,
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            counters: Counters::default(),
            sites: Sites::default(),
            translator: Translator::new(args.directmap),
            state: Mutex::new(State {
                model: Model::new(region, durable, vcpus),
                armed,
                events: 0,
                marks: Vec::new(),
            }),
            args,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Never poisoned: a panic in a callback aborts.
        self.state.lock().expect("a callback panicked")
    }

    /// The offset in the region of a guest-physical address.
    fn offset(&self, physical: u64) -> Option<u64> {
        let offset = physical.checked_sub(self.args.base)?;
        (offset < self.size).then_some(offset)
    }

    /// Gives an instruction that is being translated its callbacks.
    fn instrument(&self, insn: Insn) {
        let mut buffer = [0; 16];
        match decode::decode(self.qemu.code(insn, &mut buffer)) {
            Some(Op::Flush(kind, mem)) => {
                let site = self.sites.keep(&self.qemu, insn, kind, mem);
                self.qemu.on_exec(insn, on_flush, Regs::Read, site);
            }
            Some(Op::Fence) => self.on_exec(insn, on_fence),
            Some(Op::WriteBackAll) => self.on_exec(insn, on_write_back_all),
            Some(Op::Mark) => self.on_exec(insn, on_mark),
            Some(Op::Locked) if self.args.locked => self.on_exec(insn, on_locked),
            Some(Op::NonTemporal) => self.qemu.on_access(insn, on_store_nt, Access::Write),
            Some(Op::Locked) | None => {}
        }
        match self.args.count {
            Count::None => {}
            Count::Stores => self.qemu.on_access(insn, on_access, Access::Write),
            Count::All => self.qemu.on_access(insn, on_access, Access::ReadWrite),
        }
    }

    fn on_exec(&self, insn: Insn, cb: qemu::ExecCb) {
        self.qemu.on_exec(insn, cb, Regs::None, &());
    }

    fn flush(&self, cpu: usize, site: &Site) {
        let c = &self.counters;
        let offset = match self.target(cpu, site) {
            Target::Region(offset) => offset,
            Target::Outside => return Counters::add(&c.flushes_outside, 1),
            Target::Unmapped => return Counters::add(&c.flushes_unmapped, 1),
            Target::Unresolved => return Counters::add(&c.unresolved, 1),
        };
        let line = offset as usize / LINE;
        let mut state = self.lock();
        let (counter, found) = match site.kind {
            FlushKind::Clwb => (&c.clwb, state.model.flush(cpu, line)),
            FlushKind::Clflushopt => (&c.clflushopt, state.model.flush(cpu, line)),
            FlushKind::Clflush => (&c.clflush, state.model.flush_ordered(line)),
        };
        Counters::add(counter, 1);
        match found {
            Flush::Dirty => {}
            Flush::Clean => Counters::add(&c.flushes_clean, 1),
            Flush::Repeated => Counters::add(&c.flushes_repeated, 1),
        }
        self.note_waiting(cpu, &state);
        self.event(&mut state, Event::Flush);
    }

    /// Where a flush leads that is about to execute.
    fn target(&self, cpu: usize, site: &Site) -> Target {
        let Some(registers) = self.vcpus.get(cpu).and_then(|v| v.registers.get()) else {
            return Target::Unresolved;
        };
        match self.translator.target(&self.qemu, registers, site) {
            vcpu::Target::Physical(physical) => self
                .offset(physical)
                .map_or(Target::Outside, Target::Region),
            vcpu::Target::Unmapped => Target::Unmapped,
            vcpu::Target::Unresolved => Target::Unresolved,
        }
    }

    fn fence(&self, cpu: usize) {
        let c = &self.counters;
        match self.drain(cpu) {
            None => Counters::add(&c.fences_empty, 1),
            Some(mut state) => {
                Counters::add(&c.fences, 1);
                self.event(&mut state, Event::Fence);
            }
        }
    }

    /// Commits what waits for a vCPU; `None` if that is nothing.
    fn drain(&self, cpu: usize) -> Option<MutexGuard<'_, State>> {
        if let Some(vcpu) = self.vcpus.get(cpu) {
            if !vcpu.waits.load(Ordering::Relaxed) {
                return None;
            }
            vcpu.waits.store(false, Ordering::Relaxed);
        }
        let mut state = self.lock();
        let lines = state.model.fence(cpu);
        Counters::add(&self.counters.lines_fenced, lines as u64);
        (lines > 0).then_some(state)
    }

    fn store_nt(&self, cpu: usize, info: u32, vaddr: u64) {
        let c = &self.counters;
        let Some(access) = self.qemu.access(info, vaddr) else {
            return; // a device's registers
        };
        let Some(offset) = self.offset(access.physical) else {
            return;
        };
        let len = self.within_page(access.physical, access.len);
        let mut state = self.lock();
        state.model.store_nt(cpu, offset as usize, len);
        Counters::add(&c.nt_stores, 1);
        Counters::add(&c.nt_store_bytes, access.len as u64);
        self.note_waiting(cpu, &state);
    }

    /// The part of an access that is in its first page; QEMU tells the physical
    /// address of that part only, so the rest is counted as unresolved.
    fn within_page(&self, physical: u64, len: usize) -> usize {
        let room = 4096 - (physical % 4096) as usize;
        if len > room {
            Counters::add(&self.counters.unresolved, 1);
        }
        len.min(room)
    }

    fn count_access(&self, info: u32, vaddr: u64) {
        let c = &self.counters;
        let Some(access) = self.qemu.access(info, vaddr) else {
            return;
        };
        if self.offset(access.physical).is_none() {
            return;
        }
        if !access.store {
            Counters::add(&c.loads, 1);
            Counters::add(&c.load_bytes, access.len as u64);
            return;
        }
        Counters::add(&c.stores, 1);
        Counters::add(&c.store_bytes, access.len as u64);
        if self.args.cut.is_some_and(|cut| cut.event == Event::Store) {
            self.event(&mut self.lock(), Event::Store);
        }
    }

    fn mark(&self) {
        let mut state = self.lock();
        if state.marks.len() < MARKS {
            let snapshot = self.counters.snapshot();
            state.marks.push(snapshot);
        }
        Counters::add(&self.counters.marks, 1);
        if state.armed {
            self.event(&mut state, Event::Mark);
        }
        state.armed = true;
    }

    fn note_waiting(&self, cpu: usize, state: &State) {
        if let Some(vcpu) = self.vcpus.get(cpu) {
            vcpu.waits.store(state.model.waits(cpu), Ordering::Relaxed);
        }
    }

    /// Counts an event of the kind that the cut waits for, and cuts.
    fn event(&self, state: &mut State, event: Event) {
        let Some(cut) = self.args.cut else { return };
        if !state.armed || cut.event != event {
            return;
        }
        state.events += 1;
        if state.events == cut.after {
            let code = self.cut(state, event.name());
            // SAFETY: ends the process at once, without atexit handlers: the
            // caller holds the lock, so nothing changes the model meanwhile.
            unsafe { libc::_exit(code) }
        }
    }

    /// Writes the image and the statistics; says how the process is to exit.
    fn cut(&self, state: &State, reason: &str) -> c_int {
        match self.try_cut(state, reason) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("powercut: {error}");
                1
            }
        }
    }

    fn try_cut(&self, state: &State, reason: &str) -> Result<(), String> {
        let model = &state.model;
        let region = model.memory();
        let (extents, labels) = (region.extents(), region.labels());
        let make = |lose: Lose, seed: u64, out: Option<&File>| {
            image::cut(model, &extents, &labels, lose, seed, out)
        };
        let (lose, seed) = (self.args.lose, self.args.seed);
        let damage = match &self.args.out {
            Some(path) => {
                for (lose, seed) in &self.args.more {
                    let mut name = path.clone().into_os_string();
                    name.push(match lose {
                        Lose::All => ".all".into(),
                        Lose::None => ".none".into(),
                        Lose::Random => format!(".random{seed}"),
                    });
                    image::replace(name.as_ref(), |file| make(*lose, *seed, Some(file)))?;
                }
                image::replace(path, |file| make(lose, seed, Some(file)))?
            }
            None => make(lose, seed, None).map_err(|e| e.to_string())?,
        };
        let report = Report {
            reason,
            armed: state.armed,
            events: state.events,
            region: (self.args.base, self.size, region.label() as u64),
            damage,
            total: self.counters.snapshot(),
            marks: &state.marks,
        };
        if let Some(path) = &self.args.stats {
            image::replace_text(path, &report.json())?;
        }
        eprintln!("powercut: cut at {reason}: {}", damage.json());
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
        (None, _) => eprintln!("powercut: vCPU {vcpu} is one more than the machine may have"),
        // Without registers a flush says nothing: no use in going on.
        (_, Err(error)) => {
            eprintln!("powercut: {error}");
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
    // SAFETY: instrument() passed a Site that site() keeps for good, and nothing
    // ever changes one.
    let site = unsafe { &*data.cast_const().cast::<Site>() };
    plugin().flush(vcpu as usize, site);
}

extern "C" fn on_fence(vcpu: c_uint, _: *mut c_void) {
    plugin().fence(vcpu as usize);
}

extern "C" fn on_locked(vcpu: c_uint, _: *mut c_void) {
    let plugin = plugin();
    if plugin.drain(vcpu as usize).is_some() {
        Counters::add(&plugin.counters.drains_locked, 1);
    }
}

extern "C" fn on_write_back_all(_: c_uint, _: *mut c_void) {
    Counters::add(&plugin().counters.wbinvd, 1);
}

extern "C" fn on_mark(_: c_uint, _: *mut c_void) {
    plugin().mark();
}

extern "C" fn on_store_nt(vcpu: c_uint, info: u32, vaddr: u64, _: *mut c_void) {
    plugin().store_nt(vcpu as usize, info, vaddr);
}

extern "C" fn on_access(_: c_uint, info: u32, vaddr: u64, _: *mut c_void) {
    plugin().count_access(info, vaddr);
}

extern "C" fn on_exit(_: qemu::Id, _: *mut c_void) {
    let plugin = plugin();
    let code = plugin.cut(&plugin.lock(), "exit");
    if code != 0 {
        // SAFETY: ends the process, which is about to end; only so can QEMU's
        // exit status say that the image is missing.
        unsafe { libc::_exit(code) }
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
            eprintln!("powercut: {error}");
            return -1;
        }
    };
    plugin
        .qemu
        .register(id, on_vcpu_init, on_translate, on_exit);
    0
}
