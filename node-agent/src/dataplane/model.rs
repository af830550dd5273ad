//! What should be programmed: from API rows to frontends and their backends.
//!
//! Pure. [`Model`] follows the tables' changes and says which frontends they touch, so that one
//! changed endpoint costs in proportion to its service, not to the cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ebpf_common::{
    addr::Addr,
    service::{Backend, SCOPE_INTERNAL, ServiceKey},
};

use crate::{
    model::{
        EndpointRow, EndpointSliceRow, ObjectKey, Protocol, ServiceKind, ServicePort, ServiceRow,
    },
    table::Delta,
};

/// Cluster DNS answers on every node: the service's backend is an address of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeLocalService {
    /// The service whose endpoints are replaced.
    pub service: ObjectKey,
    /// The address that answers on this node, at the service's own ports.
    pub address: IpAddr,
}

/// Backends of every frontend of one service.
pub type Frontends = BTreeMap<ServiceKey, BTreeSet<Backend>>;

/// Services, their slices, and who owns which frontend.
#[derive(Debug, Default)]
pub struct Model {
    node_local: Option<NodeLocalService>,
    services: BTreeMap<ObjectKey, Arc<ServiceRow>>,
    slices: BTreeMap<ObjectKey, Arc<EndpointSliceRow>>,
    slices_of: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    resolved: BTreeMap<ObjectKey, Frontends>,
    claims: BTreeMap<ServiceKey, BTreeSet<ObjectKey>>,
}

impl Model {
    /// An empty model.
    #[must_use]
    pub fn new(node_local: Option<NodeLocalService>) -> Self {
        Self { node_local, ..Self::default() }
    }

    /// Takes changes over and returns the frontends that they may have touched.
    pub fn update(
        &mut self,
        services: Delta<ObjectKey, ServiceRow>,
        slices: Delta<ObjectKey, EndpointSliceRow>,
    ) -> BTreeSet<ServiceKey> {
        let mut dirty = self.take_services(services);
        dirty.extend(self.take_slices(slices));
        let mut touched = BTreeSet::new();
        for service in dirty {
            self.resolve(&service, &mut touched);
        }
        touched
    }

    /// What a frontend should lead to; `None` if nobody has it.
    #[must_use]
    pub fn backends(&self, frontend: &ServiceKey) -> Option<&BTreeSet<Backend>> {
        self.resolved.get(self.owner(frontend)?)?.get(frontend)
    }

    /// The service that has a frontend: of several that claim it, the first by name.
    #[must_use]
    pub fn owner(&self, frontend: &ServiceKey) -> Option<&ObjectKey> {
        self.claims.get(frontend)?.first()
    }

    /// Every frontend that should exist.
    pub fn frontends(&self) -> impl Iterator<Item = &ServiceKey> {
        self.claims.keys()
    }

    /// Services that claim a frontend which another service has: `(loser, frontend, owner)`.
    pub fn conflicts(&self) -> impl Iterator<Item = (&ObjectKey, &ServiceKey, &ObjectKey)> {
        self.claims.iter().flat_map(|(frontend, claimants)| {
            let owner = claimants.first();
            claimants.iter().skip(1).filter_map(move |loser| Some((loser, frontend, owner?)))
        })
    }

    /// Services that are not programmed since they use fields this agent does not implement.
    pub fn unsupported(&self) -> impl Iterator<Item = (&ObjectKey, &[Box<str>])> {
        self.services
            .iter()
            .filter(|(_, row)| !row.unsupported.is_empty())
            .map(|(key, row)| (key, row.unsupported.as_slice()))
    }

    fn take_services(&mut self, delta: Delta<ObjectKey, ServiceRow>) -> BTreeSet<ObjectKey> {
        let mut dirty = BTreeSet::new();
        if delta.full {
            dirty.extend(self.services.keys().cloned());
            self.services.clear();
        }
        for (key, row) in delta.upserts {
            dirty.insert(key.clone());
            self.services.insert(key, row);
        }
        for key in delta.deletes {
            self.services.remove(&key);
            dirty.insert(key);
        }
        dirty
    }

    fn take_slices(&mut self, delta: Delta<ObjectKey, EndpointSliceRow>) -> BTreeSet<ObjectKey> {
        let mut dirty = BTreeSet::new();
        if delta.full {
            dirty.extend(self.slices_of.keys().cloned());
            self.slices.clear();
            self.slices_of.clear();
        }
        for (key, row) in delta.upserts {
            dirty.extend(self.drop_slice(&key));
            dirty.insert(row.service.clone());
            self.slices_of.entry(row.service.clone()).or_default().insert(key.clone());
            self.slices.insert(key, row);
        }
        for key in delta.deletes {
            dirty.extend(self.drop_slice(&key));
        }
        dirty
    }

    fn drop_slice(&mut self, key: &ObjectKey) -> Option<ObjectKey> {
        let row = self.slices.remove(key)?;
        if let Some(of) = self.slices_of.get_mut(&row.service) {
            of.remove(key);
            if of.is_empty() {
                self.slices_of.remove(&row.service);
            }
        }
        Some(row.service.clone())
    }

    fn resolve(&mut self, key: &ObjectKey, touched: &mut BTreeSet<ServiceKey>) {
        let new = match self.services.get(key) {
            Some(row) => {
                let slices: Vec<&EndpointSliceRow> = self
                    .slices_of
                    .get(key)
                    .into_iter()
                    .flatten()
                    .filter_map(|slice| self.slices.get(slice).map(Arc::as_ref))
                    .collect();
                let local = self.node_local.as_ref().filter(|local| local.service == *key);
                frontends(row, &slices, local.map(|local| local.address))
            }
            None => Frontends::new(),
        };
        let old = self.resolved.remove(key).unwrap_or_default();
        for frontend in old.keys().filter(|frontend| !new.contains_key(*frontend)) {
            if let Some(claimants) = self.claims.get_mut(frontend) {
                claimants.remove(key);
                if claimants.is_empty() {
                    self.claims.remove(frontend);
                }
            }
        }
        for frontend in new.keys() {
            self.claims.entry(*frontend).or_default().insert(key.clone());
        }
        touched.extend(old.keys().chain(new.keys()));
        if !new.is_empty() {
            self.resolved.insert(key.clone(), new);
        }
    }
}

/// Every frontend of a service with its backends; `node_local` replaces its endpoints.
#[must_use]
pub fn frontends(
    row: &ServiceRow,
    slices: &[&EndpointSliceRow],
    node_local: Option<IpAddr>,
) -> Frontends {
    let mut frontends = Frontends::new();
    let has_address = match row.kind {
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => true,
        ServiceKind::Headless | ServiceKind::ExternalName => false,
    };
    if !has_address || !row.unsupported.is_empty() {
        return frontends;
    }
    for port in &row.ports {
        let backends = match node_local {
            Some(address) => BTreeSet::from([backend(Addr::from(address), port.port)]),
            None => backends(row, port, slices),
        };
        let addresses = row.cluster_ips.iter().chain(&row.external_ips).chain(&row.ingress_ips);
        for address in addresses.filter_map(ipv4) {
            frontends.insert(key(address, port.port, port.protocol), backends.clone());
        }
        if port.node_port != 0 {
            let frontend = key(Addr::ANY_V4, port.node_port, port.protocol);
            frontends.insert(frontend, backends);
        }
    }
    frontends
}

/// Ready endpoints; if there is none, those that still serve while they terminate (KEP-1669).
fn backends(
    row: &ServiceRow,
    port: &ServicePort,
    slices: &[&EndpointSliceRow],
) -> BTreeSet<Backend> {
    let with_port = || {
        slices.iter().flat_map(move |slice| {
            let port = slice
                .ports
                .iter()
                .find(|one| one.name == port.name && one.protocol == port.protocol);
            port.into_iter().flat_map(move |port| {
                slice.endpoints.iter().map(move |endpoint| (endpoint, port.port))
            })
        })
    };
    let choose = |wanted: fn(&EndpointRow) -> bool| -> BTreeSet<Backend> {
        with_port()
            .filter(|(endpoint, _)| wanted(endpoint))
            .filter_map(|(endpoint, port)| Some(backend(ipv4(&endpoint.ip)?, port)))
            .collect()
    };
    if row.publish_not_ready {
        return choose(|_| true);
    }
    let ready = choose(|endpoint| endpoint.ready);
    if ready.is_empty() {
        return choose(|endpoint| endpoint.serving && endpoint.terminating);
    }
    ready
}

fn ipv4(address: &IpAddr) -> Option<Addr> {
    match address {
        IpAddr::V4(_) => Some(Addr::from(*address)),
        IpAddr::V6(_) => None,
    }
}

const fn backend(addr: Addr, port: u16) -> Backend {
    Backend { addr, port: port.to_be_bytes(), reserved: [0; 2] }
}

/// The map key of a frontend.
#[must_use]
pub const fn key(addr: Addr, port: u16, protocol: Protocol) -> ServiceKey {
    let proto = match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    };
    ServiceKey { addr, port: port.to_be_bytes(), proto, scope: SCOPE_INTERNAL }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
