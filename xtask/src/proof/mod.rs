//! The sample's proof: what `up` and `prove` print and the end-to-end tests assert. `judge` holds the pure part;
//! here requests are sent, pods deleted and processes killed.

mod driver;
mod judge;
mod load;
mod measure;
mod server;
mod told;

use std::{
    collections::BTreeMap,
    fmt,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

pub use driver::{Carried, carried_by_xdp, traced, xdp_outlives_agent};
pub use judge::{Covered, Request, Tally};
pub(crate) use load::LoadPod;
pub use measure::{agent_killed, no_rules, unit_restarted};
pub use server::{ServerKilled, server_killed};
pub(crate) use told::PARTS;
pub use told::{agents, cpu, deletion, memory, rules};

use crate::{cluster::Cluster, kubectl::Kubectl};

/// Requests of the proof through the Service's name.
pub const REQUESTS: u32 = 1000;
/// How many of them are under way at once: a single one waits most of its time for other VMs.
const AT_ONCE: &str = "8";
/// Requests of the proof through the NodePort.
const NODE_PORT_REQUESTS: u32 = 20;
/// The Service's name as a pod would be told it.
pub(crate) const SERVICE: &str = "nginx.default.svc.cluster.local";

/// What the requests showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requests {
    /// Where they came from, and answers by replica.
    pub client_node: String,
    pub split: BTreeMap<String, u32>,
    /// Each replica's node.
    pub placed: BTreeMap<String, String>,
    /// Answers through a node's port, by the node asked.
    pub node_ports: BTreeMap<String, u32>,
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u32 = self.split.values().sum();
        writeln!(
            f,
            "    {total} requests to http://{SERVICE} from a pod on {}, all answered:",
            self.client_node
        )?;
        for (pod, count) in &self.split {
            let node = self.placed.get(pod).map_or("?", String::as_str);
            writeln!(f, "      {pod} on {node}: {count}")?;
        }
        for (node, count) in &self.node_ports {
            writeln!(
                f,
                "    {count} requests from outside to the NodePort of {node}, all answered"
            )?;
        }
        Ok(())
    }
}

/// A thousand requests by name from another node's pod, and some from outside to every node's port.
///
/// # Errors
/// When one was not answered, a replica got none, or an answer came from something else.
pub fn requests(cluster: &Cluster) -> Result<Requests> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let placed = replicas(kubectl)?;
    let args = ["--count", &REQUESTS.to_string(), "--parallel", AT_ONCE];
    let pod = LoadPod::start(kubectl, "proof-requests", &args)?;
    let tally = judge::tally(&pod.finish(Duration::from_secs(240))?);
    let client_node = "server".to_owned();
    tally.all_answered(REQUESTS)?;
    for replica in placed.keys() {
        let count = tally.by_replica.get(replica).copied().unwrap_or_default();
        ensure!(
            count > 0,
            "replica {replica} answered none of {REQUESTS} requests: {:?}",
            tally.by_replica
        );
    }
    for answered in tally.by_replica.keys() {
        ensure!(placed.contains_key(answered), "an answer from {answered}, which is no replica");
    }
    if cluster.nodes.len() > 1 {
        let same = placed.iter().find(|(_, node)| **node == client_node);
        ensure!(same.is_none(), "a replica is on the client's own node: {same:?}");
    }
    let mut node_ports = BTreeMap::new();
    for node in &cluster.nodes {
        for _ in 0..NODE_PORT_REQUESTS {
            let from = get(node.node_port)
                .with_context(|| format!("the NodePort of {} from outside", node.name))?;
            ensure!(placed.contains_key(&from), "the NodePort of {} answered {from:?}", node.name);
        }
        node_ports.insert(node.name.clone(), NODE_PORT_REQUESTS);
    }
    Ok(Requests { client_node, split: tally.by_replica, placed, node_ports })
}

/// Ready replicas and their nodes.
pub(crate) fn replicas(kubectl: Kubectl<'_>) -> Result<BTreeMap<String, String>> {
    let pods = kubectl.json(&["get", "pods", "-l", "app=nginx"])?;
    Ok(pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        .filter(|pod| condition(pod, "Ready").as_deref() == Some("True"))
        .filter_map(|pod| {
            let name = pod["metadata"]["name"].as_str()?;
            Some((name.to_owned(), pod["spec"]["nodeName"].as_str()?.to_owned()))
        })
        .collect())
}

/// The status of an object's condition.
pub(crate) fn condition(object: &Value, kind: &str) -> Option<String> {
    object["status"]["conditions"]
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)?["status"]
        .as_str()
        .map(str::to_owned)
}

/// One request from the host to a forwarded port; the body's first line.
fn get(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("connect")?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).context("set a time limit")?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").context("send")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).context("read")?;
    match reply.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => {
            Ok(body.lines().next().unwrap_or_default().to_owned())
        }
        _ => bail!("no answer, but {reply:?}"),
    }
}
