//! XDP's opening of flows: the first packet of a client outside to a service.
//!
//! What is decided is decided by `nat.rs`, as in tc, and the rows are those that tc would make: where
//! XDP cannot carry the packet after all, tc finds its flow and does. Whatever is not plain - a client
//! that is refused, a backend in a node's own network or beyond this cluster, whose flows need an
//! address of this node - is left to tc, untouched and uncounted.

use aya_ebpf::programs::XdpContext;
use ebpf_common::{
    conntrack::{Flow, FlowKey},
    packet::is_group,
};

use crate::{
    apart_xdp,
    driver_frame::{self, Frame},
    frame::Arrival as _,
    maps,
    nat::{self, From},
    packet::{FLOW, Packet},
};

/// Makes both rows of a packet's flow.
#[inline(always)]
pub fn open<const V6: bool>(ctx: &XdpContext) -> Option<()> {
    let mut packet = Packet::new();
    let frame = Frame::<V6>::parse(ctx, &mut packet.key)?;
    packet.flags = frame.flags;
    packet.kind = FLOW;
    if !driver_frame::is_for(ctx, maps::device(ctx.ifindex())?.mac_words()) {
        return None;
    }
    let mut flow = nat::new_flow();
    if !apart_xdp::find(&packet, &mut flow) {
        return None;
    }
    apart_xdp::choose_source(ctx, &packet.key, &mut flow);
    if flow.flags != 0 {
        return None;
    }
    flow.seen = nat::seen(frame.flags);
    // What is full or exhausted is tried again and counted by tc.
    apart_xdp::insert(ctx, &packet.key, &mut flow).then_some(())
}

/// Pods of other nodes that come by routes are inside, and pods of this node are nobody's service.
#[inline(always)]
fn is_from_outside(key: &FlowKey) -> bool {
    !is_group(&key.dst)
        && maps::endpoint(&key.dst).is_none()
        && maps::tunnel(&key.src).is_none_or(|tunnel| tunnel.node == key.src)
}

/// The backend of a packet's flow; whether there is one.
#[inline(always)]
pub fn find(packet: &Packet, flow: &mut Flow) -> bool {
    // A flow that is known: a connection begins anew over an old one.
    let key = packet.key;
    if maps::flow(&key).is_some() || !is_from_outside(&key) {
        return false;
    }
    let Some(config) = maps::config() else { return false };
    matches!(nat::try_find_service(config, packet, flow, From::Outside), Ok(true))
}
