//! WebSocket streams with channels, as `v4.channel.k8s.io` and `v5.channel.k8s.io` have them.

use std::time::Duration;

use bytes::Bytes;
use futures::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{Body, text};

/// Largest message of a client; kubectl sends 32 KiB at a time.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// How long a client may take to answer the end of a stream, before its connection is cut.
pub(super) const FAREWELL: Duration = Duration::from_secs(5);

pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Answers an upgrade and hands the stream on; `protocols` are ours, best first.
///
/// # Errors
/// The answer for a request that is no upgrade to one of them.
pub(super) fn upgrade<F>(
    mut request: Request<Incoming>,
    protocols: &[&'static str],
    then: impl FnOnce(Socket, &'static str) -> F + Send + 'static,
) -> Result<Response<Body>, Box<Response<Body>>>
where
    F: Future<Output = ()> + Send + 'static,
{
    let bad = |message: &str| Box::new(text(StatusCode::BAD_REQUEST, message));
    let words = |name: header::HeaderName| -> Vec<String> {
        let all = request.headers().get_all(name).into_iter();
        let all = all.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        all.map(|word| word.trim().to_owned()).collect()
    };
    let is_upgrade =
        words(header::UPGRADE).iter().any(|word| word.eq_ignore_ascii_case("websocket"));
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY).cloned();
    let Some(key) = key.filter(|_| is_upgrade) else {
        return Err(bad("you must use WebSocket to stream: SPDY is not spoken here"));
    };
    let offered = words(header::SEC_WEBSOCKET_PROTOCOL);
    let chosen = protocols.iter().find(|ours| offered.iter().any(|theirs| theirs == *ours));
    let Some(protocol) = chosen.copied() else {
        let message = format!(
            "unable to negotiate protocol: client supports {offered:?}, server accepts {protocols:?}"
        );
        return Err(Box::new(text(StatusCode::FORBIDDEN, &message)));
    };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgraded.await else { return };
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE_BYTES));
        let io = TokioIo::new(upgraded);
        let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
        then(socket, protocol).await;
    });
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()));
    let accept = accept.map_err(|_never| bad("bad Sec-WebSocket-Key"))?;
    let body = Empty::<Bytes>::new().map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    Ok(response)
}

/// Sends what is queued, then ends the stream the normal way: clients take any other end, one without a
/// code included, for an error.
pub(super) async fn write(
    mut sink: SplitSink<Socket, Message>,
    mut messages: mpsc::Receiver<Message>,
) {
    while let Some(message) = messages.recv().await {
        if sink.send(message).await.is_err() {
            return;
        }
    }
    let end = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    // The client may be gone already.
    let _closed = sink.send(Message::Close(Some(end))).await;
}

/// Reads on until the client has answered the end: unread bytes would make the kernel reset the connection,
/// and with it lose what the client has not read yet.
pub(super) async fn drain(mut source: SplitStream<Socket>) {
    let rest = async { while let Some(Ok(_late)) = source.next().await {} };
    // A client that does not answer has had its time.
    let _timely = tokio::time::timeout(FAREWELL, rest).await;
}
