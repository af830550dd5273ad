//! Containers: what each list of them may have, and what they share. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{
    Of, claims,
    env::environment,
    invalid, list,
    mounts::{devices, mounts},
    one_of,
    probe::probes_and_hooks,
    resources::resources,
    security, supported,
    volumes::Volumes,
};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// The pod around a container.
#[derive(Debug)]
pub(super) struct Around<'a> {
    pub(super) spec: &'a Value,
    pub(super) volumes: Volumes<'a>,
}

impl Around<'_> {
    fn grace(&self) -> Option<i64> {
        self.spec["terminationGracePeriodSeconds"].as_i64()
    }
}

pub(super) fn containers(errors: &mut Vec<FieldError>, path: &Path, around: &Around<'_>) {
    let path = path.child("containers");
    if list(around.spec, "containers").next().is_none() {
        return errors.push(FieldError::required(&path, ""));
    }
    let (mut names, mut taken) = (BTreeSet::new(), BTreeSet::new());
    let mut clashes = Vec::new();
    for (index, container) in list(around.spec, "containers") {
        let path = path.index(index);
        common(errors, &path, container, around);
        named_once(errors, &path, container, &mut names);
        probes_and_hooks(errors, &path, container, around.grace());
        restart(errors, &path, container);
        host_ports(&mut clashes, &path, container, &mut taken);
    }
    errors.append(&mut clashes);
}

/// Only those that stay (`restartPolicy: Always`) are probed and have hooks.
pub(super) fn init_containers(errors: &mut Vec<FieldError>, path: &Path, around: &Around<'_>) {
    let regular = list(around.spec, "containers");
    let mut names: BTreeSet<&str> =
        regular.map(|(_, container)| text(container, "/name")).collect();
    for (index, container) in list(around.spec, "initContainers") {
        let path = path.child("initContainers").index(index);
        common(errors, &path, container, around);
        restart(errors, &path, container);
        named_once(errors, &path, container, &mut names);
        // One comes after the other, so that each may take a port that another one has.
        host_ports(errors, &path, container, &mut BTreeSet::new());
        if container["restartPolicy"] == "Always" {
            probes_and_hooks(errors, &path, container, around.grace());
            continue;
        }
        for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
            if container[field].is_object() {
                let why = "may not be set for init containers without restartPolicy=Always";
                errors.push(FieldError::forbidden(&path.child(field), why));
            }
        }
    }
}

/// What upstream asks of containers in a Pod only, so that templates from before stay valid.
pub(super) fn only_in_pods(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for key in ["containers", "initContainers"] {
        for (index, container) in list(spec, key) {
            let image = text(container, "/image");
            if image.trim() != image {
                let path = path.child(key).index(index).child("image");
                let why = "must not have leading or trailing whitespace";
                errors.push(FieldError::invalid(&path, &json!(image), why));
            }
        }
    }
}

/// Upstream's `validatePodHostNetworkDeps`: on the host's network a port is the host's. Defaults see to it in a
/// Pod, but not in a template.
pub(super) fn ports_on_host(errors: &mut Vec<FieldError>, path: &Path, spec: &Value, of: Of) {
    if spec["hostNetwork"] != true {
        return;
    }
    for (c, container) in list(spec, "containers") {
        for (p, port) in list(container, "ports") {
            let number = port["hostPort"].as_i64().unwrap_or(0);
            let differs = port["containerPort"].as_i64().unwrap_or(0) != number;
            if differs && (of == Of::Pod || number != 0) {
                let path = path.child("containers").index(c).child("ports").index(p);
                let why = "must match `containerPort` when `hostNetwork` is true";
                errors.push(FieldError::invalid(&path.child("hostPort"), &json!(number), why));
            }
        }
    }
}

fn common(errors: &mut Vec<FieldError>, path: &Path, container: &Value, around: &Around<'_>) {
    let name = text(container, "/name");
    for (field, value) in [("name", name), ("image", text(container, "/image"))] {
        if value.is_empty() {
            errors.push(FieldError::required(&path.child(field), ""));
        }
    }
    if !name.is_empty() {
        invalid(errors, &path.child("name"), &container["name"], names::dns1123_label(name));
    }
    let policies = ["File", "FallbackToLogsOnError"];
    let policy = path.child("terminationMessagePolicy");
    one_of(errors, &policy, &container["terminationMessagePolicy"], &policies);
    ports(errors, &path.child("ports"), container);
    environment(errors, path, container);
    mounts(errors, &path.child("volumeMounts"), container, &around.volumes);
    devices(errors, &path.child("volumeDevices"), container, &around.volumes);
    let policies = ["Always", "IfNotPresent", "Never"];
    one_of(errors, &path.child("imagePullPolicy"), &container["imagePullPolicy"], &policies);
    let place = path.child("resources");
    resources(errors, &place, &container["resources"]);
    claims::of_container(errors, &place.child("claims"), &container["resources"], around.spec);
    claims::resize(errors, &path.child("resizePolicy"), container, around.spec);
    security::of_container(errors, &path.child("securityContext"), container, around.spec);
}

fn named_once<'a>(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &'a Value,
    seen: &mut BTreeSet<&'a str>,
) {
    let name = text(container, "/name");
    if !name.is_empty() && !seen.insert(name) {
        errors.push(FieldError::duplicate(&path.child("name"), &json!(name)));
    }
}

fn restart(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    let path = path.child("restartPolicy");
    if container["restartPolicy"].is_null() && list(container, "restartPolicyRules").count() > 0 {
        let why = "must specify restartPolicy when restart rules are used";
        errors.push(FieldError::required(&path, why));
    }
    let policies = ["Always", "Never", "OnFailure"];
    supported(errors, &path, &container["restartPolicy"], &policies);
}

fn ports(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    let mut seen = BTreeSet::new();
    for (index, port) in list(container, "ports") {
        let path = path.index(index);
        if let Some(name) = port["name"].as_str().filter(|name| !name.is_empty()) {
            let reasons = names::port_name(name);
            if reasons.is_empty() && !seen.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), &port["name"]));
            }
            invalid(errors, &path.child("name"), &port["name"], reasons);
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

/// Adds the ports of the host that a container takes.
fn host_ports(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    taken: &mut BTreeSet<String>,
) {
    for (index, port) in list(container, "ports") {
        let Some(number) = port["hostPort"].as_i64().filter(|number| *number != 0) else {
            continue;
        };
        let place = format!("{}/{}/{number}", text(port, "/protocol"), text(port, "/hostIP"));
        let path = path.child("ports").index(index).child("hostPort");
        if taken.contains(&place) {
            errors.push(FieldError::duplicate(&path, &json!(place)));
        }
        taken.insert(place);
    }
}
