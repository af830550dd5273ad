//! What a device's driver does for packets, and who the driver is (`SIOCETHTOOL`).
//!
//! Effects only; takes and returns plain values.
#![expect(unsafe_code, reason = "ioctl takes raw pointers")]

use std::{io, net::UdpSocket, os::fd::AsRawFd as _};

/// What a driver does for packets of a device (`linux/ethtool.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Checksums of packets that leave: they come out finished, whatever the stack has left to it.
    TxChecksums,
    /// Packets that came in are merged by the stack; for veth, packets are taken in by a queue of their own.
    Gro,
    /// Packets that came in are merged by the device.
    Lro,
}

impl Offload {
    /// Command that asks, and command that sets.
    const fn commands(self) -> (u32, u32) {
        match self {
            Self::TxChecksums => (0x16, 0x17),
            Self::Gro => (0x2b, 0x2c),
            Self::Lro => (0x25, 0x26),
        }
    }

    /// The bit that stands for it in what is asked and set.
    const fn bit(self) -> u32 {
        match self {
            Self::TxChecksums | Self::Gro => 1,
            // ETH_FLAG_LRO
            Self::Lro => 1 << 15,
        }
    }
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ethtool_drvinfo` up to the driver's name, and room for the rest.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}
const _: () = assert!(size_of::<DriverInfo>() == 196);

/// `ETHTOOL_GDRVINFO`.
const GET_DRIVER: u32 = 0x03;
/// `SIOCETHTOOL`.
const SIOCETHTOOL: u64 = 0x8946;

/// Whether the driver does something for a device of the thread's network namespace.
///
/// # Errors
///
/// `EOPNOTSUPP` when it cannot, `ENODEV` when there is no such device.
pub fn offload(device: &str, offload: Offload) -> io::Result<bool> {
    let mut value = Value { command: offload.commands().0, data: 0 };
    ask(device, &mut value)?;
    Ok(value.data & offload.bit() != 0)
}

/// Has the driver do it or not.
///
/// # Errors
///
/// As [`offload`], and what the driver says to it.
pub fn set_offload(device: &str, offload: Offload, on: bool) -> io::Result<()> {
    let (get, set) = offload.commands();
    let mut value = Value { command: get, data: 0 };
    ask(device, &mut value)?;
    value.command = set;
    value.data = if on { value.data | offload.bit() } else { value.data & !offload.bit() };
    ask(device, &mut value)
}

/// The driver's name.
///
/// # Errors
///
/// As [`offload`].
pub fn driver(device: &str) -> io::Result<String> {
    let mut info = DriverInfo { command: GET_DRIVER, driver: [0; 32], rest: [0; 160] };
    ask(device, &mut info)?;
    let end = info.driver.iter().position(|byte| *byte == 0).unwrap_or(info.driver.len());
    Ok(String::from_utf8_lossy(&info.driver[..end]).into_owned())
}

fn ask<T>(device: &str, what: &mut T) -> io::Result<()> {
    // Any socket of the namespace will do.
    let socket = UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_no_ipv6| UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)))?;
    // SAFETY: a structure of integers and a union of such, for which zero bytes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = device.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name) {
        *place = libc::c_char::from_ne_bytes([*byte]);
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(what).cast();
    // SAFETY: the request and what it points to outlive the call; `what` has the layout that its command
    // asks for and at least the length.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
