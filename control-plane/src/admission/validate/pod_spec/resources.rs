//! Amounts of resources. Pure.

use api::{names, quantity::Quantity};
use serde_json::{Value, json};

use super::{invalid, list};
use crate::schema::{FieldError, Path};

/// What is counted, not measured, besides extended resources (upstream's `integerResources`).
const COUNTED: &[&str] = &[
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "services.nodeports",
    "services.loadbalancers",
];
/// What may be named without a domain, besides what is counted (upstream's `standardResources`).
const MEASURED: &[&str] = &[
    "cpu",
    "memory",
    "ephemeral-storage",
    "storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "requests.storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
];
const OF_CONTAINERS: &[&str] = &["cpu", "memory", "ephemeral-storage"];
const OF_PODS: &[&str] = &["cpu", "memory"];
const HUGE_PAGES: &str = "hugepages-";

/// Limits and requests of a container.
pub(super) fn resources(errors: &mut Vec<FieldError>, path: &Path, resources: &Value) {
    let check = |errors: &mut Vec<FieldError>, path: &Path, name: &str| {
        resource_name(errors, path, name);
        if !name.contains('/') && !OF_CONTAINERS.contains(&name) && !name.starts_with(HUGE_PAGES) {
            let why = "must be a standard resource for containers";
            errors.push(FieldError::invalid(path, &json!(name), why));
        }
    };
    requirements(errors, path, resources, &check);
}

/// Limits and requests of a pod as a whole, which has less of them.
pub(super) fn of_pod(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let resources = &spec["resources"];
    if !resources.is_object() {
        return;
    }
    if spec["os"]["name"] == "windows" {
        return errors.push(FieldError::forbidden(path, "may not be set for a windows pod"));
    }
    if !resources["claims"].is_null() {
        let why = "claims may not be set for Resources at pod-level";
        errors.push(FieldError::forbidden(&path.child("claims"), why));
    }
    let check = |errors: &mut Vec<FieldError>, path: &Path, name: &str| {
        let before = errors.len();
        resource_name(errors, path, name);
        if errors.len() == before && !OF_PODS.contains(&name) && !name.starts_with(HUGE_PAGES) {
            errors.push(FieldError::not_supported(path, &json!(name), OF_PODS));
        }
    };
    requirements(errors, path, resources, &check);
    for (index, container) in list(spec, "containers") {
        for (name, limit) in container["resources"]["limits"].as_object().into_iter().flatten() {
            let (own, most) = (quantity(limit), quantity(&resources["limits"][name]));
            if let (Some(own), Some(most)) = (own, most)
                && own > most
            {
                let why = format!("must be less than or equal to pod limits of {most}");
                let path = path.child("containers").index(index).key(name).child("limits");
                errors.push(FieldError::invalid(&path, limit, why));
            }
        }
    }
}

/// Says what is wrong with the name of a resource.
type Named<'a> = dyn Fn(&mut Vec<FieldError>, &Path, &str) + 'a;

fn requirements(errors: &mut Vec<FieldError>, path: &Path, resources: &Value, check: &Named<'_>) {
    let mut named = Vec::new();
    for list in ["limits", "requests"] {
        for (name, value) in resources[list].as_object().into_iter().flatten() {
            let place = path.child(list).key(name);
            check(errors, &place, name);
            amount(errors, &place, name, value);
            if list == "requests" {
                within_limit(errors, path, name, resources);
            }
            whole_pages(errors, &place, name, value);
            named.push(name.as_str());
        }
    }
    let computes = named.iter().any(|name| matches!(*name, "cpu" | "memory"));
    if !computes && named.iter().any(|name| name.starts_with(HUGE_PAGES)) {
        errors.push(FieldError::forbidden(path, "HugePages require cpu or memory"));
    }
}

/// Upstream's `ValidateResourceQuantityValue`.
pub(in crate::admission::validate) fn amount(
    errors: &mut Vec<FieldError>,
    path: &Path,
    name: &str,
    value: &Value,
) {
    let Some(amount) = quantity(value) else { return };
    if amount.sign() < 0 {
        errors.push(FieldError::invalid(path, value, "must be greater than or equal to 0"));
    }
    let is_counted = COUNTED.contains(&name) || is_extended(name);
    if is_counted && amount.milli_value() % 1000 != 0 {
        errors.push(FieldError::invalid(path, value, "must be an integer"));
    }
}

/// Decoding has refused what is no quantity.
pub(super) fn quantity(value: &Value) -> Option<Quantity> {
    value.as_str().and_then(|text| text.parse().ok())
}

fn is_native(name: &str) -> bool {
    !name.contains('/') || name.contains("kubernetes.io/")
}

/// Resources of other domains; those with the prefix of quotas would be mistaken for theirs.
fn is_extended(name: &str) -> bool {
    !is_native(name)
        && !name.starts_with("requests.")
        && names::qualified_name(&format!("requests.{name}")).is_empty()
}

fn resource_name(errors: &mut Vec<FieldError>, path: &Path, name: &str) {
    let value = json!(name);
    let mut refuse = |why: &str| errors.push(FieldError::invalid(path, &value, why));
    let reasons = names::qualified_name(name);
    if name.contains('/') {
        if reasons.is_empty() && !is_native(name) && !is_extended(name) {
            refuse("doesn't follow extended resource name standard");
        }
    } else {
        let pages = name.strip_prefix("requests.").unwrap_or(name).starts_with(HUGE_PAGES);
        if reasons.is_empty() && !pages && !COUNTED.contains(&name) && !MEASURED.contains(&name) {
            refuse("must be a standard resource type or fully qualified");
        }
    }
    invalid(errors, path, &value, reasons);
}

/// A request is at most its limit; of what cannot be shared out twice it is its limit.
fn within_limit(errors: &mut Vec<FieldError>, path: &Path, name: &str, resources: &Value) {
    let shared = is_native(name) && !name.starts_with(HUGE_PAGES);
    let (request, limit) = (&resources["requests"][name], &resources["limits"][name]);
    let Some(most) = quantity(limit) else {
        if !shared {
            let why = "Limit must be set for non overcommitable resources";
            errors.push(FieldError::required(&path.child("limits"), why));
        }
        return;
    };
    let Some(asked) = quantity(request) else { return };
    let bound = match () {
        () if asked != most && !shared => "equal to",
        () if asked > most => "less than or equal to",
        () => return,
    };
    let why = format!("must be {bound} {name} limit of {most}");
    errors.push(FieldError::invalid(&path.child("requests"), request, why));
}

fn whole_pages(errors: &mut Vec<FieldError>, path: &Path, name: &str, value: &Value) {
    let Some(size) = name.strip_prefix(HUGE_PAGES) else { return };
    let size = size.parse::<Quantity>().map_or(0, |size| size.value());
    let is_whole = |amount: Quantity| size > 0 && amount.value() % size == 0;
    if let Some(amount) = quantity(value)
        && !is_whole(amount)
    {
        let why = format!("{amount} is not positive integer multiple of {name}");
        errors.push(FieldError::invalid(path, value, why));
    }
}
