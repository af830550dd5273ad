//! `bench overlay`: traffic between pods of two nodes: by Orlop's VXLAN and L3 overlay, by the kernel's VXLAN
//! and by plain routes, both set up by hand. Effects.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result, bail, ensure};
use node_agent::{
    dataplane::{self, Tables, XdpMode},
    model::{NodeRow, ObjectKey},
    overlay::{self, Mode, OverlayConfig},
    table::Table,
};
use serde_json::json;

use super::{
    chart::{Bar, Chart, Content, Panel},
    hosts::{self, Cgroup, ETHERNET_MTU, Node},
    kube_proxy,
    measure::{self, Effort, Ends},
    orlop,
    output::{Output, progress},
    packets,
    report::{self, Lane, Parameters, Row},
    source,
    traffic::{SERVER_PORT, Worker, say},
};

/// Bytes that VXLAN over IPv4 adds (RFC 7348 section 5).
const VXLAN_OVERHEAD: u32 = 50;
/// The two nodes' numbers.
const NODES: [u8; 2] = [1, 2];

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Wish {
    /// direct, kernel-vxlan, orlop.
    #[arg(long, value_delimiter = ',')]
    pub against: Vec<String>,
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// What a child of the role `overlay-node` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeFlags {
    #[arg(long)]
    pub number: u8,
    /// `vxlan` or `l3`.
    #[arg(long)]
    pub mode: String,
    /// As `orlop::pod_flag` writes it.
    #[arg(long = "pod")]
    pub pods: Vec<String>,
    #[arg(long)]
    pub cgroup: Option<std::path::PathBuf>,
    /// Services programmed beside.
    #[arg(long, default_value_t = 0)]
    pub services: u32,
    /// Where the UDP node port of `packets` leads.
    #[arg(long)]
    pub node_port_to: Option<SocketAddrV4>,
    /// What carries node ports: `tc` or `xdp`.
    #[arg(long, default_value = "tc")]
    pub path: String,
}

/// What one lane runs on; agents end before their namespaces.
struct Ground {
    _agents: Vec<Worker>,
    _cgroup: Option<Cgroup>,
    _nodes: [Node; 2],
}

/// Measures all subjects in interleaved rounds.
///
/// # Errors
/// When a subject cannot be set up, or its traffic fails.
pub fn run(wish: &Wish) -> Result<()> {
    let (mut lanes, mut ends, mut grounds): (Vec<Lane>, _, _) =
        (Vec::new(), Vec::new(), Vec::new());
    for (subject, mode) in plan(wish)? {
        progress(&format!("set up {subject} {mode}"));
        let (ground, end) = set_up(subject, mode)?;
        // Each is compared with what the kernel does by hand in the same way.
        let base = match (subject, mode) {
            ("orlop", "vxlan") => "kernel-vxlan",
            _ => "direct",
        };
        let base = lanes.iter().position(|lane| lane.subject == base);
        let parameters = Parameters::from([("mode", json!(mode)), ("nodes", json!(NODES.len()))]);
        lanes.push(Lane { subject, parameters, base });
        ends.push(end);
        grounds.push(ground);
    }
    let effort = Effort::new(wish.quick);
    progress(&format!("measure {} subjects in {} rounds", lanes.len(), effort.rounds));
    let samples = measure::rounds(&lanes, &mut ends, effort)?;
    drop(ends);
    drop(grounds);
    let rows = report::rows(&lanes, &samples);
    wish.output.finish("overlay", &rows, |note| chart(&rows, note))
}

/// Subjects and modes; what others are compared with stands first.
fn plan(wish: &Wish) -> Result<Vec<(&'static str, &'static str)>> {
    let known = ["direct", "kernel-vxlan", "orlop"];
    if let Some(other) = wish.against.iter().find(|one| !known.contains(&one.as_str())) {
        bail!("--against {other}: expected direct, kernel-vxlan or orlop");
    }
    let all = [("direct", "l3"), ("kernel-vxlan", "vxlan"), ("orlop", "l3"), ("orlop", "vxlan")];
    let asked = |subject: &str| wish.against.iter().any(|one| one == subject);
    Ok(all.into_iter().filter(|(subject, _)| asked(subject)).collect())
}

fn set_up(subject: &'static str, mode: &'static str) -> Result<(Ground, Ends)> {
    let node = |number: u8| Node::new(&format!("{subject}-{mode}{number}"), number);
    let mut nodes = [node(NODES[0])?, node(NODES[1])?];
    hosts::join(&nodes[0], &nodes[1])?;
    let mtu = if mode == "vxlan" { ETHERNET_MTU - VXLAN_OVERHEAD } else { ETHERNET_MTU };
    let pods = [nodes[0].add_pod(mtu)?, nodes[1].add_pod(mtu)?];
    let (mut agents, mut cgroup) = (Vec::new(), None);
    match subject {
        "direct" => routes(&nodes)?,
        "kernel-vxlan" => tunnel(&nodes, mtu)?,
        _ => {
            let made = Cgroup::new(&nodes[0].name)?;
            for (node, pod) in nodes.iter().zip(&pods) {
                let args = [
                    format!("--number={}", node.number),
                    format!("--mode={mode}"),
                    format!("--pod={}", orlop::pod_flag(pod)),
                    format!("--cgroup={}", made.path()),
                ];
                agents.push(Worker::start(&node.name, "overlay-node", &args)?);
            }
            cgroup = Some(made);
        }
    }
    let server = Worker::start(&pods[1].netns, "server", &[])?;
    let target = SocketAddrV4::new(pods[1].ip, SERVER_PORT);
    let mut flags = vec![format!("--target={target}")];
    flags.extend(cgroup.iter().map(|dir| format!("--cgroup={}", dir.path())));
    let mut client = Worker::start(&pods[0].netns, "client", &flags)?;
    client.measure("crr 100").with_context(|| format!("warm up {subject} {mode}"))?;
    Ok((Ground { _agents: agents, _cgroup: cgroup, _nodes: nodes }, Ends { client, server }))
}

/// A route to the other node's pods by its address.
fn routes(nodes: &[Node; 2]) -> Result<()> {
    for (node, other) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        node.ip_command(&format!("route add {} via {}", other.pod_cidr(), other.ip()))?;
    }
    Ok(())
}

/// What flannel makes: a VXLAN device without learning, and per peer a route, a neighbour and an
/// entry of the forwarding table.
fn tunnel(nodes: &[Node; 2], mtu: u32) -> Result<()> {
    let mac = |node: &Node| format!("02:42:00:00:00:{:02x}", node.number);
    let gateway = |node: &Node| Ipv4Addr::new(10, 244, node.number, 0);
    for (node, other) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        node.ip_command(&format!(
            "link add vx address {} mtu {mtu} type vxlan id 1 dstport 8472 local {} dev eth0 nolearning",
            mac(node),
            node.ip()
        ))?;
        node.ip_command(&format!("addr add {}/32 dev vx", gateway(node)))?;
        node.ip_command("link set vx up")?;
        let (far, far_mac) = (gateway(other), mac(other));
        node.ip_command(&format!("route add {} via {far} dev vx onlink", other.pod_cidr()))?;
        node.ip_command(&format!("neigh add {far} lladdr {far_mac} dev vx nud permanent"))?;
        let node_ip = other.ip().to_string();
        let entry = ["bridge", "fdb", "add", &far_mac, "dev", "vx", "dst", &node_ip];
        hosts::exec(&node.name, &entry, None)?;
    }
    Ok(())
}

/// The child's life: Orlop's overlay and dataplane on one node, until standard input ends;
/// orders are those of `source`.
///
/// # Errors
/// When one of them cannot start or is not ready in time.
pub async fn life(flags: NodeFlags) -> Result<()> {
    let nodes = Table::new();
    for number in NODES {
        let row = NodeRow {
            internal_ips: vec![Ipv4Addr::new(192, 168, 0, number).into()],
            pod_cidrs: vec![format!("10.244.{number}.0/24").parse().context("a CIDR")?],
            ready: true,
            leaving: false,
            labels: std::collections::BTreeMap::new(),
        };
        nodes.upsert(ObjectKey::new("", &format!("node-{number}")), row);
    }
    nodes.mark_synced();
    let own = Ipv4Addr::new(192, 168, 0, flags.number);
    let config = OverlayConfig {
        mode: if flags.mode == "l3" { Mode::L3 } else { Mode::Vxlan },
        ..OverlayConfig::new(&format!("node-{}", flags.number), vec![own.into()])
    };
    let mut overlay = overlay::start(config, nodes).context("start the overlay")?;
    let pods = flags.pods.iter().map(|flag| orlop::endpoint(flag)).collect::<Result<_>>()?;
    let mut all: Vec<_> = (0..flags.services).map(|n| kube_proxy::service(n, 2)).collect();
    all.extend(flags.node_port_to.map(|to| packets::node_port_service(flags.services, to)));
    let orlop::Filled { tables, overlay: _unused } = orlop::fill(all.into_iter(), pods);
    tables.services.mark_synced();
    tables.slices.mark_synced();
    let revision = *tables.endpoints.subscribe().borrow();
    let tables =
        Tables { tunnels: overlay.tunnels.clone(), overlay: overlay.device.clone(), ..tables };
    let config = dataplane::DataplaneConfig {
        node_ips: vec![own.into()],
        devices: Vec::new(),
        xdp: if flags.path == "xdp" { XdpMode::Native } else { XdpMode::Off },
        ..orlop::config(flags.cgroup)
    };
    let device = overlay.device.wait_for(Option::is_some);
    let device = tokio::time::timeout(orlop::TIMEOUT, device).await;
    drop(device.with_context(|| format!("{:?}", *overlay.trouble.borrow()))?.context("overlay")?);
    let mut handle = dataplane::start(config, tables).context("start the dataplane")?;
    let programmed = handle.programmed.wait_for(|done| done.revision >= revision);
    drop(tokio::time::timeout(orlop::TIMEOUT, programmed).await.context("pods in time")?);
    let report = handle.report().await.context("the dataplane ended")?;
    ensure!(report.trouble.is_empty(), "{:?}", report.trouble);
    say("ready")?;
    tokio::task::spawn_blocking(source::take_orders).await??;
    handle.stop().await;
    overlay.stop().await;
    Ok(())
}

fn chart(rows: &[Row], note: &str) -> Chart {
    let panel = |metric: &str, title: &str| {
        let bars = rows.iter().filter(|row| row.metric == metric).map(|row| {
            let mode = row.parameters.get("mode").and_then(|mode| mode.as_str()).unwrap_or("");
            let name = if row.subject == "orlop" {
                format!("orlop\n{mode}")
            } else {
                row.subject.to_owned()
            };
            Bar { name, subject: row.subject, value: row.median }
        });
        Panel { title: title.to_owned(), content: Content::Bars(bars.collect()) }
    };
    Chart {
        title: "Two pods on two nodes: Orlop's overlay and the kernel's, set up by hand".to_owned(),
        note: format!("cargo xtask bench overlay · {note}"),
        panels: vec![
            panel("crr_p50", "connect + request + reply, p50, µs (lower is better)"),
            panel("throughput", "throughput, bit/s (higher is better)"),
            panel("cpu_per_transaction", "CPU of one connection, µs (lower is better)"),
        ],
    }
}
