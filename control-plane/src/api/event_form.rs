//! `events.k8s.io/v1` Events, which are kept as core ones. Pure.

use serde_json::{Map, Value, json};

use crate::schema::Served;

/// Field of the core kind, field of the `events.k8s.io` kind.
const RENAMED: [(&str, &str); 6] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];
const REPORTER: [(&str, &str); 2] =
    [("reportingComponent", "reportingController"), ("reportingInstance", "reportingInstance")];

/// A stored object as its resource shows it.
#[must_use]
pub(super) fn outward(served: &Served, object: Value) -> Value {
    if served.storage.is_some() { shown(&object) } else { object }
}

/// A written object as it is stored.
#[must_use]
pub(super) fn inward(served: &Served, object: Value) -> Value {
    if served.storage.is_some() { stored(&object) } else { object }
}

/// A core Event as `events.k8s.io` shows it.
fn shown(event: &Value) -> Value {
    rename(event, "events.k8s.io/v1", |(core, other)| (core, other))
}

/// The other way round.
fn stored(event: &Value) -> Value {
    rename(event, "v1", |(core, other)| (other, core))
}

fn rename(
    event: &Value,
    api_version: &str,
    direction: fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Value {
    let mut out = Map::new();
    for (key, value) in event.as_object().into_iter().flatten() {
        let pairs = RENAMED.into_iter().chain(REPORTER).map(direction);
        let name =
            pairs.into_iter().find(|(from, _)| from == key).map_or(key.as_str(), |(_, to)| to);
        out.insert(name.to_owned(), value.clone());
    }
    out.insert("apiVersion".to_owned(), json!(api_version));
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let core = json!({"apiVersion": "v1", "kind": "Event", "message": "m", "count": 2,
            "involvedObject": {"name": "p"}, "reportingComponent": "kubelet", "metadata": {"name": "e"}});
        let other = shown(&core);
        assert_eq!(other["note"], "m");
        assert_eq!(other["reportingController"], "kubelet");
        assert_eq!(stored(&other), core);
    }
}
