//! What upstream checks of a status. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{address, invalid, list, non_negative};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Upstream's `ValidatePodStatusUpdate`, as far as it is about fields by themselves.
pub(super) fn pod(pod: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let (path, status) = (Path::new("status"), &pod["status"]);
    let before = old.map_or(&Value::Null, |old| &old["status"]);
    for (index, condition) in list(status, "conditions") {
        let kind = text(condition, "/type");
        // Upstream takes the name in Go for that in JSON, and looks at its own types alone for more.
        let path = path.child("conditions").index(index).child("Type");
        invalid(&mut errors, &path, &json!(kind), names::qualified_name(kind));
    }
    let nominated = &status["nominatedNodeName"];
    if let Some(name) = nominated.as_str()
        && before["nominatedNodeName"] != *nominated
    {
        let reasons = names::dns1123_subdomain(name);
        invalid(&mut errors, &path.child("nominatedNodeName"), nominated, reasons);
    }
    let (class, stored) = (&status["qosClass"], &before["qosClass"]);
    if class != stored && class.is_string() && stored.is_string() {
        super::immutable(&mut errors, &path.child("qosClass"), class, stored);
    }
    ips(&mut errors, &path.child("podIPs"), (&status["podIPs"], &before["podIPs"]));
    let hosts = &status["hostIPs"];
    if let Some(first) = hosts.get(0)
        && text(first, "/ip") != text(status, "/hostIP")
    {
        let path = path.child("hostIPs").index(0).child("ip");
        let why = "must be equal to `hostIP`";
        errors.push(FieldError::invalid(&path, &json!(text(first, "/ip")), why));
    }
    ips(&mut errors, &path.child("hostIPs"), (hosts, &before["hostIPs"]));
    errors
}

/// Upstream's `validatePodIPs`, and the same of hosts.
fn ips(errors: &mut Vec<FieldError>, path: &Path, (new, old): (&Value, &Value)) {
    let all = |value: &Value| -> Vec<String> {
        let items = value.as_array().into_iter().flatten();
        items.map(|one| text(one, "/ip").to_owned()).collect()
    };
    let (ips, stored) = (all(new), all(old));
    for (index, ip) in ips.iter().enumerate() {
        address::ip(errors, &path.index(index), ip, &stored);
    }
    if ips.len() > 1 && !address::is_dual(&ips) {
        let shown: Value = ips.iter().map(|ip| json!({ "IP": ip })).collect();
        let why = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(path, &shown, why));
    }
}

/// A Deployment's or ReplicaSet's.
pub(super) fn workload(object: &Value) -> Vec<FieldError> {
    let (mut errors, path, status) = (Vec::new(), Path::new("status"), &object["status"]);
    let own = match object["kind"].as_str() {
        Some("ReplicaSet") => ["fullyLabeledReplicas", "terminatingReplicas", "", ""],
        _ => ["updatedReplicas", "terminatingReplicas", "unavailableReplicas", "collisionCount"],
    };
    let common = ["replicas", "readyReplicas", "availableReplicas", "observedGeneration"];
    for field in common.into_iter().chain(own).filter(|field| !field.is_empty()) {
        non_negative(&mut errors, &path.child(field), &status[field]);
    }
    let count = |field: &str| status[field].as_i64().unwrap_or(0);
    let mut within = |field: &str, most: &str, named: &str| {
        if count(field) > count(most) {
            let why = format!("cannot be greater than {named}");
            errors.push(FieldError::invalid(&path.child(field), &json!(count(field)), why));
        }
    };
    for field in [own[0], "readyReplicas", "availableReplicas"] {
        within(field, "replicas", "status.replicas");
    }
    within("availableReplicas", "readyReplicas", "readyReplicas");
    errors
}

pub(super) fn namespace(object: &Value) -> Vec<FieldError> {
    let deleting = object["metadata"].get("deletionTimestamp").is_some();
    let (wanted, when) = if deleting {
        ("Terminating", "may only be 'Terminating' if `deletionTimestamp` is not empty")
    } else {
        ("Active", "may only be 'Active' if `deletionTimestamp` is empty")
    };
    let phase = text(object, "/status/phase");
    if phase == wanted {
        return Vec::new();
    }
    vec![FieldError::invalid(&Path::new("status.Phase"), &json!(phase), when)]
}

/// Where a Node can be reached, each way once.
pub(super) fn node_addresses(object: &Value) -> Vec<FieldError> {
    let mut known = BTreeSet::new();
    let twice = list(&object["status"], "addresses")
        .filter(|(_, one)| !known.insert((one["type"].as_str(), one["address"].as_str())));
    let path = Path::new("status.addresses");
    twice
        .map(|(index, one)| {
            let shown = json!({"Type": one["type"], "Address": one["address"]});
            FieldError::duplicate(&path.index(index), &shown)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};

    #[test]
    fn of_a_pod() {
        let said = |new: Value, old: Value| {
            lines(&pod(&json!({ "status": new }), Some(&json!({ "status": old }))))
        };
        let pair = json!([{"ip": "1.2.3.4"}, {"ip": "1.2.3.5"}]);
        let bad = json!([{"ip": "010.1.1.1"}]);
        let table = [
            (
                json!({"podIPs": pair}),
                json!({}),
                "status.podIPs: Invalid value: [{\"IP\":\"1.2.3.4\"},{\"IP\":\"1.2.3.5\"}]: may specify no more than one IP for each IP family",
            ),
            (
                json!({"podIPs": bad}),
                json!({}),
                "status.podIPs[0]: Invalid value: \"010.1.1.1\": must not have leading 0s",
            ),
            (json!({"podIPs": bad}), json!({"podIPs": bad}), ""),
            (
                json!({"hostIPs": [{"ip": "1.2.3.4"}]}),
                json!({}),
                "status.hostIPs[0].ip: Invalid value: \"1.2.3.4\": must be equal to `hostIP`",
            ),
            (json!({"hostIP": "1.2.3.4", "hostIPs": [{"ip": "1.2.3.4"}]}), json!({}), ""),
            (
                json!({"qosClass": "X"}),
                json!({"qosClass": "BestEffort"}),
                "status.qosClass: Invalid value: \"X\": field is immutable",
            ),
            (json!({"nominatedNodeName": "X_"}), json!({"nominatedNodeName": "X_"}), ""),
        ];
        for (new, old, want) in table {
            assert_eq!(said(new.clone(), old), want, "{new}");
        }
        let condition = json!({"conditions": [{"type": "a b"}]});
        assert!(said(condition, json!({})).starts_with("status.conditions[0].Type: Invalid"));
    }

    #[test]
    fn of_workloads_namespaces_and_nodes() {
        assert_eq!(
            lines(&workload(
                &json!({"kind": "Deployment", "status": {"replicas": 1, "availableReplicas": 2,
                "readyReplicas": 1, "updatedReplicas": 1, "collisionCount": -1}})
            )),
            "status.collisionCount: Invalid value: -1: must be greater than or equal to 0\n\
             status.availableReplicas: Invalid value: 2: cannot be greater than status.replicas\n\
             status.availableReplicas: Invalid value: 2: cannot be greater than readyReplicas"
        );
        let namespace_of = |phase: &str| lines(&namespace(&json!({"status": {"phase": phase}})));
        assert_eq!(namespace_of("Active"), "");
        assert!(namespace_of("X").starts_with("status.Phase: Invalid value: \"X\""));
        let one = json!({"type": "InternalIP", "address": "1.1.1.1"});
        assert_eq!(
            lines(&node_addresses(&json!({"status": {"addresses": [one, one]}}))),
            "status.addresses[1]: Duplicate value: {\"Address\":\"1.1.1.1\",\"Type\":\"InternalIP\"}"
        );
    }
}
