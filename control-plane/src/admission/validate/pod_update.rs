//! What of a pod's spec may change once it is there. Pure.

use serde_json::Value;

use super::{
    list,
    pod_spec::{self, Of},
};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Other images, a shorter deadline, more tolerations and fewer scheduling gates are allowed. What was stored before
/// a check of the spec came about is not held against an update.
pub(super) fn update(pod: &Value, old: &Value) -> Vec<FieldError> {
    let (new, old) = (&pod["spec"], &old["spec"]);
    if new == old {
        return Vec::new();
    }
    let path = Path::new("spec");
    let stored = pod_spec::spec(Of::Pod, old, &path);
    let mut errors = pod_spec::spec(Of::Pod, new, &path);
    errors.retain(|error| !stored.contains(error));
    for key in ["containers", "initContainers"] {
        if list(new, key).count() != list(old, key).count() {
            let why = "pod updates may not add or remove containers";
            errors.push(FieldError::forbidden(&path.child(key), why));
            return errors;
        }
    }
    if let Some(error) = deadline(&path.child("activeDeadlineSeconds"), new, old) {
        errors.push(error);
        return errors;
    }
    errors.extend(tolerations(&path.child("tolerations"), new, old));
    errors.extend(gates(&path.child("schedulingGates"), new, old));
    if reverted(new, old) != *old {
        errors.push(FieldError::forbidden(
            &path,
            "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        ));
    }
    errors
}

/// A deadline may be set, and come nearer.
fn deadline(path: &Path, new: &Value, old: &Value) -> Option<FieldError> {
    let value = &new["activeDeadlineSeconds"];
    let why = match (value.as_i64(), old["activeDeadlineSeconds"].as_i64()) {
        (Some(new), _) if !(0..=i64::from(i32::MAX)).contains(&new) => {
            "must be between 0 and 2147483647, inclusive"
        }
        (Some(new), Some(old)) if new > old => "must be less than or equal to previous value",
        (None, Some(_)) => "must not update from a positive integer to nil value",
        (Some(_) | None, _) => return None,
    };
    Some(FieldError::invalid(path, value, why))
}

/// A toleration stays, whatever becomes of its seconds.
fn tolerations(path: &Path, new: &Value, old: &Value) -> Option<FieldError> {
    let timeless = |spec| {
        list(spec, "tolerations").map(|(_, toleration)| {
            let mut toleration = toleration.clone();
            toleration.as_object_mut().map(|fields| fields.remove("tolerationSeconds"));
            toleration
        })
    };
    let lost = timeless(old).any(|toleration| !timeless(new).any(|kept| kept == toleration));
    let why = "existing toleration can not be modified except its tolerationSeconds";
    lost.then(|| FieldError::forbidden(path, why))
}

/// Scheduling gates only fall.
fn gates(path: &Path, new: &Value, old: &Value) -> Vec<FieldError> {
    let name = |gate: &Value| text(gate, "/name").to_owned();
    let known: Vec<String> = list(old, "schedulingGates").map(|(_, gate)| name(gate)).collect();
    list(new, "schedulingGates")
        .map(|(index, gate)| (index, name(gate)))
        .filter(|(_, gate)| !known.contains(gate))
        .map(|(index, gate)| {
            let why = format!("only deletion is allowed, but found new scheduling gate '{gate}'");
            FieldError::forbidden(&path.index(index).child("name"), why)
        })
        .collect()
}

/// The new spec with everything as it was that may change. Both have the same number of containers.
fn reverted(new: &Value, old: &Value) -> Value {
    let mut spec = new.clone();
    for key in ["containers", "initContainers"] {
        for (index, container) in list(old, key) {
            restore(&mut spec[key][index], container, "image");
        }
    }
    for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        restore(&mut spec, old, field);
    }
    let grace = "terminationGracePeriodSeconds";
    if old[grace].as_i64().is_some_and(|seconds| seconds < 0) && spec[grace] == 1 {
        restore(&mut spec, old, grace);
    }
    spec
}

fn restore(spec: &mut Value, old: &Value, field: &str) {
    let Some(fields) = spec.as_object_mut() else { return };
    match old.get(field) {
        Some(value) => drop(fields.insert(field.to_owned(), value.clone())),
        None => drop(fields.remove(field)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A pod with these fields in its spec, too.
    fn pod(fields: &Value) -> Value {
        let mut spec = json!({"restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
            "terminationGracePeriodSeconds": 30,
            "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
            "schedulingGates": [{"name": "one"}, {"name": "two"}],
            "containers": [{"name": "c", "image": "nginx:1", "imagePullPolicy": "IfNotPresent",
                "terminationMessagePolicy": "File"}]});
        for (key, value) in fields.as_object().unwrap() {
            spec[key] = value.clone();
        }
        json!({"spec": spec})
    }

    fn refused(old: &Value, new: &Value) -> Vec<String> {
        let errors = update(&pod(new), &pod(old));
        errors.iter().map(ToString::to_string).collect()
    }

    fn container(image: &str) -> Value {
        json!([{"name": "c", "image": image, "imagePullPolicy": "IfNotPresent",
            "terminationMessagePolicy": "File"}])
    }

    #[test]
    fn what_may_change() {
        let kept = json!({"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 10});
        let added = json!({"key": "b", "operator": "Equal", "value": "v", "effect": "NoExecute"});
        let cases = [
            (json!({}), json!({"containers": container("nginx:2")})),
            (json!({}), json!({"activeDeadlineSeconds": 60})),
            (json!({"activeDeadlineSeconds": 60}), json!({"activeDeadlineSeconds": 30})),
            (json!({}), json!({"tolerations": [added, kept]})),
            (json!({}), json!({"schedulingGates": [{"name": "two"}]})),
            (json!({}), json!({"schedulingGates": []})),
            (
                json!({"terminationGracePeriodSeconds": -1}),
                json!({"terminationGracePeriodSeconds": 1}),
            ),
            // A spec from before images were looked at.
            (
                json!({"containers": container(" nginx")}),
                json!({"containers": container(" nginx"), "activeDeadlineSeconds": 60}),
            ),
        ];
        for (old, new) in cases {
            assert_eq!(refused(&old, &new), Vec::<String>::new(), "{old} to {new}");
        }
    }

    #[test]
    fn what_may_not() {
        let frozen = "spec: Forbidden: pod updates may not change fields other than ";
        let lost = "spec.tolerations: Forbidden: existing toleration can not be modified except its tolerationSeconds";
        let deadline = "spec.activeDeadlineSeconds: Invalid value: ";
        let two = json!([container("nginx:1")[0], {"name": "d", "image": "i",
            "imagePullPolicy": "Always", "terminationMessagePolicy": "File"}]);
        let cases = [
            (json!({}), json!({"hostname": "h"}), frozen.to_owned()),
            (json!({}), json!({"terminationGracePeriodSeconds": 1}), frozen.to_owned()),
            (
                json!({"terminationGracePeriodSeconds": -1}),
                json!({"terminationGracePeriodSeconds": 2}),
                frozen.to_owned(),
            ),
            (
                json!({}),
                json!({"activeDeadlineSeconds": -1}),
                format!("{deadline}-1: must be between 0 and 2147483647, inclusive"),
            ),
            (
                json!({"activeDeadlineSeconds": 60}),
                json!({"activeDeadlineSeconds": 61}),
                format!("{deadline}61: must be less than or equal to previous value"),
            ),
            (
                json!({"activeDeadlineSeconds": 60}),
                json!({}),
                format!("{deadline}null: must not update from a positive integer to nil value"),
            ),
            (json!({}), json!({"tolerations": []}), lost.to_owned()),
            (
                json!({}),
                json!({"tolerations": [{"key": "a", "operator": "Equal", "value": "v"}]}),
                lost.to_owned(),
            ),
            (
                json!({}),
                json!({"tolerations": [pod(&json!({}))["spec"]["tolerations"][0], {"key": "b c"}]}),
                "spec.tolerations[1].key: Invalid value: \"b c\": ".to_owned(),
            ),
            (
                json!({}),
                json!({"schedulingGates": [{"name": "two"}, {"name": "new"}]}),
                "spec.schedulingGates[1].name: Forbidden: only deletion is allowed, but found new scheduling gate 'new'".to_owned(),
            ),
            (
                json!({}),
                json!({"containers": container(" nginx:1")}),
                "spec.containers[0].image: Invalid value: \" nginx:1\": must not have leading or trailing whitespace".to_owned(),
            ),
            (
                json!({}),
                json!({"containers": two}),
                "spec.containers: Forbidden: pod updates may not add or remove containers".to_owned(),
            ),
        ];
        for (old, new, said) in cases {
            let found = refused(&old, &new);
            assert!(found.iter().any(|error| error.starts_with(&said)), "{new}: {found:?}");
        }
    }
}
