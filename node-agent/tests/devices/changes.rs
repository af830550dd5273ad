//! What is new on the node is served as soon as the kernel tells of it.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use node_agent::dataplane::XdpMode;

use super::{
    node::{place::ip, space::pause},
    tests::{NODE_PORT, PATIENCE, POD, ask, await_that, by_both_ways},
};

#[test]
fn new_devices_and_addresses_are_served_at_once() {
    by_both_ways(|world| {
        // Looked for every ten seconds at most, if it were for that alone.
        world.node.configure = |overlay, dataplane| {
            (overlay.refresh, dataplane.refresh) = (PATIENCE * 100, PATIENCE * 100);
            dataplane.xdp = XdpMode::Auto;
        };
        let agent = world.node.start(None);
        let path = agent.report().tc;
        let start = Instant::now();
        let tid = world.client.tid;
        for number in 1..=3 {
            world.node.space.run(move || {
                ip(&format!(
                    "addr add 192.0.2.{number}/24 dev eth0
                     link add more{number} type veth peer name wire{number} netns {tid}
                     addr add 203.0.{number}.1/24 dev more{number}
                     link set more{number} up"
                ));
            });
            world.client.run(move || {
                ip(&format!(
                    "addr add 203.0.{number}.2/24 dev wire{number}
                     link set wire{number} up
                     route add 192.0.2.{number}/32 dev wire0"
                ));
            });
            for address in [[192, 0, 2, number], [203, 0, number, 1]].map(Ipv4Addr::from) {
                let asked = || world.client.run(move || ask((address, NODE_PORT)));
                await_that(&agent, "another address of the node", || asked() == Some(POD));
            }
        }
        // By looking every ten seconds it would take twenty.
        assert!(start.elapsed() < Duration::from_secs(18), "{:?}", start.elapsed());
        // What the agent does itself is no news to it.
        pause(Duration::from_secs(1));
        let before = agent.report().rounds.count;
        pause(Duration::from_secs(3));
        let rounds = agent.report().rounds.count - before;
        assert!(rounds <= 2, "{rounds} rounds while nothing happens");
        path
    });
}
