//! What `node-agent flows` is told: a line an event, as long as somebody reads.
//!
//! Effects. One task for each listener, a child of the debug socket's; it reads names from the tables and
//! events from the dataplane. It ends when its reader goes or does not read, or after the time that was
//! asked for.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufStream, ReadHalf, WriteHalf},
    net::UnixStream,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    dataplane::{
        events::{Events, Item, LISTENERS, Listener},
        flow_log::{self, Filter, Names},
    },
    sys::socket::netns_cookie,
    way::Known,
};

/// The question that is answered here.
pub const QUESTION: &str = "flows";
/// How long a reader may leave its lines unread.
const PATIENCE: Duration = Duration::from_secs(60);
/// Names are looked up anew after this, if they have changed.
const RENAME: Duration = Duration::from_secs(1);
/// Events that are put into words at a time.
const BATCH: usize = 256;

/// Where events and names come from.
#[derive(Clone, Debug)]
pub struct Ear {
    pub events: Events,
    pub known: Known,
    /// This node's name.
    pub node: Arc<str>,
}

/// Answers one listener with its arguments.
pub async fn serve(stream: BufStream<UnixStream>, ear: Ear, arguments: String) {
    let (reader, mut writer) = tokio::io::split(stream);
    let told = match ask(&ear, &arguments).await {
        Ok((question, listener)) => tell(&ear, question, listener, (reader, &mut writer)).await,
        Err(words) => write(&mut writer, &[json!({ "error": words })]).await,
    };
    if let Err(error) = told {
        tracing::debug!(%error, "a listener has gone");
    }
}

/// What is wanted, and until when.
struct Question {
    filter: Filter,
    until: Option<Instant>,
}

impl Question {
    fn parse(arguments: &str) -> Result<Self, String> {
        let pairs = arguments.split_whitespace();
        let pairs = pairs.map(|word| word.split_once('=').unwrap_or((word, "")));
        let arguments: BTreeMap<&str, &str> = pairs.collect();
        let names = ["from", "to", "service", "verdict", "seconds"];
        if let Some(name) = arguments.keys().find(|name| !names.contains(*name)) {
            return Err(format!("unknown argument {name}; there are {}", names.join(", ")));
        }
        let seconds = arguments.get("seconds").map(|text| {
            let seconds: Option<u32> = text.parse().ok();
            seconds.ok_or_else(|| format!("seconds={text}: want a number"))
        });
        let limit = seconds.transpose()?.map(|seconds| Duration::from_secs(seconds.into()));
        let until = limit.map(|limit| Instant::now() + limit);
        Ok(Self { filter: Filter::parse(&arguments)?, until })
    }
}

async fn ask(ear: &Ear, arguments: &str) -> Result<(Question, Listener), String> {
    let question = Question::parse(arguments)?;
    let mut listener = ear.events.listen().await.ok_or("the dataplane has ended")?;
    if !listener.ready().await {
        return Err(format!("{LISTENERS} listen already, or the dataplane has ended"));
    }
    Ok((question, listener))
}

async fn tell(
    ear: &Ear,
    question: Question,
    mut listener: Listener,
    (mut reader, writer): (ReadHalf<BufStream<UnixStream>>, &mut WriteHalf<BufStream<UnixStream>>),
) -> io::Result<()> {
    let mut names = Called::new(ear);
    write(writer, &[json!({"listening": true})]).await?;
    let end = async {
        match question.until {
            Some(until) => sleep_until(until).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);
    let mut byte = [0; 1];
    let mut items = Vec::new();
    loop {
        tokio::select! {
            count = listener.next_many(&mut items, BATCH) => if count == 0 { return Ok(()) },
            () = &mut end => return Ok(()),
            // A reader says nothing more: it has gone.
            _gone = reader.read(&mut byte) => return Ok(()),
        }
        let names = names.now(ear);
        let clocks = Clocks::now();
        let lines = items.drain(..).filter_map(|item| match item {
            Item::Lost(count) => Some(json!({ "lost": count })),
            Item::Event(event) => {
                let line = flow_log::line(&event, names);
                question.filter.takes(&line).then(|| line.json(&clocks.time(event.at)))
            }
        });
        let lines: Vec<Value> = lines.collect();
        write(writer, &lines).await?;
    }
}

/// Writes each value as a line. A reader that does not read for long has gone.
async fn write(writer: &mut WriteHalf<BufStream<UnixStream>>, lines: &[Value]) -> io::Result<()> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let written = async {
        writer.write_all(text.as_bytes()).await?;
        writer.flush().await
    };
    timeout(PATIENCE, written).await?
}

/// A line for people.
#[must_use]
pub fn text(line: &Value) -> String {
    if let Some(count) = line["lost"].as_u64() {
        return format!("{count} events were lost: there were more than could be told\n");
    }
    match (line["time"].as_str(), line["text"].as_str()) {
        (Some(time), Some(text)) => format!("{time} {text}\n"),
        // That it listens.
        _ => String::new(),
    }
}

/// Names, and the tables' revisions when they were looked up.
struct Called {
    names: Names,
    seen: (u64, u64),
    at: Instant,
}

impl Called {
    fn new(ear: &Ear) -> Self {
        let pods = ear.known.endpoints.changes_since(0);
        let services = ear.known.services.changes_since(0);
        let mut names =
            Names::new(pods.upserts.iter().map(|(_, row)| row), services.upserts.iter());
        // Without it the node's own sockets stay without a name.
        if let Ok(cookie) = netns_cookie() {
            names.set_node(cookie, &ear.node);
        }
        Self { names, seen: (pods.revision, services.revision), at: Instant::now() }
    }

    fn now(&mut self, ear: &Ear) -> &Names {
        let revisions =
            (*ear.known.endpoints.subscribe().borrow(), *ear.known.services.subscribe().borrow());
        if revisions != self.seen && self.at.elapsed() >= RENAME {
            *self = Self::new(ear);
        }
        &self.names
    }
}

/// Both clocks at one moment: events carry the monotonic one.
struct Clocks {
    wall: jiff::Timestamp,
    monotonic_ns: i128,
}

impl Clocks {
    fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let monotonic_ns = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
        Self { wall: jiff::Timestamp::now(), monotonic_ns }
    }

    /// The time of the wall clock, to the microsecond.
    fn time(&self, at: u64) -> String {
        let nanos = self.wall.as_nanosecond() - (self.monotonic_ns - i128::from(at));
        let time = jiff::Timestamp::from_nanosecond(nanos).unwrap_or(self.wall);
        format!("{time:.6}")
    }
}
