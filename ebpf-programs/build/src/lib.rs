//! Finds a compiler with a BPF core and builds the eBPF object with it.
//!
//! Effects only: runs `rustc --print`, then one inner cargo. Used by `node-agent/build.rs` and by
//! `cargo xtask build-ebpf`. The inner cargo has a target directory of its own, so that it never
//! waits for the lock of the cargo that called us, and none of the outer cargo's environment.

use std::{
    env,
    ffi::OsStr,
    fmt, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

/// The target of the programs: little-endian BPF, which is right for x86-64 and arm64 alike.
pub const TARGET: &str = "bpfel-unknown-none";

/// Types are kept for the verifier (`--btf`). Structures are zeroed and copied by plain stores: in the order that
/// bpf-linker asks LLVM for by default, they would be by calls of loops over single bytes, which took half of a
/// packet's time.
const RUSTFLAGS: &str =
    "-Cdebuginfo=2 -Clink-arg=--btf -Clink-arg=--disable-expand-memcpy-in-order";

/// Name of the object in the inner cargo's output directory.
const OBJECT: &str = "orlop";

/// What to install, said once at the end of every failure to find a compiler.
const ADVICE: &str = "install one of: `apt-get install rustc-web libstd-rust-web-dev-bpf` (Debian), \
                      or `rustup component add rust-src`";

/// What was built, and by which compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// The relocatable BPF object.
    pub object: PathBuf,
    /// One line for people: which compiler, and where its core comes from.
    pub compiler: String,
}

/// Why there is no object.
#[derive(Debug)]
pub enum BuildError {
    /// No compiler on this machine has a core library for BPF, prebuilt or as source.
    NoCompiler,
    /// `bpf-linker` is not in `PATH` nor in cargo's bin directory.
    NoLinker,
    /// A command could not be started or a file not be read.
    Io { what: String, source: io::Error },
    /// The inner cargo ran and failed; its messages are in `stderr`.
    Cargo { compiler: String, stderr: String },
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCompiler => {
                write!(f, "no Rust compiler with a core library for {TARGET} found; {ADVICE}")
            }
            Self::NoLinker => write!(
                f,
                "bpf-linker not found; install it with `cargo install bpf-linker --version 0.10.4`"
            ),
            Self::Io { what, source: _ } => f.write_str(what),
            Self::Cargo { compiler, stderr } => {
                write!(f, "building the eBPF programs with {compiler} failed:\n{stderr}")
            }
        }
    }
}

impl std::error::Error for BuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::NoCompiler | Self::NoLinker | Self::Cargo { .. } => None,
        }
    }
}

/// The crate's feature with which the programs write lines of text.
pub const LOG: &str = "log";

/// Cargo's target folder of what is built for a build: one for all profiles and features of the workspace, as
/// what is built does not depend on them. `CARGO_TARGET_DIR` counts where it is absolute, else it lies beside the
/// folder `programs` (`ebpf-programs`).
#[must_use]
pub fn target_dir(programs: &Path, name: &str) -> PathBuf {
    let set = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    set.unwrap_or_else(|| programs.with_file_name("target")).join(name)
}

/// Builds the programs of `programs` (the folder `ebpf-programs`) with the crate's `features`. The object is
/// overwritten by the next build with these features: copy what must stay.
///
/// # Errors
///
/// [`BuildError`], each variant of which says in one line what is missing; compiler messages follow
/// on lines of their own.
pub fn build(programs: &Path, features: &[&str]) -> Result<Built, BuildError> {
    let name = features.iter().fold("ebpf".to_owned(), |name, feature| format!("{name}-{feature}"));
    let target_dir = target_dir(programs, &name);
    let compiler = find_compiler().ok_or(BuildError::NoCompiler)?;
    let linker = find_linker().ok_or(BuildError::NoLinker)?;
    let mut cargo = Command::new(cargo_path());
    let _: &mut Command = cargo.current_dir(programs).args(["build", "--release", "--locked"]);
    let _: &mut Command = cargo.args(["--target", TARGET, "--target-dir"]).arg(&target_dir);
    let _: &mut Command = cargo.arg("--features").arg(features.join(","));
    if compiler.build_std {
        let _: &mut Command = cargo.args(["-Z", "build-std=core"]);
    }
    for (name, _) in env::vars_os().filter(|(name, _)| is_outer_cargo(name)) {
        let _: &mut Command = cargo.env_remove(name);
    }
    let _: &mut Command = cargo
        .env("RUSTC", &compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", RUSTFLAGS);
    let output = cargo.output().map_err(|source| BuildError::Io {
        what: format!("cannot run {}", cargo.get_program().display()),
        source,
    })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(BuildError::Cargo { compiler: compiler.to_string(), stderr });
    }
    let object = target_dir.join(TARGET).join("release").join(OBJECT);
    Ok(Built { object, compiler: compiler.to_string() })
}

/// The files and folders on which the object depends, for `cargo:rerun-if-changed`.
#[must_use]
pub fn sources(programs: &Path) -> Vec<PathBuf> {
    ["src", "Cargo.toml", "Cargo.lock", "common/src", "common/Cargo.toml"]
        .iter()
        .map(|name| programs.join(name))
        .collect()
}

/// A compiler that can build for BPF.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Compiler {
    rustc: PathBuf,
    /// Core is compiled from source, since the compiler has none for BPF.
    build_std: bool,
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = if self.build_std { "core built from source" } else { "prebuilt core" };
        write!(f, "{} ({core})", self.rustc.display())
    }
}

/// Prefers a prebuilt core (17 s cold against 39 s) and among equals the first of the candidates.
fn find_compiler() -> Option<Compiler> {
    let found: Vec<(PathBuf, PathBuf)> =
        candidates().into_iter().filter_map(|rustc| Some((sysroot(&rustc)?, rustc))).collect();
    let prebuilt = found.iter().find(|(sysroot, _)| has_prebuilt_core(sysroot));
    let source = || found.iter().find(|(sysroot, _)| has_core_source(sysroot));
    prebuilt
        .map(|(_, rustc)| Compiler { rustc: rustc.clone(), build_std: false })
        .or_else(|| source().map(|(_, rustc)| Compiler { rustc: rustc.clone(), build_std: true }))
}

/// Debian's compiler, the one of the calling cargo, the one in `PATH`, then rustup's toolchains.
fn candidates() -> Vec<PathBuf> {
    let mut list = vec![PathBuf::from("/usr/bin/rustc")];
    list.extend(env::var_os("RUSTC").map(PathBuf::from));
    list.extend(in_path("rustc"));
    let rustup = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")));
    if let Some(entries) = rustup.and_then(|home| fs::read_dir(home.join("toolchains")).ok()) {
        list.extend(entries.filter_map(|entry| Some(entry.ok()?.path().join("bin/rustc"))));
    }
    list
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    let output = Command::new(rustc).args(["--print", "sysroot"]).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !line.trim().is_empty()).then(|| PathBuf::from(line.trim()))
}

fn has_prebuilt_core(sysroot: &Path) -> bool {
    let libraries = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    fs::read_dir(libraries).is_ok_and(|entries| {
        entries
            .filter_map(Result::ok)
            .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
    })
}

fn has_core_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

fn find_linker() -> Option<PathBuf> {
    let in_cargo_home = || {
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))?;
        Some(home.join("bin/bpf-linker")).filter(|path| path.is_file())
    };
    in_path("bpf-linker").or_else(in_cargo_home)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The cargo that called us knows its own path; otherwise the one in `PATH`.
fn cargo_path() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Variables by which the outer cargo or rustup would change what the inner one builds.
fn is_outer_cargo(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let kept = ["CARGO_HOME", "CARGO_HTTP_CAINFO", "CARGO_NET_OFFLINE"];
    let exact = ["RUSTFLAGS", "RUSTDOCFLAGS", "RUSTUP_TOOLCHAIN", "MAKEFLAGS", "CARGO"];
    let prefixes = ["CARGO_", "RUSTC", "DEP_"];
    exact.contains(&name.as_ref())
        || (prefixes.iter().any(|prefix| name.starts_with(prefix))
            && !kept.contains(&name.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_cargo_does_not_reach_the_inner_one() {
        let outer = ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "RUSTC"];
        for name in outer.iter().chain(&["CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN", "CARGO"]) {
            assert!(is_outer_cargo(OsStr::new(name)), "{name}");
        }
        for name in ["CARGO_HOME", "PATH", "HOME", "RUSTUP_HOME"] {
            assert!(!is_outer_cargo(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn a_sysroot_without_bpf_is_no_candidate_and_one_with_source_is() {
        let root = env::temp_dir().join(format!("ebpf-build-{}", std::process::id()));
        let source = root.join("lib/rustlib/src/rust/library/core/src");
        fs::create_dir_all(&source).unwrap();
        assert!(!has_prebuilt_core(&root) && !has_core_source(&root));
        fs::write(source.join("lib.rs"), "").unwrap();
        assert!(!has_prebuilt_core(&root) && has_core_source(&root));
        let library = root.join("lib/rustlib").join(TARGET).join("lib");
        fs::create_dir_all(&library).unwrap();
        fs::write(library.join("libcore-0.rlib"), "").unwrap();
        assert!(has_prebuilt_core(&root));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn an_error_is_one_line_that_names_what_to_install() {
        for (error, words) in [
            (BuildError::NoCompiler, "libstd-rust-web-dev-bpf"),
            (BuildError::NoLinker, "cargo install bpf-linker --version 0.10.4"),
        ] {
            let text = error.to_string();
            assert!(text.contains(words) && !text.contains('\n'), "{text}");
        }
    }
}
