//! One agent's connection: whole requests in, answers and news out, never blocking the shim.

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use shim::wire::{self, Body, Message, Request};

/// Most bytes that wait for a reader; one that is slower loses its connection and asks anew. Holds the
/// longest list: 100 containers with messages of 4 KiB, each byte escaped to six.
const MAX_WAITING_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    pub(crate) closed: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, input: Vec::new(), output: Vec::new(), closed: false })
    }

    pub(crate) fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Takes what has come and returns the whole requests in it.
    pub(crate) fn read(&mut self, space: &mut [u8]) -> Vec<Request> {
        let mut requests = Vec::new();
        match self.stream.read(space) {
            Ok(0) => self.closed = true,
            Ok(count) => self.input.extend_from_slice(space.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_broken) => self.closed = true,
        }
        while !self.closed {
            match wire::take_frame(&mut self.input) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(_undecodable) => self.closed = true,
            }
        }
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        requests
    }

    pub(crate) fn send(&mut self, seq: u64, body: Body) {
        match wire::frame(&Message { seq, body }) {
            Ok(bytes) if self.output.len() + bytes.len() <= MAX_WAITING_BYTES => {
                self.output.extend_from_slice(&bytes);
                self.flush();
            }
            _ => self.closed = true,
        }
    }

    pub(crate) fn flush(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_broken) => {
                    self.closed = true;
                    return;
                }
            }
        }
        self.output = Vec::new();
    }

    /// Before the shim ends: whatever still waits goes out.
    pub(crate) fn finish(&mut self) {
        if self.stream.set_nonblocking(false).is_ok() {
            self.flush();
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
