// SPDX-License-Identifier: GPL-2.0-only

//! Numbers, times, keys and flows as people read and write them.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use jiff::{fmt::temporal, SignedDuration, Timestamp};
use pmskb_uapi::core::{Addrs, CsumKind, Flow, TimeSource};

use crate::select::Key;

/// `0123...-...` as bytes.
pub fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| {
            c.to_digit(16)
                .map(|d| d as u8)
                .ok_or("a uuid has hexadecimal digits")
        })
        .collect::<Result<_, _>>()?;
    let bytes: Vec<u8> = digits
        .chunks(2)
        .map(|d| (d[0] << 4) | d.get(1).unwrap_or(&0))
        .collect();
    match digits.len() {
        32 => Ok(bytes.try_into().expect("16 bytes")),
        n => Err(format!("a uuid has 32 digits, not {n}")),
    }
}

/// Bytes as a uuid.
pub fn uuid(bytes: &[u8; 16]) -> String {
    let hex = hex(bytes);
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

/// Bytes in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// `4096`, `0x1000`, `4K`, `2M`, `1GiB`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|e| e.to_string());
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(format!("unknown unit {unit:?}: give K, M, G or T")),
    };
    let n: u64 = digits.parse().map_err(|_| "not a number".to_string())?;
    n.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// Bytes, with a binary unit.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].iter();
    let mut unit = units.next().expect("there are some");
    while value >= 1024.0 {
        let Some(next) = units.next() else { break };
        (value, unit) = (value / 1024.0, next);
    }
    match *unit {
        "B" => format!("{bytes} B"),
        unit => format!("{value:.1} {unit}"),
    }
}

/// The same of a difference.
pub fn signed_size(bytes: i128) -> String {
    let size = size(u64::try_from(bytes.unsigned_abs()).unwrap_or(u64::MAX));
    if bytes < 0 {
        format!("-{size}")
    } else {
        size
    }
}

/// Bytes a second: `64M`, `64M/s`.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text.strip_suffix("/s").unwrap_or(text)) {
        Ok(0) => Err("at least 1 byte a second".into()),
        other => other,
    }
}

/// A number with its thousands apart.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `pmskb0` as 0.
pub fn parse_store(text: &str) -> Result<u32, String> {
    pmskb_uapi::store::minor_of(text)
        .ok_or_else(|| "a store is pmskbN; `pmskbctl list` shows those that are attached".into())
}

/// A key as it is printed: `\xNN` for what is not printable, `\\` for a backslash.
pub fn key(key: &[u8]) -> String {
    let mut out = String::with_capacity(key.len());
    for part in key.utf8_chunks() {
        for c in part.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                // Anything that could move the cursor or look like what it is not.
                c if c.is_control() || (c.is_whitespace() && c != ' ') || is_unseen(c) => {
                    let mut bytes = [0; 4];
                    for b in c.encode_utf8(&mut bytes).bytes() {
                        out.push_str(&format!("\\x{b:02x}"));
                    }
                }
                c => out.push(c),
            }
        }
        for b in part.invalid() {
            out.push_str(&format!("\\x{b:02x}"));
        }
    }
    out
}

/// Characters without a width, or that change the direction of what follows (Unicode's
/// `Default_Ignorable_Code_Point` and `Bidi_Control`).
const UNSEEN: [std::ops::RangeInclusive<char>; 15] = [
    '\u{ad}'..='\u{ad}',
    '\u{34f}'..='\u{34f}',
    '\u{61c}'..='\u{61c}',
    '\u{115f}'..='\u{1160}',
    '\u{17b4}'..='\u{17b5}',
    '\u{180b}'..='\u{180f}',
    '\u{200b}'..='\u{200f}',
    '\u{202a}'..='\u{202e}',
    '\u{2060}'..='\u{206f}',
    '\u{3164}'..='\u{3164}',
    '\u{fe00}'..='\u{fe0f}',
    '\u{feff}'..='\u{feff}',
    '\u{ffa0}'..='\u{ffa0}',
    '\u{fff0}'..='\u{fffb}',
    '\u{e0000}'..='\u{e0fff}',
];

fn is_unseen(c: char) -> bool {
    UNSEEN.iter().any(|range| range.contains(&c))
}

/// Whether bytes are text that a terminal prints and nothing else: it obeys some control characters.
pub fn is_plain(bytes: &[u8]) -> bool {
    let plain = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
    bytes
        .utf8_chunks()
        .all(|part| part.valid().chars().all(plain) && part.invalid().iter().all(|b| *b >= 0xa0))
}

/// The opposite of [`key`].
pub fn parse_key(text: &str) -> Result<Key, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [b'\\', tail @ ..]) => {
                out.push(b'\\');
                tail
            }
            (b'\\', [b'x', a, b, tail @ ..]) => {
                let digit = |c: &u8| char::from(*c).to_digit(16).map(|d| d as u8);
                let (Some(a), Some(b)) = (digit(a), digit(b)) else {
                    return Err("\\x is followed by two hexadecimal digits".into());
                };
                out.push((a << 4) | b);
                tail
            }
            (b'\\', _) => return Err("write a backslash as \\\\, a byte as \\xNN".into()),
            (byte, tail) => {
                out.push(*byte);
                tail
            }
        };
    }
    Ok(Key(out))
}

/// Hexadecimal digits as a key.
pub fn parse_hex_key(text: &str) -> Result<Key, String> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    match digits {
        Some(d) if d.len() % 2 == 0 => Ok(Key(d.chunks(2).map(|d| (d[0] << 4) | d[1]).collect())),
        _ => Err("an even number of hexadecimal digits".into()),
    }
}

/// A point in time, or so long ago, as nanoseconds since the epoch.
pub fn parse_time(text: &str) -> Result<u64, String> {
    static PARSER: temporal::DateTimeParser = temporal::DateTimeParser::new();
    let now = Timestamp::now();
    let time = match text {
        "now" => now,
        _ => match PARSER.parse_timestamp(text) {
            Ok(time) => time,
            Err(e) => match ago(text) {
                Some(ago) => now.checked_sub(ago).map_err(|e| e.to_string())?,
                None => {
                    return Err(format!(
                    "{e}\n  give a time as 2026-01-31T12:00:00Z, or how long ago: 30s, 10m, 2h, 1d"
                ))
                }
            },
        },
    };
    u64::try_from(time.as_nanosecond()).map_err(|_| "before 1970".into())
}

/// `10m`, `1.5h`, `2d`
fn ago(text: &str) -> Option<SignedDuration> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
    let (number, unit) = text.split_at(end);
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        "w" => 7.0 * 86400.0,
        _ => return None,
    };
    SignedDuration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

/// Sequence numbers: `N`, `N-M`, `N-`, `-M`. Both ends inclusive.
pub fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let number = |t: &str, default| match t {
        "" => Ok(default),
        t => t
            .parse()
            .map_err(|_| format!("{t:?} is no sequence number")),
    };
    match text.split_once('-') {
        None => {
            let n = number(text, 0)?;
            Ok((n, n))
        }
        Some(("", "")) => Err("a range is N, N-M, N- or -M".into()),
        Some((first, last)) => Ok((number(first, 0)?, number(last, u64::MAX)?)),
    }
}

/// A time with nanoseconds.
pub fn time(nanos: u64) -> String {
    match Timestamp::from_nanosecond(nanos.into()) {
        Ok(time) => format!("{time:.9}"),
        Err(_) => format!("{nanos} ns"),
    }
}

/// A time with microseconds.
pub fn short_time(nanos: u64) -> String {
    match Timestamp::from_nanosecond(nanos.into()) {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%S%.6f").to_string(),
        Err(_) => format!("{nanos} ns"),
    }
}

/// A timestamp's source.
pub fn time_source(source: TimeSource) -> &'static str {
    match source {
        TimeSource::None => "none",
        TimeSource::Hardware => "hardware",
        TimeSource::Software => "software",
        TimeSource::Placement => "placement",
    }
}

/// A checksum's kind.
pub fn csum_kind(kind: CsumKind) -> &'static str {
    match kind {
        CsumKind::None => "none",
        CsumKind::Derived => "derived",
        CsumKind::Hardware => "hardware",
        CsumKind::Computed => "computed",
    }
}

/// Both ends of a flow: where it came from, and where to.
pub fn ends(flow: &Flow) -> (SocketAddr, SocketAddr) {
    let (remote, local): (IpAddr, IpAddr) = match flow.addrs {
        Addrs::V4 { remote, local } => (remote.into(), local.into()),
        Addrs::V6 { remote, local } => (remote.into(), local.into()),
    };
    (
        SocketAddr::new(remote, flow.remote_port),
        SocketAddr::new(local, flow.local_port),
    )
}

/// A flow, from the sender to this host.
pub fn flow(flow: &Option<Flow>) -> String {
    let Some(flow) = flow else { return "-".into() };
    let (remote, local) = ends(flow);
    let protocol = if flow.udp { "udp" } else { "tcp" };
    format!("{protocol} {remote} > {local}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_being_printed() {
        for bytes in [
            &b"plain/key"[..],
            b"a\\b",
            b"\x00\n\x1b[0m",
            b"\xff\xfe",
            "é \u{2028}".as_bytes(),
            "\u{202e}moc\u{2066} \u{200b}".as_bytes(),
        ] {
            let printed = key(bytes);
            assert!(!printed.contains(['\n', '\x1b', '\u{2028}']), "{printed}");
            assert!(
                !printed.contains(['\u{202e}', '\u{2066}', '\u{200b}']),
                "{printed}"
            );
            assert_eq!(parse_key(&printed).unwrap().0, bytes);
        }
        assert!(parse_key("\\q").is_err());
        assert!(parse_key("\\x1").is_err());
        assert_eq!(parse_hex_key("00ff").unwrap().0, [0, 255]);
        assert!(parse_hex_key("0").is_err());
    }

    #[test]
    fn what_a_terminal_obeys_is_not_plain() {
        for plain in [&b""[..], b"a\tb\r\n", "é".as_bytes(), b"\xe9t\xe9"] {
            assert!(is_plain(plain), "{plain:?}");
        }
        for other in [
            &b"\x00"[..],
            b"\x1b[2J",
            b"\x7f",
            b"\x9b2J",
            "\u{9b}2J".as_bytes(),
        ] {
            assert!(!is_plain(other), "{other:?}");
        }
    }

    #[test]
    fn times_are_absolute_or_so_long_ago() {
        assert_eq!(parse_time("1970-01-01T00:00:01Z").unwrap(), 1_000_000_000);
        assert_eq!(
            parse_time("1970-01-01T01:00:00.5+01:00").unwrap(),
            500_000_000
        );
        let now = Timestamp::now().as_nanosecond() as u64;
        for (text, seconds) in [("10m", 600), ("1.5h", 5400), ("2d", 172_800)] {
            let ago = now - parse_time(text).unwrap();
            assert!(
                ago.abs_diff(seconds * 1_000_000_000) < 5_000_000_000,
                "{text}: {ago}"
            );
        }
        for text in ["", "yesterday", "10", "10 parsecs", "1969-01-01T00:00:00Z"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_ranges() {
        assert_eq!(parse_size("2M"), Ok(2 << 20));
        assert_eq!(parse_size("4KiB"), Ok(4096));
        assert_eq!(parse_size("0x10"), Ok(16));
        assert!(parse_size("1X").is_err() && parse_size("").is_err());
        assert!(parse_size("99999999999T").is_err());
        assert_eq!(parse_rate("64K/s"), Ok(64 << 10));
        assert!(parse_rate("0").is_err() && parse_rate("/s").is_err());
        assert_eq!(signed_size(-1536), "-1.5 KiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(parse_range("5"), Ok((5, 5)));
        assert_eq!(parse_range("5-"), Ok((5, u64::MAX)));
        assert_eq!(parse_range("-7"), Ok((0, 7)));
        assert_eq!(parse_range("5-7"), Ok((5, 7)));
        assert!(parse_range("-").is_err() && parse_range("a").is_err());
    }

    #[test]
    fn uuids() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(uuid(&parse_uuid(text).unwrap()), text);
        assert!(parse_uuid("00").is_err() && parse_uuid("x").is_err());
    }
}
