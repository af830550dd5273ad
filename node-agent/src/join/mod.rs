//! Joining a cluster with a short-lived token, and keeping the node's credentials fresh.
//!
//! The token pins the cluster's CA: nothing is sent before the server has shown a certificate of it,
//! the question for the public `cluster-info` apart, whose answer is checked against the pin.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tracing::{info, warn};

use crate::chain::chain;

mod pin;

#[cfg(test)]
pub(crate) use pin::any_server;

const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Most bytes of the `cluster-info` answer; a kubeconfig with one CA has 2 KiB.
const MAX_INFO_BYTES: usize = 64 << 10;
/// Pauses between tries to reach the server or to see the certificate.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long one connection may take.
const DIAL: Duration = Duration::from_secs(10);
/// Part of a certificate's life after which it is renewed (the kubelet picks 70 to 90 %).
const RENEW: f64 = 0.8;

/// Where and how to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// `https://HOST:PORT`.
    pub server: String,
    pub token: Token,
}

/// A bootstrap token and the pin of the cluster's CA.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
    /// SHA-256 of the CA certificate's DER.
    pin: [u8; 32],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

impl FromStr for Token {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str = "want <6 characters>.<16 characters>.<64 hex digits>, as `control-plane token` prints it";
        let mut parts = text.trim().split('.');
        let (Some(id), Some(secret), Some(pin), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(SHAPE);
        };
        let plain = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if id.len() != 6 || secret.len() != 16 || pin.len() != 64 || !plain(id) || !plain(secret) {
            return Err(SHAPE);
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let digits = pin.get(2 * at..2 * at + 2).ok_or(SHAPE)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_not_hex| SHAPE)?;
        }
        Ok(Self { id: id.to_owned(), secret: secret.to_owned(), pin: bytes })
    }
}

/// Why a node cannot join or renew.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(
        "the server at {server} has another CA than the token names: wrong server, or an old token"
    )]
    WrongCa { server: String },
    #[error("the server refused the token: {message}")]
    Refused { message: String },
    #[error("the certificate request {name} was denied: {message}")]
    Denied { name: String, message: String },
    #[error("cannot make a key or a certificate request")]
    Request(#[source] rcgen::Error),
    #[error("cannot use kubeconfig {}", path.display())]
    Kubeconfig { path: PathBuf, source: Box<kube::config::KubeconfigError> },
    #[error("cannot make a client")]
    Client(#[source] Box<kube::Error>),
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("the answer of the server is not understood: {0}")]
    Answer(String),
    #[error("cannot ask {server}")]
    Ask { server: String, source: Box<dyn std::error::Error + Send + Sync> },
}

impl JoinError {
    /// Whether a person must change something: trying again cannot help.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        match self {
            Self::WrongCa { .. }
            | Self::Refused { .. }
            | Self::Denied { .. }
            | Self::Request(_)
            | Self::Kubeconfig { .. }
            | Self::Write { .. } => true,
            Self::Client(_) | Self::Answer(_) | Self::Ask { .. } => false,
        }
    }
}

/// A client from a kubeconfig file.
///
/// # Errors
/// When the file is missing or wrong.
pub async fn client(path: &Path) -> Result<(Client, Config), JoinError> {
    let wrong = |source| JoinError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
    let config = config_of(kubeconfig).await.map_err(wrong)?;
    let client = Client::try_from(config.clone()).map_err(|e| JoinError::Client(Box::new(e)))?;
    Ok((client, config))
}

async fn config_of(kubeconfig: Kubeconfig) -> Result<Config, kube::config::KubeconfigError> {
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
}

/// Joins the cluster and writes the kubeconfig. A server that is not up yet is waited for.
///
/// # Errors
/// What a person must see to: a wrong token, another CA, a denied request.
pub async fn join(join: &Join, node: &str, path: &Path) -> Result<(), JoinError> {
    let mut pause = RETRY.0;
    loop {
        match try_join(join, node, path).await {
            Err(error) if !error.is_final() => warn!(error = chain(&error), "not joined yet"),
            result => return result,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn try_join(join: &Join, node: &str, path: &Path) -> Result<(), JoinError> {
    let ca = pin::fetch_ca(join).await?;
    let token = format!("{}.{}", join.token.id, join.token.secret);
    let text = kubeconfig(&join.server, &ca, "bootstrap", &format!("    token: {token}\n"));
    let parsed =
        Kubeconfig::from_yaml(&text).map_err(|error| JoinError::Answer(error.to_string()))?;
    let config = config_of(parsed).await.map_err(|error| JoinError::Answer(error.to_string()))?;
    let client = Client::try_from(config).map_err(|e| JoinError::Client(Box::new(e)))?;
    let (certificate, key) = request_certificate(client, node, &join.server).await?;
    write_kubeconfig(path, &join.server, &ca, (&certificate, &key))?;
    info!(node, server = join.server, "joined the cluster");
    Ok(())
}

/// Asks for a client certificate as this node and waits until it is signed. Returns it and its key, PEM.
async fn request_certificate(
    client: Client,
    node: &str,
    server: &str,
) -> Result<(Vec<u8>, String), JoinError> {
    let key = rcgen::KeyPair::generate().map_err(JoinError::Request)?;
    let request = csr_pem(&key, node, &[]).map_err(JoinError::Request)?;
    let usages = ["digital signature", "client auth"];
    let certificate = sign(client, CLIENT_SIGNER, &usages, request).await;
    certificate.map(|certificate| (certificate, key.serialize_pem())).map_err(|mut error| {
        if let JoinError::Ask { server: asked, .. } = &mut error {
            server.clone_into(asked);
        }
        error
    })
}

/// A certificate request of this node's identity, PEM; `names` are its subject alternative names.
///
/// # Errors
/// When a name is neither an address nor a DNS name.
pub fn csr_pem(key: &rcgen::KeyPair, node: &str, names: &[String]) -> Result<String, rcgen::Error> {
    let mut params = rcgen::CertificateParams::new(names.to_vec())?;
    let mut subject = rcgen::DistinguishedName::new();
    subject.push(rcgen::DnType::OrganizationName, "system:nodes");
    subject.push(rcgen::DnType::CommonName, format!("system:node:{node}"));
    params.distinguished_name = subject;
    params.serialize_request(key)?.pem()
}

/// Posts a certificate request and waits until it is signed or denied.
///
/// # Errors
/// When the server refuses or denies it, or cannot be asked.
pub async fn sign(
    client: Client,
    signer: &str,
    usages: &[&str],
    request: String,
) -> Result<Vec<u8>, JoinError> {
    let api: Api<CertificateSigningRequest> = Api::all(client);
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: signer.to_owned(),
            usages: Some(usages.iter().map(|usage| (*usage).to_owned()).collect()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let made = api.create(&PostParams::default(), &object).await.map_err(ask_error)?;
    let name = made.metadata.name.unwrap_or_default();
    let mut pause = RETRY.0;
    loop {
        let status = api.get(&name).await.map_err(ask_error)?.status.unwrap_or_default();
        if let Some(certificate) = status.certificate {
            return Ok(certificate.0);
        }
        let conditions = status.conditions.unwrap_or_default();
        let bad = conditions.into_iter().find(|c| matches!(c.type_.as_str(), "Denied" | "Failed"));
        if let Some(bad) = bad {
            return Err(JoinError::Denied { name, message: bad.message.unwrap_or_default() });
        }
        if pause == RETRY.1 {
            info!(request = name, "waiting for the certificate request to be approved");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

fn ask_error(error: kube::Error) -> JoinError {
    if let kube::Error::Api(status) = &error
        && matches!(status.code, 401 | 403)
    {
        return JoinError::Refused { message: status.message.clone() };
    }
    JoinError::Ask { server: "the API server".to_owned(), source: Box::new(error) }
}

fn kubeconfig(server: &str, ca: &[u8], user: &str, credentials: &str) -> String {
    let ca = pem("CERTIFICATE", ca);
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: orlop\n\
         clusters:\n- name: orlop\n  cluster:\n    server: {server}\n    certificate-authority-data: {}\n\
         contexts:\n- name: orlop\n  context:\n    cluster: orlop\n    user: {user}\n\
         users:\n- name: {user}\n  user:\n{credentials}",
        BASE64_STANDARD.encode(ca)
    )
}

fn pem(label: &str, der: &[u8]) -> String {
    let mut out = format!("-----BEGIN {label}-----\n");
    for (at, c) in BASE64_STANDARD.encode(der).chars().enumerate() {
        // Lines of 64 characters (RFC 7468 section 2).
        if at > 0 && at % 64 == 0 {
            out.push('\n');
        }
        out.push(c);
    }
    out + &format!("\n-----END {label}-----\n")
}

fn write_kubeconfig(
    path: &Path,
    server: &str,
    ca: &[u8],
    (certificate, key): (&[u8], &str),
) -> Result<(), JoinError> {
    let credentials = format!(
        "    client-certificate-data: {}\n    client-key-data: {}\n",
        BASE64_STANDARD.encode(certificate),
        BASE64_STANDARD.encode(key)
    );
    let text = kubeconfig(server, ca, "node", &credentials);
    write_private(path, text.as_bytes())
        .map_err(|source| JoinError::Write { path: path.to_owned(), source })
}

/// Replaces a file at once, readable by its owner alone.
///
/// # Errors
/// The file operation's.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(temporary, path)
}

/// Waits until the kubeconfig's certificate is at 80 % of its life, then replaces it. Returns when
/// it has: whoever holds a client must make a new one. Never returns without a certificate in the file.
///
/// # Errors
/// When the file cannot be read or written.
pub async fn renew(client: Client, node: &str, path: &Path) -> Result<(), JoinError> {
    let wrong = |source| JoinError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
    let user = kubeconfig.auth_infos.first().and_then(|named| named.auth_info.clone());
    let encoded = user.and_then(|user| user.client_certificate_data);
    let pem = encoded.and_then(|text| BASE64_STANDARD.decode(text.trim()).ok());
    let Some(wait) = pem.as_deref().and_then(time_to_renewal) else {
        return std::future::pending().await;
    };
    tokio::time::sleep(wait).await;
    let cluster = kubeconfig.clusters.first().and_then(|named| named.cluster.clone());
    let cluster =
        cluster.ok_or_else(|| JoinError::Answer("no cluster in kubeconfig".to_owned()))?;
    let server = cluster.server.unwrap_or_default();
    let ca = cluster.certificate_authority_data.unwrap_or_default();
    let ca = BASE64_STANDARD.decode(ca.trim()).unwrap_or_default();
    let ca = CertificateDer::from_pem_slice(&ca)
        .map_err(|error| JoinError::Answer(format!("CA in kubeconfig: {error}")))?;
    let mut pause = RETRY.0;
    loop {
        match request_certificate(client.clone(), node, &server).await {
            Ok((certificate, key)) => {
                return write_kubeconfig(path, &server, &ca, (&certificate, &key));
            }
            Err(error) => warn!(error = chain(&error), "client certificate not renewed"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(60));
    }
}

/// Time until a PEM certificate is at 80 % of its life; `None` if it is no certificate.
#[must_use]
pub fn time_to_renewal(pem: &[u8]) -> Option<Duration> {
    let der = CertificateDer::from_pem_slice(pem).ok()?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).ok()?;
    let validity = parsed.validity();
    let (from, to) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    let life = Duration::from_secs(u64::try_from(to - from).ok()?);
    let age = jiff::Timestamp::now().as_second() - from;
    let age = Duration::from_secs(u64::try_from(age).unwrap_or(0));
    Some(life.mul_f64(RENEW).saturating_sub(age))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_have_three_parts() {
        let pin = "ab".repeat(32);
        let token: Token = format!("abcdef.0123456789abcdef.{pin}").parse().expect("a token");
        assert_eq!((token.id.as_str(), token.pin), ("abcdef", [0xab; 32]));
        assert!(!format!("{token:?}").contains("0123456789abcdef"), "secrets are not printed");
        for wrong in
            ["", "abcdef.0123456789abcdef", "abcdef.0123456789abcdef.xyz", "a.b.c", "A.b.c.d"]
        {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_written_kubeconfig_is_private_and_read_back_by_the_client() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["ca".to_owned()]).expect("parameters");
        let ca = params.self_signed(&key).expect("a certificate");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("sub/kubeconfig");
        let pems = (ca.pem().into_bytes(), key.serialize_pem());
        write_kubeconfig(&path, "https://h:6443", ca.der(), (&pems.0, &pems.1)).expect("written");
        let kubeconfig = Kubeconfig::read_from(&path).expect("a kubeconfig");
        let config = config_of(kubeconfig).await.expect("a configuration");
        assert_eq!(config.cluster_url.to_string(), "https://h:6443/");
        assert_eq!(config.root_cert, Some(vec![ca.der().to_vec()]));
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn renewal_is_due_at_80_percent_of_the_life() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(vec!["n".to_owned()]).expect("parameters");
        let now = jiff::Timestamp::now().as_second();
        let date = |seconds: i64| {
            let days = jiff::Timestamp::from_second(seconds).expect("a time");
            let date = days.to_zoned(jiff::tz::TimeZone::UTC).date();
            rcgen::date_time_ymd(
                i32::from(date.year()),
                u8::try_from(date.month()).expect("a month"),
                u8::try_from(date.day()).expect("a day"),
            )
        };
        let day = 24 * 3600;
        params.not_before = date(now - 90 * day);
        params.not_after = date(now + 10 * day);
        let old = params.clone().self_signed(&key).expect("a certificate");
        assert_eq!(time_to_renewal(old.pem().as_bytes()), Some(Duration::ZERO));
        params.not_before = date(now);
        params.not_after = date(now + 100 * day);
        let wait =
            time_to_renewal(params.self_signed(&key).expect("a certificate").pem().as_bytes());
        let days = wait.expect("a certificate").as_secs() / 86_400;
        assert!((78..=80).contains(&days), "{days} days");
    }
}
