//! Decisions for named clusters, and the laws of the plan for random ones.

use proptest::prelude::*;

use super::*;

const VXLAN: u32 = 9;
const HOST: u32 = 7;
const MODES: [Mode; 4] = [Mode::Vxlan, Mode::L3, Mode::Auto, Mode::Off];

fn own(net: &str, mtu: u32) -> UnderlayAddress {
    UnderlayAddress { net: net.parse().unwrap(), device: 2, mtu }
}

fn underlay(nets: &[&str]) -> Underlay {
    let addresses = nets.iter().map(|net| own(net, 1500)).collect();
    Underlay { addresses, vxlan: Some(VXLAN), host: HOST, host_peer: HOST + 1 }
}

fn place(mode: Mode) -> Place {
    Place {
        name: "a".to_owned(),
        mode,
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/108".parse().unwrap()],
        link_cidrs: usual_link_cidrs(),
    }
}

/// Name, addresses and pod CIDRs, the lists separated by spaces.
type Node<'a> = (&'a str, &'a str, &'a str);

fn rows(nodes: &[Node<'_>]) -> BTreeMap<ObjectKey, NodeRow> {
    let row = |(name, ips, cidrs): &Node<'_>| {
        let row = NodeRow {
            internal_ips: ips.split_whitespace().map(|ip| ip.parse().unwrap()).collect(),
            pod_cidrs: cidrs.split_whitespace().map(|cidr| cidr.parse().unwrap()).collect(),
            ready: true,
            leaving: false,
            labels: BTreeMap::new(),
        };
        (ObjectKey::new("", name), row)
    };
    nodes.iter().map(row).collect()
}

fn decide(mode: Mode, nodes: &[Node<'_>], nets: &[&str]) -> Desired {
    desired(rows(nodes).iter(), &place(mode), &underlay(nets))
}

fn is_to_peer(route: &Route) -> bool {
    route.device != HOST && route.device != 0
}

/// Destination, device and gateway of each route to a peer.
fn ways(desired: &Desired) -> Vec<String> {
    let peers = desired.routes.values().filter(|route| is_to_peer(route));
    let way = |route: &Route| match route.gateway {
        Some(ip) => format!("{} via {ip}", route.destination),
        None => format!("{} tunnel", route.destination),
    };
    peers.map(way).collect()
}

fn tunnels(desired: &Desired) -> Vec<String> {
    let row = |(net, far): (&IpNet, &FarEnd)| {
        let way = match far.path {
            FarPath::Tunnel => "in",
            FarPath::Routes => "via",
            FarPath::Here => "of",
        };
        format!("{net} {way} {}", far.node)
    };
    desired.tunnels.iter().map(row).collect()
}

const NODES: &[Node<'_>] = &[
    ("a", "192.168.0.1 2001:db8::1", "10.244.0.0/24 fd00:10::/64"),
    ("b", "192.168.0.2 2001:db8::2", "10.244.1.0/24 fd00:10:0:1::/64"),
    ("c", "192.168.9.3 2001:db8::3", "10.244.2.0/24 fd00:10:0:2::/64"),
    ("new", "192.168.0.4", ""),
    ("newer", "", "10.244.3.0/24"),
];
const DUAL: &[&str] = &["192.168.0.1/24", "2001:db8::1/64"];

#[test]
fn each_mode_reaches_every_peer_by_both_families() {
    let all_tunnel = [
        "10.244.1.0/24 tunnel",
        "10.244.2.0/24 tunnel",
        "fd00:10:0:1::/64 tunnel",
        "fd00:10:0:2::/64 tunnel",
    ];
    let vxlan = decide(Mode::Vxlan, NODES, DUAL);
    assert_eq!(ways(&vxlan), all_tunnel);
    // Both families travel in the tunnel of the node's main family.
    assert_eq!(
        tunnels(&vxlan),
        [
            "10.244.0.0/24 of 10.244.0.1",
            "10.244.1.0/24 in 192.168.0.2",
            "10.244.2.0/24 in 192.168.9.3",
            "192.168.0.2/32 in 192.168.0.2",
            "192.168.9.3/32 in 192.168.9.3",
            "2001:db8::2/128 in 192.168.0.2",
            "2001:db8::3/128 in 192.168.9.3",
            "fd00:10::/64 of fd00:10::1",
            "fd00:10:0:1::/64 in 192.168.0.2",
            "fd00:10:0:2::/64 in 192.168.9.3",
        ]
    );
    // `auto` decides for each family: c is on the same network for IPv6 only.
    let auto = decide(Mode::Auto, NODES, DUAL);
    assert_eq!(
        ways(&auto),
        [
            "10.244.1.0/24 via 192.168.0.2",
            "10.244.2.0/24 tunnel",
            "fd00:10:0:1::/64 via 2001:db8::2",
            "fd00:10:0:2::/64 via 2001:db8::3",
        ]
    );
    assert!(tunnels(&auto).contains(&"192.168.9.3/32 in 192.168.9.3".to_owned()));
    assert!(tunnels(&auto).contains(&"fd00:10:0:2::/64 via 2001:db8::3".to_owned()));
    let l3 = decide(Mode::L3, NODES, DUAL);
    assert_eq!(ways(&l3).len(), 3);
    assert_eq!(l3.conditions.len(), 1);
    assert!(l3.conditions[0].starts_with("node c is not on this node's network for 10.244.2.0/24"));
    for desired in [vxlan, auto, l3] {
        let gateways = desired.gateways.map(|gateway| gateway.unwrap().to_string());
        assert_eq!(gateways, ["10.244.0.1", "fd00:10::1"]);
        for (cidr, route) in &desired.routes {
            let is_own = desired.pod_cidrs.contains(cidr);
            assert_eq!(*route == Route::to_nobody(*cidr), is_own, "{route:?}");
            // To services as the gateway; to pods elsewhere, and to who asks by a service, as the node.
            let Place { service_cidrs, link_cidrs, .. } = place(Mode::Vxlan);
            let is_service = service_cidrs.contains(cidr) || link_cidrs.contains(cidr);
            let node = if cidr.addr().is_ipv4() { "192.168.0.1" } else { "2001:db8::1" };
            let node = node.parse().ok().filter(|_| !is_own);
            let source = if is_service { gateway_for(&desired, *cidr) } else { node };
            assert_eq!(route.preferred_source, source);
        }
    }
}

#[test]
fn nodes_with_ipv6_alone_carry_both_families_of_pods_in_ipv6() {
    let nodes: &[Node<'_>] = &[
        ("a", "2001:db8::1", "10.244.0.0/24 fd00:10::/64"),
        ("b", "2001:db8::2", "10.244.1.0/24 fd00:10:0:1::/64"),
    ];
    let desired = decide(Mode::Auto, nodes, &["2001:db8::1/64"]);
    assert_eq!(ways(&desired), ["10.244.1.0/24 tunnel", "fd00:10:0:1::/64 via 2001:db8::2"]);
    assert!(tunnels(&desired).contains(&"10.244.1.0/24 in 2001:db8::2".to_owned()));
    assert_eq!((desired.pod_mtu, desired.vxlan_mtu), (1430, 1430));
    // A node without any address of a family of ours is told, not forgotten.
    let desired = decide(Mode::Vxlan, nodes, &["192.168.0.1/24"]);
    assert_eq!((ways(&desired).len(), desired.conditions.len()), (0, 2));
}

#[test]
fn pods_packets_fit_on_every_way() {
    let mtu = |mode, nets: &[UnderlayAddress]| {
        let underlay = Underlay {
            addresses: nets.to_vec(),
            vxlan: Some(VXLAN),
            host: HOST,
            host_peer: HOST + 1,
        };
        let desired = desired(rows(NODES).iter(), &place(mode), &underlay);
        (desired.pod_mtu, desired.conditions.iter().filter(|text| text.contains("MTU")).count())
    };
    let v4 = own("192.168.0.1/24", 1500);
    assert_eq!(mtu(Mode::Vxlan, &[v4]), (1450, 0));
    assert_eq!(mtu(Mode::Auto, &[v4]), (1450, 0));
    assert_eq!(mtu(Mode::L3, &[v4]), (1500, 0));
    assert_eq!(mtu(Mode::L3, &[v4, own("2001:db8::1/64", 1400)]), (1400, 0));
    assert_eq!(mtu(Mode::Vxlan, &[own("192.168.0.1/24", 1320)]), (1270, 1));
}

#[test]
fn of_nodes_that_share_addresses_one_is_reached_and_the_other_named() {
    let nodes: &[Node<'_>] = &[
        NODES[0],
        ("b", "192.168.0.2", "10.244.1.0/24"),
        ("c", "192.168.0.3", "10.244.1.0/24"),
        ("d", "192.168.0.4", "10.244.0.128/25"),
    ];
    let desired = decide(Mode::L3, nodes, DUAL);
    assert_eq!(ways(&desired), ["10.244.1.0/24 via 192.168.0.2"]);
    assert_eq!(
        desired.conditions,
        [
            "pod CIDR 10.244.1.0/24 of node c overlaps 10.244.1.0/24 of node b",
            "pod CIDR 10.244.0.128/25 of node d overlaps 10.244.0.0/24 of node a",
        ]
    );
}

#[test]
fn services_are_reached_by_the_host_device_in_every_mode() {
    for mode in MODES {
        let desired = decide(mode, NODES, DUAL);
        for cidr in place(mode).service_cidrs {
            let route = desired.routes[&cidr];
            assert_eq!((route.device, route.gateway), (HOST, None), "{mode:?}");
            assert_eq!(route.preferred_source, gateway_for(&desired, cidr));
        }
    }
    // On a cluster of others the addresses are the link's.
    let off = decide(Mode::Off, NODES, DUAL);
    assert_eq!(
        off.gateways.map(|ip| ip.unwrap().to_string()),
        ["169.254.21.1", "fd6f:726c:6f70::1"]
    );
    assert_eq!((ways(&off).len(), off.tunnels.len(), off.pod_cidrs.len()), (0, 0, 0));
    // Without a pod CIDR yet too.
    assert_eq!(decide(Mode::Vxlan, &NODES[1..], DUAL).gateways, off.gateways);
    // A range that contains the node itself would cut it off.
    let inside = decide(Mode::Vxlan, NODES, &["10.96.3.4/24"]);
    assert!(!inside.routes.contains_key(&"10.96.0.0/16".parse().unwrap()));
    assert_eq!(inside.conditions, ["range 10.96.0.0/16 contains the node's own address 10.96.3.4"]);
}

#[test]
fn without_a_range_of_its_own_a_node_reaches_nobody() {
    let desired = decide(Mode::Vxlan, &[("a", "192.168.0.1", ""), NODES[1]], DUAL);
    assert!(ways(&desired).is_empty() && desired.tunnels.is_empty());
}

#[test]
fn routes_of_an_agent_that_did_not_mark_them_are_taken_over() {
    let old = |destination: &str, device, source: &str| Route {
        destination: destination.parse().unwrap(),
        gateway: None,
        device,
        preferred_source: source.parse().ok(),
        scope: Scope::Link,
        owner: Owner::Other,
    };
    let observed = [
        old("10.244.1.0/24", VXLAN, "10.244.0.1"),
        old("10.244.77.0/24", VXLAN, "10.244.0.1"),
        old("10.244.88.0/24", 2, "10.244.0.1"),
        old("10.244.0.5/32", 30, "192.168.0.1"),
    ];
    let desired = decide(Mode::Vxlan, &NODES[..2], DUAL);
    let ops = routes(&desired, &observed, &underlay(DUAL));
    let deleted: Vec<_> = ops
        .iter()
        .filter_map(|op| match op {
            RouteOp::Delete(route) => Some(route.destination.to_string()),
            RouteOp::Replace(_) => None,
        })
        .collect();
    assert_eq!(deleted, ["10.244.77.0/24", "10.244.88.0/24"]);
    assert!(ops.contains(&RouteOp::Replace(desired.routes[&"10.244.1.0/24".parse().unwrap()])));
}

/// Carries one write out on a list as the kernel would.
fn apply(table: &mut Vec<Route>, op: RouteOp) {
    match op {
        RouteOp::Replace(route) => {
            table.retain(|old| old.destination != route.destination);
            table.push(route);
        }
        RouteOp::Delete(route) => table.retain(|old| *old != route),
    }
}

fn cluster() -> impl Strategy<Value = Vec<(u8, u8, u8, u8)>> {
    // Node number, network of its address, number of its CIDR, which families it has.
    prop::collection::vec((0_u8..12, 0_u8..3, 0_u8..20, 0_u8..4), 0..14)
}

fn random_rows(nodes: &[(u8, u8, u8, u8)]) -> BTreeMap<ObjectKey, NodeRow> {
    let mut rows = rows(&NODES[..1]);
    for (node, net, cidr, families) in nodes {
        let (name, node) = (format!("n{node}"), u32::from(*node) + 10);
        let ips = format!("192.168.{net}.{node} 2001:db8:{net}::{node}");
        let cidrs = match families {
            0 => String::new(),
            1 => format!("10.244.{cidr}.0/24"),
            2 => format!("fd00:10:0:{cidr}::/64"),
            _ => format!("10.244.{cidr}.0/24 fd00:10:0:{cidr}::/64"),
        };
        let row: Node<'_> = (&name, &ips, &cidrs);
        rows.extend(self::rows(&[row]));
    }
    rows
}

proptest! {
    #[test]
    fn the_plan_is_complete_idempotent_minimal_and_leaves_others_alone(
        steps in prop::collection::vec((cluster(), 0_usize..4), 1..6)
    ) {
        let foreign = Route {
            destination: "172.16.0.0/16".parse().unwrap(),
            gateway: Some("192.168.0.254".parse().unwrap()),
            device: 2,
            preferred_source: None,
            scope: Scope::Global,
            owner: Owner::Other,
        };
        let underlay = underlay(DUAL);
        let mut table = vec![foreign];
        let mut before: BTreeMap<IpNet, Route> = BTreeMap::new();
        for (nodes, mode) in steps {
            let desired = desired(random_rows(&nodes).iter(), &place(MODES[mode]), &underlay);
            let wanted = &desired.routes;
            for op in routes(&desired, &table, &underlay) {
                if let RouteOp::Replace(route) = op {
                    prop_assert!(!table.contains(&route), "minimal");
                }
                apply(&mut table, op);
                // What is reached before and after is reached all the time.
                for cidr in before.keys().filter(|cidr| wanted.contains_key(*cidr)) {
                    prop_assert!(table.iter().any(|route| route.destination == *cidr));
                }
            }
            prop_assert!(table.contains(&foreign), "foreign-safe");
            prop_assert!(wanted.values().all(|route| table.contains(route)), "complete");
            prop_assert_eq!(table.len(), wanted.len() + 1, "nothing stale");
            prop_assert_eq!(routes(&desired, &table, &underlay), vec![], "idempotent");
            before.clone_from(wanted);
        }
    }

    #[test]
    fn every_route_into_the_tunnel_has_a_far_end_and_none_leads_home(
        nodes in cluster(), mode in 0_usize..4
    ) {
        let desired = desired(random_rows(&nodes).iter(), &place(MODES[mode]), &underlay(DUAL));
        for (cidr, route) in desired.routes.iter().filter(|(_, route)| is_to_peer(route)) {
            let far = desired.tunnels.get(cidr).map(|far| far.path);
            let by_device = if route.device == VXLAN { FarPath::Tunnel } else { FarPath::Routes };
            prop_assert_eq!(far, Some(by_device));
            prop_assert!(desired.pod_cidrs.iter().all(|own| !own.contains(cidr)));
            if let Some(next_hop) = route.gateway {
                prop_assert!(DUAL.iter().any(|net| net.parse::<IpNet>().unwrap().contains(&next_hop)));
            }
        }
        for cidr in &desired.pod_cidrs {
            prop_assert_eq!(desired.routes.get(cidr), Some(&Route::to_nobody(*cidr)));
            prop_assert_eq!(desired.tunnels.get(cidr).map(|far| far.path), Some(FarPath::Here));
        }
        let families = desired.pod_cidrs.len();
        prop_assert_eq!(families, if MODES[mode] == Mode::Off { 0 } else { 2 });
    }
}
