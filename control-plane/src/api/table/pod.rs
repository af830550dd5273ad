//! The row of a pod: what its READY, STATUS and RESTARTS columns say. Pure.
//!
//! The order of the rules is upstream's `printPod`:
//! <https://github.com/kubernetes/kubernetes/blob/master/pkg/printers/internalversion/printers.go>.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{AGE, Column, NAME, age, integer, list, or, since, string, text, wide};
use crate::schema::Served;

pub(super) const COLUMNS: &[Column] = &[
    NAME,
    text("Ready", "The aggregate readiness state of this pod for accepting traffic."),
    text("Status", "The aggregate status of the containers in this pod."),
    text(
        "Restarts",
        "The number of times the containers in this pod have been restarted and when the last container in this pod has restarted.",
    ),
    AGE,
    wide("IP", "podIP address allocated to the pod."),
    wide("Node", "NodeName indicates in which node this pod is scheduled."),
    wide(
        "Nominated Node",
        "nominatedNodeName is set only when this pod preempts other pods on the node, but it cannot be scheduled right away as preemption victims receive their graceful termination periods.",
    ),
    wide(
        "Readiness Gates",
        "If specified, all readiness gates will be evaluated for pod readiness.",
    ),
];

/// The row's condition that lets clients hide finished pods.
pub(super) fn finished(resource: &Served, object: &Value) -> Option<Value> {
    if (resource.group, resource.kind) != ("", "Pod") {
        return None;
    }
    let message = match string(object, "/status/phase") {
        "Succeeded" => "The pod has completed successfully.",
        "Failed" => "The pod failed.",
        _ => return None,
    };
    let reason = string(object, "/status/phase");
    Some(json!({"type": "Completed", "status": "True", "reason": reason, "message": message}))
}

pub(super) fn cells(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summary(pod);
    let restarts = match summary.last_restart {
        Some(last) if summary.restarts != 0 => {
            format!("{} ({} ago)", summary.restarts, since(last, now))
        }
        _ => summary.restarts.to_string(),
    };
    let address = list(pod, "/status/podIPs").first().map_or("", |ip| string(ip, "/ip"));
    vec![
        string(pod, "/metadata/name").into(),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.status.into(),
        restarts.into(),
        age(pod, now),
        or(or(address, string(pod, "/status/podIP")), "<none>").into(),
        or(string(pod, "/spec/nodeName"), "<none>").into(),
        or(string(pod, "/status/nominatedNodeName"), "<none>").into(),
        gates(pod).into(),
    ]
}

fn gates(pod: &Value) -> String {
    let gates = list(pod, "/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let met = gates.iter().filter(|gate| condition(pod, string(gate, "/conditionType")) == "True");
    format!("{}/{}", met.count(), gates.len())
}

fn condition<'a>(pod: &'a Value, kind: &str) -> &'a str {
    list(pod, "/status/conditions")
        .iter()
        .find(|condition| string(condition, "/type") == kind)
        .map_or("", |condition| string(condition, "/status"))
}

/// What the first columns say about a pod.
struct Summary<'a> {
    ready: usize,
    total: usize,
    status: String,
    restarts: i64,
    last_restart: Option<&'a str>,
}

impl<'a> Summary<'a> {
    fn count_restarts(&mut self, container: &'a Value) {
        self.restarts += integer(container, "/restartCount");
        let finished = string(container, "/lastState/terminated/finishedAt");
        // Times are canonical, so that their texts are ordered as they are.
        if !finished.is_empty() && self.last_restart.is_none_or(|last| last < finished) {
            self.last_restart = Some(finished);
        }
    }
}

fn summary(pod: &Value) -> Summary<'_> {
    let mut status = or(string(pod, "/status/reason"), string(pod, "/status/phase")).to_owned();
    if list(pod, "/status/conditions").iter().any(|condition| {
        string(condition, "/type") == "PodScheduled"
            && string(condition, "/reason") == "SchedulingGated"
    }) {
        "SchedulingGated".clone_into(&mut status);
    }
    let sidecars = list(pod, "/spec/initContainers").iter().filter(|c| sidecar(c)).count();
    let mut summary = Summary {
        ready: 0,
        total: list(pod, "/spec/containers").len() + sidecars,
        status,
        restarts: 0,
        last_restart: None,
    };
    let initializing = init_containers(pod, &mut summary);
    if !initializing || condition(pod, "Initialized") == "True" {
        summary.restarts = 0;
        summary.last_restart = None;
        for container in list(pod, "/status/initContainerStatuses") {
            if is_sidecar(pod, container) {
                summary.count_restarts(container);
            }
        }
        containers(pod, &mut summary);
    }
    let deleted = !string(pod, "/metadata/deletionTimestamp").is_empty();
    let terminal = ["Succeeded", "Failed"].contains(&string(pod, "/status/phase"));
    if deleted && string(pod, "/status/reason") == "NodeLost" {
        "Unknown".clone_into(&mut summary.status);
    } else if deleted && !terminal {
        "Terminating".clone_into(&mut summary.status);
    }
    summary
}

/// Whether initialization goes on or failed; the status then says how far it is.
fn init_containers<'a>(pod: &'a Value, summary: &mut Summary<'a>) -> bool {
    let total = list(pod, "/spec/initContainers").len();
    for (index, container) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
        summary.count_restarts(container);
        let terminated = container.pointer("/state/terminated");
        let waiting = string(container, "/state/waiting/reason");
        if terminated.is_some_and(|terminated| integer(terminated, "/exitCode") == 0) {
            continue;
        }
        if is_sidecar(pod, container) && flag(container, "started") {
            summary.ready += usize::from(flag(container, "ready"));
            continue;
        }
        summary.status = match terminated {
            Some(terminated) => format!("Init:{}", ended(terminated)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => {
                format!("Init:{waiting}")
            }
            None => format!("Init:{index}/{total}"),
        };
        return true;
    }
    false
}

fn containers<'a>(pod: &'a Value, summary: &mut Summary<'a>) {
    let mut running = false;
    for container in list(pod, "/status/containerStatuses").iter().rev() {
        summary.count_restarts(container);
        let waiting = string(container, "/state/waiting/reason");
        if !waiting.is_empty() {
            waiting.clone_into(&mut summary.status);
        } else if let Some(terminated) = container.pointer("/state/terminated") {
            summary.status = ended(terminated);
        } else if flag(container, "ready") && container.pointer("/state/running").is_some() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.status == "Completed" && running {
        let ready = condition(pod, "Ready") == "True";
        if ready { "Running" } else { "NotReady" }.clone_into(&mut summary.status);
    }
}

/// How a container ended: its reason, else its signal or exit code.
fn ended(terminated: &Value) -> String {
    let (reason, signal) = (string(terminated, "/reason"), integer(terminated, "/signal"));
    if !reason.is_empty() {
        reason.to_owned()
    } else if signal != 0 {
        format!("Signal:{signal}")
    } else {
        format!("ExitCode:{}", integer(terminated, "/exitCode"))
    }
}

fn sidecar(container: &Value) -> bool {
    string(container, "/restartPolicy") == "Always"
}

fn is_sidecar(pod: &Value, status: &Value) -> bool {
    list(pod, "/spec/initContainers")
        .iter()
        .any(|c| sidecar(c) && string(c, "/name") == string(status, "/name"))
}

fn flag(object: &Value, name: &str) -> bool {
    object.get(name).and_then(Value::as_bool).unwrap_or_default()
}
