//! Amounts of resources. Pure.

use api::{names, quantity::Quantity};
use serde_json::{Value, json};

use super::invalid;
use crate::schema::{FieldError, Path};
pub(super) fn resources(errors: &mut Vec<FieldError>, path: &Path, resources: &Value) {
    let amount = |list: &str, name: &str| {
        resources[list][name].as_str().and_then(|text| text.parse::<Quantity>().ok())
    };
    for list in ["limits", "requests"] {
        for name in resources[list].as_object().into_iter().flat_map(|list| list.keys()) {
            let path = path.child(list).key(name);
            invalid(errors, &path, &json!(name), names::qualified_name(name));
            let standard = ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str())
                || name.starts_with("hugepages-");
            if !standard && !name.contains('/') {
                errors.push(FieldError::invalid(
                    &path,
                    &json!(name),
                    "must be a standard resource for containers",
                ));
            }
            if amount(list, name).is_some_and(|amount| amount.sign() < 0) {
                errors.push(FieldError::invalid(
                    &path,
                    &resources[list][name],
                    "must be greater than or equal to 0",
                ));
            }
        }
    }
    for name in resources["requests"].as_object().into_iter().flat_map(|list| list.keys()) {
        let (Some(request), Some(limit)) = (amount("requests", name), amount("limits", name))
        else {
            continue;
        };
        if request.minus(limit).sign() > 0 {
            errors.push(FieldError::invalid(
                &path.child("requests"),
                &resources["requests"][name],
                format!("must be less than or equal to {name} limit of {limit}"),
            ));
        }
    }
}
