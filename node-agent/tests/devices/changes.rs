//! What is new on the node is served as soon as the kernel tells of it, and a node that has lost its address
//! finds another.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr},
    sync::mpsc,
    time::{Duration, Instant},
};

use node_agent::{address, dataplane::XdpMode, sys::notices};

use super::{
    node::{
        place::{ip, is_possible},
        space::{Space, pause},
    },
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

#[test]
fn a_node_that_was_not_told_its_address_finds_another_when_that_is_gone_for_good() {
    if !is_possible() {
        return;
    }
    let space = Space::new();
    space.run(|| {
        ip("link add eth0 type veth peer name far
            addr add 192.0.2.1/24 dev eth0
            link set far up
            link set eth0 up
            route add default via 192.0.2.254");
    });
    let (found, finds) = mpsc::channel();
    space.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (server, own) = ("https://198.51.100.1:6443".parse().unwrap(), [[192, 0, 2, 1].into()]);
        found.send(runtime.block_on(address::moved(&server, &own))).unwrap();
    });
    // A restart of the network.
    space.run(|| ip("addr del 192.0.2.1/24 dev eth0\naddr add 192.0.2.1/24 dev eth0"));
    space.run(|| {
        ip("addr add 192.0.2.7/32 dev eth0\nroute replace default via 192.0.2.254 src 192.0.2.7")
    });
    finds.recv_timeout(Duration::from_secs(7)).expect_err("its own is there, whatever the way");
    space.run(|| ip("addr del 192.0.2.1/24 dev eth0\naddr add 192.0.2.7/24 dev eth0"));
    space.run(|| ip("route replace default via 192.0.2.254 src 192.0.2.7"));
    let others: Vec<IpAddr> = finds.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(others, [IpAddr::from([192, 0, 2, 7])]);
}

#[test]
fn notices_that_were_lost_are_a_notice_and_no_failure() {
    if !is_possible() {
        return;
    }
    let space = Space::new();
    space.run(|| {
        let socket = notices::open().unwrap();
        let none = || notices::take(&socket).unwrap_err().kind() == ErrorKind::WouldBlock;
        assert!(none(), "nothing has changed");
        // More than a socket holds.
        let lines = (0..2500).map(|number: u32| {
            let ip = Ipv4Addr::from(0x0a00_0000 + number);
            format!("addr add {ip}/32 dev lo\naddr del {ip}/32 dev lo\n")
        });
        ip(&lines.collect::<String>());
        let count = (0..10_000).take_while(|_| notices::take(&socket).is_ok()).count();
        assert!((1..5000).contains(&count), "{count}");
        assert!(none(), "all were taken");
    });
}
