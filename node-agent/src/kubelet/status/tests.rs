//! Statuses of pods in the states that their machine goes through.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;
use crate::kubelet::{
    plan::pod_plan,
    pod::{History, PodEffect, PodEvent},
    runtime::Started,
};

struct Case {
    pod: Pod,
    machine: PodMachine,
    now: Instant,
}

const UNSUPPORTED: &[String] = &[];

impl Case {
    fn new(spec: &Value) -> Self {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "u"}, "spec": spec}))
        .expect("a pod");
        let now = Instant::now();
        let machine = PodMachine::new(pod_plan(&pod), &History::default(), now);
        let mut case = Self { pod, machine, now };
        case.machine.handle_timeout(now, &mut Vec::new());
        case
    }

    fn tell(&mut self, event: PodEvent) -> Vec<PodEffect> {
        let mut out = Vec::new();
        self.machine.handle_event(event, self.now, &mut out);
        out
    }

    fn run(&mut self, id: &str) {
        self.tell(PodEvent::SandboxReady { ips: vec!["10.244.1.2".parse().expect("an address")] });
        self.tell(PodEvent::ImageReady { slot: 0, digest: "sha256:1".to_owned() });
        let started = Started { pid: 1, at: "2026-01-01T00:00:00Z".parse().expect("a time") };
        self.tell(PodEvent::Started { slot: 0, id: ContainerId(id.into()), started });
    }

    fn exit(&mut self, id: &str, code: i32, oom_killed: bool) {
        let at = "2026-01-01T00:01:00Z".parse().expect("a time");
        let exit =
            Exit { code, signal: 0, oom_killed, unstarted: false, at, message: "bye".to_owned() };
        self.tell(PodEvent::Exited { id: ContainerId(id.into()), exit });
    }

    fn status_at(&self, now: &str, unsupported: &[String], rejection: Option<&Rejection>) -> Value {
        let ctx = StatusContext {
            host_ip: "10.0.0.1".parse().expect("an address"),
            now: now.parse().expect("a time"),
            rejection,
            unsupported,
            unheeded: &[],
        };
        serde_json::to_value(pod_status(&self.pod, &self.machine, &ctx)).expect("JSON")
    }

    fn status(&self) -> Value {
        self.status_at("2026-01-01T00:00:00Z", UNSUPPORTED, None)
    }
}

fn condition(status: &Value, kind: &str) -> Value {
    let list = status["conditions"].as_array().expect("conditions");
    list.iter().find(|c| c["type"] == kind).expect("the condition").clone()
}

#[test]
fn a_pod_goes_from_pending_to_running_and_ready() {
    let mut case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}]}));
    let status = case.status();
    assert_eq!(status["phase"], "Pending");
    assert_eq!(status["containerStatuses"][0]["state"]["waiting"]["reason"], "ContainerCreating");
    assert_eq!(condition(&status, "Ready")["message"], "containers with unready status: [a]");
    case.run("c0");
    let status = case.status();
    assert_eq!((&status["phase"], &status["podIP"]), (&json!("Running"), &json!("10.244.1.2")));
    assert_eq!(status["containerStatuses"][0]["containerID"], "orlop://c0");
    for kind in ["Ready", "ContainersReady", "Initialized", "PodReadyToStartContainers"] {
        assert_eq!(condition(&status, kind)["status"], "True", "{kind}");
    }
}

#[test]
fn a_killed_container_is_reported_with_its_reason_and_counts_its_restarts() {
    let mut case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}]}));
    case.run("c0");
    case.exit("c0", 137, true);
    case.run("c1");
    case.exit("c1", 1, false);
    let status = case.status();
    let container = &status["containerStatuses"][0];
    assert_eq!(container["state"]["waiting"]["reason"], "CrashLoopBackOff");
    assert_eq!(
        container["state"]["waiting"]["message"],
        "back-off 10s restarting failed container=a pod=web_default(u)"
    );
    assert_eq!(container["lastState"]["terminated"]["exitCode"], 1);
    assert_eq!((&container["restartCount"], &status["phase"]), (&json!(1), &json!("Running")));
    case.now += Duration::from_secs(10);
    case.machine.handle_timeout(case.now, &mut Vec::new());
    case.run("c2");
    assert_eq!(case.status()["containerStatuses"][0]["restartCount"], 2);

    let mut case =
        Case::new(&json!({"containers": [{"name": "a", "image": "i"}], "restartPolicy": "Never"}));
    case.run("c0");
    case.exit("c0", 137, true);
    let status = case.status();
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&ended["reason"], &ended["message"]), (&json!("OOMKilled"), &json!("bye")));
    assert_eq!(status["phase"], "Failed");
    assert_eq!(condition(&status, "Ready")["reason"], "PodFailed");
}

#[test]
fn transition_times_and_foreign_conditions_are_kept() {
    let mut case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}]}));
    case.run("c0");
    let mut first = case.status_at("2026-01-01T00:00:00Z", UNSUPPORTED, None);
    first["conditions"]
        .as_array_mut()
        .expect("conditions")
        .push(json!({"type": "DisruptionTarget", "status": "True", "lastTransitionTime": null}));
    case.pod.status = Some(serde_json::from_value(first.clone()).expect("a status"));
    let second = case.status_at("2026-01-01T01:00:00Z", UNSUPPORTED, None);
    assert_eq!(condition(&second, "Ready"), condition(&first, "Ready"));
    assert_eq!(condition(&second, "DisruptionTarget")["status"], "True");
    assert_eq!(second["startTime"], "2026-01-01T00:00:00Z");
}

#[test]
fn what_is_not_implemented_keeps_the_pod_pending_and_is_named() {
    let case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}]}));
    let fields = ["spec.hostPID".to_owned()];
    let status = case.status_at("2026-01-01T00:00:00Z", &fields, None);
    assert_eq!(status["phase"], "Pending");
    let waiting = &status["containerStatuses"][0]["state"]["waiting"];
    assert_eq!(waiting["message"], "this node does not implement: spec.hostPID");
    let condition = condition(&status, "PodReadyToStartContainers");
    assert_eq!(
        (&condition["status"], &condition["reason"]),
        (&json!("False"), &json!("UnsupportedField"))
    );
}

#[test]
fn a_pod_that_runs_is_told_what_it_got_in_vain_and_runs_on() {
    let mut case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}]}));
    case.run("c0");
    let ctx = StatusContext {
        host_ip: "10.0.0.1".parse().expect("an address"),
        now: Timestamp::UNIX_EPOCH,
        rejection: None,
        unsupported: &[],
        unheeded: &["spec.activeDeadlineSeconds".to_owned()],
    };
    let status = serde_json::to_value(pod_status(&case.pod, &case.machine, &ctx)).unwrap();
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Running"), &Value::Null));
    let told = condition(&status, "PodReadyToStartContainers");
    assert_eq!((&told["status"], &told["reason"]), (&json!("True"), &json!("UnsupportedField")));
    assert_eq!(told["message"], "this node does not implement: spec.activeDeadlineSeconds");
    assert_eq!(condition(&status, "Ready")["status"], "True");
}

#[test]
fn a_pod_fails_with_an_init_container_that_itself_says_never() {
    let mut case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}],
        "initContainers": [{"name": "i", "image": "i", "restartPolicy": "Never"}]}));
    case.run("c0");
    case.exit("c0", 1, false);
    assert_eq!(case.status()["phase"], "Failed");
}

#[test]
fn a_rejected_pod_is_failed_with_the_reason() {
    let case = Case::new(&json!({"containers": [{"name": "a", "image": "i"}]}));
    let rejection = Rejection { reason: "OutOfcpu", message: "no".to_owned() };
    let status = case.status_at("2026-01-01T00:00:00Z", UNSUPPORTED, Some(&rejection));
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!("OutOfcpu")));
}
