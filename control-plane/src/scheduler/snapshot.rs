//! Nodes and what is taken of them, kept up to date pod by pod. Pure.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::pod::{Pod, resources};
use crate::controllers::{
    json::{boolean, items, labels_at, text},
    model::Labels,
};

/// Amounts by resource name: CPU in milli-cores, memory and storage in bytes, others in units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources(pub(crate) BTreeMap<String, i64>);

impl Resources {
    pub(crate) fn amount(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let own = self.0.entry(name.clone()).or_insert(0);
            *own = own.saturating_add(*amount);
        }
    }

    fn subtract(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            if let Some(own) = self.0.get_mut(name) {
                *own = own.saturating_sub(*amount);
            }
        }
    }

    /// Raises each amount to at least the other's.
    pub(crate) fn raise(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let own = self.0.entry(name.clone()).or_insert(0);
            *own = (*own).max(*amount);
        }
    }
}

/// A port of the node that a pod takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// `0.0.0.0` for all addresses.
    pub(crate) ip: String,
    pub(crate) protocol: String,
    pub(crate) port: i64,
}

impl HostPort {
    pub(crate) fn conflicts(&self, other: &Self) -> bool {
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || self.ip == "0.0.0.0" || other.ip == "0.0.0.0")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taint {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) effect: String,
}

impl Taint {
    pub(crate) fn decode(value: &Value) -> Self {
        Self {
            key: text(value, "/key").to_owned(),
            value: text(value, "/value").to_owned(),
            effect: text(value, "/effect").to_owned(),
        }
    }
}

/// A node with the pods on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Node {
    pub(crate) name: String,
    /// False while only pods tell of it.
    pub(crate) present: bool,
    pub(crate) labels: Labels,
    pub(crate) unschedulable: bool,
    pub(crate) taints: Vec<Taint>,
    pub(crate) allocatable: Resources,
    pub(crate) used: Resources,
    pub(crate) scored: Resources,
    pub(crate) pods: i64,
    pub(crate) host_ports: Vec<HostPort>,
    groups: HashMap<String, i64>,
}

impl Node {
    /// Pods of a group on this node.
    pub(crate) fn of_group(&self, group: &str) -> i64 {
        self.groups.get(group).copied().unwrap_or(0)
    }
}

/// What is remembered of a pod that takes room on a node.
#[derive(Clone, Debug)]
struct Placed {
    node: String,
    requests: Resources,
    scored: Resources,
    host_ports: Vec<HostPort>,
    group: String,
}

/// All nodes and the room taken on them. Every change costs what it touches, not what there is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    nodes: Vec<Node>,
    slots: HashMap<String, usize>,
    /// By uid.
    pods: HashMap<String, Placed>,
    present: usize,
}

/// Whether a change may make room for a pod that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Helps {
    No,
    Maybe,
}

impl Snapshot {
    /// In no particular order; those that are not `present` have only pods.
    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// How many nodes exist.
    pub(crate) fn count(&self) -> usize {
        self.present
    }

    pub(crate) fn put_node(&mut self, value: &Value) -> Helps {
        let name = text(value, "/metadata/name");
        let slot = self.slot(name);
        let node = &mut self.nodes[slot];
        let labels = labels_at(value, "/metadata/labels");
        let unschedulable = boolean(value, "/spec/unschedulable");
        let taints: Vec<Taint> = items(value, "/spec/taints").iter().map(Taint::decode).collect();
        let allocatable = resources(value.pointer("/status/allocatable"));
        let same = node.present
            && node.labels == labels
            && node.unschedulable == unschedulable
            && node.taints == taints
            && node.allocatable == allocatable;
        if same {
            return Helps::No;
        }
        if !std::mem::replace(&mut node.present, true) {
            self.present += 1;
        }
        node.labels = labels;
        node.unschedulable = unschedulable;
        node.taints = taints;
        node.allocatable = allocatable;
        Helps::Maybe
    }

    pub(crate) fn remove_node(&mut self, name: &str) {
        let Some(slot) = self.slots.get(name).copied() else { return };
        if std::mem::take(&mut self.nodes[slot].present) {
            self.present -= 1;
        }
        self.drop_if_unused(slot);
    }

    /// Takes the room of a pod on a node, instead of what it took before.
    pub(crate) fn put_pod(&mut self, pod: &Pod, node: &str) {
        if self.pods.get(&pod.uid).is_some_and(|placed| {
            placed.node == node && placed.requests == pod.requests && placed.group == pod.group
        }) {
            return;
        }
        self.remove_pod(&pod.uid);
        let slot = self.slot(node);
        let place = &mut self.nodes[slot];
        place.used.add(&pod.requests);
        place.scored.add(&pod.scored);
        place.pods += 1;
        place.host_ports.extend(pod.host_ports.iter().cloned());
        *place.groups.entry(pod.group.clone()).or_insert(0) += 1;
        let placed = Placed {
            node: node.to_owned(),
            requests: pod.requests.clone(),
            scored: pod.scored.clone(),
            host_ports: pod.host_ports.clone(),
            group: pod.group.clone(),
        };
        self.pods.insert(pod.uid.clone(), placed);
    }

    pub(crate) fn remove_pod(&mut self, uid: &str) -> Helps {
        let Some(placed) = self.pods.remove(uid) else { return Helps::No };
        let Some(slot) = self.slots.get(&placed.node).copied() else { return Helps::No };
        let node = &mut self.nodes[slot];
        node.used.subtract(&placed.requests);
        node.scored.subtract(&placed.scored);
        node.pods -= 1;
        for port in &placed.host_ports {
            if let Some(index) = node.host_ports.iter().position(|own| own == port) {
                node.host_ports.swap_remove(index);
            }
        }
        if let Some(count) = node.groups.get_mut(&placed.group) {
            *count -= 1;
            if *count == 0 {
                node.groups.remove(&placed.group);
            }
        }
        self.drop_if_unused(slot);
        Helps::Maybe
    }

    fn slot(&mut self, name: &str) -> usize {
        if let Some(slot) = self.slots.get(name) {
            return *slot;
        }
        self.nodes.push(Node { name: name.to_owned(), ..Node::default() });
        self.slots.insert(name.to_owned(), self.nodes.len() - 1);
        self.nodes.len() - 1
    }

    fn drop_if_unused(&mut self, slot: usize) {
        if self.nodes[slot].present || self.nodes[slot].pods > 0 {
            return;
        }
        let gone = self.nodes.swap_remove(slot);
        self.slots.remove(&gone.name);
        if let Some(moved) = self.nodes.get(slot) {
            self.slots.insert(moved.name.clone(), slot);
        }
    }
}
