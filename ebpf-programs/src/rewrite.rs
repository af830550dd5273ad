//! Rewriting of a packet as a flow says, with every checksum kept exact.
#![expect(unsafe_code, reason = "packet memory is reached through raw pointers")]

use ebpf_common::{
    ICMP, ICMPV6, SCTP, TCP, UDP,
    conntrack::Flow,
    packet::{ETH_LEN, checksum_after_change},
    verdict::DropReason,
};

use crate::{
    frame::{Frame, Sum},
    helpers,
    packet::Packet,
};

/// Offset of IPv4's checksum in the frame; the addresses follow it.
const V4_CHECKSUM: usize = ETH_LEN + 10;
/// Offset of IPv6's addresses in the frame.
const V6_ADDRESSES: usize = ETH_LEN + 8;

/// What IPv4's header has from its checksum to its end.
#[repr(C, packed(2))]
struct V4Tail {
    checksum: [u8; 2],
    src: u32,
    dst: u32,
}

/// Replaces addresses and ports.
#[inline(always)]
pub fn translate<F: Frame>(frame: &F, packet: &Packet, flow: &Flow) -> Result<(), DropReason> {
    let addresses = helpers::address_difference(&packet.key, flow);
    set_addresses(frame, flow, addresses)?;
    if !packet.has_transport() {
        return Ok(());
    }
    let v6 = !flow.dst.is_v4();
    let l4 = packet.l4 as usize;
    let old = [packet.key.sport, packet.key.dport];
    let new = [flow.sport, flow.dport];
    let (at, summed, zero_is_none) = match packet.key.proto {
        TCP => (l4 + 16, true, false),
        UDP => (l4 + 6, true, !v6),
        ICMPV6 => (l4 + 2, true, false),
        ICMP => (l4 + 2, false, false),
        // SCTP's CRC covers its ports but no address, and no helper computes it.
        SCTP if old == new => return Ok(()),
        _ => return Err(DropReason::Rewrite),
    };
    if summed {
        frame.fold(Sum { at, pseudo: true, zero_is_none, v6 }, addresses)?;
    }
    if old == new {
        return Ok(());
    }
    let ports = helpers::port_difference(&packet.key, flow);
    frame.fold(Sum { at, pseudo: false, zero_is_none, v6 }, ports)?;
    match packet.key.proto {
        // Of an echo's two "ports" one is its identifier, the other zero.
        ICMP | ICMPV6 => frame.store(l4 + 4, &identifier(new)),
        _ => frame.store(l4, &new),
    }
}

/// An echo's identifier out of the ports of its flow.
#[inline(always)]
pub fn identifier(ports: [[u8; 2]; 2]) -> [u8; 2] {
    (u16::from_ne_bytes(ports[0]) | u16::from_ne_bytes(ports[1])).to_ne_bytes()
}

/// Writes a flow's source and destination into the IP header.
#[inline(always)]
pub fn set_addresses<F: Frame>(frame: &F, flow: &Flow, difference: u32) -> Result<(), DropReason> {
    if flow.dst.is_v4() {
        let tail = frame.at::<V4Tail>(V4_CHECKSUM).ok_or(DropReason::Malformed)?;
        // SAFETY: `at` has checked that these bytes lie inside the packet; their place is even, and
        // more is not asked of it.
        let tail = unsafe { &mut *tail };
        tail.checksum = checksum_after_change(tail.checksum, difference);
        tail.src = flow.src.words()[3];
        tail.dst = flow.dst.words()[3];
        return Ok(());
    }
    let addresses = frame.at::<[[u32; 4]; 2]>(V6_ADDRESSES).ok_or(DropReason::Malformed)?;
    // SAFETY: as above.
    unsafe { addresses.write_unaligned([flow.src.words(), flow.dst.words()]) };
    Ok(())
}
