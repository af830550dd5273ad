//! A pod of the embedded runtime below a folder of its own, with an image and a CNI plugin to note calls.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use node_agent::kubelet::runtime::{
    Capabilities, CgroupSpec, ContainerId, ContainerSpec, DnsConfig, Embedded, Exit, ImageConfig,
    PodUid, Runtime as _, RuntimeConfig, RuntimeEvent, SandboxSpec, Seccomp, UnpackedImage, User,
};
use tokio::{sync::mpsc, time::timeout};

/// Longer than anything here takes on a busy machine.
pub(crate) const SLOW: Duration = Duration::from_secs(20);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Where a cgroup v2 tree is mounted, if the tests can run here.
pub(crate) fn tree() -> Option<&'static Path> {
    let mut trees = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new).into_iter();
    let tree = trees.find(|path| path.join("cgroup.controllers").exists());
    let missing = if !rustix::process::geteuid().is_root() {
        "root"
    } else if tree.is_none() {
        "a cgroup v2 tree"
    } else if !Path::new("/bin/busybox").exists() {
        "/bin/busybox (busybox-static)"
    } else {
        return tree;
    };
    skip::because(&format!("no {missing}"));
    None
}

/// A node with a runtime and one pod, removed when dropped.
pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: RuntimeConfig,
    pub(crate) runtime: Embedded,
    pub(crate) events: mpsc::Receiver<RuntimeEvent>,
    pub(crate) uid: PodUid,
}

impl Node {
    pub(crate) async fn new() -> Option<Self> {
        let tree = tree()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("orlop-test-{}-{number}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        let config = RuntimeConfig {
            controllers: Vec::new(),
            cgroup_root: tree.join(&name),
            cni_conf_dir: dir.path().join("net.d"),
            cni_bin_dir: dir.path().join("cni"),
            ..RuntimeConfig::standard(
                dir.path().join("lib"),
                dir.path().join("run"),
                vec!["192.0.2.1".parse().unwrap()],
            )
        };
        fs::create_dir_all(&config.cni_conf_dir).unwrap();
        fs::create_dir_all(&config.cni_bin_dir).unwrap();
        image(dir.path());
        plugin(&config, dir.path());
        let (runtime, events) = start(&config).await;
        let uid = PodUid(format!("00000000-0000-0000-0000-{number:012}").into());
        Some(Self { dir, config, runtime, events, uid })
    }

    pub(crate) fn sandbox(&self) -> SandboxSpec {
        SandboxSpec {
            uid: self.uid.clone(),
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            hostname: "web-host".to_owned(),
            host_network: false,
            cgroup: CgroupSpec {
                path: format!("burstable/pod{}", self.uid),
                ..CgroupSpec::default()
            },
            dns: DnsConfig { servers: vec!["10.96.0.10".to_owned()], ..DnsConfig::default() },
            host_aliases: vec![("192.0.2.7".to_owned(), vec!["alias".to_owned()])],
            sysctls: BTreeMap::new(),
            host_ports: Vec::new(),
        }
    }

    pub(crate) fn container(&self, script: &str) -> ContainerSpec {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        ContainerSpec {
            id: ContainerId(format!("{number:064x}").into()),
            pod: self.uid.clone(),
            name: "main".to_owned(),
            restart_count: 0,
            image: UnpackedImage {
                reference: "test/busybox".to_owned(),
                digest: "sha256:0".to_owned(),
                layers: vec![
                    self.dir.path().join("layers/base"),
                    self.dir.path().join("layers/top"),
                ],
                config: ImageConfig::default(),
            },
            args: ["sh", "-c", script].map(str::to_owned).into(),
            env: vec![("GREETING".to_owned(), "hello".to_owned())],
            working_dir: String::new(),
            user: User::default(),
            mounts: Vec::new(),
            cgroup: CgroupSpec::default(),
            oom_score_adj: 7,
            capabilities: Capabilities::default(),
            privileged: false,
            read_only_root: false,
            no_new_privileges: false,
            seccomp: Seccomp::RuntimeDefault,
            stdin: false,
            tty: false,
            termination_message_path: "/dev/termination-log".to_owned(),
            stop_signal: 15,
            log_path: self.dir.path().join(format!("logs/main/{number}.log")),
        }
    }

    /// Starts a container in the pod and waits for its end.
    pub(crate) async fn run(&mut self, spec: &ContainerSpec) -> (Exit, String) {
        self.runtime.ensure_sandbox(&self.sandbox()).await.unwrap();
        self.runtime.start_container(spec).await.unwrap_or_else(|error| {
            panic!("{error}: {}", std::error::Error::source(&error).unwrap())
        });
        let exit = self.exit(&spec.id).await;
        (exit, log(&spec.log_path))
    }

    pub(crate) async fn exit(&mut self, wanted: &ContainerId) -> Exit {
        loop {
            let event = timeout(SLOW, self.events.recv()).await.expect("an exit").unwrap();
            match event {
                RuntimeEvent::ContainerExited { id, exit, .. } if id == *wanted => return exit,
                RuntimeEvent::ContainerExited { .. } => {}
                RuntimeEvent::SandboxLost { pod } => panic!("{pod} is lost"),
            }
        }
    }

    /// Removes the pod and asserts that nothing of it is left.
    pub(crate) async fn finish(self) {
        self.runtime.remove_sandbox(&self.uid).await.unwrap();
        self.runtime.remove_sandbox(&self.uid).await.unwrap();
        assert!(self.runtime.sandboxes().await.unwrap().is_empty());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.path().to_str().unwrap();
        assert!(!mounts.contains(dir), "{mounts}");
        let empty = |path: PathBuf| fs::read_dir(path).unwrap().count() == 0;
        assert!(empty(self.config.run_dir.join("shim")));
        assert!(empty(self.config.run_dir.join("netns")));
        assert!(empty(self.config.state_dir.join("containers")));
        assert!(!self.config.cgroup_root.join(format!("burstable/pod{}", self.uid)).exists());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Also after a failed assertion: what runs is killed by its cgroup.
        let root = &self.config.cgroup_root;
        drop(fs::write(root.join("cgroup.kill"), "1"));
        drop(node_agent::sys::cgroup::remove(root));
        for path in
            ["shm"].map(|name| self.config.run_dir.join("shim").join(&*self.uid.0).join(name))
        {
            drop(node_agent::sys::sandbox::release(&path));
        }
        drop(node_agent::sys::sandbox::release(
            &self.config.run_dir.join("netns").join(&*self.uid.0),
        ));
    }
}

pub(crate) async fn start(config: &RuntimeConfig) -> (Embedded, mpsc::Receiver<RuntimeEvent>) {
    let runtime = Embedded::new(config.clone()).await.unwrap();
    let events = runtime.take_events().unwrap();
    assert!(runtime.take_events().is_none());
    (runtime, events)
}

/// Two layers: busybox with its names, and a file that hides another.
pub(crate) fn image(dir: &Path) {
    let (base, top) = (dir.join("layers/base"), dir.join("layers/top"));
    for folder in ["bin", "etc", "tmp"] {
        fs::create_dir_all(base.join(folder)).unwrap();
    }
    fs::create_dir_all(top.join("etc")).unwrap();
    fs::copy("/bin/busybox", base.join("bin/busybox")).unwrap();
    for name in [
        "sh", "cat", "sleep", "id", "mount", "hostname", "ls", "touch", "mknod", "unshare", "stat",
        "head", "yes", "tty", "stty", "ip", "grep", "printenv", "kill", "echo", "pwd", "test",
        "env", "ulimit", "mkdir", "umount", "chmod", "cp",
    ] {
        symlink("busybox", base.join("bin").join(name)).unwrap();
    }
    fs::write(base.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n")
        .unwrap();
    fs::write(base.join("etc/layer"), "base").unwrap();
    fs::write(top.join("etc/layer"), "top").unwrap();
    fs::write(top.join("etc/plain"), "no program").unwrap();
    symlink("/outside", top.join("etc/link")).unwrap();
}

/// A CNI plugin that writes its calls down and gives an address.
pub(crate) fn plugin(config: &RuntimeConfig, dir: &Path) {
    fs::write(
        config.cni_conf_dir.join("10-test.conflist"),
        r#"{"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "note"}]}"#,
    )
    .unwrap();
    let calls = dir.join("calls").display().to_string();
    let script = format!(
        "#!/bin/sh\necho \"$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_ARGS $(cat)\" >> {calls}\n\
         test -e $CNI_NETNS || exit 1\n\
         echo '{{\"cniVersion\": \"1.0.0\", \"ips\": [{{\"address\": \"10.244.9.9/24\"}}]}}'\n"
    );
    let path = config.cni_bin_dir.join("note");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The log's data, each entry checked for its form.
pub(crate) fn log(path: &Path) -> String {
    let mut data = String::new();
    for line in fs::read_to_string(path).unwrap().lines() {
        let mut parts = line.splitn(4, ' ');
        let time = parts.next().unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{line}");
        let stream = parts.next().unwrap();
        assert!(matches!(stream, "stdout" | "stderr"), "{line}");
        let tag = parts.next().unwrap();
        data.push_str(parts.next().unwrap());
        if tag == "F" {
            data.push('\n');
        }
    }
    data
}
