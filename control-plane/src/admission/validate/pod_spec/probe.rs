//! Probes, and what they and the hooks of a container do. Pure.

use serde_json::Value;

use super::{list, non_negative, one_of, port_or_name, positive};
use crate::schema::{FieldError, Path};
pub(super) fn probe(errors: &mut Vec<FieldError>, path: &Path, probe: &Value) {
    handler(errors, path, probe);
    for field in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        non_negative(errors, &path.child(field), &probe[field]);
    }
    positive(
        errors,
        &path.child("terminationGracePeriodSeconds"),
        &probe["terminationGracePeriodSeconds"],
    );
}

pub(super) fn handler(errors: &mut Vec<FieldError>, path: &Path, of: &Value) {
    let kinds = ["exec", "httpGet", "tcpSocket", "grpc", "sleep"];
    let given: Vec<&&str> = kinds.iter().filter(|kind| of[**kind].is_object()).collect();
    if given.is_empty() {
        errors.push(FieldError::required(path, "must specify a handler type"));
    }
    for extra in given.iter().skip(1) {
        let path = path.child(extra);
        errors.push(FieldError::forbidden(&path, "may not specify more than 1 handler type"));
    }
    for kind in ["httpGet", "tcpSocket"] {
        if of[kind].is_object() {
            port_or_name(errors, &path.child(kind).child("port"), &of[kind]["port"]);
        }
    }
    if of["httpGet"].is_object() {
        let scheme = path.child("httpGet").child("scheme");
        one_of(errors, &scheme, &of["httpGet"]["scheme"], &["HTTP", "HTTPS"]);
    }
    if of["exec"].is_object() && list(&of["exec"], "command").next().is_none() {
        errors.push(FieldError::required(&path.child("exec").child("command"), ""));
    }
}
