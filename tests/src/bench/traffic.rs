//! The two ends of measured traffic, each a child process in its own namespace. Effects.
//!
//! The client reads one order a line from standard input (`crr 2000`, `rr 2000`) and answers with one
//! line `p50_ns p99_ns cpu_ns`; the server echoes requests of `SIZE` bytes and answers `cpu` with its
//! own processor time. Both are pinned to a core each, so that a round is the same work every time.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Bytes of a request and of its reply.
const SIZE: usize = 64;
/// No single operation of a round may take longer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What one order to the client showed.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    pub p50_ns: u64,
    pub p99_ns: u64,
    /// Processor time of the client for the whole order, system time included.
    pub cpu_ns: u64,
}

/// A child process that takes orders.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts this program again as `role` with `args` in a namespace.
    ///
    /// # Errors
    /// When it cannot be started or does not say `ready`.
    pub fn start(netns: &str, role: &str, args: &[&str]) -> Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        // `ip netns exec` would mount a new /sys, in which no cgroup is to be seen.
        let mut child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{netns}"))
            .arg(own)
            .arg(role)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {role} in {netns}"))?;
        let orders = child.stdin.take().context("stdin was piped")?;
        let answers = BufReader::new(child.stdout.take().context("stdout was piped")?);
        let mut worker = Self { child, orders, answers };
        let first = worker.answer()?;
        ensure!(first == "ready", "{role} in {netns} said {first:?} instead of ready");
        Ok(worker)
    }

    /// Sends an order and waits for its one line of answer.
    ///
    /// # Errors
    /// When the child has died or reports a failure.
    pub fn order(&mut self, order: &str) -> Result<String> {
        writeln!(self.orders, "{order}").with_context(|| format!("order {order}"))?;
        self.answer().with_context(|| format!("answer to {order}"))
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("read from the child")?;
        let line = line.trim();
        if line.is_empty() {
            bail!("the child ended");
        }
        ensure!(!line.starts_with("error"), "{line}");
        Ok(line.to_owned())
    }

    /// `order`, with the answer as latencies.
    ///
    /// # Errors
    /// As `order`.
    pub fn measure(&mut self, order: &str) -> Result<Latency> {
        let answer = self.order(order)?;
        let numbers: Vec<u64> = answer.split(' ').filter_map(|n| n.parse().ok()).collect();
        let [p50_ns, p99_ns, cpu_ns] = numbers[..] else { bail!("unexpected answer {answer:?}") };
        Ok(Latency { p50_ns, p99_ns, cpu_ns })
    }

    /// The child's processor time so far, in nanoseconds.
    ///
    /// # Errors
    /// As `order`.
    pub fn cpu_ns(&mut self) -> Result<u64> {
        self.order("cpu")?.parse().context("a number")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The client's life: `target` is what it connects to. With `cgroup`, it moves there first.
///
/// # Errors
/// When standard input or output break; failures of traffic are answered as `error …` lines.
pub fn client(target: SocketAddrV4, cgroup: Option<&str>) -> Result<()> {
    if let Some(dir) = cgroup {
        std::fs::write(format!("{dir}/cgroup.procs"), "0").context("enter the cgroup")?;
    }
    pin(0);
    say("ready")?;
    for line in std::io::stdin().lines() {
        let line = line.context("read an order")?;
        let answer = match order(target, &line) {
            Ok(answer) => answer,
            Err(error) => format!("error {error:#}"),
        };
        say(&answer)?;
    }
    Ok(())
}

fn order(target: SocketAddrV4, line: &str) -> Result<String> {
    if line == "cpu" {
        return Ok(cpu_ns()?.to_string());
    }
    let (kind, count) = line.split_once(' ').context("an order is a kind and a count")?;
    let count: usize = count.parse().context("count")?;
    let before = cpu_ns()?;
    let mut times = Vec::with_capacity(count);
    match kind {
        "crr" => {
            for _ in 0..count {
                let start = Instant::now();
                let mut stream = connect(target)?;
                exchange(&mut stream)?;
                times.push(start.elapsed());
            }
        }
        "rr" => {
            let mut stream = connect(target)?;
            for _ in 0..count {
                let start = Instant::now();
                exchange(&mut stream)?;
                times.push(start.elapsed());
            }
        }
        _ => bail!("unknown order {kind}"),
    }
    let cpu = cpu_ns()?.saturating_sub(before);
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).map_or(0, Duration::as_nanos);
    Ok(format!("{} {} {cpu}", at(50), at(99)))
}

fn connect(target: SocketAddrV4) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target.into(), TIMEOUT).context("connect")?;
    stream.set_nodelay(true).context("nodelay")?;
    stream.set_read_timeout(Some(TIMEOUT)).context("timeout")?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    let mut buffer = [0u8; SIZE];
    stream.write_all(&buffer).context("request")?;
    stream.read_exact(&mut buffer).context("reply")
}

/// The server's life: echoes on `port` of every address until standard input ends.
///
/// # Errors
/// When the port cannot be bound.
pub fn server(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("bind")?;
    drop(std::thread::spawn(move || {
        pin(1);
        for stream in listener.incoming().map_while(Result::ok) {
            echo(stream);
        }
    }));
    say("ready")?;
    for line in std::io::stdin().lines() {
        drop(line.context("read an order")?);
        say(&cpu_ns()?.to_string())?;
    }
    Ok(())
}

fn echo(mut stream: TcpStream) {
    let _nodelay: bool = stream.set_nodelay(true).is_ok();
    let mut buffer = [0u8; SIZE];
    while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
}

/// Prints one line of answer.
///
/// # Errors
/// When standard output is closed.
pub fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("answer")
}

/// User and system time of this process so far.
fn cpu_ns() -> Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/schedstat").context("read schedstat")?;
    let main: u64 = stat.split(' ').next().and_then(|n| n.parse().ok()).context("a number")?;
    let mut sum = main;
    for task in std::fs::read_dir("/proc/self/task").context("list threads")? {
        let path = task.context("a thread")?.path();
        if path.file_name().and_then(|n| n.to_str()) == Some(&std::process::id().to_string()) {
            continue;
        }
        let stat = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        sum += stat.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// Pins the calling thread to a core; a machine with fewer cores leaves it where it is.
fn pin(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    let _pinned: bool = rustix::thread::sched_setaffinity(None, &set).is_ok();
}
