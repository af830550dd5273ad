//! Starting and removing containers.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path};

use shim::wire::{Body, Call, ContainerConfig};

use super::{
    ContainerId, ContainerSpec, RuntimeError, START, Started,
    client::ShimError,
    embedded::{Inner, failed},
    plan::{self, ContainerPaths},
    state::{self, SandboxRecord},
};
use crate::sys::{cgroup, rootdir::remove_tree};

impl Inner {
    pub(super) async fn start_container(
        &self,
        spec: &ContainerSpec,
    ) -> Result<Started, RuntimeError> {
        let id = &spec.id;
        let client = self.client(&spec.pod).ok_or(ShimError::Gone);
        let client = client.map_err(failed(START, id))?;
        let prepared = self.prepare_container(spec).await;
        let answer = match prepared {
            Ok(()) => {
                client.call(Call::Start { id: id.to_string() }).await.map_err(failed(START, id))
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok(Body::Started { pid, at_ns }) => Ok(Started { pid, at: state::timestamp(at_ns) }),
            Ok(_) => Err(failed(START, id)(ShimError::Unexpected)),
            Err(error) => {
                // The first error is the one that matters; what stays is removed with the sandbox.
                if let Err(left) = self.remove_container(id).await {
                    tracing::warn!(container = %id, error = %left, "container left behind");
                }
                Err(error)
            }
        }
    }

    /// Layer folders, cgroup, log folder and configuration. Asked again, it changes nothing.
    async fn prepare_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError> {
        let id = spec.id.clone();
        let dir = self.pod_dir(&spec.pod);
        let record = SandboxRecord::load(&dir).map_err(failed("read the sandbox", &id))?;
        let record =
            record.ok_or("there is no sandbox").map_err(failed("read the sandbox", &id))?;
        if dir.join(format!("{id}.json")).exists() {
            return Ok(());
        }
        let paths = ContainerPaths {
            work: self.container_dir(&id.0),
            cgroup: record.cgroup.join(&*id.0),
            pod: dir.clone(),
        };
        let mut config = plan::container(spec, &paths).map_err(failed("plan container", &id))?;
        if !spec.privileged {
            config.masked_paths.extend(thermal_throttle());
        }
        let values = plan::cgroup_values(&spec.cgroup, &self.config.controllers);
        let controllers = self.config.controllers.clone();
        let work = move || -> Result<(), RuntimeError> {
            let id = &config.id;
            make_folders(&paths.work, &config)
                .map_err(failed("make the container's folders", id))?;
            cgroup::ensure(&paths.cgroup, &controllers)
                .map_err(failed("make the container's cgroup", id))?;
            for (file, value) in values {
                cgroup::write(&paths.cgroup, file, &value)
                    .map_err(failed("set the container's limits", id))?;
            }
            let text =
                serde_json::to_vec(&config).map_err(failed("write the configuration", id))?;
            state::write(&paths.pod.join(format!("{id}.json")), &text)
                .map_err(failed("write the configuration", id))
        };
        tokio::task::spawn_blocking(work).await.map_err(failed("prepare container", &id))?
    }

    pub(super) async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let located = self.locate(id)?;
        if let Some((dir, client)) = located {
            if let Some(client) = client {
                match client.call(Call::Remove { id: id.to_string() }).await {
                    Ok(_) | Err(ShimError::Gone) => {}
                    Err(error) => return Err(failed("remove container", id)(error)),
                }
            }
            let record = SandboxRecord::load(&dir).map_err(failed("read the sandbox", id))?;
            if let Some(record) = record {
                let cgroup = record.cgroup.join(&*id.0);
                tokio::task::spawn_blocking(move || cgroup::remove(&cgroup))
                    .await
                    .map_err(failed("remove the container's cgroup", id))?
                    .map_err(failed("remove the container's cgroup", id))?;
            }
        }
        let work = self.container_dir(&id.0);
        tokio::task::spawn_blocking(move || remove_tree(&work))
            .await
            .map_err(failed("remove the container's layer", id))?
            .map_err(failed("remove the container's layer", id))
    }
}

/// The counters of Intel's processors that the kubelet hides too: one folder a processor. A machine without
/// them has nothing to hide.
fn thermal_throttle() -> Vec<String> {
    let Ok(processors) = fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    let folders = processors.filter_map(|entry| Some(entry.ok()?.path().join("thermal_throttle")));
    folders
        .filter(|path| path.is_dir())
        .filter_map(|path| Some(path.to_str()?.to_owned()))
        .collect()
}

/// The message file is for any user of the container; the log's folder is for the node only.
fn make_folders(work: &Path, config: &ContainerConfig) -> io::Result<()> {
    for folder in ["upper", "work", "root"] {
        fs::create_dir_all(work.join(folder))?;
    }
    fs::set_permissions(work.join("upper"), fs::Permissions::from_mode(0o755))?;
    let message = plan::termination_file(work);
    fs::write(&message, "")?;
    fs::set_permissions(&message, fs::Permissions::from_mode(0o666))?;
    match Path::new(&config.log_path).parent() {
        Some(folder) => fs::create_dir_all(folder),
        None => Ok(()),
    }
}
