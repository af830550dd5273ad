//! What each CNI command does on this node, one at a time: address, link, file, table.
//!
//! Effects, blocking; the server calls it under a lock on threads made for blocking. The address is
//! on disk before a link has it and leaves the disk after the link is gone, so a crash in between
//! can only leave an address too many, which the next `DEL` or `GC` frees.

use std::{
    collections::BTreeSet,
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;

use super::{
    ipam::{self, Attachment, Ipam, IpamError},
    veth::{self, VethError, VethSpec},
    wire::{Added, CniError, Code, Request, previous_differs},
};
use crate::{
    model::{LocalEndpoint, ObjectKey},
    sys::netns::NetNs,
    table::Table,
};

/// The state of the CNI server.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) host: NetNs,
    pub(super) mtu: u32,
    pub(super) node_ip: Option<Ipv4Addr>,
    pub(super) state: StateFile,
    pub(super) ipam: Ipam,
    pub(super) endpoints: Table<Ipv4Addr, LocalEndpoint>,
}

/// An `ADD` that is done as far as this node's kernel goes.
#[derive(Debug)]
pub(super) struct Addition {
    pub(super) added: Added,
    /// The endpoint table's revision that holds the pod; the dataplane must have seen it.
    pub(super) revision: u64,
}

impl Engine {
    /// Fills the endpoint table with the pods whose links exist, and marks it synced.
    ///
    /// # Errors
    /// When the links cannot be listed.
    pub(super) fn restore(&mut self) -> Result<usize, VethError> {
        let links = veth::host_ends(&self.host)?;
        let mut rows = std::collections::BTreeMap::new();
        for (attachment, record) in self.ipam.records() {
            let spec = self.spec(attachment, record.ip);
            if let Some(link) = links.iter().find(|link| link.name == spec.host_name) {
                rows.insert(record.ip, endpoint(&record.pod, &spec, link.index));
            }
        }
        let restored = rows.len();
        self.endpoints.replace(rows);
        Ok(restored)
    }

    pub(super) const fn set_cidr(&mut self, cidr: Option<Ipv4Net>) {
        self.ipam.set_cidr(cidr);
    }

    /// `ADD`: an address, a link and a row of the endpoint table; the same answer when asked again.
    pub(super) fn add(&mut self, request: &Request) -> Result<Addition, CniError> {
        let attachment = &request.attachment;
        let fresh = self.ipam.record(attachment).is_none();
        let ip = self
            .ipam
            .allocate(attachment, &request.pod, &request.netns)
            .map_err(|error| ipam_error(&error))?;
        let spec = self.spec(attachment, ip);
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
            Ok(index) => {
                self.endpoints.upsert(ip, endpoint(&request.pod, &spec, index));
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

    /// `DEL`: takes back what `ADD` gave; nothing to take back is a success.
    pub(super) fn del(&mut self, attachment: &Attachment) -> Result<(), CniError> {
        let name = self.spec(attachment, Ipv4Addr::UNSPECIFIED).host_name;
        if let Some(record) = self.ipam.record(attachment) {
            self.endpoints.delete(&record.ip);
        }
        veth::detach(&self.host, &name).map_err(|error| veth_error(&error))?;
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
        let spec = self.spec(&request.attachment, record.ip);
        if let Some(difference) = previous_differs(request, &added(&spec)) {
            return Err(CniError::new(Code::CheckFailed, difference));
        }
        let index = veth::check(&self.host, Path::new(&request.netns), &spec)
            .map_err(|error| veth_error(&error))?;
        let row = self.endpoints.row(&record.ip);
        if row.is_none_or(|row| row.host_ifindex != index) {
            let text = format!("the dataplane was told of another interface for {}", record.ip);
            return Err(CniError::new(Code::CheckFailed, text));
        }
        Ok(())
    }

    /// `GC`: frees every attachment that is not in the list, and links that nobody has a record of.
    pub(super) fn gc(&mut self, valid: &BTreeSet<Attachment>) -> Result<(), CniError> {
        let stale: Vec<_> = self
            .ipam
            .records()
            .map(|(attachment, _)| attachment)
            .filter(|attachment| !valid.contains(attachment))
            .cloned()
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
            .map(|attachment| self.spec(attachment, Ipv4Addr::UNSPECIFIED).host_name)
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
        match self.ipam.cidr() {
            Some(_) => Ok(()),
            None => Err(CniError::new(Code::NotAvailable, IpamError::NoPodCidr.to_string())),
        }
    }

    fn spec(&self, attachment: &Attachment, ip: Ipv4Addr) -> VethSpec {
        VethSpec::new(attachment, ip, self.mtu, self.node_ip)
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

fn endpoint(pod: &ObjectKey, spec: &VethSpec, host_ifindex: u32) -> LocalEndpoint {
    LocalEndpoint {
        pod: pod.clone(),
        ip: spec.ip,
        host_ifindex,
        host_mac: spec.host_mac,
        pod_mac: spec.pod_mac,
    }
}

fn added(spec: &VethSpec) -> Added {
    Added {
        ip: spec.ip,
        gateway: veth::POD_GATEWAY,
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
    let (code, source) = match error {
        VethError::Namespace { source, .. } => (Code::InvalidEnvironment, Some(source)),
        VethError::OwnNamespace { .. } => (Code::InvalidEnvironment, None),
        VethError::Kernel { source, .. } => (Code::Kernel, Some(source)),
        VethError::Differs(_) => (Code::CheckFailed, None),
    };
    let details = source.map(ToString::to_string).unwrap_or_default();
    CniError::new(code, error.to_string()).with_details(details)
}
