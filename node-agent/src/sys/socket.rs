//! Sockets that a successor process may bind before its predecessor lets go.
//!
//! Effects.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, listen, recvfrom, socket_with,
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

/// Takes a datagram that is queued at a socket, by asking the kernel rather than a runtime, which may
/// not know of it yet. `None` when there is none.
///
/// # Errors
/// When the socket fails.
pub fn take_queued(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, SocketAddr)>> {
    match recvfrom(socket, buffer, RecvFlags::DONTWAIT) {
        Ok((length, _, peer)) => {
            let peer = peer.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            Ok(Some((length, SocketAddr::try_from(peer)?)))
        }
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
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
