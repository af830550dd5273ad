//! The cluster's CA by its pin: asked of a server that is not trusted yet, believed only if its hash is
//! the token's. Effects.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::config::Kubeconfig;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;

use super::{DIAL, Join, JoinError, MAX_INFO_BYTES};

/// The CA whose hash the token pins: from the server's chain, else from `cluster-info`.
pub(super) async fn fetch_ca(join: &Join) -> Result<CertificateDer<'static>, JoinError> {
    let fetched = tokio::time::timeout(DIAL, ask_for_ca(&join.server)).await;
    let fetched = fetched.unwrap_or_else(|elapsed| Err(elapsed.into()));
    let candidates =
        fetched.map_err(|source| JoinError::Ask { server: join.server.clone(), source })?;
    let pinned = candidates.into_iter().find(|der| Sha256::digest(der)[..] == join.token.pin);
    pinned.ok_or_else(|| JoinError::WrongCa { server: join.server.clone() })
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn ask_for_ca(server: &str) -> Result<Vec<CertificateDer<'static>>, AnyError> {
    let uri: http::Uri = server.parse()?;
    let host = uri.host().ok_or("no host")?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(443);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Unpinned { provider: Arc::clone(&provider) });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    let name = ServerName::try_from(host.clone())?;
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let mut candidates: Vec<_> = shown.iter().map(|der| der.clone().into_owned()).collect();
    candidates.extend(cluster_info(TokioIo::new(stream), &host).await?);
    Ok(candidates)
}

/// The CA certificates in the public `cluster-info`; none when there is no such object.
async fn cluster_info(
    stream: TokioIo<tokio_rustls::client::TlsStream<TcpStream>>,
    host: &str,
) -> Result<Vec<CertificateDer<'static>>, AnyError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get("/api/v1/namespaces/kube-public/configmaps/cluster-info")
        .header(header::HOST, host)
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let found = answer.status().is_success();
    let body = Limited::new(answer.into_body(), MAX_INFO_BYTES).collect().await?.to_bytes();
    connection.abort();
    if !found {
        return Ok(Vec::new());
    }
    let info: ConfigMap = serde_json::from_slice(&body)?;
    let data = info.data.unwrap_or_default();
    let kubeconfig = Kubeconfig::from_yaml(data.get("kubeconfig").map_or("", String::as_str))?;
    let clusters = kubeconfig.clusters.into_iter().filter_map(|named| named.cluster);
    let encoded = clusters.filter_map(|cluster| cluster.certificate_authority_data);
    let mut list = Vec::new();
    for text in encoded {
        let pem = BASE64_STANDARD.decode(text.trim())?;
        list.extend(CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(list)
}

/// A verifier that accepts any server.
#[cfg(test)]
pub(crate) fn any_server() -> Arc<dyn ServerCertVerifier> {
    Arc::new(Unpinned { provider: Arc::new(rustls::crypto::ring::default_provider()) })
}

/// Accepts any server, to look at its certificates: only public data is asked for, and the answer is
/// checked against the pin.
#[derive(Debug)]
struct Unpinned {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Unpinned {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let schemes = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, schemes)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let schemes = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, schemes)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
