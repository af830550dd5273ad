//! JSON and YAML bodies into objects of a kind: types checked, unknown and duplicate fields found,
//! values brought into the form in which the API returns them. Pure.
//!
//! The form is Go's: nulls are dropped, empty values of optional fields too (unless they are pointers
//! in Go, where zero and absent differ), quantities and times are canonical.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "JSON has six kinds of values and gets no more"
)]

use std::fmt;

use api::quantity::Quantity;
use base64::Engine as _;
use serde_json::{Map, Value};

use super::{
    json,
    table::{Container, Element, Field, Kind, Type},
};

/// The `fieldValidation` of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strictness {
    /// Unknown and duplicate fields are errors.
    #[default]
    Strict,
    /// They become warnings.
    Warn,
    Ignore,
}

/// Why a body is not an object of the kind. Each is a 400 `BadRequest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Not JSON, YAML or protobuf at all.
    Syntax(String),
    /// A value of the wrong type or form; the text is what Go's decoder says.
    Type(String),
    /// `unknown field "spec.foo"`, `duplicate field "spec.replicas"`, …
    Strict(Vec<String>),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(text) | Self::Type(text) => f.write_str(text),
            Self::Strict(found) => write!(f, "strict decoding error: {}", found.join(", ")),
        }
    }
}

impl std::error::Error for DecodeError {}

impl DecodeError {
    /// The message of the `Status`.
    pub fn message(&self, kind: &Kind) -> String {
        match self {
            Self::Syntax(text) => format!(
                "the object provided is unrecognized (must be of type {}): couldn't get version/kind; json parse error: {text}",
                kind.kind
            ),
            Self::Type(_) | Self::Strict(_) => format!(
                "{0} in version {1:?} cannot be handled as a {0}: {self}",
                kind.kind, kind.version
            ),
        }
    }
}

/// `unknown field "spec.foo"` or `duplicate field "spec.replicas"`, for a `Warning` header.
pub type Warning = String;

/// Decodes a JSON body.
///
/// # Errors
/// [`DecodeError`], with every unknown and duplicate field at once.
pub fn json(
    kind: &Kind,
    body: &[u8],
    strictness: Strictness,
) -> Result<(Value, Vec<Warning>), DecodeError> {
    let (parsed, duplicates) = parse_json(body)?;
    finish(kind, parsed, duplicates, strictness)
}

/// Decodes a YAML body (of which JSON is a part).
///
/// # Errors
/// As [`json`].
pub fn yaml(
    kind: &Kind,
    body: &[u8],
    strictness: Strictness,
) -> Result<(Value, Vec<Warning>), DecodeError> {
    let (parsed, duplicates) = parse_yaml(body)?;
    finish(kind, parsed, duplicates, strictness)
}

/// Decodes a value that is parsed already, such as the result of a patch.
///
/// # Errors
/// As [`json`], without duplicates.
pub fn value(
    kind: &Kind,
    value: Value,
    strictness: Strictness,
) -> Result<(Value, Vec<Warning>), DecodeError> {
    finish(kind, value, Vec::new(), strictness)
}

/// Parses a JSON body without a kind, such as a patch. The second part names duplicate keys by path.
///
/// # Errors
/// [`DecodeError::Syntax`].
pub fn parse_json(body: &[u8]) -> Result<(Value, Vec<String>), DecodeError> {
    json::json(body).map_err(|error| DecodeError::Syntax(error.to_string()))
}

/// Parses a YAML or JSON body without a kind, as server-side apply does: nothing is dropped. The second
/// part names duplicate keys by path.
///
/// # Errors
/// [`DecodeError::Syntax`].
pub fn parse_yaml(body: &[u8]) -> Result<(Value, Vec<String>), DecodeError> {
    json::yaml(body).map_err(|error| DecodeError::Syntax(error.to_string()))
}

fn finish(
    kind: &Kind,
    parsed: Value,
    duplicates: Vec<String>,
    strictness: Strictness,
) -> Result<(Value, Vec<Warning>), DecodeError> {
    let mut found: Vec<String> =
        duplicates.into_iter().map(|path| format!("duplicate field {path:?}")).collect();
    let mut walk = Walk { found: &mut found, names: Vec::new(), path: String::new() };
    let object = match parsed {
        Value::Object(map) => Value::Object(walk.object(kind.body, map)?),
        other => {
            let text = format!(
                "json: cannot unmarshal {} into Go value of type {}",
                go_value(&other),
                go_struct(kind.body)
            );
            return Err(DecodeError::Type(text));
        }
    };
    match strictness {
        Strictness::Strict if !found.is_empty() => Err(DecodeError::Strict(found)),
        Strictness::Strict | Strictness::Ignore => Ok((object, Vec::new())),
        Strictness::Warn => Ok((object, found)),
    }
}

struct Walk<'a> {
    found: &'a mut Vec<String>,
    /// The fields from the root on, as Go's errors name them: without indices and map keys.
    names: Vec<&'static str>,
    /// With them, as strict errors name them.
    path: String,
}

/// The struct that is being filled and its field, for errors.
#[derive(Clone, Copy)]
struct Place {
    of: Type,
    field: Field,
}

impl Walk<'_> {
    fn object(
        &mut self,
        of: Type,
        map: Map<String, Value>,
    ) -> Result<Map<String, Value>, DecodeError> {
        let mut out = Map::new();
        for (name, value) in map {
            let length = self.path.len();
            if length > 0 {
                self.path.push('.');
            }
            self.path.push_str(&name);
            match of.field(&name) {
                None => self.found.push(format!("unknown field {:?}", self.path)),
                Some(field) => {
                    self.names.push(field.name());
                    if let Some(value) = self.field(Place { of, field }, value)? {
                        out.insert(name, value);
                    }
                    self.names.pop();
                }
            }
            self.path.truncate(length);
        }
        Ok(out)
    }

    fn field(&mut self, place: Place, value: Value) -> Result<Option<Value>, DecodeError> {
        let value = match (place.field.container(), value) {
            (_, Value::Null) => return Ok(None),
            (Container::One, value) => self.element(place, value)?,
            (Container::List, Value::Array(items)) => {
                let mut out = Vec::with_capacity(items.len());
                for (index, item) in items.into_iter().enumerate() {
                    let length = self.path.len();
                    self.path.push_str(&format!("[{index}]"));
                    out.push(self.item(place, item)?);
                    self.path.truncate(length);
                }
                Value::Array(out)
            }
            (Container::Map, Value::Object(entries)) => {
                let mut out = Map::new();
                for (key, item) in entries {
                    let length = self.path.len();
                    self.path.push('.');
                    self.path.push_str(&key);
                    out.insert(key, self.item(place, item)?);
                    self.path.truncate(length);
                }
                Value::Object(out)
            }
            (Container::List | Container::Map, other) => {
                return Err(self.mismatch(place, &other, &go_type(place.field)));
            }
        };
        Ok(keep(place.field, &value).then_some(value))
    }

    /// An entry of a list or map: a null there is Go's zero value.
    fn item(&mut self, place: Place, value: Value) -> Result<Value, DecodeError> {
        match (value, place.field.element()) {
            (Value::Null, Element::String | Element::Bytes) => Ok(Value::String(String::new())),
            (Value::Null, Element::Object(_)) => Ok(Value::Object(Map::new())),
            (Value::Null, Element::Quantity) => Ok(Value::String("0".into())),
            (value, _) => self.element(place, value),
        }
    }

    fn element(&mut self, place: Place, value: Value) -> Result<Value, DecodeError> {
        let element = place.field.element();
        match (element, value) {
            (Element::Object(of), Value::Object(map)) => Ok(Value::Object(self.object(of, map)?)),
            (Element::String, value @ Value::String(_))
            | (Element::Bool, value @ Value::Bool(_))
            | (Element::IntOrString, value @ Value::String(_))
            | (Element::RawExtension | Element::FieldsV1, value @ Value::Object(_))
            | (Element::JsonSchemaPropsOrBool, value @ Value::Bool(_))
            | (Element::Double, value @ Value::Number(_))
            | (Element::Json, value) => Ok(value),
            (Element::Int32 | Element::IntOrString, Value::Number(number)) => {
                let fits = number.as_i64().is_some_and(|n| i32::try_from(n).is_ok());
                self.integer(place, number, fits)
            }
            (Element::Int64, Value::Number(number)) => {
                let fits = number.as_i64().is_some();
                self.integer(place, number, fits)
            }
            (Element::Quantity, value @ (Value::String(_) | Value::Number(_))) => quantity(&value),
            (Element::Time | Element::MicroTime, Value::String(text)) => {
                time(&text, element == Element::MicroTime)
            }
            (Element::Duration, value @ Value::String(_)) => Ok(value),
            (Element::Bytes, Value::String(text)) => bytes(&text),
            (Element::StringList, Value::Array(items)) if items.iter().all(Value::is_string) => {
                Ok(Value::Array(items))
            }
            (
                Element::JsonSchemaPropsOrBool
                | Element::JsonSchemaPropsOrArray
                | Element::JsonSchemaPropsOrStringArray,
                value,
            ) => self.schema_or(place, value),
            (_, other) => Err(self.mismatch(place, &other, &go_element(element))),
        }
    }

    fn integer(
        &self,
        place: Place,
        number: serde_json::Number,
        fits: bool,
    ) -> Result<Value, DecodeError> {
        if fits {
            return Ok(Value::Number(number));
        }
        let wanted = go_element(place.field.element());
        let wanted = if wanted == "intstr.IntOrString" { "int32".to_owned() } else { wanted };
        Err(self.error(place, &format!("number {number}"), &wanted))
    }

    /// The three unions of CustomResourceDefinition schemas.
    fn schema_or(&mut self, place: Place, value: Value) -> Result<Value, DecodeError> {
        match (place.field.element(), value) {
            (_, Value::Object(map)) => Ok(Value::Object(self.object(place.of, map)?)),
            (Element::JsonSchemaPropsOrArray, Value::Array(items)) => {
                let mut out = Vec::with_capacity(items.len());
                for item in items {
                    match item {
                        Value::Object(map) => out.push(Value::Object(self.object(place.of, map)?)),
                        other => return Err(self.mismatch(place, &other, &go_struct(place.of))),
                    }
                }
                Ok(Value::Array(out))
            }
            (Element::JsonSchemaPropsOrStringArray, Value::Array(items))
                if items.iter().all(Value::is_string) =>
            {
                Ok(Value::Array(items))
            }
            (element, other) => Err(self.mismatch(place, &other, &go_element(element))),
        }
    }

    fn mismatch(&self, place: Place, value: &Value, wanted: &str) -> DecodeError {
        self.error(place, go_value(value), wanted)
    }

    fn error(&self, place: Place, value: &str, wanted: &str) -> DecodeError {
        DecodeError::Type(format!(
            "json: cannot unmarshal {value} into Go struct field {}.{} of type {wanted}",
            place.of.short_name(),
            self.names.join(".")
        ))
    }
}

/// Whether Go would write this value: optional fields that are not pointers leave out their zero.
pub(super) fn keep(field: Field, value: &Value) -> bool {
    if field.required() || field.pointer() {
        return true;
    }
    match value {
        Value::Null => false,
        Value::Bool(value) => *value || field.element() == Element::Json,
        Value::Number(number) => {
            number.as_f64() != Some(0.0)
                || matches!(field.element(), Element::IntOrString | Element::Json)
        }
        Value::String(text) => {
            !text.is_empty() || matches!(field.element(), Element::IntOrString | Element::Json)
        }
        Value::Array(items) => !items.is_empty() || field.container() == Container::One,
        Value::Object(map) => !map.is_empty() || field.container() == Container::One,
    }
}

fn quantity(value: &Value) -> Result<Value, DecodeError> {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match text.parse::<Quantity>() {
        Ok(quantity) => Ok(Value::String(quantity.to_string())),
        Err(error) => Err(DecodeError::Type(error.to_string())),
    }
}

fn bytes(text: &str) -> Result<Value, DecodeError> {
    let engine = base64::engine::general_purpose::STANDARD;
    // Go skips line breaks inside base64.
    let joined: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    match engine.decode(&joined) {
        Ok(_) => Ok(Value::String(joined)),
        Err(base64::DecodeError::InvalidByte(at, _)) => {
            Err(DecodeError::Type(format!("illegal base64 data at input byte {at}")))
        }
        Err(_) => {
            let at = joined.trim_end_matches('=').len();
            Err(DecodeError::Type(format!("illegal base64 data at input byte {at}")))
        }
    }
}

fn time(text: &str, micro: bool) -> Result<Value, DecodeError> {
    let layout =
        if micro { "2006-01-02T15:04:05.000000Z07:00" } else { "2006-01-02T15:04:05Z07:00" };
    let well_formed = text.as_bytes().get(10) == Some(&b'T');
    if let Some((rest, wanted)) = not_micro(text)
        && micro
        && well_formed
        && text.parse::<jiff::Timestamp>().is_ok()
    {
        return Err(DecodeError::Type(format!(
            "parsing time {text:?} as {layout:?}: cannot parse {rest:?} as {wanted:?}"
        )));
    }
    match text.parse::<jiff::Timestamp>() {
        Ok(at) if well_formed => Ok(Value::String(print_time(at, micro))),
        _ => Err(DecodeError::Type(format!(
            "parsing time {text:?} as {layout:?}: cannot parse {text:?} as \"2006\""
        ))),
    }
}

/// Where a time does not have six digits behind its seconds, and what Go looks for there.
fn not_micro(text: &str) -> Option<(&str, &'static str)> {
    let rest = text.get("2006-01-02T15:04:05".len()..)?;
    let six = rest.strip_prefix('.').and_then(|digits| digits.split_at_checked(6));
    match six.filter(|(digits, _)| digits.bytes().all(|byte| byte.is_ascii_digit())) {
        None => Some((rest, ".000000")),
        Some((_, zone)) if zone.starts_with(|c: char| c.is_ascii_digit()) => Some((zone, "Z07:00")),
        Some(_) => None,
    }
}

/// `meta/v1` `Time` (seconds) or `MicroTime` (six digits).
pub fn print_time(at: jiff::Timestamp, micro: bool) -> String {
    let format = if micro { "%Y-%m-%dT%H:%M:%S.%6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    at.strftime(format).to_string()
}

pub fn go_value(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn go_type(field: Field) -> String {
    match field.container() {
        Container::One => go_element(field.element()),
        Container::List => format!("[]{}", go_element(field.element())),
        Container::Map => format!("map[string]{}", go_element(field.element())),
    }
}

/// `v1.PodSpec`.
fn go_struct(of: Type) -> String {
    let mut parts = of.name().rsplit('.');
    let name = parts.next().unwrap_or_default();
    format!("{}.{name}", parts.next().unwrap_or("v1"))
}

fn go_element(element: Element) -> String {
    match element {
        Element::String => "string",
        Element::Bytes => "[]uint8",
        Element::Bool => "bool",
        Element::Int32 => "int32",
        Element::Int64 => "int64",
        Element::Double => "float64",
        Element::Object(of) => return go_struct(of),
        Element::Quantity => "resource.Quantity",
        Element::IntOrString => "intstr.IntOrString",
        Element::Time => "v1.Time",
        Element::MicroTime => "v1.MicroTime",
        Element::Duration => "v1.Duration",
        Element::RawExtension => "runtime.RawExtension",
        Element::FieldsV1 => "v1.FieldsV1",
        Element::Json => "v1.JSON",
        Element::JsonSchemaPropsOrBool => "v1.JSONSchemaPropsOrBool",
        Element::JsonSchemaPropsOrArray => "v1.JSONSchemaPropsOrArray",
        Element::JsonSchemaPropsOrStringArray => "v1.JSONSchemaPropsOrStringArray",
        Element::StringList => "[]string",
    }
    .to_owned()
}
