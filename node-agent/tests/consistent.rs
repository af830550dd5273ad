//! A client outside reaches the same backend by whichever node: the programs of two nodes, whose maps
//! came about separately, by `BPF_PROG_TEST_RUN` on the running kernel.

#[cfg(test)]
#[path = "support/place.rs"]
#[expect(dead_code, reason = "shared with tests that need more of it")]
mod place;
#[cfg(test)]
#[path = "support/wire.rs"]
mod wire;

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        net::IpAddr,
        thread,
    };

    use ebpf_common::{
        addr::{Addr, Net},
        config::Config,
        conntrack::FORWARD,
        device::{Device, XDP},
        service::{Backend, ServiceKey},
    };
    use node_agent::{
        dataplane::{
            frontends::{Frontend, Port, PortId, Which},
            load::{Programs, TcHook},
            maps::Maps,
            plan::{Observed, Plan},
        },
        model::{Family, FarEnd, FarPath, ObjectKey, Protocol},
    };

    use super::{
        place::{is_possible, own_namespaces},
        wire::{ACK, FIN, SYN, TCP, UDP, Wire},
    };

    /// Loopback, by which test runs come in.
    const LOOPBACK: u32 = 1;
    const PORT: u16 = 30_080;

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    /// Backend number `n` of a family, a pod of a node that neither of the two is.
    fn backend(v6: bool, n: u8) -> Backend {
        let text = if v6 { format!("fd02:9::{n:x}") } else { format!("10.244.9.{n}") };
        Backend { addr: addr(&text), port: 8080_u16.to_be_bytes(), reserved: [0; 2] }
    }

    struct Node {
        programs: Programs,
        maps: Maps,
        observed: Observed,
        number: u8,
    }

    impl Node {
        fn new(number: u8) -> Self {
            let (programs, maps) = Programs::load(None).unwrap();
            let mut node = Self { programs, maps, observed: Observed::default(), number };
            let config = Config {
                services: [Net::default(); 2],
                gateway: [addr(&format!("10.244.{number}.1")), addr(&format!("fd02:{number}::1"))],
                vxlan_ifindex: 5,
                node_port_first: 30_000,
                node_port_last: 32_767,
                vxlan_port: 8472,
                ..Config::default()
            };
            node.maps.set_config(&config).unwrap();
            let ips = [node.ip(false), node.ip(true)].map(|ip| ip.parse().unwrap());
            node.maps.set_node_addresses(&BTreeSet::from(ips)).unwrap();
            let device = Device {
                addr: [addr(&node.ip(false)), addr(&node.ip(true))],
                mtu: 1500,
                mac: [0; 6],
                flags: XDP,
            };
            node.maps.set_devices(&BTreeMap::from([(LOOPBACK, device)])).unwrap();
            for net in ["10.244.9.0/24", "fd02:9::/64"] {
                let far = FarEnd { node: "192.168.0.9".parse().unwrap(), path: FarPath::Tunnel };
                node.maps.put_tunnel(net.parse().unwrap(), far).unwrap();
            }
            node
        }

        fn ip(&self, v6: bool) -> String {
            let number = self.number;
            if v6 { format!("fd01::{number}") } else { format!("192.168.0.{number}") }
        }

        /// Programs the node port with these backends.
        fn program(&mut self, v6: bool, affinity_s: u32, backends: impl Iterator<Item = u8>) {
            let mut set: Vec<Backend> = backends.map(|n| backend(v6, n)).collect();
            set.sort_unstable();
            let (family, any) =
                if v6 { (Family::V6, Addr::ANY_V6) } else { (Family::V4, Addr::ANY_V4) };
            let port = |protocol, proto| {
                let key = ServiceKey { addr: any, port: PORT.to_be_bytes(), proto, scope: 0 };
                let which = Which::Cluster;
                Port {
                    id: PortId { name: "".into(), protocol, family },
                    backends: [set.clone(), Vec::new()],
                    frontends: vec![Frontend { key, which, flags: 0, is_consistent: true }],
                    affinity_s,
                    ranges: Vec::new(),
                }
            };
            let ports = [port(Protocol::Tcp, TCP), port(Protocol::Udp, UDP)];
            let mut plan = Plan::default();
            let key = ObjectKey::new("d", if v6 { "web6" } else { "web" });
            self.observed.plan_service(&key, &ports, &mut plan);
            let failed = self.maps.services().write(&plan.into_batches());
            assert!(failed.is_empty(), "{failed:?}");
        }

        /// Which backends the first packets of these clients open flows to, which are gone afterwards. One walk
        /// of the table for all: under an emulated processor it takes longer than a hundred packets.
        fn choose_all(&mut self, by: By, asked: &[Asked]) -> Vec<Addr> {
            for (client, port, proto) in asked {
                let own = self.ip(client.contains(':'));
                let wire = Wire {
                    macs: [[0; 6]; 2],
                    flags: if *proto == TCP { SYN } else { 0 },
                    ..Wire::new(*proto, (client, *port), (&own, PORT))
                };
                match by {
                    By::Tc => drop(
                        self.programs
                            .test_run(TcHook::FromUnderlay, LOOPBACK, &wire.bytes())
                            .unwrap(),
                    ),
                    By::Xdp => {
                        drop(self.programs.test_run_xdp(LOOPBACK, &wire.bytes(), 1).unwrap());
                    }
                }
            }
            let flows = self.maps.connections().dump().unwrap();
            let opened: BTreeMap<_, Addr> = flows
                .iter()
                .filter(|(_, flow)| flow.direction == FORWARD)
                .map(|(key, flow)| ((key.src, key.sport, key.proto), flow.dst))
                .collect();
            assert_eq!(
                (flows.len(), opened.len()),
                (2 * asked.len(), asked.len()),
                "{by:?} opens one flow each"
            );
            let keys: Vec<_> = flows.iter().map(|(key, _)| *key).collect();
            assert!(self.maps.connections().delete(&keys).is_empty());
            asked
                .iter()
                .map(|(client, port, proto)| opened[&(addr(client), port.to_be_bytes(), *proto)])
                .collect()
        }

        fn choose(&mut self, by: By, client: &str, port: u16, proto: u8) -> Addr {
            self.choose_all(by, &[(client.to_owned(), port, proto)])[0]
        }
    }

    /// A client's address and port, and its protocol.
    type Asked = (String, u16, u8);

    /// Who opens the flow.
    #[derive(Clone, Copy, Debug)]
    enum By {
        Tc,
        Xdp,
    }

    /// Runs a test in namespaces of its own, for both families.
    fn with_nodes(test: impl Fn(&mut [Node; 2], bool) + Send + Sync) {
        if !is_possible() {
            return;
        }
        let run = || {
            own_namespaces();
            let mut nodes = [Node::new(1), Node::new(2)];
            for v6 in [false, true] {
                test(&mut nodes, v6);
            }
        };
        if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
            std::panic::resume_unwind(panic);
        }
    }

    fn client(v6: bool, number: u16) -> (String, u16) {
        let host = number % 7 + 1;
        let text = if v6 { format!("2001:db8::{host}") } else { format!("198.51.100.{host}") };
        (text, 20_000 + number)
    }

    #[test]
    fn a_flow_has_one_backend_on_both_nodes_and_by_tc_and_xdp() {
        with_nodes(|nodes, v6| {
            // Few backends are compared, many have a table.
            for count in [5, 20] {
                let [one, two] = nodes;
                one.program(v6, 0, 1..=count);
                two.program(v6, 0, (1..=count + 9).rev());
                two.program(v6, 0, (3..=count).rev());
                two.program(v6, 0, 1..=count);
                let asked: Vec<Asked> = (0..80)
                    .flat_map(|number| {
                        let (client, port) = client(v6, number);
                        [TCP, UDP].map(|proto| (client.clone(), port, proto))
                    })
                    .collect();
                let chosen = one.choose_all(By::Tc, &asked);
                assert_eq!(two.choose_all(By::Tc, &asked), chosen);
                assert_eq!(one.choose_all(By::Xdp, &asked), chosen);
                assert_eq!(two.choose_all(By::Xdp, &asked), chosen);
                let mut met = BTreeMap::<Addr, u32>::new();
                for chosen in chosen {
                    *met.entry(chosen).or_default() += 1;
                }
                assert!(met.len() + 1 >= usize::from(count), "{met:?}");
                // 160 flows: 32 and 8 on average, with a deviation of 5 and 2.8.
                let mean = 160 / u32::from(count);
                assert!(met.values().all(|flows| (1..mean * 3).contains(flows)), "{met:?}");
            }
        });
    }

    #[test]
    fn a_lost_backend_moves_its_own_flows_alone() {
        with_nodes(|nodes, v6| {
            let [one, two] = nodes;
            for (node, lost) in [(one, 3), (two, 17)] {
                node.program(v6, 0, 1..=20);
                let asked: Vec<Asked> = (0..120)
                    .map(|number| {
                        let (client, port) = client(v6, number);
                        (client, port, TCP)
                    })
                    .collect();
                let before = node.choose_all(By::Tc, &asked);
                node.program(v6, 0, (1..=20).filter(|n| *n != lost));
                let after = node.choose_all(By::Tc, &asked);
                let lost = backend(v6, lost).addr;
                let flows: Vec<_> =
                    before.into_iter().zip(after).filter(|(before, _)| *before != lost).collect();
                let moved = flows.iter().filter(|(before, after)| before != after).count();
                assert!(moved * 100 <= 2 * flows.len(), "{moved} of {}", flows.len());
            }
        });
    }

    #[test]
    fn only_what_begins_a_connection_opens_a_flow_to_a_node_port() {
        with_nodes(|nodes, v6| {
            let [node, _] = nodes;
            node.program(v6, 0, 1..=5);
            let (client, port) = client(v6, 1);
            for flags in [ACK, FIN | ACK] {
                let wire = Wire::new(TCP, (&client, port), (&node.ip(v6), PORT));
                let bytes = Wire { macs: [[0; 6]; 2], flags, ..wire }.bytes();
                node.programs.test_run(TcHook::FromUnderlay, LOOPBACK, &bytes).unwrap();
                node.programs.test_run_xdp(LOOPBACK, &bytes, 1).unwrap();
            }
            assert_eq!(node.maps.connections().dump().unwrap().len(), 0);
        });
    }

    #[test]
    fn with_affinity_the_client_alone_decides_and_is_remembered() {
        with_nodes(|nodes, v6| {
            let [one, two] = nodes;
            one.program(v6, 600, 1..=20);
            two.program(v6, 600, (1..=20).rev());
            let (client, _) = client(v6, 4);
            let chosen = one.choose(By::Tc, &client, 20_000, TCP);
            for port in 20_001..20_020 {
                assert_eq!(one.choose(By::Xdp, &client, port, TCP), chosen);
                assert_eq!(two.choose(By::Tc, &client, port, TCP), chosen);
            }
            // It stays where the hash would lead elsewhere by now.
            let others = (1..=20).filter(|n| backend(v6, *n).addr == chosen || n % 5 == 0);
            one.program(v6, 600, others);
            for port in 20_020..20_040 {
                assert_eq!(one.choose(By::Xdp, &client, port, TCP), chosen);
            }
        });
    }
}
