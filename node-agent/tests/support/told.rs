//! What a client is told, at once, of why a packet of its does not arrive.

use std::net::IpAddr;

use super::frame::{Frame, checksum};

/// An ICMP error of that type, code and rest of the header about a packet, as a program sends it back to who sent
/// that.
pub(crate) fn told(asked: &Frame, from: IpAddr, kind: (u8, u8, [u8; 4])) -> Vec<u8> {
    let v4 = asked.src.0.is_ipv4();
    let mut quote = asked.bytes().split_off(14);
    // Always as long, filled up with zeros.
    quote.resize(if v4 { 40 } else { 60 }, 0);
    let error = Frame::error_quoting(kind, (from, asked.src.0), &quote);
    let mut bytes = Frame { dst_mac: asked.src_mac, src_mac: asked.dst_mac, ..error }.bytes();
    if v4 {
        // Neither an identification nor a wish not to be fragmented.
        bytes[18..22].fill(0);
        bytes[24..26].fill(0);
        let sum = checksum(&bytes[14..34]).to_be_bytes();
        bytes[24..26].copy_from_slice(&sum);
    }
    bytes
}
