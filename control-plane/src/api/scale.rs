//! `autoscaling/v1` `Scale` of workloads. Pure.

use serde_json::{Value, json};

use crate::{
    api::{
        core::Call,
        error,
        prepare::{self, text},
    },
    client::ApiError,
    schema::{FieldError, Path},
};

/// The scale of a Deployment or ReplicaSet.
#[must_use]
pub(super) fn of(owner: &Value) -> Value {
    let metadata = &owner["metadata"];
    let labels = owner["spec"]["selector"]["matchLabels"].as_object();
    let mut terms: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect();
    for expression in owner["spec"]["selector"]["matchExpressions"].as_array().into_iter().flatten()
    {
        let values = expression["values"].as_array().into_iter().flatten();
        let values: Vec<&str> = values.filter_map(Value::as_str).collect();
        let (key, values) = (text(expression, "/key"), values.join(","));
        terms.push(match text(expression, "/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"],
            "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"],
            "creationTimestamp": metadata["creationTimestamp"]},
        "spec": {"replicas": owner["spec"]["replicas"].as_i64().unwrap_or(0)},
        "status": {"replicas": owner["status"]["replicas"].as_i64().unwrap_or(0),
            "selector": terms.join(",")}})
}

/// The owner with the replicas of a scale.
///
/// # Errors
/// 422 for a negative number, 400 for another object's scale.
pub(super) fn onto(call: &Call, owner: &Value, scale: &Value) -> Result<Value, ApiError> {
    prepare::named(call.about(), scale)?;
    let namespace = text(scale, "/metadata/namespace");
    if !namespace.is_empty() && namespace != call.namespace {
        return Err(error::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let replicas = scale["spec"]["replicas"].as_i64().unwrap_or(0);
    if replicas < 0 {
        let why = "must be greater than or equal to 0";
        let error = FieldError::invalid(&Path::new("spec.replicas"), &json!(replicas), why);
        return Err(super::core::invalid(call, &[error]));
    }
    let mut owner = owner.clone();
    owner["spec"]["replicas"] = json!(replicas);
    for field in ["resourceVersion", "uid"] {
        let given = &scale["metadata"][field];
        if given.as_str().is_some_and(|text| !text.is_empty()) {
            owner["metadata"][field] = given.clone();
        }
    }
    Ok(owner)
}
