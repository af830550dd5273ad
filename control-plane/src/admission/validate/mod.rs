//! Validation in upstream's words: all errors at once, each with its field. Pure.

use api::names;
use serde_json::{Value, json};

use crate::{
    admission::Attempt,
    api::prepare::{Part, text},
    schema::{FieldError, Path},
};

mod address;
mod endpoint_slice;
mod event;
mod meta;
mod other;
mod pod_spec;
mod pod_update;
mod service;
mod service_update;
mod signing;
mod status;
mod workload;

pub(super) use service_update::addresses as service_addresses;

/// A whole object, new or changed.
#[must_use]
pub fn object(attempt: &Attempt<'_>, object: &Value) -> Vec<FieldError> {
    let mut errors = meta::metadata(attempt, object);
    let old = attempt.old;
    errors.extend(match (attempt.served.group, attempt.served.plural) {
        ("", "pods") => match old {
            None => pod_spec::new_pod(object),
            Some(old) => pod_update::update(object, old),
        },
        ("", "services") => service::service(object, old),
        ("apps", "deployments") => workload::deployment(object, old),
        ("apps", "replicasets") => workload::replica_set(object, old),
        ("", "configmaps") => other::config_map(object, old),
        ("", "secrets") => other::secret(object, old),
        ("", "nodes") => other::node(object, old),
        ("coordination.k8s.io", "leases") => other::lease(object),
        ("discovery.k8s.io", "endpointslices") => endpoint_slice::slice(object, old),
        ("", "endpoints") => endpoint_slice::endpoints(object, old),
        ("certificates.k8s.io", "certificatesigningrequests") => signing::request(object, old),
        ("", "namespaces") if old.is_none() => other::finalizers(object, |path, _| path.clone()),
        (group @ ("" | "events.k8s.io"), "events") => event::event(group, object, old),
        _ => Vec::new(),
    });
    errors
}

/// A write to the status or another part: the metadata, and what upstream checks of the part.
#[must_use]
pub fn part(attempt: &Attempt<'_>, object: &Value) -> Vec<FieldError> {
    let mut errors = meta::metadata(attempt, object);
    let (group, plural) = (attempt.served.group, attempt.served.plural);
    match (attempt.part, group, plural) {
        (Part::Status, "", "services") => {
            errors.extend(attempt.old.into_iter().flat_map(|old| service::status(object, old)));
        }
        (Part::Finalize, ..) => errors.extend(other::finalizers(object, Path::index)),
        (Part::Status, "", "pods") => errors.extend(status::pod(object, attempt.old)),
        (Part::Status, "", "namespaces") => errors.extend(status::namespace(object)),
        (Part::Status, "", "nodes") => {
            errors.extend(other::node_resources(object));
            errors.extend(status::node_addresses(object));
        }
        (Part::Status, "apps", _) => errors.extend(status::workload(object)),
        _ => {}
    }
    errors
}

/// The items of a list with their indices; none where there is no such list.
pub(super) fn list<'a>(
    of: &'a Value,
    key: &str,
) -> impl Iterator<Item = (usize, &'a Value)> + use<'a> {
    of.get(key).and_then(Value::as_array).into_iter().flatten().enumerate()
}

/// One error a reason.
fn invalid(errors: &mut Vec<FieldError>, path: &Path, value: &Value, reasons: Vec<String>) {
    errors.extend(reasons.into_iter().map(|reason| FieldError::invalid(path, value, reason)));
}

fn non_negative(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if value.as_i64().is_some_and(|number| number < 0) {
        errors.push(FieldError::invalid(path, value, "must be greater than or equal to 0"));
    }
}

fn positive(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if value.as_i64().is_some_and(|number| number <= 0) {
        errors.push(FieldError::invalid(path, value, "must be greater than 0"));
    }
}

fn one_of(errors: &mut Vec<FieldError>, path: &Path, value: &Value, supported: &[&str]) {
    match value.as_str() {
        None | Some("") => errors.push(FieldError::required(path, "")),
        Some(word) if supported.contains(&word) => {}
        Some(_) => errors.push(FieldError::not_supported(path, value, supported)),
    }
}

/// Refuses what is set to none of these words.
fn supported(errors: &mut Vec<FieldError>, path: &Path, value: &Value, words: &[&str]) {
    if value.as_str().is_some_and(|word| !words.contains(&word)) {
        errors.push(FieldError::not_supported(path, value, words));
    }
}

fn immutable(errors: &mut Vec<FieldError>, path: &Path, new: &Value, old: &Value) {
    if new != old {
        errors.push(FieldError::invalid(path, new, "field is immutable"));
    }
}

/// A port number, or the name of one.
fn port_or_name(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    match value {
        Value::String(name) => invalid(errors, path, value, names::port_name(name)),
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::Array(_)
        | Value::Object(_)) => {
            let number = other.as_i64().unwrap_or(0);
            invalid(errors, path, &json!(number), names::port_number(number));
        }
    }
}

fn labels(errors: &mut Vec<FieldError>, path: &Path, map: &Value) {
    for (key, value) in map.as_object().into_iter().flatten() {
        invalid(errors, path, &json!(key), names::qualified_name(key));
        invalid(errors, path, value, names::label_value(value.as_str().unwrap_or("")));
    }
}

/// A `meta/v1` `LabelSelector`.
fn selector(errors: &mut Vec<FieldError>, path: &Path, selector: &Value) {
    labels(errors, &path.child("matchLabels"), &selector["matchLabels"]);
    for (index, requirement) in list(selector, "matchExpressions") {
        let path = path.child("matchExpressions").index(index);
        let values = requirement["values"].as_array().map_or(0, Vec::len);
        match text(requirement, "/operator") {
            "In" | "NotIn" if values == 0 => errors.push(FieldError::required(
                &path.child("values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "Exists" | "DoesNotExist" if values > 0 => errors.push(FieldError::forbidden(
                &path.child("values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => errors.push(FieldError::invalid(
                &path.child("operator"),
                &requirement["operator"],
                "not a valid selector operator",
            )),
        }
        let key = text(requirement, "/key");
        invalid(errors, &path.child("key"), &json!(key), names::qualified_name(key));
        for (index, value) in list(requirement, "values") {
            let reasons = names::label_value(value.as_str().unwrap_or(""));
            invalid(errors, &path.child("values").index(index), value, reasons);
        }
    }
}

/// Whether a `LabelSelector` selects these labels.
fn selects(selector: &Value, labels: &Value) -> bool {
    let matched = selector["matchLabels"].as_object().into_iter().flatten();
    let expressions = selector["matchExpressions"].as_array().into_iter().flatten();
    matched.clone().all(|(key, value)| labels.get(key) == Some(value))
        && expressions.into_iter().all(|requirement| {
            let value = labels.get(text(requirement, "/key"));
            let listed = || {
                let values = requirement["values"].as_array();
                values.into_iter().flatten().any(|one| Some(one) == value)
            };
            match text(requirement, "/operator") {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

/// What is wrong, a reason a line.
#[cfg(test)]
fn lines(errors: &[FieldError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
