//! The copy of the programs that traces: what it says must be allowed too, and its last step shows by which
//! device a packet leaves, which a run of the programs themselves does not.

use std::net::IpAddr;

use ebpf_common::{
    addr::Addr,
    trace::{DROP as DROPPED, INWARD, NEIGHBOUR, PEER, PLAIN, REDIRECT as SENT, STEPS, Step},
    verdict::DropReason,
};
use node_agent::dataplane::tracer::Run;

use super::{
    flows::{Direction, Flows, Kind, Tuple},
    frame::Frame,
    rig::{HOST_DEVICE, Outcome, POD_DEVICE, REDIRECT, VXLAN_DEVICE, hex},
    ruling::Ruling,
    step::Message,
    world::World,
};

/// Compares a traced run with what is allowed. `back` is the device by which the packet came.
pub(crate) fn check(
    run: &Run,
    (message, frame): (&Message, &Frame),
    ruling: &Ruling,
    (world, flows, back): (&World, &Flows, u32),
) -> Result<(), String> {
    let dropped = run.steps.iter().filter(|step| step.kind == DROPPED).map(reason).collect();
    let outcome = Outcome { verdict: run.verdict, packet: run.frame.clone(), dropped };
    let differs = |words: String| {
        let packet = hex(&run.frame);
        format!("{message:?}: traced {} {packet}: {words}\n  allowed: {ruling:?}", run.verdict)
    };
    ruling.judge(frame, &outcome, flows).map_err(differs)?;
    if u32::try_from(run.steps.len()).unwrap() >= STEPS {
        // The last steps are not noted.
        return Ok(());
    }
    let sent: Vec<[u32; 2]> = run
        .steps
        .iter()
        .filter(|step| step.kind == SENT)
        .map(|step| [step.key[0], step.key[1]])
        .collect();
    let (_, to) = ends(&run.frame);
    if matches!(message, Message::Error(_)) && World::far_node(&to).is_some() {
        // It goes as the packets of its flow go, which its addresses do not show.
        return Ok(());
    }
    // Who did not come by the tunnel is answered as he came, though the answers are a pod's.
    let met = flows.find(&Tuple::of(frame));
    let turns = met.is_some_and(|(_, flow, direction)| {
        (flow.kind, direction) == (Kind::GaveWay, Direction::Reverse)
    });
    let expected = (run.verdict == REDIRECT).then(|| device(run, (ruling, back), (world, turns)));
    let is_same = match (&sent[..], expected) {
        ([], None) => true,
        ([[_, kind]], Some([_, NEIGHBOUR])) => *kind == NEIGHBOUR,
        ([one], Some(expected)) => *one == expected,
        _ => false,
    };
    if is_same { Ok(()) } else { Err(differs(format!("sent by {sent:?}, not by {expected:?}"))) }
}

fn reason(step: &Step) -> DropReason {
    DropReason::ALL[usize::try_from(step.key[0]).unwrap()]
}

/// The device and the way of leaving that a packet must have, as it is when it leaves.
fn device(run: &Run, (ruling, back): (&Ruling, u32), (world, turns): (&World, bool)) -> [u32; 2] {
    if matches!(ruling, Ruling::Told(_)) {
        return [back, PLAIN];
    }
    if run.frame[..6] == super::rig::OWN_MAC {
        return [HOST_DEVICE, INWARD];
    }
    let (src, dst) = ends(&run.frame);
    if let Some(pod) = World::pod(&dst) {
        return [POD_DEVICE + u32::try_from(pod).unwrap(), PEER];
    }
    let is_pods = World::pod(&src).is_some();
    let by_tunnel = match (World::far_node_of_pod(&dst), World::far_node(&dst)) {
        (Some(node), _) => world.is_tunnelled(node),
        // Between nodes the underlay is shorter, but it need not know pods.
        (None, Some(node)) => world.is_tunnelled(node) && is_pods && !turns,
        (None, None) => false,
    };
    if by_tunnel { [VXLAN_DEVICE, PLAIN] } else { [0, NEIGHBOUR] }
}

/// Source and destination of a packet.
pub(crate) fn ends(bytes: &[u8]) -> (IpAddr, IpAddr) {
    let addr = |at: usize| {
        if bytes[12..14] == [8, 0] {
            let at = 26 + at * 4;
            Addr::v4(bytes[at..at + 4].try_into().unwrap()).ip()
        } else {
            let at = 22 + at * 16;
            Addr::from_octets(bytes[at..at + 16].try_into().unwrap()).ip()
        }
    };
    (addr(0), addr(1))
}
