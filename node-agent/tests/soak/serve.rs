//! Servers of both protocols and families that answer with a number.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    thread,
};

/// Servers of both protocols at port 8080.
pub(crate) fn serve(number: u8) {
    let listener = TcpListener::bind("[::]:8080").unwrap();
    let _tcp = thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut byte = [0];
            // The far end may have gone; a request of one byte comes with its connection.
            let _gone = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&[number]));
        }
    });
    let socket = UdpSocket::bind("[::]:8080").unwrap();
    let _udp = thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut bytes) {
            let _gone = socket.send_to(&[number], from);
        }
    });
}
