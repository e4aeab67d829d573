// SPDX-License-Identifier: GPL-2.0

//! The checksums of an object, from those of the packets that it lies in.
//!
//! A whole packet brings its checksum along. Where an object takes only a part
//! of a packet (a request's body, without its header), the smaller side is read:
//! either the bytes that are taken, or those that are left out, whose sum is then
//! subtracted. Objects of several packets combine.
//!
//! A CRC32C, where it is wanted, combines likewise, but of parts that are known as they are: what
//! has none is read.

use super::{crc, csum::Sum, CsumKind, Result};

/// What is known of the packet that some bytes came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Sequence number of the payload's first byte; tells packets apart.
    pub seq: u32,
    /// When it came, ns; tells packets apart.
    pub time: u64,
    /// Payload bytes.
    pub len: u32,
    /// Checksum of the whole payload.
    pub sum: Sum,
    /// Where that is from; [`CsumKind::None`] if it is not known.
    pub kind: CsumKind,
}

/// Bytes of one packet that lie together in the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset of the first byte in the region.
    pub off: u64,
    /// Bytes; at least 1.
    pub len: u32,
    /// The packet that they came in.
    pub packet: Packet,
    /// Offset of the first byte in the packet's payload.
    pub at: u32,
    /// Bytes of the packet right before and after these in the region that the
    /// caller holds too, and that may be read instead.
    pub before: u32,
    /// See `before`.
    pub after: u32,
    /// CRC32C of these bytes, if it is known.
    pub crc: Option<u32>,
}

/// The checksums of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Composed {
    /// The sum of all its bytes.
    pub sum: Sum,
    /// The least trustworthy source that any of it has: computed by this host,
    /// the device's sum, the sender's checksum.
    pub kind: CsumKind,
    /// Bytes that had to be read for it.
    pub read: u64,
    /// The CRC32C of all its bytes, if it was asked for.
    pub crc: Option<u32>,
    /// Bytes that had to be read for that, and were not for the sum.
    pub crc_read: u64,
}

/// Composes the checksum of the object that consists of `pieces`, in order; and its CRC32C if
/// `with_crc`. `look(off, len, with_crc)` reads bytes of the region: their sum, and their CRC32C
/// if that is wanted. An empty object has the sum of no bytes, computed.
pub fn compose(
    pieces: &[Piece],
    with_crc: bool,
    mut look: impl FnMut(u64, u32, bool) -> Result<(Sum, u32)>,
) -> Result<Composed> {
    let mut out = Composed {
        sum: Sum::ZERO,
        kind: CsumKind::None,
        read: 0,
        crc: with_crc.then_some(0),
        crc_read: 0,
    };
    let mut len = 0u64;
    let mut rest = pieces;
    while let Some(first) = rest.first() {
        let group = same_packet(rest);
        let (group, others) = rest.split_at_checked(group).unwrap_or((rest, &[]));
        rest = others;

        let taken: u64 = group.iter().map(|piece| u64::from(piece.len)).sum();
        let (sum, kind, read) = match left_out(first, group.last().unwrap_or(first), taken) {
            Some((head, tail)) => {
                let mut sum = first.packet.sum;
                if head != 0 {
                    let at = first.off.saturating_sub(u64::from(head));
                    sum = sum.after(u64::from(head), look(at, head, false)?.0);
                }
                if tail != 0 {
                    let last = group.last().unwrap_or(first);
                    let at = last.off.saturating_add(u64::from(last.len));
                    sum = sum.without(taken, look(at, tail, false)?.0);
                }
                for piece in group.iter().filter(|_| with_crc) {
                    let crc = match piece.crc {
                        Some(crc) => crc,
                        None => {
                            out.crc_read += u64::from(piece.len);
                            look(piece.off, piece.len, true)?.1
                        }
                    };
                    out.append(crc, piece.len);
                }
                (sum, first.packet.kind, u64::from(head) + u64::from(tail))
            }
            None => {
                let mut sum = Sum::ZERO;
                let mut at = 0u64;
                for piece in group {
                    let unknown = with_crc && piece.crc.is_none();
                    let (part, crc) = look(piece.off, piece.len, unknown)?;
                    sum = sum.then(at, part);
                    out.append(piece.crc.unwrap_or(crc), piece.len);
                    at += u64::from(piece.len);
                }
                (sum, CsumKind::Computed, taken)
            }
        };
        out.sum = out.sum.then(len, sum);
        out.kind = weaker(out.kind, kind);
        out.read += read;
        len += taken;
    }
    if len == 0 {
        out.kind = CsumKind::Computed;
    }
    Ok(out)
}

impl Composed {
    /// `len` bytes more, which have this CRC32C.
    fn append(&mut self, crc: u32, len: u32) {
        self.crc = self.crc.map(|so_far| crc::combine(so_far, crc, len.into()));
    }
}

/// How many of the first pieces are of one packet, one after the other in it.
fn same_packet(pieces: &[Piece]) -> usize {
    let follows = |pair: &[Piece]| match pair {
        [a, b] => a.packet == b.packet && a.at.checked_add(a.len) == Some(b.at),
        _ => false,
    };
    1 + pieces.windows(2).take_while(|pair| follows(pair)).count()
}

/// The bytes of the packet before `first` and after `last`, if the packet's sum
/// is known, those bytes are at hand, and they are fewer than what is taken.
fn left_out(first: &Piece, last: &Piece, taken: u64) -> Option<(u32, u32)> {
    if first.packet.kind == CsumKind::None {
        return None;
    }
    let end = last.at.checked_add(last.len)?;
    let head = first.at;
    let tail = first.packet.len.checked_sub(end)?;
    let near = first.before >= head && last.after >= tail;
    let fewer = u64::from(head) + u64::from(tail) < taken;
    (near && fewer).then_some((head, tail))
}

/// The source of a sum that has parts from both.
fn weaker(a: CsumKind, b: CsumKind) -> CsumKind {
    use CsumKind::*;
    match (a, b) {
        (None, other) | (other, None) => other,
        (Computed, _) | (_, Computed) => Computed,
        (Hardware, _) | (_, Hardware) => Hardware,
        (Derived, Derived) => Derived,
    }
}
