//! An object encoded but for its revision (pure).
//!
//! The revision is known only when the writer orders the commits, and encoding again there would
//! cost the one thread that everybody waits for. So the bytes have a hole where the digits go.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{Attributes, Entry};

/// The bytes around `metadata.resourceVersion`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    bytes: Vec<u8>,
    hole: usize,
    pub attributes: Attributes,
}

impl Draft {
    /// Encodes `object`; a `metadata.resourceVersion` in it is disregarded.
    #[must_use]
    pub fn new(object: &Value, attributes: Attributes) -> Self {
        let empty = Map::new();
        let fields = object.as_object().unwrap_or(&empty);
        let metadata = fields.get("metadata").and_then(Value::as_object).unwrap_or(&empty);
        let mut bytes = Vec::with_capacity(1024);
        bytes.extend_from_slice(br#"{"metadata":{"resourceVersion":""#);
        let hole = bytes.len();
        bytes.push(b'"');
        for (key, value) in metadata.iter().filter(|(key, _)| *key != "resourceVersion") {
            member(&mut bytes, key, value);
        }
        bytes.push(b'}');
        for (key, value) in fields.iter().filter(|(key, _)| *key != "metadata") {
            member(&mut bytes, key, value);
        }
        bytes.push(b'}');
        Self { bytes, hole, attributes }
    }

    /// The object at `revision`.
    #[must_use]
    pub fn seal(&self, revision: u64) -> Entry {
        let (head, tail) = self.bytes.split_at(self.hole);
        let bytes = join(head, revision, tail);
        Entry::new(bytes, self.hole, revision, self.attributes.clone())
    }
}

/// `entry` as if written at `revision`: what a watcher is told of a deletion.
#[must_use]
pub fn reseal(entry: &Entry, revision: u64) -> Entry {
    let (head, rest) = entry.bytes.split_at(entry.hole());
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (_, tail) = rest.split_at(digits);
    Entry::new(join(head, revision, tail), entry.hole(), revision, entry.attributes.clone())
}

fn join(head: &[u8], revision: u64, tail: &[u8]) -> Bytes {
    let digits = revision.to_string();
    let mut bytes = Vec::with_capacity(head.len() + digits.len() + tail.len());
    bytes.extend_from_slice(head);
    bytes.extend_from_slice(digits.as_bytes());
    bytes.extend_from_slice(tail);
    Bytes::from(bytes)
}

fn member(bytes: &mut Vec<u8>, key: &str, value: &Value) {
    bytes.push(b',');
    bytes.extend_from_slice(Value::from(key).to_string().as_bytes());
    bytes.push(b':');
    serde_json::to_writer(&mut *bytes, value).expect("a JSON value can be written to memory");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_revision_goes_where_it_belongs_whatever_the_object_says() {
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "\"resourceVersion\":\"1\""},
            "metadata": {"name": "x", "resourceVersion": "7", "labels": {"resourceVersion": "1"}}});
        let draft = Draft::new(&object, Attributes::default());
        let entry = draft.seal(42);
        let mut want = object;
        want["metadata"]["resourceVersion"] = json!("42");
        assert_eq!(*entry.value(), want);
        let later = reseal(&entry, 1_000_000);
        want["metadata"]["resourceVersion"] = json!("1000000");
        assert_eq!(*later.value(), want);
        assert_eq!(later.revision, 1_000_000);
    }
}
