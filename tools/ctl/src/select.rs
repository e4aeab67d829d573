// SPDX-License-Identifier: GPL-2.0-only

//! Which records.

use std::ops::Bound;

use clap::Args;
use pmskb_uapi::{
    catalog::end_of,
    core::{Direction, Record, Result},
    Catalog,
};

use crate::{source::Log, text};

/// What records must be like.
#[derive(Args)]
pub struct Filter {
    /// Keys that start with this; escapes as `ls` prints them
    #[arg(long, value_parser = text::parse_key, help_heading = "Filters")]
    prefix: Option<Key>,
    /// Keys from this one on
    #[arg(long, value_name = "KEY", value_parser = text::parse_key, help_heading = "Filters")]
    key_from: Option<Key>,
    /// Keys before this one
    #[arg(long, value_name = "KEY", value_parser = text::parse_key, help_heading = "Filters")]
    key_to: Option<Key>,
    /// Received at or after this time: RFC 3339, or so long ago (10m, 2h, 1d)
    #[arg(long, value_name = "TIME", value_parser = text::parse_time, help_heading = "Filters")]
    since: Option<u64>,
    /// Received before this time
    #[arg(long, value_name = "TIME", value_parser = text::parse_time, help_heading = "Filters")]
    until: Option<u64>,
    /// Sequence numbers: N, N-M, N- or -M
    #[arg(long, value_name = "RANGE", value_parser = text::parse_range, help_heading = "Filters")]
    seq: Option<(u64, u64)>,
}

/// Which records, and in which order.
#[derive(Args)]
pub struct Select {
    #[command(flatten)]
    filter: Filter,
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

impl Filter {
    /// Whether every record is meant.
    pub fn is_empty(&self) -> bool {
        self.prefix.is_none()
            && self.key_from.is_none()
            && self.key_to.is_none()
            && self.since.is_none()
            && self.until.is_none()
            && self.seq.is_none()
    }

    /// Whether a record is meant; `key` is `None` if it has none.
    pub fn meant(&self, record: &Record, key: Option<&[u8]>) -> bool {
        let (first, last) = self.seq.unwrap_or((0, u64::MAX));
        let (from, to) = self.keys();
        let by_key = match (key, &from) {
            (None, _) => self.prefix.is_none() && self.key_from.is_none() && self.key_to.is_none(),
            (Some(key), Bound::Included(from)) => key >= from.as_slice(),
            (Some(_), _) => true,
        };
        by_key
            && key.is_none_or(|key| to.is_none_or(|to| key < to.as_slice()))
            && self.since.is_none_or(|t| record.meta.time >= t)
            && self.until.is_none_or(|t| record.meta.time < t)
            && (first..=last).contains(&record.seq)
    }

    /// The range of keys.
    fn keys(&self) -> (Bound<Vec<u8>>, Option<Vec<u8>>) {
        let prefix = self.prefix.as_ref().map(|p| p.0.as_slice());
        let from = self.key_from.as_ref().map(|k| k.0.as_slice());
        let from = match from.max(prefix) {
            Some(from) => Bound::Included(from.to_vec()),
            None => Bound::Unbounded,
        };
        let to = self.key_to.as_ref().map(|k| k.0.clone());
        let to = match (to, prefix.and_then(end_of)) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        (from, to)
    }

    /// The records that are meant and have a key, in key order or the opposite one.
    fn by_key_in<'a>(
        &'a self,
        catalog: &'a Catalog,
        direction: Direction,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Record)>> + 'a {
        let (from, to) = self.keys();
        let all = catalog.range(from, to, direction);
        all.filter(|found| {
            found
                .as_ref()
                .map_or(true, |(key, record)| self.meant(record, Some(key)))
        })
    }

    /// The records that are meant and have a key, in key order.
    pub fn by_key<'a>(
        &'a self,
        catalog: &'a Catalog,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Record)>> + 'a {
        self.by_key_in(catalog, Direction::Forward)
    }
}

impl Select {
    /// Whether all records are meant.
    pub fn is_all(&self) -> bool {
        self.filter.is_empty() && self.limit.is_none() && !self.by_key
    }

    /// The records that are meant, with their keys (`None` if they have none).
    pub fn records<'a>(
        &'a self,
        catalog: &'a Catalog,
    ) -> impl Iterator<Item = Result<(Record, Option<Vec<u8>>)>> + 'a {
        type Found = Result<(Record, Option<Vec<u8>>)>;
        let all: Box<dyn Iterator<Item = Found> + 'a> = if self.by_key {
            let direction = match self.reverse {
                true => Direction::Backward,
                false => Direction::Forward,
            };
            let found = self.filter.by_key_in(catalog, direction);
            Box::new(found.map(|found| found.map(|(key, record)| (record, Some(key)))))
        } else {
            let seqs = self.filter.seq.unwrap_or((0, u64::MAX));
            let log = Log::new(catalog, self.reverse, seqs);
            Box::new(log.filter_map(move |record| match record {
                Err(e) => Some(Err(e)),
                Ok(record) => self.key_if_meant(catalog, record).transpose(),
            }))
        };
        all.take(self.limit.unwrap_or(usize::MAX))
    }

    fn key_if_meant(
        &self,
        catalog: &Catalog,
        record: Record,
    ) -> Result<Option<(Record, Option<Vec<u8>>)>> {
        let key = match record.keyed() {
            // Gone meanwhile: not meant any more.
            true => match catalog.key(&record)? {
                Some(key) => Some(key),
                None => return Ok(None),
            },
            false => None,
        };
        let meant = self.filter.meant(&record, key.as_deref());
        Ok(meant.then_some((record, key)))
    }
}
