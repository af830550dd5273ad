//! Reads the table that `build.rs` wrote. Pure. The table is used in place from the program's
//! read-only data: nothing is parsed at start, and handles are indices.

use std::{borrow::Cow, io::Read as _};

/// Written by `build/emit.rs`, which describes the layout.
static TABLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));
/// The deflated texts of types and fields.
static DOCS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/docs.bin"));

const HEADER: usize = 20;
const TYPE_ROW: usize = 16;
const FIELD_ROW: usize = 24;
const KIND_ROW: usize = 16;

/// An object type of the API, such as `io.k8s.api.core.v1.PodSpec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Type(u16);

/// A field of a [`Type`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Field(u16);

/// What a field holds, seen without its list or map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    String,
    /// Base64 in JSON.
    Bytes,
    Bool,
    Int32,
    Int64,
    Double,
    Object(Type),
    Quantity,
    IntOrString,
    /// RFC 3339 with seconds.
    Time,
    /// RFC 3339 with microseconds.
    MicroTime,
    /// As Go prints durations.
    Duration,
    /// An object of any kind.
    RawExtension,
    /// A set of fields in the form of `managedFields`.
    FieldsV1,
    /// Any JSON value.
    Json,
    JsonSchemaPropsOrBool,
    JsonSchemaPropsOrArray,
    JsonSchemaPropsOrStringArray,
    /// A list of strings that protobuf wraps in a message.
    StringList,
}

/// How many of the element a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Container {
    One,
    List,
    /// With strings as keys.
    Map,
}

/// How server-side apply sees a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListType {
    /// Owned and replaced as a whole.
    Atomic,
    /// Of unique scalars.
    Set,
    /// Of objects told apart by [`Field::list_keys`].
    Map,
}

/// A resource's or request's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub body: Type,
}

impl Kind {
    /// `apps/v1`, or `v1` for the core group.
    pub fn api_version(&self) -> Cow<'static, str> {
        if self.group.is_empty() {
            Cow::Borrowed(self.version)
        } else {
            Cow::Owned(format!("{}/{}", self.group, self.version))
        }
    }
}

/// All kinds of the table.
pub fn kinds() -> impl Iterator<Item = Kind> {
    let start = HEADER + header(0) * TYPE_ROW + header(1) * FIELD_ROW;
    (0..header(2)).map(move |index| {
        let row = start + index * KIND_ROW;
        Kind {
            group: string(word(TABLE, row)),
            version: string(word(TABLE, row + 4)),
            kind: string(word(TABLE, row + 8)),
            body: Type(half(TABLE, row + 12)),
        }
    })
}

/// All types of the table, inline ones included.
pub fn types() -> impl Iterator<Item = Type> {
    (0..header(0)).filter_map(|index| u16::try_from(index).ok()).map(Type)
}

impl Type {
    fn row(self) -> usize {
        HEADER + usize::from(self.0) * TYPE_ROW
    }

    /// The definition's name, such as `io.k8s.api.core.v1.PodSpec`. A type that only groups inline
    /// fields has no dots in it.
    pub fn name(self) -> &'static str {
        string(word(TABLE, self.row()))
    }

    /// The last part of the name.
    pub fn short_name(self) -> &'static str {
        self.name().rsplit('.').next().unwrap_or_default()
    }

    /// Whether server-side apply replaces it as a whole.
    pub fn atomic(self) -> bool {
        TABLE.get(self.row() + 12).is_some_and(|flag| *flag == 1)
    }

    /// The fields as protobuf has them: with inline messages as one field.
    pub fn own_fields(self) -> impl Iterator<Item = Field> {
        let start = half(TABLE, self.row() + 8);
        (start..start.saturating_add(half(TABLE, self.row() + 10))).map(Field)
    }

    /// The fields as JSON has them, in order of their names.
    pub fn fields(self) -> Vec<Field> {
        let mut fields = Vec::new();
        self.flatten(&mut fields);
        fields.sort_by_key(|field| field.name());
        fields
    }

    fn flatten(self, into: &mut Vec<Field>) {
        for field in self.own_fields() {
            match (field.inline(), field.element()) {
                (true, Element::Object(inner)) => inner.flatten(into),
                _ => into.push(field),
            }
        }
    }

    /// The field of this name in JSON.
    pub fn field(self, name: &str) -> Option<Field> {
        self.own_fields().find_map(|field| match (field.inline(), field.element()) {
            (true, Element::Object(inner)) => inner.field(name),
            (true, _) => None,
            (false, _) => (field.name() == name).then_some(field),
        })
    }

    /// The field with this protobuf tag.
    pub fn tagged(self, tag: u32) -> Option<Field> {
        self.own_fields().find(|field| u32::from(field.tag()) == tag)
    }
}

impl Field {
    fn row(self) -> usize {
        HEADER + header(0) * TYPE_ROW + usize::from(self.0) * FIELD_ROW
    }

    fn flag(self, bit: u16) -> bool {
        half(TABLE, self.row() + 22) & (1 << bit) != 0
    }

    /// In JSON; empty for an inline message.
    pub fn name(self) -> &'static str {
        string(word(TABLE, self.row()))
    }

    /// 0: protobuf does not carry it.
    pub fn tag(self) -> u16 {
        half(TABLE, self.row() + 16)
    }

    pub fn element(self) -> Element {
        match TABLE.get(self.row() + 20).copied().unwrap_or_default() {
            0 => Element::String,
            1 => Element::Bytes,
            2 => Element::Bool,
            3 => Element::Int32,
            4 => Element::Int64,
            5 => Element::Double,
            6 => Element::Object(Type(half(TABLE, self.row() + 18))),
            7 => Element::Quantity,
            8 => Element::IntOrString,
            9 => Element::Time,
            10 => Element::MicroTime,
            11 => Element::Duration,
            12 => Element::RawExtension,
            13 => Element::FieldsV1,
            15 => Element::JsonSchemaPropsOrBool,
            16 => Element::JsonSchemaPropsOrArray,
            17 => Element::JsonSchemaPropsOrStringArray,
            18 => Element::StringList,
            _ => Element::Json,
        }
    }

    pub fn container(self) -> Container {
        match TABLE.get(self.row() + 21) {
            Some(1) => Container::List,
            Some(2) => Container::Map,
            _ => Container::One,
        }
    }

    /// Whether OpenAPI calls it required (Go always writes it).
    pub fn required(self) -> bool {
        self.flag(0)
    }

    /// A message whose fields JSON shows in the outer object.
    pub fn inline(self) -> bool {
        self.flag(1)
    }

    /// A scalar behind a pointer in Go, so that zero and absent differ.
    pub fn pointer(self) -> bool {
        self.flag(2)
    }

    pub fn list_type(self) -> ListType {
        match half(TABLE, self.row() + 22) >> 3 & 3 {
            1 => ListType::Set,
            2 => ListType::Map,
            _ => ListType::Atomic,
        }
    }

    /// The keys of a list of [`ListType::Map`].
    pub fn list_keys(self) -> impl Iterator<Item = &'static str> {
        string(word(TABLE, self.row() + 8)).split(',').filter(|key| !key.is_empty())
    }

    /// Strategic merge patch merges the list instead of replacing it.
    pub fn patch_merge(self) -> bool {
        self.flag(5)
    }

    /// Strategic merge patch replaces the object or map instead of merging it.
    pub fn patch_replace(self) -> bool {
        self.flag(6)
    }

    /// Strategic merge patch clears the fields that `$retainKeys` does not name.
    pub fn patch_retain_keys(self) -> bool {
        self.flag(7)
    }

    /// The key by which strategic merge patch tells a list's objects apart; empty for scalars.
    pub fn patch_merge_key(self) -> &'static str {
        string(word(TABLE, self.row() + 12))
    }

    /// A map or object that server-side apply replaces as a whole.
    pub fn atomic(self) -> bool {
        self.flag(8)
    }
}

/// What the table was made of, for hashes of what is made from it.
pub(crate) fn fingerprint() -> [&'static [u8]; 2] {
    [TABLE, DOCS]
}

/// The texts of types and fields, inflated. About a megabyte: made for one request and dropped.
#[derive(Debug)]
pub struct Docs(Vec<u8>);

impl Docs {
    pub fn inflate() -> Self {
        let mut bytes = Vec::with_capacity(header(4));
        let limit = u64::try_from(header(4)).unwrap_or(u64::MAX);
        let read = flate2::read::ZlibDecoder::new(DOCS).take(limit).read_to_end(&mut bytes);
        read.expect("build.rs deflated it");
        Self(bytes)
    }

    pub fn of_type(&self, of: Type) -> &str {
        text(&self.0, word(TABLE, of.row() + 4))
    }

    pub fn of_field(&self, of: Field) -> &str {
        text(&self.0, word(TABLE, of.row() + 4))
    }
}

fn header(index: usize) -> usize {
    word(TABLE, index * 4)
}

fn word(table: &[u8], at: usize) -> usize {
    let bytes = table.get(at..at + 4).and_then(|b| b.try_into().ok()).unwrap_or_default();
    usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
}

fn half(table: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(table.get(at..at + 2).and_then(|b| b.try_into().ok()).unwrap_or_default())
}

fn string(at: usize) -> &'static str {
    let pool = HEADER + header(0) * TYPE_ROW + header(1) * FIELD_ROW + header(2) * KIND_ROW;
    text(TABLE, pool + at)
}

fn text(pool: &[u8], at: usize) -> &str {
    let length = usize::from(half(pool, at));
    let bytes = pool.get(at + 2..at + 2 + length).unwrap_or_default();
    std::str::from_utf8(bytes).unwrap_or_default()
}
