//! The agent's network parts follow any server of the Kubernetes API: ours, and upstream's `kube-apiserver` over an
//! etcd, where both programs are found. Runs them on a node in a network namespace as `deploy/daemonset.yaml` would,
//! with that manifest's permissions where the server knows such, and asks its services by real connections.
//!
//! Needs root, eBPF and kubectl; says so when it skips.

#[cfg(test)]
#[path = "api_server/manifest.rs"]
mod manifest;
#[cfg(test)]
#[path = "api_server/node.rs"]
mod node;
#[cfg(test)]
#[path = "../../node-agent/tests/support/place.rs"]
mod place;
#[cfg(test)]
#[path = "api_server/server.rs"]
mod server;
#[cfg(test)]
#[path = "../../node-agent/tests/support/space.rs"]
#[expect(dead_code, reason = "agents here are processes")]
mod space;

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        time::{Duration, Instant},
    };

    use serde_json::{Value, json};

    use super::{
        node::{IP, NAME, Node, addresses, node_object},
        place::is_possible,
        server::{Kind, Server},
        space::pause,
    };

    /// Longest until what the server was told is on the node.
    const SOON: Duration = Duration::from_secs(20);
    const NODE_PORT: u16 = 30_080;
    /// More than a page of a list (500, `kube::runtime::watcher`).
    const MANY: usize = 700;
    const WEB: [u8; 2] = [96, 80];

    /// Whether this can run here; says why if not.
    fn can_run() -> bool {
        let missing = ["busybox", "kubectl"].into_iter().find_map(|name| skip::program(name).err());
        if let Some(why) = &missing {
            skip::because(why);
        }
        missing.is_none() && is_possible()
    }

    #[test]
    fn follows_our_own_server() {
        if !super::node::play(&[]) && can_run() {
            follows(Kind::Ours);
        }
    }

    #[test]
    fn follows_upstreams_server() {
        if super::node::play(&[]) || !can_run() {
            return;
        }
        match Kind::upstream() {
            Ok(kind) => follows(kind),
            Err(missing) => skip::because(&missing),
        }
    }

    /// Waits until `ask` gives what is wanted.
    #[track_caller]
    fn soon<T: PartialEq + std::fmt::Debug>(what: &str, wanted: &T, mut ask: impl FnMut() -> T) {
        let start = Instant::now();
        loop {
            let got = ask();
            if got == *wanted {
                return;
            }
            assert!(start.elapsed() < SOON, "{what}: {got:?} and not {wanted:?}");
            pause(Duration::from_millis(50));
        }
    }

    fn service_ip(last: [u8; 2]) -> String {
        format!("10.96.{}.{}", last[0], last[1])
    }

    fn service(name: &str, last: [u8; 2], node_port: Option<u16>) -> Value {
        let mut port = json!({"name": "http", "port": 80, "targetPort": 8081});
        if let Some(node_port) = node_port {
            port["nodePort"] = node_port.into();
        }
        let kind = if node_port.is_some() { "NodePort" } else { "ClusterIP" };
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"type": kind, "clusterIP": service_ip(last), "ports": [port]},
        })
    }

    /// One endpoint of a service: a process of the node at this port.
    fn slice(service: &str, port: u16) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-{port}"),
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [IP], "conditions": {"ready": true}}],
        })
    }

    fn follows(kind: Kind) {
        let is_ours = matches!(kind, Kind::Ours);
        let node = Node::new();
        let mut server = Server::start(kind, &node);
        server.create(&[node_object(), service("web", WEB, Some(NODE_PORT)), slice("web", 8081)]);
        server.kubectl(&["patch", "node", NAME, "--subresource=status", "-p", &addresses()]);
        let credentials = server.credentials();
        node.start_agent(&credentials);
        let web = || node.ask(&service_ip(WEB), 80);
        let answers = |port: &str| Ok::<_, String>(port.to_owned());
        soon("the first list", &answers("8081"), web);
        assert_eq!(node.ask_from_outside(NODE_PORT), answers("8081"));

        increments(&server, &node);
        a_bad_object_is_told(&server);

        // A server that is away: what was programmed serves, also a new agent's.
        server.kill();
        assert_eq!(web(), answers("8082"));
        node.kill_agent();
        node.start_agent(&credentials);
        assert_eq!((web(), node.ask_from_outside(NODE_PORT)), (answers("8082"), answers("8082")));
        server.start_again();
        server.create(&[slice("web", 8081)]);
        server.kubectl(&["delete", "endpointslice", "web-8082"]);
        let web = || node.ask(&service_ip(WEB), 80);
        soon("the server came back", &answers("8081"), web);

        many(&server, &node, &credentials);
        what_was_missed(&mut server, &node, is_ours);
        let said = node.agent_said();
        // Upstream's server says that of everything until it has read its roles.
        let refused = |line: &&str| line.contains("forbidden") && !line.contains("cannot list");
        assert_eq!(said.lines().find(refused), None);
        assert!(!said.contains("panicked"), "{said}");
    }

    /// One object after the other, as the watch has them.
    fn increments(server: &Server<'_>, node: &Node) {
        let answers = |port: &str| Ok::<_, String>(port.to_owned());
        server.create(&[slice("web", 8082)]);
        server.kubectl(&["delete", "endpointslice", "web-8081"]);
        soon("another endpoint", &answers("8082"), || node.ask(&service_ip(WEB), 80));
        server.create(&[service("second", [96, 81], None), slice("second", 8081)]);
        soon("another service", &answers("8081"), || node.ask(&service_ip([96, 81]), 80));
        server.kubectl(&["delete", "service", "second"]);
        soon("a service that is gone", &true, || node.ask(&service_ip([96, 81]), 80).is_err());
        assert_eq!(node.ask_from_outside(NODE_PORT), answers("8082"));
    }

    /// What the node cannot do is told as a condition and an Event, by the permissions that the manifest gives.
    fn a_bad_object_is_told(server: &Server<'_>) {
        let mut bad = service("sctp", [96, 82], None);
        bad["spec"]["ports"][0]["protocol"] = "SCTP".into();
        server.create(&[bad]);
        let condition = "jsonpath={.status.conditions[?(@.type==\"Programmed\")].reason}";
        soon("its condition", &"UnsupportedField".to_owned(), || {
            server.kubectl(&["get", "service", "sctp", "-o", condition])
        });
        let about = ["--field-selector", "involvedObject.name=sctp"];
        let messages = ["-o", "jsonpath={.items[*].message}"];
        soon("its Event", &true, || {
            let said = server.kubectl(&[&["get", "events"], &about[..], &messages[..]].concat());
            said.contains("spec.ports[0].targetPort is not supported")
        });
    }

    /// Lists come in pages.
    fn many(server: &Server<'_>, node: &Node, credentials: &Path) {
        let address = |number: usize| {
            [u8::try_from(100 + number / 200).unwrap(), u8::try_from(1 + number % 200).unwrap()]
        };
        let services: Vec<_> = (0..MANY)
            .map(|number| service(&format!("many-{number}"), address(number), None))
            .collect();
        server.create(&services);
        server.create(&[slice("many-0", 8081), slice(&format!("many-{}", MANY - 1), 8082)]);
        let both =
            |node: &Node| [0, MANY - 1].map(|number| node.ask(&service_ip(address(number)), 80));
        let wanted = ["8081", "8082"].map(|port| Ok(port.to_owned()));
        soon("many services", &wanted, || both(node));
        node.kill_agent();
        node.start_agent(credentials);
        let all = server.kubectl(&["get", "services", "--all-namespaces", "-o", "name"]);
        assert!(all.lines().count() > MANY, "{all}");
        soon("a list of pages", &Some(all.lines().count()), || node.services());
        assert_eq!(both(node), wanted);
    }

    /// An agent that stands still, without a connection, while much is changed; it is not to be had from the watch any
    /// more.
    fn what_was_missed(server: &mut Server<'_>, node: &Node, is_ours: bool) {
        server.kill();
        node.stop_agent(true);
        server.start_again();
        server.kubectl(&["delete", "service", "many-0"]);
        server.create(&[service("third", [96, 83], None), slice("third", 8082)]);
        if !is_ours {
            server.compact();
        }
        server.kill();
        server.start_again();
        node.stop_agent(false);
        let third = || node.ask(&service_ip([96, 83]), 80);
        soon("a service that was missed", &Ok("8082".to_owned()), third);
        soon("one whose end was missed", &true, || node.ask(&service_ip([100, 1]), 80).is_err());
        assert_eq!(node.ask(&service_ip(WEB), 80), Ok("8081".to_owned()));
    }
}
