//! Traces of clients outside where XDP is on: the first hop is the driver's program, and the next one goes on
//! from what that one did.

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        path::{Path, PathBuf},
        thread,
    };

    use ebpf_common::{
        TCP,
        config::Config,
        device::{Device, XDP},
        endpoint::Endpoint,
        service::Service,
    };
    use node_agent::{
        dataplane::{XdpMode, load::Programs, maps::Maps, xdp::Xdp},
        model::{FarEnd, FarPath},
        sys::netlink::Netlink,
        table::Table,
        way::{self, Known},
    };
    use serde_json::Value;

    use crate::{
        dump::dump,
        place::{ip, is_possible, own_namespaces},
        rows::{Rows, addr},
    };

    const NODE: &str = "192.0.2.1";
    const FAR: &str = "192.0.2.2";
    const CLIENT: &str = "192.0.2.9";
    /// Pods here, on the node whose neighbour entry is known, and on one without.
    const PODS: [&str; 3] = ["10.244.1.7", "10.244.2.7", "10.244.3.7"];
    /// The node port of the service whose only backend is the pod.
    const PORTS: [u16; 3] = [30_081, 30_082, 30_083];

    struct World {
        pins: PathBuf,
        programs: Programs,
        maps: Maps,
        uplink: u32,
        netlink: Netlink,
    }

    fn set_up(pins: PathBuf) -> World {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        ip("link add under0 type veth peer name far0
            address add 192.0.2.1/24 dev under0
            link set far0 up
            link set under0 up
            neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev under0
            link add vxlan0 type veth peer name vxlan1");
        let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
        let (uplink, vxlan) = (index("under0"), index("vxlan0"));
        let mut netlink = Netlink::open().unwrap();
        let (programs, mut maps) = Programs::load(Some(&pins)).unwrap();
        let config = Config {
            gateway: [addr("10.244.1.1"), addr("fd00:244::1")],
            vxlan_ifindex: vxlan,
            vni: 7,
            vxlan_port: 8_472,
            node_port_first: 30_000,
            node_port_last: 32_767,
            ..Config::default()
        };
        maps.set_config(&config).unwrap();
        maps.set_node_addresses(&BTreeSet::from([NODE.parse().unwrap()])).unwrap();
        let link = netlink.link("under0").unwrap().unwrap();
        let device = Device {
            addr: [addr(NODE), addr("::")],
            mtu: 1_500,
            mac: link.mac.unwrap(),
            flags: XDP,
        };
        maps.set_devices(&BTreeMap::from([(uplink, device)])).unwrap();
        maps.put_endpoint(PODS[0].parse().unwrap(), &Endpoint::default()).unwrap();
        for (net, node) in [("10.244.2.0/24", FAR), ("10.244.3.0/24", "192.0.2.3")] {
            let far = FarEnd { node: node.parse().unwrap(), path: FarPath::Tunnel };
            maps.put_tunnel(net.parse().unwrap(), far).unwrap();
        }
        let rows = Rows::below(&pins);
        for (pod, port) in PODS.into_iter().zip(PORTS) {
            let backend = format!("{pod}:8080").parse().unwrap();
            rows.put_service(&format!("0.0.0.0:{port}"), TCP, Service::default(), &[backend]);
        }
        World { pins, programs, maps, uplink, netlink }
    }

    impl World {
        /// Puts the program on the uplink, or takes it off; what is given is to be held.
        fn switch(&mut self, mode: XdpMode) -> Xdp {
            let mut xdp = Xdp::new(&mut self.programs, mode);
            xdp.attach(&mut self.netlink, self.uplink, "under0");
            xdp
        }

        /// The hops of a client's packet; nothing was written by them.
        fn hops(&self, port: u16) -> Vec<Value> {
            let before = dump(&self.pins);
            let to = format!("{NODE}:{port}");
            let hops = asked(&self.pins, &to);
            assert_eq!(dump(&self.pins), before, "a trace writes nothing");
            hops
        }
    }

    fn asked(pins: &Path, to: &str) -> Vec<Value> {
        let known = Known { services: Table::new(), endpoints: Table::new() };
        let hops = way::trace(pins, &known, &BTreeMap::from([("from", CLIENT), ("to", to)]));
        hops.unwrap().as_array().unwrap().clone()
    }

    fn programs(hops: &[Value]) -> Vec<&str> {
        hops.iter().map(|hop| hop["program"].as_str().unwrap()).collect()
    }

    /// Each of the sentences begins one of the hop's decisions, in this order.
    #[track_caller]
    fn says(hop: &Value, sentences: &[&str], result: &str) {
        let decisions: Vec<&str> =
            hop["decisions"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
        let mut rest = decisions.iter();
        for sentence in sentences {
            assert!(rest.any(|one| one.starts_with(sentence)), "{sentence} not in {hop:#}");
        }
        assert_eq!(hop["result"], result, "{hop:#}");
    }

    #[test]
    fn in_the_stack_it_begins_with_the_program_that_runs_there() {
        if !is_possible() {
            return;
        }
        let test = || {
            let mut world = set_up(own_namespaces().join("orlop"));
            let _xdp = world.switch(XdpMode::Generic);
            assert_eq!(programs(&world.hops(PORTS[1])), ["xdp_generic"]);
            let hops = world.hops(PORTS[0]);
            assert_eq!(programs(&hops), ["xdp_generic", "tc_from_underlay"], "{hops:#?}");
            says(&hops[1], &["known flow TCP 192.0.2.9:32768 to 192.0.2.1:30081"], "sent on");
        };
        if let Err(panic) = thread::scope(|scope| scope.spawn(test).join()) {
            std::panic::resume_unwind(panic);
        }
    }

    fn is_done_by_xdp_alone(world: &World) {
        let hops = world.hops(PORTS[1]);
        assert_eq!(programs(&hops), ["xdp_entry"], "{hops:#?}");
        let up = format!("under0 ({})", world.uplink);
        assert_eq!(hops[0]["place"], format!("a packet at {up}, before the stack"));
        let takes = format!("{up} takes frames from XDP");
        let sentences = [
            takes.as_str(),
            "no flow TCP 192.0.2.9:32768 to 192.0.2.1:30082 is known",
            "slot 0 of set ",
            "10.244.2.7 is reached by node 192.0.2.2 through the tunnel",
            "the flow TCP 10.244.2.7:8080 to 10.244.1.1:",
            "the flow TCP 192.0.2.9:32768 to 192.0.2.1:30082 would be noted as 10.244.1.1:",
            "known flow TCP 192.0.2.9:32768 to 192.0.2.1:30082 becomes 10.244.1.1:",
            &format!("the next hop to 192.0.2.2 is known, out of {up}"),
            "tunnelled to node 192.0.2.2 (network 7)",
            &format!("sent out of {up}"),
        ];
        says(&hops[0], &sentences, "sent back out of its device");
    }

    fn goes_on_with_tc(world: &World) {
        // To a pod here: translated by XDP, delivered by tc.
        let hops = world.hops(PORTS[0]);
        assert_eq!(programs(&hops), ["xdp_entry", "tc_from_underlay"], "{hops:#?}");
        let passed = "left to the tc programs and the stack";
        says(&hops[0], &["slot 0 of set ", "10.244.1.7 is a pod of this node"], passed);
        says(&hops[1], &["10.244.1.7 is a pod of this node"], "sent on");
        // To a node that was not spoken to: opened by XDP, translated by tc, which finds the flow.
        let hops = world.hops(PORTS[2]);
        let way = ["xdp_entry", "tc_from_underlay", "tc_to_overlay"];
        assert_eq!(programs(&hops), way, "{hops:#?}");
        says(&hops[0], &["slot 0 of set ", "no next hop to 192.0.2.3 is known"], passed);
        says(&hops[1], &["known flow TCP 192.0.2.9:32768 to 192.0.2.1:30083"], "sent on");
        let noted = |hop: &Value| {
            let sentences = hop["decisions"].as_array().unwrap().iter().filter_map(Value::as_str);
            let noted = sentences.filter_map(|one| one.split_once(" becomes "));
            noted.map(|(_, to)| to.to_owned()).next().unwrap()
        };
        assert_eq!(noted(&hops[0]), noted(&hops[1]), "one flow, one port");
    }

    #[test]
    fn a_trace_of_a_client_outside_begins_in_the_driver_where_xdp_is_on() {
        if !is_possible() {
            return;
        }
        let test = || {
            let mut world = set_up(own_namespaces().join("orlop"));
            let hops = world.hops(PORTS[1]);
            assert_eq!(programs(&hops)[0], "tc_from_underlay", "XDP is off: {hops:#?}");
            let xdp = world.switch(XdpMode::Native);
            is_done_by_xdp_alone(&world);
            goes_on_with_tc(&world);
            // The packet through the program that packets meet: what a trace left out is there.
            let before = dump(&world.pins);
            let mac = world.netlink.link("under0").unwrap().unwrap().mac.unwrap();
            let (client, to) = (format!("{CLIENT}:32768"), format!("{NODE}:{}", PORTS[1]));
            let packet = node_agent::dataplane::trace::frame(
                client.parse().unwrap(),
                to.parse().unwrap(),
                TCP,
                mac,
            );
            let ran = world.programs.test_run_xdp(world.uplink, &packet, 1).unwrap();
            assert_eq!(ran.0, 3, "sent back out of its device, as the trace said");
            assert_eq!(world.maps.connections().dump().unwrap().len(), 2);
            assert_ne!(dump(&world.pins), before, "and the dumps see it");
            drop(xdp);
            let _off = world.switch(XdpMode::Off);
            assert_eq!(programs(&world.hops(PORTS[0])), ["tc_from_underlay"]);
        };
        if let Err(panic) = thread::scope(|scope| scope.spawn(test).join()) {
            std::panic::resume_unwind(panic);
        }
    }
}
