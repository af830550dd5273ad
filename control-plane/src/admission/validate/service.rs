//! Services. Pure.
//!
//! Follows upstream's `validateService` and `ValidateServiceStatusUpdate`, in its order and words.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{address, invalid, labels, list, one_of, service_update};
use crate::{
    admission::service::fields::{
        families, health_number, ips, is_externally_accessible, is_headless, kind,
        needs_health_port, node_port, parse_ip,
    },
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Longest `timeoutSeconds` of client affinity: a day.
const LONGEST_AFFINITY: i64 = 86_400;
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
const TOPOLOGY_MODE: &str = "service.kubernetes.io/topology-mode";
const TOPOLOGY_HINTS: &str = "service.kubernetes.io/topology-aware-hints";
const BALANCERS_ONLY: &str = "may only be used when `type` is 'LoadBalancer'";

pub(super) fn service(service: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = old.map_or_else(Vec::new, |old| service_update::service(service, old));
    let (path, spec) = (Path::new("spec"), &service["spec"]);
    topology_annotations(&mut errors, service);
    if list(spec, "ports").next().is_none() && !is_headless(service) && !is_external(service) {
        errors.push(FieldError::required(&path.child("ports"), ""));
    }
    by_type(&mut errors, service);
    ports(&mut errors, &path.child("ports"), spec);
    labels(&mut errors, &path.child("selector"), &spec["selector"]);
    affinity(&mut errors, spec);
    errors.extend(service_update::addresses(service, old));
    let stored = old.map_or_else(Vec::new, |old| address::texts(&old["spec"]["externalIPs"]));
    for (index, ip) in list(spec, "externalIPs") {
        let (path, ip) = (path.child("externalIPs").index(index), ip.as_str().unwrap_or(""));
        let before = errors.len();
        address::ip(&mut errors, &path, ip, &stored);
        if errors.len() == before {
            address::endpoint_ip(&mut errors, &path, ip);
        }
    }
    let types = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    one_of(&mut errors, &path.child("type"), &spec["type"], &types);
    doubles(&mut errors, service);
    source_ranges(&mut errors, service, old);
    balancer(&mut errors, service, None);
    traffic(&mut errors, service);
    errors
}

fn is_external(service: &Value) -> bool {
    kind(service) == "ExternalName"
}

fn topology_annotations(errors: &mut Vec<FieldError>, service: &Value) {
    let annotations = &service["metadata"]["annotations"];
    let (mode, hints) = (annotations.get(TOPOLOGY_MODE), annotations.get(TOPOLOGY_HINTS));
    if let (Some(mode), Some(hints)) = (mode, hints)
        && mode != hints
    {
        let path = Path::new("metadata.annotations").key(TOPOLOGY_MODE);
        let why = format!("must match annotations[{TOPOLOGY_HINTS}] when both are specified");
        errors.push(FieldError::invalid(&path, mode, why));
    }
}

/// What one type demands of fields that others leave free.
fn by_type(errors: &mut Vec<FieldError>, service: &Value) {
    let path = Path::new("spec");
    match kind(service) {
        kind @ ("LoadBalancer" | "NodePort") if is_headless(service) => {
            let why = format!("may not be set to 'None' for {kind} services");
            let path = path.child("clusterIPs").index(0);
            errors.push(FieldError::invalid(&path, &json!("None"), why));
        }
        "ExternalName" => {
            let policy = !service["spec"]["ipFamilyPolicy"].is_null();
            for (set, field) in [
                (!ips(service).is_empty(), "clusterIPs"),
                (!families(service).is_empty(), "ipFamilies"),
                (policy, "ipFamilyPolicy"),
            ] {
                if set {
                    let why = "may not be set for ExternalName services";
                    errors.push(FieldError::forbidden(&path.child(field), why));
                }
            }
            let path = path.child("externalName");
            let name = text(service, "/spec/externalName");
            match name.strip_suffix('.').unwrap_or(name) {
                "" => errors.push(FieldError::required(&path, "")),
                name => invalid(errors, &path, &json!(name), names::dns1123_subdomain(name)),
            }
        }
        _ => {}
    }
}

fn ports(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let several = list(spec, "ports").count() > 1;
    let mut named = BTreeSet::new();
    for (index, port) in list(spec, "ports") {
        let path = path.index(index);
        match text(port, "/name") {
            "" if several => errors.push(FieldError::required(&path.child("name"), "")),
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
        super::port_or_name(errors, &path.child("targetPort"), &port["targetPort"]);
        if let Some(app) = port["appProtocol"].as_str() {
            let path = path.child("appProtocol");
            invalid(errors, &path, &port["appProtocol"], names::qualified_name(app));
        }
    }
}

fn affinity(errors: &mut Vec<FieldError>, spec: &Value) {
    let path = Path::new("spec.sessionAffinity");
    one_of(errors, &path, &spec["sessionAffinity"], &["ClientIP", "None"]);
    let path = Path::new("spec.sessionAffinityConfig");
    let config = &spec["sessionAffinityConfig"];
    match text(spec, "/sessionAffinity") {
        "None" if !config.is_null() => {
            let why = "must not be set when session affinity is None";
            errors.push(FieldError::forbidden(&path, why));
        }
        "ClientIP" => {
            let why = "when session affinity type is ClientIP";
            let client = path.child("clientIP");
            let timeout = &config["clientIP"]["timeoutSeconds"];
            if config.is_null() {
                errors.push(FieldError::required(&path, why));
            } else if config["clientIP"].is_null() {
                errors.push(FieldError::required(&client, why));
            } else if timeout.is_null() {
                errors.push(FieldError::required(&client.child("timeoutSeconds"), why));
            } else if !(1..=LONGEST_AFFINITY).contains(&timeout.as_i64().unwrap_or(0)) {
                let why = format!("must be greater than 0 and less than {LONGEST_AFFINITY}");
                errors.push(FieldError::invalid(&client.child("timeoutSeconds"), timeout, why));
            }
        }
        _ => {}
    }
}

/// Node ports and ports that stand twice, by protocol.
fn doubles(errors: &mut Vec<FieldError>, service: &Value) {
    let (path, spec) = (Path::new("spec.ports"), &service["spec"]);
    let protocol = |port: &Value| text(port, "/protocol").to_owned();
    if kind(service) == "ClusterIP" {
        for (index, _) in list(spec, "ports").filter(|(_, port)| node_port(port) != 0) {
            let why = "may not be used when `type` is 'ClusterIP'";
            errors.push(FieldError::forbidden(&path.index(index).child("nodePort"), why));
        }
    }
    let mut seen = BTreeSet::new();
    for (index, port) in list(spec, "ports").filter(|(_, port)| node_port(port) != 0) {
        if !seen.insert((protocol(port), node_port(port))) {
            let path = path.index(index).child("nodePort");
            errors.push(FieldError::duplicate(&path, &port["nodePort"]));
        }
    }
    let mut seen = BTreeSet::new();
    for (index, port) in list(spec, "ports") {
        let number = port["port"].as_i64().unwrap_or(0);
        if !seen.insert((protocol(port), number)) {
            // Upstream prints its internal type, whose fields have no JSON names.
            let value = json!({"Name": "", "Protocol": port["protocol"], "AppProtocol": null,
                "Port": number, "TargetPort": 0, "NodePort": 0});
            errors.push(FieldError::duplicate(&path.index(index), &value));
        }
    }
}

/// By the field, or where it is empty by the annotation that came before it.
fn source_ranges(errors: &mut Vec<FieldError>, service: &Value, old: Option<&Value>) {
    let trimmed = |service: &Value| -> Vec<String> {
        let texts = address::texts(&service["spec"]["loadBalancerSourceRanges"]);
        texts.iter().map(|text| text.trim().to_owned()).collect()
    };
    let ranges = trimmed(service);
    let is_balancer = kind(service) == "LoadBalancer";
    if !ranges.is_empty() {
        // Spelt with a capital, as upstream's path is.
        let path = Path::new("spec.LoadBalancerSourceRanges");
        if !is_balancer {
            errors.push(FieldError::forbidden(&path, BALANCERS_ONLY));
        }
        let stored = old.map_or_else(Vec::new, trimmed);
        for (index, range) in ranges.iter().enumerate() {
            address::cidr(errors, &path.index(index), range, &stored);
        }
        return;
    }
    let annotation = |service: &Value| service["metadata"]["annotations"][SOURCE_RANGES].clone();
    let value = annotation(service);
    let Some(said) = value.as_str() else { return };
    let path = Path::new("metadata.annotations").key(SOURCE_RANGES);
    if !is_balancer {
        errors.push(FieldError::forbidden(&path, BALANCERS_ONLY));
    }
    if said.trim().is_empty() || old.is_some_and(|old| annotation(old) == value) {
        return;
    }
    for range in said.split(',') {
        address::cidr(errors, &path, range.trim(), &[]);
    }
}

/// Fields that only a balancer has; its class stays what it was.
pub(super) fn balancer(errors: &mut Vec<FieldError>, service: &Value, old: Option<&Value>) {
    let (path, spec) = (Path::new("spec"), &service["spec"]);
    let is_balancer = kind(service) == "LoadBalancer";
    if old.is_none() {
        let allocate = &spec["allocateLoadBalancerNodePorts"];
        if !allocate.is_null() && !is_balancer {
            let path = path.child("allocateLoadBalancerNodePorts");
            errors.push(FieldError::forbidden(&path, BALANCERS_ONLY));
        }
        if allocate.is_null() && is_balancer {
            // Upstream's path has no `spec` here.
            let path = Path::new("allocateLoadBalancerNodePorts");
            errors.push(FieldError::required(&path, ""));
        }
    }
    let (path, class) = (path.child("loadBalancerClass"), &spec["loadBalancerClass"]);
    if let Some(old) = old
        && is_balancer
        && kind(old) == "LoadBalancer"
        && old["spec"]["loadBalancerClass"] != *class
    {
        errors.push(FieldError::invalid(&path, class, "may not change once set"));
    }
    match class.as_str() {
        Some(word) if is_balancer => invalid(errors, &path, class, names::qualified_name(word)),
        Some(_) => errors.push(FieldError::forbidden(&path, BALANCERS_ONLY)),
        None => {}
    }
}

fn traffic(errors: &mut Vec<FieldError>, service: &Value) {
    let (path, spec) = (Path::new("spec"), &service["spec"]);
    let policies = ["Cluster", "Local"];
    let (field, external) = (path.child("externalTrafficPolicy"), &spec["externalTrafficPolicy"]);
    if is_externally_accessible(service) {
        one_of(errors, &field, external, &policies);
    } else if !external.is_null() {
        let why = "may only be set for externally-accessible services";
        errors.push(FieldError::invalid(&field, external, why));
    }
    let (field, number) = (path.child("healthCheckNodePort"), health_number(service));
    match (needs_health_port(service), number) {
        (true, 0) => errors.push(FieldError::required(&field, "")),
        (true, number) => {
            invalid(errors, &field, &json!(number), names::port_number(number));
        }
        (false, 0) => {}
        (false, number) => {
            let why = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
            errors.push(FieldError::invalid(&field, &json!(number), why));
        }
    }
    let (field, internal) = (path.child("internalTrafficPolicy"), &spec["internalTrafficPolicy"]);
    let needed = matches!(kind(service), "NodePort" | "LoadBalancer" | "ClusterIP");
    if needed || !internal.is_null() {
        one_of(errors, &field, internal, &policies);
    }
    let distribution = &spec["trafficDistribution"];
    let known = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    if !distribution.is_null() && !known.iter().any(|word| distribution == *word) {
        let field = path.child("trafficDistribution");
        errors.push(FieldError::not_supported(&field, distribution, &known));
    }
}

/// Upstream's `ValidateLoadBalancerStatus`.
pub(super) fn status(service: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let path = Path::new("status.loadBalancer.ingress");
    let balancer = &service["status"]["loadBalancer"];
    if kind(service) != "LoadBalancer" && list(balancer, "ingress").next().is_some() {
        let why = "may only be used when `spec.type` is 'LoadBalancer'";
        return vec![FieldError::forbidden(&path, why)];
    }
    let stored: Vec<String> = list(&old["status"]["loadBalancer"], "ingress")
        .map(|(_, ingress)| text(ingress, "/ip").to_owned())
        .filter(|ip| !ip.is_empty())
        .collect();
    for (index, ingress) in list(balancer, "ingress") {
        let path = path.index(index);
        let ip = text(ingress, "/ip");
        if !ip.is_empty() {
            address::ip(&mut errors, &path.child("ip"), ip, &stored);
        }
        let (mode_path, mode) = (path.child("ipMode"), &ingress["ipMode"]);
        if mode.is_null() && !ip.is_empty() {
            let why = "must be specified when `ip` is set";
            errors.push(FieldError::required(&mode_path, why));
        } else if !mode.is_null() && ip.is_empty() {
            let why = "may not be specified when `ip` is not set";
            errors.push(FieldError::forbidden(&mode_path, why));
        } else if !mode.is_null() && *mode != "Proxy" && *mode != "VIP" {
            errors.push(FieldError::not_supported(&mode_path, mode, &["Proxy", "VIP"]));
        }
        let host = text(ingress, "/hostname");
        if !host.is_empty() {
            let path = path.child("hostname");
            invalid(&mut errors, &path, &json!(host), names::dns1123_subdomain(host));
            if parse_ip(host).is_some() {
                let why = "must be a DNS name, not an IP address";
                errors.push(FieldError::invalid(&path, &json!(host), why));
            }
        }
    }
    errors
}
