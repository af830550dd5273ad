//! `PodStatus` out of the machine's state. Pure.

#[cfg(test)]
mod tests;

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use super::{
    admit::Rejection,
    cgroup::qos_class,
    pod::{Phase, PodMachine, Role, Slot},
    runtime::{ContainerId, Exit},
};

/// What the machine does not know but the status says.
#[derive(Clone, Copy, Debug)]
pub struct StatusContext<'a> {
    pub host_ip: IpAddr,
    /// Truncated to seconds, as the API keeps times.
    pub now: Timestamp,
    /// The pod was turned away: it is `Failed`.
    pub rejection: Option<&'a Rejection>,
    /// Field paths that are not implemented: the pod stays `Pending`.
    pub unsupported: &'a [String],
    /// The same, of a pod that ran before they were set: it runs on without them.
    pub unheeded: &'a [String],
}

/// The status of a pod. Times of conditions that did not change, and conditions of others, are taken
/// from the pod's present status.
#[must_use]
pub fn pod_status(pod: &Pod, machine: &PodMachine, ctx: &StatusContext<'_>) -> PodStatus {
    let before = pod.status.clone().unwrap_or_default();
    let statuses = |init: bool| -> Option<Vec<ContainerStatus>> {
        let list: Vec<_> = machine
            .slots()
            .iter()
            .filter(|slot| (slot.plan.role != Role::Main) == init)
            .map(|slot| container_status(slot, machine, ctx))
            .collect();
        (!list.is_empty()).then_some(list)
    };
    let phase = phase(machine, ctx);
    let ips: Vec<String> = machine.ips().iter().map(ToString::to_string).collect();
    let host_ip = ctx.host_ip.to_string();
    let (reason, message) = words(ctx);
    PodStatus {
        phase: Some(phase.to_owned()),
        conditions: Some(conditions(&before, pod, machine, (phase, ctx))),
        container_statuses: statuses(false),
        init_container_statuses: statuses(true),
        host_ip: Some(host_ip.clone()),
        host_ips: Some(vec![HostIP { ip: host_ip }]),
        pod_ip: ips.first().cloned().or(before.pod_ip),
        pod_ips: (!ips.is_empty())
            .then(|| ips.into_iter().map(|ip| PodIP { ip }).collect())
            .or(before.pod_ips),
        start_time: before.start_time.or(Some(Time(ctx.now))),
        // The server has said it, by amounts that are not rounded, and keeps to it.
        qos_class: before.qos_class.or_else(|| {
            let class = pod.spec.as_ref().map_or("BestEffort", |spec| qos_class(spec).name());
            Some(class.to_owned())
        }),
        observed_generation: pod.metadata.generation,
        reason,
        message,
        ..PodStatus::default()
    }
}

fn words(ctx: &StatusContext<'_>) -> (Option<String>, Option<String>) {
    match ctx.rejection {
        Some(rejection) => (Some(rejection.reason.to_owned()), Some(rejection.message.clone())),
        None if !ctx.unsupported.is_empty() => {
            (Some("UnsupportedField".to_owned()), Some(unsupported_message(ctx.unsupported)))
        }
        None => (None, None),
    }
}

/// The sentence that names unimplemented fields, in conditions and Events.
#[must_use]
pub fn unsupported_message(fields: &[String]) -> String {
    format!("this node does not implement: {}", fields.join(", "))
}

/// Upstream's `getPhase`.
fn phase(machine: &PodMachine, ctx: &StatusContext<'_>) -> &'static str {
    if ctx.rejection.is_some() {
        return "Failed";
    }
    let mains = || machine.slots().iter().filter(|slot| slot.plan.role == Role::Main);
    let running = mains().filter(|slot| slot.running().is_some()).count();
    let stopped: Vec<&Exit> = mains()
        .filter(|slot| slot.running().is_none())
        .filter_map(|slot| Some(&slot.last.as_ref()?.2))
        .collect();
    let all = mains().count();
    let failed = stopped.iter().any(|exit| exit.code != 0);
    let init_failed = machine.slots().iter().any(|slot| {
        slot.plan.role == Role::Init
            && matches!(slot.phase, Phase::Exited)
            && slot.last.as_ref().is_some_and(|(_, _, exit)| exit.code != 0)
    });
    // It is not tried again, whoever's policy says so.
    if init_failed {
        return "Failed";
    }
    if machine.is_ending() && running == 0 && stopped.len() == all {
        return if failed { "Failed" } else { "Succeeded" };
    }
    if running + stopped.len() < all { "Pending" } else { "Running" }
}

fn container_status(slot: &Slot, machine: &PodMachine, ctx: &StatusContext<'_>) -> ContainerStatus {
    let last = slot.last.as_ref().map(|(id, at, exit)| terminated(id, *at, exit));
    let running = slot.running();
    let (state, last_state) = match &slot.phase {
        Phase::Running(running) => {
            let running = ContainerStateRunning { started_at: Some(Time(running.at)) };
            (ContainerState { running: Some(running), ..ContainerState::default() }, last)
        }
        Phase::Exited => (ended(last), None),
        Phase::Waiting { .. }
        | Phase::Pulling { .. }
        | Phase::PullFailed { .. }
        | Phase::Starting
            if machine.is_ending() && last.is_some() =>
        {
            (ended(last), None)
        }
        Phase::Waiting { since, .. }
        | Phase::PullFailed { since, .. }
        | Phase::Pulling { again: Some(since) } => {
            let message = if since.reason == "CrashLoopBackOff" {
                format!("{} pod={}", since.message, machine.plan().display)
            } else {
                since.message.clone()
            };
            (waiting(reason(slot, machine, ctx, since.reason), message, ctx), last)
        }
        Phase::Pulling { again: None } | Phase::Starting => {
            (waiting(reason(slot, machine, ctx, "ContainerCreating"), String::new(), ctx), last)
        }
    };
    // The machine counts the next instance as soon as the last one ended; the API counts starts.
    let begun = running.is_some() || matches!(slot.phase, Phase::Exited) || slot.last.is_none();
    let id = running.map(|running| &running.id).or_else(|| slot.last.as_ref().map(|(id, _, _)| id));
    ContainerStatus {
        name: slot.plan.name.to_string(),
        image: slot.image.to_string(),
        image_id: slot.image_digest.clone(),
        container_id: id.filter(|id| !id.0.is_empty()).map(|id| format!("orlop://{id}")),
        ready: ready(slot),
        started: Some(running.is_some_and(|running| running.started)),
        restart_count: i32::try_from(slot.restart_count.saturating_sub(u32::from(!begun)))
            .unwrap_or(i32::MAX),
        state: Some(state),
        last_state: last_state.map(|t| ended(Some(t))),
        ..ContainerStatus::default()
    }
}

/// An init container is ready once it has succeeded; others while they run and their probe says so.
fn ready(slot: &Slot) -> bool {
    match (slot.plan.role, &slot.last) {
        (Role::Init, Some((_, _, exit))) => matches!(slot.phase, Phase::Exited) && exit.code == 0,
        (Role::Init, None) => false,
        (Role::Sidecar | Role::Main, _) => slot.running().is_some_and(|running| running.ready),
    }
}

fn reason(
    slot: &Slot,
    machine: &PodMachine,
    ctx: &StatusContext<'_>,
    own: &'static str,
) -> &'static str {
    if !ctx.unsupported.is_empty() {
        return "UnsupportedField";
    }
    let init_pending = !initialized(machine);
    if own == "ContainerCreating" && init_pending && slot.plan.role == Role::Main {
        return "PodInitializing";
    }
    own
}

fn waiting(reason: &str, message: String, ctx: &StatusContext<'_>) -> ContainerState {
    let message =
        if ctx.unsupported.is_empty() { message } else { unsupported_message(ctx.unsupported) };
    let message = (!message.is_empty()).then_some(message);
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

fn ended(terminated: Option<ContainerStateTerminated>) -> ContainerState {
    ContainerState { terminated, ..ContainerState::default() }
}

fn terminated(id: &ContainerId, at: Option<Timestamp>, exit: &Exit) -> ContainerStateTerminated {
    let unseen = exit.at == Timestamp::UNIX_EPOCH;
    let reason = match exit.code {
        _ if exit.oom_killed => "OOMKilled",
        _ if exit.unstarted => "StartError",
        0 => "Completed",
        _ if unseen => "ContainerStatusUnknown",
        _ => "Error",
    };
    ContainerStateTerminated {
        container_id: (!id.0.is_empty()).then(|| format!("orlop://{id}")),
        exit_code: exit.code,
        signal: (exit.signal != 0 && exit.code == 0).then_some(exit.signal),
        finished_at: (!unseen).then_some(Time(exit.at)),
        started_at: at.map(Time),
        message: (!exit.message.is_empty()).then(|| exit.message.clone()),
        reason: Some(reason.to_owned()),
    }
}

fn initialized(machine: &PodMachine) -> bool {
    let slots = machine.slots();
    let main_ran = slots.iter().any(|slot| {
        slot.plan.role == Role::Main && (slot.running().is_some() || slot.last.is_some())
    });
    main_ran
        || slots.iter().all(|slot| match slot.plan.role {
            Role::Init => ready(slot),
            Role::Sidecar => slot.running().is_some_and(|running| running.started),
            Role::Main => true,
        })
}

type Verdict = (&'static str, bool, Option<String>, Option<String>);

fn conditions(
    before: &PodStatus,
    pod: &Pod,
    machine: &PodMachine,
    (phase, ctx): (&str, &StatusContext<'_>),
) -> Vec<PodCondition> {
    let empty = Vec::new();
    let old = before.conditions.as_ref().unwrap_or(&empty);
    let mut list: Vec<PodCondition> = verdicts(machine, phase, ctx)
        .into_iter()
        .map(|(kind, good, reason, message)| {
            let status = if good { "True" } else { "False" };
            let same = old.iter().find(|c| c.type_ == kind && c.status == status);
            PodCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason,
                message,
                last_transition_time: same
                    .and_then(|c| c.last_transition_time.clone())
                    .or(Some(Time(ctx.now))),
                observed_generation: pod.metadata.generation,
                ..PodCondition::default()
            }
        })
        .collect();
    let foreign = old.iter().filter(|old| !list.iter().any(|new| new.type_ == old.type_));
    let foreign: Vec<_> = foreign.cloned().collect();
    list.extend(foreign);
    if !list.iter().any(|condition| condition.type_ == "PodScheduled") {
        list.push(PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "True".to_owned(),
            last_transition_time: Some(Time(ctx.now)),
            ..PodCondition::default()
        });
    }
    list
}

fn verdicts(machine: &PodMachine, phase: &str, ctx: &StatusContext<'_>) -> Vec<Verdict> {
    let (mut reason, mut message) = (None, None);
    let names = |init: bool| -> Vec<&str> {
        let wanted = |slot: &&Slot| match slot.plan.role {
            Role::Main => !init,
            Role::Sidecar => true,
            Role::Init => init,
        };
        let slots = machine.slots().iter().filter(wanted).filter(|slot| !ready(slot));
        slots.map(|slot| &*slot.plan.name).collect()
    };
    let unready = names(false);
    let over = matches!(phase, "Succeeded" | "Failed");
    let all_ready = unready.is_empty() && machine.sandbox_ready() && !over;
    if phase == "Succeeded" {
        reason = Some("PodCompleted".to_owned());
    } else if phase == "Failed" {
        reason = Some("PodFailed".to_owned());
    } else if !all_ready {
        reason = Some("ContainersNotReady".to_owned());
        message = Some(format!("containers with unready status: [{}]", unready.join(" ")));
    }
    let initialized = initialized(machine) && ctx.rejection.is_none();
    let init_words = match (initialized, phase) {
        (true, "Succeeded") => (Some("PodCompleted".to_owned()), None),
        (true, _) => (None, None),
        (false, _) => (
            Some("ContainersNotInitialized".to_owned()),
            Some(format!("containers with incomplete status: [{}]", names(true).join(" "))),
        ),
    };
    let unsupported = [ctx.unsupported, ctx.unheeded].concat();
    let sandbox_words = if unsupported.is_empty() {
        (None, None)
    } else {
        (Some("UnsupportedField".to_owned()), Some(unsupported_message(&unsupported)))
    };
    vec![
        ("PodReadyToStartContainers", machine.sandbox_ready(), sandbox_words.0, sandbox_words.1),
        ("Initialized", initialized, init_words.0, init_words.1),
        ("Ready", all_ready, reason.clone(), message.clone()),
        ("ContainersReady", all_ready, reason, message),
    ]
}
