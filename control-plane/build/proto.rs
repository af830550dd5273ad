//! Reads `k8s-pb`: the protobuf messages with their tags, and the markers in their comments.

use std::{collections::BTreeMap, fs, path::Path};

use super::{Failure, rust_files};

/// A message such as `api::core::v1::PodSpec`.
#[derive(Default)]
pub(super) struct Message {
    /// `+structType=atomic`: replaced as a whole by server-side apply.
    pub(super) atomic: bool,
    pub(super) fields: Vec<ProtoField>,
}

pub(super) struct ProtoField {
    /// In the crate's snake case.
    pub(super) name: String,
    pub(super) tag: u16,
    pub(super) scalar: String,
    pub(super) container: Container,
    /// The path of the message, where `scalar` is `message`.
    pub(super) message: String,
    pub(super) markers: Markers,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    One,
    List,
    Map,
}

/// The `+name=value` lines of a comment.
#[derive(Clone, Default)]
pub(super) struct Markers(Vec<(String, String)>);

impl Markers {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn take(&mut self, line: &str) {
        if let Some(marker) = line.strip_prefix("/// +") {
            let (name, value) = marker.split_once('=').unwrap_or((marker, ""));
            self.0.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
}

/// Messages by their path in the crate.
pub(super) fn read(dir: &Path) -> Result<BTreeMap<String, Message>, Failure> {
    let mut files = Vec::new();
    rust_files(dir, &mut files)?;
    let mut messages = BTreeMap::new();
    for file in files {
        let Some(parent) = file.parent().and_then(|p| p.strip_prefix(dir).ok()) else { continue };
        let module = parent.to_string_lossy().replace('/', "::");
        parse(&fs::read_to_string(&file)?, &module, &mut messages)?;
    }
    Ok(messages)
}

fn parse(text: &str, module: &str, into: &mut BTreeMap<String, Message>) -> Result<(), Failure> {
    let mut current: Option<(String, Message)> = None;
    let mut markers = Markers::default();
    let mut attribute = String::new();
    let mut statement = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("pub struct ") {
            let atomic = markers.get("structType") == Some("atomic");
            let name = rest.split([' ', ';']).next().unwrap_or_default();
            current = Some((format!("{module}::{name}"), Message { atomic, fields: Vec::new() }));
            markers = Markers::default();
            if line.ends_with("{}") || line.ends_with(';') {
                into.extend(current.take());
            }
        } else if line == "}" {
            into.extend(current.take());
            markers = Markers::default();
        } else if line.starts_with("///") {
            markers.take(line);
        } else if let Some(rest) = line.strip_prefix("#[prost(") {
            rest.trim_end_matches(")]").clone_into(&mut attribute);
        } else if let Some((_, message)) = &mut current
            && (line.starts_with("pub ") || !statement.is_empty())
        {
            statement.push_str(line);
            statement.push(' ');
            if line.ends_with(',') && !attribute.is_empty() && closed(&statement) {
                message.fields.push(field(&attribute, &statement, module, &markers)?);
                markers = Markers::default();
                attribute.clear();
                statement.clear();
            }
        }
    }
    Ok(())
}

fn closed(statement: &str) -> bool {
    statement.matches('<').count() == statement.matches('>').count()
}

fn field(
    attribute: &str,
    statement: &str,
    module: &str,
    markers: &Markers,
) -> Result<ProtoField, Failure> {
    let (name, kind) = statement
        .trim_start_matches("pub ")
        .split_once(':')
        .ok_or_else(|| format!("not a field: {statement}"))?;
    let tag = attribute.rsplit_once("tag = \"").map_or("", |(_, t)| t).trim_end_matches('"');
    let first = attribute.split(',').next().unwrap_or_default();
    let (scalar, container) = match attribute.strip_prefix("btree_map = \"string, ") {
        Some(rest) => (rest.split('"').next().unwrap_or_default(), Container::Map),
        None if attribute.contains(", repeated") => {
            (first.split(' ').next().unwrap_or_default(), Container::List)
        }
        None => (first.split(' ').next().unwrap_or_default(), Container::One),
    };
    let inner = kind.trim().trim_end_matches([',', ' ', '>']);
    let inner = inner.rsplit(['<', ',']).next().unwrap_or_default().trim();
    Ok(ProtoField {
        name: name.trim().trim_start_matches("r#").to_owned(),
        tag: tag.parse().map_err(|e| format!("tag of {module} {statement}: {e}"))?,
        scalar: scalar.to_owned(),
        container,
        message: if scalar == "message" { resolve(inner, module) } else { String::new() },
        markers: markers.clone(),
    })
}

/// `super::super::v1::X` seen from `module`.
fn resolve(path: &str, module: &str) -> String {
    let mut base: Vec<&str> = module.split("::").collect();
    let mut rest = path;
    while let Some(next) = rest.strip_prefix("super::") {
        base.pop();
        rest = next;
    }
    base.push(rest);
    base.join("::")
}
