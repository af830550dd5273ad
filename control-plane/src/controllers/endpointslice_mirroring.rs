//! Endpoints that users write by hand, mirrored into EndpointSlices, which is what nodes read. Pure.
//!
//! Follows upstream's `endpointslicemirroring` controller: Endpoints of a Service without selector, a slice for each
//! set of ports and address family.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use serde_json::{Value, json};

use super::{
    endpointslice::{
        Frame, HEADLESS, MANAGED_BY, Port, SERVICE_NAME, Wanted, identity, listed_ports, managed,
        owners_of, reconcile,
    },
    json::{controller_reference, items, labels_at, text},
    model::{ENDPOINT_SLICES, ENDPOINTS, Key, Labels, Object, SERVICES},
    sync::{Context, Controller, Note, Step, Sync, own_key, reference},
    world::{Change, World},
};

/// Upstream's default for `--mirroring-max-endpoints-per-subset`, and of a slice here.
const SUBSET_LIMIT: usize = 1000;
const US: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Endpoints that are but a lock for elections.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Annotations that tell of the Endpoints object itself.
const OWN: [&str; 2] = [
    "endpoints.kubernetes.io/last-change-trigger-time",
    "kubectl.kubernetes.io/last-applied-configuration",
];

pub(super) const CONTROLLER: Controller = Controller {
    name: "endpointslicemirroring",
    component: "endpoint-slice-mirroring-controller",
    keys,
    sync,
    first: None,
};

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(ENDPOINTS, change, out);
    if change.resource == SERVICES
        && let Some(service) = change.object()
        && world.get(ENDPOINTS, &service.meta.key).is_some()
    {
        out.push(service.meta.key.clone());
    } else if change.resource == ENDPOINT_SLICES {
        owners_of(change, US, out);
    }
}

fn sync(world: &World, key: &Key, _context: &Context) -> Sync {
    let existing: Vec<&Arc<Object>> = managed(world, key, US).collect();
    let endpoints = world.get(ENDPOINTS, key).filter(|endpoints| is_mirrored(world, endpoints));
    let Some(endpoints) = endpoints else {
        // What is owned by Endpoints that are gone, garbage collection removes too.
        let steps = existing.into_iter().map(|slice| Step::delete(slice)).collect();
        return Sync { steps, ..Sync::default() };
    };
    let mut counts = Counts::default();
    let mut wanted = wanted(endpoints, &mut counts);
    let stored = existing.iter().map(|slice| text(&slice.value, "/addressType").to_owned());
    let families: BTreeSet<String> =
        wanted.keys().map(|family| (*family).to_owned()).chain(stored).collect();
    let mut steps = Vec::new();
    for family in &families {
        let of_family = |slice: &&Arc<Object>| text(&slice.value, "/addressType") == family;
        let existing: Vec<_> = existing.iter().copied().filter(of_family).collect();
        let frame = Frame {
            owner: endpoints,
            owner_reference: controller_reference(endpoints, "v1", "Endpoints"),
            family,
            labels: labels(endpoints),
            annotations: annotations(endpoints),
            limit: SUBSET_LIMIT,
            triggered: None,
        };
        let of_family = wanted.remove(family.as_str()).unwrap_or_default();
        steps.extend(reconcile(&frame, of_family, &existing, false));
    }
    if !steps.is_empty() {
        steps.extend(counts.notes(endpoints).into_iter().map(Step::tell));
    }
    Sync { steps, ..Sync::default() }
}

/// Whether nobody but the user writes the slices of the Service of that name.
fn is_mirrored(world: &World, endpoints: &Object) -> bool {
    let skipped = endpoints.meta.labels.get(SKIP).is_some_and(|label| label == "true")
        || labels_at(&endpoints.value, "/metadata/annotations").contains_key(LEADER);
    let service = world.get(SERVICES, &endpoints.meta.key);
    !skipped
        && endpoints.meta.deleted.is_none()
        && service.is_some_and(|service| labels_at(&service.value, "/spec/selector").is_empty())
}

/// What is left out, for the user to know.
#[derive(Default)]
struct Counts {
    invalid: usize,
    skipped: usize,
}

impl Counts {
    fn notes(&self, endpoints: &Object) -> Vec<Note> {
        let note = |reason, message| {
            Note::warning(reference(endpoints, "v1", "Endpoints"), reason, message)
        };
        let mut notes = Vec::new();
        if self.invalid > 0 {
            let message = format!(
                "Skipped {} invalid IP addresses when mirroring to EndpointSlices",
                self.invalid
            );
            notes.push(note("InvalidIPAddress", message));
        }
        if self.skipped > 0 {
            let message = format!(
                "A max of {SUBSET_LIMIT} addresses can be mirrored to EndpointSlices per Endpoints subset. {} addresses were skipped",
                self.skipped
            );
            notes.push(note("TooManyAddressesToMirror", message));
        }
        notes
    }
}

/// Endpoints by family and ports.
type ByFamily = BTreeMap<&'static str, BTreeMap<Vec<Port>, Wanted>>;

fn wanted(endpoints: &Object, counts: &mut Counts) -> ByFamily {
    let mut wanted = ByFamily::new();
    for subset in items(&endpoints.value, "/subsets") {
        let ports = listed_ports(subset);
        let listed = |field: &str, ready: bool| {
            items(subset, field).iter().map(move |address| (address, ready))
        };
        let mut added = 0;
        for (address, ready) in
            listed("/addresses", true).chain(listed("/notReadyAddresses", false))
        {
            let Ok(ip) = text(address, "/ip").parse::<IpAddr>() else {
                counts.invalid += 1;
                continue;
            };
            if added == SUBSET_LIMIT {
                counts.skipped += 1;
                continue;
            }
            added += 1;
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let endpoint = endpoint((address, ip), ready);
            let of_ports = wanted.entry(family).or_default().entry(ports.clone()).or_default();
            // Of two that are the same, the ready one stands first.
            of_ports.entry(identity(&endpoint)).or_insert(endpoint);
        }
    }
    wanted
}

fn endpoint((address, ip): (&Value, IpAddr), ready: bool) -> Value {
    // A slice takes an address in its one form alone.
    let mut endpoint = json!({
        "addresses": [ip.to_string()],
        "conditions": {"ready": ready},
    });
    for field in ["targetRef", "nodeName", "hostname"] {
        if let Some(value) = address.get(field).filter(|value| !value.is_null()) {
            endpoint[field] = value.clone();
        }
    }
    endpoint
}

fn labels(endpoints: &Object) -> Labels {
    let mut labels = endpoints.meta.labels.clone();
    labels.remove(HEADLESS);
    labels.insert(SERVICE_NAME.to_owned(), endpoints.meta.key.name.clone());
    labels.insert(MANAGED_BY.to_owned(), US.to_owned());
    labels
}

fn annotations(endpoints: &Object) -> Labels {
    let mut annotations = labels_at(&endpoints.value, "/metadata/annotations");
    annotations.retain(|key, _| !OWN.contains(&key.as_str()));
    annotations
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, service, world};
    use super::*;
    use crate::client::Write;

    fn bare() -> Value {
        let mut service = service("web");
        service["spec"]["selector"] = Value::Null;
        service
    }

    fn by_hand() -> Value {
        json!({"apiVersion": "v1", "kind": "Endpoints",
            "metadata": {"name": "web", "namespace": "ns", "uid": "uid-web", "labels": {"a": "b"}},
            "subsets": [{"ports": [{"name": "http", "port": 80}],
                "addresses": [{"ip": "192.0.2.1", "hostname": "one"}, {"ip": "FD00:0::1"}],
                "notReadyAddresses": [{"ip": "192.0.2.2", "nodeName": "n1"}]}]})
    }

    fn writes(objects: Vec<Value>) -> Vec<Write> {
        sync(&world(objects), &Key::new("ns", "web"), &context()).writes()
    }

    fn created(write: &Write, name: &str) -> Value {
        let Write::Create { object, .. } = write else { unreachable!("{write:?}") };
        let mut object = object.clone();
        object["metadata"]["name"] = json!(name);
        object["metadata"]["uid"] = json!(format!("uid-{name}"));
        object
    }

    #[test]
    fn endpoints_by_hand_become_a_slice_of_each_family() {
        let all = writes(vec![bare(), by_hand()]);
        let [four, six] = &all[..] else { unreachable!("{all:?}") };
        let (four, six) = (created(four, "web-a"), created(six, "web-b"));
        assert_eq!((&four["addressType"], &six["addressType"]), (&json!("IPv4"), &json!("IPv6")));
        assert_eq!(six["endpoints"][0]["addresses"], json!(["fd00::1"]));
        let owner = &four["metadata"]["ownerReferences"][0];
        assert_eq!((&owner["kind"], &owner["uid"]), (&json!("Endpoints"), &json!("uid-web")));
        assert_eq!(
            four["metadata"]["labels"],
            json!({"a": "b", SERVICE_NAME: "web", MANAGED_BY: US})
        );
        assert_eq!(
            four["endpoints"],
            json!([
                {"addresses": ["192.0.2.1"], "conditions": {"ready": true}, "hostname": "one"},
                {"addresses": ["192.0.2.2"], "conditions": {"ready": false}, "nodeName": "n1"}
            ])
        );
        assert_eq!(four["ports"], json!([{"name": "http", "protocol": "TCP", "port": 80}]));
        assert_eq!(writes(vec![bare(), by_hand(), four.clone(), six.clone()]), []);
        // One address less is one slice less, and nothing at all no slice.
        let mut fewer = by_hand();
        fewer["subsets"][0]["addresses"].as_array_mut().unwrap().pop();
        let all = writes(vec![bare(), fewer, four.clone(), six.clone()]);
        assert!(matches!(&all[..], [Write::Delete { object, .. }] if object.name == "web-b"));
        let mut none = by_hand();
        none["subsets"] = json!([]);
        assert_eq!(writes(vec![bare(), none, four, six]).len(), 2);
    }

    #[test]
    fn what_has_a_selector_or_says_no_is_not_mirrored() {
        let slices: Vec<Value> = writes(vec![bare(), by_hand()])
            .iter()
            .enumerate()
            .map(|(n, write)| created(write, &format!("web-{n}")))
            .collect();
        let with = |service: Option<Value>, endpoints: Value| {
            let mut all = slices.clone();
            all.extend(service);
            all.push(endpoints);
            let writes = writes(all);
            writes.iter().filter(|write| matches!(write, Write::Delete { .. })).count()
        };
        assert_eq!(with(Some(bare()), by_hand()), 0);
        assert_eq!(with(Some(service("web")), by_hand()), 2);
        assert_eq!(with(None, by_hand()), 2);
        let mut skipped = by_hand();
        skipped["metadata"]["labels"][SKIP] = json!("true");
        assert_eq!(with(Some(bare()), skipped), 2);
        let mut lock = by_hand();
        lock["metadata"]["annotations"] = json!({LEADER: "x"});
        assert_eq!(with(Some(bare()), lock), 2);
    }

    #[test]
    fn what_is_left_out_is_told() {
        let mut many = by_hand();
        let addresses = &mut many["subsets"][0]["addresses"];
        *addresses =
            (0..1001).map(|n| json!({"ip": format!("10.0.{}.{}", n / 250, n % 250)})).collect();
        addresses.as_array_mut().unwrap().insert(0, json!({"ip": "x"}));
        let sync = sync(&world(vec![bare(), many]), &Key::new("ns", "web"), &context());
        let told: Vec<&str> =
            sync.steps.iter().filter_map(|step| Some(step.note.as_ref()?.reason)).collect();
        assert_eq!(told, ["InvalidIPAddress", "TooManyAddressesToMirror"]);
        assert_eq!(sync.writes().len(), 1);
    }
}
