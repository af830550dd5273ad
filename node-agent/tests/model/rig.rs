//! The loaded programs over real maps, which are filled by the agent's own way: from tables by the model
//! and its plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::{
    Ebpf,
    maps::{HashMap, MapData, PerCpuArray},
};
use ebpf_common::{
    addr::{Addr, Net},
    affinity::{Affinity, AffinityKey},
    config::{Config, LOOPBACK_PORTS, MASQUERADE_V4, MASQUERADE_V6},
    conntrack::{Flow, FlowKey},
    device::{Device, XDP},
    endpoint::Endpoint,
    fragment::{Fragment, FragmentKey},
    maps as names,
    netns::Netns,
    verdict::{Budget, DropReason},
};
use node_agent::{
    dataplane::{
        NodeLocalService, host_ports,
        load::Programs,
        maps::Maps,
        model::Model,
        plan::{Observed, Plan},
        select::Place,
        tracer::Tracer,
    },
    model::{EndpointSliceRow, FarEnd, FarPath, ObjectKey, ServiceRow},
    sys::map::Walk,
    table::Table,
};

use super::{
    asking::Asker,
    flows::{Flows, Tuple},
    loaded::{UPLINK_MAC, load_over, make_uplink, pin_connections},
    place::own_namespaces,
    random::NODE_LOCAL,
    world::{
        DNS, End, FAR_NETS, FAR_NODES, GATEWAY, LOOPBACK, NAMES, NODE, NODE_PORTS, OWN_NETS, PODS,
        Pair, SERVICE_NETS, Service, VXLAN_PORT, World, ZONES, ip,
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

/// Bytes of a way that XDP remembers.
const WAY: usize = 136;

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
    pub(crate) maps: Maps,
    /// The same programs over the same maps, with every field of a packet's context.
    pub(crate) object: Ebpf,
    pub(crate) tracer: Tracer,
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    revisions: (u64, u64),
    model: Model,
    observed: Observed,
    pub(crate) uplink: u32,
    /// What was counted and told so far.
    pub(crate) counted: Vec<u64>,
}

impl Rig {
    /// Moves the thread into namespaces of its own and loads the programs there.
    pub(crate) fn load() -> Self {
        let pins = own_namespaces().join("orlop");
        let uplink = make_uplink();
        pin_connections(&pins);
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
        self.maps.set_local_macs(&BTreeSet::from([UPLINK_MAC])).unwrap();
        let pods = (0..PODS.len()).map(|index| (Asker::Pod(index), PODS[index]));
        let spaces = pods.chain([(Asker::Node, GATEWAY)]);
        let rows = spaces.map(|(who, pair)| (who.cookie(), Netns { addr: pair.map(Addr::from) }));
        self.maps.set_namespaces(&rows.collect(), true).unwrap();
    }

    /// Makes the node that of a world, as if nothing had been before.
    pub(crate) fn set_up(&mut self, world: &World) {
        self.tear_down();
        let loopback = LOOPBACK.iter().filter(|_| world.loopback_ports);
        let addresses = NODE.iter().chain([&DNS]).flatten().chain(loopback);
        self.maps.set_node_addresses(&addresses.copied().collect()).unwrap();
        self.put_devices(world);
        self.put_pods();
        for (node, pods) in FAR_NETS.iter().enumerate() {
            for v6 in [false, true] {
                let path = if world.routed[node] { FarPath::Routes } else { FarPath::Tunnel };
                let far = FarEnd { node: ip(FAR_NODES[node], v6), path };
                // A row that is replaced has the flag that flows lead there: what may meet one is looked up.
                self.maps.put_tunnel(pods[usize::from(v6)], far).unwrap();
                self.maps.put_tunnel(far.node.into(), far).unwrap();
                self.maps.put_tunnel(pods[usize::from(v6)], far).unwrap();
                self.maps.put_tunnel(far.node.into(), far).unwrap();
            }
        }
        for (net, node) in OWN_NETS.into_iter().zip(GATEWAY) {
            self.maps.put_tunnel(net, FarEnd { node, path: FarPath::Here }).unwrap();
        }
        for service in &world.services {
            self.put_service(service);
        }
        self.set_host_ports(world);
        self.empty();
        if world.xdp {
            self.forget_ways();
        }
    }

    fn put_devices(&mut self, world: &World) {
        let own = Device { addr: [Addr::default(); 2], mtu: 1500, mac: OWN_MAC, flags: 0 };
        let flags = if world.xdp { XDP } else { 0 };
        let addr = NODE[0].map(Addr::from);
        let uplink = Device { addr, mac: UPLINK_MAC, flags, ..own };
        self.maps.set_devices(&[(HOST_DEVICE, own), (self.uplink, uplink)].into()).unwrap();
    }

    fn put_config(&mut self, world: &World) {
        let masquerade = if world.masquerade { MASQUERADE_V4 | MASQUERADE_V6 } else { 0 };
        let at_loopback = host_ports::are_at_loopback(world.endpoints());
        let config = Config {
            services: SERVICE_NETS.map(|net| Net::new(net.addr(), net.prefix_len())),
            gateway: GATEWAY.map(Addr::from),
            vxlan_ifindex: if world.vxlan { VXLAN_DEVICE } else { 0 },
            vni: 1,
            host_ifindex: HOST_DEVICE,
            flags: masquerade | if at_loopback { LOOPBACK_PORTS } else { 0 },
            node_port_first: NODE_PORTS.0,
            node_port_last: NODE_PORTS.1,
            vxlan_port: VXLAN_PORT,
            reserved: 0,
        };
        self.maps.set_config(&config).unwrap();
    }

    fn put_pods(&mut self) {
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
    }

    /// Ends what the last world has left: services by the agent's way, the rest row by row.
    pub(crate) fn tear_down(&mut self) {
        for (key, _) in self.services.changes_since(0).upserts {
            self.services.delete(&key);
        }
        for (key, _) in self.slices.changes_since(0).upserts {
            self.slices.delete(&key);
        }
        let dirty = self.model.set_host_ports(BTreeMap::new());
        self.write(dirty);
    }

    fn empty(&mut self) {
        let flows = self.connections();
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

    /// XDP remembers for a second where its packets go, and worlds change more quickly.
    fn forget_ways(&mut self) {
        let map = self.object.map_mut("PATHS").unwrap();
        let mut map: PerCpuArray<_, [u8; WAY]> = map.try_into().unwrap();
        let none = || vec![[0; WAY]; aya::util::nr_cpus().unwrap()].try_into().unwrap();
        for place in 0..map.len() {
            map.set(place, none(), 0).unwrap();
        }
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

    /// The ports of pods are those of a world; settings and rows follow.
    pub(crate) fn set_host_ports(&mut self, world: &World) {
        self.put_config(world);
        let node = NODE.iter().flatten().copied().collect();
        let dirty = self.model.set_host_ports(host_ports::rows(world.endpoints(), &node));
        self.write(dirty);
    }

    /// A round of the agent: what changed in the tables into the maps.
    pub(crate) fn round(&mut self) {
        self.write(BTreeSet::new());
    }

    /// The same, and what else is to be looked through.
    fn write(&mut self, mut dirty: BTreeSet<ObjectKey>) {
        let services = self.services.changes_since(self.revisions.0);
        let slices = self.slices.changes_since(self.revisions.1);
        self.revisions = (services.revision, slices.revision);
        let mut plan = Plan::default();
        dirty.append(&mut self.model.update(services, slices));
        for key in dirty {
            let desired = self.model.desired(&key);
            self.observed.plan_service(&key, &desired.ports, &mut plan);
        }
        let failed = self.maps.services().write(&plan.into_batches());
        assert!(failed.is_empty(), "{failed:?}");
    }

    /// Every row of the connection table, of which there are few.
    pub(crate) fn connections(&self) -> Vec<(FlowKey, Flow)> {
        let (mut rows, mut walk) = (Vec::new(), Walk::by(128));
        while !walk.is_over() {
            rows.extend(self.maps.connections().next(&mut walk).unwrap());
        }
        rows
    }

    /// Compares the connection table with what the reference remembers.
    pub(crate) fn compare_flows(&self, flows: &Flows) -> Result<(), String> {
        let rows = self.connections();
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

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
