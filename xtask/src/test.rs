//! `test`: the workspace's tests on this machine, then the sample's proof in virtual machines. Whatever
//! is not run is listed with its reason.

use anyhow::{Result, bail};

use crate::{
    down,
    exec::{cmd, find, run},
    paths::Paths,
    setup::{self, Need},
    step,
    stop::impossible,
    up,
};

/// Which kinds of tests to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinds {
    /// All that this machine can run; the rest is listed.
    Possible,
    Host,
    Vm,
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
    /// Everything; what cannot run is a failure.
    #[arg(long, group = "kind")]
    all: bool,
    /// Only tests whose name contains this.
    pub filter: Option<String>,
}

impl Wish {
    /// The kinds that the flags stand for; at most one is set.
    #[must_use]
    pub fn kinds(&self) -> Kinds {
        match (self.host, self.vm, self.all) {
            (true, _, _) => Kinds::Host,
            (_, true, _) => Kinds::Vm,
            (_, _, true) => Kinds::All,
            (false, false, false) => Kinds::Possible,
        }
    }
}

/// Runs the tests whose name contains `filter`, all when there is none.
///
/// # Errors
/// When a test fails, or with `All` and `Vm` when one cannot be run.
pub fn test(paths: &Paths, kinds: Kinds, filter: Option<&str>) -> Result<()> {
    setup::ensure(paths, &[Need::Ebpf])?;
    let mut skipped = Vec::new();
    if kinds != Kinds::Vm {
        host(paths, filter, &mut skipped)?;
    }
    match (kinds, vm_obstacle()) {
        (Kinds::Host, _) => skipped.push("tests in virtual machines: not asked for".to_owned()),
        (Kinds::Possible, Some(why)) => skipped.push(format!("tests in virtual machines: {why}")),
        (Kinds::Vm | Kinds::All, Some(why)) => {
            return Err(impossible(format!("tests in virtual machines cannot run: {why}")));
        }
        (Kinds::Possible | Kinds::Vm | Kinds::All, None) => vm(paths, filter, &mut skipped)?,
    }
    for line in &skipped {
        println!("skipped: {line}");
    }
    if kinds == Kinds::All && !skipped.is_empty() {
        bail!("--all was asked for, and {} kinds of tests were skipped", skipped.len());
    }
    Ok(())
}

fn host(paths: &Paths, filter: Option<&str>, skipped: &mut Vec<String>) -> Result<()> {
    if !setup::is_root() {
        skipped.push("tests that load programs or make network namespaces: not root".to_owned());
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
    run(cargo.args(filter).current_dir(&paths.root))
}

/// The clusters that the tests in VMs are about, and the test file of each.
fn clusters() -> [(&'static str, up::Wish); 2] {
    let one_debian = up::Wish { nodes: 1, debian: true, ..up::Wish::default() };
    [("cluster", up::Wish::default()), ("systemd", one_debian)]
}

/// Boots each cluster in turn (or takes the running one) and runs the tests that are marked as needing it.
/// A cluster on which a test failed is left running, to be looked at.
fn vm(paths: &Paths, filter: Option<&str>, skipped: &mut Vec<String>) -> Result<()> {
    for (file, wish) in clusters() {
        if wish.debian && !setup::is_root() {
            skipped
                .push("Debian with systemd in a VM: not root, which mmdebstrap needs".to_owned());
            continue;
        }
        up::up(paths, &wish)?;
        step(&format!("tests in virtual machines: {file}"));
        let mut cargo = cmd("cargo", ["test", "--locked", "--package", "tests", "--test", file]);
        cargo.args(["--", "--ignored", "--test-threads=1", "--nocapture"]).args(filter);
        run(cargo.current_dir(&paths.root))?;
        down::down(paths)?;
    }
    Ok(())
}

fn vm_obstacle() -> Option<String> {
    if cfg!(not(target_arch = "x86_64")) {
        return Some("the VM images are made for x86-64 hosts only".to_owned());
    }
    setup::missing(&[Need::Vm, Need::Packages, Need::Kubectl])
}
