//! `ci`: exactly what CI runs, in order; CI files call only this.

use std::{env, process::Command, time::Instant};

use anyhow::{Context as _, Result};

use crate::{
    exec::{cmd, find, run},
    paths::Paths,
    setup::{self, Need},
    step, tidy, timed,
};

/// Sets up, then tidy, format, lints (BPF and host), and the README's test command; ends at the first that fails.
///
/// # Errors
/// Names the stage that failed.
pub fn ci(paths: &Paths) -> Result<()> {
    let began = Instant::now();
    stage("set-up", || setup::ensure(paths, &[Need::Ebpf, Need::Packages, Need::Vm]))?;
    stage("tidy", || tidy::tidy(paths))?;
    stage("format", || run(cmd("cargo", ["fmt", "--all", "--check"]).current_dir(&paths.root)))?;
    stage("lints of the kernel side", || lint_ebpf(paths))?;
    stage("lints, with the build of the tests", || {
        let build = ["test", "--workspace", "--locked", "--no-run", "--quiet"];
        run(linting(&mut cmd("cargo", build)).current_dir(&paths.root))
    })?;
    stage("tests", || {
        let own = env::current_exe().context("find this program")?;
        run(linting(&mut cmd(own, ["test"])).current_dir(&paths.root))
    })?;
    for (tool, what) in
        [("cargo-deny", "licences and bans"), ("cargo-machete", "unused dependencies")]
    {
        if find(tool).is_none() {
            println!("skipped: {what} ({tool} is not installed)");
        }
    }
    println!("ci passed in {} s", began.elapsed().as_secs());
    Ok(())
}

fn stage(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    step(name);
    timed(name, work).with_context(|| format!("{name} failed"))
}

/// Makes every cargo below `command` compile the workspace by clippy's driver, whose warnings are errors. It is what
/// `cargo clippy` does for `cargo check` (`src/tools/clippy/src/main.rs` in Rust's sources), but the driver makes
/// programs as the compiler does: what was linted is what is tested, and nothing is compiled twice for it.
fn linting(command: &mut Command) -> &mut Command {
    command.env("RUSTC_WORKSPACE_WRAPPER", "clippy-driver");
    command.env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__")
}

/// Formats and compiles the kernel side with its warnings as errors. Debian's compiler for BPF comes
/// without clippy, so its lints run where rustup has `rust-src`.
fn lint_ebpf(paths: &Paths) -> Result<()> {
    let programs = paths.root.join("ebpf-programs");
    run(cmd("cargo", ["fmt", "--check"]).current_dir(&programs))?;
    let sysroot = crate::exec::output(&mut cmd("rustc", ["--print", "sysroot"]))?;
    let source =
        std::path::Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if source.is_file() {
        return run(cmd(
            "cargo",
            [
                "clippy",
                "--release",
                "--target",
                ebpf_build::TARGET,
                "-Z",
                "build-std=core",
                "--",
                "-D",
                "warnings",
            ],
        )
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(&programs));
    }
    println!("skipped: clippy of the kernel side (rustup has no rust-src here)");
    crate::build_ebpf::build_ebpf(paths, crate::build_ebpf::Wish::default())
}
