//! Random worlds and what happens in them. The same seed gives the same case everywhere.

use std::net::IpAddr;

use super::{
    asking::{Asker, Question},
    chance::Random,
    flows::{Direction, Tuple},
    frame::{ACK, FIN, Frame, ICMP, ICMPV6, RST, SCTP, SYN, TCP, UDP},
    step::{Error, Hook, Message, Step, frame},
    world::{
        DNS, End, Endpoint, FAR_NODES, FAR_PODS, GATEWAY, HOST, HostPort, LOOPBACK, NAMES, NOBODY,
        NODE, OUTSIDE, PODS, Place, Port, ROUTER, Service, State, UNROUTABLE, VXLAN_PORT, World,
        ZONES, ip,
    },
};

impl Random {
    /// One time out of so many.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn u16(&mut self) -> u16 {
        u16::try_from(self.next() >> 48).unwrap()
    }
}

/// Few, so that they meet; inside and outside the range that the node gives out.
const CLIENT_PORTS: [u16; 5] = [2_000, 29_999, 40_000, 40_001, 700];
const SERVICE_PORTS: [u16; 3] = [80, 53, 443];
const TARGETS: [u16; 3] = [80, 5_353, 8_080];
const NODE_PORTS: [u16; 4] = [30_000, 30_080, 31_000, 32_767];
/// A service that answers on every node itself has this number.
pub(crate) const NODE_LOCAL: u8 = 9;

pub(crate) fn world(random: &mut Random) -> World {
    let count = 1 + random.below(5);
    let mut node_ports = vec![0, 0, 0, 0, 0];
    node_ports.extend(NODE_PORTS.iter().flat_map(|port| [*port, 0]));
    let mut services: Vec<Service> =
        (1..).take(count).map(|number: u8| service(random, number, &mut node_ports)).collect();
    if random.once_in(6) {
        let row = service(random, NODE_LOCAL, &mut node_ports);
        services.push(Service { node_local: true, ..row });
    }
    World {
        vxlan: !random.once_in(6),
        routed: [random.once_in(3), random.once_in(3)],
        masquerade: !random.once_in(6),
        loopback_ports: random.once_in(2),
        xdp: !random.once_in(3),
        services,
        host_ports: host_ports(random),
    }
}

/// Ports of the node that lead to pods; some are also node ports or ports of an external address.
fn host_ports(random: &mut Random) -> Vec<HostPort> {
    let mut ports: Vec<HostPort> = Vec::new();
    for _ in 0..random.below(5) {
        let proto = random.pick(&[TCP, TCP, UDP, UDP, SCTP]);
        let port = random.pick(&[80, 53, 8_080, NODE_PORTS[0], NODE_PORTS[1]]);
        let target = if proto == SCTP { port } else { random.pick(&TARGETS) };
        let at = random.pick(&[None, None, Some(NODE[0]), Some(NODE[1]), Some(LOOPBACK)]);
        let at = at.map(|pair| random.pick(&pair));
        let new = HostPort { pod: random.below(PODS.len()), at, proto, port, target };
        // The scheduler lets no two pods have the same one.
        let meets = |old: &HostPort| {
            (old.proto, old.port) == (proto, port)
                && (old.at.is_none() || at.is_none() || old.at == at)
        };
        if !ports.iter().any(meets) {
            ports.push(new);
        }
    }
    ports
}

/// A service; node ports that it takes are gone for others.
pub(crate) fn service(random: &mut Random, number: u8, node_ports: &mut Vec<u16>) -> Service {
    let families = random.pick(&[[true, true], [true, false], [false, true], [true, true]]);
    let mut pairs: Vec<(u8, u16)> = [TCP, UDP, SCTP]
        .iter()
        .flat_map(|proto| SERVICE_PORTS.map(|port| (*proto, port)))
        .collect();
    let count = 1 + random.below(3);
    let ports = (0..count).map(|_| {
        let (proto, port) = pairs.swap_remove(random.below(pairs.len()));
        let node_port = if node_ports.is_empty() {
            0
        } else {
            node_ports.swap_remove(random.below(node_ports.len()))
        };
        let target = if proto == SCTP { port } else { random.pick(&TARGETS) };
        let second = if random.once_in(3) { random.pick(&TARGETS) } else { target };
        let node_port = if proto == SCTP { 0 } else { node_port };
        Port { proto, port, node_port, targets: [target, second] }
    });
    let ports = ports.collect();
    let ranges = [
        "198.51.100.0/24",
        "198.51.100.9/32",
        "10.244.0.0/16",
        "2001:db8::/64",
        "::/0",
        "0.0.0.0/0",
    ];
    let limits = if random.once_in(2) { 1 + random.below(2) } else { 0 };
    Service {
        number,
        families,
        external: random.once_in(2),
        external_is_node: number == 1 && random.once_in(3),
        ingress: random.once_in(2),
        internal_local: random.once_in(5),
        external_local: random.once_in(3),
        affinity_s: if random.once_in(3) { random.pick(&[60, 10_800, 86_400]) } else { 0 },
        ranges: (0..limits).map(|_| random.pick(&ranges).parse().unwrap()).collect(),
        ports,
        endpoints: endpoints(random),
        node_local: false,
    }
}

pub(crate) fn endpoints(random: &mut Random) -> Vec<Endpoint> {
    let mut places = Place::ALL.to_vec();
    let count = random.pick(&[0, 1, 1, 2, 2, 3, 5]);
    let has_zones = random.once_in(4);
    let has_nodes = random.once_in(6);
    let all_ready = random.once_in(2);
    (0..count)
        .map(|_| {
            let place = places.swap_remove(random.below(places.len()));
            let states = [State::Ready, State::NotReady, State::Draining, State::Dead];
            let is_ready = all_ready || random.once_in(2);
            let mut hint = |is_used: bool, names: &[&'static str]| {
                (is_used && !random.once_in(8)).then(|| random.pick(names))
            };
            let (zone, hinted_node) = (hint(has_zones, &ZONES), hint(has_nodes, &NAMES));
            Endpoint {
                place,
                state: if is_ready { State::Ready } else { random.pick(&states) },
                second_target: random.once_in(5),
                zone,
                hinted_node,
            }
        })
        .collect()
}

/// The next thing to happen.
pub(crate) fn step(random: &mut Random, world: &World) -> Step {
    let direction = if random.once_in(2) { Direction::Forward } else { Direction::Reverse };
    match random.below(100) {
        0..38 => send(random, world),
        38..40 => lone(random),
        40..43 => {
            let (hook, frame) = plain(random, world);
            Step::Pieces(hook, frame)
        }
        43..46 => Step::Direct { flow: random.below(1_000), flags: random.pick(&[SYN, SYN, ACK]) },
        46..70 => {
            let flags = random.pick(&[SYN, ACK, ACK, ACK, SYN | ACK, FIN | ACK, RST]);
            let outside = random.once_in(3);
            Step::Again { flow: random.below(1_000), outside, direction, flags }
        }
        70..78 => tell(random, direction),
        78..90 => Step::Ask(question(random, world)),
        90..95 if !world.services.is_empty() => {
            let number = random.pick(&world.services).number;
            Step::Endpoints(number, endpoints(random))
        }
        95..98 if !world.services.is_empty() => {
            Step::Service(random.pick(&world.services).number, None)
        }
        98 => Step::Wait(wait(random)),
        99 if random.once_in(2) => Step::HostPorts(host_ports(random)),
        _ => {
            // Without node ports: who has which is settled when the world begins.
            let number = 1 + u8::try_from(random.below(6)).unwrap();
            let row = service(random, number, &mut Vec::new());
            Step::Service(number, Some(Box::new(Service { external_is_node: false, ..row })))
        }
    }
}

/// Seconds, close to those that mean something, but never by less than the two by which a row may seem older
/// than it is: a case takes its time, and clocks count whole seconds.
fn wait(random: &mut Random) -> u32 {
    const STEP: u32 = 13;
    const LONG: [u32; 8] = [572, 573, 830, 831, 6_646, 6_647, 100_000, 1];
    let steps = if random.once_in(6) {
        random.pick(&LONG)
    } else {
        random.pick(&[1, 2, 3, 4, 5, 13, 14, 16, 17, 18, 19])
    };
    steps * STEP
}

fn send(random: &mut Random, world: &World) -> Step {
    let (hook, mut frame) = plain(random, world);
    if random.once_in(30) {
        frame.ttl = random.pick(&[0, 1, 2]);
    }
    if random.once_in(8) && frame.src.0.is_ipv6() {
        frame.extensions = random.pick(&[vec![0], vec![60], vec![0, 43], vec![0, 60, 43, 60]]);
    }
    if random.once_in(16) {
        // About as long as a packet may be that fits into a tunnel's, and none that its device cannot take.
        frame.payload = vec![7; 1_340 + random.below(69)];
    }
    frame.unchecked = random.once_in(8) && frame.src.0.is_ipv4() && frame.proto == UDP;
    Step::Send(hook, Message::Plain(frame))
}

fn tell(random: &mut Random, direction: Direction) -> Step {
    // By family it is the type of one or of the other: see `case.rs`.
    let kind = random.pick(&[(3, 4, [0, 0, 5, 120]), (3, 3, [0; 4]), (11, 0, [0; 4])]);
    let quoted = random.pick(&[28, 48, 500]);
    Step::Tell { flow: random.below(1_000), direction, by_router: random.once_in(2), kind, quoted }
}

/// What belongs to nothing: a later fragment, an error, a packet of another protocol.
fn lone(random: &mut Random) -> Step {
    let v6 = random.once_in(2);
    let from = (ip(random.pick(&PODS), v6), random.pick(&CLIENT_PORTS));
    let to = (ip(random.pick(&OUTSIDE), v6), 9);
    match random.below(3) {
        0 => {
            let whole = Frame { payload: vec![7; 60], ..Frame::between(UDP, from, to) };
            let later = Frame { fragment: Some((24, 16, true)), ..whole };
            Step::Send(Hook::FromPod, Message::Plain(later))
        }
        1 => {
            let about = Frame::between(UDP, to, from);
            let kind = if v6 { (1, 4, [0; 4]) } else { (3, 3, [0; 4]) };
            let error = Error { about, from: from.0, kind, quoted: 500 };
            Step::Send(Hook::FromPod, Message::Error(error))
        }
        _ => Step::Send(Hook::FromPod, Message::Plain(Frame::between(47, from, to))),
    }
}

/// A packet that might open something, and where it meets a program.
fn plain(random: &mut Random, world: &World) -> (Hook, Frame) {
    let v6 = random.once_in(2);
    let own = !random.once_in(6);
    let hook = random.pick(&[
        Hook::FromPod,
        Hook::FromPod,
        Hook::FromPod,
        Hook::FromUnderlay,
        Hook::FromUnderlay,
        Hook::FromUnderlay,
        Hook::FromUnderlay,
        Hook::FromOverlay,
        Hook::FromHost,
        Hook::ToPod { own },
        Hook::ToUnderlay { own },
        Hook::ToUnderlay { own },
        Hook::ToOverlay { own },
    ]);
    let port = random.pick(&CLIENT_PORTS);
    let outside = [OUTSIDE[0], OUTSIDE[1], OUTSIDE[2], FAR_NODES[0], FAR_PODS[0], FAR_PODS[2]];
    let from = match hook {
        Hook::FromPod => random.pick(&PODS),
        Hook::FromUnderlay => random.pick(&outside),
        Hook::FromOverlay => random.pick(&FAR_PODS),
        Hook::FromHost => random.pick(&[GATEWAY, GATEWAY, NODE[0]]),
        Hook::ToPod { .. } => random.pick(&[GATEWAY, NODE[0], OUTSIDE[0]]),
        Hook::ToUnderlay { .. } => NODE[0],
        Hook::ToOverlay { .. } => random.pick(&[GATEWAY, PODS[0]]),
    };
    let (proto, to) = target(random, world, (hook, v6));
    let mut frame = frame(Tuple { proto, src: (ip(from, v6), port), dst: to });
    if matches!(proto, ICMP | ICMPV6) {
        frame.dst.1 = 0;
        if random.once_in(8) {
            // An answer to nothing.
            frame.flags = if v6 { 129 } else { 0 };
            (frame.src.1, frame.dst.1) = (0, port);
        }
    }
    if proto == TCP && random.once_in(5) {
        frame.flags = random.pick(&[ACK, SYN | ACK, FIN | ACK, RST, RST | ACK]);
    }
    (hook, frame)
}

/// Protocol and destination of a packet at a hook.
fn target(random: &mut Random, world: &World, (hook, v6): (Hook, bool)) -> (u8, End) {
    let echo = if v6 { ICMPV6 } else { ICMP };
    let proto = random.pick(&[TCP, TCP, TCP, UDP, UDP, UDP, SCTP, echo]);
    let port = random.pick(&[80, 53, 443, 8_080, 30_080, 30_000, 9]);
    let places: &[super::world::Pair] = match hook {
        Hook::ToPod { .. } => return (proto, (ip(random.pick(&PODS), v6), port)),
        Hook::ToUnderlay { .. } => &[OUTSIDE[0], OUTSIDE[1], HOST],
        Hook::ToOverlay { .. } => &[FAR_PODS[0], FAR_PODS[2], FAR_NODES[0], OUTSIDE[0]],
        _ if !world.host_ports.is_empty() && random.once_in(8) => {
            return host_port_target(random, world, v6);
        }
        _ if !random.once_in(4) && !world.services.is_empty() => {
            return service_target(random, world, (v6, hook));
        }
        Hook::FromPod => &[
            PODS[0],
            PODS[1],
            FAR_PODS[0],
            FAR_PODS[2],
            FAR_NODES[0],
            FAR_NODES[1],
            GATEWAY,
            NOBODY,
            NODE[0],
            NODE[1],
            OUTSIDE[0],
            OUTSIDE[1],
            OUTSIDE[2],
            HOST,
            UNROUTABLE,
            DNS,
        ],
        Hook::FromUnderlay => &[NODE[0], NODE[1], PODS[0], PODS[1], GATEWAY, NOBODY, OUTSIDE[2]],
        Hook::FromOverlay => &[PODS[0], PODS[1], NODE[0], GATEWAY, NOBODY, OUTSIDE[0]],
        Hook::FromHost => &[OUTSIDE[0], FAR_PODS[0], NODE[0]],
    };
    let to = ip(random.pick(places), v6);
    if hook == Hook::FromPod && random.once_in(40) {
        let group = if v6 { "ff02::1" } else { "224.0.0.1" };
        return (UDP, (group.parse().unwrap(), 5_353));
    }
    let tunnel = match hook {
        Hook::FromUnderlay => Some(NODE[0]),
        Hook::ToUnderlay { .. } => Some(FAR_NODES[0]),
        Hook::FromPod
        | Hook::FromOverlay
        | Hook::FromHost
        | Hook::ToPod { .. }
        | Hook::ToOverlay { .. } => None,
    };
    if let Some(far) = tunnel.filter(|_| random.once_in(20)) {
        return (UDP, (ip(far, v6), VXLAN_PORT));
    }
    (proto, (to, port))
}

/// A port of the node that leads to a pod, or the same number at another address.
fn host_port_target(random: &mut Random, world: &World, v6: bool) -> (u8, End) {
    let port = random.pick(&world.host_ports);
    let at = port.at.filter(|at| at.is_ipv6() == v6 && !at.is_loopback());
    let any = ip(random.pick(&NODE), v6);
    let proto = if random.once_in(12) { random.pick(&[TCP, UDP]) } else { port.proto };
    (proto, (if random.once_in(8) { any } else { at.unwrap_or(any) }, port.port))
}

/// A frontend of a service, or something near one.
fn service_target(random: &mut Random, world: &World, (v6, hook): (bool, Hook)) -> (u8, End) {
    let with_family = world.services.iter().filter(|one| one.has(v6)).cloned().collect::<Vec<_>>();
    let is_any = with_family.is_empty() || random.once_in(6);
    let service = random.pick(if is_any { &world.services } else { &with_family });
    let port = random.pick(&service.ports);
    let echo = if v6 { ICMPV6 } else { ICMP };
    let proto = if random.once_in(12) { random.pick(&[TCP, UDP, echo]) } else { port.proto };
    let number = if random.once_in(20) { 9 } else { port.port };
    let cluster_ip: (IpAddr, u16) = (service.cluster_ip(v6), number);
    let node =
        (ip(random.pick(&NODE), v6), if port.node_port == 0 { 30_001 } else { port.node_port });
    let others = [
        (service.external, (service.external_ip(v6), number)),
        (service.ingress, (service.ingress_ip(v6), number)),
        (port.node_port != 0, node),
    ];
    let is_there = |(is_there, _): &&(bool, End)| *is_there;
    let mut at: Vec<End> = others.iter().filter(is_there).map(|(_, end)| *end).collect();
    if at.is_empty() || random.once_in(4) {
        at = others.map(|(_, end)| end).to_vec();
    }
    let wants_cluster_ip = match hook {
        Hook::FromHost => !random.once_in(4),
        Hook::FromUnderlay => random.once_in(10),
        Hook::FromOverlay => return (proto, node),
        Hook::FromPod | Hook::ToPod { .. } | Hook::ToUnderlay { .. } | Hook::ToOverlay { .. } => {
            random.once_in(2)
        }
    };
    (proto, if wants_cluster_ip { cluster_ip } else { random.pick(&at) })
}

pub(crate) fn question(random: &mut Random, world: &World) -> Question {
    let v6 = random.once_in(2);
    let asker =
        random.pick(&[Asker::Pod(0), Asker::Pod(1), Asker::Pod(2), Asker::Node, Asker::Stranger]);
    let (proto, mut to) = if world.services.is_empty() || random.once_in(8) {
        (TCP, (ip(random.pick(&[OUTSIDE[0], NODE[0], PODS[0], ROUTER, DNS]), v6), 80))
    } else if !world.host_ports.is_empty() && random.once_in(6) {
        host_port_target(random, world, v6)
    } else {
        service_target(random, world, (v6, Hook::FromPod))
    };
    if random.once_in(8) {
        to.0 = ip(LOOPBACK, v6);
    }
    // No hook is called for sockets of other protocols.
    let proto = if matches!(proto, TCP | UDP) { proto } else { TCP };
    let random_number = u32::from(random.u16()) << 16 | u32::from(random.u16());
    let datagram = proto == UDP && random.once_in(2);
    Question { asker, proto, datagram, to, random: random_number }
}
