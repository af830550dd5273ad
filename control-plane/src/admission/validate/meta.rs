//! `ObjectMeta` of every kind. Pure.

use api::names;
use serde_json::{Value, json};

use super::{invalid, labels, list};
use crate::{
    admission::Attempt,
    api::prepare::text,
    schema::{FieldError, Path},
};

/// All annotations of an object together, bytes of keys and values.
const ANNOTATIONS: usize = 256 << 10;
/// Those that need no domain (upstream's `standardFinalizers`).
const FINALIZERS: &[&str] = &["kubernetes", "orphan", "foregroundDeletion"];

pub(super) fn metadata(attempt: &Attempt<'_>, object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let path = Path::new("metadata");
    let metadata = &object["metadata"];
    name(&mut errors, attempt, metadata);
    labels(&mut errors, &path.child("labels"), &metadata["labels"]);
    annotations(&mut errors, &path.child("annotations"), &metadata["annotations"]);
    for (index, finalizer) in list(metadata, "finalizers") {
        let path = path.child("finalizers").index(index);
        let word = finalizer.as_str().unwrap_or("");
        invalid(&mut errors, &path, finalizer, names::qualified_name(word));
        if !word.contains('/') && !FINALIZERS.contains(&word) {
            let why = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(FieldError::invalid(&path, finalizer, why));
        }
    }
    owners(&mut errors, &path.child("ownerReferences"), metadata);
    if let Some(old) = attempt.old {
        let deleting = old["metadata"].get("deletionTimestamp").is_some();
        let before = old["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
        let added: Vec<&Value> = list(metadata, "finalizers")
            .map(|(_, finalizer)| finalizer)
            .filter(|finalizer| !before.contains(finalizer))
            .collect();
        if deleting && !added.is_empty() {
            let names: Vec<&str> = added.iter().filter_map(|v| v.as_str()).collect();
            errors.push(FieldError::forbidden(
                &path.child("finalizers"),
                format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                    names.iter().map(|n| format!("{n:?}")).collect::<Vec<_>>().join(", ")
                ),
            ));
        }
    }
    errors
}

fn name(errors: &mut Vec<FieldError>, attempt: &Attempt<'_>, metadata: &Value) {
    let path = Path::new("metadata.name");
    let name = text(metadata, "/name");
    if name.is_empty() {
        errors.push(FieldError::required(&path, "name or generateName is required"));
        return;
    }
    let reasons = match (attempt.served.group, attempt.served.plural) {
        ("", "services") => names::dns1035_label(name),
        ("", "namespaces") => names::dns1123_label(name),
        _ => names::dns1123_subdomain(name),
    };
    invalid(errors, &path, &json!(name), reasons);
}

pub(super) fn annotations(errors: &mut Vec<FieldError>, path: &Path, map: &Value) {
    let mut size = 0;
    for (key, value) in map.as_object().into_iter().flatten() {
        // Annotation keys may have capitals in their prefix.
        invalid(errors, path, &json!(key), names::qualified_name(&key.to_lowercase()));
        size += key.len() + value.as_str().map_or(0, str::len);
    }
    if size > ANNOTATIONS {
        errors.push(FieldError::too_long(path, ANNOTATIONS));
    }
}

fn owners(errors: &mut Vec<FieldError>, path: &Path, metadata: &Value) {
    let mut controllers = 0;
    for (index, owner) in list(metadata, "ownerReferences") {
        let path = path.index(index);
        for (field, what) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if text(owner, &format!("/{field}")).is_empty() {
                errors.push(FieldError::invalid(&path.child(field), &owner[field], what));
            }
        }
        controllers += usize::from(owner["controller"] == true);
    }
    if controllers > 1 {
        errors.push(FieldError::invalid(
            path,
            &metadata["ownerReferences"],
            "Only one reference can have Controller set to true",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};
    use crate::{
        api::{authn::User, prepare::Part, route::Verb},
        schema,
    };

    #[test]
    fn a_finalizer_has_a_domain() {
        let attempt = Attempt {
            served: schema::resource("", "v1", "configmaps").unwrap(),
            verb: Verb::Create,
            part: Part::Main,
            user: &User::default(),
            old: None,
        };
        let said = |finalizers: Value| {
            let object = json!({"metadata": {"name": "m", "finalizers": finalizers}});
            let errors = metadata(&attempt, &object);
            lines(&errors)
        };
        assert_eq!(said(json!(["foregroundDeletion", "orphan", "kubernetes", "a.b/c"])), "");
        assert_eq!(
            said(json!(["a.b/c", "mine"])),
            "metadata.finalizers[1]: Invalid value: \"mine\": name is neither a standard finalizer name nor is it fully qualified"
        );
    }
}
