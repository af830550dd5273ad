//! The XDP programs on the running kernel with the rows of a node: packets in, action and packet out.

use std::{collections::BTreeMap, net::IpAddr, thread};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{
        Array, HashMap, MapData, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp as XdpProgram},
};
use ebpf_common::{
    addr::{Addr, Net},
    config::Config,
    conntrack::{FORWARD, Flow, FlowKey, REVERSE},
    device::{Device, XDP},
    endpoint::Endpoint,
    service::{Backend, BackendKey, SCOPE_INTERNAL, Service, ServiceKey, SourceRange},
    tunnel::{ROUTED, Tunnel},
    verdict::DropReason,
};
use node_agent::dataplane::object;

use crate::{
    place::{ip, is_possible, own_namespaces},
    wire::{Wire, checksum},
};

pub(crate) const PASS: u32 = 2;
pub(crate) const REDIRECT: u32 = 4;
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const NEXT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x63];

/// The addresses of one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) node: &'static str,
    pub(crate) next: &'static str,
    pub(crate) client: &'static str,
    pub(crate) gateway: &'static str,
    pub(crate) tunnel_pod: &'static str,
    pub(crate) tunnel6_pod: &'static str,
    pub(crate) routed_pod: &'static str,
    pub(crate) local_pod: &'static str,
    pub(crate) lost_pod: &'static str,
}
pub(crate) const V4: Family = Family {
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
pub(crate) const V6: Family = Family {
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

pub(crate) fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().unwrap())
}

pub(crate) struct Kernel {
    object: Ebpf,
    /// The XDP program that runs.
    pub(crate) program: &'static str,
    pub(crate) uplink: u32,
    /// Backends of set 1 so far.
    pub(crate) slots: u32,
}

impl Kernel {
    fn load() -> Self {
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
        }
        ip("link add up0 type veth peer name up1
            link set up0 address 02:00:00:00:00:01
            link set up1 up
            link set up0 up
            address add 192.168.0.1/24 dev up0
            address add fd01::1/64 dev up0 nodad
            neighbour add 192.168.0.2 lladdr 02:00:00:00:00:02 dev up0
            neighbour add fd01::2 lladdr 02:00:00:00:00:02 dev up0
            neighbour add 192.168.0.99 lladdr 02:00:00:00:00:63 dev up0
            neighbour add fd01::63 lladdr 02:00:00:00:00:63 dev up0
            route add 10.244.3.0/24 via 192.168.0.2
            route add fd02:3::/64 via fd01::2");
        let object = EbpfLoader::new().load(object()).unwrap();
        let uplink = nix::net::if_::if_nametoindex("up0").unwrap();
        let mut kernel = Self { object, program: "xdp_entry", uplink, slots: 0 };
        kernel.tc().load().unwrap();
        kernel.set_up();
        kernel
    }

    fn xdp(&mut self) -> &mut XdpProgram {
        let program: &mut XdpProgram =
            self.object.program_mut(self.program).unwrap().try_into().unwrap();
        if program.fd().is_err() {
            program.load().unwrap();
        }
        program
    }

    fn tc(&mut self) -> &mut SchedClassifier {
        self.object.program_mut("tc_from_underlay").unwrap().try_into().unwrap()
    }

    /// Runs a packet through tc. Its test runs come in by loopback, whose MAC is zero.
    pub(crate) fn run_tc(&mut self, wire: &Wire) {
        let bytes = Wire { macs: [[0; 6]; 2], ..wire.clone() }.bytes();
        let mut options = TestRunOptions::new();
        options.data_in = Some(&bytes);
        self.tc().test_run(options).unwrap();
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

    pub(crate) fn put<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) {
        let map = self.object.map_mut(name).unwrap();
        let mut map: HashMap<&mut MapData, K, V> = map.try_into().unwrap();
        map.insert(key, value, 0).unwrap();
    }

    pub(crate) fn flows(&self) -> BTreeMap<FlowKey, Flow> {
        let map = self.object.map("CONNTRACK").unwrap();
        let map: HashMap<_, FlowKey, Flow> = map.try_into().unwrap();
        map.iter().map(Result::unwrap).collect()
    }

    /// Forgets every flow, and gives what there was.
    pub(crate) fn take_flows(&mut self) -> BTreeMap<FlowKey, Flow> {
        let flows = self.flows();
        let map = self.object.map_mut("CONNTRACK").unwrap();
        let mut map: HashMap<&mut MapData, FlowKey, Flow> = map.try_into().unwrap();
        flows.keys().for_each(|key| map.remove(key).unwrap());
        flows
    }

    /// Packets that were counted as dropped.
    pub(crate) fn drops(&self) -> u64 {
        let map = self.object.map("COUNTERS").unwrap();
        let counters: PerCpuArray<_, u64> = map.try_into().unwrap();
        let reasons = 0..u32::try_from(DropReason::ALL.len()).unwrap();
        reasons.map(|index| counters.get(&index, 0).unwrap().iter().sum::<u64>()).sum()
    }

    /// A service of set and number `service` at an address; its backends have port 8080.
    pub(crate) fn serve(&mut self, at: (&str, u16), proto: u8, service: Service, pods: &[&str]) {
        for (pod, slot) in pods.iter().zip(0..) {
            let backend = Backend { addr: addr(pod), port: [31, 144], reserved: [0; 2] };
            self.put("BACKENDS", BackendKey { set: service.set, slot }, backend);
        }
        let count = u32::try_from(pods.len()).unwrap();
        let (addr, port) = (addr(at.0), at.1.to_be_bytes());
        let key = ServiceKey { addr, port, proto, scope: SCOPE_INTERNAL };
        self.put("SERVICES", key, Service { count, service: service.set, ..service });
    }

    /// Lets one address in to a service with source ranges.
    pub(crate) fn allow(&mut self, service: u32, client: &str) {
        let range = SourceRange { service, addr: addr(client) };
        let map = self.object.map_mut("SOURCE_RANGES").unwrap();
        let mut map: LpmTrie<&mut MapData, SourceRange, u32> = map.try_into().unwrap();
        map.insert(&Key::new(32 + 128, range), 1, 0).unwrap();
    }

    /// Both rows of a flow from the client's port to a node port, as tc makes them.
    pub(crate) fn open(&mut self, family: Family, proto: u8, port: u16, pod: &str) -> FlowKey {
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

    pub(crate) fn run(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut out = vec![0; frame.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        let result = self.xdp().test_run(options).unwrap();
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        (result.return_value, out)
    }

    #[track_caller]
    pub(crate) fn check(&mut self, frame: &[u8], action: u32, out: &[u8]) {
        let (got, bytes) = self.run(frame);
        assert_eq!((got, hex(&bytes)), (action, hex(out)));
    }

    #[track_caller]
    pub(crate) fn passes(&mut self, frame: &[u8]) {
        self.check(frame, PASS, frame);
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs a test for each family in namespaces of its own.
pub(crate) fn with_kernel(test: impl Fn(&mut Kernel, Family) + Send + Sync) {
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

pub(crate) fn question(family: Family, proto: u8, port: u16) -> Wire {
    Wire::new(proto, (family.client, port), (family.node, 30_080))
}

/// The question as the backend sees it, one hop later.
pub(crate) fn asked(family: Family, question: &Wire, pod: &str) -> Wire {
    Wire {
        src: (family.gateway.parse().unwrap(), question.src.1),
        dst: (pod.parse().unwrap(), 8080),
        ttl: question.ttl - 1,
        ..question.clone()
    }
}

/// Takes the tunnel's headers off, each field checked against what RFC 7348 asks for.
#[track_caller]
pub(crate) fn decapsulated(bytes: &[u8], over: Family, class: u8) -> (Vec<u8>, u16) {
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
