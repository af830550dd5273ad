//! What a pod's folder says about it, and the wire's reports in the runtime's terms.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use shim::wire::{ContainerConfig, ContainerReport, ExitReport};

use crate::sys::cgroup;

use super::{ContainerId, ContainerState, Exit};

/// A sandbox from its first step on: what has to be undone. `sandbox.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SandboxRecord {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) host_network: bool,
    /// Absolute path of the pod's cgroup.
    pub(super) cgroup: PathBuf,
    /// Pinned network namespace; empty on the node's network.
    pub(super) netns: PathBuf,
    /// All steps were done.
    pub(super) ready: bool,
    pub(super) ips: Vec<IpAddr>,
    /// `portMappings` for CNI plugins that have the capability.
    #[serde(default)]
    pub(super) port_mappings: serde_json::Value,
    /// CNI's result, which `DEL` is given.
    pub(super) network: Option<serde_json::Value>,
}

/// Name of the record in the pod's folder.
const RECORD: &str = "sandbox.json";

impl SandboxRecord {
    /// The record of the pod whose folder is `dir`.
    pub(super) fn load(dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(dir.join(RECORD)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The pod's addresses. On the node's network they are those that the node has now, which may be others than
    /// when the sandbox was made.
    pub(super) fn addresses(&self, node_ips: &[IpAddr]) -> Vec<IpAddr> {
        if self.host_network { node_ips.to_vec() } else { self.ips.clone() }
    }

    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        write(&dir.join(RECORD), &serde_json::to_vec(self)?)
    }
}

/// Containers cannot outlive their shim: nobody would see their end.
pub(super) fn kill_orphans(dir: &Path) {
    if let Ok(Some(record)) = SandboxRecord::load(dir)
        && let Err(error) = cgroup::kill(&record.cgroup)
    {
        tracing::error!(pod = record.uid, %error, "containers without a shim could not be killed");
    }
}

/// Writes a file whole or not at all.
pub(super) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    fs::write(&part, bytes)?;
    fs::rename(part, path)
}

/// Every container whose configuration lies in the pod's folder.
pub(super) fn configs(dir: &Path) -> io::Result<Vec<ContainerConfig>> {
    let mut configs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let id = name.strip_suffix(".json").unwrap_or_default();
        if id.len() == 64 {
            configs.push(serde_json::from_slice(&fs::read(&path)?)?);
        }
    }
    Ok(configs)
}

/// The last report that the shim wrote of a container.
pub(super) fn report(dir: &Path, id: &str) -> Option<ContainerReport> {
    serde_json::from_slice(&fs::read(dir.join(format!("{id}.state.json"))).ok()?).ok()
}

/// A container from its configuration and report.
pub(super) fn container(config: ContainerConfig, report: ContainerReport) -> ContainerState {
    ContainerState {
        id: ContainerId(config.id.into()),
        name: config.name,
        restart_count: config.restart_count,
        image_reference: config.image_reference,
        image_digest: config.image_digest,
        pid: report.pid,
        started_at: timestamp(report.started_ns),
        exit: report.exit.map(exit),
    }
}

/// The exit of a container whose shim died: it was killed with it, when is not known.
pub(super) fn lost(at: Timestamp) -> Exit {
    Exit { code: 137, signal: 9, oom_killed: false, unstarted: false, at, message: String::new() }
}

pub(super) fn exit(report: ExitReport) -> Exit {
    Exit {
        code: report.code,
        signal: report.signal,
        oom_killed: report.oom_killed,
        unstarted: false,
        at: timestamp(report.at_ns),
        message: report.message,
    }
}

pub(super) fn timestamp(ns: i64) -> Timestamp {
    Timestamp::from_nanosecond(ns.into()).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_on_the_nodes_network_has_the_addresses_that_the_node_has_now() {
        let [before, now] = [1, 2].map(|last| vec![IpAddr::from([192, 0, 2, last])]);
        for (host_network, expected) in [(true, &now), (false, &before)] {
            let record = SandboxRecord {
                uid: String::new(),
                namespace: String::new(),
                name: String::new(),
                host_network,
                cgroup: PathBuf::new(),
                netns: PathBuf::new(),
                ready: true,
                ips: before.clone(),
                port_mappings: serde_json::Value::Null,
                network: None,
            };
            assert_eq!(record.addresses(&now), *expected);
        }
    }
}
