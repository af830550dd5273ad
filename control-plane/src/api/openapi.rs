//! OpenAPI v3, made from the schema table. Pure.
//!
//! A document is written part by part into one buffer when it is asked for, and not kept: the largest
//! (core/v1) is about a megabyte, its texts are inflated only meanwhile.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::discovery;
use crate::schema::{
    Container, Docs, Element, Field, ListType, Type,
    resources::{Served, SubResource, served},
    table, type_named,
};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// `/openapi/v3`. The hash in each address changes whenever the document may.
pub fn index(version: &str) -> Value {
    let mut paths = Map::new();
    for group in discovery::groups() {
        for group_version in discovery::versions(group) {
            let path = path_of(group, group_version);
            let url = format!("/openapi/v3/{path}?hash={}", hash(group, group_version, version));
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// `api/v1` or `apis/apps/v1`.
fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// The hash of one document, as upper-case hexadecimal digits. `version` is the server's.
pub fn hash(group: &str, group_version: &str, version: &str) -> String {
    let mut hasher = Sha256::new();
    for part in table::fingerprint() {
        hasher.update(part);
    }
    hasher.update(format!("{group}/{group_version} {version} {:?}", served()));
    hasher.finalize().iter().map(|byte| format!("{byte:02X}")).collect()
}

/// `/openapi/v3/api/v1` or `/openapi/v3/apis/<group>/<version>` as JSON text, where they are served.
/// `version` is the server's, such as `v1.36.0`.
pub fn document(group: &str, group_version: &str, version: &str) -> Option<String> {
    let resources: Vec<&Served> =
        served().iter().filter(|r| r.group == group && r.version == group_version).collect();
    if resources.is_empty() {
        return None;
    }
    let mut out = String::from(r#"{"openapi":"3.0.0","info":"#);
    out.push_str(&json!({"title": "Kubernetes", "version": version}).to_string());
    out.push_str(r#","paths":{"#);
    let mut paths = Entries::new(&mut out);
    for resource in &resources {
        for (path, item) in path_items(resource) {
            paths.put(&path, &item);
        }
    }
    out.push_str(r#"},"components":{"schemas":{"#);
    let docs = Docs::inflate();
    let mut schemas = Entries::new(&mut out);
    let wanted = reachable(&resources);
    for of in &wanted {
        schemas.put(of.name(), &type_schema(*of, &docs));
    }
    for resource in resources.iter().filter(|resource| resource.allows("list")) {
        if let Some(kind) = resource.kind() {
            schemas.put(&format!("{}List", kind.body.name()), &list_schema(resource, kind.body));
        }
    }
    for (name, schema) in special_schemas() {
        schemas.put(&name, &schema);
    }
    out.push_str("}}}");
    Some(out)
}

/// Writes `"key":value` pairs with commas between.
struct Entries<'a> {
    out: &'a mut String,
    first: bool,
}

impl<'a> Entries<'a> {
    fn new(out: &'a mut String) -> Self {
        Self { out, first: true }
    }

    fn put(&mut self, key: &str, value: &Value) {
        if !self.first {
            self.out.push(',');
        }
        self.first = false;
        self.out.push_str(&Value::from(key).to_string());
        self.out.push(':');
        self.out.push_str(&value.to_string());
    }
}

/// The types of the resources and all that they refer to, in order of their names.
fn reachable(resources: &[&Served]) -> Vec<Type> {
    let mut todo: Vec<Type> = Vec::new();
    for resource in resources {
        todo.extend(resource.kind().map(|kind| kind.body));
        for sub in resource.subresources {
            let (group, version, kind) = sub.kind;
            todo.extend(crate::schema::kind(group, version, kind).map(|kind| kind.body));
        }
    }
    for name in ["DeleteOptions", "Status", "ListMeta"] {
        todo.extend(type_named(&format!("{META}.{name}")));
    }
    let mut seen = BTreeSet::new();
    while let Some(of) = todo.pop() {
        if !seen.insert(of) {
            continue;
        }
        for field in of.fields() {
            if let Element::Object(inner) = field.element() {
                todo.push(inner);
            }
        }
    }
    let mut types: Vec<Type> = seen.into_iter().collect();
    types.sort_by_key(|of| of.name());
    types
}

fn type_schema(of: Type, docs: &Docs) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for field in of.fields() {
        properties.insert(field.name().to_owned(), field_schema(field, docs.of_field(field)));
        if field.required() && field.name() != "metadata" {
            required.push(field.name());
        }
    }
    let mut schema = json!({"type": "object", "properties": properties});
    if !docs.of_type(of).is_empty() {
        schema["description"] = docs.of_type(of).into();
    }
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    if of.atomic() {
        schema["x-kubernetes-map-type"] = "atomic".into();
    }
    let kinds: Vec<Value> = table::kinds()
        .filter(|kind| kind.body == of)
        .map(|kind| gvk(kind.group, kind.version, kind.kind))
        .collect();
    if !kinds.is_empty() {
        schema["x-kubernetes-group-version-kind"] = kinds.into();
    }
    schema
}

fn field_schema(field: Field, doc: &str) -> Value {
    let mut schema = match field.container() {
        Container::One => match element_schema(field.element()) {
            // A reference cannot have siblings.
            reference if reference.get("$ref").is_some() => json!({"allOf": [reference]}),
            schema => schema,
        },
        Container::List => json!({"type": "array", "items": item_schema(field.element())}),
        Container::Map => {
            json!({"type": "object", "additionalProperties": item_schema(field.element())})
        }
    };
    if !doc.is_empty() {
        schema["description"] = doc.into();
    }
    if field.container() == Container::List {
        schema["x-kubernetes-list-type"] = match field.list_type() {
            ListType::Atomic => "atomic",
            ListType::Set => "set",
            ListType::Map => "map",
        }
        .into();
        let keys: Vec<&str> = field.list_keys().collect();
        if !keys.is_empty() {
            schema["x-kubernetes-list-map-keys"] = json!(keys);
        }
    }
    if field.atomic() {
        schema["x-kubernetes-map-type"] = "atomic".into();
    }
    let strategies: Vec<&str> = [
        (field.patch_merge(), "merge"),
        (field.patch_replace(), "replace"),
        (field.patch_retain_keys(), "retainKeys"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect();
    if !strategies.is_empty() {
        schema["x-kubernetes-patch-strategy"] = strategies.join(",").into();
    }
    if !field.patch_merge_key().is_empty() {
        schema["x-kubernetes-patch-merge-key"] = field.patch_merge_key().into();
    }
    schema
}

fn item_schema(element: Element) -> Value {
    let schema = element_schema(element);
    if schema.get("$ref").is_some() { json!({"allOf": [schema]}) } else { schema }
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

const API_EXTENSIONS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1";

fn element_schema(element: Element) -> Value {
    match element {
        Element::String => json!({"type": "string"}),
        Element::Bytes => json!({"type": "string", "format": "byte"}),
        Element::Bool => json!({"type": "boolean"}),
        Element::Int32 => json!({"type": "integer", "format": "int32"}),
        Element::Int64 => json!({"type": "integer", "format": "int64"}),
        Element::Double => json!({"type": "number", "format": "double"}),
        Element::Object(of) => reference(of.name()),
        Element::Quantity => reference("io.k8s.apimachinery.pkg.api.resource.Quantity"),
        Element::IntOrString => reference("io.k8s.apimachinery.pkg.util.intstr.IntOrString"),
        Element::Time => reference(&format!("{META}.Time")),
        Element::MicroTime => reference(&format!("{META}.MicroTime")),
        Element::Duration => json!({"type": "string"}),
        Element::RawExtension => reference("io.k8s.apimachinery.pkg.runtime.RawExtension"),
        Element::FieldsV1 => reference(&format!("{META}.FieldsV1")),
        Element::Json => reference(&format!("{API_EXTENSIONS}.JSON")),
        Element::JsonSchemaPropsOrBool
        | Element::JsonSchemaPropsOrArray
        | Element::JsonSchemaPropsOrStringArray => json!({}),
        Element::StringList => json!({"type": "array", "items": {"type": "string"}}),
    }
}

fn special_schemas() -> [(String, Value); 7] {
    let either = |other: &str| json!({"oneOf": [{"type": "string"}, {"type": other}]});
    let mut int_or_string = either("integer");
    int_or_string["format"] = "int-or-string".into();
    let mut quantity = either("number");
    quantity["description"] = "Quantity is a fixed-point number, such as 100m, 1.5 or 64Mi.".into();
    [
        ("io.k8s.apimachinery.pkg.api.resource.Quantity".to_owned(), quantity),
        ("io.k8s.apimachinery.pkg.util.intstr.IntOrString".to_owned(), int_or_string),
        (format!("{META}.Time"), json!({"type": "string", "format": "date-time"})),
        (format!("{META}.MicroTime"), json!({"type": "string", "format": "date-time"})),
        (format!("{META}.FieldsV1"), json!({"type": "object"})),
        ("io.k8s.apimachinery.pkg.runtime.RawExtension".to_owned(), json!({"type": "object"})),
        (format!("{API_EXTENSIONS}.JSON"), json!({})),
    ]
}

fn list_schema(resource: &Served, of: Type) -> Value {
    json!({
        "type": "object",
        "description": format!("{} is a list of {} objects.", resource.list_kind(), resource.kind),
        "required": ["items"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"allOf": [reference(&format!("{META}.ListMeta"))]},
            "items": {"type": "array", "items": {"allOf": [reference(of.name())]}},
        },
        "x-kubernetes-group-version-kind":
            [gvk(resource.group, resource.version, &resource.list_kind())],
    })
}

fn gvk(group: &str, version: &str, kind: &str) -> Value {
    json!({"group": group, "version": version, "kind": kind})
}

fn path_items(resource: &Served) -> Vec<(String, Value)> {
    let root = path_of(resource.group, resource.version);
    let plural = resource.plural;
    let mut base = format!("/{root}");
    let mut items = Vec::new();
    if resource.namespaced {
        if resource.allows("list") {
            let all = operations(resource, resource_gvk(resource), &["list"]);
            items.push((format!("{base}/{plural}"), all));
        }
        base.push_str("/namespaces/{namespace}");
    }
    let collection = operations(resource, resource_gvk(resource), collection_verbs(resource));
    items.push((format!("{base}/{plural}"), collection));
    if resource.allows("get") {
        let item = operations(resource, resource_gvk(resource), resource.verbs);
        items.push((format!("{base}/{plural}/{{name}}"), only_item(item)));
    }
    for sub in resource.subresources {
        let path = format!("{base}/{plural}/{{name}}/{}", sub.name);
        items.push((path, sub_operations(resource, sub)));
    }
    items
}

fn resource_gvk(resource: &Served) -> Value {
    gvk(resource.group, resource.version, resource.kind)
}

fn collection_verbs(resource: &Served) -> &'static [&'static str] {
    match (resource.allows("list"), resource.allows("deletecollection")) {
        (true, true) => &["list", "create", "deletecollection"],
        (true, false) => &["list", "create"],
        (false, _) => &["create"],
    }
}

/// Drops the collection's operation of the same method.
fn only_item(mut item: Value) -> Value {
    if let Some(map) = item.as_object_mut() {
        map.remove("post");
    }
    item
}

fn sub_operations(resource: &Served, sub: &SubResource) -> Value {
    let (group, version, kind) = sub.kind;
    operations(resource, gvk(group, version, kind), sub.verbs)
}

fn operations(resource: &Served, gvk: Value, verbs: &[&str]) -> Value {
    let mut item = Map::new();
    for verb in verbs {
        let (method, action) = match *verb {
            "create" => ("post", "post"),
            "delete" => ("delete", "delete"),
            "deletecollection" => ("delete", "deletecollection"),
            "get" => ("get", "get"),
            "list" => ("get", "list"),
            "patch" => ("patch", "patch"),
            "update" => ("put", "put"),
            _ => continue,
        };
        if item.contains_key(method) {
            continue;
        }
        item.insert(method.to_owned(), operation(resource, &gvk, method, action));
    }
    if resource.namespaced {
        let parameter = json!({"name": "namespace", "in": "path", "required": true,
            "schema": {"type": "string", "uniqueItems": true}});
        item.insert("parameters".to_owned(), json!([parameter]));
    }
    Value::Object(item)
}

fn operation(resource: &Served, gvk: &Value, method: &str, action: &str) -> Value {
    let query = |name: &str, kind: &str| json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}});
    let mut parameters = Vec::new();
    if matches!(method, "post" | "put" | "patch" | "delete") {
        parameters.push(query("dryRun", "string"));
    }
    if matches!(method, "post" | "put" | "patch") {
        parameters.push(query("fieldManager", "string"));
        parameters.push(query("fieldValidation", "string"));
    }
    if method == "patch" {
        parameters.push(query("force", "boolean"));
    }
    let schema = resource.kind().map_or_else(|| json!({}), |kind| reference(kind.body.name()));
    let mut out = json!({
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk,
        "parameters": parameters,
        "responses": {"200": {"description": "OK",
            "content": {"application/json": {"schema": schema}}}},
    });
    if method == "patch" {
        let body = json!({"schema": {"type": "object"}});
        out["requestBody"] = json!({"required": true, "content": {
            "application/apply-patch+yaml": body,
            "application/json-patch+json": body,
            "application/merge-patch+json": body,
            "application/strategic-merge-patch+json": body,
        }});
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_say_what_apply_and_explain_need() {
        let text = document("apps", "v1", "v1.36.0").unwrap();
        let apps: Value = serde_json::from_str(&text).unwrap();
        let patch =
            &apps["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Deployment");
        let names: Vec<&str> = patch["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|p| p["name"].as_str())
            .collect();
        assert_eq!(names, ["dryRun", "fieldManager", "fieldValidation", "force"]);
        let schemas = &apps["components"]["schemas"];
        let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-patch-strategy"], "merge");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        assert!(containers["description"].as_str().unwrap().starts_with("List of containers"));
        let volume = &schemas["io.k8s.api.core.v1.Volume"]["properties"];
        assert!(volume["emptyDir"]["allOf"][0]["$ref"].is_string(), "{volume}");
    }

    #[test]
    fn every_reference_is_there() {
        for group in discovery::groups() {
            let text = document(group, "v1", "v1.36.0").unwrap();
            let parsed: Value = serde_json::from_str(&text).unwrap();
            let mut rest = text.as_str();
            while let Some((_, after)) = rest.split_once("\"$ref\":\"#/components/schemas/") {
                let (name, after) = after.split_once('"').unwrap();
                assert!(parsed["components"]["schemas"].get(name).is_some(), "{name}");
                rest = after;
            }
        }
        assert_eq!(document("batch", "v1", "v1.36.0"), None);
        let index = index("v1.36.0");
        let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap();
        assert!(url.starts_with("/openapi/v3/apis/apps/v1?hash="));
    }
}
