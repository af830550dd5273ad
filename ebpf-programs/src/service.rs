//! From a frontend to one of its backends: the one logic of sockets and packets of both families.

use ebpf_common::{
    addr::Addr,
    affinity::{Affinity, AffinityKey, MemberKey, holds},
    config::Config,
    service::{
        Backend, BackendKey, Peer, SCOPE_EXTERNAL, SCOPE_INTERNAL, SOURCE_RANGES, Service,
        ServiceKey, SourceRange, choose as slot_of,
    },
    verdict::DropReason,
};

use crate::{helpers, maps};

/// The service that answers at an address and a port; `None` for what is no service. `scope` says
/// from where the client comes; what differs for neither has an internal row only.
///
/// A loopback address is never a node address here: whether a packet may ask for one is its
/// receiver's to say, and what comes in by a device may not.
#[inline(always)]
pub fn frontend(
    config: &Config,
    to: &Addr,
    port: [u8; 2],
    proto: u8,
    scope: u8,
) -> Result<Option<Service>, DropReason> {
    if let Some(service) = row(*to, port, proto, scope) {
        return Ok(Some(service));
    }
    if config.is_service_address(to) {
        return Err(DropReason::UnknownService);
    }
    if config.is_node_port(u16::from_be_bytes(port))
        && !to.is_loopback()
        && maps::is_node_address(to)
    {
        return Ok(row(to.any(), port, proto, scope));
    }
    Ok(None)
}

/// The row of a frontend as it is keyed.
#[inline(always)]
pub fn row(addr: Addr, port: [u8; 2], proto: u8, scope: u8) -> Option<Service> {
    let mut key = ServiceKey { addr, port, proto, scope };
    if scope == SCOPE_EXTERNAL {
        if let Some(service) = maps::service(&key) {
            return Some(service);
        }
        key.scope = SCOPE_INTERNAL;
    }
    maps::service(&key)
}

/// Whether the service lets the client in.
#[inline(always)]
pub fn admits(service: &Service, client: &Addr) -> bool {
    service.flags & SOURCE_RANGES == 0
        || maps::in_source_range(SourceRange { service: service.service, addr: *client })
}

/// The backend for a new connection of `client`: the one that it had, if the service remembers its
/// clients, else the one of `random`.
#[inline(always)]
pub fn choose(service: &Service, client: &Addr, random: u32) -> Result<Backend, DropReason> {
    let slot = slot_of(random, service.count).ok_or_else(|| service.lack())?;
    choose_slot(service, client, slot)
}

/// As [`choose`], with the slot that it leads to if the service does not remember the client.
#[inline(always)]
pub fn choose_slot(service: &Service, client: &Addr, slot: u32) -> Result<Backend, DropReason> {
    if service.affinity_s == 0 {
        return at(service.set, slot);
    }
    let key = AffinityKey { client: *client, service: service.service };
    let now = helpers::now_s();
    if let Some(backend) = kept(service, &key, now) {
        return Ok(backend);
    }
    let backend = at(service.set, slot)?;
    let peer = Peer { addr: backend.addr, port: backend.port, reserved: [0; 2] };
    maps::keep_client(&key, &Affinity { backend: peer, last_used: now });
    Ok(backend)
}

/// The backend that a client had, if that still holds and it is still there.
#[inline(always)]
fn kept(service: &Service, key: &AffinityKey, now: u32) -> Option<Backend> {
    let known = maps::client(key)?;
    if !holds(known.last_used, now, service.affinity_s)
        || maps::member(&MemberKey { set: service.set, backend: known.backend }).is_none()
    {
        return None;
    }
    if known.last_used != now {
        maps::use_client(key, now);
    }
    Some(Backend { addr: known.backend.addr, port: known.backend.port, reserved: [0; 2] })
}

/// The backend of a slot. The count may have shrunk since it was read: slot 0 is the last to go.
#[inline(always)]
pub fn at(set: u32, slot: u32) -> Result<Backend, DropReason> {
    maps::backend(&BackendKey { set, slot })
        .or_else(|| maps::backend(&BackendKey { set, slot: 0 }))
        .ok_or(DropReason::BackendMissing)
}
