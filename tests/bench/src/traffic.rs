//! The two ends of measured traffic, each a child process in its own namespace. Effects.
//!
//! The client reads one order a line from standard input: `crr 2000` and `rr 2000` are answered with one
//! line `p50_ns p99_ns cpu_ns`, `bulk 100` (milliseconds) with `bytes elapsed_ns cpu_ns`. The server echoes
//! requests of `SIZE` bytes, swallows bulk data, and answers `cpu` with its own processor time. Both are
//! pinned to one core and go before other processes, so that a round is the same work every time: the path's
//! and that of two switches between processes. On a core each most of a round is the interrupt by which one
//! idle virtual core wakes the other (25 of 50 µs on the reference machine), the same for every subject.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Port of the echo server in the server pod.
pub const SERVER_PORT: u16 = 8080;
/// Bytes of a request and of its reply.
const SIZE: usize = 64;
/// Bytes of one write or read of bulk data.
const CHUNK: usize = 128 << 10;
/// First byte of a request that is to be echoed.
const ECHO: u8 = 0;
/// First byte of a connection that carries bulk data: read to its end, answered by the count.
const BULK: u8 = 1;
/// Goes before everything without a real-time priority. A priority in the time-sharing class is not
/// enough: on a busy machine a woken process still waits for the end of another's slice (8 ms at p99).
const REAL_TIME: [&str; 3] = ["chrt", "--fifo", "1"];
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

/// What bulk transfer showed.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    pub bytes: u64,
    /// From the first write until the server had read all.
    pub elapsed_ns: u64,
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
    pub fn start(netns: &str, role: &str, args: &[String]) -> Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(REAL_TIME[0]);
        // What programs a node takes its time like any other process.
        if matches!(role, "client" | "server" | "hold") {
            command.args(&REAL_TIME[1..]).arg("nsenter");
        } else {
            command = Command::new("nsenter");
        }
        // `ip netns exec` would mount a new /sys, in which no cgroup is to be seen.
        let mut child = command
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

    /// Packets that a device of its namespace has received.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn received(&self, device: &str) -> Result<u64> {
        let path = format!("/proc/{}/net/dev", self.child.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let start = format!("{device}:");
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&start));
        let packets = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        packets.with_context(|| format!("no {device} in {path}"))
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
        let [p50_ns, p99_ns, cpu_ns] = self.numbers(order)?;
        Ok(Latency { p50_ns, p99_ns, cpu_ns })
    }

    /// `order`, with the answer as a transfer.
    ///
    /// # Errors
    /// As `order`.
    pub fn bulk(&mut self, order: &str) -> Result<Bulk> {
        let [bytes, elapsed_ns, cpu_ns] = self.numbers(order)?;
        Ok(Bulk { bytes, elapsed_ns, cpu_ns })
    }

    /// `order`, with the answer as so many numbers.
    ///
    /// # Errors
    /// As `order`; when the answer is anything else.
    pub fn numbers<const N: usize>(&mut self, order: &str) -> Result<[u64; N]> {
        let answer = self.order(order)?;
        let numbers: Option<Vec<u64>> = answer.split(' ').map(|n| n.parse().ok()).collect();
        let numbers = numbers.and_then(|numbers| <[u64; N]>::try_from(numbers).ok());
        numbers.with_context(|| format!("unexpected answer {answer:?}"))
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
    if kind == "bulk" {
        let time = Duration::from_millis(count.try_into().context("milliseconds")?);
        let (bytes, elapsed) = bulk(target, time)?;
        let cpu = cpu_ns()?.saturating_sub(before);
        return Ok(format!("{bytes} {} {cpu}", elapsed.as_nanos()));
    }
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
    let mut buffer = [ECHO; SIZE];
    stream.write_all(&buffer).context("request")?;
    stream.read_exact(&mut buffer).context("reply")
}

/// Writes as much as goes through in the given time; the server says how much arrived.
fn bulk(target: SocketAddrV4, time: Duration) -> Result<(u64, Duration)> {
    let mut stream = connect(target)?;
    let chunk = vec![BULK; CHUNK];
    let start = Instant::now();
    while start.elapsed() < time {
        stream.write_all(&chunk).context("send")?;
    }
    stream.shutdown(std::net::Shutdown::Write).context("end")?;
    let mut count = [0u8; 8];
    stream.read_exact(&mut count).context("the server's count")?;
    Ok((u64::from_be_bytes(count), start.elapsed()))
}

/// The server's life: echoes on `port` of every address until standard input ends.
///
/// # Errors
/// When the port cannot be bound.
pub fn server(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("bind")?;
    drop(std::thread::spawn(move || {
        pin(0);
        let mut buffer = vec![0u8; CHUNK];
        for stream in listener.incoming().map_while(Result::ok) {
            serve(stream, &mut buffer);
        }
    }));
    say("ready")?;
    for line in std::io::stdin().lines() {
        drop(line.context("read an order")?);
        say(&cpu_ns()?.to_string())?;
    }
    Ok(())
}

/// One connection: echoes requests, or counts bulk data. `buffer` has `CHUNK` bytes.
fn serve(mut stream: TcpStream, buffer: &mut [u8]) {
    let _nodelay: bool = stream.set_nodelay(true).is_ok();
    let mut request = [0u8; SIZE];
    while stream.read_exact(&mut request).is_ok() {
        if request.first() == Some(&BULK) {
            let mut bytes = 64_u64;
            while let Ok(count @ 1..) = stream.read(buffer) {
                bytes += u64::try_from(count).unwrap_or(0);
            }
            // A client that has gone finds out by itself.
            let _told: bool = stream.write_all(&bytes.to_be_bytes()).is_ok();
            return;
        }
        if stream.write_all(&request).is_err() {
            return;
        }
    }
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
///
/// # Errors
/// When `/proc` does not tell.
pub fn cpu_ns() -> Result<u64> {
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
pub fn pin(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    let _pinned: bool = rustix::thread::sched_setaffinity(None, &set).is_ok();
}
