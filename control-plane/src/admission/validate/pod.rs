//! What an update of a Pod may change. Pure.

use serde_json::Value;

use super::list;
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Images, added tolerations and a shorter deadline may change; nothing else of a spec.
pub(super) fn update(pod: &Value, old: &Value) -> Vec<FieldError> {
    let path = Path::new("spec");
    let mut errors = Vec::new();
    let mut comparable = pod["spec"].clone();
    for key in ["containers", "initContainers"] {
        for (index, container) in list(&pod["spec"], key) {
            if text(container, "/image").is_empty() {
                errors.push(FieldError::required(&path.child(key).index(index).child("image"), ""));
            }
            let before = &old["spec"][key][index]["image"];
            if !before.is_null()
                && let Some(container) = comparable[key].get_mut(index)
            {
                container["image"] = before.clone();
            }
        }
    }
    for field in ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds"] {
        let before = old["spec"].get(field).cloned();
        if let Some(fields) = comparable.as_object_mut() {
            match before {
                Some(before) => drop(fields.insert(field.to_owned(), before)),
                None => drop(fields.remove(field)),
            }
        }
    }
    let new = |list: &Value| list.as_array().cloned().unwrap_or_default();
    let kept = new(&pod["spec"]["tolerations"]);
    let lost = new(&old["spec"]["tolerations"]).iter().any(|before| !kept.contains(before));
    if comparable != old["spec"] || lost {
        errors.push(FieldError::forbidden(
            &path,
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
    errors
}
