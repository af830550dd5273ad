//! The CNI plugin binary and its server against the specification, on the real kernel: a "node" and
//! its "pods" are network namespaces made here. Needs root and `ip`; says so when it skips.

/// Ends a test where it cannot run, and says why.
#[cfg(test)]
macro_rules! skip_unless_able {
    () => {
        if let Some(reason) = crate::fixture::skip_reason() {
            skip::because(reason);
            return;
        }
    };
}

#[cfg(test)]
#[path = "cni/deaths.rs"]
mod deaths;
#[cfg(test)]
#[path = "support/cni.rs"]
mod fixture;
#[cfg(test)]
#[path = "cni/repairs.rs"]
mod repairs;
#[cfg(test)]
#[path = "cni/steps.rs"]
mod steps;

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
        path::Path,
        time::Duration,
    };

    use node_agent::{
        model::{ObjectKey, Programmed, Protocol, ServicePort, ServiceRow},
        sys::netns::NetNs,
    };
    use serde_json::{Value, json};
    use tokio::sync::watch;

    use super::fixture::{Namespace, Node, PLUGINS, Pod, ip_ok, pod_network};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn pods_reach_their_node_and_each_other_after_add() {
        skip_unless_able!();
        let node = Node::new("n1");
        let (one, two) = (Pod::new("n1a"), Pod::new("n1b"));
        let (ip_one, result_one) = node.add(&one).await;
        let (ip_two, result_two) = node.add(&two).await;
        assert_ne!(ip_one, ip_two);
        assert!(
            one.namespace.reaches(&node.namespace, Ipv4Addr::new(192, 0, 2, 10)),
            "pod to node"
        );
        assert!(one.namespace.reaches(&two.namespace, ip_two), "pod to pod");
        assert!(node.namespace.reaches(&two.namespace, ip_two), "node to pod");
        assert_eq!(node.check(&one, &result_one).await, Ok(Value::Null));
        assert_eq!(node.check(&two, &result_two).await, Ok(Value::Null));
        let row = node.endpoints.row(&ip_one.into()).expect("the dataplane is told");
        assert_eq!(row.pod.to_string(), "default/web");
        let shown = ip_ok(&format!("-n {} -o link show type veth", node.namespace.0));
        assert!(shown.contains(&format!("{}: orl", row.host_ifindex)), "{shown}");
        assert!(node.folder.path().join("net.d/10-orlop.conflist").exists());
        assert_eq!(node.call("STATUS", None, json!({})).await, Ok(Value::Null));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pod_gets_answers_from_the_nodes_dns_address() {
        skip_unless_able!();
        let node = Node::new("n0");
        let pod = Pod::new("n0a");
        let (pod_ip, _) = node.add(&pod).await;
        // As the agent puts it there: on loopback, with host scope.
        ip_ok(&format!("-n {} addr add 169.254.20.10/32 dev lo scope host", node.namespace.0));
        let dns = ("169.254.20.10", 53);
        let inside_node = NetNs::open(&node.namespace.path()).unwrap();
        let server = inside_node.run(|| UdpSocket::bind(dns)).unwrap().unwrap();
        let inside_pod = NetNs::open(&pod.namespace.path()).unwrap();
        let client = inside_pod.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        }
        client.connect(dns).unwrap();
        client.send(b"question").unwrap();
        let mut buffer = [0; 16];
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip(), pod_ip, "no address translation");
        server.send_to(b"answer", from).unwrap();
        let length = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"answer");
        // The address is nobody's source: the node still speaks to pods with its own.
        let route = ip_ok(&format!("-n {} route get {pod_ip}", node.namespace.0));
        assert!(route.contains("src 192.0.2.10"), "{route}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_same_add_twice_gives_the_same_answer_and_keeps_the_link() {
        skip_unless_able!();
        let node = Node::new("n2");
        let pod = Pod::new("n2a");
        let (address, first) = node.add(&pod).await;
        let before = node.endpoints.row(&address.into());
        let (_, second) = node.add(&pod).await;
        assert_eq!(first, second);
        assert_eq!(before, node.endpoints.row(&address.into()));
        assert_eq!(node.links(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_port_of_the_node_is_one_pods_at_a_time_and_no_services() {
        skip_unless_able!();
        let mut node = Node::new("h1");
        let ports = |host_ip: &str, port: u16| {
            let mapping = json!([{"hostPort": port, "containerPort": 80, "hostIP": host_ip}]);
            json!({"runtimeConfig": {"portMappings": mapping}})
        };
        let node_port =
            ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 30_080 };
        let row = ServiceRow { ports: vec![node_port], ..ServiceRow::default() };
        node.services.upsert(ObjectKey::new("default", "web"), row);
        let (one, other) = (Pod::new("h1a"), Pod::new("h1b"));
        let result = node.call("ADD", Some(&one), ports("192.0.2.10", 8080)).await.unwrap();
        for (wanted, why) in [
            (ports("", 8080), "8080/TCP cannot lead to the pod: pod default/web has it"),
            (ports("", 30_080), "it is the node port of service default/web"),
            (ports("2001:db8::10", 8080), "the pod has no address of that family"),
        ] {
            let error = node.call("ADD", Some(&other), wanted).await.unwrap_err();
            assert_eq!(error["code"], 103, "{error}");
            assert!(error["msg"].as_str().unwrap().contains(why), "{error}");
        }
        assert_eq!(node.endpoints.len(), 1, "a refused pod has nothing");
        node.call("ADD", Some(&other), ports("127.0.0.1", 8080)).await.unwrap();
        // The next agent knows them, and the port is free when the pod has gone.
        node.start();
        let rows = node.endpoints.changes_since(0).upserts;
        let mut texts: Vec<String> =
            rows.iter().map(|(_, row)| row.host_ports[0].to_string()).collect();
        texts.sort();
        assert_eq!(texts, ["127.0.0.1:8080/TCP", "192.0.2.10:8080/TCP"]);
        node.check(&one, &result).await.unwrap();
        node.call("ADD", Some(&one), ports("192.0.2.10", 8080)).await.expect("its own");
        node.call("DEL", Some(&one), json!({})).await.unwrap();
        node.call("DEL", Some(&other), json!({})).await.unwrap();
        node.call("ADD", Some(&other), ports("", 8080)).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn check_fails_after_each_kind_of_tampering() {
        skip_unless_able!();
        let node = Node::new("n3");
        let pod = Pod::new("n3a");
        let (address, result) = node.add(&pod).await;
        let host_end = result["interfaces"][0]["name"].as_str().unwrap();
        let (inside, outside) = (&pod.namespace.0, &node.namespace.0);
        let tampering = [
            format!("-n {inside} link set lo down"),
            format!("-n {inside} addr del {address}/32 dev eth0"),
            format!("-n {inside} route del default"),
            format!("-n {inside} neigh del 169.254.1.1 dev eth0"),
            format!("-n {inside} link set eth0 mtu 1300"),
            format!("-n {outside} route del {address}/32"),
            format!("-n {outside} neigh del {address} dev {host_end}"),
            format!("-n {outside} link set {host_end} down"),
            format!("-n {outside} link del {host_end}"),
        ];
        for step in tampering {
            assert_eq!(node.check(&pod, &result).await, Ok(Value::Null), "before: {step}");
            ip_ok(&step);
            let error = node.check(&pod, &result).await.expect_err(&step);
            assert_eq!(error["code"], 100, "{step}: {error}");
            // A repeated ADD mends the link with the address that the pod had.
            assert_eq!(node.add(&pod).await.0, address, "{step}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn del_takes_everything_back_and_may_be_repeated() {
        skip_unless_able!();
        let node = Node::new("n4");
        let pod = Pod::new("n4a");
        let (address, result) = node.add(&pod).await;
        for _ in 0..2 {
            assert_eq!(node.call("DEL", Some(&pod), json!({})).await, Ok(Value::Null));
            assert_eq!(node.links(), 0);
            assert_eq!(node.endpoints.row(&address.into()), None);
        }
        let error = node.check(&pod, &result).await.expect_err("nothing is there");
        assert_eq!(error["code"], 100);
        assert_ne!(node.add(&pod).await.0, address, "a freed address is not given at once");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn gc_frees_what_is_not_listed_and_nothing_else() {
        skip_unless_able!();
        let node = Node::new("n5");
        let (kept, lost) = (Pod::new("n5a"), Pod::new("n5b"));
        let (kept_ip, kept_result) = node.add(&kept).await;
        let (lost_ip, _) = node.add(&lost).await;
        // Another network's collection is none of our pods' business.
        let none = json!({"name": "other", "cni.dev/valid-attachments": []});
        node.call("GC", None, none).await.unwrap();
        assert_eq!(node.links(), 2);
        ip_ok(&format!("-n {} link add orl00000000 type veth peer name x", node.namespace.0));
        let list = json!([{"containerID": kept.id, "ifname": "eth0"}]);
        let error =
            node.call("GC", None, json!({})).await.expect_err("no list is not an empty list");
        assert_eq!(error["code"], 7);
        node.call("GC", None, json!({"cni.dev/valid-attachments": list})).await.unwrap();
        assert_eq!(node.links(), 1);
        assert!(
            node.endpoints.row(&lost_ip.into()).is_none()
                && node.endpoints.row(&kept_ip.into()).is_some()
        );
        assert_eq!(node.check(&kept, &kept_result).await, Ok(Value::Null));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_new_server_restores_addresses_and_the_endpoint_table() {
        skip_unless_able!();
        let mut node = Node::new("n6");
        let (one, two, half) = (Pod::new("n6a"), Pod::new("n6b"), Pod::new("n6c"));
        let (ip_one, result) = node.add(&one).await;
        let (ip_half, half_result) = node.add(&half).await;
        // As if the agent had died between saving the address and making the link.
        let host_end = half_result["interfaces"][0]["name"].as_str().unwrap();
        ip_ok(&format!("-n {} link del {host_end}", node.namespace.0));
        node.start();
        assert!(node.endpoints.is_synced());
        assert!(
            node.endpoints.row(&ip_one.into()).is_some()
                && node.endpoints.row(&ip_half.into()).is_none()
        );
        assert_eq!(node.check(&one, &result).await, Ok(Value::Null));
        let (ip_two, _) = node.add(&two).await;
        assert!(ip_two != ip_one && ip_two != ip_half);
        assert_eq!(node.add(&half).await.0, ip_half, "the retried ADD completes the half-made one");
        assert!(half.namespace.reaches(&one.namespace, ip_one));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_add_that_fails_leaves_nothing_behind() {
        skip_unless_able!();
        let node = Node::new("n7");
        let pod = Pod::new("n7a");
        // The pod already has an interface of that name.
        ip_ok(&format!("-n {} link add eth0 type veth peer name y", pod.namespace.0));
        let error = node.call("ADD", Some(&pod), json!({})).await.expect_err("eth0 is taken");
        assert_eq!(error["code"], 102, "{error}");
        assert_eq!(node.links(), 0);
        let state = fs::read_to_string(node.folder.path().join("state/cni/ipam.json")).unwrap();
        assert!(!state.contains(&pod.id), "{state}");
        // The node's own namespace is nobody's pod.
        let own = Pod { id: "own".to_owned(), namespace: Namespace(node.namespace.0.clone()) };
        let error = node.call("ADD", Some(&own), json!({})).await.expect_err("own namespace");
        assert_eq!(error["code"], 4, "{error}");
        drop(own);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn add_waits_for_the_dataplane_and_fails_when_it_does_not_come() {
        skip_unless_able!();
        let mut node = Node::new("n8");
        let programmed = watch::Sender::new(Programmed::default());
        node.programmed = Some(programmed.subscribe());
        node.patience = Some(Duration::from_millis(200));
        node.start();
        let pod = Pod::new("n8a");
        let error = node.call("ADD", Some(&pod), json!({})).await.expect_err("nobody programs");
        assert_eq!(error["code"], 11, "{error}");
        assert_eq!((node.links(), node.endpoints.len()), (0, 0));
        // A server that waits, for a dataplane that follows the table, but for the first pod, whose device refuses
        // its programs.
        node.patience = None;
        node.start();
        let endpoints = node.endpoints.clone();
        let mut revisions = endpoints.subscribe();
        let mut bad = None;
        let dataplane = tokio::spawn(async move {
            while revisions.changed().await.is_ok() {
                let revision = *revisions.borrow_and_update();
                let rows = endpoints.changes_since(0).upserts;
                bad = bad.or_else(|| rows.first().map(|(_, row)| row.host_ifindex));
                let refused = rows.iter().filter(|(_, row)| Some(row.host_ifindex) == bad);
                let refused = refused.map(|(ip, _)| *ip).collect();
                programmed.send_replace(Programmed { revision, refused });
            }
        });
        let error = node.call("ADD", Some(&pod), json!({})).await.expect_err("it is refused");
        assert_eq!(error["code"], 11, "{error}");
        node.add(&Pod::new("n8b")).await;
        dataplane.abort();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn without_a_pod_cidr_or_an_agent_the_runtime_is_told_to_try_again() {
        skip_unless_able!();
        let mut node = Node::new("n9");
        node.network.send_replace(None);
        node.start();
        let pod = Pod::new("n9a");
        let code = |result: Result<Value, Value>| result.expect_err("not ready")["code"].clone();
        assert_eq!(code(node.call("ADD", Some(&pod), json!({})).await), 11);
        assert_eq!(code(node.call("STATUS", None, json!({})).await), 50);
        node.handle.take().unwrap().stop().await;
        for (command, expected) in [("ADD", 11), ("DEL", 11), ("STATUS", 50)] {
            assert_eq!(
                code(node.call(command, Some(&pod), json!({})).await),
                expected,
                "{command}"
            );
        }
        let version = node.call("VERSION", None, json!({})).await.unwrap();
        assert_eq!(version["supportedVersions"].as_array().unwrap().last().unwrap(), "1.1.0");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pod_of_two_families_is_reached_by_both_at_once() {
        skip_unless_able!();
        let mut node = Node::new("d1");
        node.network.send_replace(Some(pod_network(&["fd00:3::/64", "10.244.3.0/24"], 1400)));
        node.start();
        let (one, two) = (Pod::new("d1a"), Pod::new("d1b"));
        let first = node.call("ADD", Some(&one), json!({})).await.unwrap();
        let second = node.call("ADD", Some(&two), json!({})).await.unwrap();
        let address = |result: &Value, at: usize| -> std::net::IpAddr {
            let text = result["ips"][at]["address"].as_str().unwrap().to_owned();
            text.split('/').next().unwrap().parse().unwrap()
        };
        assert!(address(&first, 0).is_ipv6() && address(&first, 1).is_ipv4(), "{first}");
        for at in [0, 1] {
            let ip = address(&second, at);
            assert!(one.namespace.reaches(&two.namespace, ip), "pod to pod {ip}");
            assert!(node.namespace.reaches(&two.namespace, ip), "node to pod {ip}");
        }
        let own: std::net::IpAddr = "2001:db8::10".parse().unwrap();
        assert!(one.namespace.reaches(&node.namespace, own), "pod to node");
        assert_eq!(node.check(&one, &first).await, Ok(Value::Null));
        // Nothing of the kernel's own making: no link-local address, no address that waits.
        let shown = ip_ok(&format!("-n {} -6 addr show dev eth0", one.namespace.0));
        assert!(!shown.contains("fe80") && !shown.contains("tentative"), "{shown}");
        for step in [
            format!("-n {} -6 route del default", one.namespace.0),
            format!("-n {} -6 neigh del fe80::1 dev eth0", one.namespace.0),
            format!("-n {} addr del {}/128 dev eth0", one.namespace.0, address(&first, 0)),
            format!("-n {} -6 route del {}", node.namespace.0, address(&first, 0)),
        ] {
            ip_ok(&step);
            assert_eq!(node.check(&one, &first).await.expect_err(&step)["code"], 100, "{step}");
            assert_eq!(
                node.call("ADD", Some(&one), json!({})).await.as_ref(),
                Ok(&first),
                "{step}"
            );
        }
        assert_eq!(node.call("DEL", Some(&one), json!({})).await, Ok(Value::Null));
        let routes = ip_ok(&format!("-n {} -6 route", node.namespace.0));
        assert!(!routes.contains(&address(&first, 0).to_string()), "{routes}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_smaller_underlay_reaches_pods_that_run() {
        skip_unless_able!();
        let node = Node::new("m1");
        let pod = Pod::new("m1a");
        let (_, result) = node.add(&pod).await;
        node.network.send_replace(Some(pod_network(&["10.244.3.0/24"], 1300)));
        node.settled(1300).await;
        assert_eq!(node.check(&pod, &result).await, Ok(Value::Null));
        let shown = ip_ok(&format!("-n {} link show dev eth0", pod.namespace.0));
        assert!(shown.contains("mtu 1300"), "{shown}");
        let again = node.call("ADD", Some(&pod), json!({})).await.unwrap();
        assert_eq!(again["interfaces"][1]["mtu"], 1300);
    }

    /// Runs a command for each plugin of a chain as the specification has it: `ADD` forwards with each
    /// result given to the next, `DEL` backwards, the others in order, with the last result of `ADD`.
    async fn chain(
        node: &Node,
        command: &str,
        pod: Option<&Pod>,
        plugins: &[Value],
        (previous, extra): (Option<&Value>, &Value),
    ) -> Result<Value, Value> {
        let mut plugins = plugins.to_vec();
        if command == "DEL" {
            plugins.reverse();
        }
        let mut result = previous.cloned();
        for plugin in plugins {
            let mut config = plugin.clone();
            let map = config.as_object_mut().unwrap();
            // The version that both Debian's plugins (1.1.1) and we speak.
            map.insert("cniVersion".to_owned(), "1.0.0".into());
            map.insert("name".to_owned(), "chain".into());
            map.extend(extra.as_object().unwrap().clone());
            map.extend(result.clone().map(|result| ("prevResult".to_owned(), result)));
            let name = plugin["type"].as_str().unwrap();
            let ours = name == "orlop";
            let folder = if ours { node.folder.path().join("bin") } else { PLUGINS.into() };
            let said = node.run(&folder.join(name), command, pod, config).await;
            let said = said.map_err(|error| json!({"plugin": name, "error": error}))?;
            if command == "ADD" {
                result = Some(said);
            }
        }
        Ok(result.unwrap_or(Value::Null))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn debians_plugins_are_chained_before_and_behind() {
        skip_unless_able!();
        if !Path::new(PLUGINS).join("portmap").exists() {
            skip::because("needs Debian's containernetworking-plugins");
            return;
        }
        let mut node = Node::new("c1");
        node.network.send_replace(Some(pod_network(&["10.244.3.0/24", "fd00:3::/64"], 1450)));
        node.start();
        let pod = Pod::new("c1a");
        let socket = node.folder.path().join("cni.sock");
        let mapping = json!([{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp"}]);
        let plugins = [
            json!({"type": "loopback"}),
            json!({"type": "orlop", "socket": socket}),
            json!({"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}}),
            json!({"type": "bandwidth", "ingressRate": 80_000_000, "ingressBurst": 8_000_000}),
            json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true,
                   "runtimeConfig": {"portMappings": mapping}}),
        ];
        let nothing = json!({});
        let result = chain(&node, "ADD", Some(&pod), &plugins, (None, &nothing)).await.unwrap();
        let names: Vec<_> =
            result["interfaces"].as_array().unwrap().iter().map(|i| i["name"].clone()).collect();
        assert!(names.contains(&json!("lo")) && names.contains(&json!("eth0")), "{result}");
        // Not portmap's: that of 1.1.1 looks for the IPv4 rules in ip6tables.
        let checked = &plugins[..4];
        chain(&node, "CHECK", Some(&pod), checked, (Some(&result), &nothing)).await.unwrap();

        // Each of them did its part: the sysctl, the rate, and the port of the node.
        let inside = NetNs::open(&pod.namespace.path()).unwrap();
        let setting = "/proc/sys/net/ipv4/conf/eth0/arp_filter";
        assert_eq!(inside.run(|| fs::read_to_string(setting)).unwrap().unwrap().trim(), "1");
        let shown = ip_ok(&format!("-n {} -d link", node.namespace.0));
        assert!(shown.contains("qdisc tbf"), "{shown}");
        let listener = inside.run(|| TcpListener::bind("0.0.0.0:8080")).unwrap().unwrap();
        let own = NetNs::open(&node.namespace.path()).unwrap();
        let target = (Ipv4Addr::new(192, 0, 2, 10), 18080).into();
        let connected = own.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(2)));
        connected.unwrap().expect("portmap leads to the pod");
        drop(listener);

        chain(&node, "DEL", Some(&pod), &plugins, (Some(&result), &nothing)).await.unwrap();
        assert_eq!((node.links(), node.endpoints.len()), (0, 0));
        let error =
            chain(&node, "ADD", Some(&pod), &plugins[1..2], (Some(&result), &nothing)).await;
        assert_eq!(error.unwrap_err()["error"]["code"], 7, "eth0 is taken in the chain");
    }
}
