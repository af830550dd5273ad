//! From a `Pod` object to what the pod machine decides by. Pure.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerState, ContainerStatus, Pod, PodSpec, Probe};

use super::{
    pod::{ContainerHistory, ContainerPlan, History, PodPlan, RestartPolicy, Role},
    probe::ProbePlan,
    runtime::{Exit, SandboxState},
};

/// `terminationGracePeriodSeconds` where nothing is said (API default).
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// The machine's plan of a pod.
#[must_use]
pub fn pod_plan(pod: &Pod) -> PodPlan {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let meta = &pod.metadata;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    // The API lets a negative one pass; it is the shortest.
    let grace = spec.termination_grace_period_seconds.map(|s| u64::try_from(s).unwrap_or(0));
    PodPlan {
        display: format!("{}_{}({})", text(&meta.name), text(&meta.namespace), text(&meta.uid)),
        restart_policy: restart_policy(spec.restart_policy.as_deref())
            .unwrap_or(RestartPolicy::Always),
        grace: grace.map_or(DEFAULT_GRACE, Duration::from_secs),
        containers: containers(spec)
            .map(|(role, container)| container_plan(role, container))
            .collect(),
    }
}

fn restart_policy(text: Option<&str>) -> Option<RestartPolicy> {
    match text? {
        "Never" => Some(RestartPolicy::Never),
        "OnFailure" => Some(RestartPolicy::OnFailure),
        "Always" => Some(RestartPolicy::Always),
        _ => None,
    }
}

/// Init containers in their order, then the main ones: the order of the machine's slots.
pub fn containers(spec: &PodSpec) -> impl Iterator<Item = (Role, &Container)> {
    let init = spec.init_containers.iter().flatten().map(|container| {
        let sidecar = super::cgroup::is_sidecar(container);
        (if sidecar { Role::Sidecar } else { Role::Init }, container)
    });
    init.chain(spec.containers.iter().map(|container| (Role::Main, container)))
}

fn container_plan(role: Role, container: &Container) -> ContainerPlan {
    let probe = |probe: &Option<Probe>| probe.as_ref().map(probe_plan);
    ContainerPlan {
        name: container.name.as_str().into(),
        role,
        restart_policy: restart_policy(container.restart_policy.as_deref()),
        image: container.image.as_deref().unwrap_or_default().into(),
        startup: probe(&container.startup_probe),
        liveness: probe(&container.liveness_probe),
        readiness: probe(&container.readiness_probe),
    }
}

fn probe_plan(probe: &Probe) -> ProbePlan {
    let positive = |value: Option<i32>, default: u32| {
        value.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default)
    };
    let seconds = |value: u32| Duration::from_secs(u64::from(value));
    let grace = probe.termination_grace_period_seconds.and_then(|s| u64::try_from(s).ok());
    ProbePlan {
        initial_delay: seconds(positive(probe.initial_delay_seconds, 0)),
        period: seconds(positive(probe.period_seconds, 10)),
        timeout: seconds(positive(probe.timeout_seconds, 1)),
        success_threshold: positive(probe.success_threshold, 1),
        failure_threshold: positive(probe.failure_threshold, 3),
        grace: grace.map(Duration::from_secs),
    }
}

/// What a pod has behind it when this process sees it for the first time.
#[must_use]
pub fn history(pod: &Pod, sandbox: Option<SandboxState>) -> History {
    let status = pod.status.as_ref();
    let lists = status
        .into_iter()
        .flat_map(|status| [&status.init_container_statuses, &status.container_statuses]);
    History {
        sandbox,
        containers: lists.flatten().flatten().map(container_history).collect(),
        over: is_over(pod),
    }
}

/// Whether the API says that the pod has ended for good.
#[must_use]
pub fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn container_history(status: &ContainerStatus) -> ContainerHistory {
    let id = |text: &Option<String>| {
        let text = text.as_deref().unwrap_or_default();
        text.split_once("://").map_or(text, |(_, id)| id).to_owned()
    };
    let state = status.state.as_ref();
    let terminated = state.and_then(|state: &ContainerState| state.terminated.as_ref());
    let exit = terminated.map(|terminated| {
        let exit = Exit {
            code: terminated.exit_code,
            signal: terminated.signal.unwrap_or(0),
            oom_killed: terminated.reason.as_deref() == Some("OOMKilled"),
            unstarted: terminated.reason.as_deref() == Some("StartError"),
            at: terminated.finished_at.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            message: terminated.message.clone().unwrap_or_default(),
        };
        (id(&terminated.container_id), exit)
    });
    ContainerHistory {
        name: status.name.clone(),
        restart_count: u32::try_from(status.restart_count).unwrap_or(0),
        ready: status.ready,
        started: status.started.unwrap_or(false),
        ran: status.restart_count > 0
            || state.is_some_and(|s| s.running.is_some())
            || exit.is_some(),
        exit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_grace_is_none_and_a_missing_one_the_default() {
        for (seconds, expected) in [(None, 30), (Some(5), 5), (Some(0), 0), (Some(-1), 0)] {
            let spec = PodSpec { termination_grace_period_seconds: seconds, ..PodSpec::default() };
            let pod = Pod { spec: Some(spec), ..Pod::default() };
            assert_eq!(pod_plan(&pod).grace, Duration::from_secs(expected), "{seconds:?}");
        }
    }
}
