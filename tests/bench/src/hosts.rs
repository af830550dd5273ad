//! Hosts of a benchmark: network namespaces joined by veth pairs. Effects; removed on drop.
//!
//! A `Node` is a namespace that routes; pods are namespaces with one veth pair to it, an address of
//! the pod network and a default route, as a plain CNI plugin would make them.

use std::{
    net::Ipv4Addr,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// A node with its pods. Namespace names carry the process id, so that runs do not meet.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    /// Its number in the addresses: 192.168.0.`number`, pods in 10.244.`number`.0/24.
    pub number: u8,
    pub pods: Vec<Pod>,
}

/// What an Ethernet device usually carries.
pub const ETHERNET_MTU: u32 = 1500;

/// A pod: its namespace and address, and its veth pair.
#[derive(Clone, Debug)]
pub struct Pod {
    pub netns: String,
    pub ip: Ipv4Addr,
    pub host_veth: String,
    /// Interface index of the host's end.
    pub host_ifindex: u32,
    /// Ethernet addresses as `ip` prints them: the host's end, the pod's end.
    pub macs: (String, String),
}

impl Node {
    /// Makes the node's namespace, with forwarding on.
    ///
    /// # Errors
    /// When a namespace cannot be made (no root).
    pub fn new(label: &str, number: u8) -> Result<Self> {
        let name = format!("ob{}-{label}", std::process::id());
        ip(&["netns", "add", &name])?;
        let node = Self { name, number, pods: Vec::new() };
        ip(&["-n", &node.name, "link", "set", "lo", "up"])?;
        node.sysctl("net.ipv4.ip_forward=1")?;
        node.sysctl("net.ipv4.conf.all.rp_filter=0")?;
        Ok(node)
    }

    /// The node's address on the network between nodes, once `join` has given it one.
    #[must_use]
    pub const fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 0, self.number)
    }

    /// The network of its pods.
    #[must_use]
    pub fn pod_cidr(&self) -> String {
        format!("10.244.{}.0/24", self.number)
    }

    /// Runs `ip` in the node's namespace, the arguments given in one line.
    ///
    /// # Errors
    /// When it fails; its words are in the error.
    pub fn ip_command(&self, line: &str) -> Result<()> {
        let words: Vec<&str> = ["-n", &self.name].into_iter().chain(line.split(' ')).collect();
        ip(&words)
    }

    /// Adds a pod with the next address of the node's pods, from .10 on.
    ///
    /// # Errors
    /// When a link or route cannot be made.
    pub fn add_pod(&mut self, mtu: u32) -> Result<Pod> {
        let n = u8::try_from(self.pods.len()).context("at most 200 pods")?;
        let host_veth = format!("pod{n}");
        let netns = format!("{}-p{n}", self.name);
        let address = Ipv4Addr::new(10, 244, self.number, 10 + n);
        let mut pod =
            Pod { netns, ip: address, host_veth, host_ifindex: 0, macs: Default::default() };
        ip(&["netns", "add", &pod.netns])?;
        self.pods.push(pod.clone());
        let (host, inside, addr) = (self.name.as_str(), pod.netns.as_str(), pod.ip.to_string());
        let pair = ["link", "add", &pod.host_veth, "netns", host, "type", "veth", "peer", "name"];
        ip(&[&["-n", inside], pair.as_slice(), &["eth0"]].concat())?;
        ip(&["-n", inside, "link", "set", "lo", "up"])?;
        let mtu = mtu.to_string();
        ip(&["-n", inside, "link", "set", "eth0", "mtu", &mtu, "up"])?;
        ip(&["-n", host, "link", "set", &pod.host_veth, "mtu", &mtu, "up"])?;
        ip(&["-n", inside, "addr", "add", &format!("{addr}/32"), "dev", "eth0"])?;
        ip(&["-n", inside, "route", "add", "169.254.1.1", "dev", "eth0", "scope", "link"])?;
        ip(&["-n", inside, "route", "add", "default", "via", "169.254.1.1", "dev", "eth0"])?;
        ip(&["-n", host, "route", "add", &format!("{addr}/32"), "dev", &pod.host_veth])?;
        let (host_ifindex, host_mac) = link(host, &pod.host_veth)?;
        let (_pod_ifindex, pod_mac) = link(inside, "eth0")?;
        let gateway = ["neigh", "add", "169.254.1.1", "lladdr", &host_mac, "dev", "eth0"];
        ip(&[&["-n", inside], gateway.as_slice(), &["nud", "permanent"]].concat())?;
        // Else closed connections take up the ports within seconds, and most of the time that is
        // measured goes into the search for a free one.
        for setting in ["ip_local_port_range=1024 65535", "tcp_max_tw_buckets=64"] {
            exec(inside, &["sysctl", "-qw", &format!("net.ipv4.{setting}")], None)?;
        }
        pod.host_ifindex = host_ifindex;
        pod.macs = (host_mac, pod_mac);
        Ok(pod)
    }

    /// Sets a sysctl in the node's namespace.
    ///
    /// # Errors
    /// When the kernel has no such setting.
    pub fn sysctl(&self, setting: &str) -> Result<()> {
        exec(&self.name, &["sysctl", "-qw", setting], None)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for pod in &self.pods {
            drop(ip(&["netns", "del", &pod.netns]));
        }
        drop(ip(&["netns", "del", &self.name]));
    }
}

/// Joins two nodes by a veth pair, `eth0` in each, with an address in 192.168.0.0/24.
///
/// # Errors
/// When a link cannot be made.
pub fn join(one: &Node, other: &Node) -> Result<()> {
    let pair = format!("link add eth0 type veth peer name eth0 netns {}", other.name);
    one.ip_command(&pair)?;
    for node in [one, other] {
        node.ip_command(&format!("addr add {}/24 dev eth0", node.ip()))?;
        node.ip_command("link set eth0 up")?;
    }
    Ok(())
}

/// A cgroup of version 2 for the clients of one subject; removed on drop.
#[derive(Debug)]
pub struct Cgroup(std::path::PathBuf);

impl Cgroup {
    /// Makes a child of the first version 2 hierarchy that is mounted.
    ///
    /// # Errors
    /// When no hierarchy of version 2 is mounted, or the folder cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
        let mut cgroup2 = mounts.lines().filter(|line| line.contains(" cgroup2 "));
        let root = cgroup2.next().and_then(|line| line.split(' ').nth(1));
        let path = std::path::Path::new(root.context("no cgroup2 is mounted")?).join(name);
        std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        drop(std::fs::remove_dir(&self.0));
    }
}

/// Runs a command in a namespace, with the given standard input.
///
/// # Errors
/// When it cannot be started or fails; its words are in the error.
pub fn exec(netns: &str, command: &[&str], input: Option<&str>) -> Result<()> {
    let mut full = vec!["netns", "exec", netns];
    full.extend_from_slice(command);
    run("ip", &full, input)
}

/// Interface index and Ethernet address of a device, from `ip -o link`.
///
/// # Errors
/// When there is no such device.
pub fn link(netns: &str, device: &str) -> Result<(u32, String)> {
    let out = Command::new("ip")
        .args(["-n", netns, "-o", "link", "show", device])
        .output()
        .context("run ip")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let index = text.split(':').next().and_then(|n| n.trim().parse().ok());
    let mac = text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
    index.zip(mac.map(str::to_owned)).with_context(|| format!("no {device} in: {text}"))
}

fn ip(args: &[&str]) -> Result<()> {
    run("ip", args, None)
}

fn run(program: &str, args: &[&str], input: Option<&str>) -> Result<()> {
    use std::io::Write as _;
    let mut child = Command::new(program)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(text.as_bytes()).with_context(|| format!("write to {program}"))?;
    }
    let out = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.success(), "{program} {}: {}", args.join(" "), words.trim());
    Ok(())
}
