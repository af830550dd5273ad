//! Which pod has which addresses: an allocator over a value, and its form on disk.
//!
//! Pure. Addresses are handed out round robin, so that a fresh pod does not get the address that
//! some peer's connection or cache still means for a dead one. The first host address belongs to
//! the node (its gateway); network and broadcast addresses are never given. A range is never listed:
//! the search for a free address takes at most one step more than there are addresses taken.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

use super::wishes;
use crate::model::{HostPort, ObjectKey, PodNetwork};

/// Version of the file's layout that is written.
const FILE_VERSION: u32 = 2;
/// The layout before a pod could have two addresses; still read.
const ONE_ADDRESS_VERSION: u32 = 1;

/// What CNI identifies an interface by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    pub container_id: Box<str>,
    pub ifname: Box<str>,
}

impl Attachment {
    #[must_use]
    pub fn new(container_id: &str, ifname: &str) -> Self {
        Self { container_id: container_id.into(), ifname: ifname.into() }
    }
}

/// Addresses that are taken, by whom, and what their link was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// One of each family that the node had a pod CIDR of, the first CIDR's first.
    pub ips: Vec<IpAddr>,
    pub pod: ObjectKey,
    /// Path of the pod's network namespace.
    pub netns: Box<str>,
    /// Name of the CNI network: garbage collection is for one network.
    pub network: Box<str>,
    /// Of both ends of the link, bytes.
    pub mtu: u32,
    /// Ports of the node that lead to the pod.
    pub host_ports: Vec<HostPort>,
}

/// Who asks for addresses.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    pub attachment: &'a Attachment,
    pub pod: &'a ObjectKey,
    pub netns: &'a str,
    pub network: &'a str,
    pub host_ports: &'a [HostPort],
}

/// Why there is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("the node has no pod CIDR yet")]
    NoPodCidr,
    #[error("all addresses of pod CIDR {0} are taken")]
    Exhausted(IpNet),
}

/// The file cannot be taken for a table of addresses.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("it is no JSON of the expected shape")]
    Json(#[source] serde_json::Error),
    #[error("its version is {0}, this agent reads {ONE_ADDRESS_VERSION} and {FILE_VERSION}")]
    Version(u32),
    #[error("it gives address {0} away twice")]
    Twice(IpAddr),
}

/// The addresses of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ipam {
    network: Option<PodNetwork>,
    last_v4: Option<Ipv4Addr>,
    last_v6: Option<Ipv6Addr>,
    records: BTreeMap<Attachment, Record>,
    taken: BTreeSet<IpAddr>,
}

impl Ipam {
    /// Sets where new addresses come from. Addresses already given stay given.
    pub fn set_network(&mut self, network: Option<PodNetwork>) {
        self.network = network;
    }

    /// The node's pod CIDRs and MTU, when known.
    #[must_use]
    pub const fn network(&self) -> Option<&PodNetwork> {
        self.network.as_ref()
    }

    /// Takes the next free address of each pod CIDR, all or none; an attachment that has addresses
    /// keeps them.
    ///
    /// # Errors
    /// When there is no pod CIDR yet or one is full; retrying helps once that changes.
    pub fn allocate(&mut self, claim: Claim<'_>) -> Result<&Record, IpamError> {
        let Claim { attachment, pod, netns, network, host_ports } = claim;
        if !self.records.contains_key(attachment) {
            let (ips, mtu) = self.next_free()?;
            for ip in &ips {
                self.taken.insert(*ip);
                match ip {
                    IpAddr::V4(ip) => self.last_v4 = Some(*ip),
                    IpAddr::V6(ip) => self.last_v6 = Some(*ip),
                }
            }
            let record = Record {
                ips,
                pod: pod.clone(),
                netns: netns.into(),
                network: network.into(),
                mtu,
                host_ports: Vec::new(),
            };
            self.records.insert(attachment.clone(), record);
        }
        let record = self.records.get_mut(attachment).expect("it was there or has been inserted");
        record.netns = netns.into();
        record.host_ports = host_ports.to_vec();
        Ok(record)
    }

    /// Whether an attachment could be given addresses now.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn has_room(&self) -> Result<(), IpamError> {
        self.next_free().map(drop)
    }

    /// Notes the MTU that an attachment's link was brought to.
    pub fn note_mtu(&mut self, attachment: &Attachment, mtu: u32) {
        if let Some(record) = self.records.get_mut(attachment) {
            record.mtu = mtu;
        }
    }

    /// Gives an attachment's addresses back; `None` when there were none.
    pub fn release(&mut self, attachment: &Attachment) -> Option<Record> {
        let record = self.records.remove(attachment)?;
        for ip in &record.ips {
            self.taken.remove(ip);
        }
        Some(record)
    }

    /// The record of an attachment.
    #[must_use]
    pub fn record(&self, attachment: &Attachment) -> Option<&Record> {
        self.records.get(attachment)
    }

    /// All records, in the order of their keys.
    pub fn records(&self) -> impl Iterator<Item = (&Attachment, &Record)> {
        self.records.iter()
    }

    /// Forgets all records, as after a reboot, but not how far the round has come.
    pub fn forget_records(&mut self) {
        self.records.clear();
        self.taken.clear();
    }

    /// The first free address of each CIDR after the last one given, and the MTU.
    fn next_free(&self) -> Result<(Vec<IpAddr>, u32), IpamError> {
        let network = self.network.as_ref().ok_or(IpamError::NoPodCidr)?;
        let free = network.cidrs.iter().map(|cidr| {
            let last = match cidr {
                IpNet::V4(_) => self.last_v4.map(IpAddr::V4),
                IpNet::V6(_) => self.last_v6.map(IpAddr::V6),
            };
            next_in(*cidr, last, &self.taken).ok_or(IpamError::Exhausted(*cidr))
        });
        Ok((free.collect::<Result<_, _>>()?, network.mtu))
    }

    /// The form on disk. `boot` identifies this boot of the machine.
    #[must_use]
    pub fn encode(&self, boot: &str) -> Vec<u8> {
        let records: Vec<_> = self
            .records
            .iter()
            .map(|(attachment, record)| {
                let mut entry = json!({
                    "containerId": &*attachment.container_id,
                    "ifname": &*attachment.ifname,
                    "ips": record.ips,
                    "namespace": &*record.pod.namespace,
                    "name": &*record.pod.name,
                    "netns": &*record.netns,
                    "network": &*record.network,
                    "mtu": record.mtu,
                });
                // An agent that knows of none reads the file of a node without any.
                if !record.host_ports.is_empty() {
                    entry["hostPorts"] = wishes::mappings(&record.host_ports);
                }
                entry
            })
            .collect();
        let file = json!({
            "version": FILE_VERSION,
            "boot": boot,
            "last": self.last_v4,
            "lastV6": self.last_v6,
            "records": records,
        });
        let mut text = format!("{file:#}").into_bytes();
        text.push(b'\n');
        text
    }

    /// Reads the form on disk; also says which boot wrote it.
    ///
    /// # Errors
    /// When it is not what [`Self::encode`] writes, or wrote before pods could have two addresses.
    pub fn decode(bytes: &[u8]) -> Result<(Self, String), DecodeError> {
        let version: FileVersion = serde_json::from_slice(bytes).map_err(DecodeError::Json)?;
        if !matches!(version.version, ONE_ADDRESS_VERSION | FILE_VERSION) {
            return Err(DecodeError::Version(version.version));
        }
        let file: File = serde_json::from_slice(bytes).map_err(DecodeError::Json)?;
        let mut ipam = Self { last_v4: file.last, last_v6: file.last_v6, ..Self::default() };
        for entry in file.records {
            let ips: Vec<_> = entry.ip.into_iter().chain(entry.ips).collect();
            for ip in &ips {
                if !ipam.taken.insert(*ip) {
                    return Err(DecodeError::Twice(*ip));
                }
            }
            let attachment = Attachment::new(&entry.container_id, &entry.ifname);
            let record = Record {
                ips,
                pod: ObjectKey::new(&entry.namespace, &entry.name),
                netns: entry.netns.into(),
                network: entry.network.into(),
                mtu: entry.mtu,
                host_ports: wishes::host_ports(&entry.host_ports).unwrap_or_default(),
            };
            ipam.records.insert(attachment, record);
        }
        Ok((ipam, file.boot))
    }
}

/// The first host address of a pod CIDR: the node's own, every pod's idea of a gateway aside.
#[must_use]
pub fn gateway(cidr: IpNet) -> IpAddr {
    from_bits(bits(cidr.network()).saturating_add(1), cidr)
}

/// The first address after `last` that is not taken, wrapping around once.
fn next_in(cidr: IpNet, last: Option<IpAddr>, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let (low, high) = usable(cidr)?;
    let start = match last.map(bits) {
        Some(last) if (low..high).contains(&last) => last + 1,
        _ => low,
    };
    let mut round = (start..=high).chain(low..start).map(|number| from_bits(number, cidr));
    round.find(|ip| !taken.contains(ip))
}

/// Lowest and highest address for pods; `None` when the prefix leaves none. IPv6 has no broadcast
/// address.
fn usable(cidr: IpNet) -> Option<(u128, u128)> {
    let low = bits(gateway(cidr)).checked_add(1)?;
    let last = bits(cidr.broadcast());
    let high = match cidr {
        IpNet::V4(_) => last.checked_sub(1)?,
        IpNet::V6(_) => last,
    };
    (low <= high).then_some((low, high))
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// An address of the CIDR's family; one that IPv4 cannot count to becomes its last.
fn from_bits(number: u128, cidr: IpNet) -> IpAddr {
    match cidr {
        IpNet::V4(_) => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

#[derive(Debug, Deserialize)]
struct FileVersion {
    version: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    #[expect(dead_code, reason = "read before the rest, as FileVersion")]
    version: u32,
    boot: String,
    last: Option<Ipv4Addr>,
    #[serde(default)]
    last_v6: Option<Ipv6Addr>,
    records: Vec<FileRecord>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileRecord {
    container_id: String,
    ifname: String,
    /// Version 1 only.
    ip: Option<IpAddr>,
    #[serde(default)]
    ips: Vec<IpAddr>,
    namespace: String,
    name: String,
    netns: String,
    #[serde(default = "default_network")]
    network: String,
    #[serde(default = "default_mtu")]
    mtu: u32,
    #[serde(default)]
    host_ports: Value,
}

/// The one network of version 1.
fn default_network() -> String {
    super::PLUGIN.to_owned()
}

/// The one MTU of version 1.
const fn default_mtu() -> u32 {
    1450
}

#[cfg(test)]
#[path = "ipam_tests.rs"]
mod tests;
