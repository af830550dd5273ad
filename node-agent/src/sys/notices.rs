//! Word from the kernel that devices or addresses of a network namespace have changed.
//!
//! Effects. What changed is not told: whoever hears it looks at everything, and so misses nothing when
//! the kernel had more to say than the socket holds.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
        socket_with,
    },
};

/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// Opens a socket in the namespace of the calling thread that hears of every change from now on.
///
/// # Errors
/// When the kernel gives no socket.
pub fn open() -> io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE (linux/netlink.h).
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    Ok(socket)
}

/// Takes one notice. That some were lost is one too.
///
/// # Errors
/// `WouldBlock` when there is none; else when the socket fails.
pub fn take(socket: impl AsFd) -> io::Result<()> {
    // Nobody reads it, and the kernel cuts off what has no room.
    let mut start = [0; 16];
    match recv(socket, &mut start, RecvFlags::empty()) {
        Ok(_) | Err(Errno::NOBUFS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
