//! Builds what the agent carries: the eBPF object, and the small static binary of `shim/`.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?;
    let folder = Path::new(&folder);
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?;
    let out = Path::new(&out);
    println!("cargo:rerun-if-changed=build.rs");
    let programs = folder.with_file_name("ebpf-programs");
    for source in ebpf_build::sources(&programs) {
        println!("cargo:rerun-if-changed={}", source.display());
    }
    let logs = env::var_os("CARGO_FEATURE_KERNEL_LOG").is_some();
    let features: &[&str] = if logs { &[ebpf_build::LOG] } else { &[] };
    let built = match ebpf_build::build(&programs, features) {
        Ok(built) => built,
        Err(error) => {
            for line in error.to_string().lines() {
                println!("cargo:error={line}");
            }
            return Err(error.into());
        }
    };
    let shim = shim(&folder.join("shim"), &ebpf_build::target_dir(&programs, "shim"))?;
    // Copies, as other builds of the workspace overwrite what they share.
    for (name, built) in [("ORLOP_EBPF_OBJECT", built.object), ("ORLOP_SHIM", shim)] {
        let copy = out.join(name);
        fs::copy(&built, &copy)?;
        println!("cargo:rustc-env={name}={}", copy.display());
    }
    Ok(())
}

/// Static and not position-independent: a hundred of them run on a node, and relocations would make
/// pages of each its own. In a target folder of its own, as the outer cargo holds the lock of ours.
fn shim(folder: &Path, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    println!("cargo:rerun-if-changed={}", folder.join("src").display());
    println!("cargo:rerun-if-changed={}", folder.join("Cargo.toml").display());
    let cargo = env::var_os("CARGO").ok_or("CARGO is not set")?;
    let target = env::var_os("TARGET").ok_or("TARGET is not set")?;
    let flags = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--bin", "shim", "--target"])
        .arg(&target)
        .arg("--manifest-path")
        .arg(folder.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()?;
    if status.success() {
        Ok(target_dir.join(target).join("release/shim"))
    } else {
        Err("the shim did not build".into())
    }
}
