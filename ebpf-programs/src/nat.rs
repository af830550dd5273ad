//! Node ports from outside: the client's packet goes to a backend with the node's gateway address
//! as source, and the answer comes back here and is turned around.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    TCP,
    config::Config,
    conntrack::{
        FORWARD, Flow, FlowKey, REVERSE, SEEN_FIN, SEEN_REPLY, SEEN_RST, SNAT_TRIES, snat_port,
    },
    packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
    service::{Backend, Service},
    verdict::DropReason,
};

use crate::{
    count, helpers, maps,
    packet::{self, Ipv4, Transport},
    route, service, trace,
};

/// A packet to an address of this node: to a node port, or for the host's stack.
#[inline(always)]
pub fn to_node(ctx: &TcContext, config: &Config, ip: &Ipv4) -> Result<i32, DropReason> {
    let Some(transport) = packet::transport(ctx, ip)? else { return Ok(count::PASS) };
    if !config.is_node_port(u16::from_be_bytes(transport.dport)) {
        return Ok(count::PASS);
    }
    node_port(ctx, config, ip, &transport)
}

/// A packet to a node port. What no service answers is left to the host's stack, which refuses it in
/// the words of the protocol (RST, port unreachable).
#[inline(always)]
fn node_port(
    ctx: &TcContext,
    config: &Config,
    ip: &Ipv4,
    transport: &Transport,
) -> Result<i32, DropReason> {
    let key = packet::flow_key(ip, transport);
    let is_new = ip.proto == TCP && transport.flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
    if let Some(flow) = maps::flow(&key) {
        if is_new && flow.is_closing() {
            // The client uses its port again: the old flow is over.
            let reverse = flow.opposite(ip.proto);
            maps::remove_flow(&reverse);
            maps::remove_flow(&key);
        } else {
            touch(flow, transport.flags);
            let flow = *flow;
            return send(ctx, config, ip, transport, flow);
        }
    }
    if ip.proto == TCP && !is_new {
        return Ok(count::PASS);
    }
    let Some(found) = service::node_port(&ip.dst(), transport.dport, ip.proto) else {
        return Ok(count::PASS);
    };
    if found.count == 0 {
        maps::count(DropReason::NoBackend);
        return Ok(count::PASS);
    }
    let backend = service::pick(found, helpers::random())?;
    if maps::is_node_address(&backend.addr) {
        return Err(DropReason::BackendOnThisNode);
    }
    let flow = open(ctx, config, &key, &found, &backend)?;
    send(ctx, config, ip, transport, flow)
}

/// A packet to the gateway address: the answer of a backend, or the node's own traffic.
#[inline(always)]
pub fn answer(ctx: &TcContext, config: &Config, ip: &Ipv4) -> Result<i32, DropReason> {
    let Some(transport) = packet::transport(ctx, ip)? else { return Ok(count::PASS) };
    let Some(flow) = maps::flow(&packet::flow_key(ip, &transport)) else { return Ok(count::PASS) };
    touch(flow, transport.flags);
    let flow = *flow;
    packet::translate(ctx, ip, &transport, &flow)?;
    route::forward(ctx, config, &flow.src, &flow.dst, flow.ifindex)
}

#[inline(always)]
fn send(
    ctx: &TcContext,
    config: &Config,
    ip: &Ipv4,
    transport: &Transport,
    flow: Flow,
) -> Result<i32, DropReason> {
    packet::translate(ctx, ip, transport, &flow)?;
    route::forward(ctx, config, &flow.src, &flow.dst, 0)
}

/// Makes both halves of a flow: the reverse one first, since it is what holds the port.
#[inline(always)]
fn open(
    ctx: &TcContext,
    config: &Config,
    key: &FlowKey,
    service: &Service,
    backend: &Backend,
) -> Result<Flow, DropReason> {
    let now = helpers::now_s();
    let random = helpers::random();
    let ifindex = helpers::ifindex(ctx);
    let client_port = u16::from_be_bytes(key.sport);
    let back = Flow {
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        ifindex,
        last_seen: now,
        direction: REVERSE,
        seen: 0,
        flags: 0,
        service: service.service,
        set: service.set,
    };
    let mut attempt = 0;
    while attempt < SNAT_TRIES {
        let flow = Flow {
            src: config.gateway_for(&key.dst),
            dst: backend.addr,
            sport: snat_port(client_port, random, attempt).to_be_bytes(),
            dport: backend.port,
            ifindex,
            last_seen: now,
            direction: FORWARD,
            seen: 0,
            flags: 0,
            service: service.service,
            set: service.set,
        };
        let reverse = flow.opposite(key.proto);
        match maps::insert_flow(&reverse, &back) {
            Ok(()) => {
                if maps::insert_flow(key, &flow).is_err() {
                    maps::remove_flow(&reverse);
                    return Err(DropReason::ConntrackFull);
                }
                return Ok(flow);
            }
            Err(maps::EEXIST) => attempt += 1,
            Err(_) => return Err(DropReason::ConntrackFull),
        }
    }
    Err(DropReason::PortsExhausted)
}

/// Ages the flow's row; writes only what changes, since the row is shared between CPUs.
#[inline(always)]
fn touch(flow: &mut Flow, tcp_flags: u8) {
    if trace::is_on() {
        return;
    }
    let mut seen = flow.seen | SEEN_REPLY;
    if tcp_flags & TCP_FIN != 0 {
        seen |= SEEN_FIN;
    }
    if tcp_flags & TCP_RST != 0 {
        seen |= SEEN_RST;
    }
    if seen != flow.seen {
        flow.seen = seen;
    }
    let now = helpers::now_s();
    if now != flow.last_seen {
        flow.last_seen = now;
    }
}
