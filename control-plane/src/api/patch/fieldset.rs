//! Sets of fields, as `managedFields` writes them (`fieldsV1`), and the walk over an object that yields
//! them. Pure.
//!
//! A path is a chain of elements in their written form: `f:name` for a field or map key, `k:{…}` for an
//! entry of a list told apart by keys, `v:…` for one of a set.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Map, Value};

use crate::schema::{Container, Element, Field, ListType, Type};

/// A set of fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet {
    children: BTreeMap<String, Node>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    /// Whether the path that ends here is in the set.
    member: bool,
    below: FieldSet,
}

impl FieldSet {
    /// Reads the `fieldsV1` form; what is no object in it is ignored.
    pub fn from_json(value: &Value) -> Self {
        let mut children = BTreeMap::new();
        for (element, inner) in value.as_object().into_iter().flatten() {
            if element == "." {
                continue;
            }
            let below = Self::from_json(inner);
            let member = below.children.is_empty() || inner.get(".").is_some();
            children.insert(element.clone(), Node { member, below });
        }
        Self { children }
    }

    /// The `fieldsV1` form.
    pub fn to_json(&self) -> Value {
        let entries = self.children.iter().map(|(element, node)| {
            let mut inner = node.below.to_json();
            if node.member
                && !node.below.is_empty()
                && let Some(map) = inner.as_object_mut()
            {
                map.insert(".".to_owned(), Value::Object(Map::new()));
            }
            (element.clone(), inner)
        });
        Value::Object(entries.collect())
    }

    pub fn is_empty(&self) -> bool {
        self.children.is_empty()
    }

    /// What is below an element; nothing where the set has no path through it.
    pub(super) fn below(&self, element: &str) -> Option<&Self> {
        self.children.get(element).map(|node| &node.below)
    }

    pub(super) fn elements(&self) -> impl Iterator<Item = &str> {
        self.children.keys().map(String::as_str)
    }

    pub(super) fn insert(&mut self, element: String) {
        self.children.entry(element).or_default().member = true;
    }

    /// The set below an element, made if need be.
    pub(super) fn descend(&mut self, element: String) -> &mut Self {
        &mut self.children.entry(element).or_default().below
    }

    pub(super) fn remove(&mut self, element: &str) {
        self.children.remove(element);
    }

    /// Refuses an entry of the list at `path` that the set already has; in upstream's words
    /// (`typed/validate.go` of structured-merge-diff).
    fn refuse_second(&self, element: &str, path: &str) -> Result<(), String> {
        if self.children.contains_key(element) {
            return Err(format!("{path}: duplicate entries for key {}", shown(element)));
        }
        Ok(())
    }

    /// Drops paths that lead to nothing.
    pub(super) fn trim(&mut self) {
        self.children.retain(|_, node| {
            node.below.trim();
            node.member || !node.below.is_empty()
        });
    }

    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        for (element, theirs) in &other.children {
            let ours = out.children.entry(element.clone()).or_default();
            ours.member |= theirs.member;
            ours.below = ours.below.union(&theirs.below);
        }
        out
    }

    /// What is in this set and not in the other.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && !theirs, true)
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && theirs, false)
    }

    fn combine(&self, other: &Self, member: fn(bool, bool) -> bool, alone: bool) -> Self {
        let mut children = BTreeMap::new();
        for (element, ours) in &self.children {
            match other.children.get(element) {
                Some(theirs) => {
                    let node = Node {
                        member: member(ours.member, theirs.member),
                        below: ours.below.combine(&theirs.below, member, alone),
                    };
                    if node.member || !node.below.is_empty() {
                        children.insert(element.clone(), node);
                    }
                }
                None if alone => {
                    children.insert(element.clone(), ours.clone());
                }
                None => {}
            }
        }
        Self { children }
    }

    /// The paths as upstream prints them: `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect("", &mut paths);
        paths
    }

    fn collect(&self, prefix: &str, into: &mut Vec<String>) {
        for (element, node) in &self.children {
            let path = format!("{prefix}{}", shown(element));
            if node.member {
                into.push(path.clone());
            }
            node.below.collect(&path, into);
        }
    }
}

fn shown(element: &str) -> String {
    match element.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("v", value)) => format!("[={value}]"),
        Some(("i", index)) => format!("[{index}]"),
        Some(("k", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let mut out = String::from("[");
            for (index, (key, value)) in keys.iter().enumerate() {
                let comma = if index == 0 { "" } else { "," };
                // Writing into a String cannot fail.
                let _written = write!(out, "{comma}{key}={value}");
            }
            out.push(']');
            out
        }
        _ => element.to_owned(),
    }
}

/// How server-side apply sees the value of a field.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    /// Owned as a whole.
    Leaf,
    Object(Type),
    /// A map with keys of any name and values of this shape's element.
    Map(Element),
    /// A list of unique scalars.
    Set,
    /// A list of objects told apart by the field's keys.
    Keyed(Field, Type),
}

impl Shape {
    pub(super) fn of(field: Field) -> Self {
        match (field.container(), field.element()) {
            _ if field.atomic() => Self::Leaf,
            (Container::One, element) => Self::of_element(element),
            (Container::Map, element) => Self::Map(element),
            (Container::List, element) => match (field.list_type(), element) {
                (ListType::Map, Element::Object(of)) => Self::Keyed(field, of),
                (ListType::Set, _) => Self::Set,
                (ListType::Atomic | ListType::Map, _) => Self::Leaf,
            },
        }
    }

    pub(super) fn of_element(element: Element) -> Self {
        if let Element::Object(of) = element
            && !of.atomic()
        {
            Self::Object(of)
        } else {
            Self::Leaf
        }
    }
}

/// The element of a list's entry by its keys. A port without a protocol is a TCP port, the only default
/// that a list key has.
///
/// # Errors
/// The key that the entry lacks.
pub(super) fn key_of(field: Field, item: &Value) -> Result<String, &'static str> {
    let mut keys = Map::new();
    let mut names: Vec<&'static str> = field.list_keys().collect();
    names.sort_unstable();
    for name in names {
        let value = match item.get(name) {
            Some(value) => value.clone(),
            None if name == "protocol" => Value::from("TCP"),
            None => return Err(name),
        };
        keys.insert(name.to_owned(), value);
    }
    Ok(format!("k:{}", Value::Object(keys)))
}

/// All fields of an object or part of one.
///
/// # Errors
/// A field that the type does not have, a list entry without its keys, or the same entry twice, by path.
pub(super) fn fields_of(shape: Shape, value: &Value, path: &str) -> Result<FieldSet, String> {
    let mut set = FieldSet::default();
    match (shape, value) {
        (Shape::Object(of), Value::Object(map)) => {
            for (name, inner) in map {
                let path = format!("{path}.{name}");
                let field = of.field(name);
                let field = field.ok_or_else(|| format!("{path}: field not declared in schema"))?;
                put(&mut set, format!("f:{name}"), Shape::of(field), inner, &path)?;
            }
        }
        (Shape::Map(element), Value::Object(map)) => {
            for (name, inner) in map {
                let path = format!("{path}.{name}");
                put(&mut set, format!("f:{name}"), Shape::of_element(element), inner, &path)?;
                set.insert(format!("f:{name}"));
            }
        }
        (Shape::Set, Value::Array(items)) => {
            for item in items {
                let element = format!("v:{item}");
                set.refuse_second(&element, path)?;
                set.insert(element);
            }
        }
        (Shape::Keyed(field, of), Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                let key = key_of(field, item).map_err(|key| {
                    format!("{path}: element {index}: associative list with keys has an element that omits key field {key:?} (and doesn't have default value)")
                })?;
                set.refuse_second(&key, path)?;
                let path = format!("{path}{}", shown(&key));
                put(&mut set, key.clone(), Shape::Object(of), item, &path)?;
                set.insert(key);
            }
        }
        _ => {}
    }
    Ok(set)
}

fn put(
    set: &mut FieldSet,
    element: String,
    shape: Shape,
    value: &Value,
    path: &str,
) -> Result<(), String> {
    let below = fields_of(shape, value, path)?;
    let empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
    if matches!(shape, Shape::Leaf) || empty {
        set.insert(element);
    } else if !below.is_empty() {
        *set.descend(element) = below;
    }
    Ok(())
}

/// What differs between two objects of a type: changed or added, and removed fields.
pub(super) fn differences(
    shape: Shape,
    old: Option<&Value>,
    new: Option<&Value>,
) -> (FieldSet, FieldSet) {
    let (mut changed, mut removed) = (FieldSet::default(), FieldSet::default());
    let olds = parts(shape, old);
    let news = parts(shape, new);
    for (element, (inner, value)) in &news {
        let before = olds.get(element).map(|(_, value)| *value);
        if before == Some(*value) {
            continue;
        }
        let (more, less) = differences(*inner, before, Some(value));
        let leaf = matches!(inner, Shape::Leaf);
        let whole =
            before.is_none() && !matches!((shape, inner), (Shape::Object(_), Shape::Object(_)));
        let emptied = parts(*inner, Some(value)).is_empty();
        if !more.is_empty() {
            *changed.descend(element.clone()) = more;
        }
        if leaf || whole || (before.is_none() && emptied) {
            changed.insert(element.clone());
        }
        if !less.is_empty() {
            *removed.descend(element.clone()) = less;
        }
    }
    for (element, (inner, value)) in &olds {
        if !news.contains_key(element) {
            let (_, less) = differences(*inner, Some(value), None);
            if !less.is_empty() {
                *removed.descend(element.clone()) = less;
            }
            removed.insert(element.clone());
        }
    }
    (changed, removed)
}

/// The parts of a value by element, with their shapes. An entry without its keys has no place.
pub(super) fn parts(shape: Shape, value: Option<&Value>) -> BTreeMap<String, (Shape, &Value)> {
    let mut out = BTreeMap::new();
    match (shape, value) {
        (Shape::Object(of), Some(Value::Object(map))) => {
            for (name, value) in map {
                if let Some(field) = of.field(name) {
                    out.insert(format!("f:{name}"), (Shape::of(field), value));
                }
            }
        }
        (Shape::Map(element), Some(Value::Object(map))) => {
            for (name, value) in map {
                out.insert(format!("f:{name}"), (Shape::of_element(element), value));
            }
        }
        (Shape::Set, Some(Value::Array(items))) => {
            for item in items {
                out.insert(format!("v:{item}"), (Shape::Leaf, item));
            }
        }
        (Shape::Keyed(field, of), Some(Value::Array(items))) => {
            for item in items {
                if let Ok(key) = key_of(field, item) {
                    out.insert(key, (Shape::Object(of), item));
                }
            }
        }
        _ => {}
    }
    out
}
