// SPDX-License-Identifier: GPL-2.0-only

//! An array of operations, and what became of each.

use std::{io, ops::Range, os::fd::RawFd};

use crate::{error, sys, Error, Result, MAX_OPS};

/// A part of what a token holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ext {
    /// The token.
    pub token: u32,
    /// First byte, counted from the start of the token's extent.
    pub offset: u32,
    /// Bytes; at least 1.
    pub len: u32,
}

/// Where a key's bytes are.
#[derive(Debug, Clone, Copy)]
pub enum Key<'a> {
    /// There is no key: the record is in the log only.
    None,
    /// In memory.
    Bytes(&'a [u8]),
    /// In the packets themselves.
    Extents(&'a [Ext]),
}

/// On which condition a put happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Whether or not the key has a record.
    #[default]
    Upsert,
    /// Only if it has none, else EEXIST.
    Create,
    /// Only if it has one, else ENOENT.
    Replace,
}

/// What became of an operation that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The record's sequence number; of a release, the number of tokens; of a
    /// truncation, the sequence number up to which the log is empty.
    pub seq: u64,
    /// It replaces a record with the same key.
    pub replaced: bool,
    /// Bytes of it had been copied into frames at receive.
    pub copied: bool,
    /// The object's Internet checksum as a big-endian number.
    pub csum: u16,
    /// `PMSKB_CSUM_*`.
    pub csum_kind: u8,
}

/// Operations to submit together: all that succeed become durable with the same
/// two fences. Reusable; nothing in it is freed by [`clear`](Self::clear).
#[derive(Debug, Default)]
pub struct Batch {
    atomic: bool,
    fail: bool,
    ops: Vec<Op>,
    exts: Vec<sys::pmskb_ext>,
    keys: Vec<u8>,
    raw: Vec<sys::pmskb_op>,
    results: Vec<sys::pmskb_result>,
}

/// An operation of a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpView {
    /// `PMSKB_OP_*`.
    pub opcode: u32,
    /// `PMSKB_OP_*` flags.
    pub flags: u32,
    /// The socket of the tokens.
    pub fd: RawFd,
    /// The key, if it is in memory.
    pub key: Vec<u8>,
    /// The key, if it is in packets.
    pub key_extents: Vec<Ext>,
    /// The object, or what is released.
    pub extents: Vec<Ext>,
    /// With `PMSKB_OP_IF_SEQ` the number that is expected; of a truncation, where
    /// it ends.
    pub seq: u64,
}

#[derive(Debug)]
struct Op {
    opcode: u16,
    flags: u16,
    fd: RawFd,
    /// Into `keys`, or with KEY_EXTENTS into `exts`.
    key: usize,
    key_len: usize,
    exts: usize,
    nr_exts: usize,
    seq: u64,
}

impl Batch {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Operations in it.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Forgets operations and results, and that it was to be atomic, or to fail.
    pub fn clear(&mut self) {
        self.atomic = false;
        self.fail = false;
        self.ops.clear();
        self.exts.clear();
        self.keys.clear();
        self.results.clear();
    }

    /// All of it or nothing, after a crash and for readers: if one operation fails,
    /// the others' outcome is ECANCELED. It cannot have a truncation, nor more
    /// than [`MAX_OPS`] operations: E2BIG, and nothing is done.
    pub fn set_atomic(&mut self) {
        self.atomic = true;
    }

    /// If an operation fails, the submission does, with the errno of the first (EBUSY instead
    /// of EAGAIN). All are carried out, and have their outcomes, all the same.
    pub fn set_fail(&mut self) {
        self.fail = true;
    }

    /// Whether it is all or nothing.
    pub fn is_atomic(&self) -> bool {
        self.atomic
    }

    /// Operation `index`, a put or a delete, happens only if the key's record has
    /// the sequence number `seq`, or, a put with 0, if there is none; else ESTALE.
    ///
    /// # Panics
    ///
    /// If there is no such operation.
    pub fn if_seq(&mut self, index: usize, seq: u64) {
        let op = &mut self.ops[index];
        op.flags |= sys::PMSKB_OP_IF_SEQ as u16;
        op.seq = seq;
    }

    /// Adds a put of `extents` of `fd`'s tokens, and says which operation it is.
    /// The tokens stay held if `keep`.
    ///
    /// `fd` is looked up when the batch is submitted: do not close it before.
    pub fn put(
        &mut self,
        fd: RawFd,
        key: Key<'_>,
        extents: &[Ext],
        mode: Mode,
        keep: bool,
    ) -> usize {
        let mut flags = match mode {
            Mode::Upsert => 0,
            Mode::Create => sys::PMSKB_OP_CREATE,
            Mode::Replace => sys::PMSKB_OP_REPLACE,
        };
        if keep {
            flags |= sys::PMSKB_OP_KEEP;
        }
        let (at, key_len) = match key {
            Key::None => (0, 0),
            Key::Bytes(b) => {
                self.keys.extend_from_slice(b);
                (self.keys.len() - b.len(), b.len())
            }
            Key::Extents(e) => {
                flags |= sys::PMSKB_OP_KEY_EXTENTS;
                (self.extents(e), e.len())
            }
        };
        let exts = self.extents(extents);
        self.push(Op {
            opcode: sys::PMSKB_OP_PUT as u16,
            flags: flags as u16,
            fd,
            key: at,
            key_len,
            exts,
            nr_exts: extents.len(),
            seq: 0,
        })
    }

    /// Adds the release of `fd`'s tokens, and says which operation it is.
    pub fn release(&mut self, fd: RawFd, tokens: &[u32]) -> usize {
        let exts = self.exts.len();
        self.exts.extend(tokens.iter().map(|&token| sys::pmskb_ext {
            token,
            ..Default::default()
        }));
        self.push(Op {
            opcode: sys::PMSKB_OP_RELEASE as u16,
            flags: 0,
            fd,
            key: 0,
            key_len: 0,
            exts,
            nr_exts: tokens.len(),
            seq: 0,
        })
    }

    /// Adds the deletion of a key, and says which operation it is.
    pub fn delete(&mut self, key: &[u8]) -> usize {
        self.keys.extend_from_slice(key);
        self.push(Op {
            opcode: sys::PMSKB_OP_DELETE as u16,
            flags: 0,
            fd: -1,
            key: self.keys.len() - key.len(),
            key_len: key.len(),
            exts: 0,
            nr_exts: 0,
            seq: 0,
        })
    }

    /// Adds the removal of all records without a key up to a sequence number, which
    /// counts as the highest in use if it is not in use yet; says which operation it
    /// is.
    pub fn truncate(&mut self, seq: u64) -> usize {
        self.push(Op {
            opcode: sys::PMSKB_OP_TRUNCATE as u16,
            flags: 0,
            fd: -1,
            key: 0,
            key_len: 0,
            exts: 0,
            nr_exts: 0,
            seq,
        })
    }

    /// What became of operation `index`, after a submission.
    ///
    /// # Panics
    ///
    /// If there is no such operation, or the batch was not submitted.
    pub fn outcome(&self, index: usize) -> io::Result<Outcome> {
        let r = &self.results[index];
        if r.res < 0 {
            let errno = i32::try_from(-r.res).unwrap_or(libc::EIO);
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(Outcome {
            seq: r.res as u64,
            replaced: r.flags & sys::PMSKB_RES_REPLACED != 0,
            copied: r.flags & sys::PMSKB_RES_COPIED != 0,
            csum: u16::from_be(r.csum),
            csum_kind: r.csum_kind,
        })
    }

    /// As [`outcome`](Self::outcome), with an error for people: `what` was tried.
    pub fn outcome_of(&self, index: usize, what: impl Into<String>) -> Result<Outcome> {
        self.outcome(index)
            .map_err(|e| Error::new(what, e, error::OUTCOME))
    }

    /// The operations in it, for stand-ins of a store in tests.
    pub fn ops(&self) -> Vec<OpView> {
        let exts = |at: usize, n: usize| -> Vec<Ext> {
            let part = &self.exts[at..at + n];
            part.iter()
                .map(|e| Ext {
                    token: e.token,
                    offset: e.offset,
                    len: e.len,
                })
                .collect()
        };
        let view = |op: &Op| {
            let in_packets = u32::from(op.flags) & sys::PMSKB_OP_KEY_EXTENTS != 0;
            OpView {
                opcode: op.opcode.into(),
                flags: op.flags.into(),
                fd: op.fd,
                key: match in_packets {
                    true => Vec::new(),
                    false => self.keys[op.key..op.key + op.key_len].to_vec(),
                },
                key_extents: match in_packets {
                    true => exts(op.key, op.key_len),
                    false => Vec::new(),
                },
                extents: exts(op.exts, op.nr_exts),
                seq: op.seq,
            }
        };
        self.ops.iter().map(view).collect()
    }

    /// Says what became of all operations, for stand-ins of a store in tests.
    pub fn set_outcomes(&mut self, outcomes: impl IntoIterator<Item = io::Result<Outcome>>) {
        let raw = |outcome: io::Result<Outcome>| match outcome {
            Ok(o) => sys::pmskb_result {
                res: o.seq as i64,
                flags: if o.replaced {
                    sys::PMSKB_RES_REPLACED
                } else {
                    0
                },
                csum: o.csum.to_be(),
                csum_kind: o.csum_kind,
                reserved: 0,
            },
            Err(e) => sys::pmskb_result {
                res: -i64::from(e.raw_os_error().unwrap_or(libc::EIO)),
                ..Default::default()
            },
        };
        self.results = outcomes.into_iter().map(raw).collect();
    }

    fn extents(&mut self, extents: &[Ext]) -> usize {
        let at = self.exts.len();
        self.exts.extend(extents.iter().map(|e| sys::pmskb_ext {
            token: e.token,
            offset: e.offset,
            len: e.len,
            reserved: 0,
        }));
        at
    }

    fn push(&mut self, op: Op) -> usize {
        self.ops.push(op);
        self.ops.len() - 1
    }

    /// How many operations from `start` on one call takes: at least one.
    fn fitting(&self, start: usize) -> usize {
        let mut extents = 0;
        let fits = self.ops[start..].iter().take(MAX_OPS).take_while(|op| {
            extents += op.nr_exts;
            if u32::from(op.flags) & sys::PMSKB_OP_KEY_EXTENTS != 0 {
                extents += op.key_len;
            }
            extents <= sys::PMSKB_MAX_EXTENTS as usize
        });
        fits.count().max(1)
    }

    /// Describes the operations for the kernel, as many at a time as it takes. The pointers are
    /// good until the batch is changed or dropped; moving it does no harm.
    ///
    /// E2BIG, and that is every outcome, if it is to be atomic and too long for one call.
    pub(crate) fn describe(&mut self) -> io::Result<Vec<Part>> {
        self.raw.clear();
        for op in &self.ops {
            // Pointers are taken now, when the arrays no longer move. The kernel
            // only reads through them.
            let key = match op.key_len {
                0 => 0,
                _ if u32::from(op.flags) & sys::PMSKB_OP_KEY_EXTENTS != 0 => {
                    self.exts[op.key..].as_ptr() as u64
                }
                _ => self.keys[op.key..].as_ptr() as u64,
            };
            let extents = if op.nr_exts == 0 {
                0
            } else {
                self.exts[op.exts..].as_ptr() as u64
            };
            self.raw.push(sys::pmskb_op {
                opcode: op.opcode,
                flags: op.flags,
                fd: op.fd,
                key,
                key_len: op.key_len as u32,
                nr_extents: op.nr_exts as u32,
                extents,
                seq: op.seq,
                reserved: [0; 3],
            });
        }
        self.results.clear();
        self.results
            .resize(self.raw.len(), sys::pmskb_result::default());
        if self.atomic && self.fitting(0) < self.raw.len() {
            // In parts it would not be atomic.
            let error = io::Error::from_raw_os_error(libc::E2BIG);
            self.refuse(0..self.raw.len(), &error);
            return Err(error);
        }
        let mut flags = 0;
        if self.atomic {
            flags |= sys::PMSKB_SUBMIT_ATOMIC;
        }
        if self.fail {
            flags |= sys::PMSKB_SUBMIT_FAIL;
        }
        let results = self.results.as_mut_ptr();
        let mut parts = Vec::new();
        let mut start = 0;
        while start < self.raw.len() {
            let end = start + self.fitting(start);
            parts.push(Part {
                ops: start..end,
                arg: sys::pmskb_submit {
                    ops: self.raw[start..end].as_ptr() as u64,
                    results: results.wrapping_add(start) as u64,
                    nr: (end - start) as u32,
                    flags,
                    reserved: 0,
                },
            });
            start = end;
        }
        Ok(parts)
    }

    /// The call for these operations failed, and nothing says what became of each: all have
    /// failed with its errno.
    pub(crate) fn refuse(&mut self, ops: Range<usize>, error: &io::Error) {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        for r in &mut self.results[ops] {
            // Those that were answered keep their answer: see `set_fail`.
            if r.res == 0 {
                r.res = -i64::from(errno);
            }
        }
    }

    /// Passes the operations to `call`, as many at a time as the module takes. One that
    /// is refused as a whole fails each of its operations; the first such error
    /// is returned.
    pub(crate) fn submit_with(
        &mut self,
        mut call: impl FnMut(&mut sys::pmskb_submit) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut first_error = None;
        for mut part in self.describe()? {
            if let Err(e) = call(&mut part.arg) {
                self.refuse(part.ops, &e);
                first_error.get_or_insert(e);
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// Operations of a [`Batch`] that one call takes.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) ops: Range<usize>,
    pub(crate) arg: sys::pmskb_submit,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would see of an array.
    ///
    /// # Safety
    ///
    /// `at` must point to `n` valid `T`.
    unsafe fn read<T: Clone>(at: u64, n: u32) -> Vec<T> {
        // SAFETY: as promised by the caller.
        unsafe { std::slice::from_raw_parts(at as *const T, n as usize) }.to_vec()
    }

    #[test]
    fn operations_reach_the_kernel_as_they_were_added() {
        let mut b = Batch::new();
        let e = |token| Ext {
            token,
            offset: 1,
            len: 2,
        };
        b.put(7, Key::Bytes(b"one"), &[e(1), e(2)], Mode::Create, true);
        b.put(8, Key::Extents(&[e(3)]), &[], Mode::Upsert, false);
        b.release(7, &[1, 2]);
        b.put(9, Key::None, &[e(4)], Mode::Replace, false);
        let mut seen = Vec::new();
        b.submit_with(|s| {
            // SAFETY: submit_with describes its own arrays.
            let ops = unsafe { read::<sys::pmskb_op>(s.ops, s.nr) };
            for (i, op) in ops.iter().enumerate() {
                // SAFETY: as above; the key is bytes in operation 0 only.
                unsafe {
                    let exts: Vec<sys::pmskb_ext> = match op.nr_extents {
                        0 => vec![],
                        n => read(op.extents, n),
                    };
                    let key = match i {
                        0 => read::<u8>(op.key, op.key_len),
                        1 => vec![read::<sys::pmskb_ext>(op.key, op.key_len)[0].token as u8],
                        _ => vec![],
                    };
                    seen.push((op.fd, op.flags, key, exts.iter().map(|e| e.token).collect()));
                    let r = (s.results as *mut sys::pmskb_result).add(i);
                    (*r).res = if i == 3 { -28 } else { 10 + i as i64 };
                }
            }
            Ok(())
        })
        .unwrap();
        let expected: Vec<(i32, u16, Vec<u8>, Vec<u32>)> = vec![
            (7, 1 | 4, b"one".to_vec(), vec![1, 2]),
            (8, 8, vec![3], vec![]),
            (7, 0, vec![], vec![1, 2]),
            (9, 2, vec![], vec![4]),
        ];
        assert_eq!(seen, expected);
        assert_eq!(b.outcome(1).unwrap().seq, 11);
        assert_eq!(b.outcome(3).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn batches_with_many_extents_are_split() {
        let mut b = Batch::new();
        let many = vec![
            Ext {
                token: 1,
                offset: 0,
                len: 1
            };
            sys::PMSKB_MAX_EXTENTS as usize / 2
        ];
        for _ in 0..5 {
            b.put(3, Key::Bytes(b"k"), &many, Mode::Upsert, true);
        }
        let mut calls = Vec::new();
        b.submit_with(|s| {
            calls.push(s.nr);
            Ok(())
        })
        .unwrap();
        assert_eq!(calls, [2, 2, 1]);
    }

    #[test]
    fn long_batches_are_split_and_a_refused_part_fails_its_operations_only() {
        let mut b = Batch::new();
        for t in 0..MAX_OPS as u32 + 1 {
            b.release(3, &[t]);
        }
        let mut calls = 0;
        let r = b.submit_with(|s| {
            calls += 1;
            assert_eq!(s.nr, if calls == 1 { MAX_OPS as u32 } else { 1 });
            if calls == 2 {
                Err(io::Error::from_raw_os_error(libc::ENODEV))
            } else {
                Ok(())
            }
        });
        assert_eq!(r.unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert!(b.outcome(MAX_OPS - 1).is_ok());
        assert!(b.outcome(MAX_OPS).is_err());
    }

    #[test]
    fn conditions_and_truncation_reach_the_kernel() {
        let mut b = Batch::new();
        let put = b.put(3, Key::Bytes(b"k"), &[], Mode::Upsert, false);
        b.if_seq(put, 0);
        let delete = b.delete(b"k");
        b.if_seq(delete, 7);
        b.truncate(9);
        let mut seen = Vec::new();
        b.submit_with(|s| {
            // SAFETY: submit_with describes its own arrays.
            let ops = unsafe { read::<sys::pmskb_op>(s.ops, s.nr) };
            seen = ops.iter().map(|op| (op.opcode, op.flags, op.seq)).collect();
            assert_eq!(s.flags, 0);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(1, 16, 0), (2, 16, 7), (4, 0, 9)]);
    }

    #[test]
    fn an_atomic_batch_is_never_split() {
        let mut b = Batch::new();
        b.set_atomic();
        for _ in 0..MAX_OPS {
            b.delete(b"k");
        }
        let mut calls = 0;
        let mut count = |s: &mut sys::pmskb_submit| {
            calls += 1;
            assert_eq!((s.nr as usize, s.flags), (MAX_OPS, 1));
            Ok(())
        };
        b.submit_with(&mut count).unwrap();
        b.delete(b"k");
        let e = b.submit_with(&mut count).unwrap_err();
        assert_eq!(calls, 1, "nothing is done of one that is too long");
        assert_eq!(e.raw_os_error(), Some(libc::E2BIG));
        for index in [0, MAX_OPS] {
            let e = b.outcome_of(index, "cannot delete").unwrap_err();
            assert_eq!(e.errno(), libc::E2BIG);
        }
        b.clear();
        assert!(!b.is_atomic());
    }

    #[test]
    fn a_batch_that_is_to_fail_keeps_the_outcomes_of_its_operations() {
        let mut b = Batch::new();
        b.delete(b"a");
        b.delete(b"b");
        b.set_fail();
        let e = b.submit_with(|s| {
            assert_eq!(s.flags, 2);
            let results = s.results as *mut sys::pmskb_result;
            // SAFETY: submit_with describes its own arrays, of two.
            unsafe {
                (*results).res = 7;
                (*results.add(1)).res = -i64::from(libc::ENOENT);
            }
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        });
        assert_eq!(e.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert_eq!(b.outcome(0).unwrap().seq, 7);
        let e = b.outcome(1).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOENT));
    }
}
