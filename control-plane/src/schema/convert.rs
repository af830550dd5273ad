//! Between the two forms of an Event: core/v1, in which it is stored, and events.k8s.io/v1. Pure.

use serde_json::{Value, json};

/// Fields that differ: stored name, newer name.
const RENAMED: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// A core/v1 Event as events.k8s.io/v1.
pub fn event_from_core(event: Value) -> Value {
    rename(event, "events.k8s.io/v1", |(core, newer)| (core, newer))
}

/// An events.k8s.io/v1 Event as core/v1.
pub fn event_to_core(event: Value) -> Value {
    rename(event, "v1", |(core, newer)| (newer, core))
}

fn rename(
    mut event: Value,
    api_version: &str,
    direction: fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Value {
    if let Some(map) = event.as_object_mut() {
        for pair in RENAMED {
            let (from, to) = direction(pair);
            if let Some(value) = map.remove(from) {
                map.insert(to.to_owned(), value);
            }
        }
        map.insert("apiVersion".to_owned(), json!(api_version));
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{decode, kind};

    #[test]
    fn forth_and_back() {
        let stored = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"},
            "involvedObject": {"kind": "Pod", "name": "p"}, "reason": "Pulled", "message": "m",
            "source": {"component": "kubelet", "host": "n"}, "count": 2, "type": "Normal",
            "firstTimestamp": "2026-01-02T03:04:05Z", "lastTimestamp": "2026-01-02T03:04:05Z",
            "reportingComponent": "kubelet", "reportingInstance": "n",
            "eventTime": "2026-01-02T03:04:05.000000Z",
        });
        let newer = event_from_core(stored.clone());
        assert_eq!(newer["regarding"]["name"], "p");
        let kind = kind("events.k8s.io", "v1", "Event").unwrap();
        let decoded = decode::value(&kind, newer.clone(), decode::Strictness::Strict);
        assert_eq!(decoded.unwrap().0, newer);
        assert_eq!(event_to_core(newer), stored);
    }
}
