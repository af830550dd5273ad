//! Connected sockets of UDP, which no program at sockets translates, and a process of a node that answers at all
//! addresses, so that its node chooses under which one.

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use super::cluster::{POD_PORT, TIMEOUT, any_of};

/// What it answers.
pub(crate) const NUMBER: u8 = 100;

/// Starts it in the caller's namespace, for so many questions: it would keep the namespace else.
pub(crate) fn serve(questions: usize) {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, POD_PORT)).unwrap();
    let _answers = thread::spawn(move || {
        for _ in 0..questions {
            let (_, from) = socket.recv_from(&mut [0]).unwrap();
            socket.send_to(&[NUMBER], from).unwrap();
        }
    });
}

pub(crate) fn connect_udp(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((any_of(to), 0)).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// Whether a datagram is answered within that time.
pub(crate) fn hears(socket: &UdpSocket, patience: Duration) -> bool {
    socket.set_read_timeout(Some(patience)).unwrap();
    // What was refused is told by the next call.
    socket.send(b"?").is_ok() && socket.recv(&mut [0]).is_ok()
}

/// Who answers how often, over connected sockets of UDP.
pub(crate) fn connected(to: SocketAddr, count: usize) -> BTreeMap<u8, usize> {
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        let (socket, mut byte) = (connect_udp(to), *b"?");
        socket.send(&byte).unwrap();
        socket.recv(&mut byte).unwrap();
        *seen.entry(byte[0]).or_default() += 1;
    }
    seen
}

/// How many bytes are answered to so many, over a connected socket.
pub(crate) fn echoed(to: SocketAddr, bytes: usize) -> usize {
    let socket = connect_udp(to);
    socket.send(&vec![b'?'; bytes]).unwrap();
    socket.recv(&mut vec![0; bytes + 1]).unwrap()
}
