//! Looking into a running agent: a unix socket that answers one line with one JSON value. A line is a
//! word, and for some `name=value` words after it.
//!
//! One task; inputs are the tables and the kernel's maps, outputs the answers. The reading side is
//! `node-agent status` and its like. The socket is root's.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Write as _},
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    sync::watch,
    task::JoinSet,
};

use crate::{
    dataplane::{Report, events::LISTENERS},
    kubelet::Directory,
    listen,
    model::{LocalEndpoint, NodeRow, ObjectKey, ServiceRow},
    readers::{self, Readers},
    table::Table,
};

/// Longest question: names have 253 bytes at most, and there are two in one.
const MAX_QUESTION_BYTES: u64 = 1_024;
/// How long the agent waits for who asks to write and to read.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long who asks waits for an answer: a trace loads programs, for which the kernel takes a second for each
/// hundred thousand steps on an emulated CPU, which others want too.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

/// What can be looked at.
#[derive(Clone, Debug)]
pub struct Views {
    pub node: String,
    pub components: Vec<&'static str>,
    pub services: Table<ObjectKey, ServiceRow>,
    pub nodes: Table<ObjectKey, NodeRow>,
    pub endpoints: Table<IpAddr, LocalEndpoint>,
    pub pods: Directory,
    /// Why the node is not ready, if it is not.
    pub not_ready: watch::Receiver<Option<String>>,
    /// What is wrong with single nodes or ranges.
    pub conditions: Option<watch::Receiver<Vec<String>>>,
    /// Reads what the kernel knows; `None` without the dataplane.
    pub readers: Option<Arc<Readers>>,
}

/// Answers questions until cancelled. A stale socket of an earlier agent is replaced.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve(path: &Path, views: Views) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let mut listeners = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        let mut stream = tokio::io::BufStream::new(stream);
        let mut question = String::new();
        let mut limited = (&mut stream).take(MAX_QUESTION_BYTES);
        let read = limited.read_line(&mut question);
        // One asker that does not finish must not keep the others out for long.
        if tokio::time::timeout(PATIENCE, read).await.is_err() {
            continue;
        }
        while listeners.try_join_next().is_some() {}
        if let Some((listen::QUESTION, arguments)) = split(&question)
            && let Some(ear) = views.readers.as_ref().and_then(|readers| readers.ear())
            && listeners.len() < LISTENERS
        {
            // It is answered for long, and must not keep the others out.
            listeners.spawn(listen::serve(stream, ear.clone(), arguments.to_owned()));
            continue;
        }
        let mut answer = answer(question.trim(), &views).await.to_string();
        answer.push('\n');
        let write = async {
            stream.write_all(answer.as_bytes()).await?;
            stream.flush().await
        };
        if !matches!(tokio::time::timeout(PATIENCE, write).await, Ok(Ok(()))) {
            tracing::debug!("an answer on the debug socket was not read");
        }
    }
}

/// The question's first word, and the rest.
fn split(question: &str) -> Option<(&str, &str)> {
    let question = question.trim();
    (!question.is_empty()).then(|| question.split_once(' ').unwrap_or((question, "")))
}

async fn answer(line: &str, views: &Views) -> Value {
    let mut words = line.split_whitespace();
    let question = words.next().unwrap_or_default();
    if readers::QUESTIONS.contains(&question) {
        let Some(readers) = &views.readers else {
            return json!({"error": "this agent runs no dataplane"});
        };
        let pairs = words.map(|word| word.split_once('=').unwrap_or((word, "")));
        let arguments: BTreeMap<&str, &str> = pairs.collect();
        let answer = readers.answer(question, &arguments).await;
        return answer.unwrap_or_else(|error| json!({"error": error}));
    }
    match question {
        listen::QUESTION if views.readers.is_some() => {
            json!({"error": format!("{LISTENERS} listen already")})
        }
        listen::QUESTION => json!({"error": "this agent runs no dataplane"}),
        "status" => {
            let report = match &views.readers {
                Some(readers) => readers.report().await,
                None => None,
            };
            let not_ready = views.not_ready.borrow().clone();
            json!({
                "node": views.node,
                "version": env!("CARGO_PKG_VERSION"),
                "components": views.components,
                "ready": not_ready.is_none(),
                "not_ready": not_ready,
                "conditions": views.conditions.as_ref().map(|now| now.borrow().clone()),
                "services": views.services.len(),
                "nodes": views.nodes.len(),
                "endpoints": views.endpoints.len(),
                "pods": views.pods.list().len(),
                "synced": views.services.is_synced() && views.nodes.is_synced(),
                "dataplane": report.as_ref().map(Report::json),
                "traffic": report.as_ref().map(|report| report.status_text()),
            })
        }
        _ => {
            let names = readers::QUESTIONS.join(", ");
            json!({"error": format!("there are status, flows, {names}")})
        }
    }
}

/// Asks a running agent. Blocks for 30 s at most.
///
/// # Errors
/// When no agent listens, or it answers with something else than JSON.
pub fn ask(socket: &Path, question: &str) -> io::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWERED_WITHIN))?;
    writeln!(stream, "{question}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(io::Error::from)
}

/// Follows a running agent's events: gives each line that it says to `each` until that says no, or there
/// are no more. Blocks for as long.
///
/// # Errors
/// When no agent listens, or it says something else than JSON.
pub fn follow(
    socket: &Path,
    question: &str,
    mut each: impl FnMut(Value) -> bool,
) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{question}")?;
    for line in BufReader::new(stream).lines() {
        if !each(serde_json::from_str(&line?)?) {
            break;
        }
    }
    Ok(())
}

/// Fields of `status` that are more than a line: told in whole sentences, or in JSON only.
const LONG: [&str; 2] = ["dataplane", "traffic"];

/// An answer for people: a line a field, or a line a row.
#[must_use]
pub fn text(value: &Value) -> String {
    let plain = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let words = items
                .iter()
                .map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned));
            words.collect::<Vec<_>>().join(",")
        }
        Value::Null => "-".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    };
    match value {
        Value::Object(fields) => {
            let short = fields.iter().filter(|(name, _)| !LONG.contains(&name.as_str()));
            let lines = short.map(|(name, value)| format!("{name:<12} {}\n", plain(value)));
            let traffic = fields.get("traffic").and_then(Value::as_str).unwrap_or_default();
            lines.chain([traffic.to_owned()]).collect()
        }
        Value::Array(rows) => {
            let line = |row: &Value| {
                let cells = row.as_object().into_iter().flatten().map(|(_, cell)| plain(cell));
                cells.collect::<Vec<_>>().join("  ") + "\n"
            };
            rows.iter().map(line).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            format!("{}\n", plain(value))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_running_agent_answers_and_wrong_questions_name_the_right_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("agent.sock");
        let (_sender, not_ready) = watch::channel(Some("no network".to_owned()));
        let views = Views {
            node: "n1".to_owned(),
            components: vec!["kubelet"],
            services: Table::new(),
            nodes: Table::new(),
            endpoints: Table::new(),
            pods: Directory::default(),
            not_ready,
            readers: None,
            conditions: None,
        };
        let path = socket.clone();
        let server = tokio::spawn(async move { serve(&path, views).await });
        while !socket.exists() {
            tokio::task::yield_now().await;
        }
        let asked =
            tokio::task::spawn_blocking(move || (ask(&socket, "status"), ask(&socket, "x")));
        let (status, wrong) = asked.await.expect("asked");
        let status = status.expect("an answer");
        assert_eq!((&status["ready"], &status["not_ready"]), (&json!(false), &json!("no network")));
        assert!(text(&status).contains("node         n1\n"));
        assert!(wrong.expect("an answer")["error"].is_string());
        server.abort();
    }
}
