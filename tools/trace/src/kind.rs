// SPDX-License-Identifier: GPL-2.0-only
//! What a line of a store is for.

use pmskb_core::{FRAME_SIZE, Geometry, LINE_SIZE, LIVE_OFF};
use pmskb_tcg::model::Line;
use serde::Serialize;

/// Lines of a frame.
pub const LINES: u64 = FRAME_SIZE / LINE_SIZE;

/// What a line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A superblock.
    Superblock,
    /// The live page: means nothing after a crash.
    Live,
    /// A batch area.
    Batch,
    /// The frame map.
    Map,
    /// The head area: packets' headers, which mean nothing after a crash.
    Heads,
    /// The header of a record frame.
    Header,
    /// A line of a record frame.
    Record,
    /// Of an extent list.
    List,
    /// A node of the index, which means nothing after a crash.
    Node,
    /// Payload, of a record or not.
    Data,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 10] = [
        Kind::Superblock,
        Kind::Batch,
        Kind::Map,
        Kind::Header,
        Kind::Record,
        Kind::List,
        Kind::Data,
        Kind::Node,
        Kind::Live,
        Kind::Heads,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Superblock => "superblock",
            Kind::Live => "live page",
            Kind::Batch => "batch area",
            Kind::Map => "frame map",
            Kind::Heads => "head area",
            Kind::Header => "record frame's header",
            Kind::Record => "record",
            Kind::List => "extent list",
            Kind::Node => "index",
            Kind::Data => "payload",
        }
    }

    /// Whether nobody reads it after a crash.
    pub fn volatile(self) -> bool {
        matches!(self, Kind::Live | Kind::Heads | Kind::Node)
    }

    /// What a line is for; `read` has the lines as they are.
    pub fn of(geo: &Geometry, line: u64, read: impl Fn(u64) -> Line) -> Self {
        let off = line * LINE_SIZE;
        if off >= geo.data_end() || off < LIVE_OFF {
            return Kind::Superblock;
        }
        if off < LIVE_OFF + FRAME_SIZE {
            return Kind::Live;
        }
        if off < geo.map_off {
            return Kind::Batch;
        }
        if off < geo.head_off {
            return Kind::Map;
        }
        if off < geo.data_off {
            return Kind::Heads;
        }
        let first = line / LINES * LINES;
        // Of a frame that was made one and is so no more only the first word is gone.
        let head = read(first);
        let place = head[8..16] == (first * LINE_SIZE).to_le_bytes();
        if head[4..8] == *b"PKel" && place {
            return Kind::List;
        }
        if head[4..8] == *b"PKrf" && place {
            return if line == first {
                Kind::Header
            } else {
                Kind::Record
            };
        }
        let node = (0..4).any(|node| read(first + node * 16)[14..16] == [0x70, 0x6e]);
        if node { Kind::Node } else { Kind::Data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmskb_core::HeadArea;

    #[test]
    fn every_area_has_its_kind() {
        let geo = Geometry::new(16 << 20, HeadArea::Default).unwrap();
        let data = geo.data_off / LINE_SIZE;
        let read = |line: u64| {
            let mut bytes = [0; 64];
            let frame = line / LINES * LINES;
            bytes[8..16].copy_from_slice(&(line * LINE_SIZE).to_le_bytes());
            match frame - data {
                0 => bytes[4..8].copy_from_slice(b"PKrf"),
                64 => bytes[4..8].copy_from_slice(b"PKel"),
                128 if line == data + 128 + 16 => bytes[14..16].copy_from_slice(&[0x70, 0x6e]),
                _ => bytes = [0; 64],
            }
            bytes
        };
        let of = |off: u64| Kind::of(&geo, off / LINE_SIZE, read);
        for (off, kind) in [
            (0, Kind::Superblock),
            (448, Kind::Superblock),
            (4096, Kind::Live),
            (8192, Kind::Batch),
            (geo.map_off - 64, Kind::Batch),
            (geo.map_off, Kind::Map),
            (geo.head_off, Kind::Heads),
            (geo.data_off, Kind::Header),
            (geo.data_off + 64, Kind::Record),
            (geo.data_off + 4096, Kind::List),
            (geo.data_off + 8192 + 640, Kind::Node),
            (geo.data_off + 3 * 4096, Kind::Data),
            (geo.data_end(), Kind::Superblock),
        ] {
            assert_eq!(of(off), kind, "{off:#x}");
        }
    }
}
