//! Time that goes by for the loaded programs' rows.
//!
//! No clock is turned: what the rows say of when they were last used is put back instead, so that they look
//! as they would after so many seconds. What then goes is the agent's own collector's to say.

use aya::maps::{HashMap, MapData};
use ebpf_common::{
    affinity::{Affinity, AffinityKey},
    conntrack::{Flow, FlowKey},
    maps as names,
};
use node_agent::dataplane::collect::Collector;
use rustix::time::{ClockId, clock_gettime};

use super::rig::Rig;

impl Rig {
    /// So many seconds go by, and the agent's walk over the connection table.
    pub(crate) fn wait(&mut self, seconds: u32) {
        let rows = self.connections().into_iter().map(|(key, row)| {
            let last_seen = row.last_seen.wrapping_sub(seconds);
            (key, Flow { last_seen, ..row })
        });
        let rows: Vec<(FlowKey, Flow)> = rows.collect();
        assert!(self.maps.connections().update(&rows).is_empty());
        let map = self.object.map_mut(names::AFFINITY).unwrap();
        let mut map: HashMap<&mut MapData, AffinityKey, Affinity> = map.try_into().unwrap();
        let rows: Vec<(AffinityKey, Affinity)> = map.iter().map(Result::unwrap).collect();
        for (key, row) in rows {
            let last_used = row.last_used.wrapping_sub(seconds);
            map.insert(key, Affinity { last_used, ..row }, 0).unwrap();
        }
        self.collect();
    }

    fn collect(&self) {
        let mut collector = Collector::default();
        let tables = (self.maps.connections(), self.maps.old_connections());
        let now = u32::try_from(clock_gettime(ClockId::Monotonic).tv_sec).unwrap();
        collector.begin();
        while collector.is_walking() {
            collector
                .part(tables, now, |_sought, _rows| Ok(Vec::new()), |_rows, _gone| {})
                .unwrap();
        }
    }
}
