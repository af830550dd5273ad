//! XDP's opening of flows: the first packet of a client outside to a service.
//!
//! What is decided is decided by `nat.rs`, as in tc, and the rows are those that tc would make: where
//! XDP cannot carry the packet after all, tc finds its flow and does. Whatever is not plain - a client
//! that is refused, a backend in a node's own network or beyond this cluster, whose flows need an
//! address of this node - is left to tc, untouched and uncounted.

use aya_ebpf::programs::XdpContext;
use ebpf_common::{
    addr::Addr,
    conntrack::{Flow, FlowKey},
    packet::is_group,
    verdict::DropReason,
};

use crate::{
    driver_frame::{self, Frame},
    frame::Arrival,
    helpers, maps,
    nat::{self, From},
    packet::{FLOW, Packet},
};

/// Makes both rows of a packet's flow. Gives 1 when they are there.
#[inline(never)]
pub fn open<const V6: bool>(ctx: &XdpContext) -> u32 {
    u32::from(try_open::<V6>(ctx).is_some())
}

#[inline(always)]
fn try_open<const V6: bool>(ctx: &XdpContext) -> Option<()> {
    let mut packet = Packet::new();
    let frame = Frame::<V6>::parse(ctx, &mut packet.key)?;
    packet.flags = frame.flags;
    packet.kind = FLOW;
    if !driver_frame::is_for(ctx, maps::device(ctx.ifindex())?.mac_words()) {
        return None;
    }
    // A connection that begins anew over an old one.
    if maps::flow(&packet.key).is_some() || !is_from_outside(&packet.key) {
        return None;
    }
    let mut flow = nat::new_flow();
    if find(&packet, &mut flow) == 0 {
        return None;
    }
    choose_source(ctx, &packet.key, &mut flow);
    if flow.flags != 0 {
        return None;
    }
    // What is full or exhausted is tried again and counted by tc.
    nat::insert(ctx, &packet.key, &mut flow, 0).ok()
}

/// Pods of other nodes that come by routes are inside, and pods of this node are nobody's service.
#[inline(always)]
fn is_from_outside(key: &FlowKey) -> bool {
    !is_group(&key.dst)
        && maps::endpoint(&key.dst).is_none()
        && maps::tunnel(&key.src).is_none_or(|tunnel| tunnel.node == key.src)
}

/// The backend of a packet's flow. Gives 1 when there is one.
#[inline(never)]
fn find(packet: &Packet, flow: &mut Flow) -> u32 {
    let Some(config) = maps::config() else { return 0 };
    let found = nat::try_find_service(config, packet, flow, From::Outside);
    u32::from(matches!(found, Ok(true)))
}

#[inline(never)]
fn choose_source(ctx: &XdpContext, key: &FlowKey, flow: &mut Flow) {
    nat::choose_source(ctx, key, flow, From::Outside);
}

impl Arrival for XdpContext {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn route(&self, src: &Addr, dst: &Addr) -> Result<u32, DropReason> {
        match route(self, src, dst) {
            NO_ROUTE => Err(DropReason::NoRoute),
            ifindex => Ok(ifindex),
        }
    }

    #[inline(always)]
    fn insert_reverse(&self, key: &FlowKey, flow: &Flow, flags: u16) -> i32 {
        insert_reverse(self, key, flow, flags)
    }

    #[inline(always)]
    fn has_socket(&self, key: &FlowKey) -> bool {
        helpers::has_socket(self, key)
    }
}

/// No device has this index.
const NO_ROUTE: u32 = u32::MAX;

#[inline(never)]
fn route(ctx: &XdpContext, src: &Addr, dst: &Addr) -> u32 {
    helpers::route(ctx, ctx.ifindex(), src, dst).unwrap_or(NO_ROUTE)
}

#[inline(never)]
fn insert_reverse(ctx: &XdpContext, key: &FlowKey, flow: &Flow, flags: u16) -> i32 {
    nat::insert_reverse(ctx, key, flow, flags)
}
