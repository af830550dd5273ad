//! A place of one's own for tests that need the kernel.

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use node_agent::sys::netlink::Netlink;

/// Loopback's index in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
const LOOPBACK: u32 = 1;

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
pub(crate) fn is_possible() -> bool {
    if let Some(why) = missing() {
        skip::because(why);
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
    Netlink::open().unwrap().set_up(LOOPBACK).unwrap();
    folder
}

/// Runs commands of `ip`, one a line, in the thread's network namespace. All by one process: starting it takes longer
/// than what it does, most of all on an emulated processor.
pub(crate) fn ip(lines: &str) {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{lines}: {}", String::from_utf8_lossy(&output.stderr));
}
