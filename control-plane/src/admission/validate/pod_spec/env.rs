//! Variables of a container, and what they and files take from its pod. Pure.

use api::names;
use serde_json::{Value, json};

use super::{invalid, list};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// What a variable may take from its pod.
const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// What upstream knows the names of, though not every place may have them.
const LABELS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "spec.restartPolicy",
    "spec.schedulerName",
    "status.phase",
];
/// What a variable or file may take from a container.
const RESOURCES: &[&str] = &[
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];

pub(super) fn environment(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    for (index, env) in list(container, "env") {
        let path = path.child("env").index(index);
        match text(env, "/name") {
            "" => errors.push(FieldError::required(&path.child("name"), "")),
            name => invalid(errors, &path.child("name"), &env["name"], names::env_var_name(name)),
        }
        if env["valueFrom"].is_object() {
            value_from(errors, &path.child("valueFrom"), env);
        }
    }
    for (index, from) in list(container, "envFrom") {
        env_from(errors, &path.child("envFrom"), index, from);
    }
}

fn value_from(errors: &mut Vec<FieldError>, path: &Path, env: &Value) {
    let from = &env["valueFrom"];
    if from["fieldRef"].is_object() {
        field_ref(errors, &path.child("fieldRef"), &from["fieldRef"], FIELDS);
    }
    if from["resourceFieldRef"].is_object() {
        let reference = &from["resourceFieldRef"];
        resource_ref(errors, &path.child("resourceFieldRef"), reference);
    }
    for source in ["configMapKeyRef", "secretKeyRef"] {
        if from[source].is_object() {
            key_ref(errors, &path.child(source), &from[source]);
        }
    }
    let why = match from.as_object().map_or(0, serde_json::Map::len) {
        0 => {
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"
        }
        _ if !text(env, "/value").is_empty() => "may not be specified when `value` is not empty",
        1 => return,
        _ => "may not have more than one field specified at a time",
    };
    errors.push(FieldError::invalid(path, &json!(""), why));
}

/// A field of the pod, of which `supported` may be taken whole.
pub(super) fn field_ref(
    errors: &mut Vec<FieldError>,
    path: &Path,
    reference: &Value,
    supported: &[&str],
) {
    for field in ["apiVersion", "fieldPath"] {
        if text(reference, &format!("/{field}")).is_empty() {
            return errors.push(FieldError::required(&path.child(field), ""));
        }
    }
    let (version, whole) = (text(reference, "/apiVersion"), text(reference, "/fieldPath"));
    let subscripted = subscript(whole);
    let known = FIELDS.contains(&whole) || LABELS.contains(&whole) || whole == "spec.host";
    let why = match subscripted {
        _ if version != "v1" => format!("unsupported pod version: {version}"),
        Some(("metadata.annotations" | "metadata.labels", _)) => String::new(),
        Some(_) => format!("field label does not support subscript: {whole}"),
        None if known => String::new(),
        None => format!("field label not supported: {whole}"),
    };
    let place = path.child("fieldPath");
    if !why.is_empty() {
        let why = format!("error converting fieldPath: {why}");
        return errors.push(FieldError::invalid(&place, &reference["fieldPath"], why));
    }
    // What old clients call the node's name.
    let label = if whole == "spec.host" { "spec.nodeName" } else { whole };
    match subscripted {
        Some((of, key)) => {
            let key =
                if of == "metadata.annotations" { key.to_lowercase() } else { key.to_owned() };
            invalid(errors, path, &json!(key), names::qualified_name(&key));
        }
        None if supported.contains(&label) => {}
        None => errors.push(FieldError::not_supported(&place, &json!(label), supported)),
    }
}

/// `metadata.labels['app']` is `metadata.labels` and `app`.
fn subscript(path: &str) -> Option<(&str, &str)> {
    path.strip_suffix("']")?.split_once("['").filter(|(of, _)| !of.is_empty())
}

/// An amount of a container.
pub(super) fn resource_ref(errors: &mut Vec<FieldError>, path: &Path, reference: &Value) {
    let resource = text(reference, "/resource");
    let place = path.child("resource");
    if resource.is_empty() {
        errors.push(FieldError::required(&place, ""));
    } else if !RESOURCES.contains(&resource) && !is_huge(resource) {
        errors.push(FieldError::not_supported(&place, &json!(resource), RESOURCES));
    }
    divisor(errors, &path.child("divisor"), resource, text(reference, "/divisor"));
}

fn is_huge(resource: &str) -> bool {
    ["limits.hugepages-", "requests.hugepages-"].iter().any(|prefix| resource.starts_with(prefix))
}

fn divisor(errors: &mut Vec<FieldError>, path: &Path, resource: &str, divisor: &str) {
    const BYTES: &[&str] =
        &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    if matches!(divisor, "" | "0") {
        return;
    }
    let (supported, what) = match resource.split_once('.').map_or("", |(_, name)| name) {
        "cpu" => (&["1m", "1"][..], "cpu"),
        "memory" => (BYTES, "memory"),
        "ephemeral-storage" => (BYTES, "local ephemeral storage"),
        _ if is_huge(resource) => (BYTES, "hugepages"),
        _ => return,
    };
    if !supported.contains(&divisor) {
        let joined = supported.join(if what == "cpu" { " and " } else { ", " });
        let why = format!("only divisor's values {joined} are supported with the {what} resource");
        errors.push(FieldError::invalid(path, &json!(resource), why));
    }
}

fn key_ref(errors: &mut Vec<FieldError>, path: &Path, reference: &Value) {
    let (name, key) = (text(reference, "/name"), text(reference, "/key"));
    invalid(errors, &path.child("name"), &json!(name), names::dns1123_subdomain(name));
    let path = path.child("key");
    match key {
        "" => errors.push(FieldError::required(&path, "")),
        key => invalid(errors, &path, &json!(key), names::config_map_key(key)),
    }
}

/// Upstream names the entry in what is wrong within it, and the list where the entry has no or two sources.
fn env_from(errors: &mut Vec<FieldError>, path: &Path, index: usize, from: &Value) {
    let place = path.index(index);
    if let Some(prefix) = from["prefix"].as_str().filter(|prefix| !prefix.is_empty()) {
        invalid(errors, &place.child("prefix"), &from["prefix"], names::env_var_name(prefix));
    }
    let mut sources = 0;
    for source in ["configMapRef", "secretRef"] {
        if !from[source].is_object() {
            continue;
        }
        sources += 1;
        let path = place.child(source).child("name");
        match text(&from[source], "/name") {
            "" => errors.push(FieldError::required(&path, "")),
            name => {
                invalid(errors, &path, &from[source]["name"], names::dns1123_subdomain(name));
            }
        }
    }
    let why = match sources {
        0 => "must specify one of: `configMapRef` or `secretRef`",
        1 => return,
        _ => "may not have more than one field specified at a time",
    };
    errors.push(FieldError::invalid(path, &json!(""), why));
}
