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
    if attempt.old.is_none() {
        name(&mut errors, attempt, metadata);
    }
    labels(&mut errors, &path.child("labels"), &metadata["labels"]);
    annotations(&mut errors, &path.child("annotations"), &metadata["annotations"]);
    for (index, one) in list(metadata, "finalizers") {
        let path = path.child("finalizers");
        finalizer(&mut errors, (&path, &path.index(index)), one);
    }
    let both = ["orphan", "foregroundDeletion"];
    let given = &metadata["finalizers"];
    if both.iter().all(|name| list(metadata, "finalizers").any(|(_, one)| one == name)) {
        let why = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.push(FieldError::invalid(&path.child("finalizers"), given, why));
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
    let check = match (attempt.served.group, attempt.served.plural) {
        ("", "services" | "namespaces") => names::dns1123_label,
        ("", "events") | ("certificates.k8s.io", "certificatesigningrequests") => {
            names::path_segment
        }
        _ => names::dns1123_subdomain,
    };
    // Something follows it: a hyphen is not the end of the name then.
    let prefix = text(metadata, "/generateName");
    let shown =
        match prefix.strip_suffix('-').map(str::char_indices).and_then(|mut all| all.next_back()) {
            Some((last, _)) => format!("{}a", prefix.get(..last).unwrap_or_default()),
            None => prefix.to_owned(),
        };
    if !prefix.is_empty() {
        invalid(errors, &Path::new("metadata.generateName"), &json!(prefix), check(&shown));
    }
    let path = Path::new("metadata.name");
    let name = text(metadata, "/name");
    if name.is_empty() {
        errors.push(FieldError::required(&path, "name or generateName is required"));
        return;
    }
    invalid(errors, &path, &json!(name), check(name));
}

/// Upstream says at one place what is wrong with the name, and at another that it is not known.
pub(super) fn finalizer(errors: &mut Vec<FieldError>, (path, own): (&Path, &Path), name: &Value) {
    let word = name.as_str().unwrap_or("");
    invalid(errors, path, name, names::qualified_name(word));
    if !word.contains('/') && !FINALIZERS.contains(&word) {
        let why = "name is neither a standard finalizer name nor is it fully qualified";
        errors.push(FieldError::invalid(own, name, why));
    }
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
    let mut controller = None;
    for (_, owner) in list(metadata, "ownerReferences") {
        for (field, what) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if text(owner, &format!("/{field}")).is_empty() {
                errors.push(FieldError::invalid(&path.child(field), &json!(""), what));
            }
        }
        if owner["apiVersion"] == "v1" && owner["kind"] == "Event" {
            let why = "/v1, Kind=Event is disallowed from being an owner";
            errors.push(FieldError::invalid(path, owner, why));
        }
        if owner["controller"] != true {
            continue;
        }
        let own = format!("{}/{}", text(owner, "/kind"), text(owner, "/name"));
        if let Some(first) = &controller {
            let why = format!(
                "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {own}"
            );
            errors.push(FieldError::invalid(path, &metadata["ownerReferences"], why));
        }
        controller.get_or_insert(own);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};
    use crate::{
        api::{authn::User, prepare::Part, route::Verb},
        schema,
    };

    fn of(plural: &str, fields: &Value) -> String {
        let attempt = Attempt {
            served: schema::resource("", "v1", plural).unwrap(),
            verb: Verb::Create,
            part: Part::Main,
            user: &User::default(),
            old: None,
        };
        lines(&metadata(&attempt, &json!({"metadata": fields})))
    }

    #[test]
    fn names_and_the_beginnings_of_names() {
        for (plural, name, why) in [
            ("services", "9a", ""),
            ("services", "a.b", "must not contain dots"),
            ("configmaps", "a.b", ""),
            ("events", "A_b", ""),
            ("events", "a/b", "may not contain '/'"),
        ] {
            let want = if why.is_empty() {
                String::new()
            } else {
                format!("metadata.name: Invalid value: {name:?}: {why}")
            };
            assert_eq!(of(plural, &json!({"name": name})), want);
        }
        for (prefix, fits) in [("web-", true), ("a", true), ("-", false), ("X_", false)] {
            let said = of("configmaps", &json!({"name": "m", "generateName": prefix}));
            assert_eq!(said.is_empty(), fits, "{said}");
            let start = format!("metadata.generateName: Invalid value: {prefix:?}: ");
            assert!(fits || said.starts_with(&start), "{said}");
        }
    }

    #[test]
    fn owners_are_whole_and_one_of_them_controls() {
        let owner =
            json!({"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "u", "controller": true});
        assert_eq!(of("configmaps", &json!({"name": "m", "ownerReferences": [owner]})), "");
        let bare = json!({"kind": "Pod", "name": "x"});
        assert_eq!(
            of("configmaps", &json!({"name": "m", "ownerReferences": [bare]})),
            "metadata.ownerReferences.apiVersion: Invalid value: \"\": version must not be empty\n\
             metadata.ownerReferences.uid: Invalid value: \"\": must not be empty"
        );
        let event = json!({"apiVersion": "v1", "kind": "Event", "name": "x", "uid": "u"});
        let said = of("configmaps", &json!({"name": "m", "ownerReferences": [event]}));
        assert!(said.ends_with(": /v1, Kind=Event is disallowed from being an owner"), "{said}");
        let said = of("configmaps", &json!({"name": "m", "ownerReferences": [owner, owner]}));
        assert!(
            said.ends_with("Only one reference can have Controller set to true. Found \"true\" in references for Pod/x and Pod/x"),
            "{said}"
        );
    }

    #[test]
    fn a_finalizer_has_a_domain() {
        let said =
            |finalizers: Value| of("configmaps", &json!({"name": "m", "finalizers": finalizers}));
        assert_eq!(said(json!(["foregroundDeletion", "kubernetes", "a.b/c"])), "");
        assert_eq!(
            said(json!(["foregroundDeletion", "orphan"])),
            "metadata.finalizers: Invalid value: [\"foregroundDeletion\",\"orphan\"]: finalizer orphan and foregroundDeletion cannot be both set"
        );
        assert_eq!(
            said(json!(["a.b/c", "mine"])),
            "metadata.finalizers[1]: Invalid value: \"mine\": name is neither a standard finalizer name nor is it fully qualified"
        );
    }
}
