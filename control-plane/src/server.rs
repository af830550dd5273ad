//! The HTTPS server: accepts, shakes hands, hands requests to `api::http` (effects).
//!
//! Tasks: one accepts; one a connection. All end when the shutdown token is cancelled: watches at once, other
//! requests when they are answered or `DRAIN` has passed.

use std::{io, sync::Arc, time::Duration};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::api::{authn, core::Api, http::Handler, proxy::Kubelets};

/// Open connections at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 20_000;
/// How long a client may take for its TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long running requests may take once the server is to end.
const DRAIN: Duration = Duration::from_secs(5);

/// What a server needs. All of it is made by the caller, so that tests can make it too.
#[derive(Debug)]
pub struct ServerConfig {
    /// Bound already, so that the caller knows the port.
    pub listener: TcpListener,
    /// From `Pki::tls_config`.
    pub tls: Arc<rustls::ServerConfig>,
    pub api: Arc<Api>,
    /// Where logs, exec and port-forward go; `None` refuses them.
    pub kubelets: Option<Kubelets>,
    pub shutdown: CancellationToken,
}

/// Serves until the token is cancelled.
///
/// # Errors
/// When the listener fails for good.
pub async fn serve(config: ServerConfig) -> io::Result<()> {
    let ServerConfig { listener, tls, api, kubelets, shutdown } = config;
    let handler = Arc::new(Handler::new(api, kubelets, shutdown.clone()));
    let acceptor = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let tracker = TaskTracker::new();
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, mostly: waiting helps, ending does not.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = shutdown.cancelled() => break,
        };
        let (handler, acceptor) = (Arc::clone(&handler), acceptor.clone());
        let shutdown = shutdown.clone();
        tracker.spawn(async move {
            if let Err(error) = connection(handler, acceptor, stream, shutdown).await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(slot);
        });
    }
    tracker.close();
    if tokio::time::timeout(DRAIN, tracker.wait()).await.is_err() {
        tracing::warn!("requests were cut off at the end");
    }
    Ok(())
}

async fn connection(
    handler: Arc<Handler>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    shutdown: CancellationToken,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await??;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let user = certificate.and_then(|der| authn::of_certificate(der)).map(Arc::new);
    let service = service_fn(move |request| {
        let (handler, user) = (Arc::clone(&handler), user.clone());
        async move { Ok::<_, std::convert::Infallible>(handler.handle(user, request).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let running = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(running);
    tokio::select! {
        result = running.as_mut() => return result.map_err(io::Error::other),
        () = shutdown.cancelled() => running.as_mut().graceful_shutdown(),
    }
    running.await.map_err(io::Error::other)
}
