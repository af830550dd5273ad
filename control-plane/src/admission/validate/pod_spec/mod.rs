//! Pod specs, of Pods and of templates, in the order and the words of upstream's `ValidatePodSpec`. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{
    address, invalid, labels, list, non_negative, one_of, port_or_name, positive, selector,
    supported,
};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

mod affinity;
mod annotations;
mod claims;
mod container;
mod dns;
mod env;
mod mounts;
mod paths;
mod probe;
mod resources;
mod scheduling;
mod security;
#[cfg(test)]
mod tests;
mod volumes;

pub(super) use annotations::annotations;
pub(super) use resources::amount;
pub(super) use scheduling::TAINT_EFFECTS;

/// What a spec is the spec of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// A Pod, new or changed.
    Pod,
    /// A template, of which Pods will be made.
    Template,
}

/// A Pod that is to be created.
pub(super) fn new_pod(object: &Value) -> Vec<FieldError> {
    let (mut errors, spec) = (Vec::new(), &object["spec"]);
    let own = &object["metadata"]["annotations"];
    annotations(&mut errors, &Path::new("metadata.annotations"), own, spec);
    let path = Path::new("spec");
    errors.extend(self::spec(Of::Pod, spec, &path));
    if list(spec, "ephemeralContainers").count() > 0 {
        let path = path.child("ephemeralContainers");
        errors.push(FieldError::forbidden(&path, "cannot be set on create"));
    }
    if !text(spec, "/nodeName").is_empty() && list(spec, "schedulingGates").count() > 0 {
        let why = "cannot be set until all schedulingGates have been cleared";
        errors.push(FieldError::forbidden(&path.child("nodeName"), why));
    }
    errors
}

pub(super) fn spec(of: Of, spec: &Value, path: &Path) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let volumes = volumes::volumes(&mut errors, &path.child("volumes"), spec);
    claims::of_pod(&mut errors, &path.child("resourceClaims"), spec);
    let around = container::Around { spec, volumes };
    container::containers(&mut errors, path, &around);
    container::init_containers(&mut errors, path, &around);
    container::ports_on_host(&mut errors, path, spec, of);
    policies(&mut errors, path, spec);
    labels(&mut errors, &path.child("nodeSelector"), &spec["nodeSelector"]);
    security::of_pod(&mut errors, path, spec);
    affinity::affinity(&mut errors, &path.child("affinity"), &spec["affinity"]);
    dns::config(&mut errors, &path.child("dnsConfig"), spec);
    scheduling::gates(&mut errors, path, spec);
    scheduling::spread(&mut errors, &path.child("topologySpreadConstraints"), spec);
    security::host_users(&mut errors, path, spec);
    deadline(&mut errors, path, spec);
    references(&mut errors, path, spec);
    dns::host_name(&mut errors, &path.child("hostnameOverride"), spec);
    scheduling::tolerations(&mut errors, &path.child("tolerations"), spec);
    dns::host_aliases(&mut errors, &path.child("hostAliases"), spec);
    preemption(&mut errors, &path.child("preemptionPolicy"), &spec["preemptionPolicy"]);
    resources::of_pod(&mut errors, &path.child("resources"), spec);
    let overhead = json!({"limits": spec["overhead"]});
    resources::resources(&mut errors, &path.child("overhead"), &overhead);
    system(&mut errors, &path.child("os"), &spec["os"]);
    match of {
        Of::Pod => {
            container::only_in_pods(&mut errors, path, spec);
            volumes::only_in_pods(&mut errors, &path.child("volumes"), spec);
        }
        Of::Template => only_templates(&mut errors, path, spec),
    }
    errors
}

fn policies(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let policies = ["Always", "OnFailure", "Never"];
    one_of(errors, &path.child("restartPolicy"), &spec["restartPolicy"], &policies);
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    one_of(errors, &path.child("dnsPolicy"), &spec["dnsPolicy"], &policies);
}

fn deadline(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let deadline = &spec["activeDeadlineSeconds"];
    if deadline.as_i64().is_some_and(|n| !(1..=i64::from(i32::MAX)).contains(&n)) {
        errors.push(FieldError::invalid(
            &path.child("activeDeadlineSeconds"),
            deadline,
            "must be between 1 and 2147483647, inclusive",
        ));
    }
}

/// Names of other objects, and the pod's own in the network.
fn references(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for (field, check) in [
        ("serviceAccountName", names::dns1123_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns1123_subdomain),
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
        ("priorityClassName", names::dns1123_subdomain),
        ("runtimeClassName", names::dns1123_subdomain),
    ] {
        if let Some(word) = spec[field].as_str().filter(|word| !word.is_empty()) {
            invalid(errors, &path.child(field), &spec[field], check(word));
        }
    }
}

fn preemption(errors: &mut Vec<FieldError>, path: &Path, policy: &Value) {
    if !policy.is_null() {
        one_of(errors, path, policy, &["PreemptLowerPriority", "Never"]);
    }
}

fn system(errors: &mut Vec<FieldError>, path: &Path, system: &Value) {
    if !system.is_object() {
        return;
    }
    match text(system, "/name") {
        "" => errors.push(FieldError::required(&path.child("name"), "cannot be empty")),
        _ => supported(errors, path, &system["name"], &["linux", "windows"]),
    }
}

fn only_templates(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    if list(spec, "ephemeralContainers").count() > 0 {
        let path = path.child("ephemeralContainers");
        let why = "ephemeral containers not allowed in pod template";
        errors.push(FieldError::forbidden(&path, why));
    }
}

fn name(errors: &mut Vec<FieldError>, path: &Path, of: &Value, seen: &mut BTreeSet<String>) {
    match text(of, "/name") {
        "" => errors.push(FieldError::required(path, "")),
        name => {
            invalid(errors, path, &of["name"], names::dns1123_label(name));
            if !seen.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(path, &of["name"]));
            }
        }
    }
}
