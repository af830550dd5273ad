//! Keeps the values of the three fixed cgroups: `kubepods` and its QoS tiers. Effects.

use std::{path::PathBuf, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use tracing::warn;

use super::{Directory, admit::Allocatable, cgroup, chain, plan::is_over, runtime::CgroupSpec};
use crate::sys::cgroup as door;

/// How often the tiers' weights follow the pods (kubelet: 1 min).
const REFRESH: Duration = Duration::from_secs(60);
/// Until the first pods of a fresh agent are known.
const SOON: Duration = Duration::from_secs(5);

/// Writes the values until cancelled; what failed is tried again with the next round.
#[expect(clippy::infinite_loop, reason = "ends by being cancelled")]
pub async fn run(root: PathBuf, pods: Directory, allocatable: Allocatable) -> &'static str {
    let mut pause = SOON;
    loop {
        let list: Vec<Arc<Pod>> = pods.list().into_iter().map(|view| view.pod).collect();
        let live: Vec<&Pod> = list.iter().map(|pod| &**pod).filter(|pod| !is_over(pod)).collect();
        for spec in cgroup::tree(&live, allocatable.cpu_millis, allocatable.memory_bytes) {
            if let Err(error) = write(&root, &spec) {
                warn!(cgroup = spec.path, error = chain(&error), "cgroup values not written");
            }
        }
        tokio::time::sleep(pause).await;
        pause = REFRESH;
    }
}

fn write(root: &std::path::Path, spec: &CgroupSpec) -> Result<(), door::CgroupError> {
    let path = if spec.path.is_empty() { root.to_owned() } else { root.join(&spec.path) };
    if let Some(weight) = spec.cpu_weight {
        door::write(&path, "cpu.weight", &weight.to_string())?;
    }
    if let Some(bytes) = spec.memory_max_bytes {
        door::write(&path, "memory.max", &bytes.to_string())?;
    }
    Ok(())
}
