//! Kubernetes' container runtime interface (CRI v1) as a client speaks it: gRPC over a unix socket, with
//! the few messages that a pod's life needs.
//!
//! Field numbers are those of `k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`.

use std::{io, path::Path, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::UnixStream, time::timeout};

/// Longer than a runtime takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A protobuf message under construction.
#[derive(Clone, Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    pub(crate) fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    pub(crate) fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    pub(crate) fn message(self, field: u64, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len().try_into().unwrap());
        self.0.extend(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value > 0x7f {
            self.0.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
            value >>= 7;
        }
        self.0.push(value.try_into().unwrap());
    }
}

/// The fields of a message that was received: number, and value by its kind.
pub(crate) struct Fields<'a>(Vec<(u64, Value<'a>)>);

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Fields<'a> {
    pub(crate) fn read(mut from: &'a [u8]) -> Self {
        let mut fields = Vec::new();
        while !from.is_empty() {
            let key = varint(&mut from);
            let value = match key & 7 {
                0 => Value::Number(varint(&mut from)),
                2 => {
                    let length = varint(&mut from).try_into().unwrap();
                    let (value, rest) = from.split_at(length);
                    from = rest;
                    Value::Bytes(value)
                }
                kind => panic!("no CRI message has a field of wire type {kind}"),
            };
            fields.push((key >> 3, value));
        }
        Self(fields)
    }

    /// The values of a repeated text or message.
    pub(crate) fn all(&self, wanted: u64) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().filter_map(move |(field, value)| match value {
            Value::Bytes(bytes) if *field == wanted => Some(*bytes),
            Value::Bytes(_) | Value::Number(_) => None,
        })
    }

    /// A message; empty where there is none.
    pub(crate) fn message(&self, wanted: u64) -> Self {
        Self::read(self.all(wanted).next().unwrap_or_default())
    }

    pub(crate) fn text(&self, wanted: u64) -> String {
        String::from_utf8_lossy(self.all(wanted).next().unwrap_or_default()).into_owned()
    }

    pub(crate) fn number(&self, wanted: u64) -> u64 {
        let found = self.0.iter().find_map(|(field, value)| match value {
            Value::Number(number) if *field == wanted => Some(*number),
            Value::Bytes(_) | Value::Number(_) => None,
        });
        found.unwrap_or(0)
    }
}

fn varint(from: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (byte, rest) = from.split_first().expect("a whole number");
        *from = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// Calls a method (`RuntimeService/Version`) and returns the encoded answer.
///
/// # Errors
/// The runtime's words, or what kept it from answering.
pub(crate) fn call(socket: &Path, method: &str, message: &Message) -> io::Result<Bytes> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = async { timeout(PATIENCE, exchange(socket, method, &message.0)).await? };
    runtime.block_on(answer).map_err(|error| io::Error::other(format!("{method}: {error}")))
}

async fn exchange(socket: &Path, method: &str, message: &[u8]) -> io::Result<Bytes> {
    let stream = TokioIo::new(UnixStream::connect(socket).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
            .await
            .map_err(io::Error::other)?;
    let _driver = tokio::spawn(connection);
    // gRPC over HTTP/2: a frame is a flag (not compressed), the length and the message.
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.len().try_into().unwrap());
    frame.put_slice(message);
    let request = http::Request::post(format!("http://localhost/runtime.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(frame.freeze()))
        .map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let (head, body) = response.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?;
    // A failure without an answer has its trailers in the head.
    let trailers = body.trailers().cloned().unwrap_or(head.headers);
    if trailers.get("grpc-status").is_none_or(|status| status != "0") {
        return Err(io::Error::other(format!("{:?}", trailers.get("grpc-message"))));
    }
    Ok(body.to_bytes().slice(5..))
}
