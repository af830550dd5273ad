//! The local cluster: which VMs there are, with which addresses and ports; started, found again, ended.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{
    exec::{cmd, output},
    guest::Guest,
    paths::Paths,
    vm::{self, Accel, Process, Spec},
};

/// The port that the sample's Service asks for on every node.
pub const SAMPLE_NODE_PORT: u16 = 30080;
/// The host as user-network VMs see it; what listens on the host's loopback answers there.
pub const HOST_OF_VMS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Memory of a node in MiB; QEMU takes it from the host only as it is touched.
const MEMORY_MIB: u32 = 1024;
/// Ports of the host's loopback that lead into each VM.
const FORWARDED: usize = 3;
/// Longest boot until the command port answers; TCG on two busy cores takes about 15 s.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// What a node VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Control plane and agent.
    Server,
    /// Agent.
    Worker,
}

/// One node VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    pub role: Role,
    /// Its address between the nodes.
    pub ip: Ipv4Addr,
    /// Loopback ports of the host that lead into the VM: its shell, its API server, the sample's NodePort.
    pub shell_port: u16,
    pub api_port: u16,
    pub node_port: u16,
    dir: PathBuf,
    process: Process,
}

/// A cluster as recorded in `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub kubeconfig: PathBuf,
    /// Port of the host's loopback where a registry without TLS may listen; nodes take it at
    /// `HOST_OF_VMS` and this port.
    pub registry_port: u16,
    /// What it was made from; another value means that it must be made anew.
    pub fingerprint: String,
    /// Shown to people.
    pub kernel: String,
}

/// What all nodes are started from.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) nodes: u8,
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) disk: &'a Path,
    pub(crate) accel: Accel,
    pub(crate) kernel_name: String,
    pub(crate) fingerprint: String,
    /// Init starts no Orlop program.
    pub(crate) bare: bool,
}

impl Node {
    /// The host's way to run commands in it.
    #[must_use]
    pub fn shell(&self) -> Guest {
        Guest { port: self.shell_port }
    }

    /// The end of its console.
    #[must_use]
    pub fn console_tail(&self) -> String {
        vm::console_tail(&self.dir)
    }

    /// The file with all that its console said.
    pub(crate) fn console(&self) -> PathBuf {
        vm::console(&self.dir)
    }

    /// The last lines that one of its Orlop programs logged.
    pub(crate) fn log(&self, program: &str, lines: u32) -> Result<String> {
        self.shell().sh(&format!(
            "if [ -d /run/systemd/system ]; then \
             journalctl -n {lines} --no-pager -u orlop-{program}; \
             else tail -n {lines} /var/log/{program}.log; fi"
        ))
    }

    fn wait_booted(&self) -> Result<()> {
        let limit = Instant::now() + BOOT_LIMIT;
        loop {
            if self.shell().run("true", Duration::from_secs(5)).is_ok() {
                return Ok(());
            }
            if !self.process.alive() || Instant::now() > limit {
                let how = if self.process.alive() { "does not answer" } else { "ended" };
                bail!(
                    "VM {} {how}; the end of {}:\n{}",
                    self.name,
                    vm::console(&self.dir).display(),
                    self.console_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Cluster {
    /// The cluster of `state.json` if all of its VMs run.
    #[must_use]
    pub fn running(paths: &Paths) -> Option<Self> {
        Self::recorded(paths)
            .filter(|cluster| cluster.nodes.iter().all(|node| node.process.alive()))
    }

    /// The cluster of `state.json`, running or not.
    #[must_use]
    pub fn recorded(paths: &Paths) -> Option<Self> {
        let text = fs::read_to_string(paths.cluster.join("state.json")).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Starts all VMs at once and waits until each answers.
    pub(crate) fn boot(paths: &Paths, plan: &Plan<'_>) -> Result<Self> {
        let lan = multicast();
        let registry_port = registry_port()?;
        // Drawn together, and each held until the VM that has it starts.
        let mut ports = free_ports(FORWARDED * usize::from(plan.nodes))?;
        let mut cluster = Self {
            nodes: Vec::new(),
            kubeconfig: paths.cluster.join("kubeconfig"),
            registry_port,
            fingerprint: plan.fingerprint.clone(),
            kernel: plan.kernel_name.clone(),
        };
        for number in 1..=plan.nodes {
            let own = ports.split_off(ports.len() - FORWARDED);
            let node = start(paths, plan, (number, own), &Shared { lan: &lan, registry_port })?;
            cluster.nodes.push(node);
            // Written after each, so that `down` finds also those of a start that failed half-way.
            cluster.save(paths)?;
        }
        for node in &cluster.nodes {
            node.wait_booted()?;
        }
        Ok(cluster)
    }

    fn save(&self, paths: &Paths) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write the cluster's state")?;
        let file = paths.cluster.join("state.json");
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Ends every VM of `state.json` and returns their number. Reads nothing but the processes, so that it
    /// also ends the cluster of an older or newer build of this program.
    pub(crate) fn end(paths: &Paths) -> Result<usize> {
        #[derive(Deserialize)]
        struct Started {
            process: Process,
        }
        #[derive(Deserialize)]
        struct State {
            nodes: Vec<Started>,
        }
        let file = paths.cluster.join("state.json");
        if !file.exists() {
            return Ok(0);
        }
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let state: State = serde_json::from_str(&text)
            .with_context(|| format!("{}: which VMs run is not known", file.display()))?;
        state.nodes.iter().try_for_each(|node| node.process.kill())?;
        Ok(state.nodes.len())
    }

    /// The first node.
    ///
    /// # Errors
    /// When the record is empty.
    pub fn server(&self) -> Result<&Node> {
        self.nodes.first().context("the cluster has no nodes")
    }

    /// The node of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("the cluster has no node {name}"))
    }
}

/// What all nodes of a cluster have in common and no other cluster has.
struct Shared<'a> {
    /// The netdev of the network between them.
    lan: &'a str,
    registry_port: u16,
}

fn start(
    paths: &Paths,
    plan: &Plan<'_>,
    (number, own): (u8, Vec<TcpListener>),
    shared: &Shared<'_>,
) -> Result<Node> {
    let (name, role) = match number {
        1 => ("server".to_owned(), Role::Server),
        _ => (format!("worker-{}", number - 1), Role::Worker),
    };
    let dir = paths.cluster.join(&name);
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let disk = dir.join("disk.ext4");
    output(cmd("cp", ["--sparse=always", "--reflink=auto"]).arg(plan.disk).arg(&disk))?;
    let ip = Ipv4Addr::new(192, 168, 77, number);
    let mut ports = [0; FORWARDED];
    for (port, listener) in ports.iter_mut().zip(&own) {
        *port = listener.local_addr().context("a held port")?.port();
    }
    let [shell_port, api_port, node_port] = ports;
    let forward = |host: u16, guest: u16| format!("hostfwd=tcp:127.0.0.1:{host}-:{guest}");
    let user = format!(
        "user,{},{},{}",
        forward(shell_port, 2300),
        forward(api_port, 6443),
        forward(node_port, SAMPLE_NODE_PORT)
    );
    let role_word = match role {
        _ if plan.bare => "none",
        Role::Server => "server",
        Role::Worker => "worker",
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let spec = Spec {
        dir: dir.clone(),
        kernel: plan.kernel.to_owned(),
        initramfs: plan.initramfs.to_owned(),
        disk: Some(vm::Disk { file: disk, is_kept: true }),
        append: format!(
            "systemd.hostname={name} orlop.name={name} orlop.ip={ip} orlop.role={role_word} \
             orlop.time={now} orlop.registry={HOST_OF_VMS}:{}",
            shared.registry_port
        ),
        memory_mib: MEMORY_MIB,
        reboots: true,
        accel: plan.accel,
        // Locally administered addresses; the last byte is the node's number on both networks.
        nics: vec![
            (user, format!("52:54:00:77:00:{number:02x}")),
            (shared.lan.to_owned(), format!("52:54:00:77:01:{number:02x}")),
        ],
    };
    drop(own);
    let process = vm::start(&spec).with_context(|| format!("start VM {name}"))?;
    Ok(Node { name, role, ip, shell_port, api_port, node_port, dir, process })
}

/// A QEMU netdev that joins this cluster's VMs at layer 2. Group and port come from this process's
/// number, so that two clusters on one machine do not hear each other.
fn multicast() -> String {
    let [high, low] = u16::try_from(std::process::id() % 64_000).unwrap_or(0).to_be_bytes();
    let port = 20_000 + std::process::id() % 20_000;
    format!("socket,mcast=230.77.{high}.{low}:{port},localaddr=127.0.0.1")
}

/// Listeners at so many ports of loopback that nobody else has while they live.
fn free_ports(count: usize) -> Result<Vec<TcpListener>> {
    let draw = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port");
    (0..count).map(draw).collect()
}

/// A port of loopback that nobody listens on now. Nobody holds it until a registry is started, so it is below those
/// that the kernel gives away by itself (ip_local_port_range begins at 32768).
fn registry_port() -> Result<u16> {
    let first = 10_000 + u16::try_from(std::process::id() % 10_000).unwrap_or_default();
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    (first..first + 1_000).find(is_free).context("find a free port for a registry")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registrys_port_is_none_that_the_kernel_gives_away() {
        let port = registry_port().unwrap();
        assert!(port < 32_768, "{port}");
        let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_ne!(registry_port().unwrap(), port, "one that is taken is no choice");
    }

    #[test]
    fn vms_of_a_record_that_another_build_wrote_are_ended() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths { cluster: folder.path().to_owned(), ..Paths::new() };
        assert_eq!(Cluster::end(&paths).unwrap(), 0);
        let mut child = cmd("sleep", ["60"]).spawn().unwrap();
        let process = serde_json::to_value(Process::of(child.id()).unwrap()).unwrap();
        let state = serde_json::json!({ "nodes": [{ "process": process, "new_field": 1 }] });
        fs::write(folder.path().join("state.json"), state.to_string()).unwrap();
        assert!(Cluster::recorded(&paths).is_none(), "it is not one of ours");
        assert_eq!(Cluster::end(&paths).unwrap(), 1);
        assert!(!child.wait().unwrap().success(), "it was ended by a signal");
    }
}
