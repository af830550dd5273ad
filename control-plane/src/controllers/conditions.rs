//! `status.conditions` as values. Pure.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::json::{rfc3339, text};

pub(crate) fn find<'a>(conditions: &'a [Value], kind: &str) -> Option<&'a Value> {
    conditions.iter().find(|condition| text(condition, "/type") == kind)
}

/// What a condition says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said<'a> {
    pub(crate) kind: &'a str,
    pub(crate) status: &'a str,
    pub(crate) reason: &'a str,
    pub(crate) message: String,
}

impl<'a> Said<'a> {
    pub(crate) fn new(
        kind: &'a str,
        status: &'a str,
        reason: &'a str,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, status, reason, message: message.into() }
    }

    /// The condition as of now, without `lastUpdateTime`.
    pub(crate) fn value(&self, now: Timestamp) -> Value {
        json!({
            "type": self.kind, "status": self.status, "reason": self.reason,
            "message": self.message, "lastTransitionTime": rfc3339(now),
        })
    }
}

/// Whether status and reason are said already.
pub(crate) fn says(conditions: &[Value], said: &Said<'_>) -> bool {
    find(conditions, said.kind).is_some_and(|old| {
        text(old, "/status") == said.status && text(old, "/reason") == said.reason
    })
}

/// Puts a condition in place of its namesake; the transition time stays while the status stays.
pub(crate) fn put(conditions: &mut Vec<Value>, said: &Said<'_>, now: Timestamp) {
    let mut value = said.value(now);
    let slot = conditions.iter().position(|condition| text(condition, "/type") == said.kind);
    if let Some(slot) = slot {
        if text(&conditions[slot], "/status") == said.status {
            value["lastTransitionTime"] = conditions[slot]["lastTransitionTime"].clone();
        }
        conditions[slot] = value;
    } else {
        conditions.push(value);
    }
}

pub(crate) fn remove(conditions: &mut Vec<Value>, kind: &str) {
    conditions.retain(|condition| text(condition, "/type") != kind);
}
