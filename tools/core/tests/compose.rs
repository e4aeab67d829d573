// SPDX-License-Identifier: GPL-2.0

//! Promise: for any split of any number of packets, the checksum that is recorded
//! equals a computed one, and a whole packet's bytes are not read for it.

use pmskb_core::{compose, csum::Sum, CsumKind, Packet, Piece};
use proptest::prelude::*;

/// Packets that lie one after the other in a region, cut into the extents that
/// tokens hold, of which an object takes some bytes each.
#[derive(Debug, Clone)]
struct Case {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

fn case() -> impl Strategy<Value = Case> {
    let packet = (
        proptest::collection::vec(any::<u8>(), 1..200),
        // Where the packet is cut in two tokens (as at a frame's end), if at all.
        proptest::option::of(any::<prop::sample::Index>()),
        // What is taken of it, from the front and the back.
        (0usize..40, 0usize..40, any::<bool>()),
        prop_oneof![
            Just(CsumKind::None),
            Just(CsumKind::Derived),
            Just(CsumKind::Hardware),
            Just(CsumKind::Computed)
        ],
    );
    proptest::collection::vec(packet, 0..8).prop_map(|packets| {
        let mut bytes = Vec::new();
        let mut pieces = Vec::new();
        for (nr, (payload, cut, (front, back, whole), kind)) in packets.iter().enumerate() {
            let start = bytes.len() as u64;
            bytes.extend_from_slice(payload);
            let packet = Packet {
                seq: nr as u32 * 1000,
                time: nr as u64,
                len: payload.len() as u32,
                sum: Sum::of(payload),
                kind: *kind,
            };
            let cut = cut.map_or(payload.len(), |cut| cut.index(payload.len()));
            let (front, back) = if *whole { (0, 0) } else { (*front, *back) };
            let (from, to) = (front, payload.len().saturating_sub(back));
            for (token, end) in [(0, cut), (cut, payload.len())] {
                let (a, b) = (from.max(token), to.min(end));
                if a < b {
                    pieces.push(Piece {
                        off: start + a as u64,
                        len: (b - a) as u32,
                        packet,
                        at: a as u32,
                        before: (a - token) as u32,
                        after: (end - b) as u32,
                    });
                }
            }
        }
        Case { bytes, pieces }
    })
}

proptest! {
    #[test]
    fn recorded_checksum_equals_a_computed_one(case in case()) {
        let object: Vec<u8> = case
            .pieces
            .iter()
            .flat_map(|p| case.bytes[p.off as usize..][..p.len as usize].to_vec())
            .collect();
        let mut read = 0u64;
        let composed = compose(&case.pieces, |off, len| {
            read += u64::from(len);
            Ok(Sum::of(&case.bytes[off as usize..][..len as usize]))
        })
        .unwrap();
        prop_assert_eq!(composed.sum, Sum::of(&object));
        prop_assert_eq!(composed.read, read);
        prop_assert!(read <= object.len() as u64);
        let all_known = case.pieces.iter().all(|p| p.packet.kind == CsumKind::Derived);
        if !all_known && !object.is_empty() && composed.kind == CsumKind::Derived {
            prop_assert!(false, "derived, but not all of it was");
        }
    }
}

#[test]
fn whole_packets_are_not_read() {
    let payload = [7u8; 1448];
    let packet = |nr: u32| Packet {
        seq: nr * 1448,
        time: 1,
        len: 1448,
        sum: Sum::of(&payload),
        kind: CsumKind::Derived,
    };
    // The second packet crosses the end of a frame.
    let piece = |nr, off, at, len| Piece {
        off,
        len,
        packet: packet(nr),
        at,
        before: 0,
        after: 0,
    };
    let pieces = [
        piece(0, 0, 0, 1448),
        piece(1, 1448, 0, 1000),
        piece(1, 8192, 1000, 448),
    ];
    let composed = compose(&pieces, |_, _| panic!("read")).unwrap();
    assert_eq!(composed.read, 0);
    assert_eq!(composed.kind, CsumKind::Derived);
    assert_eq!(composed.sum, Sum::of(&[7u8; 2896]));
}

#[test]
fn a_header_is_read_instead_of_its_body() {
    let bytes: Vec<u8> = (0..1135u32).map(|i| i as u8).collect();
    let packet = Packet {
        seq: 1,
        time: 1,
        len: 1135,
        sum: Sum::of(&bytes),
        kind: CsumKind::Derived,
    };
    let body = Piece {
        off: 111,
        len: 1024,
        packet,
        at: 111,
        before: 111,
        after: 0,
    };
    let composed = compose(&[body], |off, len| {
        Ok(Sum::of(&bytes[off as usize..][..len as usize]))
    })
    .unwrap();
    assert_eq!(composed.read, 111);
    assert_eq!(composed.kind, CsumKind::Derived);
    assert_eq!(composed.sum, Sum::of(&bytes[111..]));
}
