// SPDX-License-Identifier: GPL-2.0-only
//! What a store must hold after a crash, and what it may.
//!
//! It follows from the marks. What was acknowledged is there, with its number and its bytes; of
//! what was being tried, each is there as a whole, or not at all, and those that belong together
//! all or none. Nothing else is there.

use crate::mark::{Begin, Kind};
use crate::work::key_of;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// An operation that may change what the store holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    op: u64,
    what: What,
    key: u64,
    len: u32,
    crc: u32,
    group: u64,
    /// The number of its record, or up to which the log is empty: if the trace tells it, before
    /// it was acknowledged, too.
    result: Option<u64>,
    /// Of a truncation, what was asked for.
    upto: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum What {
    Put,
    Delete,
    Append,
    Truncate,
}

/// An object in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its key, if it has one.
    pub key: Option<Vec<u8>>,
    /// Its number.
    pub seq: u64,
    /// Bytes.
    pub len: u32,
    /// Their CRC32C.
    pub crc: u32,
}

/// All that a store holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Objects without a key are gone up to here.
    pub truncated: u64,
    /// No number up to here is given out again.
    pub last: u64,
    /// The objects.
    pub found: Vec<Found>,
}

/// What is known at some point of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// What was acknowledged last, of each key that was ever used: a put, or nothing.
    keys: BTreeMap<u64, Option<Op>>,
    /// What was acknowledged of objects without a key, by number.
    log: BTreeMap<u64, Op>,
    truncated: u64,
    /// The highest number that was acknowledged.
    #[serde(default)]
    highest: u64,
    tried: BTreeMap<u64, Op>,
    /// Operations acknowledged so far.
    pub acknowledged: u64,
    /// Counts the changes of all this.
    pub changes: u64,
    #[serde(skip)]
    names: HashMap<Vec<u8>, u64>,
}

impl Op {
    fn is(&self, found: &Found) -> bool {
        let number = self.result.is_none_or(|seq| seq == found.seq);
        number && (self.len, self.crc) == (found.len, found.crc)
    }
}

impl Ledger {
    /// An operation is about to be tried, which will be answered with `result`, if at all.
    pub fn begin(&mut self, begin: &Begin, result: Option<i64>) {
        let what = match begin.kind {
            Kind::Put => What::Put,
            Kind::Delete => What::Delete,
            Kind::Append => What::Append,
            Kind::Truncate => What::Truncate,
            Kind::Compact | Kind::Receive | Kind::Send | Kind::Attach => return,
        };
        self.changes += 1;
        if matches!(what, What::Put | What::Delete) {
            self.keys.entry(begin.key).or_default();
            self.names.insert(key_of(begin.key), begin.key);
        }
        // What fails does nothing, before it says so, too.
        if result.is_some_and(|result| result < 0) {
            return;
        }
        let op = Op {
            op: begin.op,
            what,
            key: begin.key,
            len: begin.len,
            crc: begin.crc,
            group: begin.group,
            result: result.map(|result| result as u64),
            upto: begin.seq,
        };
        self.tried.insert(begin.op, op);
    }

    /// It was answered. False if nobody tried it.
    pub fn ack(&mut self, number: u64, result: i64) -> bool {
        self.changes += 1;
        let Some(op) = self.tried.remove(&number) else {
            return result < 0;
        };
        if result < 0 {
            return true;
        }
        let group = op.group;
        self.settle(Op {
            result: Some(result as u64),
            ..op
        });
        // With one of them all are acknowledged.
        let rest: Vec<u64> = self
            .tried
            .values()
            .filter(|other| group != 0 && other.group == group)
            .map(|other| other.op)
            .collect();
        for number in rest {
            if let Some(op) = self.tried.get_mut(&number) {
                // Its own answer comes; it is not one of those that may be absent any more.
                op.group = 0;
                let op = op.clone();
                self.settle(op);
            }
        }
        self.acknowledged += 1;
        true
    }

    fn settle(&mut self, op: Op) {
        if matches!(op.what, What::Put | What::Append) {
            self.highest = self.highest.max(op.result.unwrap_or(0));
        }
        match op.what {
            What::Put => drop(self.keys.insert(op.key, Some(op))),
            What::Delete => drop(self.keys.insert(op.key, None)),
            What::Append => {
                // What is not known yet is required as soon as it is.
                if let Some(seq) = op.result.filter(|seq| *seq > self.truncated) {
                    self.log.insert(seq, op);
                }
            }
            What::Truncate => {
                let upto = op.result.unwrap_or(0).max(self.truncated);
                self.truncated = upto;
                self.log = self.log.split_off(&(upto + 1));
            }
        }
    }

    /// After it was read from a file.
    pub fn restored(mut self) -> Self {
        self.names = self.keys.keys().map(|key| (key_of(*key), *key)).collect();
        self
    }

    /// Whether a store may hold this; and if not, why.
    pub fn check(&self, state: &State) -> Result<(), String> {
        self.check_truncated(state.truncated)?;
        if state.last < self.highest {
            let (last, highest) = (state.last, self.highest);
            return Err(format!(
                "{highest} may be given out again: {last} is the last one"
            ));
        }
        let mut keys: HashMap<u64, &Found> = HashMap::with_capacity(state.found.len());
        let mut log: BTreeMap<u64, &Found> = BTreeMap::new();
        for found in &state.found {
            match &found.key {
                Some(key) => {
                    let Some(number) = self.names.get(key) else {
                        return Err(format!("there is a key that nobody gave: {}", text(key)));
                    };
                    if keys.insert(*number, found).is_some() {
                        return Err(format!("a key is there twice: {}", text(key)));
                    }
                }
                None => {
                    if found.seq <= state.truncated {
                        return Err(format!("record {} was truncated and is there", found.seq));
                    }
                    if log.insert(found.seq, found).is_some() {
                        return Err(format!("record {} is there twice", found.seq));
                    }
                }
            }
        }
        self.check_keys(&keys)?;
        let appended = self.check_log(&log, state.truncated)?;
        self.check_groups(&keys, &appended, state.truncated)
    }

    fn check_truncated(&self, truncated: u64) -> Result<(), String> {
        let mut wanted = vec![self.truncated];
        for op in self.tried.values().filter(|op| op.what == What::Truncate) {
            match op.result {
                Some(result) => wanted.push(result.max(self.truncated)),
                None if (self.truncated..=op.upto).contains(&truncated) => return Ok(()),
                None => {}
            }
        }
        if wanted.contains(&truncated) {
            return Ok(());
        }
        Err(format!(
            "the log is truncated up to {truncated}, and not up to one of {wanted:?}"
        ))
    }

    fn puts_of(&self, key: u64) -> impl Iterator<Item = &Op> {
        self.tried
            .values()
            .filter(move |op| op.what == What::Put && op.key == key)
    }

    fn check_keys(&self, keys: &HashMap<u64, &Found>) -> Result<(), String> {
        for (number, acked) in &self.keys {
            let name = || text(&key_of(*number));
            match (keys.get(number), acked) {
                (Some(found), acked) => {
                    let old = acked.iter().any(|op| op.is(found));
                    if !old && !self.puts_of(*number).any(|op| op.is(found)) {
                        let what = match acked {
                            Some(op) => format!("acknowledged is record {:?}", op.result),
                            None => "acknowledged is that it has none".into(),
                        };
                        return Err(format!(
                            "the key {} has record {} of {} bytes: {what}",
                            name(),
                            found.seq,
                            found.len
                        ));
                    }
                }
                (None, Some(op)) => {
                    let delete = |t: &Op| t.what == What::Delete && t.key == *number;
                    if !self.tried.values().any(delete) {
                        return Err(format!(
                            "the key {} is lost: operation {}, record {:?}, was acknowledged",
                            name(),
                            op.op,
                            op.result
                        ));
                    }
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// Returns those in flight that are there.
    fn check_log(
        &self,
        log: &BTreeMap<u64, &Found>,
        truncated: u64,
    ) -> Result<BTreeSet<u64>, String> {
        let mut there = BTreeSet::new();
        for (seq, found) in log {
            if let Some(op) = self.log.get(seq) {
                if !op.is(found) {
                    return Err(format!("record {seq} is not what was acknowledged"));
                }
                continue;
            }
            let tried = self
                .tried
                .values()
                .find(|op| op.what == What::Append && op.is(found));
            match tried {
                Some(op) if there.insert(op.op) => {}
                Some(_) => return Err(format!("record {seq} is there twice")),
                None => return Err(format!("record {seq} is one that nobody made")),
            }
        }
        match self
            .log
            .range(truncated + 1..)
            .find(|(seq, _)| !log.contains_key(seq))
        {
            Some((seq, op)) => Err(format!(
                "record {seq}, of operation {}, is lost: it was acknowledged",
                op.op
            )),
            None => Ok(there),
        }
    }

    fn check_groups(
        &self,
        keys: &HashMap<u64, &Found>,
        appended: &BTreeSet<u64>,
        truncated: u64,
    ) -> Result<(), String> {
        let mut groups: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
        for op in self.tried.values().filter(|op| op.group != 0) {
            let done = match op.what {
                What::Put => keys.get(&op.key).is_some_and(|found| op.is(found)),
                // Durable, and truncated by somebody else before it was acknowledged.
                What::Append if op.result.is_some_and(|seq| seq <= truncated) => continue,
                What::Append => appended.contains(&op.op),
                // Of nothing, nobody can tell.
                What::Delete if self.keys.get(&op.key).is_none_or(Option::is_none) => continue,
                What::Delete => !keys.contains_key(&op.key),
                What::Truncate => continue,
            };
            let (yes, no) = groups.entry(op.group).or_default();
            if done {
                *yes += 1;
            } else {
                *no += 1;
            }
        }
        match groups.iter().find(|(_, (yes, no))| *yes > 0 && *no > 0) {
            Some((group, (yes, no))) => Err(format!(
                "group {group} is torn: {yes} of its operations are done and {no} are not"
            )),
            None => Ok(()),
        }
    }
}

fn text(key: &[u8]) -> String {
    let more = if key.len() > 40 { "..." } else { "" };
    format!("{}{more}", key[..key.len().min(40)].escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(op: u64, kind: Kind, key: u64, group: u64) -> Begin {
        Begin {
            op,
            kind,
            key,
            len: 100 + op as u32,
            crc: op as u32,
            group,
            seq: 0,
        }
    }

    fn found(op: u64, key: Option<u64>, seq: u64) -> Found {
        Found {
            key: key.map(key_of),
            seq,
            len: 100 + op as u32,
            crc: op as u32,
        }
    }

    fn state(found: &[Found]) -> State {
        State {
            truncated: 0,
            last: 99,
            found: found.to_vec(),
        }
    }

    fn wrong(ledger: &Ledger, found: &[Found], why: &str) {
        let error = ledger.check(&state(found)).unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn what_was_acknowledged_is_there_and_what_was_tried_may_be() {
        let mut l = Ledger::default();
        l.begin(&begin(1, Kind::Put, 7, 0), None);
        for s in [&[][..], &[found(1, Some(7), 1)]] {
            l.check(&state(s)).unwrap();
        }
        assert!(l.ack(1, 1));
        wrong(&l, &[], "is lost");
        l.begin(&begin(2, Kind::Put, 7, 0), Some(5));
        l.check(&state(&[found(1, Some(7), 1)])).unwrap();
        l.check(&state(&[found(2, Some(7), 5)])).unwrap();
        wrong(&l, &[found(2, Some(7), 6)], "has record 6");
        wrong(&l, &[], "is lost");
        l.ack(2, 5);
        wrong(&l, &[found(1, Some(7), 1)], "has record 1");
        wrong(&l, &[found(2, Some(7), 5), found(1, Some(7), 1)], "twice");
        wrong(&l, &[found(2, Some(8), 5)], "nobody gave");
    }

    #[test]
    fn what_was_deleted_stays_so_and_what_failed_never_was() {
        let mut l = Ledger::default();
        l.begin(&begin(1, Kind::Put, 7, 0), None);
        l.ack(1, 1);
        l.begin(&begin(2, Kind::Delete, 7, 0), None);
        l.check(&state(&[])).unwrap();
        l.check(&state(&[found(1, Some(7), 1)])).unwrap();
        l.ack(2, 2);
        wrong(&l, &[found(1, Some(7), 1)], "has record 1");
        l.begin(&begin(3, Kind::Put, 7, 0), Some(-28));
        wrong(&l, &[found(3, Some(7), 3)], "has record 3");
        assert!(l.ack(3, -28));
        assert!(!l.ack(99, 1));
        l.check(&state(&[])).unwrap();
    }

    #[test]
    fn a_group_is_whole_or_absent() {
        let mut l = Ledger::default();
        l.begin(&begin(1, Kind::Put, 1, 0), None);
        l.ack(1, 1);
        l.begin(&begin(2, Kind::Put, 2, 9), None);
        l.begin(&begin(3, Kind::Delete, 1, 9), None);
        l.begin(&begin(4, Kind::Append, 0, 9), None);
        // There is nothing to delete.
        l.begin(&begin(5, Kind::Delete, 55, 9), None);
        let all = [found(2, Some(2), 2), found(4, None, 3)];
        l.check(&state(&all)).unwrap();
        l.check(&state(&[found(1, Some(1), 1)])).unwrap();
        wrong(&l, &all[..1], "torn");
        wrong(&l, &all[1..], "torn");
        wrong(&l, &[], "torn");
        // With one of them all are acknowledged.
        l.ack(2, 2);
        wrong(
            &l,
            &[found(1, Some(1), 1), found(2, Some(2), 2)],
            "has record 1",
        );
    }

    #[test]
    fn between_the_answers_of_a_group_all_of_it_is_there() {
        let mut l = Ledger::default();
        for op in 1..=3 {
            let kind = if op == 2 { Kind::Put } else { Kind::Append };
            l.begin(&begin(op, kind, 1, 9), Some(op as i64));
        }
        let all = [found(1, None, 1), found(2, Some(1), 2), found(3, None, 3)];
        for op in 1..=3 {
            l.check(&state(&all)).unwrap();
            l.ack(op, op as i64);
            wrong(&l, &all[..2], "record 3");
        }
        l.check(&state(&all)).unwrap();
    }

    #[test]
    fn the_log_ends_where_a_truncation_says() {
        let mut l = Ledger::default();
        for op in 1..=3 {
            l.begin(&begin(op, Kind::Append, 0, 0), None);
            l.ack(op, op as i64);
        }
        let all: Vec<_> = (1..=3).map(|op| found(op, None, op)).collect();
        l.check(&state(&all)).unwrap();
        wrong(&l, &all[1..], "record 1");
        wrong(&l, &[found(9, None, 1)], "not what was");
        let truncate = Begin {
            seq: 2,
            ..begin(4, Kind::Truncate, 0, 0)
        };
        l.begin(&truncate, Some(2));
        l.check(&state(&all)).unwrap();
        let cut = State {
            truncated: 2,
            last: 99,
            found: all[2..].to_vec(),
        };
        l.check(&cut).unwrap();
        wrong(&l, &all[2..], "record 1");
        l.ack(4, 2);
        l.check(&cut).unwrap();
        wrong(&l, &all, "not up to one of");
        let back = State {
            truncated: 2,
            last: 99,
            found: all.clone(),
        };
        assert!(l.check(&back).unwrap_err().contains("was truncated"));
    }

    #[test]
    fn a_number_that_was_acknowledged_is_not_given_out_again() {
        let mut l = Ledger::default();
        l.begin(&begin(1, Kind::Put, 1, 0), Some(7));
        l.ack(1, 7);
        l.begin(&begin(2, Kind::Delete, 1, 0), Some(7));
        l.ack(2, 7);
        let mut gone = state(&[]);
        gone.last = 7;
        l.check(&gone).unwrap();
        gone.last = 6;
        assert!(l.check(&gone).unwrap_err().contains("given out again"));
    }

    #[test]
    fn what_another_thread_truncated_before_it_was_acknowledged_tears_no_group() {
        let mut l = Ledger::default();
        l.begin(&begin(1, Kind::Put, 1, 9), Some(1));
        l.begin(&begin(2, Kind::Append, 0, 9), Some(2));
        let put = [found(1, Some(1), 1)];
        wrong(&l, &put, "torn");
        let truncate = Begin {
            seq: 5,
            ..begin(3, Kind::Truncate, 0, 0)
        };
        l.begin(&truncate, Some(5));
        l.ack(3, 5);
        let state = State {
            truncated: 5,
            last: 99,
            found: put.to_vec(),
        };
        l.check(&state).unwrap();
        l.ack(1, 1);
        l.check(&state).unwrap();
    }

    #[test]
    fn it_is_the_same_from_a_file() {
        let mut l = Ledger::default();
        l.begin(&begin(1, Kind::Put, 7, 0), None);
        l.ack(1, 1);
        let file = serde_json::to_string(&l).unwrap();
        let l: Ledger = serde_json::from_str(&file).unwrap();
        let l = l.restored();
        l.check(&state(&[found(1, Some(7), 1)])).unwrap();
        wrong(&l, &[], "is lost");
    }
}
