//! `bench lb`: traffic between two pods of one node: routed directly, through a Service of Orlop, and
//! through kube-proxy's rules for iptables and nftables. Effects.

use std::net::SocketAddrV4;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::{
    chart::{Bar, Chart, Content, Panel, Series},
    hosts::{self, Cgroup, ETHERNET_MTU, Node},
    kube_proxy::{self, iptables, nftables},
    measure::{self, Effort, Ends, float},
    orlop,
    output::{Output, progress},
    packets,
    report::{self, Lane, Parameters, Row},
    traffic::{SERVER_PORT, Worker},
};

/// Pod network of the measured node.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// Endpoints of each service that is not measured.
const ENDPOINTS: u32 = 2;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Wish {
    /// Numbers of services for all subjects.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1000, 10_000])]
    pub services: Vec<u32>,
    /// Further numbers of services for Orlop alone.
    #[arg(long, value_delimiter = ',')]
    pub more_services: Vec<u32>,
    /// direct, orlop, iptables, nftables.
    #[arg(long, value_delimiter = ',')]
    pub against: Vec<String>,
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// What one lane runs on. Programs end before their cgroup and the namespaces.
struct Ground {
    _agent: Option<Worker>,
    _cgroup: Option<Cgroup>,
    _node: Node,
}

/// Measures all subjects in interleaved rounds.
///
/// # Errors
/// When a subject cannot be set up, or its traffic fails.
pub fn run(wish: &Wish) -> Result<()> {
    let (mut lanes, mut ends, mut grounds) = (Vec::new(), Vec::new(), Vec::new());
    for (subject, services) in plan(wish)? {
        let services_given = if subject == "direct" { 0 } else { services };
        progress(&format!("set up {subject} with {services_given} services"));
        let (ground, end) = match set_up(subject, services) {
            Ok(made) => made,
            // More than the others have: the rest is worth measuring without it.
            Err(error) if wish.more_services.contains(&services) => {
                progress(&format!("  failed: {error:#}"));
                continue;
            }
            Err(error) => return Err(error),
        };
        let parameters = Parameters::from([
            ("services", json!(services_given)),
            ("endpoints", json!(ENDPOINTS)),
        ]);
        let base = lanes.iter().position(|lane: &Lane| lane.subject == "direct");
        lanes.push(Lane { subject, parameters, base });
        ends.push(end);
        grounds.push(ground);
    }
    let effort = Effort::new(wish.quick);
    progress(&format!("measure {} subjects in {} rounds", lanes.len(), effort.rounds));
    let samples = measure::rounds(&lanes, &mut ends, effort)?;
    drop(ends);
    drop(grounds);
    let mut rows = report::rows(&lanes, &samples);
    rows.extend(packets::run(&wish.against, wish.quick)?);
    wish.output.finish("lb", &rows, |note| chart(&rows, note))
}

/// Latency by the number of services, and what an established connection does at the largest number
/// that all subjects have.
fn chart(rows: &[Row], note: &str) -> Chart {
    let services = |row: &Row| row.parameters.get("services").and_then(Value::as_u64).unwrap_or(0);
    let mut series: Vec<Series> = Vec::new();
    for row in rows.iter().filter(|row| row.metric == "crr_p50") {
        let point = (float(services(row)).max(1.0), row.median);
        match series.iter_mut().find(|one| one.subject == row.subject) {
            Some(one) => one.points.push(point),
            None => {
                let (name, subject) = (row.subject.to_owned(), row.subject);
                let across = subject == "direct";
                series.push(Series { name, across, subject, points: vec![point] });
            }
        }
    }
    let log_y = {
        let medians = || series.iter().flat_map(|one| one.points.iter().map(|(_, y)| *y));
        medians().fold(0.0, f64::max) > 8.0 * medians().fold(f64::MAX, f64::min)
    };
    let common = rows.iter().filter(|row| row.subject == "nftables").map(services).max();
    let bars = |metric: &str| -> Vec<Bar> {
        let wanted = |row: &&Row| {
            let at = services(row);
            row.metric == metric && (at == 0 || common.is_none_or(|common| at == common))
        };
        let bar =
            |row: &Row| Bar { name: row.subject.into(), subject: row.subject, value: row.median };
        rows.iter().filter(wanted).map(bar).collect()
    };
    let at = common.map_or_else(String::new, |count| format!(" at {count} services"));
    let x_title = "services (direct: none)".to_owned();
    Chart {
        title: "Two pods of one node: directly, and through a Service".to_owned(),
        note: format!("cargo xtask bench lb · {note}"),
        panels: vec![
            Panel {
                title: "connect + request + reply, p50, µs (lower is better)".to_owned(),
                content: Content::Lines { x_title, log_y, series },
            },
            Panel {
                title: format!("throughput, bit/s{at} (higher is better)"),
                content: Content::Bars(bars("throughput")),
            },
            packets::panel(rows),
            Panel {
                title: format!("CPU of one connection, µs{at}"),
                content: Content::Bars(bars("cpu_per_transaction")),
            },
        ],
    }
}

/// Subjects and numbers of services, `direct` first.
fn plan(wish: &Wish) -> Result<Vec<(&'static str, u32)>> {
    let mut plan = Vec::new();
    if wish.against.iter().any(|subject| subject == "direct") {
        plan.push(("direct", 1));
    }
    for subject in &wish.against {
        let subject = match subject.as_str() {
            "direct" => continue,
            "orlop" => "orlop",
            "iptables" => "iptables",
            "nftables" => "nftables",
            other => bail!("--against {other}: expected direct, orlop, iptables or nftables"),
        };
        plan.extend(wish.services.iter().map(|count| (subject, *count)));
        if subject == "orlop" {
            plan.extend(wish.more_services.iter().map(|count| (subject, *count)));
        }
    }
    Ok(plan)
}

fn set_up(subject: &'static str, services: u32) -> Result<(Ground, Ends)> {
    let mut node = Node::new(&format!("{subject}{services}"), 0)?;
    let (a, b) = (node.add_pod(ETHERNET_MTU)?, node.add_pod(ETHERNET_MTU)?);
    let real = SocketAddrV4::new(b.ip, SERVER_PORT);
    let (all, cluster_ip) = kube_proxy::services(services, ENDPOINTS, &[real]);
    let server = Worker::start(&b.netns, "server", &[])?;
    let target = if subject == "direct" { real } else { cluster_ip }.to_string();
    let mut client_flags = vec!["--target".to_owned(), target];
    let (mut agent, mut cgroup) = (None, None);
    match subject {
        "iptables" => {
            let rules = iptables::full(&all, CLUSTER_CIDR);
            hosts::exec(&node.name, &["iptables-restore", "--noflush"], Some(&rules))?;
        }
        "nftables" => {
            let rules = nftables::full(&all, CLUSTER_CIDR, &node.ip().to_string());
            hosts::exec(&node.name, &["nft", "-f", "-"], Some(&rules))?;
        }
        "orlop" => {
            let made = Cgroup::new(&node.name)?;
            let dir = made.path();
            let flags = orlop::NodeFlags {
                cgroup: Some(dir.clone().into()),
                services,
                endpoints: ENDPOINTS,
                real: Some(real),
                pods: vec![orlop::pod_flag(&a), orlop::pod_flag(&b)],
            };
            agent = Some(Worker::start(&node.name, "node", &flags.to_args())?);
            client_flags.extend(["--cgroup".to_owned(), dir]);
            cgroup = Some(made);
        }
        _ => {}
    }
    let mut client = Worker::start(&a.netns, "client", &client_flags)?;
    client.measure("crr 100").with_context(|| format!("warm up {subject} at {services}"))?;
    Ok((Ground { _agent: agent, _cgroup: cgroup, _node: node }, Ends { client, server }))
}
