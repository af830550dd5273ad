//! Maps that are pinned as an earlier agent would have left them, of a size of the test's own.

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
