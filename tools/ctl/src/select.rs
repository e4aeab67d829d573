// SPDX-License-Identifier: GPL-2.0-only

//! Which records.

use clap::Args;
use pmskb_uapi::{
    core::{Record, Result},
    Catalog,
};

use crate::{
    source::{Order, Walk},
    text,
};

/// Filters.
#[derive(Args)]
pub struct Select {
    /// Keys that start with this; escapes as `ls` prints them
    #[arg(long, value_parser = text::parse_key, help_heading = "Filters")]
    prefix: Option<Key>,
    /// Received at or after this time: RFC 3339, or so long ago (10m, 2h, 1d)
    #[arg(long, value_name = "TIME", value_parser = text::parse_time, help_heading = "Filters")]
    since: Option<u64>,
    /// Received before this time
    #[arg(long, value_name = "TIME", value_parser = text::parse_time, help_heading = "Filters")]
    until: Option<u64>,
    /// Sequence numbers: N, N-M, N- or -M
    #[arg(long, value_name = "RANGE", value_parser = text::parse_range, help_heading = "Filters")]
    seq: Option<(u64, u64)>,
    /// At most so many
    #[arg(long, value_name = "N", help_heading = "Filters")]
    limit: Option<usize>,
    /// The last first
    #[arg(long, help_heading = "Filters")]
    reverse: bool,
    /// In the order of keys, and only records with one
    #[arg(long, help_heading = "Filters")]
    by_key: bool,
}

/// Bytes of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(pub Vec<u8>);

impl Select {
    /// The records that are meant, with their keys (`None` if they have none).
    pub fn records<'a>(
        &'a self,
        catalog: &'a Catalog,
    ) -> impl Iterator<Item = Result<(Record, Option<Vec<u8>>)>> + 'a {
        let order = if self.by_key { Order::Keys } else { Order::Log };
        let all: Box<dyn Iterator<Item = Result<Record>> + 'a> = match &self.prefix {
            // The index leads there; the log must be gone through.
            Some(prefix) if self.by_key && !self.reverse => Box::new(
                catalog
                    .prefix(&prefix.0, None)
                    .map(|found| found.map(|(_, r)| r)),
            ),
            _ => {
                let seqs = self.seq.unwrap_or((0, u64::MAX));
                Box::new(Walk::new(catalog, order, self.reverse, seqs))
            }
        };
        let matching = all.filter_map(move |record| match record {
            Err(e) => Some(Err(e)),
            Ok(record) => self.key_if_meant(catalog, record).transpose(),
        });
        matching.take(self.limit.unwrap_or(usize::MAX))
    }

    fn key_if_meant(
        &self,
        catalog: &Catalog,
        record: Record,
    ) -> Result<Option<(Record, Option<Vec<u8>>)>> {
        let (first, last) = self.seq.unwrap_or((0, u64::MAX));
        let in_time = self.since.is_none_or(|t| record.meta.time >= t)
            && self.until.is_none_or(|t| record.meta.time < t);
        if !in_time || !(first..=last).contains(&record.seq) {
            return Ok(None);
        }
        if !record.keyed() {
            return Ok(self.prefix.is_none().then_some((record, None)));
        }
        // Gone meanwhile: not meant any more.
        let Some(key) = catalog.key(&record)? else {
            return Ok(None);
        };
        let meant = self.prefix.as_ref().is_none_or(|p| key.starts_with(&p.0));
        Ok(meant.then_some((record, Some(key))))
    }
}
