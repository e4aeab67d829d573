// SPDX-License-Identifier: GPL-2.0-only

//! The demo's book-keeping: what was acknowledged, and whether it is still there.
//!
//! A ledger is a text file with one line for each acknowledged object: the
//! `Location` of the reply, or its status and the `Location`, or a SHA-256 and the
//! key (as `sha256sum` prints them). A last line without an end is ignored: who
//! wrote it was stopped on the way.
//!
//! Keys end in `-SIZE`, and bodies follow from keys; see [`body_of`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
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
use pmskb_uapi::{catalog::describe, Catalog, Store};
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
    /// Look for every acknowledged object
    ///
    /// Exit status: 0 all are there, 1 some are not, 2 it could not be checked.
    Check {
        #[command(flatten)]
        place: Place,
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
        Command::Check { place, ledgers } => check(&place, &ledgers),
    };
    result.unwrap_or_else(|e| {
        eprintln!("pmskb-ledger: {e:#}");
        ExitCode::from(2)
    })
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

/// Keys and what their bodies must be.
fn read(ledgers: &[PathBuf]) -> anyhow::Result<BTreeMap<String, Hash>> {
    let mut all = BTreeMap::new();
    for path in ledgers {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        for (n, line) in whole
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.is_empty())
        {
            let entry =
                parse_line(line).with_context(|| format!("{}, line {}", path.display(), n + 1))?;
            all.extend(entry);
        }
    }
    Ok(all)
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
    for (key, hash) in read(ledgers)? {
        writeln!(out, "{}  {key}", hex(&hash))?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// What became of the acknowledged objects.
#[derive(Default)]
struct Tally {
    found: usize,
    bytes: u64,
    missing: Vec<String>,
    wrong: Vec<String>,
}

impl Tally {
    fn note(&mut self, key: &str, right: &Hash, object: Option<(Hash, u64)>) {
        match object {
            None => self.missing.push(key.to_owned()),
            Some((is, len)) => {
                self.found += 1;
                self.bytes += len;
                if is != *right {
                    self.wrong.push(key.to_owned());
                }
            }
        }
    }
}

fn check(place: &Place, ledgers: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let all = read(ledgers)?;
    let tally = match (&place.url, &place.store, &place.image) {
        (Some(url), _, _) => check_server(url, &all)?,
        (_, Some(path), _) => check_catalog(&Catalog::of_store(&Store::open(path)?)?, &all)?,
        (_, _, Some(path)) => check_catalog(&Catalog::of_image(path, (None, None))?, &all)?,
        _ => bail!("say where to look"),
    };
    for (what, keys) in [("missing", &tally.missing), ("wrong", &tally.wrong)] {
        for key in keys.iter().take(10) {
            println!("{what}: {key}");
        }
        if keys.len() > 10 {
            println!("{what}: ... and {} more", keys.len() - 10);
        }
    }
    println!(
        "{} acknowledged, {} found, {} missing, {} wrong, {} bytes",
        all.len(),
        tally.found,
        tally.missing.len(),
        tally.wrong.len(),
        tally.bytes
    );
    let lost = !tally.missing.is_empty() || !tally.wrong.is_empty();
    Ok(ExitCode::from(u8::from(lost)))
}

fn check_catalog(catalog: &Catalog, all: &BTreeMap<String, Hash>) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    for (key, right) in all {
        let object = find(catalog, key).map_err(|e| anyhow::anyhow!("{key}: {}", describe(e)));
        match object {
            Ok(object) => tally.note(key, right, object),
            Err(e) => {
                println!("{e:#}");
                tally.missing.push(key.clone());
            }
        }
    }
    Ok(tally)
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

fn check_server(url: &str, all: &BTreeMap<String, Hash>) -> anyhow::Result<Tally> {
    let address = url
        .strip_prefix("http://")
        .map(|a| a.trim_end_matches('/'))
        .with_context(|| format!("{url}: not http://HOST:PORT"))?;
    let keys: Vec<(&String, &Hash)> = all.iter().collect();
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    let work = || -> anyhow::Result<()> {
        let mut client = Client::connect(address)?;
        while let Some((key, right)) = keys.get(next.fetch_add(1, Ordering::Relaxed)) {
            let object = client
                .get(key)?
                .map(|body| (hash(&body), body.len() as u64));
            tally
                .lock()
                .expect("no thread panicked")
                .note(key, right, object);
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
        let request = format!("GET /{key} HTTP/1.1\r\nHost: {}\r\n\r\n", self.address);
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if self.stream.read_until(b'\n', &mut head)? == 0 || head.len() > 16 << 10 {
                bail!("{key}: the server closed the connection, or talks nonsense");
            }
        }
        let mut fields = [httparse::EMPTY_HEADER; 32];
        let mut reply = httparse::Response::new(&mut fields);
        reply.parse(&head)?;
        let length = reply
            .headers
            .iter()
            .find(|h| h.name.eq_ignore_ascii_case("content-length"));
        let length = length.and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok());
        let length: usize = length.with_context(|| format!("{key}: a reply without a length"))?;
        let status = reply.code;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        match status {
            Some(200) => Ok(Some(body)),
            Some(404) => Ok(None),
            other => bail!("{key}: status {}", other.unwrap_or(0)),
        }
    }
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
        let keys: Vec<&str> = all.keys().map(String::as_str).collect();
        assert_eq!(keys, ["a-1", "b-2", "c"]);
        assert_eq!(all["a-1"], hash(b"a"));
        assert_eq!(all["c"], hash(b"other"));
        assert!(parse_line("nonsense here").is_err());
    }
}
