//! Endpoints that change a hundred times a second under real connections and datagrams of both families, through
//! the agent's own path: no request fails while every backend is alive, and nothing is left in any map afterwards.
//!
//! Once with every service asked in the packets' path, once with programs at the sockets. `ORLOP_SOAK_S` says
//! for how many seconds in all, 20 if it says nothing. One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/chance.rs"]
mod chance;
#[cfg(test)]
#[path = "support/node.rs"]
mod node;
#[cfg(test)]
#[path = "support/requests.rs"]
mod requests;
#[cfg(test)]
#[path = "soak/serve.rs"]
mod serve;

#[cfg(test)]
use node::space;

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
        path::{Path, PathBuf},
        time::{Duration, Instant},
    };

    use aya::maps::{
        HashMap, Map, MapData,
        lpm_trie::{Key, LpmTrie},
    };
    use ebpf_common::{
        ABI_VERSION, UDP,
        conntrack::{FORWARD, Flow, FlowKey},
        maps as names,
        service::SourceRange,
    };
    use node_agent::{
        dataplane::look::Look,
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, Family, ObjectKey, Protocol, ServiceKind,
            ServicePort, ServiceRow, TrafficPolicy,
        },
    };

    use super::{
        cgroup::TestCgroup,
        chance::Random,
        node::{
            Agent, FAMILIES, NAME, NODE_IPS, Node,
            place::is_possible,
            pod_ip,
            space::{Space, pause},
        },
        requests::{BREATH, Kind, Outcome, Requests},
        serve::serve,
    };

    const CLIENT: u8 = 11;
    const BACKENDS: [u8; 6] = [21, 22, 23, 24, 25, 26];
    /// Services that are asked all the time; those after them come and go, and nobody asks them.
    const STEADY: u8 = 6;
    const GHOSTS: u8 = 6;
    /// Between two changes: a hundred a second.
    const CHANGE: Duration = Duration::from_millis(10);
    /// How many answers every client has at the least.
    const ANSWERS: usize = 100;
    /// How much longer a slow machine may take for them.
    const LATE: Duration = Duration::from_secs(120);
    /// Longer than any flow lives without a packet.
    const AGE_S: u32 = 8_000;

    fn cluster_ip(family: Family, number: u8) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number.into()).into(),
        }
    }

    fn node_port(number: u8) -> u16 {
        30_000 + u16::from(number)
    }

    fn key(number: u8) -> ObjectKey {
        ObjectKey::new("default", &format!("service-{number}"))
    }

    fn slice_key(family: Family, number: u8) -> ObjectKey {
        ObjectKey::new("default", &format!("service-{number}-{family:?}"))
    }

    /// Between them they have rows in every map of services.
    fn service(number: u8) -> ServiceRow {
        let port = |protocol, node_port| ServicePort {
            name: format!("{protocol:?}").into(),
            protocol,
            port: 80,
            node_port,
        };
        let is_local = number.is_multiple_of(4);
        ServiceRow {
            kind: ServiceKind::LoadBalancer,
            cluster_ips: FAMILIES.map(|family| cluster_ip(family, number)).into(),
            ingress_ips: [format!("203.0.113.{number}"), format!("2001:db8:1::{number}")]
                .map(|ip| ip.parse().unwrap())
                .to_vec()
                .into(),
            ports: vec![
                port(Protocol::Tcp, node_port(number)),
                port(Protocol::Udp, node_port(number)),
            ],
            affinity_s: if number.is_multiple_of(3) { 10_800 } else { 0 },
            external_policy: if is_local { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
            source_ranges: [format!("10.{number}.0.0/16"), format!("fd00:{number}::/64")]
                .map(|range| range.parse().unwrap())
                .to_vec()
                .into(),
            ..ServiceRow::default()
        }
    }

    fn slice(family: Family, number: u8, pods: &[u8]) -> EndpointSliceRow {
        let port =
            |protocol| EndpointPort { name: format!("{protocol:?}").into(), protocol, port: 8_080 };
        let endpoint = |last: &u8| EndpointRow {
            ip: pod_ip(family, *last),
            node: NAME.into(),
            ..EndpointRow::default()
        };
        EndpointSliceRow {
            service: key(number),
            family,
            ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
            endpoints: pods.iter().map(endpoint).collect(),
            ..EndpointSliceRow::default()
        }
    }

    /// One change. A service that is asked always has a backend of each family, and all of them are alive.
    fn change(node: &Node, random: &mut Random) {
        let some = |random: &mut Random, all: &[u8]| -> Vec<u8> {
            let mask = random.below(1 << all.len());
            let is_in = |at: &usize| mask >> at & 1 == 1;
            (0..all.len()).filter(is_in).map(|at| all[at]).collect()
        };
        let pick = |random: &mut Random, from: u8, count: u8| {
            from + u8::try_from(random.below(usize::from(count))).unwrap()
        };
        let family = FAMILIES[random.below(FAMILIES.len())];
        if random.below(4) != 0 {
            let number = pick(random, 1, STEADY);
            let mut pods = some(random, &BACKENDS);
            if pods.is_empty() {
                pods.push(BACKENDS[usize::from(number) % BACKENDS.len()]);
            }
            node.slices.upsert(slice_key(family, number), slice(family, number, &pods));
            return;
        }
        let number = pick(random, STEADY + 1, GHOSTS);
        match random.below(4) {
            0 => drop(node.services.delete(&key(number))),
            1 => drop(node.slices.delete(&slice_key(family, number))),
            2 => drop(node.services.upsert(key(number), service(number))),
            _ => {
                let pods: Vec<u8> = (100..140).collect();
                let row = slice(family, number, &some(random, &pods));
                node.slices.upsert(slice_key(family, number), row);
            }
        }
    }

    /// Changes endpoints for so long, and on until there were so many changes and answers enough to every client,
    /// unless these do not come; gives how many changes there were.
    fn churn(node: &Node, (time, least): (Duration, u32), running: &[Requests]) -> u32 {
        let (mut random, start, mut changes) = (Random(0x6f72_6c6f_7021), Instant::now(), 0);
        let is_enough = |changes, elapsed| {
            let are_answered = || running.iter().all(|client| client.answered() > ANSWERS);
            elapsed >= time && changes >= least && are_answered()
        };
        while !is_enough(changes, start.elapsed()) && start.elapsed() < time + LATE {
            change(node, &mut random);
            changes += 1;
            pause((CHANGE * changes).saturating_sub(start.elapsed()));
        }
        changes
    }

    fn addresses() -> Vec<SocketAddr> {
        let of = |number| FAMILIES.map(|family| (cluster_ip(family, number), 80).into());
        (1..=STEADY).flat_map(of).collect()
    }

    fn node_ports() -> Vec<SocketAddr> {
        let of = |number| NODE_IPS.map(|ip| (ip, node_port(number)).into());
        (1..=STEADY).flat_map(of).collect()
    }

    #[expect(clippy::print_stdout, reason = "what a soak has done is part of its result")]
    fn soak(cgroup: Option<PathBuf>, time: Duration) {
        let with_sockets = cgroup.is_some();
        let outside = Space::new();
        let mut node = Node::new(&outside);
        for last in BACKENDS.iter().chain([&CLIENT]) {
            node.add_pod(*last);
        }
        for last in BACKENDS {
            node.pods[&last].run(move || serve(last));
        }
        for number in 1..=STEADY {
            node.services.upsert(key(number), service(number));
            for family in FAMILIES {
                node.slices.upsert(slice_key(family, number), slice(family, number, &BACKENDS));
            }
        }
        let agent = node.start(cgroup);
        let pod = &node.pods[&CLIENT];
        // Each datagram of a socket that is not connected asks for the service anew and opens no flow: as
        // many as there can be, so that a moment without a row would be met.
        let often = if with_sockets { Duration::ZERO } else { BREATH };
        let mut running = vec![
            Requests::start(pod, Kind::Connection, addresses(), BREATH),
            Requests::start(pod, Kind::Connected, addresses(), BREATH),
            Requests::start(pod, Kind::Datagram, addresses(), often),
        ];
        if !with_sockets {
            // Programs at the sockets would take the client outside for a process of this node.
            running.push(Requests::start(&outside, Kind::Connection, node_ports(), BREATH));
            running.push(Requests::start(&outside, Kind::Connected, node_ports(), BREATH));
        }
        // Four fifths of what was promised, on a machine that does something else too; an emulated processor
        // is ten times slower.
        let share = if std::env::var_os("ORLOP_EMULATED").is_some() { 10 } else { 1 };
        let promised = time.as_millis() / CHANGE.as_millis() * 4 / 5 / share;
        let promised = u32::try_from(promised).unwrap();
        let changes = churn(&node, (time, promised), &running);
        let outcomes: Vec<Outcome> = running.into_iter().map(Requests::stop).collect();
        println!("{} s, {changes} changes, sockets {with_sockets}: {outcomes:?}", time.as_secs());
        assert!(changes >= promised, "{changes} changes");
        for outcome in &outcomes {
            assert!(outcome.failures.is_empty(), "{outcome:?}");
            assert!(outcome.answered > ANSWERS, "{outcome:?}");
            assert!(outcome.backends.len() == BACKENDS.len(), "all were asked: {outcome:?}");
        }
        nothing_is_left(&node, &agent);
        drop(agent);
        node.space.settle();
    }

    fn nothing_is_left(node: &Node, agent: &Agent) {
        // Both halves of a flow are there, and go together once it is over. One that is being collected may
        // be seen with one half, but not for ever.
        let halves = || {
            let pins = node.pins();
            node.space.run(move || halves(&pins))
        };
        let ((flows, mut lone), start) = (halves(), Instant::now());
        assert!(flows > 0, "no rows of flows");
        while !lone.is_empty() {
            let is_late = start.elapsed() > Duration::from_secs(60);
            assert!(!is_late, "{flows} rows of flows, without the other one {lone:?}");
            pause(Duration::from_millis(200));
            lone = &lone & &halves().1;
        }

        for number in 1..=STEADY + GHOSTS {
            node.services.delete(&key(number));
            for family in FAMILIES {
                node.slices.delete(&slice_key(family, number));
            }
        }
        node.settle(agent);
        let pins = node.pins();
        let left = node.space.run(move || rows(&pins));
        let of_services: Vec<_> =
            left.iter().filter(|(map, rows)| is_of_services(map) && *rows != 0).collect();
        assert!(of_services.is_empty(), "rows are left: {of_services:?}");
        // Datagrams' flows end with the frontends that they asked, the others when they are old.
        until_left(node, |key, flow| key.proto == UDP && flow.set != 0);
        let pins = node.pins();
        node.space.run(move || age(&pins));
        until_left(node, |_key, _flow| true);
    }

    /// Waits until there is no such row of a flow.
    fn until_left(node: &Node, is_such: fn(&FlowKey, &Flow) -> bool) {
        let start = Instant::now();
        loop {
            let pins = node.pins();
            let flows = node.space.run(move || Look::below(&pins).flows().unwrap());
            let left = flows.iter().filter(|(key, flow)| is_such(key, flow)).count();
            if left == 0 {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{left} rows of flows are left");
            pause(Duration::from_millis(200));
        }
    }

    fn is_of_services(map: &str) -> bool {
        let maps =
            [names::SERVICES, names::BACKENDS, names::MEMBERS, names::MAGLEV, names::SOURCE_RANGES];
        maps.contains(&map)
    }

    fn pin(pins: &Path, name: &str) -> MapData {
        MapData::from_pin(pins.join(format!("v{ABI_VERSION}")).join(name)).unwrap()
    }

    fn rows(pins: &Path) -> Vec<(&'static str, u64)> {
        let fill = Look::below(pins).fill().unwrap();
        let mut rows: Vec<_> = fill.into_iter().map(|fill| (fill.map, fill.rows)).collect();
        let ranges: LpmTrie<_, SourceRange, u32> =
            Map::LpmTrie(pin(pins, names::SOURCE_RANGES)).try_into().unwrap();
        let keys: Vec<Key<SourceRange>> = ranges.keys().map(Result::unwrap).collect();
        rows.push((names::SOURCE_RANGES, u64::try_from(keys.len()).unwrap()));
        rows
    }

    /// The number of rows of flows, and those whose other half is not there.
    fn halves(pins: &Path) -> (usize, BTreeSet<FlowKey>) {
        let rows = Look::below(pins).flows().unwrap();
        let is_forward = |flow: &Flow| flow.direction == FORWARD;
        let forward = rows.iter().filter(|(_, flow)| is_forward(flow));
        let opposite: BTreeMap<FlowKey, FlowKey> =
            forward.map(|(key, flow)| (flow.opposite(key.proto), *key)).collect();
        let lone = opposite.iter().filter(|(other, _)| !rows.contains_key(other));
        let mut lone: BTreeSet<FlowKey> = lone.map(|(_, key)| *key).collect();
        let reverse = rows.iter().filter(|(_, flow)| !is_forward(flow)).map(|(key, _)| key);
        lone.extend(reverse.filter(|key| !opposite.contains_key(key)));
        (rows.len(), lone)
    }

    /// Makes every flow one that was last seen long ago.
    fn age(pins: &Path) {
        let mut map: HashMap<_, FlowKey, Flow> =
            Map::HashMap(pin(pins, names::CONNTRACK)).try_into().unwrap();
        for (key, flow) in Look::below(pins).flows().unwrap() {
            let last_seen = flow.last_seen.wrapping_sub(AGE_S);
            map.insert(key, Flow { last_seen, ..flow }, 0).unwrap();
        }
    }

    #[test]
    fn endpoints_change_under_traffic_and_nothing_fails_or_is_left() {
        if !is_possible() {
            return;
        }
        let seconds = std::env::var_os("ORLOP_SOAK_S");
        let seconds = seconds.map_or(20, |text| text.to_str().unwrap().parse().unwrap());
        let half = Duration::from_secs(seconds) / 2;
        let cgroup = TestCgroup::enter("soak");
        // First without: programs at the sockets outlive the agent that attached them.
        soak(None, half);
        soak(Some(cgroup.path.clone()), half);
    }
}
