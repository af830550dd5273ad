//! The smaller kinds. Pure.

use api::names;
use serde_json::{Value, json};

use super::{address, immutable, invalid, list, positive};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Most bytes of data in a ConfigMap or Secret (upstream: 1 MiB).
const DATA: usize = 1 << 20;

fn data(errors: &mut Vec<FieldError>, object: &Value, fields: &[&str]) {
    let mut size = 0;
    for field in fields {
        let path = Path::new(field);
        for (key, value) in object[*field].as_object().into_iter().flatten() {
            invalid(errors, &path.key(key), &json!(key), names::config_map_key(key));
            size += value.as_str().map_or(0, str::len);
        }
    }
    if size > DATA {
        errors.push(FieldError::too_long(&Path::root(), DATA));
    }
}

fn frozen(errors: &mut Vec<FieldError>, object: &Value, old: Option<&Value>, fields: &[&str]) {
    let Some(old) = old.filter(|old| old["immutable"] == true) else { return };
    if object["immutable"] != true {
        let path = Path::new("immutable");
        errors.push(FieldError::forbidden(&path, "field is immutable when `immutable` is set"));
    }
    for field in fields {
        if object[*field] != old[*field] {
            let path = Path::new(field);
            errors.push(FieldError::forbidden(&path, "field is immutable when `immutable` is set"));
        }
    }
}

pub(super) fn config_map(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    data(&mut errors, object, &["data", "binaryData"]);
    for key in object["data"].as_object().into_iter().flat_map(|map| map.keys()) {
        if object["binaryData"].get(key).is_some() {
            let path = Path::new("data").key(key);
            let why = "duplicate of key present in binaryData";
            errors.push(FieldError::invalid(&path, &json!(key), why));
        }
    }
    frozen(&mut errors, object, old, &["data", "binaryData"]);
    errors
}

pub(super) fn secret(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    data(&mut errors, object, &["data"]);
    let required: &[&str] = match text(object, "/type") {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in required {
        if object["data"].get(key).is_none() {
            errors.push(FieldError::required(&Path::new("data").key(key), ""));
        }
    }
    if let Some(old) = old {
        immutable(&mut errors, &Path::new("type"), &object["type"], &old["type"]);
    }
    frozen(&mut errors, object, old, &["data"]);
    errors
}

pub(super) fn node(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (index, taint) in list(&object["spec"], "taints") {
        let path = Path::new("spec.taints").index(index);
        let key = text(taint, "/key");
        invalid(&mut errors, &path.child("key"), &taint["key"], names::qualified_name(key));
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        super::one_of(&mut errors, &path.child("effect"), &taint["effect"], &effects);
    }
    let path = Path::new("spec.podCIDRs");
    let cidrs = address::texts(&object["spec"]["podCIDRs"]);
    let stored = old.map_or_else(Vec::new, |old| address::texts(&old["spec"]["podCIDRs"]));
    for (index, cidr) in cidrs.iter().enumerate() {
        address::cidr(&mut errors, &path.index(index), cidr, &stored);
    }
    if cidrs.len() > 1 && !address::is_dual(&cidrs) {
        let why = "may specify no more than one CIDR for each IP family";
        errors.push(FieldError::invalid(&path, &json!(cidrs), why));
    }
    let Some(old) = old else { return errors };
    if !stored.is_empty() && stored != cidrs {
        let why = "node updates may not change podCIDR except from \"\" to valid";
        errors.push(FieldError::forbidden(&path, why));
    }
    let (id, before) = (&object["spec"]["providerID"], &old["spec"]["providerID"]);
    if before.as_str().is_some_and(|text| !text.is_empty()) && id != before {
        let why = "node updates may not change providerID except from \"\" to valid";
        errors.push(FieldError::forbidden(&Path::new("spec.providerID"), why));
    }
    errors
}

/// Upstream's `validatePodIPs`.
pub(super) fn pod_status(pod: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let path = Path::new("podIPs");
    let ips: Vec<String> =
        list(&pod["status"], "podIPs").map(|(_, ip)| text(ip, "/ip").to_owned()).collect();
    for (index, ip) in ips.iter().enumerate() {
        address::ip(&mut errors, &path.index(index), ip, &[]);
        if ips[..index].contains(ip) {
            let value = json!({"IP": ip});
            errors.push(FieldError::duplicate(&path.index(index), &value));
        }
    }
    if ips.len() > 1 && !address::is_dual(&ips) {
        let value = &pod["status"]["podIPs"];
        let why = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(&path, value, why));
    }
    errors
}

pub(super) fn lease(object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let spec = &object["spec"];
    let path = Path::new("spec.leaseDurationSeconds");
    positive(&mut errors, &path, &spec["leaseDurationSeconds"]);
    let path = Path::new("spec.leaseTransitions");
    super::non_negative(&mut errors, &path, &spec["leaseTransitions"]);
    errors
}

pub(super) fn signing_request(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let spec = &object["spec"];
    for (field, empty) in [
        ("request", text(spec, "/request").is_empty()),
        ("signerName", text(spec, "/signerName").is_empty()),
        ("usages", list(spec, "usages").next().is_none()),
    ] {
        if empty {
            errors.push(FieldError::required(&Path::new("spec").child(field), ""));
        }
    }
    if old.is_some_and(|old| old["spec"] != *spec) {
        errors.push(FieldError::invalid(&Path::new("spec"), spec, "field is immutable"));
    }
    errors
}

pub(super) fn event(object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let about = text(object, "/involvedObject/namespace");
    let own = text(object, "/metadata/namespace");
    let fits =
        if about.is_empty() { own == "default" || own == "kube-system" } else { about == own };
    if !fits {
        let path = Path::new("involvedObject.namespace");
        let why = "does not match event.namespace";
        errors.push(FieldError::invalid(&path, &json!(about), why));
    }
    errors
}
