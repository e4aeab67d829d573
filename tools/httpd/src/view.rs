// SPDX-License-Identifier: GPL-2.0-only

//! What a connection has received and not yet used: bytes that lie in packets.
//!
//! Every byte that arrives is settled exactly once: when it is of no use any
//! more (a header, chunk framing, a refused body), or when the put that it
//! belongs to is in the batch. A packet with all its bytes settled is let go.

use std::collections::VecDeque;

use pmskb_uapi::Ext;

/// Memory that packets lie in.
pub trait Memory {
    /// The bytes of a packet that is held; `None` if they are out of range.
    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]>;
}

/// A packet as it is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The hold on it.
    pub token: u32,
    /// Where it lies in the store.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// Bytes of one packet that are in use: taken from the view, but not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which packet, counted over the connection's life.
    serial: u64,
    offset: u32,
    len: u32,
}

#[derive(Debug)]
struct Hold {
    token: u32,
    base: u64,
    unsettled: u32,
}

/// Bytes at the front of the view, or further back: a packet or the rest of one.
#[derive(Debug, Clone, Copy)]
struct Seg {
    serial: u64,
    at: u64,
    end: u64,
}

/// The bytes received and not yet used, in order.
#[derive(Debug, Default)]
pub struct View {
    segs: VecDeque<Seg>,
    len: usize,
    /// Packets with unsettled bytes, and settled ones between them.
    holds: VecDeque<Hold>,
    /// Serial number of the first hold.
    first: u64,
    free: Vec<u32>,
}

impl View {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a packet at the end.
    pub fn push(&mut self, packet: Packet) {
        if packet.len == 0 {
            self.free.push(packet.token);
            return;
        }
        let serial = self.first + self.holds.len() as u64;
        self.holds.push_back(Hold {
            token: packet.token,
            base: packet.offset,
            unsettled: packet.len,
        });
        let end = packet.offset + u64::from(packet.len);
        self.segs.push_back(Seg {
            serial,
            at: packet.offset,
            end,
        });
        self.len += packet.len as usize;
    }

    /// The longest slice of memory at the front, over the borders of packets that
    /// lie side by side. Empty only if the view is.
    pub fn run<'m>(&self, memory: &'m (impl Memory + ?Sized), limit: usize) -> &'m [u8] {
        let Some(first) = self.segs.front() else {
            return &[];
        };
        let mut end = first.end;
        for seg in self.segs.iter().skip(1) {
            if seg.at != end || end - first.at >= limit as u64 {
                break;
            }
            end = seg.end;
        }
        memory.bytes(first.at, end - first.at).unwrap_or(&[])
    }

    /// The bytes of the first packet. Empty only if the view is.
    pub fn front<'m>(&self, memory: &'m (impl Memory + ?Sized)) -> &'m [u8] {
        self.segs
            .front()
            .and_then(|seg| memory.bytes(seg.at, seg.end - seg.at))
            .unwrap_or(&[])
    }

    /// The slices of memory from byte `from` on.
    pub fn slices<'m, M: Memory + ?Sized>(
        &self,
        memory: &'m M,
        from: usize,
    ) -> impl Iterator<Item = &'m [u8]> + use<'_, 'm, M> {
        let mut skip = from as u64;
        self.segs.iter().filter_map(move |seg| {
            let len = seg.end - seg.at;
            if skip >= len {
                skip -= len;
                return None;
            }
            let at = seg.at + skip;
            skip = 0;
            memory.bytes(at, seg.end - at)
        })
    }

    /// The piece of the `len` bytes after the first `from`, if they are of one
    /// packet. They stay in the view.
    pub fn piece_at(&self, from: usize, len: usize) -> Option<Piece> {
        let mut from = from as u64;
        for seg in &self.segs {
            let seg_len = seg.end - seg.at;
            if from < seg_len {
                if from + len as u64 > seg_len {
                    return None;
                }
                let hold = self.hold(seg.serial);
                return Some(Piece {
                    serial: seg.serial,
                    offset: (seg.at + from - hold.base) as u32,
                    len: len as u32,
                });
            }
            from -= seg_len;
        }
        None
    }

    /// Drops and settles the first `n` bytes; those of `keep`, which must be
    /// among them, are only dropped.
    pub fn discard(&mut self, n: usize, keep: Option<Piece>) {
        let mut left = n;
        while left > 0 {
            let Some(piece) = self.pop(left) else {
                return;
            };
            left -= piece.len as usize;
            let kept = match keep {
                Some(k) if k.serial == piece.serial => {
                    let start = k.offset.max(piece.offset);
                    let end = (k.offset + k.len).min(piece.offset + piece.len);
                    end.saturating_sub(start)
                }
                _ => 0,
            };
            self.settle_bytes(piece.serial, piece.len - kept);
        }
    }

    /// Moves at most `n` bytes from the front to `pieces`. Returns how many.
    pub fn take(&mut self, n: usize, pieces: &mut Vec<Piece>) -> usize {
        let mut taken = 0;
        while taken < n {
            let Some(piece) = self.pop(n - taken) else {
                break;
            };
            taken += piece.len as usize;
            match pieces.last_mut() {
                Some(last)
                    if last.serial == piece.serial && last.offset + last.len == piece.offset =>
                {
                    last.len += piece.len;
                }
                _ => pieces.push(piece),
            }
        }
        taken
    }

    /// Where in memory a piece lies.
    pub fn memory_of(&self, piece: &Piece) -> std::ops::Range<u64> {
        let start = self.hold(piece.serial).base + u64::from(piece.offset);
        start..start + u64::from(piece.len)
    }

    /// How the store names a piece.
    pub fn ext(&self, piece: &Piece) -> Ext {
        Ext {
            token: self.hold(piece.serial).token,
            offset: piece.offset,
            len: piece.len,
        }
    }

    /// The piece is no longer needed.
    pub fn settle(&mut self, piece: &Piece) {
        self.settle_bytes(piece.serial, piece.len);
    }

    /// Drops all that is in it.
    pub fn clear(&mut self) {
        self.discard(self.len, None);
    }

    /// Tokens that can be released. Whoever takes them does it.
    pub fn free(&mut self) -> &mut Vec<u32> {
        &mut self.free
    }

    /// Tokens that are held: with unsettled bytes, or waiting to be released.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.free.len() + self.holds.iter().filter(|h| h.unsettled > 0).count()
    }

    fn hold(&self, serial: u64) -> &Hold {
        &self.holds[(serial - self.first) as usize]
    }

    /// The front of the view, at most `n` bytes of one packet.
    fn pop(&mut self, n: usize) -> Option<Piece> {
        let seg = self.segs.front_mut()?;
        let serial = seg.serial;
        let at = seg.at;
        let len = (n as u64).min(seg.end - at);
        seg.at += len;
        if seg.at == seg.end {
            self.segs.pop_front();
        }
        self.len -= len as usize;
        let offset = (at - self.hold(serial).base) as u32;
        Some(Piece {
            serial,
            offset,
            len: len as u32,
        })
    }

    fn settle_bytes(&mut self, serial: u64, bytes: u32) {
        let hold = &mut self.holds[(serial - self.first) as usize];
        hold.unsettled -= bytes;
        if hold.unsettled == 0 && bytes > 0 {
            self.free.push(hold.token);
        }
        while self.holds.front().is_some_and(|h| h.unsettled == 0) {
            self.holds.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Memory for Vec<u8> {
        fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
            self.get(offset as usize..(offset + len) as usize)
        }
    }

    fn view() -> (View, Vec<u8>) {
        let mut view = View::default();
        for (token, offset, len) in [(7, 0, 4), (8, 4, 4), (9, 10, 4)] {
            view.push(Packet { token, offset, len });
        }
        (view, b"abcdefgh--ijkl".to_vec())
    }

    #[test]
    fn packets_side_by_side_are_one_run() {
        let (view, memory) = view();
        assert_eq!(view.run(&memory, usize::MAX), b"abcdefgh");
        assert_eq!(view.run(&memory, 3), b"abcd");
        let all: Vec<&[u8]> = view.slices(&memory, 5).collect();
        assert_eq!(all, [&b"fgh"[..], b"ijkl"]);
    }

    #[test]
    fn a_packet_is_free_when_its_last_byte_is_settled() {
        let (mut view, _memory) = view();
        view.discard(3, None);
        assert!(view.free().is_empty());
        let mut pieces = Vec::new();
        assert_eq!(view.take(3, &mut pieces), 3);
        assert_eq!(pieces.len(), 2);
        view.settle(&pieces[0]);
        assert_eq!(std::mem::take(view.free()), [7]);
        view.discard(2, None);
        assert!(view.free().is_empty());
        view.settle(&pieces[1]);
        assert_eq!(std::mem::take(view.free()), [8]);
        assert_eq!(view.held(), 1);
    }

    #[test]
    fn a_kept_piece_outlives_the_bytes_around_it() {
        let (mut view, _memory) = view();
        let key = view.piece_at(5, 2).unwrap();
        assert_eq!(
            view.ext(&key),
            Ext {
                token: 8,
                offset: 1,
                len: 2
            }
        );
        assert!(view.piece_at(3, 2).is_none(), "in two packets");
        view.discard(9, Some(key));
        assert_eq!(std::mem::take(view.free()), [7]);
        view.settle(&key);
        assert_eq!(std::mem::take(view.free()), [8]);
    }

    #[test]
    fn pieces_of_one_packet_are_joined() {
        let (mut view, _memory) = view();
        let mut pieces = Vec::new();
        view.take(1, &mut pieces);
        view.take(2, &mut pieces);
        assert_eq!(pieces.len(), 1);
        assert_eq!(pieces[0].len, 3);
    }
}
