//! Every frontend as it is programmed, with what stands behind it: what `node-agent services` shows.
//!
//! Pure. A cluster may have a hundred thousand services, so they are told a page at a time: at most
//! [`SERVICES`] of them, or as many as have [`ROWS`] frontends and backends, in the order of their names.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    ops::Bound,
    sync::Arc,
};

use ebpf_common::service::{
    Backend, KEEP_SOURCE, SCOPE_EXTERNAL, SCOPE_INTERNAL, SOURCE_RANGES, Service, ServiceKey,
};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{
    frontends, host_ports,
    model::{Model, Problems},
    plan::Observed,
    status,
};
use crate::model::{EndpointRow, EndpointSliceRow, ObjectKey, ServiceKind, ServiceRow};

/// Services of one page.
pub const SERVICES: usize = 1_000;
/// Frontends and backends after which a page ends with the service that it is at.
pub const ROWS: usize = 20_000;
/// Backends that are told of one frontend; the others are counted.
pub const BACKENDS: usize = 1_000;

/// Which services are asked for, and where the page begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub namespace: Option<String>,
    /// Of a service, or of a pod with ports of the node.
    pub name: Option<String>,
    /// [`Page::next`] of the page before.
    pub after: Option<ObjectKey>,
}

/// Some of the frontends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub rows: Vec<FrontendRow>,
    /// What the page went up to, if there may be more.
    pub next: Option<ObjectKey>,
}

/// One frontend, or that a service has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendRow {
    /// The service, or the pod whose port of the node it is.
    pub service: ObjectKey,
    /// What leads to it, in the words of the API; of a service without a frontend, the service's type.
    pub kind: &'static str,
    /// As [`status::frontend`] has it.
    pub frontend: Option<String>,
    /// By slot.
    pub backends: Vec<BackendRow>,
    /// Backends beyond [`BACKENDS`].
    pub left_out: usize,
    /// Only backends of this node are chosen.
    pub is_local: bool,
    /// Seconds for which a client keeps its backend; 0 if it does not.
    pub affinity_s: u32,
    /// From where clients are let in; `None` lets everybody in.
    pub source_ranges: Option<Vec<IpNet>>,
    /// What is to be known of it; of the service as a whole, with its first row.
    pub problems: Vec<String>,
}

/// Who may be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendRow {
    pub address: SocketAddr,
    /// What its `EndpointSlice` says.
    pub state: &'static str,
    /// Empty where the slice names none.
    pub node: Box<str>,
}

/// What the answer is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight<'a> {
    pub(super) model: &'a Model,
    /// `None` until the maps were read.
    pub(super) observed: Option<&'a Observed>,
    /// Frontends that are not in the maps though they are to be.
    pub(super) missing: &'a BTreeSet<ServiceKey>,
    /// Services whose health check is not served.
    pub(super) unserved: &'a Problems,
}

impl Wanted {
    /// Where the services begin that may be wanted.
    fn start(&self) -> Bound<ObjectKey> {
        match (&self.after, &self.namespace) {
            (Some(after), _) => Bound::Excluded(after.clone()),
            (None, Some(namespace)) => Bound::Included(ObjectKey::new(namespace, "")),
            (None, None) => Bound::Unbounded,
        }
    }

    fn has_namespace(&self, key: &ObjectKey) -> bool {
        self.namespace.as_deref().is_none_or(|namespace| *namespace == *key.namespace)
    }

    /// Whether an object is wanted, wherever the page begins.
    #[must_use]
    pub fn names(&self, key: &ObjectKey) -> bool {
        self.has_namespace(key) && self.name.as_deref().is_none_or(|name| *name == *key.name)
    }
}

/// The page that is asked for.
pub(super) fn page(sight: Sight<'_>, wanted: &Wanted) -> Page {
    let mut page = Page::default();
    let (mut services, mut size, mut last) = (0, 0, None);
    let start = wanted.start();
    let all = sight.model.from(start.as_ref());
    for (key, row, slices) in all.take_while(|(key, ..)| wanted.has_namespace(key)) {
        let pod = host_ports::pod(key);
        if !wanted.names(pod.as_ref().unwrap_or(key)) {
            continue;
        }
        if services == SERVICES || size >= ROWS {
            page.next = last;
            return page;
        }
        let rows = OfService { sight, key, row, slices, pod }.rows();
        services += 1;
        size += rows.iter().map(|row| 1 + row.backends.len()).sum::<usize>();
        page.rows.extend(rows);
        last = Some(key.clone());
    }
    page
}

struct OfService<'a> {
    sight: Sight<'a>,
    key: &'a ObjectKey,
    row: &'a ServiceRow,
    slices: &'a [Arc<EndpointSliceRow>],
    /// It stands for this pod's ports of the node.
    pod: Option<ObjectKey>,
}

impl OfService<'_> {
    fn rows(&self) -> Vec<FrontendRow> {
        let mut rows = self.frontends();
        if rows.is_empty() {
            rows.push(self.nothing());
        }
        let whole = [self.sight.model.problems(), self.sight.unserved];
        let whole = whole.into_iter().filter_map(|problems| problems.get(self.key)).flatten();
        let fields = self.row.unsupported.iter();
        let fields = fields.map(|field| format!("{field} is not supported"));
        if let Some(first) = rows.first_mut() {
            first.problems.extend(fields.chain(whole.cloned()));
        }
        rows
    }

    fn frontends(&self) -> Vec<FrontendRow> {
        let Some(observed) = self.sight.observed else { return Vec::new() };
        let endpoints = self.endpoints();
        let ports = observed.ports_of(self.key).iter();
        let planned = ports.flat_map(|port| {
            let [_, local] = port.sets;
            port.frontends.iter().map(move |(key, row)| (key, row, local != 0 && row.set == local))
        });
        let mut rows: Vec<FrontendRow> = planned
            .map(|(key, row, is_local)| self.frontend((key, row), is_local, observed, &endpoints))
            .collect();
        let claims = frontends::claims(self.row);
        let both = |key: &ServiceKey| {
            [SCOPE_INTERNAL, SCOPE_EXTERNAL].map(|scope| ServiceKey { scope, ..*key })
        };
        for key in claims.iter().flat_map(both) {
            let Some(service) = observed.unclaimed(&key) else { continue };
            let is_local = service.flags & KEEP_SOURCE != 0;
            let mut row = self.frontend((&key, service), is_local, observed, &endpoints);
            row.problems
                .push("as an earlier agent left it, until the server has spoken".to_owned());
            rows.push(row);
        }
        rows
    }

    fn frontend(
        &self,
        (key, service): (&ServiceKey, &Service),
        is_local: bool,
        observed: &Observed,
        endpoints: &BTreeMap<IpAddr, &EndpointRow>,
    ) -> FrontendRow {
        let slots = observed.slots(service.set);
        let kind = self.kind(key);
        let is_limited = service.flags & SOURCE_RANGES != 0;
        let mut problems = Vec::new();
        if self.sight.missing.contains(key) {
            problems.push("not programmed: a map is full or could not be written".to_owned());
        }
        if kind == LOAD_BALANCER && !is_limited && !self.row.source_ranges.is_empty() {
            problems.push("open to all: no source range is of its family".to_owned());
        }
        FrontendRow {
            kind,
            frontend: Some(status::frontend(key)),
            backends: slots.iter().take(BACKENDS).map(|one| self.backend(one, endpoints)).collect(),
            left_out: slots.len().saturating_sub(BACKENDS),
            is_local,
            affinity_s: service.affinity_s,
            source_ranges: is_limited.then(|| observed.ranges_of(service.service)),
            problems,
            ..self.nothing()
        }
    }

    /// A service without frontends.
    fn nothing(&self) -> FrontendRow {
        let (kind, words) = match self.row.kind {
            ServiceKind::ClusterIp => (CLUSTER_IP, None),
            ServiceKind::NodePort => (NODE_PORT, None),
            ServiceKind::LoadBalancer => (LOAD_BALANCER, None),
            ServiceKind::Headless => ("Headless", Some("its name leads to pods")),
            ServiceKind::ExternalName => ("ExternalName", Some("its name leads to another name")),
        };
        FrontendRow {
            service: self.pod.as_ref().unwrap_or(self.key).clone(),
            kind: if self.pod.is_some() { HOST_PORT } else { kind },
            frontend: None,
            backends: Vec::new(),
            left_out: 0,
            is_local: false,
            affinity_s: 0,
            source_ranges: None,
            problems: words.map(str::to_owned).into_iter().collect(),
        }
    }

    fn kind(&self, key: &ServiceKey) -> &'static str {
        let ip = key.addr.ip();
        match () {
            () if self.pod.is_some() => HOST_PORT,
            () if key.addr == key.addr.any() => NODE_PORT,
            () if self.row.cluster_ips.contains(&ip) => CLUSTER_IP,
            () if self.row.ingress_ips.contains(&ip) => LOAD_BALANCER,
            () => "ExternalIP",
        }
    }

    fn endpoints(&self) -> BTreeMap<IpAddr, &EndpointRow> {
        let all = self.slices.iter().flat_map(|slice| &slice.endpoints);
        all.map(|endpoint| (endpoint.ip, endpoint)).collect()
    }

    fn backend(&self, backend: &Backend, endpoints: &BTreeMap<IpAddr, &EndpointRow>) -> BackendRow {
        let ip = backend.addr.ip();
        let address = SocketAddr::new(ip, u16::from_be_bytes(backend.port));
        let (state, node) = match endpoints.get(&ip) {
            Some(endpoint) => (state(endpoint), endpoint.node.clone()),
            None if self.sight.model.is_answered_here(self.key) => ("this node", "".into()),
            // It goes with the next round.
            None => ("gone", "".into()),
        };
        BackendRow { address, state, node }
    }
}

const CLUSTER_IP: &str = "ClusterIP";
const NODE_PORT: &str = "NodePort";
const LOAD_BALANCER: &str = "LoadBalancer";
const HOST_PORT: &str = "HostPort";

const fn state(endpoint: &EndpointRow) -> &'static str {
    match endpoint {
        EndpointRow { ready: true, .. } => "ready",
        EndpointRow { terminating: true, serving: true, .. } => "terminating",
        _ => "not ready",
    }
}

impl FrontendRow {
    /// The row for `-o json`.
    #[must_use]
    pub fn json(&self) -> Value {
        let backend = |one: &BackendRow| json!({"address": one.address.to_string(), "state": one.state, "node": &*one.node});
        json!({
            "namespace": &*self.service.namespace,
            "name": &*self.service.name,
            "kind": self.kind,
            "frontend": self.frontend,
            "backends": self.backends.iter().map(backend).collect::<Vec<_>>(),
            "backends_left_out": self.left_out,
            "policy": if self.is_local { "Local" } else { "Cluster" },
            "affinity_s": self.affinity_s,
            "source_ranges": self.source_ranges.as_ref()
                .map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>()),
            "problems": self.problems,
        })
    }
}

#[cfg(test)]
#[path = "listing_tests.rs"]
mod tests;
