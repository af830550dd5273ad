//! Tells a client at once that nobody answers: ICMP port unreachable, as kube-proxy's REJECT does. And tells
//! who sends what is larger than its way out how much that takes, and who sends where no way leads that.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    ICMP, ICMPV6,
    addr::Addr,
    packet::{
        ETH_IPV4, ETH_IPV6, ETH_LEN, IPV4_LEN, IPV6_LEN, TCP_RST, add, checksum_after_change,
        is_group,
    },
    verdict::DropReason,
};

use crate::{
    count,
    frame::{Arrival as _, Frame},
    helpers, maps,
    packet::{ERROR, LATER, NO_WAY, Packet},
};

/// Bytes of the ICMP header.
const ICMP_LEN: usize = 8;
/// Hops that an answer may go (RFC 1700's default).
const HOPS: u8 = 64;
/// Bytes quoted behind an IP header without options: TCP's header, which holds all that a client's
/// stack looks at, and so that the checksum that a device is still to finish lies inside.
const QUOTED: usize = 20;
/// Destination unreachable, port unreachable: type and code (RFC 792, RFC 4443).
const UNREACHABLE_V4: [u8; 2] = [3, 3];
const UNREACHABLE_V6: [u8; 2] = [1, 4];
/// Host unreachable (RFC 792); address unreachable (RFC 4443): Linux tells both as `EHOSTUNREACH`.
const NO_WAY_V4: [u8; 2] = [3, 1];
const NO_WAY_V6: [u8; 2] = [1, 3];
/// Fragmentation needed (RFC 1191); packet too big (RFC 4443).
const TOO_BIG_V4: [u8; 2] = [3, 4];
const TOO_BIG_V6: [u8; 2] = [2, 0];

/// Ethernet, IPv4 and ICMP before a quoted packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeadV4 {
    macs: [[u8; 6]; 2],
    kind: [u8; 2],
    ip: [u8; IPV4_LEN],
    icmp: [u8; ICMP_LEN],
}
const _: () = assert!(size_of::<HeadV4>() == ETH_LEN + IPV4_LEN + ICMP_LEN);

/// Ethernet and IPv6 up to its addresses.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeadV6 {
    macs: [[u8; 6]; 2],
    kind: [u8; 2],
    ip: [u8; 8],
}
const _: () = assert!(size_of::<HeadV6>() == ETH_LEN + IPV6_LEN - 2 * size_of::<Addr>());

/// Sends the answer back by the device by which the packet came; drops the packet if none is due.
/// Gives tc's verdict. The refusal itself has been counted.
#[inline(always)]
pub fn answer(ctx: &TcContext, packet: &Packet) -> i32 {
    match try_answer(ctx, packet) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop_of(reason, &packet.key),
    }
}

#[inline(always)]
fn try_answer(ctx: &TcContext, packet: &Packet) -> Result<i32, DropReason> {
    // RFC 1122, section 3.2.2: never about errors, later fragments, groups; nor is a reset answered.
    if packet.kind == ERROR
        || packet.fragment == LATER
        || packet.flags & TCP_RST != 0
        || is_group(&packet.key.src)
        || is_group(&packet.key.dst)
    {
        return Ok(count::DROP);
    }
    if !maps::may_refuse(helpers::now_s()) {
        return Err(DropReason::RefusalLimit);
    }
    if packet.key.dst.is_v4() {
        answer_v4(ctx, packet)?;
    } else {
        answer_v6(ctx, packet)?;
    }
    Ok(helpers::redirect(ctx.ifindex()))
}

/// Type and code of the answer, of those for nobody, no way and too big; and how much the way takes.
#[inline(always)]
const fn why(packet: &Packet, [nobody, no_way, too_big]: [[u8; 2]; 3]) -> ([u8; 2], u32) {
    match packet.mtu {
        0 => (nobody, 0),
        NO_WAY => (no_way, 0),
        mtu => (too_big, mtu),
    }
}

#[inline(never)]
fn answer_v4(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    const QUOTE: usize = IPV4_LEN + QUOTED;
    const LENGTH: [u8; 2] = ((IPV4_LEN + ICMP_LEN + QUOTE) as u16).to_be_bytes();
    helpers::set_length(ctx, (ETH_LEN + QUOTE) as u32)?;
    let quoted = quoted_sum::<{ QUOTE / 4 }>(ctx);
    let [s0, s1, s2, s3] = packet.key.dst.v4_octets();
    let [d0, d1, d2, d3] = packet.key.src.v4_octets();
    let [to, from]: [[u8; 6]; 2] = ctx.load(0).map_err(|_errno| DropReason::Rewrite)?;
    let ([kind, code], mtu) = why(packet, [UNREACHABLE_V4, NO_WAY_V4, TOO_BIG_V4]);
    let [_, _, high, low] = mtu.to_be_bytes();
    let mut head = HeadV4 {
        macs: [from, to],
        kind: ETH_IPV4,
        ip: [
            0x45, 0, LENGTH[0], LENGTH[1], 0, 0, 0, 0, HOPS, ICMP, 0, 0, s0, s1, s2, s3, d0, d1,
            d2, d3,
        ],
        icmp: [kind, code, 0, 0, 0, 0, high, low],
    };
    let sum = helpers::sum(&head.ip);
    [head.ip[10], head.ip[11]] = checksum_after_change([0xff; 2], sum);
    let sum = add(quoted, helpers::sum(&head.icmp));
    [head.icmp[2], head.icmp[3]] = checksum_after_change([0xff; 2], sum);
    helpers::add_head(ctx, (IPV4_LEN + ICMP_LEN) as u32)?;
    ctx.store(0, &head, 0).map_err(|_errno| DropReason::Rewrite)
}

/// The sum of the packet's first bytes after Ethernet's header. Not inlined: 6.1 rounds every function's
/// stack up to 32 bytes, and the programs' whole stack is 512.
#[inline(never)]
fn quoted_sum<const WORDS: usize>(ctx: &TcContext) -> u32 {
    // The packet has been cut or filled up to this length, so that it cannot be shorter.
    helpers::sum_at::<WORDS>(ctx, ETH_LEN as u32).unwrap_or(0)
}

#[inline(never)]
fn answer_v6(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    const QUOTE: usize = IPV6_LEN + QUOTED;
    const LENGTH: [u8; 2] = ((ICMP_LEN + QUOTE) as u16).to_be_bytes();
    helpers::set_length(ctx, (ETH_LEN + QUOTE) as u32)?;
    let quoted = quoted_sum::<{ QUOTE / 4 }>(ctx);
    // The pseudo header: addresses, length, protocol.
    let pseudo = [0, 0, LENGTH[0], LENGTH[1], 0, 0, 0, ICMPV6];
    let ([kind, code], mtu) = why(packet, [UNREACHABLE_V6, NO_WAY_V6, TOO_BIG_V6]);
    let [m0, m1, m2, m3] = mtu.to_be_bytes();
    let mut icmp = [kind, code, 0, 0, m0, m1, m2, m3];
    let mut sum = add(quoted, helpers::sum(&packet.key.dst));
    sum = add(sum, helpers::sum(&packet.key.src));
    sum = add(sum, helpers::sum(&pseudo));
    sum = add(sum, helpers::sum(&icmp));
    [icmp[2], icmp[3]] = checksum_after_change([0xff; 2], sum);
    let [to, from]: [[u8; 6]; 2] = ctx.load(0).map_err(|_errno| DropReason::Rewrite)?;
    let head = HeadV6 {
        macs: [from, to],
        kind: ETH_IPV6,
        ip: [0x60, 0, 0, 0, LENGTH[0], LENGTH[1], ICMPV6, HOPS],
    };
    helpers::add_head(ctx, (IPV6_LEN + ICMP_LEN) as u32)?;
    // Piece by piece: the whole would take more stack than there is.
    let addresses = size_of::<HeadV6>();
    Frame::store(ctx, 0, &head)?;
    Frame::store(ctx, addresses, &packet.key.dst)?;
    Frame::store(ctx, addresses + size_of::<Addr>(), &packet.key.src)?;
    Frame::store(ctx, ETH_LEN + IPV6_LEN, &icmp)
}
