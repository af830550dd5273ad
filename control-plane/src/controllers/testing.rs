//! Objects for tests, and an API server in memory that checks and counts what it is asked.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use futures::future::{BoxFuture, FutureExt as _};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    json::{boolean, items, safe_encode, stable_hash, text},
    model::{KINDS, NODES, PODS},
    sync::Context,
    world::{Settings, World},
};
use crate::api::patch::merge;
use crate::client::{ApiError, Client, Event, ObjectRef, Resource, Write, is_owned_by};

pub(crate) fn context() -> Context {
    Context { now: "2026-01-01T00:00:00Z".parse().unwrap(), failure: None }
}

pub(crate) fn settings() -> Settings {
    Settings {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        node_masks: crate::config::NodeMasks::default(),
        ca_pem: "CA".to_owned(),
        server_url: "https://192.0.2.1:6443".to_owned(),
        kinds: KINDS.to_vec(),
    }
}

pub(crate) fn world(objects: Vec<Value>) -> World {
    world_at(objects, context().now)
}

/// A synced world with these objects, by their `kind`.
pub(crate) fn world_at(objects: Vec<Value>, seen: Timestamp) -> World {
    let mut world = World::new(settings());
    for mut object in objects {
        let kind = KINDS.iter().find(|kind| object["kind"] == kind.kind).unwrap();
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.entry("resourceVersion").or_insert(json!("1"));
        world.apply(kind.resource, Event::Applied(Arc::new(object)), seen);
    }
    for kind in KINDS {
        world.apply(kind.resource, Event::Synced, seen);
    }
    world
}

fn template() -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{
            "name": "c", "image": "nginx", "ports": [{"name": "http", "containerPort": 80}],
        }]},
    })
}

pub(crate) fn deployment(name: &str, replicas: i64) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": template(), "progressDeadlineSeconds": 600,
            "strategy": {"type": "RollingUpdate"},
        },
    })
}

/// The ReplicaSet that a Deployment's template makes.
pub(crate) fn set_of(deployment: &Value, revision: &str, replicas: i64) -> Value {
    let hash = safe_encode(stable_hash(&deployment["spec"]["template"], ""));
    let mut template = deployment["spec"]["template"].clone();
    template["metadata"]["labels"]["pod-template-hash"] = json!(hash);
    let name = deployment["metadata"]["name"].as_str().unwrap();
    json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {
            "name": format!("{name}-{hash}"), "namespace": "ns", "uid": format!("uid-{name}-{hash}"),
            "generation": 1, "labels": template["metadata"]["labels"],
            "annotations": {
                "deployment.kubernetes.io/revision": revision,
                "deployment.kubernetes.io/desired-replicas": deployment["spec"]["replicas"].to_string(),
                "deployment.kubernetes.io/max-replicas":
                    (deployment["spec"]["replicas"].as_i64().unwrap() * 5 + 3).div_euclid(4).to_string(),
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "Deployment", "name": name,
                "uid": deployment["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": {
            "replicas": replicas, "template": template,
            "selector": {"matchLabels": {"app": "web", "pod-template-hash": hash}},
        },
    })
}

pub(crate) fn replica_set(name: &str, replicas: i64) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": template(),
        },
    })
}

/// A pod of the ReplicaSet `set`; running when it has a node.
pub(crate) fn pod(name: &str, set: &str, node: &str, ready: bool) -> Value {
    let mut template = template();
    template["spec"]["nodeName"] = json!(node);
    let ready = if ready { "True" } else { "False" };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "ns", "uid": format!("uid-{name}"), "labels": {"app": "web"},
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": set,
                "uid": format!("uid-{set}"), "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "spec": template["spec"],
        "status": {
            "phase": if node.is_empty() { "Pending" } else { "Running" },
            "podIP": "10.244.0.9",
            "conditions": [{"type": "Ready", "status": ready}],
        },
    })
}

pub(crate) fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-svc-{name}")},
        "spec": {
            "clusterIP": "10.96.0.9", "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80}],
        },
    })
}

pub(crate) fn node(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [
                {"type": "Hostname", "address": name},
                {"type": "InternalIP", "address": "192.0.2.11"},
            ],
        },
    })
}

/// An API server in memory. It keeps what the real one promises: revisions, conflicts, names,
/// finalizers, graceful deletion, subresources.
#[derive(Default)]
pub(crate) struct FakeApi {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<ObjectRef, Value>,
    revision: u64,
    watches: Vec<(Resource, mpsc::Sender<Event>)>,
    /// Writes that were carried out, by verb and plural.
    counts: BTreeMap<String, usize>,
    /// The next so many creations of a resource fail with 500.
    faults: BTreeMap<Resource, usize>,
    /// Events that the watches of one resource get later.
    delayed: Option<(Resource, Vec<Event>)>,
}

/// What an in-memory watch holds; tests stay far below.
const WATCH: usize = 65_536;

impl FakeApi {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub(crate) fn fail_creates(&self, resource: Resource, count: usize) {
        self.state.lock().unwrap().faults.insert(resource, count);
    }

    /// From now on the watches of this resource tell nothing, until [`FakeApi::tell_all`].
    pub(crate) fn delay_watch(&self, resource: Resource) {
        self.state.lock().unwrap().delayed = Some((resource, Vec::new()));
    }

    pub(crate) fn tell_all(&self) {
        let mut state = self.state.lock().unwrap();
        let (resource, events) = state.delayed.take().unwrap();
        events.iter().for_each(|event| state.tell(resource, event));
    }

    /// How often this was done, such as `create pods`.
    pub(crate) fn count(&self, what: &str) -> usize {
        self.state.lock().unwrap().counts.get(what).copied().unwrap_or(0)
    }

    pub(crate) fn list(&self, resource: Resource) -> Vec<Value> {
        let state = self.state.lock().unwrap();
        state
            .objects
            .iter()
            .filter(|(place, _)| place.resource == resource)
            .map(|(_, value)| value.clone())
            .collect()
    }

    pub(crate) async fn create(&self, resource: Resource, object: Value) -> Value {
        let namespace = text(&object, "/metadata/namespace").to_owned();
        self.write(Write::Create { resource, namespace, object }).await.unwrap()
    }

    pub(crate) async fn patch(&self, object: ObjectRef, subresource: &'static str, patch: Value) {
        self.write(Write::Patch { object, subresource, patch }).await.unwrap();
    }

    /// Waits until `test` holds of the resource's objects; the loop's timeout is the test's.
    pub(crate) async fn wait(
        &self,
        resource: Resource,
        test: impl Fn(&[Value]) -> bool,
    ) -> Vec<Value> {
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let objects = self.list(resource);
            if test(&objects) {
                return objects;
            }
            assert!(tokio::time::Instant::now() < deadline, "waited in vain: {objects:#?}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

fn error(code: u16, reason: &'static str, message: String) -> ApiError {
    ApiError { code, reason, message, details: Value::Null }
}

impl State {
    fn tell(&mut self, resource: Resource, event: &Event) {
        if let Some((_, delayed)) = self.delayed.as_mut().filter(|(of, _)| *of == resource) {
            delayed.push(event.clone());
            return;
        }
        self.watches.retain(|(watched, watch)| {
            *watched != resource || watch.try_send(event.clone()).is_ok()
        });
    }

    fn store(&mut self, place: ObjectRef, mut value: Value) -> Value {
        self.revision += 1;
        value["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let going = !text(&value, "/metadata/deletionTimestamp").is_empty();
        let held = !items(&value, "/metadata/finalizers").is_empty()
            || !items(&value, "/spec/finalizers").is_empty()
            || value["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) > 0;
        if going && !held {
            self.objects.remove(&place);
            self.tell(place.resource, &Event::Deleted(Arc::new(value.clone())));
        } else {
            self.objects.insert(place.clone(), value.clone());
            self.tell(place.resource, &Event::Applied(Arc::new(value.clone())));
        }
        value
    }

    fn create(
        &mut self,
        resource: Resource,
        namespace: String,
        mut object: Value,
    ) -> Result<Value, ApiError> {
        if let Some(left) = self.faults.get_mut(&resource).filter(|left| **left > 0) {
            *left -= 1;
            return Err(error(500, "InternalError", "fault".to_owned()));
        }
        self.revision += 1;
        if text(&object, "/metadata/name").is_empty() {
            let name = format!("{}{:05}", text(&object, "/metadata/generateName"), self.revision);
            object["metadata"]["name"] = json!(name);
        }
        let name = text(&object, "/metadata/name").to_owned();
        let place = ObjectRef { resource, namespace: namespace.clone(), name };
        if self.objects.contains_key(&place) {
            return Err(error(409, "AlreadyExists", format!("{} already exists", place.name)));
        }
        assert_eq!(
            text(&object, "/metadata/namespace"),
            namespace,
            "the namespace is said twice alike"
        );
        object["metadata"]["uid"] = json!(format!("u{}", self.revision));
        object["metadata"]["generation"] = json!(1);
        object["metadata"]["creationTimestamp"] = json!(super::json::rfc3339(Timestamp::now()));
        if resource == PODS {
            object["status"]["phase"] = json!("Pending");
        }
        Ok(self.store(place, object))
    }

    fn change(
        &mut self,
        place: &ObjectRef,
        sub: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<Value, ApiError> {
        let Some(old) = self.objects.get(place).cloned() else {
            return Err(error(404, "NotFound", format!("{} not found", place.name)));
        };
        let mut new = old.clone();
        change(&mut new);
        let asked = text(&new, "/metadata/resourceVersion");
        if !asked.is_empty() && asked != text(&old, "/metadata/resourceVersion") {
            return Err(error(409, "Conflict", "the object has been modified".to_owned()));
        }
        if text(&new, "/metadata/uid") != text(&old, "/metadata/uid") {
            return Err(error(409, "Conflict", "another uid".to_owned()));
        }
        match sub {
            "status" | "approval" => {
                let status = new["status"].clone();
                new = old.clone();
                new["status"] = status;
            }
            "finalize" => {
                let finalizers = new["spec"]["finalizers"].clone();
                new = old.clone();
                new["spec"]["finalizers"] = finalizers;
            }
            _ => new["status"] = old["status"].clone(),
        }
        if new == old {
            return Ok(old);
        }
        if new["spec"] != old["spec"] {
            new["metadata"]["generation"] =
                json!(old["metadata"]["generation"].as_i64().unwrap_or(0) + 1);
        }
        Ok(self.store(place.clone(), new))
    }

    fn bind(&mut self, place: &ObjectRef, binding: &Value) -> Result<Value, ApiError> {
        let node = text(binding, "/target/name").to_owned();
        assert_eq!(text(binding, "/target/kind"), "Node");
        let at = ObjectRef { resource: NODES, namespace: String::new(), name: node.clone() };
        assert!(self.objects.contains_key(&at), "bound to a node that does not exist");
        let Some(pod) = self.objects.get(place) else {
            return Err(error(404, "NotFound", "no such pod".to_owned()));
        };
        if !text(pod, "/spec/nodeName").is_empty() {
            return Err(error(409, "Conflict", "pod is already assigned to a node".to_owned()));
        }
        let mut pod = pod.clone();
        pod["spec"]["nodeName"] = json!(node);
        pod["status"]["conditions"] = json!([{"type": "PodScheduled", "status": "True"}]);
        Ok(self.store(place.clone(), pod))
    }

    fn delete(
        &mut self,
        place: &ObjectRef,
        options: &crate::client::DeleteOptions,
    ) -> Result<Value, ApiError> {
        let Some(mut value) = self.objects.get(place).cloned() else {
            return Err(error(404, "NotFound", format!("{} not found", place.name)));
        };
        if options.uid.as_ref().is_some_and(|uid| uid != text(&value, "/metadata/uid")) {
            return Err(error(409, "Conflict", "precondition failed: uid".to_owned()));
        }
        let revision = text(&value, "/metadata/resourceVersion");
        if options.resource_version.as_ref().is_some_and(|asked| asked != revision) {
            return Err(error(409, "Conflict", "precondition failed: revision".to_owned()));
        }
        value["metadata"]["deletionTimestamp"] = json!(super::json::rfc3339(Timestamp::now()));
        if place.resource == PODS && !text(&value, "/spec/nodeName").is_empty() {
            let grace = options.grace_period_seconds.unwrap_or(30);
            value["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        }
        let finalizer = match options.propagation {
            Some("Foreground") => Some("foregroundDeletion"),
            Some("Orphan") => Some("orphan"),
            _ => None,
        };
        if let Some(finalizer) = finalizer {
            let mut all = items(&value, "/metadata/finalizers").to_vec();
            if !all.contains(&json!(finalizer)) {
                all.push(json!(finalizer));
            }
            value["metadata"]["finalizers"] = json!(all);
        }
        Ok(self.store(place.clone(), value))
    }

    fn write(&mut self, write: Write) -> Result<Value, ApiError> {
        let (verb, resource, sub) = match &write {
            Write::Create { resource, .. } => ("create", *resource, ""),
            Write::Update { object, .. } => ("update", object.resource, ""),
            Write::UpdateSub { object, subresource, .. } => {
                ("update", object.resource, *subresource)
            }
            Write::Patch { object, subresource, .. } => ("patch", object.resource, *subresource),
            Write::Delete { object, .. } => ("delete", object.resource, ""),
        };
        let what = format!("{verb} {}", resource.plural);
        let what = if sub.is_empty() { what } else { format!("{what}/{sub}") };
        let result = match write {
            Write::Create { resource, namespace, object } => {
                self.create(resource, namespace, object)
            }
            Write::Update { object, value } => self.change(&object, "", |old| *old = value),
            Write::UpdateSub { object, subresource: "binding", value } => {
                self.bind(&object, &value)
            }
            Write::UpdateSub { object, subresource, value } => {
                self.change(&object, subresource, |old| *old = value)
            }
            Write::Patch { object, subresource, patch } => {
                self.change(&object, subresource, |old| *old = merge::patch(old.take(), &patch))
            }
            Write::Delete { object, options } => self.delete(&object, &options),
        };
        if result.is_ok() {
            *self.counts.entry(what).or_insert(0) += 1;
        }
        result
    }
}

impl Client for FakeApi {
    fn write(&self, write: Write) -> BoxFuture<'_, Result<Value, ApiError>> {
        let result = self.state.lock().unwrap().write(write);
        async move { result }.boxed()
    }

    fn read(&self, object: &ObjectRef) -> BoxFuture<'_, Result<Value, ApiError>> {
        let found = self.state.lock().unwrap().objects.get(object).cloned();
        let result =
            found.ok_or_else(|| error(404, "NotFound", format!("{} not found", object.name)));
        async move { result }.boxed()
    }

    fn find_child(
        &self,
        uid: &str,
        resource: Resource,
        namespace: &str,
    ) -> BoxFuture<'_, Result<Option<String>, ApiError>> {
        let mut state = self.state.lock().unwrap();
        *state.counts.entry(format!("list {}", resource.plural)).or_insert(0) += 1;
        let mut objects = state.objects.iter();
        let child = objects.find(|(place, value)| {
            place.resource == resource
                && (namespace.is_empty() || place.namespace == namespace)
                && is_owned_by(value, uid)
        });
        let child = child.map(|(place, _)| place.name.clone());
        async move { Ok(child) }.boxed()
    }

    fn watch(&self, resource: Resource) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(WATCH);
        let mut state = self.state.lock().unwrap();
        sender.try_send(Event::Restart).unwrap();
        for (place, value) in &state.objects {
            if place.resource == resource {
                sender.try_send(Event::Applied(Arc::new(value.clone()))).unwrap();
            }
        }
        sender.try_send(Event::Synced).unwrap();
        state.watches.push((resource, sender));
        receiver
    }
}

/// Whether a pod is ready, for waiting.
pub(crate) fn is_ready(pod: &Value) -> bool {
    items(pod, "/status/conditions").iter().any(|condition| {
        text(condition, "/type") == "Ready" && text(condition, "/status") == "True"
    }) && !boolean(pod, "/metadata/deleted")
}
