// SPDX-License-Identifier: GPL-2.0

//! A store's media, piece by piece: for a checker.
//!
//! Recovery takes what is right and passes over the rest. Here every piece is told
//! by itself, right or not, and can be mended by itself; which pieces there are and
//! what they mean together is for the caller to find out. Nothing is kept in
//! memory.

use super::batch::{self, Area};
use super::record::{
    kill_word, parse, read_dead, FrameHeader, Line, Lists, Locator, Record, LINES,
};
use super::superblock::{probe, Geometry, Probe, Superblock};
use super::{Error, Frame, Pmem, Result, LINE_SIZE};

/// What the state of a batch area is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AreaState {
    /// Nothing in it is to be done.
    Ended,
    /// It is in force, and so many of its words have yet to be stored.
    InForce(u32),
    /// It claims to be in force, and its checksum is wrong.
    Damaged,
    /// The media refuses to read it.
    Unreadable,
}

/// What is at a frame of the data area, taken for a record frame.
#[derive(Debug, Clone, Copy)]
pub enum FrameFound {
    /// A record frame of this store.
    Records(RecordFrame),
    /// One that was given back, or never used.
    Blank,
    /// What was a record frame of this store: its header is damaged.
    Damaged,
    /// Anything else.
    Other,
    /// The media refuses to read its header.
    Unreadable,
}

/// A record frame.
#[derive(Debug, Clone, Copy)]
pub struct RecordFrame {
    header: FrameHeader,
    /// Of the attach that opened it.
    pub epoch: u64,
}

impl RecordFrame {
    /// Where it is.
    pub fn off(&self) -> u64 {
        self.header.off
    }

    /// No record in it has a lower sequence number.
    pub fn base_seq(&self) -> u64 {
        self.header.base_seq
    }
}

/// What is at a line of a record frame.
#[derive(Debug, Clone, Copy)]
pub enum LineFound {
    /// A record whose checksum is right.
    Put(Record),
    /// A record that was killed.
    Killed {
        /// Its sequence number.
        seq: u64,
    },
    /// What looks like a record, with a wrong checksum: damaged, or never
    /// acknowledged and cut short. What it seems to say.
    Torn(Option<Record>),
    /// Nothing, or the rest of something.
    Blank,
    /// The media refuses to read it.
    Unreadable,
}

/// A store's media, to be looked at.
pub struct Inspector<P> {
    pm: P,
    sb: Superblock,
}

impl<P: Pmem> Inspector<P> {
    /// Looks at the superblocks. Errors are those of [`probe`].
    pub fn new(pm: P) -> Result<(Self, Probe)> {
        let found = probe(&pm)?;
        let sb = found.superblock.clone();
        Ok((Inspector { pm, sb }, found))
    }

    /// The media.
    pub fn pm(&self) -> &P {
        &self.pm
    }

    /// The superblock to go by.
    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    /// Where the areas are.
    pub fn geometry(&self) -> &Geometry {
        &self.sb.geometry
    }

    /// Where one of the two batch areas is.
    pub fn area_off(area: u64) -> u64 {
        batch::area_off(area)
    }

    /// The states of the batch areas.
    pub fn areas(&self) -> Result<[AreaState; 2]> {
        let state = |area| match batch::area(&self.pm, &self.sb, area) {
            Ok(Area::Dead) => Ok(AreaState::Ended),
            Ok(Area::InForce { pending }) => Ok(AreaState::InForce(pending)),
            Ok(Area::Damaged) => Ok(AreaState::Damaged),
            Err(Error::Io) => Ok(AreaState::Unreadable),
            Err(error) => Err(error),
        };
        Ok([state(0)?, state(1)?])
    }

    /// Stores what batches in force say, as recovery does, and ends them; ends
    /// damaged ones, too.
    pub fn end_batches(&self) -> Result<()> {
        batch::replay(&self.pm, &self.sb)?;
        for (area, state) in self.areas()?.into_iter().enumerate() {
            if state == AreaState::Damaged {
                batch::kill(&self.pm, batch::area_off(area as u64))?;
            }
        }
        self.pm.fence();
        Ok(())
    }

    /// The frames that the map says hold records, from `from` on: the next one.
    pub fn next_mapped(&self, from: Frame) -> Result<Option<Frame>> {
        self.sb.geometry.next_mapped(&self.pm, from)
    }

    /// Whether the map says that a data frame holds records.
    pub fn mapped(&self, frame: Frame) -> Result<bool> {
        let (at, bit) = self.sb.geometry.map_bit(frame);
        Ok(self.pm.load(at)? & bit != 0)
    }

    /// What a data frame is, if it is a record frame.
    pub fn frame(&self, frame: Frame) -> Result<FrameFound> {
        let found = self.header(frame);
        match found {
            Ok(found) => Ok(found),
            Err(Error::Io) => Ok(FrameFound::Unreadable),
            Err(error) => Err(error),
        }
    }

    fn header(&self, frame: Frame) -> Result<FrameFound> {
        let off = self.sb.geometry.check_frame(frame.off())?.off();
        let word = self.pm.load(off)?;
        if word == 0 {
            return Ok(FrameFound::Blank);
        }
        let header = match FrameHeader::read(&self.pm, off, &self.sb.uuid) {
            Ok(header) => header,
            Err(Error::Damaged) => {
                let lost = FrameHeader::lost(&self.pm, self.geometry(), &self.sb, off)?;
                return Ok(if lost {
                    FrameFound::Damaged
                } else {
                    FrameFound::Other
                });
            }
            Err(error) => return Err(error),
        };
        match header.check_nonce(&self.pm, self.sb.salt) {
            Ok(()) => Ok(FrameFound::Records(RecordFrame {
                header,
                epoch: self.pm.load(off.saturating_add(40))?,
            })),
            // Somebody's, who does not know the salt.
            Err(Error::Damaged) => Ok(FrameFound::Other),
            Err(error) => Err(error),
        }
    }

    /// Calls `each` with what is at each line of a record frame, and which line it
    /// is, until it says that this is enough.
    pub fn lines(
        &self,
        frame: &RecordFrame,
        mut each: impl FnMut(u64, LineFound) -> bool,
    ) -> Result<()> {
        let mut line = 1;
        while line < LINES {
            let (found, lines) = match parse(&self.pm, &self.sb.geometry, &frame.header, line) {
                Ok(Line::Put(record)) => (LineFound::Put(record), u64::from(record.lines)),
                Ok(Line::Killed { lines, seq }) => (LineFound::Killed { seq }, lines),
                Ok(Line::Torn) => {
                    let off = frame.header.off.saturating_add(line * LINE_SIZE);
                    (LineFound::Torn(read_dead(&self.pm, Locator(off)).ok()), 1)
                }
                Ok(Line::Blank) => (LineFound::Blank, 1),
                Err(Error::Io) => (LineFound::Unreadable, 1),
                Err(error) => return Err(error),
            };
            if !each(line, found) {
                break;
            }
            line += lines.max(1);
        }
        Ok(())
    }

    /// Whether a truncation removed a record.
    pub fn truncated(&self, record: &Record) -> bool {
        !record.keyed() && record.seq <= self.sb.trunc_seq
    }

    /// A record's extent-list frames.
    pub fn list_frames<'a>(&'a self, record: &Record) -> ListFrames<'a, P> {
        ListFrames(record.lists(&self.pm, &self.sb.geometry))
    }

    /// Writes both superblocks anew: durable on return.
    pub fn rewrite_superblocks(&mut self) -> Result<()> {
        self.sb.write(&self.pm)
    }

    /// Sets or clears a frame's bit in the map; durable after the next fence.
    pub fn set_mapped(&self, frame: Frame, on: bool) -> Result<()> {
        self.sb.geometry.check_frame(frame.off())?;
        let (at, bit) = self.sb.geometry.map_bit(frame);
        let word = self.pm.load(at)?;
        self.pm
            .store(at, if on { word | bit } else { word & !bit })?;
        self.pm.flush(at, 8)
    }

    /// Kills the record, or what looks like one, at a line; durable after the next
    /// fence. The kill of an older record with its key must be durable already.
    pub fn kill(&self, frame: &RecordFrame, line: u64) -> Result<()> {
        if line == 0 || line >= LINES {
            return Err(Error::Invalid);
        }
        let at = frame.header.off.saturating_add(line * LINE_SIZE);
        let word = kill_word(&self.pm, Locator(at))?;
        self.pm.store(at, word)?;
        self.pm.flush(at, 8)
    }
}

/// Iterator over the frames of a record's extent lists. Ends after an error.
pub struct ListFrames<'a, P>(Lists<'a, P>);

impl<P: Pmem> Iterator for ListFrames<'_, P> {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Result<Frame>> {
        self.0.next()
    }
}
