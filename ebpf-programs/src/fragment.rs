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

/// Completes the key of a later fragment, and remembers that of a first one.
#[inline(always)]
pub fn resolve(packet: &mut Packet) -> Result<(), DropReason> {
    let FlowKey { src, dst, sport, dport, proto, .. } = packet.key;
    let key = FragmentKey { src, dst, id: packet.id, proto, reserved: [0; 3] };
    if packet.fragment == FIRST {
        maps::remember_fragment(&key, &Fragment { sport, dport });
    } else if packet.fragment == LATER {
        let first = maps::fragment(&key).ok_or(DropReason::FragmentLost)?;
        packet.key.sport = first.sport;
        packet.key.dport = first.dport;
    }
    Ok(())
}
