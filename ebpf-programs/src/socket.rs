//! Translation at the socket: decided by values in one function, so that a trace can ask it too.
//!
//! A process that asks for a service gets a backend once, at connect or per datagram, and no packet of
//! the connection is touched afterwards. Connected UDP is left to the packet path where that path sees
//! the namespace's packets, since only there the socket can move when its backend goes. SCTP never
//! comes here: the kernel calls no connect hook for it (`sctp_inet_connect`), and the packet path
//! translates it.

use aya_ebpf::programs::SockAddrContext;
use ebpf_common::{
    TCP, UDP,
    addr::Addr,
    config::{Config, LOOPBACK_PORTS},
    netns::Netns,
    service::{AT_SOCKET, Peer, SCOPE_INTERNAL, SCOPE_LOOPBACK, SOURCE_RANGES, Service, mix},
    socket::{Ask, CONNECT},
    verdict::DropReason,
};

use crate::{events, helpers, log, maps, service};

/// Translates where a socket of this node wants to go. Gives the hook's result: 1 goes on, 0 refuses.
#[inline(always)]
pub fn translate<const V6: bool>(ctx: &SockAddrContext, call: u8) -> i32 {
    log::told_at_socket(try_translate::<V6>(ctx, call))
}

/// Apart from the line about it, for which its frame leaves no room.
#[cfg_attr(feature = "log", inline(never))]
#[cfg_attr(not(feature = "log"), inline(always))]
fn try_translate<const V6: bool>(ctx: &SockAddrContext, call: u8) -> i32 {
    let Some(proto) = helpers::socket_protocol(ctx) else { return GO_ON };
    let wanted = helpers::user_peer::<V6>(ctx);
    // TCP chooses anew for each connection; a UDP socket stays with its backend while the set of
    // backends does not change, since what it sends in a row belongs together.
    let random = if proto == TCP { helpers::random() } else { mix(helpers::socket_cookie(ctx)) };
    let netns = helpers::netns_cookie(ctx);
    let ask = Ask { netns, wanted, random, proto, call, reserved: [0; 6] };
    match decide(&ask) {
        Ok(None) => GO_ON,
        Ok(Some(backend)) => {
            if maps::remember(ctx, wanted, backend) {
                events::connected(&ask, &backend);
            }
            helpers::set_user_peer::<V6>(ctx, backend);
            GO_ON
        }
        Err(reason) => {
            maps::count(reason);
            events::refused(&ask, reason);
            refuse(reason)
        }
    }
}

/// Shows the program the service for which it asked instead of the backend that it got.
#[inline(always)]
pub fn show_service<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    if let Some(service) = maps::service_of(ctx, helpers::user_peer::<V6>(ctx)) {
        helpers::set_user_peer::<V6>(ctx, service);
    }
    GO_ON
}

/// The system call goes on.
const GO_ON: i32 = 1;

/// A client that may not is told so (`EPERM`, the hook's own refusal); where nobody answers it is as
/// if the far end had refused.
#[inline(always)]
fn refuse(reason: DropReason) -> i32 {
    if reason as u32 != DropReason::SourceRange as u32 {
        helpers::refuse_connection();
    }
    0
}

/// Where a socket goes instead of where it wants to go; `None` leaves it alone.
#[inline(always)]
pub fn decide(ask: &Ask) -> Result<Option<Peer>, DropReason> {
    let Some(config) = maps::config() else { return Ok(None) };
    let wanted = &ask.wanted;
    let service = if wanted.addr.is_loopback() {
        on_loopback(config, ask)
    } else {
        service::frontend(config, &wanted.addr, wanted.port, ask.proto, SCOPE_INTERNAL)?
    };
    let Some(service) = service else { return Ok(None) };
    if service.count == 0 {
        return Err(DropReason::NoBackend);
    }
    let connected_udp = ask.proto == UDP && ask.call == CONNECT;
    let mut client = pseudo_address(ask.netns, &wanted.addr);
    // Most connections are TCP to services that ask for nothing of their client.
    if connected_udp || service.affinity_s != 0 || service.flags & SOURCE_RANGES != 0 {
        if let Some(netns) = maps::netns(ask.netns) {
            client = if wanted.addr.is_v4() { netns.addr[0] } else { netns.addr[1] };
            if connected_udp && is_left_to_packets(config, &netns, &service, &wanted.addr) {
                return if service::admits(&service, &client) {
                    Ok(None)
                } else {
                    Err(DropReason::SourceRange)
                };
            }
        }
        if !service::admits(&service, &client) {
            return Err(DropReason::SourceRange);
        }
    }
    let backend = service::choose(&service, &client, ask.random)?;
    Ok(Some(Peer { addr: backend.addr, port: backend.port, reserved: [0; 2] }))
}

/// A pod's port or a node port asked for at 127.0.0.1 or ::1 by the node itself; a pod's loopback is its
/// own.
#[inline(always)]
fn on_loopback(config: &Config, ask: &Ask) -> Option<Service> {
    let wanted = &ask.wanted;
    if config.flags & LOOPBACK_PORTS != 0
        && is_node(config, &maps::netns(ask.netns)?)
        && let Some(service) = service::row(wanted.addr, wanted.port, ask.proto, SCOPE_LOOPBACK)
    {
        return Some(service);
    }
    if !config.is_node_port(u16::from_be_bytes(wanted.port))
        || !maps::is_node_address(&wanted.addr)
        || !is_node(config, &maps::netns(ask.netns)?)
    {
        return None;
    }
    service::row(wanted.addr.any(), wanted.port, ask.proto, SCOPE_INTERNAL)
}

/// Whether packets of a connected UDP socket meet a program that translates them: all of a pod's do,
/// the node's own do where the route of the service range leads them to the host device.
#[inline(always)]
fn is_left_to_packets(config: &Config, netns: &Netns, service: &Service, to: &Addr) -> bool {
    if service.flags & AT_SOCKET != 0 {
        return false;
    }
    !is_node(config, netns) || (config.host_ifindex != 0 && config.is_service_address(to))
}

/// Whether the namespace is the node's own: its packets are seen under the gateway addresses.
#[inline(always)]
fn is_node(config: &Config, netns: &Netns) -> bool {
    netns.addr[0] == config.gateway[0] && netns.addr[1] == config.gateway[1]
}

/// What stands for the client in a namespace that Orlop does not know: an address of the family of `to`
/// that no packet has as its source, so that of all ranges only those hold it that hold every address:
/// 0.0.0.0/8 (RFC 791, "this network") and 100::/64 (RFC 6666, "discard only").
#[inline(always)]
const fn pseudo_address(netns: u64, to: &Addr) -> Addr {
    let (low, high) = (netns as u32, (netns >> 32) as u32);
    if to.is_v4() {
        let [a, b, c, _] = low.to_ne_bytes();
        return Addr::v4([0, a, b, c]);
    }
    Addr::from_words([u32::from_ne_bytes([1, 0, 0, 0]), 0, low, high])
}
