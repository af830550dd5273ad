//! `bench agent`: what a whole `node-agent` takes beside a real control plane, with a handful of services and
//! with many: memory of the agent and of its DNS process, and their processor time while nothing happens. Effects.
//!
//! Both programs are those that run on nodes. They are in a network namespace of their own; the agent has a mount
//! and a cgroup namespace too, so that neither its pins nor its programs at sockets meet the machine. Its kubelet
//! part is left out: it needs a machine that is a node, with the controllers of cgroup version 2.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    chart::{Bar, Chart, Content, Panel},
    hosts::{self, Cgroup, Node},
    kube_proxy,
    measure::float,
    output::{Output, progress},
    report::{self, Lane, Parameters, Row, Sample},
    tool,
    traffic::{Worker, say},
};

/// Services beside the cluster's own of an idle node.
const HANDFUL: u32 = 5;
/// Requests that are under way at a time while objects are made.
const PARALLEL: usize = 32;
/// A start, or the last of many services programmed, takes no longer.
const PATIENCE: Duration = Duration::from_secs(300);
/// Range of service addresses: that of `kube_proxy`'s set.
const SERVICE_CIDR: &str = "10.96.0.0/12";
const NAME: &str = "bench-node";
/// Where the agent serves its metrics unless it is told otherwise.
const METRICS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 10_249);

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Wish {
    /// Numbers of services.
    #[arg(long, value_delimiter = ',')]
    pub services: Vec<u32>,
    /// Endpoints of each.
    #[arg(long, default_value_t = 4)]
    pub endpoints: u32,
    /// Given by the command that runs this program; there are no peers.
    #[arg(long, hide = true)]
    pub against: Option<String>,
    /// The agent's program.
    #[arg(long)]
    pub node_agent: PathBuf,
    /// The control plane's.
    #[arg(long)]
    pub control_plane: PathBuf,
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// Starts a control plane and an agent, and measures at each number of services.
///
/// # Errors
/// When one of them does not start, or does not program what it was given.
pub fn run(wish: &Wish) -> Result<()> {
    // While nothing happens; the time that is promised for, and one for a first look.
    let idle = Duration::from_secs(if wish.quick { 10 } else { 60 });
    let cluster = Cluster::start(wish)?;
    let mut loader = Worker::start(&cluster.node.name, "agent-load", &cluster.loader_flags(wish))?;
    let agent = Agent::start(wish, &cluster)?;
    let (mut lanes, mut samples) = (Vec::new(), Vec::new());
    let mut sizes: Vec<u32> = std::iter::once(HANDFUL).chain(wish.services.clone()).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for (lane, services) in sizes.into_iter().enumerate() {
        progress(&format!("{services} services x {} endpoints", wish.endpoints));
        let [made_ms] = loader.numbers(&format!("make {services}"))?;
        // All of them, and the API server's own.
        let settled = agent.settle(&mut loader, services + 1)?;
        progress(&format!("  made in {made_ms} ms, the last one programmed {settled:?} later"));
        // What was needed only on the way is given back, and the snapshot is written.
        pause(Duration::from_secs(15));
        let before = agent.cpu_ns()?;
        pause(idle);
        let after = agent.cpu_ns()?;
        let share = |then: u64, now: u64| {
            float(now.saturating_sub(then)) / 1e9 / idle.as_secs_f64() * 100.0
        };
        let memory = |pid, field| tool::memory(pid, field).map(float).context("memory");
        let (own, dns) = (agent.child.id(), agent.dns()?);
        for (metric, unit, value) in [
            ("rss", "B", memory(own, "VmRSS")?),
            ("peak_rss", "B", memory(own, "VmHWM")?),
            ("rss_dns", "B", memory(dns, "VmRSS")?),
            ("idle_cpu", "%", share(before[0], after[0])),
            ("idle_cpu_dns", "%", share(before[1], after[1])),
            ("programmed", "ms", settled.as_secs_f64() * 1e3),
        ] {
            samples.push(Sample { lane, round: 0, metric, unit, value });
        }
        let parameters =
            Parameters::from([("services", json!(services)), ("endpoints", json!(wish.endpoints))]);
        lanes.push(Lane { subject: "orlop", parameters, base: None });
    }
    let rows = report::rows(&lanes, &samples);
    wish.output.finish("agent", &rows, |note| Chart {
        title: "What a whole node agent takes".to_owned(),
        note: format!("cargo xtask bench agent · {note}"),
        panels: vec![
            panel(&rows, "rss", "agent, resident bytes"),
            panel(&rows, "rss_dns", "DNS, resident bytes"),
        ],
    })
}

fn panel(rows: &[Row], metric: &str, title: &str) -> Panel {
    let bar = |row: &Row| Bar {
        name: row.parameters.get("services").map(|n| format!("{n} services")).unwrap_or_default(),
        subject: row.subject,
        value: row.median,
    };
    let bars = rows.iter().filter(|row| row.metric == metric).map(bar);
    Panel { title: title.to_owned(), content: Content::Bars(bars.collect()) }
}

/// A control plane in the namespace of the node, ended on drop.
struct Cluster {
    node: Node,
    _far: Node,
    folder: Folder,
    server: Child,
}

impl Cluster {
    fn start(wish: &Wish) -> Result<Self> {
        let (node, far) = (Node::new("agent", 1)?, Node::new("far", 2)?);
        hosts::join(&node, &far)?;
        let folder = Folder::new()?;
        let data = folder.0.join("server");
        let log = fs::File::create(folder.0.join("server.log")).context("the server's log")?;
        let address = node.ip().to_string();
        let server = inside(&node)
            .arg(&wish.control_plane)
            .args(["run", "--service-cidr", SERVICE_CIDR, "--advertise-address", &address])
            .arg("--data-dir")
            .arg(&data)
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .context("start the control plane")?;
        let cluster = Self { node, _far: far, folder, server };
        let start = Instant::now();
        loop {
            match cluster.ask(wish, &["kubeconfig"]) {
                Ok(text) => {
                    fs::write(cluster.kubeconfig(), text).context("write the kubeconfig")?;
                    return Ok(cluster);
                }
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_not_yet) => pause(Duration::from_millis(100)),
            }
        }
    }

    /// What a command of the control plane says about the one that runs.
    fn ask(&self, wish: &Wish, words: &[&str]) -> Result<String> {
        let mut command = inside(&self.node);
        command.arg(&wish.control_plane).args(words).arg("--data-dir");
        let said = command.arg(self.folder.0.join("server")).output().context("ask the server")?;
        ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr).trim());
        Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.0.join("admin.kubeconfig")
    }

    fn loader_flags(&self, wish: &Wish) -> Vec<String> {
        vec![
            format!("--kubeconfig={}", self.kubeconfig().display()),
            format!("--endpoints={}", wish.endpoints),
            format!("--node-ip={}", self.node.ip()),
        ]
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.server.kill());
        drop(self.server.wait());
    }
}

/// The agent, ended on drop with the DNS process that it left.
struct Agent {
    child: Child,
    log: PathBuf,
    _cgroup: Cgroup,
}

impl Agent {
    fn start(wish: &Wish, cluster: &Cluster) -> Result<Self> {
        let token = cluster.ask(wish, &["token"])?;
        let cgroup = Cgroup::new(&format!("ob{}-agent", std::process::id()))?;
        let folder = &cluster.folder.0;
        let (run_dir, log) = (folder.join("run"), folder.join("agent.log"));
        // The cgroup becomes the root of what the agent sees; what it writes into the machine's folders stays
        // in its own mount namespace.
        let script = "echo $$ > $0/cgroup.procs && exec unshare --mount --cgroup sh -ec '\
             mount -t cgroup2 none /sys/fs/cgroup; mount -t bpf none /sys/fs/bpf; \
             mount -t tmpfs none /mnt; \
             for folder in etc opt; do mkdir /mnt/$folder /mnt/$folder.work; \
             mount -t overlay none /$folder \
             -o lowerdir=/$folder,upperdir=/mnt/$folder,workdir=/mnt/$folder.work; done; \
             exec \"$@\"' \"$@\"";
        let address = cluster.node.ip();
        let stderr = fs::File::create(&log).context("the agent's log")?;
        let child = inside(&cluster.node)
            .args(["sh", "-c", script, &cgroup.path(), "agent"])
            .arg(&wish.node_agent)
            .args(["run", "--components", "overlay,dataplane,cni,dns", "--node-name", NAME])
            .args(["--service-cidr", SERVICE_CIDR, "--token", &token])
            .arg(format!("--server=https://{address}:6443"))
            .arg(format!("--node-ip={address}"))
            .arg(format!("--kubeconfig={}", folder.join("agent.kubeconfig").display()))
            .arg(format!("--state-dir={}", folder.join("state").display()))
            .arg(format!("--run-dir={}", run_dir.display()))
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context("start the agent")?;
        Ok(Self { child, log, _cgroup: cgroup })
    }

    /// Waits until so many services are programmed and DNS answers, and says how long that took.
    fn settle(&self, loader: &mut Worker, services: u32) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let programmed = loader.numbers("rows").map_or(0, |[rows]| rows);
            if programmed >= services.into() && self.dns().is_ok() {
                return Ok(start.elapsed());
            }
            if start.elapsed() > PATIENCE {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                bail!("{programmed} of {services} programmed in time\n{}", last.join("\n"));
            }
            // A scrape goes through the maps.
            pause(Duration::from_secs(1));
        }
    }

    /// Its DNS server, a process of its own in the same network namespace.
    fn dns(&self) -> Result<u32> {
        let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let own = space(&self.child.id().to_string()).context("the agent has ended")?;
        for entry in fs::read_dir("/proc").context("list processes")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
                continue;
            };
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let is_dns = words.split(|byte| *byte == 0).nth(1) == Some(b"dns");
            if is_dns && space(pid) == Some(own.clone()) {
                return pid.parse().context("a number");
            }
        }
        bail!("no DNS process")
    }

    /// Processor time so far: of the agent, of its DNS process.
    fn cpu_ns(&self) -> Result<[u64; 2]> {
        Ok([tool::cpu_ns(self.child.id())?, tool::cpu_ns(self.dns()?)?])
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Ok(dns) = self.dns() {
            let pid = i32::try_from(dns).ok().and_then(rustix::process::Pid::from_raw);
            let _ended =
                pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A folder of this run, removed on drop. In memory, as the server syncs every write, and its disk is not
/// what is measured.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = Path::new("/dev/shm").join(format!("orlop-bench-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A command in a node's network namespace, with this machine's other namespaces.
fn inside(node: &Node) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", node.name)).stdin(Stdio::null());
    command
}

#[expect(clippy::disallowed_methods, reason = "no runtime here whose worker could be blocked")]
fn pause(time: Duration) {
    thread::sleep(time);
}

/// What the loading child is told.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadFlags {
    #[arg(long)]
    pub kubeconfig: PathBuf,
    #[arg(long)]
    pub endpoints: u32,
    #[arg(long)]
    pub node_ip: Ipv4Addr,
}

/// The child's life: `make N` makes services until there are N, and says how many milliseconds it took;
/// `rows` says how many the agent has programmed.
///
/// # Errors
/// When the server cannot be reached; failures of an order are answered as `error …` lines.
pub async fn load(flags: LoadFlags) -> Result<()> {
    let server = Server::new(&flags.kubeconfig).await?;
    server.make("/api/v1/namespaces", &json!({"metadata": {"name": "bench"}})).await?;
    // As its kubelet would register it, so that it has a pod network.
    let address = json!({"type": "InternalIP", "address": flags.node_ip});
    let node = json!({"metadata": {"name": NAME}, "status": {"addresses": [address]}});
    server.make("/api/v1/nodes", &node).await?;
    say("ready")?;
    let mut present = 0;
    for line in std::io::stdin().lines() {
        let line = line.context("read an order")?;
        let answer = match line.split_once(' ') {
            None if line == "rows" => rows().map(u128::from),
            Some(("make", count)) => {
                let (start, count) = (Instant::now(), count.parse().context("count")?);
                let filled = server.fill(present..count, flags.endpoints).await;
                present = count;
                filled.map(|()| start.elapsed().as_millis())
            }
            _ => bail!("unknown order {line}"),
        };
        match answer {
            Ok(number) => say(&number.to_string())?,
            Err(error) => say(&format!("error {error:#}"))?,
        }
    }
    Ok(())
}

/// Services that the agent has programmed, by its metrics.
fn rows() -> Result<u64> {
    let mut stream = TcpStream::connect(METRICS).context("connect to the agent's metrics")?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("read the metrics")?;
    let name = "dataplane_map_rows{map=\"SERVICES\"} ";
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.with_context(|| format!("no {name}"))
}

/// The API server as a client sees it.
#[derive(Clone)]
struct Server(kube::Client);

impl Server {
    async fn new(kubeconfig: &Path) -> Result<Self> {
        Ok(Self(node_agent::join::client(kubeconfig).await?.0))
    }

    /// Makes services of these numbers with a slice each, many at a time.
    async fn fill(&self, numbers: std::ops::Range<u32>, endpoints: u32) -> Result<()> {
        let numbers = std::sync::Arc::new(tokio::sync::Mutex::new(numbers));
        let mut workers = tokio::task::JoinSet::new();
        for _worker in 0..PARALLEL {
            let (server, numbers) = (self.clone(), std::sync::Arc::clone(&numbers));
            workers.spawn(async move {
                loop {
                    let Some(number) = numbers.lock().await.next() else { return Ok(()) };
                    let service = kube_proxy::service(number, endpoints);
                    server
                        .make(&path("discovery.k8s.io/v1", "endpointslices"), &slice(&service))
                        .await?;
                    server.make("/api/v1/namespaces/bench/services", &object(&service)).await?;
                }
            });
        }
        while let Some(ended) = workers.join_next().await {
            let made: Result<()> = ended.context("a worker")?;
            made?;
        }
        Ok(())
    }

    async fn make(&self, path: &str, object: &Value) -> Result<()> {
        let request = http::Request::post(path)
            .header("content-type", "application/json")
            .body(object.to_string().into_bytes())?;
        let _made: Value = self.0.request(request).await.with_context(|| path.to_owned())?;
        Ok(())
    }
}

fn path(group: &str, resource: &str) -> String {
    format!("/apis/{group}/namespaces/bench/{resource}")
}

fn object(service: &kube_proxy::Service) -> Value {
    json!({
        "metadata": {"name": format!("service-{}", service.number)},
        "spec": {
            "clusterIP": service.address.ip(),
            "ports": [{"name": "http", "port": service.address.port()}],
        },
    })
}

fn slice(service: &kube_proxy::Service) -> Value {
    let endpoints = service.endpoints.iter();
    let port = service.endpoints.first().map_or(0, std::net::SocketAddrV4::port);
    let name = format!("service-{}", service.number);
    let endpoint = |ip: &Ipv4Addr| json!({"addresses": [ip], "conditions": {"ready": true}});
    json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": endpoints.map(|one| endpoint(one.ip())).collect::<Value>(),
    })
}
