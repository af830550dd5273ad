//! Packets from outside where XDP's program runs in the driver: through that program first, and through tc's
//! if it passes them. What arrives must be what tc alone would have sent; only the way may be another one.

use super::{
    frame::{Frame, UDP},
    loaded::{UPLINK_MAC, next_mac},
    rig::{DROP, Outcome, REDIRECT, Rig, hex},
    ruling::Ruling,
    running::{XDP_PASS, XDP_TX},
    step::Hook,
    tracing::ends,
    world::{FAR_NODES, NODE, VXLAN_PORT, World, ip},
};

/// What XDP did with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driven {
    /// Nothing that shows.
    Left,
    /// It translated it and sent it on.
    Sent,
    /// It translated it for a pod here.
    Passed,
}

impl Driven {
    /// What is counted for it.
    pub(crate) const fn name(self, ruling: &Ruling) -> &'static str {
        match (self, ruling) {
            (Self::Left, _) => ruling.name(),
            (_, Ruling::Opens(_)) => "flows opened in the driver",
            (Self::Sent, _) => "sent on in the driver",
            (Self::Passed, _) => "translated in the driver",
        }
    }
}

/// Runs a packet; the outcome is told as if tc had had it alone.
pub(crate) fn run(
    rig: &mut Rig,
    frame: &Frame,
    world: &World,
) -> Result<(Driven, Outcome), String> {
    let bytes = frame.bytes();
    let (action, out) = rig.drive(&bytes);
    match action {
        XDP_PASS => {
            let driven = if out == bytes { Driven::Left } else { Driven::Passed };
            Ok((driven, rig.run(Hook::FromUnderlay, &out)))
        }
        XDP_TX => {
            let packet = arrived(&out, frame, world).map_err(|words| {
                format!("{frame:?}\n  in  {}\n  XDP {}\n  {words}", hex(&bytes), hex(&out))
            })?;
            let outcome = Outcome { verdict: REDIRECT, packet, dropped: Vec::new() };
            Ok((Driven::Sent, outcome))
        }
        // XDP drops nothing that fits.
        _ => {
            let dropped = rig.newly_counted();
            Ok((Driven::Left, Outcome { verdict: DROP, packet: out, dropped }))
        }
    }
}

/// A packet that XDP has sent, as it is where tc would have handed it over: the tunnel's headers, which a
/// device would have added, and the MACs, which the stack would have, are checked and taken off.
fn arrived(sent: &[u8], frame: &Frame, world: &World) -> Result<Vec<u8>, String> {
    let tunnelled = inner(sent);
    let packet = tunnelled.unwrap_or(sent);
    let to = ends(packet).1;
    let far = World::far_node_of_pod(&to).filter(|node| world.is_tunnelled(*node));
    let next = far.map_or(to, |node| ip(FAR_NODES[node], to.is_ipv6()));
    let mac = next_mac(&next).ok_or("sent to a next hop that nobody knows")?;
    if [&sent[..6], &sent[6..12]] != [mac, UPLINK_MAC] {
        return Err(format!("must be addressed to {}", hex(&mac)));
    }
    match (tunnelled, far) {
        (None, None) => Ok([&frame.dst_mac[..], &frame.src_mac, &sent[12..]].concat()),
        (Some(inner), Some(node)) => {
            let expected = in_tunnel(inner, node, sent);
            if sent == expected {
                return Ok(inner.to_vec());
            }
            Err(format!("the tunnel's headers must be {}", hex(&expected)))
        }
        (Some(_), None) => Err("sent by the tunnel".to_owned()),
        (None, Some(_)) => Err("not sent by the tunnel".to_owned()),
    }
}

/// Bytes before what a tunnel carries: Ethernet, IP, UDP and VXLAN (RFC 7348, section 5).
const fn outer_length(v6: bool) -> usize {
    14 + if v6 { 40 } else { 20 } + 8 + 8
}

/// What a packet of the tunnel carries; `None`: it is none.
fn inner(sent: &[u8]) -> Option<&[u8]> {
    let v6 = sent[12..14] != [8, 0];
    let (proto, udp) = if v6 { (sent[20], 54) } else { (sent[23], 34) };
    let is_tunnels = proto == UDP && sent.get(udp + 2..udp + 4)? == VXLAN_PORT.to_be_bytes();
    if is_tunnels { sent.get(outer_length(v6)..) } else { None }
}

/// A packet in the tunnel to a node, with the identification and the source port that are the sender's to
/// choose as they are in `like`.
fn in_tunnel(inner: &[u8], node: usize, like: &[u8]) -> Vec<u8> {
    let v6 = ends(inner).1.is_ipv6();
    let at = outer_length(v6) - 16;
    // From the dynamic range, as RFC 7348 asks for.
    let port = u16::from_be_bytes([like[at], like[at + 1]]).max(49_152);
    let to = ip(FAR_NODES[node], v6);
    let outer = Frame {
        dst_mac: next_mac(&to).unwrap_or_default(),
        src_mac: UPLINK_MAC,
        payload: [&[8, 0, 0, 0, 0, 0, 1, 0], inner].concat(),
        unchecked: true,
        ..Frame::between(UDP, (ip(NODE[0], v6), port), (to, VXLAN_PORT))
    };
    let mut bytes = outer.bytes();
    if !v6 {
        // Whatever its identification; it may be fragmented.
        bytes[18..20].copy_from_slice(&like[18..20]);
        bytes[20..22].fill(0);
        bytes[24..26].fill(0);
        let sum = super::frame::checksum(&bytes[14..34]).to_be_bytes();
        bytes[24..26].copy_from_slice(&sum);
    }
    bytes
}
