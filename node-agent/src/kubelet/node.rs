//! This node's `Node` object: registered once, its status kept true.
//!
//! `Facts` are read from the machine; `node_object` and `node_status` decide (pure); `run` writes.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints,
        NodeStatus, NodeSystemInfo,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, Time},
    },
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{ImageSource, admit::Allocatable, chain, events::second, images::ImageSummary};

/// How often the status is looked at, and how often it is written when nothing changed (kubelet's
/// `nodeStatusUpdateFrequency` and `nodeStatusReportFrequency`).
const CHECK: Duration = Duration::from_secs(10);
const REPORT: Duration = Duration::from_secs(300);
/// Least time between two status writes that a change asks for.
const SETTLE: Duration = Duration::from_millis(100);
/// Most images that the status names (kubelet's `nodeStatusMaxImages`).
const MAX_IMAGES: usize = 50;
/// Kept back from pods for the system and the agent itself.
pub const RESERVED_CPU_MILLIS: u64 = 100;
pub const RESERVED_MEMORY_BYTES: u64 = 100 << 20;
/// Default of `maxPods`.
pub const MAX_PODS: u64 = 110;
/// Port of the kubelet's HTTPS server.
pub const KUBELET_PORT: u16 = 10_250;

/// What is read from the machine once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub cpus: u64,
    pub memory_bytes: u64,
    pub storage_bytes: u64,
    pub kernel: String,
    pub os_image: String,
    pub machine_id: String,
    pub boot_id: String,
    pub system_uuid: String,
    pub hostname: String,
}

impl Facts {
    /// Reads them; what cannot be read is empty.
    #[must_use]
    pub fn read(state_dir: &std::path::Path) -> Self {
        let text = |path: &str| {
            std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        let storage = rustix::fs::statvfs(state_dir).map_or(0, |fs| fs.f_blocks * fs.f_frsize);
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            cpus: u64::try_from(cpus).unwrap_or(1),
            memory_bytes: memory_total(&text("/proc/meminfo")),
            storage_bytes: storage,
            kernel: text("/proc/sys/kernel/osrelease"),
            os_image: os_name(&text("/etc/os-release")),
            machine_id: text("/etc/machine-id"),
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            system_uuid: text("/sys/class/dmi/id/product_uuid"),
            hostname: text("/proc/sys/kernel/hostname"),
        }
    }
}

fn memory_total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn os_name(os_release: &str) -> String {
    let line = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.map(|name| name.trim_matches('"').to_owned()).unwrap_or_default()
}

/// What the node says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    pub name: Arc<str>,
    /// That others reach: the primary one, then one of the other family.
    pub ips: Vec<IpAddr>,
    pub facts: Facts,
    /// Kept back from pods.
    pub reserved_cpu_millis: u64,
    pub reserved_memory_bytes: u64,
}

impl NodeConfig {
    /// Capacity less what is kept back.
    #[must_use]
    pub const fn allocatable(&self) -> Allocatable {
        let facts = &self.facts;
        Allocatable {
            cpu_millis: (facts.cpus * 1000).saturating_sub(self.reserved_cpu_millis),
            memory_bytes: facts.memory_bytes.saturating_sub(self.reserved_memory_bytes),
            pods: MAX_PODS,
        }
    }
}

/// The labels that every kubelet sets.
#[must_use]
pub fn labels(config: &NodeConfig) -> BTreeMap<String, String> {
    let rows = [
        ("beta.kubernetes.io/arch", arch()),
        ("beta.kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch()),
        ("kubernetes.io/hostname", &*config.name),
        ("kubernetes.io/os", "linux"),
    ];
    rows.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The reason why a node is not ready whose agent has just begun. It is told of a node that is new or was
/// booted; what ran before an agent was replaced goes on, and so does the node's condition.
pub const STARTING: &str = "starting";

/// The status; `not_ready` says why pods cannot run, `before` has the conditions' times.
#[must_use]
pub fn node_status(
    config: &NodeConfig,
    images: &[ImageSummary],
    not_ready: Option<&str>,
    before: Option<&NodeStatus>,
    now: Timestamp,
) -> NodeStatus {
    let facts = &config.facts;
    let quantity = |cpu: String, memory: u64| -> BTreeMap<String, Quantity> {
        let rows = [
            ("cpu", cpu),
            ("ephemeral-storage", format!("{}Ki", facts.storage_bytes / 1024)),
            ("memory", format!("{}Ki", memory / 1024)),
            ("pods", MAX_PODS.to_string()),
        ];
        rows.into_iter().map(|(name, text)| (name.to_owned(), Quantity(text))).collect()
    };
    let free_millis = (facts.cpus * 1000).saturating_sub(config.reserved_cpu_millis);
    let cpu = if free_millis.is_multiple_of(1000) {
        (free_millis / 1000).to_string()
    } else {
        format!("{free_millis}m")
    };
    let free_memory = facts.memory_bytes.saturating_sub(config.reserved_memory_bytes);
    let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
    NodeStatus {
        addresses: Some(
            config
                .ips
                .iter()
                .map(|ip| address("InternalIP", ip.to_string()))
                .chain([address("Hostname", config.name.to_string())])
                .collect(),
        ),
        capacity: Some(quantity(facts.cpus.to_string(), facts.memory_bytes)),
        allocatable: Some(quantity(cpu, free_memory)),
        conditions: Some(conditions(
            not_ready.filter(|why| !goes_on(why, facts, before)),
            before,
            now,
        )),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(KUBELET_PORT) }),
        }),
        declared_features: Some(vec!["ExtendWebSocketsToKubelet".to_owned()]),
        images: Some(image_list(images)),
        node_info: Some(system_info(facts)),
        ..NodeStatus::default()
    }
}

fn image_list(images: &[ImageSummary]) -> Vec<ContainerImage> {
    let mut largest: Vec<&ImageSummary> = images.iter().collect();
    largest.sort_by_key(|image| std::cmp::Reverse(image.size_bytes));
    let image = |image: &ImageSummary| ContainerImage {
        names: Some(image.names.clone()),
        size_bytes: i64::try_from(image.size_bytes).ok(),
    };
    largest.into_iter().take(MAX_IMAGES).map(image).collect()
}

fn system_info(facts: &Facts) -> NodeSystemInfo {
    let version = env!("CARGO_PKG_VERSION");
    NodeSystemInfo {
        architecture: arch().to_owned(),
        boot_id: facts.boot_id.clone(),
        container_runtime_version: format!("orlop://{version}"),
        kernel_version: facts.kernel.clone(),
        kubelet_version: format!("v1.36.0+orlop.{version}"),
        machine_id: facts.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: facts.os_image.clone(),
        system_uuid: facts.system_uuid.clone(),
        ..NodeSystemInfo::default()
    }
}

/// Whether another agent was replaced on a node that is ready and has not been booted since.
fn goes_on(why: &str, facts: &Facts, before: Option<&NodeStatus>) -> bool {
    let Some(before) = before.filter(|_| why == STARTING) else { return false };
    let is_same_boot = before
        .node_info
        .as_ref()
        .is_some_and(|info| !info.boot_id.is_empty() && info.boot_id == facts.boot_id);
    let mut conditions = before.conditions.iter().flatten();
    is_same_boot && conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}

fn conditions(
    not_ready: Option<&str>,
    before: Option<&NodeStatus>,
    now: Timestamp,
) -> Vec<NodeCondition> {
    let ready = match not_ready {
        None => ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        Some(why) => ("Ready", "False", "KubeletNotReady", why),
    };
    let rows = [
        (
            "MemoryPressure",
            "False",
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available",
        ),
        ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ready,
    ];
    let old = before.and_then(|status| status.conditions.as_ref());
    rows.into_iter()
        .map(|(kind, status, reason, message)| {
            let same = old.into_iter().flatten().find(|c| c.type_ == kind && c.status == status);
            NodeCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()),
                last_heartbeat_time: Some(Time(now)),
                last_transition_time: same
                    .and_then(|c| c.last_transition_time.clone())
                    .or(Some(Time(now))),
            }
        })
        .collect()
}

/// A status without its heartbeats, to see whether anything changed.
fn lasting(mut status: NodeStatus) -> NodeStatus {
    for condition in status.conditions.iter_mut().flatten() {
        condition.last_heartbeat_time = None;
    }
    status
}

/// Registers the node and keeps its status true until cancelled. `registered` gets the object's uid.
pub async fn run<I: ImageSource>(
    client: Client,
    config: NodeConfig,
    images: Arc<I>,
    mut not_ready: watch::Receiver<Option<String>>,
    registered: watch::Sender<Option<String>>,
) {
    let api: Api<Node> = Api::all(client);
    let mut before = register(&api, &config, &registered).await;
    let mut written: Option<(NodeStatus, Instant)> = None;
    loop {
        let source = Arc::clone(&images);
        let list = tokio::task::spawn_blocking(move || source.list()).await.unwrap_or_default();
        let why = not_ready.borrow_and_update().clone();
        let now = second(Timestamp::now());
        let status = node_status(&config, &list, why.as_deref(), before.as_ref(), now);
        let due = written.as_ref().is_none_or(|(old, at)| {
            at.elapsed() >= REPORT || lasting(old.clone()) != lasting(status.clone())
        });
        if due {
            match write(&api, &config, &status).await {
                Ok(()) => written = Some((status.clone(), Instant::now())),
                Err(kube::Error::Api(answer)) if answer.code == 404 => {
                    // Somebody deleted the node: it comes back, as upstream's does.
                    before = register(&api, &config, &registered).await;
                    written = None;
                    continue;
                }
                Err(error) => warn!(error = chain(&error), "node status not written"),
            }
            before = Some(status);
        }
        tokio::select! {
            () = tokio::time::sleep(CHECK) => {}
            changed = not_ready.changed() => match changed {
                Ok(()) => tokio::time::sleep(SETTLE).await,
                Err(_gone) => tokio::time::sleep(CHECK).await,
            },
        }
    }
}

/// Creates the object, or takes the present one over; tries until it works.
async fn register(
    api: &Api<Node>,
    config: &NodeConfig,
    registered: &watch::Sender<Option<String>>,
) -> Option<NodeStatus> {
    let node = Node {
        metadata: ObjectMeta {
            name: Some(config.name.to_string()),
            labels: Some(labels(config)),
            ..ObjectMeta::default()
        },
        ..Node::default()
    };
    let mut pause = Duration::from_millis(100);
    loop {
        let made = match api.create(&PostParams::default(), &node).await {
            Err(kube::Error::Api(answer)) if answer.code == 409 => {
                let patch = json!({"metadata": {"labels": labels(config)}});
                api.patch(&config.name, &PatchParams::default(), &Patch::Merge(patch)).await
            }
            made => made,
        };
        match made {
            Ok(node) => {
                info!(node = %config.name, "node registered");
                registered.send_replace(node.metadata.uid);
                return node.status;
            }
            Err(error) => warn!(error = chain(&error), "node not registered"),
        }
        tokio::time::sleep(pause).await;
        // The kubelet's own limits: 100 ms doubling to 7 s.
        pause = (pause * 2).min(Duration::from_secs(7));
    }
}

async fn write(
    api: &Api<Node>,
    config: &NodeConfig,
    status: &NodeStatus,
) -> Result<(), kube::Error> {
    let patch = Patch::Strategic(status_patch(status));
    api.patch_status(&config.name, &PatchParams::default(), &patch).await.map(drop)
}

/// The patch for a status. Addresses take the place of those that are there: servers merge them by their type, of which
/// a node of two families has two (`fixupPatchForNodeStatusAddresses`, pkg/util/node/node.go in Kubernetes).
fn status_patch(status: &NodeStatus) -> Value {
    let mut patch = json!({ "status": status });
    if let Some(addresses) = patch["status"]["addresses"].as_array_mut() {
        addresses.push(json!({"$patch": "replace"}));
    }
    patch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NodeConfig {
        let facts = Facts {
            cpus: 4,
            memory_bytes: 1 << 30,
            storage_bytes: 10 << 30,
            kernel: "6.1".to_owned(),
            os_image: os_name("NAME=x\nPRETTY_NAME=\"Debian 12\"\n"),
            machine_id: String::new(),
            boot_id: String::new(),
            system_uuid: String::new(),
            hostname: "n".to_owned(),
        };
        NodeConfig {
            name: "n1".into(),
            ips: vec!["10.0.0.1".parse().expect("an address")],
            facts,
            reserved_cpu_millis: 100,
            reserved_memory_bytes: 256 << 20,
        }
    }

    #[test]
    fn two_addresses_of_one_type_take_the_place_of_others() {
        let address = |address: &str| NodeAddress {
            type_: "InternalIP".to_owned(),
            address: address.to_owned(),
        };
        let addresses = Some(vec![address("10.0.0.1"), address("fd00::1")]);
        let patch = status_patch(&NodeStatus { addresses, ..NodeStatus::default() });
        let listed = patch["status"]["addresses"].as_array().unwrap();
        assert_eq!((listed.len(), &listed[2]), (3, &json!({"$patch": "replace"})));
    }

    #[test]
    fn allocatable_is_capacity_less_reservation() {
        let status = node_status(&config(), &[], None, None, Timestamp::UNIX_EPOCH);
        let text = |list: &Option<BTreeMap<String, Quantity>>, name: &str| {
            list.as_ref().and_then(|list| list.get(name)).map(|quantity| quantity.0.clone())
        };
        assert_eq!(text(&status.capacity, "cpu").as_deref(), Some("4"));
        assert_eq!(text(&status.allocatable, "cpu").as_deref(), Some("3900m"));
        assert_eq!(text(&status.allocatable, "memory").as_deref(), Some("786432Ki"));
        assert_eq!(status.node_info.map(|info| info.os_image).as_deref(), Some("Debian 12"));
    }

    #[test]
    fn a_replaced_agent_keeps_a_ready_node_ready_and_a_boot_does_not() {
        let config = |boot: &str| NodeConfig {
            facts: Facts { boot_id: boot.to_owned(), ..config().facts },
            ..config()
        };
        let status = |boot: &str, why, before| {
            let status = node_status(&config(boot), &[], why, before, Timestamp::UNIX_EPOCH);
            let ready = status.conditions.iter().flatten().find(|c| c.type_ == "Ready");
            (ready.map(|c| c.status.clone()).unwrap_or_default(), status)
        };
        let (new, _) = status("one", Some(STARTING), None);
        assert_eq!(new, "False", "nothing was there before");
        let (_, ready) = status("one", None, None);
        assert_eq!(status("one", Some(STARTING), Some(&ready)).0, "True");
        assert_eq!(status("two", Some(STARTING), Some(&ready)).0, "False");
        assert_eq!(status("one", Some("no network"), Some(&ready)).0, "False");
        let (_, not_ready) = status("one", Some("no network"), None);
        assert_eq!(status("one", Some(STARTING), Some(&not_ready)).0, "False");
    }

    #[test]
    fn readiness_changes_its_time_and_heartbeats_alone_are_no_change() {
        let at = |seconds| Timestamp::from_second(seconds).expect("a time");
        let first = node_status(&config(), &[], Some("no network"), None, at(1));
        let second = node_status(&config(), &[], Some("no network"), Some(&first), at(2));
        assert_eq!(lasting(first), lasting(second.clone()));
        let third = node_status(&config(), &[], None, Some(&second), at(3));
        let ready = third.conditions.iter().flatten().find(|c| c.type_ == "Ready").expect("Ready");
        assert_eq!(ready.status, "True");
        assert_eq!(ready.last_transition_time, Some(Time(at(3))));
    }

    #[test]
    fn memory_is_read_from_meminfo() {
        assert_eq!(memory_total("MemTotal:       2048 kB\nMemFree: 1 kB"), 2 << 20);
        assert_eq!(memory_total(""), 0);
    }
}
