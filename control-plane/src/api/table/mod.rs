//! `kubectl get`'s tables: upstream's columns and cells. Pure; the time is passed in.

mod kinds;
mod pod;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::schema::Served;

/// What a row carries of its object: the `includeObject` parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IncludeObject {
    /// `PartialObjectMetadata`.
    #[default]
    Metadata,
    Object,
    None,
}

impl IncludeObject {
    /// The value of the query parameter; absent is `Metadata`.
    pub fn parse(value: &str) -> Option<Self> {
        match value {
            "" | "Metadata" => Some(Self::Metadata),
            "Object" => Some(Self::Object),
            "None" => Some(Self::None),
            _ => None,
        }
    }
}

/// How a table is to be made.
#[derive(Clone, Copy, Debug)]
pub struct TableOptions<'a> {
    /// `v1` or `v1beta1` of `meta.k8s.io`.
    pub version: &'a str,
    pub include: IncludeObject,
    /// Column definitions are left out of the later events of a watch.
    pub headers: bool,
    pub now: Timestamp,
}

/// A `Table` of objects. `list_metadata` becomes its metadata; for one object, give the object's
/// `{"resourceVersion": …}`.
pub fn table(
    resource: &Served,
    objects: &[&Value],
    list_metadata: Value,
    options: TableOptions<'_>,
) -> Value {
    let rows: Vec<Value> = objects.iter().map(|object| row(resource, object, options)).collect();
    let columns: Vec<Value> = if options.headers {
        columns(resource).iter().map(Column::definition).collect()
    } else {
        Vec::new()
    };
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{}", options.version),
        "metadata": list_metadata,
        "columnDefinitions": columns,
        "rows": rows,
    })
}

fn row(resource: &Served, object: &Value, options: TableOptions<'_>) -> Value {
    let cells = cells(resource, object, options.now);
    let mut row = json!({"cells": cells});
    match options.include {
        IncludeObject::Metadata => {
            row["object"] = json!({
                "kind": "PartialObjectMetadata",
                "apiVersion": format!("meta.k8s.io/{}", options.version),
                "metadata": object.get("metadata").cloned().unwrap_or_default(),
            });
        }
        IncludeObject::Object => row["object"] = object.clone(),
        IncludeObject::None => row["object"] = Value::Null,
    }
    if let Some(condition) = pod::finished(resource, object) {
        row["conditions"] = json!([condition]);
    }
    row
}

/// A column of a table.
#[derive(Clone, Copy, Debug)]
struct Column {
    name: &'static str,
    kind: &'static str,
    format: &'static str,
    description: &'static str,
    /// Above 0: shown by `-o wide` only.
    priority: u8,
}

impl Column {
    fn definition(&self) -> Value {
        json!({
            "name": self.name, "type": self.kind, "format": self.format,
            "description": self.description, "priority": self.priority,
        })
    }
}

const fn text(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "string", format: "", description, priority: 0 }
}

const fn wide(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "string", format: "", description, priority: 1 }
}

const fn number(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "integer", format: "", description, priority: 0 }
}

const NAME: Column = Column {
    name: "Name",
    kind: "string",
    format: "name",
    description: "Name must be unique within a namespace.",
    priority: 0,
};
const AGE: Column = text(
    "Age",
    "CreationTimestamp is a timestamp representing the server time when this object was created.",
);

fn columns(resource: &Served) -> &'static [Column] {
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::COLUMNS,
        (group, kind) => kinds::columns(group, kind),
    }
}

fn cells(resource: &Served, object: &Value, now: Timestamp) -> Vec<Value> {
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::cells(object, now),
        (group, kind) => kinds::cells(group, kind, object, now),
    }
}

/// A string at a JSON pointer; empty where there is none.
fn string<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn integer(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or_default()
}

fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

/// The age of an object, or of anything with a time: `<unknown>` without one.
fn since(time: &str, now: Timestamp) -> String {
    match time.parse::<Timestamp>() {
        Ok(then) => human_duration(now.as_second().saturating_sub(then.as_second())),
        Err(_) => "<unknown>".to_owned(),
    }
}

fn age(object: &Value, now: Timestamp) -> Value {
    since(string(object, "/metadata/creationTimestamp"), now).into()
}

/// Seconds as kubectl shows ages: `45s`, `3m12s`, `5h`, `2d3h`, `400d`.
pub fn human_duration(seconds: i64) -> String {
    let with = |large: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{large}{unit}")
        } else {
            format!("{large}{unit}{small}{small_unit}")
        }
    };
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match () {
        () if seconds < -1 => "<invalid>".to_owned(),
        () if seconds < 0 => "0s".to_owned(),
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => with(minutes, "m", seconds % 60, "s"),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => with(hours, "h", minutes % 60, "m"),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 24 * 8 => with(hours / 24, "d", hours % 24, "h"),
        () if hours < 24 * 365 * 2 => format!("{}d", hours / 24),
        () if hours < 24 * 365 * 8 => with(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        () => format!("{}y", hours / 24 / 365),
    }
}

#[cfg(test)]
mod tests;
