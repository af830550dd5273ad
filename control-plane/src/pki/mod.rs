//! The cluster's certificates under `<data-dir>/pki`: made on first start, renewed in process.
//!
//! Effects: files (mode 0600) and key generation. Deciding what a certificate says is in `issue.rs`.

mod issue;
mod resolver;

use std::{
    fs, io,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use self::issue::Leaf;
pub use self::{
    issue::{BACKDATE, KeyedCert, LEAF_LIFE, Usage},
    resolver::ServerCert,
};

/// A leaf is renewed when less than this share of its life is left, in per cent.
const RENEW_BELOW_PERCENT: i64 = 30;
/// How often a running server looks at its certificates.
pub const RENEW_CHECK: Duration = Duration::from_secs(3600);
const FILE_MODE: u32 = 0o600;

/// Why a certificate could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path} holds no usable certificate or key")]
    Parse { path: PathBuf },
    #[error("cannot sign a certificate")]
    Sign { source: rcgen::Error },
    #[error("not a valid certificate signing request")]
    Request { source: rcgen::Error },
    #[error("cannot set up TLS")]
    Tls { source: rustls::Error },
}

/// The names that the server's certificate carries, sorted and without doubles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerNames {
    dns: Vec<String>,
    ips: Vec<IpAddr>,
}

impl ServerNames {
    /// The names every server has, plus the given ones; each that parses as an address is one.
    pub fn new(service_ip: IpAddr, extra: impl IntoIterator<Item = String>) -> Self {
        let mut dns: Vec<String> = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
        ]
        .map(str::to_owned)
        .to_vec();
        let mut ips = vec![IpAddr::from([127, 0, 0, 1]), "::1".parse().unwrap_or(service_ip)];
        ips.push(service_ip);
        for name in extra {
            match name.parse() {
                Ok(ip) => ips.push(ip),
                Err(_) => dns.push(name),
            }
        }
        dns.sort();
        dns.dedup();
        ips.sort();
        ips.dedup();
        Self { dns, ips }
    }
}

/// The cluster's certificate authority and the credentials made from it.
#[derive(Clone, Debug)]
pub struct Pki {
    dir: PathBuf,
    ca: KeyedCert,
    ca_der: Vec<u8>,
    /// Client certificate `kube-apiserver-kubelet-client`, with which the server calls kubelets.
    pub kubelet_client: KeyedCert,
    /// Client certificate `kubernetes-admin` in `system:masters`.
    pub admin: KeyedCert,
    /// EC P-256 private key, PKCS#8 PEM, that signs service account tokens.
    pub sa_key_pem: String,
    /// Its public half, PEM.
    pub sa_public_pem: String,
}

impl Pki {
    /// Reads the directory, making what is missing or about to expire.
    ///
    /// # Errors
    /// When a file cannot be read, parsed or written. A damaged CA is never replaced.
    pub fn open(data_dir: &Path, now: Timestamp) -> Result<Self, PkiError> {
        let dir = data_dir.join("pki");
        fs::create_dir_all(&dir).map_err(|source| PkiError::Write { path: dir.clone(), source })?;
        let ca = match read_pair(&dir, "ca")? {
            Some(pair) => pair,
            None => write_pair(&dir, "ca", issue::ca(now, serial())?)?,
        };
        let ca_der = certificate_der(&ca, &dir.join("ca.crt"))?;
        let client = |file: &str, common_name: &str, organization: Option<&str>| {
            let leaf = Leaf {
                common_name,
                organization,
                usage: Usage::Client,
                dns_names: &[],
                ip_addresses: &[],
            };
            ensure_leaf(&dir, file, &ca, &leaf, now)
        };
        let masters = Some("system:masters");
        let kubelet_client =
            client("apiserver-kubelet-client", "kube-apiserver-kubelet-client", masters)?;
        let admin = client("admin", "kubernetes-admin", masters)?;
        let (sa_key_pem, sa_public_pem) = ensure_sa_key(&dir)?;
        Ok(Self { dir, ca, ca_der, kubelet_client, admin, sa_key_pem, sa_public_pem })
    }

    /// The CA's certificate, PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca.cert_pem
    }

    /// The CA's certificate, DER.
    pub fn ca_der(&self) -> &[u8] {
        &self.ca_der
    }

    /// SHA-256 of the CA certificate's DER, lower-case hex: what a join token pins.
    pub fn ca_sha256_hex(&self) -> String {
        hex(&Sha256::digest(&self.ca_der))
    }

    /// Signs a checked PEM request for `life` from now; returns the certificate as PEM.
    ///
    /// # Errors
    /// When the request does not parse or signing fails; a retry does not help.
    pub fn sign(
        &self,
        csr_pem: &str,
        usage: Usage,
        now: Timestamp,
        life: Duration,
    ) -> Result<String, PkiError> {
        issue::sign_request(&self.ca, csr_pem, usage, now, (life, serial()))
    }

    /// The server's certificate for these names, renewed when due, else as stored.
    ///
    /// # Errors
    /// As for [`Pki::open`].
    pub fn server_cert(&self, names: &ServerNames, now: Timestamp) -> Result<KeyedCert, PkiError> {
        let leaf = Leaf {
            common_name: "kube-apiserver",
            organization: None,
            usage: Usage::Server,
            dns_names: &names.dns,
            ip_addresses: &names.ips,
        };
        ensure_leaf(&self.dir, "apiserver", &self.ca, &leaf, now)
    }

    /// A rustls server configuration: our certificate by `cert`, client certificates of our CA
    /// accepted but not demanded, ALPN `h2` and `http/1.1`.
    ///
    /// # Errors
    /// When the CA is not acceptable to rustls.
    pub fn tls_config(&self, cert: &Arc<ServerCert>) -> Result<rustls::ServerConfig, PkiError> {
        resolver::tls_config(&self.ca_der, cert)
    }

    /// A rustls client configuration that trusts our CA alone and shows `cert`.
    ///
    /// # Errors
    /// When the CA is not acceptable to rustls.
    pub fn client_config(&self, cert: &Arc<ServerCert>) -> Result<rustls::ClientConfig, PkiError> {
        resolver::client_config(&self.ca_der, cert)
    }
}

/// A random positive serial number of 63 bits (RFC 5280 section 4.1.2.2 asks for at most 20 octets).
fn serial() -> u64 {
    rand::random::<u64>() >> 1 | 1
}

fn ensure_leaf(
    dir: &Path,
    file: &str,
    ca: &KeyedCert,
    leaf: &Leaf<'_>,
    now: Timestamp,
) -> Result<KeyedCert, PkiError> {
    if let Some(pair) = read_pair(dir, file)? {
        let der = certificate_der(&pair, &dir.join(format!("{file}.crt")))?;
        if is_fresh(&der, leaf, now) {
            return Ok(pair);
        }
    }
    tracing::info!(certificate = file, "certificate issued");
    write_pair(dir, file, issue::leaf(ca, leaf, now, serial())?)
}

/// Whether a stored leaf still says what is wanted and has enough life left. Pure.
fn is_fresh(der: &[u8], leaf: &Leaf<'_>, now: Timestamp) -> bool {
    let Ok((_, cert)) = X509Certificate::from_der(der) else { return false };
    let (start, end) =
        (cert.validity().not_before.timestamp(), cert.validity().not_after.timestamp());
    let left = end.saturating_sub(now.as_second());
    if left.saturating_mul(100) < end.saturating_sub(start).saturating_mul(RENEW_BELOW_PERCENT) {
        return false;
    }
    let (mut dns, mut ips) = (Vec::new(), Vec::new());
    if let Ok(Some(names)) = cert.subject_alternative_name() {
        for name in &names.value.general_names {
            if let GeneralName::DNSName(name) = name {
                dns.push((*name).to_owned());
            } else if let GeneralName::IPAddress(bytes) = name {
                ips.extend(address(bytes));
            }
        }
    }
    dns == leaf.dns_names && ips == leaf.ip_addresses
}

pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

fn ensure_sa_key(dir: &Path) -> Result<(String, String), PkiError> {
    let path = dir.join("sa.key");
    let (pem, key) = match read_file(&path)? {
        Some(pem) => {
            let key = rcgen::KeyPair::from_pem(&pem).map_err(|source| PkiError::Sign { source })?;
            (pem, key)
        }
        None => {
            let key = issue::generate_key()?;
            let pem = key.serialize_pem();
            write_file(&path, &pem)?;
            write_file(&dir.join("sa.pub"), &key.public_key_pem())?;
            (pem, key)
        }
    };
    Ok((pem, key.public_key_pem()))
}

fn certificate_der(pair: &KeyedCert, path: &Path) -> Result<Vec<u8>, PkiError> {
    CertificateDer::from_pem_slice(pair.cert_pem.as_bytes())
        .map(|der| der.to_vec())
        .map_err(|_bad_pem| PkiError::Parse { path: path.to_owned() })
}

fn read_pair(dir: &Path, file: &str) -> Result<Option<KeyedCert>, PkiError> {
    let cert_pem = read_file(&dir.join(format!("{file}.crt")))?;
    let key_pem = read_file(&dir.join(format!("{file}.key")))?;
    Ok(cert_pem.zip(key_pem).map(|(cert_pem, key_pem)| KeyedCert { cert_pem, key_pem }))
}

fn write_pair(dir: &Path, file: &str, pair: KeyedCert) -> Result<KeyedCert, PkiError> {
    // Key first: a crash between the two leaves no certificate, and both are made anew.
    write_file(&dir.join(format!("{file}.key")), &pair.key_pem)?;
    write_file(&dir.join(format!("{file}.crt")), &pair.cert_pem)?;
    Ok(pair)
}

fn read_file(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::Read { path: path.to_owned(), source }),
    }
}

/// Writes by rename, so that a crash leaves the old file or the new one.
pub(crate) fn write_file(path: &Path, text: &str) -> Result<(), PkiError> {
    let fresh = path.with_extension("new");
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(FILE_MODE)
            .open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().map_err(|source| PkiError::Write { path: path.to_owned(), source })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-01-01T00:00:00Z";

    fn names(extra: &[&str]) -> ServerNames {
        ServerNames::new("10.96.0.1".parse().unwrap(), extra.iter().map(|s| (*s).to_owned()))
    }

    #[test]
    fn second_open_keeps_everything() {
        let dir = tempfile::tempdir().unwrap();
        let now = NOW.parse().unwrap();
        let first = Pki::open(dir.path(), now).unwrap();
        let second = Pki::open(dir.path(), now).unwrap();
        assert_eq!(first.ca_pem(), second.ca_pem());
        assert_eq!(first.admin.cert_pem, second.admin.cert_pem);
        assert_eq!(first.sa_key_pem, second.sa_key_pem);
        assert_eq!(first.ca_sha256_hex().len(), 64);
        let mode = {
            use std::os::unix::fs::PermissionsExt as _;
            fs::metadata(dir.path().join("pki/ca.key")).unwrap().permissions().mode()
        };
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn server_certificate_is_renewed_for_new_names_and_near_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let now: Timestamp = NOW.parse().unwrap();
        let pki = Pki::open(dir.path(), now).unwrap();
        let first = pki.server_cert(&names(&["pi.local"]), now).unwrap();
        let day = |days: i64| now + jiff::SignedDuration::from_hours(24 * days);
        let same = |names: &ServerNames, at| {
            pki.server_cert(names, at).unwrap().cert_pem == first.cert_pem
        };
        assert!(same(&names(&["pi.local"]), day(1)));
        assert!(same(&names(&["pi.local"]), day(255)), "30.1 % of a year is left");
        assert!(!same(&names(&["pi.local"]), day(257)), "29.6 % of a year is left");
        assert!(!same(&names(&["pi.local", "192.0.2.7"]), day(1)));
    }

    #[test]
    fn damaged_ca_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let now = NOW.parse().unwrap();
        drop(Pki::open(dir.path(), now).unwrap());
        fs::write(dir.path().join("pki/ca.crt"), "rubbish").unwrap();
        assert!(matches!(Pki::open(dir.path(), now), Err(PkiError::Parse { .. })));
        assert_eq!(fs::read_to_string(dir.path().join("pki/ca.crt")).unwrap(), "rubbish");
    }
}
