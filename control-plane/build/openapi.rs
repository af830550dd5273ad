//! Reads `k8s-openapi`: the flat JSON shape of every definition, from its `json_schema` function.

use std::{collections::BTreeMap, fs, path::Path};

use super::{Failure, rust_files};

/// A definition such as `io.k8s.api.core.v1.PodSpec`.
pub(super) struct Definition {
    pub(super) name: String,
    pub(super) doc: String,
    pub(super) properties: Vec<Property>,
    /// Group, version and kind, where the definition is a resource.
    pub(super) kind: Option<[String; 3]>,
}

pub(super) struct Property {
    pub(super) name: String,
    pub(super) doc: String,
    pub(super) required: bool,
    /// The path of a referenced definition, such as `api::core::v1::PodSpec`.
    pub(super) reference: Option<String>,
    /// The `type`s from the outside in: `["object", "array", "string"]`.
    pub(super) types: Vec<String>,
    pub(super) format: Option<String>,
}

/// Definitions by their path in the crate (`api::core::v1::PodSpec`).
pub(super) fn read(dir: &Path) -> Result<BTreeMap<String, Definition>, Failure> {
    let mut files = Vec::new();
    rust_files(dir, &mut files)?;
    let mut definitions = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(&file)?;
        let Some(name) = between(&text, "// Generated from definition ", "\n") else { continue };
        let Some(at) = text.find("crate::schemars::json_schema!({") else { continue };
        let schema = text.get(at..).unwrap_or_default();
        let Some(parent) = file.parent().and_then(|p| p.strip_prefix(dir).ok()) else { continue };
        let modules = parent.to_string_lossy().replace('/', "::");
        let short = name.rsplit('.').next().unwrap_or(name);
        definitions.insert(format!("{modules}::{short}"), definition(name, &text, schema));
    }
    Ok(definitions)
}

fn definition(name: &str, text: &str, schema: &str) -> Definition {
    let mut properties = Vec::new();
    let mut doc = String::new();
    let mut required = Vec::new();
    let mut block: Option<(String, String)> = None;
    let mut section = String::new();
    for line in schema.lines().skip(1) {
        let indent = line.len() - line.trim_start().len();
        let body = line.trim_start();
        if indent == 8 {
            break;
        } else if indent == 12 {
            section = body.split(':').next().unwrap_or_default().to_owned();
            if let Some(quoted) = body.strip_prefix("\"description\": ") {
                doc = unescape(quoted);
            }
        } else if section == "\"required\"" {
            required.push(body.trim_matches(['"', ',']).to_owned());
        } else if section == "\"properties\"" {
            if indent == 16 && body.starts_with('"') {
                properties.extend(block.take().map(|(name, text)| property(name, &text)));
                let name = body.split("\": ").next().unwrap_or_default().trim_matches('"');
                block = Some((name.to_owned(), String::new()));
            }
            if let Some((_, text)) = &mut block {
                text.push_str(body);
                text.push('\n');
            }
        }
    }
    properties.extend(block.take().map(|(name, text)| property(name, &text)));
    for property in &mut properties {
        property.required = required.contains(&property.name);
    }
    Definition { name: name.to_owned(), doc, properties, kind: kind(text) }
}

fn property(name: String, text: &str) -> Property {
    let mut doc = String::new();
    let mut types = Vec::new();
    let mut format = None;
    let mut reference = None;
    for line in text.lines() {
        if let Some(quoted) = line.strip_prefix("\"description\": ") {
            doc = unescape(quoted);
        } else if let Some((_, quoted)) = line.split_once("insert(\"description\".into(), ") {
            doc = unescape(quoted.trim_end_matches(".into());"));
        } else if let Some(quoted) = line.strip_prefix("\"type\": ") {
            types.push(unescape(quoted));
        } else if let Some(quoted) = line.strip_prefix("\"format\": ") {
            format = Some(unescape(quoted));
        }
        if let Some(path) = between(line, "subschema_for::<crate::", ">") {
            reference = Some(path.to_owned());
        }
    }
    Property { name, doc, required: false, reference, types, format }
}

fn kind(text: &str) -> Option<[String; 3]> {
    text.find("impl crate::Resource for ")?;
    let value = |key: &str| between(text, &format!("const {key}: &'static str = \""), "\"");
    Some([value("GROUP")?.to_owned(), value("VERSION")?.to_owned(), value("KIND")?.to_owned()])
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    Some(rest.split_once(after)?.0)
}

/// A Rust string literal, with or without the comma behind it.
fn unescape(literal: &str) -> String {
    let literal = literal.trim_end_matches(',');
    let inner = literal.strip_prefix('"').and_then(|l| l.strip_suffix('"')).unwrap_or(literal);
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('r') => out.push('\r'),
            Some('0') => out.push('\0'),
            Some('u') => {
                let digits: String = chars.by_ref().skip(1).take_while(|c| *c != '}').collect();
                out.extend(u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32));
            }
            Some(other) => out.push(other),
            None => {}
        }
    }
    out
}
