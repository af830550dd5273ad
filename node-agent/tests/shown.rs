//! `node-agent services` and `endpoints` on a running dataplane, as whoever looks at a node sees them.

#[cfg(test)]
#[path = "support/node.rs"]
#[expect(dead_code, reason = "other nodes are for other tests")]
mod node;
#[cfg(test)]
#[path = "support/views.rs"]
mod views;

#[cfg(test)]
mod tests {
    use std::{
        net::IpAddr,
        path::{Path, PathBuf},
        process::Command,
    };

    use node_agent::{
        dataplane::{Reporter, XdpMode},
        debug,
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, Family, ObjectKey, Protocol, ServiceKind,
            ServicePort, ServiceRow, TrafficPolicy,
        },
        parse,
        readers::Readers,
        way::Known,
    };
    use serde_json::{Value, json};

    use super::{
        node::{
            Agent, NAME, Node,
            place::is_possible,
            pod_ip,
            space::{Space, pause},
        },
        views,
    };

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("default", name)
    }

    /// Two services with backends here, there and on the way out, and one whose ports are not all supported.
    fn fill(node: &Node) {
        let port = |port, node_port| ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port,
            node_port,
        };
        let web = ServiceRow {
            kind: ServiceKind::LoadBalancer,
            cluster_ips: vec!["10.96.1.1".parse().unwrap()],
            ingress_ips: vec!["203.0.113.7".parse().unwrap()].into(),
            source_ranges: vec!["198.51.100.0/24".parse().unwrap()].into(),
            external_policy: TrafficPolicy::Local,
            affinity_s: 10_800,
            ports: vec![port(80, 30_080)],
            ..ServiceRow::default()
        };
        node.services.upsert(key("web"), web);
        let endpoint = |ip: &str, node: &str| EndpointRow {
            ip: ip.parse().unwrap(),
            node: node.into(),
            ..EndpointRow::default()
        };
        let slice = |service: &str, port, endpoints| EndpointSliceRow {
            service: key(service),
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port }],
            endpoints,
            ..EndpointSliceRow::default()
        };
        let pods = vec![endpoint("10.244.1.11", NAME), endpoint("10.244.2.7", "node-2")];
        node.slices.upsert(key("web-1"), slice("web", 8_080, pods));
        let old =
            EndpointRow { ready: false, terminating: true, ..endpoint("10.244.2.8", "node-2") };
        node.slices.upsert(key("db-1"), slice("db", 5_432, vec![old]));
        let sync = json!({"name": "sync", "port": 3_868, "targetPort": 3_869, "protocol": "SCTP"});
        for (name, ip, ports) in [
            ("db", "10.96.1.2", json!([{"port": 5_432}])),
            ("odd", "10.96.1.3", json!([{"port": 5_432}, sync])),
        ] {
            let object = json!({
                "metadata": {"namespace": "default", "name": name},
                "spec": {"clusterIP": ip, "ports": ports},
            });
            let (key, row) = parse::service(&serde_json::from_value(object).unwrap()).unwrap();
            node.services.upsert(key, row);
        }
    }

    /// The agent's socket in a folder, until the test's process ends.
    fn serve(node: &Node, reporter: Reporter, folder: &Path) {
        let known = Known { services: node.services.clone(), endpoints: node.endpoints.clone() };
        let (pins, nodes) = (node.pins(), node.nodes.clone());
        let socket = folder.join("agent.sock");
        let there = socket.clone();
        node.space.spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let readers = Readers::new(&pins, known, Some(reporter)).with_node(NAME.into(), nodes);
            runtime.block_on(debug::serve(&socket, views::of(NAME, readers))).unwrap();
        });
        while !there.exists() {
            pause(std::time::Duration::from_millis(5));
        }
    }

    struct Shown {
        folder: PathBuf,
    }

    impl Shown {
        /// What the command prints, or what it complains of.
        fn ask(&self, words: &str) -> Result<String, String> {
            let command = Command::new(env!("CARGO_BIN_EXE_node-agent"))
                .args(words.split_whitespace())
                .arg("--run-dir")
                .arg(&self.folder)
                .output()
                .unwrap();
            let text = |bytes| String::from_utf8(bytes).unwrap();
            if command.status.success() {
                Ok(text(command.stdout))
            } else {
                Err(text(command.stderr))
            }
        }

        /// The cells of each line.
        #[track_caller]
        fn lines(&self, words: &str) -> Vec<String> {
            let text = self.ask(words).unwrap();
            let cells = |line: &str| {
                let cells = line.split("   ").map(str::trim).filter(|cell| !cell.is_empty());
                cells.collect::<Vec<_>>().join(" | ")
            };
            text.lines().map(cells).collect()
        }
    }

    fn services_are_shown_as_they_are_programmed(shown: &Shown) {
        let (here, all) =
            ("10.244.1.11:8080 (ready)", "10.244.2.7:8080 (ready), 10.244.1.11:8080 (ready)");
        let (kept, limited) = ("affinity 10800 s", "open to 198.51.100.0/24");
        assert_eq!(
            shown.lines("services"),
            [
                "SERVICE | KIND | FRONTEND | BACKENDS | NOTES".to_owned(),
                "default/db | ClusterIP | 10.96.1.2:5432/TCP | 10.244.2.8:5432 (terminating)"
                    .to_owned(),
                "default/odd | ClusterIP | - | - | spec.ports[1].targetPort is not supported"
                    .to_owned(),
                format!("default/web | ClusterIP | 10.96.1.1:80/TCP | {all} | {kept}"),
                format!(
                    "default/web | LoadBalancer | 203.0.113.7:80/TCP | {all} | {kept}; {limited}"
                ),
                format!(
                    "default/web | LoadBalancer | 203.0.113.7:80/TCP from outside | {here} | \
                     policy Local; {kept}; {limited}"
                ),
                format!("default/web | NodePort | node:30080/TCP | {all} | {kept}"),
                format!(
                    "default/web | NodePort | node:30080/TCP from outside | {here} | policy Local; {kept}"
                ),
            ]
        );
        let json: Value = serde_json::from_str(&shown.ask("services -o json").unwrap()).unwrap();
        assert_eq!(json.as_array().unwrap().len(), 7);
        assert_eq!(json[2]["backends"][0]["node"], "node-2");
        assert_eq!(shown.lines("services db -n default").len(), 2);
        assert_eq!(shown.lines("services default/web").len(), 6);
        assert_eq!(shown.lines("services -n kube-system").len(), 1, "the head alone");
        assert_eq!(shown.ask("services wob").unwrap_err(), "node-agent: there is no service wob\n");
    }

    /// More than a page has, asked for page by page.
    fn all_services_are_shown(shown: &Shown, node: &Node, agent: &Agent) {
        for number in 0..1_200_u32 {
            let ip = IpAddr::from((0x0a61_0001 + number).to_be_bytes());
            let row = ServiceRow {
                cluster_ips: vec![ip],
                ports: vec![ServicePort {
                    name: "".into(),
                    protocol: Protocol::Tcp,
                    port: 80,
                    node_port: 0,
                }],
                ..ServiceRow::default()
            };
            node.services.upsert(ObjectKey::new("many", &format!("s{number}")), row);
        }
        node.settle(agent);
        assert_eq!(shown.lines("services -n many").len(), 1_201);
        let json = shown.ask("services -o json").unwrap();
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json.as_array().unwrap().len(), 1_207);
    }

    fn endpoints_are_shown_as_they_are_programmed(shown: &Shown) {
        let lines = shown.lines("endpoints");
        let (device, pod) = ("device orl", "default/pod-11 | node-1");
        assert!(lines[1].starts_with(&format!("10.244.1.11 | {pod} | {device}")), "{lines:?}");
        assert!(lines[2].starts_with(&format!("fd00:244:0:1::b | {pod} | {device}")), "{lines:?}");
        for line in [
            "ADDRESS | POD | NODE | WAY",
            "10.244.1.0/24 | - | node-1 | this node's pods, nobody else",
            "10.244.2.0/24 | - | node-2 | tunnel to 192.168.0.2",
            "192.168.0.2/32 | - | node-2 | tunnel to 192.168.0.2",
            "fd00:244:0:2::/64 | - | node-2 | tunnel to 192.168.0.2",
        ] {
            assert!(lines.iter().any(|one| one == line), "{line} not in {lines:?}");
        }
        assert_eq!(shown.lines("endpoints pod-11").len(), 3);
        let json = shown.ask("endpoints -n default -o json").unwrap();
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            (json.as_array().unwrap().len(), &json[0]["pod"]),
            (2, &"default/pod-11".into())
        );
        let words = "node-agent: this node has no pod wob\n";
        assert_eq!(shown.ask("endpoints wob").unwrap_err(), words);
    }

    #[test]
    fn what_is_programmed_is_shown() {
        if !is_possible() {
            return;
        }
        let client = Space::new();
        let mut node = Node::new(&client);
        node.configure = |_overlay, dataplane| dataplane.xdp = XdpMode::Off;
        node.add_node(2);
        node.add_pod(11);
        assert_eq!(pod_ip(Family::V4, 11).to_string(), "10.244.1.11");
        fill(&node);
        let agent = node.start(None);
        let folder = tempfile::tempdir().unwrap();
        serve(&node, agent.reporter.clone(), folder.path());
        let shown = Shown { folder: folder.path().to_owned() };
        services_are_shown_as_they_are_programmed(&shown);
        endpoints_are_shown_as_they_are_programmed(&shown);
        all_services_are_shown(&shown, &node, &agent);
    }
}
