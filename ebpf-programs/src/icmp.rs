//! ICMP errors about packets of flows: what they quote is turned back to what its sender had sent.

use ebpf_common::{
    ICMP, ICMPV6, SCTP, TCP, UDP,
    addr::Addr,
    conntrack::{Flow, FlowKey},
    packet::{IPV4_LEN, IPV6_LEN, Icmp, add, checksum_after_change, is_fragment},
    verdict::DropReason,
};

use crate::{
    frame::{Frame, Sum},
    helpers, maps,
    nat::Step,
    packet::{EXTENSIONS, FRAGMENT, Packet, is_extension},
    rewrite,
};

/// Bytes of an ICMP header, after which the quoted packet begins.
const ICMP_LEN: usize = 8;

/// A quoted packet.
#[repr(C)]
pub struct Quote {
    /// The flow of answers to it.
    answer: FlowKey,
    /// Offset of its IP header.
    l3: u32,
    /// Offset of its transport's header.
    l4: u32,
}

/// Translates an error about a packet of a known flow: the quoted packet was translated by one row,
/// the other one turns it and the error back.
#[inline(always)]
pub fn follow<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow) -> Step {
    let found = try_follow(frame, packet, flow);
    Step::of(found, &packet.key)
}

#[inline(always)]
fn try_follow<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow) -> Result<bool, DropReason> {
    let mut quote = Quote { answer: FlowKey::default(), l3: 0, l4: 0 };
    if !frame.quote(packet, &mut quote)? {
        return Ok(false);
    }
    let Some(row) = maps::flow(&quote.answer) else { return Ok(false) };
    *flow = *row;
    // Who sent the quoted packet's answer may have sent the error too; a router keeps its name.
    if packet.key.src != quote.answer.src {
        flow.src = packet.key.src;
    }
    let total = turn_back(frame, &quote, row)?;
    let v6 = !flow.dst.is_v4();
    let sum = Sum { at: packet.l4 as usize + 2, pseudo: false, zero_is_none: false, v6 };
    frame.fold(sum, total)?;
    let outer = helpers::address_difference(&packet.key, flow);
    if v6 {
        frame.fold(Sum { pseudo: true, ..sum }, outer)?;
    }
    rewrite::set_addresses(frame, flow, outer)?;
    Ok(true)
}

/// Reads the quoted packet: whether there is one that may have a flow.
#[inline(always)]
pub fn read<F: Frame>(frame: &F, packet: &Packet, quote: &mut Quote) -> Result<bool, DropReason> {
    let l3 = packet.l4 as usize + ICMP_LEN;
    quote.l3 = l3 as u32;
    if packet.key.dst.is_v4() { quoted_v4(frame, quote) } else { quoted_v6(frame, quote) }
}

#[inline(always)]
fn quoted_v4<F: Frame>(frame: &F, quote: &mut Quote) -> Result<bool, DropReason> {
    let header: [u8; IPV4_LEN] = frame.load(quote.l3 as usize)?;
    let length = u32::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || length < IPV4_LEN as u32 {
        return Err(DropReason::Malformed);
    }
    // A later fragment has no ports to go by.
    if is_fragment([header[6] & 0x1f, header[7]]) {
        return Ok(false);
    }
    // The answer goes the other way round.
    quote.answer.dst = Addr::v4([header[12], header[13], header[14], header[15]]);
    quote.answer.src = Addr::v4([header[16], header[17], header[18], header[19]]);
    quote.answer.proto = header[9];
    quote.l4 = quote.l3 + length;
    ports(frame, quote)
}

#[inline(always)]
fn quoted_v6<F: Frame>(frame: &F, quote: &mut Quote) -> Result<bool, DropReason> {
    let header: [u32; 10] = frame.load(quote.l3 as usize)?;
    quote.answer.dst = Addr::from_words([header[2], header[3], header[4], header[5]]);
    quote.answer.src = Addr::from_words([header[6], header[7], header[8], header[9]]);
    let [_, _, next, _] = header[1].to_ne_bytes();
    quote.answer.proto = next;
    quote.l4 = quote.l3 + IPV6_LEN as u32;
    if is_extension(next) && !extensions(frame, quote)? {
        return Ok(false);
    }
    ports(frame, quote)
}

/// Steps over a quoted packet's extension headers, as its own hop would; false for one whose ports do not follow.
#[inline(always)]
fn extensions<F: Frame>(frame: &F, quote: &mut Quote) -> Result<bool, DropReason> {
    let mut step = 0;
    while step < EXTENSIONS {
        let header: [u8; 8] = frame.load(quote.l4 as usize)?;
        let is_fragment = quote.answer.proto == FRAGMENT;
        // A later one has no ports to go by.
        if is_fragment && [header[2], header[3] & 0xf8] != [0; 2] {
            return Ok(false);
        }
        quote.l4 += if is_fragment { 8 } else { (u32::from(header[1]) + 1) * 8 };
        quote.answer.proto = header[0];
        if !is_extension(header[0]) {
            return Ok(true);
        }
        step += 1;
    }
    Ok(false)
}

/// Reads the ports; false for a packet without.
#[inline(always)]
fn ports<F: Frame>(frame: &F, quote: &mut Quote) -> Result<bool, DropReason> {
    let proto = quote.answer.proto;
    if !matches!(proto, TCP | UDP | SCTP | ICMP | ICMPV6) {
        // Nothing may follow, as where an IPv6 header says that there is no next one.
        return Ok(false);
    }
    // RFC 792 promises eight bytes of the transport.
    let head: [u8; 8] = frame.load(quote.l4 as usize)?;
    let (sport, dport) = match proto {
        TCP | UDP | SCTP => ([head[0], head[1]], [head[2], head[3]]),
        ICMP | ICMPV6 => match Icmp::of(proto, head[0]) {
            Icmp::Request => ([head[4], head[5]], [0; 2]),
            Icmp::Reply => ([0; 2], [head[4], head[5]]),
            Icmp::Error | Icmp::Other => return Ok(false),
        },
        _ => return Ok(false),
    };
    quote.answer.sport = dport;
    quote.answer.dport = sport;
    Ok(true)
}

/// Rewrites the quoted packet; gives what the sum of its bytes went up by.
#[inline(always)]
fn turn_back<F: Frame>(frame: &F, quote: &Quote, row: &Flow) -> Result<u32, DropReason> {
    let answer = &quote.answer;
    let (l3, l4) = (quote.l3 as usize, quote.l4 as usize);
    let v6 = !answer.dst.is_v4();
    // The quoted packet has source and destination the other way round; sums do not mind.
    let addresses = helpers::address_difference(answer, row);
    let ports = helpers::port_difference(answer, row);
    let new_ports = [row.dport, row.sport];
    // An IPv4 header sums up to the same as before, its checksum sees to that.
    let mut total = if v6 { add(addresses, ports) } else { ports };
    let (at, covers_addresses) = match answer.proto {
        TCP => (l4 + 16, true),
        UDP => (l4 + 6, true),
        ICMP => (l4 + 2, false),
        ICMPV6 => (l4 + 2, true),
        _ => (0, false),
    };
    let covered = if covers_addresses { add(addresses, ports) } else { ports };
    // TCP's checksum lies beyond the eight bytes that are sure to be quoted.
    if at != 0
        && let Ok(old) = frame.load::<[u8; 2]>(at)
        && (answer.proto != UDP || old != [0; 2])
    {
        let mut changed = checksum_after_change(old, covered);
        if answer.proto == UDP && changed == [0; 2] {
            changed = [0xff; 2];
        }
        frame.store(at, &changed)?;
        total = add(total, !covered);
    }
    match answer.proto {
        ICMP | ICMPV6 => frame.store(l4 + 4, &rewrite::identifier(new_ports))?,
        _ => frame.store(l4, &new_ports)?,
    }
    if v6 {
        frame.store(l3 + 8, &row.dst)?;
        frame.store(l3 + 24, &row.src)?;
    } else {
        let old: [u8; 2] = frame.load(l3 + 10)?;
        frame.store(l3 + 10, &checksum_after_change(old, addresses))?;
        frame.store(l3 + 12, &row.dst.v4_octets())?;
        frame.store(l3 + 16, &row.src.v4_octets())?;
    }
    Ok(total)
}
