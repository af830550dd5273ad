//! Nanoseconds a packet of every program, by the kernel's test harness. Effects.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;
use serde_json::json;

use super::{
    hosts::{self, ETHERNET_MTU, Node, Pod},
    measure::float,
    orlop,
    output::progress,
    packets::{BACKEND_PORT, CLIENT, FAR_POD, NODE_PORT, SERVICES},
    report::{self, Lane, Parameters, Row, Sample},
    source::{headers, hex},
    traffic::Worker,
};

/// Runs of a program in a round.
const REPEAT: u32 = 100_000;
/// `TC_ACT_REDIRECT`.
const REDIRECT: u64 = 7;
/// `TC_ACT_UNSPEC`, as a word.
const NEXT: u64 = 0xffff_ffff;
/// `XDP_PASS`: to the pod's own stack.
const UP: u64 = 2;
/// `XDP_TX`: out of the device by which it came.
const BACK: u64 = 3;

/// A program on one kind of packet.
struct Case {
    program: &'static str,
    case: &'static str,
    ends: [SocketAddrV4; 2],
    /// The verdict that says that the packet went its way.
    verdict: u64,
}

/// A node with Orlop's programs, a node that its frames go to, and two pods.
struct Ground {
    agent: Worker,
    /// Index and Ethernet address of the device between the nodes.
    device: (u32, String),
    pods: [Pod; 2],
    node_port: SocketAddrV4,
    _nodes: [Node; 2],
}

/// Measures every program in every case, in rounds.
///
/// # Errors
/// When namespaces cannot be made, or the kernel does not run a program.
pub fn run(rounds: u32) -> Result<Vec<Row>> {
    progress("nanoseconds a packet of each program");
    let (mut lanes, mut samples) = (Vec::new(), Vec::new());
    for (number, mode, is_here) in [(0, "vxlan", true), (1, "vxlan", false), (2, "l3", false)] {
        let mut ground = Ground::new(number, mode, is_here)?;
        for case in ground.cases(mode, is_here) {
            let lane = lanes.len();
            let parameters = Parameters::from([
                ("services", json!(SERVICES)),
                ("program", json!(case.program)),
                ("case", json!(case.case)),
            ]);
            lanes.push(Lane { subject: "orlop", parameters, base: None });
            for round in 0..rounds {
                match ground.measure(&case) {
                    Ok(value) => {
                        let (metric, unit) = ("ns_per_packet", "ns");
                        samples.push(Sample { lane, round, metric, unit, value });
                    }
                    Err(error) => {
                        progress(&format!(
                            "  {}, {}: not measured: {error:#}",
                            case.program, case.case
                        ));
                        break;
                    }
                }
            }
        }
    }
    Ok(report::rows(&lanes, &samples))
}

impl Ground {
    fn new(number: u8, mode: &str, is_here: bool) -> Result<Self> {
        let mut node = Node::new(&format!("ns{number}n"), 1)?;
        let outside = Node::new(&format!("ns{number}o"), 2)?;
        hosts::join(&node, &outside)?;
        let pods = [node.add_pod(ETHERNET_MTU)?, node.add_pod(ETHERNET_MTU)?];
        let address = if is_here { pods[0].ip } else { FAR_POD };
        let device = hosts::link(&node.name, "eth0")?;
        // Nobody is there to be asked.
        for far in [outside.ip(), *CLIENT.ip()] {
            node.ip_command(&format!("neigh replace {far} lladdr 02:00:00:00:00:09 dev eth0"))?;
        }
        let args = [
            "--number=1".to_owned(),
            format!("--mode={mode}"),
            format!("--services={SERVICES}"),
            format!("--node-port-to={}", SocketAddrV4::new(address, BACKEND_PORT)),
            format!("--pod={}", orlop::pod_flag(&pods[0])),
            format!("--pod={}", orlop::pod_flag(&pods[1])),
            "--path=xdp".to_owned(),
        ];
        let agent = Worker::start(&node.name, "overlay-node", &args)?;
        let node_port = SocketAddrV4::new(node.ip(), NODE_PORT);
        Ok(Self { agent, device, pods, node_port, _nodes: [node, outside] })
    }

    fn cases(&self, mode: &str, is_here: bool) -> Vec<Case> {
        let at = |ip: Ipv4Addr| SocketAddrV4::new(ip, BACKEND_PORT);
        let [near, far] = [at(self.pods[0].ip), at(FAR_POD)];
        let case = |program, case, ends, verdict| Case { program, case, ends, verdict };
        let outside = [CLIENT, self.node_port];
        if !is_here {
            let name = if mode == "l3" {
                "node port, to another node by route"
            } else {
                "node port, to another node by tunnel"
            };
            return vec![case("xdp_entry", name, outside, BACK)];
        }
        vec![
            case("tc_from_pod", "to a pod here", [near, at(self.pods[1].ip)], REDIRECT),
            case("tc_from_pod", "to another node", [near, far], REDIRECT),
            case("tc_to_overlay", "to another node", [near, far], NEXT),
            case("tc_from_overlay", "to a pod here", [far, near], REDIRECT),
            case("tc_from_underlay", "node port, to a pod here", outside, REDIRECT),
            case("xdp_entry", "node port, to a pod here", outside, UP),
        ]
    }

    /// Nanoseconds a packet of an established flow, the writing of its headers taken off.
    fn measure(&mut self, case: &Case) -> Result<f64> {
        // A test run of tc comes in by loopback, whose address is zero.
        let mac = if case.program.starts_with("xdp") { &self.device.1 } else { "0:0:0:0:0:0" };
        let [from, to] = case.ends;
        let headers = hex(&headers(mac, from, to)?);
        let order = format!("run {} {headers} {REPEAT} {}", case.program, self.device.0);
        let [with, without, verdict, changed] = self.agent.numbers::<4>(&order)?;
        anyhow::ensure!(verdict == case.verdict, "verdict {verdict}");
        // `XDP_PASS` says nothing by itself.
        anyhow::ensure!(verdict != UP || changed == 1, "the packet was not translated");
        Ok(float(with) - float(without))
    }
}
