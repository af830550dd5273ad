//! Reading the pinned maps beside the dataplane's own task, for people and for metrics.
//!
//! Effects; nothing here writes. A reader opens a map by its pin each time, so that it also sees the
//! connection table that took the place of a smaller one.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
};
use ebpf_common::{
    ABI_VERSION,
    addr::Addr,
    affinity::{self, Affinity, AffinityKey, MemberKey},
    config::Config,
    conntrack::{Flow, FlowKey},
    device::Device,
    endpoint::Endpoint,
    fragment::{Fragment, FragmentKey},
    maglev::{MaglevBlock, MaglevKey},
    maps as names,
    netns::Netns,
    service::{Backend, BackendKey, Service, ServiceKey},
    tunnel::{HERE, Tunnel},
    verdict::DropReason,
};

use super::{apply::now_s, maps};
use crate::sys::map::{RowMap, Walk};

/// A folder of pinned maps.
#[derive(Clone, Debug)]
pub struct Look {
    folder: PathBuf,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    pub map: &'static str,
    pub rows: u64,
    pub max: u64,
}

/// Maps that can get full and whose rows are worth counting.
const COUNTED: [&str; 11] = [
    names::SERVICES,
    names::BACKENDS,
    names::MEMBERS,
    names::ENDPOINTS,
    names::NODE_ADDRS,
    names::NETNS,
    names::DEVICES,
    names::CONNTRACK,
    names::MAGLEV,
    names::AFFINITY,
    names::FRAGMENTS,
];

/// Those of them that forget the least recently used row when they are full.
const FORGETFUL: [&str; 2] = [names::AFFINITY, names::FRAGMENTS];

impl Look {
    /// The maps below `pins`, as [`super::DataplaneConfig::pins`] has it.
    #[must_use]
    pub fn below(pins: &Path) -> Self {
        Self { folder: pins.join(format!("v{ABI_VERSION}")) }
    }

    /// Every row of the connection table, also of the smaller one that it took over from.
    ///
    /// # Errors
    ///
    /// When the maps are not there, or what the kernel says to reading.
    pub fn flows(&self) -> io::Result<BTreeMap<FlowKey, Flow>> {
        let mut flows = BTreeMap::new();
        for name in [names::CONNTRACK_OLD, names::CONNTRACK] {
            let map: HashMap<_, FlowKey, Flow> = self.hash(name)?;
            for row in map.iter() {
                let (key, flow) = row.map_err(io::Error::other)?;
                flows.insert(key, flow);
            }
        }
        Ok(flows)
    }

    /// Drops and refusals by reason since the maps were made, summed over CPUs.
    ///
    /// # Errors
    ///
    /// As [`Self::flows`].
    pub fn drops(&self) -> io::Result<Vec<(DropReason, u64)>> {
        let map = Map::PerCpuArray(self.open(names::COUNTERS)?);
        maps::drops(&PerCpuArray::try_from(map).map_err(io::Error::other)?)
    }

    /// How full the maps are, by counting rows: some 0.1 µs each, in bounded memory.
    ///
    /// # Errors
    ///
    /// As [`Self::flows`].
    pub fn fill(&self) -> io::Result<Vec<Fill>> {
        COUNTED.iter().map(|name| self.fill_of(name)).collect()
    }

    /// The same for maps that forget rows when they are full.
    ///
    /// # Errors
    ///
    /// As [`Self::flows`].
    pub fn forgetful(&self) -> io::Result<Vec<Fill>> {
        FORGETFUL.iter().map(|name| self.fill_of(name)).collect()
    }

    /// The settings that programs read.
    ///
    /// # Errors
    ///
    /// As [`Self::flows`].
    pub fn config(&self) -> io::Result<Config> {
        let map = Map::Array(self.open(names::CONFIG)?);
        let map: Array<_, Config> = Array::try_from(map).map_err(io::Error::other)?;
        map.get(&0, 0).map_err(io::Error::other)
    }

    /// Whether another node has an address.
    ///
    /// # Errors
    ///
    /// As [`Self::flows`].
    pub fn is_elsewhere(&self, ip: IpAddr) -> io::Result<bool> {
        let map = Map::LpmTrie(self.open(names::TUNNELS)?);
        let map: LpmTrie<_, Addr, Tunnel> = LpmTrie::try_from(map).map_err(io::Error::other)?;
        match map.get(&Key::new(128, Addr::from(ip)), 0) {
            Ok(row) => Ok(row.flags & HERE == 0),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn fill_of(&self, map: &'static str) -> io::Result<Fill> {
        let (rows, max) = match map {
            names::SERVICES => self.count::<ServiceKey, Service>(map)?,
            names::BACKENDS => self.count::<BackendKey, Backend>(map)?,
            names::MEMBERS => self.count::<MemberKey, u32>(map)?,
            names::ENDPOINTS => self.count::<Addr, Endpoint>(map)?,
            names::NODE_ADDRS => self.count::<Addr, u32>(map)?,
            names::NETNS => self.count::<u64, Netns>(map)?,
            names::DEVICES => self.count::<u32, Device>(map)?,
            names::MAGLEV => self.count::<MaglevKey, MaglevBlock>(map)?,
            names::AFFINITY => self.clients()?,
            names::FRAGMENTS => self.count::<FragmentKey, Fragment>(map)?,
            _ => self.count::<FlowKey, Flow>(map)?,
        };
        Ok(Fill { map, rows, max })
    }

    fn count<K: Pod, V: Pod>(&self, name: &str) -> io::Result<(u64, u64)> {
        let map: RowMap<K, V> = self.rows(name)?;
        Ok((map.count()?, u64::from(map.max())))
    }

    /// Clients who still keep their backend. Nobody takes out the rows of the others, whose place is taken first.
    fn clients(&self) -> io::Result<(u64, u64)> {
        let clients: RowMap<AffinityKey, Affinity> = self.rows(names::AFFINITY)?;
        let (mut used, max) = (Vec::new(), u64::from(clients.max()));
        each(&clients, |key, row| used.push((key.service, row.last_used)))?;
        if used.is_empty() {
            // As in most clusters, whose services are many.
            return Ok((0, max));
        }
        let mut limits = BTreeMap::new();
        each(&self.rows::<ServiceKey, Service>(names::SERVICES)?, |_, row| {
            if row.affinity_s != 0 {
                limits.insert(row.service, row.affinity_s);
            }
        })?;
        let now_s = now_s();
        used.retain(|(service, last_used)| {
            let limit = limits.get(service);
            limit.is_some_and(|limit| affinity::holds(*last_used, now_s, *limit))
        });
        Ok((u64::try_from(used.len()).unwrap_or(max), max))
    }

    fn rows<K: Pod, V: Pod>(&self, name: &str) -> io::Result<RowMap<K, V>> {
        let failed =
            |error| io::Error::other(format!("map {name} in {}: {error}", self.folder.display()));
        RowMap::open(&self.folder.join(name)).map_err(failed)
    }

    fn hash<K: Pod, V: Pod>(&self, name: &str) -> io::Result<HashMap<MapData, K, V>> {
        HashMap::try_from(Map::HashMap(self.open(name)?)).map_err(io::Error::other)
    }

    fn open(&self, name: &str) -> io::Result<MapData> {
        MapData::from_pin(self.folder.join(name)).map_err(|error: MapError| {
            io::Error::other(format!("map {name} in {}: {error}", self.folder.display()))
        })
    }
}

fn each<K: Pod, V: Pod>(map: &RowMap<K, V>, mut see: impl FnMut(&K, &V)) -> io::Result<()> {
    let mut walk = Walk::new();
    while !walk.is_over() {
        map.next(&mut walk)?.iter().for_each(|(key, row)| see(key, row));
    }
    Ok(())
}
