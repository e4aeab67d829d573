// SPDX-License-Identifier: GPL-2.0-only
//! Which function is for what: the rows of Table 1 in the 2021 paper.
//!
//! The rules are by name, and the first that fits counts. What no rule knows is network: the
//! driver, the stack, system calls, the event loop, HTTP. The copy out of the socket, which
//! every program makes that is given bytes, is copy and not network.

use pmskb_meter::tally::Row;
use serde::{Deserialize, Serialize};

/// What a function is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// Driver, network stack, system calls, event loop, HTTP.
    Network,
    /// Making a request to a store out of what was received.
    Preparation,
    /// Checksums.
    Checksum,
    /// Copies of payload, and of whatever else is copied by the same functions.
    #[serde(rename = "copy")]
    Copying,
    /// Space, records, index; file systems and databases.
    Insertion,
    /// Write-backs and fences.
    Flush,
}

impl Category {
    /// All of them, in the paper's order.
    pub const ALL: [Category; 6] = [
        Category::Network,
        Category::Preparation,
        Category::Checksum,
        Category::Copying,
        Category::Insertion,
        Category::Flush,
    ];

    /// As a heading.
    pub fn title(self) -> &'static str {
        match self {
            Category::Network => "network",
            Category::Preparation => "request preparation",
            Category::Checksum => "checksum",
            Category::Copying => "copy",
            Category::Insertion => "allocation and insertion",
            Category::Flush => "flush",
        }
    }
}

/// Parts of the names of functions, and what those are for.
type Rules = &'static [(&'static str, Category)];

use Category::{Checksum, Copying, Flush, Insertion, Network, Preparation};

/// In the module. What moves a packet into frames and describes it stands for making a request.
const MODULE: Rules = &[
    ("pmem::Pmem>::flush", Flush),
    ("pmem::Pmem>::fence", Flush),
    ("csum", Checksum),
    ("crc", Checksum),
    ("::place", Preparation),
    ("::submit", Preparation),
    ("::receive", Preparation),
    ("::descriptor", Preparation),
    ("::token", Preparation),
    ("::uring", Preparation),
    ("::auto", Preparation),
    ("", Insertion),
];

/// In the kernel itself.
const KERNEL: Rules = &[
    ("arch_wb_cache_pmem", Flush),
    ("clean_cache_range", Flush),
    ("flushcache", Flush),
    ("dax_flush", Flush),
    ("csum_partial", Checksum),
    ("skb_checksum", Checksum),
    ("crc32", Checksum),
    ("rep_movs_alternative", Copying),
    ("memcpy", Copying),
    ("memmove", Copying),
    ("copy_to_iter", Copying),
    ("copy_from_iter", Copying),
    ("copy_mc_to_kernel", Copying),
    ("skb_copy_bits", Copying),
    ("skb_copy_datagram_iter", Copying),
    ("rust_helper", Insertion),
    ("dax_", Insertion),
    ("iomap_", Insertion),
    ("vfs_write", Insertion),
    ("vfs_iter", Insertion),
    ("fsync", Insertion),
    ("fdatasync", Insertion),
    ("pwrite", Insertion),
    ("file_write_and_wait", Insertion),
    ("filemap_", Insertion),
    ("blk_", Insertion),
    ("submit_bio", Insertion),
    ("bio_", Insertion),
    ("pmem", Insertion),
    ("handle_mm_fault", Insertion),
    ("krealloc", Insertion),
    ("kvrealloc", Insertion),
];

/// In this program.
const BENCH: Rules = &[
    ("Pmem>::flush", Flush),
    ("Pmem>::fence", Flush),
    ("checksum_body", Checksum),
    ("crc32c", Checksum),
    ("copy_body", Copying),
    ("SkipList<P>::put", Preparation),
    ("skiplist::", Insertion),
    ("store::", Insertion),
];

/// In pmskb-httpd.
const HTTPD: Rules = &[
    ("pmskb_uapi::batch", Preparation),
    ("pmskb_uapi::ring", Network),
    ("pmskb_uapi", Preparation),
    ("conn::Conn::carry_out", Preparation),
    ("conn::Conn::put", Preparation),
];

/// In the databases.
const TABLES: Rules = &[
    ("crc32c", Checksum),
    ("WriteBatch", Preparation),
    ("", Insertion),
];

/// In the C library.
const LIBC: Rules = &[
    ("memcpy", Copying),
    ("memmove", Copying),
    ("memcmp", Insertion),
    ("pwrite", Insertion),
    ("sync", Insertion),
];

/// What a function is for.
pub fn of(row: &Row) -> Category {
    let rules: Rules = match row.place.as_str() {
        "kernel" => KERNEL,
        "[pmskb]" => MODULE,
        "[ext4]" | "[jbd2]" | "[mbcache]" | "[nd_pmem]" | "[libnvdimm]" | "[dax]" => {
            &[("", Insertion)]
        }
        "pmskb-bench" => BENCH,
        "pmskb-httpd" => HTTPD,
        place if place.starts_with("libc.so") => LIBC,
        place
            if ["libleveldb", "librocksdb", "liblmdb"]
                .iter()
                .any(|l| place.starts_with(l)) =>
        {
            TABLES
        }
        // Compression, allocation and threads that came with a database.
        place if place.starts_with("lib") => &[("", Insertion)],
        _ => &[],
    };
    let found = rules.iter().find(|(part, _)| row.name.contains(part));
    found.map_or(Network, |(_, category)| *category)
}

/// Whether a function reads payload to sum it up, alone or while it copies.
pub fn sums(row: &Row) -> bool {
    of(row) == Checksum || row.name.contains("csum")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn category(place: &str, name: &str) -> Category {
        of(&Row {
            place: place.into(),
            name: name.into(),
            ..Row::default()
        })
    }

    #[test]
    fn the_first_rule_that_fits_counts() {
        assert_eq!(category("kernel", "tcp_v4_rcv"), Network);
        assert_eq!(category("[e1000e]", "e1000_clean_rx_irq"), Network);
        assert_eq!(category("kernel", "__memcpy_flushcache"), Flush);
        assert_eq!(category("kernel", "memcpy_orig"), Copying);
        assert_eq!(category("[ext4]", "ext4_map_blocks"), Insertion);
        let flush = "<main::region::Region as main::pm::pmem::Pmem>::flush";
        assert_eq!(category("[pmskb]", flush), Flush);
        assert_eq!(category("[pmskb]", "main::pm::csum::payload_of"), Checksum);
        assert_eq!(category("[pmskb]", "main::submit::stage"), Preparation);
        assert_eq!(category("[pmskb]", "main::pm::tree::find"), Insertion);
        assert_eq!(
            category("pmskb-bench", "pmskb_httpd::parse::HeadParser::next"),
            Network
        );
        assert_eq!(
            category("librocksdb.so.9.10", "rocksdb::WriteBatch::Put"),
            Preparation
        );
        assert_eq!(
            category("librocksdb.so.9.10", "rocksdb::DBImpl::Write"),
            Insertion
        );
        assert_eq!(category("libstdc++.so.6", "std::string::append"), Insertion);
    }

    #[test]
    fn a_function_that_copies_and_sums_sums() {
        let row = Row {
            place: "kernel".into(),
            name: "csum_partial_copy_generic".into(),
            ..Row::default()
        };
        assert!(sums(&row));
    }
}
