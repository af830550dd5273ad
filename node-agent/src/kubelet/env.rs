//! The environment and arguments of a container. Pure: what it refers to has been fetched before.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVarSource, ObjectFieldSelector, Pod, PodSpec, ResourceFieldSelector,
    Secret,
};

use super::{
    admit::Allocatable,
    cgroup::{limits, requests},
    quantity::{bytes, cpu_millis},
};

/// Objects that a container refers to, by name; an object that does not exist is not in it.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub config_maps: BTreeMap<String, ConfigMap>,
    pub secrets: BTreeMap<String, Secret>,
}

/// What the environment is made from besides the pod and its objects.
#[derive(Clone, Debug)]
pub struct EnvContext<'a> {
    pub pod: &'a Pod,
    pub objects: &'a Objects,
    /// Variables of the services, weakest of all.
    pub services: Vec<(String, String)>,
    pub pod_ips: &'a [IpAddr],
    pub host_ip: IpAddr,
    pub allocatable: Allocatable,
}

/// Names of the config maps and secrets that a pod's containers take variables from.
#[must_use]
pub fn references(spec: &PodSpec) -> (Vec<String>, Vec<String>) {
    let (mut config_maps, mut secrets) = (Vec::new(), Vec::new());
    for (_, container) in super::plan::containers(spec) {
        for source in container.env_from.iter().flatten() {
            config_maps.extend(source.config_map_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(source.secret_ref.as_ref().map(|r| r.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
            config_maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.clone()));
        }
    }
    for list in [&mut config_maps, &mut secrets] {
        list.sort_unstable();
        list.dedup();
    }
    (config_maps, secrets)
}

/// The variables of a container in their order; a later one replaces an earlier one of its name.
///
/// # Errors
/// Upstream's words for what is missing; the container waits with `CreateContainerConfigError`.
pub fn variables(
    container: &Container,
    ctx: &EnvContext<'_>,
) -> Result<Vec<(String, String)>, String> {
    let mut list: Vec<(String, String)> = Vec::new();
    for (name, value) in &ctx.services {
        set(&mut list, name, value.clone());
    }
    from_objects(container, ctx, &mut list)?;
    // Only what `env` itself and the objects define before can be referred to.
    for env in container.env.iter().flatten() {
        let value = match (&env.value, &env.value_from) {
            (_, Some(source)) => source_value(source, container, ctx)?,
            (Some(text), None) => Some(expand(text, &list)),
            (None, None) => Some(String::new()),
        };
        if let Some(value) = value {
            set(&mut list, &env.name, value);
        }
    }
    Ok(list)
}

fn set(list: &mut Vec<(String, String)>, name: &str, value: String) {
    match list.iter_mut().find(|(known, _)| known == name) {
        Some(row) => row.1 = value,
        None => list.push((name.to_owned(), value)),
    }
}

fn from_objects(
    container: &Container,
    ctx: &EnvContext<'_>,
    list: &mut Vec<(String, String)>,
) -> Result<(), String> {
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            match ctx.objects.config_maps.get(&reference.name) {
                Some(object) => {
                    for (key, value) in object.data.iter().flatten() {
                        set(list, &format!("{prefix}{key}"), value.clone());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(format!("configmap \"{}\" not found", reference.name)),
            }
        }
        if let Some(reference) = &source.secret_ref {
            match ctx.objects.secrets.get(&reference.name) {
                Some(object) => {
                    for (key, value) in object.data.iter().flatten() {
                        let value = String::from_utf8_lossy(&value.0).into_owned();
                        set(list, &format!("{prefix}{key}"), value);
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(format!("secret \"{}\" not found", reference.name)),
            }
        }
    }
    Ok(())
}

/// `None` when an optional reference finds nothing: the variable is not set.
fn source_value(
    source: &EnvVarSource,
    container: &Container,
    ctx: &EnvContext<'_>,
) -> Result<Option<String>, String> {
    let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or_default();
    if let Some(field) = &source.field_ref {
        return field_value(field, ctx.pod, ctx.pod_ips, ctx.host_ip).map(Some);
    }
    if let Some(field) = &source.resource_field_ref {
        let spec = ctx.pod.spec.as_ref();
        return resource_value(field, spec, container, ctx.allocatable).map(Some);
    }
    if let Some(reference) = &source.config_map_key_ref {
        let optional = reference.optional == Some(true);
        let Some(object) = ctx.objects.config_maps.get(&reference.name) else {
            let message = format!("configmap \"{}\" not found", reference.name);
            return if optional { Ok(None) } else { Err(message) };
        };
        let value = object.data.as_ref().and_then(|data| data.get(&reference.key)).cloned();
        return match value {
            None if !optional => Err(format!(
                "couldn't find key {} in ConfigMap {namespace}/{}",
                reference.key, reference.name
            )),
            value => Ok(value),
        };
    }
    if let Some(reference) = &source.secret_key_ref {
        let optional = reference.optional == Some(true);
        let Some(object) = ctx.objects.secrets.get(&reference.name) else {
            let message = format!("secret \"{}\" not found", reference.name);
            return if optional { Ok(None) } else { Err(message) };
        };
        let value = object.data.as_ref().and_then(|data| data.get(&reference.key));
        return match value {
            None if !optional => Err(format!(
                "couldn't find key {} in Secret {namespace}/{}",
                reference.key, reference.name
            )),
            value => Ok(value.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned())),
        };
    }
    Ok(Some(String::new()))
}

/// The value of a pod's own field, as the downward API offers it.
///
/// # Errors
/// When the field is none of those that the downward API has.
pub fn field_value(
    field: &ObjectFieldSelector,
    pod: &Pod,
    pod_ips: &[IpAddr],
    host_ip: IpAddr,
) -> Result<String, String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let join = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let path = field.field_path.as_str();
    for (prefix, map) in
        [("metadata.labels", &meta.labels), ("metadata.annotations", &meta.annotations)]
    {
        let Some(rest) = path.strip_prefix(prefix) else { continue };
        if rest.is_empty() {
            let lines = map.iter().flatten().map(|(key, value)| format!("{key}={value:?}"));
            return Ok(lines.collect::<Vec<_>>().join("\n"));
        }
        if let Some(key) = rest.strip_prefix("['").and_then(|rest| rest.strip_suffix("']")) {
            return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
        }
    }
    let value = match path {
        "metadata.name" => meta.name.clone(),
        "metadata.namespace" => meta.namespace.clone(),
        "metadata.uid" => meta.uid.clone(),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.clone()),
        "spec.serviceAccountName" => spec.and_then(|spec| spec.service_account_name.clone()),
        "status.hostIP" | "status.hostIPs" => Some(host_ip.to_string()),
        "status.podIP" => Some(join(pod_ips.get(..1).unwrap_or_default())),
        "status.podIPs" => Some(join(pod_ips)),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    };
    Ok(value.unwrap_or_default())
}

/// A container's own request or limit in units of the divisor, rounded up. A limit that is not set is
/// what the node can give.
///
/// # Errors
/// When the container or the resource is not known.
pub fn resource_value(
    field: &ResourceFieldSelector,
    spec: Option<&PodSpec>,
    own: &Container,
    allocatable: Allocatable,
) -> Result<String, String> {
    let named = field.container_name.as_deref().filter(|name| !name.is_empty());
    let container = match named {
        None => own,
        Some(name) => spec
            .and_then(|spec| super::plan::containers(spec).map(|(_, c)| c).find(|c| c.name == name))
            .ok_or_else(|| format!("container {name} not found"))?,
    };
    let (limit, request) = (limits(container), requests(container));
    let (value, milli) = match field.resource.as_str() {
        "limits.cpu" => (limit.cpu_millis.unwrap_or(allocatable.cpu_millis), true),
        "limits.memory" => (limit.memory_bytes.unwrap_or(allocatable.memory_bytes), false),
        "requests.cpu" => (request.cpu_millis.unwrap_or(0), true),
        "requests.memory" => (request.memory_bytes.unwrap_or(0), false),
        other => return Err(format!("unsupported container resource : {other}")),
    };
    let scale = |quantity| if milli { cpu_millis(quantity) } else { bytes(quantity) };
    let one = if milli { 1000 } else { 1 };
    let divisor = field.divisor.as_ref().and_then(scale).filter(|d| *d > 0).unwrap_or(one);
    Ok(value.div_ceil(divisor).to_string())
}

/// Replaces `$(NAME)` by the variable's value; `$$` stands for `$`, and an unknown name stays as it is.
#[must_use]
pub fn expand(text: &str, variables: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
            continue;
        }
        let reference = after.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        let Some((name, tail)) = reference else {
            out.push('$');
            rest = after;
            continue;
        };
        match variables.iter().find(|(known, _)| known == name) {
            Some((_, value)) => out.push_str(value),
            None => {
                out.push_str("$(");
                out.push_str(name);
                out.push(')');
            }
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

/// A service's cluster IP and ports, as variables are made of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceView {
    pub name: String,
    pub cluster_ip: IpAddr,
    /// Port name, protocol in upper case, number.
    pub ports: Vec<(String, &'static str, u16)>,
}

/// `{SVC}_SERVICE_HOST`, `{SVC}_SERVICE_PORT` and the variables of Docker's links for each service.
#[must_use]
pub fn service_variables(services: &[ServiceView]) -> Vec<(String, String)> {
    let mut list = Vec::new();
    for service in services {
        let prefix = variable_name(&service.name);
        let ip = service.cluster_ip;
        let Some((_, first_protocol, first)) = service.ports.first() else { continue };
        list.push((format!("{prefix}_SERVICE_HOST"), ip.to_string()));
        list.push((format!("{prefix}_SERVICE_PORT"), first.to_string()));
        for (name, _, port) in service.ports.iter().filter(|(name, ..)| !name.is_empty()) {
            list.push((format!("{prefix}_SERVICE_PORT_{}", variable_name(name)), port.to_string()));
        }
        let url = |protocol: &str, port: &u16| {
            let scheme = protocol.to_ascii_lowercase();
            format!("{scheme}://{}", std::net::SocketAddr::new(ip, *port))
        };
        list.push((format!("{prefix}_PORT"), url(first_protocol, first)));
        for (_, protocol, port) in &service.ports {
            let link = format!("{prefix}_PORT_{port}_{protocol}");
            list.push((link.clone(), url(protocol, port)));
            list.push((format!("{link}_PROTO"), protocol.to_ascii_lowercase()));
            list.push((format!("{link}_PORT"), port.to_string()));
            list.push((format!("{link}_ADDR"), ip.to_string()));
        }
    }
    list
}

fn variable_name(name: &str) -> String {
    name.to_ascii_uppercase().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_are_expanded_as_upstream_does() {
        // The cases of upstream's third_party/forked/golang/expansion tests.
        let known = [("A".to_owned(), "a".to_owned()), ("EMPTY".to_owned(), String::new())];
        let table = [
            ("$(A)", "a"),
            ("x$(A)y", "xay"),
            ("$(EMPTY)", ""),
            ("$(NO)", "$(NO)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$a"),
            ("$", "$"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$$", "$"),
            ("a$(A)$(A)", "aaa"),
        ];
        for (text, expected) in table {
            assert_eq!(expand(text, &known), expected, "{text}");
        }
    }

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "u", "labels": {"app": "x"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c",
                "resources": {"limits": {"cpu": "1500m"}},
                "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}},
                            {"secretRef": {"name": "none", "optional": true}}],
                "env": [
                    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                    {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                    {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                    {"name": "PASS", "valueFrom": {"secretKeyRef": {"name": "s", "key": "p"}}},
                    {"name": "OPT", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "no", "optional": true}}},
                    {"name": "URL", "value": "http://$(P_host)/$(NODE)"}]}]}}))
        .expect("a pod")
    }

    #[test]
    fn variables_come_from_services_objects_fields_and_text_in_this_order() {
        let pod = pod();
        let mut objects = Objects::default();
        let map = json!({"data": {"host": "db"}});
        objects.config_maps.insert("cm".to_owned(), serde_json::from_value(map).expect("a map"));
        let secret = json!({"data": {"p": "c2VjcmV0"}});
        objects.secrets.insert("s".to_owned(), serde_json::from_value(secret).expect("a secret"));
        let ctx = EnvContext {
            pod: &pod,
            objects: &objects,
            services: vec![("P_host".to_owned(), "weakest".to_owned())],
            pod_ips: &[],
            host_ip: "10.0.0.1".parse().expect("an address"),
            allocatable: Allocatable { cpu_millis: 2000, memory_bytes: 3 << 20, pods: 1 },
        };
        let container = &pod.spec.as_ref().expect("a spec").containers[0];
        let list = variables(container, &ctx).expect("all is there");
        let pairs: Vec<String> =
            list.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            pairs,
            ["P_host=db", "NODE=n1", "APP=x", "CPUS=2", "MEM=3", "PASS=secret", "URL=http://db/n1"]
        );

        let none = Objects::default();
        let error =
            variables(container, &EnvContext { objects: &none, ..ctx }).expect_err("missing");
        assert_eq!(error, "configmap \"cm\" not found");
    }

    #[test]
    fn services_become_variables() {
        let service = ServiceView {
            name: "my-db".to_owned(),
            cluster_ip: "10.96.0.7".parse().expect("an address"),
            ports: vec![("sql".to_owned(), "TCP", 5432)],
        };
        let pairs: Vec<String> =
            service_variables(&[service]).iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(
            pairs,
            [
                "MY_DB_SERVICE_HOST=10.96.0.7",
                "MY_DB_SERVICE_PORT=5432",
                "MY_DB_SERVICE_PORT_SQL=5432",
                "MY_DB_PORT=tcp://10.96.0.7:5432",
                "MY_DB_PORT_5432_TCP=tcp://10.96.0.7:5432",
                "MY_DB_PORT_5432_TCP_PROTO=tcp",
                "MY_DB_PORT_5432_TCP_PORT=5432",
                "MY_DB_PORT_5432_TCP_ADDR=10.96.0.7",
            ]
        );
    }
}
