//! What a trace must leave as it is.

use std::{collections::BTreeMap, path::Path};

use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use ebpf_common::{
    ABI_VERSION,
    affinity::{Affinity, AffinityKey},
    conntrack::{Flow, FlowKey},
    endpoint::Endpoint,
    fragment::{Fragment, FragmentKey},
    maps as names,
    verdict::DROP_REASONS,
};

/// Every map that a program writes, byte for byte.
pub(crate) fn dump(pins: &Path) -> BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>> {
    let open = |name| MapData::from_pin(pins.join(format!("v{ABI_VERSION}")).join(name)).unwrap();
    fn rows<const K: usize, const V: usize>(map: Map) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let map: HashMap<_, [u8; K], [u8; V]> = HashMap::try_from(map).unwrap();
        map.iter().map(Result::unwrap).map(|(key, row)| (key.into(), row.into())).collect()
    }
    const FLOW: [usize; 2] = [size_of::<FlowKey>(), size_of::<Flow>()];
    const CLIENT: [usize; 2] = [size_of::<AffinityKey>(), size_of::<Affinity>()];
    const PIECE: [usize; 2] = [size_of::<FragmentKey>(), size_of::<Fragment>()];
    let flows = |name| rows::<{ FLOW[0] }, { FLOW[1] }>(Map::HashMap(open(name)));
    let clients = Map::LruHashMap(open(names::AFFINITY));
    let pieces = Map::LruHashMap(open(names::FRAGMENTS));
    let pods = Map::HashMap(open(names::ENDPOINTS));
    let counters: PerCpuArray<_, u64> =
        PerCpuArray::try_from(Map::PerCpuArray(open(names::COUNTERS))).unwrap();
    let counts = (0..DROP_REASONS).map(|at| {
        let values = counters.get(&at, 0).unwrap();
        let bytes = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        (at.to_ne_bytes().to_vec(), bytes)
    });
    BTreeMap::from([
        (names::CONNTRACK, flows(names::CONNTRACK)),
        (names::CONNTRACK_OLD, flows(names::CONNTRACK_OLD)),
        (names::AFFINITY, rows::<{ CLIENT[0] }, { CLIENT[1] }>(clients)),
        (names::FRAGMENTS, rows::<{ PIECE[0] }, { PIECE[1] }>(pieces)),
        (names::ENDPOINTS, rows::<16, { size_of::<Endpoint>() }>(pods)),
        (names::COUNTERS, counts.collect()),
    ])
}
