// SPDX-License-Identifier: GPL-2.0-only
//! Marks with data: no-ops by which the guest says what it does.
//!
//! `%rax` says that it is one of these, and which; `%rdi`, `%rsi`, `%rdx`, `%r8` and `%r9` are its
//! data. On a machine without the plugin nothing happens.

/// The upper half of `%rax`: "PKtr".
const MAGIC: u64 = (u32::from_le_bytes(*b"PKtr") as u64) << 32;

/// The data of a mark.
pub type Data = [u64; 5];

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Makes an object the key's.
    Put = 1,
    /// Takes the key's object away.
    Delete = 2,
    /// Adds an object without a key.
    Append = 3,
    /// Takes objects without a key away, up to a number.
    Truncate = 4,
    /// Moves what is there; changes nothing that can be asked for.
    Compact = 5,
    /// Receives bytes: nothing durable.
    Receive = 6,
    /// Sends an object's bytes; nothing durable.
    Send = 7,
    /// Lets a store go, or takes it up again; changes nothing that can be asked for.
    Attach = 8,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 8] = [
        Kind::Put,
        Kind::Delete,
        Kind::Append,
        Kind::Truncate,
        Kind::Compact,
        Kind::Receive,
        Kind::Send,
        Kind::Attach,
    ];

    fn of(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u64 == number)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Put => "put",
            Kind::Delete => "delete",
            Kind::Append => "append",
            Kind::Truncate => "truncate",
            Kind::Compact => "compact",
            Kind::Receive => "receive",
            Kind::Send => "send",
            Kind::Attach => "detach, attach",
        }
    }
}

/// An operation that is about to be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Its number, of this run's.
    pub op: u64,
    /// What it does.
    pub kind: Kind,
    /// Which key; see [`work::key_of`](crate::work::key_of). 0 where there is none.
    pub key: u64,
    /// Bytes of the object; of a truncation nothing.
    pub len: u32,
    /// CRC32C of the object.
    pub crc: u32,
    /// Of those that are all or nothing, the number; 0: it is by itself.
    pub group: u64,
    /// Of a truncation, where it ends.
    pub seq: u64,
}

/// What the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// From here on crashes are looked at: the store is formatted, attached and empty. A name.
    Start([u8; 32]),
    /// Up to here.
    End,
    /// An operation is about to be tried.
    Begin(Begin),
    /// It returned: the number of its record, of a truncation up to which the log is empty; or a
    /// negative errno, and it did nothing.
    Ack {
        /// Of [`Begin`].
        op: u64,
        /// What it was told.
        result: i64,
    },
    /// One of another kind: `%rax`.
    Other(u64),
}

impl Mark {
    /// A run's beginning; of the name, up to 32 bytes.
    pub fn start(name: &str) -> Self {
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Mark::Start(bytes)
    }

    /// As `%rax` and the data.
    pub fn encode(&self) -> (u64, Data) {
        match *self {
            Mark::Start(name) => {
                let word = |i: usize| {
                    let bytes = name[8 * i..8 * i + 8].try_into();
                    u64::from_le_bytes(bytes.expect("eight of them"))
                };
                (MAGIC | 1, [word(0), word(1), word(2), word(3), 0])
            }
            Mark::End => (MAGIC | 2, [0; 5]),
            Mark::Begin(b) => (
                MAGIC | 3 | ((b.kind as u64) << 8),
                [
                    b.op,
                    b.key,
                    u64::from(b.len) | (u64::from(b.crc) << 32),
                    b.group,
                    b.seq,
                ],
            ),
            Mark::Ack { op, result } => (MAGIC | 4, [op, result as u64, 0, 0, 0]),
            Mark::Other(rax) => (rax, [0; 5]),
        }
    }

    /// From what was in the registers.
    pub fn decode(rax: u64, data: Data) -> Self {
        let kind = (rax >> 8) & 0xff;
        match rax & !0xff00 {
            x if x == MAGIC | 1 && kind == 0 => {
                let mut name = [0; 32];
                for (to, word) in name.chunks_exact_mut(8).zip(data) {
                    to.copy_from_slice(&word.to_le_bytes());
                }
                Mark::Start(name)
            }
            x if x == MAGIC | 2 && kind == 0 => Mark::End,
            x if x == MAGIC | 3 => match Kind::of(kind) {
                Some(kind) => Mark::Begin(Begin {
                    op: data[0],
                    kind,
                    key: data[1],
                    len: data[2] as u32,
                    crc: (data[2] >> 32) as u32,
                    group: data[3],
                    seq: data[4],
                }),
                None => Mark::Other(rax),
            },
            x if x == MAGIC | 4 && kind == 0 => Mark::Ack {
                op: data[0],
                result: data[1] as i64,
            },
            _ => Mark::Other(rax),
        }
    }

    /// Makes the mark.
    #[cfg(target_arch = "x86_64")]
    pub fn make(&self) {
        let (rax, data) = self.encode();
        // SAFETY: a no-op with a memory operand that is never accessed.
        unsafe {
            std::arch::asm!("nopl {mark}(%rax)", mark = const pmskb_tcg::decode::MARK,
                in("rax") rax, in("rdi") data[0], in("rsi") data[1], in("rdx") data[2],
                in("r8") data[3], in("r9") data[4],
                options(att_syntax, nostack, preserves_flags));
        }
    }
}

/// A run's name, as text.
pub fn name_of(name: &[u8; 32]) -> String {
    let len = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..len]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_means_what_it_said() {
        let begin = |kind| {
            Mark::Begin(Begin {
                op: u64::MAX,
                kind,
                key: 7,
                len: 1 << 30,
                crc: 0xdead_beef,
                group: 3,
                seq: 9,
            })
        };
        let all = [
            Mark::start("a name"),
            Mark::start("thirty-two bytes, and no bit more"),
            Mark::End,
            Mark::Ack { op: 1, result: -28 },
            Mark::Ack { op: 2, result: 77 },
            Mark::Other(0xffff_8880_0000_0000),
        ];
        for mark in all.into_iter().chain(Kind::ALL.map(begin)) {
            let (rax, data) = mark.encode();
            assert_eq!(Mark::decode(rax, data), mark);
            mark.make();
        }
        let (rax, data) = Mark::start("a name").encode();
        match Mark::decode(rax, data) {
            Mark::Start(name) => assert_eq!(name_of(&name), "a name"),
            other => panic!("{other:?}"),
        }
        for rax in [0, MAGIC, MAGIC | 5, MAGIC | 3 | 0xff00, MAGIC | 1 | 0x100] {
            assert_eq!(Mark::decode(rax, [0; 5]), Mark::Other(rax), "{rax:#x}");
        }
    }
}
