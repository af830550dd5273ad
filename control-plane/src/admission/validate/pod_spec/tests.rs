//! What is said of pod specs, row by row of `tables`: `pod`, `template`, `container` or `init` and in YAML the
//! fields that are put over those of a good one, and below them kube-apiserver's words. None: it is taken. `…` at
//! the end of a line stands for the rest of it.

use serde_json::{Value, json};

use super::Of;
use crate::{
    admission::defaults,
    schema::{Path, decode::parse_yaml, resource},
};

const AFFINITY: &str = include_str!("tables/affinity.txt");
const CONTAINERS: &str = include_str!("tables/containers.txt");
const DNS: &str = include_str!("tables/dns.txt");
const ENV: &str = include_str!("tables/env.txt");
const MOUNTS: &str = include_str!("tables/mounts.txt");
const PROBES: &str = include_str!("tables/probes.txt");
const RESOURCES: &str = include_str!("tables/resources.txt");
const SCHEDULING: &str = include_str!("tables/scheduling.txt");
const SECURITY: &str = include_str!("tables/security.txt");
const VOLUMES: &str = include_str!("tables/volumes.txt");

/// Puts fields over those of an object.
fn put(mut object: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().expect("fields are an object") {
        object[name] = value.clone();
    }
    object
}

/// The whole spec of a row.
fn whole(kind: &str, fields: &Value) -> Value {
    let good = json!({"name": "c", "image": "i"});
    let pod = json!({"containers": [good]});
    match kind {
        "pod" | "template" => put(pod, fields),
        "container" => put(pod, &json!({"containers": [put(good, fields)]})),
        "init" => {
            let init = put(json!({"name": "i", "image": "i"}), fields);
            put(pod, &json!({"initContainers": [init]}))
        }
        other => panic!("no row begins with {other}"),
    }
}

/// What is said, one reason a line.
fn said(kind: &str, fields: &Value) -> Vec<String> {
    let spec = whole(kind, fields);
    let (served, mut object) = match kind {
        "template" => {
            (resource("apps", "v1", "deployments"), json!({"spec": {"template": {"spec": spec}}}))
        }
        _ => (resource("", "v1", "pods"), json!({"spec": spec})),
    };
    defaults::apply(served.unwrap(), &mut object);
    let errors = match object.pointer("/spec/template/spec") {
        Some(template) => super::spec(Of::Template, template, &Path::new("spec")),
        None => super::new_pod(&object),
    };
    errors.iter().map(ToString::to_string).collect()
}

fn is(said: &str, want: &str) -> bool {
    want.strip_suffix('…').map_or(said == want, |start| said.starts_with(start))
}

/// All rows that differ are told at once.
fn check(table: &str) {
    let lines = table.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut rows: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in lines {
        match (line.strip_prefix("  "), rows.last_mut()) {
            (Some(want), Some((_, words))) => words.push(want),
            (Some(_), None) => panic!("words before the first row"),
            (None, _) => rows.push((line, Vec::new())),
        }
    }
    let mut wrong = Vec::new();
    for (row, want) in rows {
        let (kind, fields) = row.split_once(' ').expect("a kind and fields");
        let (fields, _) = parse_yaml(fields.as_bytes()).unwrap();
        let said = said(kind, &fields);
        let same = said.len() == want.len() && said.iter().zip(&want).all(|(a, b)| is(a, b));
        if !same {
            let (want, said) = (want.join("\n    "), said.join("\n    "));
            wrong.push(format!("{row}\n  want\n    {want}\n  said\n    {said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn affinity() {
    check(AFFINITY);
}

#[test]
fn containers() {
    check(CONTAINERS);
}

#[test]
fn dns() {
    check(DNS);
}

#[test]
fn env() {
    check(ENV);
}

#[test]
fn mounts() {
    check(MOUNTS);
}

#[test]
fn probes() {
    check(PROBES);
}

#[test]
fn resources() {
    check(RESOURCES);
}

#[test]
fn scheduling() {
    check(SCHEDULING);
}

#[test]
fn security() {
    check(SECURITY);
}

#[test]
fn volumes() {
    check(VOLUMES);
}

#[test]
fn annotations_of_a_new_pod() {
    let cost = "controller.kubernetes.io/pod-deletion-cost";
    let spec = whole("pod", &json!({}));
    let mut object = json!({"metadata": {"annotations": {cost: "much"}}, "spec": spec});
    defaults::apply(resource("", "v1", "pods").unwrap(), &mut object);
    let said: Vec<String> = super::new_pod(&object).iter().map(ToString::to_string).collect();
    let want =
        format!("metadata.annotations[{cost}]: Invalid value: \"much\": must be a 32bit integer");
    assert_eq!(said, [want]);
}

/// What is deployed to other clusters is good enough for ours.
#[test]
fn the_daemon_set_of_this_repository() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/daemonset.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let documents = text.split("\n---\n");
    let parsed = documents.map(|document| parse_yaml(document.as_bytes()).unwrap().0);
    let set = parsed.into_iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let said = said("template", &set["spec"]["template"]["spec"]);
    assert_eq!(said, Vec::<String>::new());
}
