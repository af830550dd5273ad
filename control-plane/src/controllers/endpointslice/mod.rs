//! EndpointSlices of Services that have a selector. Pure.
//!
//! `endpoint.rs` makes endpoints of pods, `pack.rs` puts them into slices; the mirror of Endpoints
//! (`endpointslice_mirroring.rs`) packs with it too.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde_json::Value;

use super::{
    json::{controller_reference, items, labels_at, map_matches, normal, text},
    model::{ENDPOINT_SLICES, Key, Labels, NODES, Object, PODS, SERVICES},
    sync::{Context, Controller, Note, Step, Sync, own_key, reference, services_of},
    world::{Change, World},
};

mod endpoint;
mod pack;
#[cfg(test)]
mod tests;

pub(super) use endpoint::{Port, listed_ports};
use endpoint::{ZONE, endpoint, ports};
pub(super) use pack::{Frame, Wanted, identity, reconcile};

/// Upstream's default for `--max-endpoints-per-slice`.
const SLICE_LIMIT: usize = 100;
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(super) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const US: &str = "endpointslice-controller.k8s.io";
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";

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
        owners_of(change, US, out);
    } else if change.resource == NODES {
        place_changed(world, change, out);
    }
}

/// Keys of the Services (or of the Endpoints, which have the same name) of slices that a controller manages.
pub(super) fn owners_of(change: &Change, manager: &str, out: &mut Vec<Key>) {
    for slice in change.both().filter(|slice| is_managed(slice, manager)) {
        if let Some(service) = slice.meta.labels.get(SERVICE_NAME) {
            out.push(Key::new(&slice.meta.key.namespace, service));
        }
    }
}

/// A node that came, went, or is in another zone concerns the Services of its pods.
fn place_changed(world: &World, change: &Change, out: &mut Vec<Key>) {
    let zone =
        |node: &Option<Arc<Object>>| node.as_ref().map(|node| node.meta.labels.get(ZONE).cloned());
    if zone(&change.old) == zone(&change.new) {
        return;
    }
    let Some(node) = change.object() else { return };
    for pod in world.pods_on(&node.meta.key.name) {
        let change = Change { resource: PODS, old: None, new: Some(Arc::clone(pod)) };
        services_of(world, &change, out);
    }
}

fn is_managed(slice: &Object, manager: &str) -> bool {
    slice.meta.labels.get(MANAGED_BY).is_some_and(|label| label == manager)
}

/// The slices of a Service or Endpoints that a controller manages.
pub(super) fn managed<'a>(
    world: &'a World,
    key: &'a Key,
    manager: &'static str,
) -> impl Iterator<Item = &'a Arc<Object>> {
    world.in_namespace(ENDPOINT_SLICES, &key.namespace).filter(move |slice| {
        is_managed(slice, manager)
            && slice.meta.deleted.is_none()
            && slice.meta.labels.get(SERVICE_NAME) == Some(&key.name)
    })
}

fn sync(world: &World, key: &Key, _context: &Context) -> Sync {
    let Some(service) = world.get(SERVICES, key) else { return Sync::done() };
    let selector = labels_at(&service.value, "/spec/selector");
    if service.meta.deleted.is_some()
        || selector.is_empty()
        || text(&service.value, "/spec/type") == "ExternalName"
    {
        return Sync::done();
    }
    let existing: Vec<&Arc<Object>> = managed(world, key, US).collect();
    let families = match items(&service.value, "/spec/ipFamilies") {
        [] => vec!["IPv4"],
        families => families.iter().filter_map(Value::as_str).collect(),
    };
    let mut steps = Vec::new();
    for family in &families {
        let of_family = |slice: &&Arc<Object>| text(&slice.value, "/addressType") == *family;
        let existing: Vec<_> = existing.iter().copied().filter(of_family).collect();
        let wanted = wanted(world, service, &selector, family);
        let frame = Frame {
            owner: service,
            owner_reference: controller_reference(service, "v1", "Service"),
            family,
            labels: slice_labels(service),
            annotations: Labels::new(),
            limit: SLICE_LIMIT,
            triggered: triggered(world, service, &wanted, &existing),
        };
        steps.extend(reconcile(&frame, wanted, &existing, true));
    }
    for slice in &existing {
        if !families.contains(&text(&slice.value, "/addressType")) {
            steps.push(Step::delete(slice));
        }
    }
    let message = format!("Error updating Endpoint Slices for Service {}: ", place(service));
    for step in &mut steps {
        let regarding = reference(service, "v1", "Service");
        // Told only when it fails: the note's own text is never used.
        let note = Note::warning(regarding, "", "");
        step.note = Some(note.or("FailedToUpdateEndpointSlices", message.as_str()));
    }
    Sync { steps, ..Sync::default() }
}

fn place(service: &Object) -> String {
    format!("{}/{}", service.meta.key.namespace, service.meta.key.name)
}

/// The endpoints of each set of ports.
fn wanted(
    world: &World,
    service: &Object,
    selector: &Labels,
    family: &str,
) -> BTreeMap<Vec<Port>, Wanted> {
    let mut wanted: BTreeMap<Vec<Port>, Wanted> = BTreeMap::new();
    for object in world.in_namespace(PODS, &service.meta.key.namespace) {
        let Some(pod) = &object.pod else { continue };
        if pod.is_terminal() || !map_matches(selector, &object.meta.labels) {
            continue;
        }
        let is_v6 = family == "IPv6";
        let Some(ip) = pod.ips.iter().find(|ip| ip.contains(':') == is_v6) else { continue };
        if let Some(endpoint) = endpoint(world, service, object, (pod, ip)) {
            let of_ports = wanted.entry(ports(service, pod)).or_default();
            of_ports.insert(identity(&endpoint), endpoint);
        }
    }
    wanted
}

/// When the change began that is to be written now: the first of the transitions of the pods that are new or other
/// than written, and of the Service's creation when nothing is written yet.
fn triggered(
    world: &World,
    service: &Object,
    wanted: &BTreeMap<Vec<Port>, Wanted>,
    existing: &[&Arc<Object>],
) -> Option<Timestamp> {
    let stored = existing.iter().flat_map(|slice| items(&slice.value, "/endpoints"));
    let stored: BTreeMap<_, _> =
        stored.map(|endpoint| (identity(endpoint), normal(endpoint))).collect();
    let changed = wanted.values().flatten().filter(|(identity, endpoint)| {
        stored.get(*identity).is_none_or(|old| *old != normal(endpoint))
    });
    let transition = |endpoint: &Value| {
        let name = text(endpoint, "/targetRef/name");
        let pod = world.get(PODS, &Key::new(&service.meta.key.namespace, name))?;
        pod.pod.as_ref()?.ready_since
    };
    let created = existing.is_empty().then_some(service.meta.created);
    changed.filter_map(|(_, endpoint)| transition(endpoint)).chain(created).min()
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
