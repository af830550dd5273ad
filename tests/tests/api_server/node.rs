//! The node: a network namespace with servers and an agent, and a client outside.

use std::{
    cell::RefCell,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{
    manifest::Manifest,
    place::ip,
    server,
    space::{Space, pause},
};

pub(crate) const NAME: &str = "node-1";
pub(crate) const IP: &str = "192.0.2.1";
/// The client outside, where a server is as well.
pub(crate) const FAR: &str = "192.0.2.99";
/// What a process of this test is to be: `server FOLDER` or `agent FOLDER`.
pub(crate) const ROLE: &str = "ORLOP_ROLE";
/// Longest for one connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// The name of a process' part, and what it does in a folder.
type Part<'a> = (&'a str, fn(&Path));

/// In a process that a test has made of itself, does what that is for, to its end. `others` are parts by their names
/// beside those of a server and an agent. Gives whether it was such a process.
pub(crate) fn play(others: &[Part<'_>]) -> bool {
    let Some(role) = std::env::var_os(ROLE) else { return false };
    let role = role.into_string().unwrap();
    let (role, folder) = role.split_once(' ').unwrap();
    let folder = Path::new(folder);
    if let Some((_, part)) = others.iter().find(|(name, _)| *name == role) {
        part(folder);
        return true;
    }
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match role {
        "server" => runtime.block_on(server::run_ours(folder)),
        "agent" => runtime.block_on(run_agent(folder)),
        _ => panic!("{role}"),
    }
    true
}

async fn run_agent(folder: &Path) {
    let mut flags = Manifest::read().flags(&folder.join("agent/kubeconfig"), (NAME, IP)).run;
    flags.state_dir = Some(folder.join("state"));
    flags.run_dir = Some(folder.join("run"));
    node_agent::agent::run(flags.parse(NAME).unwrap()).await.unwrap();
}

/// The node as a cluster has it.
pub(crate) fn node_object() -> Value {
    let spec = json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]});
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME}, "spec": spec})
}

/// The patch of its status that says where it is.
pub(crate) fn addresses() -> String {
    json!({"status": {"addresses": [{"type": "InternalIP", "address": IP}]}}).to_string()
}

/// Servers that answer everybody with their port.
fn serve(ports: &'static [u16]) {
    for port in ports {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).unwrap();
        let _tcp = thread::spawn(move || {
            for stream in listener.incoming() {
                // Who asks may be gone.
                let _gone = write!(stream.unwrap(), "{port}");
            }
        });
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, *port)).unwrap();
        let _udp = thread::spawn(move || {
            while let Ok((_, from)) = socket.recv_from(&mut [0]) {
                let _gone = socket.send_to(port.to_string().as_bytes(), from);
            }
        });
    }
}

/// This test once more, in another role. Its name is its thread's.
pub(crate) fn itself(role: &str, folder: &Path) -> Command {
    let name = thread::current().name().unwrap().to_owned();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--nocapture"]);
    command.env(ROLE, format!("{role} {}", folder.display()));
    command
}

/// Adds what a process says to a file.
pub(crate) fn said_to(command: &mut Command, file: &Path) {
    let file = fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
    command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
}

pub(crate) struct Node {
    pub(crate) space: Space,
    pub(crate) outside: Space,
    /// Of all that is stored, the server's things too.
    pub(crate) folder: tempfile::TempDir,
    cgroup: PathBuf,
    agent: RefCell<Option<Child>>,
}

impl Node {
    pub(crate) fn new() -> Self {
        let (space, outside) = (Space::new(), Space::new());
        let tid = space.tid;
        outside.run(move || {
            ip(&format!(
                "link add eth0 type veth peer name eth0 netns {tid}
                 addr add {FAR}/24 dev eth0
                 link set eth0 up
                 route add 10.96.0.0/16 via {IP}
                 route add 203.0.113.0/24 via {IP}"
            ));
            serve(&[8083]);
        });
        space.run(|| {
            ip(&format!(
                "addr add {IP}/24 dev eth0
                 link set eth0 up
                 route add default via {FAR}"
            ));
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            serve(&[8081, 8082]);
        });
        let folder = tempfile::tempdir().unwrap();
        let hybrid = Path::new("/sys/fs/cgroup/unified");
        let root = if hybrid.is_dir() { hybrid } else { Path::new("/sys/fs/cgroup") };
        let cgroup =
            root.join(folder.path().file_name().unwrap().to_str().unwrap().replace('.', "orlop-"));
        fs::create_dir(&cgroup).unwrap();
        Self { space, outside, folder, cgroup, agent: RefCell::default() }
    }

    /// Runs a program in the node's namespaces.
    pub(crate) fn spawn(&self, mut command: Command) -> Child {
        self.space.run(move || command.spawn().unwrap())
    }

    /// The same, in the node's cgroup.
    pub(crate) fn within(&self, program: &Path, arguments: &[&str]) -> Command {
        let procs = self.cgroup.join("cgroup.procs");
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(procs);
        command.arg(program).args(arguments);
        command
    }

    /// An agent to which the node's cgroup is the root of all, as that of a node is.
    pub(crate) fn start_agent(&self, kubeconfig: &Path) {
        assert_eq!(kubeconfig, self.folder.path().join("agent/kubeconfig"));
        let mounts =
            r#"mount -t cgroup2 none /sys/fs/cgroup && mount --bind "$0" /sys/fs/bpf && exec "$@""#;
        let bpf = self.space.bpf.to_str().unwrap().to_owned();
        let unshare = ["--cgroup", "--mount", "sh", "-c", mounts, &bpf];
        let itself = itself("agent", self.folder.path());
        let mut command = self.within(Path::new("unshare"), &unshare);
        command.arg(itself.get_program()).args(itself.get_args());
        let role = itself.get_envs().find_map(|(name, value)| (name == ROLE).then_some(value?));
        command.env(ROLE, role.unwrap());
        said_to(&mut command, &self.folder.path().join("agent.log"));
        self.agent.replace(Some(self.spawn(command)));
    }

    pub(crate) fn kill_agent(&self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// Makes the agent stand still, or go on.
    pub(crate) fn stop_agent(&self, still: bool) {
        let signal = if still { Signal::SIGSTOP } else { Signal::SIGCONT };
        let agent = self.agent.borrow().as_ref().unwrap().id();
        kill(Pid::from_raw(agent.try_into().unwrap()), signal).unwrap();
    }

    pub(crate) fn agent_said(&self) -> String {
        fs::read_to_string(self.folder.path().join("agent.log")).unwrap()
    }

    /// How many services the agent has read, once it has read all; `None` before.
    pub(crate) fn services(&self) -> Option<usize> {
        let status =
            node_agent::debug::ask(&self.folder.path().join("run/agent.sock"), "status").ok()?;
        let services = status["services"].as_u64()?;
        (status["synced"] == true).then(|| services.try_into().unwrap())
    }

    /// What answers a process of the node.
    pub(crate) fn ask(&self, ip: &str, port: u16) -> Result<String, String> {
        let seconds = PATIENCE.as_secs().to_string();
        let port = port.to_string();
        let mut command =
            self.within(Path::new("timeout"), &[&seconds, "busybox", "nc", ip, &port]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = self.spawn(command).wait_with_output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if ended.status.success() { Ok(text(&ended.stdout)) } else { Err(text(&ended.stderr)) }
    }

    /// What answers a client outside at a port of the node.
    pub(crate) fn ask_from_outside(&self, port: u16) -> Result<String, String> {
        self.outside
            .run(move || {
                let address = SocketAddr::new(IP.parse().unwrap(), port);
                let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            })
            .map_err(|error: std::io::Error| error.to_string())
    }
}

#[expect(clippy::print_stderr, reason = "what a failed test is explained by")]
impl Drop for Node {
    fn drop(&mut self) {
        self.kill_agent();
        // What was in it may still be ending.
        let start = Instant::now();
        while fs::remove_dir(&self.cgroup).is_err() && start.elapsed() < PATIENCE {
            pause(Duration::from_millis(20));
        }
        if thread::panicking() {
            let said = fs::read_to_string(self.folder.path().join("agent.log"));
            eprintln!("the agent said:\n{}", said.unwrap_or_default());
        }
    }
}
