//! Runs a copy of the programs that writes nothing and notes what it looked up, on made-up packets.
//!
//! Effects. The copy is the same object over the same pinned maps, with one constant set; it is loaded
//! for a trace, attached to nothing, and gone after it.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};
use ebpf_common::{
    ABI_VERSION,
    addr::Addr,
    conntrack::{Flow, FlowKey},
    maps as names,
    packet::ETH_LEN,
    service::Peer,
    socket::{Ask, REFUSED, TRANSLATED},
    trace::{STEPS, Step},
    verdict::DropReason,
};

use super::{
    load::{LoadError, MAPS, SKB_IFINDEX, SKB_LEN},
    object::object,
    xdp,
};

/// The copy that traces.
#[derive(Debug)]
pub struct Tracer {
    object: Ebpf,
}

/// What a program did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub verdict: i32,
    /// The packet as the program left it.
    pub frame: Vec<u8>,
    pub steps: Vec<Step>,
}

/// What becomes of a socket's question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Left,
    Translated(Peer),
    Refused(DropReason),
}

/// A step crosses the kernel's border as plain words.
type Words = [u32; size_of::<Step>() / 4];

impl Tracer {
    /// Loads the copy over the maps below `pins`.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; without pinned maps there is nothing to look at.
    pub fn load(pins: &Path) -> Result<Self, LoadError> {
        let folder = pins.join(format!("v{ABI_VERSION}"));
        if let Err(source) = std::fs::metadata(folder.join(names::SERVICES)) {
            return Err(LoadError::Folder { path: folder, source });
        }
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            loader.map_pin_path(name, folder.join(name));
        }
        loader.override_global(names::TRACING, &1_u8, true);
        let object = loader.load(object()).map_err(LoadError::Object)?;
        Ok(Self { object })
    }

    /// Whether the object has such a program.
    #[must_use]
    pub fn has(&self, program: &str) -> bool {
        self.object.program(program).is_some()
    }

    /// Asks the twin of the socket programs.
    ///
    /// # Errors
    ///
    /// [`LoadError::Program`].
    pub fn ask(&mut self, ask: &Ask) -> Result<(Answer, Vec<Step>), LoadError> {
        let frame = [&[0; ETH_LEN][..], &ask.bytes()].concat();
        let run = self.tc("tc_trace_socket", 0, &frame)?;
        let answer = match run.verdict {
            TRANSLATED => peer(&run.frame).map_or(Answer::Left, Answer::Translated),
            verdict if verdict >= REFUSED => {
                let index = usize::try_from(verdict - REFUSED).unwrap_or(0);
                DropReason::ALL.get(index).map_or(Answer::Left, |reason| Answer::Refused(*reason))
            }
            _ => Answer::Left,
        };
        Ok((answer, run.steps))
    }

    /// Runs a tc program on a packet that came by a device.
    ///
    /// # Errors
    ///
    /// [`LoadError::Program`].
    pub fn tc(&mut self, name: &'static str, ifindex: u32, frame: &[u8]) -> Result<Run, LoadError> {
        self.forget()?;
        self.then_tc(name, ifindex, frame)
    }

    /// As [`Self::tc`], for a packet that the last run has let go on: the flows that that one would have
    /// added are known.
    ///
    /// # Errors
    ///
    /// [`LoadError::Program`].
    pub fn then_tc(
        &mut self,
        name: &'static str,
        ifindex: u32,
        frame: &[u8],
    ) -> Result<Run, LoadError> {
        let failed = |source| LoadError::Program { name, source };
        self.begin()?;
        let mut out = vec![0; frame.len() + 256];
        let mut context = [0_u8; SKB_LEN];
        context[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let program = self.object.program_mut(name).ok_or(LoadError::NoProgram { name })?;
        let program: &mut SchedClassifier = program.try_into().map_err(failed)?;
        if program.fd().is_err() {
            program.load().map_err(failed)?;
        }
        let result = program.test_run(options).map_err(failed)?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(0));
        self.end(result.return_value.cast_signed(), out)
    }

    /// Runs an XDP program on a packet that came by a device.
    ///
    /// # Errors
    ///
    /// [`LoadError::Program`].
    pub fn xdp(
        &mut self,
        name: &'static str,
        ifindex: u32,
        frame: &[u8],
    ) -> Result<Run, LoadError> {
        let failed = |source| LoadError::Program { name, source };
        self.forget()?;
        self.begin()?;
        let mut out = vec![0; frame.len() + 256];
        let context = xdp::context(ifindex, frame);
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let program = self.object.program_mut(name).ok_or(LoadError::NoProgram { name })?;
        let program: &mut Xdp = program.try_into().map_err(failed)?;
        if program.fd().is_err() {
            program.load().map_err(failed)?;
        }
        let result = program.test_run(options).map_err(failed)?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(0));
        self.end(result.return_value.cast_signed(), out)
    }

    /// Flows that earlier runs would have added are known no more.
    fn forget(&mut self) -> Result<(), LoadError> {
        let name = names::TRACE_FLOWS;
        let failed = |source| LoadError::Map { name, source };
        let map = self.object.map_mut(name).ok_or(LoadError::NoMap { name })?;
        let mut map: HashMap<&mut MapData, FlowKey, Flow> =
            HashMap::try_from(map).map_err(failed)?;
        let keys = map.keys().collect::<Result<Vec<_>, _>>().map_err(failed)?;
        keys.iter().try_for_each(|key| map.remove(key)).map_err(failed)
    }

    fn begin(&mut self) -> Result<(), LoadError> {
        let failed = |source| LoadError::Map { name: names::TRACE_LENGTH, source };
        self.array::<u32>(names::TRACE_LENGTH)?.set(0, 0, 0).map_err(failed)?;
        let mut steps = self.array::<Words>(names::TRACE)?;
        for at in 0..STEPS {
            let failed = |source| LoadError::Map { name: names::TRACE, source };
            steps.set(at, [0; size_of::<Step>() / 4], 0).map_err(failed)?;
        }
        Ok(())
    }

    fn end(&mut self, verdict: i32, frame: Vec<u8>) -> Result<Run, LoadError> {
        let failed = |source| LoadError::Map { name: names::TRACE_LENGTH, source };
        let noted = self.array::<u32>(names::TRACE_LENGTH)?.get(&0, 0).map_err(failed)?;
        let rows = self.array::<Words>(names::TRACE)?;
        let read = |at| {
            let failed = |source| LoadError::Map { name: names::TRACE, source };
            rows.get(&at, 0).map(|words| step(&words)).map_err(failed)
        };
        let steps = (0..noted.min(STEPS)).map(read).collect::<Result<_, _>>()?;
        Ok(Run { verdict, frame, steps })
    }

    fn array<V: Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, V>, LoadError> {
        let map = self.object.map_mut(name).ok_or(LoadError::NoMap { name })?;
        Array::try_from(map).map_err(|source| LoadError::Map { name, source })
    }
}

fn step(words: &Words) -> Step {
    let mut step = Step { kind: words[0], yes: words[1], ..Step::default() };
    let (key, row) = words[2..].split_at(step.key.len());
    step.key.copy_from_slice(key);
    step.row.copy_from_slice(row);
    step
}

fn peer(frame: &[u8]) -> Option<Peer> {
    let bytes = frame.get(ETH_LEN..ETH_LEN + 18)?;
    let (addr, port) = bytes.split_at(16);
    Some(Peer {
        addr: Addr::from_octets(addr.try_into().ok()?),
        port: port.try_into().ok()?,
        reserved: [0; 2],
    })
}
