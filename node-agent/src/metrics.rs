//! The door at which Prometheus asks: `GET /metrics` over plain HTTP.
//!
//! One task; a connection at a time, each with a time limit, so that whoever asks costs little.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, time::timeout};

use crate::readers::Readers;

/// How long one connection may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers until cancelled.
///
/// # Errors
/// When the address cannot be listened at.
pub async fn serve(address: SocketAddr, readers: Arc<Readers>) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let answers = service_fn(|request: Request<Incoming>| {
            let readers = Arc::clone(&readers);
            async move { Ok::<_, Infallible>(answer(request.uri().path(), &readers).await) }
        });
        let mut connection = http1::Builder::new();
        connection.keep_alive(false);
        let served = connection.serve_connection(TokioIo::new(stream), answers);
        if !matches!(timeout(PATIENCE, served).await, Ok(Ok(()))) {
            tracing::debug!("a request for metrics was not answered");
        }
    }
}

async fn answer(path: &str, readers: &Readers) -> Response<Full<Bytes>> {
    let (status, text) = if path == "/metrics" {
        match readers.metrics().await {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
        }
    } else {
        (StatusCode::NOT_FOUND, "there is /metrics\n".to_owned())
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
