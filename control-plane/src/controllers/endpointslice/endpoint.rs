//! A pod as an endpoint of a Service: address, conditions, place, hints and ports. Pure.
//!
//! Follows `podToEndpoint`, `getEndpointPorts` and `trafficdist` of upstream's `k8s.io/endpointslice`.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::super::{
    json::{boolean, integer, items, text},
    model::{Key, NODES, Object, PodFacts},
    world::World,
};

pub(super) const ZONE: &str = "topology.kubernetes.io/zone";

/// A port of a slice: name, protocol, number (none: all), application protocol.
pub(in crate::controllers) type Port = (String, String, Option<i64>, Option<String>);

/// Where a Service's clients are to be sent first (`spec.trafficDistribution`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Near {
    Anywhere,
    SameZone,
    SameNode,
}

impl Near {
    fn of(service: &Value) -> Self {
        match text(service, "/spec/trafficDistribution") {
            "PreferClose" | "PreferSameZone" => Self::SameZone,
            "PreferSameNode" => Self::SameNode,
            _ => Self::Anywhere,
        }
    }

    /// The hints of a ready endpoint; null for none.
    fn hints(self, node: &str, zone: &str) -> Value {
        let list = |name: &str| if name.is_empty() { Value::Null } else { json!([{"name": name}]) };
        let (zones, nodes) = match self {
            Self::Anywhere => return Value::Null,
            Self::SameZone => (list(zone), Value::Null),
            Self::SameNode => (list(zone), list(node)),
        };
        let mut hints = json!({});
        for (field, names) in [("forZones", zones), ("forNodes", nodes)] {
            if !names.is_null() {
                hints[field] = names;
            }
        }
        if hints == json!({}) { Value::Null } else { hints }
    }
}

/// The endpoint of a pod's address; `None` while its node is not known, unless it is to be published anyway.
pub(super) fn endpoint(
    world: &World,
    service: &Object,
    object: &Object,
    (pod, ip): (&PodFacts, &str),
) -> Option<Value> {
    let publish = boolean(&service.value, "/spec/publishNotReadyAddresses");
    let node = world.get(NODES, &Key::new("", &pod.node));
    if node.is_none() && !publish {
        return None;
    }
    let terminating = object.meta.deleted.is_some();
    let ready = publish || (pod.ready && !terminating);
    // A slice takes an address in its one form alone; another's kubelet may have written it otherwise.
    let ip = ip.parse::<IpAddr>().map_or_else(|_| ip.to_owned(), |ip| ip.to_string());
    let mut endpoint = json!({
        "addresses": [ip],
        "conditions": {"ready": ready, "serving": pod.ready, "terminating": terminating},
        "targetRef": {
            "kind": "Pod",
            "namespace": object.meta.key.namespace,
            "name": object.meta.key.name,
            "uid": object.meta.uid,
        },
    });
    if !pod.node.is_empty() {
        endpoint["nodeName"] = json!(pod.node);
    }
    let zone = node.and_then(|node| node.meta.labels.get(ZONE)).map_or("", String::as_str);
    if !zone.is_empty() {
        endpoint["zone"] = json!(zone);
    }
    if !pod.hostname.is_empty() && pod.subdomain == service.meta.key.name {
        endpoint["hostname"] = json!(pod.hostname);
    }
    let hints = Near::of(&service.value).hints(&pod.node, zone);
    if ready && !hints.is_null() {
        endpoint["hints"] = hints;
    }
    Some(endpoint)
}

/// The Service's ports on this pod, sorted; one whose name the pod does not have is left out.
pub(super) fn ports(service: &Object, pod: &PodFacts) -> Vec<Port> {
    let mut ports: Vec<Port> = items(&service.value, "/spec/ports")
        .iter()
        .filter_map(|port| {
            let protocol = match text(port, "/protocol") {
                "" => "TCP",
                protocol => protocol,
            };
            let named = text(port, "/targetPort");
            let number = if named.is_empty() {
                integer(port, "/targetPort")
                    .filter(|number| *number != 0)
                    .or_else(|| integer(port, "/port"))?
            } else {
                let found =
                    pod.ports.iter().find(|port| port.name == named && port.protocol == protocol);
                found?.port
            };
            let app = port.get("appProtocol").and_then(Value::as_str).map(str::to_owned);
            Some((text(port, "/name").to_owned(), protocol.to_owned(), Some(number), app))
        })
        .collect();
    ports.sort();
    ports
}

/// The ports of a slice or of a subset of Endpoints, sorted.
pub(in crate::controllers) fn listed_ports(of: &Value) -> Vec<Port> {
    let mut ports: Vec<Port> = items(of, "/ports")
        .iter()
        .map(|port| {
            let app = port.get("appProtocol").and_then(Value::as_str).map(str::to_owned);
            let number = integer(port, "/port");
            let protocol = text(port, "/protocol");
            let protocol = if protocol.is_empty() { "TCP" } else { protocol };
            (text(port, "/name").to_owned(), protocol.to_owned(), number, app)
        })
        .collect();
    ports.sort();
    ports
}

pub(super) fn port_values(ports: &[Port]) -> Vec<Value> {
    ports
        .iter()
        .map(|(name, protocol, port, app)| {
            let mut value = json!({"name": name, "protocol": protocol});
            if let Some(port) = port {
                value["port"] = json!(port);
            }
            if let Some(app) = app {
                value["appProtocol"] = json!(app);
            }
            value
        })
        .collect()
}
