//! Typed handles of the kernel's maps: reading what is there, and writing one row at a time.
//!
//! Effects only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::IpAddr,
};

use aya::{
    Ebpf, Pod,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
};
use ebpf_common::{
    addr::Addr,
    config::Config,
    conntrack::{Flow, FlowKey, LED_TO},
    device::Device,
    endpoint::{Endpoint, HAS_FLOWS},
    maps as names,
    netns::Netns,
    tunnel::{HERE, ROUTED, Tunnel},
    verdict::DropReason,
};
use ipnet::IpNet;

use super::{
    load::LoadError,
    plan::{Batch, Observed},
    service_maps::{ServiceMaps, take},
};
use crate::{
    model::{FarEnd, FarPath},
    sys::map::RowMap,
};

/// Every map that the agent reads or writes.
pub struct Maps {
    config: Array<MapData, Config>,
    services: ServiceMaps,
    node_addresses: HashMap<MapData, Addr, u32>,
    local_macs: HashMap<MapData, [u8; 8], u32>,
    endpoints: HashMap<MapData, Addr, Endpoint>,
    tunnels: LpmTrie<MapData, Addr, Tunnel>,
    conntrack: RowMap<FlowKey, Flow>,
    conntrack_old: RowMap<FlowKey, Flow>,
    namespaces: HashMap<MapData, u64, Netns>,
    devices: HashMap<MapData, u32, Device>,
    counters: PerCpuArray<MapData, u64>,
    /// Programs that are still to be loaded name the maps by these descriptors.
    _kept: Vec<Map>,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the object lacks one or has it in another shape.
    pub(super) fn take(object: &mut Ebpf) -> Result<Self, LoadError> {
        let mut kept = Vec::new();
        Ok(Self {
            config: typed(object, names::CONFIG)?,
            services: ServiceMaps::take(object)?,
            node_addresses: typed(object, names::NODE_ADDRS)?,
            local_macs: typed(object, names::LOCAL_MACS)?,
            endpoints: typed(object, names::ENDPOINTS)?,
            tunnels: typed(object, names::TUNNELS)?,
            conntrack: take(object, names::CONNTRACK, &mut kept)?,
            conntrack_old: take(object, names::CONNTRACK_OLD, &mut kept)?,
            namespaces: typed(object, names::NETNS)?,
            devices: typed(object, names::DEVICES)?,
            counters: typed(object, names::COUNTERS)?,
            _kept: kept,
        })
    }

    /// The maps of services.
    #[must_use]
    pub const fn services(&self) -> &ServiceMaps {
        &self.services
    }

    /// What the service maps hold.
    ///
    /// # Errors
    ///
    /// What the kernel says to reading.
    pub fn observed(&self) -> io::Result<Observed> {
        Ok(Observed::from_rows(self.services.read()?).0)
    }

    /// Does one batch of a plan. A row that is to go and is gone is no error.
    ///
    /// # Errors
    ///
    /// What the kernel says; `E2BIG` when the map is full.
    pub fn apply(&mut self, batch: &Batch) -> io::Result<()> {
        let failed = self.services.write(std::slice::from_ref(batch)).into_iter().next();
        failed.map_or(Ok(()), |failed| Err(failed.error))
    }

    /// The settings as they are.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn config(&self) -> io::Result<Config> {
        self.config.get(&0, 0).map_err(errno)
    }

    /// Writes the settings if they differ.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_config(&mut self, config: &Config) -> io::Result<()> {
        if self.config()? == *config {
            return Ok(());
        }
        self.config.set(0, *config, 0).map_err(errno)
    }

    /// Makes the node's own addresses exactly these. A row that is there stays as it is, since programs may
    /// set its flag.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_node_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        let desired: BTreeSet<Addr> =
            addresses.iter().map(|address| Addr::from(*address)).collect();
        let observed: BTreeMap<Addr, u32> = rows(self.node_addresses.iter())?;
        for addr in desired.iter().filter(|addr| !observed.contains_key(addr)) {
            self.node_addresses.insert(addr, 1, 0).map_err(errno)?;
        }
        for addr in observed.keys().filter(|addr| !desired.contains(addr)) {
            gone(self.node_addresses.remove(addr))?;
        }
        Ok(())
    }

    /// Makes the MACs whose broadcasts are echoes exactly these.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_local_macs(&mut self, macs: &BTreeSet<[u8; 6]>) -> io::Result<()> {
        let padded = |mac: &[u8; 6]| [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0];
        let desired = macs.iter().map(|mac| (padded(mac), 1)).collect();
        sync(&mut self.local_macs, &desired)
    }

    /// Makes the namespaces whose packets pass our programs these; with `surplus_may_go` exactly
    /// these.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_namespaces(
        &mut self,
        desired: &BTreeMap<u64, Netns>,
        surplus_may_go: bool,
    ) -> io::Result<()> {
        let observed: BTreeMap<u64, Netns> = rows(self.namespaces.iter())?;
        for (cookie, row) in desired.iter().filter(|(key, row)| observed.get(key) != Some(row)) {
            self.namespaces.insert(cookie, row, 0).map_err(errno)?;
        }
        for cookie in observed.keys().filter(|key| surplus_may_go && !desired.contains_key(key)) {
            gone(self.namespaces.remove(cookie))?;
        }
        Ok(())
    }

    /// Writes what is known of a namespace; `None` forgets it.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn put_namespace(&mut self, cookie: u64, row: Option<&Netns>) -> io::Result<()> {
        match row {
            Some(row) => self.namespaces.insert(cookie, row, 0).map_err(errno),
            None => gone(self.namespaces.remove(&cookie)),
        }
    }

    /// Makes the devices that programs know exactly these.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_devices(&mut self, desired: &BTreeMap<u32, Device>) -> io::Result<()> {
        sync(&mut self.devices, desired)
    }

    /// The pods that are programmed.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn endpoints(&self) -> io::Result<BTreeMap<IpAddr, Endpoint>> {
        let rows: BTreeMap<Addr, Endpoint> = rows(self.endpoints.iter())?;
        Ok(rows.into_iter().map(|(addr, endpoint)| (addr.ip(), endpoint)).collect())
    }

    /// Programs a pod. A row that is replaced has all the flags that programs set, since they may set one
    /// meanwhile: it costs look-ups only.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn put_endpoint(&mut self, address: IpAddr, endpoint: &Endpoint) -> io::Result<()> {
        let is_known = self.endpoints.get(&Addr::from(address), 0).is_ok();
        let noted = if is_known { HAS_FLOWS | LED_TO } else { 0 };
        let endpoint = Endpoint { flags: endpoint.flags | noted, ..*endpoint };
        self.endpoints.insert(Addr::from(address), endpoint, 0).map_err(errno)
    }

    /// Forgets a pod.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn delete_endpoint(&mut self, address: IpAddr) -> io::Result<()> {
        gone(self.endpoints.remove(&Addr::from(address)))
    }

    /// Pod CIDRs of other nodes that are programmed.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn tunnels(&self) -> io::Result<BTreeMap<IpNet, FarEnd>> {
        self.tunnels
            .iter()
            .map(|row| {
                let (key, tunnel) = row.map_err(errno)?;
                let net = net(&key.data(), key.prefix_len())
                    .ok_or_else(|| io::Error::other("a range with an impossible length"))?;
                let path = match tunnel.flags {
                    flags if flags & HERE != 0 => FarPath::Here,
                    flags if flags & ROUTED != 0 => FarPath::Routes,
                    _ => FarPath::Tunnel,
                };
                Ok((net, FarEnd { node: tunnel.node.ip(), path }))
            })
            .collect()
    }

    /// Programs the far end for a pod CIDR. As with a pod, a row that is replaced (or that is part of another
    /// one) has the flag that programs set.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn put_tunnel(&mut self, net: IpNet, far: FarEnd) -> io::Result<()> {
        let is_known = self.tunnels.get(&lpm(net), 0).is_ok();
        let path = match far.path {
            FarPath::Tunnel => 0,
            FarPath::Routes => ROUTED,
            FarPath::Here => ROUTED | HERE,
        };
        let flags = path | if is_known { LED_TO } else { 0 };
        let tunnel = Tunnel { node: Addr::from(far.node), flags };
        self.tunnels.insert(&lpm(net), tunnel, 0).map_err(errno)
    }

    /// Forgets a pod CIDR.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn delete_tunnel(&mut self, net: IpNet) -> io::Result<()> {
        gone(self.tunnels.remove(&lpm(net)))
    }

    /// The connection table into which programs insert.
    #[must_use]
    pub const fn connections(&self) -> &RowMap<FlowKey, Flow> {
        &self.conntrack
    }

    /// The one in which they look too.
    #[must_use]
    pub const fn old_connections(&self) -> &RowMap<FlowKey, Flow> {
        &self.conntrack_old
    }

    /// Drops and refusals for one reason, as [`Self::drops`].
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn dropped(&self, reason: DropReason) -> io::Result<u64> {
        let place = DropReason::ALL.iter().zip(0_u32..).find(|(one, _)| **one == reason);
        counted(self.counters.get(&place.map_or(0, |(_, index)| index), 0))
    }

    /// Drops and refusals by reason since the maps were made, summed over CPUs.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn drops(&self) -> io::Result<Vec<(DropReason, u64)>> {
        drops(&self.counters)
    }
}

/// What the counters say, by reason.
pub(super) fn drops(counters: &PerCpuArray<MapData, u64>) -> io::Result<Vec<(DropReason, u64)>> {
    let count =
        |(reason, index): (&DropReason, u32)| Ok((*reason, counted(counters.get(&index, 0))?));
    DropReason::ALL.iter().zip(0_u32..).map(count).collect()
}

/// A counter summed over CPUs. The map may be an earlier agent's, who knew fewer reasons: nothing was counted for others.
fn counted(counter: Result<PerCpuValues<u64>, MapError>) -> io::Result<u64> {
    match counter {
        Ok(values) => Ok(values.iter().sum()),
        Err(MapError::KeyNotFound | MapError::OutOfBounds { .. }) => Ok(0),
        Err(error) => Err(errno(error)),
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<T, LoadError> {
    let map = object.take_map(name).ok_or(LoadError::NoMap { name })?;
    T::try_from(map).map_err(|source| LoadError::Map { name, source })
}

fn rows<K: Ord, V>(
    rows: impl Iterator<Item = Result<(K, V), MapError>>,
) -> io::Result<BTreeMap<K, V>> {
    rows.map(|row| row.map_err(errno)).collect()
}

/// Writes what differs, then deletes what is surplus.
fn sync<K: Pod + Ord, V: Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    desired: &BTreeMap<K, V>,
) -> io::Result<()> {
    let observed: BTreeMap<K, V> = rows(map.iter())?;
    for (key, value) in desired.iter().filter(|(key, value)| observed.get(key) != Some(value)) {
        map.insert(key, value, 0).map_err(errno)?;
    }
    for key in observed.keys().filter(|key| !desired.contains_key(key)) {
        gone(map.remove(key))?;
    }
    Ok(())
}

/// Bits before an IPv4 address in the form that both families share.
const V4_PREFIX: u32 = 96;

fn lpm(net: IpNet) -> Key<Addr> {
    let before = if net.addr().is_ipv4() { V4_PREFIX } else { 0 };
    Key::new(before + u32::from(net.prefix_len()), Addr::from(net.network()))
}

/// The range of an address and so many bits of the form that both families share.
pub(super) fn net(addr: &Addr, bits: u32) -> Option<IpNet> {
    let before = if addr.is_v4() { V4_PREFIX } else { 0 };
    IpNet::new(addr.ip(), u8::try_from(bits.checked_sub(before)?).ok()?).ok()
}

fn gone(result: Result<(), MapError>) -> io::Result<()> {
    match result.map_err(errno) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The kernel's error inside aya's.
fn errno(error: MapError) -> io::Error {
    if matches!(error, MapError::KeyNotFound) {
        return io::Error::from(io::ErrorKind::NotFound);
    }
    if let MapError::SyscallError(error) = error {
        return error.io_error;
    }
    io::Error::other(error)
}
