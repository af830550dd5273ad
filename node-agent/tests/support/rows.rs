//! Rows of the pinned maps as a test wants them, written beside the agent.
#![expect(dead_code, reason = "each test uses a part of it")]

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use aya::{
    Pod,
    maps::{
        Array, HashMap, Map, MapData,
        lpm_trie::{Key, LpmTrie},
    },
};
use ebpf_common::{
    ABI_VERSION,
    addr::{Addr, Net},
    affinity::{Affinity, AffinityKey, MemberKey},
    config::Config,
    maps as names,
    netns::Netns,
    service::{
        Backend, BackendKey, Peer, SCOPE_EXTERNAL, SCOPE_INTERNAL, SCOPE_LOOPBACK, Service,
        ServiceKey, SourceRange,
    },
};

/// The maps below a folder of pins.
pub(crate) struct Rows {
    folder: PathBuf,
}

/// Names sets and services; each new one gets a number of its own.
static NEXT: AtomicU32 = AtomicU32::new(1);

impl Rows {
    pub(crate) fn below(pins: &Path) -> Self {
        Self { folder: pins.join(format!("v{ABI_VERSION}")) }
    }

    fn pin(&self, name: &str) -> MapData {
        MapData::from_pin(self.folder.join(name)).unwrap()
    }

    fn hash<K: Pod, V: Pod>(&self, name: &str) -> HashMap<MapData, K, V> {
        HashMap::try_from(Map::HashMap(self.pin(name))).unwrap()
    }

    pub(crate) fn set_config(&self, config: Config) {
        let mut map: Array<_, Config> =
            Array::try_from(Map::Array(self.pin(names::CONFIG))).unwrap();
        map.set(0, config, 0).unwrap();
    }

    pub(crate) fn set_flags(&self, flags: u32) {
        let mut map: Array<_, Config> =
            Array::try_from(Map::Array(self.pin(names::CONFIG))).unwrap();
        let config = map.get(&0, 0).unwrap();
        map.set(0, Config { flags, ..config }, 0).unwrap();
    }

    pub(crate) fn put_node_address(&self, ip: &str) {
        self.hash::<Addr, u32>(names::NODE_ADDRS).insert(addr(ip), 1, 0).unwrap();
    }

    pub(crate) fn put_netns(&self, cookie: u64, addresses: [&str; 2]) {
        let row = Netns { addr: addresses.map(|ip| if ip.is_empty() { zero() } else { addr(ip) }) };
        self.hash::<u64, Netns>(names::NETNS).insert(cookie, row, 0).unwrap();
    }

    pub(crate) fn delete_netns(&self, cookie: u64) {
        self.hash::<u64, Netns>(names::NETNS).remove(&cookie).unwrap();
    }

    /// Puts a frontend ("any" address for a node port) that leads to these backends by a new set; what
    /// the set, the count and the service's number are is filled in. Gives the row.
    pub(crate) fn put_service(
        &self,
        frontend: &str,
        proto: u8,
        like: Service,
        backends: &[SocketAddr],
    ) -> Service {
        self.put_scoped((frontend, SCOPE_INTERNAL), proto, like, backends)
    }

    /// As [`Self::put_service`], for clients outside.
    pub(crate) fn put_external(
        &self,
        frontend: &str,
        proto: u8,
        like: Service,
        backends: &[SocketAddr],
    ) -> Service {
        self.put_scoped((frontend, SCOPE_EXTERNAL), proto, like, backends)
    }

    /// A pod's port at a loopback address.
    pub(crate) fn put_at_loopback(&self, at: &str, proto: u8, backends: &[SocketAddr]) {
        self.put_scoped((at, SCOPE_LOOPBACK), proto, Service::default(), backends);
    }

    fn put_scoped(
        &self,
        (frontend, scope): (&str, u8),
        proto: u8,
        like: Service,
        backends: &[SocketAddr],
    ) -> Service {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let service = if like.service == 0 { number } else { like.service };
        let count = u32::try_from(backends.len()).unwrap();
        let row = Service { set: number, count, service, ..like };
        let mut members = self.hash::<MemberKey, u32>(names::MEMBERS);
        let mut slots = self.hash::<BackendKey, Backend>(names::BACKENDS);
        for (slot, backend) in (0..).zip(backends) {
            let peer = peer(*backend);
            let backend = Backend { addr: peer.addr, port: peer.port, reserved: [0; 2] };
            slots.insert(BackendKey { set: number, slot }, backend, 0).unwrap();
            members.insert(MemberKey { set: number, backend: peer }, slot, 0).unwrap();
        }
        let to = peer(frontend.parse().unwrap());
        let key = ServiceKey { addr: to.addr, port: to.port, proto, scope };
        self.hash::<ServiceKey, Service>(names::SERVICES).insert(key, row, 0).unwrap();
        row
    }

    /// Takes a backend from those that affinity may choose.
    pub(crate) fn delete_member(&self, set: u32, backend: SocketAddr) {
        let key = MemberKey { set, backend: peer(backend) };
        self.hash::<MemberKey, u32>(names::MEMBERS).remove(&key).unwrap();
    }

    pub(crate) fn put_source_range(&self, service: u32, ip: &str, length: u8) {
        let ip: IpAddr = ip.parse().unwrap();
        let net = Net::new(ip, length);
        let bits = 32 + u32::from(length) + if ip.is_ipv4() { 96 } else { 0 };
        let map = Map::LpmTrie(self.pin(names::SOURCE_RANGES));
        let mut map: LpmTrie<_, SourceRange, u32> = LpmTrie::try_from(map).unwrap();
        map.insert(&Key::new(bits, SourceRange { service, addr: net.addr }), 1, 0).unwrap();
    }

    pub(crate) fn clients(&self) -> BTreeMap<AffinityKey, Affinity> {
        let map = Map::LruHashMap(self.pin(names::AFFINITY));
        let map: HashMap<_, AffinityKey, Affinity> = HashMap::try_from(map).unwrap();
        map.iter().map(Result::unwrap).collect()
    }

    pub(crate) fn put_client(&self, key: AffinityKey, affinity: Affinity) {
        let map = Map::LruHashMap(self.pin(names::AFFINITY));
        let mut map: HashMap<_, AffinityKey, Affinity> = HashMap::try_from(map).unwrap();
        map.insert(key, affinity, 0).unwrap();
    }
}

pub(crate) fn addr(ip: &str) -> Addr {
    Addr::from(ip.parse::<IpAddr>().unwrap())
}

fn zero() -> Addr {
    Addr::default()
}

pub(crate) fn peer(address: SocketAddr) -> Peer {
    let port = address.port().to_be_bytes();
    Peer { addr: Addr::from(address.ip()), port, reserved: [0; 2] }
}
