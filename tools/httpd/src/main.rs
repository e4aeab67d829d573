// SPDX-License-Identifier: GPL-2.0-only

//! `pmskb-httpd`: the server as a program.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::{
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    os::unix::net::{UnixDatagram, UnixStream},
    path::PathBuf,
    time::Duration,
};

use anyhow::{bail, Context};
use clap::Parser;
use pmskb_uapi::Store;

use pmskb_httpd::{
    conn, epoll,
    server::{self, Server},
    store, uring,
};

/// Serves a pmskb store over HTTP/1.1.
///
/// PUT or POST /KEY makes the body durable where it was received, and answers 201
/// (200 if it replaces another) when it is. GET /KEY sends it, DELETE /KEY removes it,
/// GET /?prefix=P lists keys.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address and port to listen on; may be repeated
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:8080")]
    listen: Vec<SocketAddr>,
    /// The store: pmskbN; by default the only one that is attached
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// What drives the server
    #[arg(long, value_enum, value_name = "ENGINE", default_value_t = EngineName::Epoll)]
    engine: EngineName,
    /// With io_uring: microseconds that a turn waits until a quarter of the clients have
    /// something
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    gather: u64,
    /// Largest body, bytes
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20,
          value_parser = clap::value_parser!(u64).range(0..=1 << 30))]
    max_body: u64,
    /// Most connections at a time; more wait to be accepted
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    max_connections: usize,
    /// Seconds that a client may take for a request's head
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    head_timeout: u64,
    /// Seconds without any byte of a body, or of a reply taken
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    stall_timeout: u64,
    /// Seconds between requests
    #[arg(long, value_name = "SECONDS", default_value_t = 75)]
    idle_timeout: u64,
    /// An inherited descriptor to write a line to when listening
    #[arg(long, value_name = "FD")]
    ready_fd: Option<u32>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum EngineName {
    Epoll,
    Uring,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();

    raise_file_limit();
    let (stop, stopper) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, stopper.try_clone()?)?;
    }

    let device = store::Device::open(open_store(args.store.as_deref())?)?;
    let path = device.store().path().display().to_string();
    let limits = conn::Limits {
        max_body: args.max_body,
        head: Duration::from_secs(args.head_timeout),
        stall: Duration::from_secs(args.stall_timeout),
        idle: Duration::from_secs(args.idle_timeout),
    };
    let max = args.max_connections;
    let mut server: Box<dyn server::Engine> = match args.engine {
        EngineName::Epoll => {
            let server = Server::new(device, &args.listen, limits, max, stop)?;
            Box::new(epoll::Epoll::new(server)?)
        }
        EngineName::Uring => {
            let server = Server::new(device, &args.listen, limits, max, stop)?;
            let gather = Duration::from_micros(args.gather);
            Box::new(uring::Uring::new(server, gather)?)
        }
    };
    for address in server.addresses()? {
        tracing::info!("{path} is served on http://{address}/");
        println!("listening on {address}");
    }
    std::io::stdout().flush()?;
    tell_ready(args.ready_fd)?;
    server.run()
}

fn open_store(name: Option<&str>) -> anyhow::Result<Store> {
    if let Some(name) = name {
        return Ok(match pmskb_uapi::store::minor_of(name) {
            Some(minor) => Store::open_minor(minor)?,
            None => Store::open(&PathBuf::from(name))?,
        });
    }
    match pmskb_uapi::store::attached()[..] {
        [minor] => Ok(Store::open_minor(minor)?),
        [] => bail!("no store is attached\n  `pmskbctl attach DEVICE` attaches one"),
        _ => bail!("more than one store is attached\n  say which with --store pmskbN"),
    }
}

/// Tells whoever started the server that it listens.
fn tell_ready(fd: Option<u32>) -> anyhow::Result<()> {
    if let Some(fd) = fd {
        std::fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{fd}"))
            .and_then(|mut f| f.write_all(b"ready\n"))
            .with_context(|| format!("cannot write to --ready-fd {fd}"))?;
    }
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET") {
        let _ = UnixDatagram::unbound().and_then(|s| s.send_to(b"READY=1", PathBuf::from(path)));
    }
    Ok(())
}

/// As many connections as are allowed.
fn raise_file_limit() {
    use rustix::process::{getrlimit, setrlimit, Resource};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
