// SPDX-License-Identifier: GPL-2.0

//! Promise: for any split of any number of packets, the checksum that is recorded
//! equals a computed one, and a whole packet's bytes are not read for it. The same goes for
//! the CRC32C, if it is wanted.

use pmskb_core::{compose, crc, crc32c_software, csum::Sum, CsumKind, Packet, Piece};
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
        // Its CRC32C was computed when it was placed.
        any::<bool>(),
    );
    proptest::collection::vec(packet, 0..8).prop_map(|packets| {
        let mut bytes = Vec::new();
        let mut pieces = Vec::new();
        for (nr, (payload, cut, (front, back, whole), kind, crc)) in packets.iter().enumerate() {
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
                        crc: (*crc && (a, b) == (token, end))
                            .then(|| crc32c_software(0, &payload[a..b])),
                    });
                }
            }
        }
        Case { bytes, pieces }
    })
}

proptest! {
    #[test]
    fn recorded_checksum_equals_a_computed_one(case in case(), with_crc in any::<bool>()) {
        let object: Vec<u8> = case
            .pieces
            .iter()
            .flat_map(|p| case.bytes[p.off as usize..][..p.len as usize].to_vec())
            .collect();
        let mut read = 0u64;
        let composed = compose(&case.pieces, with_crc, |off, len, with_crc| {
            read += u64::from(len);
            let bytes = &case.bytes[off as usize..][..len as usize];
            // Whoever did not ask gets nothing right.
            let crc = if with_crc { crc32c_software(0, bytes) } else { 0x5555_5555 };
            Ok((Sum::of(bytes), crc))
        })
        .unwrap();
        prop_assert_eq!(composed.sum, Sum::of(&object));
        prop_assert_eq!(composed.crc, with_crc.then(|| crc32c_software(0, &object)));
        prop_assert_eq!(composed.read + composed.crc_read, read);
        prop_assert!(composed.read <= object.len() as u64);
        let known: usize = case.pieces.iter().filter(|p| p.crc.is_some()).map(|p| p.len as usize).sum();
        prop_assert!(composed.crc_read as usize <= object.len() - known);
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
        crc: Some(crc32c_software(0, &payload[..len as usize])),
    };
    let pieces = [
        piece(0, 0, 0, 1448),
        piece(1, 1448, 0, 1000),
        piece(1, 8192, 1000, 448),
    ];
    let composed = compose(&pieces, true, |_, _, _| panic!("read")).unwrap();
    assert_eq!(composed.read, 0);
    assert_eq!(composed.crc, Some(crc32c_software(0, &[7u8; 2896])));
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
        crc: None,
    };
    let composed = compose(&[body], false, |off, len, _| {
        Ok((Sum::of(&bytes[off as usize..][..len as usize]), 0))
    })
    .unwrap();
    assert_eq!(composed.read, 111);
    assert_eq!(composed.kind, CsumKind::Derived);
    assert_eq!(composed.sum, Sum::of(&bytes[111..]));
}

#[test]
fn a_crc_of_parts_is_that_of_the_whole() {
    // RFC 3720, B.4: 32 bytes of zeros, of ones, rising.
    let rising: Vec<u8> = (0..32).collect();
    for (bytes, right) in [
        (&[0; 32][..], 0x8a91_36aa),
        (&[0xff; 32][..], 0x62a8_ab43),
        (&rising[..], 0x46dd_794e),
    ] {
        for cut in 0..=32 {
            let (a, b) = bytes.split_at(cut);
            let whole = crc::combine(crc32c_software(0, a), crc32c_software(0, b), b.len() as u64);
            assert_eq!(whole, right, "cut at {cut}");
        }
    }
    // Lengths that nobody computes byte by byte: twice as many is twice in a row.
    for len in [1u64 << 12, 1 << 30, (1 << 40) + 5] {
        let twice = crc::combine(crc::combine(1, 0, len), 0, len);
        assert_eq!(crc::combine(1, 0, 2 * len), twice);
    }
}
