//! A watch on the API server as any client would see it: each event with the host's time of its arrival.

use std::{
    io::{BufRead as _, BufReader},
    process::Child,
    sync::mpsc::{Receiver, sync_channel},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::kubectl::Kubectl;

/// Events that wait to be read; more stop the reading, and with it `kubectl`, until there is room.
const WAITING: usize = 1000;

/// One change.
#[derive(Clone, Debug)]
pub struct Event {
    /// Milliseconds since 1970 by the host's clock.
    pub at_ms: u64,
    pub object: Value,
}

/// A running `kubectl get --raw …?watch=true`; ended when dropped.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    events: Receiver<Event>,
}

impl Watch {
    /// Starts it; `path` carries the selectors but not `watch`.
    ///
    /// # Errors
    /// When `kubectl` cannot be started.
    pub fn start(kubectl: Kubectl<'_>, path: &str) -> Result<Self> {
        let mark = if path.contains('?') { '&' } else { '?' };
        let mut child = kubectl.spawn(&["get", "--raw", &format!("{path}{mark}watch=true")])?;
        let out = child.stdout.take().context("kubectl's stdout")?;
        let (send, events) = sync_channel(WAITING);
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let at_ms = now_ms();
                let mut event: Value = serde_json::from_str(&line).unwrap_or_default();
                if send.send(Event { at_ms, object: event["object"].take() }).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, events })
    }

    /// The next event for which `wanted` holds.
    ///
    /// # Errors
    /// When none comes within `limit`; `what` says what was waited for.
    pub fn until(
        &self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Result<Event> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self
                .events
                .recv_timeout(left)
                .with_context(|| format!("the watch did not show {what}"))?;
            if wanted(&event.object) {
                return Ok(event);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended by itself, which is as well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The host's clock.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
