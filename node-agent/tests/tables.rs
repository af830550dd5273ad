//! A running agent whose tables change in ways that are easily missed: an address passes from a pod to the next at
//! once, rows of an earlier agent are nobody's any more, a Service's last pod goes.

#[cfg(test)]
#[path = "support/node.rs"]
mod node;
#[cfg(test)]
#[path = "support/pins.rs"]
#[expect(dead_code, reason = "maps are the agent's own here")]
mod pins;

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
        thread,
        time::{Duration, Instant},
    };

    use ebpf_common::{addr::Addr, endpoint::Endpoint, maps as names};
    use nix::net::if_::if_nametoindex;
    use node_agent::{
        dataplane::{TcPath, look::Look},
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, Family::V4, LocalEndpoint, ObjectKey,
            Protocol, ServiceKind, ServicePort, ServiceRow, TrafficPolicy,
        },
        sys::map::RowMap,
        table::Table,
    };

    use super::{
        node::{
            NAME, NODE_IPS, Node,
            place::{ip, is_possible},
            pod_ip,
            space::{Space, pause},
        },
        pins,
    };

    const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);
    const CHECK_PORT: u16 = 32_000;
    const CLIENT: u8 = 11;
    const SERVER: u8 = 12;
    const TIMEOUT: Duration = Duration::from_secs(10);
    /// Much less than the agent takes to read its maps back for no reason, 300 s.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[track_caller]
    fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "{what}");
            pause(Duration::from_millis(50));
        }
    }

    fn key() -> ObjectKey {
        ObjectKey::new("default", "web")
    }

    /// A load balancer's Service that only its pods on a node answer there.
    fn service() -> ServiceRow {
        let port =
            ServicePort { name: "".into(), protocol: Protocol::Tcp, port: SERVICE.1, node_port: 0 };
        ServiceRow {
            kind: ServiceKind::LoadBalancer,
            cluster_ips: vec![SERVICE.0.into()],
            ports: vec![port],
            external_policy: TrafficPolicy::Local,
            health_check_port: CHECK_PORT,
            ..ServiceRow::default()
        }
    }

    /// Pods of this node that answer the Service, and one of another node's.
    fn slice(here: &[u8]) -> EndpointSliceRow {
        let row = |ip: IpAddr, node: &str| EndpointRow {
            ip,
            node: node.into(),
            ..EndpointRow::default()
        };
        let mut endpoints: Vec<_> = here.iter().map(|last| row(pod_ip(V4, *last), NAME)).collect();
        endpoints.push(row(Ipv4Addr::new(10, 244, 2, 9).into(), "node-2"));
        EndpointSliceRow {
            service: key(),
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints,
            ..EndpointSliceRow::default()
        }
    }

    fn serve() {
        let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
        let _server = thread::spawn(move || {
            let mut open = Vec::new();
            while let Ok((stream, _)) = listener.accept() {
                open.push(stream);
            }
        });
    }

    /// IPv4 addresses of pods that are programmed.
    fn programmed(node: &Node) -> Vec<Addr> {
        let pin = pins::folder(&node.pins()).join(names::ENDPOINTS);
        let rows = node.space.run(move || RowMap::<Addr, Endpoint>::open(&pin).unwrap().dump());
        rows.unwrap().into_iter().map(|(addr, _)| addr).filter(Addr::is_v4).collect()
    }

    /// Rows of flows from or to a pod's address.
    fn flows_of(node: &Node, last: u8) -> usize {
        let (pins, addr) = (node.pins(), Addr::from(pod_ip(V4, last)));
        let flows = node.space.run(move || Look::below(&pins).flows().unwrap());
        let rows = flows.iter();
        rows.filter(|(key, flow)| [key.src, key.dst, flow.src, flow.dst].contains(&addr)).count()
    }

    /// A node with a client and a server, and the space at the other end of its wire.
    fn node_with_pods() -> (Node, Space) {
        let client = Space::new();
        let mut node = Node::new(&client);
        [CLIENT, SERVER].iter().for_each(|last| node.add_pod(*last));
        (node, client)
    }

    /// Pins of links at a device.
    fn links(node: &Node, ifindex: u32) -> usize {
        let (folder, end) = (pins::folder(&node.pins()).join("links"), format!("_{ifindex}"));
        node.space.run(move || {
            let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name.to_str().unwrap().ends_with(&end)).count()
        })
    }

    #[test]
    fn an_address_that_passes_to_another_pod_at_once_takes_no_flow_along() {
        if !is_possible() {
            return;
        }
        let (mut node, _client) = node_with_pods();
        node.pods[&SERVER].run(serve);
        node.services.upsert(key(), ServiceRow { health_check_port: 0, ..service() });
        let mut slice = slice(&[SERVER]);
        slice.endpoints.truncate(1);
        node.slices.upsert(key(), slice);
        let _agent = node.start(None);
        let connect = || TcpStream::connect_timeout(&SocketAddr::from(SERVICE), TIMEOUT).unwrap();
        let _open = node.pods[&CLIENT].run(connect);
        assert_eq!(flows_of(&node, SERVER), 2);
        let address = pod_ip(V4, SERVER);
        let old = node.endpoints.row(&address).unwrap().host_ifindex;
        let had_links = links(&node, old);

        // The table knows no moment between the two.
        node.space.run(move || {
            let device = nix::net::if_::if_indextoname(old).unwrap();
            ip(&format!("link del {}", device.to_str().unwrap()));
        });
        node.add_pod(SERVER);
        let new = node.endpoints.row(&address).unwrap().host_ifindex;
        assert_ne!(new, old);
        await_that("the new pod is programmed", || links(&node, new) == had_links);
        await_that("flows of the old one are over", || flows_of(&node, SERVER) == 0);
        await_that("its links are forgotten", || links(&node, old) == 0);

        // And the new one is asked as the old one was.
        node.pods[&SERVER].run(serve);
        let _open = node.pods[&CLIENT].run(connect);
        assert_eq!(flows_of(&node, SERVER), 2);
    }

    #[test]
    fn what_an_earlier_agent_left_goes_once_the_tables_are_whole_though_rows_came_before() {
        if !is_possible() {
            return;
        }
        let (mut node, _client) = node_with_pods();
        [2, 3].iter().for_each(|number| node.add_node(*number));
        let far = |number| Ipv4Addr::new(10, 244, number, 9).into();
        let is_known = |node: &Node, number| {
            let pins = node.pins();
            node.space.run(move || Look::below(&pins).is_elsewhere(far(number)).unwrap())
        };
        let agent = node.start(None);
        await_that("all is programmed", || {
            programmed(&node).len() == 2 && is_known(&node, 2) && is_known(&node, 3)
        });
        drop(agent);
        node.space.settle();

        // Of the next one's lists the first rows come before it is told that there are no more.
        let kept = node.endpoints.row(&pod_ip(V4, CLIENT)).unwrap();
        (node.endpoints, node.nodes) = (Table::new(), Table::new());
        node.endpoints.upsert(kept.ip, (*kept).clone());
        [1, 2].iter().for_each(|number| node.add_node(*number));
        let _agent = node.start(None);
        pause(Duration::from_millis(500));
        assert_eq!(programmed(&node).len(), 2, "the other may only be late");
        assert!(is_known(&node, 2) && is_known(&node, 3));
        node.endpoints.mark_synced();
        node.nodes.mark_synced();
        await_that("the pod that is nobody's goes", || programmed(&node).len() == 1);
        await_that("and the node", || !is_known(&node, 3));
        assert_eq!(programmed(&node), [Addr::from(pod_ip(V4, CLIENT))]);
        assert!(is_known(&node, 2));
    }

    /// What the node answers to a load balancer that asks after the Service; `None`: it is not there.
    fn check(client: &Space) -> Option<String> {
        client.run(|| {
            let mut stream = TcpStream::connect((NODE_IPS[0], CHECK_PORT)).ok()?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        })
    }

    #[test]
    fn a_load_balancer_hears_how_many_pods_of_this_node_answer_a_service() {
        if !is_possible() {
            return;
        }
        let client = Space::new();
        let node = Node::new(&client);
        node.services.upsert(key(), service());
        node.slices.upsert(key(), slice(&[CLIENT, SERVER]));
        let _agent = node.start(None);
        let is_told = |status: &str, count: u8| {
            let (status, count) = (format!("HTTP/1.1 {status} "), count.to_string());
            let lines = [
                format!("X-Load-Balancing-Endpoint-Weight: {count}\r\n").to_lowercase(),
                format!("\"localEndpoints\": {count},"),
                "\"serviceProxyHealthy\": true".to_owned(),
            ];
            check(&client).is_some_and(|text| {
                let lower = text.to_lowercase();
                let has = |line: &String| lower.contains(&line.to_lowercase());
                text.starts_with(&status) && lines.iter().all(has)
            })
        };
        await_that("two pods are here", || is_told("200", 2));
        node.slices.upsert(key(), slice(&[SERVER]));
        await_that("one is left", || is_told("200", 1));
        let mut leaving = slice(&[SERVER]);
        (leaving.endpoints[0].ready, leaving.endpoints[0].terminating) = (false, true);
        node.slices.upsert(key(), leaving);
        await_that("one that drains is for nobody new", || is_told("503", 0));
        node.slices.upsert(key(), slice(&[CLIENT]));
        await_that("another one is ready", || is_told("200", 1));
        // Nobody asks any more.
        node.services.upsert(key(), ServiceRow { health_check_port: 0, ..service() });
        await_that("the port is closed", || check(&client).is_none());
    }

    #[test]
    fn a_pod_whose_device_refuses_a_program_keeps_no_other_from_being_served() {
        if !is_possible() {
            return;
        }
        let (mut node, _client) = node_with_pods();
        let agent = node.start(None);
        if agent.report().tc == Some(TcPath::Clsact) {
            // Nothing is pinned there, where something else could be in the way.
            return;
        }
        let folder = pins::folder(&node.pins()).join("links");
        let (pin, host_ifindex) = node.space.run(move || {
            ip("link add bad0 type veth peer name bad1");
            let ifindex = if_nametoindex("bad0").unwrap();
            let pin = folder.join(format!("tc_from_pod_{ifindex}"));
            fs::create_dir(&pin).unwrap();
            (pin, ifindex)
        });
        let [bad, good] = [SERVER + 1, SERVER + 2].map(|last| pod_ip(V4, last));
        let other = node.endpoints.row(&pod_ip(V4, SERVER)).unwrap();
        let row = LocalEndpoint { ip: bad, host_ifindex, netns_cookie: 0, ..(*other).clone() };
        node.endpoints.upsert(bad, row);
        node.add_pod(SERVER + 2);
        let revision = node.endpoints.changes_since(0).revision;
        let serves = |ip| agent.programmed.borrow().serves(revision, [ip]);
        await_that("the other pod is served", || serves(good));
        assert!(!serves(bad));
        let trouble = agent.report().trouble;
        assert!(
            matches!(&trouble[..], [("pods", words)] if words.starts_with(&format!("{bad}: "))),
            "{trouble:?}"
        );
        node.space.run(move || fs::remove_dir(pin).unwrap());
        await_that("so is this one", || serves(bad) && agent.report().trouble.is_empty());
    }
}
