//! JSON patch (RFC 6902). Pure.

use serde_json::Value;

use super::PatchError;
use crate::schema::decode::go_value;

/// Operations of one patch; upstream refuses more with the same words.
const MAX_OPERATIONS: usize = 10_000;
/// Bytes that all copies of one patch may add; upstream's limit (`AccumulatedCopySizeLimit`, set to the limit of a
/// body), as each copy could be one of all before it.
const MAX_COPIED_BYTES: usize = 3 << 20;
/// Levels of an object that a copy leaves: what has more cannot be gone through by calls.
const MAX_DEPTH: usize = 500;

/// Applies the operations in order; all or nothing.
///
/// # Errors
/// [`PatchError::Malformed`] where the patch is no list of operations, [`PatchError::Unfit`] where a path
/// does not exist or a test fails.
pub fn patch(mut target: Value, patch: &Value) -> Result<Value, PatchError> {
    let operations = patch.as_array().ok_or_else(|| {
        PatchError::Malformed(
            "error decoding patch: json: cannot unmarshal object into Go value of type jsonpatch.Patch"
                .to_owned(),
        )
    })?;
    if operations.len() > MAX_OPERATIONS {
        return Err(PatchError::Malformed(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    if let Some(other) = operations.iter().find(|operation| !operation.is_object()) {
        return Err(PatchError::Malformed(format!(
            "error decoding patch: json: cannot unmarshal {} into Go value of type handlers.jsonPatchOp",
            go_value(other)
        )));
    }
    let mut copied = 0;
    for operation in operations {
        apply(&mut target, operation, &mut copied)?;
    }
    Ok(target)
}

/// Bytes of a value, about, and its levels.
fn measure(value: &Value) -> (usize, usize) {
    let add = |(bytes, levels): (usize, usize), (more, deep): (usize, usize)| {
        (bytes + more, levels.max(deep + 1))
    };
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => (4, 0),
        Value::String(text) => (text.len() + 2, 0),
        Value::Array(items) => items.iter().map(measure).fold((2, 0), add),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(name, value)| {
                let (bytes, levels) = measure(value);
                (bytes + name.len() + 4, levels)
            });
            fields.fold((2, 0), add)
        }
    }
}

/// Counts one more copy.
fn count_copy(copied: &mut usize, value: &Value, depth: usize) -> Result<(), PatchError> {
    let (bytes, levels) = measure(value);
    *copied += bytes;
    if *copied > MAX_COPIED_BYTES {
        return Err(unfit(format!(
            "unable to complete the copy, the accumulated size increase of copy is {copied}, exceeding the \
             limit {MAX_COPIED_BYTES}"
        )));
    }
    if depth + levels > MAX_DEPTH {
        return Err(unfit(format!("unable to complete the copy, it is deeper than {MAX_DEPTH}")));
    }
    Ok(())
}

fn apply(target: &mut Value, operation: &Value, copied: &mut usize) -> Result<(), PatchError> {
    let text = |name: &str| operation.get(name).and_then(Value::as_str);
    let op = text("op").unwrap_or_default();
    let path = text("path").ok_or_else(|| unfit(format!("{op} operation is missing its path")))?;
    let pointer = parse(path)?;
    let value = || operation.get("value").cloned().unwrap_or(Value::Null);
    let from = || {
        let from = text("from")
            .ok_or_else(|| unfit(format!("{op} operation is missing its from path")))?;
        parse(from)
    };
    match op {
        "add" => add(target, &pointer, value(), path),
        "remove" => remove(target, &pointer, path).map(|_old| ()),
        "replace" => {
            *slot(target, &pointer).ok_or_else(|| missing("replace", path))? = value();
            Ok(())
        }
        "move" => {
            let from = from()?;
            if pointer.len() > from.len() && pointer.starts_with(&from) {
                return Err(unfit(format!(
                    "move operation does not apply: {path} is inside its source"
                )));
            }
            let moved = remove(target, &from, path)?;
            add(target, &pointer, moved, path)
        }
        "copy" => {
            let from = from()?;
            let there = find(target, &from).map(|value| value.clone());
            let parent = from.split_last().and_then(|(_, parent)| find(target, parent));
            let copy = match there {
                None if parent.is_some_and(|parent| parent.is_object()) => Value::Null,
                found => found.ok_or_else(|| missing("copy", path))?,
            };
            count_copy(copied, &copy, pointer.len())?;
            add(target, &pointer, copy, path)
        }
        "test" => {
            let wanted = operation.get("value").unwrap_or(&Value::Null);
            let found = find(target, &pointer).map_or(Value::Null, |value| value.clone());
            if same(&found, wanted) {
                Ok(())
            } else {
                Err(unfit(format!("testing value {path} failed: test failed")))
            }
        }
        other => Err(unfit(format!("Unexpected kind: {other}"))),
    }
}

fn unfit(text: String) -> PatchError {
    PatchError::Unfit(text)
}

fn missing(op: &str, path: &str) -> PatchError {
    unfit(format!("{op} operation does not apply: doc is missing path: {path}: missing value"))
}

fn parse(path: &str) -> Result<Vec<String>, PatchError> {
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let Some(rest) = path.strip_prefix('/') else {
        return Err(unfit(format!("the path {path:?} does not begin with a slash")));
    };
    Ok(rest.split('/').map(|part| part.replace("~1", "/").replace("~0", "~")).collect())
}

fn find<'a>(target: &'a mut Value, pointer: &[String]) -> Option<&'a mut Value> {
    pointer.iter().try_fold(target, |value, part| match value {
        Value::Object(map) => map.get_mut(part),
        Value::Array(items) => items.get_mut(index(part)?),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    })
}

/// As [`find`], but a field that its object does not have is a null: upstream's library takes it so for what is
/// replaced.
fn slot<'a>(target: &'a mut Value, pointer: &[String]) -> Option<&'a mut Value> {
    match pointer.split_last() {
        None => Some(target),
        Some((last, parent)) => match find(target, parent)? {
            Value::Object(map) => Some(map.entry(last.clone()).or_insert(Value::Null)),
            Value::Array(items) => items.get_mut(index(last)?),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
        },
    }
}

/// An index without sign and leading zeros.
fn index(part: &str) -> Option<usize> {
    let plain = part == "0" || !part.starts_with(['0', '+', '-']);
    plain.then(|| part.parse().ok()).flatten()
}

fn add(target: &mut Value, pointer: &[String], new: Value, path: &str) -> Result<(), PatchError> {
    let Some((last, parent)) = pointer.split_last() else {
        *target = new;
        return Ok(());
    };
    match find(target, parent) {
        Some(Value::Object(map)) => {
            map.insert(last.clone(), new);
            Ok(())
        }
        Some(Value::Array(items)) if last == "-" => {
            items.push(new);
            Ok(())
        }
        Some(Value::Array(items)) => match index(last) {
            Some(at) if at <= items.len() => {
                items.insert(at, new);
                Ok(())
            }
            _ => Err(unfit(format!(
                "add operation does not apply: doc is missing path: {path:?}: invalid index referenced"
            ))),
        },
        _ => Err(missing("add", path)),
    }
}

fn remove(target: &mut Value, pointer: &[String], path: &str) -> Result<Value, PatchError> {
    let Some((last, parent)) = pointer.split_last() else {
        return Err(unfit("remove operation does not apply: the whole document".to_owned()));
    };
    let removed = match find(target, parent) {
        Some(Value::Object(map)) => map.remove(last),
        Some(Value::Array(items)) => {
            index(last).filter(|at| *at < items.len()).map(|at| items.remove(at))
        }
        _ => None,
    };
    removed.ok_or_else(|| missing("remove", path))
}

/// Equality in which 1 and 1.0 are one number, as the RFC asks.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn copies_are_bounded_in_size_and_depth() {
        let doubling: Vec<_> = (0..40)
            .map(|number| json!({"op": "copy", "from": "/x", "path": format!("/x/a{number}")}))
            .collect();
        let deep: Vec<_> = (1..2_000)
            .map(|levels| json!({"op": "copy", "from": "/x", "path": format!("/x{}", "/a".repeat(levels))}))
            .collect();
        for (patches, why) in [(doubling, "exceeding the limit"), (deep, "deeper than")] {
            let refused = patch(json!({"x": {}}), &json!(patches)).unwrap_err();
            let PatchError::Unfit(words) = refused else { panic!("{refused:?}") };
            assert!(words.contains(why), "{words}");
        }
    }

    #[test]
    fn operations() {
        let cases = [
            (
                json!({"a": {}}),
                json!([{"op": "add", "path": "/a/b", "value": 1}]),
                json!({"a": {"b": 1}}),
            ),
            (
                json!({"a": [1, 3]}),
                json!([{"op": "add", "path": "/a/1", "value": 2}]),
                json!({"a": [1, 2, 3]}),
            ),
            (
                json!({"a": [1]}),
                json!([{"op": "add", "path": "/a/-", "value": 2}]),
                json!({"a": [1, 2]}),
            ),
            (
                json!({"a/b": 1, "c~d": 2}),
                json!([{"op": "remove", "path": "/a~1b"}, {"op": "remove", "path": "/c~0d"}]),
                json!({}),
            ),
            (json!({"a": [1, 2]}), json!([{"op": "remove", "path": "/a/0"}]), json!({"a": [2]})),
            (
                json!({"a": 1}),
                json!([{"op": "replace", "path": "/a", "value": null}]),
                json!({"a": null}),
            ),
            (
                json!({"a": {"b": 1}}),
                json!([{"op": "move", "from": "/a/b", "path": "/c"}]),
                json!({"a": {}, "c": 1}),
            ),
            (
                json!({"a": 1}),
                json!([{"op": "copy", "from": "/a", "path": "/b"}]),
                json!({"a": 1, "b": 1}),
            ),
            (
                json!({"a": 1}),
                json!([{"op": "test", "path": "/a", "value": 1.0}, {"op": "replace", "path": "", "value": {}}]),
                json!({}),
            ),
        ];
        for (target, operations, wanted) in cases {
            assert_eq!(patch(target, &operations), Ok(wanted), "{operations}");
        }
    }

    /// Upstream's library takes what is not there for null, against the RFC.
    #[test]
    fn what_is_missing_is_null() {
        let cases = [
            (json!([{"op": "replace", "path": "/b", "value": 1}]), json!({"a": 1, "b": 1})),
            (json!([{"op": "copy", "from": "/b", "path": "/a"}]), json!({"a": null})),
            (json!([{"op": "add", "path": "/a"}]), json!({"a": null})),
        ];
        for (operations, wanted) in cases {
            assert_eq!(patch(json!({"a": 1}), &operations), Ok(wanted), "{operations}");
        }
    }

    #[test]
    fn refusals() {
        let cases = [
            (json!({}), "no list"),
            (json!([{"op": "remove", "path": "/x"}]), "missing"),
            (json!([{"op": "replace", "path": "/x/y", "value": 1}]), "missing parent"),
            (json!([{"op": "replace", "path": "/l/1", "value": 1}]), "missing index"),
            (json!([5]), "no operation"),
            (json!([{"op": "add", "path": "/x/y", "value": 1}]), "missing parent"),
            (json!([{"op": "test", "path": "/a", "value": 2}]), "test"),
            (json!([{"op": "add", "path": "/l/7", "value": 2}]), "index"),
            (json!([{"op": "add", "path": "/l/01", "value": 2}]), "leading zero"),
            (json!([{"op": "jump", "path": "/a"}]), "unknown"),
            (json!([{"op": "add", "path": "a", "value": 1}]), "no slash"),
            (json!([{"op": "move", "from": "/l", "path": "/l/0"}]), "into itself"),
        ];
        for (operations, why) in cases {
            let target = json!({"a": 1, "l": [1]});
            assert!(patch(target, &operations).err().is_some(), "{why}");
        }
    }
}
