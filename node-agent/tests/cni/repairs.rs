//! What becomes of pods' links on the node when addresses of the node come and go, and when somebody takes
//! routes and such away: both families, by what the server hears, by what it looks at, and by its start.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::fixture::{Node, Pod, ip, ip_ok, pod_network};

/// The server looks rarely: what is mended sooner it has heard of.
const RARELY: Option<Duration> = Some(Duration::from_secs(3600));
const OFTEN: Option<Duration> = Some(Duration::from_millis(200));
/// On an emulated processor too.
const PATIENCE: Duration = Duration::from_secs(10);
const OWN: [&str; 2] = ["192.0.2.10/24", "2001:db8::10/64"];

/// A node of both families, and a pod on it.
struct World {
    node: Node,
    pod: Pod,
    result: Value,
    ips: Vec<IpAddr>,
    host_end: String,
}

impl World {
    async fn new(name: &str, refresh: Option<Duration>) -> Self {
        let mut node = Node::new(name);
        // Without a carrier nobody is asked whose an address is.
        ip_ok(&format!("-n {} link set far up", node.namespace.0));
        node.refresh = refresh;
        node.network.send_replace(Some(pod_network(&["10.244.3.0/24", "fd00:3::/64"], 1450)));
        node.start();
        let pod = Pod::new(&format!("{name}a"));
        let result = node.call("ADD", Some(&pod), json!({})).await.unwrap();
        let ips = result["ips"].as_array().unwrap().iter().map(|ip| {
            let address = ip["address"].as_str().unwrap();
            address.split('/').next().unwrap().parse().unwrap()
        });
        let (ips, host_end) = (ips.collect(), result["interfaces"][0]["name"].as_str().unwrap());
        let host_end = host_end.to_owned();
        let world = Self { node, pod, result, ips, host_end };
        world.is_whole("at first", OWN).await;
        world
    }

    /// What the node's `ip` does.
    fn ip(&self, arguments: &str) -> String {
        ip_ok(&format!("-n {} {arguments}", self.node.namespace.0))
    }

    /// Waits until all that `ADD` made is there and the node reaches the pod, from these addresses of its own.
    async fn is_whole(&self, when: &str, own: [&str; 2]) {
        let start = Instant::now();
        while let Err(lack) = self.lacks(own).await {
            assert!(start.elapsed() < PATIENCE, "{when}: {lack}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn lacks(&self, own: [&str; 2]) -> Result<(), String> {
        let checked = self.node.check(&self.pod, &self.result).await;
        checked.map_err(|error| error.to_string())?;
        for (pod, own) in self.ips.iter().zip(own) {
            // Where there is no route, `ip` fails.
            let route = ip(&format!("-n {} route get {pod}", self.node.namespace.0));
            let route = String::from_utf8(route.stdout).unwrap();
            let source = format!("src {} ", own.split('/').next().unwrap());
            let reaches = || self.node.namespace.reaches(&self.pod.namespace, *pod);
            if !route.contains(&source) || !reaches() {
                return Err(format!("{pod} from {own}: {route}"));
            }
        }
        Ok(())
    }

    fn lose(&self, own: [&str; 2]) {
        own.iter().for_each(|own| drop(self.ip(&format!("addr del {own} dev uplink"))));
    }

    fn gain(&self, own: [&str; 2]) {
        own.iter().for_each(|own| drop(self.ip(&format!("addr add {own} dev uplink nodad"))));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_of_the_node_that_go_and_come_back_leave_no_pod_behind() {
    skip_unless_able!();
    let world = World::new("r1", RARELY).await;
    for round in ["once", "twice"] {
        world.lose(OWN);
        world.gain(OWN);
        world.is_whole(round, OWN).await;
    }
    // An address that others are still asked about cannot be a source yet.
    world.lose(OWN);
    OWN.iter().for_each(|own| drop(world.ip(&format!("addr add {own} dev uplink"))));
    world.is_whole("asked about", OWN).await;
    // As a network restart does.
    world.ip("link set uplink down");
    world.ip(&format!("addr del {} dev uplink", OWN[0]));
    world.ip("link set uplink up");
    world.gain(OWN);
    world.is_whole("restart of the network", OWN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_end_that_is_brought_down_comes_back() {
    skip_unless_able!();
    let world = World::new("r2", RARELY).await;
    world.ip(&format!("link set {} down", world.host_end));
    world.is_whole("down", OWN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_and_neighbours_that_others_delete_come_back() {
    skip_unless_able!();
    let world = World::new("r3", OFTEN).await;
    let host_end = &world.host_end;
    for step in [
        format!("route flush dev {host_end}"),
        format!("-6 route flush dev {host_end}"),
        format!("neigh del {} dev {host_end}", world.ips[0]),
        format!("neigh del {} dev {host_end}", world.ips[1]),
        format!("route replace {} dev {host_end} scope link", world.ips[0]),
    ] {
        world.ip(&step);
        world.is_whole(&step, OWN).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_agent_mends_what_was_lost_while_there_was_none() {
    skip_unless_able!();
    let mut world = World::new("r4", None).await;
    world.node.handle.take().unwrap().stop().await;
    world.lose(OWN);
    world.gain(OWN);
    world.node.start();
    world.is_whole("at the start", OWN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_with_other_addresses_of_the_node_speaks_to_pods_from_them() {
    skip_unless_able!();
    let mut world = World::new("r6", None).await;
    world.node.handle.take().unwrap().stop().await;
    // The former ones are still there.
    let others = ["198.51.100.20/24", "2001:db8:1::20/64"];
    world.gain(others);
    world.node.ips = ["198.51.100.20", "2001:db8:1::20"];
    world.node.start();
    world.is_whole("at the start", others).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_reached_from_another_address_until_the_nodes_is_back() {
    skip_unless_able!();
    let world = World::new("r5", RARELY).await;
    let other = ["198.51.100.20/24", "2001:db8:1::20/64"];
    world.lose(OWN);
    world.gain(other);
    world.is_whole("with another", other).await;
    // A pod that comes now is reached too.
    let pod = Pod::new("r5b");
    let (ip, _) = world.node.add(&pod).await;
    assert!(world.node.namespace.reaches(&pod.namespace, ip));
    world.gain(OWN);
    world.is_whole("with both", OWN).await;
    world.lose(other);
    world.is_whole("as before", OWN).await;
}
