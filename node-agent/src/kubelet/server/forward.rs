//! `port-forward` over WebSocket channels: two for each port, data and errors, as `v4.channel.k8s.io`
//! has them. SPDY frames in a tunnel are not spoken.

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    Body,
    stream::{Socket, upgrade},
    text, values,
};
use crate::kubelet::Directory;

const PROTOCOLS: [&str; 1] = ["v4.channel.k8s.io"];
/// Most ports of one request: each takes two of 256 channels.
const MAX_PORTS: usize = 127;
/// Messages that may wait in each direction.
const QUEUE: usize = 16;
const CHUNK_BYTES: usize = 32 << 10;

/// Connects to the pod's ports once the client has its stream.
pub(super) fn answer(
    directory: &Directory,
    (namespace, pod): (&str, &str),
    request: Request<Incoming>,
) -> Response<Body> {
    let query = request.uri().query();
    let lists = [values(query, "port"), values(query, "ports")].concat();
    let ports: Result<Vec<u16>, _> =
        lists.iter().flat_map(|list| list.split(',')).map(str::parse).collect();
    let ports = match ports {
        Ok(ports) if !ports.is_empty() && ports.len() <= MAX_PORTS => ports,
        Ok(_) | Err(_) => {
            return text(StatusCode::BAD_REQUEST, "query parameter \"port\" is required");
        }
    };
    let Some(view) = directory.find(namespace, pod) else {
        return text(StatusCode::NOT_FOUND, &format!("pod \"{namespace}/{pod}\" does not exist"));
    };
    let Some(ip) = view.ips.first().copied() else {
        return text(StatusCode::INTERNAL_SERVER_ERROR, "the pod has no address yet");
    };
    upgrade(request, &PROTOCOLS, move |socket, _protocol| session(socket, ip, ports))
        .unwrap_or_else(|refusal| *refusal)
}

async fn session(socket: Socket, ip: std::net::IpAddr, ports: Vec<u16>) {
    let (mut sink, mut source) = socket.split();
    let (sender, mut messages) = mpsc::channel::<Message>(QUEUE);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(message) = messages.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        let _closed = sink.close().await;
    });
    let mut inputs = Vec::new();
    for (index, port) in ports.into_iter().enumerate() {
        let (input, received) = mpsc::channel(QUEUE);
        inputs.push(input);
        let data = u8::try_from(2 * index).unwrap_or(u8::MAX - 1);
        tasks.spawn(connect((ip, port), data, received, sender.clone()));
    }
    drop(sender);
    while let Some(Ok(message)) = source.next().await {
        let Message::Binary(bytes) = message else {
            if matches!(message, Message::Close(_)) {
                break;
            }
            continue;
        };
        let Some(channel) = bytes.first().copied() else { continue };
        let input = inputs.get(usize::from(channel / 2)).filter(|_| channel % 2 == 0);
        if let Some(input) = input
            && input.send(bytes.slice(1..)).await.is_err()
        {
            // The pod closed its side; what the client still says is lost, as on any connection.
            continue;
        }
    }
}

/// One port: the first message of each channel is the port, then bytes.
async fn connect(
    address: (std::net::IpAddr, u16),
    data: u8,
    mut input: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Message>,
) {
    let message =
        |channel: u8, bytes: &[u8]| Message::Binary(Bytes::from([&[channel], bytes].concat()));
    for channel in [data, data + 1] {
        if sender.send(message(channel, &address.1.to_le_bytes())).await.is_err() {
            return;
        }
    }
    let stream = match TcpStream::connect(address).await {
        Ok(stream) => stream,
        Err(error) => {
            let words = format!("error forwarding port {} to pod: {error}", address.1);
            // A closed queue is a client that went away.
            let _sent = sender.send(message(data + 1, words.as_bytes())).await;
            return;
        }
    };
    let (mut read, mut write) = stream.into_split();
    let up = async {
        while let Some(bytes) = input.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            let bytes = buffer.get(..count).unwrap_or_default();
            if sender.send(message(data, bytes)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}
