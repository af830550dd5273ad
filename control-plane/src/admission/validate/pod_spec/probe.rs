//! Probes and hooks of a container that stays. Pure.

use api::names;
use serde_json::Value;

use super::{invalid, list, non_negative, one_of, port_or_name, positive};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// `grace` is the pod's, in seconds: no hook may sleep longer.
pub(super) fn probes_and_hooks(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    grace: Option<i64>,
) {
    for hook in ["postStart", "preStop"] {
        let (path, action) = (path.child("lifecycle").child(hook), &container["lifecycle"][hook]);
        if action.is_object() {
            handler(errors, &path, action, grace);
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let (path, probe) = (path.child(name), &container[name]);
        if !probe.is_object() {
            continue;
        }
        self::probe(errors, &path, probe);
        if name == "readinessProbe" {
            let (path, own) = (path.child(GRACE), &probe[GRACE]);
            if !own.is_null() {
                let why = "must not be set for readinessProbes";
                errors.push(FieldError::invalid(&path, own, why));
            }
        } else if probe["successThreshold"] != 1 {
            let path = path.child("successThreshold");
            errors.push(FieldError::invalid(&path, &probe["successThreshold"], "must be 1"));
        }
    }
}

const GRACE: &str = "terminationGracePeriodSeconds";

fn probe(errors: &mut Vec<FieldError>, path: &Path, probe: &Value) {
    handler(errors, path, probe, None);
    for field in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        non_negative(errors, &path.child(field), &probe[field]);
    }
    positive(errors, &path.child(GRACE), &probe[GRACE]);
}

fn handler(errors: &mut Vec<FieldError>, path: &Path, of: &Value, grace: Option<i64>) {
    let kinds = ["exec", "httpGet", "tcpSocket", "grpc", "sleep"];
    let mut given = kinds.iter().filter(|kind| of[**kind].is_object());
    let Some(kind) = given.next() else {
        return errors.push(FieldError::required(path, "must specify a handler type"));
    };
    let (place, action) = (path.child(kind), &of[*kind]);
    match *kind {
        "exec" if list(action, "command").next().is_none() => {
            errors.push(FieldError::required(&place.child("command"), ""));
        }
        "httpGet" => http_get(errors, &place, action),
        "tcpSocket" | "grpc" => {
            port_or_name(errors, &place.child("port"), &action["port"]);
        }
        "sleep" => sleep(errors, &place, &action["seconds"], grace),
        _ => {}
    }
    for extra in given {
        let path = path.child(extra);
        errors.push(FieldError::forbidden(&path, "may not specify more than 1 handler type"));
    }
}

fn http_get(errors: &mut Vec<FieldError>, path: &Path, action: &Value) {
    port_or_name(errors, &path.child("port"), &action["port"]);
    one_of(errors, &path.child("scheme"), &action["scheme"], &["HTTP", "HTTPS"]);
    for (_, header) in list(action, "httpHeaders") {
        let reasons = names::http_header_name(text(header, "/name"));
        invalid(errors, &path.child("httpHeaders"), &header["name"], reasons);
    }
}

fn sleep(errors: &mut Vec<FieldError>, path: &Path, seconds: &Value, grace: Option<i64>) {
    let Some(grace) = grace else { return };
    if seconds.as_i64().is_some_and(|seconds| !(0..=grace).contains(&seconds)) {
        let why =
            format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
        errors.push(FieldError::invalid(path, seconds, why));
    }
}
