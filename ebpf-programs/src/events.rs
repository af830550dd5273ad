//! Tells whoever listens what becomes of connections: one row in a ring as one begins, ends or is
//! refused. Nothing here runs for a packet of a connection that goes on.
//!
//! Each function is one call where something is decided, asks first whether anybody listens, and
//! builds its row in the ring's own memory, as the stack of the programs is full.

use ebpf_common::{
    addr::Addr,
    config::EVENTS,
    conntrack::{FORWARD, Flow, FlowKey, SEEN_FIN, SEEN_RST},
    event::{CLOSED, DROPPED, Event, OPENED, PACKET, SOCKET},
    service::Peer,
    socket::Ask,
    verdict::DropReason,
};

use crate::{helpers, log, maps, trace};

const NOBODY: Peer = Peer { addr: Addr::ANY_V6, port: [0; 2], reserved: [0; 2] };

/// A flow has got its rows.
#[inline(never)]
pub fn opened(key: &FlowKey, flow: &Flow) {
    log::flow(OPENED, key, flow);
    flow_event(OPENED, key, flow);
}

/// A flow ends since its rows go.
#[inline(never)]
pub fn closed(key: &FlowKey, flow: &Flow) {
    log::flow(CLOSED, key, flow);
    flow_event(CLOSED, key, flow);
}

/// Notes a packet of a flow, and tells of its end: its client has finished, or either end resets it.
/// The backend's finishing alone leaves the client free to send.
#[inline(always)]
pub fn touch(key: &FlowKey, flow: &'static Flow, seen: u8, now_s: u32) {
    let ends = if flow.direction == FORWARD { SEEN_FIN | SEEN_RST } else { SEEN_RST };
    if seen & ends & !flow.seen != 0 {
        closed(key, flow);
    }
    maps::touch(flow, seen, now_s);
}

/// A packet is dropped, or its sender refused; `key` is null where nothing could be read of it.
#[inline(never)]
pub fn dropped(reason: DropReason, key: Option<&FlowKey>) {
    log::dropped(reason, key);
    if !is_listened() {
        return;
    }
    let Some(mut entry) = maps::new_event() else { return };
    let event = entry.write(Event {
        at: helpers::now_ns(),
        netns: 0,
        key: NO_KEY,
        source: NOBODY,
        to: NOBODY,
        kind: DROPPED,
        path: PACKET,
        reason: reason as u8,
        direction: FORWARD,
        reserved: 0,
    });
    // Not by a choice of values, which would take the stack for its result.
    if let Some(key) = key {
        event.key = *key;
    }
    entry.submit(0);
}

/// A socket goes to a backend.
#[inline(never)]
pub fn connected(ask: &Ask, backend: &Peer) {
    log::socket(OPENED, ask, backend, 0);
    socket_event(OPENED, ask, backend, 0);
}

/// A socket is refused.
#[inline(never)]
pub fn refused(ask: &Ask, reason: DropReason) {
    log::socket(DROPPED, ask, &NOBODY, reason as u8);
    socket_event(DROPPED, ask, &NOBODY, reason as u8);
}

const NO_KEY: FlowKey = FlowKey {
    src: Addr::ANY_V6,
    dst: Addr::ANY_V6,
    sport: [0; 2],
    dport: [0; 2],
    proto: 0,
    reserved: [0; 3],
};

#[inline(always)]
fn is_listened() -> bool {
    !trace::is_on() && maps::config().is_some_and(|config| config.flags & EVENTS != 0)
}

#[inline(always)]
fn flow_event(kind: u8, key: &FlowKey, flow: &Flow) {
    if !is_listened() {
        return;
    }
    let Some(mut entry) = maps::new_event() else { return };
    let _written = entry.write(Event {
        at: helpers::now_ns(),
        netns: 0,
        key: *key,
        source: Peer { addr: flow.src, port: flow.sport, reserved: [0; 2] },
        to: Peer { addr: flow.dst, port: flow.dport, reserved: [0; 2] },
        kind,
        path: PACKET,
        reason: 0,
        direction: flow.direction,
        reserved: 0,
    });
    entry.submit(0);
}

#[inline(always)]
fn socket_event(kind: u8, ask: &Ask, backend: &Peer, reason: u8) {
    if !is_listened() {
        return;
    }
    let Some(mut entry) = maps::new_event() else { return };
    let event = entry.write(Event {
        at: helpers::now_ns(),
        netns: ask.netns,
        key: NO_KEY,
        source: NOBODY,
        to: NOBODY,
        kind,
        path: SOCKET,
        reason,
        direction: FORWARD,
        reserved: 0,
    });
    event.key.dst = ask.wanted.addr;
    event.key.dport = ask.wanted.port;
    event.key.proto = ask.proto;
    event.to = *backend;
    entry.submit(0);
}
