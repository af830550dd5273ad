//! Which pod has which address: an allocator over a value, and its form on disk.
//!
//! Pure. Addresses are handed out round robin, so that a fresh pod does not get the address that
//! some peer's connection or cache still means for a dead one. The first host address belongs to
//! the node (its gateway); network and broadcast addresses are never given.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use serde::Deserialize;
use serde_json::json;

use crate::model::ObjectKey;

/// Version of the file's layout; another one is refused.
const FILE_VERSION: u32 = 1;

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

/// An address that is taken, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub ip: Ipv4Addr,
    pub pod: ObjectKey,
    /// Path of the pod's network namespace.
    pub netns: Box<str>,
}

/// Why there is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("the node has no pod CIDR yet")]
    NoPodCidr,
    #[error("all addresses of pod CIDR {0} are taken")]
    Exhausted(Ipv4Net),
}

/// The file cannot be taken for a table of addresses.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("it is no JSON of the expected shape")]
    Json(#[source] serde_json::Error),
    #[error("its version is {0}, this agent reads {FILE_VERSION}")]
    Version(u32),
    #[error("it gives address {0} away twice")]
    Twice(Ipv4Addr),
}

/// The addresses of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ipam {
    cidr: Option<Ipv4Net>,
    last: Option<Ipv4Addr>,
    records: BTreeMap<Attachment, Record>,
    taken: BTreeSet<Ipv4Addr>,
}

impl Ipam {
    /// Sets where new addresses come from. Addresses already given stay given.
    pub const fn set_cidr(&mut self, cidr: Option<Ipv4Net>) {
        self.cidr = cidr;
    }

    /// The node's pod CIDR, when known.
    #[must_use]
    pub const fn cidr(&self) -> Option<Ipv4Net> {
        self.cidr
    }

    /// Takes the next free address; an attachment that has one keeps it.
    ///
    /// # Errors
    /// When there is no pod CIDR yet or it is full; retrying helps once that changes.
    pub fn allocate(
        &mut self,
        attachment: &Attachment,
        pod: &ObjectKey,
        netns: &str,
    ) -> Result<Ipv4Addr, IpamError> {
        if let Some(record) = self.records.get_mut(attachment) {
            record.netns = netns.into();
            return Ok(record.ip);
        }
        let cidr = self.cidr.ok_or(IpamError::NoPodCidr)?;
        let ip = self.next_free(cidr).ok_or(IpamError::Exhausted(cidr))?;
        let record = Record { ip, pod: pod.clone(), netns: netns.into() };
        self.records.insert(attachment.clone(), record);
        self.taken.insert(ip);
        self.last = Some(ip);
        Ok(ip)
    }

    /// Gives an address back; `None` when there was none.
    pub fn release(&mut self, attachment: &Attachment) -> Option<Record> {
        let record = self.records.remove(attachment)?;
        self.taken.remove(&record.ip);
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

    /// The first free address after the last one given, wrapping around once.
    fn next_free(&self, cidr: Ipv4Net) -> Option<Ipv4Addr> {
        let (low, high) = usable(cidr)?;
        let start = match self.last.map(u32::from) {
            Some(last) if (low..high).contains(&last) => last + 1,
            _ => low,
        };
        let mut round = (start..=high).chain(low..start).map(Ipv4Addr::from);
        round.find(|ip| !self.taken.contains(ip))
    }

    /// The form on disk. `boot` identifies this boot of the machine.
    #[must_use]
    pub fn encode(&self, boot: &str) -> Vec<u8> {
        let records: Vec<_> = self
            .records
            .iter()
            .map(|(attachment, record)| {
                json!({
                    "containerId": &*attachment.container_id,
                    "ifname": &*attachment.ifname,
                    "ip": record.ip,
                    "namespace": &*record.pod.namespace,
                    "name": &*record.pod.name,
                    "netns": &*record.netns,
                })
            })
            .collect();
        let file =
            json!({"version": FILE_VERSION, "boot": boot, "last": self.last, "records": records});
        let mut text = format!("{file:#}").into_bytes();
        text.push(b'\n');
        text
    }

    /// Reads the form on disk; also says which boot wrote it.
    ///
    /// # Errors
    /// When it is not what [`Self::encode`] writes.
    pub fn decode(bytes: &[u8]) -> Result<(Self, String), DecodeError> {
        let file: File = serde_json::from_slice(bytes).map_err(DecodeError::Json)?;
        if file.version != FILE_VERSION {
            return Err(DecodeError::Version(file.version));
        }
        let mut ipam = Self { last: file.last, ..Self::default() };
        for entry in file.records {
            if !ipam.taken.insert(entry.ip) {
                return Err(DecodeError::Twice(entry.ip));
            }
            let attachment = Attachment::new(&entry.container_id, &entry.ifname);
            let pod = ObjectKey::new(&entry.namespace, &entry.name);
            let record = Record { ip: entry.ip, pod, netns: entry.netns.into() };
            ipam.records.insert(attachment, record);
        }
        Ok((ipam, file.boot))
    }
}

/// The first host address of a pod CIDR: the node's own, every pod's idea of a gateway aside.
#[must_use]
pub fn gateway(cidr: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(cidr.network()).saturating_add(1))
}

/// Lowest and highest address for pods; `None` when the prefix leaves none.
fn usable(cidr: Ipv4Net) -> Option<(u32, u32)> {
    let low = u32::from(gateway(cidr)).checked_add(1)?;
    let high = u32::from(cidr.broadcast()).checked_sub(1)?;
    (low <= high).then_some((low, high))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    boot: String,
    last: Option<Ipv4Addr>,
    records: Vec<FileRecord>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileRecord {
    container_id: String,
    ifname: String,
    ip: Ipv4Addr,
    namespace: String,
    name: String,
    netns: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ipam(cidr: &str) -> Ipam {
        let mut ipam = Ipam::default();
        ipam.set_cidr(Some(cidr.parse().unwrap()));
        ipam
    }

    fn take(ipam: &mut Ipam, id: u8) -> Result<Ipv4Addr, IpamError> {
        let attachment = Attachment::new(&format!("c{id}"), "eth0");
        ipam.allocate(&attachment, &ObjectKey::new("default", "p"), "/run/netns/p")
    }

    fn give_back(ipam: &mut Ipam, id: u8) {
        ipam.release(&Attachment::new(&format!("c{id}"), "eth0")).expect("was taken");
    }

    #[test]
    fn network_gateway_and_broadcast_addresses_are_never_given() {
        let mut ipam = ipam("10.244.1.0/29");
        let given: Vec<_> = (0..5).map(|id| take(&mut ipam, id).unwrap().octets()[3]).collect();
        assert_eq!(given, [2, 3, 4, 5, 6]);
        assert_eq!(take(&mut ipam, 5), Err(IpamError::Exhausted(ipam.cidr().unwrap())));
        assert_eq!(gateway(ipam.cidr().unwrap()), Ipv4Addr::new(10, 244, 1, 1));
    }

    #[test]
    fn a_freed_address_is_given_again_only_after_all_others() {
        let mut ipam = ipam("10.244.1.0/29");
        assert_eq!(take(&mut ipam, 0).unwrap().octets()[3], 2);
        give_back(&mut ipam, 0);
        let given: Vec<_> = (1..6).map(|id| take(&mut ipam, id).unwrap().octets()[3]).collect();
        assert_eq!(given, [3, 4, 5, 6, 2]);
    }

    #[test]
    fn the_same_attachment_keeps_its_address() {
        let mut ipam = ipam("10.244.1.0/24");
        assert_eq!(take(&mut ipam, 1), take(&mut ipam, 1));
        assert_eq!(ipam.records().count(), 1);
    }

    #[test]
    fn a_prefix_without_room_for_a_pod_is_full_and_none_is_not_ready() {
        for cidr in ["10.0.0.0/30", "10.0.0.0/31", "10.0.0.0/32", "255.255.255.255/32"] {
            let mut ipam = ipam(cidr);
            let first = take(&mut ipam, 0);
            assert_eq!(first.is_ok(), cidr.ends_with("/30"), "{cidr}: {first:?}");
            assert!(matches!(take(&mut ipam, 1), Err(IpamError::Exhausted(_))), "{cidr}");
        }
        assert_eq!(take(&mut Ipam::default(), 0), Err(IpamError::NoPodCidr));
    }

    #[test]
    fn another_version_or_a_doubled_address_is_refused() {
        let file = br#"{"version":2,"boot":"b","last":null,"records":[]}"#;
        assert!(matches!(Ipam::decode(file), Err(DecodeError::Version(2))));
        let entry = r#"{"containerId":"ID","ifname":"eth0","ip":"10.0.0.2","namespace":"","name":"n","netns":""}"#;
        let file = format!(
            r#"{{"version":1,"boot":"b","last":null,"records":[{},{}]}}"#,
            entry.replace("ID", "a"),
            entry.replace("ID", "b")
        );
        assert!(matches!(Ipam::decode(file.as_bytes()), Err(DecodeError::Twice(_))));
    }

    proptest! {
        #[test]
        fn whatever_happens_no_address_is_given_twice_and_the_file_restores_all(
            steps in prop::collection::vec((any::<bool>(), 0_u8..24), 0..80)
        ) {
            let mut ipam = ipam("10.244.7.0/28");
            let mut model = BTreeMap::new();
            for (add, id) in steps {
                if add {
                    match take(&mut ipam, id) {
                        Ok(ip) => {
                            prop_assert!(model.iter().all(|(other, used)| *used != ip || *other == id));
                            prop_assert!((2..15).contains(&ip.octets()[3]));
                            model.insert(id, ip);
                        }
                        Err(_) => prop_assert_eq!(model.len(), 13),
                    }
                } else {
                    let attachment = Attachment::new(&format!("c{id}"), "eth0");
                    let released = ipam.release(&attachment).map(|record| record.ip);
                    prop_assert_eq!(released, model.remove(&id));
                }
            }
            let (mut back, boot) = Ipam::decode(&ipam.encode("boot-1")).unwrap();
            back.set_cidr(ipam.cidr());
            prop_assert_eq!(boot, "boot-1");
            prop_assert_eq!(back, ipam);
        }
    }
}
