//! Making and removing sandboxes. Each step can be repeated, and each is undone by removal, whichever was
//! the last to be done.

use std::{fs, io, net::IpAddr, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use shim::wire::PodConfig;

use super::{
    PodUid, RuntimeError, Sandbox, SandboxSpec, cni,
    embedded::{Inner, blocking, failed},
    plan,
    state::{self, SandboxRecord},
};
use crate::sys::{
    cgroup, exec,
    netlink::Netlink,
    netns::NetNs,
    rootdir::remove_tree,
    sandbox::{ensure_netns, ensure_shm, release},
};

/// A shim is up in milliseconds; a node that swaps gets this much.
const SHIM_START_LIMIT: Duration = Duration::from_secs(20);

/// Leaf of the pod's cgroup for its shim: processes may only be in leaves.
const SHIM_CGROUP: &str = "shim";

impl Inner {
    pub(super) async fn ensure_sandbox(&self, spec: &SandboxSpec) -> Result<Sandbox, RuntimeError> {
        let uid = &spec.uid;
        let dir = self.pod_dir(uid);
        let known = SandboxRecord::load(&dir).map_err(failed("read the record", uid))?;
        if let Some(record) = &known
            && record.ready
            && self.client(uid).is_some()
        {
            return Ok(Sandbox { ips: record.addresses(&self.config.node_ips) });
        }
        let mut record = known.unwrap_or_else(|| self.record(spec));
        self.prepare(spec, &record).await?;
        if self.client(uid).is_none() {
            self.start_shim(spec, &record).await?;
        }
        record.ips = self.connect_network(&mut record, &dir).await?;
        let (hosts_dir, ips, hosts_spec) = (dir.clone(), record.ips.clone(), spec.clone());
        blocking(move || write_hosts(&hosts_dir, &hosts_spec, &ips)).await.map_err(failed::<
            io::Error,
        >(
            "write /etc/hosts",
            uid,
        ))?;
        record.ready = true;
        record.save(&dir).map_err(failed("write the record", uid))?;
        Ok(Sandbox { ips: record.ips })
    }

    fn record(&self, spec: &SandboxSpec) -> SandboxRecord {
        let netns = if spec.host_network {
            Default::default()
        } else {
            self.config.run_dir.join("netns").join(&*spec.uid.0)
        };
        SandboxRecord {
            uid: spec.uid.to_string(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            host_network: spec.host_network,
            cgroup: self.config.cgroup_root.join(&spec.cgroup.path),
            netns,
            ready: false,
            ips: Vec::new(),
            port_mappings: crate::cni::mappings(&spec.host_ports),
            network: None,
        }
    }

    /// Folder, record, cgroup, namespace and files. The record comes first: it says what to undo.
    async fn prepare(
        &self,
        spec: &SandboxSpec,
        record: &SandboxRecord,
    ) -> Result<(), RuntimeError> {
        let uid = spec.uid.clone();
        let (dir, record, spec) = (self.pod_dir(&uid), record.clone(), spec.clone());
        let controllers = self.config.controllers.clone();
        let work = move || -> Result<(), RuntimeError> {
            let uid = &spec.uid;
            fs::create_dir_all(&dir).map_err(failed("make the pod's folder", uid))?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
                .map_err(failed("make the pod's folder", uid))?;
            record.save(&dir).map_err(failed("write the record", uid))?;
            cgroup::ensure(&record.cgroup.join(SHIM_CGROUP), &controllers)
                .map_err(failed("make the pod's cgroup", uid))?;
            for (file, value) in plan::cgroup_values(&spec.cgroup, &controllers) {
                cgroup::write(&record.cgroup, file, &value)
                    .map_err(failed("set the pod's limits", uid))?;
            }
            if !spec.host_network {
                ensure_netns(&record.netns).map_err(failed("create network namespace", uid))?;
                loopback_up(&record.netns).map_err(failed("bring up loopback", uid))?;
            }
            ensure_shm(&dir.join("shm")).map_err(failed("mount /dev/shm", uid))?;
            write_files(&dir, &spec).map_err(failed("write the pod's files", uid))
        };
        tokio::task::spawn_blocking(work).await.map_err(failed("prepare the sandbox", &uid))?
    }

    async fn start_shim(
        &self,
        spec: &SandboxSpec,
        record: &SandboxRecord,
    ) -> Result<(), RuntimeError> {
        let uid = &spec.uid;
        let dir = self.pod_dir(uid);
        if self.connect(uid).await.is_ok() {
            return Ok(());
        }
        let pod = PodConfig {
            uid: uid.to_string(),
            hostname: if spec.host_network { String::new() } else { spec.hostname.clone() },
            netns: record.netns.display().to_string(),
            shim_cgroup: record.cgroup.join(SHIM_CGROUP).display().to_string(),
            sysctls: plan::sysctls(spec),
        };
        let text = serde_json::to_vec(&pod).map_err(failed("write pod.json", uid))?;
        state::write(&dir.join("pod.json"), &text).map_err(failed("write pod.json", uid))?;
        let folder = dir.display().to_string();
        let args = ["pod", "--dir", &folder];
        let output = exec::run(&self.shim, &args, &[], &[], SHIM_START_LIMIT)
            .await
            .map_err(failed("start the shim", uid))?;
        if !output.status.success() {
            return Err(failed("start the shim", uid)(output.stderr));
        }
        self.connect(uid).await.map_err(failed("reach the shim", uid))?;
        Ok(())
    }

    async fn connect_network(
        &self,
        record: &mut SandboxRecord,
        dir: &Path,
    ) -> Result<Vec<IpAddr>, RuntimeError> {
        if record.host_network {
            return Ok(self.config.node_ips.clone());
        }
        let pod = record.uid.clone();
        let step = "connect the network";
        let result = match &record.network {
            Some(result) => result.clone(),
            None => {
                let network = cni::load(&self.config.cni_conf_dir).map_err(failed(step, &pod))?;
                let result = network
                    .add(&self.config.cni_bin_dir, &attachment(record))
                    .await
                    .map_err(failed(step, &pod))?;
                record.network = Some(result.clone());
                record.save(dir).map_err(failed("write the record", &pod))?;
                result
            }
        };
        cni::addresses(&result).map_err(failed(step, &pod))
    }

    async fn disconnect_network(&self, record: &SandboxRecord) -> Result<(), cni::CniError> {
        let network = match cni::load(&self.config.cni_conf_dir) {
            // Never connected, as there was no network to connect to.
            Err(cni::CniError::NoConfig(_)) if record.network.is_none() => return Ok(()),
            network => network?,
        };
        network.delete(&self.config.cni_bin_dir, &attachment(record), record.network.as_ref()).await
    }

    pub(super) async fn remove_sandbox(&self, uid: &PodUid) -> Result<(), RuntimeError> {
        let dir = self.pod_dir(uid);
        let Some(record) = SandboxRecord::load(&dir).map_err(failed("read the record", uid))?
        else {
            remove_tree(&dir).map_err(failed("remove the pod's folder", uid))?;
            return Ok(());
        };
        if let Some(client) = self.client(uid) {
            client.expect_end();
        }
        // The shim is in this cgroup too, so that nothing starts any more.
        cgroup::kill(&record.cgroup).map_err(failed("kill the pod", uid))?;
        let cgroup = record.cgroup.clone();
        blocking(move || cgroup::remove(&cgroup).map_err(io::Error::other))
            .await
            .map_err(failed::<io::Error>("remove the pod's cgroup", uid))?;
        if !record.host_network && record.netns.exists() {
            self.disconnect_network(&record)
                .await
                .map_err(failed("disconnect the network", uid))?;
        }
        let ids: Vec<String> = state::configs(&dir)
            .map_err(failed("read the containers", uid))?
            .into_iter()
            .map(|config| config.id)
            .collect();
        let layers = ids.iter().map(|id| self.container_dir(id)).collect::<Vec<_>>();
        let work = move || -> io::Result<()> {
            if !record.host_network {
                release(&record.netns)?;
            }
            release(&dir.join("shm"))?;
            layers.iter().try_for_each(|layer| remove_tree(layer))?;
            // The record goes last: as long as it is there, removal can be asked for again.
            remove_tree(&dir)
        };
        blocking(work).await.map_err(failed::<io::Error>("remove the sandbox", uid))?;
        let mut clients = self.clients.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        clients.remove(uid);
        Ok(())
    }
}

fn attachment(record: &SandboxRecord) -> cni::Attachment<'_> {
    cni::Attachment {
        uid: &record.uid,
        namespace: &record.namespace,
        name: &record.name,
        netns: &record.netns,
        port_mappings: &record.port_mappings,
    }
}

/// The CNI plugins of others expect the runtime to do this.
fn loopback_up(netns: &Path) -> io::Result<()> {
    NetNs::open(netns)?.run(|| {
        let mut netlink = Netlink::open()?;
        match netlink.link("lo")? {
            Some(lo) => netlink.set_up(lo.index),
            None => Ok(()),
        }
    })?
}

fn write_files(dir: &Path, spec: &SandboxSpec) -> io::Result<()> {
    file(&dir.join("resolv.conf"), &plan::resolv_conf(&spec.dns))?;
    file(&dir.join("hostname"), &format!("{}\n", spec.hostname))
}

fn write_hosts(dir: &Path, spec: &SandboxSpec, ips: &[IpAddr]) -> io::Result<()> {
    let node = if spec.host_network {
        fs::read_to_string("/etc/hosts").unwrap_or_default()
    } else {
        String::new()
    };
    file(&dir.join("hosts"), &plan::hosts(spec, ips, &node))
}

/// Readable by every user of the pod's containers. Written in place: a running container has it mounted.
fn file(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}
