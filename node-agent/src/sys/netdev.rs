//! What a device's driver can do with XDP, as the kernel's generic netlink family `netdev` has it (6.3).
//!
//! Effects, but for the messages.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// `GENL_ID_CTRL`, which gives the number of a family, and its command for it.
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `NETDEV_CMD_DEV_GET` and attributes of `linux/netdev.h`.
const GET_DEVICE: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`: the driver takes frames of others that are redirected to it.
const TAKES_FRAMES: u64 = 1 << 2;
/// Bytes of `struct nlmsghdr` and of `struct genlmsghdr`.
const NETLINK_HEAD: usize = 16;
const GENERIC_HEAD: usize = 4;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;

/// Whether a device takes frames that XDP programs of other devices redirect to it; `None` where the kernel
/// does not tell.
///
/// # Errors
///
/// What the kernel says to asking, `ENODEV` when the device is gone.
pub fn takes_frames(ifindex: u32) -> io::Result<Option<bool>> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let family = match ask(&socket, &request(CONTROLLER, GET_FAMILY, FAMILY_NAME, b"netdev\0")) {
        Ok(answer) => attribute(&answer, FAMILY_ID)
            .and_then(|id| Some(u16::from_ne_bytes(id.try_into().ok()?))),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(error) => return Err(error),
    };
    let Some(family) = family else { return Ok(None) };
    let answer = ask(&socket, &request(family, GET_DEVICE, IFINDEX, &ifindex.to_ne_bytes()))?;
    let features = attribute(&answer, XDP_FEATURES)
        .and_then(|bytes| Some(u64::from_ne_bytes(bytes.try_into().ok()?)));
    Ok(features.map(|features| features & TAKES_FRAMES != 0))
}

/// A message with one attribute.
fn request(family: u16, command: u8, attribute: u16, value: &[u8]) -> Vec<u8> {
    let attribute_len = 4 + value.len();
    let padded = attribute_len.next_multiple_of(4);
    let length = NETLINK_HEAD + GENERIC_HEAD + padded;
    let mut message = Vec::with_capacity(length);
    // What is asked for is some dozen bytes long.
    message.extend(u32::try_from(length).unwrap_or(0).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(u16::try_from(attribute_len).unwrap_or(0).to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    message.resize(length, 0);
    message
}

/// The kernel's answer, its netlink header taken off.
fn ask(socket: &Socket, message: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(message, 0)?;
    let (answer, _from) = socket.recv_from_full()?;
    let kind = answer.get(4..6).and_then(|two| two.try_into().ok()).map(u16::from_ne_bytes);
    let body = answer.get(NETLINK_HEAD..).unwrap_or(&[]);
    if kind == Some(ERROR) {
        let code =
            body.get(..4).and_then(|four| four.try_into().ok()).map_or(0, i32::from_ne_bytes);
        return Err(io::Error::from_raw_os_error(code.saturating_neg()));
    }
    Ok(body.get(GENERIC_HEAD..).unwrap_or(&[]).to_vec())
}

/// The value of an attribute.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?);
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..usize::from(length))?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(usize::from(length).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_padded_and_its_attribute_is_found_again() {
        let message = request(20, GET_DEVICE, FAMILY_NAME, b"netdev\0");
        assert_eq!(message.len(), 32);
        assert_eq!(message[..4], 32_u32.to_ne_bytes());
        let attributes = &message[NETLINK_HEAD + GENERIC_HEAD..];
        assert_eq!(attribute(attributes, FAMILY_NAME), Some(&b"netdev\0"[..]));
        assert_eq!(attribute(attributes, FAMILY_ID), None);
        assert_eq!(attribute(&attributes[..6], FAMILY_NAME), None, "cut short");
        assert_eq!(attribute(&[0; 8], FAMILY_NAME), None, "no length");
    }
}
