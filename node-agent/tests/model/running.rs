//! Runs of the loaded programs: packets through tc's and XDP's, questions through the sockets' twin.

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use ebpf_common::{
    addr::Addr,
    packet::ETH_LEN,
    service::Peer,
    socket::{Ask, CONNECT, DATAGRAM, LEFT, REFUSED, TRANSLATED},
    verdict::DropReason,
};
use node_agent::dataplane::tracer::Run;

use super::{
    asking::Question,
    rig::{Answered, DROP, Outcome, Rig},
    step::Hook,
};

/// What XDP says of a packet (`enum xdp_action`, linux/bpf.h).
pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_TX: u32 = 3;

/// Bytes of `struct __sk_buff` (linux/bpf.h) as far as 6.1 has it.
const CONTEXT: usize = 184;

impl Rig {
    /// Runs a packet through a program.
    pub(crate) fn run(&mut self, hook: Hook, packet: &[u8]) -> Outcome {
        let (verdict, out) = self.test_run(hook, packet);
        // An answer that tells of a refusal is another packet than the one that came in.
        let is_answer = [20, 23].iter().any(|at| out.get(*at) != packet.get(*at));
        let is_counted = verdict == DROP || is_answer || out.len() != packet.len();
        let dropped = if is_counted { self.newly_counted() } else { Vec::new() };
        Outcome { verdict, packet: out, dropped }
    }

    /// Runs a packet through the copy of a program that traces.
    pub(crate) fn trace(&mut self, hook: Hook, packet: &[u8]) -> Run {
        let device = self.device(hook);
        self.tracer.tc(hook.program(), device, packet).unwrap()
    }

    /// Runs a packet from outside through XDP's program; gives its action and the packet after it.
    pub(crate) fn drive(&mut self, packet: &[u8]) -> (u32, Vec<u8>) {
        let program = self.object.program_mut("xdp_entry").unwrap();
        let program: &mut Xdp = program.try_into().unwrap();
        let mut out = vec![0; packet.len() + 256];
        // `struct xdp_md` (linux/bpf.h): the data's end is its second word, `ingress_ifindex` its fourth.
        let mut context = [0_u8; 24];
        context[4..8].copy_from_slice(&u32::try_from(packet.len()).unwrap().to_ne_bytes());
        context[12..16].copy_from_slice(&self.uplink.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        let result = program.test_run(options).unwrap();
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        (result.return_value, out)
    }

    /// The device at which a hook is; 0: loopback's stands for it.
    pub(crate) const fn device(&self, hook: Hook) -> u32 {
        match hook {
            Hook::FromUnderlay => self.uplink,
            Hook::FromPod
            | Hook::FromOverlay
            | Hook::FromHost
            | Hook::ToPod { .. }
            | Hook::ToUnderlay { .. }
            | Hook::ToOverlay { .. } => 0,
        }
    }

    fn test_run(&mut self, hook: Hook, packet: &[u8]) -> (i32, Vec<u8>) {
        // `ingress_ifindex` is its tenth word, `ifindex` the next.
        let mut context = [0; CONTEXT];
        let came_by = u32::from(hook.came_by_device());
        context[36..40].copy_from_slice(&came_by.to_ne_bytes());
        context[40..44].copy_from_slice(&self.device(hook).to_ne_bytes());
        self.test_run_by(hook.program(), packet, &context)
    }

    fn test_run_by(&mut self, name: &str, packet: &[u8], context: &[u8]) -> (i32, Vec<u8>) {
        let program = self.object.program_mut(name).unwrap();
        let program: &mut SchedClassifier = program.try_into().unwrap();
        let mut out = vec![0; packet.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(context);
        let result = program.test_run(options).unwrap();
        out.truncate(usize::try_from(result.data_size_out).unwrap());
        (result.return_value.cast_signed(), out)
    }

    /// What was counted since the last time.
    pub(crate) fn newly_counted(&mut self) -> Vec<DropReason> {
        let mut reasons = Vec::new();
        for ((reason, count), before) in
            self.maps.drops().unwrap().into_iter().zip(&mut self.counted)
        {
            let new = usize::try_from(count - *before).unwrap();
            reasons.extend(std::iter::repeat_n(reason, new));
            *before = count;
        }
        reasons
    }

    /// Asks the twin of the socket programs, which here writes what they would write.
    pub(crate) fn ask(&mut self, question: &Question) -> Answered {
        let port = question.to.1.to_be_bytes();
        let wanted = Peer { addr: Addr::from(question.to.0), port, reserved: [0; 2] };
        let ask = Ask {
            netns: question.asker.cookie(),
            wanted,
            random: question.random,
            proto: question.proto,
            call: if question.datagram { DATAGRAM } else { CONNECT },
            reserved: [0; 6],
        };
        let frame = [&[0; ETH_LEN][..], &ask.bytes()].concat();
        let (verdict, out) = self.test_run_by("tc_trace_socket", &frame, &[0; CONTEXT]);
        match verdict {
            LEFT => Answered::Left,
            TRANSLATED => {
                let bytes = &out[ETH_LEN..];
                let addr = Addr::from_octets(bytes[..16].try_into().unwrap());
                Answered::To((addr.ip(), u16::from_be_bytes([bytes[16], bytes[17]])))
            }
            verdict => {
                let index = usize::try_from(verdict - REFUSED).unwrap();
                self.counted[index] += 1;
                Answered::Refused(DropReason::ALL[index])
            }
        }
    }
}
