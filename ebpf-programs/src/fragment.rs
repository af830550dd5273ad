//! Ports of fragmented packets: the first fragment shows them, the others ask for them.

use ebpf_common::{
    conntrack::FlowKey,
    fragment::{Fragment, FragmentKey},
    verdict::DropReason,
};

use crate::{
    maps,
    packet::{FIRST, LATER, Packet},
};

/// Remembers the ports of a first fragment whose packet no flow is asked for, so that its later ones are
/// told from fragments whose first one is lost.
#[inline(always)]
pub fn note(packet: &Packet) {
    if packet.fragment == FIRST {
        remember(packet);
    }
}

#[inline(never)]
fn remember(packet: &Packet) {
    write(packet);
}

/// In [`resolve`] without a frame of its own: of the longest chain of calls 512 bytes of stack are taken.
#[inline(always)]
fn write(packet: &Packet) {
    let FlowKey { sport, dport, .. } = packet.key;
    maps::remember_fragment(&key(packet), &Fragment { sport, dport });
}

#[inline(always)]
const fn key(packet: &Packet) -> FragmentKey {
    let FlowKey { src, dst, proto, .. } = packet.key;
    FragmentKey { src, dst, id: packet.id, proto, reserved: [0; 3] }
}

/// Whether it is a later fragment whose first one was not seen, or is yet to come.
#[inline(always)]
pub fn is_lost(packet: &Packet) -> bool {
    packet.fragment == LATER && has_no_first(packet)
}

#[inline(never)]
fn has_no_first(packet: &Packet) -> bool {
    maps::fragment(&key(packet)).is_none()
}

/// Completes the key of a later fragment, and remembers that of a first one.
#[inline(always)]
pub fn resolve(packet: &mut Packet) -> Result<(), DropReason> {
    if packet.fragment == FIRST {
        write(packet);
    } else if packet.fragment == LATER {
        let first = maps::fragment(&key(packet)).ok_or(DropReason::FragmentLost)?;
        packet.key.sport = first.sport;
        packet.key.dport = first.dport;
    }
    Ok(())
}
