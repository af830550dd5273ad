//! Services through defaulting, completion and validation. Cases with a name follow upstream's
//! `TestValidateServiceCreate`, `TestValidateServiceUpdate` (`pkg/apis/core/validation`), `TestDropTypeDependentFields`
//! (`pkg/registry/core/service`) and `TestServiceRegistry*` (its `storage`).

mod create;
mod update;

use serde_json::{Value, json};

use super::*;
use crate::{
    admission::{Attempt, defaults, validate},
    api::{authn::User, prepare::Part, route::Verb},
    schema::{self, field},
};

fn networks(dual: bool) -> Networks {
    let cidrs = ["10.0.0.0/16", "fd00::/108"];
    Networks::new(cidrs.iter().take(1 + usize::from(dual)).map(|c| c.parse().unwrap()).collect())
}

/// What the API would store, or say.
fn admitted(spec: &Value, old: Option<&Value>, allocated: &Allocated) -> Result<Value, String> {
    let served = schema::resource("", "v1", "services").unwrap();
    let mut service = json!({"metadata": {"name": "valid", "namespace": "valid"}, "spec": spec});
    for part in ["annotations", "status"] {
        if let Some(value) = service["spec"].as_object_mut().unwrap().remove(part) {
            let place = if part == "status" { &mut service } else { &mut service["metadata"] };
            place[part] = value;
        }
    }
    if let Some(old) = old.filter(|_| service.get("status").is_none()) {
        service["status"] = old["status"].clone();
    }
    defaults::apply(served, &mut service);
    match complete(&networks(true), &allocated.others(None), &mut service, old) {
        Err(Refusal::Fields(errors)) => return Err(field::aggregate(&errors)),
        Err(Refusal::Internal(why)) => return Err(why),
        Ok(()) => {}
    }
    let verb = if old.is_some() { Verb::Update } else { Verb::Create };
    let user = User::new("test", &[]);
    let attempt = Attempt { served, verb, part: Part::Main, user: &user, old };
    let errors = validate::object(&attempt, &service);
    if errors.is_empty() { Ok(service) } else { Err(field::aggregate(&errors)) }
}

fn new(spec: &Value) -> Result<Value, String> {
    admitted(spec, None, &Allocated::default())
}

/// A valid Service with these fields set, or where null removed.
fn with(fields: &Value) -> Value {
    over(
        json!({"selector": {"key": "val"}, "type": "ClusterIP",
        "ports": [{"name": "p", "port": 8675}]}),
        fields,
    )
}

fn over(mut spec: Value, fields: &Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        if value.is_null() {
            spec.as_object_mut().unwrap().remove(key);
        } else {
            spec[key] = value.clone();
        }
    }
    spec
}

const BALANCER: &str = "LoadBalancer";

#[test]
fn what_is_left_out_is_filled_in() {
    let spec = |fields: Value| new(&with(&fields)).unwrap()["spec"].take();
    let plain = spec(json!({}));
    assert_eq!(
        plain,
        json!({"type": "ClusterIP", "selector": {"key": "val"}, "sessionAffinity": "None",
            "internalTrafficPolicy": "Cluster", "clusterIP": "10.0.1.1", "clusterIPs": ["10.0.1.1"],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "p", "port": 8675, "protocol": "TCP", "targetPort": 8675}]})
    );
    let sticky = spec(json!({"sessionAffinity": "ClientIP"}));
    assert_eq!(sticky["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10_800);
    let local = spec(json!({"type": BALANCER, "externalTrafficPolicy": "Local"}));
    assert_eq!(local["ports"][0]["nodePort"], 30_086);
    assert_eq!(local["healthCheckNodePort"], 30_087);
    assert_eq!(local["allocateLoadBalancerNodePorts"], true);
    let none = spec(json!({"type": BALANCER, "allocateLoadBalancerNodePorts": false}));
    assert_eq!(none["ports"][0].get("nodePort"), None);
    let some = spec(json!({"type": BALANCER, "allocateLoadBalancerNodePorts": false, "ports": [
        {"name": "a", "port": 1, "nodePort": 30_500}, {"name": "b", "port": 2}]}));
    assert_eq!(some["ports"][0]["nodePort"], 30_500);
    assert_eq!(some["ports"][1].get("nodePort"), None);
    let listed = spec(json!({"externalIPs": ["1.1.1.1"]}));
    assert_eq!(listed["externalTrafficPolicy"], "Cluster");
    let shared = spec(json!({"type": "NodePort", "ports": [
        {"name": "a", "port": 53, "protocol": "UDP"}, {"name": "b", "port": 53}]}));
    assert_eq!(shared["ports"][0]["nodePort"], shared["ports"][1]["nodePort"]);
    let external = spec(json!({"type": "ExternalName", "externalName": "a.b"}));
    assert_eq!(external.get("clusterIP"), None);
    assert_eq!(external.get("internalTrafficPolicy"), None);
}

#[test]
fn a_number_belongs_to_one_service_whatever_the_protocol() {
    let mut taken = Allocated::default();
    taken.set(&"a/other".into(), "10.0.1.1 30086 30999");
    let service = |fields: Value| admitted(&with(&fields), None, &taken);
    let free = service(json!({"type": "NodePort"})).unwrap();
    assert_eq!(free["spec"]["clusterIP"], "10.0.1.2");
    assert_eq!(free["spec"]["ports"][0]["nodePort"], 30_087);
    let udp =
        json!({"type": "NodePort", "ports": [{"port": 1, "protocol": "UDP", "nodePort": 30_999}]});
    assert_eq!(
        service(udp).unwrap_err(),
        "spec.ports[0].nodePort: Invalid value: 30999: provided port is already allocated"
    );
    let health =
        json!({"type": BALANCER, "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_086});
    assert_eq!(
        service(health).unwrap_err(),
        "failed to allocate requested HealthCheck NodePort 30086: provided port is already allocated"
    );
    assert_eq!(
        service(json!({"clusterIP": "10.0.1.1"})).unwrap_err(),
        "spec.clusterIPs: Invalid value: [\"10.0.1.1\"]: failed to allocate IP 10.0.1.1: provided IP is already allocated"
    );
}

#[test]
fn a_range_that_is_full_is_the_servers_fault() {
    let tiny = Networks {
        service_cidrs: vec!["10.0.0.0/30".parse().unwrap()],
        node_ports: (30_000, 30_000),
    };
    let mut taken = Allocated::default();
    taken.set(&"a/other".into(), "10.0.0.1 10.0.0.2");
    let mut service = json!({"spec": with(&json!({"type": "NodePort"}))});
    assert_eq!(
        complete(&tiny, &taken.others(None), &mut service, None),
        Err(Refusal::Internal("failed to allocate a serviceIP: range is full".to_owned()))
    );
    let mut ports = Allocated::default();
    ports.set(&"a/other".into(), "30000");
    let mut service = json!({"spec": with(&json!({"type": "NodePort"}))});
    assert_eq!(
        complete(&tiny, &ports.others(None), &mut service, None),
        Err(Refusal::Internal("failed to allocate a nodePort: range is full".to_owned()))
    );
}

#[test]
fn validate_load_balancer_status() {
    let served = schema::resource("", "v1", "services").unwrap();
    let user = User::new("test", &[]);
    let old = new(&with(&json!({"type": BALANCER}))).unwrap();
    let plain = new(&with(&json!({}))).unwrap();
    let said = |old: &Value, ingress: Value| {
        let mut object = old.clone();
        object["status"] = json!({"loadBalancer": {"ingress": [ingress]}});
        defaults::status(served, &mut object);
        let attempt =
            Attempt { served, verb: Verb::Update, part: Part::Status, user: &user, old: Some(old) };
        let errors = validate::part(&attempt, &object);
        if errors.is_empty() {
            object["status"]["loadBalancer"]["ingress"][0]["ipMode"].to_string()
        } else {
            field::aggregate(&errors)
        }
    };
    let path = "status.loadBalancer.ingress[0]";
    let cases = [
        (json!({"ip": "1.2.3.4"}), "\"VIP\"".to_owned()),
        (json!({"ip": "1.2.3.4", "ipMode": "Proxy"}), "\"Proxy\"".to_owned()),
        (json!({"hostname": "a.b"}), "null".to_owned()),
        (
            json!({"ip": "x"}),
            format!(
                "{path}.ip: Invalid value: \"x\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            ),
        ),
        (
            json!({"ip": "1.2.3.4", "ipMode": "x"}),
            format!(
                "{path}.ipMode: Unsupported value: \"x\": supported values: \"Proxy\", \"VIP\""
            ),
        ),
        (
            json!({"hostname": "a.b", "ipMode": "VIP"}),
            format!("{path}.ipMode: Forbidden: may not be specified when `ip` is not set"),
        ),
        (
            json!({"hostname": "1.2.3.4"}),
            format!(
                "{path}.hostname: Invalid value: \"1.2.3.4\": must be a DNS name, not an IP address"
            ),
        ),
    ];
    for (ingress, want) in cases {
        assert_eq!(said(&old, ingress), want);
    }
    assert_eq!(
        said(&plain, json!({"ip": "1.2.3.4"})),
        "status.loadBalancer.ingress: Forbidden: may only be used when `spec.type` is 'LoadBalancer'"
    );
}
