//! Discovery documents, from the list of served resources. Pure.

use serde_json::{Value, json};

use crate::schema::resources::{Served, SubResource, served};

/// The versions of the aggregated document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregated {
    V2,
    V2Beta1,
}

impl Aggregated {
    /// The `Content-Type` of the answer.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::V2 => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            Self::V2Beta1 => {
                "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"
            }
        }
    }

    fn version(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V2Beta1 => "v2beta1",
        }
    }
}

/// The groups in the order in which they are served; the core group is the empty one.
pub fn groups() -> Vec<&'static str> {
    let mut groups: Vec<&'static str> = Vec::new();
    for resource in served() {
        if !groups.contains(&resource.group) {
            groups.push(resource.group);
        }
    }
    groups
}

/// The versions of a group, the preferred one first.
pub fn versions(group: &str) -> Vec<&'static str> {
    let mut versions: Vec<&'static str> = Vec::new();
    for resource in served().iter().filter(|resource| resource.group == group) {
        if !versions.contains(&resource.version) {
            versions.push(resource.version);
        }
    }
    versions
}

fn resources_of(group: &str, version: &str) -> Vec<&'static Served> {
    let mut found: Vec<&Served> =
        served().iter().filter(|r| r.group == group && r.version == version).collect();
    found.sort_by_key(|resource| resource.plural);
    found
}

/// `APIGroupDiscoveryList` of `/api` (`core`) or `/apis`.
pub fn aggregated(core: bool, form: Aggregated) -> Value {
    let wanted: Vec<&str> = groups().into_iter().filter(|group| group.is_empty() == core).collect();
    let items: Vec<Value> = wanted
        .into_iter()
        .map(|group| {
            let versions: Vec<Value> = versions(group)
                .into_iter()
                .map(|version| {
                    let resources: Vec<Value> =
                        resources_of(group, version).into_iter().map(aggregated_resource).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let metadata = if group.is_empty() {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": group, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{}", form.version()),
        "metadata": {},
        "items": items,
    })
}

fn gvk((group, version, kind): (&str, &str, &str)) -> Value {
    json!({"group": group, "version": version, "kind": kind})
}

fn aggregated_resource(resource: &Served) -> Value {
    let mut out = json!({
        "resource": resource.plural,
        "responseKind": gvk((resource.group, resource.version, resource.kind)),
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        out["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        out["categories"] = json!(resource.categories);
    }
    if !resource.subresources.is_empty() {
        let subresources = resource.subresources.iter().map(|sub| {
            json!({"subresource": sub.name, "responseKind": gvk(sub.kind), "verbs": sub.verbs})
        });
        out["subresources"] = subresources.collect();
    }
    out
}

/// `APIVersions` of `/api`.
pub fn api_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": versions(""),
        "serverAddressByClientCIDRs":
            [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}],
    })
}

/// `APIGroupList` of `/apis`.
pub fn group_list() -> Value {
    let groups: Vec<Value> =
        groups().into_iter().filter(|group| !group.is_empty()).map(bare_group).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `APIGroup` of `/apis/<group>`, where the group is served.
pub fn group(group: &str) -> Option<Value> {
    if group.is_empty() || !groups().contains(&group) {
        return None;
    }
    let mut out = bare_group(group);
    out["kind"] = "APIGroup".into();
    out["apiVersion"] = "v1".into();
    Some(out)
}

fn bare_group(group: &str) -> Value {
    let versions: Vec<Value> = versions(group)
        .into_iter()
        .map(|version| json!({"groupVersion": format!("{group}/{version}"), "version": version}))
        .collect();
    let preferred = versions.first().cloned().unwrap_or_default();
    json!({"name": group, "versions": versions, "preferredVersion": preferred})
}

/// `APIResourceList` of `/api/v1` or `/apis/<group>/<version>`, where they are served.
pub fn resource_list(group: &str, version: &str) -> Option<Value> {
    let mut entries = Vec::new();
    for resource in resources_of(group, version) {
        entries.push(listed(resource));
        entries.extend(resource.subresources.iter().map(|sub| listed_sub(resource, sub)));
    }
    if entries.is_empty() {
        return None;
    }
    let group_version =
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(json!({
        "kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": group_version, "resources": entries,
    }))
}

fn listed(resource: &Served) -> Value {
    let mut out = json!({
        "name": resource.plural, "singularName": resource.singular,
        "namespaced": resource.namespaced, "kind": resource.kind, "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        out["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        out["categories"] = json!(resource.categories);
    }
    out
}

fn listed_sub(resource: &Served, sub: &SubResource) -> Value {
    let (group, version, kind) = sub.kind;
    let mut out = json!({
        "name": format!("{}/{}", resource.plural, sub.name), "singularName": "",
        "namespaced": resource.namespaced, "kind": kind, "verbs": sub.verbs,
    });
    if (group, version) != (resource.group, resource.version) {
        out["group"] = group.into();
        out["version"] = version.into();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_what_is_served_and_nothing_else() {
        let core = aggregated(true, Aggregated::V2);
        let resources = core["items"][0]["versions"][0]["resources"].as_array().unwrap();
        let pods = resources.iter().find(|r| r["resource"] == "pods").unwrap();
        assert_eq!(pods["shortNames"], json!(["po"]));
        assert_eq!(pods["scope"], "Namespaced");
        assert!(pods["subresources"].as_array().unwrap().iter().any(|s| s["subresource"] == "log"));
        let named = aggregated(false, Aggregated::V2Beta1);
        assert_eq!(named["apiVersion"], "apidiscovery.k8s.io/v2beta1");
        assert_eq!(named["items"][0]["metadata"]["name"], "apps");
        assert_eq!(resource_list("batch", "v1"), None);
        assert_eq!(group("batch"), None);
    }

    #[test]
    fn drain_finds_eviction() {
        let list = resource_list("", "v1").unwrap();
        let resources = list["resources"].as_array().unwrap();
        let eviction = resources.iter().find(|r| r["name"] == "pods/eviction").unwrap();
        assert_eq!((&eviction["kind"], &eviction["group"]), (&json!("Eviction"), &json!("policy")));
        assert_eq!(resource_list("apps", "v1").unwrap()["groupVersion"], "apps/v1");
    }
}
