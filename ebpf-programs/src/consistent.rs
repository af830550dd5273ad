//! The choice between backends for traffic from outside: the same on every node, and kept by the flows of
//! those that stay (`ebpf_common::maglev`).
#![expect(unsafe_code, reason = "a global function has a name of its own")]

use ebpf_common::{
    conntrack::FlowKey,
    maglev::{self, NO_RANK},
    service::{BackendKey, Service, ServiceKey},
    trace as steps,
};

use crate::{maps, trace};

/// The slot of a flow to a service with `maglev_bits`.
#[inline(always)]
pub fn slot(key: &FlowKey, service: &Service) -> u32 {
    trace::step(steps::MAGLEV, &BackendKey { set: service.set, slot: 0 });
    // Each node has addresses of its own: to them it is the port that is the frontend.
    let addr = if maps::is_node_address(&key.dst) { key.dst.any() } else { key.dst };
    let frontend = ServiceKey { addr, port: key.dport, proto: key.proto, scope: 0 };
    let hash = maglev::flow_hash(&key.src, key.sport, &frontend, service.affinity_s);
    let rank = |service: &Service, slot, cell| apart_rank(service.set, service.count, slot, cell);
    maglev::slot(service, hash, rank, maps::maglev_cell)
}

/// How the backend of a slot ranks a cell. A global function, as the ones of `apart.rs`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_rank(set: u32, count: u32, slot: u32, cell: u32) -> u64 {
    if slot >= count {
        // A row may be there while the set changes.
        return NO_RANK;
    }
    maps::candidate(&BackendKey { set, slot }).map_or(NO_RANK, |one| maglev::rank(&one, slot, cell))
}
