//! XDP: which devices run our program in their driver, and what else carries their service traffic.
//!
//! [`wanted`] and the words are pure, the rest effects. Everything that XDP does tc does too, so that a
//! device without it loses speed and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    str::FromStr,
};

use aya::programs::{ProgramError, TestRun as _, TestRunOptions, Xdp as XdpProgram};
use ebpf_common::ABI_VERSION;

use super::{
    driver::{Driver, UNFINISHED, why},
    load::{LoadError, Programs},
};
use crate::{
    chain::chain,
    sys::{
        bpf, netdev,
        netlink::Netlink,
        xdp::{self, Place},
    },
};

/// The program's name in the object, and in those of its links' pins.
pub(super) const PROGRAM: &str = "xdp_entry";
/// The name of the one for the kernel's stack.
const GENERIC: &str = "xdp_generic";

/// On which devices XDP is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, where that is sure to be right.
    Auto,
    /// Nowhere. The default until more drivers have been tried.
    #[default]
    Off,
    /// In the driver, also of devices whose senders may leave checksums unfinished: who asks for it has
    /// seen to it that they do not.
    Native,
    /// In the kernel's stack, which any device can. Slower than tc; for trying out. tc carries what is for pods here,
    /// and packets with unfinished checksums, as most between virtual devices are.
    Generic,
}

impl FromStr for XdpMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "native" => Ok(Self::Native),
            "generic" => Ok(Self::Generic),
            _ => Err(format!("unknown XDP mode \"{text}\"; there are auto, off, native, generic")),
        }
    }
}

impl XdpMode {
    /// As it is written in flags.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    const fn program(self) -> &'static str {
        match self {
            Self::Generic => program(Place::Generic),
            Self::Auto | Self::Off | Self::Native => program(Place::Native),
        }
    }
}

/// What carries a device's service traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XdpPath {
    Native,
    /// In a driver that takes no frames of other devices: what comes in there by XDP and is to leave here
    /// goes by tc.
    NativeAlone,
    Generic,
    /// tc alone, and why.
    Tc(Why),
}

/// Why XDP does not run on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is not asked for.
    Off,
    /// The other end of a veth pair, or of a virtual machine's device, hands over packets whose checksum is
    /// still to be finished, and XDP is not told so.
    Checksums,
    /// The driver has none.
    NoDriver,
    /// Another program is there, by name.
    Foreign(String),
    /// The kernel or the driver said something else.
    Refused(String),
    /// The kernel did not take the program.
    NotLoaded(String),
}

impl fmt::Display for XdpPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("XDP in the driver"),
            Self::NativeAlone => {
                f.write_str("XDP in the driver, but tc for what comes by other devices")
            }
            Self::Generic => f.write_str(
                "XDP in the stack (generic), but tc for pods here and for unfinished checksums",
            ),
            Self::Tc(why) => write!(f, "tc, {why}"),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("as XDP is switched off"),
            Self::Checksums => f.write_str("as its packets may have unfinished checksums"),
            Self::NoDriver => f.write_str("as its driver has no XDP"),
            Self::Foreign(name) => write!(f, "as XDP program {name} is there, which is not ours"),
            Self::Refused(words) => write!(f, "as its driver refuses XDP: {words}"),
            Self::NotLoaded(words) => write!(f, "as the kernel refuses the program: {words}"),
        }
    }
}

/// Where the program is to run on a device; why not, if it is not.
///
/// # Errors
///
/// The reason, in words for people by its `Display`.
pub const fn wanted(mode: XdpMode, has_unfinished: bool) -> Result<Place, Why> {
    match (mode, has_unfinished) {
        (XdpMode::Off, _) => Err(Why::Off),
        (XdpMode::Auto, true) => Err(Why::Checksums),
        (XdpMode::Auto | XdpMode::Native, _) => Ok(Place::Native),
        (XdpMode::Generic, _) => Ok(Place::Generic),
    }
}

/// The program that runs in a place.
const fn program(place: Place) -> &'static str {
    match place {
        Place::Native => PROGRAM,
        Place::Generic => GENERIC,
    }
}

/// Which of our programs runs on a device, by the links that are pinned below `pins`.
#[must_use]
pub fn running(pins: &Path, ifindex: u32) -> Option<&'static str> {
    let links = pins.join(format!("v{ABI_VERSION}/links"));
    let mut places = [Place::Native, Place::Generic].into_iter();
    places.find(|place| pin(&links, ifindex, *place).exists()).map(program)
}

/// Where a link is pinned.
fn pin(links: &Path, ifindex: u32, place: Place) -> PathBuf {
    let place = match place {
        Place::Native => "native",
        Place::Generic => "generic",
    };
    links.join(format!("{PROGRAM}_{place}_{ifindex}"))
}

/// A frame's `struct xdp_md` (linux/bpf.h) for a test run: it came in by the first queue of a device.
pub(super) fn context(ifindex: u32, frame: &[u8]) -> [u8; 24] {
    let mut context = [0; 24];
    // Longer frames than the kernel takes are refused by it.
    let end = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    context[4..8].copy_from_slice(&end.to_ne_bytes());
    context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

/// Devices and what carries their service traffic, on one line.
#[must_use]
pub fn words(paths: &BTreeMap<String, XdpPath>) -> String {
    if paths.is_empty() {
        return "no device yet".to_owned();
    }
    let each: Vec<String> = paths.iter().map(|(name, path)| format!("{name}: {path}")).collect();
    each.join("; ")
}

/// The loaded program and where it is attached. Dropping it leaves what is pinned in place.
#[derive(Debug)]
pub struct Xdp {
    mode: XdpMode,
    /// The program, or why there is none.
    program: Result<OwnedFd, String>,
    /// Folder of pinned links.
    links: Option<PathBuf>,
    attached: BTreeMap<u32, Attached>,
    /// Where it was attached, or found to be, since somebody last doubted it.
    sure: BTreeSet<u32>,
}

#[derive(Debug)]
struct Attached {
    name: String,
    path: XdpPath,
    /// The link, if it is not pinned.
    held: Option<OwnedFd>,
}

impl Xdp {
    /// Takes the loaded program. A kernel that did not take it has tc.
    #[must_use]
    pub fn new(programs: &mut Programs, mode: XdpMode) -> Self {
        let links = programs.pins.as_ref().map(|folder| folder.join("links"));
        let program = if mode == XdpMode::Off {
            Err("switched off".to_owned())
        } else {
            programs.xdp_program(mode.program())
        };
        Self { mode, program, links, attached: BTreeMap::new(), sure: BTreeSet::new() }
    }

    /// Sees to it that the program runs on a device, if it can. Says whether it does so in the driver,
    /// which then takes frames from other devices too.
    pub fn attach(&mut self, netlink: &mut Netlink, ifindex: u32, name: &str) -> bool {
        if self.sure.contains(&ifindex)
            && let Some(attached) = self.attached.get_mut(&ifindex)
        {
            // Who sits at the other end may have come meanwhile.
            if attached.path == XdpPath::NativeAlone
                && let Ok(Some(true)) = netdev::takes_frames(ifindex)
            {
                attached.path = XdpPath::Native;
            }
            match attached.path {
                XdpPath::Native => return true,
                XdpPath::NativeAlone | XdpPath::Generic => return false,
                XdpPath::Tc(_) => {}
            }
        }
        let old = self.attached.get(&ifindex).map(|attached| attached.path.clone());
        let (path, held) = match self.try_attach(netlink, ifindex) {
            Ok(attached) => attached,
            Err(why) => (XdpPath::Tc(why), None),
        };
        if old.as_ref() != Some(&path) {
            tracing::info!(device = name, path = %path, "service traffic");
        }
        let is_native = path == XdpPath::Native;
        self.sure.insert(ifindex);
        self.attached.insert(ifindex, Attached { name: name.to_owned(), path, held });
        is_native
    }

    /// Attaches anew, the next time that it is asked to, what somebody may have detached meanwhile.
    pub fn doubt(&mut self) {
        self.sure.clear();
    }

    /// Takes the program of an object that was loaded anew, and puts it where the former one runs.
    ///
    /// # Errors
    ///
    /// [`LoadError::Attach`] for the first link that could not be swapped; all others are.
    pub fn renew(&mut self, programs: &mut Programs) -> Result<(), LoadError> {
        if self.program.is_err() {
            return Ok(());
        }
        let failed = |target, source| LoadError::Attach { name: PROGRAM, target, source };
        let program = programs.xdp_program(self.mode.program());
        let program =
            program.map_err(|words| failed("a link".to_owned(), io::Error::other(words)))?;
        let mut outcome = Ok(());
        for (ifindex, attached) in &self.attached {
            let place = match attached.path {
                XdpPath::Native | XdpPath::NativeAlone => Place::Native,
                XdpPath::Generic => Place::Generic,
                XdpPath::Tc(_) => continue,
            };
            let swapped = match (&attached.held, self.pin(*ifindex, place)) {
                (Some(link), _) => bpf::link_update(link.as_fd(), program.as_fd()),
                (None, Some(pin)) => bpf::open_pin(&pin)
                    .and_then(|link| bpf::link_update(link.as_fd(), program.as_fd())),
                (None, None) => Ok(()),
            };
            match swapped {
                // The device is gone; the next look at devices forgets it.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(source) => outcome = outcome.and(Err(failed(attached.name.clone(), source))),
                Ok(()) => {}
            }
        }
        self.program = Ok(program);
        outcome
    }

    /// Forgets devices that are gone; the kernel has taken the program off with them.
    pub fn keep(&mut self, present: impl Fn(u32) -> bool) {
        let gone: Vec<u32> =
            self.attached.keys().copied().filter(|ifindex| !present(*ifindex)).collect();
        for ifindex in gone {
            self.leave(ifindex);
        }
    }

    /// Takes the program off a device, whichever agent put it there.
    pub fn leave(&mut self, ifindex: u32) {
        self.attached.remove(&ifindex);
        for place in [Place::Native, Place::Generic] {
            self.unpin(ifindex, place);
        }
    }

    /// What carries each device's service traffic.
    #[must_use]
    pub fn paths(&self) -> BTreeMap<String, XdpPath> {
        self.attached.values().map(|one| (one.name.clone(), one.path.clone())).collect()
    }

    fn try_attach(
        &self,
        netlink: &mut Netlink,
        ifindex: u32,
    ) -> Result<(XdpPath, Option<OwnedFd>), Why> {
        let refused = |error: io::Error| Why::Refused(error.to_string());
        let device = xdp::device(netlink, ifindex).map_err(refused)?;
        let driver = Driver::of(&device);
        let has_unfinished = device.is_veth || UNFINISHED.contains(&driver.name.as_str());
        let place = wanted(self.mode, has_unfinished);
        // What an earlier agent was told to do and this one is not.
        for other in [Place::Native, Place::Generic] {
            if place.as_ref().ok() != Some(&other) {
                self.unpin(ifindex, other);
            }
        }
        let place = place?;
        let program = self.program.as_ref().map_err(|words| Why::NotLoaded(words.clone()))?;
        let held = self
            .link(program.as_fd(), ifindex, place)
            .map_err(|error| why(&error, device.program.and_then(xdp::program_name), &driver))?;
        let path = match place {
            Place::Generic => XdpPath::Generic,
            // Some drivers take frames only while they run XDP themselves: asked when this one does.
            Place::Native if driver.takes_frames(netdev::takes_frames(ifindex).ok().flatten()) => {
                XdpPath::Native
            }
            Place::Native => XdpPath::NativeAlone,
        };
        Ok((path, held))
    }

    /// Puts the program in the place of an earlier agent's, or on the device. Gives the link if it is not
    /// pinned.
    fn link(
        &self,
        program: BorrowedFd<'_>,
        ifindex: u32,
        place: Place,
    ) -> io::Result<Option<OwnedFd>> {
        let Some(pin) = self.pin(ifindex, place) else {
            let held = self.attached.get(&ifindex).and_then(|attached| attached.held.as_ref());
            return match held.map(|link| bpf::link_update(link.as_fd(), program).map(|()| link)) {
                Some(Ok(link)) => link.try_clone().map(Some),
                Some(Err(error)) if error.raw_os_error() != Some(libc::ENOLINK) => Err(error),
                None | Some(Err(_)) => xdp::attach(program, ifindex, place).map(Some),
            };
        };
        match bpf::open_pin(&pin).and_then(|link| bpf::link_update(link.as_fd(), program)) {
            Ok(()) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Somebody has detached it, or its device is gone; an interface index may have come around.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                self.unpin(ifindex, place);
            }
            Err(error) => return Err(error),
        }
        let link = xdp::attach(program, ifindex, place)?;
        bpf::pin(link.as_fd(), &pin)?;
        Ok(None)
    }

    fn unpin(&self, ifindex: u32, place: Place) {
        if let Some(pin) = self.pin(ifindex, place)
            && let Err(error) = fs::remove_file(&pin)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(pin = %pin.display(), %error, "cannot remove a link's pin");
        }
    }

    fn pin(&self, ifindex: u32, place: Place) -> Option<PathBuf> {
        Some(pin(self.links.as_ref()?, ifindex, place))
    }
}

impl Programs {
    /// Loads the XDP program; says why not, if the kernel does not take it.
    fn xdp_program(&mut self, name: &'static str) -> Result<OwnedFd, String> {
        let load = |programs: &mut Self| -> Result<OwnedFd, LoadError> {
            let failed = |source| LoadError::Program { name, source };
            let program = programs.xdp(name)?;
            match program.load() {
                Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
                Err(error) => return Err(failed(error)),
            }
            let descriptor = program.fd().map_err(failed)?;
            descriptor.as_fd().try_clone_to_owned().map_err(|source| LoadError::Attach {
                name,
                target: "a descriptor of its own".to_owned(),
                source,
            })
        };
        load(self).map_err(|error| chain(&error))
    }

    /// Runs the XDP program on a frame as if it came in by a device (`BPF_PROG_TEST_RUN`) and returns its
    /// action, the frame as it left it, and how long one of `repeat` runs took. Nothing is sent, map rows are
    /// written as by a real frame.
    ///
    /// # Errors
    ///
    /// [`LoadError::Program`].
    pub fn test_run_xdp(
        &mut self,
        ifindex: u32,
        frame: &[u8],
        repeat: u32,
    ) -> Result<(u32, Vec<u8>, std::time::Duration), LoadError> {
        let failed = |source| LoadError::Program { name: PROGRAM, source };
        let mut out = vec![0; frame.len() + 256];
        let program = self.xdp(PROGRAM)?;
        match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(failed(error)),
        }
        let context = context(ifindex, frame);
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        let result = program.test_run(options).map_err(failed)?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(0));
        Ok((result.return_value, out, result.duration))
    }

    fn xdp(&mut self, name: &'static str) -> Result<&mut XdpProgram, LoadError> {
        let program = self.object.program_mut(name).ok_or(LoadError::NoProgram { name })?;
        program.try_into().map_err(|source| LoadError::Program { name, source })
    }
}

#[cfg(test)]
#[path = "xdp_tests.rs"]
mod tests;
