//! `test`: the workspace's tests on this machine, then the sample's proof in virtual machines. Whatever
//! is not run is listed with its reason.

use std::{fs, process::Command, thread};

use anyhow::{Context as _, Result, bail};

use crate::{
    cluster::Cluster,
    down,
    exec::{cmd, find, run_seen},
    kernel, kernel_tests,
    paths::Paths,
    setup::{self, Need},
    skipped, step,
    stop::impossible,
    timed, up,
};

/// Which kinds of tests to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kinds {
    /// All that this machine can run; the rest is listed.
    Possible,
    Host,
    /// In virtual machines: this machine's kernel tests on other kernels, and clusters.
    Vm,
    /// Of these only the former.
    Matrix,
    /// Of these only the latter.
    Clusters,
    /// Everything; what cannot run is a failure.
    All,
}

/// What was asked for.
#[derive(Debug, clap::Args)]
pub struct Wish {
    /// Only what runs on this machine itself.
    #[arg(long, group = "kind")]
    host: bool,
    /// Only what runs in virtual machines.
    #[arg(long, group = "kind")]
    vm: bool,
    /// Only the kernel-level tests, in one virtual machine for each kernel.
    #[arg(long, group = "kind")]
    matrix: bool,
    /// Only the tests on clusters of virtual machines.
    #[arg(long, group = "kind")]
    clusters: bool,
    /// Everything; what cannot run is a failure.
    #[arg(long, group = "kind")]
    all: bool,
    /// Debian kernel series for what runs in virtual machines; can be given more than once. Otherwise kernel-level
    /// tests run on 6.1 and 6.12, and clusters on 6.1.
    #[arg(long, value_name = "SERIES", conflicts_with = "host")]
    kernel: Vec<String>,
    /// Leaves the test cluster running, and takes one that runs, when it was made from the same programs.
    #[arg(long)]
    keep: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

impl Wish {
    /// The kinds that the flags stand for; at most one is set.
    fn kinds(&self) -> Kinds {
        let flags = [
            (self.host, Kinds::Host),
            (self.vm, Kinds::Vm),
            (self.matrix, Kinds::Matrix),
            (self.clusters, Kinds::Clusters),
            (self.all, Kinds::All),
        ];
        let set = flags.into_iter().find(|(is_set, _)| *is_set);
        set.map_or(Kinds::Possible, |(_, kinds)| kinds)
    }

    /// The kernels that were asked for, or those of `usual`.
    fn kernels(&self, usual: &[&str]) -> Vec<String> {
        if self.kernel.is_empty() {
            return usual.iter().map(|series| (*series).to_owned()).collect();
        }
        self.kernel.clone()
    }
}

/// What has been run so far.
#[derive(Debug, Default)]
struct Report {
    passed: u32,
    failed: u32,
    /// Of those that passed, how many were skipped by themselves, in whole or in part.
    by_themselves: usize,
    /// What was not run, with the reason.
    skipped: Vec<String>,
    /// Why calls of the test runner failed.
    errors: Vec<anyhow::Error>,
}

impl Report {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.by_themselves += other.by_themselves;
        self.skipped.extend(other.skipped);
        self.errors.extend(other.errors);
    }

    /// The closing line.
    fn numbers(&self) -> String {
        let Self { passed, failed, by_themselves, .. } = self;
        match by_themselves {
            0 => format!("{passed} passed, {failed} failed"),
            some => format!("{passed} passed, of which {some} skipped, {failed} failed"),
        }
    }
}

/// Runs the tests that were asked for, shows what was not run, and ends with their numbers.
///
/// # Errors
/// When a test fails, or with `--all` and `--vm` when one cannot be run.
pub fn test(paths: &Paths, wish: &Wish) -> Result<()> {
    setup::ensure(paths, &[Need::Ebpf])?;
    let kinds = wish.kinds();
    let on_host = !matches!(kinds, Kinds::Vm | Kinds::Matrix | Kinds::Clusters);
    // Without root, or elsewhere than on Debian, a test that misses one of these says so and skips.
    if on_host && setup::is_root() && find("apt-get").is_some() {
        setup::ensure(paths, &[Need::Host])?;
    }
    let mut report = Report::default();
    let obstacle = vm_obstacle();
    if on_host {
        let series = wish.kernels(&kernel_tests::SERIES);
        let goes_on = kinds != Kinds::Host && obstacle.is_none() && setup::is_root();
        thread::scope(|scope| {
            // These tests leave processors idle at times. Whoever needs what could not be made says so.
            let _made = goes_on.then(|| scope.spawn(|| kernel_tests::prepare(paths, &series)));
            timed("tests on this machine", || host(paths, wish.filter.as_deref(), &mut report))
        })?;
    }
    match (kinds, obstacle) {
        (Kinds::Host, _) => {
            report.skipped.push("tests in virtual machines: not asked for".to_owned());
        }
        (Kinds::Possible, Some(why)) => {
            report.skipped.push(format!("tests in virtual machines: {why}"));
        }
        (Kinds::Vm | Kinds::Matrix | Kinds::Clusters | Kinds::All, Some(why)) => {
            return Err(impossible(format!("tests in virtual machines cannot run: {why}")));
        }
        (Kinds::Matrix, None) => matrix(paths, wish, &mut report, || {})?,
        (Kinds::Clusters, None) => clusters(paths, wish, wanted_clusters(wish), &mut report)?,
        (Kinds::Possible | Kinds::Vm | Kinds::All, None) => in_vms(paths, wish, &mut report)?,
    }
    for line in &report.skipped {
        println!("skipped: {line}");
    }
    for error in report.errors.iter().skip(1) {
        println!("failed: {error:#}");
    }
    println!("{}", report.numbers());
    if let Some(error) = report.errors.into_iter().next() {
        return Err(error);
    }
    if kinds == Kinds::All && !report.skipped.is_empty() {
        bail!("--all was asked for, and not all was run, for {} reasons", report.skipped.len());
    }
    Ok(())
}

fn host(paths: &Paths, filter: Option<&str>, report: &mut Report) -> Result<()> {
    if !setup::is_root() {
        report
            .skipped
            .push("tests that load programs or make network namespaces: not root".to_owned());
    }
    step("tests on this machine");
    let mut cargo = if find("cargo-nextest").is_some() {
        let mut cargo =
            cmd("cargo", ["nextest", "run", "--workspace", "--locked", "--no-fail-fast"]);
        if filter.is_some() {
            cargo.args(["--no-tests", "warn"]);
        }
        cargo
    } else {
        cmd("cargo", ["test", "--workspace", "--locked", "--no-fail-fast"])
    };
    let list = skipped::List::begin(paths)?;
    runner(cargo.args(filter).env(skip::FILE, &list.file).current_dir(&paths.root), report);
    let said = list.end()?;
    report.by_themselves = skipped::count(&said);
    report.skipped.extend(skipped::by_reason(&said));
    Ok(())
}

/// Runs a test runner and adds its numbers.
fn runner(cargo: &mut Command, report: &mut Report) {
    let ran = run_seen(cargo, |line| {
        if let Some((passed, failed)) = counts(line) {
            report.passed += passed;
            report.failed += failed;
        }
    });
    report.errors.extend(ran.err());
}

/// Passed and failed tests in the closing line of `cargo test` or `cargo nextest`.
pub(crate) fn counts(line: &str) -> Option<(u32, u32)> {
    let line = line.trim_start();
    if !line.starts_with("test result:") && !line.starts_with("Summary [") {
        return None;
    }
    let words: Vec<&str> = line.split_whitespace().collect();
    let before = |word: &str| {
        let at = words.iter().position(|found| found.trim_end_matches([',', ';']) == word)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    // nextest leaves out what is zero, and says "passed (2 slow)", which stands behind the word.
    Some((before("passed").unwrap_or(0), before("failed").unwrap_or(0)))
}

/// The kernels, and then the clusters; those of one VM begin as soon as one of the kernels leaves a processor to them.
fn in_vms(paths: &Paths, wish: &Wish, report: &mut Report) -> Result<()> {
    let (small, large): (Vec<_>, Vec<_>) =
        wanted_clusters(wish).into_iter().partition(|(_, cluster)| cluster.nodes == 1);
    let mut small = Some(small);
    let (mut beside, mut outcome) = (Report::default(), Ok(()));
    let meanwhile = || {
        let small = small.take().unwrap_or_default();
        outcome =
            timed("tests on clusters of one node", || clusters(paths, wish, small, &mut beside));
    };
    timed("tests on other kernels", || matrix(paths, wish, report, meanwhile))?;
    report.add(beside);
    outcome?;
    let left = small.into_iter().flatten().chain(large).collect();
    timed("tests on clusters", || clusters(paths, wish, left, report))
}

/// Runs the kernel-level tests of this machine on each kernel, and `meanwhile` when one leaves a processor idle.
fn matrix(paths: &Paths, wish: &Wish, report: &mut Report, meanwhile: impl FnOnce()) -> Result<()> {
    if !setup::is_root() {
        report
            .skipped
            .push("kernel-level tests in VMs: not root, which mmdebstrap needs".to_owned());
        return Ok(());
    }
    let programs = kernel_tests::build(paths)?;
    let series = wish.kernels(&kernel_tests::SERIES);
    let ran = kernel_tests::run(paths, &series, &programs, wish.filter.as_deref(), meanwhile);
    let ran = ran.unwrap_or_else(|error| {
        report.failed += 1;
        report.errors.push(error.context("tests on other kernels"));
        Vec::new()
    });
    for (series, ran) in ran {
        report.passed += ran.passed;
        report.failed += ran.failed;
        report.skipped.extend(ran.skipped.iter().map(|what| format!("on kernel {series}: {what}")));
        report.errors.extend(ran.error);
    }
    Ok(())
}

/// A cluster that tests in VMs are about, and their file.
type Wanted = (&'static str, up::Wish);

/// The clusters of each kernel.
fn wanted_clusters(wish: &Wish) -> Vec<Wanted> {
    let of_kernel = |kernel| {
        let three = up::Wish { kernel, ..up::Wish::default() };
        let one_debian = up::Wish { nodes: 1, debian: true, ..three.clone() };
        [("cluster", three), ("systemd", one_debian)]
    };
    wish.kernels(&[kernel::DEFAULT]).into_iter().flat_map(of_kernel).collect()
}

/// Boots clusters in turn and runs the tests that are marked as needing them; four VMs at once are too much for two
/// processors. A cluster that `up` made for the user is not touched.
fn clusters(paths: &Paths, wish: &Wish, wanted: Vec<Wanted>, report: &mut Report) -> Result<()> {
    if let Some(why) = setup::kubectl_obstacle() {
        if wish.kinds() != Kinds::Possible {
            return Err(impossible(format!("tests on clusters cannot run: {why}")));
        }
        let line = format!("tests on clusters: {why}");
        if !report.skipped.contains(&line) {
            report.skipped.push(line);
        }
        return Ok(());
    }
    setup::ensure(paths, &[Need::Registry])?;
    for (file, cluster) in wanted {
        if cluster.debian && !setup::is_root() {
            report
                .skipped
                .push("Debian with systemd in a VM: not root, which mmdebstrap needs".to_owned());
            continue;
        }
        one_cluster(wish, (file, &cluster), report)?;
    }
    Ok(())
}

/// Boots a cluster, runs its tests and takes it down.
fn one_cluster(wish: &Wish, (file, cluster): (&str, &up::Wish), report: &mut Report) -> Result<()> {
    let paths = Paths::for_tests();
    let errors = report.errors.len();
    match up::up_for_tests(&paths, cluster) {
        Ok(()) => {
            step(&format!("tests in virtual machines: {file}"));
            let test = ["test", "--locked", "--package", "tests", "--test", file];
            let mut cargo = cmd("cargo", test);
            cargo.args(["--", "--ignored", "--test-threads=1", "--nocapture"]);
            // A failed step's own words say what was wrong.
            cargo.env("RUST_BACKTRACE", "0");
            runner(cargo.args(&wish.filter).current_dir(&paths.root), report);
        }
        Err(error) => {
            report.failed += 1;
            report.errors.push(error.context(format!("the test cluster {file}")));
        }
    }
    if report.errors.len() > errors {
        keep_logs(&paths, file)?;
    }
    if !wish.keep {
        down::down(&paths)?;
    }
    Ok(())
}

/// Keeps what the VMs of a failed run said: their consoles, and the programs' logs if they still answer.
fn keep_logs(paths: &Paths, file: &str) -> Result<()> {
    let Some(cluster) = Cluster::recorded(paths) else { return Ok(()) };
    let folder = paths.failed.join(file);
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    for node in &cluster.nodes {
        let console = folder.join(format!("{}-console.log", node.name));
        fs::copy(node.console(), &console)
            .with_context(|| format!("write {}", console.display()))?;
        for program in ["control-plane", "node-agent"] {
            let Ok(said) = node.log(program, 5000) else { continue };
            let log = folder.join(format!("{}-{program}.log", node.name));
            fs::write(&log, said).with_context(|| format!("write {}", log.display()))?;
        }
    }
    println!("consoles and logs of the failed run are in {}", folder.display());
    Ok(())
}

fn vm_obstacle() -> Option<String> {
    if cfg!(not(target_arch = "x86_64")) {
        return Some("the VM images are made for x86-64 hosts only".to_owned());
    }
    if setup::is_root() {
        // What is missing is installed; only clusters need what is not, a kubectl.
        return None;
    }
    setup::missing(&[Need::Vm, Need::Packages, Need::Kubectl, Need::Registry])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_both_runners_are_counted() {
        let cargo =
            "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out";
        assert_eq!(counts(cargo), Some((12, 2)));
        let nextest =
            "     Summary [   9.1s] 345 tests run: 340 passed (3 slow), 5 failed, 2 skipped";
        assert_eq!(counts(nextest), Some((340, 5)));
        assert_eq!(counts("  Summary [ 1s] 3 tests run: 3 passed, 0 skipped"), Some((3, 0)));
        assert_eq!(counts("test a ... 5 passed"), None);
    }

    #[test]
    fn tests_that_skipped_themselves_are_told_apart() {
        let report = Report { passed: 9, by_themselves: 2, ..Report::default() };
        assert_eq!(report.numbers(), "9 passed, of which 2 skipped, 0 failed");
        assert_eq!(Report { passed: 9, ..Report::default() }.numbers(), "9 passed, 0 failed");
    }
}
