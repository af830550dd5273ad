//! The loaded programs over real maps, which are filled by the agent's own way: from tables by the model
//! and its plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData, PerCpuArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use ebpf_common::{
    ABI_VERSION,
    addr::{Addr, Net},
    affinity::{Affinity, AffinityKey},
    config::{Config, MASQUERADE_V4, MASQUERADE_V6},
    conntrack::FlowKey,
    device::Device,
    endpoint::Endpoint,
    fragment::{Fragment, FragmentKey},
    maps as names,
    netns::Netns,
    packet::ETH_LEN,
    service::Peer,
    socket::{Ask, CONNECT, DATAGRAM, LEFT, REFUSED, TRANSLATED},
    verdict::{Budget, DropReason},
};
use node_agent::{
    dataplane::{
        NodeLocalService,
        load::Programs,
        maps::Maps,
        model::Model,
        object,
        plan::{Observed, Plan},
        select::Place,
        tracer::{Run, Tracer},
    },
    model::{EndpointSliceRow, FarEnd, ObjectKey, ServiceRow},
    table::Table,
};

use crate::{
    asking::{Asker, Question},
    flows::{Flows, Tuple},
    place::{ip as command, own_namespaces},
    random::NODE_LOCAL,
    step::Hook,
    world::{
        DNS, End, FAR_NETS, FAR_NODES, GATEWAY, LOOPBACK, NAMES, NODE, NODE_PORTS, PODS, Pair,
        SERVICE_NETS, Service, VXLAN_PORT, World, ZONES, ip,
    },
};

pub(crate) const PASS: i32 = -1;
pub(crate) const DROP: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;
pub(crate) const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
/// MAC of the host device.
pub(crate) const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 9];
/// Index of the host device; loopback's, since a device of that index has to be there.
pub(crate) const HOST_DEVICE: u32 = 1;
pub(crate) const VXLAN_DEVICE: u32 = 5;
/// Index of the first pod's device; the others' follow.
pub(crate) const POD_DEVICE: u32 = 7;
const UPLINK: &str = "up0";

pub(crate) fn pod_mac(index: usize) -> [u8; 6] {
    [2, 0, 0, 0, 1, 2 + u8::try_from(index).unwrap()]
}

/// What a program did.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) verdict: i32,
    pub(crate) packet: Vec<u8>,
    /// What was counted for it.
    pub(crate) dropped: Vec<DropReason>,
}

/// What a socket was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    Left,
    To(End),
    Refused(DropReason),
}

pub(crate) struct Rig {
    pub(crate) programs: Programs,
    maps: Maps,
    /// The same programs over the same maps, with every field of a packet's context.
    object: Ebpf,
    tracer: Tracer,
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    revisions: (u64, u64),
    model: Model,
    observed: Observed,
    uplink: u32,
    /// What was counted and told so far.
    counted: Vec<u64>,
}

impl Rig {
    /// Moves the thread into namespaces of its own and loads the programs there.
    pub(crate) fn load() -> Self {
        let pins = own_namespaces().join("orlop");
        let uplink = make_uplink();
        let (programs, maps) = Programs::load(Some(&pins)).unwrap();
        let dns = NodeLocalService {
            service: ObjectKey::new("default", &format!("service-{NODE_LOCAL}")),
            address: DNS[0],
        };
        let mut model = Model::new(Some(dns));
        let place = Place { node: NAMES[0].into(), zone: ZONES[0].into() };
        assert!(model.set_place(place).is_empty());
        let mut rig = Self {
            programs,
            maps,
            object: load_over(&pins),
            tracer: Tracer::load(&pins).unwrap(),
            services: Table::new(),
            slices: Table::new(),
            revisions: (0, 0),
            model,
            observed: Observed::default(),
            uplink,
            counted: vec![0; DropReason::ALL.len()],
        };
        rig.services.mark_synced();
        rig.slices.mark_synced();
        rig.put_node();
        rig
    }

    /// Rows that no world changes.
    fn put_node(&mut self) {
        let addresses: BTreeSet<IpAddr> =
            NODE.iter().chain([&DNS]).flat_map(|pair| *pair).collect();
        self.maps.set_node_addresses(&addresses).unwrap();
        self.maps.set_local_macs(&BTreeSet::from([[2, 0, 0, 0, 0, 1]])).unwrap();
        let own = Device { addr: [Addr::default(); 2], mtu: 1500, mac: OWN_MAC, flags: 0 };
        let uplink = Device { addr: NODE[0].map(Addr::from), mac: [2, 0, 0, 0, 0, 1], ..own };
        self.maps.set_devices(&[(HOST_DEVICE, own), (self.uplink, uplink)].into()).unwrap();
        let pods = (0..PODS.len()).map(|index| (Asker::Pod(index), PODS[index]));
        let spaces = pods.chain([(Asker::Node, GATEWAY)]);
        let rows = spaces.map(|(who, pair)| (who.cookie(), Netns { addr: pair.map(Addr::from) }));
        self.maps.set_namespaces(&rows.collect(), true).unwrap();
    }

    /// Makes the node that of a world, as if nothing had been before.
    pub(crate) fn set_up(&mut self, world: &World) {
        self.tear_down();
        let flags = if world.masquerade { MASQUERADE_V4 | MASQUERADE_V6 } else { 0 };
        let config = Config {
            services: SERVICE_NETS.map(|net| Net::new(net.addr(), net.prefix_len())),
            gateway: GATEWAY.map(Addr::from),
            vxlan_ifindex: if world.vxlan { VXLAN_DEVICE } else { 0 },
            vni: 1,
            host_ifindex: HOST_DEVICE,
            flags,
            node_port_first: NODE_PORTS.0,
            node_port_last: NODE_PORTS.1,
            vxlan_port: VXLAN_PORT,
            reserved: 0,
        };
        self.maps.set_config(&config).unwrap();
        let loopback = LOOPBACK.iter().filter(|_| world.loopback_ports);
        let addresses = NODE.iter().chain([&DNS]).flatten().chain(loopback);
        self.maps.set_node_addresses(&addresses.copied().collect()).unwrap();
        for (index, pod) in PODS.iter().enumerate() {
            let row = Endpoint {
                ifindex: POD_DEVICE + u32::try_from(index).unwrap(),
                host_mac: HOST_MAC,
                pod_mac: pod_mac(index),
                flags: 0,
            };
            for addr in pod {
                // What a world has noted of its flows is gone with it.
                self.maps.delete_endpoint(*addr).unwrap();
                self.maps.put_endpoint(*addr, &row).unwrap();
            }
        }
        for (node, pods) in FAR_NETS.iter().enumerate() {
            for v6 in [false, true] {
                let far = FarEnd { node: ip(FAR_NODES[node], v6), routed: world.routed[node] };
                // A row that is replaced has the flag that flows lead there: what may meet one is looked up.
                self.maps.put_tunnel(pods[usize::from(v6)], far).unwrap();
                self.maps.put_tunnel(far.node.into(), far).unwrap();
                self.maps.put_tunnel(pods[usize::from(v6)], far).unwrap();
                self.maps.put_tunnel(far.node.into(), far).unwrap();
            }
        }
        for service in &world.services {
            self.put_service(service);
        }
        self.round();
        self.empty();
    }

    /// Ends what the last world has left: services by the agent's way, the rest row by row.
    pub(crate) fn tear_down(&mut self) {
        for (key, _) in self.services.changes_since(0).upserts {
            self.services.delete(&key);
        }
        for (key, _) in self.slices.changes_since(0).upserts {
            self.slices.delete(&key);
        }
        self.round();
    }

    fn empty(&mut self) {
        let flows = self.maps.connections().dump().unwrap();
        let keys: Vec<FlowKey> = flows.iter().map(|(key, _)| *key).collect();
        assert!(self.maps.connections().delete(&keys).is_empty());
        self.empty_map::<AffinityKey, Affinity>(names::AFFINITY);
        self.empty_map::<FragmentKey, Fragment>(names::FRAGMENTS);
        // This second's answers that tell of refusals.
        let map = self.object.map_mut(names::REFUSALS).unwrap();
        let mut map: PerCpuArray<_, Budget> = map.try_into().unwrap();
        let fresh = vec![Budget::default(); aya::util::nr_cpus().unwrap()];
        map.set(0, fresh.try_into().unwrap(), 0).unwrap();
    }

    fn empty_map<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) {
        let map = self.object.map_mut(name).unwrap();
        let mut map: HashMap<&mut MapData, K, V> = map.try_into().unwrap();
        let keys: Vec<K> = map.keys().map(Result::unwrap).collect();
        for key in keys {
            // Another processor's share of the map may have taken it meanwhile.
            let _gone = map.remove(&key);
        }
    }

    pub(crate) fn put_service(&mut self, service: &Service) {
        self.services.upsert(service.key(), service.row());
        for (key, row) in service.slices() {
            self.slices.upsert(key, row);
        }
    }

    pub(crate) fn delete_service(&mut self, service: &Service) {
        self.services.delete(&service.key());
        for (key, _) in service.slices() {
            self.slices.delete(&key);
        }
    }

    /// Makes a network namespace one of this kind, for real sockets in it.
    pub(crate) fn be(&mut self, asker: Asker, cookie: u64) {
        let row = |pair: Pair| (cookie, Netns { addr: pair.map(Addr::from) });
        let rows = match asker {
            Asker::Pod(index) => [row(PODS[index])].into(),
            Asker::Node => [row(GATEWAY)].into(),
            Asker::Stranger => BTreeMap::new(),
        };
        self.maps.set_namespaces(&rows, true).unwrap();
    }

    /// A round of the agent: what changed in the tables into the maps.
    pub(crate) fn round(&mut self) {
        let services = self.services.changes_since(self.revisions.0);
        let slices = self.slices.changes_since(self.revisions.1);
        self.revisions = (services.revision, slices.revision);
        let mut plan = Plan::default();
        for key in self.model.update(services, slices) {
            let desired = self.model.desired(&key);
            self.observed.plan_service(&key, &desired.ports, &mut plan);
        }
        let failed = self.maps.services().write(&plan.into_batches());
        assert!(failed.is_empty(), "{failed:?}");
    }

    /// Makes every remembered client one of long ago.
    pub(crate) fn age_clients(&mut self) {
        let map = self.object.map_mut(names::AFFINITY).unwrap();
        let mut map: HashMap<&mut MapData, AffinityKey, Affinity> = map.try_into().unwrap();
        let rows: Vec<(AffinityKey, Affinity)> = map.iter().map(Result::unwrap).collect();
        for (key, row) in rows {
            let last_used = row.last_used.wrapping_sub(1_000_000);
            map.insert(key, Affinity { last_used, ..row }, 0).unwrap();
        }
    }

    /// Runs a packet through a program.
    pub(crate) fn run(&mut self, hook: Hook, packet: &[u8]) -> Outcome {
        let (verdict, out) = self.test_run(hook.program(), packet, hook.came_by_device());
        // An answer that tells of a refusal is another packet than the one that came in.
        let is_answer = [20, 23].iter().any(|at| out.get(*at) != packet.get(*at));
        let is_counted = verdict == DROP || is_answer || out.len() != packet.len();
        let dropped = if is_counted { self.newly_counted() } else { Vec::new() };
        Outcome { verdict, packet: out, dropped }
    }

    /// Runs a packet through the copy of a program that traces.
    pub(crate) fn trace(&mut self, hook: Hook, packet: &[u8]) -> Run {
        self.tracer.tc(hook.program(), 0, packet).unwrap()
    }

    fn test_run(&mut self, name: &str, packet: &[u8], came_by_device: bool) -> (i32, Vec<u8>) {
        let program = self.object.program_mut(name).unwrap();
        let program: &mut SchedClassifier = program.try_into().unwrap();
        let mut out = vec![0; packet.len() + 256];
        // `struct __sk_buff` (linux/bpf.h) as far as 6.1 has it: `ingress_ifindex` is its tenth word.
        let mut context = [0_u8; 184];
        context[36..40].copy_from_slice(&u32::from(came_by_device).to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = program.test_run(options).unwrap();
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        (result.return_value.cast_signed(), out)
    }

    /// What was counted since the last time.
    pub(crate) fn newly_counted(&mut self) -> Vec<DropReason> {
        let mut reasons = Vec::new();
        for ((reason, count), before) in
            self.maps.drops().unwrap().into_iter().zip(&mut self.counted)
        {
            let new = usize::try_from(count - *before).unwrap();
            reasons.extend(std::iter::repeat_n(reason, new));
            *before = count;
        }
        reasons
    }

    /// Asks the twin of the socket programs, which here writes what they would write.
    pub(crate) fn ask(&mut self, question: &Question) -> Answered {
        let port = question.to.1.to_be_bytes();
        let wanted = Peer { addr: Addr::from(question.to.0), port, reserved: [0; 2] };
        let ask = Ask {
            netns: question.asker.cookie(),
            wanted,
            random: question.random,
            proto: question.proto,
            call: if question.datagram { DATAGRAM } else { CONNECT },
            reserved: [0; 6],
        };
        let frame = [&[0; ETH_LEN][..], &ask.bytes()].concat();
        let (verdict, out) = self.test_run("tc_trace_socket", &frame, false);
        match verdict {
            LEFT => Answered::Left,
            TRANSLATED => {
                let bytes = &out[ETH_LEN..];
                let addr = Addr::from_octets(bytes[..16].try_into().unwrap());
                Answered::To((addr.ip(), u16::from_be_bytes([bytes[16], bytes[17]])))
            }
            verdict => {
                let index = usize::try_from(verdict - REFUSED).unwrap();
                self.counted[index] += 1;
                Answered::Refused(DropReason::ALL[index])
            }
        }
    }

    /// Compares the connection table with what the reference remembers.
    pub(crate) fn compare_flows(&self, flows: &Flows) -> Result<(), String> {
        let rows = self.maps.connections().dump().unwrap();
        let end = |addr: &Addr, port: [u8; 2]| (addr.ip(), u16::from_be_bytes(port));
        let found: BTreeSet<(Tuple, Tuple)> = rows
            .iter()
            .map(|(key, row)| {
                let FlowKey { src, dst, sport, dport, proto, .. } = *key;
                let from = Tuple { proto, src: end(&src, sport), dst: end(&dst, dport) };
                let to =
                    Tuple { proto, src: end(&row.src, row.sport), dst: end(&row.dst, row.dport) };
                (from, to)
            })
            .collect();
        let expected: BTreeSet<(Tuple, Tuple)> = flows
            .iter()
            .flat_map(|flow| {
                [(flow.asked, flow.sent), (flow.sent.reversed(), flow.asked.reversed())]
            })
            .collect();
        if found == expected {
            return Ok(());
        }
        let lost: Vec<_> = expected.difference(&found).collect();
        let surplus: Vec<_> = found.difference(&expected).collect();
        Err(format!("connection table: not there {lost:?}, not to be there {surplus:?}"))
    }

    /// After a world no map of services may hold a row.
    pub(crate) fn is_empty(&self) -> bool {
        let rows = self.maps.services().read().unwrap();
        rows.services.is_empty()
            && rows.backends.is_empty()
            && rows.members.is_empty()
            && rows.ranges.is_empty()
            && rows.blocks.is_empty()
    }
}

/// A second copy of the programs over the maps of the first.
fn load_over(pins: &Path) -> Ebpf {
    let mut loader = EbpfLoader::new();
    let folder = pins.join(format!("v{ABI_VERSION}"));
    let pinned: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| !entry.file_type().unwrap().is_dir())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .collect();
    for (name, path) in &pinned {
        loader.map_pin_path(name, path);
    }
    let mut object = loader.load(object()).unwrap();
    for name in [
        "tc_from_pod",
        "tc_to_pod",
        "tc_from_overlay",
        "tc_to_overlay",
        "tc_from_underlay",
        "tc_to_underlay",
        "tc_from_host",
        "tc_trace_socket",
    ] {
        let program: &mut SchedClassifier = object.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
    }
    object
}

/// A device with this node's addresses and a default route; gives its index.
fn make_uplink() -> u32 {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
    command(&format!("link add {UPLINK} type veth peer name up1"));
    command("link set up1 up");
    command(&format!("link set {UPLINK} up"));
    for address in NODE.iter().flatten() {
        let (bits, nodad) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
        command(&format!("address add {address}/{bits} dev {UPLINK} {nodad}"));
    }
    command(&format!("route add default via 192.168.0.254 dev {UPLINK}"));
    command(&format!("-6 route add default via fd00:a::fe dev {UPLINK}"));
    command("route add unreachable 198.18.0.0/15");
    command("-6 route add unreachable 2001:db8:dead::/48");
    nix::net::if_::if_nametoindex(UPLINK).unwrap()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
