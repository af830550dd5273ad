//! Kubernetes' protobuf form: the `k8s\0` envelope and the objects in it, both ways. Pure. Decoding is here,
//! encoding in `encode`.
//!
//! `kubectl` 1.32 and newer sends its writes this way. Decoded objects have the same form as those from
//! [`super::decode`]. Fields that the table has no tag for are skipped, as protobuf does.

use std::fmt;

use base64::Engine as _;
use serde_json::{Map, Value};

use super::{
    decode::{keep, print_time},
    kind_of,
    table::{Container, Element, Field, Kind, Type},
};

mod encode;

pub use encode::{encode, encode_list};

/// What precedes every object.
pub const MAGIC: &[u8] = b"k8s\0";
/// The media type of bodies in this form.
pub const CONTENT_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// Nesting of messages that is followed; the deepest real one (CustomResourceDefinition schemas) stays
/// well below, and a body cannot exhaust the stack.
const MAX_DEPTH: usize = 64;

/// Why a body is not an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    #[error(
        "provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]"
    )]
    NoMagic,
    #[error("unexpected EOF")]
    Truncated,
    #[error("proto: integer overflow")]
    Overflow,
    #[error("proto: illegal wireType {0}")]
    WireType(u64),
    #[error("proto: nesting exceeds {MAX_DEPTH} levels")]
    Depth,
    #[error("proto: invalid UTF-8 in field {0}")]
    Utf8(&'static str),
    #[error("proto: field {0} is not valid: {1}")]
    Value(&'static str, String),
    #[error("no kind {kind:?} is registered for version {api_version:?}")]
    UnknownKind { api_version: String, kind: String },
}

/// An envelope, opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub api_version: String,
    pub kind: String,
    pub raw: &'a [u8],
}

/// Opens the envelope without looking into the object.
///
/// # Errors
/// [`ProtoError`] where it is none.
pub fn envelope(body: &[u8]) -> Result<Envelope<'_>, ProtoError> {
    let body = body.strip_prefix(MAGIC).ok_or(ProtoError::NoMagic)?;
    let mut out = Envelope { api_version: String::new(), kind: String::new(), raw: &[] };
    let mut reader = Reader(body);
    while let Some((tag, wire)) = reader.next()? {
        match (tag, wire) {
            (1, Wire::Bytes(meta)) => {
                let mut meta = Reader(meta);
                while let Some((tag, wire)) = meta.next()? {
                    match (tag, wire) {
                        (1, Wire::Bytes(text)) => out.api_version = utf8(text, "apiVersion")?,
                        (2, Wire::Bytes(text)) => out.kind = utf8(text, "kind")?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(raw)) => out.raw = raw,
            _ => {}
        }
    }
    Ok(out)
}

/// Decodes a body into its kind and object.
///
/// # Errors
/// [`ProtoError`].
pub fn decode(body: &[u8]) -> Result<(Kind, Value), ProtoError> {
    let envelope = envelope(body)?;
    let kind =
        kind_of(&envelope.api_version, &envelope.kind).ok_or_else(|| ProtoError::UnknownKind {
            api_version: envelope.api_version.clone(),
            kind: envelope.kind.clone(),
        })?;
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), envelope.api_version.into());
    object.insert("kind".to_owned(), envelope.kind.into());
    message(kind.body, envelope.raw, &mut object, 0)?;
    Ok((kind, Value::Object(object)))
}

enum Wire<'a> {
    Number(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Option<(u32, Wire<'a>)>, ProtoError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let tag = u32::try_from(key >> 3).map_err(|_wide| ProtoError::Overflow)?;
        let wire = match key & 7 {
            0 => Wire::Number(self.varint()?),
            1 => {
                let bytes = self.take(8)?;
                Wire::Fixed64(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
            }
            2 => {
                let length = self.varint()?;
                let length = usize::try_from(length).map_err(|_wide| ProtoError::Overflow)?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Wire::Number(u32::from_le_bytes(bytes.try_into().unwrap_or_default()).into())
            }
            other => return Err(ProtoError::WireType(other)),
        };
        Ok(Some((tag, wire)))
    }

    fn varint(&mut self) -> Result<u64, ProtoError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(ProtoError::Truncated)?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ProtoError::Overflow)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], ProtoError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(ProtoError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }
}

fn utf8(bytes: &[u8], field: &'static str) -> Result<String, ProtoError> {
    std::str::from_utf8(bytes).map(ToOwned::to_owned).map_err(|_bad| ProtoError::Utf8(field))
}

fn message(
    of: Type,
    bytes: &[u8],
    into: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtoError> {
    if depth > MAX_DEPTH {
        return Err(ProtoError::Depth);
    }
    let mut reader = Reader(bytes);
    while let Some((tag, wire)) = reader.next()? {
        let Some(field) = of.tagged(tag) else { continue };
        if field.inline() {
            if let (Element::Object(inner), Wire::Bytes(bytes)) = (field.element(), wire) {
                message(inner, bytes, into, depth + 1)?;
            }
            continue;
        }
        match field.container() {
            Container::One => {
                if let Some(value) = element(of, field, wire, depth)?
                    && keep(field, &value)
                {
                    into.insert(field.name().to_owned(), value);
                }
            }
            Container::List => list(of, field, wire, (into, depth))?,
            Container::Map => {
                if let Wire::Bytes(bytes) = wire {
                    let (key, value) = entry(of, field, bytes, depth)?;
                    let map = into.entry(field.name()).or_insert_with(|| Value::Object(Map::new()));
                    if let (Some(map), Some(value)) = (map.as_object_mut(), value) {
                        map.insert(key, value);
                    }
                }
            }
        }
    }
    Ok(())
}

fn list(
    of: Type,
    field: Field,
    wire: Wire<'_>,
    (into, depth): (&mut Map<String, Value>, usize),
) -> Result<(), ProtoError> {
    let mut items = Vec::new();
    match (field.element(), wire) {
        // Numbers may be packed.
        (Element::Int32 | Element::Int64 | Element::Bool, Wire::Bytes(packed)) => {
            let mut reader = Reader(packed);
            while !reader.0.is_empty() {
                let number = Wire::Number(reader.varint()?);
                items.extend(element(of, field, number, depth)?);
            }
        }
        (_, wire) => items.extend(element(of, field, wire, depth)?),
    }
    let list = into.entry(field.name()).or_insert_with(|| Value::Array(Vec::new()));
    if let Some(list) = list.as_array_mut() {
        list.append(&mut items);
    }
    Ok(())
}

fn entry(
    of: Type,
    field: Field,
    bytes: &[u8],
    depth: usize,
) -> Result<(String, Option<Value>), ProtoError> {
    let mut key = String::new();
    let mut value = None;
    let mut reader = Reader(bytes);
    while let Some((tag, wire)) = reader.next()? {
        match (tag, wire) {
            (1, Wire::Bytes(text)) => key = utf8(text, field.name())?,
            (2, wire) => value = element(of, field, wire, depth)?,
            _ => {}
        }
    }
    // An absent value is the zero one.
    let value = match (value, field.element()) {
        (None, Element::String | Element::Bytes) => Some(Value::String(String::new())),
        (None, Element::Object(_)) => Some(Value::Object(Map::new())),
        (value, _) => value,
    };
    Ok((key, value))
}

/// One value. Nothing where the wire type does not fit, and for a time that is not set.
fn element(
    of: Type,
    field: Field,
    wire: Wire<'_>,
    depth: usize,
) -> Result<Option<Value>, ProtoError> {
    Ok(match (field.element(), wire) {
        (Element::Bool, Wire::Number(number)) => Some(Value::Bool(number != 0)),
        (Element::Int32, Wire::Number(number)) => {
            // A negative int32 travels as ten bytes; the low half is the number.
            let low = u32::try_from(number & u64::from(u32::MAX)).unwrap_or_default();
            Some(low.cast_signed().into())
        }
        (Element::Int64, Wire::Number(number)) => Some(number.cast_signed().into()),
        (Element::Double, Wire::Fixed64(bits)) => {
            serde_json::Number::from_f64(f64::from_bits(bits)).map(Value::Number)
        }
        (Element::String, Wire::Bytes(text)) => Some(utf8(text, field.name())?.into()),
        (Element::Bytes, Wire::Bytes(bytes)) => {
            Some(base64::engine::general_purpose::STANDARD.encode(bytes).into())
        }
        (Element::Object(inner), Wire::Bytes(bytes)) => {
            let mut map = Map::new();
            message(inner, bytes, &mut map, depth + 1)?;
            Some(Value::Object(map))
        }
        (_, Wire::Bytes(bytes)) => special(of, field, bytes, depth)?,
        (_, Wire::Number(_) | Wire::Fixed64(_)) => None,
    })
}

/// A message with a JSON form of its own, by tag.
#[derive(Default)]
struct Parts<'a> {
    texts: Vec<(u32, &'a [u8])>,
    /// The last number of the tags below 4.
    numbers: [u64; 4],
    schemas: Vec<Value>,
}

impl<'a> Parts<'a> {
    fn read(of: Type, field: Field, bytes: &'a [u8], depth: usize) -> Result<Self, ProtoError> {
        let mut parts = Self::default();
        let mut reader = Reader(bytes);
        while let Some((tag, wire)) = reader.next()? {
            match (wire, field.element()) {
                (
                    Wire::Bytes(bytes),
                    Element::JsonSchemaPropsOrBool | Element::JsonSchemaPropsOrArray,
                ) => parts.schemas.push(schema(of, bytes, depth)?),
                (Wire::Bytes(bytes), Element::JsonSchemaPropsOrStringArray) if tag == 1 => {
                    parts.schemas.push(schema(of, bytes, depth)?);
                }
                (Wire::Bytes(bytes), _) => parts.texts.push((tag, bytes)),
                (Wire::Number(number), _) => {
                    let slot = usize::try_from(tag).unwrap_or_default();
                    if let Some(slot) = parts.numbers.get_mut(slot) {
                        *slot = number;
                    }
                }
                (Wire::Fixed64(_), _) => {}
            }
        }
        Ok(parts)
    }

    fn text(&self, tag: u32, field: &'static str) -> Result<String, ProtoError> {
        utf8(self.bytes(tag), field)
    }

    fn bytes(&self, tag: u32) -> &'a [u8] {
        self.texts.iter().find(|(t, _)| *t == tag).map_or(&[], |(_, bytes)| bytes)
    }

    fn strings(&self, field: &'static str) -> Result<Value, ProtoError> {
        let items = self.texts.iter().map(|(_, bytes)| utf8(bytes, field).map(Value::String));
        Ok(Value::Array(items.collect::<Result<_, _>>()?))
    }

    fn json(&self, field: &'static str) -> Result<Option<Value>, ProtoError> {
        let bytes = self.bytes(1);
        if bytes.is_empty() {
            return Ok(None);
        }
        let parsed = crate::schema::json::json(bytes);
        Ok(Some(parsed.map_err(|error| ProtoError::Value(field, error.to_string()))?.0))
    }
}

/// The messages with a JSON form of their own.
fn special(
    of: Type,
    field: Field,
    bytes: &[u8],
    depth: usize,
) -> Result<Option<Value>, ProtoError> {
    let name = field.name();
    let mut parts = Parts::read(of, field, bytes, depth)?;
    Ok(match field.element() {
        Element::Quantity => Some(quantity(name, parts.text(1, name)?)?),
        Element::IntOrString if parts.numbers[1] == 1 => Some(parts.text(3, name)?.into()),
        Element::IntOrString => {
            let low = u32::try_from(parts.numbers[2] & u64::from(u32::MAX)).unwrap_or_default();
            Some(low.cast_signed().into())
        }
        Element::Time | Element::MicroTime if bytes.is_empty() => None,
        Element::Time | Element::MicroTime => Some(time(name, field.element(), parts.numbers)?),
        Element::RawExtension | Element::FieldsV1 | Element::Json => parts.json(name)?,
        Element::Duration => Some(format!("{}ns", parts.numbers[1].cast_signed()).into()),
        Element::StringList => Some(parts.strings(name)?),
        Element::JsonSchemaPropsOrBool => {
            Some(parts.schemas.pop().unwrap_or(Value::Bool(parts.numbers[1] != 0)))
        }
        Element::JsonSchemaPropsOrArray if parts.schemas.len() == 1 => parts.schemas.pop(),
        Element::JsonSchemaPropsOrArray => Some(Value::Array(parts.schemas)),
        Element::JsonSchemaPropsOrStringArray if !parts.schemas.is_empty() => parts.schemas.pop(),
        Element::JsonSchemaPropsOrStringArray => Some(parts.strings(name)?),
        Element::String
        | Element::Bytes
        | Element::Bool
        | Element::Int32
        | Element::Int64
        | Element::Double
        | Element::Object(_) => None,
    })
}

/// The nested schema of a union, which stands in the type that holds the union.
fn schema(of: Type, bytes: &[u8], depth: usize) -> Result<Value, ProtoError> {
    let mut map = Map::new();
    message(of, bytes, &mut map, depth + 1)?;
    Ok(Value::Object(map))
}

fn quantity(name: &'static str, text: String) -> Result<Value, ProtoError> {
    let text = if text.is_empty() { "0".to_owned() } else { text };
    match text.parse::<api::quantity::Quantity>() {
        Ok(quantity) => Ok(Value::String(quantity.to_string())),
        Err(error) => Err(ProtoError::Value(name, error.to_string())),
    }
}

fn time(name: &'static str, element: Element, numbers: [u64; 4]) -> Result<Value, ProtoError> {
    let nanos = i32::try_from(numbers[2]).unwrap_or_default();
    let at = jiff::Timestamp::new(numbers[1].cast_signed(), nanos);
    let at = at.map_err(|error| ProtoError::Value(name, error.to_string()))?;
    Ok(Value::String(print_time(at, element == Element::MicroTime)))
}

/// For messages about a body that was refused.
impl fmt::Display for Envelope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, Kind={}", self.api_version, self.kind)
    }
}
