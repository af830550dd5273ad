//! From a frontend to one of its backends.

use aya_ebpf::programs::SockAddrContext;
use ebpf_common::{
    TCP,
    addr::Addr,
    service::{Backend, BackendKey, Peer, SCOPE_INTERNAL, Service, ServiceKey, choose, mix},
    verdict::DropReason,
};

use crate::{count, helpers, maps};

/// The backend row of a chosen slot. The count may have shrunk since it was read: slot 0 is the last
/// to go.
#[inline(always)]
pub fn pick(service: Service, random: u32) -> Result<Backend, DropReason> {
    let slot = choose(random, service.count).ok_or(DropReason::NoBackend)?;
    maps::backend(&BackendKey { set: service.set, slot })
        .or_else(|| maps::backend(&BackendKey { set: service.set, slot: 0 }))
        .ok_or(DropReason::BackendMissing)
}

/// The service behind a node port at `addr`, an address of this node.
#[inline(always)]
pub fn node_port(addr: &Addr, port: [u8; 2], proto: u8) -> Option<Service> {
    maps::service(&ServiceKey { addr: addr.any(), port, proto, scope: SCOPE_INTERNAL })
}

/// Translates where a socket of this node wants to go. Gives the hook's result: 1 goes on, 0 refuses.
#[inline(always)]
pub fn translate_socket(ctx: &SockAddrContext) -> i32 {
    match try_translate(ctx) {
        Ok(()) => 1,
        Err(reason) => {
            let _verdict: i32 = count::drop(reason);
            helpers::refuse()
        }
    }
}

#[inline(always)]
fn try_translate(ctx: &SockAddrContext) -> Result<(), DropReason> {
    let Some(proto) = helpers::socket_protocol(ctx) else { return Ok(()) };
    let wanted = helpers::user_peer(ctx);
    let Some(service) = find(wanted, proto)? else { return Ok(()) };
    // TCP chooses anew for each connection; a UDP socket stays with its backend while the set of
    // backends does not change, since what it sends in a row belongs together.
    let random = if proto == TCP { helpers::random() } else { mix(helpers::socket_cookie(ctx)) };
    let backend = pick(service, random)?;
    let backend = Peer { addr: backend.addr, port: backend.port, reserved: [0; 2] };
    maps::remember(ctx, wanted, backend);
    helpers::set_user_peer(ctx, backend);
    Ok(())
}

#[inline(always)]
fn find(wanted: Peer, proto: u8) -> Result<Option<Service>, DropReason> {
    let key = ServiceKey { addr: wanted.addr, port: wanted.port, proto, scope: SCOPE_INTERNAL };
    if let Some(service) = maps::service(&key) {
        return Ok(Some(service));
    }
    let Some(config) = maps::config() else { return Ok(None) };
    if config.is_service_address(&wanted.addr) {
        return Err(DropReason::UnknownService);
    }
    if config.is_node_port(u16::from_be_bytes(wanted.port)) && maps::is_node_address(&wanted.addr) {
        return Ok(node_port(&wanted.addr, wanted.port, proto));
    }
    Ok(None)
}
