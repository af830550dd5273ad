//! Server-side apply, and who owns which field (`metadata.managedFields`). Pure; the time is passed in.
//!
//! Semantics: <https://kubernetes.io/docs/reference/using-api/server-side-apply/>. Every ordinary write
//! goes through [`update`], so that later applies know the other writers.

use serde_json::{Map, Value, json};

use super::fieldset::{FieldSet, Shape, differences, fields_of, key_of, parts};
use crate::schema::Type;

/// Who writes.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    /// The `fieldManager`, or what stands for it in the user agent.
    pub manager: &'a str,
    /// Of the request's object, such as `apps/v1`.
    pub api_version: &'a str,
    /// Empty for none.
    pub subresource: &'a str,
    /// RFC 3339 with seconds.
    pub time: &'a str,
}

/// Whether an applier takes the fields that others own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    No,
    Yes,
}

/// A field that another manager owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// As in messages: `"kubectl-client-side-apply" using apps/v1`.
    pub manager: String,
    /// Such as `.spec.replicas`.
    pub path: String,
}

/// Why an apply is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// 400 or 422: the configuration does not fit the type.
    #[error("{0}")]
    Malformed(String),
    /// 409, reason `Conflict`.
    #[error("{}", message(.0))]
    Conflicts(Vec<Conflict>),
}

impl ApplyError {
    /// The `causes` of the `Status`; none where it is no conflict.
    pub fn causes(&self) -> Vec<Value> {
        match self {
            Self::Malformed(_) => Vec::new(),
            Self::Conflicts(conflicts) => conflicts
                .iter()
                .map(|conflict| {
                    json!({
                        "reason": "FieldManagerConflict",
                        "message": format!("conflict with {}", conflict.manager),
                        "field": conflict.path,
                    })
                })
                .collect(),
        }
    }
}

fn message(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!(
            "Apply failed with 1 conflict: conflict with {}: {}",
            one.manager, one.path
        );
    }
    let mut managers: Vec<&str> = conflicts.iter().map(|c| c.manager.as_str()).collect();
    managers.sort_unstable();
    managers.dedup();
    let parts: Vec<String> = managers
        .into_iter()
        .map(|manager| {
            let paths = conflicts.iter().filter(|c| c.manager == manager);
            let paths: Vec<String> = paths.map(|c| format!("- {}", c.path)).collect();
            format!("conflicts with {manager}:\n{}", paths.join("\n"))
        })
        .collect();
    format!("Apply failed with {} conflicts: {}", conflicts.len(), parts.join("\n"))
}

const APPLY: &str = "Apply";
const UPDATE: &str = "Update";

/// An entry of `managedFields`.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    api_version: String,
    subresource: String,
    time: String,
    fields: FieldSet,
}

impl Entry {
    fn read(value: &Value) -> Self {
        let text =
            |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Self {
            manager: text("manager"),
            operation: text("operation"),
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            fields: FieldSet::from_json(value.get("fieldsV1").unwrap_or(&Value::Null)),
        }
    }

    fn write(&self) -> Value {
        let mut out = json!({
            "manager": self.manager, "operation": self.operation, "apiVersion": self.api_version,
            "time": self.time, "fieldsType": "FieldsV1", "fieldsV1": self.fields.to_json(),
        });
        if !self.subresource.is_empty() {
            out["subresource"] = self.subresource.as_str().into();
        }
        out
    }

    fn is(&self, writer: Writer<'_>, operation: &str) -> bool {
        self.manager == writer.manager
            && self.operation == operation
            && self.subresource == writer.subresource
            && (operation == APPLY || self.api_version == writer.api_version)
    }

    fn shown(&self) -> String {
        let mut out = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            out.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == UPDATE {
            out.push_str(&format!(" using {}", self.api_version));
        }
        out
    }
}

/// More managers than this and the oldest updaters are merged into one, as upstream does with 10.
const MAX_UPDATERS: usize = 10;

fn read_entries(object: Option<&Value>) -> Vec<Entry> {
    let entries = object.and_then(|object| object.pointer("/metadata/managedFields"));
    entries.and_then(Value::as_array).into_iter().flatten().map(Entry::read).collect()
}

fn write_entries(object: &mut Value, mut entries: Vec<Entry>) {
    for entry in &mut entries {
        entry.fields.trim();
    }
    entries.retain(|entry| !entry.fields.is_empty());
    entries.sort_by(|a, b| {
        (&a.operation, &a.time, &a.manager).cmp(&(&b.operation, &b.time, &b.manager))
    });
    let updaters = entries.iter().filter(|entry| entry.operation == UPDATE).count();
    if updaters > MAX_UPDATERS {
        merge_oldest(&mut entries, updaters + 1 - MAX_UPDATERS);
    }
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    if entries.is_empty() {
        metadata.remove("managedFields");
    } else {
        let written = entries.iter().map(Entry::write).collect();
        metadata.insert("managedFields".to_owned(), written);
    }
}

/// Merges the `count` oldest updaters of each version into one entry.
fn merge_oldest(entries: &mut Vec<Entry>, count: usize) {
    let (mut kept, mut merged): (Vec<Entry>, Vec<Entry>) = (Vec::new(), Vec::new());
    let mut left = count;
    for entry in entries.drain(..) {
        if entry.operation != UPDATE || left == 0 {
            kept.push(entry);
            continue;
        }
        left -= 1;
        let same = |other: &&mut Entry| {
            other.api_version == entry.api_version && other.subresource == entry.subresource
        };
        match merged.iter_mut().find(same) {
            Some(old) => {
                old.fields = old.fields.union(&entry.fields);
                old.time = entry.time;
            }
            None => merged.push(Entry { manager: "ancient-changes".to_owned(), ..entry }),
        }
    }
    kept.append(&mut merged);
    *entries = kept;
}

/// Fields that the server owns: nobody manages them.
fn strip(fields: &mut FieldSet) {
    const META: [&str; 9] = [
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "generation",
        "managedFields",
        "resourceVersion",
        "deletionTimestamp",
    ];
    fields.remove("f:apiVersion");
    fields.remove("f:kind");
    if fields.below("f:metadata").is_some() {
        let metadata = fields.descend("f:metadata".to_owned());
        for name in META {
            metadata.remove(&format!("f:{name}"));
        }
    }
    fields.trim();
}

/// Applies a configuration to the live object, or creates it. The result carries the new
/// `managedFields`; where nothing changes, it equals the live object.
///
/// `ignored` are top-level fields that this endpoint does not write, such as `status`.
///
/// # Errors
/// [`ApplyError`].
pub fn apply(
    of: Type,
    live: Option<&Value>,
    config: &Value,
    writer: Writer<'_>,
    (force, ignored): (Force, &[&str]),
) -> Result<Value, ApplyError> {
    if config.pointer("/metadata/managedFields").is_some_and(|m| m != &json!([])) {
        let text = "metadata.managedFields must be nil";
        return Err(ApplyError::Malformed(text.to_owned()));
    }
    let mut config = config.clone();
    if let Some(map) = config.as_object_mut() {
        map.retain(|name, _| !ignored.contains(&name.as_str()));
    }
    let shape = Shape::Object(of);
    let mut applied = fields_of(shape, &config, "").map_err(|text| {
        ApplyError::Malformed(format!(
            "failed to create typed patch object ({}): {text}",
            id(&config)
        ))
    })?;
    strip(&mut applied);
    let mut entries = read_entries(live);
    let last =
        entries.iter().position(|entry| entry.is(writer, APPLY)).map(|at| entries.remove(at));
    let mut object = match live {
        Some(live) => merge(shape, Some(live), &config),
        None => config.clone(),
    };
    take_over(shape, (live, &object), &mut entries, force)?;
    if let Some(last) = &last {
        let kept = entries.iter().fold(applied.clone(), |set, entry| set.union(&entry.fields));
        prune(shape, (&mut object, Some(&config)), &last.fields, &kept);
        drop_removed(shape, live, &object, &mut entries);
    }
    let unchanged = |last: &Entry| last.fields == applied && same(live, &object);
    let time = match &last {
        Some(last) if unchanged(last) => last.time.clone(),
        _ => writer.time.to_owned(),
    };
    entries.push(Entry {
        manager: writer.manager.to_owned(),
        operation: APPLY.to_owned(),
        api_version: writer.api_version.to_owned(),
        subresource: writer.subresource.to_owned(),
        time,
        fields: applied,
    });
    write_entries(&mut object, entries);
    Ok(object)
}

fn id(config: &Value) -> String {
    let text = |pointer: &str| config.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
    format!("{namespace}/{name}; {}", go_kind(config))
}

/// What an object says to be, as Go prints a `GroupVersionKind`: the core group has no name, and yet its slash.
pub fn go_kind(object: &Value) -> String {
    let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
    let version = text("apiVersion");
    let slash = if version.contains('/') { "" } else { "/" };
    format!("{slash}{version}, Kind={}", text("kind"))
}

/// Whether the objects are equal but for `managedFields`.
fn same(live: Option<&Value>, object: &Value) -> bool {
    let bare = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        object
    };
    live.is_some_and(|live| bare(live) == bare(object))
}

/// Finds the fields of others that the new object changes: conflicts, or with force theirs no more.
fn take_over(
    shape: Shape,
    (live, object): (Option<&Value>, &Value),
    entries: &mut [Entry],
    force: Force,
) -> Result<(), ApplyError> {
    if live.is_none() {
        return Ok(());
    }
    let (changed, _) = differences(shape, live, Some(object));
    let mut conflicts = Vec::new();
    for entry in entries {
        let taken = entry.fields.intersection(&changed);
        if taken.is_empty() {
            continue;
        }
        let manager = entry.shown();
        conflicts.extend(
            taken.paths().into_iter().map(|path| Conflict { manager: manager.clone(), path }),
        );
        entry.fields = entry.fields.difference(&taken);
    }
    if force == Force::No && !conflicts.is_empty() {
        return Err(ApplyError::Conflicts(conflicts));
    }
    Ok(())
}

fn drop_removed(shape: Shape, live: Option<&Value>, object: &Value, entries: &mut [Entry]) {
    let (_, removed) = differences(shape, live, Some(object));
    for entry in entries {
        entry.fields = entry.fields.difference(&removed);
    }
}

/// The live value with the configuration laid over it.
fn merge(shape: Shape, live: Option<&Value>, config: &Value) -> Value {
    match (shape, live, config) {
        (Shape::Object(_) | Shape::Map(_), Some(Value::Object(old)), Value::Object(new)) => {
            let mut out = old.clone();
            let shapes = parts(shape, Some(config));
            for (name, value) in new {
                let inner = shapes.get(&format!("f:{name}")).map_or(Shape::Leaf, |(s, _)| *s);
                out.insert(name.clone(), merge(inner, old.get(name), value));
            }
            Value::Object(out)
        }
        (Shape::Set, Some(Value::Array(old)), Value::Array(new)) => {
            let mut out = old.clone();
            out.extend(new.iter().filter(|item| !old.contains(item)).cloned());
            Value::Array(out)
        }
        (Shape::Keyed(field, of), Some(Value::Array(old)), Value::Array(new)) => {
            let mut out = old.clone();
            for item in new {
                let key = key_of(field, item);
                let place = out.iter_mut().find(|other| key_of(field, other) == key);
                match place {
                    Some(place) => *place = merge(Shape::Object(of), Some(place), item),
                    None => out.push(item.clone()),
                }
            }
            Value::Array(out)
        }
        _ => config.clone(),
    }
}

/// Removes what was applied before, is not applied now, and nobody else owns. An empty list or map in
/// the configuration is owned by nobody and yet stays.
fn prune(
    shape: Shape,
    (value, config): (&mut Value, Option<&Value>),
    last: &FieldSet,
    kept: &FieldSet,
) {
    let configured = parts(shape, config);
    for element in last.elements() {
        let config = configured.get(element).map(|(_, config)| *config);
        let Some((inner, part)) = part_mut(shape, value, element) else {
            if config.is_none() && kept.below(element).is_none() {
                remove(shape, value, element);
            }
            continue;
        };
        match (kept.below(element), config, last.below(element)) {
            (Some(keep), config, Some(last)) => prune(inner, (part, config), last, keep),
            (None, Some(config), _) => *part = config.clone(),
            (None, None, _) => remove(shape, value, element),
            (Some(_), _, None) => {}
        }
    }
}

fn remove(shape: Shape, value: &mut Value, element: &str) {
    match (shape, value) {
        (Shape::Object(_) | Shape::Map(_), Value::Object(map)) => {
            map.remove(element.trim_start_matches("f:"));
        }
        (Shape::Set, Value::Array(items)) => items.retain(|item| format!("v:{item}") != element),
        (Shape::Keyed(field, _), Value::Array(items)) => {
            items.retain(|item| key_of(field, item).as_deref() != Ok(element));
        }
        _ => {}
    }
}

fn part_mut<'a>(
    shape: Shape,
    value: &'a mut Value,
    element: &str,
) -> Option<(Shape, &'a mut Value)> {
    let inner = parts(shape, Some(value)).get(element).map(|(inner, _)| *inner)?;
    let part = match (shape, value) {
        (Shape::Object(_) | Shape::Map(_), Value::Object(map)) => {
            map.get_mut(element.strip_prefix("f:")?)?
        }
        (Shape::Keyed(field, _), Value::Array(items)) => {
            items.iter_mut().find(|item| key_of(field, item).as_deref() == Ok(element))?
        }
        _ => return None,
    };
    Some((inner, part))
}

/// Records an ordinary write (create, update, patch): the writer owns what it changed, others lose it.
/// `new` is what the writer asks for. `managedFields` that it brings replace the stored ones
/// (a client moves ownership that way), a list with one empty entry clears them; none leaves the stored.
/// `ignored` as for [`apply`].
pub fn update(
    of: Type,
    (old, mut new): (Option<&Value>, Value),
    writer: Writer<'_>,
    ignored: &[&str],
) -> Value {
    let shape = Shape::Object(of);
    let mut entries = match new.pointer("/metadata/managedFields").and_then(Value::as_array) {
        Some(brought) if writer.subresource.is_empty() && !brought.is_empty() => {
            brought.iter().map(Entry::read).filter(|entry| !entry.operation.is_empty()).collect()
        }
        _ => read_entries(old),
    };
    if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    let empty = Value::Object(Map::new());
    let (mut changed, mut removed) = differences(shape, old.or(Some(&empty)), Some(&new));
    for name in ignored {
        changed.remove(&format!("f:{name}"));
        removed.remove(&format!("f:{name}"));
    }
    strip(&mut changed);
    for entry in &mut entries {
        entry.fields = entry.fields.difference(&removed);
        if !entry.is(writer, UPDATE) {
            entry.fields = entry.fields.difference(&changed);
        }
    }
    if !changed.is_empty() {
        match entries.iter_mut().find(|entry| entry.is(writer, UPDATE)) {
            Some(entry) => {
                entry.fields = entry.fields.union(&changed);
                writer.time.clone_into(&mut entry.time);
            }
            None => entries.push(Entry {
                manager: writer.manager.to_owned(),
                operation: UPDATE.to_owned(),
                api_version: writer.api_version.to_owned(),
                subresource: writer.subresource.to_owned(),
                time: writer.time.to_owned(),
                fields: changed,
            }),
        }
    }
    write_entries(&mut new, entries);
    new
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
