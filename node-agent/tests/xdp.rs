//! The XDP program: packet tables by `BPF_PROG_TEST_RUN`, on the running kernel.

#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/wire.rs"]
mod wire;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::IpAddr, thread};

    use aya::{
        Ebpf, EbpfLoader, Pod,
        maps::{
            Array, HashMap, MapData,
            lpm_trie::{Key, LpmTrie},
        },
        programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp as XdpProgram},
    };
    use ebpf_common::{
        addr::{Addr, Net},
        config::Config,
        conntrack::{FLOW_MASQUERADE, FORWARD, Flow, FlowKey, REVERSE, SEEN_FIN, SEEN_REPLY},
        device::{Device, XDP},
        endpoint::Endpoint,
        service::{Backend, BackendKey, Service, ServiceKey},
        tunnel::{ROUTED, Tunnel},
    };
    use node_agent::dataplane::object;

    use super::{
        place::{ip, is_possible, own_namespaces},
        wire::{FIN, SYN, TCP, UDP, Wire, checksum},
    };

    const DROP_NOTHING: u32 = 2;
    const REDIRECT: u32 = 4;
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const NEXT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x63];

    /// The addresses of one family.
    #[derive(Clone, Copy, Debug)]
    struct Family {
        node: &'static str,
        next: &'static str,
        client: &'static str,
        gateway: &'static str,
        tunnel_pod: &'static str,
        tunnel6_pod: &'static str,
        routed_pod: &'static str,
        local_pod: &'static str,
        lost_pod: &'static str,
    }
    const V4: Family = Family {
        node: "192.168.0.1",
        next: "192.168.0.2",
        client: "192.168.0.99",
        gateway: "10.244.1.1",
        tunnel_pod: "10.244.2.7",
        tunnel6_pod: "10.244.6.7",
        routed_pod: "10.244.3.7",
        local_pod: "10.244.1.7",
        lost_pod: "10.244.4.7",
    };
    const V6: Family = Family {
        node: "fd01::1",
        next: "fd01::2",
        client: "fd01::63",
        gateway: "fd02:1::1",
        tunnel_pod: "fd02:2::7",
        tunnel6_pod: "fd02:6::7",
        routed_pod: "fd02:3::7",
        local_pod: "fd02:1::7",
        lost_pod: "fd02:4::7",
    };

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    struct Kernel {
        object: Ebpf,
        uplink: u32,
        slots: u32,
    }

    impl Kernel {
        fn load() -> Self {
            for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
            }
            for command in [
                "link add up0 type veth peer name up1",
                "link set up0 address 02:00:00:00:00:01",
                "link set up1 up",
                "link set up0 up",
                "address add 192.168.0.1/24 dev up0",
                "address add fd01::1/64 dev up0 nodad",
                "neighbour add 192.168.0.2 lladdr 02:00:00:00:00:02 dev up0",
                "neighbour add fd01::2 lladdr 02:00:00:00:00:02 dev up0",
                "neighbour add 192.168.0.99 lladdr 02:00:00:00:00:63 dev up0",
                "neighbour add fd01::63 lladdr 02:00:00:00:00:63 dev up0",
                "route add 10.244.3.0/24 via 192.168.0.2",
                "-6 route add fd02:3::/64 via fd01::2",
            ] {
                ip(command);
            }
            let object = EbpfLoader::new().load(object()).unwrap();
            let uplink = nix::net::if_::if_nametoindex("up0").unwrap();
            let mut kernel = Self { object, uplink, slots: 0 };
            kernel.xdp().load().unwrap();
            kernel.tc().load().unwrap();
            kernel.set_up();
            kernel
        }

        fn xdp(&mut self) -> &mut XdpProgram {
            self.object.program_mut("xdp_entry").unwrap().try_into().unwrap()
        }

        fn tc(&mut self) -> &mut SchedClassifier {
            self.object.program_mut("tc_from_underlay").unwrap().try_into().unwrap()
        }

        fn set_up(&mut self) {
            let config = Config {
                services: [Net::new("10.96.0.0".parse().unwrap(), 16), Net::default()],
                gateway: [addr(V4.gateway), addr(V6.gateway)],
                vxlan_ifindex: 5,
                vni: 0x01_02_03,
                node_port_first: 30_000,
                node_port_last: 32_767,
                vxlan_port: 8472,
                ..Config::default()
            };
            let map = self.object.map_mut("CONFIG").unwrap();
            Array::<_, Config>::try_from(map).unwrap().set(0, config, 0).unwrap();
            // Test runs come in by loopback.
            let device =
                Device { addr: [addr(V4.node), addr(V6.node)], mtu: 1500, mac: MAC, flags: XDP };
            for ifindex in [1, self.uplink] {
                self.put("DEVICES", ifindex, device);
            }
            for family in [V4, V6] {
                let length = if addr(family.node).is_v4() { 96 + 24 } else { 64 };
                let mut far = |pod: &str, node: &str, flags| {
                    let tunnel = Tunnel { node: addr(node), flags };
                    let map = self.object.map_mut("TUNNELS").unwrap();
                    let mut map: LpmTrie<&mut MapData, Addr, Tunnel> = map.try_into().unwrap();
                    map.insert(&Key::new(length, addr(pod)), tunnel, 0).unwrap();
                };
                far(family.tunnel_pod, V4.next, 0);
                far(family.tunnel6_pod, V6.next, 0);
                far(family.routed_pod, family.next, ROUTED);
                // Its node has no neighbour entry.
                far(family.lost_pod, "192.168.0.4", 0);
                self.put("ENDPOINTS", addr(family.local_pod), Endpoint::default());
                self.put("NODE_ADDRS", addr(family.node), 1_u32);
            }
        }

        fn put<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) {
            let map = self.object.map_mut(name).unwrap();
            let mut map: HashMap<&mut MapData, K, V> = map.try_into().unwrap();
            map.insert(key, value, 0).unwrap();
        }

        fn flows(&self) -> BTreeMap<FlowKey, Flow> {
            let map = self.object.map("CONNTRACK").unwrap();
            let map: HashMap<_, FlowKey, Flow> = map.try_into().unwrap();
            map.iter().map(Result::unwrap).collect()
        }

        /// Both rows of a flow from the client's port to a node port, as tc makes them.
        fn open(&mut self, family: Family, proto: u8, port: u16, pod: &str) -> FlowKey {
            let key = FlowKey {
                src: addr(family.client),
                dst: addr(family.node),
                sport: port.to_be_bytes(),
                dport: 30_080_u16.to_be_bytes(),
                proto,
                reserved: [0; 3],
            };
            let backend = Backend { addr: addr(pod), port: [31, 144], reserved: [0; 2] };
            let slot = self.slots;
            self.slots += 1;
            self.put("BACKENDS", BackendKey { set: 1, slot }, backend);
            let is_local = pod == family.local_pod;
            let forward = Flow {
                src: if is_local { key.src } else { addr(family.gateway) },
                dst: backend.addr,
                sport: key.sport,
                dport: backend.port,
                direction: FORWARD,
                service: 1,
                set: 1,
                slot,
                ..Flow::default()
            };
            let reverse = Flow {
                src: key.dst,
                dst: key.src,
                sport: key.dport,
                dport: key.sport,
                ifindex: self.uplink,
                direction: REVERSE,
                ..forward
            };
            self.put("CONNTRACK", key, forward);
            self.put("CONNTRACK", forward.opposite(proto), reverse);
            key
        }

        fn run(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
            let mut out = vec![0; frame.len() + 256];
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.data_out = Some(&mut out);
            let result = self.xdp().test_run(options).unwrap();
            out.truncate(usize::try_from(result.data_size_out).unwrap());
            (result.return_value, out)
        }

        #[track_caller]
        fn check(&mut self, frame: &[u8], action: u32, out: &[u8]) {
            let (got, bytes) = self.run(frame);
            assert_eq!((got, hex(&bytes)), (action, hex(out)));
        }

        #[track_caller]
        fn passes(&mut self, frame: &[u8]) {
            self.check(frame, DROP_NOTHING, frame);
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Runs a test for each family in namespaces of its own.
    fn with_kernel(test: impl Fn(&mut Kernel, Family) + Send + Sync) {
        if !is_possible() {
            return;
        }
        for family in [V4, V6] {
            let run = || {
                own_namespaces();
                test(&mut Kernel::load(), family);
            };
            if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
                std::panic::resume_unwind(panic);
            }
        }
    }

    fn question(family: Family, proto: u8, port: u16) -> Wire {
        Wire::new(proto, (family.client, port), (family.node, 30_080))
    }

    /// The question as the backend sees it, one hop later.
    fn asked(family: Family, question: &Wire, pod: &str) -> Wire {
        Wire {
            src: (family.gateway.parse().unwrap(), question.src.1),
            dst: (pod.parse().unwrap(), 8080),
            ttl: question.ttl - 1,
            ..question.clone()
        }
    }

    /// Takes the tunnel's headers off, each field checked against what RFC 7348 asks for.
    #[track_caller]
    fn decapsulated(bytes: &[u8], over: Family, class: u8) -> (Vec<u8>, u16) {
        assert_eq!((&bytes[..6], &bytes[6..12]), (&NEXT_MAC[..], &MAC[..]));
        let (udp, ends) = if over.node.contains(':') {
            let ip = &bytes[14..54];
            assert_eq!(
                (&bytes[12..14], ip[0], ip[1], ip[2..4] == [0, 0]),
                (&[0x86, 0xdd][..], 0x60, class << 4, true)
            );
            assert_eq!((usize::from(ip[4]) << 8 | usize::from(ip[5])), bytes.len() - 54);
            assert_eq!((ip[6], ip[7]), (17, 64));
            (&bytes[54..], ip[8..40].to_vec())
        } else {
            let ip = &bytes[14..34];
            assert_eq!((&bytes[12..14], ip[0], ip[1]), (&[8, 0][..], 0x45, class));
            assert_eq!((usize::from(ip[2]) << 8 | usize::from(ip[3])), bytes.len() - 14);
            assert_eq!((ip[6], ip[7], ip[8], ip[9]), (0, 0, 64, 17));
            assert_eq!(checksum(ip), 0, "a header with its checksum sums to zero");
            (&bytes[34..], ip[12..20].to_vec())
        };
        let octets = |text: &str| match text.parse().unwrap() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        assert_eq!(ends, [octets(over.node), octets(over.next)].concat());
        let source = u16::from_be_bytes([udp[0], udp[1]]);
        assert!(source >= 49_152, "{source}");
        assert_eq!(udp[2..4], 8472_u16.to_be_bytes());
        assert_eq!((usize::from(udp[4]) << 8 | usize::from(udp[5])), udp.len());
        assert_eq!(udp[6..8], [0, 0], "no checksum, as in the tc path");
        assert_eq!(udp[8..16], [8, 0, 0, 0, 1, 2, 3, 0]);
        (udp[16..].to_vec(), source)
    }

    #[test]
    fn flows_to_far_pods_leave_in_the_tunnel() {
        with_kernel(|kernel, family| {
            for (port, proto, over) in
                [(20_000, TCP, V4), (20_001, UDP, V4), (20_002, TCP, V6), (20_003, UDP, V6)]
            {
                let pod = if over.node == V4.node { family.tunnel_pod } else { family.tunnel6_pod };
                kernel.open(family, proto, port, pod);
                let mut sources = Vec::new();
                // Not ECN capable, ECT(1), congested: marks survive, congestion is told outside as ECT(0).
                for (class, outer) in [(0, 0), (0xb9, 1), (3, 2)] {
                    let question = Wire { class, ..question(family, proto, port) };
                    let (action, bytes) = kernel.run(&question.bytes());
                    assert_eq!(action, REDIRECT);
                    let (inner, source) = decapsulated(&bytes, over, outer);
                    assert_eq!(hex(&inner), hex(&asked(family, &question, pod).bytes()));
                    sources.push(source);
                }
                assert!(sources.iter().all(|source| *source == sources[0]), "one path for a flow");
            }
            // Without a checksum it stays without, where that is allowed.
            if family.node == V4.node {
                let question = Wire { unchecked: true, ..question(family, UDP, 20_001) };
                let (_, bytes) = kernel.run(&question.bytes());
                let (inner, _) = decapsulated(&bytes, V4, 0);
                assert_eq!(hex(&inner), hex(&asked(family, &question, V4.tunnel_pod).bytes()));
            }
        });
    }

    #[test]
    fn flows_to_routed_pods_go_to_the_next_hop_and_answers_turn_around() {
        with_kernel(|kernel, family| {
            for (port, proto) in [(20_000, TCP), (20_001, UDP)] {
                kernel.open(family, proto, port, family.routed_pod);
                let question = question(family, proto, port);
                let asked =
                    Wire { macs: [NEXT_MAC, MAC], ..asked(family, &question, family.routed_pod) };
                kernel.check(&question.bytes(), REDIRECT, &asked.bytes());
                let answer = Wire { src: asked.dst, dst: asked.src, ttl: 9, ..question.clone() };
                let turned = Wire {
                    macs: [CLIENT_MAC, MAC],
                    src: question.dst,
                    dst: question.src,
                    ttl: 8,
                    ..answer.clone()
                };
                kernel.check(&answer.bytes(), REDIRECT, &turned.bytes());
            }
        });
    }

    #[test]
    fn what_is_for_a_pod_here_is_translated_and_delivered_by_tc() {
        with_kernel(|kernel, family| {
            kernel.open(family, TCP, 20_000, family.local_pod);
            let question = question(family, TCP, 20_000);
            let dst = (family.local_pod.parse().unwrap(), 8080);
            let translated = Wire { dst, ..question.clone() };
            kernel.check(&question.bytes(), DROP_NOTHING, &translated.bytes());
        });
    }

    #[test]
    fn all_else_passes_untouched() {
        with_kernel(|kernel, family| {
            kernel.open(family, TCP, 20_000, family.routed_pod);
            let carried = question(family, TCP, 20_000);
            assert_eq!(kernel.run(&carried.bytes()).0, REDIRECT, "the packet that is varied");
            let vary = |change: &dyn Fn(&mut Wire)| {
                let mut wire = carried.clone();
                change(&mut wire);
                wire.bytes()
            };
            kernel.passes(&vary(&|wire| wire.src.1 = 20_009));
            kernel.passes(&vary(&|wire| wire.flags = SYN));
            kernel.passes(&vary(&|wire| wire.ttl = 1));
            kernel.passes(&vary(&|wire| wire.macs[0] = CLIENT_MAC));
            kernel.passes(&vary(&|wire| wire.payload = vec![7; 1_461]));
            let mut short = carried.bytes();
            short.truncate(short.len() - 1);
            kernel.passes(&short);
            let mut vlan = carried.bytes();
            vlan[12..14].copy_from_slice(&[0x81, 0]);
            kernel.passes(&vlan);
            for (at, value) in if family.node == V4.node {
                // Options, more fragments, a later fragment.
                [(14, 0x46), (20, 0x20), (21, 1)]
            } else {
                // Hop-by-hop options, a fragment, a destination option.
                [(20, 0), (20, 44), (20, 60)]
            } {
                let mut odd = carried.bytes();
                odd[at] = value;
                kernel.passes(&odd);
            }
            // No neighbour, a backend that has left, pods' own connections to the outside.
            kernel.open(family, TCP, 20_001, family.lost_pod);
            kernel.passes(&question(family, TCP, 20_001).bytes());
            kernel.open(family, UDP, 20_002, family.routed_pod);
            kernel.put(
                "BACKENDS",
                BackendKey { set: 1, slot: kernel.slots - 1 },
                Backend::default(),
            );
            kernel.passes(&question(family, UDP, 20_002).bytes());
            let key = kernel.open(family, TCP, 20_003, family.routed_pod);
            let masked = Flow { flags: FLOW_MASQUERADE, ..kernel.flows()[&key] };
            kernel.put("CONNTRACK", key, masked);
            kernel.passes(&question(family, TCP, 20_003).bytes());
        });
    }

    #[test]
    fn tc_opens_what_xdp_carries_in_the_same_rows() {
        with_kernel(|kernel, family| {
            let service = Service { set: 9, count: 1, service: 9, ..Service::default() };
            let any = addr(family.node).any();
            let key =
                ServiceKey { addr: any, port: 30_080_u16.to_be_bytes(), proto: TCP, scope: 0 };
            let pod = addr(family.tunnel_pod);
            let backend = Backend { addr: pod, port: [31, 144], reserved: [0; 2] };
            kernel.put("BACKENDS", BackendKey { set: 9, slot: 0 }, backend);
            kernel.put("SERVICES", key, service);
            let syn = Wire { flags: SYN, ..question(family, TCP, 20_000) };
            kernel.passes(&syn.bytes());
            assert!(kernel.flows().is_empty());
            let mut options = TestRunOptions::new();
            // A test run of tc comes in by loopback, whose MAC is zero.
            let bytes = Wire { macs: [[0; 6]; 2], ..syn }.bytes();
            options.data_in = Some(&bytes);
            kernel.tc().test_run(options).unwrap();
            assert_eq!(kernel.flows().len(), 2, "tc has opened it");
            let question = question(family, TCP, 20_000);
            let (action, bytes) = kernel.run(&question.bytes());
            assert_eq!(action, REDIRECT);
            let (inner, _) = decapsulated(&bytes, V4, 0);
            assert_eq!(hex(&inner), hex(&asked(family, &question, family.tunnel_pod).bytes()));
            let last = Wire { flags: FIN, ..question };
            kernel.run(&last.bytes());
            let flows = kernel.flows();
            let forward = flows.values().find(|flow| flow.direction == FORWARD).unwrap();
            assert_eq!(forward.seen, SEEN_REPLY | SEEN_FIN);
            assert!(forward.last_seen > 0);
        });
    }
}
