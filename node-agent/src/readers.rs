//! What `node-agent services`, `endpoints`, `conntrack`, `drops`, `trace` and a scrape of metrics are told (`flows`: `listen.rs`): the
//! kernel's maps, read and put into words.
//!
//! Effects: reads pinned maps on a blocking thread and asks the dataplane's task for its report.
//! Nothing here writes.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use ebpf_common::verdict::DropReason;
use serde_json::{Value, json};

use crate::{
    dataplane::{
        Report, Reporter,
        events::Events,
        flows::{self, Filter, Want},
        listing::{FrontendRow, Wanted},
        look::Look,
        metrics::Metrics,
        status::evicting,
    },
    ends,
    listen::Ear,
    model::{NodeRow, ObjectKey},
    sys::netlink::{Link, Netlink},
    table::Table,
    way::{self, Known},
};

/// The questions that are answered here, beside those of [`crate::debug`].
pub const QUESTIONS: [&str; 5] = ["services", "endpoints", "conntrack", "drops", "trace"];

const ENDED: &str = "the dataplane has ended";

/// What the answers are read from.
#[derive(Debug)]
pub struct Readers {
    pins: PathBuf,
    look: Look,
    known: Known,
    reporter: Option<Reporter>,
    /// This node's name.
    here: Arc<str>,
    /// What other nodes are called.
    nodes: Table<ObjectKey, NodeRow>,
    /// Drops when they were asked for the last time.
    before: Mutex<BTreeMap<&'static str, u64>>,
    /// Where events are heard; without it there are none.
    ear: Option<Ear>,
}

impl Readers {
    /// Reads maps below `pins`; `reporter` asks the dataplane's task, where there is one.
    #[must_use]
    pub fn new(pins: &Path, known: Known, reporter: Option<Reporter>) -> Self {
        let (pins, look) = (pins.to_owned(), Look::below(pins));
        Self {
            pins,
            look,
            known,
            reporter,
            here: "this node".into(),
            nodes: Table::new(),
            before: Mutex::default(),
            ear: None,
        }
    }

    /// The same with this node's name and those of all.
    #[must_use]
    pub fn with_node(self, here: Arc<str>, nodes: Table<ObjectKey, NodeRow>) -> Self {
        Self { here, nodes, ..self }
    }

    /// The same with events of connections; to be called when the node's name is known.
    #[must_use]
    pub fn with_events(self, events: Events) -> Self {
        let ear = Ear { events, known: self.known.clone(), node: Arc::clone(&self.here) };
        Self { ear: Some(ear), ..self }
    }

    /// Where events are heard.
    #[must_use]
    pub const fn ear(&self) -> Option<&Ear> {
        self.ear.as_ref()
    }

    /// Answers a question of [`QUESTIONS`] with its arguments.
    ///
    /// # Errors
    /// What is wrong with the question, or why the maps cannot be read.
    pub async fn answer(
        &self,
        question: &str,
        arguments: &BTreeMap<&str, &str>,
    ) -> Result<Value, String> {
        match question {
            "services" => self.services(arguments).await,
            "endpoints" => self.endpoints(arguments).await,
            "conntrack" => self.conntrack(arguments).await,
            "trace" => self.trace(arguments).await,
            _ => self.drops(arguments).await,
        }
    }

    /// What the dataplane's task tells about itself, and what its maps show; `None` where there is none.
    pub async fn report(&self) -> Option<Report> {
        let mut report = self.reporter.as_ref()?.report().await?;
        let look = self.look.clone();
        // Without pins there is nothing to read, which the report tells.
        if let Ok(Ok(fill)) = tokio::task::spawn_blocking(move || look.forgetful()).await {
            report.evicting = evicting(&fill, report.loses_pieces);
        }
        Some(report)
    }

    fn reporter(&self) -> Result<&Reporter, String> {
        self.reporter.as_ref().ok_or_else(|| "this agent runs no dataplane".to_owned())
    }

    /// What a scrape of metrics shows.
    ///
    /// # Errors
    /// Why the maps cannot be read.
    pub async fn metrics(&self) -> io::Result<String> {
        let look = self.look.clone();
        let read = move || io::Result::Ok((look.drops()?, look.fill()?));
        let (drops, fill) = tokio::task::spawn_blocking(read).await??;
        let report = match &self.reporter {
            Some(reporter) => reporter.report().await.unwrap_or_default(),
            None => Report::default(),
        };
        let (programs, evicting) = (report.programs(), evicting(&fill, report.loses_pieces));
        let Report { full, rounds, .. } = report;
        Ok(Metrics { drops, fill, full, evicting, programs, rounds }.text())
    }

    /// A page of frontends, and where the next one begins.
    async fn services(&self, arguments: &BTreeMap<&str, &str>) -> Result<Value, String> {
        known(arguments, &["namespace", "name", "after"])?;
        let wanted = wanted(arguments)?;
        let name = wanted.name.clone().filter(|_name| wanted.after.is_none());
        let page = self.reporter()?.services(wanted).await.ok_or(ENDED)?;
        match name {
            Some(name) if page.rows.is_empty() => Err(format!("there is no service {name}")),
            _ => Ok(json!({
                "rows": page.rows.iter().map(FrontendRow::json).collect::<Vec<_>>(),
                "next": page.next.map(|key| key.to_string()),
            })),
        }
    }

    async fn endpoints(&self, arguments: &BTreeMap<&str, &str>) -> Result<Value, String> {
        known(arguments, &["namespace", "name"])?;
        let wanted = wanted(arguments)?;
        let ends = self.reporter()?.ends().await.ok_or(ENDED)?.map_err(words)?;
        let links = tokio::task::spawn_blocking(|| Netlink::open()?.links());
        let links = links.await.map_err(words)?.map_err(words)?;
        let mut rows = ends::rows(&ends, &self.names(links));
        // No range has a name.
        rows.retain(|row| match &row.pod {
            Some(pod) => wanted.names(pod),
            None => wanted == Wanted::default(),
        });
        match wanted.name {
            Some(name) if rows.is_empty() => Err(format!("this node has no pod {name}")),
            _ => Ok(rows.iter().map(ends::Row::json).collect()),
        }
    }

    fn names(&self, links: Vec<Link>) -> ends::Names {
        let nodes = self.nodes.changes_since(0).upserts;
        let addresses = nodes
            .iter()
            .flat_map(|(key, row)| row.internal_ips.iter().map(|ip| (*ip, Arc::clone(&key.name))));
        ends::Names {
            pods: self.known.endpoints.changes_since(0).upserts.into_iter().collect(),
            nodes: addresses.collect(),
            devices: links.into_iter().map(|link| (link.index, link.name)).collect(),
            here: Arc::clone(&self.here),
        }
    }

    async fn conntrack(&self, arguments: &BTreeMap<&str, &str>) -> Result<Value, String> {
        known(arguments, &["src", "dst", "service"])?;
        let want = |name| arguments.get(name).map(|text| Want::parse(text)).transpose();
        let frontends = arguments.get("service").map(|name| self.frontends(name)).transpose()?;
        let filter = Filter { src: want("src")?, dst: want("dst")?, frontends };
        let look = self.look.clone();
        let rows = tokio::task::spawn_blocking(move || look.flows());
        let rows = rows.await.map_err(words)?.map_err(words)?;
        let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_s = u32::try_from(clock.tv_sec & 0xffff_ffff).unwrap_or(0);
        let rows = flows::join(&rows, now_s);
        Ok(rows.iter().filter(|row| filter.takes(row)).map(flows::FlowRow::json).collect())
    }

    /// One at a time: the socket that asks is answered one question after another.
    async fn trace(&self, arguments: &BTreeMap<&str, &str>) -> Result<Value, String> {
        known(arguments, &["from", "to", "protocol"])?;
        let (pins, known) = (self.pins.clone(), self.known.clone());
        let owned = |(name, value): (&&str, &&str)| ((*name).to_owned(), (*value).to_owned());
        let arguments: BTreeMap<String, String> = arguments.iter().map(owned).collect();
        let run = move || {
            let borrowed = arguments.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            way::trace(&pins, &known, &borrowed.collect())
        };
        tokio::task::spawn_blocking(run).await.map_err(words)?
    }

    /// Drops by reason since the maps were made, and since somebody asked for them the last time.
    async fn drops(&self, arguments: &BTreeMap<&str, &str>) -> Result<Value, String> {
        known(arguments, &[])?;
        let look = self.look.clone();
        let drops = tokio::task::spawn_blocking(move || look.drops());
        let drops = drops.await.map_err(words)?.map_err(words)?;
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let row = |(reason, count): &(DropReason, u64)| {
            let old = before.insert(reason.words(), *count).unwrap_or(0);
            let since = count.saturating_sub(old);
            json!({"reason": reason.words(), "count": count, "since_last": since})
        };
        Ok(drops.iter().filter(|(_, count)| *count > 0).map(row).collect())
    }

    /// Where a service is asked for: its addresses, and its node ports at any address.
    fn frontends(&self, name: &str) -> Result<Vec<Want>, String> {
        let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
        let key = ObjectKey::new(namespace, name);
        let rows = self.known.services.changes_since(0).upserts;
        let (_, row) = rows
            .iter()
            .find(|(one, _)| *one == key)
            .ok_or_else(|| format!("there is no service {key}"))?;
        let ips = row.cluster_ips.iter().chain(&row.external_ips).chain(&row.ingress_ips);
        Ok(ips
            .flat_map(|ip| {
                row.ports.iter().map(|port| Want { ip: Some(*ip), port: Some(port.port) })
            })
            .chain(
                row.ports
                    .iter()
                    .filter(|port| port.node_port != 0)
                    .map(|port| Want { ip: None, port: Some(port.node_port) }),
            )
            .collect())
    }
}

/// What is asked for: `name` may have the namespace in it.
fn wanted(arguments: &BTreeMap<&str, &str>) -> Result<Wanted, String> {
    let argument = |name| arguments.get(name).copied();
    let name = argument("name");
    let (namespace, name) =
        match (argument("namespace"), name.and_then(|name| name.split_once('/'))) {
            (Some(one), Some((other, name))) if one != other => {
                return Err(format!("{other}/{name} is not of namespace {one}"));
            }
            (_, Some((namespace, name))) => (Some(namespace), Some(name)),
            (namespace, None) => (namespace, name),
        };
    let after = argument("after").and_then(|after| after.split_once('/'));
    Ok(Wanted {
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
        after: after.map(|(namespace, name)| ObjectKey::new(namespace, name)),
    })
}

fn known(arguments: &BTreeMap<&str, &str>, names: &[&str]) -> Result<(), String> {
    match arguments.keys().find(|name| !names.contains(*name)) {
        Some(name) => Err(format!("unknown argument {name}; there are {}", names.join(", "))),
        None => Ok(()),
    }
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wrong_questions_name_the_right_ones() {
        let known = Known { services: Table::new(), endpoints: Table::new() };
        let readers = Readers::new(Path::new("/nonexistent"), known, None);
        let ask = async |question: &str, name: &'static str, value: &'static str| {
            let arguments = BTreeMap::from([(name, value)]);
            readers.answer(question, &arguments).await.expect_err("wrong")
        };
        assert_eq!(
            ask("conntrack", "colour", "red").await,
            "unknown argument colour; there are src, dst, service"
        );
        assert!(ask("conntrack", "src", "web").await.contains("neither an address"));
        assert_eq!(ask("conntrack", "service", "a/b").await, "there is no service a/b");
        let both = BTreeMap::from([("namespace", "a"), ("name", "b/web")]);
        for question in ["services", "endpoints"] {
            let wrong = ask(question, "colour", "red").await;
            assert!(
                wrong.starts_with("unknown argument colour; there are namespace, name"),
                "{wrong}"
            );
            let wrong = readers.answer(question, &both).await.expect_err("two namespaces");
            assert_eq!(wrong, "b/web is not of namespace a");
        }
        let none = readers.answer("drops", &BTreeMap::new()).await.expect_err("no maps");
        assert!(none.contains("map COUNTERS"), "{none}");
    }
}
