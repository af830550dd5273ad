//! `port-forward`: SPDY/3.1 in WebSocket messages, as kubectl speaks it, or two WebSocket channels for each
//! port, data and errors, as `v4.channel.k8s.io` has them. Connections are made inside the pod's namespace.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
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
    Body, Door,
    stream::{Socket, upgrade, write},
    text, tunnel, values,
};
use crate::sys::netns::NetNs;

const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const PROTOCOLS: [&str; 2] = [TUNNEL, "v4.channel.k8s.io"];
/// Most ports of one request with channels: each takes two of 256.
const MAX_PORTS: usize = 127;
/// Messages that may wait in each direction.
pub(super) const QUEUE: usize = 16;
pub(super) const CHUNK_BYTES: usize = 32 << 10;
/// On a loopback device a connection stands at once or never.
const CONNECT: Duration = Duration::from_secs(5);

/// The pod whose ports are asked for.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) pod: String,
    /// `None` for a pod in the node's own namespace.
    netns: Option<PathBuf>,
}

/// Connects to the pod's ports once the client has its stream.
pub(super) fn answer<R>(
    door: &Door<R>,
    (namespace, pod): (&str, &str),
    request: Request<Incoming>,
) -> Response<Body> {
    let query = request.uri().query();
    let lists = [values(query, "port"), values(query, "ports")].concat();
    let ports = lists.iter().flat_map(|list| list.split(',')).filter(|port| !port.is_empty());
    let ports = match ports.map(str::parse).collect::<Result<Vec<u16>, _>>() {
        Ok(ports) if ports.len() <= MAX_PORTS => ports,
        Ok(_) | Err(_) => return text(StatusCode::BAD_REQUEST, "invalid query parameter \"port\""),
    };
    let Some(view) = door.directory.find(namespace, pod) else {
        return text(StatusCode::NOT_FOUND, &format!("pod \"{namespace}/{pod}\" does not exist"));
    };
    if view.ips.is_empty() {
        return text(StatusCode::INTERNAL_SERVER_ERROR, "the pod has no address yet");
    }
    let host = view.pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
    let uid = view.pod.metadata.uid.as_deref().unwrap_or_default();
    let netns = (!host).then(|| door.netns_dir.join(uid));
    let place = Place { pod: pod.to_owned(), netns };
    let run = |socket, protocol| async move {
        if protocol == TUNNEL {
            tunnel::session(socket, place).await;
        } else {
            session(socket, place, ports).await;
        }
    };
    upgrade(request, &PROTOCOLS, run).unwrap_or_else(|refusal| *refusal)
}

/// Connects to a port inside the pod's namespace, on its loopback device as upstream does.
///
/// # Errors
/// The text for the error stream.
pub(super) async fn dial(place: &Place, port: u16) -> Result<TcpStream, String> {
    let path = place.netns.clone();
    let dialled = tokio::task::spawn_blocking(move || -> io::Result<Result<_, String>> {
        let netns = path.as_deref().map_or_else(|| Ok(NetNs::own()), NetNs::open)?;
        netns.run(|| {
            let to = |ip| std::net::TcpStream::connect_timeout(&SocketAddr::new(ip, port), CONNECT);
            to(Ipv4Addr::LOCALHOST.into()).or_else(|v4| {
                to(Ipv6Addr::LOCALHOST.into()).map_err(|v6| {
                    format!(
                        "failed to connect to localhost:{port} inside the pod's namespace, IPv4: \
                         {v4} IPv6: {v6}"
                    )
                })
            })
        })
    });
    let dialled = dialled.await.map_err(io::Error::other).and_then(|done| done);
    let stream = dialled.map_err(|error| error.to_string()).and_then(|done| done).and_then(|std| {
        std.set_nonblocking(true).map_err(|error| error.to_string())?;
        TcpStream::from_std(std).map_err(|error| error.to_string())
    });
    let pod = &place.pod;
    stream.map_err(|why| format!("error forwarding port {port} to pod {pod}, uid : {why}"))
}

async fn session(socket: Socket, place: Place, ports: Vec<u16>) {
    let (sink, mut source) = socket.split();
    let (sender, messages) = mpsc::channel::<Message>(QUEUE);
    let mut tasks = JoinSet::new();
    tasks.spawn(write(sink, messages));
    let mut inputs = Vec::new();
    for (index, port) in ports.into_iter().enumerate() {
        let (input, received) = mpsc::channel(QUEUE);
        inputs.push(input);
        let channel = u8::try_from(2 * index).unwrap_or(u8::MAX - 1);
        tasks.spawn(connect((place.clone(), port), channel, received, sender.clone()));
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
    (place, port): (Place, u16),
    channel: u8,
    mut input: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Message>,
) {
    let message =
        |channel: u8, bytes: &[u8]| Message::Binary(Bytes::from([&[channel], bytes].concat()));
    for channel in [channel, channel + 1] {
        if sender.send(message(channel, &port.to_le_bytes())).await.is_err() {
            return;
        }
    }
    let stream = match dial(&place, port).await {
        Ok(stream) => stream,
        Err(words) => {
            // A closed queue is a client that went away.
            let _sent = sender.send(message(channel + 1, words.as_bytes())).await;
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
            if sender.send(message(channel, bytes)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}
