// SPDX-License-Identifier: GPL-2.0-only
//! A virtual CPU's registers, and where its write-backs lead.

use crate::decode::{Base, FlushKind, Mem, Registers, Segment};
use crate::paging::{self, DirectMap, Walk};
use crate::qemu::{Insn, Look, Qemu, Register};
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The registers that a flush may need: the general ones by their numbers in the
/// encoding, then the others.
pub const REGISTERS: [&str; 22] = [
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "fs_base",
    "gs_base",
    "cr3",
    "cr4",
    "rip",
    "k_gs_base",
];
/// The place of `%rax` among them.
pub const RAX: usize = 0;
const FS_BASE: usize = 16;
/// The place of the base of `%gs`.
pub const GS_BASE: usize = 17;
const CR3: usize = 18;
const CR4: usize = 19;
/// The place of `%rip`. It is right at the first instruction of a block, and only there.
pub const RIP: usize = 20;
/// The place of the other `%gs`: the kernel's in user mode, the user's in kernel mode.
pub const K_GS_BASE: usize = 21;

/// CR4.LA57: five levels of page tables.
const LA57: u64 = 1 << 12;

/// The handles of [`REGISTERS`] in one vCPU.
pub type Handles = [Register; REGISTERS.len()];

/// A flush in the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Site {
    /// The instruction.
    pub kind: FlushKind,
    /// Its operand.
    pub mem: Mem,
    /// The address of the next instruction, where the operand depends on it.
    next: u64,
}

/// Flushes that were translated; each is kept for good, for code that was
/// translated may run at any time, and is kept once.
#[derive(Default)]
pub struct Sites(Mutex<HashSet<&'static Site>>);

impl Sites {
    /// The site of a flush that is being translated.
    pub fn keep(&self, qemu: &Qemu, insn: Insn, kind: FlushKind, mem: Mem) -> &'static Site {
        let next = match mem.base {
            Base::Rip => qemu.next_address(insn),
            _ => 0,
        };
        let site = Site { kind, mem, next };
        let mut sites = self.0.lock().expect("a callback panicked");
        if let Some(known) = sites.get(&site) {
            return known;
        }
        let kept = Box::leak(Box::new(site));
        sites.insert(kept);
        kept
    }
}

/// Where a flush leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To this guest-physical address.
    Physical(u64),
    /// To an address that is not mapped.
    Unmapped,
    /// It could not be found out.
    Unresolved,
}

/// Finds physical addresses.
#[derive(Default)]
pub struct Translator {
    /// Where the guest's direct map begins, if it was moved.
    directmap: Option<u64>,
    /// Whether the direct map was seen to be where it is taken to be, for four
    /// and for five levels.
    proven: [AtomicBool; 2],
}

impl Translator {
    /// One for a guest whose direct map begins at `directmap`, or where `nokaslr` leaves it.
    pub fn new(directmap: Option<u64>) -> Self {
        Self {
            directmap,
            proven: Default::default(),
        }
    }

    /// Where a flush leads that is about to execute, in a callback that may read registers.
    pub fn target(&self, qemu: &Qemu, registers: &Handles, site: &Site) -> Target {
        let look = qemu.look();
        let view = View {
            look: &look,
            registers,
        };
        let (Some(cr3), Some(cr4)) = (view.read(CR3), view.read(CR4)) else {
            return Target::Unresolved;
        };
        let Some(linear) = site.mem.address(site.next, &view) else {
            return Target::Unresolved;
        };
        let five = cr4 & LA57 != 0;
        let map = DirectMap::new(five, self.directmap);
        let direct = map.physical(linear);
        let proven = &self.proven[usize::from(five)];
        match direct {
            Some(physical) if proven.load(Ordering::Relaxed) => Target::Physical(physical),
            _ => {
                let read = |at| look.memory(map.base.wrapping_add(at));
                match paging::walk(cr3, five, linear, read) {
                    Walk::Mapped(physical) => {
                        if direct == Some(physical) {
                            proven.store(true, Ordering::Relaxed);
                        }
                        Target::Physical(physical)
                    }
                    Walk::Absent => Target::Unmapped,
                    Walk::Unreadable => Target::Unresolved,
                }
            }
        }
    }
}

/// The registers of the vCPU whose callback is running.
struct View<'a> {
    look: &'a Look<'a>,
    registers: &'a Handles,
}

impl View<'_> {
    fn read(&self, index: usize) -> Option<u64> {
        self.look.register(self.registers[index])
    }
}

impl Registers for View<'_> {
    fn general(&self, number: u8) -> Option<u64> {
        self.read(usize::from(number))
    }

    fn segment(&self, segment: Segment) -> Option<u64> {
        self.read(match segment {
            Segment::Fs => FS_BASE,
            Segment::Gs => GS_BASE,
        })
    }
}
