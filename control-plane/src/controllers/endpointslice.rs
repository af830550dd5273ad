//! EndpointSlices of Services that have a selector. Pure.
//!
//! Follows upstream's `endpointslice` reconciler: endpoints stay in the slice they are in, a slice
//! is written only when it changes, and new endpoints fill slices that have room.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{
    json::{boolean, controller_reference, integer, items, labels_at, map_matches, normal, text},
    model::{ENDPOINT_SLICES, Key, Labels, NODES, Object, PODS, PodFacts, SERVICES},
    sync::{Context, Controller, Note, Step, Sync, own_key, reference, services_of},
    world::{Change, World},
};

/// Upstream's default for `--max-endpoints-per-slice`.
const SLICE_LIMIT: usize = 100;
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const US: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
const ZONE: &str = "topology.kubernetes.io/zone";

pub(super) const CONTROLLER: Controller = Controller {
    name: "endpointslice",
    component: "endpoint-slice-controller",
    keys,
    sync,
    first: None,
};

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(SERVICES, change, out);
    if change.resource == PODS {
        services_of(world, change, out);
    } else if change.resource == ENDPOINT_SLICES {
        for slice in change.both().filter(|slice| is_ours(slice)) {
            if let Some(service) = slice.meta.labels.get(SERVICE_NAME) {
                out.push(Key::new(&slice.meta.key.namespace, service));
            }
        }
    } else if change.resource == NODES {
        zone_changed(world, change, out);
    }
}

fn zone_changed(world: &World, change: &Change, out: &mut Vec<Key>) {
    let zone = |node: &Option<Arc<Object>>| {
        node.as_ref().and_then(|node| node.meta.labels.get(ZONE).cloned())
    };
    if zone(&change.old) == zone(&change.new) {
        return;
    }
    let Some(node) = change.object() else { return };
    for pod in world.pods_on(&node.meta.key.name) {
        let change = Change { resource: PODS, old: None, new: Some(Arc::clone(pod)) };
        services_of(world, &change, out);
    }
}

fn is_ours(slice: &Object) -> bool {
    slice.meta.labels.get(MANAGED_BY).is_some_and(|manager| manager == US)
}

/// A port of a slice: name, protocol, number, application protocol.
type Port = (String, String, i64, Option<String>);

fn sync(world: &World, key: &Key, _context: &Context) -> Sync {
    let Some(service) = world.get(SERVICES, key) else { return Sync::done() };
    let selector = labels_at(&service.value, "/spec/selector");
    if service.meta.deleted.is_some()
        || selector.is_empty()
        || text(&service.value, "/spec/type") == "ExternalName"
    {
        return Sync::done();
    }
    let existing: Vec<&Arc<Object>> = world
        .in_namespace(ENDPOINT_SLICES, &key.namespace)
        .filter(|slice| {
            is_ours(slice)
                && slice.meta.deleted.is_none()
                && slice.meta.labels.get(SERVICE_NAME) == Some(&key.name)
        })
        .collect();
    let families = match items(&service.value, "/spec/ipFamilies") {
        [] => vec!["IPv4"],
        families => families.iter().filter_map(Value::as_str).collect(),
    };
    let mut steps = Vec::new();
    for slice in &existing {
        if !families.contains(&text(&slice.value, "/addressType")) {
            steps.push(Step::delete(slice));
        }
    }
    for family in families {
        let wanted = wanted(world, service, &selector, family);
        let existing: Vec<_> = existing
            .iter()
            .copied()
            .filter(|slice| text(&slice.value, "/addressType") == family)
            .collect();
        steps.extend(reconcile(service, family, wanted, &existing));
    }
    for step in &mut steps {
        let regarding = reference(service, "v1", "Service");
        let message = "Failed to update endpoint slices: ";
        // Told only when it fails: the note's own text is never used.
        step.note =
            Some(Note::warning(regarding, "", "").or("FailedToUpdateEndpointSlices", message));
    }
    Sync { steps, ..Sync::default() }
}

/// The endpoints of each set of ports; a single empty entry when there is none at all.
fn wanted(
    world: &World,
    service: &Object,
    selector: &Labels,
    family: &str,
) -> BTreeMap<Vec<Port>, Vec<Value>> {
    let mut wanted: BTreeMap<Vec<Port>, Vec<Value>> = BTreeMap::new();
    for object in world.in_namespace(PODS, &service.meta.key.namespace) {
        let Some(pod) = &object.pod else { continue };
        if pod.is_terminal() || !map_matches(selector, &object.meta.labels) {
            continue;
        }
        let is_v6 = family == "IPv6";
        let Some(ip) = pod.ips.iter().find(|ip| ip.contains(':') == is_v6) else { continue };
        let endpoint = endpoint(world, service, object, (pod, ip));
        wanted.entry(ports(service, pod)).or_default().push(endpoint);
    }
    if wanted.is_empty() {
        wanted.insert(Vec::new(), Vec::new());
    }
    wanted
}

fn endpoint(
    world: &World,
    service: &Object,
    object: &Object,
    (pod, ip): (&PodFacts, &str),
) -> Value {
    let terminating = object.meta.deleted.is_some();
    let publish = boolean(&service.value, "/spec/publishNotReadyAddresses");
    let mut endpoint = json!({
        "addresses": [ip],
        "conditions": {
            "ready": publish || (pod.ready && !terminating),
            "serving": pod.ready,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "namespace": object.meta.key.namespace,
            "name": object.meta.key.name,
            "uid": object.meta.uid,
        },
    });
    if !pod.node.is_empty() {
        endpoint["nodeName"] = json!(pod.node);
        let node = world.get(NODES, &Key::new("", &pod.node));
        if let Some(zone) = node.and_then(|node| node.meta.labels.get(ZONE)) {
            endpoint["zone"] = json!(zone);
        }
    }
    if !pod.hostname.is_empty() && pod.subdomain == service.meta.key.name {
        endpoint["hostname"] = json!(pod.hostname);
    }
    endpoint
}

/// The Service's ports on this pod; one whose name the pod does not have is left out.
fn ports(service: &Object, pod: &PodFacts) -> Vec<Port> {
    items(&service.value, "/spec/ports")
        .iter()
        .filter_map(|port| {
            let protocol = match text(port, "/protocol") {
                "" => "TCP",
                protocol => protocol,
            };
            let named = text(port, "/targetPort");
            let number = if named.is_empty() {
                integer(port, "/targetPort").or_else(|| integer(port, "/port"))?
            } else if let Ok(number) = named.parse() {
                number
            } else {
                let found =
                    pod.ports.iter().find(|port| port.name == named && port.protocol == protocol);
                found?.port
            };
            let app = port.get("appProtocol").and_then(Value::as_str).map(str::to_owned);
            Some((text(port, "/name").to_owned(), protocol.to_owned(), number, app))
        })
        .collect()
}

fn stored_ports(slice: &Object) -> Vec<Port> {
    items(&slice.value, "/ports")
        .iter()
        .map(|port| {
            let app = port.get("appProtocol").and_then(Value::as_str).map(str::to_owned);
            let number = integer(port, "/port").unwrap_or(0);
            (text(port, "/name").to_owned(), text(port, "/protocol").to_owned(), number, app)
        })
        .collect()
}

fn port_values(ports: &[Port]) -> Vec<Value> {
    ports
        .iter()
        .map(|(name, protocol, port, app)| {
            let mut value = json!({"name": name, "protocol": protocol, "port": port});
            if let Some(app) = app {
                value["appProtocol"] = json!(app);
            }
            value
        })
        .collect()
}

fn reconcile(
    service: &Object,
    family: &str,
    mut wanted: BTreeMap<Vec<Port>, Vec<Value>>,
    existing: &[&Arc<Object>],
) -> Vec<Step> {
    let labels = slice_labels(service);
    let mut steps = Vec::new();
    let mut by_ports: BTreeMap<Vec<Port>, Vec<&Arc<Object>>> = BTreeMap::new();
    let mut spare = Vec::new();
    for slice in existing.iter().copied() {
        let ports = stored_ports(slice);
        if wanted.contains_key(&ports) {
            by_ports.entry(ports).or_default().push(slice);
        } else {
            spare.push(slice);
        }
    }
    // New and grown slices are written before others are deleted, so that no endpoint is missing
    // in between.
    let mut deletions = Vec::new();
    while let Some((ports, endpoints)) = wanted.pop_first() {
        let mut slices = by_ports.remove(&ports).unwrap_or_default();
        if slices.is_empty() {
            // One of other ports is written over: a Service whose ports change keeps its slice.
            slices.extend(spare.pop());
        }
        pack(service, &labels, (family, &ports, endpoints), &slices, (&mut steps, &mut deletions));
    }
    deletions.extend(spare.into_iter().map(|slice| Step::delete(slice)));
    steps.extend(deletions);
    steps
}

fn uid(endpoint: &Value) -> &str {
    text(endpoint, "/targetRef/uid")
}

/// Distributes the endpoints of one set of ports over its slices.
fn pack(
    service: &Object,
    labels: &Labels,
    (family, ports, endpoints): (&str, &[Port], Vec<Value>),
    slices: &[&Arc<Object>],
    (steps, deletions): (&mut Vec<Step>, &mut Vec<Step>),
) {
    let mut left: BTreeMap<String, Value> =
        endpoints.into_iter().map(|endpoint| (uid(&endpoint).to_owned(), endpoint)).collect();
    let mut filled: Vec<(&Arc<Object>, Vec<Value>)> = slices
        .iter()
        .map(|slice| {
            let kept = items(&slice.value, "/endpoints")
                .iter()
                .filter_map(|endpoint| left.remove(uid(endpoint)))
                .collect();
            (*slice, kept)
        })
        .collect();
    let mut left: Vec<Value> = left.into_values().collect();
    filled.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.len()));
    for (_, kept) in &mut filled {
        let room = SLICE_LIMIT.saturating_sub(kept.len()).min(left.len());
        kept.extend(left.drain(..room));
    }
    let any = !left.is_empty() || filled.iter().any(|(_, kept)| !kept.is_empty());
    let mut keep_empty = !any;
    for (slice, kept) in filled {
        if kept.is_empty() && !std::mem::take(&mut keep_empty) {
            deletions.push(Step::delete(slice));
        } else {
            steps.extend(update(slice, labels, ports, kept));
        }
    }
    if !any && slices.is_empty() {
        steps.push(create(service, labels, (family, ports), Vec::new()));
    }
    for chunk in left.chunks(SLICE_LIMIT) {
        steps.push(create(service, labels, (family, ports), chunk.to_vec()));
    }
}

fn slice_labels(service: &Object) -> Labels {
    let mut labels = service.meta.labels.clone();
    for own in [SERVICE_NAME, MANAGED_BY, HEADLESS] {
        labels.remove(own);
    }
    labels.insert(SERVICE_NAME.to_owned(), service.meta.key.name.clone());
    labels.insert(MANAGED_BY.to_owned(), US.to_owned());
    if matches!(text(&service.value, "/spec/clusterIP"), "" | "None") {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels
}

fn update(slice: &Object, labels: &Labels, ports: &[Port], endpoints: Vec<Value>) -> Option<Step> {
    let stored = items(&slice.value, "/endpoints");
    let same = stored.len() == endpoints.len()
        && stored.iter().zip(&endpoints).all(|(old, new)| normal(old) == normal(new))
        && slice.meta.labels == *labels
        && stored_ports(slice) == ports;
    if same {
        return None;
    }
    let names: BTreeSet<&String> = slice.meta.labels.keys().chain(labels.keys()).collect();
    let labels: serde_json::Map<String, Value> =
        names.into_iter().map(|name| (name.clone(), json!(labels.get(name)))).collect();
    let patch = json!({
        "metadata": {"resourceVersion": slice.meta.revision.to_string(), "labels": labels},
        "endpoints": endpoints,
        "ports": port_values(ports),
    });
    Some(Step::patch(slice.place(), patch))
}

fn create(
    service: &Object,
    labels: &Labels,
    (family, ports): (&str, &[Port]),
    endpoints: Vec<Value>,
) -> Step {
    let namespace = &service.meta.key.namespace;
    let object = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "generateName": format!("{}-", service.meta.key.name),
            "namespace": namespace,
            "labels": labels,
            "ownerReferences": [controller_reference(service, "v1", "Service")],
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": port_values(ports),
    });
    Step::create(ENDPOINT_SLICES, namespace, object)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, pod, service, world};
    use super::*;
    use crate::client::Write;

    fn steps(objects: Vec<Value>) -> Vec<Write> {
        sync(&world(objects), &Key::new("ns", "web"), &context()).writes()
    }

    fn stored(write: &Write) -> Value {
        let Write::Create { object, .. } = write else { unreachable!("{write:?}") };
        let mut object = object.clone();
        object["metadata"]["name"] = json!("web-abc");
        object["metadata"]["uid"] = json!("uid-slice");
        object["metadata"]["resourceVersion"] = json!("7");
        object
    }

    #[test]
    fn a_slice_tells_who_is_ready_and_on_which_port() {
        let mut leaving = pod("web-3", "web", "n1", true);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let mut ended = pod("web-4", "web", "n1", true);
        ended["status"]["phase"] = json!("Succeeded");
        let node =
            json!({"kind": "Node", "metadata": {"name": "n1", "uid": "n1", "labels": {ZONE: "z"}}});
        let writes = steps(vec![
            service("web"),
            pod("web-1", "web", "n1", true),
            pod("web-2", "web", "n2", false),
            leaving,
            ended,
            node,
        ]);
        let slice = stored(&writes[0]);
        assert_eq!(writes.len(), 1);
        assert_eq!(slice["metadata"]["labels"][SERVICE_NAME], "web");
        assert_eq!(slice["metadata"]["labels"][MANAGED_BY], US);
        assert_eq!(slice["ports"], json!([{"name": "http", "protocol": "TCP", "port": 80}]));
        let said: Vec<String> = slice["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| {
                let c = &e["conditions"];
                format!(
                    "{} {} {} {} {}",
                    e["targetRef"]["name"], c["ready"], c["serving"], c["terminating"], e["zone"]
                )
            })
            .collect();
        assert_eq!(
            said,
            [
                "\"web-1\" true true false \"z\"",
                "\"web-2\" false false false null",
                "\"web-3\" false true true \"z\""
            ]
        );
    }

    #[test]
    fn what_is_right_is_left_alone_and_one_change_is_one_patch() {
        let base = vec![service("web"), pod("web-1", "web", "n1", true)];
        let slice = stored(&steps(base.clone())[0]);
        let mut again = base.clone();
        again.push(slice.clone());
        assert_eq!(steps(again.clone()), []);
        again[1] = pod("web-1", "web", "n1", false);
        let writes = steps(again);
        let [Write::Patch { patch, .. }] = writes.as_slice() else { unreachable!("{writes:?}") };
        assert_eq!(patch["endpoints"][0]["conditions"]["ready"], false);
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
    }

    #[test]
    fn a_slice_holds_a_hundred_and_room_is_filled_first() {
        let pods = |count: usize| {
            let mut all = vec![service("web")];
            all.extend((0..count).map(|n| pod(&format!("web-{n:03}"), "web", "n1", true)));
            all
        };
        let writes = steps(pods(101));
        let sizes: Vec<_> =
            writes.iter().map(|w| stored(w)["endpoints"].as_array().unwrap().len()).collect();
        assert_eq!(sizes, [100, 1]);
        let mut next = pods(102);
        next.push(stored(&writes[0]));
        let mut second = stored(&writes[1]);
        second["metadata"]["name"] = json!("web-def");
        second["metadata"]["uid"] = json!("uid-second");
        next.push(second);
        let writes = steps(next);
        let [Write::Patch { object, patch, .. }] = writes.as_slice() else { unreachable!() };
        assert_eq!(object.name, "web-def");
        assert_eq!(patch["endpoints"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn named_ports_are_looked_up_in_each_pod() {
        let mut named = service("web");
        named["spec"]["ports"][0]["targetPort"] = json!("http");
        let mut other = pod("web-2", "web", "n1", true);
        other["spec"]["containers"][0]["ports"][0]["containerPort"] = json!(8080);
        let writes = steps(vec![named, pod("web-1", "web", "n1", true), other]);
        let ports: Vec<_> =
            writes.iter().map(|w| stored(w)["ports"][0]["port"].as_i64().unwrap()).collect();
        assert_eq!(ports, [80, 8080]);
    }

    #[test]
    fn a_service_without_pods_has_one_empty_slice_and_one_without_selector_none() {
        let writes = steps(vec![service("web")]);
        assert_eq!(stored(&writes[0])["endpoints"], json!([]));
        let slice = stored(&writes[0]);
        assert_eq!(steps(vec![service("web"), slice]), []);
        let mut bare = service("web");
        bare["spec"]["selector"] = Value::Null;
        assert_eq!(steps(vec![bare]), []);
    }
}
