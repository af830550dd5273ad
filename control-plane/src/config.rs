//! The configuration of a server process, parsed once in `main`.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
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
    /// ClusterIPs are taken from here, one range or one of each family; the first host of the first is the
    /// `kubernetes` Service.
    pub service_cidrs: Vec<IpNet>,
    /// Each node's pod CIDRs are cut from here: one range or one of each family.
    pub cluster_cidrs: Vec<IpNet>,
    /// Prefix lengths of a node's pod CIDRs.
    pub node_masks: NodeMasks,
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
            service_cidrs: vec![net([10, 96, 0, 0], 16)],
            cluster_cidrs: vec![net([10, 244, 0, 0], 16)],
            node_masks: NodeMasks::default(),
            scheduler: true,
            controllers: ControllerSet::all(),
        }
    }

    /// The address of the Service `default/kubernetes`: the first host of the first service CIDR.
    pub fn service_ip(&self) -> IpAddr {
        let first = self
            .service_cidrs
            .first()
            .and_then(|cidr| cidr.hosts().nth(usize::from(cidr.addr().is_ipv6())));
        first.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// What no server can run with, said in one line.
    ///
    /// # Errors
    /// The text names the flag and what would be right.
    pub fn check(&self) -> Result<(), String> {
        families("--service-cidr", &self.service_cidrs)?;
        families("--cluster-cidr", &self.cluster_cidrs)?;
        for cluster in &self.cluster_cidrs {
            self.node_masks.check(cluster)?;
        }
        for service in &self.service_cidrs {
            if service.addr().is_ipv6() && service.prefix_len() < 64 {
                return Err(format!(
                    "--service-cidr {service} is too big: an IPv6 range begins at /64, such as /108"
                ));
            }
            let same = |cluster: &&IpNet| cluster.addr().is_ipv4() == service.addr().is_ipv4();
            let Some(cluster) = self.cluster_cidrs.iter().find(same) else {
                return Err(format!(
                    "--service-cidr {service} has no range of its family in --cluster-cidr, so no pod could serve it"
                ));
            };
            if cluster.contains(&service.addr()) || service.contains(&cluster.addr()) {
                return Err(format!("--service-cidr {service} overlaps --cluster-cidr {cluster}"));
            }
        }
        Ok(())
    }
}

/// One range, or two of different families.
fn families(flag: &str, cidrs: &[IpNet]) -> Result<(), String> {
    match cidrs {
        [_] => Ok(()),
        [a, b] if a.addr().is_ipv4() != b.addr().is_ipv4() => Ok(()),
        _ => {
            let list: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
            let list = list.join(",");
            Err(format!("{flag} {list:?} must be one range, or one IPv4 and one IPv6 range"))
        }
    }
}

/// Prefix lengths of nodes' pod CIDRs, by family; upstream's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeMasks {
    pub v4: u8,
    pub v6: u8,
}

impl Default for NodeMasks {
    fn default() -> Self {
        Self { v4: 24, v6: 64 }
    }
}

impl NodeMasks {
    /// That of the family of this range.
    #[must_use]
    pub fn of(self, cluster: &IpNet) -> u8 {
        if cluster.addr().is_ipv4() { self.v4 } else { self.v6 }
    }

    fn check(self, cluster: &IpNet) -> Result<(), String> {
        let mask = self.of(cluster);
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
        Ok(())
    }
}

fn net(address: [u8; 4], prefix: u8) -> IpNet {
    IpNet::new_assert(IpAddr::from(address), prefix)
}

/// The names of the controllers, as upstream's `--controllers` spells them.
pub const CONTROLLERS: [&str; 15] = [
    "bootstrapsigner",
    "csr",
    "deployment",
    "endpointslice",
    "endpointslicemirroring",
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
        assert_eq!(check(|c| c.node_masks.v4 = 8), Err("--node-cidr-mask-size".into()));
        assert_eq!(
            check(|c| c.service_cidrs = vec![net([10, 244, 0, 0], 24)]),
            Err("--service-cidr".into())
        );
        let six = |text: &str| text.parse::<IpNet>().unwrap();
        let dual = |c: &mut Config| {
            c.service_cidrs.push(six("fd00:10:96::/108"));
            c.cluster_cidrs.push(six("fd00:10:244::/56"));
        };
        let mut config = Config::new("/x");
        dual(&mut config);
        assert_eq!(config.check(), Ok(()));
        config.service_cidrs.swap(0, 1);
        assert_eq!(config.service_ip(), six("fd00:10:96::1/128").addr());
        config.cluster_cidrs.pop();
        let said = config.check().unwrap_err();
        assert!(said.contains("no range of its family in --cluster-cidr"), "{said}");
        assert_eq!(
            check(|c| c.service_cidrs.push(net([10, 97, 0, 0], 16))),
            Err("--service-cidr".into())
        );
        assert_eq!(check(|c| c.cluster_cidrs.clear()), Err("--cluster-cidr".into()));
        assert_eq!(Config::new("/x").service_ip(), IpAddr::from([10, 96, 0, 1]));
    }
}
