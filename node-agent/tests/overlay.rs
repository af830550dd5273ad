//! The overlay alone on the real kernel: nodes and pods of both families in network namespaces, by
//! routes; what nodes that come, go and change leave behind; devices that are not as they should be.

#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/space.rs"]
#[expect(dead_code, reason = "nothing here is pinned")]
mod space;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::{Read as _, Write as _},
        net::{IpAddr, SocketAddr, TcpListener, TcpStream},
        path::PathBuf,
        process::Command,
        sync::mpsc,
        thread,
        time::{Duration, Instant},
    };

    use ipnet::IpNet;
    use node_agent::{
        cni::{
            ipam::Attachment,
            veth::{self, VethSpec},
        },
        model::{FarEnd, FarPath, NodeRow, ObjectKey, PodNetwork},
        overlay::{self, Mode, OverlayConfig, OverlayDevice, host::HOST},
        sys::{
            netlink::{Netlink, Owner},
            netns::NetNs,
        },
        table::Table,
    };
    use tokio::sync::{oneshot, watch};

    use super::{
        place::{ip, is_possible},
        space::{Space, pause},
    };

    const TIMEOUT: Duration = Duration::from_secs(20);

    type Nodes = Table<ObjectKey, NodeRow>;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn key(number: u8) -> ObjectKey {
        ObjectKey::new("", &format!("node-{number}"))
    }

    /// Node `number` as it is at first, or at another address, or with other pod CIDRs.
    fn row(address: u8, cidr: u8) -> NodeRow {
        let addresses = [format!("192.168.0.{address}"), format!("2001:db8::{address}")];
        let cidrs = [format!("10.244.{cidr}.0/24"), format!("fd00:244:0:{cidr}::/64")];
        NodeRow {
            internal_ips: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            ready: true,
            leaving: false,
            labels: BTreeMap::new(),
        }
    }

    fn cluster(numbers: &[u8]) -> Nodes {
        let nodes = Table::new();
        for number in numbers {
            nodes.upsert(key(*number), row(*number, *number));
        }
        nodes.mark_synced();
        nodes
    }

    fn config(number: u8, mode: Mode) -> OverlayConfig {
        OverlayConfig {
            mode,
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/108".parse().unwrap()],
            ..OverlayConfig::new(&format!("node-{number}"), row(number, 0).internal_ips)
        }
    }

    /// A running overlay; dropping it ends it as if killed.
    struct Agent {
        _stop: oneshot::Sender<()>,
        tunnels: Table<IpNet, FarEnd>,
        device: watch::Receiver<Option<OverlayDevice>>,
        network: watch::Receiver<Option<PodNetwork>>,
        trouble: watch::Receiver<Option<String>>,
    }

    fn start(space: &Space, config: OverlayConfig, nodes: &Nodes) -> Agent {
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let nodes = nodes.clone();
        space.spawn_agent(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let handle = overlay::start(config, nodes).unwrap();
                let agent = Agent {
                    _stop: stop,
                    tunnels: handle.tunnels.clone(),
                    device: handle.device.clone(),
                    network: handle.network.clone(),
                    trouble: handle.trouble.clone(),
                };
                ready.send(agent).unwrap();
                // Dropped sender or message: both mean stop.
                let _stop: Result<(), _> = stopped.await;
            });
        });
        is_ready.recv_timeout(TIMEOUT).expect("the overlay starts")
    }

    fn wait(what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < TIMEOUT, "{what}");
            pause(Duration::from_millis(20));
        }
    }

    fn plug(lan: &Space, space: &Space, number: u8) {
        let tid = space.tid;
        lan.run(move || {
            ip(&format!(
                "link add port{number} type veth peer name eth0 netns {tid}
                 link set port{number} master lan up"
            ));
        });
        space.run(move || {
            ip(&format!(
                "addr add 192.168.0.{number}/24 dev eth0
                 addr add 2001:db8::{number}/64 dev eth0 nodad
                 link set eth0 up"
            ));
        });
    }

    fn lan() -> Space {
        let lan = Space::new();
        lan.run(|| ip("link add lan type bridge\nlink set lan up"));
        lan
    }

    fn namespace(space: &Space) -> PathBuf {
        format!("/proc/self/task/{}/ns/net", space.tid).into()
    }

    /// A pod made as the CNI server makes it, in which a server echoes.
    fn pod(node: &Space, number: u8) -> (Space, Vec<IpAddr>) {
        let pod = Space::new();
        let addresses = ips(&[&format!("10.244.{number}.5"), &format!("fd00:244:0:{number}::5")]);
        let attachment = Attachment::new(&format!("pod-{number}"), "eth0");
        let spec = VethSpec::new(&attachment, &addresses, 1500, &row(number, 0).internal_ips);
        let host = NetNs::open(&namespace(node)).unwrap();
        veth::attach(&host, &namespace(&pod), &spec).unwrap();
        pod.run(|| {
            let listener = TcpListener::bind("[::]:8080").unwrap();
            let _server = thread::spawn(move || {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _connection = thread::spawn(move || {
                        let mut byte = [0];
                        while stream.read_exact(&mut byte).is_ok()
                            && stream.write_all(&byte).is_ok()
                        {}
                    });
                }
            });
        });
        (pod, addresses)
    }

    fn connect(space: &Space, address: IpAddr) -> TcpStream {
        space.run(move || {
            let address = SocketAddr::new(address, 8080);
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(3));
            let stream = stream.unwrap_or_else(|error| panic!("{address}: {error}"));
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            stream
        })
    }

    fn echoes(stream: &mut TcpStream) {
        stream.write_all(b"?").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }

    /// Our routes to peers, as `destination via`.
    fn routes(space: &Space) -> Vec<String> {
        let mut routes = space.run(|| {
            let mut netlink = Netlink::open().unwrap();
            let host = netlink.link(HOST).unwrap().map(|link| link.index);
            let ours = |route: &node_agent::sys::netlink::Route| {
                route.owner == Owner::Orlop && Some(route.device) != host
            };
            let all = netlink.all_routes().unwrap();
            let text = |route: node_agent::sys::netlink::Route| match route.gateway {
                Some(gateway) => format!("{} via {gateway}", route.destination),
                None if route.device == 0 => format!("{} nobody", route.destination),
                None => format!("{} tunnel", route.destination),
            };
            all.into_iter().filter(ours).map(text).collect::<Vec<_>>()
        });
        routes.sort();
        routes
    }

    /// The route of a node's own range, of which its gateway has the first address.
    fn nobody_near(gateway: &str) -> String {
        let bits = if gateway.contains(':') { 64 } else { 24 };
        format!("{} nobody", IpNet::new(gateway.parse().unwrap(), bits).unwrap().trunc())
    }

    fn output(space: &Space, arguments: &'static str) -> String {
        space.run(move || {
            let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }

    #[test]
    fn pods_of_both_families_are_reached_by_routes_while_agents_come_and_go() {
        if !is_possible() {
            return;
        }
        for mode in [Mode::L3, Mode::Auto] {
            let lan = lan();
            let (one, two) = (Space::new(), Space::new());
            plug(&lan, &one, 1);
            plug(&lan, &two, 2);
            let nodes = cluster(&[1, 2]);
            let agents = [(&one, 1), (&two, 2)].map(|(space, number)| {
                let agent = start(space, config(number, mode), &nodes);
                wait("the device", || agent.device.borrow().is_some());
                assert_eq!(*agent.trouble.borrow(), None);
                agent
            });
            let network = agents[0].network.borrow().clone().unwrap();
            assert_eq!(
                (network.mtu, network.cidrs.len()),
                (if mode == Mode::L3 { 1500 } else { 1450 }, 2)
            );
            let own = agents[0].tunnels.row(&network.cidrs[0]).map(|far| far.path);
            assert_eq!(own, Some(FarPath::Here), "no tunnel leads home");
            let ((near, _), (_far, far_ips)) = (pod(&one, 1), pod(&two, 2));
            let mut open: Vec<_> = far_ips.iter().map(|ip| connect(&near, *ip)).collect();
            for ip in &far_ips {
                drop(connect(&one, *ip));
            }
            drop(agents);
            [&one, &two].into_iter().for_each(Space::settle);
            open.iter_mut().for_each(echoes);
            let before = routes(&one);
            let again = start(&one, config(1, mode), &nodes);
            wait("the device", || again.device.borrow().is_some());
            assert_eq!(routes(&one), before);
            open.iter_mut().for_each(echoes);
            for ip in &far_ips {
                echoes(&mut connect(&near, *ip));
            }
        }
    }

    #[test]
    fn nodes_that_come_go_and_change_leave_nothing_behind() {
        if !is_possible() {
            return;
        }
        let (lan, one) = (lan(), Space::new());
        plug(&lan, &one, 1);
        let nodes = cluster(&[1, 2, 3]);
        let agent = start(&one, config(1, Mode::Auto), &nodes);
        let rows = || {
            let delta = agent.tunnels.changes_since(0);
            delta.upserts.iter().map(|(net, far)| format!("{net} {}", far.node)).collect::<Vec<_>>()
        };
        let third = ["10.244.3.0/24 via 192.168.0.3", "fd00:244:0:3::/64 via 2001:db8::3"];
        let settled = |second: &[&str], gateways: &[&str]| {
            let nobody: Vec<_> = gateways.iter().map(|gateway| nobody_near(gateway)).collect();
            let nobody: Vec<_> = nobody.iter().map(String::as_str).collect();
            let mut expected = [&third[..], second, &nobody].concat();
            expected.sort_unstable();
            wait("the routes", || routes(&one) == expected);
            // Told after the routes are there.
            let gateways: Vec<_> = ips(gateways).into_iter().map(Some).collect();
            wait("the gateways", || {
                agent.device.borrow().is_some_and(|device| device.gateways.to_vec() == gateways)
            });
            let far = second.iter().filter(|way| way.contains("10.244"));
            assert_eq!(rows().len(), 4 + 2 * far.count(), "{:?}", rows());
        };
        let gateways = ["10.244.1.1", "fd00:244:0:1::1"];
        settled(&["10.244.2.0/24 via 192.168.0.2", "fd00:244:0:2::/64 via 2001:db8::2"], &gateways);
        // Re-addressed.
        nodes.upsert(key(2), row(22, 2));
        settled(
            &["10.244.2.0/24 via 192.168.0.22", "fd00:244:0:2::/64 via 2001:db8::22"],
            &gateways,
        );
        // Created anew with other ranges.
        nodes.upsert(key(2), row(22, 9));
        settled(
            &["10.244.9.0/24 via 192.168.0.22", "fd00:244:0:9::/64 via 2001:db8::22"],
            &gateways,
        );
        // Moved to a network further away: through the tunnel, which knows its addresses too.
        let mut away = row(2, 9);
        away.internal_ips = ips(&["172.16.0.2"]);
        nodes.upsert(key(2), away);
        wait("the tunnel", || routes(&one).contains(&"10.244.9.0/24 tunnel".to_owned()));
        assert!(rows().contains(&"172.16.0.2/32 172.16.0.2".to_owned()), "{:?}", rows());
        // This node itself created anew: its addresses and the sources of its routes move.
        nodes.upsert(key(1), row(1, 7));
        nodes.delete(&key(2));
        let gateways = ["10.244.7.1", "fd00:244:0:7::1"];
        wait("the new gateway", || {
            agent.device.borrow().unwrap().gateways[0] == Some(ips(&gateways)[0])
        });
        settled(&[], &gateways);
        let shown = output(&one, "addr show dev orlop.host");
        assert!(shown.contains("10.244.7.1/32") && !shown.contains("10.244.1.1"), "{shown}");
        let shown = output(&one, "route show 10.244.3.0/24");
        assert!(shown.contains("src 192.168.0.1"), "{shown}");
        let shown = output(&one, "route show 169.254.21.0/29");
        assert!(shown.contains("src 10.244.7.1"), "{shown}");
    }

    #[test]
    fn nodes_of_the_last_snapshot_are_reached_and_none_is_forgotten_before_the_list_is_whole() {
        if !is_possible() {
            return;
        }
        let (lan, one) = (lan(), Space::new());
        plug(&lan, &one, 1);
        let both = ["10.244.2.0/24 via 192.168.0.2", "10.244.3.0/24 via 192.168.0.3"];
        let has = |way: &str| routes(&one).contains(&way.to_owned());
        drop({
            let agent = start(&one, config(1, Mode::Auto), &cluster(&[1, 2, 3]));
            wait("the routes", || both.iter().all(|way| has(way)));
            agent
        });
        one.settle();
        // The next agent knows of two nodes, and no server has answered yet.
        let nodes = Table::new();
        nodes.upsert(key(1), row(1, 1));
        nodes.upsert(key(4), row(4, 4));
        let agent = start(&one, config(1, Mode::Auto), &nodes);
        wait("the route of the snapshot", || has("10.244.4.0/24 via 192.168.0.4"));
        // Told when all routes are made.
        wait("the network, by which pods can be given addresses", || {
            agent.network.borrow().is_some()
        });
        assert!(both.iter().all(|way| has(way)), "{:?}", routes(&one));
        nodes.mark_synced();
        nodes.upsert(key(5), row(5, 5));
        wait("the whole list", || has("10.244.5.0/24 via 192.168.0.5") && !has(both[0]));
    }

    #[test]
    fn what_goes_with_a_device_or_an_address_is_back_as_soon_as_that_is() {
        if !is_possible() {
            return;
        }
        let (lan, one) = (lan(), Space::new());
        plug(&lan, &one, 1);
        let config = OverlayConfig { refresh: TIMEOUT * 100, ..config(1, Mode::Auto) };
        let agent = start(&one, config, &cluster(&[1, 2]));
        let both = ["10.244.2.0/24 via 192.168.0.2", "fd00:244:0:2::/64 via 2001:db8::2"];
        let has_both = || {
            let routes = routes(&one);
            both.iter().all(|way| routes.iter().any(|route| route == way))
        };
        wait("the routes", has_both);
        // The kernel drops routes by a device that goes down, and IPv6 addresses with them.
        one.run(|| {
            ip("link set eth0 down\nlink set eth0 up\naddr add 2001:db8::1/64 dev eth0 nodad")
        });
        wait("the routes by a device that was down", has_both);
        one.run(|| ip("addr del 192.168.0.1/24 dev eth0"));
        wait("trouble", || agent.trouble.borrow().is_some());
        let words = agent.trouble.borrow().clone().unwrap();
        assert_eq!(
            words,
            "no device has the node address 192.168.0.1: put it back, or start the agent with another --node-ip"
        );
        one.run(|| ip("addr add 192.168.0.1/24 dev eth0"));
        wait("the routes by an address that was away", has_both);
        wait("no trouble", || agent.trouble.borrow().is_none());
        one.run(|| ip("link del orlop.host"));
        wait("the device", || !output(&one, "link show dev orlop.host").is_empty());
    }

    #[test]
    fn services_lead_to_the_host_device_and_nowhere_else() {
        if !is_possible() {
            return;
        }
        for (mode, sources) in [
            (Mode::Vxlan, ["10.244.1.1", "fd00:244:0:1::1"]),
            (Mode::Off, ["169.254.21.1", "fd6f:726c:6f70::1"]),
        ] {
            let (lan, one) = (lan(), Space::new());
            plug(&lan, &one, 1);
            one.run(|| ip("route add default via 192.168.0.254"));
            one.run(|| ip("route add default via 2001:db8::254"));
            let agent = start(&one, config(1, mode), &cluster(&[1]));
            wait("the device", || agent.device.borrow().is_some());
            let index = agent.device.borrow().unwrap().host_ifindex;
            let asked =
                ["route get 10.96.5.5", "route get fd00:96::5"].map(|ask| output(&one, ask));
            for (route, source) in asked.iter().zip(sources) {
                let to = format!("dev orlop.host proto 111 src {source}");
                let to4 = format!("dev orlop.host src {source}");
                assert!(route.contains(&to) || route.contains(&to4), "{mode:?}: {route}");
            }
            // Nobody is asked for a neighbour: the packet goes at once, to the device's own address.
            let shown = output(&one, "link show dev orlop.host");
            assert!(shown.contains("NOARP") && shown.contains(",UP"), "{shown}");
            // Taken away, it comes back with the next look.
            one.run(|| ip("link del orlop.net"));
            drop(agent);
            one.settle();
            let agent = start(&one, config(1, mode), &cluster(&[1]));
            wait("the device", || agent.device.borrow().is_some());
            assert_ne!(agent.device.borrow().unwrap().host_ifindex, index);
            assert_eq!(agent.device.borrow().unwrap().ifindex == 0, mode == Mode::Off);
        }
    }

    #[test]
    fn devices_of_others_are_named_and_old_ones_of_ours_replaced() {
        if !is_possible() {
            return;
        }
        let (lan, one) = (lan(), Space::new());
        plug(&lan, &one, 1);
        one.run(|| ip("link add orlop.host type bridge"));
        // The port of another build, and no far ends with the packets.
        one.run(|| ip("link add orlop.vxlan type vxlan id 7 dstport 4789 dev eth0"));
        let agent = start(&one, config(1, Mode::Vxlan), &cluster(&[1, 2]));
        wait("trouble", || agent.trouble.borrow().is_some());
        let words = agent.trouble.borrow().clone().unwrap();
        assert_eq!(
            words,
            "device orlop.host is somebody else's: it is no veth; rename or remove it"
        );
        one.run(|| ip("link del orlop.host"));
        wait("the device", || agent.device.borrow().is_some());
        wait("no trouble", || agent.trouble.borrow().is_none());
        let shown = output(&one, "-d link show dev orlop.vxlan");
        assert!(shown.contains("dstport 8472") && shown.contains("external"), "{shown}");
        assert!(shown.contains("mtu 1450") && shown.contains("nolearning"), "{shown}");
        let ours = ["10.244.1.0/24 nobody", "10.244.2.0/24 tunnel"];
        let ours6 = ["fd00:244:0:1::/64 nobody", "fd00:244:0:2::/64 tunnel"];
        assert_eq!(routes(&one), [ours, ours6].concat());
        assert_eq!(output(&one, "neigh show dev orlop.vxlan"), "");
        // A smaller underlay makes the tunnel and the pods' packets smaller.
        drop(agent);
        one.settle();
        one.run(|| ip("link set eth0 mtu 1400"));
        let agent = start(&one, config(1, Mode::Vxlan), &cluster(&[1, 2]));
        wait("the network", || agent.network.borrow().is_some());
        assert_eq!(agent.network.borrow().as_ref().unwrap().mtu, 1350);
        assert!(output(&one, "link show dev orlop.vxlan").contains("mtu 1350"));
    }
}
