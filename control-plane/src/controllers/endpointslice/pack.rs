//! Endpoints into slices with as few writes as can be. Pure.
//!
//! Follows `reconcileByPortMapping` and `finalize` of upstream's `k8s.io/endpointslice`: an endpoint stays in the
//! slice it is in; slices that are written anyway are filled up first, the fullest before the others; what is left
//! goes whole into the slice that it fills best, or into new ones; a slice that would go is written over by one that
//! would come.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    super::{
        json::{items, normal, text},
        model::{ENDPOINT_SLICES, Labels, Object},
        sync::Step,
    },
    endpoint::{Port, listed_ports, port_values},
};

/// When what changed was set off, for measurements of how long programming takes.
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Endpoints by what is the same about them as long as they are the same endpoint.
pub(in crate::controllers) type Wanted = BTreeMap<Identity, Value>;
/// Address, hostname, and namespace and name of what it refers to.
pub(in crate::controllers) type Identity = [String; 4];

/// What all slices of an owner have in common.
pub(in crate::controllers) struct Frame<'a> {
    pub(in crate::controllers) owner: &'a Object,
    pub(in crate::controllers) owner_reference: Value,
    /// `IPv4` or `IPv6`.
    pub(in crate::controllers) family: &'a str,
    pub(in crate::controllers) labels: Labels,
    /// Beside the time of the trigger; those of an existing slice stay.
    pub(in crate::controllers) annotations: Labels,
    /// Most endpoints of a slice.
    pub(in crate::controllers) limit: usize,
    pub(in crate::controllers) triggered: Option<Timestamp>,
}

/// A slice that is to be written.
struct Draft<'a> {
    over: Option<&'a Arc<Object>>,
    ports: Vec<Port>,
    endpoints: Vec<Value>,
}

/// Slices to make, to change and to remove.
#[derive(Default)]
struct Drafts<'a> {
    create: Vec<Draft<'a>>,
    update: Vec<Draft<'a>>,
    delete: Vec<&'a Arc<Object>>,
}

pub(in crate::controllers) fn identity(endpoint: &Value) -> Identity {
    let addresses: Vec<&str> =
        items(endpoint, "/addresses").iter().filter_map(Value::as_str).collect();
    let target = |field: &str| text(endpoint, &format!("/targetRef/{field}")).to_owned();
    [
        addresses.join(","),
        text(endpoint, "/hostname").to_owned(),
        target("namespace"),
        target("name"),
    ]
}

/// The steps from the existing slices of one family to the wanted endpoints. `placeholder`: whether one empty slice
/// says that there is nothing.
pub(in crate::controllers) fn reconcile(
    frame: &Frame<'_>,
    wanted: BTreeMap<Vec<Port>, Wanted>,
    existing: &[&Arc<Object>],
    placeholder: bool,
) -> Vec<Step> {
    let uid = &frame.owner.meta.uid;
    let (owned, foreign): (Vec<_>, Vec<_>) = existing
        .iter()
        .copied()
        .partition(|slice| slice.meta.owners.iter().any(|owner| owner.uid == *uid));
    let mut by_ports: BTreeMap<Vec<Port>, Vec<&Arc<Object>>> = BTreeMap::new();
    for slice in owned {
        by_ports.entry(listed_ports(&slice.value)).or_default().push(slice);
    }
    let mut drafts = Drafts::default();
    for (ports, endpoints) in wanted {
        let slices = by_ports.remove(&ports).unwrap_or_default();
        pack(frame, (ports, endpoints), &slices, &mut drafts);
    }
    drafts.delete.extend(by_ports.into_values().flatten());
    if placeholder
        && drafts.delete.len() + foreign.len() == existing.len()
        && drafts.create.is_empty()
        && drafts.update.is_empty()
    {
        keep_placeholder(frame, &mut drafts);
    }
    // One that would go is written over: clients see a change instead of a gap.
    for over in std::mem::take(&mut drafts.delete) {
        match drafts.create.pop() {
            Some(draft) => drafts.update.push(Draft { over: Some(over), ..draft }),
            None => drafts.delete.push(over),
        }
    }
    drafts.delete.extend(foreign);
    steps(frame, drafts)
}

/// An empty slice without ports, the one that is there or a new one.
fn keep_placeholder(frame: &Frame<'_>, drafts: &mut Drafts<'_>) {
    let is_empty = |slice: &Object| {
        items(&slice.value, "/endpoints").is_empty()
            && items(&slice.value, "/ports").is_empty()
            && slice.meta.labels == frame.labels
    };
    match drafts.delete[..] {
        [only] if is_empty(only) => drafts.delete.clear(),
        _ => drafts.create.push(Draft { over: None, ports: Vec::new(), endpoints: Vec::new() }),
    }
}

/// Distributes the endpoints of one set of ports over its slices.
fn pack<'a>(
    frame: &Frame<'_>,
    (ports, mut wanted): (Vec<Port>, Wanted),
    slices: &[&'a Arc<Object>],
    drafts: &mut Drafts<'a>,
) {
    let draft = |over, endpoints| Draft { over, ports: ports.clone(), endpoints };
    let (mut changed, mut same) = (Vec::new(), Vec::new());
    for slice in slices.iter().copied() {
        let stored = items(&slice.value, "/endpoints");
        let kept: Vec<Value> =
            stored.iter().filter_map(|endpoint| wanted.remove(&identity(endpoint))).collect();
        let equal = kept.len() == stored.len()
            && kept.iter().zip(stored).all(|(new, old)| normal(new) == normal(old));
        if equal && slice.meta.labels == frame.labels && has_annotations(slice, frame) {
            same.push((slice, kept));
        } else if kept.is_empty() {
            drafts.delete.push(slice);
        } else {
            changed.push((slice, kept));
        }
    }
    let mut left: Vec<Value> = wanted.into_values().collect();
    changed.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.len()));
    for (_, kept) in &mut changed {
        let room = frame.limit.saturating_sub(kept.len()).min(left.len());
        kept.extend(left.drain(..room));
    }
    while left.len() >= frame.limit {
        drafts.create.push(draft(None, left.drain(..frame.limit).collect()));
    }
    if !left.is_empty() {
        if let Some(best) = fullest(&same, left.len(), frame.limit) {
            let (slice, mut kept) = same.swap_remove(best);
            kept.append(&mut left);
            changed.push((slice, kept));
        } else {
            drafts.create.push(draft(None, left));
        }
    }
    drafts.update.extend(changed.into_iter().map(|(slice, kept)| draft(Some(slice), kept)));
}

fn has_annotations(slice: &Object, frame: &Frame<'_>) -> bool {
    let stored = slice.value.pointer("/metadata/annotations");
    let is_set = |(key, value): (&String, &String)| {
        stored.and_then(|stored| stored.get(key)).and_then(Value::as_str) == Some(value)
    };
    frame.annotations.iter().all(is_set)
}

/// The slice that `more` endpoints fill up best.
fn fullest(slices: &[(&Arc<Object>, Vec<Value>)], more: usize, limit: usize) -> Option<usize> {
    let sizes = slices.iter().map(|(_, kept)| kept.len() + more).enumerate();
    sizes.filter(|(_, size)| *size <= limit).max_by_key(|(_, size)| *size).map(|(index, _)| index)
}

/// New and grown slices are written before others go, so that no endpoint is missing in between.
fn steps(frame: &Frame<'_>, drafts: Drafts<'_>) -> Vec<Step> {
    let writes = drafts.create.into_iter().chain(drafts.update).map(|draft| write(frame, &draft));
    writes.chain(drafts.delete.into_iter().map(|slice| Step::delete(slice))).collect()
}

fn write(frame: &Frame<'_>, draft: &Draft<'_>) -> Step {
    let mut annotations: Map<String, Value> =
        frame.annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    let trigger = frame.triggered.map(|time| json!(time.to_string()));
    let Some(slice) = draft.over else {
        annotations.extend(trigger.map(|time| (TRIGGERED.to_owned(), time)));
        let mut object = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "generateName": format!("{}-", frame.owner.meta.key.name),
                "namespace": frame.owner.meta.key.namespace,
                "labels": frame.labels,
                "ownerReferences": [frame.owner_reference],
            },
            "addressType": frame.family,
            "endpoints": draft.endpoints,
            "ports": port_values(&draft.ports),
        });
        if !annotations.is_empty() {
            object["metadata"]["annotations"] = Value::Object(annotations);
        }
        return Step::create(ENDPOINT_SLICES, &frame.owner.meta.key.namespace, object);
    };
    let names: BTreeSet<&String> = slice.meta.labels.keys().chain(frame.labels.keys()).collect();
    let labels: Map<String, Value> =
        names.into_iter().map(|name| (name.clone(), json!(frame.labels.get(name)))).collect();
    // Null removes the time of an older change.
    annotations.insert(TRIGGERED.to_owned(), trigger.unwrap_or(Value::Null));
    let patch = json!({
        "metadata": {
            "resourceVersion": slice.meta.revision.to_string(),
            "labels": labels,
            "annotations": annotations,
        },
        "endpoints": draft.endpoints,
        "ports": port_values(&draft.ports),
    });
    Step::patch(slice.place(), patch)
}
