//! The agent's configuration: flags over a file over defaults, parsed once into typed values. Pure,
//! but for reading the file.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer};

use crate::{
    dataplane::XdpMode,
    join::{Join, Token},
};

/// A part of the agent that can be switched on alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    Dataplane,
    Overlay,
    Cni,
    Dns,
    Kubelet,
}

impl Component {
    /// All of them, in the order in which they start.
    pub const ALL: [Self; 5] =
        [Self::Overlay, Self::Dataplane, Self::Cni, Self::Dns, Self::Kubelet];

    /// As `--components` has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dataplane => "dataplane",
            Self::Overlay => "overlay",
            Self::Cni => "cni",
            Self::Dns => "dns",
            Self::Kubelet => "kubelet",
        }
    }
}

impl FromStr for Component {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|component| component.name() == text)
            .ok_or_else(|| format!("unknown component \"{text}\"; there are {known}"))
    }
}

/// How pods of other nodes are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlayMode {
    Vxlan,
    L3,
    /// Routes to nodes on the same link, the tunnel to others.
    Auto,
}

impl FromStr for OverlayMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "vxlan" => Ok(Self::Vxlan),
            "l3" => Ok(Self::L3),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("unknown overlay \"{text}\"; there are vxlan, l3, auto")),
        }
    }
}

/// Flags of `run`. The names of the file's keys are the same, with `_` for `-`.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunArgs {
    /// Credentials and address of the API server; written by a join.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// API server to join when the kubeconfig does not exist, such as `https://10.0.0.1:6443`.
    #[arg(long)]
    pub server: Option<String>,
    /// What `control-plane token` printed: `<id>.<secret>.<sha256 of the CA>`.
    #[arg(long, hide_env_values = true)]
    pub token: Option<String>,
    /// Name of this node [default: the host's name].
    #[arg(long)]
    pub node_name: Option<String>,
    /// Addresses of this node that others reach, IPv4 first and IPv6 after a comma [default: the one
    /// that leads to the server, and another when the node has lost it].
    #[arg(long, value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_several")]
    pub node_ip: Option<Vec<IpAddr>>,
    /// Service CIDRs of the cluster, at most one of a family [default: 10.96.0.0/16].
    #[arg(long, value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_several")]
    pub service_cidr: Option<Vec<IpNet>>,
    /// Whether traffic of pods to the outside gets this node's address [default: true].
    #[arg(long)]
    pub masquerade: Option<bool>,
    /// The range of the server's node ports [default: 30000-32767, kube-apiserver's].
    #[arg(long)]
    pub service_node_port_range: Option<String>,
    /// Network devices on which services answer clients outside and by which pods' traffic leaves under this node's
    /// address, separated by commas [default: every device with an address that others can reach].
    #[arg(long, value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_several")]
    pub devices: Option<Vec<String>>,
    /// Whether node ports answer the node's own processes at 127.0.0.1 and ::1 too, which needs the programs at the
    /// sockets; kube-proxy's `--iptables-localhost-nodeports` [default: false].
    #[arg(long)]
    pub localhost_nodeports: Option<bool>,
    /// Parts to run, separated by commas [default: all].
    #[arg(long, value_delimiter = ',')]
    pub components: Option<Vec<String>>,
    /// What outlives a boot [default: /var/lib/orlop].
    #[arg(long)]
    pub state_dir: Option<PathBuf>,
    /// What lives until the next boot [default: /run/orlop].
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
    /// Address of cluster DNS in pods [default: 10.96.0.10].
    #[arg(long, value_delimiter = ',')]
    pub cluster_dns: Option<Vec<IpAddr>>,
    /// Domain of the cluster [default: cluster.local].
    #[arg(long)]
    pub cluster_domain: Option<String>,
    /// vxlan, l3 or auto [default: vxlan].
    #[arg(long)]
    pub overlay: Option<String>,
    /// Where Prometheus asks for metrics [default: 127.0.0.1:10249, kube-proxy's].
    #[arg(long)]
    pub metrics_address: Option<SocketAddr>,
    /// Where load balancers ask whether this node is well: `/healthz` and `/livez` [default: [::]:10256,
    /// kube-proxy's port at every address of both families].
    #[arg(long)]
    pub healthz_address: Option<SocketAddr>,
    /// Service traffic from outside in the drivers' XDP hook: auto (where the driver has one and packets have
    /// whole checksums, else by tc; `status` says which and why), off (by tc), native (as auto, but also where
    /// senders leave checksums unfinished) or generic (in the stack, on any device, except what goes to pods here;
    /// slower than tc, for trying out). The first agent after a boot that attaches in a driver resets many a
    /// network card, whose link is then down for up to seconds, and a virtual machine's device gives up its receive
    /// offloads [default: off].
    #[arg(long)]
    pub xdp: Option<String>,
    /// `host:port` of a registry without TLS; may be repeated.
    #[arg(long)]
    pub insecure_registry: Option<Vec<String>>,
}

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub kubeconfig: PathBuf,
    pub join: Option<Join>,
    pub node_name: Arc<str>,
    /// By family (IPv4, IPv6); without any the way to the server shows one.
    pub node_ips: [Option<IpAddr>; 2],
    pub service_cidrs: Vec<IpNet>,
    pub masquerade: bool,
    /// First and last.
    pub node_ports: (u16, u16),
    /// None: all that connect the node.
    pub devices: Vec<String>,
    pub localhost_nodeports: bool,
    pub components: BTreeSet<Component>,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    pub overlay: OverlayMode,
    pub xdp: XdpMode,
    pub metrics_address: SocketAddr,
    pub healthz_address: SocketAddr,
    pub insecure_registries: Vec<String>,
}

/// A wrong configuration; the program ends with code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("--kubeconfig FILE is needed (it is written by a join with --server and --token)")]
    NoKubeconfig,
    #[error("--server and --token go together")]
    HalfJoin,
    #[error("--server {0}: want https://HOST:PORT")]
    Server(String),
    #[error("--node-name {0}: want lower-case letters, digits, '-' and '.'")]
    NodeName(String),
    #[error("{0}")]
    Value(String),
    #[error("cannot read configuration file {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration file {}", path.display())]
    File { path: PathBuf, source: serde_yaml_ng::Error },
}

impl RunArgs {
    /// Reads a configuration file in YAML.
    ///
    /// # Errors
    /// When it cannot be read, or has a key that is no flag.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        serde_yaml_ng::from_str(&text)
            .map_err(|source| ConfigError::File { path: path.to_owned(), source })
    }

    /// What is said here, else what `file` says.
    #[must_use]
    pub fn over(self, file: Self) -> Self {
        Self {
            kubeconfig: self.kubeconfig.or(file.kubeconfig),
            server: self.server.or(file.server),
            token: self.token.or(file.token),
            node_name: self.node_name.or(file.node_name),
            node_ip: self.node_ip.or(file.node_ip),
            service_cidr: self.service_cidr.or(file.service_cidr),
            masquerade: self.masquerade.or(file.masquerade),
            service_node_port_range: self.service_node_port_range.or(file.service_node_port_range),
            devices: self.devices.or(file.devices),
            localhost_nodeports: self.localhost_nodeports.or(file.localhost_nodeports),
            components: self.components.or(file.components),
            state_dir: self.state_dir.or(file.state_dir),
            run_dir: self.run_dir.or(file.run_dir),
            cluster_dns: self.cluster_dns.or(file.cluster_dns),
            cluster_domain: self.cluster_domain.or(file.cluster_domain),
            overlay: self.overlay.or(file.overlay),
            xdp: self.xdp.or(file.xdp),
            metrics_address: self.metrics_address.or(file.metrics_address),
            healthz_address: self.healthz_address.or(file.healthz_address),
            insecure_registry: self.insecure_registry.or(file.insecure_registry),
        }
    }

    /// Parses everything and fills the defaults in; `hostname` names the node where nothing is said.
    ///
    /// # Errors
    /// The first value that is wrong, in one line.
    pub fn parse(self, hostname: &str) -> Result<Config, ConfigError> {
        let components = match self.components {
            None => Component::ALL.into_iter().collect(),
            Some(names) => names
                .iter()
                .map(|name| name.parse())
                .collect::<Result<_, String>>()
                .map_err(ConfigError::Value)?,
        };
        let join = match (self.server, self.token) {
            (None, None) => None,
            (Some(server), Some(token)) => Some(Join {
                server: parse_server(server)?,
                token: token
                    .parse::<Token>()
                    .map_err(|why| ConfigError::Value(format!("--token: {why}")))?,
            }),
            (Some(_), None) | (None, Some(_)) => return Err(ConfigError::HalfJoin),
        };
        let overlay = self.overlay.as_deref().unwrap_or("vxlan").parse();
        let xdp = self.xdp.as_deref().map_or_else(|| Ok(XdpMode::default()), str::parse);
        let default_dns = || vec![IpAddr::from([10, 96, 0, 10])];
        Ok(Config {
            kubeconfig: self.kubeconfig.ok_or(ConfigError::NoKubeconfig)?,
            join,
            node_name: parse_name(self.node_name.unwrap_or_else(|| hostname.to_lowercase()))?,
            node_ips: by_family("--node-ip", self.node_ip.unwrap_or_default(), IpAddr::is_ipv6)?,
            service_cidrs: service_cidrs(self.service_cidr)?,
            masquerade: self.masquerade.unwrap_or(true),
            node_ports: node_ports(self.service_node_port_range)?,
            devices: self.devices.unwrap_or_default(),
            localhost_nodeports: self.localhost_nodeports.unwrap_or(false),
            components,
            state_dir: self.state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/orlop")),
            run_dir: self.run_dir.unwrap_or_else(|| PathBuf::from("/run/orlop")),
            cluster_dns: self.cluster_dns.unwrap_or_else(default_dns),
            cluster_domain: self.cluster_domain.unwrap_or_else(|| "cluster.local".to_owned()),
            overlay: overlay.map_err(ConfigError::Value)?,
            xdp: xdp.map_err(ConfigError::Value)?,
            metrics_address: self.metrics_address.unwrap_or(METRICS_ADDRESS),
            healthz_address: self.healthz_address.unwrap_or(HEALTHZ_ADDRESS),
            insecure_registries: self.insecure_registry.unwrap_or_default(),
        })
    }
}

/// Where metrics are served unless something else is said: loopback, kube-proxy's port.
const METRICS_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

/// Where the node's health is told unless something else is said: everywhere, kube-proxy's port.
const HEALTHZ_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 10_256);

/// A list, or the only one of a list without the brackets.
fn one_or_several<'de, D, T>(from: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either<T> {
        One(T),
        Several(Vec<T>),
    }
    let either = Option::<Either<T>>::deserialize(from)?;
    Ok(either.map(|either| match either {
        Either::One(one) => vec![one],
        Either::Several(all) => all,
    }))
}

/// Sorts into (IPv4, IPv6); a second one of a family is an error.
fn by_family<T: Copy + fmt::Display>(
    flag: &str,
    all: Vec<T>,
    is_v6: impl Fn(&T) -> bool,
) -> Result<[Option<T>; 2], ConfigError> {
    let mut sorted = [None; 2];
    for one in all {
        let place = &mut sorted[usize::from(is_v6(&one))];
        if let Some(other) = place.replace(one) {
            let why = format!("{flag}: {other} and {one} are of one family; give one of each");
            return Err(ConfigError::Value(why));
        }
    }
    Ok(sorted)
}

fn service_cidrs(said: Option<Vec<IpNet>>) -> Result<Vec<IpNet>, ConfigError> {
    let default = || vec![Ipv4Net::new_assert([10, 96, 0, 0].into(), 16).into()];
    let is_v6 = |net: &IpNet| net.addr().is_ipv6();
    let sorted = by_family("--service-cidr", said.unwrap_or_else(default), is_v6)?;
    Ok(sorted.into_iter().flatten().collect())
}

/// A range as kube-apiserver has it: `first-last`, both of them in it.
fn node_ports(said: Option<String>) -> Result<(u16, u16), ConfigError> {
    let Some(said) = said else { return Ok((30_000, 32_767)) };
    let parsed = said.split_once('-').and_then(|(first, last)| {
        let range: (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        Some(range).filter(|(first, last)| *first > 0 && first <= last)
    });
    let wrong =
        || format!("--service-node-port-range {said}: want FIRST-LAST, such as 30000-32767");
    parsed.ok_or_else(|| ConfigError::Value(wrong()))
}

fn parse_server(server: String) -> Result<String, ConfigError> {
    let uri: Option<http::Uri> = server.parse().ok();
    let good = uri.is_some_and(|uri| uri.scheme_str() == Some("https") && uri.host().is_some());
    if good {
        Ok(server.trim_end_matches('/').to_owned())
    } else {
        Err(ConfigError::Server(server))
    }
}

/// A DNS-1123 subdomain, as names of nodes are.
fn parse_name(name: String) -> Result<Arc<str>, ConfigError> {
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        label.starts_with(inner)
            && label.ends_with(inner)
            && label.chars().all(|c| inner(c) || c == '-')
    };
    let good = name.len() <= 253 && name.split('.').all(label);
    if good { Ok(name.into()) } else { Err(ConfigError::NodeName(name)) }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| items.join(",");
        writeln!(f, "kubeconfig: {}", self.kubeconfig.display())?;
        if let Some(join) = &self.join {
            writeln!(f, "server: {}", join.server)?;
        }
        writeln!(f, "node_name: {}", self.node_name)?;
        let ips = self.node_ips.iter().flatten().map(ToString::to_string);
        writeln!(f, "node_ip: [{}]", list(ips.collect()))?;
        let cidrs = self.service_cidrs.iter().map(ToString::to_string);
        writeln!(f, "service_cidr: [{}]", list(cidrs.collect()))?;
        writeln!(f, "masquerade: {}", self.masquerade)?;
        let (first, last) = self.node_ports;
        writeln!(f, "service_node_port_range: {first}-{last}")?;
        writeln!(f, "devices: [{}]", list(self.devices.clone()))?;
        writeln!(f, "localhost_nodeports: {}", self.localhost_nodeports)?;
        let names = self.components.iter().map(|component| component.name().to_owned());
        writeln!(f, "components: [{}]", list(names.collect()))?;
        writeln!(f, "state_dir: {}", self.state_dir.display())?;
        writeln!(f, "run_dir: {}", self.run_dir.display())?;
        let dns = self.cluster_dns.iter().map(ToString::to_string);
        writeln!(f, "cluster_dns: [{}]", list(dns.collect()))?;
        writeln!(f, "cluster_domain: {}", self.cluster_domain)?;
        let overlay = match self.overlay {
            OverlayMode::Vxlan => "vxlan",
            OverlayMode::L3 => "l3",
            OverlayMode::Auto => "auto",
        };
        writeln!(f, "overlay: {overlay}")?;
        writeln!(f, "xdp: {}", self.xdp.name())?;
        writeln!(f, "metrics_address: {}", self.metrics_address)?;
        writeln!(f, "healthz_address: '{}'", self.healthz_address)?;
        write!(f, "insecure_registry: [{}]", list(self.insecure_registries.clone()))
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
