//! Logs, exec, attach and port-forward: handed on to the pod's kubelet, bytes unread.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    api::{
        core::Call,
        error,
        http::{Asked, Body, Handler},
        prepare::text,
        query::WriteOptions,
        route::Target,
    },
    client::ApiError,
    schema,
};

const KUBELET_PORT: u16 = 10250;

/// How kubelets are reached: the server's client certificate, and the CA that theirs are signed by.
#[derive(Clone)]
pub struct Kubelets(TlsConnector);

impl std::fmt::Debug for Kubelets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kubelets")
    }
}

impl Kubelets {
    /// From a client configuration with the `kube-apiserver-kubelet-client` certificate.
    #[must_use]
    pub fn new(tls: Arc<rustls::ClientConfig>) -> Self {
        Self(TlsConnector::from(tls))
    }
}

/// Whether a path is one that streams.
#[must_use]
pub fn is_stream(target: &Target) -> bool {
    target.group.is_empty()
        && target.plural == "pods"
        && matches!(target.subresource.as_str(), "log" | "exec" | "attach" | "portforward")
}

impl Handler {
    pub(super) async fn stream(
        &self,
        asked: &Asked,
        target: &Target,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, ApiError> {
        let served = schema::resource("", "v1", "pods").ok_or_else(error::no_resource)?;
        let call = Call {
            served,
            namespace: target.namespace.clone(),
            name: target.name.clone(),
            user: Arc::clone(&asked.user),
            options: WriteOptions::default(),
        };
        let pod = self.api.get(&call).await?.value();
        let node = text(&pod, "/spec/nodeName");
        if node.is_empty() {
            return Err(error::bad_request(format!(
                "pod {} does not have a host assigned",
                call.name
            )));
        }
        let uri = path(&pod, target, asked, request.uri())?;
        let upgrade = asked.header(header::UPGRADE).unwrap_or("").to_ascii_lowercase();
        if upgrade.starts_with("spdy/") {
            return Err(error::bad_request(
                "SPDY is not served: use a client that speaks WebSocket (kubectl 1.31 or newer)",
            ));
        }
        let address = self.address(node).await?;
        self.forward(address, uri, request).await
    }

    async fn address(&self, node: &str) -> Result<IpAddr, ApiError> {
        let about = error::About { group: "", plural: "nodes", name: node };
        let found = self.api.peek("core/nodes", "", node).await?;
        let found = found.ok_or_else(|| about.not_found())?;
        let addresses = found["status"]["addresses"].as_array().into_iter().flatten();
        let mut internal = addresses.filter(|address| address["type"] == "InternalIP");
        let address = internal.find_map(|address| text(address, "/address").parse().ok());
        address.ok_or_else(|| error::internal(format!("node {node:?} has no InternalIP")))
    }

    /// One connection a stream: it ends with it.
    async fn forward(
        &self,
        address: IpAddr,
        uri: Uri,
        mut request: Request<Incoming>,
    ) -> Result<Response<Body>, ApiError> {
        let kubelets = self.kubelets.as_ref().ok_or_else(error::no_resource)?;
        let failed = |what: &str, why: &dyn std::fmt::Display| {
            error::internal(format!("{what} kubelet {address}:{KUBELET_PORT}: {why}"))
        };
        let tcp = TcpStream::connect((address, KUBELET_PORT)).await;
        let tcp = tcp.map_err(|why| failed("error dialing", &why))?;
        let tls = kubelets.0.connect(ServerName::from(address), tcp).await;
        let tls = tls.map_err(|why| failed("TLS with", &why))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(tls)).await.map_err(|why| failed("HTTP with", &why))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a stream from a kubelet ended");
            }
        });
        let mut onward = Request::new(Empty::<Bytes>::new());
        *onward.method_mut() =
            if request.method() == Method::HEAD { Method::GET } else { request.method().clone() };
        *onward.uri_mut() = uri;
        for (name, value) in request.headers() {
            let private = *name == header::AUTHORIZATION || *name == header::CONTENT_LENGTH;
            if !private {
                onward.headers_mut().append(name, value.clone());
            }
        }
        let answer = sender.send_request(onward).await;
        let mut answer = answer.map_err(|why| failed("no answer from", &why))?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let server = hyper::upgrade::on(&mut answer);
            let client = hyper::upgrade::on(&mut request);
            let shutdown = self.shutdown.clone();
            tokio::spawn(async move {
                let (Ok(server), Ok(client)) = (server.await, client.await) else { return };
                let (mut server, mut client) = (TokioIo::new(server), TokioIo::new(client));
                tokio::select! {
                    copied = tokio::io::copy_bidirectional(&mut client, &mut server) => {
                        if let Err(error) = copied {
                            tracing::debug!(%error, "a relayed stream ended");
                        }
                    }
                    () = shutdown.cancelled() => {}
                }
            });
        }
        let (parts, body) = answer.into_parts();
        Ok(Response::from_parts(parts, body.map_err(std::io::Error::other).boxed_unsync()))
    }
}

/// The kubelet's path: `/containerLogs/NS/POD/CONTAINER`, `/exec/NS/POD/CONTAINER`, `/portForward/NS/POD`.
fn path(pod: &Value, target: &Target, asked: &Asked, uri: &Uri) -> Result<Uri, ApiError> {
    let place = format!("{}/{}", target.namespace, target.name);
    let root = match target.subresource.as_str() {
        "log" => format!("/containerLogs/{place}/{}", container(pod, asked)?),
        "portforward" => format!("/portForward/{place}"),
        other => format!("/{other}/{place}/{}", container(pod, asked)?),
    };
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    format!("{root}{query}").parse().map_err(|why| error::bad_request(format!("{why}")))
}

fn container(pod: &Value, asked: &Asked) -> Result<String, ApiError> {
    let listed = |key: &str| -> Vec<String> {
        let list = pod["spec"][key].as_array().into_iter().flatten();
        list.map(|container| text(container, "/name").to_owned()).collect()
    };
    let own = listed("containers");
    let name = text(pod, "/metadata/name");
    match (asked.query.first("container").filter(|name| !name.is_empty()), own.as_slice()) {
        (Some(wanted), _) => {
            let all =
                [own.clone(), listed("initContainers"), listed("ephemeralContainers")].concat();
            if all.iter().any(|one| one == wanted) {
                return Ok(wanted.to_owned());
            }
            Err(error::bad_request(format!("container {wanted} is not valid for pod {name}")))
        }
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(error::bad_request(format!(
            "a container name must be specified for pod {name}, choose one of: [{}]",
            own.join(" ")
        ))),
    }
}
