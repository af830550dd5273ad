//! For tests: a server of the Kubernetes API that refuses what is written to it for a while.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet, time};

/// Every object is there; so many writes are refused before the first is taken.
#[derive(Debug)]
pub(crate) struct Refusing {
    at: SocketAddr,
    state: Arc<Mutex<State>>,
    _task: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    left: usize,
    refused: usize,
    /// What the Events are about, and the paths of the patches, in their order.
    told: Vec<String>,
}

impl Refusing {
    pub(crate) async fn start(refusals: usize) -> Self {
        let state = State { left: refusals, refused: 0, told: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let at = listener.local_addr().expect("an address");
        let mut task = JoinSet::new();
        let served = Arc::clone(&state);
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&served);
                let answers = service_fn(move |request| answer(request, Arc::clone(&state)));
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), answers);
                connections.spawn(async { connection.await.unwrap_or_default() });
            }
        });
        Self { at, state, _task: task }
    }

    pub(crate) fn client(&self) -> Client {
        let uri = format!("http://{}", self.at).parse().expect("an address");
        Client::try_from(Config::new(uri)).expect("a client")
    }

    pub(crate) fn refused(&self) -> usize {
        self.state.lock().expect("nobody panics").refused
    }

    /// What was taken, once it is so many.
    pub(crate) async fn told(&self, count: usize) -> Vec<String> {
        let all = async {
            loop {
                let told = self.state.lock().expect("nobody panics").told.clone();
                if told.len() >= count {
                    return told;
                }
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        time::timeout(Duration::from_secs(30), all).await.expect("told in time")
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let (status, answer) = if method == Method::GET {
        (200, json!({"metadata": {"uid": "u"}}))
    } else {
        state.lock().expect("nobody panics").take(path, &body)
    };
    let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
    *response.status_mut() = status.try_into().expect("a status");
    Ok(response)
}

impl State {
    fn take(&mut self, path: String, body: &Value) -> (u16, Value) {
        if let Some(left) = self.left.checked_sub(1) {
            (self.left, self.refused) = (left, self.refused + 1);
            let status = json!({
                "kind": "Status", "status": "Failure", "reason": "InternalError", "code": 500,
                "message": "the store is away",
            });
            return (500, status);
        }
        let about = body["involvedObject"]["name"].as_str();
        self.told.push(about.map_or(path, str::to_owned));
        (201, json!({"metadata": {"name": "x"}, "involvedObject": {}}))
    }
}
