//! Loads that go on while something is changed: they end when told, so that how much they cover does not
//! depend on how fast the machine is.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{SERVICE, judge, judge::Request};
use crate::{
    cluster::Node,
    image::TOOLS_REFERENCE,
    kubectl::{Kubectl, wait_for},
};

/// A load that ends when told lasts so long at the least, and has so many requests.
const LEAST: Duration = Duration::from_secs(25);
const LEAST_REQUESTS: usize = 100;
/// Requests before a change, after it, and between two.
const BETWEEN: usize = 10;
/// Longest wait for requests to go on.
const LIMIT: Duration = Duration::from_secs(120);
/// In the pod, the file whose coming ends its load.
const STOP: &str = "/stop";

/// A load while it runs.
pub(super) struct Running<'a> {
    /// Where it runs.
    node: &'a Node,
    started: Instant,
    /// Reads what it has printed so far.
    printed: Box<dyn Fn() -> Result<String> + 'a>,
}

impl<'a> Running<'a> {
    pub(super) fn new(node: &'a Node, printed: impl Fn() -> Result<String> + 'a) -> Self {
        Self { node, started: Instant::now(), printed: Box::new(printed) }
    }

    /// Waits until `wanted` holds of the requests that have ended.
    pub(super) fn until(&self, what: &str, wanted: impl Fn(&[Request]) -> bool) -> Result<()> {
        wait_for(what, LIMIT, || {
            let printed = (self.printed)()?;
            Ok(wanted(&judge::parse(judge::whole_lines(&printed))?).then_some(()))
        })
    }

    /// Waits until some requests have begun and ended after this moment.
    pub(super) fn goes_on(&self) -> Result<()> {
        let now = self.node.shell().sh("load clock")?.parse().context("the VM's clock")?;
        self.until("requests to go on", |requests| judge::begun_after(requests, now) >= BETWEEN)
    }

    /// Waits until it has lasted long enough and has requests enough.
    pub(super) fn lasts(&self) -> Result<()> {
        std::thread::sleep((self.started + LEAST).saturating_duration_since(Instant::now()));
        self.until("requests enough", |requests| requests.len() >= LEAST_REQUESTS)
    }
}

/// A pod on the server node that sends requests to the sample, one after the other.
pub(crate) struct LoadPod<'a> {
    kubectl: Kubectl<'a>,
    name: String,
}

impl<'a> LoadPod<'a> {
    /// Starts it with `args` for `load http`, and waits until it runs.
    pub(crate) fn start(kubectl: Kubectl<'a>, name: &str, args: &[&str]) -> Result<Self> {
        let pod = Self { kubectl, name: name.to_owned() };
        pod.remove()?;
        let command = [&["load", "http", "--host", SERVICE], args].concat();
        kubectl.apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "labels": { "app": "load" } },
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "nodeSelector": { "kubernetes.io/hostname": "server" },
                "tolerations": [{
                    "key": "node-role.kubernetes.io/control-plane",
                    "operator": "Exists",
                    "effect": "NoSchedule",
                }],
                "containers": [{
                    "name": "load",
                    "image": TOOLS_REFERENCE,
                    "command": command,
                }],
            },
        }))?;
        wait_for(&format!("pod {name} to run"), Duration::from_secs(60), || {
            let phase = pod.phase()?;
            Ok(["Running", "Succeeded", "Failed"].contains(&phase.as_str()).then_some(()))
        })?;
        Ok(pod)
    }

    fn phase(&self) -> Result<String> {
        let pod = self.kubectl.json(&["get", "pod", &self.name])?;
        Ok(pod["status"]["phase"].as_str().unwrap_or_default().to_owned())
    }

    /// As `start`, of a load that runs until `stop`; `node` is the server's.
    pub(super) fn until_stopped(
        kubectl: Kubectl<'a>,
        node: &'a Node,
        name: &'a str,
        pause_ms: &str,
    ) -> Result<(Self, Running<'a>)> {
        let pod = Self::start(kubectl, name, &["--pause-ms", pause_ms, "--until", STOP])?;
        Ok((pod, Running::new(node, move || kubectl.run(&["logs", name]))))
    }

    /// The phase it ended with.
    fn ended(&self) -> Result<Option<String>> {
        Ok(Some(self.phase()?).filter(|phase| ["Succeeded", "Failed"].contains(&phase.as_str())))
    }

    /// Ends a load of `until_stopped` once it has lasted, and reads it as `finish` does.
    pub(super) fn stop(self, running: &Running<'_>) -> Result<Vec<Request>> {
        running.lasts()?;
        wait_for(&format!("pod {} to be told to end", self.name), LIMIT, || {
            let ended = self.ended()?;
            if ended.is_none() {
                // May itself be ended with the pod; the next look tells.
                self.kubectl.run(&["exec", &self.name, "--", "touch", STOP])?;
            }
            Ok(ended)
        })?;
        self.finish(LIMIT)
    }

    /// Waits for its end, reads every line it wrote, and removes it.
    pub(crate) fn finish(self, limit: Duration) -> Result<Vec<Request>> {
        let phase = wait_for(&format!("pod {} to end", self.name), limit, || self.ended())?;
        let log = self.kubectl.run(&["logs", &self.name])?;
        ensure!(phase == "Succeeded", "pod {} {phase}: {log}", self.name);
        self.remove()?;
        judge::parse(&log)
    }

    fn remove(&self) -> Result<()> {
        self.kubectl.run(&["delete", "pod", &self.name, "--ignore-not-found", "--timeout=60s"])?;
        Ok(())
    }
}
