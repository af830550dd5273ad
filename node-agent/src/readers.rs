//! What `node-agent conntrack`, `drops`, `trace` and a scrape of metrics are told (`flows`: `listen.rs`): the kernel's maps, read and
//! put into words.
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
use tokio::sync::{mpsc, oneshot};

use crate::{
    dataplane::{
        Report,
        events::Events,
        flows::{self, Filter, Want},
        look::Look,
        metrics::Metrics,
    },
    listen::Ear,
    model::ObjectKey,
    way::{self, Known},
};

/// The questions that are answered here, beside those of [`crate::debug`].
pub const QUESTIONS: [&str; 3] = ["conntrack", "drops", "trace"];

/// What the answers are read from.
#[derive(Debug)]
pub struct Readers {
    pins: PathBuf,
    look: Look,
    known: Known,
    reporter: Option<mpsc::Sender<oneshot::Sender<Report>>>,
    /// Drops when they were asked for the last time.
    before: Mutex<BTreeMap<&'static str, u64>>,
    /// Where events are heard; without it there are none.
    ear: Option<Ear>,
}

impl Readers {
    /// Reads maps below `pins`; `reporter` asks the dataplane's task, where there is one.
    #[must_use]
    pub fn new(
        pins: &Path,
        known: Known,
        reporter: Option<mpsc::Sender<oneshot::Sender<Report>>>,
    ) -> Self {
        let (pins, look) = (pins.to_owned(), Look::below(pins));
        Self { pins, look, known, reporter, before: Mutex::default(), ear: None }
    }

    /// The same with events of connections; `node` is this node's name.
    #[must_use]
    pub fn with_events(self, events: Events, node: Arc<str>) -> Self {
        let ear = Ear { events, known: self.known.clone(), node };
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
            "conntrack" => self.conntrack(arguments).await,
            "trace" => self.trace(arguments).await,
            _ => self.drops(arguments).await,
        }
    }

    /// What the dataplane's task tells about itself; `None` where there is none.
    pub async fn report(&self) -> Option<Report> {
        let (reply, answer) = oneshot::channel();
        self.reporter.as_ref()?.send(reply).await.ok()?;
        answer.await.ok()
    }

    /// What a scrape of metrics shows.
    ///
    /// # Errors
    /// Why the maps cannot be read.
    pub async fn metrics(&self) -> io::Result<String> {
        let look = self.look.clone();
        let read = move || io::Result::Ok((look.drops()?, look.fill()?));
        let (drops, fill) = tokio::task::spawn_blocking(read).await??;
        let told =
            self.report().await.map(|report| (report.programs(), report.full, report.rounds));
        let (programs, full, rounds) = told.unwrap_or_default();
        Ok(Metrics { drops, fill, full, programs, rounds }.text())
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
        let ips = row.cluster_ips.iter().chain(&row.external_ips);
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

fn known(arguments: &BTreeMap<&str, &str>, names: &[&str]) -> Result<(), String> {
    match arguments.keys().find(|name| !names.contains(*name)) {
        Some(name) => Err(format!("unknown argument {name}; there are {}", names.join(", "))),
        None => Ok(()),
    }
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Rows of an answer as a table with these columns.
#[must_use]
pub fn table(rows: &[Value], columns: &[&str]) -> String {
    let cell = |row: &Value, column: &str| match &row[column] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            other.to_string()
        }
    };
    let head = columns.iter().map(|column| column.replace('_', "-").to_uppercase()).collect();
    let mut lines: Vec<Vec<String>> = vec![head];
    lines.extend(rows.iter().map(|row| columns.iter().map(|one| cell(row, one)).collect()));
    let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |line: &Vec<String>| {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("   ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}

/// The columns of an answer's table; `None` for an answer that is no table.
#[must_use]
pub fn columns(question: &str) -> Option<&'static [&'static str]> {
    match question {
        "conntrack" => Some(&[
            "protocol",
            "client",
            "asked",
            "source",
            "backend",
            "state",
            "idle_s",
            "expires_s",
        ]),
        "drops" => Some(&["count", "since_last", "reason"]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    #[test]
    fn tables_line_up() {
        let rows = [
            json!({"count": 12, "since_last": 0, "reason": "a b"}),
            json!({"count": 3, "since_last": 3, "reason": "c"}),
        ];
        let text = table(&rows, columns("drops").expect("columns"));
        assert_eq!(
            text,
            "COUNT   SINCE-LAST   REASON\n12      0            a b\n3       3            c\n"
        );
    }

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
        let none = readers.answer("drops", &BTreeMap::new()).await.expect_err("no maps");
        assert!(none.contains("map COUNTERS"), "{none}");
    }
}
