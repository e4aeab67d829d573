// SPDX-License-Identifier: GPL-2.0-only

//! The demo's book-keeping: what was acknowledged, and whether it is still there.
//!
//! A ledger is a text file with one line for each acknowledged object: the
//! `Location` of the reply, or its status and the `Location`, or a SHA-256 and the
//! key (as `sha256sum` prints them). A last line without an end is ignored: who
//! wrote it was stopped on the way.
//!
//! Keys end in `-SIZE`, and bodies follow from keys; see [`body_of`]. Ledgers of
//! clients that also replace and delete say what was tried, too; see [`mix`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod mix;

use std::{
    collections::{hash_map::DefaultHasher, BTreeMap, HashSet},
    fmt::Write as _,
    fs,
    hash::{Hash as _, Hasher as _},
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Mutex,
    },
    time::Duration,
};

use anyhow::{bail, Context};
use clap::{Args, Parser, Subcommand};
use pmskb_uapi::{catalog::describe, core::Extent, Catalog, Store, FRAME_SIZE};
use sha2::{Digest, Sha256};

/// Notes what a server acknowledged, and checks whether it is still there.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write body files, and a configuration for curl that PUTs them
    Gen {
        /// Where to write them
        directory: PathBuf,
        /// http://HOST:PORT
        #[arg(long)]
        url: String,
        /// Start of the keys
        #[arg(long, default_value = "c")]
        prefix: String,
        /// Sizes, in turn; commas or spaces between them
        #[arg(long, value_parser = parse_sizes, default_value = "0,1,100,1448,4096,65536,1048576")]
        sizes: Sizes,
        /// How many files
        #[arg(long, default_value_t = 100)]
        count: usize,
    },
    /// Print the body of a key
    Body {
        /// The key
        key: String,
    },
    /// Print the SHA-256 and the key of each acknowledged object
    Sum {
        /// Ledgers
        #[arg(required = true)]
        ledgers: Vec<PathBuf>,
    },
    /// PUT, replace and DELETE objects until the server is gone
    Mix {
        /// http://HOST:PORT
        #[arg(long)]
        url: String,
        /// Start of the keys
        #[arg(long, default_value = "m")]
        prefix: String,
        /// Ledger to write
        #[arg(long)]
        ledger: PathBuf,
        /// Number of this run; of several with the same keys, each has its own
        #[arg(long, default_value_t = 0)]
        run: u64,
        /// Look first for what an earlier run left
        #[arg(long)]
        resume: bool,
        /// How many connections
        #[arg(long, default_value_t = 4)]
        connections: usize,
        /// Sizes to choose from; commas or spaces between them
        #[arg(long, value_parser = parse_sizes,
              default_value = "0,1,64,200,1024,1448,3000,4096,10000,65536")]
        sizes: Sizes,
        /// A file with a location a line: these are deleted on the way
        #[arg(long)]
        old: Option<PathBuf>,
    },
    /// Send arrays of objects to pmskb-batcher until it is gone
    Batches {
        /// HOST:PORT
        #[arg(long)]
        connect: String,
        /// Start of the keys
        #[arg(long, default_value = "b")]
        prefix: String,
        /// Ledger to write
        #[arg(long)]
        ledger: PathBuf,
        /// Number of this run; of several with the same keys, each has its own
        #[arg(long, default_value_t = 0)]
        run: u64,
        /// How many connections
        #[arg(long, default_value_t = 2)]
        connections: usize,
    },
    /// Add up an attached store's space, while nobody uses it
    Space {
        /// /dev/pmskbN
        store: PathBuf,
    },
    /// Look for what every acknowledged change led to
    ///
    /// Exit status: 0 all are there, 1 some are not, 2 it could not be checked.
    Check {
        #[command(flatten)]
        place: Place,
        /// The ledgers know every key: others are wrong
        #[arg(long, conflicts_with = "url")]
        whole: bool,
        /// Write a ledger of what was found, if all is well: from now on it must stay
        #[arg(long, value_name = "FILE")]
        settle: Option<PathBuf>,
        /// Ledgers
        #[arg(required = true)]
        ledgers: Vec<PathBuf>,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Place {
    /// On a server: http://HOST:PORT
    #[arg(long)]
    url: Option<String>,
    /// In an attached store, through its mapped index: /dev/pmskbN
    #[arg(long)]
    store: Option<PathBuf>,
    /// In an image of a region, or of a whole NVDIMM
    #[arg(long)]
    image: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Gen {
            directory,
            url,
            prefix,
            sizes,
            count,
        } => gen(&directory, &url, &prefix, &sizes.0, count),
        Command::Body { key } => print_body(&key),
        Command::Sum { ledgers } => sum(&ledgers),
        Command::Mix {
            url,
            prefix,
            ledger,
            run,
            resume,
            connections,
            sizes,
            old,
        } => old_keys(old.as_deref())
            .and_then(|old| {
                mix::run(&mix::Mix {
                    url: &url,
                    prefix: &prefix,
                    run,
                    resume,
                    ledger: &ledger,
                    connections,
                    sizes: &sizes.0,
                    old: &old,
                })
            })
            .map(|()| ExitCode::SUCCESS),
        Command::Batches {
            connect,
            prefix,
            ledger,
            run,
            connections,
        } => mix::batches(&connect, &prefix, run, &ledger, connections).map(|()| ExitCode::SUCCESS),
        Command::Space { store } => space(&store),
        Command::Check {
            place,
            whole,
            settle,
            ledgers,
        } => check(&place, whole, settle.as_deref(), &ledgers),
    };
    result.unwrap_or_else(|e| {
        eprintln!("pmskb-ledger: {e:#}");
        ExitCode::from(2)
    })
}

/// Keys of locations, a line each.
fn old_keys(path: Option<&Path>) -> anyhow::Result<Vec<String>> {
    let Some(path) = path else {
        return Ok(Vec::new());
    };
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let keys = text.lines().filter_map(|l| l.strip_prefix('/'));
    Ok(keys.map(str::to_owned).collect())
}

/// Sizes of bodies.
#[derive(Debug, Clone)]
struct Sizes(Vec<usize>);

fn parse_sizes(text: &str) -> Result<Sizes, String> {
    let sizes: Result<Vec<usize>, _> = text
        .split([',', ' '])
        .filter(|t| !t.is_empty())
        .map(str::parse)
        .collect();
    match sizes {
        Ok(sizes) if !sizes.is_empty() => Ok(Sizes(sizes)),
        _ => Err("numbers with commas or spaces between them".into()),
    }
}

/// The body of a key: line n, from 0 on, is the key, a space, n as 8 decimal digits
/// and a newline; of these lines as many bytes as the number after the key's last
/// dash says.
fn body_of(key: &str) -> anyhow::Result<Vec<u8>> {
    let size = key
        .rsplit_once('-')
        .and_then(|(_, size)| size.parse::<usize>().ok());
    let size = size.filter(|s| *s <= 1 << 30);
    let size = size.with_context(|| format!("the key {key:?} does not end in -SIZE"))?;
    let mut body = String::with_capacity(size + key.len() + 10);
    for n in 0.. {
        if body.len() >= size {
            break;
        }
        let _ = writeln!(body, "{key} {n:08}");
    }
    body.truncate(size);
    Ok(body.into_bytes())
}

/// The hash of a body.
type Hash = [u8; 32];

fn hash(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

fn hex(hash: &Hash) -> String {
    hash.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn gen(
    directory: &Path,
    url: &str,
    prefix: &str,
    sizes: &[usize],
    count: usize,
) -> anyhow::Result<ExitCode> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let url = url.trim_end_matches('/');
    let mut config = String::new();
    for (n, size) in sizes.iter().cycle().take(count).enumerate() {
        let key = format!("{prefix}.{n:07}-{size}");
        let path = directory.join(&key);
        fs::write(&path, body_of(&key)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        if n > 0 {
            config.push_str("next\n");
        }
        // Appending to the standard output makes curl write each line at once.
        // Only what was acknowledged has a Location. curl waits for a go-ahead of
        // its own accord when a body is large.
        let _ = write!(
            config,
            "url = \"{url}/{key}\"\nupload-file = \"{}\"\noutput = \"/dev/null\"\n\
             write-out = \"%output{{>>/dev/stdout}}%header{{location}}\\n\"\nsilent\n",
            path.display()
        );
        if n % 3 == 2 {
            config.push_str("header = \"Transfer-Encoding: chunked\"\n");
        }
    }
    let path = directory.join("curl.conf");
    fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
}

fn print_body(key: &str) -> anyhow::Result<ExitCode> {
    io::stdout().write_all(&body_of(key)?)?;
    Ok(ExitCode::SUCCESS)
}

/// What a key may lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    /// An object with this hash.
    Object(Hash),
    /// Nothing.
    Gone,
}

/// What a key may lead to, and a number of the change that made it so: [`NONE`] for
/// nothing at all, [`ALONE`] for an object by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    what: What,
    change: u64,
}

const NONE: u64 = 0;
const ALONE: u64 = 1;

/// What ledgers say.
#[derive(Debug, Default)]
struct Ledgers {
    /// What keys may lead to: what the last acknowledged change made of them, or one
    /// that was tried later.
    keys: BTreeMap<String, Vec<State>>,
    /// Changes that were acknowledged.
    acknowledged: usize,
    /// What servers should not have answered.
    wrong: Vec<String>,
}

/// Reads ledgers, in this order.
fn read(ledgers: &[PathBuf]) -> anyhow::Result<Ledgers> {
    let mut all = Ledgers::default();
    for path in ledgers {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        // Whether a change was acknowledged says a line after it.
        let done: HashSet<&str> = whole
            .lines()
            .filter_map(|line| line.strip_prefix("! "))
            .collect();
        for (n, line) in whole
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.is_empty())
        {
            let at = || format!("{}, line {}", path.display(), n + 1);
            if line.starts_with("! ") {
                all.acknowledged += 1;
            } else if let Some(why) = line.strip_prefix("x ") {
                all.wrong.push(why.to_owned());
            } else if let Some(change) = line.strip_prefix("? ") {
                all.change(change, &done).with_context(at)?;
            } else if let Some((key, hash)) = parse_line(line).with_context(at)? {
                all.acknowledged += 1;
                let state = State {
                    what: What::Object(hash),
                    change: ALONE,
                };
                all.keys.insert(key, vec![state]);
            }
        }
    }
    Ok(all)
}

impl Ledgers {
    /// A change that was tried: `ID put KEY N-SIZE` or `ID del KEY`.
    fn change(&mut self, line: &str, done: &HashSet<&str>) -> anyhow::Result<()> {
        let words: Vec<&str> = line.split(' ').collect();
        let (id, key, what) = match words[..] {
            [id, "put", key, version] => {
                let body = body_of(&format!("{key}#{version}"))?;
                (id, key, What::Object(hash(&body)))
            }
            [id, "del", key] => (id, key, What::Gone),
            _ => bail!("not a line of a ledger: {line:?}"),
        };
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let state = State {
            what,
            change: hasher.finish(),
        };
        let states = self.keys.entry(key.to_owned()).or_insert_with(|| {
            vec![State {
                what: What::Gone,
                change: NONE,
            }]
        });
        if done.contains(id) {
            states.clear();
        }
        states.push(state);
        Ok(())
    }
}

fn parse_line(line: &str) -> anyhow::Result<Option<(String, Hash)>> {
    let (first, location) = match line.split_once(' ') {
        None => (None, line),
        Some((first, rest)) => (Some(first), rest.trim_start()),
    };
    match first {
        Some(sum) if sum.len() == 64 => {
            let mut hash = Hash::default();
            for (byte, digits) in hash.iter_mut().zip(sum.as_bytes().chunks(2)) {
                let digits = std::str::from_utf8(digits)?;
                *byte = u8::from_str_radix(digits, 16).context("not a SHA-256")?;
            }
            return Ok(Some((location.to_owned(), hash)));
        }
        Some("200" | "201") | None => {}
        // Not acknowledged.
        Some(status) if status.len() == 3 => return Ok(None),
        Some(_) => bail!("not a line of a ledger: {line:?}"),
    }
    let key = location
        .strip_prefix('/')
        .with_context(|| format!("no location: {line:?}"))?;
    Ok(Some((key.to_owned(), hash(&body_of(key)?))))
}

fn sum(ledgers: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for (key, states) in read(ledgers)?.keys {
        if let [State {
            what: What::Object(hash),
            ..
        }] = &states[..]
        {
            writeln!(out, "{}  {key}", hex(hash))?;
        }
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// What became of the acknowledged changes.
#[derive(Default)]
struct Tally {
    found: usize,
    gone: usize,
    bytes: u64,
    missing: Vec<String>,
    wrong: Vec<String>,
    /// There again, though they were deleted.
    undead: Vec<String>,
    /// Keys that no ledger knows.
    unknown: Vec<String>,
    /// Which change each key of a group shows.
    groups: BTreeMap<String, HashSet<u64>>,
    /// A ledger of what was found.
    settled: String,
}

impl Tally {
    fn note(&mut self, key: &str, states: &[State], object: Option<(Hash, u64)>) {
        let is = match object {
            None => What::Gone,
            Some((hash, _)) => What::Object(hash),
        };
        self.bytes += object.map_or(0, |o| o.1);
        let _ = match &is {
            What::Object(hash) => writeln!(self.settled, "{}  {key}", hex(hash)),
            What::Gone => writeln!(self.settled, "? 0 del {key}\n! 0"),
        };
        let right = states.iter().find(|s| s.what == is);
        if let Some((group, _)) = key.rsplit_once('/') {
            let shown = match (&is, right) {
                (What::Object(_), Some(state)) => state.change,
                _ => NONE,
            };
            let group = self.groups.entry(group.to_owned()).or_default();
            group.insert(shown);
        }
        match (right, &is) {
            (Some(_), What::Gone) => self.gone += 1,
            (Some(_), What::Object(_)) => self.found += 1,
            (None, What::Gone) => self.missing.push(key.to_owned()),
            (None, _) if states.iter().all(|s| s.what == What::Gone) => {
                self.undead.push(key.to_owned());
            }
            (None, _) => self.wrong.push(key.to_owned()),
        }
    }
}

fn check(
    place: &Place,
    whole: bool,
    settle: Option<&Path>,
    ledgers: &[PathBuf],
) -> anyhow::Result<ExitCode> {
    let all = read(ledgers)?;
    let mut tally = match (&place.url, &place.store, &place.image) {
        (Some(url), _, _) => check_server(url, &all.keys)?,
        (_, Some(path), _) => check_catalog(&Catalog::of_store(&Store::open(path)?)?, &all.keys)?,
        (_, _, Some(path)) => check_catalog(&Catalog::of_image(path, (None, None))?, &all.keys)?,
        _ => bail!("say where to look"),
    };
    if !whole {
        tally.unknown.clear();
    }
    let torn = tally.groups.iter().filter(|(_, shown)| shown.len() > 1);
    let torn: Vec<String> = torn.map(|(group, _)| group.clone()).collect();
    let lists = [
        ("missing", &tally.missing),
        ("wrong", &tally.wrong),
        ("deleted, and there again", &tally.undead),
        ("torn", &torn),
        ("known to no ledger", &tally.unknown),
        ("wrong answer", &all.wrong),
    ];
    for (what, keys) in lists {
        for key in keys.iter().take(10) {
            println!("{what}: {key}");
        }
        if keys.len() > 10 {
            println!("{what}: ... and {} more", keys.len() - 10);
        }
    }
    println!(
        "{} acknowledged, {} found, {} gone as they should, {} missing, {} wrong, {} there again, \
         {} groups, {} torn, {} unknown, {} wrong answers, {} bytes",
        all.acknowledged,
        tally.found,
        tally.gone,
        tally.missing.len(),
        tally.wrong.len(),
        tally.undead.len(),
        tally.groups.len(),
        torn.len(),
        tally.unknown.len(),
        all.wrong.len(),
        tally.bytes
    );
    let lost = lists.iter().any(|(_, keys)| !keys.is_empty());
    if let Some(path) = settle.filter(|_| !lost) {
        fs::write(path, &tally.settled)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::from(u8::from(lost)))
}

fn check_catalog(catalog: &Catalog, all: &BTreeMap<String, Vec<State>>) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    for (key, states) in all {
        let object = find(catalog, key).map_err(|e| anyhow::anyhow!("{key}: {}", describe(e)));
        match object {
            Ok(object) => tally.note(key, states, object),
            Err(e) => {
                println!("{e:#}");
                tally.missing.push(key.clone());
            }
        }
    }
    for entry in catalog.prefix(b"", None) {
        let (key, _) = entry.map_err(|e| anyhow::anyhow!("the index: {}", describe(e)))?;
        let key = String::from_utf8_lossy(&key);
        if !all.contains_key(&*key) {
            tally.unknown.push(key.into_owned());
        }
    }
    Ok(tally)
}

/// Adds up what a store's counters say of its space, with no traffic.
fn space(path: &Path) -> anyhow::Result<ExitCode> {
    let store = Store::open(path)?;
    let catalog = Catalog::of_store(&store)?;
    let r = store.info()?.raw;
    let (mut records, mut keys, mut bytes, mut lines, mut in_payload) = (0, 0, 0, 0, 0);
    // Frames that records reach; any other one of payload is leaked.
    let mut reached = HashSet::new();
    let mut reach = |extent: &Extent| {
        let end = extent.off + u64::from(extent.len);
        reached.extend(extent.off / FRAME_SIZE..end.div_ceil(FRAME_SIZE));
    };
    for record in catalog.log(0) {
        let fail = |e| anyhow::anyhow!("cannot read the records: {}", describe(e));
        let record = record.map_err(fail)?;
        records += 1;
        keys += u64::from(record.keyed());
        bytes += u64::from(record.len);
        lines += u64::from(record.lines);
        let key = record.key_extent(catalog.media()).map_err(fail)?;
        in_payload += key.map_or(0, |extent| u64::from(extent.len));
        key.iter().for_each(&mut reach);
        let extents = catalog.extents(&record).map_err(fail)?;
        extents.iter().for_each(&mut reach);
    }
    let sum = r.frames_free
        + r.frames_payload
        + r.frames_record
        + r.frames_list
        + r.frames_index
        + r.frames_held
        + r.frames_limbo
        + r.frames_bad;
    let mut wrong = 0;
    for (what, is, right) in [
        ("frames", r.frames_total, sum),
        ("frames of payload", r.frames_payload, reached.len() as u64),
        (
            "bytes of payload frames",
            r.frames_payload * FRAME_SIZE,
            r.live_bytes + in_payload + r.fragmented_bytes,
        ),
        ("records", r.records, records),
        ("records with a key", r.keys, keys),
        ("bytes of objects", r.live_bytes, bytes),
        ("bytes of records", r.record_bytes, lines * 64),
    ] {
        if is != right {
            println!("space: {is} {what}, and not {right}");
            wrong += 1;
        }
    }
    println!(
        "space: {} frames, {} free, {} records, {} bytes of objects, {} of keys, {} fragmented: {}",
        r.frames_total,
        r.frames_free,
        r.records,
        r.live_bytes,
        in_payload,
        r.fragmented_bytes,
        if wrong == 0 { "adds up" } else { "WRONG" }
    );
    Ok(ExitCode::from(u8::from(wrong > 0)))
}

fn find(catalog: &Catalog, key: &str) -> pmskb_uapi::core::Result<Option<(Hash, u64)>> {
    for _ in 0..100 {
        let Some(record) = catalog.get(key.as_bytes())? else {
            return Ok(None);
        };
        let mut hasher = Sha256::new();
        if catalog.read(&record, |part| hasher.update(part))? {
            return Ok(Some((hasher.finalize().into(), record.len.into())));
        }
    }
    Err(pmskb_uapi::core::Error::Busy)
}

/// Connections that a check of a server uses.
const CONNECTIONS: usize = 4;

fn check_server(url: &str, all: &BTreeMap<String, Vec<State>>) -> anyhow::Result<Tally> {
    let address = url
        .strip_prefix("http://")
        .map(|a| a.trim_end_matches('/'))
        .with_context(|| format!("{url}: not http://HOST:PORT"))?;
    let keys: Vec<(&String, &Vec<State>)> = all.iter().collect();
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    let work = || -> anyhow::Result<()> {
        let mut client = Client::connect(address)?;
        while let Some((key, states)) = keys.get(next.fetch_add(1, Ordering::Relaxed)) {
            let object = client
                .get(key)?
                .map(|body| (hash(&body), body.len() as u64));
            tally
                .lock()
                .expect("no thread panicked")
                .note(key, states, object);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().expect("no thread panicked"))
    })?;
    Ok(tally.into_inner().expect("no thread panicked"))
}

/// A connection to a server.
struct Client {
    address: String,
    stream: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: &str) -> anyhow::Result<Self> {
        let port = if address.contains(':') { "" } else { ":80" };
        let stream = TcpStream::connect(format!("{address}{port}"))
            .with_context(|| format!("cannot connect to {address}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            address: address.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// An object; `None` if there is none.
    fn get(&mut self, key: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let reply = self.send("GET", key, "", &[])?;
        match reply.status {
            200 => Ok(Some(reply.body)),
            404 => Ok(None),
            other => bail!("{key}: status {other}"),
        }
    }

    /// Sends a request, with more `fields` of its head, and reads the reply.
    fn send(
        &mut self,
        method: &str,
        key: &str,
        fields: &str,
        body: &[u8],
    ) -> anyhow::Result<Reply> {
        if body.is_empty() && method != "PUT" {
            return self.exchange(method, key, fields, body);
        }
        let fields = format!("{fields}Content-Length: {}\r\n", body.len());
        self.exchange(method, key, &fields, body)
    }

    /// Sends a request whose body comes in chunks.
    fn send_chunked(
        &mut self,
        method: &str,
        key: &str,
        fields: &str,
        body: &[u8],
    ) -> anyhow::Result<Reply> {
        let mut chunks = Vec::with_capacity(body.len() + 64);
        // Some small, so that a packet has several, and some larger than a packet.
        let mut sizes = [1, 700, 10, 3000, 20000].into_iter().cycle();
        let mut rest = body;
        while !rest.is_empty() {
            let size = sizes.next().unwrap_or(1).min(rest.len());
            let (chunk, more) = rest.split_at(size);
            chunks.extend_from_slice(format!("{size:x}\r\n").as_bytes());
            chunks.extend_from_slice(chunk);
            chunks.extend_from_slice(b"\r\n");
            rest = more;
        }
        chunks.extend_from_slice(b"0\r\n\r\n");
        let fields = format!("{fields}Transfer-Encoding: chunked\r\n");
        self.exchange(method, key, &fields, &chunks)
    }

    fn exchange(
        &mut self,
        method: &str,
        key: &str,
        fields: &str,
        body: &[u8],
    ) -> anyhow::Result<Reply> {
        let mut request = format!("{method} /{key} HTTP/1.1\r\nHost: {}\r\n", self.address);
        request += fields;
        request += "\r\n";
        let mut request = request.into_bytes();
        request.extend_from_slice(body);
        self.stream.get_mut().write_all(&request)?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if self.stream.read_until(b'\n', &mut head)? == 0 || head.len() > 16 << 10 {
                bail!("{key}: the server closed the connection, or talks nonsense");
            }
        }
        let mut fields = [httparse::EMPTY_HEADER; 32];
        let mut reply = httparse::Response::new(&mut fields);
        reply.parse(&head)?;
        let status = reply.code.unwrap_or(0);
        let field = |name: &str| {
            let found = reply.headers.iter();
            let mut found = found.filter(|h| h.name.eq_ignore_ascii_case(name));
            std::str::from_utf8(found.next()?.value).ok()
        };
        let length = match field("content-length") {
            Some(length) => length.parse().ok(),
            None => (status == 204).then_some(0),
        };
        let length: usize = length.with_context(|| format!("{key}: a reply without a length"))?;
        let tag = field("etag").map(str::to_owned);
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(Reply { status, tag, body })
    }
}

/// A server's answer.
struct Reply {
    status: u16,
    /// `ETag`
    tag: Option<String>,
    body: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_follow_from_keys() {
        assert_eq!(body_of("k-0").unwrap(), b"");
        assert_eq!(body_of("k-20").unwrap(), b"k-20 00000000\nk-20 0");
        assert!(body_of("k").is_err());
        assert!(body_of("k-x").is_err());
    }

    #[test]
    fn a_ledger_has_what_was_acknowledged_and_no_half_lines() {
        let sum = hex(&hash(b"other"));
        let file = std::env::temp_dir().join(format!("pmskb-ledger-{}", std::process::id()));
        let text = format!("/a-1\n201 /b-2\n503 \n000 \n{sum}  c\n/d-10");
        fs::write(&file, text).unwrap();
        let all = read(std::slice::from_ref(&file)).unwrap();
        fs::remove_file(&file).unwrap();
        assert_eq!(all.acknowledged, 3);
        let keys: Vec<&str> = all.keys.keys().map(String::as_str).collect();
        assert_eq!(keys, ["a-1", "b-2", "c"]);
        assert_eq!(all.keys["a-1"][0].what, What::Object(hash(b"a")));
        assert_eq!(all.keys["c"][0].what, What::Object(hash(b"other")));
        assert!(parse_line("nonsense here").is_err());
    }

    /// What a ledger makes of a store that has these objects.
    fn tally(ledger: &str, store: &[(&str, &str)]) -> Tally {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = std::env::temp_dir().join(format!("pmskb-mix-{}-{n}", std::process::id()));
        fs::write(&file, ledger).unwrap();
        let all = read(std::slice::from_ref(&file)).unwrap();
        fs::remove_file(&file).unwrap();
        let mut tally = Tally::default();
        for (key, states) in &all.keys {
            let object = store.iter().find(|(k, _)| k == key);
            let object = object.map(|(key, version)| {
                let body = body_of(&format!("{key}#{version}")).unwrap();
                (hash(&body), body.len() as u64)
            });
            tally.note(key, states, object);
        }
        tally
    }

    #[test]
    fn what_was_tried_may_be_and_what_was_acknowledged_must() {
        let ledger = "? 1 put k 1-30\n! 1\n? 2 put k 2-30\n? 3 del k\n";
        for store in [&[("k", "1-30")][..], &[("k", "2-30")], &[]] {
            let t = tally(ledger, store);
            assert_eq!((t.found + t.gone, t.missing.len() + t.wrong.len()), (1, 0));
        }
        assert_eq!(tally(ledger, &[("k", "4-30")]).wrong, ["k"]);
        let deleted = "? 1 put k 1-30\n! 1\n? 2 del k\n! 2\n";
        assert_eq!(tally(deleted, &[]).gone, 1);
        assert_eq!(tally(deleted, &[("k", "1-30")]).undead, ["k"]);
        let replaced = "? 1 put k 1-30\n! 1\n? 2 put k 2-30\n! 2\n";
        assert_eq!(tally(replaced, &[("k", "1-30")]).wrong, ["k"]);
        assert_eq!(tally(replaced, &[]).missing, ["k"]);
        // Never acknowledged.
        let tried = "? 1 put k 1-30\n";
        assert_eq!(
            tally(tried, &[]).gone + tally(tried, &[("k", "1-30")]).found,
            2
        );
    }

    #[test]
    fn what_was_found_must_stay() {
        let ledger = "? 1 put g/0 1-40\n? 1 put g/1 1-40\n! 1\n? 2 del k\n";
        let both = [("g/0", "1-40"), ("g/1", "1-40")];
        let settled = tally(ledger, &both).settled;
        let t = tally(&settled, &both);
        assert_eq!((t.found, t.gone), (2, 1));
        assert_eq!(tally(&settled, &[("k", "3-1")]).undead, ["k"]);
        assert_eq!(tally(&settled, &[]).missing, ["g/0", "g/1"]);
        // A deletion of the array that was never acknowledged is all or nothing, too.
        let more = settled + "? 3 del g/0\n? 3 del g/1\n";
        for (store, shown) in [(&both[..], 1), (&both[..1], 2), (&[], 1)] {
            let t = tally(&more, store);
            assert_eq!((t.missing.len(), t.groups["g"].len()), (0, shown));
        }
    }

    #[test]
    fn a_group_shows_one_change() {
        let mut ledger = String::new();
        for (id, version) in [("1", "1-40"), ("2", "2-40")] {
            for n in 0..2 {
                let _ = writeln!(ledger, "? {id} put g/{n} {version}");
            }
            if id == "1" {
                ledger.push_str("! 1\n");
            }
        }
        let shown = |store: &[(&str, &str)]| {
            let t = tally(&ledger, store);
            assert_eq!((t.missing.len(), t.wrong.len()), (0, 0));
            t.groups["g"].len()
        };
        assert_eq!(shown(&[("g/0", "1-40"), ("g/1", "1-40")]), 1);
        assert_eq!(shown(&[("g/0", "2-40"), ("g/1", "2-40")]), 1);
        assert_eq!(shown(&[("g/0", "1-40"), ("g/1", "2-40")]), 2);
    }
}
