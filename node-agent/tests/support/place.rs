//! A place of one's own for tests that need the kernel.

use std::{fs, path::PathBuf, process::Command};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};

/// Says why a test that needs root and eBPF does not run here; `None` when it does.
fn missing() -> Option<&'static str> {
    if !geteuid().is_root() {
        return Some("not root");
    }
    if !PathBuf::from("/sys/kernel/btf/vmlinux").exists() {
        return Some("kernel without BTF");
    }
    None
}

/// Whether the test can run here; says why if not.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
pub(crate) fn is_possible() -> bool {
    if let Some(why) = missing() {
        eprintln!("skipped: {why}");
        return false;
    }
    true
}

/// Moves the calling thread into a network namespace of its own, with loopback up, and into a mount
/// namespace of its own with an empty BPF file system, whose path it returns.
pub(crate) fn own_namespaces() -> PathBuf {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let folder = std::env::temp_dir().join("orlop-test-bpf");
    fs::create_dir_all(&folder).unwrap();
    mount(Some("bpf"), &folder, Some("bpf"), MsFlags::empty(), none).unwrap();
    ip("link set lo up");
    folder
}

/// Runs `ip` in the thread's network namespace.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
