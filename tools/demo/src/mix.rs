// SPDX-License-Identifier: GPL-2.0-only

//! Clients that put, replace and delete, and note in a ledger what they try and
//! what was acknowledged.
//!
//! Before a request its changes are noted, a line each, `? ID put KEY N-SIZE` or
//! `? ID del KEY`; after its reply, `! ID`. The body of `KEY N-SIZE` is
//! that of the key `KEY#N-SIZE`; see [`body_of`]. What a server should not have
//! answered is `x ID WHY`. Changes with one ID are all or nothing.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use anyhow::{bail, Context};

use crate::{body_of, Client};

/// A ledger that is being written: each line, or group of lines, at once.
struct Ledger(File);

impl Ledger {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(file))
    }

    fn note(&self, lines: &str) -> anyhow::Result<()> {
        (&self.0).write_all(lines.as_bytes())?;
        Ok(())
    }
}

/// Pseudo-random numbers, the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Keys of one connection: few, so that most puts replace.
const KEYS: usize = 24;
/// Clients that change objects.
pub struct Mix<'a> {
    /// http://HOST:PORT
    pub url: &'a str,
    /// Start of the keys.
    pub prefix: &'a str,
    /// Number of this run: with it, no two changes have the same name or the same body.
    pub run: u64,
    /// Whether an earlier run may have left objects.
    pub resume: bool,
    /// Ledger to write.
    pub ledger: &'a Path,
    /// How many.
    pub connections: usize,
    /// Sizes of objects.
    pub sizes: &'a [usize],
    /// Keys to delete on the way.
    pub old: &'a [String],
}

/// A connection that puts, replaces and deletes, until the server is gone.
fn mix(
    address: &str,
    all: &Mix<'_>,
    prefix: &str,
    ledger: &Ledger,
    seed: u64,
) -> anyhow::Result<()> {
    let (run, sizes) = (all.run, all.sizes);
    let mut random = Random(seed | 1);
    let mut client = connect(address)?;
    // Tags of the objects that are there.
    let mut tags: [Option<String>; KEYS] = Default::default();
    if all.resume {
        for (which, tag) in tags.iter_mut().enumerate() {
            let key = format!("{prefix}.{which}");
            let reply = client.send("GET", &key, "", &[])?;
            match reply.status {
                200 => *tag = reply.tag,
                404 => {}
                status => bail!("{key}: status {status}"),
            }
        }
    }
    for n in 0u64.. {
        let id = format!("{prefix}.{run}.{n}");
        let which = random.below(KEYS);
        let key = format!("{prefix}.{which}");
        let delete = tags[which].is_some() && random.below(3) == 0;
        // Some ask for the object that is there, some for one that is not.
        let (condition, refused) = match (&tags[which], random.below(8)) {
            (Some(tag), 0 | 1) => (format!("If-Match: {tag}\r\n"), false),
            // No store here gets that far. (A new one has a record 1 again.)
            (Some(_), 2) => ("If-Match: \"999999999999\"\r\n".to_string(), true),
            (None, 0 | 1) => ("If-None-Match: *\r\n".to_string(), false),
            _ => (String::new(), false),
        };
        let (method, body, note) = if delete {
            ("DELETE", Vec::new(), format!("? {id} del {key}\n"))
        } else {
            let version = format!("{run}.{n}-{}", sizes[random.below(sizes.len())]);
            let body = body_of(&format!("{key}#{version}"))?;
            ("PUT", body, format!("? {id} put {key} {version}\n"))
        };
        if !refused {
            ledger.note(&note)?;
        }
        let reply = if !delete && random.below(5) == 0 {
            client.send_chunked(method, &key, &condition, &body)?
        } else {
            client.send(method, &key, &condition, &body)?
        };
        let right = match (refused, delete, tags[which].is_some()) {
            (true, ..) => 412,
            (_, true, _) => 204,
            (_, _, true) => 200,
            (_, _, false) => 201,
        };
        match reply.status {
            // The store is full, or nearly, for now.
            503 | 507 => std::thread::sleep(Duration::from_millis(20)),
            status if status != right => {
                let why = format!("x {id} {method} {key} {condition:?}: {status}, not {right}\n");
                ledger.note(&why)?;
                bail!("{}", why.trim_end());
            }
            412 => {}
            _ => {
                tags[which] = reply.tag.filter(|_| !delete);
                ledger.note(&format!("! {id}\n"))?;
            }
        }
    }
    Ok(())
}

/// A connection that deletes old objects.
fn sweep(address: &str, prefix: &str, ledger: &Ledger, keys: &[String]) -> anyhow::Result<()> {
    let mut client = connect(address)?;
    for (n, key) in keys.iter().enumerate() {
        let id = format!("{prefix}.{n}");
        ledger.note(&format!("? {id} del {key}\n"))?;
        match client.send("DELETE", key, "", &[])?.status {
            204 => ledger.note(&format!("! {id}\n"))?,
            503 => std::thread::sleep(Duration::from_millis(20)),
            status => {
                ledger.note(&format!("x {id} DELETE {key}: {status}, not 204\n"))?;
                bail!("{id}: {status}");
            }
        }
    }
    Ok(())
}

fn connect(address: &str) -> anyhow::Result<Client> {
    let mut tries = 0;
    loop {
        match Client::connect(address) {
            Err(e) if tries == 100 => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
            connected => return connected,
        }
        tries += 1;
    }
}

/// Changes objects over some connections until the server is gone; another one deletes
/// the old objects.
pub fn run(all: &Mix<'_>) -> anyhow::Result<()> {
    let address = all
        .url
        .strip_prefix("http://")
        .map(|a| a.trim_end_matches('/'))
        .with_context(|| format!("{}: not http://HOST:PORT", all.url))?;
    let (prefix, run) = (all.prefix, all.run);
    let ledger = &Ledger::open(all.ledger)?;
    std::thread::scope(|scope| {
        let sweeper = format!("{prefix}.s.{run}");
        let mut threads = vec![scope.spawn(move || sweep(address, &sweeper, ledger, all.old))];
        for n in 0..all.connections {
            let seed = prefix.bytes().fold(n as u64 + 1 + (run << 8), |h, b| {
                h.wrapping_mul(0x100_0000_01b3) ^ u64::from(b)
            });
            let prefix = format!("{prefix}.{n}");
            threads.push(scope.spawn(move || mix(address, all, &prefix, ledger, seed)));
        }
        let mut result = Ok(());
        for thread in threads {
            let ended = thread.join().expect("no thread panicked");
            result = result.and(ended);
        }
        result
    })
}

/// Groups of keys of one connection.
const GROUPS: u64 = 8;
/// Lengths of the objects of an array.
const LENGTHS: [usize; 6] = [40, 100, 700, 1448, 3000, 64];

/// Sends arrays of objects, each all or nothing, until the server is gone.
pub fn batches(
    address: &str,
    prefix: &str,
    run: u64,
    ledger: &Path,
    connections: usize,
) -> anyhow::Result<()> {
    let ledger = &Ledger::open(ledger)?;
    std::thread::scope(|scope| {
        let work = |n| move || batch(address, &format!("{prefix}.{n}"), run, ledger);
        let all: Vec<_> = (0..connections).map(|n| scope.spawn(work(n))).collect();
        all.into_iter().try_for_each(|thread| {
            let ended = thread.join();
            ended.expect("no thread panicked")
        })
    })
}

fn batch(address: &str, prefix: &str, run: u64, ledger: &Ledger) -> anyhow::Result<()> {
    let mut tries = 0;
    let socket = loop {
        match TcpStream::connect(address) {
            Err(e) if tries == 100 => return Err(e.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
            Ok(socket) => break socket,
        }
        tries += 1;
    };
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut replies = BufReader::new(socket.try_clone()?);
    let mut there = [false; GROUPS as usize];
    for n in 0u64.. {
        let group = n % GROUPS;
        let (id, name) = (format!("{prefix}.{run}.{n}"), format!("{prefix}.g{group}"));
        // Always as many, of which most do not fit one packet, or one line of words.
        let count = 3 + 9 * group;
        let there = &mut there[group as usize];
        let delete = *there && n % 5 == 0;
        let mut notes = String::new();
        let mut request = Vec::new();
        if delete {
            request.extend_from_slice(format!("del {id} {name} {count}\n").as_bytes());
            for k in 0..count {
                notes += &format!("? {id} del {name}/{k}\n");
            }
        } else {
            let length = LENGTHS[(n / GROUPS) as usize % LENGTHS.len()];
            request.extend_from_slice(format!("put {id} {name} {count} {length}\n").as_bytes());
            for k in 0..count {
                notes += &format!("? {id} put {name}/{k} {run}.{n}-{length}\n");
                request.extend(body_of(&format!("{name}/{k}#{run}.{n}-{length}"))?);
            }
        }
        ledger.note(&notes)?;
        (&socket).write_all(&request)?;
        let mut reply = String::new();
        if replies.read_line(&mut reply)? == 0 || !reply.ends_with('\n') {
            bail!("the server closed the connection");
        }
        let reply = reply.trim_end();
        if reply == format!("ok {id}") {
            *there = !delete;
            ledger.note(&format!("! {id}\n"))?;
        } else if reply.contains("No space") {
            std::thread::sleep(Duration::from_millis(50));
        } else {
            ledger.note(&format!("x {id} {reply}\n"))?;
            bail!("{reply}");
        }
    }
    Ok(())
}
