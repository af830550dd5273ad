//! What the reference lets a program do with a packet, and whether what a program did is that.

use std::net::IpAddr;

use ebpf_common::verdict::DropReason;

use super::{
    flows::{Flow, Flows, Kind, Life, Tuple, is_echo},
    frame::{Frame, SCTP},
    rig::{DROP, Outcome, PASS, REDIRECT, hex},
    unreachable,
    way::Way,
    world::End,
};

/// What may become of a packet.
#[derive(Clone, Debug)]
pub(crate) enum Ruling {
    /// The stack gets it as it is.
    Left,
    /// It goes on, exactly so. The frame has its new addresses; the way adds the rest.
    Sent(Frame, Way),
    /// It opens a flow by one of these.
    Opens(Vec<Offer>),
    /// Its sender is told that nobody answers.
    Told(DropReason),
    Dropped(DropReason),
}

/// A way in which a flow may be opened.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) kind: Kind,
    pub(crate) to: End,
    pub(crate) from: IpAddr,
    pub(crate) port: SourcePort,
    pub(crate) way: Way,
}

/// The source port that a flow gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourcePort {
    /// The client's own if it is free there.
    Own,
    /// The client's own if it is free and lies in the node's range.
    OwnInRange,
}

/// Ports that the node gives to flows: below Linux's ephemeral ones and the node ports.
const RANGE: std::ops::RangeInclusive<u16> = 1_024..=29_999;

/// What followed from an outcome that was allowed.
#[derive(Debug)]
pub(crate) enum Effect {
    Nothing,
    Opened(Flow),
}

impl Ruling {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Left => "left to the stack",
            Self::Sent(_, Way::Stack) => "translated for the stack",
            Self::Sent(_, Way::Pod(_)) => "sent to a pod",
            Self::Sent(_, Way::Host) => "sent to the node",
            Self::Sent(_, Way::Out) => "sent on",
            Self::Opens(_) => "flows opened",
            Self::Told(_) => "refused with an answer",
            Self::Dropped(_) => "dropped",
        }
    }

    /// Compares an outcome with what is allowed.
    pub(crate) fn judge(
        &self,
        packet: &Frame,
        outcome: &Outcome,
        flows: &Flows,
    ) -> Result<Effect, String> {
        match self {
            Self::Left => expect(outcome, PASS, &[], &packet.bytes()),
            Self::Dropped(reason) => {
                let same = (outcome.verdict, &outcome.dropped[..]) == (DROP, &[*reason]);
                if same { Ok(()) } else { Err(format!("must be dropped: {}", reason.words())) }
            }
            Self::Told(reason) => match unreachable::answer(packet) {
                Some(answer) => expect(outcome, REDIRECT, &[*reason], &answer),
                None => Self::Dropped(*reason).judge(packet, outcome, flows).map(drop),
            },
            Self::Sent(frame, way) => expect(outcome, way.verdict(), &[], &way.taken(frame)),
            Self::Opens(offers) => return judge_offers(offers, packet, outcome, flows),
        }
        .map(|()| Effect::Nothing)
    }
}

fn judge_offers(
    offers: &[Offer],
    packet: &Frame,
    outcome: &Outcome,
    flows: &Flows,
) -> Result<Effect, String> {
    let mut why = Vec::new();
    for offer in offers {
        match offer.judge(packet, outcome, flows) {
            Ok(flow) => return Ok(flow.map_or(Effect::Nothing, Effect::Opened)),
            Err(words) => why.push(words),
        }
    }
    Err(format!("none of the backends: {}", why.join("; ")))
}

impl Offer {
    /// `None`: it was this way and could not be gone.
    fn judge(
        &self,
        packet: &Frame,
        outcome: &Outcome,
        flows: &Flows,
    ) -> Result<Option<Flow>, String> {
        let asked = Tuple::of(packet);
        let own = Tuple { src: (self.from, asked.src.1), dst: self.to, ..asked };
        let is_free = |sent: &Tuple| !flows.is_taken(&sent.reversed());
        if packet.proto == SCTP && !is_free(&own) {
            let exhausted = Ruling::Dropped(DropReason::PortsExhausted);
            return exhausted.judge(packet, outcome, flows).map(|_| None);
        }
        let may_keep =
            self.port == SourcePort::Own || RANGE.contains(&own.src.1) || packet.proto == SCTP;
        let sent = if may_keep && is_free(&own) {
            own
        } else {
            let port = source_port(packet, &outcome.packet).ok_or("too short")?;
            let sent = Tuple { src: (self.from, port), ..own };
            if !RANGE.contains(&port) || !is_free(&sent) {
                return Err(format!("to {:?} from port {port}, which is not to be had", self.to));
            }
            sent
        };
        let frame = sent.carried_by(packet);
        expect(outcome, self.way.verdict(), &[], &self.way.taken(&frame))?;
        Ok(Some(Flow { asked, sent, kind: self.kind, life: Life::begun_by(packet) }))
    }
}

/// The source port, or the identifier of an echo request, of a translated packet.
fn source_port(before: &Frame, after: &[u8]) -> Option<u16> {
    let ip = if before.src.0.is_ipv4() { 20 } else { 40 + chain_length(before) };
    let at = 14 + ip + if is_echo(before) { 4 } else { 0 };
    Some(u16::from_be_bytes([*after.get(at)?, *after.get(at + 1)?]))
}

fn expect(
    outcome: &Outcome,
    verdict: i32,
    counted: &[DropReason],
    packet: &[u8],
) -> Result<(), String> {
    if (outcome.verdict, &outcome.dropped[..]) != (verdict, counted) {
        return Err(format!("must have verdict {verdict} and count {counted:?}"));
    }
    if is_same(packet, &outcome.packet) {
        return Ok(());
    }
    Err(format!("must leave as {}", hex(packet)))
}

/// Whether two packets are the same. Of a checksum there are two forms, zero and minus zero, that say the
/// same (RFC 1624, section 3), so they may differ there.
fn is_same(expected: &[u8], found: &[u8]) -> bool {
    if expected.len() != found.len() {
        return false;
    }
    let mut at = 0;
    while at < expected.len() {
        if expected[at] == found[at] {
            at += 1;
            continue;
        }
        let pair = |bytes: &[u8]| -> Option<[u8; 2]> { bytes.get(at..at + 2)?.try_into().ok() };
        let zeros = [Some([0, 0]), Some([0xff, 0xff])];
        if !(zeros.contains(&pair(expected)) && zeros.contains(&pair(found))) {
            return false;
        }
        at += 2;
    }
    true
}

/// Bytes of IPv6's extension headers.
fn chain_length(frame: &Frame) -> usize {
    8 * (frame.extensions.len() + usize::from(frame.fragment.is_some()))
}
