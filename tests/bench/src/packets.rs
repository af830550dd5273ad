//! The part of `bench lb` without sockets: node port packets per second on one core, and nanoseconds a
//! packet of each program. Effects.
//!
//! Frames of 64 established UDP flows are made by a program in the namespace outside, sent through a veth pair
//! in the way that drivers hand frames to XDP, and dropped where they arrive. All of it happens on one core, so
//! `source` says what making and handing over takes by itself.

use std::{
    io::BufRead as _,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::{
    chart::{Bar, Content, Panel},
    hosts::{self, ETHERNET_MTU, Node, Pod},
    kube_proxy::{self, Protocol, Service, iptables, nftables},
    lb::CLUSTER_CIDR,
    measure::float,
    orlop,
    output::progress,
    raw::{self, HEADERS, Verdict},
    report::{self, Lane, Parameters, Row, Sample},
    traffic::{Worker, pin, say},
};

/// Where the node port answers.
const NODE_PORT: u16 = 30_080;
/// Port of the backend.
const BACKEND_PORT: u16 = 8080;
/// The client's address and the first of its ports.
const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, 99), 10_000);
/// Flows of the packet source.
const FLOWS: u16 = 64;
/// A pod of the other node.
const FAR_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 10);
/// Services beside the measured one.
const SERVICES: u32 = 1000;
/// Frames in a round: a few tenths of a second.
const FRAMES: u32 = 200_000;
/// Runs of a program in a round.
const REPEAT: u32 = 100_000;
/// An answer that has not come by then does not come.
const TIMEOUT: Duration = Duration::from_secs(2);

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
        for (lane, rig) in rigs.iter_mut().enumerate() {
            let value = rig.measure()?;
            let (metric, unit) = ("packets_per_second", "1/s");
            samples.push(Sample { lane, round, metric, unit, value });
        }
    }
    drop(rigs);
    let lanes: Vec<Lane> = cases.iter().map(|case| describe(*case, &cases)).collect();
    let mut rows = report::rows(&lanes, &samples);
    if against.iter().any(|one| one == "orlop") {
        rows.extend(programs(rounds)?);
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
        drop(Worker::start(&outside.name, "prime", &[]).context("no answer through the service")?);
        drop(echo);
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

/// What a child of the role `hold` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct HoldFlags {
    /// The device.
    #[arg(long)]
    pub index: u32,
    /// `xdp-pass`, `xdp-drop` or `tc-drop`.
    #[arg(long)]
    pub kind: String,
}

/// The child's life: a program on the device, and frames out of it when ordered.
///
/// # Errors
/// When the kernel does not take the program; failures of an order are answered.
pub fn hold(flags: &HoldFlags) -> Result<()> {
    let kind = match flags.kind.as_str() {
        "xdp-pass" => Verdict::XdpPass,
        "xdp-drop" => Verdict::XdpDrop,
        "tc-drop" => Verdict::TcDrop,
        other => bail!("--kind {other}: expected xdp-pass, xdp-drop or tc-drop"),
    };
    let program = raw::verdict(kind)?;
    let _link = raw::attach(&program, kind, flags.index)?;
    pin(1);
    say("ready")?;
    let mut source: Option<(String, OwnedFd)> = None;
    answer_orders(|order| {
        let [_, text, count] = order.split(' ').collect::<Vec<_>>()[..] else {
            bail!("unknown order {order}")
        };
        if source.as_ref().is_none_or(|(made_of, _)| made_of != text) {
            source = Some((text.to_owned(), raw::source(&unhex(text)?)?));
        }
        let (_, program) = source.as_ref().context("made above")?;
        let start = Instant::now();
        raw::send(program, flags.index, count.parse().context("count")?)?;
        Ok(start.elapsed().as_nanos().to_string())
    })
}

/// Orders to a child with Orlop's programs: `run PROGRAM HEADERS COUNT` is answered by the nanoseconds of a
/// run behind the writing of the headers, those of the writing alone, and the verdict.
///
/// # Errors
/// When standard input or output break; failures of an order are answered.
pub fn take_orders() -> Result<()> {
    answer_orders(|order| {
        let [_, name, text, count] = order.split(' ').collect::<Vec<_>>()[..] else {
            bail!("unknown order {order}")
        };
        pin(1);
        let (with, without, verdict) =
            raw::measure(name, &unhex(text)?, count.parse().context("count")?)?;
        Ok(format!("{with} {without} {verdict}"))
    })
}

fn answer_orders(mut answer: impl FnMut(&str) -> Result<String>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("read an order")?;
        match answer(&line) {
            Ok(words) => say(&words)?,
            Err(error) => say(&format!("error {error:#}"))?,
        }
    }
    Ok(())
}

/// The child's life: answers datagrams with themselves.
///
/// # Errors
/// When the port is taken.
pub fn udp_echo(address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind((address, BACKEND_PORT)).context("bind")?;
    raw::send_without_checksum(&socket)?;
    say("ready")?;
    let mut bytes = [0; 2048];
    loop {
        let (count, from) = socket.recv_from(&mut bytes).context("receive")?;
        // What is lost is asked for again.
        let _sent: bool = socket.send_to(&bytes[..count], from).is_ok();
    }
}

/// The child's life: two answers by each flow of the packet source, so that every connection table knows
/// them as established.
///
/// # Errors
/// When no answer comes.
pub fn prime() -> Result<()> {
    let node = Ipv4Addr::new(192, 168, 0, 1);
    for flow in 0..FLOWS {
        let socket = UdpSocket::bind((*CLIENT.ip(), CLIENT.port() + flow)).context("bind")?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        raw::send_without_checksum(&socket)?;
        for _turn in 0..2 {
            let mut answer = [0; 8];
            socket.send_to(b"question", (node, NODE_PORT)).context("ask")?;
            let (_, from) = socket.recv_from(&mut answer).context("no answer")?;
            anyhow::ensure!(from == (node, NODE_PORT).into(), "an answer from {from}");
        }
    }
    say("ready")
}

/// Program, what the packet is, where from and where to, and the verdict that says that it went its way.
type ProgramCase = (&'static str, &'static str, [SocketAddrV4; 2], u64);

/// `TC_ACT_REDIRECT`.
const REDIRECT: u64 = 7;
/// `TC_ACT_UNSPEC`, as a word.
const NEXT: u64 = 0xffff_ffff;
/// `XDP_PASS`, translated, to the pod's own stack.
const UP: u64 = 2;

/// Nanoseconds a packet of every program.
fn programs(rounds: u32) -> Result<Vec<Row>> {
    progress("nanoseconds a packet of each program");
    let mut node = Node::new("pkrun-n", 1)?;
    let outside = Node::new("pkrun-o", 2)?;
    hosts::join(&node, &outside)?;
    let (pod, other) = (node.add_pod(ETHERNET_MTU)?, node.add_pod(ETHERNET_MTU)?);
    let at = |ip| SocketAddrV4::new(ip, BACKEND_PORT);
    let args = [
        "--number=1".to_owned(),
        "--mode=vxlan".to_owned(),
        format!("--services={SERVICES}"),
        format!("--node-port-to={}", at(pod.ip)),
        format!("--pod={}", orlop::pod_flag(&pod)),
        format!("--pod={}", orlop::pod_flag(&other)),
        "--path=xdp".to_owned(),
    ];
    let mut agent = Worker::start(&node.name, "overlay-node", &args)?;
    let (far, port) = (at(FAR_POD), SocketAddrV4::new(node.ip(), NODE_PORT));
    let cases: [ProgramCase; 6] = [
        ("tc_from_pod", "to a pod here", [at(pod.ip), at(other.ip)], REDIRECT),
        ("tc_from_pod", "to another node", [at(pod.ip), far], REDIRECT),
        ("tc_to_overlay", "to another node", [at(pod.ip), far], NEXT),
        ("tc_from_overlay", "to a pod here", [far, at(pod.ip)], REDIRECT),
        ("tc_from_underlay", "node port, established", [CLIENT, port], REDIRECT),
        ("xdp_entry", "node port, established", [CLIENT, port], UP),
    ];
    let (mut lanes, mut samples) = (Vec::new(), Vec::new());
    for (program, case, [from, to], expected) in cases {
        let order = format!("run {program} {} {REPEAT}", hex(&headers("0:0:0:0:0:0", from, to)?));
        let parameters = Parameters::from([
            ("services", json!(SERVICES)),
            ("program", json!(program)),
            ("case", json!(case)),
        ]);
        let lane = lanes.len();
        lanes.push(Lane { subject: "orlop", parameters, base: None });
        for round in 0..rounds {
            match agent.numbers::<3>(&order) {
                Ok([_, _, verdict]) if verdict != expected => {
                    progress(&format!("  {program}, {case}: not measured: verdict {verdict}"));
                    break;
                }
                Ok([with, without, _]) => {
                    let value = float(with) - float(without);
                    let (metric, unit) = ("ns_per_packet", "ns");
                    samples.push(Sample { lane, round, metric, unit, value });
                }
                Err(error) => {
                    progress(&format!("  {program}: not measured: {error:#}"));
                    break;
                }
            }
        }
    }
    Ok(report::rows(&lanes, &samples))
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

/// Ethernet, IPv4 and UDP headers of a frame of the shortest length; UDP without a checksum.
fn headers(mac: &str, from: SocketAddrV4, to: SocketAddrV4) -> Result<[u8; HEADERS]> {
    let ip_len = u16::try_from(raw::FRAME - 14)?;
    let mut ip = vec![0x45, 0];
    ip.extend(ip_len.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from.ip().octets());
    ip.extend(to.ip().octets());
    let mut sum: u32 = ip
        .chunks(2)
        .map(|two| u32::from(two[0]) << 8 | u32::from(two.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !u16::try_from(sum)?;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut out = orlop::mac(mac)?.to_vec();
    out.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    out.extend(ip);
    out.extend(from.port().to_be_bytes());
    out.extend(to.port().to_be_bytes());
    out.extend((ip_len - 20).to_be_bytes());
    out.extend([0, 0]);
    <[u8; HEADERS]>::try_from(out).ok().context("headers have a fixed length")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<[u8; HEADERS]> {
    let byte =
        |at: usize| text.get(at * 2..at * 2 + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    let bytes: Option<Vec<u8>> = (0..HEADERS).map(byte).collect();
    bytes.and_then(|bytes| <[u8; HEADERS]>::try_from(bytes).ok()).context("headers in hex")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_a_right_checksum_and_survive_the_order() {
        let made = headers("02:00:00:00:00:01", CLIENT, SocketAddrV4::new(FAR_POD, 7)).unwrap();
        let words = made[14..34].chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1]));
        let sum: u32 = words.sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        assert_eq!(unhex(&hex(&made)).unwrap(), made);
        assert_eq!(u16::from_be_bytes([made[38], made[39]]), 26);
    }
}
