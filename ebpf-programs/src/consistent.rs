//! The choice between backends for traffic from outside: the same on every node, and kept by the flows of
//! those that stay (`ebpf_common::maglev`).

use ebpf_common::{
    conntrack::FlowKey,
    maglev::{self, MaglevKey},
    service::{Service, ServiceKey},
    trace as steps,
};

use crate::{maps, trace};

/// The slot of a flow to a service with `maglev_bits`. Not inlined, as everybody who asks has a full
/// stack.
#[inline(never)]
pub fn slot(key: &FlowKey, service: &Service) -> u32 {
    // Each node has addresses of its own: to them it is the port that is the frontend.
    let addr = if maps::is_node_address(&key.dst) { key.dst.any() } else { key.dst };
    let frontend = ServiceKey { addr, port: key.dport, proto: key.proto, scope: 0 };
    let hash = maglev::flow_hash(&key.src, key.sport, &frontend, service.affinity_s);
    trace::step(steps::MAGLEV, &MaglevKey { set: service.set, block: 0 });
    maglev::slot(service, hash, maps::candidate, maps::maglev_cell)
}
