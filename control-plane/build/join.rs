//! Joins both crates' views into one table: protobuf structure with flat JSON names.
//!
//! Go embeds structs: protobuf nests them as messages, JSON shows their fields in the outer object.
//! Such a field is marked inline, and its type lists the fields that JSON shows outside.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Failure,
    openapi::{Definition, Property},
    plain,
    proto::{Container, Markers, Message, ProtoField},
};

pub(super) struct Table {
    pub(super) types: Vec<Type>,
    /// Group, version, kind, index into `types`.
    pub(super) kinds: Vec<([String; 3], u16)>,
}

pub(super) struct Type {
    pub(super) name: String,
    pub(super) doc: String,
    pub(super) atomic: bool,
    pub(super) fields: Vec<Field>,
}

pub(super) struct Field {
    /// In JSON; empty for an inline field.
    pub(super) name: String,
    pub(super) doc: String,
    /// 0: not in the protobuf definition.
    pub(super) tag: u16,
    pub(super) element: u8,
    /// Index into `Table::types` where the element is a message.
    pub(super) message: u16,
    pub(super) container: Container,
    pub(super) required: bool,
    pub(super) inline: bool,
    /// A pointer in Go, so that zero and absent differ.
    pub(super) pointer: bool,
    pub(super) markers: Markers,
}

/// Element codes, as `schema::table` reads them.
const MESSAGE: u8 = 6;
const STRING_LIST: u8 = 18;

/// Types with a JSON form of their own.
fn special(path: &str) -> Option<u8> {
    Some(match path.rsplit("::").next()?.to_ascii_lowercase().as_str() {
        "quantity" => 7,
        "intorstring" => 8,
        "time" => 9,
        "microtime" => 10,
        "duration" => 11,
        "rawextension" => 12,
        "fieldsv1" => 13,
        "json" => 14,
        "jsonschemapropsorbool" => 15,
        "jsonschemapropsorarray" => 16,
        "jsonschemapropsorstringarray" => 17,
        "extravalue" | "verbs" => STRING_LIST,
        _ => return None,
    })
}

struct Joiner<'a> {
    messages: BTreeMap<String, &'a Message>,
    /// Type indices by key.
    indices: BTreeMap<String, u16>,
    pointers: BTreeSet<String>,
    inlines: Vec<Type>,
    base: usize,
}

pub(super) fn join(
    definitions: &BTreeMap<String, Definition>,
    messages: &BTreeMap<String, Message>,
    pointers: &str,
) -> Result<Table, Failure> {
    let wanted: Vec<(&String, &Definition)> =
        definitions.iter().filter(|(path, _)| special(path).is_none() && stable(path)).collect();
    let mut indices = BTreeMap::new();
    for (index, (path, _)) in wanted.iter().enumerate() {
        indices.insert(key(path), u16::try_from(index)?);
    }
    let mut joiner = Joiner {
        messages: messages.iter().map(|(path, message)| (key(path), message)).collect(),
        indices,
        pointers: pointer_keys(pointers),
        inlines: Vec::new(),
        base: wanted.len(),
    };
    let mut types = Vec::new();
    let mut kinds = Vec::new();
    for (index, (path, definition)) in wanted.iter().enumerate() {
        types.push(joiner.definition(path, definition)?);
        kinds.extend(definition.kind.clone().map(|kind| (kind, u16::try_from(index).unwrap_or(0))));
    }
    types.append(&mut joiner.inlines);
    Ok(Table { types, kinds })
}

/// Whether the module is a version without alpha or beta.
fn stable(path: &str) -> bool {
    let version = path.rsplit("::").nth(1).unwrap_or_default();
    version.strip_prefix('v').is_some_and(|v| v.chars().all(|c| c.is_ascii_digit()))
}

fn key(path: &str) -> String {
    let (module, name) = path.rsplit_once("::").unwrap_or(("", path));
    format!("{module}::{}", plain(name))
}

/// Lines of `core/v1.PodSpec field field` as `core/v1.podspec.field`.
fn pointer_keys(text: &str) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let (module, name) = words.next().and_then(|w| w.split_once('.')).unwrap_or_default();
        keys.extend(words.map(|field| format!("{module}.{}.{field}", plain(name))));
    }
    keys
}

impl Joiner<'_> {
    fn definition(&mut self, path: &str, definition: &Definition) -> Result<Type, Failure> {
        let properties: BTreeMap<String, &Property> =
            definition.properties.iter().map(|p| (plain(&p.name), p)).collect();
        let message = self.messages.get(&key(path)).copied();
        let mut used = BTreeSet::new();
        let mut fields = match message {
            Some(message) => self.fields(path, message, &properties, &mut used)?,
            None => Vec::new(),
        };
        for (plain, property) in &properties {
            if !used.contains(plain) {
                fields.push(self.json_only(path, property)?);
            }
        }
        fields.sort_by(|a, b| (a.inline, &a.name).cmp(&(b.inline, &b.name)));
        Ok(Type {
            name: definition.name.clone(),
            doc: definition.doc.clone(),
            atomic: message.is_some_and(|m| m.atomic),
            fields,
        })
    }

    fn fields(
        &mut self,
        path: &str,
        message: &Message,
        properties: &BTreeMap<String, &Property>,
        used: &mut BTreeSet<String>,
    ) -> Result<Vec<Field>, Failure> {
        let mut fields = Vec::new();
        for proto in &message.fields {
            if let Some(property) = properties.get(&plain(&proto.name)) {
                used.insert(plain(&proto.name));
                fields.push(self.field(path, proto, property)?);
            } else if proto.scalar == "message" && proto.container == Container::One {
                fields.extend(self.inline(proto, properties, used)?);
            }
        }
        Ok(fields)
    }

    /// A message that JSON shows flat: all its fields are properties of the outer object. Anything else
    /// without a property was removed from the API.
    fn inline(
        &mut self,
        proto: &ProtoField,
        properties: &BTreeMap<String, &Property>,
        used: &mut BTreeSet<String>,
    ) -> Result<Option<Field>, Failure> {
        let inner_key = key(&proto.message);
        let Some(inner) = self.messages.get(&inner_key).copied() else { return Ok(None) };
        if !inner.fields.iter().any(|f| properties.contains_key(&plain(&f.name))) {
            return Ok(None);
        }
        let known = self.indices.get(&inner_key).copied();
        let mut fields = self.fields(&proto.message, inner, properties, used)?;
        let index = match known {
            Some(index) => index,
            None => {
                let index = u16::try_from(self.base + self.inlines.len())?;
                fields.sort_by(|a, b| (a.inline, &a.name).cmp(&(b.inline, &b.name)));
                let name = proto.message.rsplit("::").next().unwrap_or_default().to_owned();
                self.inlines.push(Type { name, doc: String::new(), atomic: inner.atomic, fields });
                self.indices.insert(inner_key, index);
                index
            }
        };
        Ok(Some(Field {
            name: String::new(),
            doc: String::new(),
            tag: proto.tag,
            element: MESSAGE,
            message: index,
            container: Container::One,
            required: false,
            inline: true,
            pointer: false,
            markers: proto.markers.clone(),
        }))
    }

    fn field(&self, path: &str, proto: &ProtoField, property: &Property) -> Result<Field, Failure> {
        let (element, message) = match proto.scalar.as_str() {
            "string" => (0, 0),
            "bytes" => (1, 0),
            "bool" => (2, 0),
            "int32" => (3, 0),
            "int64" => (4, 0),
            "double" => (5, 0),
            "message" => self.reference(&proto.message)?,
            other => return Err(format!("{path}: no element for {other}").into()),
        };
        Ok(Field {
            name: property.name.clone(),
            doc: property.doc.clone(),
            tag: proto.tag,
            element,
            message,
            container: proto.container,
            required: property.required,
            inline: false,
            pointer: self.pointer(path, &property.name),
            markers: proto.markers.clone(),
        })
    }

    /// A field that the protobuf definition does not have: `apiVersion` and `kind`, which travel in the
    /// envelope, and what is newer than the definition.
    fn json_only(&self, path: &str, property: &Property) -> Result<Field, Failure> {
        let types: Vec<&str> = property.types.iter().map(String::as_str).collect();
        let inner = types.last().copied().unwrap_or_default();
        let container = match (types.first().copied(), types.len(), &property.reference) {
            (Some("array"), ..) => Container::List,
            (Some("object"), 2.., _) | (Some("object"), _, Some(_)) => Container::Map,
            _ => Container::One,
        };
        let (element, message) = match (&property.reference, inner, property.format.as_deref()) {
            (Some(reference), ..) => self.reference(reference)?,
            (None, "string", Some("byte")) => (1, 0),
            (None, "string", Some("date-time")) => (9, 0),
            (None, "string", _) if types.len() == 3 => (STRING_LIST, 0),
            (None, "string", _) => (0, 0),
            (None, "boolean", _) => (2, 0),
            (None, "integer", Some("int32")) => (3, 0),
            (None, "integer", _) => (4, 0),
            (None, "number", _) => (5, 0),
            _ => (14, 0),
        };
        Ok(Field {
            name: property.name.clone(),
            doc: property.doc.clone(),
            tag: 0,
            element,
            message,
            container,
            required: property.required,
            inline: false,
            pointer: self.pointer(path, &property.name),
            markers: Markers::default(),
        })
    }

    fn reference(&self, path: &str) -> Result<(u8, u16), Failure> {
        if let Some(element) = special(path) {
            return Ok((element, 0));
        }
        match self.indices.get(&key(path)) {
            Some(index) => Ok((MESSAGE, *index)),
            None => Err(format!("no definition for {path}").into()),
        }
    }

    fn pointer(&self, path: &str, field: &str) -> bool {
        let mut parts = path.rsplit("::");
        let name = plain(parts.next().unwrap_or_default());
        let version = parts.next().unwrap_or_default();
        let group = parts.next().unwrap_or_default();
        self.pointers.contains(&format!("{group}/{version}.{name}.{field}"))
    }
}
