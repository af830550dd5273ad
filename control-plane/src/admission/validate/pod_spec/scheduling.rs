//! What says where a pod may run, besides affinity. Pure.

use api::names;
use serde_json::{Value, json};

use super::{invalid, list};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};
pub(super) fn tolerations(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for (index, toleration) in list(spec, "tolerations") {
        let path = path.index(index);
        let (key, operator) = (text(toleration, "/key"), text(toleration, "/operator"));
        if key.is_empty() && operator != "Exists" {
            errors.push(FieldError::invalid(
                &path.child("operator"),
                &json!(operator),
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            ));
        } else if !key.is_empty() {
            invalid(errors, &path.child("key"), &json!(key), names::qualified_name(key));
        }
        if !matches!(operator, "" | "Equal" | "Exists") {
            let path = path.child("operator");
            errors.push(FieldError::not_supported(&path, &json!(operator), &["Equal", "Exists"]));
        }
        if operator == "Exists" && !text(toleration, "/value").is_empty() {
            errors.push(FieldError::invalid(
                &path.child("operator"),
                toleration,
                "value must be empty when `operator` is 'Exists'",
            ));
        }
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        if let Some(effect) = toleration["effect"].as_str().filter(|effect| !effect.is_empty())
            && !effects.contains(&effect)
        {
            let path = path.child("effect");
            errors.push(FieldError::not_supported(&path, &toleration["effect"], &effects));
        }
    }
}
