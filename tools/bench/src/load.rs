// SPDX-License-Identifier: GPL-2.0-only
//! The client: some connections, each with one POST at a time. It marks the window of the meter
//! from one reply to another, in the middle of steady traffic.

use anyhow::{Context, Result, bail, ensure};
use pmskb_meter::mark::Mark;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventFlags};
use serde::Serialize;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// What `load` is told.
#[derive(clap::Args)]
pub struct Args {
    /// The server
    #[arg(long, value_name = "ADDR:PORT")]
    connect: SocketAddr,
    /// Connections
    #[arg(long, value_name = "N", default_value_t = 1)]
    connections: usize,
    /// Requests in the window
    #[arg(long, value_name = "N", default_value_t = 1000)]
    requests: u64,
    /// Requests before it
    #[arg(long, value_name = "N", default_value_t = 200)]
    warmup: u64,
    /// Bytes of a body
    #[arg(long, value_name = "BYTES", default_value_t = 1024)]
    body: usize,
    /// The byte that bodies are made of
    #[arg(long, value_name = "N", default_value_t = 0x7e)]
    fill: u8,
    /// The window's number; without it the meter is told nothing
    #[arg(long, value_name = "N")]
    window: Option<u64>,
    /// Where the keys begin: another number makes others
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Keys to look up at the end, and to compare what they have
    #[arg(long, value_name = "N", default_value_t = 0)]
    check: u64,
}

/// What a run was, on standard output.
#[derive(Serialize)]
struct Done {
    window: Option<u64>,
    requests: u64,
    connections: usize,
    body: usize,
    seconds: f64,
    /// Of the requests in the window, from the first byte sent to the last one received.
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
    checked: u64,
}

struct Connection {
    stream: TcpStream,
    request: Vec<u8>,
    /// Bytes of the request that were sent.
    sent: usize,
    reply: Vec<u8>,
    asked: Instant,
}

/// The key with a number: 16 bytes, in no order.
fn key(seed: u64, number: u64) -> String {
    let mut z = ((seed << 32) | number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^= z >> 27;
    format!("k{:015x}", z >> 4)
}

/// A request's head.
fn head(key: &str, body: usize) -> String {
    format!("POST /{key} HTTP/1.1\r\nHost: bench\r\nContent-Length: {body}\r\n\r\n")
}

/// The length of the head of a request with a body of so many bytes.
pub fn head_len(body: u64) -> usize {
    head(&key(0, 0), body as usize).len()
}

/// Where a reply ends: its length, and whether it was a success. `None`: not all of it is there.
fn reply_end(bytes: &[u8]) -> Result<Option<(usize, bool)>> {
    let Some(head) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&bytes[..head]).context("a reply's head is no text")?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|l| l.split(' ').nth(1));
    let status: u16 = status.context("a reply has no status")?.parse()?;
    let mut len = 0;
    for line in lines {
        if let Some((name, value)) = line.split_once(':') {
            if name.eq_ignore_ascii_case("content-length") {
                len = value.trim().parse()?;
            }
        }
    }
    let end = head + 4 + len;
    Ok((bytes.len() >= end).then_some((end, (200..300).contains(&status))))
}

impl Connection {
    fn new(address: SocketAddr) -> Result<Self> {
        let stream =
            TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            request: Vec::new(),
            sent: 0,
            reply: Vec::with_capacity(4096),
            asked: Instant::now(),
        })
    }

    fn ask(&mut self, key: &str, body: &[u8]) -> Result<()> {
        self.request.clear();
        self.sent = 0;
        self.request.extend(head(key, body.len()).as_bytes());
        self.request.extend_from_slice(body);
        self.asked = Instant::now();
        self.send()
    }

    fn send(&mut self) -> Result<()> {
        while self.sent < self.request.len() {
            match self.stream.write(&self.request[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).context("cannot send"),
            }
        }
        Ok(())
    }

    /// Receives; true when the reply is complete.
    fn receive(&mut self) -> Result<bool> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the server has closed the connection"),
                Ok(n) => self.reply.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e).context("cannot receive"),
            }
            if let Some((end, success)) = reply_end(&self.reply)? {
                ensure!(success, "refused: {}", String::from_utf8_lossy(&self.reply));
                ensure!(end == self.reply.len(), "more than a reply");
                self.reply.clear();
                return Ok(true);
            }
        }
    }
}

/// So many percent of these, which are in order, are not longer; in microseconds.
fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).map_or(0.0, |d| d.as_secs_f64() * 1e6)
}

/// Looks some of the keys up, over a connection of its own.
fn check(args: &Args, total: u64) -> Result<u64> {
    let mut stream = TcpStream::connect(args.connect)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let step = (total / args.check.max(1)).max(1);
    let mut checked = 0;
    for number in (0..total).step_by(step as usize).take(args.check as usize) {
        let key = key(args.seed, number);
        write!(stream, "GET /{key} HTTP/1.1\r\nHost: bench\r\n\r\n")?;
        let mut reply = Vec::new();
        let mut buffer = [0; 16384];
        let (end, success) = loop {
            let n = stream.read(&mut buffer)?;
            ensure!(n > 0, "the server has closed the connection");
            reply.extend_from_slice(&buffer[..n]);
            if let Some(end) = reply_end(&reply)? {
                break end;
            }
        };
        ensure!(success, "{key}: {}", String::from_utf8_lossy(&reply));
        let body = &reply[end - args.body..end];
        ensure!(
            body.iter().all(|&b| b == args.fill),
            "{key} has other bytes"
        );
        checked += 1;
    }
    Ok(checked)
}

pub fn run(args: &Args) -> Result<()> {
    let total = args.warmup + args.requests;
    ensure!(
        args.connections > 0,
        "without connections nothing can be sent"
    );
    ensure!(
        args.warmup > 0,
        "the window begins with a reply: warm up with one at least"
    );
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut connections = Vec::new();
    for index in 0..args.connections {
        let connection = Connection::new(args.connect)?;
        let name = epoll::EventData::new_u64(index as u64);
        epoll::add(&epoll, &connection.stream, name, EventFlags::IN)?;
        connections.push(connection);
    }
    let body = vec![args.fill; args.body];
    let (mut asked, mut answered) = (0, 0);
    for connection in &mut connections {
        connection.ask(&key(args.seed, asked), &body)?;
        asked += 1;
    }
    let mut start = Instant::now();
    let mut seconds = 0.0;
    let mut latencies = Vec::with_capacity(args.requests as usize);
    let mut events = Vec::with_capacity(256);
    // Traffic goes on until the window has ended; only then it ebbs.
    while answered < asked {
        events.clear();
        // A request that did not fit the socket's buffer is gone on with in a moment.
        let blocked = connections.iter().any(|c| c.sent < c.request.len());
        let moment = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 100_000,
        };
        let timeout = blocked.then_some(&moment);
        match epoll::wait(&epoll, spare_capacity(&mut events), timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("epoll_wait"),
        }
        if blocked {
            for connection in &mut connections {
                connection.send()?;
            }
        }
        for event in &events {
            let connection = &mut connections[event.data.u64() as usize];
            if !connection.receive()? {
                continue;
            }
            answered += 1;
            if answered > args.warmup && answered <= total {
                latencies.push(connection.asked.elapsed());
            }
            if answered == args.warmup {
                start = Instant::now();
                if let Some(number) = args.window {
                    Mark::Begin(number).make();
                }
            }
            if answered == total {
                if args.window.is_some() {
                    Mark::End.make();
                }
                seconds = start.elapsed().as_secs_f64();
            }
            if answered < total {
                connection.ask(&key(args.seed, asked), &body)?;
                asked += 1;
            }
        }
    }
    drop(connections);
    latencies.sort();
    let checked = check(args, total)?;
    let done = Done {
        window: args.window,
        requests: args.requests,
        connections: args.connections,
        body: args.body,
        seconds,
        mean_us: latencies.iter().sum::<Duration>().as_secs_f64() * 1e6 / args.requests as f64,
        p50_us: percentile(&latencies, 50),
        p99_us: percentile(&latencies, 99),
        checked,
    };
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn keys_are_all_different_and_16_bytes() {
        let mut seen = HashSet::new();
        for seed in 0..3 {
            for number in 0..20_000 {
                let key = key(seed, number);
                assert_eq!(key.len(), 16);
                assert!(seen.insert(key));
            }
        }
    }

    #[test]
    fn percentiles_are_of_what_is_there() {
        let times: Vec<_> = (1..=200).map(Duration::from_micros).collect();
        assert_eq!(percentile(&times, 50).round(), 100.0);
        assert_eq!(percentile(&times, 99).round(), 198.0);
        assert_eq!(percentile(&times[..1], 99).round(), 1.0);
        assert_eq!(percentile(&[], 50), 0.0);
    }

    #[test]
    fn a_reply_ends_where_its_length_says() {
        let reply = b"HTTP/1.1 201 Created\r\nX: y\r\ncontent-length: 3\r\n\r\nabc";
        for cut in 0..reply.len() {
            assert_eq!(reply_end(&reply[..cut]).unwrap(), None, "{cut}");
        }
        assert_eq!(reply_end(reply).unwrap(), Some((reply.len(), true)));
        let two = [&reply[..], b"HTTP"].concat();
        assert_eq!(reply_end(&two).unwrap(), Some((reply.len(), true)));
        let refused = b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(reply_end(refused).unwrap(), Some((refused.len(), false)));
        assert!(reply_end(b"nonsense\r\n\r\n").is_err());
    }
}
