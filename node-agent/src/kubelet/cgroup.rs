//! From a pod's requests and limits to the values of its cgroups. Pure.
//!
//! Shares and quotas follow the kubelet (`pkg/kubelet/cm/helpers_linux.go`). Weights of the QoS and pod
//! cgroups are linear in the shares, as the kubelet computes them, so that pods share a CPU in the
//! ratio of their requests; among the containers of one pod the weights are those of runc and crun.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};

use super::{
    quantity::{bytes, cpu_millis},
    runtime::CgroupSpec,
};

/// Least and most `cpu.shares` that the kernel ever took (`kernel/sched/sched.h`).
const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;
/// Least quota that the kernel takes, in microseconds.
const MIN_QUOTA_US: u64 = 1_000;
/// Upstream's `systemNodeCriticalPriority`: such pods are killed as late as guaranteed ones.
const NODE_CRITICAL_PRIORITY: i32 = 2_000_001_000;

/// Quality of service class of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum QosClass {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl QosClass {
    /// As in `status.qosClass`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// CPU in thousandths and memory in bytes; `None` where nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub cpu_millis: Option<u64>,
    pub memory_bytes: Option<u64>,
}

/// Requests of a container; a resource with a limit only requests its limit, as the API defaults it.
#[must_use]
pub fn requests(container: &Container) -> Amount {
    let limits = limits(container);
    let said = amount(container.resources.as_ref().and_then(|r| r.requests.as_ref()));
    Amount {
        cpu_millis: said.cpu_millis.or(limits.cpu_millis),
        memory_bytes: said.memory_bytes.or(limits.memory_bytes),
    }
}

/// Limits of a container. A limit of 0 is no limit.
#[must_use]
pub fn limits(container: &Container) -> Amount {
    let said = amount(container.resources.as_ref().and_then(|r| r.limits.as_ref()));
    Amount {
        cpu_millis: said.cpu_millis.filter(|millis| *millis > 0),
        memory_bytes: said.memory_bytes.filter(|bytes| *bytes > 0),
    }
}

type ResourceList =
    std::collections::BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>;

fn amount(list: Option<&ResourceList>) -> Amount {
    let Some(list) = list else { return Amount::default() };
    Amount {
        cpu_millis: list.get("cpu").and_then(cpu_millis),
        memory_bytes: list.get("memory").and_then(bytes),
    }
}

/// Whether an init container runs beside the main ones (`restartPolicy: Always`).
#[must_use]
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The class, as upstream's `ComputePodQOS`: only cpu and memory count.
#[must_use]
pub fn qos_class(spec: &PodSpec) -> QosClass {
    let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let says_nothing = |resources: &Option<ResourceRequirements>| {
        resources.as_ref().is_none_or(|r| {
            let nonzero = |list: &Option<ResourceList>| {
                let amount = amount(list.as_ref());
                amount.cpu_millis.unwrap_or(0) > 0 || amount.memory_bytes.unwrap_or(0) > 0
            };
            !nonzero(&r.requests) && !nonzero(&r.limits)
        })
    };
    if all().all(|container| says_nothing(&container.resources)) {
        return QosClass::BestEffort;
    }
    let guaranteed = |container: &Container| {
        let limit = limits(container);
        limit.cpu_millis.is_some() && limit.memory_bytes.is_some() && requests(container) == limit
    };
    if all().all(guaranteed) { QosClass::Guaranteed } else { QosClass::Burstable }
}

/// What the whole pod asks for, as the scheduler counts it: the larger of the containers that run
/// together and each init container with the sidecars before it; plus overhead.
#[must_use]
pub fn pod_requests(spec: &PodSpec) -> Amount {
    let mut sidecars = (0, 0);
    let mut peak = (0, 0);
    for container in spec.init_containers.iter().flatten() {
        let (cpu, memory) = flat(requests(container));
        let together = (sidecars.0 + cpu, sidecars.1 + memory);
        peak = (peak.0.max(together.0), peak.1.max(together.1));
        if is_sidecar(container) {
            sidecars = together;
        }
    }
    let mut sum = sidecars;
    for container in &spec.containers {
        let (cpu, memory) = flat(requests(container));
        sum = (sum.0 + cpu, sum.1 + memory);
    }
    let overhead = flat(amount(spec.overhead.as_ref()));
    Amount {
        cpu_millis: Some(sum.0.max(peak.0) + overhead.0),
        memory_bytes: Some(sum.1.max(peak.1) + overhead.1),
    }
}

fn flat(amount: Amount) -> (u64, u64) {
    (amount.cpu_millis.unwrap_or(0), amount.memory_bytes.unwrap_or(0))
}

/// `cpu.shares` for a request in thousandths of a CPU.
#[must_use]
pub fn shares(millis: u64) -> u64 {
    (millis.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

/// Weight of kubelet-owned cgroups: linear in the shares (`getCPUWeight` in the kubelet).
#[must_use]
pub fn linear_weight(shares: u64) -> u64 {
    1 + (shares.clamp(MIN_SHARES, MAX_SHARES) - 2) * 9_999 / 262_142
}

/// Weight of a container: `ceil(10^((L² + 125 L) / 612 − 7/34))` with `L = log2(shares)`, as in runc
/// 1.3.2 and crun 1.23.
#[must_use]
pub fn container_weight(shares: u64) -> u64 {
    if shares <= MIN_SHARES {
        return 1;
    }
    if shares >= MAX_SHARES {
        return 10_000;
    }
    // 262,143 is exact in a double.
    let log = f64::from(u32::try_from(shares).unwrap_or(u32::MAX)).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    let weight = 10_f64.powf(exponent).ceil().clamp(1.0, 10_000.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 1..=10000 on the line before"
    )]
    let weight = weight as u64;
    weight
}

/// `cpu.max` quota for a limit in thousandths of a CPU, per `CPU_PERIOD_US`.
#[must_use]
pub fn quota_us(millis: u64) -> u64 {
    (millis.saturating_mul(super::runtime::CPU_PERIOD_US) / 1000).max(MIN_QUOTA_US)
}

/// Folder of the pod's cgroup below `kubepods`.
#[must_use]
pub fn pod_path(class: QosClass, uid: &str) -> String {
    match class {
        QosClass::Guaranteed => format!("pod{uid}"),
        QosClass::Burstable => format!("burstable/pod{uid}"),
        QosClass::BestEffort => format!("besteffort/pod{uid}"),
    }
}

/// Values of the pod's cgroup. A quota or a memory limit is set only when every container has one.
#[must_use]
pub fn pod_cgroup(spec: &PodSpec, uid: &str) -> CgroupSpec {
    let class = qos_class(spec);
    let total = pod_requests(spec).cpu_millis.unwrap_or(0);
    CgroupSpec {
        path: pod_path(class, uid),
        cpu_weight: Some(linear_weight(if class == QosClass::BestEffort {
            MIN_SHARES
        } else {
            shares(total)
        })),
        cpu_quota_us: pod_limit(spec, |limit| limit.cpu_millis).map(quota_us),
        memory_max_bytes: pod_limit(spec, |limit| limit.memory_bytes),
        oom_group: false,
        pids_max: None,
    }
}

/// The pod-level limit of one resource; `None` when any container is without.
fn pod_limit(spec: &PodSpec, of: fn(Amount) -> Option<u64>) -> Option<u64> {
    let mut sidecars = 0_u64;
    let mut peak = 0_u64;
    for container in spec.init_containers.iter().flatten() {
        let limit = of(limits(container))?;
        peak = peak.max(sidecars + limit);
        if is_sidecar(container) {
            sidecars += limit;
        }
    }
    let mut sum = sidecars;
    for container in &spec.containers {
        sum += of(limits(container))?;
    }
    Some(sum.max(peak))
}

/// Values of one container's cgroup.
#[must_use]
pub fn container_cgroup(pod: &PodSpec, uid: &str, container: &Container, id: &str) -> CgroupSpec {
    let limit = limits(container);
    let request = requests(container).cpu_millis.unwrap_or(0);
    CgroupSpec {
        path: format!("{}/{id}", pod_path(qos_class(pod), uid)),
        cpu_weight: Some(container_weight(shares(request))),
        cpu_quota_us: limit.cpu_millis.map(quota_us),
        memory_max_bytes: limit.memory_bytes,
        oom_group: true,
        pids_max: None,
    }
}

/// `oom_score_adj` of a container (`pkg/kubelet/qos/policy.go`).
#[must_use]
pub fn oom_score_adj(spec: &PodSpec, container: &Container, capacity_bytes: u64) -> i32 {
    if spec.priority.unwrap_or(0) >= NODE_CRITICAL_PRIORITY {
        return -997;
    }
    match qos_class(spec) {
        QosClass::Guaranteed => -997,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let own = burstable_score(container, capacity_bytes);
            if !spec.init_containers.iter().flatten().any(|c| c.name == container.name)
                || !is_sidecar(container)
            {
                return own;
            }
            // A sidecar is not killed before the main container that asks for least.
            let smallest =
                spec.containers.iter().min_by_key(|c| requests(c).memory_bytes.unwrap_or(0));
            smallest.map_or(own, |main| own.min(burstable_score(main, capacity_bytes)))
        }
    }
}

fn burstable_score(container: &Container, capacity_bytes: u64) -> i32 {
    let request = u128::from(requests(container).memory_bytes.unwrap_or(0));
    let part = request * 1000 / u128::from(capacity_bytes.max(1));
    let score = 1000 - i32::try_from(part.min(1000)).unwrap_or(1000);
    score.clamp(3, 999)
}

/// Values of the three fixed cgroups: `kubepods`, its `burstable` and its `besteffort`.
///
/// `memory.max` of `kubepods` is capacity less reservation; eviction thresholds are not subtracted.
#[must_use]
pub fn tree(pods: &[&Pod], allocatable_millis: u64, allocatable_bytes: u64) -> [CgroupSpec; 3] {
    let burstable: u64 = pods
        .iter()
        .filter_map(|pod| pod.spec.as_ref())
        .filter(|spec| qos_class(spec) == QosClass::Burstable)
        .map(|spec| pod_requests(spec).cpu_millis.unwrap_or(0))
        .sum();
    let with_weight = |path: &str, shares: u64| CgroupSpec {
        path: path.to_owned(),
        cpu_weight: Some(linear_weight(shares)),
        ..CgroupSpec::default()
    };
    [
        CgroupSpec {
            memory_max_bytes: Some(allocatable_bytes),
            ..with_weight("", shares(allocatable_millis))
        },
        with_weight("burstable", shares(burstable)),
        with_weight("besteffort", MIN_SHARES),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(containers: Value) -> PodSpec {
        serde_json::from_value(json!({"containers": containers})).expect("a pod spec")
    }

    fn container(requests: Value, limits: Value) -> Value {
        json!({"name": "c", "resources": {"requests": requests, "limits": limits}})
    }

    #[test]
    fn weights_are_those_of_the_kubelet_and_of_runc() {
        // Numbers computed in the kubelet's and runc's own tests for 100m, 250m, 1 and 4 CPUs.
        let table = [(100, 4, 17), (250, 10, 35), (1000, 39, 100), (4000, 157, 303)];
        for (millis, linear, container) in table {
            assert_eq!(linear_weight(shares(millis)), linear, "{millis}m");
            assert_eq!(container_weight(shares(millis)), container, "{millis}m");
        }
        assert_eq!((linear_weight(2), container_weight(2)), (1, 1));
        assert_eq!((linear_weight(262_144), container_weight(262_144)), (10_000, 10_000));
    }

    #[test]
    fn class_follows_upstream() {
        let both = json!({"cpu": "100m", "memory": "64Mi"});
        let cases = [
            (json!([{"name": "a"}]), QosClass::BestEffort),
            (json!([container(json!({}), both.clone())]), QosClass::Guaranteed),
            (json!([container(both.clone(), both.clone()), {"name": "b"}]), QosClass::Burstable),
            (
                json!([container(json!({"cpu": "50m", "memory": "64Mi"}), both)]),
                QosClass::Burstable,
            ),
            (json!([container(json!({}), json!({"cpu": "1"}))]), QosClass::Burstable),
            (json!([container(json!({"cpu": "0"}), json!({}))]), QosClass::BestEffort),
        ];
        for (containers, class) in cases {
            assert_eq!(qos_class(&spec(containers.clone())), class, "{containers}");
        }
    }

    #[test]
    fn the_pod_is_limited_only_when_every_container_is() {
        let limited = container(json!({}), json!({"cpu": "200m", "memory": "32Mi"}));
        let one = pod_cgroup(&spec(json!([limited, limited])), "u");
        assert_eq!(one.path, "podu");
        assert_eq!((one.cpu_quota_us, one.memory_max_bytes), (Some(40_000), Some(64 << 20)));
        let two = pod_cgroup(&spec(json!([limited, {"name": "b"}])), "u");
        assert_eq!(two.path, "burstable/podu");
        assert_eq!((two.cpu_quota_us, two.memory_max_bytes), (None, None));
        assert_eq!(quota_us(1), 1_000, "the kernel's least quota");
    }

    #[test]
    fn an_init_container_counts_only_where_it_needs_more_than_the_rest() {
        let pod: PodSpec = serde_json::from_value(json!({
            "initContainers": [
                {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "big", "resources": {"requests": {"cpu": "1"}}}],
            "containers": [{"name": "main", "resources": {"requests": {"cpu": "300m"}}}]}))
        .expect("a pod spec");
        assert_eq!(pod_requests(&pod).cpu_millis, Some(1100));
    }

    #[test]
    fn the_kernel_kills_best_effort_first_and_guaranteed_last() {
        let gib = 1 << 30;
        let best = spec(json!([{"name": "a"}]));
        assert_eq!(oom_score_adj(&best, &best.containers[0], gib), 1000);
        let both = json!({"cpu": "1", "memory": "1Gi"});
        let sure = spec(json!([container(both.clone(), both)]));
        assert_eq!(oom_score_adj(&sure, &sure.containers[0], gib), -997);
        let table = [("512Mi", 500), ("1Ki", 999), ("1Gi", 3)];
        for (memory, score) in table {
            let pod = spec(json!([container(json!({"memory": memory}), json!({}))]));
            assert_eq!(oom_score_adj(&pod, &pod.containers[0], gib), score, "{memory}");
        }
    }
}
