//! What selectors may ask of each resource. Pure.

use serde_json::Value;

use crate::{
    admission::Allocated,
    store::{Attributes, Class},
};

/// A Service's addresses and node ports, as [`Allocated::print`] writes them. Not selectable.
pub const TAKEN: &str = "taken";

/// The fields that a resource (`group/plural`) can be selected by, besides `metadata.name` and
/// `metadata.namespace` (upstream's `SelectableFields`).
#[must_use]
pub fn selectable(resource: &str) -> &'static [&'static str] {
    match resource {
        "core/pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "core/nodes" => &["spec.unschedulable"],
        "core/namespaces" => &["status.phase"],
        "core/secrets" => &["type"],
        "core/services" => &["spec.clusterIP", "spec.type"],
        "core/events" | "events.k8s.io/events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "apps/replicasets" | "core/replicationcontrollers" => &["status.replicas"],
        "batch/jobs" => &["status.successful"],
        "certificates.k8s.io/certificatesigningrequests" => &["spec.signerName"],
        _ => &[],
    }
}

/// Takes out what selectors ask about.
#[must_use]
pub fn attributes(resource: &str, object: &Value) -> Attributes {
    let labels = object.pointer("/metadata/labels").and_then(Value::as_object);
    let mut labels: Vec<(Box<str>, Box<str>)> = labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.as_str().into(), value.as_str()?.into())))
        .collect();
    labels.sort();
    let mut fields: Vec<(&'static str, Box<str>)> = selectable(resource)
        .iter()
        .filter_map(|field| Some((*field, text(object, field)?.into_boxed_str())))
        .collect();
    if resource == "core/services" {
        fields.push((TAKEN, Allocated::print(object).into()));
    }
    Attributes { labels: labels.into(), fields: fields.into() }
}

fn text(object: &Value, field: &str) -> Option<String> {
    if field == "source" {
        return text(object, "source.component").or_else(|| text(object, "reportingComponent"));
    }
    if let ("status.successful", Some(count)) = (field, object.pointer("/status/succeeded")) {
        return Some(count.to_string());
    }
    let mut value = object;
    for part in field.split('.') {
        value = match value.get(part) {
            Some(value) => value,
            None if matches!(field, "spec.unschedulable" | "spec.hostNetwork") => {
                return Some("false".to_owned());
            }
            None => return None,
        };
    }
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Leases are rewritten every few seconds and Events only tell: neither is worth an fsync a write.
#[must_use]
pub fn class(resource: &str) -> Class {
    match resource {
        "coordination.k8s.io/leases" | "core/events" | "events.k8s.io/events" => Class::Volatile,
        _ => Class::Durable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_come_from_where_selectors_name_them() {
        let pod = json!({"metadata": {"labels": {"b": "2", "a": "1"}}, "spec": {"nodeName": "n"}});
        let found = attributes("core/pods", &pod);
        assert_eq!(found.label("a"), Some("1"));
        assert_eq!(found.field("spec.nodeName"), "n");
        assert_eq!(found.field("spec.hostNetwork"), "false");
        assert_eq!(found.field("status.phase"), "");
        let event = json!({"source": {"component": "kubelet"}});
        assert_eq!(attributes("core/events", &event).field("source"), "kubelet");
    }
}
