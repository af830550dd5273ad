//! Loads the programs, attaches them, and lets them outlive the agent.
//!
//! Effects only. Maps and links are pinned below a folder whose name carries the ABI version. A new
//! agent takes the pinned maps over and swaps the programs inside the pinned links, so that no
//! packet and no connection ever meets a node without programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapError,
    programs::{CgroupSockAddr, ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use ebpf_common::{ABI_VERSION, maps as names};
use thiserror::Error;

pub use super::hook::{TcHook, TcPath};
use super::{events::Ring, grow, maps::Maps, object::object, size::Sizes};
use crate::sys::{
    bpf::{self, AttachType},
    tc,
};

/// Why the dataplane could not be brought up.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error(
        "the kernel lets this process load no BPF program: it needs CAP_BPF, CAP_NET_ADMIN and \
         CAP_PERFMON (or CAP_SYS_ADMIN) and a kernel with CONFIG_BPF_SYSCALL"
    )]
    Denied(#[source] io::Error),
    #[error("cannot prepare the BPF file system folder {path}")]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the kernel refused the eBPF object")]
    Object(#[source] EbpfError),
    #[error("the eBPF object has no map {name}")]
    NoMap { name: &'static str },
    #[error("map {name} is not as expected")]
    Map {
        name: &'static str,
        #[source]
        source: MapError,
    },
    #[error("the eBPF object has no program {name}")]
    NoProgram { name: &'static str },
    #[error("the kernel refused program {name}")]
    Program {
        name: &'static str,
        #[source]
        source: ProgramError,
    },
    #[error("cannot attach {name} to {target}")]
    Attach {
        name: &'static str,
        target: String,
        #[source]
        source: io::Error,
    },
}

impl LoadError {
    /// Whether a device to be attached to is gone.
    #[must_use]
    pub fn is_missing_device(&self) -> bool {
        match self {
            Self::Attach { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
            }
            Self::Denied(_)
            | Self::Folder { .. }
            | Self::Object(_)
            | Self::NoMap { .. }
            | Self::Map { .. }
            | Self::NoProgram { .. }
            | Self::Program { .. } => false,
        }
    }
}

/// Asks whether this process can load programs at all, before anything is joined or made.
///
/// # Errors
///
/// [`LoadError::Denied`]; trying again does not help.
pub fn require() -> Result<(), LoadError> {
    bpf::require().map_err(LoadError::Denied)
}

pub(super) const CGROUP_HOOKS: [(&str, AttachType); 8] = [
    ("cg_connect4", AttachType::CgroupConnect4),
    ("cg_connect6", AttachType::CgroupConnect6),
    ("cg_sendmsg4", AttachType::CgroupSendmsg4),
    ("cg_sendmsg6", AttachType::CgroupSendmsg6),
    ("cg_recvmsg4", AttachType::CgroupRecvmsg4),
    ("cg_recvmsg6", AttachType::CgroupRecvmsg6),
    ("cg_getpeername4", AttachType::CgroupGetpeername4),
    ("cg_getpeername6", AttachType::CgroupGetpeername6),
];

pub(super) const MAPS: [&str; 20] = [
    names::CONFIG,
    names::SERVICES,
    names::BACKENDS,
    names::NODE_ADDRS,
    names::LOCAL_MACS,
    names::ENDPOINTS,
    names::TUNNELS,
    names::CONNTRACK,
    names::CONNTRACK_OLD,
    names::MEMBERS,
    names::AFFINITY,
    names::SOURCE_RANGES,
    names::MAGLEV,
    names::NETNS,
    names::DEVICES,
    names::FRAGMENTS,
    names::COUNTERS,
    names::SOCKETS,
    // The same ring for programs that are loaded anew while somebody listens.
    names::EVENTS,
    names::EVENTS_LOST,
];

/// A program's name and the interface index of its device; 0 for the cgroup.
type Attachment = (&'static str, u32);

/// The loaded programs. Dropping it leaves everything that is pinned in place.
pub struct Programs {
    pub(super) object: Ebpf,
    pub(super) pins: Option<PathBuf>,
    /// How large maps are made and may become.
    pub(super) sizes: Sizes,
    /// Links that are not pinned, held open by us.
    held: BTreeMap<Attachment, OwnedFd>,
    /// Where our clsact filters are: they cannot be pinned.
    pub(super) filters: BTreeSet<(TcHook, u32)>,
    tc_path: Option<TcPath>,
    /// Socket programs for which this kernel has no hook.
    pub(super) missing: BTreeSet<&'static str>,
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs")
            .field("pins", &self.pins)
            .field("tc_path", &self.tc_path)
            .finish_non_exhaustive()
    }
}

impl Programs {
    /// Loads everything. With `pins` (a folder in a BPF file system, usually `/sys/fs/bpf/orlop`),
    /// maps of the same ABI version are taken over; without, all ends with this process.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; its source has the verifier's words.
    pub fn load(pins: Option<&Path>) -> Result<(Self, Maps), LoadError> {
        let pins = pins.map(|root| root.join(format!("v{ABI_VERSION}")));
        if let Some(folder) = &pins {
            let links = folder.join("links");
            let failed = |source| LoadError::Folder { path: links.clone(), source };
            let root = folder.ancestors().nth(2).unwrap_or(folder);
            bpf::ensure_bpf_folder(root, &links).map_err(failed)?;
            grow::clean(folder).map_err(failed)?;
        }
        let sizes = Sizes::for_memory(memory_bytes());
        let (object, missing) = Self::load_object(pins.as_deref(), &sizes)?;
        let mut programs = Self {
            object,
            pins,
            sizes,
            held: BTreeMap::new(),
            filters: BTreeSet::new(),
            tc_path: None,
            missing,
        };
        let maps = Maps::take(&mut programs.object)?;
        // What an earlier agent left runs on the maps of its own time, which may have been replaced.
        programs.swap()?;
        Ok((programs, maps))
    }

    /// Loads the object over the maps that are pinned, and makes those that are not there.
    pub(super) fn load_object(
        pins: Option<&Path>,
        sizes: &Sizes,
    ) -> Result<(Ebpf, BTreeSet<&'static str>), LoadError> {
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            if let Some(folder) = pins {
                loader.map_pin_path(name, folder.join(name));
            }
            // A pinned map is taken as it is, whatever its size.
            if let Some(rows) = sizes.first.get(name) {
                loader.map_max_entries(name, *rows);
            }
        }
        #[cfg(feature = "kernel-log")]
        let level = super::kernel_log::level();
        #[cfg(feature = "kernel-log")]
        loader.override_global(aya_log::LEVEL, &level, true);
        // The same ring for programs that are loaded anew.
        #[cfg(feature = "kernel-log")]
        if let Some(folder) = pins {
            loader.map_pin_path(super::kernel_log::RING, folder.join(super::kernel_log::RING));
        }
        let mut object = loader.load(object()).map_err(LoadError::Object)?;
        for hook in TcHook::ALL {
            let name = hook.program();
            let failed = |source| LoadError::Program { name, source };
            classifier(&mut object, name)?.load().map_err(failed)?;
        }
        let mut missing = BTreeSet::new();
        for (name, _) in CGROUP_HOOKS {
            match sock_addr(&mut object, name)?.load() {
                Ok(()) => {}
                Err(error) if is_unknown_hook(&error) => drop(missing.insert(name)),
                Err(source) => return Err(LoadError::Program { name, source }),
            }
        }
        Ok((object, missing))
    }

    /// The ring of events, which is this load's own: it can be taken once.
    ///
    /// # Errors
    ///
    /// [`LoadError::NoMap`] when it was taken.
    pub fn events(&mut self) -> Result<Ring, LoadError> {
        Ring::take(&mut self.object)
    }

    /// The socket programs that this kernel has hooks for.
    #[must_use]
    pub fn hooks(&self) -> Vec<&'static str> {
        let names = CGROUP_HOOKS.iter().map(|(name, _)| *name);
        names.filter(|name| !self.missing.contains(name)).collect()
    }

    /// Socket programs that run nowhere since this kernel has no hook for them; the packet path
    /// serves what they would have translated.
    #[must_use]
    pub const fn missing_hooks(&self) -> &BTreeSet<&'static str> {
        &self.missing
    }

    /// How tc programs were attached; `None` before the first one was.
    #[must_use]
    pub const fn tc_path(&self) -> Option<TcPath> {
        self.tc_path
    }

    /// Goes by one tc path without probing; to be called before the first program is attached.
    pub const fn force_tc_path(&mut self, path: TcPath) {
        self.tc_path = Some(path);
    }

    /// Translates connections of every process below a cgroup (of version 2). May be called again, to put back what
    /// somebody has detached; it has to be the same cgroup.
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`].
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<(), LoadError> {
        for (name, attach) in CGROUP_HOOKS {
            if self.missing.contains(name) {
                continue;
            }
            self.attach_one_cgroup(cgroup, name, attach).map_err(|source| LoadError::Attach {
                name,
                target: format!("cgroup {}", cgroup.display()),
                source,
            })?;
        }
        Ok(())
    }

    /// Puts a program on a device, or in the place of the one that is there: an earlier agent's, or this one's
    /// own. May be called again, to put back what somebody has detached.
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`].
    pub fn attach_tc(&mut self, hook: TcHook, ifindex: u32) -> Result<(), LoadError> {
        self.attach_one_tc(hook, ifindex).map_err(|source| LoadError::Attach {
            name: hook.program(),
            target: format!("device {ifindex}"),
            source,
        })
    }

    /// Forgets a device and removes its pin. From one that is gone the kernel has taken the program; from one that is
    /// there it goes with the pin, where it is a link.
    pub fn forget_tc(&mut self, hook: TcHook, ifindex: u32) {
        self.filters.remove(&(hook, ifindex));
        self.held.remove(&(hook.program(), ifindex));
        if let Some(pin) = self.pin((hook.program(), ifindex))
            && let Err(error) = fs::remove_file(&pin)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(pin = %pin.display(), %error, "cannot remove a link's pin");
        }
    }

    /// Takes a program off a device that is there, whichever agent put it there.
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`].
    pub fn leave_tc(&mut self, hook: TcHook, ifindex: u32) -> Result<(), LoadError> {
        self.forget_tc(hook, ifindex);
        if self.tc_path != Some(TcPath::Clsact) {
            return Ok(());
        }
        tc::detach(ifindex, hook.direction(), hook.program()).map_err(|source| LoadError::Attach {
            name: hook.program(),
            target: format!("no more to device {ifindex}"),
            source,
        })
    }

    /// Runs a tc program on a packet (`BPF_PROG_TEST_RUN`) and returns its verdict and the packet as
    /// it left it. Redirections are not carried out, map rows are written as by a real packet.
    ///
    /// # Errors
    ///
    /// [`LoadError::Program`].
    pub fn test_run(
        &mut self,
        hook: TcHook,
        ifindex: u32,
        packet: &[u8],
    ) -> Result<(i32, Vec<u8>), LoadError> {
        let name = hook.program();
        let failed = |source| LoadError::Program { name, source };
        let mut out = vec![0; packet.len() + 256];
        let mut context = [0_u8; SKB_LEN];
        context[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = self.classifier(name)?.test_run(options).map_err(failed)?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(0));
        Ok((result.return_value.cast_signed(), out))
    }

    fn attach_one_cgroup(
        &mut self,
        cgroup: &Path,
        name: &'static str,
        attach: AttachType,
    ) -> io::Result<()> {
        let program = self.sock_addr(name).map_err(io::Error::other)?;
        let program =
            program.fd().map_err(io::Error::other)?.try_clone().map_err(io::Error::other)?;
        let folder = File::open(cgroup)?;
        let target = folder.as_raw_fd().cast_unsigned();
        self.link(program.as_fd(), (name, 0), target, attach)
    }

    fn attach_one_tc(&mut self, hook: TcHook, ifindex: u32) -> io::Result<()> {
        if self.tc_path != Some(TcPath::Clsact) {
            let program = self.classifier(hook.program()).map_err(io::Error::other)?;
            let program =
                program.fd().map_err(io::Error::other)?.try_clone().map_err(io::Error::other)?;
            let place = (hook.program(), ifindex);
            match self.link(program.as_fd(), place, ifindex, hook.tcx()) {
                Ok(()) => {
                    self.tc_path = Some(TcPath::Tcx);
                    return Ok(());
                }
                // This kernel does not know the attach type: the probe for tcx.
                Err(error)
                    if self.tc_path.is_none() && error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        self.filter(hook, ifindex)?;
        self.tc_path = Some(TcPath::Clsact);
        self.filters.insert((hook, ifindex));
        Ok(())
    }

    /// Puts a filter on a device, or in the place of the one that is there.
    pub(super) fn filter(&mut self, hook: TcHook, ifindex: u32) -> io::Result<()> {
        let program = self.classifier(hook.program()).map_err(io::Error::other)?;
        tc::attach(program, ifindex, hook.direction())
    }

    /// Swaps the program inside the link that is there, or makes a new one and pins or holds it.
    fn link(
        &mut self,
        program: BorrowedFd<'_>,
        place: Attachment,
        target: u32,
        attach: AttachType,
    ) -> io::Result<()> {
        let pin = self.pin(place);
        let old = match &pin {
            Some(pin) => bpf::open_pin(pin),
            None => match self.held.get(&place) {
                Some(link) => link.try_clone(),
                None => Err(io::ErrorKind::NotFound.into()),
            },
        };
        match old.and_then(|link| bpf::link_update(link.as_fd(), program)) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Somebody has detached it, or its device or cgroup is gone; an interface index may have come around.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                pin.as_ref().map_or(Ok(()), fs::remove_file)?;
            }
            Err(error) => return Err(error),
        }
        let link = bpf::link_create(program, target, attach)?;
        match pin {
            Some(pin) => bpf::pin(link.as_fd(), &pin),
            None => {
                self.held.insert(place, link);
                Ok(())
            }
        }
    }

    /// Where a link is pinned.
    fn pin(&self, (name, ifindex): Attachment) -> Option<PathBuf> {
        let links = self.pins.as_ref()?.join("links");
        Some(links.join(if ifindex == 0 { name.to_owned() } else { format!("{name}_{ifindex}") }))
    }

    pub(super) fn classifier(
        &mut self,
        name: &'static str,
    ) -> Result<&mut SchedClassifier, LoadError> {
        classifier(&mut self.object, name)
    }

    pub(super) fn sock_addr(
        &mut self,
        name: &'static str,
    ) -> Result<&mut CgroupSockAddr, LoadError> {
        sock_addr(&mut self.object, name)
    }
}

fn classifier<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, LoadError> {
    let program = object.program_mut(name).ok_or(LoadError::NoProgram { name })?;
    program.try_into().map_err(|source| LoadError::Program { name, source })
}

fn sock_addr<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, LoadError> {
    let program = object.program_mut(name).ok_or(LoadError::NoProgram { name })?;
    program.try_into().map_err(|source| LoadError::Program { name, source })
}

/// The node's memory; what a cgroup leaves the agent does not matter, maps are the kernel's.
fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// Whether the kernel has no such hook: it says so before the verifier has a word.
fn is_unknown_hook(error: &ProgramError) -> bool {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return false };
    io_error.raw_os_error() == Some(libc::EINVAL) && verifier_log.to_string().trim().is_empty()
}

/// Length of `struct __sk_buff` up to and without `hwtstamp` (linux/bpf.h), which 6.1 has too.
pub(super) const SKB_LEN: usize = 184;
/// Offset of `ifindex` in it: the tenth word.
pub(super) const SKB_IFINDEX: usize = 40;
