//! Objects into protobuf, with tags in ascending order as upstream writes them. Pure.

use base64::Engine as _;
use serde_json::{Map, Value};

use super::MAGIC;
use crate::schema::table::{Container, Element, Field, Kind, Type};

/// Encodes an object, envelope included.
pub fn encode(kind: &Kind, object: &Value) -> Vec<u8> {
    let mut raw = Vec::new();
    if let Some(map) = object.as_object() {
        write_message(kind.body, map, &mut raw);
    }
    wrap(&kind.api_version(), kind.kind, &raw)
}

/// Encodes a list of objects of one kind, envelope included. `metadata` is the list's.
pub fn encode_list(kind: &Kind, metadata: &Value, items: &[&Value]) -> Vec<u8> {
    let mut raw = Vec::new();
    let list_meta = crate::schema::type_named("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta");
    if let (Some(of), Some(map)) = (list_meta, metadata.as_object()) {
        let mut inner = Vec::new();
        write_message(of, map, &mut inner);
        put_bytes(&mut raw, 1, &inner);
    }
    for item in items {
        let mut inner = Vec::new();
        if let Some(map) = item.as_object() {
            write_message(kind.body, map, &mut inner);
        }
        put_bytes(&mut raw, 2, &inner);
    }
    wrap(&kind.api_version(), &format!("{}List", kind.kind), &raw)
}

fn wrap(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let mut meta = Vec::new();
    put_bytes(&mut meta, 1, api_version.as_bytes());
    put_bytes(&mut meta, 2, kind.as_bytes());
    let mut out = Vec::with_capacity(raw.len() + 64);
    out.extend_from_slice(MAGIC);
    put_bytes(&mut out, 1, &meta);
    put_bytes(&mut out, 2, raw);
    // Upstream writes the two empty strings of the envelope as well.
    put_bytes(&mut out, 3, b"");
    put_bytes(&mut out, 4, b"");
    out
}

fn write_message(of: Type, map: &Map<String, Value>, out: &mut Vec<u8>) {
    let mut fields: Vec<Field> = of.own_fields().filter(|field| field.tag() != 0).collect();
    fields.sort_by_key(|field| field.tag());
    for field in fields {
        let tag = u32::from(field.tag());
        if field.inline() {
            if let Element::Object(inner) = field.element() {
                let mut bytes = Vec::new();
                write_message(inner, map, &mut bytes);
                if !bytes.is_empty() {
                    put_bytes(out, tag, &bytes);
                }
            }
            continue;
        }
        match (field.container(), map.get(field.name())) {
            (_, None | Some(Value::Null)) => {}
            (Container::List, Some(Value::Array(items))) => {
                for item in items {
                    write_element(of, field, item, (tag, out));
                }
            }
            (Container::Map, Some(Value::Object(entries))) => {
                for (key, value) in entries {
                    let mut entry = Vec::new();
                    put_bytes(&mut entry, 1, key.as_bytes());
                    write_element(of, field, value, (2, &mut entry));
                    put_bytes(out, tag, &entry);
                }
            }
            (_, Some(value)) => write_element(of, field, value, (tag, out)),
        }
    }
}

fn write_element(of: Type, field: Field, value: &Value, (tag, out): (u32, &mut Vec<u8>)) {
    let mut inner = Vec::new();
    match (field.element(), value) {
        (Element::Bool, Value::Bool(value)) => return put_number(out, tag, u64::from(*value)),
        (Element::Int32 | Element::Int64, Value::Number(number)) => {
            return put_number(out, tag, number.as_i64().unwrap_or_default().cast_unsigned());
        }
        (Element::Double, Value::Number(number)) => {
            put_varint(out, u64::from(tag) << 3 | 1);
            return out.extend(number.as_f64().unwrap_or_default().to_le_bytes());
        }
        (Element::String, Value::String(text)) => inner.extend(text.as_bytes()),
        (Element::Bytes, Value::String(text)) => {
            let decoded = base64::engine::general_purpose::STANDARD.decode(text);
            inner = decoded.unwrap_or_default();
        }
        (Element::Object(of), Value::Object(map)) => write_message(of, map, &mut inner),
        (Element::Quantity, Value::String(text)) => put_bytes(&mut inner, 1, text.as_bytes()),
        (Element::IntOrString, Value::Number(number)) => {
            put_number(&mut inner, 1, 0);
            let number = number.as_i64().unwrap_or_default();
            put_number(&mut inner, 2, number.cast_unsigned());
            put_bytes(&mut inner, 3, b"");
        }
        (Element::IntOrString, Value::String(text)) => {
            put_number(&mut inner, 1, 1);
            put_number(&mut inner, 2, 0);
            put_bytes(&mut inner, 3, text.as_bytes());
        }
        (Element::Time | Element::MicroTime, Value::String(text)) => {
            if let Ok(at) = text.parse::<jiff::Timestamp>() {
                put_number(&mut inner, 1, at.as_second().cast_unsigned());
                let nanos = i64::from(at.subsec_nanosecond());
                put_number(&mut inner, 2, nanos.cast_unsigned());
            }
        }
        (Element::RawExtension | Element::FieldsV1 | Element::Json, value) => {
            put_bytes(&mut inner, 1, value.to_string().as_bytes());
        }
        (Element::StringList, Value::Array(items)) => {
            for item in items.iter().filter_map(Value::as_str) {
                put_bytes(&mut inner, 1, item.as_bytes());
            }
        }
        (element, value) => write_union(of, element, value, &mut inner),
    }
    put_bytes(out, tag, &inner);
}

/// The three unions of CustomResourceDefinition schemas.
fn write_union(of: Type, element: Element, value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Bool(allows) => put_number(out, 1, u64::from(*allows)),
        Value::Object(map) => {
            let mut inner = Vec::new();
            write_message(of, map, &mut inner);
            let tag = if element == Element::JsonSchemaPropsOrBool { 2 } else { 1 };
            put_bytes(out, tag, &inner);
        }
        Value::Array(items) => {
            for item in items {
                match item {
                    Value::String(text) => put_bytes(out, 2, text.as_bytes()),
                    Value::Object(map) => {
                        let mut inner = Vec::new();
                        write_message(of, map, &mut inner);
                        put_bytes(out, 2, &inner);
                    }
                    Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {}
                }
            }
        }
        Value::Null | Value::Number(_) | Value::String(_) => {}
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap_or_default() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap_or_default());
}

fn put_number(out: &mut Vec<u8>, tag: u32, value: u64) {
    put_varint(out, u64::from(tag) << 3);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    put_varint(out, u64::from(tag) << 3 | 2);
    put_varint(out, u64::try_from(bytes.len()).unwrap_or_default());
    out.extend_from_slice(bytes);
}
