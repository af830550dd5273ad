//! Reading and making JSON values. Pure.

use std::collections::BTreeMap;

use api::selector::{LabelSelector, Operator};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::model::{Labels, Object};

/// The string at a pointer, empty when absent.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(crate) fn integer(value: &Value, pointer: &str) -> Option<i64> {
    value.pointer(pointer).and_then(Value::as_i64)
}

/// The boolean at a pointer, false when absent.
pub(crate) fn boolean(value: &Value, pointer: &str) -> bool {
    value.pointer(pointer).and_then(Value::as_bool).unwrap_or(false)
}

/// The list at a pointer, empty when absent.
pub(crate) fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

pub(crate) fn time(value: &Value, pointer: &str) -> Option<Timestamp> {
    value.pointer(pointer).and_then(Value::as_str).and_then(|text| text.parse().ok())
}

pub(crate) fn labels_at(value: &Value, pointer: &str) -> Labels {
    let Some(map) = value.pointer(pointer).and_then(Value::as_object) else {
        return BTreeMap::new();
    };
    map.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// `metav1.Time`: whole seconds.
pub(crate) fn rfc3339(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Whether a `LabelSelector` matches; one that is null matches nothing, an empty one everything.
pub(crate) fn selector_matches(selector: &Value, labels: &Labels) -> bool {
    selector.is_object()
        && LabelSelector::from_object(selector)
            .is_ok_and(|selector| selector.matches(|key| labels.get(key).map(String::as_str)))
}

/// Whether one `{key, operator, values}` holds, with upstream's node operators `Gt` and `Lt` too.
pub(crate) fn requirement_matches(term: &Value, labels: &Labels) -> bool {
    let found = labels.get(text(term, "/key")).map(String::as_str);
    let values = items(term, "/values").iter().filter_map(Value::as_str);
    Operator::named(text(term, "/operator")).is_some_and(|operator| operator.holds(found, values))
}

/// Whether a plain `map[string]string` selector, as a Service has it, matches; empty matches nothing.
pub(crate) fn map_matches(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// A controlling `ownerReference` to this object.
pub(crate) fn controller_reference(owner: &Object, api_version: &str, kind: &str) -> Value {
    json!({
        "apiVersion": api_version,
        "kind": kind,
        "name": owner.meta.key.name,
        "uid": owner.meta.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

/// A number as `i32`-sized JSON integer or a percentage of `total`, rounded up or down.
pub(crate) fn scaled(value: Option<&Value>, total: i64, round_up: Rounding) -> Option<i64> {
    let value = value?;
    if let Some(number) = value.as_i64() {
        return Some(number);
    }
    let percent: i64 = value.as_str()?.strip_suffix('%')?.parse().ok()?;
    let product = total.saturating_mul(percent);
    Some(match round_up {
        Rounding::Up => product.saturating_add(99).div_euclid(100),
        Rounding::Down => product.div_euclid(100),
    })
}

/// Which way a percentage that is not whole goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Up,
    Down,
}

/// The value without nulls and empty maps, so that two writings of the same thing compare equal.
pub(crate) fn normal(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .map(|(key, value)| (key.clone(), normal(value)))
                .filter(|(_, value)| {
                    !value.is_null() && value.as_object().is_none_or(|map| !map.is_empty())
                })
                .collect(),
        ),
        Value::Array(list) => Value::Array(list.iter().map(normal).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

/// FNV-1a, 32 bit, over a canonical walk of the value (keys sorted, nulls and empty maps left out).
pub(crate) fn stable_hash(value: &Value, extra: &str) -> u32 {
    let mut hash = Fnv(0x811c_9dc5);
    hash.value(&normal(value));
    hash.bytes(extra.as_bytes());
    hash.0
}

struct Fnv(u32);

impl Fnv {
    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Object(map) => {
                self.bytes(b"{");
                let sorted: BTreeMap<_, _> = map.iter().collect();
                for (key, value) in sorted {
                    self.bytes(key.as_bytes());
                    self.bytes(b":");
                    self.value(value);
                }
                self.bytes(b"}");
            }
            Value::Array(list) => {
                self.bytes(b"[");
                for value in list {
                    self.value(value);
                    self.bytes(b",");
                }
                self.bytes(b"]");
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                self.bytes(value.to_string().as_bytes());
            }
        }
    }
}

/// A hash in letters that form no words, as upstream's `SafeEncodeString` spells its decimal digits.
pub(crate) fn safe_encode(hash: u32) -> String {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    hash.to_string().bytes().map(|digit| char::from(LETTERS[usize::from(digit) % 27])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_match_as_upstream_says() {
        let labels: Labels = [("app".to_owned(), "web".to_owned())].into();
        let cases = [
            (Value::Null, false),
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "db"}}), false),
            (
                json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["web"]}]}),
                true,
            ),
            (json!({"matchExpressions": [{"key": "x", "operator": "Exists"}]}), false),
            (json!({"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}), true),
            (json!({"matchExpressions": [{"key": "x", "operator": "Nonsense"}]}), false),
        ];
        for (selector, expected) in cases {
            assert_eq!(selector_matches(&selector, &labels), expected, "{selector}");
        }
    }

    #[test]
    fn percentages_round_as_asked() {
        let quarter = json!("25%");
        assert_eq!(scaled(Some(&quarter), 3, Rounding::Up), Some(1));
        assert_eq!(scaled(Some(&quarter), 3, Rounding::Down), Some(0));
        assert_eq!(scaled(Some(&json!(2)), 3, Rounding::Down), Some(2));
        assert_eq!(scaled(Some(&json!("x")), 3, Rounding::Down), None);
    }

    #[test]
    fn hash_ignores_order_nulls_and_empty_maps() {
        let one: Value = serde_json::from_str(r#"{"a":1,"b":{"c":null},"d":[{}]}"#).unwrap();
        let two: Value = serde_json::from_str(r#"{"d":[{}],"a":1}"#).unwrap();
        assert_eq!(stable_hash(&one, ""), stable_hash(&two, ""));
        assert_ne!(stable_hash(&one, ""), stable_hash(&one, "1"));
        assert_eq!(safe_encode(0), safe_encode(0));
        assert_eq!(safe_encode(1234), "5678");
    }

    #[test]
    fn times_are_spelt_as_metav1_does() {
        let now: Timestamp = "2026-01-02T03:04:05.678901234Z".parse().unwrap();
        assert_eq!(rfc3339(now), "2026-01-02T03:04:05Z");
    }
}
