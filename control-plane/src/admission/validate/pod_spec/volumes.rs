//! Volumes of a pod. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{
    env::{field_ref, resource_ref},
    list, name, paths,
    resources::quantity,
};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Volumes that nothing is wrong with, by name.
pub(super) type Volumes<'a> = BTreeMap<&'a str, &'a Value>;

/// The sources, in the order in which upstream looks for them, and the fields without which they say nothing.
const SOURCES: &[(&str, &[&str])] = &[
    ("emptyDir", &[]),
    ("hostPath", &["path"]),
    ("gitRepo", &["repository"]),
    ("gcePersistentDisk", &["pdName"]),
    ("awsElasticBlockStore", &["volumeID"]),
    ("secret", &["secretName"]),
    ("nfs", &["server", "path"]),
    ("iscsi", &["targetPortal", "iqn"]),
    ("glusterfs", &["endpoints", "path"]),
    ("flocker", &[]),
    ("persistentVolumeClaim", &["claimName"]),
    ("rbd", &["image"]),
    ("cinder", &["volumeID"]),
    ("cephfs", &[]),
    ("quobyte", &["registry", "volume"]),
    ("downwardAPI", &[]),
    ("fc", &[]),
    ("flexVolume", &["driver"]),
    ("configMap", &["name"]),
    ("azureFile", &["secretName", "shareName"]),
    ("vsphereVolume", &["volumePath"]),
    ("photonPersistentDisk", &["pdID"]),
    ("portworxVolume", &["volumeID"]),
    ("azureDisk", &["diskName", "diskURI"]),
    ("storageos", &[]),
    ("projected", &[]),
    ("scaleIO", &["gateway", "system"]),
    ("csi", &["driver"]),
    ("ephemeral", &[]),
    ("image", &[]),
];
const HOST_PATH_TYPES: &[&str] = &[
    "",
    "BlockDevice",
    "CharDevice",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
];
/// What a file may take from its pod.
const FIELDS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
];

pub(super) fn volumes<'a>(
    errors: &mut Vec<FieldError>,
    path: &Path,
    spec: &'a Value,
) -> Volumes<'a> {
    let mut seen = BTreeSet::new();
    let mut good = Volumes::new();
    for (index, volume) in list(spec, "volumes") {
        let (path, before) = (path.index(index), errors.len());
        source(errors, &path, volume);
        name(errors, &path.child("name"), volume, &mut seen);
        if errors.len() == before {
            good.insert(text(volume, "/name"), volume);
        }
    }
    good
}

fn source(errors: &mut Vec<FieldError>, path: &Path, volume: &Value) {
    let given = SOURCES.iter().filter(|(source, _)| volume[*source].is_object());
    for (count, (source, required)) in given.enumerate() {
        let (path, fields) = (path.child(source), &volume[*source]);
        if count > 0 {
            errors.push(FieldError::forbidden(&path, "may not specify more than 1 volume type"));
            continue;
        }
        for field in required.iter().filter(|field| text(fields, &format!("/{field}")).is_empty()) {
            errors.push(FieldError::required(&path.child(field), ""));
        }
        match *source {
            "emptyDir" => empty_dir(errors, &path, fields),
            "hostPath" => host_path(errors, &path, fields),
            "secret" | "configMap" => {
                mode(errors, &path.child("defaultMode"), &fields["defaultMode"]);
                keys(errors, &path, fields);
            }
            "downwardAPI" => {
                mode(errors, &path.child("defaultMode"), &fields["defaultMode"]);
                files(errors, &path, fields);
            }
            "projected" => projected(errors, &path, fields),
            "nfs" if !text(fields, "/path").starts_with('/') => {
                let why = "must be an absolute path";
                errors.push(FieldError::invalid(&path.child("path"), &fields["path"], why));
            }
            "image" => image(errors, &path, fields),
            "ephemeral" if !fields["volumeClaimTemplate"].is_object() => {
                errors.push(FieldError::required(&path.child("volumeClaimTemplate"), ""));
            }
            _ => {}
        }
    }
}

/// What a template may leave open.
pub(super) fn only_in_pods(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for (index, volume) in list(spec, "volumes") {
        let image = &volume["image"];
        if image.is_object() && text(image, "/reference").is_empty() {
            let path = path.index(index).child("image").child("reference");
            errors.push(FieldError::required(&path, ""));
        }
    }
}

fn image(errors: &mut Vec<FieldError>, path: &Path, fields: &Value) {
    let policies = ["Always", "IfNotPresent", "Never"];
    super::supported(errors, &path.child("pullPolicy"), &fields["pullPolicy"], &policies);
}

fn empty_dir(errors: &mut Vec<FieldError>, path: &Path, fields: &Value) {
    if quantity(&fields["sizeLimit"]).is_some_and(|limit| limit.sign() < 0) {
        let why = "SizeLimit field must be a valid resource quantity";
        errors.push(FieldError::forbidden(&path.child("sizeLimit"), why));
    }
}

fn host_path(errors: &mut Vec<FieldError>, path: &Path, fields: &Value) {
    if text(fields, "/path").is_empty() {
        return;
    }
    paths::no_backsteps(errors, &path.child("path"), &fields["path"]);
    super::supported(errors, &path.child("type"), &fields["type"], HOST_PATH_TYPES);
}

/// Permissions of a file.
fn mode(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if value.as_i64().is_some_and(|mode| !(0..=0o777).contains(&mode)) {
        let why = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(FieldError::invalid(path, value, why));
    }
}

/// The place of a file in its volume.
fn place(errors: &mut Vec<FieldError>, path: &Path, item: &Value) {
    let path = path.child("path");
    if text(item, "/path").is_empty() {
        errors.push(FieldError::required(&path, ""));
    }
    paths::not_reserved(errors, &path, &item["path"]);
}

/// Keys of a Secret or ConfigMap that become files.
fn keys(errors: &mut Vec<FieldError>, path: &Path, source: &Value) {
    for (index, item) in list(source, "items") {
        let path = path.child("items").index(index);
        if text(item, "/key").is_empty() {
            errors.push(FieldError::required(&path.child("key"), ""));
        }
        place(errors, &path, item);
        mode(errors, &path.child("mode"), &item["mode"]);
    }
}

/// Fields of the pod that become files. Upstream does not name which of them is wrong.
fn files(errors: &mut Vec<FieldError>, path: &Path, source: &Value) {
    for (_, item) in list(source, "items") {
        place(errors, path, item);
        let (field, resource) = (&item["fieldRef"], &item["resourceFieldRef"]);
        match (field.is_object(), resource.is_object()) {
            (true, both) => {
                field_ref(errors, &path.child("fieldRef"), field, FIELDS);
                if both {
                    let why = "fieldRef and resourceFieldRef can not be specified simultaneously";
                    errors.push(FieldError::invalid(path, &json!("resource"), why));
                }
            }
            (false, true) => {
                let path = path.child("resourceFieldRef");
                if text(resource, "/containerName").is_empty() {
                    errors.push(FieldError::required(&path.child("containerName"), ""));
                } else {
                    resource_ref(errors, &path, resource);
                }
            }
            (false, false) => {
                let why = "one of fieldRef and resourceFieldRef is required";
                errors.push(FieldError::required(path, why));
            }
        }
        mode(errors, &path.child("mode"), &item["mode"]);
    }
}

fn projected(errors: &mut Vec<FieldError>, path: &Path, fields: &Value) {
    mode(errors, &path.child("defaultMode"), &fields["defaultMode"]);
    let mut taken = BTreeSet::new();
    for (index, one) in list(fields, "sources") {
        let place = path.child("sources").index(index);
        for kind in
            ["secret", "configMap", "downwardAPI"].iter().filter(|kind| one[**kind].is_object())
        {
            let (place, source) = (place.child(kind), &one[*kind]);
            if *kind == "downwardAPI" {
                files(errors, &place, source);
            } else {
                if text(source, "/name").is_empty() {
                    errors.push(FieldError::required(&place.child("name"), ""));
                }
                keys(errors, &place, source);
            }
            for (_, item) in list(source, "items") {
                let file = text(item, "/path");
                if !file.is_empty() && !taken.insert(file) {
                    let owner =
                        if *kind == "downwardAPI" { &item["path"] } else { &source["name"] };
                    errors.push(FieldError::invalid(path, owner, "conflicting duplicate paths"));
                }
            }
        }
        if one["serviceAccountToken"].is_object() {
            token(errors, path, &place.child("serviceAccountToken"), &one["serviceAccountToken"]);
        }
        if one.as_object().is_some_and(|kinds| kinds.len() > 1) {
            let why = "may not specify more than 1 volume type per source";
            errors.push(FieldError::forbidden(&place, why));
        }
    }
}

/// Upstream names the token's path as if it were the volume's.
fn token(errors: &mut Vec<FieldError>, volume: &Path, path: &Path, token: &Value) {
    let seconds = &token["expirationSeconds"];
    let why = match seconds.as_i64() {
        Some(..600) => Some("may not specify a duration less than 10 minutes"),
        Some(0x1_0000_0001..) => Some("may not specify a duration larger than 2^32 seconds"),
        Some(600..=0x1_0000_0000) | None => None,
    };
    if let Some(why) = why {
        errors.push(FieldError::invalid(&path.child("expirationSeconds"), seconds, why));
    }
    place(errors, volume, token);
}
