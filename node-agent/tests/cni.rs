//! The CNI plugin binary and its server against the specification, on the real kernel: a "node" and
//! its "pods" are network namespaces made here. Needs root and `ip`; says so when it skips.

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write as _,
        net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
        path::{Path, PathBuf},
        process::{Command, Output, Stdio},
        sync::OnceLock,
        time::Duration,
    };

    use ipnet::Ipv4Net;
    use node_agent::{
        cni::{self, CniConfig, CniInputs, Handle},
        model::LocalEndpoint,
        sys::netns::NetNs,
        table::Table,
    };
    use serde_json::{Value, json};
    use tokio::sync::watch;

    fn ip(arguments: &str) -> Output {
        Command::new("ip").args(arguments.split_whitespace()).output().expect("ip runs")
    }

    fn ip_ok(arguments: &str) -> String {
        let output = ip(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn skip_reason() -> Option<&'static str> {
        if !rustix::process::geteuid().is_root() {
            return Some("needs root to make network namespaces");
        }
        let present = Command::new("ip").arg("-V").output().is_ok_and(|o| o.status.success());
        (!present).then_some("needs the ip command")
    }

    /// A network namespace that is gone with the value.
    struct Namespace(String);

    impl Namespace {
        fn new(name: &str) -> Self {
            let name = format!("orlop-t{}-{name}", std::process::id());
            ip_ok(&format!("netns add {name}"));
            ip_ok(&format!("-n {name} link set lo up"));
            Self(name)
        }

        fn path(&self) -> PathBuf {
            Path::new("/run/netns").join(&self.0)
        }

        /// Whether a TCP connection from here to an address of `other` comes about.
        fn reaches(&self, other: &Self, address: Ipv4Addr) -> bool {
            let far = NetNs::open(&other.path()).unwrap();
            let listener = far.run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
            let target: SocketAddr = listener.local_addr().unwrap();
            let near = NetNs::open(&self.path()).unwrap();
            near.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(2)).is_ok())
                .unwrap()
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            ip(&format!("netns del {}", self.0));
        }
    }

    /// The plugin as built by cargo from the `shim` package.
    fn plugin() -> &'static [u8] {
        static PLUGIN: OnceLock<Vec<u8>> = OnceLock::new();
        PLUGIN.get_or_init(|| {
            let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("shim/Cargo.toml");
            let build = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "--message-format=json", "--manifest-path"])
                .arg(manifest)
                .stderr(Stdio::inherit())
                .output()
                .expect("cargo runs");
            assert!(build.status.success(), "the plugin builds");
            let executable = String::from_utf8(build.stdout)
                .unwrap()
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .find_map(|message| message["executable"].as_str().map(PathBuf::from))
                .expect("cargo names the executable");
            fs::read(executable).unwrap()
        })
    }

    struct Node {
        namespace: Namespace,
        folder: tempfile::TempDir,
        cidr: watch::Sender<Option<Ipv4Net>>,
        endpoints: Table<Ipv4Addr, LocalEndpoint>,
        programmed: Option<watch::Receiver<u64>>,
        handle: Option<Handle>,
    }

    impl Node {
        fn new(name: &str) -> Self {
            let namespace = Namespace::new(name);
            // The node's own address, which the kernel must choose as source towards pods.
            ip_ok(&format!("-n {} link add uplink type veth peer name far", namespace.0));
            ip_ok(&format!("-n {} addr add 192.0.2.10/24 dev uplink", namespace.0));
            ip_ok(&format!("-n {} link set uplink up", namespace.0));
            let mut node = Self {
                namespace,
                folder: tempfile::tempdir().unwrap(),
                cidr: watch::Sender::new(Some("10.244.3.0/24".parse().unwrap())),
                endpoints: Table::new(),
                programmed: None,
                handle: None,
            };
            node.start();
            node
        }

        /// Starts the server anew, as a new agent process would: only the state file carries over.
        fn start(&mut self) {
            self.handle = None;
            self.endpoints = Table::new();
            let mut config = CniConfig::new(&self.folder.path().join("state"), self.folder.path());
            config.conf_dir = self.folder.path().join("net.d");
            config.bin_dir = self.folder.path().join("bin");
            config.host_netns = Some(self.namespace.path());
            config.node_ip = Some(Ipv4Addr::new(192, 0, 2, 10));
            config.program_timeout = Duration::from_millis(200);
            let inputs = CniInputs {
                pod_cidr: self.cidr.subscribe(),
                endpoints: self.endpoints.clone(),
                programmed: self.programmed.clone(),
            };
            self.handle = Some(cni::start(config, inputs, plugin()).unwrap());
        }

        fn config(&self, extra: &Value) -> Value {
            let socket = self.folder.path().join("cni.sock");
            let mut config =
                json!({"cniVersion": "1.1.0", "name": "orlop", "type": "orlop", "socket": socket});
            let (Some(all), Some(extra)) = (config.as_object_mut(), extra.as_object()) else {
                panic!("extra is an object")
            };
            all.extend(extra.clone());
            config
        }

        /// Runs the installed plugin as a runtime would.
        async fn call(
            &self,
            command: &str,
            pod: Option<&Pod>,
            extra: Value,
        ) -> Result<Value, Value> {
            let mut plugin = Command::new(self.folder.path().join("bin/orlop"));
            plugin.env_clear().env("CNI_COMMAND", command).env("CNI_PATH", "/opt/cni/bin");
            if let Some(pod) = pod {
                plugin
                    .env("CNI_CONTAINERID", &pod.id)
                    .env("CNI_NETNS", pod.namespace.path())
                    .env("CNI_IFNAME", "eth0")
                    .env("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web");
            }
            let config = self.config(&extra);
            tokio::task::spawn_blocking(move || {
                let mut child = plugin
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .expect("plugin runs");
                child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
                let output = child.wait_with_output().unwrap();
                let value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
                if output.status.success() { Ok(value) } else { Err(value) }
            })
            .await
            .unwrap()
        }

        async fn add(&self, pod: &Pod) -> (Ipv4Addr, Value) {
            let result = self.call("ADD", Some(pod), json!({})).await.expect("ADD succeeds");
            let address = result["ips"][0]["address"].as_str().unwrap();
            (address.strip_suffix("/32").unwrap().parse().unwrap(), result)
        }

        async fn check(&self, pod: &Pod, previous: &Value) -> Result<Value, Value> {
            self.call("CHECK", Some(pod), json!({"prevResult": previous})).await
        }

        fn links(&self) -> usize {
            ip_ok(&format!("-n {} -o link", self.namespace.0)).matches(": orl").count()
        }
    }

    struct Pod {
        id: String,
        namespace: Namespace,
    }

    impl Pod {
        fn new(name: &str) -> Self {
            Self { id: format!("container-{name}"), namespace: Namespace::new(name) }
        }
    }

    macro_rules! skip_unless_able {
        () => {
            if let Some(reason) = skip_reason() {
                eprintln!("skipped: {reason}");
                return;
            }
        };
    }

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
        let row = node.endpoints.row(&ip_one).expect("the dataplane is told");
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
        let before = node.endpoints.row(&address);
        let (_, second) = node.add(&pod).await;
        assert_eq!(first, second);
        assert_eq!(before, node.endpoints.row(&address));
        assert_eq!(node.links(), 1);
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
            assert_eq!(node.endpoints.row(&address), None);
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
        ip_ok(&format!("-n {} link add orl00000000 type veth peer name x", node.namespace.0));
        let list = json!([{"containerID": kept.id, "ifname": "eth0"}]);
        let error =
            node.call("GC", None, json!({})).await.expect_err("no list is not an empty list");
        assert_eq!(error["code"], 7);
        node.call("GC", None, json!({"cni.dev/valid-attachments": list})).await.unwrap();
        assert_eq!(node.links(), 1);
        assert!(node.endpoints.row(&lost_ip).is_none() && node.endpoints.row(&kept_ip).is_some());
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
        assert!(node.endpoints.row(&ip_one).is_some() && node.endpoints.row(&ip_half).is_none());
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
        let programmed = watch::Sender::new(0_u64);
        node.programmed = Some(programmed.subscribe());
        node.start();
        let pod = Pod::new("n8a");
        let error = node.call("ADD", Some(&pod), json!({})).await.expect_err("nobody programs");
        assert_eq!(error["code"], 11, "{error}");
        assert_eq!((node.links(), node.endpoints.len()), (0, 0));
        // A dataplane that follows the table.
        let mut revisions = node.endpoints.subscribe();
        let dataplane = tokio::spawn(async move {
            while revisions.changed().await.is_ok() {
                programmed.send_replace(*revisions.borrow_and_update());
            }
        });
        node.add(&pod).await;
        dataplane.abort();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn without_a_pod_cidr_or_an_agent_the_runtime_is_told_to_try_again() {
        skip_unless_able!();
        let mut node = Node::new("n9");
        node.cidr.send_replace(None);
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
}
