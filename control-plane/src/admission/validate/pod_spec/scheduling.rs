//! What says when and where a pod may run, besides affinity. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{invalid, list, selector, supported};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

pub(in crate::admission::validate) const TAINT_EFFECTS: &[&str] =
    &["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// Upstream's `ValidateTolerations`.
pub(in crate::admission::validate) fn tolerations(
    errors: &mut Vec<FieldError>,
    path: &Path,
    spec: &Value,
) {
    for (index, toleration) in list(spec, "tolerations") {
        let path = path.index(index);
        let at = path.child("operator");
        let (key, operator) = (text(toleration, "/key"), text(toleration, "/operator"));
        let value = text(toleration, "/value");
        if key.is_empty() && operator != "Exists" {
            let why = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.push(FieldError::invalid(&at, &json!(operator), why));
        } else if !key.is_empty() {
            invalid(errors, &path.child("key"), &json!(key), names::qualified_name(key));
        }
        let effect = text(toleration, "/effect");
        if !toleration["tolerationSeconds"].is_null() && effect != "NoExecute" {
            let why = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.push(FieldError::invalid(&path.child("effect"), &json!(effect), why));
        }
        let reasons = names::label_value(value);
        match operator {
            "Exists" if !value.is_empty() => {
                let why = "value must be empty when `operator` is 'Exists'";
                errors.push(FieldError::invalid(&at, &json!(value), why));
            }
            "" | "Equal" if !reasons.is_empty() => {
                errors.push(FieldError::invalid(&at, &json!(value), reasons.join(";")));
            }
            "" | "Equal" | "Exists" => {}
            _ => {
                let known = ["Equal", "Exists"];
                errors.push(FieldError::not_supported(&at, &json!(operator), &known));
            }
        }
        if !effect.is_empty() {
            supported(errors, &path.child("effect"), &toleration["effect"], TAINT_EFFECTS);
        }
    }
}

/// Upstream's `validateReadinessGates` and `validateSchedulingGates`.
pub(super) fn gates(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for (index, gate) in list(spec, "readinessGates") {
        let path = path.child("readinessGates").index(index).child("conditionType");
        let kind = text(gate, "/conditionType");
        invalid(errors, &path, &json!(kind), names::qualified_name(kind));
    }
    let mut seen = BTreeSet::new();
    for (index, gate) in list(spec, "schedulingGates") {
        let path = path.child("schedulingGates").index(index);
        let name = text(gate, "/name");
        invalid(errors, &path, &json!(name), names::qualified_name(name));
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&path, &json!(name)));
        }
    }
}

/// Upstream's `validateTopologySpreadConstraints`.
pub(super) fn spread(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let pair = |constraint: &Value| {
        (constraint["topologyKey"].clone(), constraint["whenUnsatisfiable"].clone())
    };
    for (index, constraint) in list(spec, "topologySpreadConstraints") {
        let path = path.index(index);
        above_zero(
            errors,
            &path.child("maxSkew"),
            &json!(constraint["maxSkew"].as_i64().unwrap_or(0)),
        );
        let (key, action) =
            (text(constraint, "/topologyKey"), text(constraint, "/whenUnsatisfiable"));
        if key.is_empty() {
            errors.push(FieldError::required(&path.child("topologyKey"), "can not be empty"));
        }
        let place = path.child("whenUnsatisfiable");
        supported(errors, &place, &json!(action), &["DoNotSchedule", "ScheduleAnyway"]);
        let mut later = list(spec, "topologySpreadConstraints").skip(index + 1);
        if later.any(|(_, other)| pair(other) == pair(constraint)) {
            let place = path.child("{topologyKey, whenUnsatisfiable}");
            errors.push(FieldError::duplicate(&place, &json!(format!("{{{key}, {action}}}"))));
        }
        let (place, least) = (path.child("minDomains"), &constraint["minDomains"]);
        above_zero(errors, &place, least);
        if !least.is_null() && action != "DoNotSchedule" {
            let why =
                format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}");
            errors.push(FieldError::invalid(&place, least, why));
        }
        for policy in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            supported(errors, &path.child(policy), &constraint[policy], &["Honor", "Ignore"]);
        }
        keys(errors, &path.child("matchLabelKeys"), constraint);
        selector(errors, &path.child("labelSelector"), &constraint["labelSelector"]);
    }
}

fn above_zero(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if value.as_i64().is_some_and(|number| number <= 0) {
        errors.push(FieldError::invalid(path, value, "must be greater than zero"));
    }
}

fn keys(errors: &mut Vec<FieldError>, path: &Path, constraint: &Value) {
    let selector = &constraint["labelSelector"];
    if selector.is_null() && list(constraint, "matchLabelKeys").count() > 0 {
        let why = "must not be specified when labelSelector is not set";
        errors.push(FieldError::forbidden(path, why));
    }
    for (index, value) in list(constraint, "matchLabelKeys") {
        let (path, key) = (path.index(index), value.as_str().unwrap_or(""));
        invalid(errors, &path, value, names::qualified_name(key));
        let in_labels = selector["matchLabels"].get(key).is_some();
        if in_labels || list(selector, "matchExpressions").any(|(_, one)| one["key"] == *value) {
            let why = "exists in both matchLabelKeys and labelSelector";
            errors.push(FieldError::invalid(&path, value, why));
        }
    }
}
