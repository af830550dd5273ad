//! From what the kubelet wants to what the shim does: capabilities, paths, files, cgroup values. Pure.

use std::{
    fmt::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
};

use shim::wire::{ContainerConfig, MountConfig};

use super::{
    CPU_PERIOD_US, Capabilities, CgroupSpec, ContainerSpec, DnsConfig, SandboxSpec, Seccomp,
    seccomp,
};

/// Capabilities by number (`include/uapi/linux/capability.h`).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has when nothing is said (containerd, `pkg/oci/spec.go`).
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Hidden from containers (kubelet, `pkg/securitycontext/util.go`).
const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Not writable in containers (the same file).
const READ_ONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Open files of a container, soft and hard: what Docker's and containerd's units led images to expect.
const OPEN_FILES: u64 = 1_048_576;

/// Set in every pod's network namespace (containerd's `enable_unprivileged_ports` and `_icmp`, on by
/// default since 2.0).
const NET_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// Why a container cannot be made as it is asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("unknown capability \"{0}\" to add")]
    UnknownCapability(String),
    #[error("the image has no layers")]
    NoLayers,
    #[error("image layers lie in several folders")]
    ScatteredLayers,
    #[error("path {} is not UTF-8", .0.display())]
    NotUtf8(PathBuf),
}

/// Where the runtime keeps what belongs to one container.
#[derive(Debug)]
pub(super) struct ContainerPaths {
    pub(super) work: PathBuf,
    pub(super) cgroup: PathBuf,
    /// Pod's folder with `hosts`, `hostname`, `resolv.conf` and `shm` in it.
    pub(super) pod: PathBuf,
}

/// Everything the shim needs to start a container.
///
/// # Errors
/// What cannot be done as asked; nothing is left out silently.
pub(super) fn container(
    spec: &ContainerSpec,
    paths: &ContainerPaths,
) -> Result<ContainerConfig, PlanError> {
    let (layers_dir, layers) = layers(&spec.image.layers)?;
    let masked = if spec.privileged { &[][..] } else { &MASKED_PATHS[..] };
    let fixed = if spec.privileged { &[][..] } else { &READ_ONLY_PATHS[..] };
    let owned = |list: &[&str]| list.iter().map(|&path| path.to_owned()).collect();
    let filter = match spec.seccomp {
        Seccomp::RuntimeDefault if !spec.privileged => seccomp::default_filter(),
        Seccomp::RuntimeDefault | Seccomp::Unconfined => Vec::new(),
    };
    Ok(ContainerConfig {
        id: spec.id.to_string(),
        name: spec.name.clone(),
        restart_count: spec.restart_count,
        image_reference: spec.image.reference.clone(),
        image_digest: spec.image.digest.clone(),
        layers_dir,
        layers,
        work_dir: text(&paths.work)?,
        cgroup: text(&paths.cgroup)?,
        args: spec.args.clone(),
        env: spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        cwd: spec.working_dir.clone(),
        uid: spec.user.uid,
        gid: spec.user.gid,
        groups: groups(spec),
        mounts: mounts(spec, paths)?,
        capabilities: capabilities(&spec.capabilities, spec.privileged)?,
        privileged: spec.privileged,
        read_only_root: spec.read_only_root,
        no_new_privileges: spec.no_new_privileges,
        seccomp: filter,
        masked_paths: owned(masked),
        read_only_paths: owned(fixed),
        oom_score_adj: spec.oom_score_adj,
        open_files: OPEN_FILES,
        stop_signal: spec.stop_signal,
        stdin: spec.stdin,
        tty: spec.tty,
        termination_file: text(&termination_file(&paths.work))?,
        log_path: text(&spec.log_path)?,
    })
}

/// The file behind a container's termination message path.
pub(super) fn termination_file(work: &Path) -> PathBuf {
    work.join("termination-log")
}

fn text(path: &Path) -> Result<String, PlanError> {
    path.to_str().map(str::to_owned).ok_or_else(|| PlanError::NotUtf8(path.to_owned()))
}

fn layers(paths: &[PathBuf]) -> Result<(String, Vec<String>), PlanError> {
    let dir = paths.first().and_then(|path| path.parent()).ok_or(PlanError::NoLayers)?;
    let names = paths.iter().map(|path| {
        let name = path.strip_prefix(dir).map_err(|_elsewhere| PlanError::ScatteredLayers)?;
        text(name)
    });
    Ok((text(dir)?, names.collect::<Result<_, _>>()?))
}

fn groups(spec: &ContainerSpec) -> Vec<u32> {
    let mut groups = spec.user.additional_gids.clone();
    if !groups.contains(&spec.user.gid) {
        groups.insert(0, spec.user.gid);
    }
    groups
}

/// The pod's files and shared memory where the spec mounts nothing of its own, then the spec's mounts;
/// outer ones first, so that none hides another.
fn mounts(spec: &ContainerSpec, paths: &ContainerPaths) -> Result<Vec<MountConfig>, PlanError> {
    let mut mounts = Vec::new();
    let message = PathBuf::from(&spec.termination_message_path);
    let own = [
        (paths.pod.join("shm"), Path::new("/dev/shm"), false),
        (paths.pod.join("hosts"), Path::new("/etc/hosts"), spec.read_only_root),
        (paths.pod.join("hostname"), Path::new("/etc/hostname"), spec.read_only_root),
        (paths.pod.join("resolv.conf"), Path::new("/etc/resolv.conf"), spec.read_only_root),
        (termination_file(&paths.work), message.as_path(), false),
    ];
    for (source, destination, read_only) in own {
        let taken = spec.mounts.iter().any(|mount| mount.destination == destination);
        if !taken && destination.is_absolute() {
            mounts.push(MountConfig {
                source: text(&source)?,
                destination: text(destination)?,
                read_only,
            });
        }
    }
    for mount in &spec.mounts {
        mounts.push(MountConfig {
            source: mount.source.as_deref().map_or(Ok(String::new()), text)?,
            destination: text(&mount.destination)?,
            read_only: mount.read_only,
        });
    }
    mounts.sort_by_key(|mount| Path::new(&mount.destination).components().count());
    Ok(mounts)
}

/// The default set with `drop` taken away and `add` put in; `ALL` stands for all. As in containerd,
/// `ALL` first, then names, and an addition wins over a removal.
fn capabilities(wanted: &Capabilities, privileged: bool) -> Result<Vec<u8>, PlanError> {
    let clean = |name: &str| name.trim_start_matches("CAP_").to_uppercase();
    let (add, drop): (Vec<_>, Vec<_>) = (
        wanted.add.iter().map(|name| clean(name)).collect(),
        wanted.drop.iter().map(|name| clean(name)).collect(),
    );
    let all = |names: &[String]| names.iter().any(|name| name == "ALL");
    let known = |name: &&String| *name == "ALL" || CAPABILITIES.contains(&name.as_str());
    if let Some(unknown) = add.iter().find(|name| !known(name)) {
        return Err(PlanError::UnknownCapability(unknown.clone()));
    }
    let has = |name: &str| {
        let named = |names: &[String]| names.iter().any(|other| other == name);
        let base = if all(&add) {
            !named(&drop)
        } else {
            !all(&drop) && !named(&drop) && DEFAULT_CAPABILITIES.contains(&name)
        };
        privileged || base || named(&add)
    };
    let numbered = (0_u8..).zip(CAPABILITIES);
    Ok(numbered.filter(|(_, name)| has(name)).map(|(number, _)| number).collect())
}

/// Files and values to write into a cgroup, for the controllers that are enabled.
pub(super) fn cgroup_values(
    spec: &CgroupSpec,
    controllers: &[&str],
) -> Vec<(&'static str, String)> {
    let mut values = Vec::new();
    let mut put = |controller: &str, file: &'static str, value: Option<String>| {
        if let Some(value) = value.filter(|_| controllers.contains(&controller)) {
            values.push((file, value));
        }
    };
    put("cpu", "cpu.weight", spec.cpu_weight.map(|weight| weight.to_string()));
    put("cpu", "cpu.max", spec.cpu_quota_us.map(|quota| format!("{quota} {CPU_PERIOD_US}")));
    put("memory", "memory.max", spec.memory_max_bytes.map(|bytes| bytes.to_string()));
    put("memory", "memory.oom.group", spec.oom_group.then(|| "1".to_owned()));
    put("pids", "pids.max", spec.pids_max.map(|count| count.to_string()));
    values
}

/// Sysctls of a pod: the runtime's own defaults below what the spec asks for.
pub(super) fn sysctls(spec: &SandboxSpec) -> Vec<(String, String)> {
    let defaults = NET_SYSCTLS.iter().filter(|_| !spec.host_network);
    let defaults = defaults.filter(|(name, _)| !spec.sysctls.contains_key(*name));
    defaults
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .chain(spec.sysctls.iter().map(|(name, value)| (name.clone(), value.clone())))
        .collect()
}

/// A pod's `resolv.conf`.
pub(super) fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        writeln!(text, "search {}", dns.searches.join(" ")).unwrap_or_default();
    }
    for server in &dns.servers {
        writeln!(text, "nameserver {server}").unwrap_or_default();
    }
    if !dns.options.is_empty() {
        writeln!(text, "options {}", dns.options.join(" ")).unwrap_or_default();
    }
    text
}

/// A pod's `/etc/hosts` in the kubelet's form; on the node's network, the node's own file is its base.
pub(super) fn hosts(spec: &SandboxSpec, ips: &[IpAddr], node_hosts: &str) -> String {
    let mut text = String::new();
    if spec.host_network {
        text.push_str("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(node_hosts);
    } else {
        text.push_str(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
             fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        for ip in ips {
            writeln!(text, "{ip}\t{}", spec.hostname).unwrap_or_default();
        }
    }
    if !spec.host_aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for (ip, names) in &spec.host_aliases {
            writeln!(text, "{ip}\t{}", names.join("\t")).unwrap_or_default();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(add: &[&str], drop: &[&str], privileged: bool) -> Vec<&'static str> {
        let owned = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        let wanted = Capabilities { add: owned(add), drop: owned(drop) };
        let numbers = capabilities(&wanted, privileged).unwrap();
        numbers.iter().map(|number| CAPABILITIES[usize::from(*number)]).collect()
    }

    #[test]
    fn capabilities_are_the_default_set_changed_by_name_or_all() {
        assert_eq!(names(&[], &[], false).len(), 14);
        assert_eq!(names(&[], &["ALL"], false), Vec::<&str>::new());
        assert_eq!(names(&["NET_ADMIN"], &["ALL"], false), ["NET_ADMIN"]);
        assert_eq!(names(&["CAP_SYS_TIME"], &["ALL"], false), ["SYS_TIME"]);
        assert_eq!(names(&["ALL"], &["SYS_ADMIN"], false).len(), 40);
        assert!(!names(&["ALL"], &["SYS_ADMIN"], false).contains(&"SYS_ADMIN"));
        assert!(!names(&[], &["KILL"], false).contains(&"KILL"));
        assert_eq!(names(&[], &[], true).len(), 41);
        let unknown = Capabilities { add: vec!["FLY".to_owned()], drop: Vec::new() };
        assert_eq!(
            capabilities(&unknown, false),
            Err(PlanError::UnknownCapability("FLY".to_owned()))
        );
    }

    #[test]
    fn cgroup_values_are_written_for_enabled_controllers_only() {
        let spec = CgroupSpec {
            path: "burstable/pod1".to_owned(),
            cpu_weight: Some(39),
            cpu_quota_us: Some(20_000),
            memory_max_bytes: Some(64 << 20),
            oom_group: true,
            pids_max: Some(100),
        };
        assert_eq!(
            cgroup_values(&spec, &["cpu", "memory", "pids"]),
            [
                ("cpu.weight", "39".to_owned()),
                ("cpu.max", "20000 100000".to_owned()),
                ("memory.max", "67108864".to_owned()),
                ("memory.oom.group", "1".to_owned()),
                ("pids.max", "100".to_owned()),
            ]
        );
        assert_eq!(cgroup_values(&spec, &["pids"]), [("pids.max", "100".to_owned())]);
        assert_eq!(cgroup_values(&CgroupSpec::default(), &["cpu", "memory", "pids"]), []);
    }

    #[test]
    fn resolv_conf_has_the_kubelets_order() {
        let list = |items: &[&str]| items.iter().map(|&item| item.to_owned()).collect();
        let dns = DnsConfig {
            servers: list(&["10.96.0.10"]),
            searches: list(&["a.svc.cluster.local", "svc.cluster.local"]),
            options: list(&["ndots:5"]),
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&DnsConfig::default()), "");
    }
}
