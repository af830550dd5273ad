//! Which nodes and which other pods a pod is to be near. Pure.

use api::names;
use serde_json::{Value, json};

use super::{invalid, list, selector};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

pub(super) fn affinity(errors: &mut Vec<FieldError>, path: &Path, affinity: &Value) {
    if affinity["nodeAffinity"].is_object() {
        node_affinity(errors, &path.child("nodeAffinity"), &affinity["nodeAffinity"]);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        pod_affinity(errors, &path.child(kind), &affinity[kind]);
    }
}

/// Whether values of labels that no label can have are refused: in demands, not in wishes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    Checked,
    Any,
}

fn node_affinity(errors: &mut Vec<FieldError>, path: &Path, affinity: &Value) {
    let required = &affinity[REQUIRED];
    if required.is_object() {
        let path = path.child(REQUIRED).child("nodeSelectorTerms");
        if list(required, "nodeSelectorTerms").next().is_none() {
            let why = "must have at least one node selector term";
            errors.push(FieldError::required(&path, why));
        }
        for (index, term) in list(required, "nodeSelectorTerms") {
            node_term(errors, &path.index(index), term, Values::Checked);
        }
    }
    for (index, preferred) in list(affinity, PREFERRED) {
        let path = path.child(PREFERRED).index(index);
        weight(errors, &path, preferred);
        node_term(errors, &path.child("preference"), &preferred["preference"], Values::Any);
    }
}

fn weight(errors: &mut Vec<FieldError>, path: &Path, of: &Value) {
    let weight = of["weight"].as_i64().unwrap_or(0);
    if !(1..=100).contains(&weight) {
        let why = "must be in the range 1-100";
        errors.push(FieldError::invalid(&path.child("weight"), &json!(weight), why));
    }
}

fn node_term(errors: &mut Vec<FieldError>, path: &Path, term: &Value, values: Values) {
    for (index, requirement) in list(term, "matchExpressions") {
        let path = path.child("matchExpressions").index(index);
        expression(errors, &path, requirement);
        let key = text(requirement, "/key");
        invalid(errors, &path.child("key"), &json!(key), names::qualified_name(key));
        if values == Values::Checked {
            for (index, value) in list(requirement, "values") {
                let reasons = names::label_value(value.as_str().unwrap_or(""));
                invalid(errors, &path.child("values").index(index), value, reasons);
            }
        }
    }
    for (index, requirement) in list(term, "matchFields") {
        field(errors, &path.child("matchFields").index(index), requirement);
    }
}

fn expression(errors: &mut Vec<FieldError>, path: &Path, requirement: &Value) {
    let count = list(requirement, "values").count();
    let values = path.child("values");
    match text(requirement, "/operator") {
        "In" | "NotIn" if count == 0 => errors.push(FieldError::required(
            &values,
            "must be specified when `operator` is 'In' or 'NotIn'",
        )),
        "Exists" | "DoesNotExist" if count > 0 => errors.push(FieldError::forbidden(
            &values,
            "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
        )),
        "Gt" | "Lt" if count != 1 => errors.push(FieldError::required(
            &values,
            "must be specified single value when `operator` is 'Lt' or 'Gt'",
        )),
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        other => operator(errors, path, other),
    }
}

fn operator(errors: &mut Vec<FieldError>, path: &Path, operator: &str) {
    let why = "not a valid selector operator";
    errors.push(FieldError::invalid(&path.child("operator"), &json!(operator), why));
}

/// A field of the node: there is only its name.
fn field(errors: &mut Vec<FieldError>, path: &Path, requirement: &Value) {
    match text(requirement, "/operator") {
        "In" | "NotIn" => {
            if list(requirement, "values").count() != 1 {
                let why = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
                errors.push(FieldError::required(&path.child("values"), why));
            }
        }
        other => operator(errors, path, other),
    }
    let key = text(requirement, "/key");
    if key != "metadata.name" {
        let why = "not a valid field selector key";
        return errors.push(FieldError::invalid(&path.child("key"), &json!(key), why));
    }
    for (index, value) in list(requirement, "values") {
        let reasons = names::dns1123_subdomain(value.as_str().unwrap_or(""));
        invalid(errors, &path.child("values").index(index), value, reasons);
    }
}

fn pod_affinity(errors: &mut Vec<FieldError>, path: &Path, affinity: &Value) {
    for (index, term) in list(affinity, REQUIRED) {
        pod_term(errors, &path.child(REQUIRED).index(index), term);
    }
    for (index, preferred) in list(affinity, PREFERRED) {
        let path = path.child(PREFERRED).index(index);
        weight(errors, &path, preferred);
        pod_term(errors, &path.child("podAffinityTerm"), &preferred["podAffinityTerm"]);
    }
}

fn pod_term(errors: &mut Vec<FieldError>, path: &Path, term: &Value) {
    for field in ["labelSelector", "namespaceSelector"] {
        selector(errors, &path.child(field), &term[field]);
    }
    for (_, namespace) in list(term, "namespaces") {
        let reasons = names::dns1123_label(namespace.as_str().unwrap_or(""));
        invalid(errors, &path.child("namespace"), namespace, reasons);
    }
    label_keys(errors, path, term);
    let (path, key) = (path.child("topologyKey"), text(term, "/topologyKey"));
    if key.is_empty() {
        errors.push(FieldError::required(&path, "can not be empty"));
    }
    invalid(errors, &path, &json!(key), names::qualified_name(key));
}

/// Upstream's `validateMatchLabelKeysAndMismatchLabelKeys`.
fn label_keys(errors: &mut Vec<FieldError>, path: &Path, term: &Value) {
    for field in ["matchLabelKeys", "mismatchLabelKeys"] {
        let path = path.child(field);
        if term["labelSelector"].is_null() && list(term, field).count() > 0 {
            let why = "must not be specified when labelSelector is not set";
            errors.push(FieldError::forbidden(&path, why));
            continue;
        }
        for (index, key) in list(term, field) {
            let reasons = names::qualified_name(key.as_str().unwrap_or(""));
            invalid(errors, &path.index(index), key, reasons);
        }
    }
    for (index, key) in list(term, "matchLabelKeys") {
        if list(term, "mismatchLabelKeys").any(|(_, other)| other == key) {
            let why = "exists in both matchLabelKeys and mismatchLabelKeys";
            errors.push(FieldError::invalid(&path.child("matchLabelKeys").index(index), key, why));
        }
    }
}
