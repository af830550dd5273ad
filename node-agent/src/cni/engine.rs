//! What each CNI command does on this node, one at a time: address, link, file, table.
//!
//! Effects, blocking; the server calls it under a lock on threads made for blocking. The address is
//! on disk before a link has it and leaves the disk after the link is gone, so a crash in between
//! can only leave an address too many, which the next `DEL` or `GC` frees.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error as _,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    ipam::{self, Attachment, Claim, Ipam, IpamError, Record},
    veth::{self, Attached, VethError, VethSpec},
    wire::{Added, CniError, Code, Request, check_chain, previous_differs},
};
use crate::{
    chain::chain,
    model::{HostPort, LocalEndpoint, ObjectKey, PodNetwork, ServiceRow},
    sys::netns::NetNs,
    table::Table,
};

/// The state of the CNI server.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) host: NetNs,
    pub(super) node_ips: Vec<IpAddr>,
    pub(super) state: StateFile,
    pub(super) ipam: Ipam,
    pub(super) endpoints: Table<IpAddr, LocalEndpoint>,
    pub(super) services: Table<ObjectKey, ServiceRow>,
}

/// An `ADD` that is done as far as this node's kernel goes.
#[derive(Debug)]
pub(super) struct Addition {
    pub(super) added: Added,
    /// The endpoint table's revision that holds the pod; the dataplane must have seen it.
    pub(super) revision: u64,
}

impl Engine {
    /// Fills the endpoint table with the pods whose links exist, and marks it synced. Links are mended before.
    ///
    /// # Errors
    /// When the links cannot be listed.
    pub(super) fn restore(&mut self) -> Result<usize, VethError> {
        if let Err(error) = self.repair() {
            tracing::warn!(error = chain(&error), "not all links of pods mended");
        }
        let links = veth::host_ends(&self.host)?;
        let mut rows = BTreeMap::new();
        for (attachment, record) in self.ipam.records() {
            let spec = self.spec(attachment, record);
            let Some(link) = links.iter().find(|link| link.name == spec.host_name) else {
                continue;
            };
            // A pod whose namespace is gone is about to be deleted; it needs no packets.
            let pod_netns = Path::new(&*record.netns);
            match veth::cookie(&self.host, pod_netns, &spec) {
                Ok(netns_cookie) => {
                    let attached = Attached { host_ifindex: link.index, netns_cookie };
                    rows.extend(endpoints(record, &spec, attached));
                }
                Err(error) => {
                    tracing::warn!(pod = %record.pod, error = chain(&error), "pod not restored");
                }
            }
        }
        let restored = rows.len();
        self.endpoints.replace(rows);
        Ok(restored)
    }

    /// Puts back what others have taken from pods' links on the node.
    ///
    /// # Errors
    /// The first one; the other links are mended all the same.
    pub(super) fn repair(&self) -> Result<(), VethError> {
        let records = self.ipam.records();
        let specs: Vec<_> =
            records.map(|(attachment, record)| self.spec(attachment, record)).collect();
        let mended = veth::repair(&self.host, &specs)?;
        if mended > 0 {
            tracing::info!(pods = mended, "links of pods mended");
        }
        Ok(())
    }

    /// Where pods get their addresses from now on, and how large their packets may be, also those of
    /// pods that run.
    pub(super) fn set_network(&mut self, network: Option<PodNetwork>) {
        if let Some(network) = &network {
            if let Err(error) = veth::enable_forwarding(&self.host, &network.cidrs) {
                tracing::error!(error = chain(&error), "the node does not forward");
            }
            self.set_mtu(network.mtu);
        }
        self.ipam.set_network(network);
    }

    fn set_mtu(&mut self, mtu: u32) {
        let other: Vec<_> = self
            .ipam
            .records()
            .filter(|(_, record)| record.mtu != mtu)
            .map(|(attachment, record)| (attachment.clone(), record.clone()))
            .collect();
        for (attachment, record) in &other {
            let spec = VethSpec { mtu, ..self.spec(attachment, record) };
            match veth::set_mtu(&self.host, Path::new(&*record.netns), &spec) {
                Ok(()) => self.ipam.note_mtu(attachment, mtu),
                // Noted as it was: the next round of the overlay or the next start tries again.
                Err(error) => {
                    tracing::warn!(pod = %record.pod, mtu, error = chain(&error), "MTU not set");
                }
            }
        }
        if !other.is_empty()
            && let Err(error) = self.save()
        {
            tracing::warn!(%error, "MTU not saved, the next change saves it");
        }
    }

    /// `ADD`: addresses, a link and rows of the endpoint table; the same answer when asked again.
    pub(super) fn add(&mut self, request: &Request) -> Result<Addition, CniError> {
        check_chain(request)?;
        let attachment = &request.attachment;
        self.check_ports(request)?;
        let fresh = self.ipam.record(attachment).is_none();
        let claim = Claim {
            attachment,
            pod: &request.pod,
            netns: &request.netns,
            network: &request.network,
            host_ports: &request.host_ports,
        };
        let record = self.ipam.allocate(claim).map_err(|error| ipam_error(&error))?.clone();
        let spec = self.spec(attachment, &record);
        let pod_netns = Path::new(&request.netns);
        let made = self.save().and_then(|()| {
            // A link of an earlier ADD that is as it should be is kept: its connections live.
            let kept = (!fresh).then(|| veth::check(&self.host, pod_netns, &spec).ok()).flatten();
            kept.map_or_else(
                || veth::attach(&self.host, pod_netns, &spec).map_err(|error| veth_error(&error)),
                Ok,
            )
        });
        match made {
            Ok(attached) => {
                for (ip, row) in endpoints(&record, &spec, attached) {
                    self.endpoints.upsert(ip, row);
                }
                let revision = *self.endpoints.subscribe().borrow();
                Ok(Addition { added: added(&spec), revision })
            }
            Err(error) => {
                if fresh {
                    self.forget(attachment);
                }
                Err(error)
            }
        }
    }

    /// Whether the node's ports that a pod wants can lead to it. Whoever has one keeps it.
    fn check_ports(&self, request: &Request) -> Result<(), CniError> {
        let others = self.ipam.records().filter(|(other, _)| **other != request.attachment);
        let others: Vec<_> = others.map(|(_, record)| record).collect();
        let services = if request.host_ports.is_empty() {
            Vec::new()
        } else {
            self.services.changes_since(0).upserts
        };
        for (index, port) in request.host_ports.iter().enumerate() {
            let has = |service: &ServiceRow| {
                let mut ports = service.ports.iter();
                ports.any(|one| one.node_port == port.host_port && one.protocol == port.protocol)
            };
            let meets = |record: &&&Record| record.host_ports.iter().any(|one| one.meets(port));
            let why = if let Some(record) = others.iter().find(meets) {
                format!("pod {} has it", record.pod)
            } else if let Some((service, _)) = services.iter().find(|(_, row)| has(row)) {
                format!("it is the node port of service {service}")
            } else if request.host_ports[..index].iter().any(|one| one.meets(port)) {
                "it is asked for twice".to_owned()
            } else if !self.has_family(port) {
                "the pod has no address of that family".to_owned()
            } else {
                continue;
            };
            let text = format!("hostPort {port} cannot lead to the pod: {why}");
            return Err(CniError::new(Code::PortTaken, text));
        }
        Ok(())
    }

    fn has_family(&self, port: &HostPort) -> bool {
        let cidrs = self.ipam.network().map_or(&[][..], |network| &network.cidrs);
        port.host_ip.is_none_or(|ip| cidrs.iter().any(|cidr| cidr.addr().is_ipv4() == ip.is_ipv4()))
    }

    /// `DEL`: takes back what `ADD` gave; nothing to take back is a success.
    pub(super) fn del(&mut self, attachment: &Attachment) -> Result<(), CniError> {
        let record = self.ipam.record(attachment);
        for ip in record.iter().flat_map(|record| &record.ips) {
            self.endpoints.delete(ip);
        }
        veth::detach(&self.host, &host_name(attachment)).map_err(|error| veth_error(&error))?;
        if self.ipam.release(attachment).is_some() {
            self.save()?;
        }
        Ok(())
    }

    /// `CHECK`: everything that `ADD` made is still there, and is what the runtime remembers.
    pub(super) fn check(&self, request: &Request) -> Result<(), CniError> {
        let Some(record) = self.ipam.record(&request.attachment) else {
            let id = &request.attachment.container_id;
            return Err(CniError::new(Code::CheckFailed, format!("container {id} has no address")));
        };
        let spec = self.spec(&request.attachment, record);
        if let Some(difference) = previous_differs(request, &added(&spec)) {
            return Err(CniError::new(Code::CheckFailed, difference));
        }
        let attached = veth::check(&self.host, Path::new(&request.netns), &spec)
            .map_err(|error| veth_error(&error))?;
        for (ip, wanted) in endpoints(record, &spec, attached) {
            if self.endpoints.row(&ip).is_none_or(|row| *row != wanted) {
                let text = format!("the dataplane was told of another interface for {ip}");
                return Err(CniError::new(Code::CheckFailed, text));
            }
        }
        Ok(())
    }

    /// `GC`: frees every attachment of a network that is not in the list, and links that nobody has a
    /// record of.
    pub(super) fn gc(
        &mut self,
        network: &str,
        valid: &BTreeSet<Attachment>,
    ) -> Result<(), CniError> {
        let stale: Vec<_> = self
            .ipam
            .records()
            .filter(|(attachment, record)| {
                *record.network == *network && !valid.contains(attachment)
            })
            .map(|(attachment, _)| attachment.clone())
            .collect();
        let mut first_error = None;
        for attachment in &stale {
            if let Err(error) = self.del(attachment) {
                first_error.get_or_insert(error);
            }
        }
        let known: BTreeSet<_> = self
            .ipam
            .records()
            .map(|(attachment, _)| attachment)
            .chain(valid)
            .map(host_name)
            .collect();
        let links = veth::host_ends(&self.host).map_err(|error| veth_error(&error))?;
        for link in links.iter().filter(|link| !known.contains(&link.name)) {
            if let Err(error) = veth::detach(&self.host, &link.name) {
                first_error.get_or_insert_with(|| veth_error(&error));
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// `STATUS`: whether an `ADD` could succeed now.
    pub(super) fn status(&self) -> Result<(), CniError> {
        let room = self.ipam.has_room();
        room.map_err(|error| CniError::new(Code::NotAvailable, error.to_string()))
    }

    fn spec(&self, attachment: &Attachment, record: &Record) -> VethSpec {
        VethSpec::new(attachment, &record.ips, record.mtu, &self.node_ips)
    }

    fn forget(&mut self, attachment: &Attachment) {
        self.ipam.release(attachment);
        if let Err(error) = self.save() {
            tracing::warn!(%error, "freed address not saved, the next change saves it");
        }
    }

    fn save(&self) -> Result<(), CniError> {
        self.state.save(&self.ipam).map_err(|error| {
            CniError::new(Code::Io, "cannot save the table of addresses")
                .with_details(format!("{}: {error}", self.state.path.display()))
        })
    }
}

/// Where the addresses are kept over restarts.
#[derive(Clone, Debug)]
pub(super) struct StateFile {
    pub(super) path: PathBuf,
    /// What this boot of the machine is called.
    pub(super) boot: String,
}

/// The table of addresses cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no table of addresses", path.display())]
    Decode { path: PathBuf, source: ipam::DecodeError },
}

impl StateFile {
    /// Reads the file; none is an empty table. Records of an earlier boot are dropped, as network
    /// namespaces do not outlive one.
    pub(super) fn load(&self) -> Result<Ipam, StateError> {
        let bytes = match std::fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ipam::default()),
            other => {
                other.map_err(|source| StateError::Read { path: self.path.clone(), source })?
            }
        };
        let (mut ipam, boot) = Ipam::decode(&bytes)
            .map_err(|source| StateError::Decode { path: self.path.clone(), source })?;
        if boot != self.boot {
            ipam.forget_records();
        }
        Ok(ipam)
    }

    fn save(&self, ipam: &Ipam) -> io::Result<()> {
        super::install::write_durably(&self.path, &ipam.encode(&self.boot), 0o600)
    }
}

/// The host end's name of an attachment, whatever its addresses.
fn host_name(attachment: &Attachment) -> String {
    VethSpec::new(attachment, &[], 0, &[]).host_name
}

/// A pod's rows of the endpoint table, one for each address.
fn endpoints(record: &Record, spec: &VethSpec, attached: Attached) -> Vec<(IpAddr, LocalEndpoint)> {
    let host_ports: Arc<[HostPort]> = record.host_ports.as_slice().into();
    let row = |ip| LocalEndpoint {
        pod: record.pod.clone(),
        host_ports: Arc::clone(&host_ports),
        ip,
        netns_cookie: attached.netns_cookie,
        host_ifindex: attached.host_ifindex,
        host_mac: spec.host_mac,
        pod_mac: spec.pod_mac,
    };
    spec.ips.iter().map(|ip| (*ip, row(*ip))).collect()
}

fn added(spec: &VethSpec) -> Added {
    Added {
        ips: spec.ips.iter().map(|ip| (*ip, veth::pod_gateway(*ip))).collect(),
        host_name: spec.host_name.clone(),
        host_mac: spec.host_mac,
        pod_mac: spec.pod_mac,
        mtu: spec.mtu,
    }
}

fn ipam_error(error: &IpamError) -> CniError {
    let code = match error {
        IpamError::NoPodCidr => Code::TryAgainLater,
        IpamError::Exhausted(_) => Code::NoAddress,
    };
    CniError::new(code, error.to_string())
}

fn veth_error(error: &VethError) -> CniError {
    let code = match error {
        VethError::Namespace { .. } | VethError::OwnNamespace { .. } => Code::InvalidEnvironment,
        VethError::Kernel { .. } | VethError::Setting { .. } => Code::Kernel,
        VethError::Differs(_) => Code::CheckFailed,
    };
    let details = error.source().map(chain).unwrap_or_default();
    CniError::new(code, error.to_string()).with_details(details)
}
