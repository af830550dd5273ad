//! The reference: what each hook may do with a packet, and what a node remembers of what it did.
//!
//! Written from the promises (`docs/dataplane.md`; kube-proxy's rules) and not from the
//! programs; it shares no logic with them.

use std::{collections::BTreeMap, net::IpAddr};

use ebpf_common::verdict::DropReason;

use super::{
    flows::{
        Direction, Flow, Flows, From, Kind, Life, Tuple, has_transport, is_echo, is_flow, is_init,
        is_syn,
    },
    frame::{Frame, ICMP, ICMPV6, RST, SCTP, TCP, UDP},
    rules::{self, Found, Frontend, Owner, PortId},
    ruling::{Effect, Offer, Ruling, SourcePort},
    step::{Error, Hook, Message},
    way::Way,
    world::{
        ASKER, End, GATEWAY, HostPort, NOBODY, NODE, Service, UNROUTABLE, VXLAN_PORT, World, ip, is,
    },
};

/// Whose affinity it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Client {
    Ip(IpAddr),
    /// A process in a namespace that Orlop does not know.
    Namespace(u64),
}

pub(crate) struct Reference {
    pub(crate) world: World,
    pub(crate) flows: Flows,
    /// Backends of clients, and the second when they were chosen last.
    affinity: BTreeMap<(PortId, Client), (End, u64)>,
    /// Ports of fragmented packets by protocol and addresses.
    fragments: BTreeMap<(u8, IpAddr, IpAddr), (u16, u16)>,
    /// Tells a port from its predecessor.
    lives: BTreeMap<Owner, u32>,
    /// Seconds since the world began.
    now: u64,
}

/// What is known of a packet's flow.
enum Followed {
    Known(Frame, Way),
    Nothing,
    /// A fragment whose first one nobody saw.
    Lost,
}

impl Reference {
    pub(crate) fn new(world: World) -> Self {
        Self {
            world,
            flows: Flows::default(),
            affinity: BTreeMap::new(),
            fragments: BTreeMap::new(),
            lives: BTreeMap::new(),
            now: 0,
        }
    }

    /// What a hook may do with a packet. Flows that the packet ends are ended.
    pub(crate) fn rule(&mut self, hook: Hook, message: &Message) -> Ruling {
        let frame = message.frame();
        let is_incoming =
            matches!(hook, Hook::FromPod | Hook::FromUnderlay | Hook::FromOverlay | Hook::FromHost);
        let is_tunnels = frame.proto == UDP && frame.dst.1 == VXLAN_PORT;
        let is_left = match hook {
            _ if is_incoming && frame.ttl <= 1 => true,
            Hook::FromPod => is_group(&frame.dst.0),
            Hook::FromUnderlay | Hook::ToUnderlay { .. } if is_tunnels => true,
            Hook::ToUnderlay { own } | Hook::ToPod { own } => !own,
            Hook::FromUnderlay | Hook::FromOverlay | Hook::FromHost | Hook::ToOverlay { .. } => {
                false
            }
        };
        if is_left {
            return Ruling::Left;
        }
        let is_looked_up = !matches!(hook, Hook::ToOverlay { own: false });
        let followed = if is_looked_up { self.follow(message) } else { Followed::Nothing };
        let has_way = !matches!(hook, Hook::ToOverlay { .. }) || is_elsewhere(&frame.dst.0);
        match followed {
            // The node's stack waits for the first one.
            Followed::Lost
                if matches!(hook, Hook::FromUnderlay | Hook::FromOverlay)
                    && World::is_node(&frame.dst.0) =>
            {
                return Ruling::Left;
            }
            Followed::Lost => return Ruling::Dropped(DropReason::FragmentLost),
            _ if !has_way => return Ruling::Dropped(DropReason::NoTunnel),
            Followed::Known(frame, _) if !is_incoming => return Ruling::Sent(frame, Way::Stack),
            Followed::Known(frame, way) => return Ruling::Sent(frame, way),
            Followed::Nothing => {}
        }
        // At its own addresses a node has services too, which come first.
        let is_own = World::is_node(&frame.dst.0);
        if !is_own && let Some(ruling) = self.meet(hook, message, &frame) {
            return ruling;
        }
        let ruling = match hook {
            Hook::FromPod => self.sent_by_pod(message, &frame),
            Hook::FromUnderlay => self.sent_by_underlay(message, &frame),
            Hook::FromOverlay => self.sent_by_overlay(message, &frame),
            Hook::FromHost => self
                .open_service(message, &frame, From::Host)
                .unwrap_or(Ruling::Dropped(DropReason::UnknownService)),
            Hook::ToPod { .. } | Hook::ToOverlay { .. } => Ruling::Left,
            Hook::ToUnderlay { .. } => self.sent_to_underlay(message, &frame),
        };
        let is_left = matches!(ruling, Ruling::Left) && is_own;
        if is_left { self.meet(hook, message, &frame).unwrap_or(ruling) } else { ruling }
    }

    /// Takes over what a program did.
    pub(crate) fn take(&mut self, effect: Effect) {
        let Effect::Opened(flow) = effect else { return };
        if let Kind::Service(set, ..) = flow.kind {
            let client = Client::Ip(flow.asked.src.0);
            self.remember(set.port, client, flow.sent.dst);
        }
        let life = Life { last: self.now, ..flow.life };
        self.flows.insert(Flow { life, ..flow });
    }

    /// A client has a backend now.
    pub(crate) fn remember(&mut self, port: PortId, client: Client, backend: End) {
        let mut services = self.world.services.iter();
        let is_sticky = services
            .any(|service| port.owner.is_services(service.number) && service.affinity_s != 0);
        if is_sticky {
            self.affinity.insert((port, client), (backend, self.now));
        }
    }

    /// So many seconds go by; gives how many flows they end.
    pub(crate) fn wait(&mut self, seconds: u32) -> usize {
        self.now += u64::from(seconds);
        self.flows.expire(self.now)
    }

    /// A service is no more, or changes its endpoints.
    pub(crate) fn change(&mut self, number: u8, row: Option<Service>) {
        let at = self.world.services.iter().position(|service| service.number == number);
        match (at, row) {
            (Some(at), Some(row)) => self.world.services[at] = row,
            (None, Some(row)) => self.world.services.push(row),
            (Some(at), None) => {
                let service = self.world.services.remove(at);
                for index in 0..service.ports.len() {
                    *self.lives.entry(Owner::Service(number, index)).or_default() += 1;
                }
                self.affinity.retain(|(port, _), _| !port.owner.is_services(number));
            }
            (None, None) => {}
        }
        let services = &self.world.services;
        self.affinity.retain(|(port, _), _| {
            let Owner::Service(number, index) = port.owner else { return false };
            let service = services.iter().find(|service| service.number == number);
            service.is_some_and(|service| rules::is_reachable(service, index, port.v6))
        });
    }

    /// Pods come and go, and with them these ports of the node.
    pub(crate) fn change_host_ports(&mut self, ports: Vec<HostPort>) {
        for old in &self.world.host_ports {
            if !ports.iter().any(|one| Owner::of(one) == Owner::of(old)) {
                *self.lives.entry(Owner::of(old)).or_default() += 1;
            }
        }
        self.world.host_ports = ports;
    }

    /// Backends that a client of a frontend may get.
    pub(crate) fn choices(&self, frontend: &Frontend, client: Client) -> Vec<End> {
        let kept = self.affinity.get(&(frontend.set.port, client));
        let is_fresh = |since: u64| self.now - since < u64::from(frontend.affinity_s);
        match kept.filter(|(_, since)| is_fresh(*since)) {
            Some((backend, _)) if frontend.backends.contains(backend) => vec![*backend],
            _ => frontend.backends.iter().copied().collect(),
        }
    }

    fn follow(&mut self, message: &Message) -> Followed {
        let frame = match message {
            Message::Plain(frame) => frame,
            Message::Error(error) => return self.follow_error(error),
        };
        if !is_flow(frame) {
            return Followed::Nothing;
        }
        let mut tuple = Tuple::of(frame);
        if let Some((from, _, more)) = frame.fragment {
            let key = (tuple.proto, tuple.src.0, tuple.dst.0);
            if from == 0 && more {
                self.fragments.insert(key, (tuple.src.1, tuple.dst.1));
            } else if from != 0 {
                let Some((sport, dport)) = self.fragments.get(&key) else { return Followed::Lost };
                (tuple.src.1, tuple.dst.1) = (*sport, *dport);
            }
        }
        let Some((number, flow, direction)) = self.flows.find(&tuple) else {
            return Followed::Nothing;
        };
        if self.is_over(frame, &flow, direction) {
            self.flows.remove(number);
            return Followed::Nothing;
        }
        self.note(frame, number, direction);
        let becomes = flow.becomes(direction);
        Followed::Known(becomes.carried_by(frame), Way::of(&flow, direction))
    }

    /// What a packet says of its flow.
    fn note(&mut self, frame: &Frame, number: usize, direction: Direction) {
        let Some(life) = self.flows.life(number) else { return };
        life.last = self.now;
        life.note(frame, direction);
    }

    /// Whether a packet begins something new although its flow is known: a client that uses its port
    /// again, or a datagram whose backend has left.
    fn is_over(&self, frame: &Frame, flow: &Flow, direction: Direction) -> bool {
        if is_syn(frame) {
            return flow.life.is_closing();
        }
        let Kind::Service(set, _, life) = flow.kind else { return false };
        if frame.proto != UDP || direction == Direction::Reverse {
            return false;
        }
        let is_same = self.life(set.port.owner) == life;
        !is_same || !rules::members(&self.world, set).contains(&flow.sent.dst)
    }

    /// An error about a packet of a flow goes to who sent it, in the words that he knows.
    fn follow_error(&self, error: &Error) -> Followed {
        let answer = Tuple::of(&error.about).reversed();
        let Some((_, flow, direction)) = self.flows.find(&answer) else { return Followed::Nothing };
        let becomes = flow.becomes(direction);
        // A router keeps its name; who would have answered has the one that he answers by.
        let from = if error.from == answer.src.0 { becomes.src.0 } else { error.from };
        let about = becomes.reversed().carried_by(&error.about);
        let told = Error { about, from, ..error.clone() };
        Followed::Known(told.frame(), Way::of(&flow, direction))
    }

    /// What is sent to a pod, to another node or to this one's processes as it is may have the ports of a flow,
    /// which would take its answers: it gives way, or what is over is ended.
    fn meet(&mut self, hook: Hook, message: &Message, frame: &Frame) -> Option<Ruling> {
        let to = frame.dst.0;
        let (kind, way) = match hook {
            Hook::ToPod { own: true } | Hook::ToOverlay { own: true } => (Kind::Evaded, Way::Stack),
            Hook::FromPod if is_elsewhere(&to) => (Kind::GaveWay, Way::Out),
            Hook::FromPod | Hook::FromUnderlay | Hook::FromOverlay if World::is_node(&to) => {
                (Kind::GaveWay, Way::Stack)
            }
            Hook::FromPod | Hook::FromUnderlay | Hook::FromOverlay => {
                (Kind::GaveWay, Way::Pod(World::pod(&to)?))
            }
            Hook::FromHost | Hook::ToPod { .. } | Hook::ToUnderlay { .. } => return None,
            Hook::ToOverlay { .. } => return None,
        };
        let (number, flow, direction) = self.flows.find(&Tuple::of(frame).reversed())?;
        let is_plain = matches!(message, Message::Plain(_));
        if !is_plain || !may_begin(frame) || direction == Direction::Forward {
            return None;
        }
        if frame.proto == SCTP || (frame.proto == TCP && flow.life.is_closing()) {
            self.flows.remove(number);
            return None;
        }
        let (from, port) = (frame.src.0, SourcePort::Own);
        Some(Ruling::Opens(vec![Offer { kind, to: frame.dst, from, port, way }]))
    }

    fn sent_by_pod(&self, message: &Message, frame: &Frame) -> Ruling {
        let to = frame.dst.0;
        if let Some(pod) = World::pod(&to) {
            return Ruling::Sent(frame.clone(), Way::Pod(pod));
        }
        if is(GATEWAY, &to) || is(NOBODY, &to) {
            return Ruling::Left;
        }
        if let Some(node) = World::far_node_of_pod(&to).or_else(|| World::far_node(&to)) {
            let has_way = self.world.vxlan || self.world.routed[node];
            return if has_way { sent_out(frame) } else { Ruling::Left };
        }
        if let Some(ruling) = self.open_service(message, frame, From::Inside) {
            return ruling;
        }
        if !self.world.masquerade || World::is_node(&to) || is(UNROUTABLE, &to) {
            return Ruling::Left;
        }
        if !may_open(message, frame) {
            return Ruling::Dropped(DropReason::NoFlow);
        }
        Ruling::Opens(vec![Offer {
            kind: Kind::Masquerade,
            to: frame.dst,
            from: ip(NODE[0], to.is_ipv6()),
            port: SourcePort::Own,
            way: Way::Out,
        }])
    }

    fn sent_by_underlay(&self, message: &Message, frame: &Frame) -> Ruling {
        if let Some(pod) = World::pod(&frame.dst.0) {
            let may_ask = may_begin(frame) || (is_echo(frame) && frame.fragment.is_none());
            let asks = may_ask && may_open(message, frame) && !is_elsewhere(&frame.src.0);
            if !self.world.masquerade || !asks {
                return Ruling::Sent(frame.clone(), Way::Pod(pod));
            }
            // What the pod answers keeps its address.
            let (from, way) = (frame.src.0, Way::Pod(pod));
            let (kind, port) = (Kind::GaveWay, SourcePort::Own);
            return Ruling::Opens(vec![Offer { kind, to: frame.dst, from, port, way }]);
        }
        let is_pod = World::far_node_of_pod(&frame.src.0).is_some();
        let from = if is_pod { From::Inside } else { From::Outside };
        self.open_service(message, frame, from).unwrap_or(Ruling::Left)
    }

    fn sent_by_overlay(&self, message: &Message, frame: &Frame) -> Ruling {
        if let Some(pod) = World::pod(&frame.dst.0) {
            return Ruling::Sent(frame.clone(), Way::Pod(pod));
        }
        if !World::is_node(&frame.dst.0) {
            return Ruling::Left;
        }
        self.open_service(message, frame, From::Inside).unwrap_or(Ruling::Left)
    }

    /// A connection of the node that would meet one of a pod under the node's address.
    fn sent_to_underlay(&self, message: &Message, frame: &Frame) -> Ruling {
        let tuple = Tuple::of(frame);
        let is_new = may_open(message, frame) && (frame.proto != TCP || is_syn(frame));
        let met = self.flows.find(&tuple.reversed());
        let is_met = met.is_some_and(|(_, flow, direction)| match flow.kind {
            Kind::Masquerade | Kind::Evaded => true,
            Kind::GaveWay => false,
            // Those too that ask a service outside under the node's address.
            Kind::Service(..) => {
                let backend = flow.sent.dst.0;
                let is_outside = World::far_node_of_pod(&backend).is_none()
                    && World::pod(&backend).is_none()
                    && !World::is_node(&backend);
                direction == Direction::Reverse && is_outside && is(NODE[0], &flow.sent.src.0)
            }
        });
        if !is_new || !is_met {
            return Ruling::Left;
        }
        Ruling::Opens(vec![Offer {
            kind: Kind::Evaded,
            to: frame.dst,
            from: frame.src.0,
            port: SourcePort::Own,
            way: Way::Stack,
        }])
    }

    /// What becomes of a packet to a service; `None`: it is to none.
    fn open_service(&self, message: &Message, frame: &Frame, from: From) -> Option<Ruling> {
        let to = frame.dst;
        let has_ports = matches!(message, Message::Plain(_)) && is_flow(frame) && !is_echo(frame);
        if !has_ports {
            let is_service = World::is_service_address(&to.0);
            return is_service.then_some(Ruling::Dropped(DropReason::ServiceAddress));
        }
        if frame.proto == TCP && !is_syn(frame) && World::is_node(&to.0) {
            return None;
        }
        let ports = self.ports_of(frame);
        let found = rules::find(&self.world, (to.0, ports.1), frame.proto, from == From::Outside);
        let frontend = match found {
            Found::Nothing => return None,
            Found::Nobody => return Some(Ruling::Told(DropReason::UnknownService)),
            Found::Frontend(frontend) => frontend,
        };
        // A later fragment does not show whether its packet may begin anything; its first one did.
        if is_reset(frame) || !has_transport(frame) {
            return Some(Ruling::Dropped(DropReason::NoFlow));
        }
        let client = frame.src.0;
        if frontend.ranges.as_ref().is_some_and(|all| !all.iter().any(|one| one.contains(&client)))
        {
            return Some(Ruling::Dropped(DropReason::SourceRange));
        }
        if frontend.backends.is_empty() {
            return Some(match frontend.is_elsewhere {
                true => Ruling::Dropped(DropReason::NoLocalBackend),
                false => Ruling::Told(DropReason::NoBackend),
            });
        }
        let choices = self.choices(&frontend, Client::Ip(client));
        let life = self.life(frontend.set.port.owner);
        let kind = Kind::Service(frontend.set, from, life);
        let offers = choices.into_iter().map(|backend| self.offer(frame, backend, (kind, from)));
        Some(Ruling::Opens(offers.collect()))
    }

    /// Under which address a backend sees its client, so that its answer comes back to this node: the
    /// client's own wherever that is so.
    fn offer(&self, frame: &Frame, backend: End, (kind, from): (Kind, From)) -> Offer {
        let (client, v6) = (frame.src.0, frame.src.0.is_ipv6());
        let is_pods = World::pod(&client).is_some();
        let own = |way| (client, SourcePort::Own, way);
        let gateway = |way| (ip(GATEWAY, v6), SourcePort::OwnInRange, way);
        let (from, port, way) = if from == From::Host && World::is_node(&backend.0) {
            // Between two addresses of its own the node would answer past the programs.
            (ip(ASKER, v6), SourcePort::OwnInRange, Way::Host)
        } else if backend.0 == client && (is_pods || World::far_node_of_pod(&client).is_some()) {
            gateway(Way::to(&client))
        } else if World::is_node(&backend.0) {
            own(Way::Stack)
        } else if World::pod(&backend.0).is_some() {
            own(Way::to(&backend.0))
        } else if World::far_node_of_pod(&backend.0).is_some() {
            if is_pods || from == From::Host { own(Way::Out) } else { gateway(Way::Out) }
        } else if World::far_node(&backend.0).is_some() && is_pods {
            own(Way::Out)
        } else {
            (ip(NODE[0], v6), SourcePort::Own, Way::Out)
        };
        Offer { kind, to: backend, from, port, way }
    }

    fn life(&self, owner: Owner) -> u32 {
        self.lives.get(&owner).copied().unwrap_or(0)
    }

    /// The ports of a packet, also where only its first fragment shows them.
    fn ports_of(&self, frame: &Frame) -> (u16, u16) {
        let key = (frame.proto, frame.src.0, frame.dst.0);
        match self.fragments.get(&key) {
            Some(ports) if !has_transport(frame) => *ports,
            _ => (frame.src.1, frame.dst.1),
        }
    }
}

/// Whether a packet of what nothing translates may begin something.
fn may_begin(frame: &Frame) -> bool {
    let is_whole = frame.fragment.is_none();
    match frame.proto {
        UDP => has_transport(frame),
        TCP => is_syn(frame) && is_whole,
        SCTP => is_init(frame) && is_whole,
        _ => false,
    }
}

fn sent_out(frame: &Frame) -> Ruling {
    Ruling::Sent(frame.clone(), Way::Out)
}

/// Whether it is another node's pod, or another node.
fn is_elsewhere(addr: &IpAddr) -> bool {
    World::far_node_of_pod(addr).is_some() || World::far_node(addr).is_some()
}

fn is_group(addr: &IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.octets()[0] >= 224,
        IpAddr::V6(addr) => addr.is_multicast() || addr.is_unicast_link_local(),
    }
}

fn is_reset(frame: &Frame) -> bool {
    frame.proto == TCP && has_transport(frame) && frame.flags & RST != 0
}

/// Whether a packet may be the first of its flow: no reset, no later fragment, no
/// echo that nobody asked for.
fn may_open(message: &Message, frame: &Frame) -> bool {
    let is_plain = matches!(message, Message::Plain(_));
    let is_reply = matches!((frame.proto, frame.flags), (ICMP, 0) | (ICMPV6, 129));
    is_plain && is_flow(frame) && has_transport(frame) && !is_reset(frame) && !is_reply
}
