//! `exec`: a process beside a container's own, its streams over WebSocket channels.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, stream::SplitStream};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    Body, Door, says,
    stream::{FAREWELL, Socket, drain, upgrade, write},
    text, values,
};
use crate::{
    chain::chain,
    kubelet::runtime::{ContainerId, ExecIo, ExecSpec, Runtime},
};

/// Protocols of remote commands, best first; version 5 can close its standard input.
const PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// Messages that may wait for a slow client: the process is slowed down then.
const QUEUE: usize = 16;
/// Bytes of output in one message.
const CHUNK_BYTES: usize = 32 << 10;

/// Starts the process once the client has its stream.
pub(super) fn answer<R: Runtime>(
    door: &Door<R>,
    (namespace, pod, container): (&str, &str, &str),
    request: Request<Incoming>,
) -> Response<Body> {
    let query = request.uri().query();
    let args = values(query, "command");
    if args.is_empty() {
        return text(StatusCode::BAD_REQUEST, "you must specify at least 1 command");
    }
    let spec = ExecSpec {
        args,
        stdin: says(query, "input") || says(query, "stdin"),
        tty: says(query, "tty"),
    };
    let Some(view) = door.directory.find(namespace, pod) else {
        return text(StatusCode::NOT_FOUND, &format!("pod \"{namespace}/{pod}\" does not exist"));
    };
    let Some(found) = view.containers.iter().find(|c| c.name == container) else {
        let message = format!("container {container} not found in pod {pod}");
        return text(StatusCode::NOT_FOUND, &message);
    };
    let Some(id) = found.running.clone() else {
        let message = format!("container not found (\"{container}\")");
        return text(StatusCode::INTERNAL_SERVER_ERROR, &message);
    };
    let runtime = Arc::clone(&door.runtime);
    let run = |socket, _protocol| async move { session(socket, &*runtime, &id, &spec).await };
    upgrade(request, &PROTOCOLS, run).unwrap_or_else(|refusal| *refusal)
}

async fn session<R: Runtime>(socket: Socket, runtime: &R, id: &ContainerId, spec: &ExecSpec) {
    let (sink, source) = socket.split();
    let (sender, messages) = mpsc::channel::<Message>(QUEUE);
    let writer = tokio::spawn(write(sink, messages));
    match runtime.exec(id, spec).await {
        Ok(io) => relay(io, source, sender).await,
        Err(error) => {
            send(&sender, ERROR, failure(&chain(&error)).to_string().as_bytes()).await;
            drop(sender);
            drain(source).await;
        }
    }
    // The queue is closed by now; a client that reads no more does not hold the connection.
    if tokio::time::timeout(FAREWELL, writer).await.is_err() {
        tracing::debug!("exec stream not read to its end");
    }
}

/// Moves bytes until the process has ended, its output is out and the client knows; or the client goes away.
async fn relay(io: ExecIo, source: SplitStream<Socket>, sender: mpsc::Sender<Message>) {
    let ExecIo { stdin, stdout, stderr, terminal, exit } = io;
    // An empty message tells the client that the stream stands.
    send(&sender, STDOUT, b"").await;
    let input = input(source, stdin, terminal);
    tokio::pin!(input);
    let output = async {
        tokio::join!(copy(stdout, STDOUT, &sender), copy(stderr, STDERR, &sender));
        exit.await
    };
    let code = tokio::select! {
        code = output => code,
        // Dropping the other ends ends the process.
        () = &mut input => return,
    };
    let status = match code {
        Ok(code) => exit_status(code),
        Err(_lost) => failure("the process was lost"),
    };
    send(&sender, ERROR, status.to_string().as_bytes()).await;
    drop(sender);
    // What the client still says goes nowhere; its answer to the end ends this.
    let _timely = tokio::time::timeout(FAREWELL, input).await;
}

/// Feeds the process until the client goes away. The end of its input is not the end of the client.
async fn input(
    mut source: SplitStream<Socket>,
    mut stdin: Option<File>,
    terminal: Option<std::os::fd::OwnedFd>,
) {
    while let Some(Ok(message)) = source.next().await {
        let Message::Binary(bytes) = message else {
            if matches!(message, Message::Close(_)) {
                return;
            }
            continue;
        };
        match (bytes.first().copied(), bytes.get(1..).unwrap_or_default()) {
            (Some(STDIN), data) => {
                if let Some(file) = &mut stdin
                    && (file.write_all(data).await.is_err() || file.flush().await.is_err())
                {
                    stdin = None;
                }
            }
            (Some(CLOSE), [STDIN]) => stdin = None,
            (Some(RESIZE), data) => resize(terminal.as_ref(), data),
            _ => {}
        }
    }
}

#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

fn resize(terminal: Option<&std::os::fd::OwnedFd>, data: &[u8]) {
    let (Some(terminal), Ok(size)) = (terminal, serde_json::from_slice::<Size>(data)) else {
        return;
    };
    let size = rustix::termios::Winsize {
        ws_row: size.height,
        ws_col: size.width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    if let Err(error) = rustix::termios::tcsetwinsize(terminal, size) {
        tracing::debug!(%error, "terminal not resized");
    }
}

async fn copy(file: Option<File>, channel: u8, sender: &mpsc::Sender<Message>) {
    let Some(mut file) = file else { return };
    let mut buffer = vec![0; CHUNK_BYTES];
    // A terminal whose last process ended reads as EIO: that is its end.
    while let Ok(count @ 1..) = file.read(&mut buffer).await {
        send(sender, channel, buffer.get(..count).unwrap_or_default()).await;
    }
}

async fn send(sender: &mpsc::Sender<Message>, channel: u8, data: &[u8]) {
    let mut message = Vec::with_capacity(data.len() + 1);
    message.push(channel);
    message.extend_from_slice(data);
    // A closed queue is a client that went away, which the input side notices.
    let _sent = sender.send(Message::Binary(Bytes::from(message))).await;
}

fn exit_status(code: i32) -> Value {
    if code == 0 {
        return json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
    }
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

fn failure(message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": "InternalError", "code": 500,
        "details": {"causes": [{"message": message}]},
    })
}
