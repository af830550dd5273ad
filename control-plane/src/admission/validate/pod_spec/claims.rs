//! Claims of devices, and how containers are resized. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{invalid, list, one_of};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Upstream's `validatePodResourceClaims`.
pub(super) fn of_pod(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let mut seen = BTreeSet::new();
    for (index, claim) in list(spec, "resourceClaims") {
        let path = path.index(index);
        let (place, name) = (path.child("name"), text(claim, "/name"));
        match name {
            "" => errors.push(FieldError::required(&place, "")),
            name if !seen.insert(name) => {
                errors.push(FieldError::duplicate(&place, &json!(name)));
            }
            name => invalid(errors, &place, &json!(name), names::dns1123_label(name)),
        }
        let sources = ["resourceClaimName", "resourceClaimTemplateName"];
        let why = match sources.iter().filter(|source| !claim[**source].is_null()).count() {
            0 => "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`",
            1 => "",
            _ => {
                "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified"
            }
        };
        if !why.is_empty() {
            errors.push(FieldError::invalid(&path, claim, why));
        }
        for source in sources {
            if let Some(of) = claim[source].as_str() {
                let reasons = names::dns1123_subdomain(of);
                invalid(errors, &path.child(source), &claim[source], reasons);
            }
        }
    }
}

/// Upstream's `validateResourceClaimNames`: what a container takes of the claims of its pod.
pub(super) fn of_container(
    errors: &mut Vec<FieldError>,
    path: &Path,
    resources: &Value,
    spec: &Value,
) {
    let known: BTreeSet<&str> =
        list(spec, "resourceClaims").map(|(_, claim)| text(claim, "/name")).collect();
    let mut taken: BTreeSet<String> = BTreeSet::new();
    for (index, claim) in list(resources, "claims") {
        let path = path.index(index);
        let (name, request) = (text(claim, "/name"), text(claim, "/request"));
        if name.is_empty() {
            errors.push(FieldError::required(&path, ""));
            continue;
        }
        let mut key = name.to_owned();
        if !request.is_empty() {
            let reasons = names::dns1123_label(request);
            invalid(errors, &path.child("request"), &json!(request), reasons);
            key = format!("{name}/{request}");
        }
        // A claim as a whole holds each of its requests.
        let part = |other: &String| other.split_once('/').is_some_and(|(of, _)| of == name);
        if taken.contains(name) || (request.is_empty() && taken.iter().any(part)) {
            errors.push(FieldError::duplicate(&path, &json!(name)));
        } else if !taken.insert(key.clone()) {
            errors.push(FieldError::duplicate(&path, &json!(key)));
        }
        if !known.contains(name) {
            let mut error = FieldError::not_found(&path, &json!(name));
            let listed = known.iter().copied().collect::<Vec<_>>().join(", ");
            let these = if known.is_empty() { " which is empty" } else { ": " };
            error.detail =
                format!("must be one of the names in pod.spec.resourceClaims{these}{listed}");
            errors.push(error);
        }
    }
}

/// Upstream's `validateResizePolicy`, which does not name the entry that it means.
pub(super) fn resize(errors: &mut Vec<FieldError>, path: &Path, container: &Value, spec: &Value) {
    let mut seen = BTreeSet::new();
    for (index, policy) in list(container, "resizePolicy") {
        let (resource, restart) = (&policy["resourceName"], &policy["restartPolicy"]);
        if !seen.insert(text(policy, "/resourceName")) {
            errors.push(FieldError::duplicate(&path.index(index), resource));
        }
        one_of(errors, path, resource, &["cpu", "memory"]);
        one_of(errors, path, restart, &["NotRequired", "RestartContainer"]);
        if spec["restartPolicy"] == "Never" && restart != "NotRequired" {
            let why = "must be 'NotRequired' when `restartPolicy` is 'Never'";
            errors.push(FieldError::invalid(path, restart, why));
        }
    }
}
