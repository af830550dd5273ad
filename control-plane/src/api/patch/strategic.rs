//! Strategic merge patch: a merge patch that merges lists by key, as the schema says. Pure.
//!
//! Directives: `$patch` (`replace`, `delete`, `merge`), `$retainKeys`, `$setElementOrder/<list>`,
//! `$deleteFromPrimitiveList/<list>`. Rules:
//! <https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md>.

use serde_json::{Map, Value};

use super::PatchError;
use crate::schema::{Container, Element, Field, Type};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// Applies a patch to an object of the type.
///
/// # Errors
/// [`PatchError::Malformed`] for unknown directives, list entries without their merge key, and values of
/// the wrong shape.
pub fn patch(of: Type, target: Value, patch: &Value) -> Result<Value, PatchError> {
    let Value::Object(changes) = patch else {
        return Err(malformed("the patch is not an object"));
    };
    let target = match target {
        Value::Object(map) => map,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Map::new()
        }
    };
    Ok(Value::Object(merge_map(Some(of), target, changes)?))
}

fn malformed(text: impl Into<String>) -> PatchError {
    PatchError::Malformed(text.into())
}

fn merge_map(
    of: Option<Type>,
    mut original: Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<Map<String, Value>, PatchError> {
    match patch.get(PATCH).map(|directive| directive.as_str().unwrap_or_default()) {
        None | Some("merge") => {}
        Some("replace") => return fresh(of, patch),
        Some("delete") => return Ok(Map::new()),
        Some(other) => return Err(malformed(format!("unknown patch type found: {other}"))),
    }
    if let Some(keys) = patch.get(RETAIN) {
        retain(&mut original, patch, keys)?;
    }
    for (key, change) in patch {
        if key == PATCH || key == RETAIN || key.starts_with(ORDER) || key.starts_with(DELETE) {
            continue;
        }
        let field = of.and_then(|of| of.field(key));
        match (original.remove(key), change) {
            (_, Value::Null) => {}
            (old, change) => {
                let order = patch.get(&format!("{ORDER}{key}"));
                let merged = merge_value(field, old, change, order)?;
                original.insert(key.clone(), merged);
            }
        }
    }
    for (directive, value) in patch {
        if let Some(list) = directive.strip_prefix(ORDER)
            && !patch.contains_key(list)
            && let Some(Value::Array(items)) = original.get_mut(list)
        {
            let field = of.and_then(|of| of.field(list));
            let taken = std::mem::take(items);
            *items = order_items(field, taken.clone(), entries(value, directive)?, &taken);
        }
    }
    for (directive, value) in patch {
        if let Some(list) = directive.strip_prefix(DELETE)
            && let Some(Value::Array(items)) = original.get_mut(list)
        {
            let gone = entries(value, directive)?;
            items.retain(|item| !gone.contains(item));
        }
    }
    Ok(original)
}

fn entries<'a>(value: &'a Value, directive: &str) -> Result<&'a [Value], PatchError> {
    value
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| malformed(format!("{directive} is not a list")))
}

/// The patch as an object of its own: directives carried out on nothing, nulls dropped.
fn fresh(of: Option<Type>, patch: &Map<String, Value>) -> Result<Map<String, Value>, PatchError> {
    let mut plain = patch.clone();
    plain.remove(PATCH);
    merge_map(of, Map::new(), &plain)
}

fn retain(
    original: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    keys: &Value,
) -> Result<(), PatchError> {
    let keys = entries(keys, RETAIN)?;
    let keeps = |key: &str| keys.iter().any(|k| k.as_str() == Some(key));
    for (key, value) in patch {
        if !key.starts_with('$') && !value.is_null() && !keeps(key) {
            return Err(malformed(format!(
                "{key} is not in the list of {RETAIN}: all fields of the patch must be"
            )));
        }
    }
    original.retain(|key, _| keeps(key));
    Ok(())
}

fn merge_value(
    field: Option<Field>,
    old: Option<Value>,
    change: &Value,
    order: Option<&Value>,
) -> Result<Value, PatchError> {
    match change {
        Value::Object(patch) => {
            let replace = field.is_some_and(Field::patch_replace);
            let old = match old {
                Some(Value::Object(map)) if !replace => map,
                _ => Map::new(),
            };
            let inner = field.and_then(|field| match (field.container(), field.element()) {
                (Container::One, Element::Object(of)) => Some(of),
                _ => None,
            });
            match field.map(|field| (field.container(), field.element())) {
                // A map of objects: each value is patched as its type.
                Some((Container::Map, Element::Object(of))) => merge_entries(of, old, patch),
                _ => Ok(Value::Object(merge_map(inner, old, patch)?)),
            }
        }
        Value::Array(items) => {
            let old = match old {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            };
            merge_list(field, old, items, order)
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(change.clone()),
    }
}

fn merge_entries(
    of: Type,
    mut old: Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<Value, PatchError> {
    for (key, change) in patch {
        match (old.remove(key), change) {
            (_, Value::Null) => {}
            (entry, Value::Object(change)) => {
                let entry = entry.and_then(|e| e.as_object().cloned()).unwrap_or_default();
                old.insert(key.clone(), Value::Object(merge_map(Some(of), entry, change)?));
            }
            (_, change) => {
                old.insert(key.clone(), change.clone());
            }
        }
    }
    Ok(Value::Object(old))
}

fn element_type(field: Field) -> Option<Type> {
    if let Element::Object(of) = field.element() { Some(of) } else { None }
}

fn merge_list(
    field: Option<Field>,
    old: Vec<Value>,
    patch: &[Value],
    order: Option<&Value>,
) -> Result<Value, PatchError> {
    let Some(field) = field.filter(|field| field.patch_merge()) else {
        return Ok(Value::Array(plain_list(field, patch)?));
    };
    let mut merged = old.clone();
    let mut listed = Vec::new();
    if field.patch_merge_key().is_empty() {
        for item in patch {
            if !merged.contains(item) {
                merged.push(item.clone());
            }
            listed.push(item.clone());
        }
    } else {
        if patch.iter().any(|item| item.get(PATCH) == Some(&"replace".into())) {
            let rest: Vec<Value> =
                patch.iter().filter(|item| item.get(PATCH).is_none()).cloned().collect();
            return Ok(Value::Array(plain_list(Some(field), &rest)?));
        }
        for item in patch {
            merge_item(field, &mut merged, item, &mut listed)?;
        }
    }
    let order = match order {
        Some(order) => entries(order, ORDER)?,
        None => &listed,
    };
    Ok(Value::Array(order_items(Some(field), merged, order, &old)))
}

fn merge_item(
    field: Field,
    merged: &mut Vec<Value>,
    item: &Value,
    listed: &mut Vec<Value>,
) -> Result<(), PatchError> {
    let key = field.patch_merge_key();
    let Value::Object(change) = item else {
        return Err(malformed(format!("an entry of {} is not an object", field.name())));
    };
    let Some(id) = change.get(key) else {
        return Err(malformed(if change.contains_key(PATCH) {
            format!("delete patch type with no merge key defined: {item}")
        } else {
            format!("map: {item} does not contain declared merge key: {key}")
        }));
    };
    if change.get(PATCH) == Some(&"delete".into()) {
        merged.retain(|old| old.get(key) != Some(id));
        return Ok(());
    }
    listed.push(item.clone());
    let of = element_type(field);
    match merged.iter_mut().find(|old| old.get(key) == Some(id)) {
        Some(old) => {
            let before = old.as_object().cloned().unwrap_or_default();
            *old = Value::Object(merge_map(of, before, change)?);
        }
        None => merged.push(Value::Object(merge_map(of, Map::new(), change)?)),
    }
    Ok(())
}

/// A list that replaces another: its entries without directives and nulls.
fn plain_list(field: Option<Field>, items: &[Value]) -> Result<Vec<Value>, PatchError> {
    let of = field.and_then(element_type);
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Value::Object(map) if map.get(PATCH) == Some(&"delete".into()) => {}
            Value::Object(map) => out.push(Value::Object(fresh(of, map)?)),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => {
                out.push(item.clone());
            }
        }
    }
    Ok(out)
}

/// Puts the entries that `order` names in its order, and the others where the server had them relative
/// to those.
fn order_items(
    field: Option<Field>,
    merged: Vec<Value>,
    order: &[Value],
    server: &[Value],
) -> Vec<Value> {
    let key = field.map_or("", Field::patch_merge_key);
    let id = |item: &Value| -> Value {
        if key.is_empty() { item.clone() } else { item.get(key).cloned().unwrap_or_default() }
    };
    let place = |list: &[Value], item: &Value| list.iter().position(|other| id(other) == id(item));
    let (mut listed, mut rest): (Vec<Value>, Vec<Value>) =
        merged.into_iter().partition(|item| place(order, item).is_some());
    listed.sort_by_key(|item| place(order, item));
    rest.sort_by_key(|item| place(server, item).unwrap_or(usize::MAX));
    let mut out = Vec::with_capacity(listed.len() + rest.len());
    let (mut listed, mut rest) = (listed.into_iter().peekable(), rest.into_iter().peekable());
    while let (Some(left), Some(right)) = (rest.peek(), listed.peek()) {
        let before = match (place(server, left), place(server, right)) {
            (Some(left), Some(right)) => left < right,
            _ => false,
        };
        out.extend(if before { rest.next() } else { listed.next() });
    }
    out.extend(rest);
    out.extend(listed);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::schema::kind;

    fn run(target: Value, change: &Value) -> Result<Value, PatchError> {
        patch(kind("apps", "v1", "Deployment").unwrap().body, target, change)
    }

    fn pod_spec(spec: Value) -> Value {
        json!({"spec": {"template": {"spec": spec}}})
    }

    #[test]
    fn lists_merge_by_key() {
        let cases = [
            (
                json!({"containers": [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}]}),
                json!({"containers": [{"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}]}]}),
                json!({"containers": [{"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": "1"}]}, {"name": "b"}]}),
            ),
            (
                json!({"containers": [{"name": "a"}, {"name": "b"}]}),
                json!({"containers": [{"name": "a", "$patch": "delete"}]}),
                json!({"containers": [{"name": "b"}]}),
            ),
            (
                json!({"containers": [{"name": "a"}, {"name": "b"}]}),
                json!({"containers": [{"name": "c"}, {"$patch": "replace"}]}),
                json!({"containers": [{"name": "c"}]}),
            ),
            (
                json!({"containers": [{"name": "a"}, {"name": "b"}]}),
                json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}], "containers": [{"name": "c", "image": "i"}]}),
                json!({"containers": [{"name": "c", "image": "i"}, {"name": "b"}, {"name": "a"}]}),
            ),
            (
                json!({"containers": [{"name": "a", "command": ["x", "y"]}]}),
                json!({"containers": [{"name": "a", "command": ["z"]}]}),
                json!({"containers": [{"name": "a", "command": ["z"]}]}),
            ),
            (
                json!({"nodeSelector": {"a": "1", "b": "2"}}),
                json!({"nodeSelector": {"a": null, "c": "3"}}),
                json!({"nodeSelector": {"b": "2", "c": "3"}}),
            ),
            (
                json!({"nodeSelector": {"a": "1"}}),
                json!({"nodeSelector": {"$patch": "replace", "c": "3"}}),
                json!({"nodeSelector": {"c": "3"}}),
            ),
            (
                json!({"volumes": [{"name": "v", "emptyDir": {}}]}),
                json!({"volumes": [{"$retainKeys": ["name", "hostPath"], "name": "v", "hostPath": {"path": "/x"}}]}),
                json!({"volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}),
            ),
            (
                json!({"tolerations": [{"key": "a"}]}),
                json!({"tolerations": [{"key": "b"}]}),
                json!({"tolerations": [{"key": "b"}]}),
            ),
        ];
        for (target, change, wanted) in cases {
            assert_eq!(
                run(pod_spec(target), &pod_spec(change.clone())),
                Ok(pod_spec(wanted)),
                "{change}"
            );
        }
    }

    #[test]
    fn primitive_lists() {
        let target = json!({"metadata": {"finalizers": ["a", "b", "c"]}});
        let change = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["b"],
            "$setElementOrder/finalizers": ["d", "a", "c"], "finalizers": ["d"]}});
        assert_eq!(run(target, &change), Ok(json!({"metadata": {"finalizers": ["d", "a", "c"]}})));
    }

    /// The patch that kubectl 1.33 computed from our OpenAPI document for `kubectl apply` of a manifest
    /// with other replicas and another image.
    #[test]
    fn what_kubectl_apply_sends() {
        let change = include_bytes!("../../schema/fixtures/patch-deployment.json");
        let change: Value = serde_json::from_slice(change).unwrap();
        let target = json!({"spec": {"replicas": 2, "template": {"spec": {"containers":
            [{"name": "nginx", "image": "nginx", "ports": [{"containerPort": 80}]}]}}}});
        let mut patched = run(target, &change).unwrap();
        assert!(patched["metadata"].take()["annotations"].is_object());
        assert_eq!(
            patched["spec"],
            json!({"replicas": 3, "template": {"spec": {"containers":
                [{"name": "nginx", "image": "nginx:2", "ports": [{"containerPort": 80}]}]}}})
        );
    }

    #[test]
    fn service_ports_by_port() {
        let service = kind("", "v1", "Service").unwrap().body;
        let target = json!({"spec": {"ports": [{"port": 80, "nodePort": 30080}, {"port": 81}]}});
        let change = json!({"spec": {"ports": [{"port": 80, "name": "http"}]}});
        let wanted = json!({"spec": {"ports": [{"port": 80, "name": "http", "nodePort": 30080}, {"port": 81}]}});
        assert_eq!(patch(service, target, &change), Ok(wanted));
    }

    #[test]
    fn refusals() {
        for change in [
            json!([]),
            json!({"$patch": "upside-down"}),
            pod_spec(json!({"containers": [{"image": "x"}]})),
            pod_spec(json!({"containers": ["x"]})),
            pod_spec(json!({"volumes": [{"$retainKeys": ["name"], "name": "v", "emptyDir": {}}]})),
        ] {
            let target = pod_spec(json!({"containers": [], "volumes": []}));
            assert!(run(target, &change).err().is_some(), "{change}");
        }
    }

    proptest! {
        #[test]
        fn applying_twice_is_applying_once(
            old in proptest::collection::btree_set("[a-d]", 0..4),
            new in proptest::collection::btree_set("[a-f]", 0..4),
            gone in "[a-d]",
        ) {
            let list = |names: &std::collections::BTreeSet<String>| -> Vec<Value> {
                names.iter().map(|name| json!({"name": name, "image": name})).collect()
            };
            let mut items = list(&new);
            items.retain(|item| item["name"] != gone.as_str());
            items.push(json!({"name": gone, "$patch": "delete"}));
            let change = pod_spec(json!({"containers": items}));
            let once = run(pod_spec(json!({"containers": list(&old)})), &change).unwrap();
            prop_assert_eq!(run(once.clone(), &change).unwrap(), once);
        }
    }
}
