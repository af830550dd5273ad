//! Services of a cluster with two families, as kubectl makes and changes them.

use serde_json::{Value, json};

use super::{Server, server, server_with};

async fn dual() -> Option<Server> {
    server_with(&["10.96.0.0/16", "fd00:10:96::/108"]).await
}

fn manifest(name: &str, spec: &Value) -> String {
    let mut whole = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"ports": [{"port": 80}], "selector": {"app": "web"}}});
    for (key, value) in spec.as_object().unwrap() {
        whole["spec"][key] = value.clone();
    }
    whole.to_string()
}

/// Policy, families and addresses.
async fn stands(server: &Server, name: &str) -> String {
    let spec = server.json(&format!("get svc {name}")).await["spec"].clone();
    format!("{} {} {}", spec["ipFamilyPolicy"], spec["ipFamilies"], spec["clusterIPs"])
        .replace('"', "")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn families_follow_from_the_policy() {
    let Some(server) = dual().await else { return };
    // Name, what is asked, what is given.
    let cases = [
        ("plain", json!({}), "SingleStack [IPv4] [10.96.1.1]"),
        (
            "prefer",
            json!({"ipFamilyPolicy": "PreferDualStack"}),
            "PreferDualStack [IPv4,IPv6] [10.96.1.2,fd00:10:96::101]",
        ),
        (
            "require",
            json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}),
            "RequireDualStack [IPv6,IPv4] [fd00:10:96::102,10.96.1.3]",
        ),
        ("six", json!({"ipFamilies": ["IPv6"]}), "SingleStack [IPv6] [fd00:10:96::103]"),
        (
            "named",
            json!({"ipFamilyPolicy": "PreferDualStack", "clusterIP": "fd00:10:96::7"}),
            "PreferDualStack [IPv6,IPv4] [fd00:10:96::7,10.96.1.4]",
        ),
        (
            "headless",
            json!({"clusterIP": "None", "ipFamilyPolicy": "PreferDualStack"}),
            "PreferDualStack [IPv4,IPv6] [None]",
        ),
        (
            "bare",
            json!({"clusterIP": "None", "selector": null}),
            "RequireDualStack [IPv4,IPv6] [None]",
        ),
    ];
    for (name, spec, want) in cases {
        server.ok("create -f -", &manifest(name, &spec)).await;
        assert_eq!(stands(&server, name).await, want, "{name}");
    }
    let table = server.ok("get svc prefer require", "").await;
    assert!(table.contains("10.96.1.2 ") && table.contains("fd00:10:96::102 "), "{table}");
    let described = server.ok("describe svc prefer", "").await;
    assert!(described.contains("10.96.1.2,fd00:10:96::101"), "{described}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn families_come_and_go_with_the_policy() {
    let Some(server) = dual().await else { return };
    server.ok("apply -f -", &manifest("web", &json!({}))).await;
    let to =
        |policy: &str| format!(r#"patch svc web -p {{"spec":{{"ipFamilyPolicy":"{policy}"}}}}"#);
    server.ok(&to("PreferDualStack"), "").await;
    let both = "PreferDualStack [IPv4,IPv6] [10.96.1.1,fd00:10:96::101]";
    assert_eq!(stands(&server, "web").await, both);
    // The manifest says nothing of families: nothing changes.
    server.ok("apply -f -", &manifest("web", &json!({}))).await;
    assert_eq!(stands(&server, "web").await, both);
    let mut whole = server.json("get svc web").await;
    whole["spec"]["clusterIPs"] = json!(["10.96.1.1"]);
    let said = server.refused("replace -f -", &whole.to_string()).await;
    assert!(said.contains("spec.ipFamilyPolicy: Invalid value: \"PreferDualStack\": must be 'SingleStack' to release the secondary cluster IP"), "{said}");
    let secondary = r#"patch svc web -p {"spec":{"clusterIPs":["10.96.1.1","fd00:10:96::9"]}}"#;
    let said = server.refused(secondary, "").await;
    assert!(said.contains("spec.clusterIPs[1]: Invalid value: [\"10.96.1.1\",\"fd00:10:96::9\"]: may not change once set"), "{said}");
    server.ok(&to("SingleStack"), "").await;
    assert_eq!(stands(&server, "web").await, "SingleStack [IPv4] [10.96.1.1]");
    // The second address was given back.
    let taken = json!({"ipFamilies": ["IPv6"], "clusterIP": "fd00:10:96::101"});
    server.ok("create -f -", &manifest("other", &taken)).await;
    server.ok(&to("RequireDualStack"), "").await;
    assert_eq!(
        stands(&server, "web").await,
        "RequireDualStack [IPv4,IPv6] [10.96.1.1,fd00:10:96::102]"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_cluster_has_not_is_refused_in_upstreams_words() {
    let Some(server) = server().await else { return };
    let cases = [
        (
            json!({"ipFamilyPolicy": "RequireDualStack"}),
            "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services",
        ),
        (
            json!({"ipFamilies": ["IPv6"]}),
            "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
        ),
        (
            json!({"clusterIP": "fd00::1"}),
            "spec.clusterIPs[0]: Invalid value: [\"fd00::1\"]: IPv6 is not configured on this cluster",
        ),
        (
            json!({"ipFamilies": ["IPv4", "IPv6"]}),
            "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
        ),
        (
            json!({"ipFamilies": ["IPv4"], "clusterIP": "fd00::1"}),
            "spec.clusterIPs[0]: Invalid value: \"fd00::1\": expected an IPv4 value as indicated by `ipFamilies[0]`",
        ),
        (
            json!({"ipFamilies": ["IPv5"]}),
            "spec.ipFamilies[0]: Unsupported value: \"IPv5\": supported values: \"IPv4\", \"IPv6\"",
        ),
        (
            json!({"ipFamilyPolicy": "Both"}),
            "spec.ipFamilyPolicy: Unsupported value: \"Both\": supported values: \"PreferDualStack\", \"RequireDualStack\", \"SingleStack\"",
        ),
        (
            json!({"clusterIPs": ["10.96.0.9"]}),
            "spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: must be empty when `clusterIP` is not specified",
        ),
        (
            json!({"clusterIP": "10.96.0.8", "clusterIPs": ["10.96.0.9"]}),
            "spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: first value must match `clusterIP`",
        ),
        (
            json!({"clusterIP": "10.97.0.8"}),
            "spec.clusterIPs: Invalid value: [\"10.97.0.8\"]: failed to allocate IP 10.97.0.8: the provided network does not match the current range",
        ),
        (
            json!({"clusterIP": "nonsense"}),
            "spec.clusterIPs[0]: Invalid value: \"nonsense\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        ),
    ];
    for (spec, want) in cases {
        let said = server.refused("create -f -", &manifest("web", &spec)).await;
        assert!(said.contains(want), "{said}\nwanted: {want}");
    }
    // Preferring what is not there is no error.
    let prefer = json!({"ipFamilyPolicy": "PreferDualStack"});
    server.ok("create -f -", &manifest("web", &prefer)).await;
    assert_eq!(stands(&server, "web").await, "PreferDualStack [IPv4] [10.96.1.1]");
}
