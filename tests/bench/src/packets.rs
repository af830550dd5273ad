//! The part of `bench lb` without sockets: node port packets per second on one core, and nanoseconds a
//! packet of each program. Effects.
//!
//! Frames of 64 established UDP flows are made by a program in the namespace outside, sent through a veth pair
//! in the way that drivers hand frames to XDP, and dropped where they arrive. All of it happens on one core, so
//! `source` says what making and handing over takes by itself, and `ns_behind_source` is the rest of a packet's
//! time: what a node spends whose frames come from a network.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    chart::{Bar, Chart, Content, Panel},
    hosts::{self, ETHERNET_MTU, Node, Pod},
    kube_proxy::{self, Protocol, Service, iptables, nftables},
    lb::CLUSTER_CIDR,
    measure::float,
    nanoseconds, orlop,
    output::{Output, progress},
    report::{self, Lane, Parameters, Row, Sample},
    source::{headers, hex},
    traffic::Worker,
};

/// Where the node port answers.
pub const NODE_PORT: u16 = 30_080;
/// Port of the backend.
pub const BACKEND_PORT: u16 = 8080;
/// The client's address and the first of its ports.
pub const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, 99), 10_000);
/// Flows of the packet source.
pub const FLOWS: u16 = 64;
/// A pod of the other node.
pub const FAR_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 10);
/// Services beside the measured one.
pub const SERVICES: u32 = 1000;
/// Frames in a round: a few tenths of a second.
const FRAMES: u32 = 200_000;

/// The service with the node port.
#[must_use]
pub fn node_port_service(number: u32, backend: SocketAddrV4) -> Service {
    Service {
        protocol: Protocol::Udp,
        node_port: Some(NODE_PORT),
        endpoints: vec![backend],
        ..kube_proxy::service(number, 0)
    }
}

/// What stands between client and backend, and what the results are described by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    subject: &'static str,
    /// `here` or `elsewhere`: where the backend is.
    backend: &'static str,
    /// `stack`, `tc`, `xdp`; `none` for the source by itself.
    path: &'static str,
}

/// One case, ready to be measured. Programs end before the namespaces.
struct Rig {
    sender: Worker,
    /// Where frames end; else they come back to the sender.
    sink: Option<Worker>,
    _held: Vec<Worker>,
    headers: String,
    _nodes: [Node; 2],
}

/// What to measure without the rest of `bench lb`.
#[derive(Clone, Debug, clap::Args)]
pub struct Wish {
    /// orlop, iptables, nftables.
    #[arg(long, value_delimiter = ',')]
    pub against: Vec<String>,
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// Measures this part alone.
///
/// # Errors
/// As [`run`].
pub fn alone(wish: &Wish) -> Result<()> {
    let rows = run(&wish.against, wish.quick)?;
    wish.output.finish("packets", &rows, |note| Chart {
        title: "Packets of a node port".to_owned(),
        note: format!("cargo xtask bench packets · {note}"),
        panels: vec![panel(&rows)],
    })
}

/// Measures what is asked for, in interleaved rounds.
///
/// # Errors
/// When namespaces or traffic fail.
pub fn run(against: &[String], quick: bool) -> Result<Vec<Row>> {
    let rounds = if quick { 7 } else { 21 };
    let (mut cases, mut rigs) = (Vec::new(), Vec::new());
    for case in plan(against) {
        progress(&format!("set up packets: {} {} {}", case.subject, case.path, case.backend));
        match Rig::new(case) {
            Ok(rig) => {
                cases.push(case);
                rigs.push(rig);
            }
            // Kernels differ in what they let a test attach; the other cases are worth measuring.
            Err(error) => progress(&format!("  not measured: {error:#}")),
        }
    }
    let mut samples = Vec::new();
    for round in 0..rounds {
        let mut source = None;
        for (lane, rig) in rigs.iter_mut().enumerate() {
            let value = rig.measure()?;
            let (metric, unit) = ("packets_per_second", "1/s");
            samples.push(Sample { lane, round, metric, unit, value });
            // Making a frame and handing it over is the first lane's.
            let Some(alone) = source.replace(source.unwrap_or(value)) else { continue };
            let value = 1e9 / value - 1e9 / alone;
            let (metric, unit) = ("ns_behind_source", "ns");
            samples.push(Sample { lane, round, metric, unit, value });
        }
    }
    drop(rigs);
    let lanes: Vec<Lane> = cases.iter().map(|case| describe(*case, &cases)).collect();
    let mut rows = report::rows(&lanes, &samples);
    if against.iter().any(|one| one == "orlop") {
        rows.extend(nanoseconds::run(rounds)?);
    }
    Ok(rows)
}

fn plan(against: &[String]) -> Vec<Case> {
    let mut cases = vec![Case { subject: "source", backend: "none", path: "none" }];
    for backend in ["here", "elsewhere"] {
        for (subject, path) in
            [("iptables", "stack"), ("nftables", "stack"), ("orlop", "tc"), ("orlop", "xdp")]
        {
            if against.iter().any(|one| one == subject) {
                cases.push(Case { subject, backend, path });
            }
        }
    }
    cases
}

fn describe(case: Case, all: &[Case]) -> Lane {
    let base = all
        .iter()
        .position(|one| one.subject == "iptables" && one.backend == case.backend)
        .filter(|_| case.subject != "iptables");
    let parameters = Parameters::from([
        ("services", json!(SERVICES)),
        ("endpoints", json!(1)),
        ("backend", json!(case.backend)),
        ("path", json!(case.path)),
    ]);
    Lane { subject: case.subject, parameters, base }
}

impl Rig {
    fn new(case: Case) -> Result<Self> {
        let label = |end: &str| format!("pk{}{}{}{end}", case.subject, case.path, case.backend);
        let mut node = Node::new(&label("n"), 1)?;
        let outside = Node::new(&label("o"), 2)?;
        hosts::join(&node, &outside)?;
        let pod = node.add_pod(ETHERNET_MTU)?;
        outside.ip_command(&format!("addr add {}/24 dev eth0", CLIENT.ip()))?;
        outside.ip_command(&format!("addr add {FAR_POD}/32 dev lo"))?;
        outside.ip_command(&format!("route add {} via {}", node.pod_cidr(), node.ip()))?;
        let (_, mac) = hosts::link(&node.name, "eth0")?;
        let headers = hex(&headers(&mac, CLIENT, SocketAddrV4::new(node.ip(), NODE_PORT))?);
        let mut held = Vec::new();
        if case.subject == "source" {
            let sink = Some(keep(&node.name, "xdp-drop")?);
            let sender = keep(&outside.name, "xdp-drop")?;
            return Ok(Self { sender, sink, _held: held, headers, _nodes: [node, outside] });
        }
        let address = if case.backend == "here" { pod.ip } else { FAR_POD };
        held.extend(program(
            case,
            &node,
            &outside,
            &pod,
            SocketAddrV4::new(address, BACKEND_PORT),
        )?);
        let server = if case.backend == "here" { &pod.netns } else { &outside.name };
        let echo = Worker::start(server, "udp-echo", &[format!("--address={address}")])?;
        // Answers that leave the node by XDP are taken at the other end of the pair by such a program alone.
        let taken = keep(&outside.name, "xdp-pass")?;
        drop(Worker::start(&outside.name, "prime", &[]).context("no answer through the service")?);
        drop((echo, taken));
        // What drops frames drops the answers of neighbours too.
        let (_, far_mac) = hosts::link(&outside.name, "eth0")?;
        let (near, near_mac, veth) = (pod.ip, &pod.macs.1, &pod.host_veth);
        node.ip_command(&format!(
            "neigh replace {near} lladdr {near_mac} dev {veth} nud permanent"
        ))?;
        for address in [outside.ip(), *CLIENT.ip()] {
            let entry = format!("neigh replace {address} lladdr {far_mac} dev eth0 nud permanent");
            node.ip_command(&entry)?;
        }
        let sender = keep(&outside.name, "xdp-drop")?;
        let sink = match case.backend {
            "here" => Some(keep(&pod.netns, "tc-drop")?),
            _ => None,
        };
        Ok(Self { sender, sink, _held: held, headers, _nodes: [node, outside] })
    }

    /// Packets a second that came to where they belong.
    fn measure(&mut self) -> Result<f64> {
        let arrived = |rig: &Self| rig.sink.as_ref().unwrap_or(&rig.sender).received("eth0");
        let before = arrived(self)?;
        let order = format!("send {} {FRAMES}", self.headers);
        let [elapsed_ns] = self.sender.numbers(&order)?;
        let count = arrived(self)?.saturating_sub(before);
        ensure!(count > 0, "no packet arrived");
        Ok(float(count) * 1e9 / float(elapsed_ns.max(1)))
    }
}

/// Programs the node with the subject's rules or programs.
fn program(
    case: Case,
    node: &Node,
    outside: &Node,
    pod: &Pod,
    backend: SocketAddrV4,
) -> Result<Vec<Worker>> {
    let mut held = Vec::new();
    if case.path != "xdp" {
        // Without a program there the device takes no frames from another's XDP.
        held.push(keep(&node.name, "xdp-pass")?);
    }
    if case.subject == "orlop" {
        let args = [
            format!("--number={}", node.number),
            "--mode=l3".to_owned(),
            format!("--services={SERVICES}"),
            format!("--node-port-to={backend}"),
            format!("--pod={}", orlop::pod_flag(pod)),
            format!("--path={}", case.path),
        ];
        held.push(Worker::start(&node.name, "overlay-node", &args)?);
        return Ok(held);
    }
    node.ip_command(&format!("route add {} via {}", outside.pod_cidr(), outside.ip()))?;
    let (mut all, _) = kube_proxy::services(SERVICES, 2, &[]);
    all.push(node_port_service(SERVICES, backend));
    if case.subject == "iptables" {
        let rules = iptables::full(&all, CLUSTER_CIDR);
        hosts::exec(&node.name, &["iptables-restore", "--noflush"], Some(&rules))?;
    } else {
        let rules = nftables::full(&all, CLUSTER_CIDR, &node.ip().to_string());
        hosts::exec(&node.name, &["nft", "-f", "-"], Some(&rules))?;
    }
    Ok(held)
}

fn keep(netns: &str, kind: &str) -> Result<Worker> {
    let (index, _) = hosts::link(netns, "eth0")?;
    Worker::start(netns, "hold", &[format!("--index={index}"), format!("--kind={kind}")])
}

/// Packets a second by subject, backends elsewhere.
#[must_use]
pub fn panel(rows: &[Row]) -> Panel {
    let text = |row: &Row, name: &str| {
        row.parameters.get(name).and_then(Value::as_str).unwrap_or("").to_owned()
    };
    let wanted =
        |row: &&Row| row.metric == "packets_per_second" && text(row, "backend") == "elsewhere";
    let bars = rows.iter().filter(wanted).map(|row| {
        let path = text(row, "path");
        let name = if path == "stack" {
            row.subject.to_owned()
        } else {
            format!("{}\n{path}", row.subject)
        };
        Bar { name, subject: row.subject, value: row.median }
    });
    Panel {
        title: "node port packets/s on one core, backend elsewhere".to_owned(),
        content: Content::Bars(bars.collect()),
    }
}
