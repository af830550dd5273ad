//! Services. Pure.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{invalid, labels, list, one_of, port_or_name};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

pub(super) fn service(service: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let (path, spec) = (Path::new("spec"), &service["spec"]);
    let types = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    one_of(&mut errors, &path.child("type"), &spec["type"], &types);
    let affinities = ["ClientIP", "None"];
    one_of(&mut errors, &path.child("sessionAffinity"), &spec["sessionAffinity"], &affinities);
    labels(&mut errors, &path.child("selector"), &spec["selector"]);
    let kind = text(spec, "/type");
    let headless = text(spec, "/clusterIP") == "None";
    let ports = list(spec, "ports").count();
    if ports == 0 && !headless && kind != "ExternalName" {
        errors.push(FieldError::required(&path.child("ports"), ""));
    }
    if kind == "ExternalName" {
        match text(spec, "/externalName") {
            "" => errors.push(FieldError::required(&path.child("externalName"), "")),
            name => {
                let name = name.trim_end_matches('.');
                let path = path.child("externalName");
                invalid(&mut errors, &path, &json!(name), names::dns1123_subdomain(name));
            }
        }
    }
    if headless && matches!(kind, "NodePort" | "LoadBalancer") {
        errors.push(FieldError::invalid(
            &path.child("clusterIPs").index(0),
            &json!("None"),
            format!("may not be set to 'None' for {kind} services"),
        ));
    }
    if matches!(kind, "NodePort" | "LoadBalancer") {
        let field = path.child("externalTrafficPolicy");
        one_of(&mut errors, &field, &spec["externalTrafficPolicy"], &["Cluster", "Local"]);
    }
    if !spec["internalTrafficPolicy"].is_null() {
        let field = path.child("internalTrafficPolicy");
        one_of(&mut errors, &field, &spec["internalTrafficPolicy"], &["Cluster", "Local"]);
    }
    self::ports(&mut errors, &path.child("ports"), spec);
    if let Some(old) = old {
        fixed(&mut errors, spec, &old["spec"]);
    }
    errors
}

fn ports(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let count = list(spec, "ports").count();
    let (mut named, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in list(spec, "ports") {
        let path = path.index(index);
        match text(port, "/name") {
            "" if count > 1 => errors.push(FieldError::required(&path.child("name"), "")),
            "" => {}
            name => {
                invalid(errors, &path.child("name"), &port["name"], names::dns1123_label(name));
                if !named.insert(name) {
                    errors.push(FieldError::duplicate(&path.child("name"), &port["name"]));
                }
            }
        }
        let number = port["port"].as_i64().unwrap_or(0);
        invalid(errors, &path.child("port"), &json!(number), names::port_number(number));
        one_of(errors, &path.child("protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
        port_or_name(errors, &path.child("targetPort"), &port["targetPort"]);
        if !seen.insert((number, text(port, "/protocol"))) {
            let value = json!({"port": number, "protocol": port["protocol"]});
            errors.push(FieldError::duplicate(&path, &value));
        }
        let exposed = matches!(text(spec, "/type"), "NodePort" | "LoadBalancer");
        let asked = port["nodePort"].as_i64().is_some_and(|number| number != 0);
        if asked && text(spec, "/type") == "ExternalName" && !exposed {
            errors.push(FieldError::forbidden(
                &path.child("nodePort"),
                "may not be used when `type` is 'ExternalName'",
            ));
        }
    }
}

/// The address of a Service stays, unless it becomes or was an ExternalName.
fn fixed(errors: &mut Vec<FieldError>, spec: &Value, old: &Value) {
    let external = |spec: &Value| text(spec, "/type") == "ExternalName";
    let (new, before) = (text(spec, "/clusterIP"), text(old, "/clusterIP"));
    if external(spec) || external(old) || new.is_empty() || before.is_empty() || new == before {
        return;
    }
    errors.push(FieldError::invalid(
        &Path::new("spec.clusterIPs").index(0),
        &json!([new]),
        "may not change once set",
    ));
}
