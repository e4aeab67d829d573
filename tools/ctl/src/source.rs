// SPDX-License-Identifier: GPL-2.0-only

//! Where records come from.

use std::path::PathBuf;

use clap::Args;
use pmskb_uapi::{
    core::{Record, Result},
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
    /// Where the region is in the image: offset and length.
    pub fn place(&self) -> (Option<u64>, Option<u64>) {
        (self.offset, self.length)
    }

    /// Opens what is meant.
    pub fn open(&self, store: Option<u32>) -> anyhow::Result<Catalog> {
        match &self.image {
            Some(path) => Ok(Catalog::of_image(path, (self.offset, self.length))?),
            None => Ok(Catalog::of_store(&Store::open_minor(the_store(store)?)?)?),
        }
    }
}

/// A way through the log, in the order of sequence numbers or the opposite one.
pub struct Log<'a> {
    catalog: &'a Catalog,
    reverse: bool,
    /// Bounds of sequence numbers, both inclusive.
    seqs: (u64, u64),
    at: At,
}

enum At {
    Start,
    Seq(u64),
    /// What is left of the log, in memory: it has no way back.
    Back(Vec<Record>),
    End,
}

impl<'a> Log<'a> {
    /// Records with a sequence number in `seqs`.
    pub fn new(catalog: &'a Catalog, reverse: bool, seqs: (u64, u64)) -> Self {
        Self {
            catalog,
            reverse,
            seqs,
            at: At::Start,
        }
    }

    fn forward(&mut self) -> Result<Option<Record>> {
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

    fn back(&mut self) -> Result<Option<Record>> {
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
}

impl Iterator for Log<'_> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = if self.reverse {
            self.back()
        } else {
            self.forward()
        };
        if step.is_err() {
            self.at = At::End;
        }
        step.transpose()
    }
}
