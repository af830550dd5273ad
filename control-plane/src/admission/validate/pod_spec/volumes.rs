//! Volumes of a pod, and where its containers mount them. Pure.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{list, name};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};
pub(super) fn volumes(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for (index, volume) in list(spec, "volumes") {
        let path = path.index(index);
        name(errors, &path.child("name"), volume, &mut seen);
        let sources: Vec<&String> = volume
            .as_object()
            .into_iter()
            .flat_map(|v| v.keys())
            .filter(|k| *k != "name")
            .collect();
        for extra in sources.iter().skip(1) {
            errors.push(FieldError::forbidden(
                &path.child(extra),
                "may not specify more than 1 volume type",
            ));
        }
        for (source, field) in [
            ("hostPath", "path"),
            ("secret", "secretName"),
            ("configMap", "name"),
            ("persistentVolumeClaim", "claimName"),
        ] {
            if volume[source].is_object() && text(&volume[source], &format!("/{field}")).is_empty()
            {
                errors.push(FieldError::required(&path.child(source).child(field), ""));
            }
        }
    }
    seen
}

pub(super) fn mounts(
    errors: &mut Vec<FieldError>,
    path: &Path,
    of: &Value,
    volumes: &BTreeSet<String>,
) {
    let mut seen = BTreeSet::new();
    for (index, mount) in list(of, "volumeMounts") {
        let path = path.index(index);
        match text(mount, "/name") {
            "" => errors.push(FieldError::required(&path.child("name"), "")),
            name if !volumes.contains(name) => {
                errors.push(FieldError::not_found(&path.child("name"), &mount["name"]));
            }
            _ => {}
        }
        match text(mount, "/mountPath") {
            "" => errors.push(FieldError::required(&path.child("mountPath"), "")),
            place if !seen.insert(place) => errors.push(FieldError::invalid(
                &path.child("mountPath"),
                &mount["mountPath"],
                "must be unique",
            )),
            _ => {}
        }
        if text(mount, "/subPath").split('/').any(|part| part == "..") {
            let path = path.child("subPath");
            errors.push(FieldError::invalid(&path, &mount["subPath"], "must not contain '..'"));
        }
    }
}
