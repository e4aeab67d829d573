// SPDX-License-Identifier: GPL-2.0-only
//! Finds, in the bytes of one x86-64 instruction, what matters for persistence.
//!
//! TCG turns `clwb` and its like into nothing and gives them no memory callback,
//! so their operand has to be decoded here. Everything else about an instruction
//! is of no interest.

/// What an instruction does for persistence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a cache line back.
    Flush(FlushKind, Mem),
    /// `sfence` or `mfence`.
    Fence,
    /// Stores past the cache.
    NonTemporal,
    /// `wbinvd` or `wbnoinvd`.
    WriteBackAll,
    /// A locked instruction, an implicitly locked `xchg` included.
    Locked,
    /// The mark: a no-op by which the guest speaks to the plugin.
    Mark,
}

/// The instruction that writes a line back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlushKind {
    /// `clwb`
    Clwb,
    /// `clflushopt`
    Clflushopt,
    /// `clflush`
    Clflush,
}

/// The displacement that makes `nopl disp32(%rax)` the mark ("pmsk").
pub const MARK: i32 = 0x6b73_6d70;

/// The base of an effective address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Base {
    /// None: displacement and index only.
    None,
    /// A general register, by its number in the encoding.
    Reg(u8),
    /// The address of the next instruction.
    Rip,
}

/// A segment whose base counts in 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// `%fs`
    Fs,
    /// `%gs`
    Gs,
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mem {
    /// The base, if any.
    pub base: Base,
    /// The index register and the power of two that scales it.
    pub index: Option<(u8, u8)>,
    /// The displacement.
    pub disp: i32,
    /// The segment override, where it counts.
    pub segment: Option<Segment>,
    /// Whether the offset is cut to 32 bits (address-size prefix).
    pub short: bool,
}

/// The registers that an address may need.
pub trait Registers {
    /// The general register with this number, or nothing if it cannot be read.
    fn general(&self, number: u8) -> Option<u64>;
    /// The base of a segment.
    fn segment(&self, segment: Segment) -> Option<u64>;
}

impl Mem {
    /// The linear address; `next` is the address of the following instruction.
    pub fn address(&self, next: u64, registers: &impl Registers) -> Option<u64> {
        let mut offset = match self.base {
            Base::None => 0,
            Base::Reg(n) => registers.general(n)?,
            Base::Rip => next,
        };
        if let Some((n, shift)) = self.index {
            offset = offset.wrapping_add(registers.general(n)? << shift);
        }
        offset = offset.wrapping_add_signed(i64::from(self.disp));
        if self.short {
            offset &= 0xffff_ffff;
        }
        let base = match self.segment {
            None => 0,
            Some(s) => registers.segment(s)?,
        };
        Some(base.wrapping_add(offset))
    }
}

/// The prefixes of one instruction.
#[derive(Default)]
struct Prefixes {
    data16: bool,
    repeat: Option<u8>,
    segment: Option<Segment>,
    short: bool,
    lock: bool,
    rex: u8,
}

/// Says what the instruction in `code` does; `None` for all the rest.
///
/// The bytes are taken for 64-bit code. In 16- and 32-bit code the fences and
/// non-temporal stores have the same opcodes, and a flush there is refused when
/// it executes, because its registers cannot be read as 64-bit ones.
pub fn decode(code: &[u8]) -> Option<Op> {
    let mut at = 0;
    let mut p = Prefixes::default();
    loop {
        match *code.get(at)? {
            0x66 => p.data16 = true,
            r @ (0xf2 | 0xf3) => p.repeat = Some(r),
            0x64 => p.segment = Some(Segment::Fs),
            0x65 => p.segment = Some(Segment::Gs),
            0x67 => p.short = true,
            0xf0 => p.lock = true,
            0x2e | 0x36 | 0x3e | 0x26 => {}
            _ => break,
        }
        at += 1;
    }
    match *code.get(at)? {
        // VEX with two and three bytes, EVEX: only vmovnt* is of interest.
        0xc5 => vector(*code.get(at + 1)?, 1, &code[at + 2..]),
        0xc4 => vector(*code.get(at + 2)?, code[at + 1] & 0x1f, &code[at + 3..]),
        0x62 => vector(*code.get(at + 2)?, code[at + 1] & 0x07, code.get(at + 4..)?),
        byte => {
            if byte & 0xf0 == 0x40 {
                p.rex = byte;
                at += 1;
            }
            let rest = code.get(at..)?;
            match *rest {
                _ if p.lock => Some(Op::Locked),
                [0x0f, ..] => escaped(&p, &rest[1..]),
                [0x86 | 0x87, modrm, ..] if modrm >> 6 != 3 => Some(Op::Locked),
                _ => None,
            }
        }
    }
}

/// An instruction with a VEX or EVEX prefix.
fn vector(payload: u8, map: u8, rest: &[u8]) -> Option<Op> {
    let [opcode, modrm, ..] = *rest else {
        return None;
    };
    // pp: 0 for none, 1 for 66.
    let found = map == 1
        && match (opcode, payload & 3) {
            (0x2b, 0 | 1) | (0xe7, 1) => modrm >> 6 != 3,
            (0xf7, 1) => modrm >> 6 == 3,
            _ => false,
        };
    found.then_some(Op::NonTemporal)
}

/// An instruction of the maps that 0F opens; `rest` begins after the 0F.
fn escaped(p: &Prefixes, rest: &[u8]) -> Option<Op> {
    let opcode = *rest.first()?;
    if opcode == 0x09 && p.repeat != Some(0xf2) {
        return Some(Op::WriteBackAll);
    }
    let modrm = *rest.get(1)?;
    let in_memory = modrm >> 6 != 3;
    match opcode {
        0xae if p.repeat.is_none() => match ((modrm >> 3) & 7, p.data16, in_memory) {
            (6, true, true) => flush(FlushKind::Clwb, p, rest),
            (7, true, true) => flush(FlushKind::Clflushopt, p, rest),
            (7, false, true) => flush(FlushKind::Clflush, p, rest),
            (6 | 7, false, false) => Some(Op::Fence),
            _ => None,
        },
        // movnti; movntps, movntpd and AMD's movntss, movntsd; movntq, movntdq.
        0xc3 | 0x2b | 0xe7 if in_memory => {
            let known = match opcode {
                0xc3 => !p.data16 && p.repeat.is_none(),
                0xe7 => p.repeat.is_none(),
                _ => true,
            };
            known.then_some(Op::NonTemporal)
        }
        // maskmovq, maskmovdqu.
        0xf7 if !in_memory && p.repeat.is_none() => Some(Op::NonTemporal),
        // movdir64b, movdiri.
        0x38 => match (modrm, p.data16, p.repeat) {
            (0xf8, true, None) | (0xf9, false, None) => Some(Op::NonTemporal),
            _ => None,
        },
        // nopl disp32(%rax), with nothing before it.
        0x1f if modrm == 0x80 && !p.data16 && p.rex == 0 => {
            let disp = rest.get(2..6)?.try_into().ok()?;
            (i32::from_le_bytes(disp) == MARK).then_some(Op::Mark)
        }
        _ => None,
    }
}

/// A flush, whose operand begins at `rest[1]`.
fn flush(kind: FlushKind, p: &Prefixes, rest: &[u8]) -> Option<Op> {
    Some(Op::Flush(kind, operand(p, rest.get(1..)?)?))
}

/// Decodes ModRM, SIB and displacement.
fn operand(p: &Prefixes, bytes: &[u8]) -> Option<Mem> {
    let modrm = *bytes.first()?;
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let (rex_b, rex_x) = ((p.rex & 1) << 3, (p.rex & 2) << 2);
    let mut rest = &bytes[1..];
    let mut base = Base::Reg(rm | rex_b);
    let mut index = None;
    // Without a base the displacement has 32 bits although the mode says none.
    let mut wide = mode == 2;
    if rm == 4 {
        let sib = *rest.first()?;
        rest = &rest[1..];
        base = Base::Reg((sib & 7) | rex_b);
        let number = ((sib >> 3) & 7) | rex_x;
        if number != 4 {
            index = Some((number, sib >> 6));
        }
        if sib & 7 == 5 && mode == 0 {
            base = Base::None;
            wide = true;
        }
    } else if rm == 5 && mode == 0 {
        base = Base::Rip;
        wide = true;
    }
    let disp = if wide {
        i32::from_le_bytes(rest.get(..4)?.try_into().ok()?)
    } else if mode == 1 {
        i32::from(*rest.first()? as i8)
    } else {
        0
    };
    Some(Mem {
        base,
        index,
        disp,
        segment: p.segment,
        short: p.short,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Made by `tests/encodings` with the GNU assembler: bytes, tab, source.
    const TABLE: &str = include_str!("../tests/encodings.txt");

    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];

    fn register(name: &str) -> (u8, bool) {
        let name = name.trim().trim_start_matches('%');
        if let Some(n) = NAMES.iter().position(|&r| r == name) {
            return (n as u8, false);
        }
        let long = match name.strip_suffix('d') {
            Some(numbered) => numbered.to_string(),
            None => name.replacen('e', "r", 1),
        };
        let n = NAMES.iter().position(|&r| r == long);
        (n.unwrap_or_else(|| panic!("register {name}")) as u8, true)
    }

    /// Reads an operand in AT&T syntax.
    fn parse(text: &str) -> Mem {
        let (segment, text) = match text.split_once(':') {
            Some(("%fs", t)) => (Some(Segment::Fs), t),
            Some(("%gs", t)) => (Some(Segment::Gs), t),
            Some(_) => panic!("segment in {text}"),
            None => (None, text),
        };
        let (disp, inner) = text
            .trim_end_matches(')')
            .split_once('(')
            .unwrap_or((text, ""));
        let (negative, digits) = match disp.strip_prefix('-') {
            Some(d) => (true, d),
            None => (false, disp),
        };
        let value = match digits.strip_prefix("0x") {
            Some(hex) => i64::from_str_radix(hex, 16).unwrap(),
            None if digits.is_empty() => 0,
            None => digits.parse().unwrap(),
        };
        let mut parts = inner.split(',');
        let (mut base, mut index, mut short) = (Base::None, None, false);
        match parts.next().unwrap_or("") {
            "" => {}
            "%rip" => base = Base::Rip,
            r => {
                let (n, s) = register(r);
                base = Base::Reg(n);
                short |= s;
            }
        }
        if let Some(r) = parts.next() {
            let (n, s) = register(r);
            short |= s;
            let scale: u32 = parts.next().unwrap_or("1").parse().unwrap();
            index = Some((n, scale.trailing_zeros() as u8));
        }
        Mem {
            base,
            index,
            disp: if negative { -value } else { value } as i32,
            segment,
            short,
        }
    }

    fn expected(source: &str) -> Option<Op> {
        let (name, operands) = source.split_once(' ').unwrap_or((source, ""));
        let kind = match name {
            "clwb" => FlushKind::Clwb,
            "clflushopt" => FlushKind::Clflushopt,
            "clflush" => FlushKind::Clflush,
            "sfence" | "mfence" => return Some(Op::Fence),
            "wbinvd" | "wbnoinvd" => return Some(Op::WriteBackAll),
            "mark" => return Some(Op::Mark),
            n if n.contains("movnt") && !n.contains("movntdqa") => return Some(Op::NonTemporal),
            n if n.contains("maskmov") || n.starts_with("movdir") => return Some(Op::NonTemporal),
            "lock" => return Some(Op::Locked),
            "xchg" if operands.contains('(') => return Some(Op::Locked),
            _ => return None,
        };
        Some(Op::Flush(kind, parse(operands)))
    }

    #[test]
    fn agrees_with_the_assembler() {
        let mut seen = 0;
        for row in TABLE.lines().filter(|l| !l.starts_with('#')) {
            let (hex, source) = row.split_once('\t').unwrap();
            let code: Vec<u8> = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[i * 2..][..2], 16).unwrap())
                .collect();
            assert_eq!(decode(&code), expected(source), "{row}");
            // A shorter one is never taken for something that it is not.
            for end in 0..code.len() {
                let cut = decode(&code[..end]);
                assert!(
                    cut.is_none() || cut == expected(source),
                    "{row} cut at {end}"
                );
            }
            seen += 1;
        }
        assert!(seen > 100, "{seen}");
    }

    struct Fixed;

    impl Registers for Fixed {
        fn general(&self, number: u8) -> Option<u64> {
            (number != 15).then(|| 0xffff_8880_0000_0000 + (u64::from(number) << 32))
        }
        fn segment(&self, segment: Segment) -> Option<u64> {
            Some(match segment {
                Segment::Fs => 0x1000,
                Segment::Gs => 0x2000,
            })
        }
    }

    #[test]
    fn addresses() {
        let at = |text: &str| parse(text).address(0xffff_ffff_8100_0000, &Fixed);
        assert_eq!(at("(%rax)"), Some(0xffff_8880_0000_0000));
        assert_eq!(at("-0x40(%rcx)"), Some(0xffff_8880_ffff_ffc0));
        assert_eq!(at("0x10(%rip)"), Some(0xffff_ffff_8100_0010));
        assert_eq!(at("%fs:0x20"), Some(0x1020));
        assert_eq!(at("%gs:-8(%edx)"), Some(0x2000 + 0xffff_fff8));
        assert_eq!(at("(,%rcx,8)"), Some((0xffff_8881_0000_0000u64) << 3));
        assert_eq!(at("(%rax,%r15,1)"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_bytes_are_decoded_or_refused(code in prop::collection::vec(any::<u8>(), 0..16)) {
            let _ = decode(&code);
        }

        #[test]
        fn any_flush_has_an_address(tail in prop::collection::vec(any::<u8>(), 14), next: u64) {
            let mut code = vec![0x66, 0x0f, 0xae];
            code.extend(tail);
            if let Some(Op::Flush(_, mem)) = decode(&code) {
                let _ = mem.address(next, &Fixed);
            }
        }
    }
}
