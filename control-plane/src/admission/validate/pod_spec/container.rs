//! What containers of every list share. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::Value;

use super::{
    env::environment,
    invalid, list, one_of,
    probe::{handler, probe},
    resources::resources,
    volumes::mounts,
};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

pub(super) fn container(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    volumes: &BTreeSet<String>,
) {
    let image = text(container, "/image");
    if image.is_empty() {
        errors.push(FieldError::required(&path.child("image"), ""));
    } else if image.trim() != image {
        errors.push(FieldError::invalid(
            &path.child("image"),
            &container["image"],
            "must not have leading or trailing whitespace",
        ));
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    one_of(errors, &path.child("imagePullPolicy"), &container["imagePullPolicy"], &policies);
    let policies = ["FallbackToLogsOnError", "File"];
    let policy = path.child("terminationMessagePolicy");
    one_of(errors, &policy, &container["terminationMessagePolicy"], &policies);
    ports(errors, &path.child("ports"), container);
    environment(errors, path, container);
    mounts(errors, &path.child("volumeMounts"), container, volumes);
    resources(errors, &path.child("resources"), &container["resources"]);
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[name].is_object() {
            probe(errors, &path.child(name), &container[name]);
        }
    }
    for name in ["livenessProbe", "startupProbe"] {
        let threshold = &container[name]["successThreshold"];
        if threshold.as_i64().is_some_and(|count| count != 1) {
            let path = path.child(name).child("successThreshold");
            errors.push(FieldError::invalid(&path, threshold, "must be 1"));
        }
    }
    for hook in ["postStart", "preStop"] {
        if container["lifecycle"][hook].is_object() {
            handler(errors, &path.child("lifecycle").child(hook), &container["lifecycle"][hook]);
        }
    }
}

fn ports(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    let mut seen = BTreeSet::new();
    for (index, port) in list(container, "ports") {
        let path = path.index(index);
        if let Some(name) = port["name"].as_str().filter(|name| !name.is_empty()) {
            invalid(errors, &path.child("name"), &port["name"], names::port_name(name));
            if !seen.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), &port["name"]));
            }
        }
        match port["containerPort"].as_i64() {
            None | Some(0) => errors.push(FieldError::required(&path.child("containerPort"), "")),
            Some(number) => {
                let reasons = names::port_number(number);
                invalid(errors, &path.child("containerPort"), &port["containerPort"], reasons);
            }
        }
        if let Some(number) = port["hostPort"].as_i64().filter(|number| *number != 0) {
            let reasons = names::port_number(number);
            invalid(errors, &path.child("hostPort"), &port["hostPort"], reasons);
        }
        one_of(errors, &path.child("protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
    }
}

/// No two containers of a pod take the same port of the host.
pub(super) fn ports_apart(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let mut seen = BTreeSet::new();
    for (c, container) in list(spec, "containers") {
        for (p, port) in list(container, "ports") {
            let Some(number) = port["hostPort"].as_i64().filter(|number| *number != 0) else {
                continue;
            };
            let taken = format!("{}/{}/{number}", text(port, "/protocol"), text(port, "/hostIP"));
            if !seen.insert(taken) {
                let path = path.child("containers").index(c).child("ports").index(p);
                errors.push(FieldError::duplicate(&path.child("hostPort"), &port["hostPort"]));
            }
        }
    }
}
