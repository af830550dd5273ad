//! From API objects to rows. Pure.
//!
//! An object that contradicts itself (an address that is none, a port out of range) loses that part
//! only, and the row says which; a field that the dataplane does not implement is named in the row,
//! so that the service is not programmed as if the field were not there.

mod service;
mod slice;

use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::ObjectMeta};

pub use service::service;
pub use slice::endpoint_slice;

use crate::model::{NodeRow, ObjectKey, Protocol};

/// The cluster autoscaler's taint of a node that it is about to delete
/// (<https://github.com/kubernetes/autoscaler/blob/e80ab518340f88f364fe3ef063f8303755125971/cluster-autoscaler/utils/deletetaint/delete.go#L36>).
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// The key and row of a node.
#[must_use]
pub fn node(object: &Node) -> Option<(ObjectKey, NodeRow)> {
    let key = key(&object.metadata)?;
    let status = object.status.as_ref();
    let internal = status
        .and_then(|status| status.addresses.as_ref())
        .into_iter()
        .flatten()
        .filter(|address| address.type_ == "InternalIP")
        .map(|address| address.address.as_str());
    let spec = object.spec.as_ref();
    let many = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let one = spec.and_then(|spec| spec.pod_cidr.clone());
    let cidrs = if many.is_empty() { one.into_iter().collect() } else { many };
    let ready = status
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let taints = spec.and_then(|spec| spec.taints.as_deref()).into_iter().flatten();
    let leaving = object.metadata.deletion_timestamp.is_some()
        || taints.into_iter().any(|taint| taint.key == TO_BE_DELETED);
    let row = NodeRow {
        internal_ips: internal.filter_map(|text| text.parse().ok()).collect(),
        pod_cidrs: cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect(),
        ready,
        leaving,
        labels: object.metadata.labels.clone().unwrap_or_default(),
    };
    Some((key, row))
}

/// Namespace and name of an object.
#[must_use]
pub fn key(metadata: &ObjectMeta) -> Option<ObjectKey> {
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    Some(ObjectKey::new(namespace, metadata.name.as_deref()?))
}

/// A protocol by its name; absent means TCP.
fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests;
