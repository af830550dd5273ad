//! Objects as controllers see them: decoded once per watch event. Pure.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::json::{boolean, integer, items, labels_at, text, time};
use crate::client::{ObjectRef, Resource};

pub(crate) type Labels = BTreeMap<String, String>;

const fn core(plural: &'static str) -> Resource {
    Resource { group: "", version: "v1", plural }
}

pub(crate) const PODS: Resource = core("pods");
pub(crate) const NODES: Resource = core("nodes");
pub(crate) const SERVICES: Resource = core("services");
pub(crate) const ENDPOINTS: Resource = core("endpoints");
pub(crate) const NAMESPACES: Resource = core("namespaces");
pub(crate) const SERVICE_ACCOUNTS: Resource = core("serviceaccounts");
pub(crate) const CONFIG_MAPS: Resource = core("configmaps");
pub(crate) const SECRETS: Resource = core("secrets");
pub(crate) const EVENTS: Resource = core("events");
pub(crate) const DEPLOYMENTS: Resource =
    Resource { group: "apps", version: "v1", plural: "deployments" };
pub(crate) const REPLICA_SETS: Resource =
    Resource { group: "apps", version: "v1", plural: "replicasets" };
pub(crate) const ENDPOINT_SLICES: Resource =
    Resource { group: "discovery.k8s.io", version: "v1", plural: "endpointslices" };
pub(crate) const LEASES: Resource =
    Resource { group: "coordination.k8s.io", version: "v1", plural: "leases" };
pub(crate) const CSRS: Resource =
    Resource { group: "certificates.k8s.io", version: "v1", plural: "certificatesigningrequests" };

/// A kind that is watched: what garbage collection and namespaces need to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub resource: Resource,
    /// As in `kind:`.
    pub kind: &'static str,
    pub namespaced: bool,
}

const fn kind(resource: Resource, kind: &'static str, namespaced: bool) -> Kind {
    Kind { resource, kind, namespaced }
}

/// The kinds that the controllers here read or write; a server that has more passes them too.
pub const KINDS: [Kind; 14] = [
    kind(NAMESPACES, "Namespace", false),
    kind(NODES, "Node", false),
    kind(CSRS, "CertificateSigningRequest", false),
    kind(PODS, "Pod", true),
    kind(SERVICES, "Service", true),
    kind(ENDPOINTS, "Endpoints", true),
    kind(SERVICE_ACCOUNTS, "ServiceAccount", true),
    kind(CONFIG_MAPS, "ConfigMap", true),
    kind(SECRETS, "Secret", true),
    kind(EVENTS, "Event", true),
    kind(DEPLOYMENTS, "Deployment", true),
    kind(REPLICA_SETS, "ReplicaSet", true),
    kind(ENDPOINT_SLICES, "EndpointSlice", true),
    kind(LEASES, "Lease", true),
];

/// Name of an object inside its resource; the namespace is empty for cluster-scoped ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    pub(crate) fn at(&self, resource: Resource) -> ObjectRef {
        ObjectRef { resource, namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

/// An entry of `metadata.ownerReferences`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) controller: bool,
    pub(crate) block_deletion: bool,
}

/// `metadata`, as far as controllers read it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Meta {
    pub(crate) key: Key,
    pub(crate) uid: String,
    /// The store's revision at the last write; 0 when absent.
    pub(crate) revision: u64,
    pub(crate) generation: i64,
    pub(crate) labels: Labels,
    pub(crate) owners: Vec<Owner>,
    pub(crate) finalizers: Vec<String>,
    pub(crate) created: Timestamp,
    /// `deletionTimestamp`.
    pub(crate) deleted: Option<Timestamp>,
}

impl Meta {
    fn decode(value: &Value) -> Option<Self> {
        let owners = items(value, "/metadata/ownerReferences")
            .iter()
            .map(|owner| Owner {
                api_version: text(owner, "/apiVersion").to_owned(),
                kind: text(owner, "/kind").to_owned(),
                name: text(owner, "/name").to_owned(),
                uid: text(owner, "/uid").to_owned(),
                controller: boolean(owner, "/controller"),
                block_deletion: boolean(owner, "/blockOwnerDeletion"),
            })
            .collect();
        let name = text(value, "/metadata/name");
        (!name.is_empty()).then(|| Self {
            key: Key::new(text(value, "/metadata/namespace"), name),
            uid: text(value, "/metadata/uid").to_owned(),
            revision: revision(value),
            generation: integer(value, "/metadata/generation").unwrap_or(0),
            labels: labels_at(value, "/metadata/labels"),
            owners,
            finalizers: items(value, "/metadata/finalizers")
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            created: time(value, "/metadata/creationTimestamp").unwrap_or(Timestamp::UNIX_EPOCH),
            deleted: time(value, "/metadata/deletionTimestamp"),
        })
    }

    /// The owner that manages this object.
    pub(crate) fn controller(&self) -> Option<&Owner> {
        self.owners.iter().find(|owner| owner.controller)
    }

    pub(crate) fn has_finalizer(&self, name: &str) -> bool {
        self.finalizers.iter().any(|finalizer| finalizer == name)
    }
}

/// `metadata.resourceVersion` as the store's revision.
pub(crate) fn revision(value: &Value) -> u64 {
    text(value, "/metadata/resourceVersion").parse().unwrap_or(0)
}

/// A pod's phase, in the order in which upstream prefers to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Pending,
    Unknown,
    Running,
    Succeeded,
    Failed,
}

/// A named container port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedPort {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) port: i64,
}

/// What is kept of a pod's spec and status; the rest would be most of a big cluster's memory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodFacts {
    /// `spec.nodeName`, empty while unassigned.
    pub(crate) node: String,
    pub(crate) phase: Phase,
    pub(crate) ready: bool,
    pub(crate) ready_since: Option<Timestamp>,
    pub(crate) restarts: i64,
    /// Annotation `controller.kubernetes.io/pod-deletion-cost`, 0 by default.
    pub(crate) deletion_cost: i64,
    pub(crate) ips: Vec<String>,
    pub(crate) hostname: String,
    pub(crate) subdomain: String,
    pub(crate) ports: Vec<NamedPort>,
    /// `spec.tolerations` as they are.
    pub(crate) tolerations: Value,
}

impl PodFacts {
    fn decode(value: &Value) -> Self {
        let ready = items(value, "/status/conditions")
            .iter()
            .find(|condition| text(condition, "/type") == "Ready");
        let mut ips: Vec<String> = items(value, "/status/podIPs")
            .iter()
            .map(|ip| text(ip, "/ip").to_owned())
            .filter(|ip| !ip.is_empty())
            .collect();
        let ip = text(value, "/status/podIP");
        if ips.is_empty() && !ip.is_empty() {
            ips.push(ip.to_owned());
        }
        Self {
            node: text(value, "/spec/nodeName").to_owned(),
            phase: match text(value, "/status/phase") {
                "Running" => Phase::Running,
                "Succeeded" => Phase::Succeeded,
                "Failed" => Phase::Failed,
                "Unknown" => Phase::Unknown,
                _ => Phase::Pending,
            },
            ready: ready.is_some_and(|condition| text(condition, "/status") == "True"),
            ready_since: ready.and_then(|condition| time(condition, "/lastTransitionTime")),
            restarts: items(value, "/status/containerStatuses")
                .iter()
                .filter_map(|status| integer(status, "/restartCount"))
                .sum(),
            deletion_cost: value
                .pointer("/metadata/annotations/controller.kubernetes.io~1pod-deletion-cost")
                .and_then(Value::as_str)
                .and_then(|cost| cost.parse().ok())
                .unwrap_or(0),
            ips,
            hostname: text(value, "/spec/hostname").to_owned(),
            subdomain: text(value, "/spec/subdomain").to_owned(),
            ports: named_ports(value),
            tolerations: value.pointer("/spec/tolerations").cloned().unwrap_or(Value::Null),
        }
    }

    /// Whether all containers have ended for good.
    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }
}

fn named_ports(pod: &Value) -> Vec<NamedPort> {
    let sidecars = items(pod, "/spec/initContainers")
        .iter()
        .filter(|container| text(container, "/restartPolicy") == "Always");
    items(pod, "/spec/containers")
        .iter()
        .chain(sidecars)
        .flat_map(|container| items(container, "/ports"))
        .filter(|port| !text(port, "/name").is_empty())
        .map(|port| NamedPort {
            name: text(port, "/name").to_owned(),
            protocol: match text(port, "/protocol") {
                "" => "TCP".to_owned(),
                protocol => protocol.to_owned(),
            },
            port: integer(port, "/containerPort").unwrap_or(0),
        })
        .collect()
}

/// An object of any watched resource.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) resource: Resource,
    pub(crate) meta: Meta,
    /// The whole object; null where only the metadata matters, and for pods, which have `pod`.
    pub(crate) value: Arc<Value>,
    pub(crate) pod: Option<PodFacts>,
    /// When this state was first seen here, by our clock. Node leases are judged by it, as clocks
    /// of nodes may be wrong.
    pub(crate) seen: Timestamp,
}

impl Object {
    /// `None` for a value without a name, which no server sends.
    pub(crate) fn decode(resource: Resource, value: &Arc<Value>, seen: Timestamp) -> Option<Self> {
        let meta = Meta::decode(value)?;
        let pod = (resource == PODS).then(|| PodFacts::decode(value));
        let value = if resource == EVENTS {
            Arc::new(event_times(value))
        } else if keeps_value(resource, value, &meta.key) {
            Arc::clone(value)
        } else {
            Arc::new(Value::Null)
        };
        Some(Self { resource, meta, value, pod, seen })
    }

    pub(crate) fn place(&self) -> ObjectRef {
        self.meta.key.at(self.resource)
    }
}

/// All that is kept of an Event.
fn event_times(event: &Value) -> Value {
    json!({
        "lastTimestamp": event.get("lastTimestamp"),
        "eventTime": event.get("eventTime"),
        "series": {"lastObservedTime": event.pointer("/series/lastObservedTime")},
    })
}

fn keeps_value(resource: Resource, value: &Value, key: &Key) -> bool {
    if resource == SECRETS {
        return text(value, "/type") == "bootstrap.kubernetes.io/token";
    }
    if resource == CONFIG_MAPS {
        return matches!(key.name.as_str(), "kube-root-ca.crt" | "cluster-info");
    }
    [NODES, SERVICES, ENDPOINTS, NAMESPACES, DEPLOYMENTS, REPLICA_SETS, ENDPOINT_SLICES, CSRS]
        .contains(&resource)
}
