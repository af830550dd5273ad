//! `port-forward` as kubectl speaks it: SPDY/3.1 streams in WebSocket messages, two for each connection (one
//! for errors, one for data, paired by their request id). Effects.
//!
//! Tasks: one reads and hands out, one writes, one a connection. A pod that does not read slows the whole
//! tunnel, as the client's one stream has no way to wait for one of its connections only.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt as _, stream::SplitStream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    forward::{CHUNK_BYTES, Place, QUEUE, dial},
    spdy::{self, Decoder, Encoder, Frame, SpdyError},
    stream::{Socket, write},
};

/// Connections at a time through one tunnel; further ones are refused.
const MAX_CONNECTIONS: usize = 256;

/// Serves the tunnel until the client closes it or breaks the protocol.
pub(super) async fn session(socket: Socket, place: Place) {
    let (sink, source) = socket.split();
    let (sender, messages) = mpsc::channel::<Message>(QUEUE);
    let mut writer = JoinSet::new();
    writer.spawn(write(sink, messages));
    if let Err(error) = run(source, place, sender).await {
        tracing::debug!(%error, "port-forward ended by its client's words");
    }
}

async fn run(
    mut source: SplitStream<Socket>,
    place: Place,
    sender: mpsc::Sender<Message>,
) -> Result<(), SpdyError> {
    let mut decoder = Decoder::new();
    let mut tunnel = Tunnel {
        place,
        sender,
        encoder: Encoder::new()?,
        errors: BTreeMap::new(),
        open: BTreeMap::new(),
        tasks: JoinSet::new(),
    };
    while let Some(Ok(message)) = source.next().await {
        match message {
            Message::Binary(bytes) => decoder.push(&bytes),
            Message::Close(_) => break,
            Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
        }
        while let Some(frame) = decoder.next()? {
            if frame == Frame::GoAway {
                return Ok(());
            }
            tunnel.handle(frame).await?;
        }
        tunnel.tidy();
    }
    Ok(())
}

/// What the client opened. Dropping it ends the connections.
struct Tunnel {
    place: Place,
    sender: mpsc::Sender<Message>,
    encoder: Encoder,
    /// Error streams that wait for their data stream, by request id.
    errors: BTreeMap<String, u32>,
    /// Where the bytes of data streams go; dropping one ends that direction.
    open: BTreeMap<u32, Connection>,
    tasks: JoinSet<()>,
}

struct Connection {
    input: Option<mpsc::Sender<Bytes>>,
    task: tokio::task::AbortHandle,
}

impl Tunnel {
    async fn handle(&mut self, frame: Frame) -> Result<(), SpdyError> {
        match frame {
            Frame::SynStream { id, headers, fin } => self.opened(id, &headers, fin).await,
            Frame::Data { id, bytes, fin } => {
                let Some(connection) = self.open.get_mut(&id) else { return Ok(()) };
                if let Some(input) = &connection.input
                    && !bytes.is_empty()
                    && input.send(bytes).await.is_err()
                {
                    // The pod closed its side; what the client still says is lost.
                    connection.input = None;
                }
                if fin {
                    connection.input = None;
                }
                Ok(())
            }
            Frame::Reset { id } => {
                self.errors.retain(|_, error| *error != id);
                if let Some(connection) = self.open.remove(&id) {
                    connection.task.abort();
                }
                Ok(())
            }
            // Pings of clients have odd numbers; an even one would be an answer to ours.
            Frame::Ping { id } => {
                if id % 2 == 1 {
                    self.send(spdy::ping(id)).await;
                }
                Ok(())
            }
            Frame::GoAway | Frame::Other { .. } => Ok(()),
        }
    }

    async fn opened(
        &mut self,
        id: u32,
        headers: &[(String, String)],
        fin: bool,
    ) -> Result<(), SpdyError> {
        let header = |name: &str| {
            let found = headers.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.as_str()).unwrap_or_default()
        };
        let (kind, request) = (header("streamtype"), header("requestid").to_owned());
        let port = header("port").parse::<u16>().ok().filter(|port| *port != 0);
        self.tidy();
        if self.errors.len() + self.open.len() >= MAX_CONNECTIONS {
            self.send(spdy::reset(id, spdy::REFUSED_STREAM)).await;
            return Ok(());
        }
        match (kind, port) {
            ("error", Some(_)) => {
                self.errors.insert(request, id);
                let reply = self.encoder.syn_reply(id)?;
                self.send(reply).await;
            }
            ("data", Some(port)) if self.errors.contains_key(&request) => {
                let reply = self.encoder.syn_reply(id)?;
                self.send(reply).await;
                let error = self.errors.remove(&request).unwrap_or_default();
                let (input, received) = mpsc::channel(QUEUE);
                let pair = Pair { data: id, error, sender: self.sender.clone() };
                let task = self.tasks.spawn(pair.connect(self.place.clone(), port, received));
                self.open.insert(id, Connection { input: (!fin).then_some(input), task });
            }
            // No port, an unknown kind, or data whose errors have no stream.
            _ => self.send(spdy::reset(id, spdy::PROTOCOL_ERROR)).await,
        }
        Ok(())
    }

    /// Forgets the connections that ended.
    fn tidy(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        self.open.retain(|_, connection| !connection.task.is_finished());
    }

    async fn send(&self, frame: Bytes) {
        // A closed queue is a client that went away, which the reading side notices.
        let _sent = self.sender.send(Message::Binary(frame)).await;
    }
}

/// The two streams of one connection.
struct Pair {
    data: u32,
    error: u32,
    sender: mpsc::Sender<Message>,
}

impl Pair {
    async fn connect(self, place: Place, port: u16, input: mpsc::Receiver<Bytes>) {
        match dial(&place, port).await {
            Ok(stream) => self.relay(stream, input).await,
            Err(words) => self.send(spdy::data(self.error, words.as_bytes())).await,
        }
        self.send(spdy::fin(self.error)).await;
        self.send(spdy::fin(self.data)).await;
    }

    /// Moves bytes until the pod has said all; the client may have ended its side before.
    async fn relay(&self, stream: TcpStream, mut input: mpsc::Receiver<Bytes>) {
        let (mut read, mut write) = stream.into_split();
        let up = async {
            while let Some(bytes) = input.recv().await {
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            // A pod that is gone needs no end.
            let _ended = write.shutdown().await;
        };
        let down = async {
            let mut buffer = vec![0; CHUNK_BYTES];
            while let Ok(count @ 1..) = read.read(&mut buffer).await {
                let bytes = buffer.get(..count).unwrap_or_default();
                self.send(spdy::data(self.data, bytes)).await;
            }
        };
        tokio::pin!(up, down);
        tokio::select! {
            () = &mut up => down.await,
            () = &mut down => {}
        }
    }

    async fn send(&self, frame: Bytes) {
        // A closed queue is a client that went away; the session ends this task then.
        let _sent = self.sender.send(Message::Binary(frame)).await;
    }
}
