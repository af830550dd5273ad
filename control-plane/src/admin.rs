//! The administrator's commands beside a running server: join tokens and kubeconfigs.
//!
//! Effects: the data directory and one HTTPS request with the administrator's certificate.

use std::{fmt::Write as _, io, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use rand::Rng as _;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    config::RunFile,
    pki::{Pki, PkiError, ServerCert},
};

/// Why a command beside the server failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error(
        "no server has run with --data-dir {path}: start `control-plane run --data-dir {path}` first"
    )]
    NeverRan { path: String },
    #[error("cannot read {path}")]
    RunFile { path: String, source: io::Error },
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("the server at {address} cannot be reached; is it running?")]
    Connect { address: String, source: io::Error },
    #[error("the server at {address} broke off")]
    Http { address: String, source: hyper::Error },
    #[error("the server refused: {message}")]
    Refused { message: String },
}

/// What a command needs of a data directory in which a server has run.
#[derive(Debug)]
pub struct Admin {
    run: RunFile,
    pki: Pki,
}

impl Admin {
    /// # Errors
    /// When no server has run there, or a file is damaged.
    pub fn open(data_dir: &Path) -> Result<Self, AdminError> {
        let path = data_dir.display().to_string();
        let run = RunFile::read(data_dir).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                return AdminError::NeverRan { path: path.clone() };
            }
            let path = RunFile::path(data_dir).display().to_string();
            AdminError::RunFile { path, source }
        })?;
        let pki = Pki::open(data_dir, Timestamp::now())?;
        Ok(Self { run, pki })
    }

    /// The administrator's kubeconfig, certificates embedded; `server` or the address that was bound.
    pub fn kubeconfig(&self, server: Option<&str>) -> String {
        let bound = format!("https://{}", self.run.local());
        kubeconfig(&self.pki, server.unwrap_or(&bound))
    }

    /// Creates a join token that ends after `ttl` (`None`: never) and returns
    /// `<id>.<secret>.<sha256 of the CA certificate>`.
    ///
    /// # Errors
    /// When the server does not answer or refuses.
    pub async fn create_token(&self, ttl: Option<SignedDuration>) -> Result<String, AdminError> {
        let (id, secret) = (random(6), random(16));
        let expiration = ttl
            .and_then(|ttl| Timestamp::now().checked_add(ttl).ok())
            .map(|end| end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        let body = token_secret(&id, &secret, expiration.as_deref());
        self.post("/api/v1/namespaces/kube-system/secrets", &body).await?;
        Ok(format!("{id}.{secret}.{}", self.pki.ca_sha256_hex()))
    }

    async fn post(&self, path: &str, body: &Value) -> Result<(), AdminError> {
        let address = self.run.local().to_string();
        let connect = |source| AdminError::Connect { address: address.clone(), source };
        let broken = |source| AdminError::Http { address: address.clone(), source };
        let cert = ServerCert::new(&self.pki.admin)?;
        let tls = TlsConnector::from(Arc::new(self.pki.client_config(&cert)?));
        let tcp = TcpStream::connect(self.run.local()).await.map_err(connect)?;
        let name = ServerName::from(self.run.local().ip());
        let stream = tls.connect(name, tcp).await.map_err(connect)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let driver = tokio::spawn(connection);
        let request = http::Request::post(path)
            .header("host", &address)
            .header("content-type", "application/json")
            .header("accept", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("method, path and headers are constant or an address");
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(broken)?.to_bytes();
        driver.abort();
        if status.is_success() {
            return Ok(());
        }
        let said: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        let message = said["message"].as_str().map_or_else(|| status.to_string(), str::to_owned);
        Err(AdminError::Refused { message })
    }
}

/// A token that `bootstrap.kubernetes.io/token` Secrets hold.
fn token_secret(id: &str, secret: &str, expiration: Option<&str>) -> Value {
    let mut data = serde_json::Map::new();
    let mut put = |key: &str, value: &str| {
        data.insert(key.to_owned(), json!(STANDARD.encode(value)));
    };
    put("token-id", id);
    put("token-secret", secret);
    put("usage-bootstrap-authentication", "true");
    put("usage-bootstrap-signing", "true");
    put("description", "made by `control-plane token`");
    if let Some(expiration) = expiration {
        put("expiration", expiration);
    }
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"},
        "type": "bootstrap.kubernetes.io/token",
        "data": data,
    })
}

/// Lower-case letters and digits, as upstream's tokens have.
fn random(length: usize) -> String {
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..length).map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())])).collect()
}

fn kubeconfig(pki: &Pki, server: &str) -> String {
    let mut text = String::from("apiVersion: v1\nkind: Config\n");
    let ca = STANDARD.encode(pki.ca_pem());
    let cert = STANDARD.encode(&pki.admin.cert_pem);
    let key = STANDARD.encode(&pki.admin.key_pem);
    let written = write!(
        text,
        "clusters:\n- name: orlop\n  cluster:\n    server: {server}\n    certificate-authority-data: {ca}\n\
         users:\n- name: kubernetes-admin\n  user:\n    client-certificate-data: {cert}\n    client-key-data: {key}\n\
         contexts:\n- name: kubernetes-admin@orlop\n  context:\n    cluster: orlop\n    user: kubernetes-admin\n\
         current-context: kubernetes-admin@orlop\n"
    );
    written.expect("writing to a String cannot fail");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubeconfig_is_yaml_with_everything_embedded() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Admin::open(dir.path()), Err(AdminError::NeverRan { .. })));
        let run = RunFile {
            bound: "0.0.0.0:7443".parse().unwrap(),
            advertise: "192.0.2.1".parse().unwrap(),
            pid: 1,
        };
        std::fs::write(RunFile::path(dir.path()), serde_json::to_vec(&run).unwrap()).unwrap();
        let admin = Admin::open(dir.path()).unwrap();
        let parsed: Value = serde_yaml_ng::from_str(&admin.kubeconfig(None)).unwrap();
        let cluster = &parsed["clusters"][0]["cluster"];
        assert_eq!(cluster["server"], "https://127.0.0.1:7443");
        assert_eq!(
            STANDARD.decode(cluster["certificate-authority-data"].as_str().unwrap()).unwrap(),
            admin.pki.ca_pem().as_bytes()
        );
        let other = admin.kubeconfig(Some("https://pi.local:6443"));
        assert!(other.contains("server: https://pi.local:6443\n"));
    }

    #[test]
    fn tokens_have_upstreams_form() {
        let secret = token_secret("abcdef", "0123456789abcdef", Some("2026-01-01T00:00:00Z"));
        assert_eq!(secret["metadata"]["name"], "bootstrap-token-abcdef");
        let expiration = STANDARD.decode(secret["data"]["expiration"].as_str().unwrap()).unwrap();
        assert_eq!(expiration, b"2026-01-01T00:00:00Z");
        let made = random(16);
        assert!(
            made.len() == 16 && made.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        );
    }
}
