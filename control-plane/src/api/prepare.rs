//! What the server itself writes into objects: identity, generation, what an update may not touch. Pure.

use serde_json::{Map, Value, json};

use crate::{
    api::error::{self, About},
    client::ApiError,
    schema::{FieldError, Path, Served},
};

/// What a new object gets.
#[derive(Clone, Copy, Debug)]
pub struct Birth<'a> {
    pub uid: &'a str,
    /// RFC 3339 with seconds.
    pub now: &'a str,
    /// Five characters that a `generateName` ends in.
    pub suffix: &'a str,
}

/// The part of a resource that a write goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Main,
    Status,
    /// A signing request's conditions.
    Approval,
    /// A namespace's `spec.finalizers`.
    Finalize,
    /// A pod's node, and the condition that says so.
    Binding,
}

/// Resources whose `metadata.generation` counts changes of the spec.
fn counted(served: &Served) -> bool {
    matches!(served.plural, "deployments" | "replicasets" | "pods" | "endpointslices")
}

pub fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    let fields = object.as_object_mut().expect("objects are decoded as JSON objects");
    let metadata = fields.entry("metadata").or_insert_with(|| json!({}));
    if !metadata.is_object() {
        *metadata = json!({});
    }
    metadata.as_object_mut().expect("made an object above")
}

#[must_use]
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// Whether anything waits to act before the object may go.
#[must_use]
pub fn has_finalizers(object: &Value) -> bool {
    let list = |pointer| object.pointer(pointer).and_then(Value::as_array);
    list("/metadata/finalizers").is_some_and(|list| !list.is_empty())
        || (object["kind"] == "Namespace"
            && list("/spec/finalizers").is_some_and(|list| !list.is_empty()))
}

/// Sets `apiVersion`, `kind` and namespace, which the path says too.
///
/// # Errors
/// 400 when the object says something else.
pub fn identify(served: &Served, namespace: &str, object: &mut Value) -> Result<(), ApiError> {
    let (group, version) = served.storage.unwrap_or((served.group, served.version));
    let api_version =
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let given = text(object, "/kind");
    if !given.is_empty() && given != served.kind {
        return Err(error::bad_request(format!(
            "{given} in version {:?} cannot be handled as a {}: converting ({given}) to ({}): unknown conversion",
            text(object, "/apiVersion"),
            served.kind,
            served.kind
        )));
    }
    let given = text(object, "/apiVersion");
    if !given.is_empty() && given != api_version && given != served.api_version() {
        return Err(error::bad_request(format!(
            "the API version in the data ({given}) does not match the expected API version ({})",
            served.api_version()
        )));
    }
    let given = text(object, "/metadata/namespace").to_owned();
    if served.namespaced && !given.is_empty() && given != namespace {
        return Err(error::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    object["apiVersion"] = json!(api_version);
    object["kind"] = json!(served.kind);
    let metadata = metadata(object);
    if served.namespaced {
        metadata.insert("namespace".into(), json!(namespace));
    } else {
        metadata.remove("namespace");
    }
    Ok(())
}

/// A new object's metadata, and an empty status.
///
/// # Errors
/// When it brings a `resourceVersion`.
pub fn create(served: &Served, object: &mut Value, birth: Birth<'_>) -> Result<(), ApiError> {
    if !text(object, "/metadata/resourceVersion").is_empty() {
        return Err(error::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    let generated = text(object, "/metadata/name").is_empty();
    let prefix = text(object, "/metadata/generateName").to_owned();
    let metadata = metadata(object);
    for field in [
        "resourceVersion",
        "selfLink",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        metadata.remove(field);
    }
    if generated && !prefix.is_empty() {
        // Upstream: 63 characters less the suffix.
        let kept: String = prefix.chars().take(58).collect();
        metadata.insert("name".into(), json!(format!("{kept}{}", birth.suffix)));
    }
    metadata.insert("uid".into(), json!(birth.uid));
    metadata.insert("creationTimestamp".into(), json!(birth.now));
    if counted(served) {
        metadata.insert("generation".into(), json!(1));
    }
    // A kubelet registers its Node with a status.
    let fields = object.as_object_mut().expect("has metadata");
    if served.subresource("status").is_some() && served.plural != "nodes" {
        fields.insert("status".into(), json!({}));
    }
    initial(served, object);
    Ok(())
}

/// What upstream's strategies set on a new object beyond its defaults.
fn initial(served: &Served, object: &mut Value) {
    match (served.group, served.plural) {
        ("", "namespaces") => {
            object["status"] = json!({"phase": "Active"});
            let spec = &mut object["spec"];
            if !spec.is_object() {
                *spec = json!({});
            }
            let finalizers = spec.get("finalizers").and_then(Value::as_array);
            let mut finalizers = finalizers.cloned().unwrap_or_default();
            if !finalizers.contains(&json!("kubernetes")) {
                finalizers.push(json!("kubernetes"));
            }
            spec["finalizers"] = json!(finalizers);
        }
        ("", "services") => object["status"] = json!({"loadBalancer": {}}),
        _ => {}
    }
}

/// Brings over what an update of `part` may not change.
pub fn update(served: &Served, part: Part, object: &mut Value, old: &Value) {
    let new_metadata = metadata(object);
    for field in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        carry(new_metadata, &old["metadata"], field);
    }
    carry(new_metadata, &old["metadata"], "generation");
    carry(new_metadata, &old["metadata"], "generateName");
    new_metadata.remove("selfLink");
    let fields = object.as_object_mut().expect("has metadata");
    match part {
        Part::Main => {
            if served.subresource("status").is_some() {
                carry(fields, old, "status");
            }
            if served.plural == "namespaces" {
                carry(fields, old, "spec");
            }
        }
        Part::Status => keep_only(served, fields, old, &["status"]),
        Part::Approval => {
            let conditions = fields.get("status").and_then(|s| s.get("conditions")).cloned();
            let mut status = old.get("status").cloned().unwrap_or_else(|| json!({}));
            if let Some(conditions) = conditions {
                status["conditions"] = conditions;
            }
            keep_only(served, fields, old, &[]);
            fields.insert("status".into(), status);
        }
        Part::Finalize => keep_only(served, fields, old, &["spec"]),
        Part::Binding => {}
    }
}

/// Counts the generation of an admitted object: what admission adds to what the writer left out is no change.
pub fn count(served: &Served, part: Part, object: &mut Value, old: &Value) {
    if counted(served) && part == Part::Main && payload(object) != payload(old) {
        let generation = old.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0);
        metadata(object).insert("generation".into(), json!(generation + 1));
    }
}

/// Everything but metadata and status.
fn payload(object: &Value) -> Vec<(&String, &Value)> {
    let outer = |key: &str| matches!(key, "metadata" | "status" | "apiVersion" | "kind");
    object.as_object().into_iter().flatten().filter(|(key, _)| !outer(key)).collect()
}

fn carry(into: &mut Map<String, Value>, from: &Value, field: &str) {
    match from.get(field) {
        Some(value) => drop(into.insert(field.to_owned(), value.clone())),
        None => drop(into.remove(field)),
    }
}

/// Keeps the listed top-level fields of the new object and all else of the old one. Annotations and
/// finalizers go with the new one, as upstream's status strategies leave them.
fn keep_only(served: &Served, fields: &mut Map<String, Value>, old: &Value, kept: &[&str]) {
    let taken: Vec<_> = kept.iter().map(|key| (*key, fields.get(*key).cloned())).collect();
    let mut metadata = fields.remove("metadata").unwrap_or_else(|| json!({}));
    if let Some(metadata) = metadata.as_object_mut() {
        carry(metadata, &old["metadata"], "ownerReferences");
        if served.group == "apps" {
            carry(metadata, &old["metadata"], "labels");
        }
    }
    *fields = old.as_object().cloned().unwrap_or_default();
    fields.insert("metadata".into(), metadata);
    for (key, value) in taken {
        match value {
            Some(value) => drop(fields.insert(key.to_owned(), value)),
            None => drop(fields.remove(key)),
        }
    }
}

/// Refuses a new object that is not called what the path says.
///
/// # Errors
/// 400.
pub fn named(about: About<'_>, object: &Value) -> Result<(), ApiError> {
    match text(object, "/metadata/name") {
        "" => Err(error::bad_request(format!(
            "the name of the object ({} based on URL) was undeterminable: name must be provided",
            about.name
        ))),
        name if name != about.name => Err(error::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            about.name
        ))),
        _ => Ok(()),
    }
}

/// Refuses a new time of deletion: that is for a DELETE to set.
///
/// # Errors
/// 422.
pub fn undeleted(served: &Served, object: &Value, old: &Value) -> Result<(), ApiError> {
    let field = "/metadata/deletionTimestamp";
    let (new, stored) = (text(object, field), text(old, field));
    // What is being deleted keeps its own time, whatever is said.
    if new.is_empty() || !stored.is_empty() {
        return Ok(());
    }
    Err(fixed(served, "metadata.deletionTimestamp", (new, text(old, "/metadata/name"))))
}

/// The 422 of a field that may not have another value.
#[must_use]
pub fn fixed(served: &Served, field: &str, (value, name): (&str, &str)) -> ApiError {
    let error = FieldError::invalid(&Path::new(field), &json!(value), "field is immutable");
    error::invalid((served.group, served.kind), name, &[error])
}

/// Refuses an update of another object than the stored one.
///
/// # Errors
/// 409 for a stale `resourceVersion` or another `uid`, 400 for another name.
pub fn same(about: About<'_>, object: &Value, old: &Value) -> Result<(), ApiError> {
    named(about, object)?;
    let (uid, stored) = (text(object, "/metadata/uid"), text(old, "/metadata/uid"));
    if !uid.is_empty() && uid != stored {
        return Err(about.conflict(&format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {stored}"
        )));
    }
    let revision = text(object, "/metadata/resourceVersion");
    if !revision.is_empty() && revision != "0" && revision != text(old, "/metadata/resourceVersion")
    {
        return Err(about.modified());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    #[test]
    fn a_status_update_changes_the_status_only_and_a_spec_update_counts() {
        let served = schema::resource("apps", "v1", "deployments").unwrap();
        let birth = Birth { uid: "u", now: "2026-01-01T00:00:00Z", suffix: "abcde" };
        let mut old = json!({"metadata": {"generateName": "web-", "uid": "mine"},
            "spec": {"replicas": 1}, "status": {"replicas": 9}});
        identify(served, "default", &mut old).unwrap();
        create(served, &mut old, birth).unwrap();
        assert_eq!(old["metadata"]["name"], "web-abcde");
        assert_eq!(old["metadata"]["uid"], "u");
        assert_eq!(old["status"], json!({}));

        let mut new = old.clone();
        new["spec"]["replicas"] = json!(2);
        new["status"] = json!({"replicas": 1});
        let mut status = new.clone();
        update(served, Part::Status, &mut status, &old);
        count(served, Part::Status, &mut status, &old);
        assert_eq!((&status["spec"], &status["status"]), (&old["spec"], &new["status"]));
        assert_eq!(status["metadata"]["generation"], 1);
        update(served, Part::Main, &mut new, &old);
        count(served, Part::Main, &mut new, &old);
        assert_eq!(new["status"], json!({}));
        assert_eq!(new["metadata"]["generation"], 2);
    }
}
