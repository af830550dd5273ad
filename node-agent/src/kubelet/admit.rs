//! Whether this node runs a pod: what it asks for must be implemented and must fit. Pure.
//!
//! The check is an allow-list over the JSON of `spec`: a field that is not known here to be implemented
//! keeps the pod from starting, also one that a newer API server invents.

use k8s_openapi::api::core::v1::PodSpec;
use serde_json::Value;

use super::{cgroup::pod_requests, ports::host_ports};
use crate::model::HostPort;

/// Fields of a pod that are implemented, or are somebody else's business (the scheduler's, the API
/// server's). `[]` stands for any index; `.**` for everything below.
const POD_FIELDS: &[&str] = &[
    "affinity.**",
    "automountServiceAccountToken",
    "dnsConfig.nameservers[]",
    "dnsConfig.options[].name",
    "dnsConfig.options[].value",
    "dnsConfig.searches[]",
    "dnsPolicy",
    "enableServiceLinks",
    "hostAliases[].hostnames[]",
    "hostAliases[].ip",
    "hostNetwork",
    "hostUsers",
    "hostname",
    "imagePullSecrets[].name",
    "nodeName",
    "nodeSelector.**",
    "os.name",
    "overhead.**",
    "preemptionPolicy",
    "priority",
    "priorityClassName",
    "restartPolicy",
    "schedulerName",
    "securityContext.runAsGroup",
    "securityContext.runAsNonRoot",
    "securityContext.runAsUser",
    "securityContext.seccompProfile.type",
    "securityContext.supplementalGroups[]",
    "securityContext.supplementalGroupsPolicy",
    "securityContext.sysctls[].name",
    "securityContext.sysctls[].value",
    "serviceAccount",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations.**",
    "topologySpreadConstraints.**",
    "volumes[].configMap.**",
    "volumes[].downwardAPI.**",
    "volumes[].emptyDir.medium",
    "volumes[].hostPath.path",
    "volumes[].hostPath.type",
    "volumes[].name",
    "volumes[].projected.defaultMode",
    "volumes[].projected.sources[].configMap.**",
    "volumes[].projected.sources[].downwardAPI.**",
    "volumes[].projected.sources[].secret.**",
    "volumes[].projected.sources[].serviceAccountToken.**",
    "volumes[].secret.**",
];

/// Fields of each entry of `containers` and `initContainers`.
const CONTAINER_FIELDS: &[&str] = &[
    "args[]",
    "command[]",
    "env[].name",
    "env[].value",
    "env[].valueFrom.configMapKeyRef.**",
    "env[].valueFrom.fieldRef.**",
    "env[].valueFrom.resourceFieldRef.**",
    "env[].valueFrom.secretKeyRef.**",
    "envFrom[].configMapRef.**",
    "envFrom[].prefix",
    "envFrom[].secretRef.**",
    "image",
    "imagePullPolicy",
    "lifecycle.postStart.exec.command[]",
    "lifecycle.postStart.sleep.seconds",
    "lifecycle.preStop.exec.command[]",
    "lifecycle.preStop.sleep.seconds",
    "name",
    "ports[].containerPort",
    "ports[].hostIP",
    "ports[].hostPort",
    "ports[].name",
    "ports[].protocol",
    "resizePolicy.**",
    "resources.limits.cpu",
    "resources.limits.memory",
    "resources.requests.cpu",
    "resources.requests.ephemeral-storage",
    "resources.requests.memory",
    "restartPolicy",
    "securityContext.allowPrivilegeEscalation",
    "securityContext.capabilities.add[]",
    "securityContext.capabilities.drop[]",
    "securityContext.privileged",
    "securityContext.procMount",
    "securityContext.readOnlyRootFilesystem",
    "securityContext.runAsGroup",
    "securityContext.runAsNonRoot",
    "securityContext.runAsUser",
    "securityContext.seccompProfile.type",
    "stdin",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "tty",
    "volumeMounts[].mountPath",
    "volumeMounts[].mountPropagation",
    "volumeMounts[].name",
    "volumeMounts[].readOnly",
    "volumeMounts[].recursiveReadOnly",
    "workingDir",
];

/// Fields of each probe of a container.
const PROBE_FIELDS: &[&str] = &[
    "exec.command[]",
    "failureThreshold",
    "httpGet.host",
    "httpGet.httpHeaders[].name",
    "httpGet.httpHeaders[].value",
    "httpGet.path",
    "httpGet.port",
    "httpGet.scheme",
    "initialDelaySeconds",
    "periodSeconds",
    "successThreshold",
    "tcpSocket.host",
    "tcpSocket.port",
    "terminationGracePeriodSeconds",
    "timeoutSeconds",
];

/// Implemented fields of which only some values are implemented, by the end of their path.
const VALUES: &[(&str, &[&str])] = &[
    ("dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]),
    ("emptyDir.medium", &["Memory"]),
    ("hostPath.type", &["Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"]),
    ("httpGet.scheme", &["HTTP"]),
    ("mountPropagation", &["None"]),
    ("os.name", &["linux"]),
    ("procMount", &["Default"]),
    ("recursiveReadOnly", &["Disabled"]),
    ("restartPolicy", &["Always", "Never", "OnFailure"]),
    ("seccompProfile.type", &["RuntimeDefault", "Unconfined"]),
    ("supplementalGroupsPolicy", &["Merge"]),
    ("terminationMessagePolicy", &["FallbackToLogsOnError", "File"]),
];

/// Paths of the fields of a pod's `spec` that this agent does not implement, such as
/// `spec.containers[0].lifecycle.stopSignal`, in the order of the JSON. Empty when it can run.
#[must_use]
pub fn unsupported_fields(spec: &Value) -> Vec<String> {
    let mut found = Vec::new();
    walk(spec, "spec", "", &mut found);
    if spec.get("hostUsers") == Some(&Value::Bool(false)) {
        found.push("spec.hostUsers".to_owned());
    }
    found.extend(init_fields(spec));
    found
}

/// What only a sidecar among the init containers may have. The API refuses it of others, but a pod that
/// comes from elsewhere or is older may have it.
fn init_fields(spec: &Value) -> Vec<String> {
    const SIDECARS: [&str; 4] = ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"];
    let list = spec.get("initContainers").and_then(Value::as_array).into_iter().flatten();
    let plain = list.enumerate().filter(|(_, container)| {
        container.get("restartPolicy").and_then(Value::as_str) != Some("Always")
    });
    plain
        .flat_map(|(index, container)| {
            let set =
                SIDECARS.iter().filter(|name| container.get(**name).is_some_and(|v| !v.is_null()));
            set.map(move |name| format!("spec.initContainers[{index}].{name}"))
        })
        .collect()
}

fn walk(value: &Value, path: &str, pattern: &str, found: &mut Vec<String>) {
    if is_unset(value) {
        return;
    }
    match (known(pattern), value) {
        (Known::Whole, _) => {}
        (Known::Unknown, _) => found.push(path.to_owned()),
        (Known::Part, Value::Object(fields)) => {
            for (name, value) in fields {
                let dot = if pattern.is_empty() { "" } else { "." };
                walk(value, &format!("{path}.{name}"), &format!("{pattern}{dot}{name}"), found);
            }
        }
        (Known::Part, Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                walk(item, &format!("{path}[{index}]"), &format!("{pattern}[]"), found);
            }
        }
        (Known::Part, Value::String(text)) => {
            let wrong = VALUES.iter().find(|(end, _)| pattern.ends_with(end));
            if wrong.is_some_and(|(_, values)| !values.contains(&text.as_str())) {
                found.push(format!("{path}: {text}"));
            }
        }
        (Known::Part, Value::Null | Value::Bool(_) | Value::Number(_)) => {}
    }
}

/// A value that says nothing. An empty object may say something (`emptyDir: {}`), so it is not here.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::Object(_) => false,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Unknown,
    /// The field, or something below it.
    Part,
    Whole,
}

fn known(pattern: &str) -> Known {
    if pattern.is_empty() {
        return Known::Part;
    }
    let container = ["containers", "initContainers"].iter().find_map(|list| {
        pattern.strip_prefix(list).filter(|rest| rest.is_empty() || rest.starts_with('['))
    });
    let Some(rest) = container else { return listed(POD_FIELDS, pattern) };
    let Some(field) = rest.strip_prefix("[].") else { return Known::Part };
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if field == probe {
            return Known::Part;
        }
        if let Some(field) = field.strip_prefix(probe).and_then(|rest| rest.strip_prefix('.')) {
            return listed(PROBE_FIELDS, field);
        }
    }
    listed(CONTAINER_FIELDS, field)
}

fn listed(fields: &[&str], pattern: &str) -> Known {
    for field in fields {
        if let Some(prefix) = field.strip_suffix(".**")
            && pattern.strip_prefix(prefix).is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('.') || rest.starts_with('[')
            })
        {
            return Known::Whole;
        }
        if field
            .strip_prefix(pattern)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || rest.starts_with('['))
        {
            return Known::Part;
        }
    }
    Known::Unknown
}

/// Why a pod is turned away for good: it becomes `Failed` with this reason and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub reason: &'static str,
    pub message: String,
}

/// What the node offers to pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocatable {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub pods: u64,
}

/// Whether a pod fits beside the ones that were taken in before it; the words are upstream's.
#[must_use]
pub fn fits(pod: &PodSpec, others: &[&PodSpec], node: Allocatable) -> Option<Rejection> {
    let sum = |of: fn(&PodSpec) -> u64| others.iter().map(|spec| of(spec)).sum::<u64>();
    let cpu = |spec: &PodSpec| pod_requests(spec).cpu_millis.unwrap_or(0);
    let memory = |spec: &PodSpec| pod_requests(spec).memory_bytes.unwrap_or(0);
    let count = u64::try_from(others.len()).unwrap_or(u64::MAX);
    let taken: Vec<HostPort> = others.iter().flat_map(|spec| host_ports(spec)).collect();
    if host_ports(pod).iter().any(|port| taken.iter().any(|other| other.meets(port))) {
        return Some(Rejection {
            reason: "NodePorts",
            message:
                "Pod was rejected: Predicate NodePorts failed: node(s) didn't have free ports \
                      for the requested pod ports"
                    .to_owned(),
        });
    }
    let rows = [
        ("OutOfpods", "pods", 1, count, node.pods),
        ("OutOfcpu", "cpu", cpu(pod), sum(cpu), node.cpu_millis),
        ("OutOfmemory", "memory", memory(pod), sum(memory), node.memory_bytes),
    ];
    rows.into_iter().find(|(_, _, asked, used, capacity)| *asked > 0 && used + asked > *capacity).map(
        |(reason, resource, asked, used, capacity)| Rejection {
            reason,
            message: format!(
                "Pod was rejected: Node didn't have enough resource: {resource}, requested: {asked}, \
                 used: {used}, capacity: {capacity}"
            ),
        },
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_sample_of_the_tutorials_with_everything_that_an_api_server_fills_in_can_run() {
        let spec = json!({
            "containers": [{
                "name": "nginx", "image": "nginx:1", "imagePullPolicy": "IfNotPresent",
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "resources": {"limits": {"cpu": "1", "memory": "64Mi"}, "requests": {"cpu": "50m"}},
                "readinessProbe": {"httpGet": {"path": "/", "port": 80, "scheme": "HTTP"},
                    "periodSeconds": 1, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3},
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "volumeMounts": [{"name": "t", "mountPath": "/var/run/secrets", "readOnly": true}]}],
            "volumes": [{"name": "t", "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef":
                    {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}}]}}, {"name": "e", "emptyDir": {}}],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "nodeName": "n",
            "preemptionPolicy": "PreemptLowerPriority", "priority": 0, "restartPolicy": "Always",
            "schedulerName": "default-scheduler", "securityContext": {}, "serviceAccount": "default",
            "serviceAccountName": "default", "terminationGracePeriodSeconds": 30,
            "tolerations": [{"effect": "NoExecute", "key": "node.kubernetes.io/not-ready",
                "operator": "Exists", "tolerationSeconds": 300}]
        });
        assert_eq!(unsupported_fields(&spec), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_implemented_is_named_with_its_path() {
        let table = [
            (json!({"hostPID": true}), "spec.hostPID"),
            (json!({"hostUsers": false}), "spec.hostUsers"),
            (json!({"volumes": [{"name": "a", "nfs": {"server": "x"}}]}), "spec.volumes[0].nfs"),
            (json!({"volumes": [{"name": "a", "ephemeral": {}}]}), "spec.volumes[0].ephemeral"),
            (
                json!({"volumes": [{"name": "a", "emptyDir": {"sizeLimit": "1Gi"}}]}),
                "spec.volumes[0].emptyDir.sizeLimit",
            ),
            (
                json!({"containers": [{"name": "a"}, {"lifecycle": {"stopSignal": "SIGUSR1"}}]}),
                "spec.containers[1].lifecycle.stopSignal",
            ),
            (
                json!({"containers": [{"livenessProbe": {"grpc": {"port": 1}}}]}),
                "spec.containers[0].livenessProbe.grpc",
            ),
            (
                json!({"containers": [{"readinessProbe": {"httpGet": {"scheme": "HTTPS"}}}]}),
                "spec.containers[0].readinessProbe.httpGet.scheme: HTTPS",
            ),
            (
                json!({"initContainers": [{"volumeMounts": [{"subPath": "x"}]}]}),
                "spec.initContainers[0].volumeMounts[0].subPath",
            ),
            (
                json!({"containers": [{"resources": {"limits": {"nvidia.com/gpu": "1"}}}]}),
                "spec.containers[0].resources.limits.nvidia.com/gpu",
            ),
            (
                json!({"initContainers": [{"restartPolicy": "Always", "startupProbe": {}},
                    {"restartPolicy": "Never", "startupProbe": {"exec": {"command": ["x"]}}}]}),
                "spec.initContainers[1].startupProbe",
            ),
            (
                json!({"initContainers": [{"lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}]}),
                "spec.initContainers[0].lifecycle",
            ),
            (
                json!({"containers": [{"restartPolicyRules": [{"action": "Restart"}]}]}),
                "spec.containers[0].restartPolicyRules",
            ),
            (json!({"restartPolicy": "Maybe"}), "spec.restartPolicy: Maybe"),
            (json!({"inventedLater": 1}), "spec.inventedLater"),
            (json!({"containersToo": [{}]}), "spec.containersToo"),
        ];
        for (spec, path) in table {
            assert_eq!(unsupported_fields(&spec), [path], "{spec}");
        }
    }

    #[test]
    fn what_says_nothing_is_no_use_of_a_field() {
        let spec = json!({"hostPID": false, "ephemeralContainers": [], "runtimeClassName": null,
            "subdomain": "", "hostUsers": true});
        assert_eq!(unsupported_fields(&spec), Vec::<String>::new());
    }

    #[test]
    fn a_pod_that_does_not_fit_is_rejected_in_upstreams_words() {
        let spec = |cpu: &str| -> PodSpec {
            serde_json::from_value(
                json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": cpu}}}]}),
            )
            .expect("a pod spec")
        };
        let node = Allocatable { cpu_millis: 1000, memory_bytes: 1 << 30, pods: 2 };
        let (small, big) = (spec("400m"), spec("700m"));
        assert_eq!(fits(&small, &[&small], node), None);
        assert_eq!(
            fits(&big, &[&small], node),
            Some(Rejection {
                reason: "OutOfcpu",
                message:
                    "Pod was rejected: Node didn't have enough resource: cpu, requested: 700, \
                          used: 400, capacity: 1000"
                        .to_owned()
            })
        );
        let with_port = |host_ip: &str, port: i32| -> PodSpec {
            let ports = json!([{"containerPort": 80, "hostPort": port, "hostIP": host_ip}]);
            serde_json::from_value(json!({"containers": [{"name": "c", "ports": ports}]})).unwrap()
        };
        let wide = Allocatable { pods: 9, ..node };
        let taken = |other: &PodSpec| fits(&with_port("", 80), &[other], wide);
        let rejection = taken(&with_port("192.0.2.1", 80)).expect("a common address");
        assert_eq!(rejection.reason, "NodePorts");
        assert!(rejection.message.ends_with("free ports for the requested pod ports"));
        assert_eq!(taken(&with_port("192.0.2.1", 81)), None);
        let third = fits(&spec("0"), &[&small, &small], node).map(|rejection| rejection.reason);
        assert_eq!(third, Some("OutOfpods"));
    }
}
