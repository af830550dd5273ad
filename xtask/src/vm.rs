//! One QEMU process: its command line, start, end, and what its console says. KVM is used only where a
//! kernel really boots under it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{
    exec::{cmd, output, tail},
    paths::Paths,
    step,
};

const QEMU: &str = "qemu-system-x86_64";
/// Longest that a working KVM takes to reach user space (TCG takes 2–4 s).
const PROBE: Duration = Duration::from_secs(10);

/// How guest code is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Accel {
    Kvm,
    Tcg,
}

/// An emulated processor runs string instructions byte by byte, and a kernel that is told of none that are fast
/// clears pages and copies by words: its own share of the tests' time fell from 67 to 40 s. Page tables of five
/// levels are one more to walk for each miss.
const EMULATED: &str = "max,erms=off,fsrm=off,la57=off";

/// Words for a kernel that is emulated. Its processors' counters are one, but so slow that an older kernel's check takes
/// them for different and reads the time from an emulated device then, which costs each `clock_gettime` a system call
/// and a way out of the emulation (`arch/x86/kernel/tsc_sync.c`). Debian's kernels clear memory whenever it is taken, which
/// takes a tenth of an emulated processor while programs are verified.
const EMULATED_WORDS: &str = "tsc=reliable init_on_alloc=0";

/// Of each VM, so that what differs by processor is met.
const CPUS: usize = 2;

/// The first QEMU whose emulated processors can run beside each other while the kernel rewrites its own code. Before
/// "accel/tcg: Always lock pages before translation" one could keep a translation of what another had just
/// replaced: Linux met its own breakpoint (`int3`) and panicked.
const THREADS_SINCE: (u32, u32) = (8, 1);

impl Accel {
    /// Processors of this machine that a busy VM takes.
    pub(crate) fn cpus(self) -> Result<usize> {
        let is_threaded =
            || anyhow::Ok(version(&output(&mut cmd(QEMU, ["--version"]))?) >= THREADS_SINCE);
        Ok(if self == Self::Kvm || is_threaded()? { CPUS } else { 1 })
    }

    fn args(self) -> Result<[&'static str; 4]> {
        Ok(match (self, self.cpus()?) {
            (Self::Kvm, _) => ["-accel", "kvm", "-cpu", "host"],
            (Self::Tcg, 1) => ["-accel", "tcg,thread=single", "-cpu", EMULATED],
            (Self::Tcg, _) => ["-accel", "tcg,thread=multi", "-cpu", EMULATED],
        })
    }
}

/// `QEMU emulator version 7.2.22 (Debian …)` → (7, 2); zeros for what is not understood.
fn version(said: &str) -> (u32, u32) {
    let number =
        said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut parts = number.unwrap_or_default().split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// What a VM is started from.
#[derive(Debug)]
pub(crate) struct Spec {
    /// Folder for `console.log` and `qemu.pid`.
    pub(crate) dir: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) disk: Option<Disk>,
    /// Words added to the kernel's command line.
    pub(crate) append: String,
    pub(crate) memory_mib: u32,
    /// A reset boots it again; else it ends the VM.
    pub(crate) reboots: bool,
    pub(crate) accel: Accel,
    /// `-netdev` value (its `id` first) and MAC address of each NIC, in order.
    pub(crate) nics: Vec<(String, String)>,
}

/// A raw image.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) file: PathBuf,
    /// Else what the VM writes is gone with it, and several can start from one image.
    pub(crate) is_kept: bool,
}

/// A started QEMU. The start time tells it from a later process with the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pid: u32,
    /// Clock ticks after boot: field 22 of `/proc/<pid>/stat`.
    started: u64,
}

impl Process {
    /// A process that runs now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        start_time(pid).map(|started| Self { pid, started })
    }

    pub(crate) fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Ends the VM as pulling its plug would. Nothing happens when it is gone already.
    pub(crate) fn kill(&self) -> Result<()> {
        if self.alive() {
            output(&mut cmd("kill", ["-KILL", &self.pid.to_string()]))?;
        }
        // A process of a gigabyte has much to give back, and a busy host little time for it.
        let limit = Instant::now() + Duration::from_secs(60);
        while self.alive() {
            if Instant::now() > limit {
                bail!("QEMU process {} does not end", self.pid);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Start time of a process that runs (is not a zombie).
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the fields after it are fixed, state first.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    (fields.next()? != "Z").then_some(())?;
    fields.nth(18)?.parse().ok()
}

/// Starts QEMU in the background; it outlives this program.
pub(crate) fn start(spec: &Spec) -> Result<Process> {
    fs::create_dir_all(&spec.dir).with_context(|| format!("make {}", spec.dir.display()))?;
    let console = console(&spec.dir);
    let pid_file = spec.dir.join("qemu.pid");
    for file in [&console, &pid_file] {
        if file.exists() {
            fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
        }
    }
    let memory = format!("{}M", spec.memory_mib);
    // A kernel that panics ends its VM, or stays as it is where that would begin again.
    let panic = if spec.reboots { "0" } else { "-1" };
    let words = if spec.accel == Accel::Tcg { EMULATED_WORDS } else { "" };
    let append = format!("console=ttyS0 quiet net.ifnames=0 panic={panic} {words} {}", spec.append);
    let mut qemu = cmd(QEMU, spec.accel.args()?);
    qemu.args([
        "-machine",
        "q35",
        "-smp",
        &CPUS.to_string(),
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
    ]);
    if !spec.reboots {
        qemu.arg("-no-reboot");
    }
    qemu.args(["-display", "none", "-rtc", "base=utc", "-append", &append, "-daemonize"]);
    qemu.arg("-kernel").arg(&spec.kernel).arg("-initrd").arg(&spec.initramfs);
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    qemu.arg("-pidfile").arg(&pid_file).args(["-device", "virtio-rng-pci"]);
    if let Some(disk) = &spec.disk {
        let snapshot = if disk.is_kept { "" } else { ",snapshot=on" };
        let file = disk.file.display();
        qemu.arg("-drive").arg(format!("file={file},format=raw,if=virtio,cache=unsafe{snapshot}"));
    }
    for (number, (netdev, mac)) in spec.nics.iter().enumerate() {
        qemu.arg("-netdev").arg(format!("{netdev},id=n{number}"));
        qemu.arg("-device").arg(format!("virtio-net-pci,netdev=n{number},mac={mac},romfile="));
    }
    output(&mut qemu)?;
    let pid =
        fs::read_to_string(&pid_file).with_context(|| format!("read {}", pid_file.display()))?;
    let pid = pid.trim().parse().context("QEMU's pid file")?;
    Process::of(pid).with_context(|| format!("QEMU ended at once: {}", console_tail(&spec.dir)))
}

pub(crate) fn console(dir: &Path) -> PathBuf {
    dir.join("console.log")
}

/// The end of a VM's console, for an error text.
pub(crate) fn console_tail(dir: &Path) -> String {
    let bytes = fs::read(console(dir)).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    if text.trim().is_empty() { "(its console is empty)".to_owned() } else { tail(&text, 25) }
}

/// KVM when a kernel really boots under it, else TCG. The answer is kept in the cache; remove
/// `.orlop/cache/accel` to ask again.
pub(crate) fn accel(paths: &Paths, kernel: &Path, initramfs: &Path) -> Result<Accel> {
    let kept = paths.cache.join("accel");
    let _lock = paths.lock_cache()?;
    match fs::read_to_string(&kept).unwrap_or_default().trim() {
        "kvm" => return Ok(Accel::Kvm),
        "tcg" => return Ok(Accel::Tcg),
        _ => {}
    }
    let accel = if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        step("no access to /dev/kvm: using TCG, about 10 times slower");
        Accel::Tcg
    } else if boots(paths, kernel, initramfs, Accel::Kvm)? {
        step("KVM works");
        Accel::Kvm
    } else {
        step("/dev/kvm is there but boots no kernel: using TCG, about 10 times slower");
        Accel::Tcg
    };
    let word = if accel == Accel::Kvm { "kvm" } else { "tcg" };
    fs::create_dir_all(&paths.cache).context("make the cache")?;
    fs::write(&kept, word).with_context(|| format!("write {}", kept.display()))?;
    Ok(accel)
}

fn boots(paths: &Paths, kernel: &Path, initramfs: &Path, accel: Accel) -> Result<bool> {
    step("try whether KVM boots a kernel (at most 10 s)");
    let spec = Spec {
        dir: paths.cache.join("probe"),
        kernel: kernel.to_owned(),
        initramfs: initramfs.to_owned(),
        disk: None,
        append: "orlop.probe".into(),
        memory_mib: 512,
        reboots: false,
        accel,
        nics: Vec::new(),
    };
    let Ok(process) = start(&spec) else { return Ok(false) };
    let limit = Instant::now() + PROBE;
    let mut booted = false;
    while !booted && Instant::now() < limit {
        let said = fs::read(console(&spec.dir)).unwrap_or_default();
        booted = String::from_utf8_lossy(&said).contains("orlop-probe-ok");
        if !process.alive() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    process.kill()?;
    Ok(booted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_and_nonsense_is_an_old_one() {
        assert_eq!(version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), (7, 2));
        assert_eq!(version("QEMU emulator version 10.0.2\nCopyright (c) 2003"), (10, 0));
        assert!(version("QEMU emulator version 8.1") >= THREADS_SINCE);
        assert!(version("QEMU emulator version 8.0.5") < THREADS_SINCE);
        assert_eq!(version("no number"), (0, 0));
    }

    #[test]
    fn this_process_is_alive_and_one_with_another_start_time_is_not() {
        let pid = std::process::id();
        let started = start_time(pid).unwrap();
        assert!(Process { pid, started }.alive());
        assert!(!Process { pid, started: started + 1 }.alive());
    }
}
