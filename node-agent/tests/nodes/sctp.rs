//! Associations of SCTP, by the kernel's own protocol.
//!
//! Every socket is bound to one address: else the two ends tell each other of all that they have, and talk past
//! what stands between them.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    thread,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, bind, connect, ipproto, listen, socket},
};

use super::cluster::{TIMEOUT, answer};

/// Whether this kernel has the protocol; says so if not.
pub(crate) fn is_there() -> bool {
    let Err(error) = make("127.0.0.1".parse().unwrap()) else { return true };
    assert_eq!(error, Errno::PROTONOSUPPORT);
    skip::because("associations of SCTP, which this kernel does not have (module sctp)");
    false
}

/// A server that says a number, as that of connections.
pub(crate) fn serve(at: SocketAddr, number: u8) {
    let listener = make(at.ip()).unwrap();
    bind(&listener, &at).unwrap();
    listen(&listener, 8).unwrap();
    let listener = TcpListener::from(listener);
    let _sctp = thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let _association = thread::spawn(move || answer(stream, number));
        }
    });
}

/// An association of one stream, with `from` as its only address.
pub(crate) fn associate(from: IpAddr, to: SocketAddr) -> TcpStream {
    let stream = TcpStream::from(make(from).unwrap());
    // The former also holds for the association's making.
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    bind(&stream, &SocketAddr::new(from, 0)).unwrap();
    connect(&stream, &to).unwrap();
    stream
}

fn make(ip: IpAddr) -> rustix::io::Result<OwnedFd> {
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket(family, SocketType::STREAM, Some(ipproto::SCTP))
}
