//! The node's network devices and what the agent has on them, from outside: which get programs, what becomes of
//! the others, and what comes back when somebody takes it away.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "devices/changes.rs"]
mod changes;
#[cfg(test)]
#[path = "support/node.rs"]
mod node;
#[cfg(test)]
#[path = "support/rows.rs"]
mod rows;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs,
        io::{Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
        os::fd::AsFd as _,
        path::PathBuf,
        process::Command,
        sync::{Mutex, MutexGuard, PoisonError},
        thread,
        time::{Duration, Instant},
    };

    use aya::Pod;
    use ebpf_common::{
        ABI_VERSION, TCP,
        addr::Addr,
        config::Config,
        device::Device,
        endpoint::Endpoint,
        maps as names,
        service::{Backend, BackendKey, Service, ServiceKey},
        verdict::DropReason,
    };
    use nix::net::if_::if_nametoindex;
    use node_agent::{
        dataplane::{
            DataplaneConfig, TcPath,
            load::{Programs, TcHook},
            paths::Untranslated,
        },
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, Family::V4, ObjectKey, Protocol,
            ServiceKind, ServicePort, ServiceRow,
        },
        overlay::OverlayConfig,
        sys::{bpf, map::RowMap, netlink::Netlink},
        table::Table,
    };

    use super::{
        cgroup::TestCgroup,
        node::{
            Agent, NODE_IPS, Node,
            agent::START,
            place::{ip, is_possible},
            pod_ip,
            space::{Space, pause},
        },
        rows::Rows,
    };

    /// How long an answer may take; what is lost is sent again after 1, 3 and 7 s.
    const TIMEOUT: Duration = Duration::from_secs(10);
    const REFRESH: Duration = Duration::from_millis(500);
    /// For what an agent does at its next refresh, on an emulated processor too.
    pub(super) const PATIENCE: Duration = Duration::from_secs(30);
    const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);
    pub(super) const NODE_PORT: u16 = 30_080;
    pub(super) const POD: u8 = 11;
    const CLIENT_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 0, 99));
    const OTHER_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
    /// Both ends of the tunnel.
    const NEAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
    const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

    /// A node with a pod behind a node port, and a client on its wire.
    pub(super) struct World {
        pub(super) node: Node,
        pub(super) client: Space,
    }

    impl World {
        fn new() -> Self {
            let client = Space::new();
            let mut node = Node::new(&client);
            node.add_pod(POD);
            node.pods[&POD].run(|| serve(pod_ip(V4, POD), 8080, POD));
            let key = ObjectKey::new("default", "web");
            let port = ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: SERVICE.1,
                node_port: NODE_PORT,
            };
            let row = ServiceRow {
                kind: ServiceKind::NodePort,
                cluster_ips: vec![SERVICE.0.into()],
                ports: vec![port],
                ..ServiceRow::default()
            };
            let slice = EndpointSliceRow {
                service: key.clone(),
                ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
                endpoints: vec![EndpointRow { ip: pod_ip(V4, POD), ..EndpointRow::default() }],
                ..EndpointSliceRow::default()
            };
            node.services.upsert(key.clone(), row);
            node.slices.upsert(key, slice);
            Self { node, client }
        }

        /// Where links are pinned, seen from inside the node.
        fn links(&self) -> PathBuf {
            self.node.pins().join(format!("v{ABI_VERSION}/links"))
        }

        /// Who answers the client at the node's port.
        fn asked(&self) -> Option<u8> {
            self.client.run(|| ask((NODE_IPS[0], NODE_PORT)))
        }
    }

    /// An agent that looks at everything all the time.
    fn often(overlay: &mut OverlayConfig, dataplane: &mut DataplaneConfig) {
        (overlay.refresh, dataplane.refresh) = (REFRESH, REFRESH);
    }

    /// A server that says a number.
    fn serve(at: impl Into<IpAddr>, port: u16, number: u8) {
        let listener = TcpListener::bind((at.into(), port)).unwrap();
        let _server = thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                // The far end may have gone.
                let _gone = stream.write_all(&[number]);
            }
        });
    }

    /// The number that is said there, if somebody answers.
    pub(super) fn ask(at: impl Into<SocketAddr>) -> Option<u8> {
        let mut stream = TcpStream::connect_timeout(&at.into(), TIMEOUT).ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut number = [0];
        stream.read_exact(&mut number).ok()?;
        Some(number[0])
    }

    fn dropped(agent: &Agent, reason: DropReason) -> u64 {
        agent.report().drops.iter().find(|(one, _)| *one == reason).unwrap().1
    }

    /// Both ends of a tunnel whose device has no header of its own, as tun, WireGuard and ppp have none.
    fn add_tunnel(world: &World) {
        for (space, here, (near, far)) in
            [(&world.node.space, CLIENT_IP, (NEAR, FAR)), (&world.client, NODE_IPS[0], (FAR, NEAR))]
        {
            space.run(move || {
                ip("link add tun0 type vxlan gpe external dstport 4790");
                ip(&format!("addr add {near}/32 dev tun0"));
                ip("link set tun0 up");
                ip(&format!("route add {far}/32 encap ip id 7 dst {here} dev tun0 src {near}"));
            });
        }
    }

    #[test]
    fn a_device_without_ethernets_header_keeps_its_traffic_and_is_named() {
        by_both_ways(|world| {
            add_tunnel(world);
            world.client.run(|| serve(FAR, 9000, 2));
            world.node.space.run(|| serve(NEAR, 9000, 1));
            let agent = world.node.start(None);
            assert_eq!(world.asked(), Some(POD), "by the other device");
            assert_eq!(world.client.run(|| ask((NEAR, 9000))), Some(1));
            assert_eq!(world.node.space.run(|| ask((FAR, 9000))), Some(2));
            assert_eq!(dropped(&agent, DropReason::Malformed), 0);
            let status = agent.report().status_text();
            assert!(
                status.contains("device tun0: its packets have no Ethernet header"),
                "{status}"
            );
            // A pod asks the node by that address as by any other.
            assert_eq!(world.node.pods[&POD].run(|| ask((NEAR, 9000))), Some(1));
            agent.report().tc
        });
    }

    /// Waits for what the agent does by itself.
    pub(super) fn await_that(agent: &Agent, what: &str, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "{what}\n{}", agent.report().status_text());
            pause(Duration::from_millis(50));
        }
    }

    #[test]
    fn a_device_that_refuses_a_program_is_told_and_stops_no_other() {
        if !is_possible() {
            return;
        }
        let _turn = turn();
        let mut world = World::new();
        world.node.configure = often;
        let agent = world.node.start(None);
        if agent.report().tc == Some(TcPath::Clsact) {
            // Nothing is pinned there, where something else could be in the way.
            return;
        }
        let links = world.links();
        world.node.space.run(move || {
            ip("link add bad0 type veth peer name bad1");
            let ifindex = if_nametoindex("bad0").unwrap();
            fs::create_dir(links.join(format!("tc_from_underlay_{ifindex}"))).unwrap();
            ip("addr add 198.51.100.1/24 dev bad0");
            ip(&format!("addr add {OTHER_IP}/24 dev eth0"));
        });
        world.client.run(|| ip(&format!("route add {OTHER_IP}/32 dev wire0")));
        await_that(&agent, "another address of the node", || {
            world.client.run(|| ask((OTHER_IP, NODE_PORT))) == Some(POD)
        });
        let trouble = agent.report().trouble;
        assert!(
            matches!(&trouble[..], [("devices", words)] if words.starts_with("bad0: ")),
            "{trouble:?}"
        );
    }

    /// Takes programs off a device behind the agent's back.
    fn detach(world: &World, tc: TcPath, programs: [&'static str; 2], device: String) {
        let links = world.links();
        world.node.space.run(move || match tc {
            TcPath::Clsact => {
                let mut tc = Command::new("tc");
                tc.args(["qdisc", "delete", "dev", &device, "clsact"]);
                assert!(tc.status().unwrap().success());
            }
            TcPath::Tcx => {
                let ifindex = if_nametoindex(&*device).unwrap();
                for program in programs {
                    let pin = links.join(format!("{program}_{ifindex}"));
                    bpf::link_detach(bpf::open_pin(&pin).unwrap().as_fd()).unwrap();
                }
            }
        });
    }

    /// Deletes all rows of a map, and gives how many there were.
    fn empty<K: Pod, V: Pod>(world: &World, name: &'static str) -> usize {
        let pin = world.node.pins().join(format!("v{ABI_VERSION}/{name}"));
        world.node.space.run(move || {
            let map: RowMap<K, V> = RowMap::open(&pin).unwrap();
            let keys: Vec<K> = map.dump().unwrap().into_iter().map(|(key, _)| key).collect();
            assert!(map.delete(&keys).is_empty());
            keys.len()
        })
    }

    /// How many rows a map has; none while there is no map.
    fn rows<K: Pod, V: Pod>(world: &World, name: &'static str) -> usize {
        let pin = world.node.pins().join(format!("v{ABI_VERSION}/{name}"));
        world.node.space.run(move || {
            let map: Option<RowMap<K, V>> = pin.exists().then(|| RowMap::open(&pin).unwrap());
            map.map_or(0, |map| map.dump().unwrap().len())
        })
    }

    fn comes_back<K: Pod, V: Pod>((world, agent): (&World, &Agent), name: &'static str) {
        let count = empty::<K, V>(world, name);
        assert_ne!(count, 0, "{name}");
        await_that(agent, name, || rows::<K, V>(world, name) == count);
    }

    #[test]
    fn what_others_take_away_comes_back() {
        by_both_ways(|world| {
            world.node.configure = often;
            let agent = world.node.start(None);
            let path = agent.report().tc.unwrap();
            assert_eq!(world.asked(), Some(POD));
            let by_pod = || world.node.pods[&POD].run(|| ask(SERVICE));
            assert_eq!(by_pod(), Some(POD));

            detach(world, path, ["tc_from_underlay", "tc_to_underlay"], "eth0".to_owned());
            await_that(&agent, "the underlay's programs", || world.asked() == Some(POD));
            let veth = world.node.space.run(host_veth);
            detach(world, path, ["tc_from_pod", "tc_to_pod"], veth);
            await_that(&agent, "a pod's programs", || by_pod() == Some(POD));

            let at = (&*world, &agent);
            comes_back::<ServiceKey, Service>(at, names::SERVICES);
            comes_back::<BackendKey, Backend>(at, names::BACKENDS);
            comes_back::<Addr, Endpoint>(at, names::ENDPOINTS);
            comes_back::<u32, Device>(at, names::DEVICES);
            assert_eq!((world.asked(), by_pod()), (Some(POD), Some(POD)));

            let route = || world.node.space.run(|| shows("route show 10.96.0.0/16"));
            assert!(route());
            world.node.space.run(|| ip("route delete 10.96.0.0/16"));
            await_that(&agent, "the route of services", route);
            assert!(agent.report().trouble.is_empty(), "{}", agent.report().status_text());
            Some(path)
        });
    }

    /// Whether `ip` has something to say.
    fn shows(arguments: &str) -> bool {
        let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "{arguments}");
        !output.stdout.is_empty()
    }

    /// The node's end of the pod's link.
    fn host_veth() -> String {
        let links = Netlink::open().unwrap().links().unwrap();
        let names = links.into_iter().map(|link| link.name);
        names.into_iter().find(|name| name.starts_with("orl") && !name.contains('.')).unwrap()
    }

    /// What an agent of another version has left: programs on the uplink that refuse whom they are asked for.
    fn leave_another_version(world: &World) {
        let (pins, bpf) = (world.node.pins(), world.node.space.bpf.clone());
        world.node.space.run(move || {
            let theirs = bpf.join("theirs");
            let (mut programs, _maps) = Programs::load(Some(&theirs)).unwrap();
            let uplink = if_nametoindex("eth0").unwrap();
            for hook in [TcHook::FromUnderlay, TcHook::ToUnderlay] {
                programs.attach_tc(hook, uplink).unwrap();
            }
            let rows = Rows::below(&theirs);
            rows.set_config(Config {
                node_port_first: NODE_PORT,
                node_port_last: NODE_PORT,
                ..Config::default()
            });
            rows.put_node_address(&NODE_IPS[0].to_string());
            rows.put_service(&format!("0.0.0.0:{NODE_PORT}"), TCP, Service::default(), &[]);
            fs::create_dir(&pins).unwrap();
            fs::rename(theirs.join(format!("v{ABI_VERSION}")), pins.join("v2")).unwrap();
        });
    }

    #[test]
    fn programs_of_another_version_serve_until_this_one_can_and_then_go() {
        if !is_possible() {
            return;
        }
        let _turn = turn();
        let mut world = World::new();
        leave_another_version(&world);
        world.node.configure = often;
        // The server has not said that this is all.
        let (key, row) = world.node.services.changes_since(0).upserts.remove(0);
        world.node.services = Table::new();
        world.node.services.upsert(key, (*row).clone());
        let other = world.node.pins().join("v2");
        let is_there = || {
            let other = other.clone();
            world.node.space.run(move || other.exists())
        };
        thread::scope(|scope| {
            let starting = scope.spawn(|| world.node.start(None));
            let start = Instant::now();
            let is_programmed = || rows::<ServiceKey, Service>(&world, names::SERVICES) > 0;
            while !is_programmed() {
                assert!(start.elapsed() < START, "services of the snapshot");
                pause(Duration::from_millis(50));
            }
            pause(REFRESH * 3);
            assert!(is_there(), "it knows more");
            world.node.services.mark_synced();
            let agent = starting.join().unwrap();
            await_that(&agent, "the other version's end", || !is_there());
            await_that(&agent, "the node port", || world.asked() == Some(POD));
            assert!(agent.report().trouble.is_empty(), "{}", agent.report().status_text());
        });
    }

    #[test]
    fn a_device_that_is_not_chosen_any_more_loses_its_programs() {
        by_both_ways(|world| {
            let agent = world.node.start(None);
            let path = agent.report().tc;
            assert_eq!(world.asked(), Some(POD));
            drop(agent);
            world.node.space.settle();
            world.node.configure = |overlay, dataplane| {
                often(overlay, dataplane);
                dataplane.devices = vec!["eth9".to_owned()];
            };
            let agent = world.node.start(None);
            await_that(&agent, "no answer at the node port", || world.asked().is_none());
            let report = agent.report();
            let told = [
                ("eth0".to_owned(), Untranslated::NotChosen),
                ("eth9".to_owned(), Untranslated::NotThere),
            ];
            assert_eq!(report.untranslated, BTreeMap::from(told));
            assert!(report.trouble.is_empty(), "{}", report.status_text());
            path
        });
    }

    #[test]
    fn a_program_that_is_not_pinned_is_attached_once_however_often() {
        if !is_possible() {
            return;
        }
        let space = Space::new();
        space.run(|| {
            ip("link add e0 type veth peer name e1");
            let ifindex = if_nametoindex("e0").unwrap();
            let (mut programs, _maps) = Programs::load(None).unwrap();
            for _ in 0..2 {
                // The kernel takes a program only once.
                programs.attach_tc(TcHook::FromUnderlay, ifindex).unwrap();
            }
        });
    }

    #[test]
    fn node_ports_answer_at_loopback_where_asked_for() {
        if !is_possible() {
            return;
        }
        let _turn = turn();
        let cgroup = TestCgroup::enter("devices");
        let mut world = World::new();
        let at_loopback = || world.node.space.run(|| ask((Ipv4Addr::LOCALHOST, NODE_PORT)));
        let agent = world.node.start(Some(cgroup.path.clone()));
        assert_eq!(at_loopback(), None);
        let addresses = rows::<Addr, u32>(&world, names::NODE_ADDRS);
        drop(agent);
        world.node.space.settle();

        world.node.configure = |overlay, dataplane| {
            often(overlay, dataplane);
            dataplane.localhost_node_ports = true;
        };
        let agent = world.node.start(Some(cgroup.path.clone()));
        let at_loopback = || world.node.space.run(|| ask((Ipv4Addr::LOCALHOST, NODE_PORT)));
        await_that(&agent, "the node port at loopback", || at_loopback() == Some(POD));
        assert_eq!(rows::<Addr, u32>(&world, names::NODE_ADDRS), addresses + 2, "of both families");
        let by_pod = world.node.pods[&POD].run(|| ask((Ipv4Addr::LOCALHOST, NODE_PORT)));
        assert_eq!(by_pod, None, "a pod's loopback is its own");

        // Who detaches the program at the sockets has it back.
        let pin = world.links().join("cg_connect4");
        world.node.space.run(move || {
            bpf::link_detach(bpf::open_pin(&pin).unwrap().as_fd()).unwrap();
        });
        await_that(&agent, "the program at the sockets", || at_loopback() == Some(POD));
    }

    /// Runs a test by each way of attaching programs at tc that the kernel has; it gives the one that its agent took.
    pub(super) fn by_both_ways(test: impl Fn(&mut World) -> Option<TcPath>) {
        if !is_possible() {
            return;
        }
        let _turn = turn();
        for tc in [None, Some(TcPath::Clsact)] {
            let mut world = World::new();
            world.node.tc = tc;
            if test(&mut world) == Some(TcPath::Clsact) {
                // This kernel has no other, or it was the last.
                return;
            }
        }
    }

    /// Holds the tests apart: what one has at the sockets of this process, all would ask by.
    fn turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
