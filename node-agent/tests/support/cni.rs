//! A "node" with the CNI server and "pods", all network namespaces, driven as a runtime would.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use node_agent::{
    cni::{self, CniConfig, CniInputs, Handle},
    kubelet::runtime::binary::SHIM,
    model::{LocalEndpoint, ObjectKey, PodNetwork, Programmed, ServiceRow},
    sys::netns::NetNs,
    table::Table,
};
use serde_json::{Value, json};
use tokio::sync::watch;

/// Where Debian's `containernetworking-plugins` has its plugins.
pub(crate) const PLUGINS: &str = "/usr/lib/cni";

pub(crate) fn ip(arguments: &str) -> Output {
    Command::new("ip").args(arguments.split_whitespace()).output().expect("ip runs")
}

pub(crate) fn ip_ok(arguments: &str) -> String {
    let output = ip(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn skip_reason() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root to make network namespaces");
    }
    let present = Command::new("ip").arg("-V").output().is_ok_and(|o| o.status.success());
    (!present).then_some("needs the ip command")
}

/// A network namespace that is gone with the value.
pub(crate) struct Namespace(pub(crate) String);

impl Namespace {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("orlop-t{}-{name}", std::process::id());
        ip_ok(&format!("netns add {name}"));
        ip_ok(&format!("-n {name} link set lo up"));
        Self(name)
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    /// Whether a TCP connection from here to an address of `other` comes about.
    pub(crate) fn reaches(&self, other: &Self, address: impl Into<IpAddr>) -> bool {
        let address = address.into();
        let far = NetNs::open(&other.path()).unwrap();
        let listener = far.run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
        let target: SocketAddr = listener.local_addr().unwrap();
        let near = NetNs::open(&self.path()).unwrap();
        near.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(2)).is_ok()).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.0));
    }
}

pub(crate) fn pod_network(cidrs: &[&str], mtu: u32) -> PodNetwork {
    PodNetwork { cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(), mtu }
}

/// What a server with its files in this folder is told, on a node with this namespace.
pub(crate) fn settings(folder: &Path, namespace: &str) -> CniConfig {
    CniConfig {
        conf_dir: folder.join("net.d"),
        bin_dir: folder.join("bin"),
        host_netns: Some(Path::new("/run/netns").join(namespace)),
        node_ips: vec!["192.0.2.10".parse().unwrap(), "2001:db8::10".parse().unwrap()],
        // What comes at all comes in this time, on any machine.
        program_timeout: Duration::from_secs(30),
        ..CniConfig::new(&folder.join("state"), folder)
    }
}

pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) network: watch::Sender<Option<PodNetwork>>,
    pub(crate) endpoints: Table<IpAddr, LocalEndpoint>,
    pub(crate) services: Table<ObjectKey, ServiceRow>,
    pub(crate) programmed: Option<watch::Receiver<Programmed>>,
    pub(crate) refresh: Option<Duration>,
    /// What the agent takes for the node's addresses.
    pub(crate) ips: [&'static str; 2],
    /// How long its servers wait for that, where it is not what `settings` says.
    pub(crate) patience: Option<Duration>,
    pub(crate) handle: Option<Handle>,
}

impl Node {
    pub(crate) fn new(name: &str) -> Self {
        let namespace = Namespace::new(name);
        // The node's own address, which the kernel must choose as source towards pods.
        ip_ok(&format!("-n {} link add uplink type veth peer name far", namespace.0));
        ip_ok(&format!("-n {} addr add 192.0.2.10/24 dev uplink", namespace.0));
        ip_ok(&format!("-n {} addr add 2001:db8::10/64 dev uplink nodad", namespace.0));
        ip_ok(&format!("-n {} link set uplink up", namespace.0));
        let mut node = Self {
            namespace,
            folder: tempfile::tempdir().unwrap(),
            network: watch::Sender::new(Some(pod_network(&["10.244.3.0/24"], 1450))),
            endpoints: Table::new(),
            services: Table::new(),
            programmed: None,
            refresh: None,
            ips: ["192.0.2.10", "2001:db8::10"],
            patience: None,
            handle: None,
        };
        node.start();
        node
    }

    /// Starts the server anew, as a new agent process would: only the state file carries over.
    pub(crate) fn start(&mut self) {
        self.handle = None;
        self.endpoints = Table::new();
        let usual = settings(self.folder.path(), &self.namespace.0);
        let config = CniConfig {
            refresh: self.refresh,
            node_ips: self.ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            program_timeout: self.patience.unwrap_or(usual.program_timeout),
            ..usual
        };
        let inputs = CniInputs {
            services: self.services.clone(),
            network: self.network.subscribe(),
            endpoints: self.endpoints.clone(),
            programmed: self.programmed.clone(),
        };
        self.handle = Some(cni::start(config, inputs, SHIM).unwrap());
    }

    pub(crate) fn config(&self, extra: &Value) -> Value {
        let socket = self.folder.path().join("cni.sock");
        let mut config =
            json!({"cniVersion": "1.1.0", "name": "orlop", "type": "orlop", "socket": socket});
        let (Some(all), Some(extra)) = (config.as_object_mut(), extra.as_object()) else {
            panic!("extra is an object")
        };
        all.extend(extra.clone());
        config
    }

    /// Runs the installed plugin as a runtime would.
    pub(crate) async fn call(
        &self,
        command: &str,
        pod: Option<&Pod>,
        extra: Value,
    ) -> Result<Value, Value> {
        let plugin = self.folder.path().join("bin/orlop");
        self.run(&plugin, command, pod, self.config(&extra)).await
    }

    /// Runs any plugin in the node's namespace.
    pub(crate) async fn run(
        &self,
        plugin: &Path,
        command: &str,
        pod: Option<&Pod>,
        config: Value,
    ) -> Result<Value, Value> {
        let mut plugin = Command::new(plugin);
        plugin
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", PLUGINS)
            // Debian's plugins call iptables.
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if let Some(pod) = pod {
            plugin
                .env("CNI_CONTAINERID", &pod.id)
                .env("CNI_NETNS", pod.namespace.path())
                .env("CNI_IFNAME", "eth0")
                .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web");
        }
        let node = NetNs::open(&self.namespace.path()).unwrap();
        tokio::task::spawn_blocking(move || {
            let spawn = || plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
            let mut child = node.run(spawn).unwrap().expect("plugin runs");
            child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            let value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
            if output.status.success() { Ok(value) } else { Err(value) }
        })
        .await
        .unwrap()
    }

    pub(crate) async fn add(&self, pod: &Pod) -> (Ipv4Addr, Value) {
        let result = self.call("ADD", Some(pod), json!({})).await.expect("ADD succeeds");
        let address = result["ips"][0]["address"].as_str().unwrap();
        (address.strip_suffix("/32").unwrap().parse().unwrap(), result)
    }

    pub(crate) async fn check(&self, pod: &Pod, previous: &Value) -> Result<Value, Value> {
        self.call("CHECK", Some(pod), json!({"prevResult": previous})).await
    }

    /// Waits until the server has taken another network over, as its records show; there must be some.
    pub(crate) async fn settled(&self, mtu: u32) {
        let state = self.folder.path().join("state/cni/ipam.json");
        for _ in 0..2_000 {
            let ready = self.call("STATUS", None, json!({})).await.is_ok();
            let text = fs::read_to_string(&state).unwrap_or_default();
            let old =
                text.matches("\"mtu\"").count() - text.matches(&format!("\"mtu\": {mtu}")).count();
            if ready && old == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the server has not taken over the network with MTU {mtu}");
    }

    pub(crate) fn links(&self) -> usize {
        ip_ok(&format!("-n {} -o link", self.namespace.0)).matches(": orl").count()
    }
}

pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) namespace: Namespace,
}

impl Pod {
    pub(crate) fn new(name: &str) -> Self {
        Self { id: format!("container-{name}"), namespace: Namespace::new(name) }
    }
}
