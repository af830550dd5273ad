//! The programs on the running kernel with the rows of a node in place, to run packets through.

use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{
        HashMap, Map, MapData, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use ebpf_common::{
    addr::{Addr, Net},
    affinity::MemberKey,
    config::{Config, MASQUERADE_V4, MASQUERADE_V6},
    conntrack::{Flow, FlowKey},
    device::Device,
    endpoint::Endpoint,
    fragment::{Fragment, FragmentKey},
    service::{Backend, BackendKey, Peer, SCOPE_INTERNAL, Service, ServiceKey, SourceRange},
    tunnel::{HERE, ROUTED, Tunnel},
    verdict::{Budget, DropReason},
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket},
};
use node_agent::dataplane::{events::Ring, load::TcHook, object};

use crate::{
    frame::{End, Frame},
    place::{ip, is_possible, own_namespaces},
};

pub(crate) const PASS: i32 = -1;
pub(crate) const DROP: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

/// The addresses of one family that every test speaks of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) node: &'static str,
    pub(crate) other_node: &'static str,
    pub(crate) gateway: &'static str,
    pub(crate) pod: &'static str,
    pub(crate) pod2: &'static str,
    /// An address among theirs that no pod has.
    pub(crate) nobody: &'static str,
    pub(crate) far_pod: &'static str,
    pub(crate) service: &'static str,
    pub(crate) external: &'static str,
    pub(crate) client: &'static str,
    pub(crate) router: &'static str,
}

pub(crate) const V4: Family = Family {
    node: "192.168.0.1",
    other_node: "192.168.0.2",
    gateway: "10.244.1.1",
    pod: "10.244.1.7",
    pod2: "10.244.1.8",
    nobody: "10.244.1.99",
    far_pod: "10.244.2.7",
    service: "10.96.3.4",
    external: "203.0.113.10",
    client: "198.51.100.9",
    router: "198.51.100.1",
};

pub(crate) const V6: Family = Family {
    node: "fd00:a::1",
    other_node: "fd00:a::2",
    gateway: "fd00:244:1::1",
    pod: "fd00:244:1::7",
    pod2: "fd00:244:1::8",
    nobody: "fd00:244:1::99",
    far_pod: "fd00:244:2::7",
    service: "fd00:96::34",
    external: "2001:db8:ee::10",
    client: "2001:db8::9",
    router: "2001:db8::1",
};

pub(crate) const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const POD_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
pub(crate) const POD2_MAC: [u8; 6] = [2, 0, 0, 0, 1, 3];
/// MAC of the host device.
pub(crate) const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 9];
/// Index of the host device; loopback's, since a device of that index has to be there.
pub(crate) const HOST_DEVICE: u32 = 1;

pub(crate) struct Kernel {
    object: Ebpf,
    /// The network namespace of all tests, and the index of the uplink in it.
    place: (File, u32),
    pub(crate) ring: Ring,
    /// The device by which packets come to this machine; 0 for what it sends itself.
    pub(crate) came_by: u32,
    next_set: u32,
}

impl Kernel {
    fn load() -> Self {
        let mut object = EbpfLoader::new().load(object()).unwrap();
        let ring = Ring::take(&mut object).unwrap();
        let place = thread::scope(|scope| scope.spawn(make_place).join()).unwrap();
        let mut kernel = Self { object, place, ring, came_by: 0, next_set: 1 };
        for name in TcHook::ALL.map(TcHook::program) {
            kernel.program(name).load().unwrap();
        }
        kernel
    }

    fn program(&mut self, name: &str) -> &mut SchedClassifier {
        self.object.program_mut(name).unwrap().try_into().unwrap()
    }

    /// Runs a packet through a program and returns the verdict and the packet after it.
    pub(crate) fn run(&mut self, hook: &str, packet: &[u8]) -> (i32, Vec<u8>) {
        let mut out = vec![0; packet.len() + 256];
        // `struct __sk_buff` (linux/bpf.h) as far as 6.1 has it: `ingress_ifindex` is its tenth word.
        let mut context = [0_u8; 184];
        context[36..40].copy_from_slice(&self.came_by.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = self.program(hook).test_run(options).unwrap();
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        (result.return_value.cast_signed(), out)
    }

    /// Runs a packet so many times; gives the nanoseconds of one run.
    pub(crate) fn run_often(&mut self, hook: &str, packet: &[u8], times: u32) -> u64 {
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.repeat = times;
        let result = self.program(hook).test_run(options).unwrap();
        u64::try_from(result.duration.as_nanos()).unwrap()
    }

    /// Runs a packet and checks what became of it; `None` for a packet that must not change.
    #[track_caller]
    pub(crate) fn check(&mut self, hook: &str, packet: &Frame, verdict: i32, out: Option<&Frame>) {
        let bytes = packet.bytes();
        let before = self.drops();
        let (got, after) = self.run(hook, &bytes);
        let expect = out.map_or(bytes, Frame::bytes);
        let drops = self.drops_since(&before);
        assert_eq!((got, hex(&after)), (verdict, hex(&expect)), "{hook} {packet:?} {drops:?}");
    }

    /// Runs a packet that must be dropped for a reason, and counted once.
    #[track_caller]
    pub(crate) fn drops_for(&mut self, hook: &str, packet: &[u8], reason: DropReason) {
        let before = self.drops();
        let (verdict, _) = self.run(hook, packet);
        let counted = self.drops_since(&before);
        assert_eq!((verdict, counted), (DROP, vec![(reason, 1)]), "{hook} {}", hex(packet));
    }

    pub(crate) fn drops(&self) -> Vec<u64> {
        let counters: PerCpuArray<_, u64> = self.map("COUNTERS").try_into().unwrap();
        (0_u32..)
            .take(DropReason::ALL.len())
            .map(|index| counters.get(&index, 0).unwrap().iter().sum())
            .collect()
    }

    pub(crate) fn drops_since(&self, before: &[u64]) -> Vec<(DropReason, u64)> {
        let after = self.drops();
        let counted = before.iter().zip(after).map(|(before, after)| after - before);
        DropReason::ALL.iter().copied().zip(counted).filter(|(_, count)| *count != 0).collect()
    }

    fn map(&self, name: &str) -> &Map {
        self.object.map(name).unwrap()
    }

    pub(crate) fn put<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) {
        let map = self.object.map_mut(name).unwrap();
        let mut map: HashMap<&mut MapData, K, V> = map.try_into().unwrap();
        map.insert(key, value, 0).unwrap();
    }

    pub(crate) fn delete<K: Pod, V: Pod>(&mut self, name: &str, key: &K) {
        let map = self.object.map_mut(name).unwrap();
        let mut map: HashMap<&mut MapData, K, V> = map.try_into().unwrap();
        map.remove(key).unwrap();
    }

    fn put_prefix<K: Pod, V: Pod>(&mut self, name: &str, length: u32, key: K, value: V) {
        let map = self.object.map_mut(name).unwrap();
        let mut map: LpmTrie<&mut MapData, K, V> = map.try_into().unwrap();
        map.insert(&Key::new(length, key), value, 0).unwrap();
    }

    pub(crate) fn set_config(&mut self, config: Config) {
        let map = self.object.map_mut("CONFIG").unwrap();
        let mut map: aya::maps::Array<_, Config> = map.try_into().unwrap();
        map.set(0, config, 0).unwrap();
    }

    pub(crate) fn flows(&self) -> BTreeMap<FlowKey, Flow> {
        let map: HashMap<_, FlowKey, Flow> = self.map("CONNTRACK").try_into().unwrap();
        map.iter().map(Result::unwrap).collect()
    }

    /// The rows of devices by their index.
    pub(crate) fn devices(&self) -> BTreeMap<u32, Device> {
        let map: HashMap<_, u32, Device> = self.map("DEVICES").try_into().unwrap();
        map.iter().map(Result::unwrap).collect()
    }

    pub(crate) fn flow(&self, key: &FlowKey) -> Option<Flow> {
        let map: HashMap<_, FlowKey, Flow> = self.map("CONNTRACK").try_into().unwrap();
        map.get(key, 0).ok()
    }

    /// Fills the connection table with rows that mean nothing.
    pub(crate) fn fill_flows(&mut self) {
        let map = self.object.map_mut("CONNTRACK").unwrap();
        let mut map: HashMap<&mut MapData, FlowKey, Flow> = map.try_into().unwrap();
        for number in 0_u32.. {
            let [a, b, c, d] = number.to_be_bytes();
            let key = FlowKey { sport: [a, b], dport: [c, d], ..FlowKey::default() };
            if map.insert(key, Flow::default(), 0).is_err() {
                break;
            }
        }
    }

    /// Makes a service of a frontend; returns its row.
    pub(crate) fn serve(&mut self, proto: u8, at: End<'_>, backends: &[End<'_>]) -> Service {
        self.serve_in(SCOPE_INTERNAL, proto, at, backends)
    }

    pub(crate) fn serve_in(
        &mut self,
        scope: u8,
        proto: u8,
        at: End<'_>,
        backends: &[End<'_>],
    ) -> Service {
        let set = self.next_set;
        self.next_set += 1;
        let service = Service {
            set,
            count: u32::try_from(backends.len()).unwrap(),
            service: set,
            ..Service::default()
        };
        self.set_backends(set, backends);
        self.put_frontend(scope, proto, at, service);
        service
    }

    /// Replaces who belongs to a set, and its slots as far as there are backends.
    pub(crate) fn set_backends(&mut self, set: u32, backends: &[End<'_>]) {
        let former: HashMap<_, MemberKey, u32> = self.map("MEMBERS").try_into().unwrap();
        let former: Vec<MemberKey> = former.keys().map(Result::unwrap).collect();
        for key in former.iter().filter(|key| key.set == set) {
            self.delete::<_, u32>("MEMBERS", key);
        }
        for (slot, backend) in (0..).zip(backends) {
            let port = backend.1.to_be_bytes();
            let row = Backend { addr: addr(backend.0), port, reserved: [0; 2] };
            self.put("BACKENDS", BackendKey { set, slot }, row);
            let backend = Peer { addr: addr(backend.0), port, reserved: [0; 2] };
            self.put("MEMBERS", MemberKey { set, backend }, slot);
        }
    }

    pub(crate) fn put_frontend(&mut self, scope: u8, proto: u8, at: End<'_>, service: Service) {
        let key = ServiceKey { addr: addr(at.0), port: at.1.to_be_bytes(), proto, scope };
        self.put("SERVICES", key, service);
    }

    pub(crate) fn allow(&mut self, service: u32, net: &str, length: u32) {
        let range = SourceRange { service, addr: addr(net) };
        let v4 = if range.addr.is_v4() { 96 } else { 0 };
        self.put_prefix("SOURCE_RANGES", 32 + v4 + length, range, 1_u32);
    }

    fn put_pod(&mut self, ip: &str, ifindex: u32, pod_mac: [u8; 6]) {
        let endpoint = Endpoint { ifindex, host_mac: HOST_MAC, pod_mac, flags: 0 };
        self.put("ENDPOINTS", addr(ip), endpoint);
    }

    fn put_far(&mut self, net: &str, length: u32, node: &str) {
        let v4 = if addr(net).is_v4() { 96 } else { 0 };
        let tunnel = Tunnel { node: addr(node), flags: 0 };
        self.put_prefix("TUNNELS", v4 + length, addr(net), tunnel);
    }

    /// Replaces the row of a pod's node.
    pub(crate) fn put_far_row(&mut self, pod: &str, tunnel: Tunnel) {
        let length = if addr(pod).is_v4() { 96 + 24 } else { 48 };
        self.put_prefix("TUNNELS", length, addr(pod), tunnel);
    }

    /// Removes what an earlier test has left.
    fn empty(&mut self) {
        self.came_by = 0;
        while self.ring.next().is_some() {}
        self.empty_map::<FlowKey, Flow>("CONNTRACK");
        self.empty_map::<ServiceKey, Service>("SERVICES");
        self.empty_map::<BackendKey, Backend>("BACKENDS");
        self.empty_map::<MemberKey, u32>("MEMBERS");
        self.empty_map::<FragmentKey, Fragment>("FRAGMENTS");
        self.empty_map::<u32, Device>("DEVICES");
        let map = self.object.map_mut("REFUSALS").unwrap();
        let mut map: PerCpuArray<_, Budget> = map.try_into().unwrap();
        let fresh = vec![Budget::default(); aya::util::nr_cpus().unwrap()];
        map.set(0, fresh.try_into().unwrap(), 0).unwrap();
    }

    fn empty_map<K: Pod, V: Pod>(&mut self, name: &str) {
        let map: HashMap<_, K, V> = self.map(name).try_into().unwrap();
        let keys: Vec<K> = map.keys().map(Result::unwrap).collect();
        for key in keys {
            self.delete::<K, V>(name, &key);
        }
    }

    /// The rows of this node.
    fn set_up(&mut self, uplink: u32) {
        self.set_config(config());
        for family in [V4, V6] {
            let whole = if family.node.contains(':') { 128 } else { 32 };
            let prefix = if whole == 128 { 48 } else { 24 };
            self.put("NODE_ADDRS", addr(family.node), 1_u32);
            self.put_pod(family.pod, 7, POD_MAC);
            self.put_pod(family.pod2, 8, POD2_MAC);
            self.put_far(family.far_pod, prefix, family.other_node);
            self.put_far(family.other_node, whole, family.other_node);
            let own = Tunnel { node: addr(family.gateway), flags: ROUTED | HERE };
            self.put_far_row(family.pod, own);
        }
        self.put("LOCAL_MACS", [2_u8, 0, 0, 0, 0, 1, 0, 0], 1_u32);
        let own = Device { addr: [Addr::default(); 2], mtu: 1500, mac: OWN_MAC, flags: 0 };
        self.put("DEVICES", HOST_DEVICE, own);
        let addr = [addr(V4.node), addr(V6.node)];
        self.put("DEVICES", uplink, Device { addr, mac: [2, 0, 0, 0, 0, 1], ..own });
    }
}

pub(crate) fn config() -> Config {
    Config {
        services: [net("10.96.0.0", 16), net("fd00:96::", 112)],
        gateway: [addr(V4.gateway), addr(V6.gateway)],
        vxlan_ifindex: 5,
        vni: 1,
        host_ifindex: HOST_DEVICE,
        flags: MASQUERADE_V4 | MASQUERADE_V6,
        node_port_first: 30_000,
        node_port_last: 32_767,
        vxlan_port: 8472,
        reserved: 0,
    }
}

fn net(text: &str, length: u8) -> Net {
    Net::new(text.parse().unwrap(), length)
}

pub(crate) fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().unwrap())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Loading costs seconds, and what a test run may see of the programs is in their maps: one copy
/// serves all tests, one after the other, each with the maps as if new. One place does, too: a test that changes
/// devices puts them back.
static KERNEL: Mutex<Option<Kernel>> = Mutex::new(None);

/// Runs a test in a namespace with an uplink, the programs loaded and this node's rows in place, once for each family.
pub(crate) fn with_kernel(test: impl Fn(&mut Kernel, Family) + Send + Sync) {
    if !is_possible() {
        return;
    }
    // A test that failed has left nothing that emptying does not remove.
    let mut guard = KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let kernel = guard.get_or_insert_with(Kernel::load);
    let run = || {
        setns(&kernel.place.0, CloneFlags::CLONE_NEWNET).unwrap();
        for family in [V4, V6] {
            kernel.empty();
            kernel.set_up(kernel.place.1);
            test(kernel, family);
        }
    };
    if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
        std::panic::resume_unwind(panic);
    }
}

/// Makes a network namespace with an uplink for the calling thread, and gives both.
fn make_place() -> (File, u32) {
    own_namespaces();
    let uplink = make_uplink();
    (File::open("/proc/thread-self/ns/net").unwrap(), uplink)
}

/// A device with this node's addresses and a default route; gives its index.
fn make_uplink() -> u32 {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
    ip("link add up0 type veth peer name up1
         link set up1 up
         link set up0 up
         address add 192.168.0.1/24 dev up0
         address add fd00:a::1/64 dev up0 nodad
         route add default via 192.168.0.254 dev up0
         route add ::/0 via fd00:a::fe dev up0
         route add unreachable 10.244.1.0/24
         route add unreachable fd00:244:1::/48
        ");
    nix::net::if_::if_nametoindex("up0").unwrap()
}

/// A connection of the node under way: its port is taken from the first packet on.
pub(crate) fn connecting(from: SocketAddr, to: SocketAddr) -> OwnedFd {
    let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
    let result = connect(fd.as_raw_fd(), &SockaddrStorage::from(to));
    assert_eq!(result, Err(Errno::EINPROGRESS));
    fd
}

/// What a packet is after one hop.
pub(crate) fn hop(frame: &Frame) -> Frame {
    Frame { ttl: frame.ttl - 1, ..frame.clone() }
}

/// A packet as it is delivered to the first pod.
pub(crate) fn delivered(frame: &Frame) -> Frame {
    Frame { dst_mac: POD_MAC, src_mac: HOST_MAC, ..hop(frame) }
}

/// A packet as it is delivered to the second pod.
pub(crate) fn delivered2(frame: &Frame) -> Frame {
    Frame { dst_mac: POD2_MAC, src_mac: HOST_MAC, ..hop(frame) }
}

/// A packet as it comes in to the node's own stack by the host device.
pub(crate) fn to_host(frame: &Frame) -> Frame {
    Frame { dst_mac: OWN_MAC, src_mac: [0; 6], ..frame.clone() }
}

/// "Any address" of an address's family, by which node ports are keyed.
pub(crate) fn any(of: &str) -> &'static str {
    if of.contains(':') { "::" } else { "0.0.0.0" }
}

/// The source port of a packet without extensions that was this frame, or an echo's identifier.
pub(crate) fn port_of(out: &[u8], frame: &Frame) -> u16 {
    let ip = match (frame.src.0.is_ipv4(), frame.fragment) {
        (true, _) => 20,
        (false, None) => 40,
        (false, Some(_)) => 48,
    };
    let at = 14 + ip + if frame.flags == 8 || frame.flags == 128 { 4 } else { 0 };
    u16::from_be_bytes([out[at], out[at + 1]])
}

/// The frame sent on to another destination.
pub(crate) fn redirected(frame: &Frame, to: End<'_>) -> Frame {
    Frame { dst: (to.0.parse().unwrap(), to.1), ..frame.clone() }
}

/// The frame sent on under another source.
pub(crate) fn masked(frame: &Frame, from: End<'_>) -> Frame {
    Frame { src: (from.0.parse().unwrap(), from.1), ..frame.clone() }
}
