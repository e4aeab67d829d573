// SPDX-License-Identifier: GPL-2.0-only

//! Where records come from.

use std::path::PathBuf;

use clap::Args;
use pmskb_uapi::{
    core::{Direction, Record, Result},
    Catalog, Store,
};

use crate::{admin::the_store, text};

/// A store or an image.
#[derive(Args)]
pub struct Source {
    /// Read a copy of the memory instead of an attached store: of a region, or of a
    /// whole NVDIMM (or a device whose store is not attached)
    #[arg(long, value_name = "FILE", help_heading = "Source")]
    pub image: Option<PathBuf>,
    /// Where in the image the region starts; looked for by default
    #[arg(long, value_name = "BYTES", requires = "image", value_parser = text::parse_size,
          help_heading = "Source")]
    offset: Option<u64>,
    /// Length of the region in the image; told by its superblock by default
    #[arg(long, value_name = "BYTES", requires = "offset", value_parser = text::parse_size,
          help_heading = "Source")]
    length: Option<u64>,
}

impl Source {
    /// Opens what is meant.
    pub fn open(&self, store: Option<u32>) -> anyhow::Result<Catalog> {
        match &self.image {
            Some(path) => Ok(Catalog::of_image(path, (self.offset, self.length))?),
            None => Ok(Catalog::of_store(&Store::open_minor(the_store(store)?)?)?),
        }
    }
}

/// A way through the records: in the order of sequence numbers, or of keys.
pub struct Walk<'a> {
    catalog: &'a Catalog,
    order: Order,
    direction: Direction,
    /// Bounds of sequence numbers, both inclusive.
    seqs: (u64, u64),
    at: At,
}

/// In which order records come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Of sequence numbers.
    Log,
    /// Of keys.
    Keys,
}

enum At {
    Start,
    Seq(u64),
    Key(Vec<u8>),
    /// What is left of the log, in memory: it has no way back.
    Back(Vec<Record>),
    End,
}

impl<'a> Walk<'a> {
    /// Records with a sequence number in `seqs`.
    pub fn new(catalog: &'a Catalog, order: Order, reverse: bool, seqs: (u64, u64)) -> Self {
        let direction = if reverse {
            Direction::Backward
        } else {
            Direction::Forward
        };
        Self {
            catalog,
            order,
            direction,
            seqs,
            at: At::Start,
        }
    }

    fn step(&mut self) -> Result<Option<Record>> {
        match (self.order, self.direction) {
            (Order::Log, Direction::Forward) => self.next_of_log(),
            (Order::Log, Direction::Backward) => self.back_in_log(),
            (Order::Keys, _) => self.next_of_keys(),
        }
    }

    fn next_of_log(&mut self) -> Result<Option<Record>> {
        let from = match self.at {
            At::Start => self.seqs.0,
            At::Seq(seq) => seq,
            _ => return Ok(None),
        };
        let record = self
            .catalog
            .log_from(from)?
            .filter(|r| r.seq <= self.seqs.1);
        self.at = match record.and_then(|r| r.seq.checked_add(1)) {
            Some(seq) => At::Seq(seq),
            None => At::End,
        };
        Ok(record)
    }

    fn back_in_log(&mut self) -> Result<Option<Record>> {
        if let At::Start = self.at {
            let all = self.catalog.log(self.seqs.0);
            let all: Result<Vec<_>> = all
                .take_while(|r| !r.as_ref().is_ok_and(|r| r.seq > self.seqs.1))
                .collect();
            self.at = At::Back(all?);
        }
        match &mut self.at {
            At::Back(records) => Ok(records.pop()),
            _ => Ok(None),
        }
    }

    fn next_of_keys(&mut self) -> Result<Option<Record>> {
        // One that is replaced while its key is read is looked for again.
        for _ in 0..100 {
            let (from, inclusive) = match &self.at {
                At::Start => (None, true),
                At::Key(key) => (Some(key.as_slice()), false),
                _ => return Ok(None),
            };
            let Some(record) = self.catalog.seek(from, inclusive, self.direction)? else {
                self.at = At::End;
                return Ok(None);
            };
            if let Some(key) = self.catalog.key(&record)? {
                self.at = At::Key(key);
                return Ok(Some(record));
            }
        }
        Err(pmskb_uapi::core::Error::Busy)
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.at = At::End;
        }
        step.transpose()
    }
}
