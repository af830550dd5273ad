//! Pod specs, of Pods and of templates, in the order of upstream's `ValidatePodSpec`. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::Value;

use super::{invalid, labels, list, non_negative, one_of, port_or_name, positive};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};
use container::ports_apart;
use scheduling::tolerations;
use volumes::volumes;

mod container;
mod env;
mod probe;
mod resources;
mod scheduling;
mod volumes;

pub(super) fn spec(spec: &Value, path: &Path) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let volumes = volumes(&mut errors, &path.child("volumes"), spec);
    let mut seen = BTreeSet::new();
    if list(spec, "containers").next().is_none() {
        errors.push(FieldError::required(&path.child("containers"), ""));
    }
    for key in ["containers", "initContainers"] {
        for (index, container) in list(spec, key) {
            let path = path.child(key).index(index);
            name(&mut errors, &path.child("name"), container, &mut seen);
            container::container(&mut errors, &path, container, &volumes);
        }
    }
    ports_apart(&mut errors, path, spec);
    let policies = ["Always", "OnFailure", "Never"];
    one_of(&mut errors, &path.child("restartPolicy"), &spec["restartPolicy"], &policies);
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    one_of(&mut errors, &path.child("dnsPolicy"), &spec["dnsPolicy"], &policies);
    labels(&mut errors, &path.child("nodeSelector"), &spec["nodeSelector"]);
    let grace = path.child("terminationGracePeriodSeconds");
    non_negative(&mut errors, &grace, &spec["terminationGracePeriodSeconds"]);
    let deadline = &spec["activeDeadlineSeconds"];
    if deadline.as_i64().is_some_and(|n| !(1..=i64::from(i32::MAX)).contains(&n)) {
        errors.push(FieldError::invalid(
            &path.child("activeDeadlineSeconds"),
            deadline,
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    for (field, check) in [
        ("serviceAccountName", names::dns1123_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns1123_subdomain),
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
    ] {
        if let Some(word) = spec[field].as_str().filter(|word| !word.is_empty()) {
            invalid(&mut errors, &path.child(field), &spec[field], check(word));
        }
    }
    tolerations(&mut errors, &path.child("tolerations"), spec);
    errors
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
