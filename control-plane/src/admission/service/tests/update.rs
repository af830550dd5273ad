//! Changed Services: what stays, what goes, what is refused.

use serde_json::{Value, json};

use super::{Allocated, BALANCER, admitted, complete, networks, new, over, with};

/// An update by PUT of the whole stored spec with some fields changed.
fn updated(from: &Value, fields: &Value) -> Result<Value, String> {
    let old = new(&with(from)).unwrap();
    admitted(&over(old["spec"].clone(), fields), Some(&old), &Allocated::default())
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn validate_service_update() {
    let health =
        json!({"type": BALANCER, "externalTrafficPolicy": "Local", "healthCheckNodePort": 31_000});
    let dual = json!({"ipFamilyPolicy": "PreferDualStack"});
    let cases = [
        ("no change", json!({}), json!({}), ""),
        (
            "change cluster IP",
            json!({}),
            json!({"clusterIP": "10.0.0.5"}),
            "spec.clusterIPs[0]: Invalid value: [\"10.0.0.5\"]: may not change once set",
        ),
        (
            "ClusterIP to headless",
            json!({}),
            json!({"clusterIP": "None"}),
            "spec.clusterIPs[0]: Invalid value: [\"None\"]: may not change once set",
        ),
        (
            "headless to ClusterIP",
            json!({"clusterIP": "None"}),
            json!({"clusterIP": "10.0.0.5"}),
            "spec.clusterIPs[0]: Invalid value: [\"10.0.0.5\"]: may not change once set",
        ),
        ("change affinity", json!({}), json!({"sessionAffinity": "ClientIP"}), ""),
        (
            "change primary family",
            json!({}),
            json!({"ipFamilies": ["IPv6"]}),
            "spec.clusterIPs[0]: Invalid value: \"10.0.1.1\": expected an IPv6 value as indicated by `ipFamilies[0]`",
        ),
        (
            "swap families",
            dual.clone(),
            json!({"ipFamilies": ["IPv6", "IPv4"]}),
            "expected an IPv6 value as indicated by `ipFamilies[0]`",
        ),
        (
            "release family without policy",
            dual.clone(),
            json!({"ipFamilies": ["IPv4"]}),
            "spec.ipFamilyPolicy: Invalid value: \"PreferDualStack\": must be 'SingleStack' to release the secondary IP family",
        ),
        (
            "change LoadBalancerClass",
            json!({"type": BALANCER, "loadBalancerClass": "a.b/c"}),
            json!({"loadBalancerClass": "a.b/d"}),
            "spec.loadBalancerClass: Invalid value: \"a.b/d\": may not change once set",
        ),
        (
            "remove LoadBalancerClass",
            json!({"type": BALANCER, "loadBalancerClass": "a.b/c"}),
            json!({"loadBalancerClass": null}),
            "spec.loadBalancerClass: Invalid value: null: may not change once set",
        ),
        (
            "set LoadBalancerClass when changing to LoadBalancer",
            json!({}),
            json!({"type": BALANCER, "loadBalancerClass": "a.b/d"}),
            "",
        ),
        (
            "change HealthCheckNodePort",
            health.clone(),
            json!({"healthCheckNodePort": 31_001}),
            "spec.healthCheckNodePort: Forbidden: field is immutable",
        ),
        ("remove HealthCheckNodePort", health.clone(), json!({"healthCheckNodePort": null}), ""),
        ("LoadBalancer Local to NodePort", health, json!({"type": "NodePort"}), ""),
        (
            "ClusterIP to ExternalName",
            json!({}),
            json!({"type": "ExternalName", "externalName": "a.b"}),
            "",
        ),
        (
            "ExternalName to ClusterIP",
            json!({"type": "ExternalName", "externalName": "a.b"}),
            json!({"type": "ClusterIP"}),
            "",
        ),
        (
            "changed clusterIP while becoming ExternalName",
            json!({}),
            json!({"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.0.0.5"}),
            "spec.clusterIPs: Forbidden: may not be set for ExternalName services",
        ),
        (
            "changed nodePort while becoming ClusterIP",
            json!({"type": "NodePort"}),
            json!({"type": "ClusterIP", "ports": [{"name": "p", "port": 8675, "nodePort": 30_555}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (
            "source ranges stay behind",
            json!({"type": BALANCER, "loadBalancerSourceRanges": ["10.0.0.0/8"]}),
            json!({"type": "ClusterIP"}),
            "spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            "duplicate nodePort on update",
            json!({"type": "NodePort", "ports": [{"name": "a", "port": 1, "nodePort": 30_001}]}),
            json!({"ports": [{"name": "a", "port": 1, "nodePort": 30_001}, {"name": "b", "port": 2, "nodePort": 30_001}]}),
            "duplicate nodePort: {TCP 30001}",
        ),
    ];
    for (name, from, fields, want) in cases {
        let said = updated(&from, &fields).err().unwrap_or_default();
        assert!(said.contains(want) && said.is_empty() == want.is_empty(), "{name}: {said}");
    }
}

#[test]
fn drop_type_dependent_fields() {
    let balancer =
        json!({"type": BALANCER, "externalTrafficPolicy": "Local", "loadBalancerClass": "a.b/c"});
    let plain = updated(&balancer, &json!({"type": "ClusterIP"})).unwrap();
    let spec = &plain["spec"];
    for gone in [
        "externalTrafficPolicy",
        "healthCheckNodePort",
        "allocateLoadBalancerNodePorts",
        "loadBalancerClass",
    ] {
        assert_eq!(spec.get(gone), None, "{gone}");
    }
    assert_eq!(spec["ports"][0].get("nodePort"), None);
    assert_eq!(spec["clusterIP"], "10.0.1.1");
    let node_port = updated(&balancer, &json!({"type": "NodePort"})).unwrap();
    assert_eq!(node_port["spec"]["ports"][0]["nodePort"], 30_086);
    assert_eq!(node_port["spec"]["externalTrafficPolicy"], "Local");
    assert_eq!(node_port["spec"].get("healthCheckNodePort"), None);
    let dual = json!({"ipFamilyPolicy": "RequireDualStack"});
    let external = updated(&dual, &json!({"type": "ExternalName", "externalName": "a.b"})).unwrap();
    for gone in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        assert_eq!(external["spec"].get(gone), None, "{gone}");
    }
    let listed = updated(&json!({"externalIPs": ["1.1.1.1"]}), &json!({"externalIPs": null}));
    assert_eq!(listed.unwrap()["spec"].get("externalTrafficPolicy"), None);
}

#[test]
fn the_balancers_status_goes_with_the_type() {
    let mut old = new(&with(&json!({"type": BALANCER}))).unwrap();
    old["status"] = json!({"loadBalancer": {"ingress": [{"ip": "1.2.3.4", "ipMode": "VIP"}]}});
    let kept = admitted(&old["spec"], Some(&old), &Allocated::default()).unwrap();
    assert_eq!(kept["status"], old["status"]);
    let fields = json!({"type": "NodePort"});
    let gone = admitted(&over(old["spec"].clone(), &fields), Some(&old), &Allocated::default());
    assert_eq!(gone.unwrap()["status"], json!({"loadBalancer": {}}));
}

#[test]
fn patch_allocated_values() {
    let old = new(&with(&json!({"type": BALANCER, "externalTrafficPolicy": "Local"}))).unwrap();
    // The first manifest again, without what was allocated.
    let same = with(&json!({"type": BALANCER, "externalTrafficPolicy": "Local"}));
    let mut taken = Allocated::default();
    taken.set(&"a/other".into(), "10.0.1.2");
    assert_eq!(admitted(&same, Some(&old), &taken).unwrap()["spec"], old["spec"]);
    // A port keeps its number by its name; a new one gets another.
    let more = json!({"type": BALANCER, "ports": [
        {"name": "q", "port": 2}, {"name": "p", "port": 3}]});
    let ports = admitted(&with(&more), Some(&old), &taken).unwrap()["spec"]["ports"].take();
    assert_eq!(ports[1]["nodePort"], 30_086);
    assert_eq!(ports[0]["nodePort"], 30_087);
    // Unless another port took it by name.
    let moved = json!({"type": BALANCER, "ports": [
        {"name": "q", "port": 2, "nodePort": 30_086}, {"name": "p", "port": 3}]});
    let ports = admitted(&with(&moved), Some(&old), &taken).unwrap()["spec"]["ports"].take();
    assert_eq!(ports[0]["nodePort"], 30_086);
    assert_ne!(ports[1]["nodePort"], 30_086);
}

#[test]
fn a_preferring_service_stays_when_the_ranges_change() {
    let old = new(&with(&json!({"ipFamilyPolicy": "PreferDualStack"}))).unwrap();
    let mut single = old.clone();
    complete(&networks(false), &Allocated::default().others(None), &mut single, Some(&old))
        .unwrap();
    assert_eq!(single["spec"]["clusterIPs"], old["spec"]["clusterIPs"]);
    let mut before = with(&json!({"ipFamilyPolicy": "PreferDualStack"}));
    before = json!({"metadata": {"name": "x"}, "spec": before});
    complete(&networks(false), &Allocated::default().others(None), &mut before, None).unwrap();
    assert_eq!(before["spec"]["ipFamilies"], json!(["IPv4"]));
    let mut after = before.clone();
    complete(&networks(true), &Allocated::default().others(None), &mut after, Some(&before))
        .unwrap();
    assert_eq!(after, before);
}
