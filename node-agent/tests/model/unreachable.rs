//! The answer that tells a client that nobody answers: port unreachable, in the name of the address that it
//! asked (RFC 792, RFC 4443), with the first twenty bytes behind the IP header.

use std::net::IpAddr;

use super::frame::{Frame, TCP, checksum};

/// The answer to a packet, as it is sent back by the device that the packet came by; `None` where none is
/// due (RFC 1122, section 3.2.2).
pub(crate) fn answer(asked: &Frame) -> Option<Vec<u8>> {
    let is_later = asked.fragment.is_some_and(|(from, ..)| from != 0);
    let is_reset = asked.proto == TCP && asked.flags & super::frame::RST != 0;
    if is_later || is_reset {
        return None;
    }
    let v4 = matches!(asked.src.0, IpAddr::V4(_));
    let quoted = if v4 { 40 } else { 60 };
    let mut quote = asked.bytes().split_off(14);
    // Always as long, filled up with zeros.
    quote.resize(quoted, 0);
    let kind = if v4 { (3, 3, [0; 4]) } else { (1, 4, [0; 4]) };
    let from = asked.dst.0;
    let mut error = Frame::error_quoting(kind, (from, asked.src.0), &quote);
    (error.dst_mac, error.src_mac) = (asked.src_mac, asked.dst_mac);
    let mut bytes = error.bytes();
    if v4 {
        // Neither an identification nor a wish not to be fragmented.
        bytes[18..22].fill(0);
        bytes[24..26].fill(0);
        let sum = checksum(&bytes[14..34]).to_be_bytes();
        bytes[24..26].copy_from_slice(&sum);
    }
    Some(bytes)
}
