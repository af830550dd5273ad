//! Values that a client left out or let stand: what was meant. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::fields::{
    cluster_ip, families, health_number, ips, is_externally_accessible, kind, needs_cluster_ip,
    needs_health_port, needs_node_port, node_port, node_ports, policy, remove, set_list,
};

/// Fields whose zero value says nothing, so that it is not stored.
const ZEROES: [&str; 8] = [
    "clusterIP",
    "clusterIPs",
    "ipFamilies",
    "externalName",
    "externalIPs",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "loadBalancerSourceRanges",
];

/// Removes zero values, as upstream's encoding does.
pub(super) fn tidy(service: &mut Value) {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_i64() == Some(0),
        Value::Array(list) => list.is_empty(),
        Value::Bool(_) | Value::Object(_) => false,
    };
    for field in ZEROES {
        if empty(&service["spec"][field]) {
            remove(service, field);
        }
    }
    for port in ports_mut(service) {
        if let Some(fields) = port.as_object_mut()
            && fields.get("nodePort").is_some_and(empty)
        {
            fields.remove("nodePort");
        }
    }
}

fn ports_mut(service: &mut Value) -> impl Iterator<Item = &mut Value> {
    let ports = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
    ports.into_iter().flatten()
}

/// Upstream's `patchAllocatedValues`: a client that sends its own manifest again keeps what it was given.
pub(super) fn patch_allocated(service: &mut Value, old: &Value) {
    if needs_cluster_ip(old) && needs_cluster_ip(service) {
        if cluster_ip(service).is_empty() && !cluster_ip(old).is_empty() {
            service["spec"]["clusterIP"] = old["spec"]["clusterIP"].clone();
        }
        if ips(service).is_empty() {
            set_list(service, "clusterIPs", &ips(old));
        }
    }
    if needs_node_port(old) && needs_node_port(service) {
        patch_node_ports(service, old);
    }
    if needs_health_port(old)
        && needs_health_port(service)
        && health_number(service) == 0
        && health_number(old) != 0
    {
        service["spec"]["healthCheckNodePort"] = json!(health_number(old));
    }
}

/// By the port's name, unless another port of the new object took the number.
fn patch_node_ports(service: &mut Value, old: &Value) {
    let kept: BTreeSet<u16> = node_ports(service).collect();
    let used: BTreeSet<i64> =
        node_ports(old).filter(|port| kept.contains(port)).map(i64::from).collect();
    let before: BTreeMap<&str, i64> = old["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|port| (port["name"].as_str().unwrap_or(""), node_port(port)))
        .collect();
    for port in ports_mut(service) {
        let number = before.get(port["name"].as_str().unwrap_or("")).copied().unwrap_or(0);
        if node_port(port) == 0 && number != 0 && !used.contains(&number) {
            port["nodePort"] = json!(number);
        }
    }
}

/// Upstream's `normalizeClusterIPs`: clients that know only `clusterIP` leave the list behind.
pub(super) fn normalize_cluster_ips(service: &mut Value, old: Option<&Value>) {
    let single = cluster_ip(service).to_owned();
    let Some(old) = old else {
        if !single.is_empty() && ips(service).is_empty() {
            set_list(service, "clusterIPs", &[single]);
        }
        return;
    };
    let before = cluster_ip(old);
    if !ips(old).is_empty() && ips(service).is_empty() && before == single {
        set_list(service, "clusterIPs", &ips(old));
    }
    if before == single || ips(service) != ips(old) {
        return;
    }
    if !before.is_empty() && single.is_empty() {
        remove(service, "clusterIPs");
    } else {
        set_list(service, "clusterIPs", &[single]);
    }
}

/// Upstream's `dropTypeDependentFields`: what the new type has no use for goes, unless the client changed it too,
/// which validation then refuses.
pub(super) fn drop_type_dependent(service: &mut Value, old: &Value) {
    let same = |service: &Value, field: &str| service["spec"][field] == old["spec"][field];
    if needs_cluster_ip(old) && !needs_cluster_ip(service) {
        if cluster_ip(service) == cluster_ip(old) && ips(service) == ips(old) {
            remove(service, "clusterIP");
            remove(service, "clusterIPs");
        }
        if families(service) == families(old) {
            remove(service, "ipFamilies");
        }
        if policy(service) == policy(old) {
            remove(service, "ipFamilyPolicy");
        }
    }
    if needs_node_port(old) && !needs_node_port(service) {
        let before: BTreeSet<u16> = node_ports(old).collect();
        if node_ports(service).all(|port| before.contains(&port)) {
            for port in ports_mut(service).filter_map(Value::as_object_mut) {
                port.remove("nodePort");
            }
        }
    }
    if needs_health_port(old)
        && !needs_health_port(service)
        && health_number(service) == health_number(old)
    {
        remove(service, "healthCheckNodePort");
    }
    if kind(old) == "LoadBalancer" && kind(service) != "LoadBalancer" {
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if same(service, field) {
                remove(service, field);
            }
        }
    }
    if is_externally_accessible(old)
        && !is_externally_accessible(service)
        && same(service, "externalTrafficPolicy")
    {
        remove(service, "externalTrafficPolicy");
    }
    if kind(service) != "LoadBalancer" && service.get("status").is_some() {
        service["status"]["loadBalancer"] = json!({});
    }
}
