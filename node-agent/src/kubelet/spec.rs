//! From a pod and an image to what the runtime is asked for. Pure.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::{
    cgroup::{container_cgroup, oom_score_adj, pod_cgroup},
    env::expand,
    ports::host_ports,
    runtime::{
        Capabilities, ContainerId, ContainerSpec, DnsConfig, Mount, PodUid, SandboxSpec, Seccomp,
        UnpackedImage, User,
    },
};

/// The node's part of names and paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeContext {
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// The node's own resolver, for `dnsPolicy: Default`.
    pub host_dns: DnsConfig,
    pub log_dir: PathBuf,
    pub capacity_bytes: u64,
}

/// Search path when an image sets none, as containerd has it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most entries of `resolv.conf` that upstream lets through.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

/// Namespace, name and uid of a pod; empty where the object lacks them.
#[must_use]
pub fn identity(pod: &Pod) -> (&str, &str, &str) {
    let meta = &pod.metadata;
    (
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
        meta.uid.as_deref().unwrap_or_default(),
    )
}

/// The host name inside the pod: `spec.hostname`, else the pod's name, at most 63 bytes.
#[must_use]
pub fn hostname(pod: &Pod) -> String {
    let (_, name, _) = identity(pod);
    let said = pod.spec.as_ref().and_then(|spec| spec.hostname.as_deref());
    let name = said.filter(|text| !text.is_empty()).unwrap_or(name);
    let short: String = name.chars().take(63).collect();
    short.trim_end_matches(['-', '.']).to_owned()
}

/// What the sandbox is made from.
#[must_use]
pub fn sandbox_spec(pod: &Pod, node: &NodeContext) -> SandboxSpec {
    let (namespace, name, uid) = identity(pod);
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_ref());
    let aliases = spec.host_aliases.iter().flatten();
    SandboxSpec {
        uid: PodUid(uid.into()),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        hostname: hostname(pod),
        host_network: spec.host_network == Some(true),
        cgroup: pod_cgroup(spec, uid),
        dns: dns(spec, namespace, node),
        host_aliases: aliases
            .map(|alias| (alias.ip.clone(), alias.hostnames.clone().unwrap_or_default()))
            .collect(),
        sysctls: sysctls
            .into_iter()
            .flatten()
            .map(|sysctl| (sysctl.name.clone(), sysctl.value.clone()))
            .collect(),
        host_ports: host_ports(spec),
    }
}

fn dns(spec: &PodSpec, namespace: &str, node: &NodeContext) -> DnsConfig {
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let host_network = spec.host_network == Some(true);
    let cluster = match policy {
        "ClusterFirst" => !host_network && !node.cluster_dns.is_empty(),
        "ClusterFirstWithHostNet" => !node.cluster_dns.is_empty(),
        _ => false,
    };
    let mut dns = if cluster {
        let domain = &node.cluster_domain;
        let mut searches =
            vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
        searches.extend(node.host_dns.searches.iter().cloned());
        DnsConfig {
            servers: node.cluster_dns.iter().map(ToString::to_string).collect(),
            searches,
            options: vec!["ndots:5".to_owned()],
        }
    } else if policy == "None" {
        DnsConfig::default()
    } else {
        node.host_dns.clone()
    };
    if let Some(config) = &spec.dns_config {
        dns.servers.extend(config.nameservers.iter().flatten().cloned());
        dns.searches.extend(config.searches.iter().flatten().cloned());
        for option in config.options.iter().flatten() {
            let name = option.name.as_deref().unwrap_or_default();
            let text = match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.to_owned(),
            };
            dns.options.retain(|old| old.split(':').next() != Some(name));
            dns.options.push(text);
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    dns.servers.retain(|server| seen.insert(server.clone()));
    dns.searches.retain(|search| seen.insert(search.clone()));
    dns.servers.truncate(MAX_NAMESERVERS);
    dns.searches.truncate(MAX_SEARCHES);
    dns
}

/// Reads the text of a `resolv.conf`.
#[must_use]
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let rest: Vec<String> = match words.next() {
            Some("nameserver" | "search" | "options") => words.map(str::to_owned).collect(),
            Some(_) | None => continue,
        };
        match line.split_whitespace().next() {
            Some("nameserver") => dns.servers.extend(rest.into_iter().take(1)),
            Some("search") => dns.searches = rest,
            Some(_) => dns.options.extend(rest),
            None => {}
        }
    }
    dns
}

/// Folder of a pod's logs.
#[must_use]
pub fn pod_log_dir(log_dir: &Path, pod: &Pod) -> PathBuf {
    let (namespace, name, uid) = identity(pod);
    log_dir.join(format!("{namespace}_{name}_{uid}"))
}

/// What is known about a container at the moment of its start.
#[derive(Clone, Debug)]
pub struct ContainerContext<'a> {
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub id: ContainerId,
    pub restart_count: u32,
    pub image: UnpackedImage,
    pub variables: Vec<(String, String)>,
    pub user: User,
    /// Folder or file on the node of each volume of the pod.
    pub volumes: &'a BTreeMap<String, PathBuf>,
}

/// What one container is made from.
///
/// # Errors
/// Upstream's words for what is wrong; the container waits with `CreateContainerConfigError`.
pub fn container_spec(
    ctx: ContainerContext<'_>,
    node: &NodeContext,
) -> Result<ContainerSpec, String> {
    let (_, _, uid) = identity(ctx.pod);
    let default = PodSpec::default();
    let pod = ctx.pod.spec.as_ref().unwrap_or(&default);
    let container = ctx.container;
    let context = container.security_context.as_ref();
    let capabilities = context.and_then(|context| context.capabilities.as_ref());
    let log = format!("{}/{}.log", container.name, ctx.restart_count);
    let config = &ctx.image.config;
    let working_dir = container.working_dir.clone().filter(|dir| !dir.is_empty());
    let message_path = container.termination_message_path.clone();
    Ok(ContainerSpec {
        pod: PodUid(uid.into()),
        name: container.name.clone(),
        restart_count: ctx.restart_count,
        args: arguments(container, &ctx.image, &ctx.variables)?,
        env: environment(ctx.pod, &config.env, &ctx.variables),
        working_dir: working_dir.unwrap_or_else(|| root_if_empty(&config.working_dir)),
        user: checked_user(pod, container, ctx.user, ctx.pod)?,
        mounts: mounts(container, ctx.volumes)?,
        cgroup: container_cgroup(pod, uid, container, &ctx.id.0),
        oom_score_adj: oom_score_adj(pod, container, node.capacity_bytes),
        capabilities: Capabilities {
            add: capabilities.and_then(|c| c.add.clone()).unwrap_or_default(),
            drop: capabilities.and_then(|c| c.drop.clone()).unwrap_or_default(),
        },
        privileged: context.is_some_and(|context| context.privileged == Some(true)),
        read_only_root: context
            .is_some_and(|context| context.read_only_root_filesystem == Some(true)),
        no_new_privileges: context
            .is_some_and(|context| context.allow_privilege_escalation == Some(false)),
        seccomp: seccomp(pod, container),
        stdin: container.stdin == Some(true),
        tty: container.tty == Some(true),
        termination_message_path: message_path.unwrap_or_else(|| "/dev/termination-log".to_owned()),
        stop_signal: stop_signal(&config.stop_signal),
        log_path: pod_log_dir(&node.log_dir, ctx.pod).join(log),
        id: ctx.id,
        image: ctx.image,
    })
}

fn root_if_empty(dir: &str) -> String {
    if dir.is_empty() { "/".to_owned() } else { dir.to_owned() }
}

/// `command` replaces the entrypoint and the image's arguments with it; `args` the arguments alone.
fn arguments(
    container: &Container,
    image: &UnpackedImage,
    variables: &[(String, String)],
) -> Result<Vec<String>, String> {
    let expanded = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|text| expand(text, variables)).collect()
    };
    let (command, args) = (expanded(&container.command), expanded(&container.args));
    let mut all = if command.is_empty() { image.config.entrypoint.clone() } else { command };
    if !args.is_empty() {
        all.extend(args);
    } else if container.command.as_ref().is_none_or(Vec::is_empty) {
        all.extend(image.config.cmd.iter().cloned());
    }
    if all.is_empty() { Err("no command specified".to_owned()) } else { Ok(all) }
}

fn environment(
    pod: &Pod,
    image: &[String],
    variables: &[(String, String)],
) -> Vec<(String, String)> {
    let mut list =
        vec![("PATH".to_owned(), DEFAULT_PATH.to_owned()), ("HOSTNAME".to_owned(), hostname(pod))];
    let image = image.iter().filter_map(|text| text.split_once('='));
    let image = image.map(|(name, value)| (name.to_owned(), value.to_owned()));
    for (name, value) in image.chain(variables.iter().cloned()) {
        match list.iter_mut().find(|(known, _)| *known == name) {
            Some(row) => row.1 = value,
            None => list.push((name, value)),
        }
    }
    list
}

/// The identity that the specs ask for over the image's own.
#[must_use]
pub fn asked_user(pod: &PodSpec, container: &Container) -> (Option<u32>, Option<u32>) {
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let (own, whole) = (container.security_context.as_ref(), pod.security_context.as_ref());
    let uid = own.and_then(|c| c.run_as_user).or_else(|| whole.and_then(|c| c.run_as_user));
    let gid = own.and_then(|c| c.run_as_group).or_else(|| whole.and_then(|c| c.run_as_group));
    (number(uid), number(gid))
}

fn checked_user(
    pod: &PodSpec,
    container: &Container,
    user: User,
    object: &Pod,
) -> Result<User, String> {
    let (own, whole) = (container.security_context.as_ref(), pod.security_context.as_ref());
    let non_root =
        own.and_then(|c| c.run_as_non_root).or_else(|| whole.and_then(|c| c.run_as_non_root))
            == Some(true);
    if non_root && user.uid == 0 {
        let (namespace, name, uid) = identity(object);
        let why = if asked_user(pod, container).0 == Some(0) {
            "container's runAsUser breaks non-root policy"
        } else {
            "container has runAsNonRoot and image will run as root"
        };
        return Err(format!(
            "{why} (pod: \"{name}_{namespace}({uid})\", container: {})",
            container.name
        ));
    }
    let mut user = user;
    let groups = whole.and_then(|c| c.supplemental_groups.as_ref()).into_iter().flatten();
    user.additional_gids.extend(groups.filter_map(|gid| u32::try_from(*gid).ok()));
    user.additional_gids.sort_unstable();
    user.additional_gids.dedup();
    Ok(user)
}

/// Without a profile a container is unconfined, as long as `seccompDefault` is not offered.
fn seccomp(pod: &PodSpec, container: &Container) -> Seccomp {
    let own = container.security_context.as_ref().and_then(|c| c.seccomp_profile.as_ref());
    let whole = pod.security_context.as_ref().and_then(|c| c.seccomp_profile.as_ref());
    match own.or(whole).map(|profile| profile.type_.as_str()) {
        Some("RuntimeDefault") => Seccomp::RuntimeDefault,
        Some(_) | None => Seccomp::Unconfined,
    }
}

fn mounts(
    container: &Container,
    volumes: &BTreeMap<String, PathBuf>,
) -> Result<Vec<Mount>, String> {
    let mut list = Vec::new();
    for mount in container.volume_mounts.iter().flatten() {
        let source = volumes
            .get(&mount.name)
            .ok_or_else(|| format!("volume \"{}\" is not mounted", mount.name))?;
        list.push(Mount {
            source: Some(source.clone()),
            destination: PathBuf::from(&mount.mount_path),
            read_only: mount.read_only == Some(true),
        });
    }
    // A mount inside another must come after it.
    list.sort_by(|a, b| a.destination.cmp(&b.destination));
    Ok(list)
}

/// Number of a signal's name or number; SIGTERM where nothing is said.
fn stop_signal(text: &str) -> i32 {
    /// Signals that images name in practice, with their Linux numbers (`asm-generic/signal.h`).
    const NAMES: &[(&str, i32)] = &[
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ABRT", 6),
        ("KILL", 9),
        ("USR1", 10),
        ("USR2", 12),
        ("TERM", 15),
        ("WINCH", 28),
        ("PWR", 30),
        ("RTMIN+3", 37),
    ];
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named.or_else(|| text.parse().ok().filter(|number| (1..=64).contains(number))).unwrap_or(15)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kubelet::runtime::ImageConfig;

    fn node() -> NodeContext {
        NodeContext {
            cluster_dns: vec!["10.96.0.10".parse().expect("an address")],
            cluster_domain: "cluster.local".to_owned(),
            host_dns: parse_resolv_conf("# c\nsearch lan\nnameserver 9.9.9.9\noptions rotate\n"),
            log_dir: PathBuf::from("/var/log/pods"),
            capacity_bytes: 1 << 30,
        }
    }

    fn pod(spec: Value) -> Pod {
        let metadata = json!({"name": "web", "namespace": "ns", "uid": "u"});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).expect("a pod")
    }

    fn build(spec: Value, config: ImageConfig, user: User) -> Result<ContainerSpec, String> {
        let pod = pod(spec);
        let container = &pod.spec.as_ref().expect("a spec").containers[0];
        let image = UnpackedImage {
            reference: "i".to_owned(),
            digest: "sha256:1".to_owned(),
            layers: Vec::new(),
            config,
        };
        let volumes = BTreeMap::from([("v".to_owned(), PathBuf::from("/vol/v"))]);
        let ctx = ContainerContext {
            pod: &pod,
            container,
            id: ContainerId("c0".into()),
            restart_count: 3,
            image,
            variables: vec![("NAME".to_owned(), "value".to_owned())],
            user,
            volumes: &volumes,
        };
        container_spec(ctx, &node())
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd() {
        let image = || ImageConfig {
            entrypoint: vec!["entry".to_owned()],
            cmd: vec!["cmd".to_owned()],
            ..ImageConfig::default()
        };
        // The table of the Kubernetes documentation on commands and arguments.
        let table: [(Value, &[&str]); 4] = [
            (json!({"name": "a"}), &["entry", "cmd"]),
            (json!({"name": "a", "command": ["x"]}), &["x"]),
            (json!({"name": "a", "args": ["$(NAME)"]}), &["entry", "value"]),
            (json!({"name": "a", "command": ["x"], "args": ["y"]}), &["x", "y"]),
        ];
        for (container, args) in table {
            let spec = build(json!({"containers": [container]}), image(), User::default());
            assert_eq!(spec.expect("a spec").args, args);
        }
        let error =
            build(json!({"containers": [{"name": "a"}]}), ImageConfig::default(), User::default());
        assert_eq!(error.expect_err("nothing to run"), "no command specified");
    }

    #[test]
    fn mounts_are_ordered_by_depth_and_logs_named_by_restart() {
        let container = json!({"name": "a", "command": ["x"], "volumeMounts": [
            {"name": "v", "mountPath": "/a/b", "readOnly": true}, {"name": "v", "mountPath": "/a"}]});
        let spec =
            build(json!({"containers": [container]}), ImageConfig::default(), User::default())
                .expect("a spec");
        let order: Vec<(&Path, bool)> =
            spec.mounts.iter().map(|m| (m.destination.as_path(), m.read_only)).collect();
        assert_eq!(order, [(Path::new("/a"), false), (Path::new("/a/b"), true)]);
        assert_eq!(spec.log_path, Path::new("/var/log/pods/ns_web_u/a/3.log"));
        assert_eq!(spec.cgroup.path, "besteffort/podu/c0");
    }

    #[test]
    fn an_image_that_runs_as_root_is_refused_where_root_is_not_wanted() {
        let spec = json!({"securityContext": {"runAsNonRoot": true, "supplementalGroups": [5]},
            "containers": [{"name": "a", "command": ["x"]}]});
        let error = build(spec.clone(), ImageConfig::default(), User::default());
        assert_eq!(
            error.expect_err("root"),
            "container has runAsNonRoot and image will run as root (pod: \"web_ns(u)\", container: a)"
        );
        let user = User { uid: 7, gid: 0, additional_gids: Vec::new() };
        let built = build(spec, ImageConfig::default(), user).expect("not root");
        assert_eq!(built.user.additional_gids, [5]);
    }

    #[test]
    fn dns_follows_its_policy() {
        let dns = |spec: Value| sandbox_spec(&pod(spec), &node()).dns;
        let cluster = dns(json!({"containers": []}));
        assert_eq!(cluster.servers, ["10.96.0.10"]);
        assert_eq!(
            cluster.searches,
            ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "lan"]
        );
        assert_eq!(cluster.options, ["ndots:5"]);
        let host = dns(json!({"containers": [], "hostNetwork": true}));
        assert_eq!(
            (host.servers, host.options),
            (vec!["9.9.9.9".to_owned()], vec!["rotate".to_owned()])
        );
        let own = dns(json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {
            "nameservers": ["1.1.1.1"], "options": [{"name": "ndots", "value": "2"}]}}));
        assert_eq!(
            (own.servers, own.options),
            (vec!["1.1.1.1".to_owned()], vec!["ndots:2".to_owned()])
        );
    }

    #[test]
    fn stop_signals_are_read_by_name_and_number() {
        let table =
            [("", 15), ("SIGQUIT", 3), ("QUIT", 3), ("9", 9), ("SIGRTMIN+3", 37), ("99", 15)];
        for (text, number) in table {
            assert_eq!(stop_signal(text), number, "{text}");
        }
    }
}
