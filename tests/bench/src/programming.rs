//! `bench programming`: from the list of services to the last write, and one changed endpoint: Orlop's
//! dataplane against `iptables-restore` and `nft -f` with what kube-proxy feeds to them. Effects.
//!
//! Orlop's time is that of its whole dataplane, from the tables that the watches fill; the peers' is that of
//! the tool alone, without kube-proxy's own work before it.

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::{
    chart::{Chart, Content, Panel, Series},
    hosts::Node,
    kube_proxy::{self, Service, iptables, nftables},
    lb::CLUSTER_CIDR,
    measure::float,
    orlop,
    output::{Output, progress},
    report::{self, Lane, Parameters, Row, Sample},
    tool::{self, Outcome},
    traffic::Worker,
};

/// Changes of one endpoint in a run: of Orlop, of a peer.
const CHANGES: (u32, u32) = (101, 5);

/// The size for which the memory of agent and maps is promised.
const MEMORY_SIZE: Size = (30_000, 4);

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Wish {
    /// Numbers of services, each with 2 and with 10 endpoints.
    #[arg(long, value_delimiter = ',')]
    pub services: Vec<u32>,
    /// orlop, iptables, nftables.
    #[arg(long, value_delimiter = ',')]
    pub against: Vec<String>,
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// How many services, and endpoints of each.
type Size = (u32, u32);

/// Measures every subject at every size, one after the other, several times.
///
/// # Errors
/// When a namespace cannot be made or a child fails.
pub fn run(wish: &Wish) -> Result<()> {
    let lanes = plan(wish)?;
    let (mut samples, mut given_up) = (Vec::new(), Vec::new());
    for round in 0..if wish.quick { 1 } else { 3 } {
        for (lane, (subject, size)) in lanes.iter().enumerate() {
            let (services, endpoints) = *size;
            // What took too long once, or a smaller size of it, is not tried again.
            if given_up.iter().any(|(one, count)| one == subject && *count <= services * endpoints)
            {
                continue;
            }
            progress(&format!("{subject}: {services} services x {endpoints} endpoints"));
            let shown = match *subject {
                "orlop" => match orlop(*size) {
                    Ok(shown) => Some(shown),
                    // The other sizes are worth measuring; this one has no row.
                    Err(error) => {
                        progress(&format!("  failed: {error:#}"));
                        None
                    }
                },
                peer => peer_run(peer, *size)?,
            };
            match shown {
                Some(shown) => samples.extend(shown.samples(lane, round)),
                None => given_up.push((*subject, services * endpoints)),
            }
        }
    }
    let described: Vec<Lane> = lanes.iter().map(|lane| describe(lane, &lanes)).collect();
    let rows = report::rows(&described, &samples);
    let command = "cargo xtask bench programming";
    wish.output.finish("programming", &rows, |note| chart(&rows, command, note))
}

fn plan(wish: &Wish) -> Result<Vec<(&'static str, Size)>> {
    let each: &[u32] = if wish.quick { &[2] } else { &[2, 10] };
    let sizes = wish.services.iter().flat_map(|count| each.iter().map(|each| (*count, *each)));
    let mut sizes: Vec<Size> = sizes.collect();
    sizes.sort_by_key(|(count, each)| count * each);
    let mut lanes = Vec::new();
    for subject in &wish.against {
        let subject = match subject.as_str() {
            "orlop" => "orlop",
            "iptables" => "iptables",
            "nftables" => "nftables",
            other => bail!("--against {other}: expected orlop, iptables or nftables"),
        };
        lanes.extend(sizes.iter().map(|size| (subject, *size)));
        if subject == "orlop" && !wish.quick {
            lanes.push((subject, MEMORY_SIZE));
        }
    }
    Ok(lanes)
}

fn describe((subject, size): &(&'static str, Size), all: &[(&'static str, Size)]) -> Lane {
    let parameters = Parameters::from([("services", json!(size.0)), ("endpoints", json!(size.1))]);
    let base = all.iter().position(|(one, other)| *one == "nftables" && other == size);
    Lane { subject, parameters, base: base.filter(|_| *subject != "nftables") }
}

/// What one run of one subject showed; `None` where the subject has no such thing.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    cold_ns: u64,
    cold_cpu_ns: u64,
    change_ns: u64,
    change_cpu_ns: u64,
    peak_rss: u64,
    rss: Option<u64>,
    map_bytes: Option<u64>,
}

impl Shown {
    fn samples(self, lane: usize, round: u32) -> Vec<Sample> {
        let ms = |ns| float(ns) / 1e6;
        let values = [
            ("cold_start", "s", Some(float(self.cold_ns) / 1e9)),
            ("cold_start_cpu", "s", Some(float(self.cold_cpu_ns) / 1e9)),
            ("one_change", "ms", Some(ms(self.change_ns))),
            ("one_change_cpu", "ms", Some(ms(self.change_cpu_ns))),
            ("peak_rss", "B", Some(float(self.peak_rss))),
            ("rss", "B", self.rss.map(float)),
            ("map_bytes", "B", self.map_bytes.map(float)),
        ];
        let present = values.into_iter().filter_map(|(metric, unit, value)| {
            value.map(|value| Sample { lane, round, metric, unit, value })
        });
        present.collect()
    }
}

fn orlop((services, endpoints): Size) -> Result<Shown> {
    let node = Node::new(&format!("prog{services}"), 0)?;
    let flags = orlop::NodeFlags { services, endpoints, ..Default::default() };
    let mut child = Worker::start(&node.name, "program", &flags.to_args())?;
    let at = || format!("{services} services x {endpoints} endpoints");
    let [cold_ns, cold_cpu_ns] = child.numbers("cold").with_context(at)?;
    let [change_ns, change_cpu_ns] =
        child.numbers(&format!("change {}", CHANGES.0)).with_context(at)?;
    let [rss, peak_rss, map_bytes] = child.numbers("memory")?;
    Ok(Shown {
        cold_ns,
        cold_cpu_ns,
        change_ns,
        change_cpu_ns,
        peak_rss,
        rss: Some(rss),
        map_bytes: Some(map_bytes),
    })
}

/// `None` when the tool took longer than anybody would wait.
fn peer_run(peer: &str, (services, endpoints): Size) -> Result<Option<Shown>> {
    let node = Node::new(&format!("{peer}{services}"), 0)?;
    let (mut all, _) = kube_proxy::services(services, endpoints, &[]);
    let command: &[&str] = match peer {
        "iptables" => &["iptables-restore", "--noflush", "--counters"],
        _ => &["nft", "-f", "-"],
    };
    let full = match peer {
        "iptables" => iptables::full(&all, CLUSTER_CIDR),
        _ => nftables::full(&all, CLUSTER_CIDR, &node.ip().to_string()),
    };
    let Outcome::Done(cold) = tool::run(&node.name, command, &full)? else {
        progress(&format!("  given up after {} s", tool::PATIENCE.as_secs()));
        return Ok(None);
    };
    drop(full);
    let (mut times, mut cpu, mut peak) = (Vec::new(), Vec::new(), cold.peak_rss);
    for turn in 0..CHANGES.1 {
        let text = change(peer, &mut all, turn)?;
        let Outcome::Done(shown) = tool::run(&node.name, command, &text)? else {
            return Ok(None);
        };
        times.push(shown.elapsed_ns);
        cpu.push(shown.cpu_ns);
        peak = peak.max(shown.peak_rss);
    }
    times.sort_unstable();
    cpu.sort_unstable();
    let middle = times.len() / 2;
    Ok(Some(Shown {
        cold_ns: cold.elapsed_ns,
        cold_cpu_ns: cold.cpu_ns,
        change_ns: times.get(middle).copied().unwrap_or(0),
        change_cpu_ns: cpu.get(middle).copied().unwrap_or(0),
        peak_rss: peak,
        rss: None,
        map_bytes: None,
    }))
}

/// Replaces an endpoint of the service in the middle, and says what the tool is fed with.
fn change(peer: &str, all: &mut [Service], turn: u32) -> Result<String> {
    let middle = all.len() / 2;
    let service = all.get_mut(middle).context("a service in the middle")?;
    let old = service.clone();
    *service = changed(service, turn);
    let new = service.clone();
    Ok(match peer {
        "iptables" => iptables::change(all, &old, &new, CLUSTER_CIDR),
        _ => nftables::change(&old, &new, CLUSTER_CIDR),
    })
}

/// The service with another first endpoint, one that no service of any size has.
#[must_use]
pub fn changed(service: &Service, turn: u32) -> Service {
    let mut new = service.clone();
    if let Some(first) = new.endpoints.first_mut() {
        *first = kube_proxy::endpoint(kube_proxy::ENDPOINTS_MAX + turn);
    }
    new
}

/// Cold start and one change by the number of services, with two endpoints each.
fn chart(rows: &[Row], command: &str, note: &str) -> Chart {
    let panel = |metric: &str, title: &str| {
        let mut series: Vec<Series> = Vec::new();
        for row in rows.iter().filter(|row| row.metric == metric) {
            let Some(services) = row.parameters.get("services").and_then(|n| n.as_f64()) else {
                continue;
            };
            let endpoints = row.parameters.get("endpoints").map_or(0, |n| n.as_u64().unwrap_or(0));
            if endpoints != 2 {
                continue;
            }
            let point = (services, row.median);
            match series.iter_mut().find(|one| one.subject == row.subject) {
                Some(one) => one.points.push(point),
                None => series.push(Series {
                    name: row.subject.to_owned(),
                    across: false,
                    subject: row.subject,
                    points: vec![point],
                }),
            }
        }
        let x_title = "services, 2 endpoints each".to_owned();
        let content = Content::Lines { x_title, log_y: true, series };
        Panel { title: title.to_owned(), content }
    };
    Chart {
        title: "From the list of services to the last rule or map row".to_owned(),
        note: format!("{command} · {note}"),
        panels: vec![
            panel("cold_start", "cold start, seconds"),
            panel("one_change", "one changed endpoint, milliseconds"),
        ],
    }
}
