//! Debian's containerd makes pods by our CNI plugin as a kubelet asks it to: addresses, pods and services
//! that are reached by our programs, ports of the node, and what is left when the runtime is killed.
//!
//! Needs root, eBPF and the packages that `support/containerd.rs` names; says so when it skips.

#[cfg(test)]
#[path = "support/cluster.rs"]
#[expect(dead_code, reason = "its own pods and UDP are for other tests")]
mod cluster;
#[cfg(test)]
#[path = "support/containerd.rs"]
mod containerd;
#[cfg(test)]
#[path = "support/cri.rs"]
mod cri;

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, SocketAddr},
        path::Path,
        process::{Command, Stdio},
        slice::from_ref,
        thread,
    };

    use ipnet::IpNet;
    use node_agent::{dataplane::XdpMode, model::LocalEndpoint, overlay::Mode};
    use serde_json::{Value, json};

    use super::{
        cluster::agent::Agent,
        cluster::place::is_possible,
        cluster::space::Space,
        cluster::{
            Cluster, Node, SERVICE, SetUp, both_families, connect, make_bridge, node_ip, plug,
        },
        containerd::{Containerd, Pod, missing},
    };

    const HOST_PORT: u16 = 18_080;

    #[test]
    fn containerd_runs_pods_by_our_plugin() {
        if !is_possible() {
            return;
        }
        if let Some(what) = missing() {
            skip::because(&what);
            return;
        }
        let world = World::new();
        let World { folder, node, cluster, outside, .. } = &world;
        let mut containerd = Containerd::start(&node.space, folder.path());

        // Two at once, of which one has a port of the node.
        let (client, web) = thread::scope(|scope| {
            let web = scope.spawn(|| containerd.run_pod("web", Some(HOST_PORT)).unwrap());
            (containerd.run_pod("client", None).unwrap(), web.join().unwrap())
        });
        for (pod, name) in [(&web, "web"), (&client, "client")] {
            check_addresses(node, pod, name);
        }
        assert_ne!(web.ips, client.ips);
        let error = containerd.run_pod("other", Some(HOST_PORT)).map(|pod| pod.id).unwrap_err();
        assert!(error.to_string().contains("pod default/web has it"), "{error}");
        assert_eq!(addresses(folder.path()), 2, "a refused pod has nothing");

        // From a container to the other pod and to the service; from outside by the port of the node.
        containerd
            .run_container(&web, &["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]);
        let asker = containerd.run_container(&client, &["/bin/busybox", "sleep", "1000"]);
        let IpAddr::V4(web_ip) = web.ips[0] else { panic!("{:?}", web.ips) };
        cluster.set_backends(&[web_ip]);
        cluster.settle(from_ref(&world.agent));
        let service = format!("http://{}:{}/", SERVICE.0, SERVICE.1);
        let pods = web.ips.iter().map(|ip| format!("http://{}/", SocketAddr::new(*ip, 8080)));
        for url in pods.chain([service.clone()]) {
            assert_eq!(fetch(&containerd, &asker, &url), ("orlop".to_owned(), 0), "{url}");
        }
        assert_eq!(outside.run(|| page((node_ip(1), HOST_PORT))), "orlop");

        // The runtime dies: its pods go on, and the next one knows them.
        containerd.kill();
        assert_eq!(node.space.run(move || page((web_ip, 8080))), "orlop");
        containerd.resume();
        assert_eq!(containerd.pods().len(), 2);
        assert_eq!(fetch(&containerd, &asker, &service), ("orlop".to_owned(), 0));
        containerd.remove_pod(&client.id);
        assert_eq!(addresses(folder.path()), 1);
        assert!(client.ips.iter().all(|ip| node.endpoints.row(ip).is_none()));

        // It dies and forgets a pod that nobody removes any more: a collection frees what it had.
        containerd.lose_everything();
        assert!(containerd.pods().is_empty());
        assert_eq!(addresses(folder.path()), 1);
        collect(folder.path());
        assert_eq!(addresses(folder.path()), 0);
        assert_eq!(node.endpoints.len(), 0);
        let links = node.space.run(|| Command::new("ip").args(["-o", "link"]).output().unwrap());
        let links = String::from_utf8(links.stdout).unwrap();
        let of_pods = |line: &&str| line.contains(": orl") && !line.contains(": orlop.");
        assert_eq!(links.lines().filter(of_pods).count(), 0, "{links}");
        drop(containerd);
        world.end();
    }

    /// A node with our agent's network parts and a client outside.
    struct World {
        folder: tempfile::TempDir,
        node: Node,
        cluster: Cluster,
        outside: Space,
        agent: Agent,
        _lan: Space,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let lan = Space::new();
            lan.run(make_bridge);
            let mut node = Node::new(1, both_families, &lan);
            node.cni = Some(folder.path().to_owned());
            let outside = Space::new();
            plug(&lan, &outside, 99);
            let cluster = Cluster::with_backends(both_families, &[]);
            let set_up = SetUp {
                mode: Mode::Vxlan,
                tc: None,
                cgroup: None,
                pins: Some(node.space.bpf.join("orlop")),
                xdp: XdpMode::Off,
            };
            let agent = node.start(&cluster, set_up);
            Self { folder, node, cluster, outside, agent, _lan: lan }
        }

        fn end(self) {
            drop(self.agent);
            self.node.space.settle();
        }
    }

    /// One address of each of the node's ranges, known to the dataplane under the pod's own name.
    fn check_addresses(node: &Node, pod: &Pod, name: &str) {
        let ranges: [IpNet; 2] =
            ["10.244.1.0/24".parse().unwrap(), "fd00:244:0:1::/64".parse().unwrap()];
        assert_eq!(pod.ips.len(), 2, "{:?}", pod.ips);
        for (ip, range) in pod.ips.iter().zip(ranges) {
            assert!(range.contains(ip), "{ip}");
            let row: LocalEndpoint = (*node.endpoints.row(ip).expect("a row")).clone();
            assert_eq!(row.pod.to_string(), format!("default/{name}"));
        }
    }

    fn fetch(containerd: &Containerd, container: &str, url: &str) -> (String, u64) {
        containerd.exec(container, &["/bin/busybox", "wget", "-qO-", url])
    }

    /// What a web server at an address says, without its head.
    fn page(address: (Ipv4Addr, u16)) -> String {
        let mut stream = connect(address.into());
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.rsplit("\r\n\r\n").next().unwrap().to_owned()
    }

    /// Pods that have addresses, by the file that outlives the agent.
    fn addresses(folder: &Path) -> usize {
        let state = fs::read(folder.join("cni/ipam.json")).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        state["records"].as_array().map_or(0, Vec::len)
    }

    /// What a runtime that knows of no pods says (CRI-O does; containerd never does).
    fn collect(folder: &Path) {
        let config = json!({
            "cniVersion": "1.1.0", "name": "orlop", "type": "orlop",
            "socket": folder.join("cni.sock"), "cni.dev/valid-attachments": [],
        });
        let mut plugin = Command::new(folder.join("bin/orlop"))
            .env_clear()
            .envs([("CNI_COMMAND", "GC"), ("CNI_PATH", "/usr/lib/cni")])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        plugin.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        assert!(plugin.wait().unwrap().success());
    }
}
