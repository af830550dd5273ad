//! Security contexts of pods and containers. Pure.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{list, one_of, paths, supported};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Upstream's `validatePodSpecSecurityContext`; `path` is the spec's. What its internal form keeps in the context
/// too is in the spec itself.
pub(super) fn of_pod(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let (path, context) = (path.child("securityContext"), &spec["securityContext"]);
    for field in ["fsGroup", "runAsUser", "runAsGroup"] {
        id(errors, &path.child(field), &context[field]);
    }
    for (index, group) in list(context, "supplementalGroups") {
        id(errors, &path.child("supplementalGroups").index(index), group);
    }
    if spec["shareProcessNamespace"] == true && spec["hostPID"] == true {
        let why = "ShareProcessNamespace and HostPID cannot both be enabled";
        let path = path.child("shareProcessNamespace");
        errors.push(FieldError::invalid(&path, &json!(true), why));
    }
    sysctls(errors, &path.child("sysctls"), spec);
    let (field, words) = ("fsGroupChangePolicy", ["Always", "OnRootMismatch"]);
    supported(errors, &path.child(field), &context[field], &words);
    profiles(errors, &path, context);
    for (field, words) in [
        ("supplementalGroupsPolicy", ["Merge", "Strict"]),
        ("seLinuxChangePolicy", ["MountOption", "Recursive"]),
    ] {
        supported(errors, &path.child(field), &context[field], &words);
    }
}

/// Upstream's `ValidateSecurityContext`.
pub(super) fn of_container(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    spec: &Value,
) {
    let context = &container["securityContext"];
    for field in ["runAsUser", "runAsGroup"] {
        id(errors, &path.child(field), &context[field]);
    }
    let (place, mount) = (path.child("procMount"), &context["procMount"]);
    supported(errors, &place, mount, &["Default", "Unmasked"]);
    if *mount == "Unmasked" && spec["hostUsers"] != false {
        let why = "`hostUsers` must be false to use `Unmasked`";
        errors.push(FieldError::invalid(&place, mount, why));
    }
    profiles(errors, path, context);
    if context["allowPrivilegeEscalation"] == false {
        if context["privileged"] == true {
            let why = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.push(FieldError::invalid(path, context, why));
        }
        if list(&context["capabilities"], "add").any(|(_, added)| added == "CAP_SYS_ADMIN") {
            let why = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.push(FieldError::invalid(path, context, why));
        }
    }
}

/// Upstream's `validateHostUsers`, with its spelling of the fields.
pub(super) fn host_users(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    if spec["hostUsers"] != false {
        return;
    }
    for (field, shown) in
        [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")]
    {
        if spec[field] == true {
            let why = "when `hostUsers` is false";
            errors.push(FieldError::forbidden(&path.child(shown), why));
        }
    }
}

/// Of a user or group.
fn id(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if value.as_i64().is_some_and(|id| !(0..=i64::from(i32::MAX)).contains(&id)) {
        let why = "must be between 0 and 2147483647, inclusive";
        errors.push(FieldError::invalid(path, value, why));
    }
}

const PROFILES: &[&str] = &["Localhost", "RuntimeDefault", "Unconfined"];

fn profiles(errors: &mut Vec<FieldError>, path: &Path, context: &Value) {
    let (place, seccomp) = (path.child("seccompProfile"), &context["seccompProfile"]);
    if seccomp.is_object() {
        kind(errors, &place.child("type"), seccomp, "seccompProfile");
        let (place, own) = (place.child("localhostProfile"), &seccomp["localhostProfile"]);
        match (seccomp["type"] == "Localhost", own.is_null()) {
            (true, true) => {
                let why = "must be set when seccomp type is Localhost";
                errors.push(FieldError::required(&place, why));
            }
            (true, false) => paths::descending(errors, &place, own),
            (false, true) => {}
            (false, false) => {
                let why = "can only be set when seccomp type is Localhost";
                errors.push(FieldError::invalid(&place, seccomp, why));
            }
        }
    }
    let (place, armor) = (path.child("appArmorProfile"), &context["appArmorProfile"]);
    if armor.is_object() {
        kind(errors, &place.child("type"), armor, "appArmorProfile");
        app_armor(errors, &place.child("localhostProfile"), armor);
    }
}

fn kind(errors: &mut Vec<FieldError>, path: &Path, profile: &Value, field: &str) {
    if text(profile, "/type").is_empty() {
        let why = format!("type is required when {field} is set");
        errors.push(FieldError::required(path, why));
    } else {
        one_of(errors, path, &profile["type"], PROFILES);
    }
}

fn app_armor(errors: &mut Vec<FieldError>, path: &Path, profile: &Value) {
    /// `PATH_MAX` less its end.
    const LONGEST: usize = 4095;
    let own = &profile["localhostProfile"];
    match (text(profile, "/type"), own.as_str()) {
        ("Localhost", Some(name)) if name.trim() != name => {
            let why = "must not be padded with whitespace";
            errors.push(FieldError::invalid(path, own, why));
        }
        ("Localhost", None | Some("")) => {
            let why = "must be set when AppArmor type is Localhost";
            errors.push(FieldError::required(path, why));
        }
        ("RuntimeDefault" | "Unconfined", Some(_)) => {
            let why = "can only be set when AppArmor type is Localhost";
            errors.push(FieldError::invalid(path, own, why));
        }
        _ => {}
    }
    if own.as_str().is_some_and(|name| name.len() > LONGEST) {
        errors.push(FieldError::too_long(path, LONGEST));
    }
}

fn sysctls(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let mut seen = BTreeSet::new();
    for (index, sysctl) in list(&spec["securityContext"], "sysctls") {
        let path = path.index(index).child("name");
        let name = text(sysctl, "/name");
        if name.is_empty() {
            errors.push(FieldError::required(&path, ""));
        } else if !is_sysctl(name) {
            let why = format!(
                "must have at most {SYSCTL_BYTES} characters and match regex {SYSCTL_FORM}"
            );
            errors.push(FieldError::invalid(&path, &json!(name), why));
        } else if seen.contains(name) {
            errors.push(FieldError::duplicate(&path, &json!(name)));
        }
        seen.insert(name);
        for (host, of_host) in [("hostNetwork", is_of_network(name)), ("hostIPC", is_of_ipc(name))]
        {
            if of_host && spec[host] == true {
                let why = format!("may not be specified when '{host}' is true");
                errors.push(FieldError::invalid(&path, &json!(name), why));
            }
        }
    }
}

const SYSCTL_BYTES: usize = 253;
const SYSCTL_FORM: &str = r"^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";

fn is_sysctl(name: &str) -> bool {
    let end = |byte: Option<u8>| {
        byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let is_segment = |part: &str| {
        end(part.bytes().next())
            && end(part.bytes().last())
            && part.bytes().all(|byte| end(Some(byte)) || b"-_".contains(&byte))
    };
    name.len() <= SYSCTL_BYTES && name.split(['.', '/']).all(is_segment)
}

/// Which kernel namespace a setting belongs to: component-helpers' `sysctl.GetNamespace`, which takes both ways of
/// writing it. Only the first separator counts.
fn dotted(name: &str) -> String {
    match name.find(['.', '/']).and_then(|at| name.as_bytes().get(at)) {
        // With slashes, dots are part of names.
        Some(b'/') => name.replace('.', "\0").replace('/', ".").replace('\0', "/"),
        _ => name.to_owned(),
    }
}

fn is_of_network(name: &str) -> bool {
    dotted(name).starts_with("net.")
}

fn is_of_ipc(name: &str) -> bool {
    let name = dotted(name);
    name == "kernel.sem"
        || ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|prefix| name.starts_with(prefix))
}
