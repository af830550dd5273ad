//! The answer that tells a client that nobody answers: port unreachable, in the name of the address that it
//! asked (RFC 792, RFC 4443), with the first twenty bytes behind the IP header.

use super::{
    frame::{Frame, TCP},
    told::told,
};

/// The answer to a packet, as it is sent back by the device that the packet came by; `None` where none is
/// due (RFC 1122, section 3.2.2).
pub(crate) fn answer(asked: &Frame) -> Option<Vec<u8>> {
    let is_later = asked.fragment.is_some_and(|(from, ..)| from != 0);
    let is_reset = asked.proto == TCP && asked.flags & super::frame::RST != 0;
    if is_later || is_reset {
        return None;
    }
    let kind = if asked.src.0.is_ipv4() { (3, 3, [0; 4]) } else { (1, 4, [0; 4]) };
    Some(told(asked, asked.dst.0, kind))
}
