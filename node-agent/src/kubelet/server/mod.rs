//! The kubelet's HTTPS server on port 10250: logs, exec, port-forward, pods, health.
//!
//! Only callers with a client certificate of the cluster's CA come in, and of them only the API server
//! and administrators. Tasks: one that accepts (at most `MAX_CONNECTIONS` at a time), one a connection, one
//! that keeps the serving certificate fresh.

mod exec;
mod forward;
pub(super) mod log_line;
mod logs;
mod spdy;
mod stream;
#[cfg(test)]
mod tests;
mod tls;
mod tunnel;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use kube::Client;

use super::{Directory, KubeletConfig, runtime::Runtime};

/// Connections at a time; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 512;
/// How long a client may take for the handshake and for its request's head.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("certificates of the kubelet's server: {0}")]
    Certificates(String),
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a request is answered from.
#[derive(Debug)]
pub struct Door<R> {
    pub runtime: Arc<R>,
    pub directory: Directory,
    /// Folder of the pods' network namespaces, each by the pod's uid.
    pub netns_dir: PathBuf,
}

/// Listens, and returns the task that serves; it ends with an error of the listener only.
///
/// # Errors
/// When the port is taken or the cluster's CA cannot be read.
pub async fn start<R: Runtime>(
    door: Door<R>,
    client: Client,
    address: SocketAddr,
    (kubelet, kubeconfig): (&KubeletConfig, &Path),
) -> Result<impl Future<Output = ()> + Send + use<R>, ServerError> {
    let wrong = ServerError::Certificates;
    let ca = tls::ca_of(kubeconfig).map_err(wrong)?;
    let names = tls::Names { node: Arc::clone(&kubelet.node_name), ip: kubelet.node_ip };
    let certificate =
        tls::Certificate::load(&kubelet.state_dir.join("pki"), names).map_err(wrong)?;
    let config = tls::server_config(ca, certificate.resolver()).map_err(wrong)?;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ServerError::Listen { address, source })?;
    let refresh = certificate.keep_fresh(client);
    Ok(async move {
        tokio::select! {
            () = serve(listener, TlsAcceptor::from(config), Arc::new(door)) => {}
            () = refresh => {}
        }
    })
}

/// Accepts until the listener fails for good.
async fn serve<R: Runtime>(listener: TcpListener, acceptor: TlsAcceptor, door: Arc<Door<R>>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: let some connections end.
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, door) = (acceptor.clone(), Arc::clone(&door));
        tokio::spawn(async move {
            connection(stream, acceptor, door).await;
            drop(slot);
        });
    }
}

async fn connection<R: Runtime>(stream: TcpStream, acceptor: TlsAcceptor, door: Arc<Door<R>>) {
    let stream = match tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            debug!(%error, "TLS handshake failed");
            return;
        }
        Err(_elapsed) => return,
    };
    let caller = stream.get_ref().1.peer_certificates().and_then(|list| tls::caller(list.first()?));
    let service = service_fn(move |request| {
        let (door, caller) = (Arc::clone(&door), caller.clone());
        async move { Ok::<_, io::Error>(answer(request, caller, door).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = served.await {
        debug!(%error, "connection ended");
    }
}

async fn answer<R: Runtime>(
    request: Request<Incoming>,
    caller: Option<tls::Caller>,
    door: Arc<Door<R>>,
) -> Response<Body> {
    match caller {
        None => return text(StatusCode::UNAUTHORIZED, "Unauthorized"),
        Some(caller) if !caller.may_call() => {
            let message = format!("Forbidden (user={}, resource=nodes)", caller.name);
            return text(StatusCode::FORBIDDEN, &message);
        }
        Some(_) => {}
    }
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let reads = request.method() == Method::GET;
    match parts[..] {
        ["healthz"] if reads => text(StatusCode::OK, "ok"),
        ["pods" | "runningpods"] | ["pods" | "runningpods", ""] if reads => pods(&door.directory),
        ["metrics"] if reads => metrics(&door.directory),
        ["containerLogs", namespace, pod, container] if reads => {
            logs::answer(&door.directory, (namespace, pod, container), request.uri().query()).await
        }
        ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
            exec::answer(&door, (namespace, pod, container), request)
        }
        ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
            forward::answer(&door, (namespace, pod), request)
        }
        ["attach", ..] => text(
            StatusCode::NOT_IMPLEMENTED,
            "attach is not implemented by this node: use logs -f or exec",
        ),
        _ => text(StatusCode::NOT_FOUND, "404 page not found"),
    }
}

fn text(status: StatusCode, message: &str) -> Response<Body> {
    respond(status, "text/plain; charset=utf-8", message.to_owned())
}

fn respond(status: StatusCode, kind: &'static str, content: String) -> Response<Body> {
    let body = Full::from(content).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn pods(directory: &Directory) -> Response<Body> {
    let items: Vec<_> = directory.list().into_iter().map(|view| view.pod).collect();
    let items: Vec<_> = items.iter().map(|pod| &**pod).collect();
    let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
    respond(StatusCode::OK, "application/json", list.to_string())
}

fn metrics(directory: &Directory) -> Response<Body> {
    let views = directory.list();
    let running: usize = views
        .iter()
        .map(|view| view.containers.iter().filter(|container| container.running.is_some()).count())
        .sum();
    let pods =
        views.iter().filter(|view| view.containers.iter().any(|c| c.running.is_some())).count();
    let content = format!(
        "# HELP kubelet_running_pods Number of pods that have a running container\n\
         # TYPE kubelet_running_pods gauge\nkubelet_running_pods {pods}\n\
         # HELP kubelet_running_containers Number of containers currently running\n\
         # TYPE kubelet_running_containers gauge\n\
         kubelet_running_containers{{container_state=\"running\"}} {running}\n"
    );
    respond(StatusCode::OK, "text/plain; version=0.0.4", content)
}

/// The values of a query parameter, percent-decoded.
fn values(query: Option<&str>, name: &str) -> Vec<String> {
    let pairs = query.unwrap_or_default().split('&').filter_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key) == name).then(|| decode(value))
    });
    pairs.collect()
}

/// Whether a query parameter says yes.
fn says(query: Option<&str>, name: &str) -> bool {
    values(query, name).first().is_some_and(|value| matches!(value.as_str(), "1" | "true" | "t"))
}

fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let rest: Vec<u8> = bytes.clone().take(2).collect();
                let hex = std::str::from_utf8(&rest).ok().filter(|hex| hex.len() == 2);
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(value) => {
                        out.push(value);
                        bytes.next();
                        bytes.next();
                    }
                    None => out.push(b'%'),
                }
            }
            other => out.push(other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
