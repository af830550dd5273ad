//! What the rig is made of: the programs over the maps of the agent's, and a device with neighbours.

use std::{net::IpAddr, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, Xdp},
};
use ebpf_common::{
    ABI_VERSION,
    conntrack::{Flow, FlowKey},
    maps as names,
};
use node_agent::dataplane::{load::TcHook, object};

use super::{
    pins::pin,
    place::ip as ip_lines,
    world::{FAR_NODES, GATE, NODE, World},
};

const UPLINK: &str = "up0";
pub(crate) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A second copy of the programs over the maps of the first.
pub(crate) fn load_over(pins: &Path) -> Ebpf {
    let mut loader = EbpfLoader::new();
    let folder = pins.join(format!("v{ABI_VERSION}"));
    let pinned: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| !entry.file_type().unwrap().is_dir())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .collect();
    for (name, path) in &pinned {
        loader.map_pin_path(name, path);
    }
    let mut object = loader.load(object()).unwrap();
    for name in TcHook::ALL.map(TcHook::program).into_iter().chain(["tc_trace_socket"]) {
        let program: &mut SchedClassifier = object.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
    }
    let driver: &mut Xdp = object.program_mut("xdp_entry").unwrap().try_into().unwrap();
    driver.load().unwrap();
    object
}

/// A connection table with room for what a case opens, to be taken for an earlier agent's: to walk over a
/// usual one costs as much as a case.
pub(crate) fn pin_connections(pins: &Path) {
    pin::<FlowKey, Flow>(pins, names::CONNTRACK, 4_096);
}

/// A device with this node's addresses and a default route; gives its index.
pub(crate) fn make_uplink() -> u32 {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
    let mut lines = vec![
        format!("link add {UPLINK} address {} type veth peer name up1", text(UPLINK_MAC)),
        "link set up1 up".to_owned(),
        format!("link set {UPLINK} up"),
    ];
    for address in NODE.iter().flatten() {
        let (bits, nodad) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
        lines.push(format!("address add {address}/{bits} dev {UPLINK} {nodad}"));
    }
    for address in GATE {
        // IPv6 would choose among the node's addresses by rules of its own.
        let (own, near) = match address {
            IpAddr::V4(_) => (NODE[0][0], "192.168.0.0/24"),
            IpAddr::V6(_) => (NODE[0][1], "fd00:a::/64"),
        };
        lines.push(format!("route add {near} dev {UPLINK} metric 1 src {own}"));
        lines.push(format!("route add default via {address} dev {UPLINK} src {own}"));
    }
    lines.push("route add unreachable 198.18.0.0/15".to_owned());
    lines.push("route add unreachable 2001:db8:dead::/48".to_owned());
    let hops = GATE.iter().chain(FAR_NODES.iter().flatten());
    for (hop, mac) in hops.filter_map(|hop| Some((hop, next_mac(hop)?))) {
        lines.push(format!("neighbour add {hop} lladdr {} dev {UPLINK}", text(mac)));
    }
    ip_lines(&lines.join("\n"));
    nix::net::if_::if_nametoindex(UPLINK).unwrap()
}

/// The MAC of the next hop to an address, which is what the neighbours' table has of it.
pub(crate) fn next_mac(to: &IpAddr) -> Option<[u8; 6]> {
    match World::far_node(to) {
        Some(0) => Some([2, 0, 0, 0, 0, 2]),
        // XDP knows no way there.
        Some(_) if to.is_ipv4() => None,
        Some(_) => Some([2, 0, 0, 0, 0, 3]),
        None => Some([2, 0, 0, 0, 0, 0xfe]),
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
