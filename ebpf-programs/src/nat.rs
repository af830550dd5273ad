//! Flows that are translated per packet: finding a packet's flow, opening one, and what both say of
//! the packet's way.
//!
//! Everything here is generic over the frame, so that tc and XDP decide alike.

use ebpf_common::{
    SCTP, TCP, UDP,
    addr::Addr,
    affinity::MemberKey,
    config::{Config, asker_for},
    conntrack::{
        FLOW_FROM_POD, FLOW_LOCAL, FLOW_MASQUERADE, FLOW_TO_HOST, FORWARD, Flow, FlowKey, REVERSE,
        SEEN_FIN, SEEN_REPLY, SEEN_RST, SNAT_TRIES, snat_port,
    },
    packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
    service::{BackendKey, Peer, SCOPE_EXTERNAL, SCOPE_INTERNAL, Service, choose, mix},
    tunnel::HERE,
    verdict::DropReason,
};

use crate::{
    apart, consistent, count, events,
    frame::{Arrival, Frame},
    helpers, maps,
    packet::{FLOW, Packet, WHOLE},
    service,
};

/// Where a packet to a service comes from.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// Inside the cluster.
    Inside,
    /// This node's own stack, by the host device.
    Host,
    /// Outside.
    Outside,
}

impl From {
    /// The origin of a number.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Inside,
            1 => Self::Host,
            _ => Self::Outside,
        }
    }
}

/// What was found about a packet, by a function that the verifier follows on its own.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is translated; the flow says where it goes.
    Translated,
    /// Nothing is known about it.
    Unknown,
    /// It is to be dropped and has been counted.
    Dropped,
    /// Its sender is to be told that nobody answers; it has been counted.
    Refused,
}

impl Step {
    /// The step of a number.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Translated,
            1 => Self::Unknown,
            2 => Self::Dropped,
            _ => Self::Refused,
        }
    }

    /// Whether it was translated, or why it may not go on, which is counted.
    #[inline(always)]
    pub fn of(found: Result<bool, DropReason>, key: &FlowKey) -> Self {
        match found {
            Ok(true) => Self::Translated,
            Ok(false) => Self::Unknown,
            Err(reason) => {
                maps::count(reason);
                events::dropped(reason, Some(key));
                if reason.is_refusal() { Self::Refused } else { Self::Dropped }
            }
        }
    }
}

/// Translates a packet of a known flow, and copies out what its row says of the way.
#[inline(always)]
pub fn known<F: Frame>(frame: &F, packet: &mut Packet, flow: &mut Flow) -> Step {
    let found = try_known(frame, packet, flow);
    Step::of(found, &packet.key)
}

#[inline(always)]
fn try_known<F: Frame>(frame: &F, packet: &mut Packet, out: &mut Flow) -> Result<bool, DropReason> {
    if packet.fragment != WHOLE {
        apart::resolve(packet)?;
    }
    let key = packet.key;
    let Some(flow) = maps::flow(&key) else { return Ok(false) };
    if is_over(packet, flow) || has_moved(frame, &key, flow, out) {
        close(&key, flow);
        return Ok(false);
    }
    events::touch(&key, flow, seen(packet.flags), helpers::now_s());
    // What says where the packet goes. The compiler reads all that is copied before it writes any, for which the
    // longest chain of calls has no room on the stack.
    (out.src, out.dst, out.sport, out.dport) = (flow.src, flow.dst, flow.sport, flow.dport);
    (out.ifindex, out.flags) = (flow.ifindex, flow.flags);
    frame.translate(packet, out)?;
    Ok(true)
}

/// Whether a packet that has a row begins something new all the same.
#[inline(always)]
fn is_over(packet: &Packet, flow: &'static Flow) -> bool {
    if packet.is_syn() {
        // The client uses its port again.
        return is_done(flow);
    }
    packet.key.proto == UDP && flow.direction == FORWARD && flow.set != 0 && !is_member(flow)
}

/// Whether what goes out under the node's address would now leave by another device or under another address:
/// its answers would not come back. Asked once a second.
#[inline(always)]
fn has_moved<F: Frame>(frame: &F, key: &FlowKey, flow: &Flow, now: &mut Flow) -> bool {
    // The node's own connections that gave way are masqueraded by their flags alone.
    if flow.direction != FORWARD
        || flow.flags & (FLOW_MASQUERADE | FLOW_LOCAL) != FLOW_MASQUERADE
        || flow.last_seen == helpers::now_s()
    {
        return false;
    }
    frame.leaves_otherwise(key, flow, now)
}

/// Asks that. A way that is not there at all may come back. `now` is for what is found.
#[inline(always)]
pub fn leaves_otherwise<F: Frame>(frame: &F, key: &FlowKey, flow: &Flow, now: &mut Flow) -> bool {
    (now.src, now.dst) = (key.src, flow.dst);
    let Ok(ifindex) = frame.way_out(&mut now.src, &now.dst) else { return false };
    ifindex != flow.ifindex || !take_address(ifindex, now) || now.src != flow.src
}

/// Whether either end of a TCP connection has said that it is done.
#[inline(always)]
pub fn is_done(flow: &'static Flow) -> bool {
    flow.is_closing() || maps::flow(&flow.opposite(TCP)).is_some_and(|other| other.is_closing())
}

/// Whether the flow's backend still is in its set. Datagrams have no connection that could end, so
/// their flow moves when the backend goes; TCP's drains.
///
/// Most have the slot that they had; where one has left, the last has taken its place, which the row of
/// members says. Without room for such rows a flow moves once when its backend's slot does.
#[inline(always)]
pub fn is_member(flow: &'static Flow) -> bool {
    if is_at(&BackendKey { set: flow.set, slot: flow.slot }, flow) {
        return true;
    }
    let backend = Peer { addr: flow.dst, port: flow.dport, reserved: [0; 2] };
    let Some(slot) = maps::member(&MemberKey { set: flow.set, backend }) else { return false };
    maps::set_slot(flow, slot);
    true
}

#[inline(always)]
pub fn is_at(key: &BackendKey, flow: &Flow) -> bool {
    maps::backend(key).is_some_and(|backend| backend.addr == flow.dst && backend.port == flow.dport)
}

/// Ends a flow: both rows go.
#[inline(always)]
pub fn close(key: &FlowKey, flow: &Flow) {
    if !flow.is_closing() {
        events::closed(key, flow);
    }
    let other = flow.opposite(key.proto);
    maps::remove_flow(&other);
    maps::remove_flow(key);
}

/// What a packet says about its flow's state. Who only asks to begin, once more, has heard nothing yet.
#[inline(always)]
pub const fn seen(flags: u8) -> u8 {
    let mut seen = if flags & (TCP_SYN | TCP_ACK) == TCP_SYN { 0 } else { SEEN_REPLY };
    if flags & TCP_FIN != 0 {
        seen |= SEEN_FIN;
    }
    if flags & TCP_RST != 0 {
        seen |= SEEN_RST;
    }
    seen
}

/// Flags of the row of answers of a new flow to a service.
#[inline(always)]
pub fn reverse_flags(flow: &Flow, from: From) -> u16 {
    let host = if from == From::Host { FLOW_TO_HOST } else { 0 };
    host | flow.flags & FLOW_MASQUERADE
}

/// Fills in what a new flow to a service is translated to, but for the source port.
#[inline(always)]
pub fn find_service(packet: &Packet, flow: &mut Flow, from: From) -> Step {
    let Some(config) = maps::config() else { return Step::Unknown };
    Step::of(try_find_service(config, packet, flow, from), &packet.key)
}

#[inline(always)]
pub fn try_find_service(
    config: &Config,
    packet: &Packet,
    flow: &mut Flow,
    from: From,
) -> Result<bool, DropReason> {
    let key = &packet.key;
    if packet.kind != FLOW || !matches!(key.proto, TCP | UDP | SCTP) {
        return if config.is_service_address(&key.dst) {
            Err(DropReason::ServiceAddress)
        } else {
            Ok(false)
        };
    }
    if key.proto == TCP && !packet.is_syn() && maps::is_node_address(&key.dst) {
        // A connection of the node itself, whose ports may lie anywhere; or of nobody, as its stack
        // will say.
        return Ok(false);
    }
    let scope = if from == From::Outside { SCOPE_EXTERNAL } else { SCOPE_INTERNAL };
    let found = service::frontend(config, &key.dst, key.dport, key.proto, scope)?;
    let Some(service) = found else { return Ok(false) };
    // A later fragment does not show whether its packet may begin anything; its first one did.
    if packet.flags & TCP_RST != 0 || !packet.has_transport() {
        return Err(DropReason::NoFlow);
    }
    if !service::admits(&service, &key.src) {
        return Err(DropReason::SourceRange);
    }
    choose_backend(key, &service, flow, from)?;
    if key.proto == SCTP && flow.dport != key.dport {
        return Err(DropReason::SctpPort);
    }
    Ok(true)
}

#[inline(always)]
fn choose_backend(
    key: &FlowKey,
    service: &Service,
    flow: &mut Flow,
    from: From,
) -> Result<(), DropReason> {
    // A guess where affinity chooses; the flow's next packet finds the slot.
    flow.slot = if from == From::Outside && service.maglev_bits != 0 {
        consistent::slot(key, service)
    } else {
        // What a datagram's sender sends in a row belongs together, also beyond the life of its flow.
        let random = if key.proto == TCP { helpers::random() } else { flow_hash(key) };
        choose(random, service.count).ok_or_else(|| service.lack())?
    };
    let backend = service::choose_slot(service, &key.src, flow.slot)?;
    flow.dst = backend.addr;
    flow.dport = backend.port;
    flow.service = service.service;
    flow.set = service.set;
    Ok(())
}

/// A number that is the same for all packets of a flow.
#[inline(always)]
fn flow_hash(key: &FlowKey) -> u32 {
    let (src, dst) = (key.src.words(), key.dst.words());
    let addresses = src[0] ^ src[1] ^ src[2] ^ src[3] ^ (dst[2] ^ dst[3]).rotate_left(16);
    let ports = u32::from_ne_bytes([key.sport[0], key.sport[1], key.dport[0], key.dport[1]]);
    mix(u64::from(addresses) << 32 | u64::from(ports))
}

/// Decides under which source address the backend sees the client, such that its answer comes back to
/// this node: the client's own wherever that is so.
#[inline(always)]
pub fn choose_source<F: Arrival>(frame: &F, key: &FlowKey, flow: &mut Flow, from: From) {
    let gateway = maps::config().map_or(Addr::ANY_V6, |config| config.gateway_for(&key.src));
    flow.src = key.src;
    let is_here =
        maps::endpoint(&flow.dst).map(|endpoint| maps::mark_led(&endpoint.flags)).is_some();
    if from == From::Host && (flow.dst == key.src || maps::is_node_address(&flow.dst)) {
        // Between two addresses of its own the node's stack would answer past the programs.
        flow.src = asker_for(&key.dst);
        flow.flags |= FLOW_TO_HOST;
        return;
    }
    let is_pod = || is_here || maps::tunnel(&flow.dst).is_some_and(|to| to.node != flow.dst);
    if flow.dst == key.src && is_pod() {
        // A pod that reached itself under its own address would answer itself. Others do not know the gateway.
        flow.src = gateway;
        return;
    }
    if is_here {
        return;
    }
    if let Some(flags) = maps::node_address(&flow.dst) {
        maps::mark_led(flags);
        flow.flags |= FLOW_LOCAL;
        return;
    }
    if let Some(tunnel) = maps::tunnel(&flow.dst) {
        if tunnel.flags & HERE != 0 {
            // A pod that is not here yet, or not any more.
            return;
        }
        let is_node = tunnel.node == flow.dst;
        if maps::endpoint(&key.src).is_some() || (!is_node && from == From::Host) {
            maps::mark_led(&tunnel.flags);
            flow.flags |= FLOW_FROM_POD;
            return;
        }
        if !is_node {
            flow.src = gateway;
            return;
        }
    }
    masquerade_source(frame, key, flow);
}

/// The address of the device by which the packet leaves. Without one the source stays.
#[inline(always)]
fn masquerade_source<F: Arrival>(frame: &F, key: &FlowKey, flow: &mut Flow) {
    // What has no route is the stack's to answer.
    flow.src = key.src;
    flow.ifindex = frame.way_out(&mut flow.src, &flow.dst).unwrap_or(0);
    if take_address(flow.ifindex, flow) {
        flow.flags |= FLOW_MASQUERADE;
    } else {
        flow.src = key.src;
    }
}

/// Makes the source the address that the device has first, if the kernel has not said which one it would take;
/// whether the device has any, and so a program that knows the answers.
#[inline(always)]
fn take_address(ifindex: u32, flow: &mut Flow) -> bool {
    let Some(device) = maps::device(ifindex) else { return false };
    let [v4, v6] = device.addr;
    let addr = if flow.dst.is_v4() { v4 } else { v6 };
    if flow.src.is_zero() {
        flow.src = addr;
    }
    !addr.is_zero()
}

/// Opens a flow for a pod's packet to the outside. [`Step::Unknown`]: the way out has no address of
/// this node.
#[inline(always)]
pub fn masquerade<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow) -> Step {
    let key = &packet.key;
    flow.dst = key.dst;
    flow.dport = key.dport;
    masquerade_source(frame, key, flow);
    if flow.flags & FLOW_MASQUERADE == 0 {
        return Step::Unknown;
    }
    if !packet.may_open() {
        let _verdict: i32 = count::drop_of(DropReason::NoFlow, &packet.key);
        return Step::Dropped;
    }
    frame.open(packet, flow, FLOW_MASQUERADE)
}

/// Makes both rows of a flow and translates the packet. `flow` has everything but its port; `flags`
/// are those of the reverse row. A connection that is taken up in its middle, as its rows were lost, has
/// begun already.
#[inline(always)]
pub fn open<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow, flags: u16) -> Step {
    flow.seen = seen(packet.flags);
    let opened = insert(frame, &packet.key, flow, flags);
    let done = opened.and_then(|()| frame.translate(packet, flow));
    Step::of(done.map(|()| true), &packet.key)
}

/// Inserts both rows, the reverse one first, since it is what holds the port.
#[inline(always)]
pub fn insert<F: Arrival>(
    frame: &F,
    key: &FlowKey,
    flow: &mut Flow,
    flags: u16,
) -> Result<(), DropReason> {
    let random = helpers::random();
    flow.last_seen = helpers::now_s();
    flow.direction = FORWARD;
    let tries = if key.proto == SCTP { 1 } else { SNAT_TRIES };
    let mut attempt = 0;
    while attempt < SNAT_TRIES {
        if attempt >= tries {
            break;
        }
        flow.sport = port(key, flow, random, attempt);
        match frame.insert_reverse(key, flow, flags) {
            0 => return apart::insert_forward(key, flow),
            maps::EEXIST => {}
            _ => return Err(DropReason::ConntrackFull),
        }
        attempt += 1;
    }
    Err(DropReason::PortsExhausted)
}

/// Inserts the row of answers; gives the kernel's error number, `EEXIST` also where a socket of this
/// node has the port.
#[inline(always)]
pub fn insert_reverse<F: Arrival>(frame: &F, key: &FlowKey, flow: &Flow, flags: u16) -> i32 {
    let reverse = flow.opposite(key.proto);
    let is_taken = if flow.flags & FLOW_MASQUERADE != 0 {
        matches!(key.proto, TCP | UDP) && frame.has_socket(&reverse)
    } else {
        // A process of the node may speak to the client already; of datagrams its one socket says nothing.
        flow.flags & FLOW_LOCAL != 0 && key.proto == TCP && frame.has_socket(&reverse.reversed())
    };
    if is_taken {
        return maps::EEXIST;
    }
    let back = Flow {
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        ifindex: frame.ifindex(),
        last_seen: flow.last_seen,
        direction: REVERSE,
        seen: 0,
        flags,
        service: flow.service,
        set: flow.set,
        slot: flow.slot,
    };
    match maps::insert_flow(&reverse, &back) {
        Ok(()) => 0,
        Err(error) => error,
    }
}

/// Inserts the row of questions when that of answers is there.
#[inline(always)]
pub fn insert_forward(key: &FlowKey, flow: &mut Flow) -> Result<(), DropReason> {
    let (key, row) = (&{ *key }, *flow);
    if let Err(error) = maps::insert_flow(key, &row) {
        maps::remove_flow(&flow.opposite(key.proto));
        // Another CPU may have opened it for the packet before this one.
        let row = if error == maps::EEXIST { maps::flow(key) } else { None };
        *flow = *row.ok_or(DropReason::ConntrackFull)?;
    } else {
        events::opened(key, flow);
    }
    if flow.src == key.src {
        maps::mark_flows(&key.src);
    }
    Ok(())
}

/// The port for a try. The gateway address is also the node's own, whose connections it must not meet;
/// SCTP's port cannot be changed.
#[inline(always)]
fn port(key: &FlowKey, flow: &Flow, random: u32, attempt: u32) -> [u8; 2] {
    let keeps = flow.src == key.src || flow.flags & FLOW_MASQUERADE != 0 || key.proto == SCTP;
    if attempt == 0 && keeps {
        return key.sport;
    }
    snat_port(u16::from_be_bytes(key.sport), random, attempt).to_be_bytes()
}

/// A row to be filled in.
#[inline(always)]
pub const fn new_flow() -> Flow {
    Flow {
        src: Addr::ANY_V6,
        dst: Addr::ANY_V6,
        sport: [0; 2],
        dport: [0; 2],
        ifindex: 0,
        last_seen: 0,
        direction: FORWARD,
        seen: 0,
        flags: 0,
        service: 0,
        set: 0,
        slot: 0,
    }
}
