//! What a pod sends: ingress of the host's end of its veth pair.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::{
    conntrack::FLOW_FROM_POD,
    endpoint::HAS_FLOWS,
    packet::is_group,
    tunnel::{HERE, ROUTED},
    verdict::DropReason,
};

use crate::{
    apart, count, log, maps,
    meeting::{self, give_way},
    nat::{self, From, Step},
    packet::{NOT_IP, Packet},
    route,
};

#[classifier]
pub fn tc_from_pod(ctx: TcContext) -> i32 {
    log::told(match try_from_pod(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_from_pod(ctx: &TcContext) -> Result<i32, DropReason> {
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    // The stack answers expired hops, and speaks with neighbours.
    if packet.kind == NOT_IP || packet.ttl <= 1 || is_group(&packet.key.dst) {
        return Ok(count::PASS);
    }
    let Some(config) = maps::config() else { return Ok(count::PASS) };
    let mut flow = nat::new_flow();
    if !config.is_service_address(&packet.key.dst)
        && let Some(endpoint) = maps::endpoint(&packet.key.dst)
    {
        if endpoint.flags & HAS_FLOWS != 0 {
            // It may answer what that pod asked of a service.
            match apart::follow(ctx, &mut packet, &mut flow) {
                Step::Translated => return Ok(apart::forward(ctx, &mut packet, &mut flow)),
                Step::Unknown => {}
                Step::Dropped | Step::Refused => return Ok(count::DROP),
            }
        }
        return match give_way(ctx, &packet, &mut flow, (endpoint.flags, FLOW_FROM_POD)) {
            Step::Translated => Ok(apart::forward(ctx, &mut packet, &mut flow)),
            Step::Unknown => Ok(apart::deliver(ctx, &packet, endpoint)),
            Step::Dropped | Step::Refused => Ok(count::DROP),
        };
    }
    match apart::follow(ctx, &mut packet, &mut flow) {
        Step::Translated => return Ok(apart::forward(ctx, &mut packet, &mut flow)),
        Step::Unknown => {}
        Step::Dropped | Step::Refused => return Ok(count::DROP),
    }
    if config.is_gateway(&packet.key.dst) {
        return Ok(count::PASS);
    }
    if let Some(tunnel) = maps::tunnel(&packet.key.dst) {
        match give_way(ctx, &packet, &mut flow, (tunnel.flags, FLOW_FROM_POD)) {
            Step::Translated => return Ok(apart::forward(ctx, &mut packet, &mut flow)),
            Step::Unknown => {}
            Step::Dropped | Step::Refused => return Ok(count::DROP),
        }
        return match tunnel.flags & (ROUTED | HERE) {
            ROUTED => Ok(apart::forward_plain(ctx, config, &mut packet, &mut flow)),
            0 if config.vxlan_ifindex != 0 => route::to_overlay(ctx, config, &packet),
            _ => Ok(count::PASS),
        };
    }
    match apart::open_service(ctx, &packet, &mut flow, From::Inside) {
        Step::Translated => return Ok(apart::forward(ctx, &mut packet, &mut flow)),
        Step::Unknown => {}
        Step::Dropped => return Ok(count::DROP),
        Step::Refused => return Ok(apart::refuse(ctx, &packet)),
    }
    if maps::is_node_address(&packet.key.dst) {
        return Ok(meeting::to_own(ctx, &packet, &mut flow));
    }
    if !config.masquerades(&packet.key.dst) {
        return Ok(count::PASS);
    }
    match apart::masquerade(ctx, &packet, &mut flow) {
        Step::Translated => Ok(apart::forward(ctx, &mut packet, &mut flow)),
        Step::Unknown => Ok(count::PASS),
        Step::Dropped | Step::Refused => Ok(count::DROP),
    }
}
