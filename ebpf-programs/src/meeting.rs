//! Connections that nothing translates and that have the ports of a flow: their answers would be taken for the
//! flow's. The newcomer gets another source port, as the kernel's own connection tracking would give it one, or a
//! flow that is over makes room for it.
//!
//! It is asked for only where flows are known to lead ([`LED_TO`]), and of a connection's first packet; of a
//! datagram each may be the first.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    ICMP, ICMPV6, SCTP, TCP, UDP,
    conntrack::{FLOW_LOCAL, FLOW_MASQUERADE, Flow, FlowKey, LED_TO, REVERSE},
    packet::TCP_SYN,
};

use crate::{
    apart, count, fragment,
    frame::Frame,
    maps,
    nat::{self, Step},
    packet::{FLOW, LATER, Packet, WHOLE},
};

/// Flags of a connection of the node itself that gives way: only ports that no socket of the node has are for
/// it, and what is translated is the stack's.
pub const OWN: u16 = FLOW_MASQUERADE | FLOW_LOCAL;

/// Lets a packet give way that nothing translates, to a destination whose row has these flags. `way` are
/// `FLOW_…` bits for what it becomes. [`Step::Unknown`]: it goes on as it is.
#[inline(always)]
pub fn give_way(
    ctx: &TcContext,
    packet: &Packet,
    flow: &mut Flow,
    (flags, way): (u32, u16),
) -> Step {
    if flags & LED_TO == 0 || !may_meet(packet) || !apart::is_met(packet) {
        return Step::Unknown;
    }
    // Its later pieces are looked up from now on.
    fragment::note(packet);
    if way & OWN == OWN {
        // `tc_to_overlay` has no room for a frame more below it (512 bytes of stack in all).
        return evade(ctx, packet, flow, way);
    }
    apart::evade(ctx, packet, flow, way)
}

/// Notes that somebody outside begins to speak to a pod of this node at the pod's own address: what the pod
/// answers is no question of its own, and keeps that address. Pods of other nodes are told by their rows.
/// [`Step::Unknown`]: it goes on as it is.
#[inline(always)]
pub fn note_asked(ctx: &TcContext, packet: &Packet, flow: &mut Flow) -> Step {
    let is_echo = matches!(packet.key.proto, ICMP | ICMPV6);
    let begins = may_meet(packet) || (is_echo && packet.fragment == WHOLE && packet.may_open());
    let Some(config) = maps::config() else { return Step::Unknown };
    if !begins || !config.masquerades(&packet.key.dst) || maps::tunnel(&packet.key.src).is_some() {
        return Step::Unknown;
    }
    // As in `give_way`.
    fragment::note(packet);
    apart::evade(ctx, packet, flow, 0)
}

/// Lets a packet give way that nothing translates, to this node's own stack. Gives tc's verdict.
#[inline(always)]
pub fn to_own(ctx: &TcContext, packet: &Packet, flow: &mut Flow) -> i32 {
    // What goes on is most, and is not looked up.
    if !may_meet(packet) {
        return count::PASS;
    }
    let Some(flags) = maps::node_address(&packet.key.dst) else { return count::PASS };
    match give_way(ctx, packet, flow, (*flags, FLOW_LOCAL)) {
        Step::Translated | Step::Unknown => count::PASS,
        Step::Dropped | Step::Refused => count::DROP,
    }
}

/// Whether a packet may begin something.
#[inline(always)]
const fn may_meet(packet: &Packet) -> bool {
    if packet.kind != FLOW {
        return false;
    }
    match packet.key.proto {
        UDP => packet.fragment != LATER,
        // INIT is SCTP's SYN.
        TCP => packet.is_syn() && packet.fragment == WHOLE,
        SCTP => packet.flags & TCP_SYN != 0 && packet.fragment == WHOLE,
        _ => false,
    }
}

/// Whether a flow that goes on would take the answers to a packet. One that does not is ended, and so is one of
/// SCTP, whose port cannot be changed: an INIT says that its association is another one.
#[inline(always)]
pub fn is_met(packet: &Packet) -> bool {
    let answer = packet.key.reversed();
    let Some(row) = maps::flow(&answer) else { return false };
    if row.direction != REVERSE {
        return false;
    }
    let is_over = match answer.proto {
        TCP => nat::is_done(row),
        SCTP => true,
        _ => false,
    };
    if is_over {
        nat::close(&answer, row);
    }
    !is_over
}

/// Gives a connection that nothing translates another source port, and translates its packet.
#[inline(always)]
pub fn evade<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow, way: u16) -> Step {
    let key = &packet.key;
    flow.src = key.src;
    flow.dst = key.dst;
    flow.dport = key.dport;
    flow.flags = way;
    // What is delivered to a pod is looked up only where its row says so: its next packets are to be found.
    maps::mark_flows(&key.dst);
    frame.open(packet, flow, if way & OWN == OWN { OWN } else { 0 })
}

/// Whether the 4-tuple of a packet that the node itself sends belongs to a pod's connection.
#[inline(always)]
pub fn is_taken(key: &FlowKey) -> bool {
    maps::flow(&key.reversed()).is_some_and(|row| row.flags & FLOW_MASQUERADE != 0)
}
