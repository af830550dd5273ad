//! Programs of somebody else's on the same device as ours, one that the kernel runs before ours and one behind.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions, qdisc_add_clsact},
    },
    sys::{Stats, enable_stats},
};
use node_agent::dataplane::{TcPath, object};

use super::space::Space;

/// With empty maps our own program lets everything pass, and is as good as anybody's.
const PROGRAM: &str = "tc_to_underlay";
const DIRECTIONS: [TcAttachType; 2] = [TcAttachType::Ingress, TcAttachType::Egress];

/// How often each of the two has run, the one before ours first.
pub(crate) type Runs = [u64; 2];

/// The programs, loaded; they count their runs.
pub(crate) struct Foreign {
    objects: Arc<Mutex<[Ebpf; 2]>>,
    _counting: OwnedFd,
}

impl Foreign {
    pub(crate) fn load() -> Self {
        let object = || {
            let mut object = EbpfLoader::new().load(object()).unwrap();
            program(&mut object).load().unwrap();
            object
        };
        let objects = Arc::new(Mutex::new([object(), object()]));
        Self { objects, _counting: enable_stats(Stats::RunTime).unwrap() }
    }

    /// Puts both on a node's device, in both directions; where there are two ways to do so, one takes the one and
    /// one the other. They stay as long as the device.
    pub(crate) fn attach(&self, node: &Space, ours: Option<TcPath>) {
        let objects = Arc::clone(&self.objects);
        node.run(move || {
            // There already on a kernel without tcx, where our filters have made it.
            let _there = qdisc_add_clsact("eth0");
            let mut objects = lock(&objects);
            let [before, behind] = &mut *objects;
            for direction in DIRECTIONS {
                let first = TcAttachOptions::TcxOrder(LinkOrder::first());
                let filter = |priority| {
                    let options = NlOptions { priority, ..NlOptions::default() };
                    TcAttachOptions::Netlink(options)
                };
                if ours == Some(TcPath::Clsact)
                    || keep(before, |one| one.attach_with_options("eth0", direction, first))
                        .is_err()
                {
                    keep(before, |one| one.attach_with_options("eth0", direction, filter(1)))
                        .unwrap();
                }
                keep(behind, |one| one.attach_with_options("eth0", direction, filter(20))).unwrap();
            }
        });
    }

    pub(crate) fn runs(&self) -> Runs {
        lock(&self.objects).each_mut().map(|object| program(object).info().unwrap().run_count())
    }

    /// How often each has run since.
    pub(crate) fn since(&self, before: Runs) -> Runs {
        let now = self.runs();
        [now[0] - before[0], now[1] - before[1]]
    }
}

fn lock(objects: &Mutex<[Ebpf; 2]>) -> MutexGuard<'_, [Ebpf; 2]> {
    objects.lock().unwrap()
}

fn program(object: &mut Ebpf) -> &mut SchedClassifier {
    object.program_mut(PROGRAM).unwrap().try_into().unwrap()
}

/// Attaches for as long as the device is there.
#[expect(
    clippy::mem_forget,
    reason = "aya would take it off, and from a device of another namespace"
)]
fn keep(
    object: &mut Ebpf,
    attach: impl FnOnce(&mut SchedClassifier) -> Result<SchedClassifierLinkId, ProgramError>,
) -> Result<(), ProgramError> {
    let program = program(object);
    let link = attach(program)?;
    std::mem::forget(program.take_link(link)?);
    Ok(())
}
