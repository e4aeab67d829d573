// SPDX-License-Identifier: GPL-2.0-only

//! The records of an attached store, or of an image of a region.

use std::{
    ops::Bound,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use pmskb_core::{
    self as core,
    host::{self, HostFrames},
    probe, Direction, Geometry, Pmem, Probe, Reader, Record, RecoverOptions, Report, Superblock,
};

use crate::{
    media::{Media, Part},
    Store,
};

/// Why records cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The device could not be opened or mapped.
    #[error(transparent)]
    Store(#[from] crate::Error),
    /// The image could not be opened or mapped.
    #[error("cannot read {}: {cause}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        cause: std::io::Error,
    },
    /// There is no store in the image.
    #[error(
        "{}: no store found\n  an image is that of a region, or of a whole NVDIMM; if its first \
         superblock is damaged, say where the region is with --offset and --length",
        .0.display()
    )]
    NoStore(PathBuf),
    /// What is on the media cannot be used.
    #[error("{what}: {}", describe(*.error))]
    Media {
        /// What was tried.
        what: String,
        /// The core's answer.
        error: core::Error,
    },
}

/// What the core's errors mean to whom reads a store.
pub fn describe(e: core::Error) -> &'static str {
    match e {
        core::Error::NotFormatted => "there is no store, or it is not attached (any more)",
        core::Error::Damaged => "the media is damaged: a checksum or a structure is wrong",
        core::Error::Version => {
            "the store has a feature that this program does not know; use a newer one"
        }
        core::Error::Busy => "too much changed meanwhile; try again",
        core::Error::Io => "the media cannot be read there",
        core::Error::NotFound => "no such record",
        core::Error::NoSpace => "no free frame is left to build the index in",
        _ => "internal error",
    }
}

/// How records are reached.
enum Source {
    /// Through the index that the module keeps.
    Live(Reader<Media>),
    /// Through one built from the records of an image, in private memory.
    Offline(Box<core::Store<Media, HostFrames, Vec<u64>>>, Report),
}

/// The records of a store or an image, to be read.
pub struct Catalog {
    source: Source,
    media: Media,
    probe: Probe,
    geometry: Geometry,
}

/// Tries of a read that a writer disturbs.
const TRIES: usize = 100;

impl Catalog {
    /// Of an attached store.
    pub fn of_store(store: &Store) -> Result<Self, CatalogError> {
        let info = store.info()?.raw;
        let hole = info.head_off..info.head_off + info.head_len;
        let media = Media::live(store.map()?, hole);
        let fail = |error| CatalogError::Media {
            what: store.path().display().to_string(),
            error,
        };
        let probe = probe(&media).map_err(fail)?;
        let reader = Reader::open(media.clone()).map_err(fail)?;
        let geometry = probe.superblock.geometry;
        let file = store.as_fd().try_clone_to_owned();
        let file = file.map_err(|cause| CatalogError::Image {
            path: store.path().to_owned(),
            cause,
        })?;
        Ok(Self {
            source: Source::Live(reader),
            media: media.by_calls(file.into()),
            probe,
            geometry,
        })
    }

    /// Of an image: a file, or a device whose store is not attached. The region
    /// is `place` (offset and length), or is looked for.
    pub fn of_image(path: &Path, place: (Option<u64>, Option<u64>)) -> Result<Self, CatalogError> {
        let file = Media::image(path).map_err(|cause| CatalogError::Image {
            path: path.to_owned(),
            cause,
        })?;
        let (media, probe) = find(&file, place).map_err(|e| match e {
            core::Error::NotFormatted => CatalogError::NoStore(path.to_owned()),
            error => CatalogError::Media {
                what: path.display().to_string(),
                error,
            },
        })?;
        let geometry = probe.superblock.geometry;
        let fail = |error| CatalogError::Media {
            what: format!("{}: cannot recover the store", path.display()),
            error,
        };
        let frames = HostFrames::new(&geometry).map_err(fail)?;
        let work = vec![0; core::Store::<Media, HostFrames, Vec<u64>>::WORK_WORDS];
        let options = RecoverOptions { read_only: true };
        let (store, report) =
            core::Store::recover(media.clone(), frames, work, host::list, options).map_err(fail)?;
        Ok(Self {
            source: Source::Offline(Box::new(store), report),
            media,
            probe,
            geometry,
        })
    }

    /// The record with `key`.
    pub fn get(&self, key: &[u8]) -> core::Result<Option<Record>> {
        match &self.source {
            Source::Live(reader) => retry(|| reader.get(key)),
            Source::Offline(store, _) => {
                store.lookup(key)?.map(|loc| store.record(loc)).transpose()
            }
        }
    }

    /// See [`Reader::seek`].
    pub fn seek(
        &self,
        key: Option<&[u8]>,
        inclusive: bool,
        direction: Direction,
    ) -> core::Result<Option<Record>> {
        match &self.source {
            Source::Live(reader) => retry(|| reader.seek(key, inclusive, direction)),
            Source::Offline(store, _) => {
                let found = store.seek(key, inclusive, direction)?;
                found.map(|loc| store.record(loc)).transpose()
            }
        }
    }

    /// See [`Reader::log_from`].
    pub fn log_from(&self, seq: u64) -> core::Result<Option<Record>> {
        match &self.source {
            Source::Live(reader) => retry(|| reader.log_from(seq)),
            Source::Offline(store, _) => store.log_from(seq),
        }
    }

    /// All records in the order of their sequence numbers, from `seq` on.
    pub fn log(&self, seq: u64) -> impl Iterator<Item = core::Result<Record>> + '_ {
        let mut next = Some(seq);
        let mut live = match &self.source {
            Source::Live(reader) => Some(reader.log(seq)),
            Source::Offline(..) => None,
        };
        std::iter::from_fn(move || {
            let seq = next?;
            let found = match &mut live {
                Some(log) => retry(|| log.next()),
                None => self.log_from(seq),
            };
            next = match &found {
                Ok(Some(record)) => record.seq.checked_add(1),
                _ => None,
            };
            found.transpose()
        })
    }

    /// All records with a key that starts with `prefix`, in key order.
    pub fn prefix<'a>(
        &'a self,
        prefix: &'a [u8],
        after: Option<&[u8]>,
    ) -> impl Iterator<Item = core::Result<(Vec<u8>, Record)>> + 'a {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after.to_vec()),
            _ => Bound::Included(prefix.to_vec()),
        };
        self.range(from, end_of(prefix), Direction::Forward)
    }

    /// All records with a key in a range, in key order or the opposite one. The end
    /// is not included.
    pub fn range(
        &self,
        from: Bound<Vec<u8>>,
        to: Option<Vec<u8>>,
        direction: Direction,
    ) -> impl Iterator<Item = core::Result<(Vec<u8>, Record)>> + '_ {
        let within = move |key: &[u8], to: Option<&Vec<u8>>, from: &Bound<Vec<u8>>| {
            to.is_none_or(|to| key < to.as_slice())
                && match from {
                    Bound::Included(from) => key >= from.as_slice(),
                    Bound::Excluded(from) => key > from.as_slice(),
                    Bound::Unbounded => true,
                }
        };
        // Where to begin: at a key, and whether it counts itself.
        let (start, inclusive) = match (direction, &from, &to) {
            (Direction::Forward, Bound::Included(from), _) => (Some(from), true),
            (Direction::Forward, Bound::Excluded(from), _) => (Some(from), false),
            (Direction::Backward, _, Some(to)) => (Some(to), false),
            _ => (None, true),
        };
        let mut live = match &self.source {
            Source::Live(reader) => {
                Some(reader.cursor(start.map(Vec::as_slice), inclusive, direction))
            }
            Source::Offline(..) => None,
        };
        let mut at = Some((start.cloned(), inclusive));
        std::iter::from_fn(move || {
            let (before, inclusive) = at.take()?;
            let mut step = || -> core::Result<Option<(Vec<u8>, Record)>> {
                let found = match &mut live {
                    Some(cursor) => {
                        let record = retry(|| cursor.next())?;
                        record.map(|record| (cursor.key().to_vec(), record))
                    }
                    None => {
                        let record = self.seek(before.as_deref(), inclusive, direction)?;
                        let key = record.map(|record| self.key(&record)).transpose()?;
                        key.flatten().zip(record)
                    }
                };
                Ok(found.filter(|(key, _)| within(key, to.as_ref(), &from)))
            };
            let found = step();
            if let Ok(Some((key, _))) = &found {
                at = Some((Some(key.clone()), false));
            }
            found.transpose()
        })
    }

    /// A record's key. `None` if the record is gone; empty if it never had one.
    pub fn key(&self, record: &Record) -> core::Result<Option<Vec<u8>>> {
        let mut key = vec![0; record.key_len.unwrap_or(0).into()];
        if !key.is_empty() {
            let n = record.read_key(&self.media, 0, &mut key);
            if !self.still(record)? {
                return Ok(None);
            }
            key.truncate(n?);
        }
        Ok(Some(key))
    }

    /// Whether a record is still alive, so that what was read of its bytes before
    /// is right.
    pub fn still(&self, record: &Record) -> core::Result<bool> {
        match &self.source {
            Source::Live(reader) => reader.still(record),
            Source::Offline(..) => Ok(true),
        }
    }

    /// Live records and their payload bytes, now.
    pub fn counts(&self) -> core::Result<(u64, u64)> {
        match &self.source {
            Source::Live(reader) => reader.live().map(|l| (l.records, l.live_bytes)),
            Source::Offline(_, report) => Ok((report.records, report.live_bytes)),
        }
    }

    /// What recovery found; of an image only.
    pub fn report(&self) -> Option<&Report> {
        match &self.source {
            Source::Live(_) => None,
            Source::Offline(_, report) => Some(report),
        }
    }

    /// What was found of the superblocks.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.probe.superblock
    }

    /// Where the areas are.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The region; of an attached store, bytes that cannot be read are an error, while
    /// what the index needs comes from the mapping (see [`explain_bus_errors`]).
    ///
    /// [`explain_bus_errors`]: crate::explain_bus_errors
    pub fn media(&self) -> &Media {
        &self.media
    }

    /// The record's extents as offset and length.
    pub fn extents(&self, record: &Record) -> core::Result<Vec<core::Extent>> {
        record.extents(&self.media, &self.geometry).collect()
    }

    /// Passes the object's bytes to `each`, part by part. False if the record was
    /// replaced meanwhile: then the bytes are worth nothing.
    pub fn read(&self, record: &Record, mut each: impl FnMut(&[u8])) -> core::Result<bool> {
        let mut part = vec![0; 1 << 20];
        for extent in record.extents(&self.media, &self.geometry) {
            let gone = |e| {
                if self.still(record) == Ok(false) {
                    Ok(false)
                } else {
                    Err(e)
                }
            };
            let extent = match extent {
                Ok(extent) => extent,
                Err(e) => return gone(e),
            };
            let (mut at, end) = (extent.off, extent.end());
            while at < end {
                let part = &mut part[..(end - at).min(1 << 20) as usize];
                if let Err(e) = self.media.read(at, part) {
                    return gone(e);
                }
                each(part);
                at += part.len() as u64;
            }
        }
        self.still(record)
    }
}

/// The first key behind all that start with `prefix`, if there is one.
pub fn end_of(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return Some(end);
        }
    }
    None
}

fn retry<T>(mut f: impl FnMut() -> core::Result<T>) -> core::Result<T> {
    for _ in 0..TRIES {
        match f() {
            Err(core::Error::Busy) => std::thread::yield_now(),
            other => return other,
        }
    }
    Err(core::Error::Busy)
}

/// How a superblock begins, and where it says where in its region it is.
const SUPERBLOCK_MAGIC: u64 = u64::from_le_bytes(*b"pmskb\0SB");
const SUPERBLOCK_OFFSET: u64 = 200;

/// Finds the region in an image, and its superblock. It is at `place` (offset and
/// length), or is looked for.
///
/// The first superblock is looked for at each frame: on a raw NVDIMM the region
/// starts behind the namespace's own data.
pub fn find<M: Part>(
    file: &M,
    (offset, length): (Option<u64>, Option<u64>),
) -> core::Result<(M, Probe)> {
    let at = |offset: u64| -> core::Result<(M, Probe)> {
        let rest = file.len().saturating_sub(offset);
        let part = file
            .part(offset, length.unwrap_or(rest))
            .ok_or(core::Error::Invalid)?;
        let found = probe(&part)?;
        let len = found.superblock.geometry.region_len;
        Ok((part.part(0, len).ok_or(core::Error::Damaged)?, found))
    };
    if let Some(offset) = offset {
        return at(offset);
    }
    // A last superblock says where its region starts: the first one may be damaged, or
    // cut short.
    let by_last = |last: u64| -> core::Result<(M, Probe)> {
        if file.load(last)? != SUPERBLOCK_MAGIC {
            return Err(core::Error::NotFormatted);
        }
        let start = last.checked_sub(file.load(last + SUPERBLOCK_OFFSET)?);
        let start = start.ok_or(core::Error::Damaged)?;
        let part = file.part(start, last - start + core::FRAME_SIZE);
        let part = part.ok_or(core::Error::Damaged)?;
        let found = probe(&part)?;
        Ok((part, found))
    };
    let mut second_best = None;
    let mut other = core::Error::NotFormatted;
    for offset in (0..file.len()).step_by(core::FRAME_SIZE as usize) {
        if let Ok(found) = by_last(offset) {
            // What lies inside of another region is a leftover: the later one counts.
            second_best = Some(found);
        }
        match at(offset) {
            Ok(found) if found.1.first.is_none() => return Ok(found),
            // Only its last superblock is right, and that it ends where the file
            // ends makes it a guess.
            Ok(found) => {
                second_best.get_or_insert(found);
            }
            Err(e @ core::Error::Version) => other = e,
            // Where a region is most likely to start.
            Err(e @ (core::Error::Damaged | core::Error::Io)) if offset == 0 => other = e,
            Err(_) => {}
        }
    }
    second_best.ok_or(other)
}

#[cfg(test)]
mod tests {
    use super::end_of;

    #[test]
    fn the_end_of_a_prefix_is_the_next_key_without_it() {
        assert_eq!(end_of(b"a/"), Some(b"a0".to_vec()));
        assert_eq!(end_of(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(end_of(b"\xff"), None);
        assert_eq!(end_of(b""), None);
    }
}
