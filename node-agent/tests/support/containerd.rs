//! Debian's containerd with an image of busybox, driven as a kubelet drives it.
//!
//! It lives in a node's namespaces and in a process namespace of its own, with which everything that it
//! started ends. It sees no cgroups: the machine's are left alone.

use std::{
    fs,
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::mount::{MsFlags, mount};
use sha2::{Digest as _, Sha256};

use crate::{
    cluster::space::{Space, pause},
    cri::{Fields, Message, call},
};

/// Where Debian's `containernetworking-plugins` has its plugins; containerd wants its `loopback`.
const PLUGINS: &str = "/usr/lib/cni";
const IMAGE: &str = "docker.io/library/orlop-test:1";
const PATIENCE: Duration = Duration::from_secs(60);

/// What containerd needs and this machine lacks.
pub(crate) fn missing() -> Option<String> {
    let loopback = format!("{PLUGINS}/loopback");
    let needed = [
        ("/usr/bin/containerd", "containerd"),
        ("/usr/bin/ctr", "containerd"),
        ("/usr/bin/crun", "crun"),
        ("/bin/busybox", "busybox-static"),
        (&*loopback, "containernetworking-plugins"),
    ];
    let lacks = needed.iter().find(|(path, _)| !Path::new(path).exists());
    lacks.map(|(path, package)| format!("no {path} (Debian's {package})"))
}

/// The daemon and the process namespace that it is in; all of it is gone with the value.
pub(crate) struct Containerd {
    folder: PathBuf,
    holder: Child,
    /// The first process of the namespace, which outlives the daemon.
    first: String,
    daemon: Option<Child>,
}

impl Containerd {
    /// Starts it in a node's namespaces. What it and the CNI server share is in `folder`: `net.d`, `bin`.
    pub(crate) fn start(space: &Space, folder: &Path) -> Self {
        set_up(folder);
        let holder = space.run(|| {
            hide();
            let unshare = ["--mount", "--propagation=unchanged", "--pid", "--fork", "--mount-proc"];
            let wait = ["--kill-child", "busybox", "sh", "-c", "while sleep 1; do :; done"];
            Command::new("unshare").args(unshare).args(wait).spawn().unwrap()
        });
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let first = until(|| {
            let first = fs::read_to_string(&children).unwrap().trim().to_owned();
            // Its `/proc` is there when it has become the shell.
            let name = fs::read_to_string(format!("/proc/{first}/comm")).ok()?;
            (name.trim() == "busybox").then_some(first)
        });
        let mut containerd = Self { folder: folder.to_owned(), holder, first, daemon: None };
        containerd.resume();
        let archive = containerd.folder.join("image.tar");
        let import = ["images", "import", "--snapshotter=native"].map(AsRef::as_ref);
        containerd.ctr(&[&import[..], &[archive.as_os_str()]].concat());
        until(|| {
            let images = containerd.ask("ImageService/ListImages", &Message::default()).unwrap();
            Fields::read(&images).all(1).next().map(|_| ())
        });
        containerd
    }

    /// Starts the daemon again after [`Self::kill`].
    pub(crate) fn resume(&mut self) {
        let log = self.folder.join("log");
        let log = fs::File::options().create(true).append(true).open(log).unwrap();
        let script = format!("echo $$ > {0}/pid; exec containerd -c {0}/config.toml", self.shown());
        let mut daemon = self.inside(&["busybox", "sh", "-c", &script]);
        self.daemon = Some(daemon.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        // Ready to run pods, which includes that it has read the network's configuration.
        until(|| {
            let status = self.ask("RuntimeService/Status", &Message::default()).ok()?;
            let status = Fields::read(&status);
            let conditions: Vec<_> = status.message(1).all(1).map(Fields::read).collect();
            let ready = conditions.len() == 2 && conditions.iter().all(|one| one.number(2) == 1);
            ready.then_some(())
        });
    }

    /// Kills the daemon; pods go on.
    pub(crate) fn kill(&mut self) {
        let pid = fs::read_to_string(self.folder.join("pid")).unwrap();
        let killed = self.inside(&["busybox", "kill", "-9", pid.trim()]).status().unwrap();
        assert!(killed.success());
        self.daemon.take().expect("it runs").wait().unwrap();
    }

    /// Kills the daemon and loses all it knew of its pods.
    pub(crate) fn lose_everything(&mut self) {
        self.kill();
        for folder in ["root/io.containerd.metadata.v1.bolt", "root/io.containerd.grpc.v1.cri"] {
            fs::remove_dir_all(self.folder.join(folder)).unwrap();
        }
        self.resume();
    }

    pub(crate) fn pods(&self) -> Vec<String> {
        let list = self.ask("RuntimeService/ListPodSandbox", &Message::default()).unwrap();
        Fields::read(&list).all(1).map(|pod| Fields::read(pod).text(1)).collect()
    }

    /// Runs a pod as the kubelet asks for it, with a port of the node that leads to its 8080.
    ///
    /// # Errors
    /// The runtime's words.
    pub(crate) fn run_pod(&self, name: &str, host_port: Option<u16>) -> io::Result<Pod> {
        let config = pod_config(name, host_port);
        let request = Message::default().message(1, &config);
        let answer = self.ask("RuntimeService/RunPodSandbox", &request)?;
        let id = Fields::read(&answer).text(1);
        let request = Message::default().text(1, &id);
        let status = self.ask("RuntimeService/PodSandboxStatus", &request)?;
        let network = Fields::read(&status).message(1).message(5);
        let more = network.all(2).map(|ip| Fields::read(ip).text(1));
        let ips = std::iter::once(network.text(1)).chain(more);
        Ok(Pod { id, config, ips: ips.map(|ip| ip.parse().unwrap()).collect() })
    }

    /// Runs a container in a pod, and returns its id.
    pub(crate) fn run_container(&self, pod: &Pod, command: &[&str]) -> String {
        let metadata = Message::default().text(1, "main");
        let image = Message::default().text(1, IMAGE);
        let config = Message::default().message(1, &metadata).message(2, &image);
        let config = command.iter().fold(config, |config, word| config.text(3, word));
        let request =
            Message::default().text(1, &pod.id).message(2, &config).message(3, &pod.config);
        let answer = self.ask("RuntimeService/CreateContainer", &request).unwrap();
        let id = Fields::read(&answer).text(1);
        let request = Message::default().text(1, &id);
        self.ask("RuntimeService/StartContainer", &request).unwrap();
        id
    }

    /// What a command in a container says, and its exit code.
    pub(crate) fn exec(&self, container: &str, command: &[&str]) -> (String, u64) {
        let request = Message::default().text(1, container);
        let request = command.iter().fold(request, |request, word| request.text(2, word));
        let answer = self.ask("RuntimeService/ExecSync", &request.number(3, 20)).unwrap();
        let answer = Fields::read(&answer);
        (answer.text(1), answer.number(3))
    }

    /// Stops and removes a pod.
    pub(crate) fn remove_pod(&self, id: &str) {
        let request = Message::default().text(1, id);
        for method in ["RuntimeService/StopPodSandbox", "RuntimeService/RemovePodSandbox"] {
            self.ask(method, &request).unwrap();
        }
    }

    fn ask(&self, method: &str, message: &Message) -> io::Result<bytes::Bytes> {
        call(&self.folder.join("containerd.sock"), method, message)
    }

    fn ctr(&self, arguments: &[&std::ffi::OsStr]) {
        let socket = self.folder.join("containerd.sock");
        let mut ctr = self.inside(&["ctr", "--namespace", "k8s.io", "--address"]);
        let Output { status, stderr, .. } = ctr.arg(socket).args(arguments).output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    }

    /// A command in the namespaces of containerd.
    fn inside(&self, command: &[&str]) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &self.first, "--mount", "--pid", "--net", "--"]).args(command);
        nsenter.stdin(Stdio::null());
        nsenter
    }

    fn shown(&self) -> std::path::Display<'_> {
        self.folder.display()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // With the first process of its namespace the kernel ends all others.
        drop(self.holder.kill());
        drop(self.holder.wait());
        if let Some(daemon) = &mut self.daemon {
            drop(daemon.wait());
        }
    }
}

/// A pod that runs.
pub(crate) struct Pod {
    pub(crate) id: String,
    /// The main address first.
    pub(crate) ips: Vec<IpAddr>,
    config: Message,
}

/// All that the kubelet says of a pod which concerns its network.
fn pod_config(name: &str, host_port: Option<u16>) -> Message {
    let metadata =
        Message::default().text(1, name).text(2, &format!("uid-{name}")).text(3, "default");
    let dns = Message::default().text(1, "10.96.0.10").text(2, "svc.cluster.local");
    let dns = dns.text(3, "ndots:5");
    let annotation = Message::default().text(1, "example.com/note").text(2, "seen by plugins");
    let linux = Message::default().text(1, &format!("/kubepods/{name}"));
    let config = Message::default().message(1, &metadata).text(2, name).message(4, &dns);
    let config = config.message(7, &annotation).message(8, &linux);
    let mapping =
        host_port.map(|port| Message::default().number(2, 8080).number(3, u64::from(port)));
    mapping.into_iter().fold(config, |config, mapping| config.message(5, &mapping))
}

/// Gives the node's namespaces an empty `/run` and no cgroups; what is mounted in the former is seen by
/// all of the node.
fn hide() {
    let none: Option<&str> = None;
    for folder in ["/run", "/sys/fs/cgroup"] {
        mount(Some("none"), folder, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    }
    mount(none, "/run", none, MsFlags::MS_SHARED, none).unwrap();
}

fn set_up(folder: &Path) {
    symlink(format!("{PLUGINS}/loopback"), folder.join("bin/loopback")).unwrap();
    let crun = folder.join("crun");
    fs::write(&crun, "#!/bin/sh\nexec /usr/bin/crun --cgroup-manager=disabled \"$@\"\n").unwrap();
    fs::set_permissions(&crun, fs::Permissions::from_mode(0o755)).unwrap();
    let config = format!(
        r#"
version = 2
root = "{0}/root"
state = "{0}/state"
[grpc]
address = "{0}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
disable_cgroup = true
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{0}/bin"
conf_dir = "{0}/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{0}/crun"
"#,
        folder.display()
    );
    fs::write(folder.join("config.toml"), config).unwrap();
    fs::write(folder.join("image.tar"), image()).unwrap();
}

/// An archive as `docker save` writes it: one layer with busybox, and a page for its web server.
fn image() -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    let busybox = fs::read("/bin/busybox").unwrap();
    for (path, mode, bytes) in
        [("bin/busybox", 0o755, &*busybox), ("www/index.html", 0o644, b"orlop")]
    {
        append(&mut layer, path, mode, bytes);
    }
    let layer = layer.into_inner().unwrap();
    let digest: String = Sha256::digest(&layer).iter().map(|byte| format!("{byte:02x}")).collect();
    let config = serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Cmd": ["/bin/busybox", "sleep", "1000"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, "layer.tar", 0o644, &layer);
    append(&mut archive, "config.json", 0o644, config.to_string().as_bytes());
    append(&mut archive, "manifest.json", 0o644, manifest.to_string().as_bytes());
    archive.into_inner().unwrap()
}

fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes.len().try_into().unwrap());
    archive.append_data(&mut header, path, bytes).unwrap();
    archive.get_mut().flush().unwrap();
}

/// Waits for a value; fails when it does not come.
fn until<T>(mut get: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = get() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited too long");
        pause(Duration::from_millis(50));
    }
}
