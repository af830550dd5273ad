//! Sockets that a successor process may bind before its predecessor lets go.
//!
//! Effects.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
};

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, listen, socket_with,
    sockopt::{set_ip_freebind, set_socket_reuseaddr, set_socket_reuseport},
};

/// Connections that wait to be accepted; the kernel's own default bound (`somaxconn`) is 4,096.
const BACKLOG: i32 = 256;

/// A UDP socket that shares its address with others of the same user (`SO_REUSEPORT`), and does not
/// mind when the address is not there yet.
///
/// # Errors
/// When the kernel refuses, as when somebody else has the address for themselves.
pub fn shared_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    shared(address, SocketType::DGRAM).map(UdpSocket::from)
}

/// A TCP listener of the same kind.
///
/// # Errors
/// When the kernel refuses, as when somebody else has the address for themselves.
pub fn shared_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = shared(address, SocketType::STREAM)?;
    listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

fn shared(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = match address.ip() {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, kind, flags, None)?;
    if kind == SocketType::STREAM {
        // Connections of a predecessor may still be in TIME_WAIT.
        set_socket_reuseaddr(&socket, true)?;
    }
    set_socket_reuseport(&socket, true)?;
    set_ip_freebind(&socket, true)?;
    bind(&socket, &address)?;
    Ok(socket)
}
