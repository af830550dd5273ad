//! Every type of Service as kubectl makes, prints and changes it.

use serde_json::json;

use super::server;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_makes_and_prints_every_type() {
    let Some(server) = server().await else { return };
    server.ok("create deployment web --image=nginx --port=80", "").await;
    for line in [
        "expose deployment web --port=80 --target-port=8080",
        "expose deployment web --name=sticky --port=80 --session-affinity=ClientIP",
        "expose deployment web --name=balanced --port=53 --protocol=UDP --type=LoadBalancer",
        "expose deployment web --name=listed --port=80 --external-ip=192.0.2.7",
        "create service loadbalancer lb --tcp=80:8080",
        "create service externalname ext --external-name=example.com",
        "create service nodeport np --tcp=80:8080 --node-port=30123",
        "create service clusterip headless --clusterip=None",
    ] {
        server.ok(line, "").await;
    }
    let table = server.ok("get svc --no-headers", "").await;
    let rows: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().take(5).collect()).collect();
    let row = |name: &str| rows.iter().find(|row| row[0] == name).unwrap()[1..].join(" ");
    assert_eq!(row("web"), "ClusterIP 10.96.1.1 <none> 80/TCP");
    assert_eq!(row("balanced"), "LoadBalancer 10.96.1.3 <pending> 53:30086/UDP");
    assert_eq!(row("listed"), "ClusterIP 10.96.1.4 192.0.2.7 80/TCP");
    assert_eq!(row("ext"), "ExternalName <none> example.com <none>");
    assert_eq!(row("np"), "NodePort 10.96.1.6 <none> 80:30123/TCP");
    assert_eq!(row("headless"), "ClusterIP None <none> <none>");
    let sticky = server.json("get svc sticky").await;
    assert_eq!(sticky["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10_800);

    let ingress = json!({"status": {"loadBalancer": {"ingress": [
        {"ip": "203.0.113.9"}, {"hostname": "b.example.com"}]}}});
    let patch = format!(
        "patch svc balanced --subresource=status -p {}",
        ingress.to_string().replace(' ', "")
    );
    server.ok(&patch, "").await;
    let balanced = server.json("get svc balanced").await;
    assert_eq!(balanced["status"]["loadBalancer"]["ingress"][0]["ipMode"], "VIP");
    let table = server.ok("get svc balanced --no-headers", "").await;
    assert!(table.contains(" 203.0.113.9,b.example.com "), "{table}");
    let said = server.refused(&patch.replace("svc balanced", "svc np"), "").await;
    assert!(said.contains("status.loadBalancer.ingress: Forbidden: may only be used when `spec.type` is 'LoadBalancer'"), "{said}");

    // What the type no longer has goes; a manifest that says less keeps what was given.
    server.ok(r#"patch svc balanced -p {"spec":{"externalTrafficPolicy":"Local"}}"#, "").await;
    let local = server.json("get svc balanced").await;
    assert_eq!(local["spec"]["healthCheckNodePort"], 30_088);
    server.ok(r#"patch svc balanced -p {"spec":{"type":"ClusterIP"}}"#, "").await;
    let plain = server.json("get svc balanced").await;
    assert_eq!(plain["status"], json!({"loadBalancer": {}}));
    assert_eq!(plain["spec"].get("healthCheckNodePort"), None);
    assert_eq!(plain["spec"]["clusterIP"], local["spec"]["clusterIP"]);
    let external =
        r#"patch svc web -p {"spec":{"type":"ExternalName","externalName":"a.example"}}"#;
    server.ok(external, "").await;
    let back = r#"patch svc web -p {"spec":{"type":"ClusterIP","externalName":null}}"#;
    assert_eq!(server.json("get svc web").await["spec"].get("clusterIP"), None);
    server.ok(back, "").await;
    // What was given back comes last.
    assert_eq!(server.json("get svc web").await["spec"]["clusterIP"], "10.96.1.7");
    let described = server.ok("describe svc listed", "").await;
    assert!(described.contains("Internal Traffic Policy:  Cluster"), "{described}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_applied_again_is_unchanged() {
    let Some(server) = server().await else { return };
    let manifest = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "loadBalancerClass": "example.com/a", "loadBalancerSourceRanges": ["10.0.0.0/8"],
            "trafficDistribution": "PreferSameZone", "selector": {"app": "web"},
            "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80, "protocol": "SCTP"}]}})
    .to_string();
    for line in ["apply -f -", "apply --server-side --force-conflicts -f -"] {
        server.ok(line, &manifest).await;
        let before = server.json("get svc web").await;
        server.ok(line, &manifest).await;
        assert_eq!(server.json("get svc web").await["spec"], before["spec"], "{line}");
    }
    let whole = server.json("get svc web").await;
    server.ok("replace -f -", &manifest).await;
    assert_eq!(server.json("get svc web").await["spec"], whole["spec"]);
    assert_eq!(
        whole["spec"]["ports"][0]["nodePort"], whole["spec"]["ports"][1]["nodePort"],
        "one port of two protocols has one node port"
    );
    let dry = server.ok("create service nodeport dry --tcp=80 --dry-run=server -o json", "").await;
    assert!(dry.contains("\"nodePort\""), "{dry}");
}
