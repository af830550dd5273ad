//! Maps that grow under flows and services: no flow is lost, whoever dies in between.

#[cfg(test)]
#[path = "support/frame.rs"]
#[expect(dead_code, reason = "the packet tables use all of it")]
mod frame;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/rows.rs"]
mod rows;
#[cfg(test)]
#[path = "support/space.rs"]
mod space;

#[cfg(test)]
#[path = "grow/agent.rs"]
mod agent;
#[cfg(test)]
#[path = "grow/steps.rs"]
mod steps;

/// What both tests begin with: maps of an earlier agent, which are too small.
#[cfg(test)]
mod small {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use aya::Pod;
    use ebpf_common::ABI_VERSION;
    use node_agent::sys::{bpf, map::RowMap};

    /// The folder of the maps' pins.
    pub(crate) fn folder(pins: &Path) -> PathBuf {
        pins.join(format!("v{ABI_VERSION}"))
    }

    pub(crate) fn pin<K: Pod, V: Pod>(pins: &Path, name: &str, rows: u32) {
        fs::create_dir_all(folder(pins)).unwrap();
        let map: RowMap<K, V> = RowMap::create_named(name, rows).unwrap();
        bpf::pin(std::os::fd::AsFd::as_fd(&map), &folder(pins).join(name)).unwrap();
    }

    /// Rows for which the map that is pinned now has room.
    pub(crate) fn max<K: Pod, V: Pod>(pins: &Path, name: &str) -> u32 {
        RowMap::<K, V>::open(&folder(pins).join(name)).unwrap().max()
    }
}
