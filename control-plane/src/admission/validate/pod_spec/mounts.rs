//! Where containers mount the volumes of their pod. Pure.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{list, paths, supported, volumes::Volumes};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Upstream's `ValidateVolumeMounts`, which does not always name which of the mounts it means.
pub(super) fn mounts(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    volumes: &Volumes<'_>,
) {
    let mut seen = BTreeSet::new();
    for (index, mount) in list(container, "volumeMounts") {
        let place = path.index(index);
        named(errors, &place.child("name"), mount, volumes);
        target(errors, &place.child("mountPath"), &mount["mountPath"], &mut seen);
        apart(errors, &place, mount, container);
        if volumes.get(text(mount, "/name")).is_some_and(|volume| volume["image"].is_object()) {
            for field in ["subPath", "subPathExpr"] {
                if !mount[field].is_null() {
                    let why = "not allowed in image volume sources";
                    errors.push(FieldError::invalid(&place.child(field), &mount[field], why));
                }
            }
        }
        paths::descending(errors, &path.child("subPath"), &mount["subPath"]);
        if !text(mount, "/subPathExpr").is_empty() && !text(mount, "/subPath").is_empty() {
            let why = "subPathExpr and subPath are mutually exclusive";
            let place = place.child("subPathExpr");
            errors.push(FieldError::invalid(&place, &mount["subPathExpr"], why));
        }
        paths::descending(errors, &path.child("subPathExpr"), &mount["subPathExpr"]);
        propagation(errors, &path.child("mountPropagation"), mount, container);
        read_only(errors, &path.child("recursiveReadOnly"), mount);
    }
}

fn named(errors: &mut Vec<FieldError>, path: &Path, of: &Value, volumes: &Volumes<'_>) {
    let name = text(of, "/name");
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
    }
    if !volumes.contains_key(name) {
        errors.push(FieldError::not_found(path, &json!(name)));
    }
}

fn target<'a>(
    errors: &mut Vec<FieldError>,
    path: &Path,
    value: &'a Value,
    seen: &mut BTreeSet<&'a str>,
) {
    let text = value.as_str().unwrap_or("");
    if text.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else if !seen.insert(text) {
        errors.push(FieldError::invalid(path, value, "must be unique"));
    }
}

/// What is a device of the container is not mounted besides.
fn apart(errors: &mut Vec<FieldError>, path: &Path, mount: &Value, container: &Value) {
    let is = |field: &str, of: &str| {
        list(container, "volumeDevices").any(|(_, device)| device[field] == mount[of])
    };
    if is("name", "name") {
        let why = "must not already exist in volumeDevices";
        errors.push(FieldError::invalid(&path.child("name"), &mount["name"], why));
    }
    if is("devicePath", "mountPath") {
        let why = "must not already exist as a path in volumeDevices";
        errors.push(FieldError::invalid(&path.child("mountPath"), &mount["mountPath"], why));
    }
}

fn propagation(errors: &mut Vec<FieldError>, path: &Path, mount: &Value, container: &Value) {
    const MODES: &[&str] = &["Bidirectional", "HostToContainer", "None"];
    let mode = &mount["mountPropagation"];
    supported(errors, path, mode, MODES);
    if *mode == "Bidirectional" && container["securityContext"]["privileged"] != true {
        let why = "Bidirectional mount propagation is available only to privileged containers";
        errors.push(FieldError::forbidden(path, why));
    }
}

fn read_only(errors: &mut Vec<FieldError>, path: &Path, mount: &Value) {
    const MODES: &[&str] = &["Disabled", "Enabled", "IfPossible"];
    let mode = &mount["recursiveReadOnly"];
    supported(errors, path, mode, MODES);
    if !matches!(mode.as_str(), Some("Enabled" | "IfPossible")) {
        return;
    }
    if mount["readOnly"] != true {
        errors.push(FieldError::forbidden(path, "may only be specified when readOnly is true"));
    }
    if mount["mountPropagation"].as_str().is_some_and(|mode| mode != "None") {
        let why = "may only be specified when mountPropagation is None or not specified";
        errors.push(FieldError::forbidden(path, why));
    }
}

/// Upstream's `ValidateVolumeDevices`.
pub(super) fn devices(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    volumes: &Volumes<'_>,
) {
    let (mut names, mut targets) = (BTreeSet::new(), BTreeSet::new());
    for (index, device) in list(container, "volumeDevices") {
        let path = path.index(index);
        let name = text(device, "/name");
        named(errors, &path.child("name"), device, volumes);
        let claims = |volume: &&Value| {
            volume["persistentVolumeClaim"].is_object() || volume["ephemeral"].is_object()
        };
        let why = match volumes.get(name) {
            Some(volume) if !claims(volume) => {
                "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode"
            }
            _ if !names.insert(name) => "must be unique",
            _ => "",
        };
        if !why.is_empty() {
            errors.push(FieldError::invalid(&path.child("name"), &device["name"], why));
        }
        let place = path.child("devicePath");
        target(errors, &place, &device["devicePath"], &mut targets);
        if paths::has_backsteps(text(device, "/devicePath")) {
            let why = "can not contain backsteps ('..')";
            errors.push(FieldError::invalid(&place, &device["devicePath"], why));
        }
    }
}
