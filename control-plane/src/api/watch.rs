//! WATCH: events as a stream of lines, pulled by the connection. Nothing is queued a watcher but one batch.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream::{self, Stream};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    api::{
        core::{Api, Call},
        error,
        list::{check_fields, scope},
        query::ListOptions,
        render::{Media, outward, outward_value},
    },
    client::ApiError,
    store::{Change, Entry, Event, Watcher},
};

/// How often an idle watcher that asked for bookmarks gets one (upstream: about a minute).
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// The shortest a watch lasts if the client does not say; the longest is twice that
/// (upstream's `MinRequestTimeout`, 1800 s).
const LEAST: Duration = Duration::from_secs(1800);

/// A running watch.
struct Running {
    call: Call,
    options: ListOptions,
    media: Media,
    watcher: Box<dyn Watcher>,
    lines: VecDeque<Bytes>,
    bookmark: Instant,
    end: Instant,
    shutdown: CancellationToken,
    ended: bool,
}

impl Api {
    /// The lines of a watch.
    ///
    /// # Errors
    /// 400 for selectors, 504 for a revision of the future; expiry comes as an `ERROR` event.
    pub async fn watch(
        &self,
        call: Call,
        options: ListOptions,
        media: Media,
        shutdown: CancellationToken,
    ) -> Result<impl Stream<Item = Bytes> + Send + use<>, ApiError> {
        check_fields(&call, &options)?;
        let asked = options.revision.unwrap_or(0);
        self.reach(asked).await?;
        let mut lines = VecDeque::new();
        let mut from = asked;
        if asked == 0 || options.initial_events {
            let all = ListOptions {
                labels: options.labels.clone(),
                fields: options.fields.clone(),
                ..ListOptions::default()
            };
            let page = self.list(&call, &all).await?;
            from = page.revision;
            lines.extend(page.entries.iter().map(|entry| line(&call, &media, "ADDED", entry)));
            if options.initial_events && options.bookmarks {
                lines.push_back(bookmark(&call, from, Initial::End));
            }
        }
        let now = Instant::now();
        let jitter = LEAST.mul_f64(rand::random::<f64>());
        let lasts = options.timeout.map_or(LEAST + jitter, Duration::from_secs);
        let running = Running {
            watcher: self.store.watch(scope(&call, &options), from),
            call,
            options,
            media,
            lines,
            bookmark: now + BOOKMARK_EVERY,
            end: now + lasts,
            shutdown,
            ended: false,
        };
        Ok(stream::unfold(running, |mut running| async move {
            let line = running.next().await?;
            Some((line, running))
        }))
    }
}

impl Running {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(first) = self.lines.pop_front() {
                return Some(self.gather(first));
            }
            if self.ended {
                return None;
            }
            self.wait().await;
        }
    }

    /// What is ready goes out in one piece, up to about a TLS record.
    fn gather(&mut self, first: Bytes) -> Bytes {
        const PIECE: usize = 16 << 10;
        if self.lines.is_empty() {
            return first;
        }
        let mut out = BytesMut::from(&*first);
        while out.len() < PIECE
            && let Some(line) = self.lines.pop_front()
        {
            out.put(line);
        }
        out.freeze()
    }

    async fn wait(&mut self) {
        tokio::select! {
            progress = self.watcher.next() => match progress {
                Ok(progress) => {
                    for event in &progress.events {
                        self.lines.extend(self.tell(event));
                    }
                }
                Err(expired) => {
                    let status = error::status(&error::expired(expired.to_string()));
                    self.lines.push_back(frame("ERROR", status.to_string().as_bytes()));
                    self.ended = true;
                }
            },
            () = tokio::time::sleep_until(self.bookmark), if self.options.bookmarks => {
                self.bookmark = Instant::now() + BOOKMARK_EVERY;
                if let Ok(progress) = self.watcher.progress().await {
                    for event in &progress.events {
                        self.lines.extend(self.tell(event));
                    }
                    self.lines.push_back(bookmark(&self.call, progress.revision, Initial::No));
                }
            }
            () = tokio::time::sleep_until(self.end) => self.ended = true,
            () = self.shutdown.cancelled() => self.ended = true,
        }
    }

    /// A change of what the selectors select is an appearance or disappearance.
    fn tell(&self, event: &Event) -> Option<Bytes> {
        let fits = |entry: &Arc<Entry>| {
            self.options.labels.matches(&entry.attributes)
                && self.options.fields.matches(&event.path, &entry.attributes)
        };
        let (kind, entry) = match &event.change {
            Change::Put { before, after } => {
                match (before.as_ref().is_some_and(fits), fits(after)) {
                    (false, true) => ("ADDED", after),
                    (true, true) => ("MODIFIED", after),
                    (true, false) => ("DELETED", after),
                    (false, false) => return None,
                }
            }
            Change::Delete { before, last } if fits(before) => ("DELETED", last),
            Change::Delete { .. } => return None,
        };
        Some(line(&self.call, &self.media, kind, entry))
    }
}

fn line(call: &Call, media: &Media, kind: &str, entry: &Entry) -> Bytes {
    match media {
        Media::Table(view) => {
            let table = view.one(
                call.served,
                &outward_value(call.served, &entry.value()),
                Timestamp::now(),
            );
            frame(kind, table.to_string().as_bytes())
        }
        Media::Json | Media::Yaml | Media::Protobuf | Media::Metadata => {
            frame(kind, &outward(call.served, entry))
        }
    }
}

fn frame(kind: &str, object: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(object.len() + 40);
    out.put(format!(r#"{{"type":"{kind}","object":"#).as_bytes());
    out.put(object);
    out.put(&b"}\n"[..]);
    out.freeze()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Initial {
    No,
    /// All objects that existed have been told.
    End,
}

fn bookmark(call: &Call, revision: u64, initial: Initial) -> Bytes {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if initial == Initial::End {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    let object: Value = json!({"kind": call.served.kind,
        "apiVersion": call.served.api_version(), "metadata": metadata});
    frame("BOOKMARK", object.to_string().as_bytes())
}
