//! Runs a peer's tool and watches what it costs. Effects.

use std::{
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

/// Longer than this nobody waits for rules; the tool is then ended, which leaves its rules undone.
pub const PATIENCE: Duration = Duration::from_secs(100);
/// How often the tool is looked at.
const GLANCE: Duration = Duration::from_millis(1);
/// Clock ticks of `/proc/PID/stat` in a second (`USER_HZ`, the same on every architecture we build for).
const TICKS: u64 = 100;

/// How a run ended.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    Done(Cost),
    GivenUp,
}

/// What a run took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub elapsed_ns: u64,
    /// In steps of 10 ms.
    pub cpu_ns: u64,
    pub peak_rss: u64,
}

/// Runs a command in a namespace with the given standard input.
///
/// # Errors
/// When it cannot be started or fails; its words are in the error.
pub fn run(netns: &str, command: &[&str], input: &str) -> Result<Outcome> {
    let name = command.join(" ");
    let before = children_cpu_ns()?;
    let start = Instant::now();
    let mut child = Command::new("ip")
        .args(["netns", "exec", netns])
        .args(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let mut stdin = child.stdin.take().context("stdin was piped")?;
    let watched = thread::scope(|scope| {
        // A tool that fails stops reading; its exit tells.
        let feeder = scope.spawn(move || stdin.write_all(input.as_bytes()).is_ok());
        let watched = watch(&mut child, start);
        drop(feeder.join());
        watched
    })?;
    let Some((success, peak_rss)) = watched else { return Ok(Outcome::GivenUp) };
    let elapsed_ns = u64::try_from(start.elapsed().as_nanos()).context("nanoseconds")?;
    let mut words = String::new();
    child.stderr.take().context("stderr was piped")?.read_to_string(&mut words)?;
    ensure!(success, "{name}: {}", words.lines().next().unwrap_or("failed"));
    let cpu_ns = children_cpu_ns()?.saturating_sub(before);
    Ok(Outcome::Done(Cost { elapsed_ns, cpu_ns, peak_rss }))
}

/// Waits for its end: whether it succeeded, and the most memory it was seen with. `None` when it was
/// ended.
#[expect(clippy::disallowed_methods, reason = "no runtime here whose worker could be blocked")]
fn watch(child: &mut Child, start: Instant) -> Result<Option<(bool, u64)>> {
    let mut peak = 0;
    loop {
        peak = peak.max(memory(child.id(), "VmHWM").unwrap_or(0));
        if let Some(status) = child.try_wait().context("wait")? {
            return Ok(Some((status.success(), peak)));
        }
        if start.elapsed() > PATIENCE {
            child.kill().context("end it")?;
            child.wait().context("wait")?;
            return Ok(None);
        }
        thread::sleep(GLANCE);
    }
}

/// A field of `/proc/PID/status` in bytes.
#[must_use]
pub fn memory(pid: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Processor time of a process so far, in steps of 10 ms.
///
/// # Errors
/// When there is no such process.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    stat_ns(&pid.to_string(), [14, 15])
}

/// Processor time of all children that were waited for.
fn children_cpu_ns() -> Result<u64> {
    stat_ns("self", [16, 17])
}

/// The sum of fields of `/proc/PID/stat` that are ticks (proc_pid_stat(5) numbers them).
fn stat_ns(process: &str, fields: [usize; 2]) -> Result<u64> {
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // After the name, which may hold blanks, come the fields from the third on.
    let rest = stat.rsplit(')').next().context("fields")?;
    let field = |n: usize| rest.split_whitespace().nth(n - 3).and_then(|n| n.parse::<u64>().ok());
    let ticks: Option<u64> = fields.into_iter().map(field).sum();
    Ok(ticks.context("two numbers of ticks")? * (1_000_000_000 / TICKS))
}
