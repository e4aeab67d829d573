// SPDX-License-Identifier: GPL-2.0-only

//! Packets as bytes, right ones and those that nobody sends.

use pmskb_uapi::core::{
    csum::{pseudo_v4, pseudo_v6, Sum},
    sim::Rng,
};

use crate::run::{one_in, pick, random};

/// Flags of TCP.
pub const FIN: u8 = 1;
/// Of the first segment.
pub const SYN: u8 = 2;
/// It ends at once.
pub const RST: u8 = 4;
/// The acknowledgement is one.
pub const ACK: u8 = 16;
/// The urgent pointer is one.
pub const URG: u8 = 32;

/// Addresses: the peer's, and those of the host's side.
#[derive(Clone, Copy)]
pub struct Path {
    /// IPv4, not IPv6.
    pub v4: bool,
    /// Both addresses, of which IPv4 uses four bytes.
    pub peer: [u8; 16],
    /// The host's.
    pub host: [u8; 16],
}

impl Path {
    fn four(from: &[u8; 16]) -> [u8; 4] {
        [from[0], from[1], from[2], from[3]]
    }

    fn pseudo(&self, protocol: u8, len: u32) -> Sum {
        if self.v4 {
            pseudo_v4(
                Self::four(&self.peer),
                Self::four(&self.host),
                protocol,
                len,
            )
        } else {
            pseudo_v6(&self.peer, &self.host, protocol, len)
        }
    }
}

/// What the checksum of a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    /// Right.
    Right,
    /// Wrong, so that the transport must not take the packet.
    Wrong,
    /// To be filled in by the device: the pseudo header's sum.
    Partial,
    /// Wrong, and the device says that it is right.
    Vouched,
    /// None, of UDP.
    None,
}

/// The header that a packet has on a device with IFF_VNET_HDR.
#[derive(Clone, Copy, Default, Debug)]
pub struct Vnet {
    /// 1: the checksum is to be filled in; 2: it was found right.
    pub flags: u8,
    /// 1 TCPv4, 3 UDP, 4 TCPv6, 5 UDP_L4; 0x80 ECN.
    pub gso_type: u8,
    /// Of all headers.
    pub hdr_len: u16,
    /// Payload of a segment.
    pub gso_size: u16,
    /// Where the sum begins.
    pub csum_start: u16,
    /// And where it goes, from there.
    pub csum_offset: u16,
}

impl Vnet {
    fn bytes(&self) -> [u8; 10] {
        let mut out = [0; 10];
        out[0] = self.flags;
        out[1] = self.gso_type;
        for (at, word) in [
            (2, self.hdr_len),
            (4, self.gso_size),
            (6, self.csum_start),
            (8, self.csum_offset),
        ] {
            out[at..at + 2].copy_from_slice(&word.to_ne_bytes());
        }
        out
    }

    /// One or more of its fields as a hostile guest has them.
    pub fn hostile(&mut self, rng: &mut Rng, len: usize) {
        let len = len as u64;
        let odd = |rng: &mut Rng| {
            let near = [
                0,
                1,
                2,
                7,
                8,
                20,
                40,
                54,
                64,
                536,
                1448,
                len - 1,
                len,
                len + 1,
                0x7fff,
                0xffff,
            ];
            if one_in(rng, 4) {
                rng.next() as u16
            } else {
                *pick(rng, &near) as u16
            }
        };
        for _ in 0..=rng.below(3) {
            match rng.below(6) {
                0 => self.flags = *pick(rng, &[0, 1, 2, 3, 4, 0xff]),
                1 => self.gso_type = *pick(rng, &[0, 1, 3, 4, 5, 0x81, 0x84, 0x80, 0xff]),
                2 => self.hdr_len = odd(rng),
                3 => self.gso_size = odd(rng),
                4 => self.csum_start = odd(rng),
                _ => self.csum_offset = odd(rng),
            }
        }
    }
}

/// A transport header and what follows it.
pub fn tcp(
    ports: (u16, u16),
    seq: u32,
    ack: u32,
    flags: u8,
    urgent: u16,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + options.len() + payload.len());
    out.extend(ports.0.to_be_bytes());
    out.extend(ports.1.to_be_bytes());
    out.extend(seq.to_be_bytes());
    out.extend(ack.to_be_bytes());
    out.push((((20 + options.len()) / 4) << 4) as u8);
    out.push(flags);
    out.extend(60000u16.to_be_bytes());
    out.extend([0, 0]);
    out.extend(urgent.to_be_bytes());
    out.extend(options);
    out.extend(payload);
    out
}

/// A datagram whose length field says `len`.
pub fn udp(ports: (u16, u16), len: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + payload.len());
    out.extend(ports.0.to_be_bytes());
    out.extend(ports.1.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend([0, 0]);
    out.extend(payload);
    out
}

/// What is around a transport's bytes.
#[derive(Default)]
pub struct Around {
    /// IPv4: options. IPv6: extension headers, each with its own number first.
    pub options: Vec<(u8, Vec<u8>)>,
    /// Bytes in a fragment; 0 for none.
    pub fragment: usize,
    /// The order of fragments: as they are, or from the last on.
    pub backwards: bool,
    /// Pieces overlap by so many bytes.
    pub overlap: usize,
}

/// Sums a transport's bytes up and makes packets of them, each with its vnet header.
pub fn packets(
    path: &Path,
    protocol: u8,
    mut body: Vec<u8>,
    check: Check,
    around: &Around,
    id: u16,
    segment: u16,
) -> Vec<(Vnet, Vec<u8>)> {
    let at = if protocol == 6 { 16 } else { 6 };
    let pseudo = path.pseudo(protocol, body.len() as u32);
    let right = !(pseudo + Sum::of(&body)).get();
    let field = match check {
        Check::Right => right,
        Check::Wrong | Check::Vouched => {
            let wrong = right ^ 0x0101;
            // Of UDP, 0 is none; and both zeroes are one.
            if [0, 0xffff].contains(&wrong) || [0, 0xffff].contains(&right) {
                0x1234
            } else {
                wrong
            }
        }
        Check::Partial => pseudo.get(),
        Check::None => 0,
    };
    let field = if protocol == 17 && field == 0 && check != Check::None {
        0xffff
    } else {
        field
    };
    if let Some(to) = body.get_mut(at..at + 2) {
        to.copy_from_slice(&field.to_be_bytes());
    }
    let mut vnet = Vnet::default();
    let header = if protocol == 6 {
        (body[12] >> 4) as usize * 4
    } else {
        8
    };
    let outer: usize = if path.v4 {
        20 + around
            .options
            .iter()
            .map(|o| o.1.len())
            .sum::<usize>()
            .next_multiple_of(4)
    } else {
        40 + around.options.iter().map(|o| o.1.len()).sum::<usize>()
    };
    match check {
        Check::Partial if around.fragment == 0 => {
            vnet.flags = 1;
            vnet.csum_start = outer as u16;
            vnet.csum_offset = at as u16;
            if segment > 0 && body.len() > header + segment as usize {
                vnet.gso_type = match (protocol, path.v4) {
                    (6, true) => 1,
                    (6, false) => 4,
                    _ => 5,
                };
                vnet.gso_size = segment;
                vnet.hdr_len = (outer + header) as u16;
            }
        }
        Check::Vouched => vnet.flags = 2,
        _ => (),
    }
    let whole = around.fragment == 0;
    let step = if whole {
        body.len().max(1)
    } else {
        around.fragment.next_multiple_of(8).max(8)
    };
    let mut pieces: Vec<usize> = (0..body.len().max(1)).step_by(step).collect();
    if around.backwards {
        pieces.reverse();
    }
    pieces
        .into_iter()
        .map(|off| {
            let end = (off + step + around.overlap).min(body.len());
            let end = if end < body.len() {
                off + (end - off) / 8 * 8
            } else {
                end
            };
            let more = end < body.len();
            (
                vnet,
                one(
                    path,
                    protocol,
                    &body[off..end],
                    around,
                    id,
                    whole,
                    off,
                    more,
                ),
            )
        })
        .collect()
}

#[allow(clippy::too_many_arguments)]
fn one(
    path: &Path,
    protocol: u8,
    body: &[u8],
    around: &Around,
    id: u16,
    whole: bool,
    off: usize,
    more: bool,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(100 + body.len());
    if path.v4 {
        let mut options: Vec<u8> = around.options.iter().flat_map(|o| o.1.clone()).collect();
        options.resize(options.len().next_multiple_of(4).min(40), 1);
        let head = 20 + options.len();
        out.push(0x40 | (head / 4) as u8);
        out.push(0);
        out.extend(((head + body.len()) as u16).to_be_bytes());
        out.extend(id.to_be_bytes());
        out.extend(((off / 8) as u16 | if more { 0x2000 } else { 0 }).to_be_bytes());
        out.extend([64, protocol, 0, 0]);
        out.extend(&path.peer[..4]);
        out.extend(&path.host[..4]);
        out.extend(&options);
        let sum = Sum::of(&out).field();
        out[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        let mut chain: Vec<(u8, Vec<u8>)> = around.options.clone();
        if !whole {
            let mut frag = vec![0, 0];
            frag.extend((off as u16 | u16::from(more)).to_be_bytes());
            frag.extend([0, 0]);
            frag.extend(id.to_be_bytes());
            chain.push((44, frag));
        }
        let len: usize = chain.iter().map(|h| h.1.len()).sum();
        out.extend([0x60, 0, 0, 0]);
        out.extend(((len + body.len()) as u16).to_be_bytes());
        out.push(chain.first().map_or(protocol, |h| h.0));
        out.push(64);
        out.extend(path.peer);
        out.extend(path.host);
        for n in 0..chain.len() {
            let next = chain.get(n + 1).map_or(protocol, |h| h.0);
            let header = &mut chain[n].1;
            if let Some(first) = header.first_mut() {
                *first = next;
            }
            out.extend(header.iter());
        }
    }
    out.extend(body);
    out
}

/// Extension headers or options, right ones for the most part.
pub fn options(rng: &mut Rng, v4: bool) -> Vec<(u8, Vec<u8>)> {
    (0..rng.below(3))
        .map(|_| {
            if v4 {
                let router_alert = vec![148, 4, 0, 0];
                let record = vec![7, 7, 4, 0, 0, 0, 0, 1];
                let stamp = vec![68, 8, 5, 0, 0, 0, 0, 0];
                let all = [
                    router_alert,
                    record,
                    stamp,
                    vec![1, 1, 1, 1],
                    random(rng, 8),
                ];
                (0, pick(rng, &all).clone())
            } else {
                let number = *pick(rng, &[0, 60, 60, 43, 51, 135]);
                let lines = rng.below(3) as usize;
                let mut header = vec![0; 8 + 8 * lines];
                header[1] = lines as u8;
                // Padding: one option of all of it.
                header[2] = 1;
                header[3] = (4 + 8 * lines) as u8;
                if one_in(rng, 6) {
                    header = random(rng, 8 + 8 * lines);
                    header[1] = *pick(rng, &[0, lines as u8, 255]);
                }
                (number, header)
            }
        })
        .collect()
}

/// Makes something wrong in a packet's first bytes, or in its length.
pub fn hurt(rng: &mut Rng, packet: &mut Vec<u8>) {
    for _ in 0..=rng.below(3) {
        if packet.is_empty() {
            return;
        }
        let near = packet.len().min(96) as u64;
        let at = rng.below(near) as usize;
        match rng.below(7) {
            0 => packet[at] ^= 1 << rng.below(8),
            1 => packet[at] = rng.next() as u8,
            2 => packet[at] = *pick(rng, &[0, 1, 0x7f, 0x80, 0xff]),
            3 => packet.truncate(at.max(1)),
            4 => packet.truncate(packet.len() - 1),
            5 => {
                let more = rng.below(64) as usize;
                packet.extend(random(rng, more).iter().map(|b| b & 0x3f | 0x40));
            }
            _ => {
                let len = (packet.len() as u16)
                    .wrapping_add(*pick(rng, &[0u16, 1, 8, 0xffff, 0xfff8, 1000]));
                let at = if packet[0] >> 4 == 4 { 2 } else { 4 };
                if let Some(to) = packet.get_mut(at..at + 2) {
                    to.copy_from_slice(&len.to_be_bytes());
                }
            }
        }
    }
    // Else nothing behind the header is ever looked at.
    if packet.is_empty() {
        return;
    }
    if packet[0] >> 4 == 4 && packet.len() >= 20 && !one_in(rng, 8) {
        let head = ((packet[0] & 15) as usize * 4).clamp(20, packet.len());
        packet[10..12].fill(0);
        let sum = Sum::of(&packet[..head]).field();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// A packet as it is written to the device.
pub fn framed(vnet: &Vnet, packet: &[u8]) -> Vec<u8> {
    let mut out = vnet.bytes().to_vec();
    out.extend(packet);
    out
}

/// What TCP has said: its number behind what it sent, what it has acknowledged, flags.
pub struct Said {
    /// Number of the next byte from there.
    pub next: u32,
    /// What it has acknowledged, if it has.
    pub acked: Option<u32>,
    /// Of TCP.
    pub flags: u8,
}

/// A packet from the device, with vnet header, if it is TCP from `ports.1` to `ports.0`.
pub fn heard(framed: &[u8], ports: (u16, u16)) -> Option<Said> {
    let packet = framed.get(10..)?;
    let (head, protocol, len) = match packet.first()? >> 4 {
        4 => ((packet[0] & 15) as usize * 4, *packet.get(9)?, packet.len()),
        _ => (40, *packet.get(6)?, packet.len()),
    };
    let t = packet.get(head..)?;
    if protocol != 6
        || t.len() < 20
        || t[..2] != ports.1.to_be_bytes()
        || t[2..4] != ports.0.to_be_bytes()
    {
        return None;
    }
    let word = |at: usize| u32::from_be_bytes([t[at], t[at + 1], t[at + 2], t[at + 3]]);
    let data = (len - head).saturating_sub((t[12] >> 4) as usize * 4) as u32;
    let flags = t[13];
    let more = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    Some(Said {
        next: word(4).wrapping_add(data + more),
        acked: (flags & ACK != 0).then(|| word(8)),
        flags,
    })
}
