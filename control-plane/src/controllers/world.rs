//! All watched objects with the indexes that controllers ask for. Owned by the controllers' one
//! task; a value otherwise. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use jiff::Timestamp;
use serde_json::Value;

use super::model::{Key, Kind, NAMESPACES, Object, PODS, REPLICA_SETS};
use crate::client::{Event, ObjectRef, Resource};

/// What controllers must know beside the objects.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Each node's pod CIDRs are cut from here, one of each.
    pub cluster_cidrs: Vec<ipnet::IpNet>,
    pub node_masks: crate::config::NodeMasks,
    /// Published as `kube-root-ca.crt` and in `cluster-info`; PEM.
    pub ca_pem: String,
    /// `https://host:port` for `cluster-info`.
    pub server_url: String,
    /// The kinds to watch: at least [`super::KINDS`].
    pub kinds: Vec<Kind>,
}

/// One resource's objects.
#[derive(Debug, Default)]
struct Cache {
    objects: BTreeMap<Key, Arc<Object>>,
    /// Keys not told again yet after a restart of the watch.
    stale: Option<BTreeSet<Key>>,
    synced: bool,
    /// The highest revision seen.
    revision: u64,
}

/// A change of one object, as `keys` functions get it. At least one side is there.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) resource: Resource,
    pub(crate) old: Option<Arc<Object>>,
    pub(crate) new: Option<Arc<Object>>,
}

impl Change {
    /// The newest state.
    pub(crate) fn object(&self) -> Option<&Arc<Object>> {
        self.new.as_ref().or(self.old.as_ref())
    }

    /// Both states, the old one first.
    pub(crate) fn both(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.old.iter().chain(&self.new)
    }
}

/// The controllers' view.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) settings: Settings,
    caches: BTreeMap<Resource, Cache>,
    by_uid: HashMap<String, ObjectRef>,
    dependents: BTreeMap<String, BTreeSet<ObjectRef>>,
    pods_by_node: BTreeMap<String, BTreeSet<Key>>,
    /// Pods and ReplicaSets that no controller owns.
    orphans: BTreeSet<ObjectRef>,
}

impl World {
    pub(crate) fn new(settings: Settings) -> Self {
        let caches = settings.kinds.iter().map(|kind| (kind.resource, Cache::default())).collect();
        Self {
            settings,
            caches,
            by_uid: HashMap::new(),
            dependents: BTreeMap::new(),
            pods_by_node: BTreeMap::new(),
            orphans: BTreeSet::new(),
        }
    }

    /// Whether every watch has told all that exists, once.
    pub(crate) fn is_synced(&self) -> bool {
        self.caches.values().all(|cache| cache.synced)
    }

    /// Takes in a watch event and tells what changed by it.
    pub(crate) fn apply(
        &mut self,
        resource: Resource,
        event: Event,
        now: Timestamp,
    ) -> Vec<Change> {
        match event {
            Event::Restart => {
                let cache = self.caches.entry(resource).or_default();
                cache.stale = Some(cache.objects.keys().cloned().collect());
                Vec::new()
            }
            Event::Applied(value) => self.put(resource, &value, now).into_iter().collect(),
            Event::Deleted(value) => {
                let Some(last) = Object::decode(resource, &value, now) else { return Vec::new() };
                let cache = self.caches.entry(resource).or_default();
                cache.revision = cache.revision.max(last.meta.revision);
                self.remove(resource, &last.meta.key).into_iter().collect()
            }
            Event::Synced => {
                let cache = self.caches.entry(resource).or_default();
                cache.synced = true;
                let stale = cache.stale.take().unwrap_or_default();
                stale.iter().filter_map(|key| self.remove(resource, key)).collect()
            }
        }
    }

    fn put(&mut self, resource: Resource, value: &Arc<Value>, now: Timestamp) -> Option<Change> {
        let object = Arc::new(Object::decode(resource, value, now)?);
        let cache = self.caches.entry(resource).or_default();
        cache.revision = cache.revision.max(object.meta.revision);
        if let Some(stale) = &mut cache.stale {
            stale.remove(&object.meta.key);
        }
        let old = cache.objects.get(&object.meta.key).cloned();
        if old.as_ref().is_some_and(|old| {
            old.meta.uid == object.meta.uid && old.meta.revision == object.meta.revision
        }) {
            return None;
        }
        if let Some(old) = &old {
            self.unindex(old);
        }
        self.index(&object);
        let cache = self.caches.entry(resource).or_default();
        cache.objects.insert(object.meta.key.clone(), Arc::clone(&object));
        Some(Change { resource, old, new: Some(object) })
    }

    fn remove(&mut self, resource: Resource, key: &Key) -> Option<Change> {
        let old = self.caches.get_mut(&resource)?.objects.remove(key)?;
        self.unindex(&old);
        Some(Change { resource, old: Some(old), new: None })
    }

    fn index(&mut self, object: &Object) {
        let place = object.place();
        for owner in &object.meta.owners {
            self.dependents.entry(owner.uid.clone()).or_default().insert(place.clone());
        }
        if let Some(pod) = &object.pod {
            self.pods_by_node.entry(pod.node.clone()).or_default().insert(object.meta.key.clone());
        }
        if matches!(object.resource, PODS | REPLICA_SETS) && object.meta.controller().is_none() {
            self.orphans.insert(place.clone());
        }
        self.by_uid.insert(object.meta.uid.clone(), place);
    }

    fn unindex(&mut self, object: &Object) {
        let place = object.place();
        for owner in &object.meta.owners {
            if let Some(set) = self.dependents.get_mut(&owner.uid) {
                set.remove(&place);
                if set.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
        if let Some(pod) = &object.pod
            && let Some(set) = self.pods_by_node.get_mut(&pod.node)
        {
            set.remove(&object.meta.key);
            if set.is_empty() {
                self.pods_by_node.remove(&pod.node);
            }
        }
        self.orphans.remove(&place);
        self.by_uid.remove(&object.meta.uid);
    }

    pub(crate) fn get(&self, resource: Resource, key: &Key) -> Option<&Arc<Object>> {
        self.caches.get(&resource)?.objects.get(key)
    }

    pub(crate) fn find(&self, place: &ObjectRef) -> Option<&Arc<Object>> {
        self.get(place.resource, &Key::new(&place.namespace, &place.name))
    }

    pub(crate) fn all(&self, resource: Resource) -> impl Iterator<Item = &Arc<Object>> {
        self.caches.get(&resource).into_iter().flat_map(|cache| cache.objects.values())
    }

    /// The resource's objects in one namespace, by name.
    pub(crate) fn in_namespace(
        &self,
        resource: Resource,
        namespace: &str,
    ) -> impl Iterator<Item = &Arc<Object>> {
        let start = Key::new(namespace, "");
        let namespace = start.namespace.clone();
        self.caches
            .get(&resource)
            .into_iter()
            .flat_map(move |cache| cache.objects.range(start.clone()..))
            .take_while(move |(key, _)| key.namespace == namespace)
            .map(|(_, object)| object)
    }

    pub(crate) fn by_uid(&self, uid: &str) -> Option<&Arc<Object>> {
        self.find(self.by_uid.get(uid)?)
    }

    /// Objects that name this uid as an owner.
    pub(crate) fn dependents(&self, uid: &str) -> impl Iterator<Item = &Arc<Object>> {
        self.dependents.get(uid).into_iter().flatten().filter_map(|place| self.find(place))
    }

    /// Pods or ReplicaSets of a namespace that no controller owns.
    pub(crate) fn orphans(
        &self,
        resource: Resource,
        namespace: &str,
    ) -> impl Iterator<Item = &Arc<Object>> {
        let start = Key::new(namespace, "").at(resource);
        let namespace = start.namespace.clone();
        self.orphans
            .range(start..)
            .take_while(move |place| place.resource == resource && place.namespace == namespace)
            .filter_map(|place| self.find(place))
    }

    /// Pods assigned to a node; `""` for unassigned ones.
    pub(crate) fn pods_on(&self, node: &str) -> impl Iterator<Item = &Arc<Object>> {
        self.pods_by_node.get(node).into_iter().flatten().filter_map(|key| self.get(PODS, key))
    }

    /// Names of all nodes that pods are assigned to.
    pub(crate) fn nodes_with_pods(&self) -> impl Iterator<Item = &str> {
        self.pods_by_node.keys().map(String::as_str).filter(|node| !node.is_empty())
    }

    pub(crate) fn namespace(&self, name: &str) -> Option<&Arc<Object>> {
        self.get(NAMESPACES, &Key::new("", name))
    }

    /// The highest revision that this resource's watch has told.
    pub(crate) fn revision(&self, resource: Resource) -> u64 {
        self.caches.get(&resource).map_or(u64::MAX, |cache| cache.revision)
    }

    /// The watched kind that an owner reference names.
    pub(crate) fn kind(&self, api_version: &str, kind: &str) -> Option<&Kind> {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        self.settings.kinds.iter().find(|known| known.kind == kind && known.resource.group == group)
    }
}
