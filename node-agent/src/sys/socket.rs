//! Sockets that a successor process may bind before its predecessor lets go.
//!
//! Effects. And what a socket tells of the network namespace that it was opened in.
#![expect(unsafe_code, reason = "no crate here reads SO_NETNS_COOKIE")]

use std::{
    io,
    mem::size_of,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
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

/// `SO_NETNS_COOKIE` (asm-generic/socket.h), since Linux 5.14.
const SO_NETNS_COOKIE: i32 = 71;

/// The cookie of the calling thread's network namespace: what `bpf_get_netns_cookie` gives to
/// programs, unique for a boot.
///
/// # Errors
/// When the kernel gives no socket, or knows no cookies.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: the option is written to `cookie`, at most `length` bytes, which is its size; both
    // outlive the call, and the descriptor is open.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if status == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
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
