//! The smaller kinds. Pure.

use std::collections::BTreeSet;

use api::names;
use base64::Engine as _;
use serde_json::{Value, json};

use super::{address, immutable, invalid, list, one_of, pod_spec, positive};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Most bytes of data in a ConfigMap or Secret (upstream: 1 MiB).
const DATA: usize = 1 << 20;

/// Fields, and whether their values are bytes in base64.
type Data = [(&'static str, bool)];

/// `whole` is what is too long where it is.
fn data(errors: &mut Vec<FieldError>, object: &Value, fields: &Data, whole: &str) {
    let mut size = 0;
    for (field, is_base64) in fields {
        let path = Path::new(field);
        for (key, value) in object[*field].as_object().into_iter().flatten() {
            invalid(errors, &path.key(key), &json!(key), names::config_map_key(key));
            let text = value.as_str().unwrap_or("");
            size += if *is_base64 { decoded_bytes(text) } else { text.len() };
        }
    }
    if size > DATA {
        errors.push(FieldError::too_long(&Path::new(whole), DATA));
    }
}

fn decoded_bytes(base64: &str) -> usize {
    let padding = base64.bytes().rev().take_while(|byte| *byte == b'=').count();
    (base64.len() / 4 * 3).saturating_sub(padding)
}

fn frozen(errors: &mut Vec<FieldError>, object: &Value, old: Option<&Value>, fields: &[&str]) {
    let Some(old) = old.filter(|old| old["immutable"] == true) else { return };
    if object["immutable"] != true {
        let path = Path::new("immutable");
        errors.push(FieldError::forbidden(&path, "field is immutable when `immutable` is set"));
    }
    for field in fields {
        if object[*field] != old[*field] {
            let path = Path::new(field);
            errors.push(FieldError::forbidden(&path, "field is immutable when `immutable` is set"));
        }
    }
}

pub(super) fn config_map(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    // Upstream's path of the object itself.
    data(&mut errors, object, &[("data", false), ("binaryData", true)], "[]");
    for key in object["data"].as_object().into_iter().flat_map(|map| map.keys()) {
        if object["binaryData"].get(key).is_some() {
            let path = Path::new("data").key(key);
            let why = "duplicate of key present in binaryData";
            errors.push(FieldError::invalid(&path, &json!(key), why));
        }
    }
    frozen(&mut errors, object, old, &["data", "binaryData"]);
    errors
}

pub(super) fn secret(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    data(&mut errors, object, &[("data", true)], "data");
    secret_type(&mut errors, object);
    if let Some(old) = old {
        immutable(&mut errors, &Path::new("type"), &object["type"], &old["type"]);
    }
    frozen(&mut errors, object, old, &["data"]);
    errors
}

/// What a Secret of a type that upstream knows must have.
fn secret_type(errors: &mut Vec<FieldError>, object: &Value) {
    let path = Path::new("data");
    let lacks = |key: &&&str| object["data"].get(**key).is_none();
    let (required, json): (&[&str], _) = match text(object, "/type") {
        "kubernetes.io/tls" => (&["tls.crt", "tls.key"], None),
        "kubernetes.io/ssh-auth" if text(&object["data"], "/ssh-privatekey").is_empty() => {
            return errors.push(FieldError::required(&path.key("ssh-privatekey"), ""));
        }
        "kubernetes.io/dockerconfigjson" => (&[".dockerconfigjson"], Some(".dockerconfigjson")),
        "kubernetes.io/dockercfg" => (&[".dockercfg"], Some(".dockercfg")),
        "kubernetes.io/basic-auth" => {
            let either: &[&str] = &["username", "password"];
            (if either.iter().all(|key| lacks(&key)) { either } else { &[] }, None)
        }
        "kubernetes.io/service-account-token" => {
            let name = "kubernetes.io/service-account.name";
            if object["metadata"]["annotations"][name].as_str().is_none_or(str::is_empty) {
                let path = Path::new("metadata.annotations").key(name);
                errors.push(FieldError::required(&path, ""));
            }
            return;
        }
        _ => return,
    };
    for key in required.iter().filter(lacks) {
        errors.push(FieldError::required(&path.key(key), ""));
    }
    if let Some(key) = json
        && let Some(why) = object["data"][key].as_str().and_then(not_json)
    {
        let redacted = json!("<secret contents redacted>");
        errors.push(FieldError::invalid(&path.key(key), &redacted, why));
    }
}

/// Why base64 is not that of a JSON object; in Go's words where a file of another kind was taken.
fn not_json(encoded: &str) -> Option<String> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap_or_default();
    let parsed: Result<Value, _> = serde_json::from_slice(&bytes);
    let kind = match parsed {
        Ok(Value::Object(_) | Value::Null) => return None,
        Ok(Value::Array(_)) => "array",
        Ok(Value::String(_)) => "string",
        Ok(Value::Bool(_)) => "bool",
        Ok(Value::Number(_)) => "number",
        Err(error) if error.is_eof() => return Some("unexpected end of JSON input".to_owned()),
        Err(error) => {
            let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
            let strange = first.filter(|byte| !b"{[\"-0123456789tfn".contains(byte));
            return Some(strange.map_or_else(
                || error.to_string(),
                |byte| {
                    let first = char::from(*byte);
                    format!("invalid character '{first}' looking for beginning of value")
                },
            ));
        }
    };
    let of = "Go value of type map[string]interface {}";
    Some(format!("json: cannot unmarshal {kind} into {of}"))
}

pub(super) fn node(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    taints(&mut errors, object);
    errors.extend(node_resources(object));
    let path = Path::new("spec.podCIDRs");
    let cidrs = address::texts(&object["spec"]["podCIDRs"]);
    let stored = old.map_or_else(Vec::new, |old| address::texts(&old["spec"]["podCIDRs"]));
    for (index, cidr) in cidrs.iter().enumerate() {
        address::cidr(&mut errors, &path.index(index), cidr, &stored);
    }
    if cidrs.len() > 1 && !address::is_dual(&cidrs) {
        let why = "may specify no more than one CIDR for each IP family";
        errors.push(FieldError::invalid(&path, &json!(cidrs), why));
    }
    let Some(old) = old else { return errors };
    if !stored.is_empty() && stored != cidrs {
        let why = "node updates may not change podCIDR except from \"\" to valid";
        errors.push(FieldError::forbidden(&path, why));
    }
    let (id, before) = (&object["spec"]["providerID"], &old["spec"]["providerID"]);
    if before.as_str().is_some_and(|text| !text.is_empty()) && id != before {
        let why = "node updates may not change providerID except from \"\" to valid";
        errors.push(FieldError::forbidden(&Path::new("spec.providerID"), why));
    }
    errors
}

/// What a Node says it has.
pub(super) fn node_resources(object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for list in ["capacity", "allocatable"] {
        for (name, amount) in object["status"][list].as_object().into_iter().flatten() {
            let path = Path::new("status").child(list).child(name);
            pod_spec::amount(&mut errors, &path, name, amount);
        }
    }
    errors
}

/// Upstream's `validateNodeTaints`, which takes them for a part of the metadata.
fn taints(errors: &mut Vec<FieldError>, object: &Value) {
    let mut seen = BTreeSet::new();
    for (index, taint) in list(&object["spec"], "taints") {
        let path = Path::new("metadata.taints").index(index);
        let (key, effect) = (text(taint, "/key"), text(taint, "/effect"));
        invalid(errors, &path.child("key"), &json!(key), names::qualified_name(key));
        let reasons = names::label_value(text(taint, "/value"));
        if !reasons.is_empty() {
            let why = reasons.join(";");
            errors.push(FieldError::invalid(&path.child("value"), &taint["value"], why));
        }
        one_of(errors, &path.child("effect"), &taint["effect"], pod_spec::TAINT_EFFECTS);
        if !seen.insert((key, effect)) {
            let mut error = FieldError::duplicate(&path, taint);
            error.detail = "taints must be unique by key and effect pair".to_owned();
            errors.push(error);
        }
    }
}

pub(super) fn lease(object: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let spec = &object["spec"];
    let path = Path::new("spec.leaseDurationSeconds");
    positive(&mut errors, &path, &spec["leaseDurationSeconds"]);
    let path = Path::new("spec.leaseTransitions");
    super::non_negative(&mut errors, &path, &spec["leaseTransitions"]);
    errors
}

/// A Namespace's own; upstream names which only where nothing but they is written.
pub(super) fn finalizers(object: &Value, at: fn(&Path, usize) -> Path) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (index, finalizer) in list(&object["spec"], "finalizers") {
        let path = at(&Path::new("spec.finalizers"), index);
        super::meta::finalizer(&mut errors, (&path, &path), finalizer);
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};

    #[test]
    fn nodes() {
        let taint = |effect: &str| json!({"key": "a", "value": "b", "effect": effect});
        let table = [
            (json!({"status": {"capacity": {"cpu": "500m", "pods": "110", "x.y/z": "2"}}}), ""),
            (
                json!({"status": {"capacity": {"cpu": "-1"}, "allocatable": {"memory": "-1Gi"}}}),
                "status.capacity.cpu: Invalid value: \"-1\": must be greater than or equal to 0\n\
                 status.allocatable.memory: Invalid value: \"-1Gi\": must be greater than or equal to 0",
            ),
            (
                json!({"status": {"capacity": {"pods": "1500m", "x.y/z": "500m"}}}),
                "status.capacity.pods: Invalid value: \"1500m\": must be an integer\n\
                 status.capacity.x.y/z: Invalid value: \"500m\": must be an integer",
            ),
            (json!({"spec": {"taints": [taint("NoSchedule"), taint("NoExecute")]}}), ""),
            (
                json!({"spec": {"taints": [taint("NoSchedule"), taint("NoSchedule")]}}),
                "metadata.taints[1]: Duplicate value: {\"effect\":\"NoSchedule\",\"key\":\"a\",\"value\":\"b\"}: taints must be unique by key and effect pair",
            ),
            (
                json!({"spec": {"taints": [taint("Never")]}}),
                "metadata.taints[0].effect: Unsupported value: \"Never\": supported values: \"NoSchedule\", \"PreferNoSchedule\", \"NoExecute\"",
            ),
        ];
        for (object, want) in table {
            assert_eq!(lines(&node(&object, None)), want, "{object}");
        }
    }

    #[test]
    fn a_namespace_has_finalizers_with_domains() {
        let object = json!({"spec": {"finalizers": ["kubernetes", "a.b/c", "x"]}});
        let why = "Invalid value: \"x\": name is neither a standard finalizer name nor is it fully qualified";
        assert_eq!(
            lines(&finalizers(&object, |path, _| path.clone())),
            format!("spec.finalizers: {why}")
        );
        assert_eq!(lines(&finalizers(&object, Path::index)), format!("spec.finalizers[2]: {why}"));
    }

    #[test]
    fn a_mebibyte_of_data_and_no_more() {
        let engine = base64::engine::general_purpose::STANDARD;
        let bytes = |count: usize| engine.encode(vec![0; count]);
        let text = |count: usize| "x".repeat(count);
        let long = "Too long: may not be more than 1048576 bytes";
        let secret = |value: String| lines(&secret(&json!({"data": {"a": value}}), None));
        assert_eq!(secret(bytes(DATA)), "");
        assert_eq!(secret(bytes(DATA + 1)), format!("data: {long}"));
        let map = |data: String, more: String| {
            lines(&config_map(&json!({"data": {"a": data}, "binaryData": {"b": more}}), None))
        };
        assert_eq!(map(text(DATA - 1), bytes(1)), "");
        assert_eq!(map(text(DATA - 1), bytes(2)), format!("[]: {long}"));
    }

    #[test]
    fn secrets_of_known_types() {
        let engine = base64::engine::general_purpose::STANDARD;
        let of = |kind: &str, key: &str, value: &str| json!({"type": format!("kubernetes.io/{kind}"), "data": {key: engine.encode(value)}});
        let config = |value: &str| of("dockerconfigjson", ".dockerconfigjson", value);
        let redacted = |why: &str| {
            format!("data[.dockerconfigjson]: Invalid value: \"<secret contents redacted>\": {why}")
        };
        let array =
            redacted("json: cannot unmarshal array into Go value of type map[string]interface {}");
        let cut = redacted("unexpected end of JSON input");
        let text = redacted("invalid character '<' looking for beginning of value");
        let table = [
            (config("{\"auths\": {}}"), ""),
            (config("[]"), array.as_str()),
            (config(""), &cut),
            (config("<xml>"), &text),
            (of("dockerconfigjson", "a", "{}"), "data[.dockerconfigjson]: Required value"),
            (of("dockercfg", "a", "{}"), "data[.dockercfg]: Required value"),
            (
                of("basic-auth", "a", "b"),
                "data[username]: Required value\ndata[password]: Required value",
            ),
            (of("basic-auth", "password", ""), ""),
            (of("ssh-auth", "ssh-privatekey", ""), "data[ssh-privatekey]: Required value"),
            (of("tls", "tls.crt", "x"), "data[tls.key]: Required value"),
            (
                of("service-account-token", "a", "b"),
                "metadata.annotations[kubernetes.io/service-account.name]: Required value",
            ),
            (of("mine", "a", "b"), ""),
        ];
        for (object, want) in table {
            assert_eq!(lines(&secret(&object, None)), want, "{object}");
        }
        let mut named = of("service-account-token", "a", "b");
        named["metadata"] =
            json!({"annotations": {"kubernetes.io/service-account.name": "default"}});
        assert_eq!(lines(&secret(&named, None)), "");
    }
}
