//! The kernel matrix: the very test programs that ran on this machine's kernel run once more in a VM for
//! each Debian kernel that is promised. One boot a kernel, one program after the other.

mod disk;
mod progress;

use std::{
    fs,
    io::{self, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};

use self::progress::Progress;
use crate::{
    cluster::Cluster,
    down,
    exec::{cmd, stdout},
    kernel,
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
/// How often a VM is booted until a test begins. An emulated machine may die while its kernel rewrites its own
/// code (seen once: 6.12 met its own breakpoint in `sched_clock_idle_wakeup_event`). Once a test has begun, an
/// end of the VM is the test's.
const BOOTS: u32 = 3;
/// What the VM's console says before each test program.
const BEGIN: &str = "orlop-tests: begin";
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

/// The test programs as cargo built them, and what they need to run elsewhere.
#[derive(Debug)]
pub(crate) struct Programs {
    /// Name and file of each.
    tests: Vec<(String, PathBuf)>,
    /// Programs that tests start, by the path that was compiled in.
    beside: Vec<PathBuf>,
    /// The loader and the shared libraries that they were linked for.
    libraries: Vec<PathBuf>,
}

/// Builds the kernel-level tests: every file in `node-agent/tests`. With the whole workspace, as the tests on this
/// machine are built: features depend on what is built together, and nothing is built twice.
pub(crate) fn build(paths: &Paths) -> Result<Programs> {
    step("build the kernel-level test programs");
    let tests = ["test", "--locked", "--no-run", "--quiet", "--workspace", "--test", "*"];
    let mut cargo = cmd("cargo", tests);
    cargo.arg("--message-format=json-render-diagnostics").current_dir(&paths.root);
    let said = stdout(&mut cargo)?;
    let mut programs = from_messages(&said, &paths.root.join("node-agent/Cargo.toml"))?;
    let files = programs.tests.iter().map(|(_, file)| file).chain(&programs.beside);
    programs.libraries = libraries(&files.collect::<Vec<_>>())?;
    Ok(programs)
}

/// The artifacts of one package in cargo's messages, a JSON object on each line.
fn from_messages(messages: &str, manifest: &Path) -> Result<Programs> {
    let mut programs = Programs { tests: Vec::new(), beside: Vec::new(), libraries: Vec::new() };
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

/// What `ldd` says that these programs load: absolute paths, each once.
fn libraries(programs: &[&PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for program in programs {
        let said = stdout(&mut cmd("ldd", [program]))?;
        found.extend(
            said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from),
        );
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Boots `series`, runs the programs' tests whose name contains `filter`, shows what they say as it comes,
/// and ends with a line of numbers.
pub(crate) fn run(paths: &Paths, series: &str, programs: &Programs, filter: Option<&str>) -> Ran {
    // The helpers that make kernels' files lay them below the cluster's folder.
    let own = Paths { cluster: paths.root.join(".orlop/kernel-tests"), ..paths.clone() };
    let began = Instant::now();
    let mut progress = Progress::default();
    let ended = in_vm(&own, series, programs, filter, &mut progress);
    let name = ended.as_deref().unwrap_or("not booted").to_owned();
    let mut ran = Ran {
        passed: progress.passed,
        failed: progress.failed,
        skipped: progress.skipped.clone(),
        error: None,
    };
    ran.error = match (ended, progress.failed) {
        (Err(error), _) => {
            ran.failed = ran.failed.max(1);
            Some(error.context(format!("tests on kernel {series}")))
        }
        (Ok(_), 0) => None,
        (Ok(_), _) => Some(anyhow!("on kernel {series} failed: {}", progress.failures.join(", "))),
    };
    println!(
        "kernel {series} ({name}): {} passed, {} failed, {} said that they skip, in {} s",
        ran.passed,
        ran.failed,
        ran.skipped.len(),
        began.elapsed().as_secs()
    );
    let cleaned = Cluster::end(&own).and_then(|_| {
        if ran.error.is_some() {
            keep_console(&own, series)?
        }
        down::remove(&own)
    });
    if let (Err(error), None) = (cleaned, &ran.error) {
        ran.error = Some(error);
    }
    ran
}

/// The kernel's full name, when all programs ran to their end.
fn in_vm(
    paths: &Paths,
    series: &str,
    programs: &Programs,
    filter: Option<&str>,
    progress: &mut Progress,
) -> Result<String> {
    setup::ensure(paths, &[Need::Vm, Need::Packages, Need::Debian])?;
    Cluster::end(paths)?;
    down::remove(paths)?;
    fs::create_dir_all(&paths.cluster).context("make the folder of the kernel tests")?;
    let kernel = kernel::get(paths, series, None)?;
    step(&format!("make a disk with {} test programs for {}", programs.tests.len(), kernel.name));
    let initramfs = rootfs::initramfs(paths, &kernel)?;
    let plan = disk::Plan { programs, filter, limit: PROGRAM_LIMIT };
    let disk = disk::make(paths, &kernel, &plan)?;
    let accel = vm::accel(paths, &kernel.image, &initramfs)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let emulated = if accel == vm::Accel::Tcg { " orlop.emulated" } else { "" };
    let spec = vm::Spec {
        dir: paths.cluster.clone(),
        kernel: kernel.image,
        initramfs,
        disk: Some(disk),
        append: format!("orlop.time={now}{emulated}"),
        memory_mib: MEMORY_MIB,
        reboots: false,
        accel,
        nics: Vec::new(),
    };
    step(&format!("tests on kernel {series}: boot {}", kernel.name));
    for boot in 1..=BOOTS {
        *progress = Progress::default();
        let has_begun = boot_once(paths, series, &spec, progress)?;
        if progress.done {
            return Ok(kernel.name);
        }
        if has_begun {
            break;
        }
        println!("boot {boot} of {BOOTS} of kernel {series} ended before any test began");
    }
    bail!("the VM ended before its tests; the end of its console:\n{}", vm::console_tail(&spec.dir))
}

/// Runs the VM to its end; whether a test program began.
fn boot_once(
    paths: &Paths,
    series: &str,
    spec: &vm::Spec,
    progress: &mut Progress,
) -> Result<bool> {
    let process = vm::start(spec)?;
    // In the form of a cluster's record, so that a run that was interrupted is ended by the next.
    let record = json!({ "nodes": [{ "process": process }] });
    fs::write(paths.cluster.join("state.json"), record.to_string()).context("record the VM")?;
    let mut has_begun = false;
    follow(&vm::console(&spec.dir), &process, |line| {
        println!("{series} | {line}");
        has_begun |= line.contains(BEGIN);
        progress.line(line);
    })?;
    Ok(has_begun)
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
        std::thread::sleep(LOOK);
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
