//! Finds what a command needs from the machine, and as root on Debian and Ubuntu installs what is
//! missing. Elsewhere it says exactly what to run, and the command ends with exit code 3.

use std::{fs, path::Path};

use anyhow::Result;

use crate::{
    exec::{cmd, find, output, run},
    kubectl,
    paths::Paths,
    step,
    stop::impossible,
};

/// A group of tools that some command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A Rust compiler with a core library for BPF, and `bpf-linker`.
    Ebpf,
    /// QEMU and what makes disks.
    Vm,
    /// What unpacks Debian packages.
    Packages,
    /// The command-line client.
    Kubectl,
    /// Network namespaces and kube-proxy's kind of rules, for the benchmarks.
    Rules,
    /// A registry on loopback and what pushes to it.
    Registry,
    /// What makes a Debian root file system.
    Debian,
    /// What tests on this machine itself use: namespaces, an image's content, a registry, another runtime.
    Host,
}

/// A program, and the Debian package it is in.
const fn tools(need: Need) -> &'static [(&'static str, &'static str)] {
    match need {
        Need::Ebpf => &[],
        Need::Vm => &[
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("mke2fs", "e2fsprogs"),
            ("xz", "xz-utils"),
        ],
        Need::Packages => &[("apt-get", "apt"), ("dpkg-deb", "dpkg")],
        Need::Kubectl => &[],
        Need::Registry => &[("docker-registry", "docker-registry"), ("skopeo", "skopeo")],
        Need::Debian => &[("mmdebstrap", "mmdebstrap"), ("depmod", "kmod")],
        Need::Host => &[
            ("ip", "iproute2"),
            ("busybox", "busybox-static"),
            ("docker-registry", "docker-registry"),
            ("skopeo", "skopeo"),
            ("iptables", "iptables"),
            ("containerd", "containerd"),
            ("crun", "crun"),
            // Not in PATH: where the package keeps them.
            ("/usr/lib/cni/portmap", "containernetworking-plugins"),
        ],
        Need::Rules => &[("ip", "iproute2"), ("iptables-restore", "iptables"), ("nft", "nftables")],
    }
}

/// The version whose LLVM fits the compilers that are asked for; later ones want a system LLVM.
const BPF_LINKER: [&str; 4] = ["install", "bpf-linker", "--version", "0.10.4"];

/// Makes sure that everything in `needs` is there.
pub(crate) fn ensure(paths: &Paths, needs: &[Need]) -> Result<()> {
    let mut packages: Vec<&str> = needs
        .iter()
        .flat_map(|need| tools(*need))
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if needs.contains(&Need::Ebpf) && !has_bpf_compiler() {
        packages.extend(["rustc-web", "libstd-rust-web-dev-bpf"]);
    }
    let linker = needs.contains(&Need::Ebpf) && !has_bpf_linker();
    packages.sort_unstable();
    packages.dedup();
    if needs.contains(&Need::Kubectl)
        && let Some(why) = kubectl_obstacle()
    {
        return Err(impossible(why));
    }
    if !packages.is_empty() {
        install(paths, &packages)?;
    }
    if linker {
        step("install bpf-linker with cargo (about a minute)");
        run(&mut cmd("cargo", BPF_LINKER))?;
    }
    Ok(())
}

/// Whether `needs` are there, without installing: what a test list says about skipped kinds.
pub(crate) fn missing(needs: &[Need]) -> Option<String> {
    let lacks: Vec<&str> = needs
        .iter()
        .flat_map(|need| tools(*need))
        .map(|(program, _)| *program)
        .filter(|program| find(program).is_none())
        .collect();
    if lacks.is_empty() {
        return needs.contains(&Need::Kubectl).then(kubectl_obstacle).flatten();
    }
    Some(format!("no {}", lacks.join(", ")))
}

/// Why there is no `kubectl` that can be used, and what to run for one.
pub(crate) fn kubectl_obstacle() -> Option<String> {
    let install = kubectl::install_line(std::env::consts::ARCH);
    if find("kubectl").is_none() {
        return Some(format!("kubectl is not in PATH; install it: {install}"));
    }
    let said = output(&mut cmd("kubectl", ["version", "--client", "-o", "json"]));
    let problem = match said.map(|said| kubectl::version_problem(&said)) {
        Ok(problem) => problem?,
        Err(error) => format!("{error:#}").replace('\n', " "),
    };
    Some(format!("{problem}; install another: {install}"))
}

fn install(paths: &Paths, packages: &[&str]) -> Result<()> {
    let line = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if find("apt-get").is_none() {
        return Err(impossible(elsewhere(packages)));
    }
    if !is_root() {
        return Err(impossible(format!("run this first, as root: {line}")));
    }
    step(&format!("install {} with apt-get", packages.join(", ")));
    let log = paths.cache.join("apt.log");
    let apt = |args: &[&str]| {
        let mut command = cmd("apt-get", ["-y", "-q"]);
        command.env("DEBIAN_FRONTEND", "noninteractive").args(args);
        let said = output(&mut command)?;
        fs::create_dir_all(&paths.cache)?;
        fs::write(&log, said)?;
        anyhow::Ok(())
    };
    let install: Vec<&str> =
        ["install", "--no-install-recommends"].iter().chain(packages).copied().collect();
    if apt(&install).is_err() {
        // Lists that are missing or old are the usual reason.
        apt(&["update"])?;
        apt(&install).map_err(|error| impossible(format!("{line}: {error:#}")))?;
    }
    Ok(())
}

/// What to install where there is no apt-get.
fn elsewhere(packages: &[&str]) -> String {
    let mut line = format!(
        "this machine lacks what Debian and Ubuntu have in the packages {}; install their like",
        packages.join(", ")
    );
    if packages.contains(&"apt") || packages.contains(&"dpkg") {
        line.push_str(
            ". apt-get (with Debian's sources) and dpkg-deb fetch and unpack, without root, the VMs' busybox, nft, \
             iptables-save and certificate authorities, the sample's nginx, and the kernel, which alone --kernel FILE \
             replaces",
        );
    }
    line
}

/// By the owner of this process's folder in `/proc`: no system call of our own is needed.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

/// The two ways of having `core` for BPF: Debian's prebuilt one, or rustup's source.
fn has_bpf_compiler() -> bool {
    ["/usr/bin/rustc".to_owned(), "rustc".to_owned()].iter().any(|rustc| {
        output(&mut cmd(rustc, ["--print", "sysroot"])).is_ok_and(|sysroot| {
            let lib = Path::new(sysroot.trim()).join("lib/rustlib");
            lib.join("bpfel-unknown-none/lib").is_dir()
                || lib.join("src/rust/library/core/src/lib.rs").is_file()
        })
    })
}

fn has_bpf_linker() -> bool {
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        Into::into,
    );
    find("bpf-linker").is_some() || home.join("bin/bpf-linker").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_is_for_is_said_where_it_is_not() {
        let line = elsewhere(&["apt", "dpkg"]);
        assert!(line.contains("busybox") && line.contains("nginx"), "{line}");
        assert!(line.contains("--kernel FILE") && !line.contains('\n'), "{line}");
        assert!(!elsewhere(&["qemu-system-x86"]).contains("busybox"));
    }
}
