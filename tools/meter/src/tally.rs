// SPDX-License-Identifier: GPL-2.0-only
//! A window, added up by symbol.

use crate::symbols::{Symbol, Symbols};
use crate::window::{Memory, Window};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// What one function did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// `kernel`, a module's name in brackets, or a file's name.
    pub place: String,
    /// The function.
    pub name: String,
    /// Instructions executed in it, not in what it calls.
    pub instructions: u64,
    /// How often it was entered.
    pub calls: u64,
    /// Bytes stored to persistent memory.
    pub pm: u64,
    /// Payload bytes stored.
    pub stored: u64,
    /// Payload bytes loaded.
    pub loaded: u64,
    /// Lines that the modelled cache fetched from DRAM.
    pub misses_dram: u64,
    /// Those from persistent memory.
    pub misses_pm: u64,
}

/// A window by symbol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// The window's number.
    pub number: u64,
    /// Instructions in all.
    pub instructions: u64,
    /// What was done to persistent memory, and to payload.
    pub memory: Memory,
    /// Functions, most instructions first.
    pub functions: Vec<Row>,
}

impl Tally {
    /// Adds a window up.
    pub fn new(window: &Window, symbols: &Symbols) -> Self {
        let mut rows: HashMap<Symbol, Row> = HashMap::new();
        let mut instructions = 0;
        for block in &window.blocks {
            let (symbol, first) = symbols.find(block.at);
            let row = rows.entry(symbol).or_default();
            let executed = block.insns * block.runs;
            instructions += executed;
            row.instructions += executed;
            row.pm += block.pm;
            row.stored += block.stored;
            row.loaded += block.loaded;
            row.misses_dram += block.misses_dram;
            row.misses_pm += block.misses_pm;
            if first {
                row.calls += block.runs;
            }
        }
        let mut functions: Vec<Row> = rows
            .into_iter()
            .map(|(symbol, row)| Row {
                place: symbol.place,
                name: symbol.name,
                ..row
            })
            .collect();
        functions.sort_by(|a, b| {
            let key = |r: &Row| std::cmp::Reverse(r.instructions);
            (key(a), &a.place, &a.name).cmp(&(key(b), &b.place, &b.name))
        });
        Self {
            number: window.number,
            instructions,
            memory: window.memory,
            functions,
        }
    }

    /// How often a function of the kernel was entered.
    pub fn kernel_calls(&self, name: &str) -> u64 {
        let here = |r: &&Row| r.place == "kernel" && r.name == name;
        self.functions.iter().filter(here).map(|r| r.calls).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::Block;

    #[test]
    fn blocks_add_up_to_functions() {
        let kallsyms = "ffffffff81000000 T entry_SYSCALL_64\nffffffff81000040 T memcpy\n";
        let symbols = Symbols::new(kallsyms, "", &[]).unwrap();
        let block = |at: u64, insns, runs, stored| Block {
            at: 0xffff_ffff_8100_0000 + at,
            insns,
            runs,
            pm: 0,
            stored,
            loaded: 2 * stored,
            misses_dram: 1,
            misses_pm: runs,
        };
        let window = Window {
            number: 3,
            blocks: vec![
                block(0, 5, 10, 0),
                block(8, 3, 10, 0),
                block(0x40, 2, 4, 64),
                block(0x44, 4, 100, 1),
                // The same address, translated with another length.
                block(0, 1, 2, 0),
            ],
            ..Window::default()
        };
        let tally = Tally::new(&window, &symbols);
        assert_eq!(
            (tally.number, tally.instructions),
            (3, 50 + 30 + 8 + 400 + 2)
        );
        assert_eq!(tally.kernel_calls("entry_SYSCALL_64"), 12);
        assert_eq!(tally.kernel_calls("memcpy"), 4);
        let first = &tally.functions[0];
        assert_eq!((first.name.as_str(), first.instructions), ("memcpy", 408));
        assert_eq!((first.stored, first.loaded), (65, 130));
        assert_eq!((first.misses_dram, first.misses_pm), (2, 104));
        assert_eq!(tally.functions.len(), 2);
    }
}
