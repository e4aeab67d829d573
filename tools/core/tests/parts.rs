// SPDX-License-Identifier: GPL-2.0

//! The parts on their own: checksums, the frame table, extents.

use pmskb_core::csum::{payload_of, pseudo_v4, pseudo_v6, Sum};
use pmskb_core::*;
use proptest::prelude::*;

/// RFC 1071, as slow as possible.
fn naive(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for (at, byte) in bytes.iter().enumerate() {
        sum += u32::from(*byte) << if at % 2 == 0 { 8 } else { 0 };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if sum == 0xffff {
        0
    } else {
        sum as u16
    }
}

proptest! {
    #[test]
    fn sums_are_those_of_rfc_1071(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert_eq!(Sum::of(&bytes).get(), naive(&bytes));
    }

    #[test]
    fn sums_of_parts_make_the_sum_of_the_whole(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        cuts in (0usize..600, 0usize..600),
    ) {
        let (a, b) = (cuts.0.min(bytes.len()), cuts.1.min(bytes.len()));
        let (a, b) = (a.min(b), a.max(b));
        let parts = [&bytes[..a], &bytes[a..b], &bytes[b..]];
        let mut sum = Sum::ZERO;
        let mut len = 0;
        for part in parts {
            sum = sum.then(len, Sum::of(part));
            len += part.len() as u64;
        }
        prop_assert_eq!(sum, Sum::of(&bytes));
        // And back: the middle without what is around it.
        let head = Sum::of(parts[0]);
        prop_assert_eq!(sum.after(a as u64, head), Sum::of(&bytes[a..]));
        let mut hole = bytes.clone();
        hole[a..b].fill(0);
        prop_assert_eq!(sum.without(a as u64, Sum::of(parts[1])), Sum::of(&hole));
    }

    #[test]
    fn a_payload_sum_follows_from_the_transport_header(
        mut header in prop::collection::vec(any::<u8>(), 20),
        payload in prop::collection::vec(any::<u8>(), 0..300),
        src in any::<[u8; 16]>(),
        dst in any::<[u8; 16]>(),
        six in any::<bool>(),
    ) {
        let len = (header.len() + payload.len()) as u32;
        let pseudo = if six {
            pseudo_v6(&src, &dst, 6, len)
        } else {
            let four = |a: [u8; 16]| [a[0], a[1], a[2], a[3]];
            pseudo_v4(four(src), four(dst), 6, len)
        };
        header[16..18].fill(0);
        let whole = pseudo + Sum::of(&header) + Sum::of(&payload);
        header[16..18].copy_from_slice(&whole.field().to_be_bytes());
        prop_assert_eq!(payload_of(pseudo, &header), Sum::of(&payload));
    }

    #[test]
    fn packed_extents_are_the_same_bytes(
        parts in prop::collection::vec((0u64..4000, 1u32..3_000_000), 0..20),
    ) {
        let mut at = 1 << 21;
        let mut extents = Vec::new();
        for (gap, len) in parts {
            at += if gap % 3 == 0 { 0 } else { gap };
            extents.push(Extent::new(at, len));
            at += u64::from(len);
        }
        let packed: Vec<_> = Packer::new(&extents).collect();
        let total = |list: &[Extent]| list.iter().map(|e| u64::from(e.len)).sum::<u64>();
        prop_assert_eq!(total(&packed), total(&extents));
        for extent in &packed {
            prop_assert_eq!(Extent::unpack(extent.pack().unwrap()), *extent);
        }
        for pair in packed.windows(2) {
            // Only what is too long for one is split.
            prop_assert!(pair[0].end() != pair[1].off || u64::from(pair[0].len) == MAX_EXTENT);
        }
        let bytes = |list: &[Extent]| {
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for extent in list {
                match runs.last_mut() {
                    Some(run) if run.1 == extent.off => run.1 = extent.end(),
                    _ => runs.push((extent.off, extent.end())),
                }
            }
            runs
        };
        prop_assert_eq!(bytes(&packed), bytes(&extents));
    }

    #[test]
    fn the_frame_table_counts_exactly(
        count in 1u32..300,
        ops in prop::collection::vec((0u8..7, any::<u32>()), 0..600),
    ) {
        let words = FrameTable::<Vec<u64>>::words(count);
        let mut table = FrameTable::new(vec![!0; words], Frame(100), count).unwrap();
        let mut holds = vec![0u32; count as usize];
        let mut bad = vec![false; count as usize];
        let busy = |frame: Frame| frame.0 % 5 != 0;
        for (op, arg) in ops {
            let index = arg % count;
            let frame = Frame(100 + index);
            let at = index as usize;
            let free = table.state(frame).unwrap().0 == FrameState::Free;
            match op {
                0 | 1 => {
                    let near = (op == 1).then_some(frame);
                    let got = table.alloc(near, Need::Reserve, busy);
                    if let Some(got) = got {
                        prop_assert!(!bad[(got.0 - 100) as usize]);
                        prop_assert_eq!(holds[(got.0 - 100) as usize], 0);
                        holds[(got.0 - 100) as usize] = 1;
                    } else {
                        prop_assert_eq!(table.counts().free, 0);
                    }
                }
                2 => {
                    prop_assert_eq!(table.hold(frame, 0).is_ok(), !free);
                    holds[at] += u32::from(!free);
                }
                3 => {
                    prop_assert_eq!(table.unhold(frame, 0).is_ok(), holds[at] > 0);
                    holds[at] = holds[at].saturating_sub(1);
                }
                4 => {
                    table.claim(frame, 0).unwrap();
                    holds[at] += 1;
                }
                5 => {
                    table.reclaim(arg % 50, busy);
                }
                _ => {
                    table.mark_bad(frame).unwrap();
                    bad[at] = true;
                }
            }
            let counts = table.counts();
            let mut seen = Counts { total: count, ..Counts::default() };
            for index in 0..count {
                let (state, held) = table.state(Frame(100 + index)).unwrap();
                prop_assert_eq!(held, holds[index as usize]);
                match state {
                    FrameState::Free => seen.free += 1,
                    FrameState::Owned => seen.owned += 1,
                    FrameState::Limbo => seen.limbo += 1,
                    FrameState::Held => seen.held += 1,
                    FrameState::Bad => {
                        seen.bad += 1;
                        seen.bad_held += u32::from(held > 0);
                    }
                }
                prop_assert!(held == 0 || state != FrameState::Free);
            }
            prop_assert_eq!(counts, seen);
        }
    }
}

#[test]
fn a_stream_gets_adjacent_frames() {
    let words = FrameTable::<Vec<u64>>::words(5000);
    let mut table = FrameTable::new(vec![0; words], Frame(512), 5000).unwrap();
    let first = table.alloc(None, Need::Reserve, |_| true).unwrap();
    let mut last = first;
    for _ in 0..4999 {
        let next = table.alloc(Some(last), Need::Reserve, |_| true).unwrap();
        assert_eq!(next.0, last.0 + 1);
        last = next;
    }
    assert_eq!(table.alloc(Some(last), Need::Reserve, |_| true), None);
    for number in first.0..=last.0 {
        table.unhold(Frame(number), 0).unwrap();
    }
    assert_eq!(table.counts().limbo, 5000);
    assert!(table.alloc(None, Need::Reserve, |_| false).is_none());
    assert!(table.alloc(None, Need::Reserve, |_| true).is_some());
}

#[test]
fn a_frame_leaves_limbo_only_when_idle() {
    let words = FrameTable::<Vec<u64>>::words(64);
    let mut table = FrameTable::new(vec![0; words], Frame(512), 64).unwrap();
    let frame = table.alloc(None, Need::Reserve, |_| true).unwrap();
    table.unhold(frame, 0).unwrap();
    // Held again while the stack still looks at it: it stays until that ends.
    table.hold(frame, 0).unwrap();
    assert_eq!(table.reclaim(8, |_| false), 0);
    assert_eq!(table.state(frame), Some((FrameState::Limbo, 1)));
    // Then the host is asked, though the frame does not become free.
    let mut asked = 0;
    let idle = |_| {
        asked += 1;
        true
    };
    assert_eq!(table.reclaim(8, idle), 0);
    assert_eq!(asked, 1);
    assert_eq!(table.state(frame), Some((FrameState::Held, 1)));
    table.unhold(frame, 0).unwrap();
    assert_eq!(table.reclaim(8, |_| true), 1);
    assert_eq!(table.state(frame), Some((FrameState::Free, 0)));
}

#[test]
fn crc32c_is_castagnolis() {
    assert_eq!(crc32c_software(0, b"123456789"), 0xe306_9283);
    let one = crc32c_software(crc32c_software(0, b"1234"), b"56789");
    assert_eq!(one, 0xe306_9283);
}

#[test]
fn every_region_size_is_laid_out_or_refused() {
    for shift in 0..=46 {
        for len in [
            1u64 << shift,
            (1 << shift) + 4097,
            (1u64 << shift).saturating_sub(1),
        ] {
            for heads in [HeadArea::Default, HeadArea::Dram, HeadArea::Bytes(3 << 20)] {
                let Ok(geo) = Geometry::new(len, heads) else {
                    assert!(!(9 << 20..=MAX_REGION).contains(&len), "{len}");
                    continue;
                };
                assert_eq!(geo.data_off % (2 << 20), 0);
                assert!(geo.head_off + geo.head_len <= geo.data_off);
                assert!(geo.map_len * 8 >= geo.region_len / 4096);
                assert_eq!(geo.data_end() + 4096, geo.region_len);
            }
        }
    }
}

#[test]
fn what_its_owner_leaves_is_looked_at_once_though_others_hold_it() {
    let words = FrameTable::<Vec<u64>>::words(64);
    let mut table = FrameTable::new(vec![0; words], Frame(512), 64).unwrap();
    let frame = table.alloc(None, Need::Reserve, |_| true).unwrap();
    // A record holds it, and then gives it up: its owner still fills it.
    table.hold(frame, 0).unwrap();
    table.unhold(frame, 0).unwrap();
    assert_eq!(table.state(frame), Some((FrameState::Owned, 1)));
    table.hold(frame, 0).unwrap();
    assert_eq!(table.leave(frame), Ok(1));
    let mut asked = 0;
    let idle = |_| {
        asked += 1;
        true
    };
    assert_eq!(table.reclaim(8, idle), 0);
    assert_eq!(asked, 1);
    assert_eq!(table.state(frame), Some((FrameState::Held, 1)));
}
