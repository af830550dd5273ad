//! `cargo xtask bench lb`: connect + request + reply and request + reply between two pods on one
//! node: routed directly, through a Service of Orlop, and through kube-proxy's iptables rules.

use std::{io::Write as _, net::SocketAddrV4, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use tests::bench::{
    hosts::{self, Cgroup, Node},
    kube_proxy, orlop,
    report::{self, Sample},
    traffic::{self, Worker},
};

/// Port of the echo server in the server pod.
const SERVER_PORT: u16 = 8080;
/// Pod network of the measured node.
const CLUSTER_CIDR: &str = "10.244.0.0/16";

#[derive(Parser)]
struct Flags {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Measures; the other roles are its children.
    Run {
        #[arg(long, value_delimiter = ',', default_values_t = [1, 1000, 10_000])]
        services: Vec<u32>,
        #[arg(long, value_delimiter = ',', default_values_t = ["direct".to_owned(), "orlop".to_owned(), "iptables".to_owned()])]
        against: Vec<String>,
        #[arg(long)]
        quick: bool,
        #[arg(long)]
        json: Option<PathBuf>,
    },
    Server,
    Node {
        #[arg(long)]
        cgroup: PathBuf,
        #[arg(long)]
        services: u32,
        #[arg(long)]
        real: SocketAddrV4,
        #[arg(long)]
        pod: Vec<String>,
    },
    Client {
        #[arg(long)]
        target: SocketAddrV4,
        #[arg(long)]
        cgroup: Option<String>,
    },
}

/// One subject at one number of services, ready to be measured.
struct Lane {
    subject: &'static str,
    services: u32,
    client: Worker,
    server: Worker,
    // Dropped after the workers: programs first, then their cgroup, then the namespaces.
    _agent: Option<Worker>,
    _cgroup: Option<Cgroup>,
    _node: Node,
}

fn main() -> Result<()> {
    match Flags::parse().role {
        Role::Run { services, against, quick, json } => run(&services, &against, quick, json),
        Role::Node { cgroup, services, real, pod } => {
            let pods = pod.iter().map(|flag| orlop::endpoint(flag)).collect::<Result<_>>()?;
            let runtime = tokio::runtime::Runtime::new().context("start tokio")?;
            runtime.block_on(orlop::node(cgroup, services, real, pods))
        }
        Role::Server => traffic::server(SERVER_PORT),
        Role::Client { target, cgroup } => traffic::client(target, cgroup.as_deref()),
    }
}

fn run(services: &[u32], against: &[String], quick: bool, json: Option<PathBuf>) -> Result<()> {
    let mut lanes = Vec::new();
    for subject in against {
        match subject.as_str() {
            "direct" => lanes.push(lane("direct", 0)?),
            "iptables" => {
                for count in services {
                    lanes.push(lane("iptables", *count)?);
                }
            }
            "orlop" => {
                for count in services {
                    lanes.push(lane("orlop", *count)?);
                }
            }
            other => bail!("--against {other}: expected direct, orlop or iptables"),
        }
    }
    let (rounds, per_round) = if quick { (9, 1000) } else { (31, 2000) };
    let mut samples = Vec::new();
    for round in 0..rounds {
        // Every other round goes backwards, so that no subject always runs after the same other.
        let mut order: Vec<usize> = (0..lanes.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let lane = lanes.get_mut(index).context("an index of lanes")?;
            measure(lane, round, per_round, &mut samples)?;
        }
    }
    let rows = report::rows(&samples);
    std::io::stdout().write_all(report::table(&rows).as_bytes()).context("print")?;
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&report::json("lb", &rows))?;
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn lane(subject: &'static str, services: u32) -> Result<Lane> {
    let mut node = Node::new(&format!("{subject}{services}"))?;
    let (a, b) = (node.add_pod()?, node.add_pod()?);
    let real = [SocketAddrV4::new(b.ip, SERVER_PORT)];
    let (all, cluster_ip) = kube_proxy::services(services.max(1), &real);
    let server = Worker::start(&b.netns, "server", &[])?;
    let target =
        if subject == "direct" { SocketAddrV4::new(b.ip, SERVER_PORT) } else { cluster_ip };
    if subject == "iptables" {
        let rules = kube_proxy::iptables(&all, CLUSTER_CIDR);
        hosts::exec(&node.name, &["iptables-restore", "--noflush"], Some(&rules))?;
    }
    let mut client_flags = vec!["--target".to_owned(), target.to_string()];
    let (mut agent, mut cgroup) = (None, None);
    if subject == "orlop" {
        let made = Cgroup::new(&node.name)?;
        let (dir, count) = (made.path(), services.to_string());
        let real = SocketAddrV4::new(b.ip, SERVER_PORT).to_string();
        let pods = [orlop::pod_flag(&a), orlop::pod_flag(&b)];
        let flags = ["--cgroup", &dir, "--services", &count, "--real", &real];
        let flags = [flags.as_slice(), &["--pod", &pods[0], "--pod", &pods[1]]].concat();
        agent = Some(Worker::start(&node.name, "node", &flags)?);
        client_flags.extend(["--cgroup".to_owned(), dir]);
        cgroup = Some(made);
    }
    let flags: Vec<&str> = client_flags.iter().map(String::as_str).collect();
    let mut client = Worker::start(&a.netns, "client", &flags)?;
    client.measure("crr 100").with_context(|| format!("warm up {subject} at {services}"))?;
    Ok(Lane { subject, services, client, server, _agent: agent, _cgroup: cgroup, _node: node })
}

fn measure(lane: &mut Lane, round: u32, count: u32, samples: &mut Vec<Sample>) -> Result<()> {
    let mut add = |metric, unit, value: f64| {
        let (subject, services) = (lane.subject, lane.services);
        samples.push(Sample { subject, services, round, metric, unit, value });
    };
    for (kind, p50, p99) in [("crr", "crr_p50", "crr_p99"), ("rr", "rr_p50", "rr_p99")] {
        let before = lane.server.cpu_ns()?;
        let shown = lane.client.measure(&format!("{kind} {count}"))?;
        let cpu = shown.cpu_ns + lane.server.cpu_ns()?.saturating_sub(before);
        add(p50, "us", micros(shown.p50_ns));
        add(p99, "us", micros(shown.p99_ns));
        if kind == "crr" {
            add("cpu_per_transaction", "us", micros(cpu) / f64::from(count));
        }
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of one round are far below 2^52")]
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}
