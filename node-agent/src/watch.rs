//! Follows a Kubernetes API server: lists and watches into tables.
//!
//! Effects only; what an object means is decided in `parse`. Tasks: one per kind, which writes its
//! table, and one that reports services with unsupported fields in a condition and Events. All end with the
//! [`Handle`]. A lost connection is retried with growing pauses; until a new list is complete the
//! tables stay as they are, so nothing is deleted for being absent from an unfinished list.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::{
    api::{
        core::v1::{Event, Node, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::JoinSet, time};

use crate::{
    chain::chain,
    model::{EndpointSliceRow, NodeRow, ObjectKey, ServiceRow},
    parse,
    service_event::{self, AGAIN, About, warning},
    table::Table,
};

/// Services whose report may wait; further ones are told by the next list. A list comes in pages of 500.
const REPORTS: usize = 4_096;
/// Services whose reports are remembered, so that each is told once; the oldest set is forgotten
/// when it is full.
const REPORTED: usize = 16_384;

/// The tables that are kept equal to the API server.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    pub services: Table<ObjectKey, ServiceRow>,
    pub slices: Table<ObjectKey, EndpointSliceRow>,
    pub nodes: Table<ObjectKey, NodeRow>,
}

/// The running watches; dropping it stops them and leaves the tables as they are.
#[derive(Debug)]
pub struct Handle {
    tasks: JoinSet<()>,
}

impl Handle {
    /// Stops all watches.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Starts to follow services, slices and nodes. Call it in a tokio runtime.
#[must_use]
pub fn start(client: &Client, node_name: &str, sources: &Sources) -> Handle {
    let (report, reports) = mpsc::channel(REPORTS);
    let mut tasks = JoinSet::new();
    let services = sources.services.clone();
    let parse_service = move |object: &Service| {
        let (key, row) = parse::service(object)?;
        let fields = row.unsupported.join(", ");
        let condition = due_condition(object, &fields);
        if !fields.is_empty() || condition.is_some() {
            let uid = object.metadata.uid.clone().unwrap_or_default();
            let unsupported = Unsupported { key: key.clone(), uid, fields, condition };
            // Full: a later list reports it.
            if report.try_send(unsupported).is_err() {
                tracing::debug!(service = %key, "too many services to report at once");
            }
        }
        Some((key, row))
    };
    tasks.spawn(follow(Api::all(client.clone()), services, parse_service));
    let slices = Api::<EndpointSlice>::all(client.clone());
    tasks.spawn(follow(slices, sources.slices.clone(), parse::endpoint_slice));
    let nodes = Api::<Node>::all(client.clone());
    tasks.spawn(follow(nodes, sources.nodes.clone(), parse::node));
    let teller = Teller {
        client: client.clone(),
        node: node_name.to_owned(),
        services: sources.services.clone(),
        told: BTreeSet::new(),
        waiting: BTreeMap::new(),
        again: AGAIN,
    };
    tasks.spawn(teller.run(reports));
    Handle { tasks }
}

/// Keeps one table equal to one kind. Ends when the stream does, which it never does by itself.
pub async fn follow<K, V>(
    api: Api<K>,
    table: Table<ObjectKey, V>,
    parse: impl Fn(&K) -> Option<(ObjectKey, V)>,
) where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    V: PartialEq,
{
    let mut listed: Option<BTreeMap<ObjectKey, V>> = None;
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    loop {
        match events.try_next().await {
            Ok(Some(event)) => take(event, &table, &mut listed, &parse),
            Ok(None) => return,
            Err(error) => {
                let kind = K::kind(&());
                tracing::warn!(%kind, error = chain(&error), "watch interrupted");
            }
        }
    }
}

/// Carries one event over. `listed` holds the rows of a list that is not whole yet.
fn take<K, V: PartialEq>(
    event: watcher::Event<K>,
    table: &Table<ObjectKey, V>,
    listed: &mut Option<BTreeMap<ObjectKey, V>>,
    parse: &impl Fn(&K) -> Option<(ObjectKey, V)>,
) where
    K: Resource,
{
    match event {
        watcher::Event::Init => *listed = Some(BTreeMap::new()),
        watcher::Event::InitApply(object) => {
            listed.get_or_insert_default().extend(parse(&object));
        }
        watcher::Event::InitDone => table.replace(listed.take().unwrap_or_default()),
        watcher::Event::Apply(object) => match parse(&object) {
            Some((key, row)) => drop(table.upsert(key, row)),
            // It has lost what made it ours, a slice its service's label for one.
            None => delete(table, &object),
        },
        watcher::Event::Delete(object) => delete(table, &object),
    }
}

fn delete<K: Resource, V: PartialEq>(table: &Table<ObjectKey, V>, object: &K) {
    if let Some(key) = parse::key(object.meta()) {
        table.delete(&key);
    }
}

/// A service that is not programmed, or is again.
struct Unsupported {
    key: ObjectKey,
    uid: String,
    /// Empty when every field is supported now.
    fields: String,
    condition: Option<Condition>,
}

/// Condition of a Service that asks for what the packet path does not do. All nodes write the same one.
const PROGRAMMED: &str = "Programmed";

/// The condition that the Service should have and has not. One that never had an unsupported field gets
/// none.
fn due_condition(object: &Service, fields: &str) -> Option<Condition> {
    let conditions = object.status.as_ref().and_then(|status| status.conditions.as_deref());
    let now = conditions.into_iter().flatten().find(|now| now.type_ == PROGRAMMED);
    let (status, reason, message) = if fields.is_empty() {
        now?;
        ("True", "Supported", String::new())
    } else {
        ("False", "UnsupportedField", format!("{fields} is not supported"))
    };
    if now.is_some_and(|now| now.status == status && now.message == message) {
        return None;
    }
    Some(Condition {
        type_: PROGRAMMED.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: object.metadata.generation,
        // Set when it is written.
        last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
    })
}

/// Writes conditions and Events of services with fields that are not supported.
struct Teller {
    client: Client,
    node: String,
    services: Table<ObjectKey, ServiceRow>,
    told: BTreeSet<(String, String)>,
    /// What could not be written.
    waiting: BTreeMap<ObjectKey, Unsupported>,
    again: Duration,
}

impl Teller {
    async fn run(mut self, mut reports: mpsc::Receiver<Unsupported>) {
        let mut timer = time::interval(self.again);
        timer.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            let due = tokio::select! {
                biased;
                report = reports.recv(), if self.waiting.len() < REPORTS => match report {
                    Some(report) => vec![report],
                    None => return,
                },
                _instant = timer.tick(), if !self.waiting.is_empty() => {
                    let waiting = std::mem::take(&mut self.waiting).into_values();
                    waiting.filter(|report| self.is_due(report)).collect()
                }
            };
            self.round(due).await;
        }
    }

    /// Whether the service still is what the report says.
    fn is_due(&self, report: &Unsupported) -> bool {
        let is_so = |row: &ServiceRow| row.unsupported.join(", ") == report.fields;
        !self.services.is_synced() || self.services.row(&report.key).is_some_and(|row| is_so(&row))
    }

    async fn round(&mut self, due: Vec<Unsupported>) {
        let mut is_away = false;
        for report in due {
            self.waiting.remove(&report.key);
            if !is_away && let Err(error) = self.write(&report).await {
                let words = chain(&error);
                tracing::warn!(service = %report.key, error = words, "cannot tell what is not supported");
                is_away = service_event::is_away(&error);
            } else if !is_away {
                continue;
            }
            self.waiting.insert(report.key.clone(), report);
        }
    }

    /// The condition, and one Event per service and set of fields.
    async fn write(&mut self, report: &Unsupported) -> kube::Result<()> {
        write_condition(&self.client, report).await?;
        let mark = (report.uid.clone(), report.fields.clone());
        if report.fields.is_empty() || self.told.contains(&mark) {
            return Ok(());
        }
        service_event::write(&self.client, &event(report, &self.node)).await?;
        if self.told.len() >= REPORTED {
            self.told.clear();
        }
        self.told.insert(mark);
        Ok(())
    }
}

async fn write_condition(client: &Client, report: &Unsupported) -> kube::Result<()> {
    let Some(condition) = &report.condition else { return Ok(()) };
    let now = Time(jiff::Timestamp::now());
    let condition = Condition { last_transition_time: now, ..condition.clone() };
    let patch = serde_json::json!({ "status": { "conditions": [condition] } });
    let services = Api::<Service>::namespaced(client.clone(), &report.key.namespace);
    let params = PatchParams::default();
    match services.patch_status(&report.key.name, &params, &Patch::Strategic(patch)).await {
        // Gone meanwhile: there is nobody to tell.
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}

fn event(report: &Unsupported, node: &str) -> Event {
    let Unsupported { key, uid, fields, .. } = report;
    let message = format!("Service is not programmed on node {node}: {fields} is not supported");
    warning(About { kind: "Service", key, uid }, node, "UnsupportedField", fields, message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::refusing::Refusing;

    fn object(name: &str, ip: &str) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "d", "name": name, "uid": name},
            "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
        }))
        .unwrap()
    }

    fn names(table: &Table<ObjectKey, ServiceRow>) -> Vec<String> {
        table.changes_since(0).upserts.iter().map(|(key, _)| key.name.to_string()).collect()
    }

    #[test]
    fn an_interrupted_list_deletes_nothing_and_a_whole_one_replaces() {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let table = Table::new();
        let mut listed = None;
        let mut feed = |event| take(event, &table, &mut listed, &parse::service);
        for event in
            [Init, InitApply(object("a", "10.96.0.2")), InitApply(object("b", "10.96.0.3"))]
        {
            feed(event);
        }
        assert!(table.is_empty() && !table.is_synced(), "not before the list is whole");
        feed(InitDone);
        assert!(table.is_synced());
        feed(Apply(object("c", "10.96.0.4")));
        feed(Delete(object("a", "10.96.0.2")));
        assert_eq!(names(&table), ["b", "c"]);
        feed(Init);
        feed(InitApply(object("c", "10.96.0.4")));
        assert_eq!(names(&table), ["b", "c"], "the new list is not whole yet");
        feed(Init);
        feed(InitApply(object("d", "10.96.0.5")));
        feed(InitDone);
        assert_eq!(names(&table), ["d"]);
    }

    #[test]
    fn a_condition_is_due_until_the_service_has_it_and_turns_when_the_field_goes() {
        let fields = "spec.sessionAffinity";
        let mut service = object("web", "10.96.0.9");
        assert!(due_condition(&service, "").is_none(), "nothing was ever wrong");
        let due = due_condition(&service, fields).unwrap();
        assert_eq!((due.status.as_str(), due.reason.as_str()), ("False", "UnsupportedField"));
        assert!(due.message.contains(fields));
        service.status.get_or_insert_default().conditions = Some(vec![due]);
        assert!(due_condition(&service, fields).is_none(), "it is written already");
        assert!(due_condition(&service, "spec.other").is_some(), "another field");
        assert_eq!(due_condition(&service, "").unwrap().status, "True");
    }

    #[tokio::test]
    async fn what_a_server_refused_is_told_when_it_takes_it_unless_it_is_over() {
        let server = Refusing::start(3).await;
        let services = Table::new();
        let row = |fields: &[&str]| ServiceRow {
            unsupported: fields.iter().map(|field| (*field).into()).collect(),
            ..ServiceRow::default()
        };
        let report = |name: &str| Unsupported {
            key: ObjectKey::new("d", name),
            uid: name.to_owned(),
            fields: "spec.a".to_owned(),
            condition: due_condition(&object(name, "10.96.0.9"), "spec.a"),
        };
        services.upsert(ObjectKey::new("d", "web"), row(&["spec.a"]));
        services.upsert(ObjectKey::new("d", "mended"), row(&[]));
        services.mark_synced();
        let (sender, reports) = mpsc::channel(2);
        for name in ["web", "mended"] {
            sender.send(report(name)).await.unwrap_or_else(|_| panic!("room"));
        }
        let teller = Teller {
            client: server.client(),
            node: "n1".to_owned(),
            services,
            told: BTreeSet::new(),
            waiting: BTreeMap::new(),
            again: Duration::from_millis(20),
        };
        let task = tokio::spawn(teller.run(reports));
        // The condition, then the Event.
        assert_eq!(server.told(2).await, ["/api/v1/namespaces/d/services/web/status", "web"]);
        assert_eq!(server.refused(), 3);
        drop(sender);
        task.await.expect("it ends with the watches");
        assert_eq!(server.told(2).await.len(), 2, "nothing of the service that is mended");
    }

    #[test]
    fn an_event_names_service_field_and_node_and_is_the_same_after_a_restart() {
        let report = || Unsupported {
            key: ObjectKey::new("d", "web"),
            uid: "u".into(),
            fields: "spec.sessionAffinity".into(),
            condition: None,
        };
        let (one, other) = (event(&report(), "n1"), event(&report(), "n1"));
        assert_eq!(one.metadata.name, other.metadata.name);
        assert_ne!(one.metadata.name, event(&report(), "n2").metadata.name);
        assert_eq!(one.reason.as_deref(), Some("UnsupportedField"));
        let message = one.message.unwrap();
        assert!(message.contains("spec.sessionAffinity") && message.contains("n1"));
    }
}
