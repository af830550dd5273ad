//! `bench lb`: traffic between two pods of one node: routed directly, through a Service of Orlop, and
//! through kube-proxy's rules for iptables and nftables. Effects.

use std::net::SocketAddrV4;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::{
    hosts::{self, Cgroup, ETHERNET_MTU, Node},
    kube_proxy::{self, iptables, nftables},
    measure::{self, Effort, Ends},
    orlop,
    output::{Output, progress},
    report::{self, Lane, Parameters},
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
        let (ground, end) = set_up(subject, services)?;
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
    wish.output.finish("lb", &report::rows(&lanes, &samples))
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
