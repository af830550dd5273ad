//! What this node sends by its network devices: egress. Only what its own stack sends is looked at.
//!
//! Answers of the node's own processes to clients of services are translated back. And a connection
//! of the node cannot meet one of a pod that has been given the node's address and the same port:
//! pods' ports are only given out where no socket of the node has them, and if a socket takes such a
//! port later, the newcomer's port is translated here.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::{TCP, UDP, verdict::DropReason};

use crate::{
    apart, count, fragment, helpers, log, maps,
    meeting::{self, OWN},
    nat::{self, Step},
    packet::{NOT_IP, Packet},
};

#[classifier]
pub fn tc_to_underlay(ctx: TcContext) -> i32 {
    log::told(match try_to_underlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_to_underlay(ctx: &TcContext) -> Result<i32, DropReason> {
    if helpers::came_by(ctx) != 0 {
        return Ok(count::PASS);
    }
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    let Some(config) = maps::config() else { return Ok(count::PASS) };
    let is_tunnel =
        packet.key.proto == UDP && u16::from_be_bytes(packet.key.dport) == config.vxlan_port;
    if packet.kind == NOT_IP || is_tunnel {
        fragment::note(&packet);
        return Ok(count::PASS);
    }
    let mut flow = nat::new_flow();
    match apart::follow(ctx, &mut packet, &mut flow) {
        Step::Translated | Step::Refused => return Ok(count::PASS),
        Step::Unknown => {}
        Step::Dropped => return Ok(count::DROP),
    }
    let is_new = packet.may_open() && (packet.key.proto != TCP || packet.is_syn());
    if is_new
        && meeting::is_taken(&packet.key)
        && apart::evade(ctx, &packet, &mut flow, OWN) == Step::Dropped
    {
        return Ok(count::DROP);
    }
    Ok(count::PASS)
}
