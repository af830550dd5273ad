//! Variables of a container. Pure.

use api::names;
use serde_json::{Value, json};

use super::{invalid, list};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};
pub(super) fn environment(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    for (index, env) in list(container, "env") {
        let path = path.child("env").index(index);
        match text(env, "/name") {
            "" => errors.push(FieldError::required(&path.child("name"), "")),
            name => invalid(errors, &path.child("name"), &env["name"], names::env_var_name(name)),
        }
        if let Some(from) = env["valueFrom"].as_object() {
            let path = path.child("valueFrom");
            match from.len() {
                0 => errors.push(FieldError::invalid(
                    &path,
                    &json!(""),
                    "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
                )),
                1 if text(env, "/value").is_empty() => {}
                1 => errors.push(FieldError::invalid(
                    &path,
                    &json!(""),
                    "may not be specified when `value` is not empty",
                )),
                _ => errors.push(FieldError::invalid(
                    &path,
                    &json!(""),
                    "may not have more than one field specified at a time",
                )),
            }
        }
    }
    for (index, from) in list(container, "envFrom") {
        let path = path.child("envFrom").index(index);
        let sources = ["configMapRef", "secretRef"].iter().filter(|s| from[**s].is_object());
        match sources.count() {
            0 => errors.push(FieldError::invalid(
                &path,
                &json!(""),
                "must specify one of: `configMapRef` or `secretRef`",
            )),
            1 => {}
            _ => errors.push(FieldError::invalid(
                &path,
                &json!(""),
                "may not have more than one field specified at a time",
            )),
        }
    }
}
