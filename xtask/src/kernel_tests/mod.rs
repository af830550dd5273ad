//! The kernel matrix: the very test programs that ran on this machine's kernel run once more in a VM for
//! each Debian kernel that is promised. One boot a kernel, one program after the other, and the kernels beside
//! each other where there are processors for it.

mod disk;
mod progress;

use std::{
    fs,
    io::{self, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};

use self::progress::Progress;
use crate::{
    cluster::Cluster,
    debian, down,
    exec::{cmd, stdout},
    kernel::{self, Kernel},
    paths::Paths,
    rootfs,
    setup::{self, Need},
    step, vm,
};

/// The kernels of Debian 12 and of its backports: the oldest that is promised, and the next long-term one.
pub(crate) const SERIES: [&str; 2] = ["6.1", "6.12"];

/// Longest that one test program may take: TCG is 10 times slower than this machine, which needs a minute for
/// the slowest.
const PROGRAM_LIMIT: Duration = Duration::from_secs(900);
/// Longest for all of one kernel, boot included.
const KERNEL_LIMIT: Duration = Duration::from_secs(45 * 60);
/// For a test process and the eBPF maps that it makes; QEMU takes it from the host only as it is touched.
const MEMORY_MIB: u32 = 2048;
/// How often the VM's console is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Numbers and names of one kernel's run.
#[derive(Debug, Default)]
pub(crate) struct Ran {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    /// What the tests said that they did not do.
    pub(crate) skipped: Vec<String>,
    /// Why the run counts as failed.
    pub(crate) error: Option<anyhow::Error>,
}

/// The test programs as cargo built them: static, so that they run in any root file system.
#[derive(Debug)]
pub(crate) struct Programs {
    /// Name and file of each.
    tests: Vec<(String, PathBuf)>,
    /// Programs that tests start, by the path that was compiled in.
    beside: Vec<PathBuf>,
}

/// Builds the kernel-level tests: every file in `node-agent/tests`. With the whole workspace, as the tests on this
/// machine are built: features depend on what is built together, and nothing is built twice.
pub(crate) fn build(paths: &Paths) -> Result<Programs> {
    step("build the kernel-level test programs");
    let tests = ["test", "--locked", "--no-run", "--quiet", "--workspace", "--test", "*"];
    let mut cargo = cmd("cargo", tests);
    cargo.arg("--message-format=json-render-diagnostics").current_dir(&paths.root);
    let said = stdout(&mut cargo)?;
    from_messages(&said, &paths.root.join("node-agent/Cargo.toml"))
}

/// The artifacts of one package in cargo's messages, a JSON object on each line.
fn from_messages(messages: &str, manifest: &Path) -> Result<Programs> {
    let mut programs = Programs { tests: Vec::new(), beside: Vec::new() };
    for message in messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let of_package =
            message["manifest_path"].as_str().is_some_and(|at| Path::new(at) == manifest);
        let Some(executable) = message["executable"].as_str().filter(|_| of_package) else {
            continue;
        };
        let name = message["target"]["name"].as_str().unwrap_or_default().to_owned();
        match (message["target"]["kind"][0].as_str(), message["profile"]["test"].as_bool()) {
            (Some("test"), Some(true)) => programs.tests.push((name, executable.into())),
            (Some("bin"), Some(false)) => programs.beside.push(executable.into()),
            _ => {}
        }
    }
    if programs.tests.is_empty() {
        bail!("cargo built no tests of {}", manifest.display());
    }
    programs.tests.sort();
    Ok(programs)
}

/// Makes what `run` needs and what changes with Debian alone; gives the kernels.
///
/// # Errors
/// When something cannot be fetched; `run` tries once more.
pub(crate) fn prepare(paths: &Paths, series: &[String]) -> Result<Vec<Kernel>> {
    setup::ensure(paths, &[Need::Vm, Need::Packages, Need::Debian])?;
    debian::kept(paths)?;
    series.iter().map(|series| kernel::get(paths, series, None)).collect()
}

/// Boots each kernel of `series` and runs the programs' tests whose name contains `filter`; several beside each other
/// where the machine has processors for that. Shows what they say as it comes, and ends each with a line of numbers.
/// As soon as one of the last that run beside each other has ended, `meanwhile` is done on what that leaves idle, which is
/// a processor of this machine if VMs are emulated; it is not done where the last runs alone.
///
/// # Errors
/// When no kernel could be booted, as what all need cannot be made.
pub(crate) fn run(
    paths: &Paths,
    series: &[String],
    programs: &Programs,
    filter: Option<&str>,
    meanwhile: impl FnOnce(),
) -> Result<Vec<(String, Ran)>> {
    let kernels = prepare(paths, series)?;
    let folder = paths.root.join(".orlop/kernel-tests");
    remove(paths, &folder)?;
    let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name.as_str()).collect();
    let count = programs.tests.len();
    step(&format!("make a disk with {count} test programs for {}", names.join(" and ")));
    // The helpers that make kernels' files lay them below the cluster's folder.
    let shared = Paths { cluster: folder.clone(), ..paths.clone() };
    fs::create_dir_all(&folder).context("make the folder of the kernel tests")?;
    let plan = disk::Plan { programs, filter, limit: PROGRAM_LIMIT };
    let disk = disk::make(&shared, &kernels, &plan)?;
    let mut machines = Vec::new();
    for (series, kernel) in series.iter().zip(&kernels) {
        let own = Paths { cluster: folder.join(series), ..paths.clone() };
        machines.push(Machine::new(own, series, kernel, &disk)?);
    }
    let cpus = machines.first().map_or(Ok(1), |machine| machine.spec.accel.cpus())?;
    let at_once = thread::available_parallelism().map_or(1, usize::from) / cpus;
    let mut chunks: Vec<_> = machines.chunks(at_once.max(1)).collect();
    let last = chunks.pop().unwrap_or_default();
    let mut ran: Vec<_> =
        chunks.into_iter().flat_map(|some| beside_each_other(some, || {})).collect();
    ran.extend(beside_each_other(last, meanwhile));
    remove(paths, &folder)?;
    Ok(ran)
}

/// Runs `machines`, and does `meanwhile` when the first of several has ended.
fn beside_each_other(machines: &[Machine], meanwhile: impl FnOnce()) -> Vec<(String, Ran)> {
    let (ended, has_ended) = mpsc::channel();
    thread::scope(|scope| {
        let start = |machine| {
            let ended = ended.clone();
            scope.spawn(move || {
                let ran = Machine::run(machine);
                // Nobody waits for the second.
                let _heard = ended.send(());
                ran
            })
        };
        let started: Vec<_> = machines.iter().map(start).collect();
        drop(ended);
        if machines.len() > 1 && has_ended.recv().is_ok() {
            meanwhile();
        }
        let runs = started.into_iter().zip(machines);
        runs.map(|(run, machine)| (machine.series.clone(), join(run))).collect()
    })
}

/// What a thread ended with; its panic is a failed run.
fn join(run: thread::ScopedJoinHandle<'_, Ran>) -> Ran {
    run.join().unwrap_or_else(|_panic| Ran {
        failed: 1,
        error: Some(anyhow!("the thread that followed a VM panicked")),
        ..Ran::default()
    })
}

/// Ends VMs that an interrupted run has left, and removes all that it made.
fn remove(paths: &Paths, folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let cluster = entry.with_context(|| format!("read {}", folder.display()))?.path();
        Cluster::end(&Paths { cluster, ..paths.clone() })?;
    }
    down::remove(&Paths { cluster: folder.to_owned(), ..paths.clone() })
}

/// One kernel's VM.
struct Machine {
    paths: Paths,
    series: String,
    kernel: String,
    spec: vm::Spec,
}

impl Machine {
    fn new(paths: Paths, series: &str, kernel: &Kernel, disk: &Path) -> Result<Self> {
        fs::create_dir_all(&paths.cluster).context("make the folder of a kernel's tests")?;
        let initramfs = rootfs::initramfs(&paths, kernel)?;
        let accel = vm::accel(&paths, &kernel.image, &initramfs)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let emulated = if accel == vm::Accel::Kvm { "" } else { " orlop.emulated" };
        let spec = vm::Spec {
            dir: paths.cluster.clone(),
            kernel: kernel.image.clone(),
            initramfs,
            disk: Some(vm::Disk { file: disk.to_owned(), is_kept: false }),
            append: format!("orlop.time={now}{emulated}"),
            memory_mib: MEMORY_MIB,
            reboots: false,
            accel,
            nics: Vec::new(),
        };
        Ok(Self { paths, series: series.to_owned(), kernel: kernel.name.clone(), spec })
    }

    /// From boot to the numbers.
    fn run(&self) -> Ran {
        let Self { series, kernel, .. } = self;
        step(&format!("tests on kernel {series}: boot {kernel}"));
        let began = Instant::now();
        let mut progress = Progress::default();
        let ended = self.follow_to_end(&mut progress);
        let Progress { passed, failed, skipped, failures, .. } = progress;
        let mut ran = Ran { passed, failed, skipped, error: None };
        if let Err(error) = ended {
            ran.failed = ran.failed.max(1);
            ran.error = Some(error.context(format!("tests on kernel {series}")));
        } else if failed > 0 {
            ran.error = Some(anyhow!("on kernel {series} failed: {}", failures.join(", ")));
        }
        println!(
            "kernel {series} ({kernel}): {} passed, {} failed, {} said that they skip, in {} s",
            ran.passed,
            ran.failed,
            ran.skipped.len(),
            began.elapsed().as_secs()
        );
        let cleaned = Cluster::end(&self.paths).and_then(|_| {
            if ran.error.is_some() { keep_console(&self.paths, series) } else { Ok(()) }
        });
        if let (Err(error), None) = (cleaned, &ran.error) {
            ran.error = Some(error);
        }
        ran
    }

    /// Runs the VM to its end, which is to come after all programs'.
    fn follow_to_end(&self, progress: &mut Progress) -> Result<()> {
        let process = vm::start(&self.spec)?;
        // In the form of a cluster's record, so that a run that was interrupted is ended by the next.
        let record = json!({ "nodes": [{ "process": process }] });
        fs::write(self.paths.cluster.join("state.json"), record.to_string())
            .context("record the VM")?;
        let console = vm::console(&self.spec.dir);
        follow(&console, &process, |line| {
            println!("{} | {line}", self.series);
            progress.line(line);
        })?;
        if !progress.done {
            let said = vm::console_tail(&self.spec.dir);
            bail!("the VM ended before its tests; the end of its console:\n{said}");
        }
        Ok(())
    }
}

/// Gives each line of the console to `see` as it comes, until the VM has ended.
fn follow(console: &Path, process: &vm::Process, mut see: impl FnMut(&str)) -> Result<()> {
    let limit = Instant::now() + KERNEL_LIMIT;
    let (mut read, mut open) = (0, Vec::new());
    loop {
        // Asked before reading: what it said last is then in the file.
        let alive = process.alive();
        let mut file = fs::File::open(console).context("open the VM's console")?;
        file.seek(SeekFrom::Start(read)).context("read the VM's console")?;
        read += io::copy(&mut file, &mut open).context("read the VM's console")?;
        while let Some(end) = open.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = open.drain(..=end).collect();
            see(String::from_utf8_lossy(&line).trim_end());
        }
        if !alive {
            return Ok(());
        }
        if Instant::now() > limit {
            bail!("no end within {} s", KERNEL_LIMIT.as_secs());
        }
        thread::sleep(LOOK);
    }
}

fn keep_console(paths: &Paths, series: &str) -> Result<()> {
    let console = vm::console(&paths.cluster);
    if console.is_file() {
        fs::create_dir_all(&paths.failed)
            .with_context(|| format!("make {}", paths.failed.display()))?;
        let kept = paths.failed.join(format!("kernel-{series}-console.log"));
        fs::copy(&console, &kept).with_context(|| format!("write {}", kept.display()))?;
        println!("the console of the failed run is {}", kept.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_and_programs_of_the_package_are_found_in_cargos_messages() {
        let message = |manifest: &str, kind: &str, name: &str, test: bool| {
            json!({
                "reason": "compiler-artifact", "manifest_path": manifest, "executable": format!("/t/{name}"),
                "target": { "kind": [kind], "name": name }, "profile": { "test": test },
            })
            .to_string()
        };
        let messages = [
            message("/a/Cargo.toml", "test", "packets", true),
            message("/a/Cargo.toml", "test", "cni", true),
            message("/a/Cargo.toml", "bin", "agent", false),
            message("/a/Cargo.toml", "bin", "agent-unit", true),
            message("/b/Cargo.toml", "test", "other", true),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ];
        let found = from_messages(&messages.join("\n"), Path::new("/a/Cargo.toml")).unwrap();
        let names: Vec<&str> = found.tests.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["cni", "packets"]);
        assert_eq!(found.beside, [PathBuf::from("/t/agent")]);
        from_messages("", Path::new("/a/Cargo.toml")).unwrap_err();
    }
}
