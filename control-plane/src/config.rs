//! The configuration of a server process, parsed once in `main`.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Everything that a running control plane was told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Certificates, database and `run.json` live here.
    pub data_dir: PathBuf,
    /// Where to listen; port 0 picks a free one, recorded in `run.json`.
    pub bind: SocketAddr,
    /// The address that others reach this server at; `None`: the host's own, by its route out.
    pub advertise_address: Option<IpAddr>,
    /// More names or addresses for the server's certificate.
    pub tls_san: Vec<String>,
    /// ClusterIPs are taken from here; the first host is the `kubernetes` Service.
    pub service_cidr: IpNet,
    /// Each node's pod CIDR is cut from here.
    pub cluster_cidr: IpNet,
    /// Prefix length of a node's pod CIDR.
    pub node_cidr_mask_size: u8,
    /// Whether the scheduler runs in this process.
    pub scheduler: bool,
    /// Which controllers run in this process.
    pub controllers: ControllerSet,
}

impl Config {
    /// The defaults for a data directory: all parts on, 0.0.0.0:6443, upstream's usual CIDRs
    /// (kubeadm: services 10.96.0.0/12, here /16; pods 10.244.0.0/16 cut to /24).
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            bind: SocketAddr::from(([0, 0, 0, 0], 6443)),
            advertise_address: None,
            tls_san: Vec::new(),
            service_cidr: net([10, 96, 0, 0], 16),
            cluster_cidr: net([10, 244, 0, 0], 16),
            node_cidr_mask_size: 24,
            scheduler: true,
            controllers: ControllerSet::all(),
        }
    }

    /// The address of the Service `default/kubernetes`: the first host of the service CIDR.
    pub fn service_ip(&self) -> IpAddr {
        self.service_cidr.hosts().next().unwrap_or_else(|| self.service_cidr.addr())
    }

    /// What no server can run with, said in one line.
    ///
    /// # Errors
    /// The text names the flag and what would be right.
    pub fn check(&self) -> Result<(), String> {
        let cluster = self.cluster_cidr;
        let mask = self.node_cidr_mask_size;
        if mask < cluster.prefix_len() || mask > cluster.max_prefix_len() {
            return Err(format!(
                "--node-cidr-mask-size {mask} must be between {} (--cluster-cidr {cluster}) and {}",
                cluster.prefix_len(),
                cluster.max_prefix_len()
            ));
        }
        if mask - cluster.prefix_len() > 16 {
            return Err(format!(
                "--node-cidr-mask-size {mask} cuts --cluster-cidr {cluster} into more than 65536 node CIDRs"
            ));
        }
        if cluster.contains(&self.service_cidr.addr())
            || self.service_cidr.contains(&cluster.addr())
        {
            return Err(format!(
                "--service-cidr {} overlaps --cluster-cidr {cluster}",
                self.service_cidr
            ));
        }
        Ok(())
    }
}

fn net(address: [u8; 4], prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::from(address), prefix)
}

/// The names of the controllers, as upstream's `--controllers` spells them.
pub const CONTROLLERS: [&str; 14] = [
    "bootstrapsigner",
    "csr",
    "deployment",
    "endpointslice",
    "event-ttl",
    "garbage-collector",
    "namespace",
    "nodeipam",
    "nodelifecycle",
    "podgc",
    "replicaset",
    "root-ca-certificate-publisher",
    "serviceaccount",
    "tokencleaner",
];

/// Which controllers run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerSet(Vec<&'static str>);

impl ControllerSet {
    /// Every one.
    pub fn all() -> Self {
        Self(CONTROLLERS.to_vec())
    }

    /// None: an API server alone.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Parses `*,-name` or `name,name`, upstream's syntax.
    ///
    /// # Errors
    /// The text names what is unknown.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut set = Vec::new();
        let mut without = Vec::new();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let name = word.strip_prefix('-').unwrap_or(word);
            if name == "*" {
                set = CONTROLLERS.to_vec();
                continue;
            }
            let Some(known) = CONTROLLERS.into_iter().find(|known| *known == name) else {
                return Err(format!(
                    "no controller {name:?}; there are {}",
                    CONTROLLERS.join(", ")
                ));
            };
            if word.starts_with('-') { without.push(known) } else { set.push(known) }
        }
        set.retain(|name| !without.contains(name));
        set.sort_unstable();
        set.dedup();
        Ok(Self(set))
    }

    /// Whether this one runs.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(&name)
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a running server tells its sibling commands, in `<data-dir>/run.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    /// The address that was bound, with its real port.
    pub bound: SocketAddr,
    /// The address that others reach it at.
    pub advertise: IpAddr,
    /// The server's process id.
    pub pid: u32,
}

impl RunFile {
    /// Where it lies.
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("run.json")
    }

    /// # Errors
    /// `NotFound` when no server has run there; `InvalidData` when the file is damaged.
    pub fn read(data_dir: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(Self::path(data_dir))?;
        serde_json::from_str(&text)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// The address that a command on this machine calls: loopback for a wildcard.
    pub fn local(&self) -> SocketAddr {
        let ip = match self.bound.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
            ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
        };
        SocketAddr::new(ip, self.bound.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_chosen_as_upstream_spells_it() {
        assert_eq!(ControllerSet::parse("*").unwrap(), ControllerSet::all());
        let set = ControllerSet::parse("*,-nodeipam").unwrap();
        assert!(!set.contains("nodeipam") && set.contains("deployment"));
        assert!(ControllerSet::parse("").unwrap().is_empty());
        assert!(ControllerSet::parse("cronjobs").unwrap_err().contains("cronjobs"));
    }

    #[test]
    fn impossible_networks_are_refused() {
        let check = |change: fn(&mut Config)| {
            let mut config = Config::new("/x");
            change(&mut config);
            config.check().map_err(|text| text.split(' ').next().unwrap_or_default().to_owned())
        };
        assert_eq!(check(|_| ()), Ok(()));
        assert_eq!(check(|c| c.node_cidr_mask_size = 8), Err("--node-cidr-mask-size".into()));
        assert_eq!(
            check(|c| c.service_cidr = net([10, 244, 0, 0], 24)),
            Err("--service-cidr".into())
        );
        assert_eq!(Config::new("/x").service_ip(), IpAddr::from([10, 96, 0, 1]));
    }
}
