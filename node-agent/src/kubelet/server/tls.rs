//! The server's certificate and who its callers are.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use kube::{Client, config::Kubeconfig};
use rustls::{
    RootCertStore, ServerConfig,
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tracing::{info, warn};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{
    chain::chain,
    join::{csr_pem, sign, time_to_renewal, write_private},
};

const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// Pause after a request for a certificate that failed.
const RETRY: Duration = Duration::from_secs(30);

/// Whose certificate it is.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) node: Arc<str>,
    pub(super) ip: IpAddr,
}

/// The caller of a request, out of its client certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) name: String,
    groups: Vec<String>,
}

impl Caller {
    /// The API server and administrators may call everything, nobody else anything.
    pub(super) fn may_call(&self) -> bool {
        self.name == "kube-apiserver-kubelet-client"
            || self.groups.iter().any(|group| group == "system:masters")
    }
}

/// Reads the subject of a verified client certificate.
pub(super) fn caller(certificate: &CertificateDer<'_>) -> Option<Caller> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let subject = parsed.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|group| group.as_str().ok());
    Some(Caller { name, groups: groups.map(str::to_owned).collect() })
}

/// The cluster's CA as the kubeconfig names it.
pub(super) fn ca_of(kubeconfig: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).map_err(|error| chain(&error))?;
    let cluster = kubeconfig.clusters.into_iter().find_map(|named| named.cluster);
    let cluster = cluster.ok_or("the kubeconfig has no cluster")?;
    let pem = match (cluster.certificate_authority_data, cluster.certificate_authority) {
        (Some(data), _) => {
            BASE64_STANDARD.decode(data.trim()).map_err(|error| error.to_string())?
        }
        (None, Some(path)) => std::fs::read(&path).map_err(|error| format!("{path}: {error}"))?,
        (None, None) => return Err("the kubeconfig has no certificate authority".to_owned()),
    };
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    list.map_err(|error| error.to_string())
}

/// A TLS configuration that lets in only who has a certificate of the CA.
pub(super) fn server_config(
    ca: Vec<CertificateDer<'static>>,
    resolver: Arc<dyn ResolvesServerCert>,
) -> Result<Arc<ServerConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in ca {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| error.to_string())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The serving certificate: signed by the cluster once it is, made by ourselves until then.
#[derive(Debug)]
pub(super) struct Certificate {
    current: Arc<Current>,
    file: PathBuf,
    names: Names,
    /// Time until a new one must be asked for; zero for one of our own making.
    wait: Duration,
}

#[derive(Debug)]
struct Current {
    key: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.key.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Certificate {
    /// The one on disk, if it is good; else one of our own making.
    pub(super) fn load(folder: &Path, names: Names) -> Result<Self, String> {
        let file = folder.join("kubelet-serving.pem");
        let stored = std::fs::read(&file).ok().and_then(|pem| {
            let wait = time_to_renewal(&pem).filter(|wait| !wait.is_zero())?;
            // The node may have had another address.
            is_for(&pem, names.ip).then_some((certified(&pem).ok()?, wait))
        });
        let (key, wait) = match stored {
            Some(found) => found,
            None => (own(&names)?, Duration::ZERO),
        };
        let current = Arc::new(Current { key: RwLock::new(Arc::new(key)) });
        Ok(Self { current, file, names, wait })
    }

    pub(super) fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        let resolver: Arc<Current> = Arc::clone(&self.current);
        resolver
    }

    /// Asks the cluster for a certificate, now and whenever 80 % of its life are over.
    #[expect(clippy::infinite_loop, reason = "ends by being cancelled")]
    pub(super) async fn keep_fresh(self, client: Client) {
        let mut wait = self.wait;
        loop {
            tokio::time::sleep(wait).await;
            wait = match self.renew(client.clone()).await {
                Ok(next) => {
                    info!("serving certificate signed by the cluster");
                    next
                }
                Err(error) => {
                    warn!(error, "no serving certificate from the cluster");
                    RETRY
                }
            };
        }
    }

    async fn renew(&self, client: Client) -> Result<Duration, String> {
        let key = rcgen::KeyPair::generate().map_err(|error| error.to_string())?;
        let names = [self.names.node.to_string(), self.names.ip.to_string()];
        let request = csr_pem(&key, &self.names.node, &names).map_err(|error| error.to_string())?;
        let usages = ["digital signature", "server auth"];
        let signed = sign(client, SIGNER, &usages, request).await.map_err(|error| chain(&error))?;
        let mut pem = signed;
        pem.push(b'\n');
        pem.extend(key.serialize_pem().into_bytes());
        let certified = certified(&pem)?;
        let wait = time_to_renewal(&pem).ok_or("the signed certificate has no dates")?;
        write_private(&self.file, &pem).map_err(|error: io::Error| error.to_string())?;
        *self.current.key.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(certified);
        Ok(wait)
    }
}

/// Whether a certificate names an address.
fn is_for(pem: &[u8], ip: IpAddr) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem) else { return false };
    let Ok((_, parsed)) = X509Certificate::from_der(&der) else { return false };
    let octets = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    parsed.subject_alternative_name().ok().flatten().is_some_and(|extension| {
        extension.value.general_names.contains(&GeneralName::IPAddress(&octets))
    })
}

fn certified(pem: &[u8]) -> Result<CertifiedKey, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|error| error.to_string())?;
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| error.to_string())?;
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, key, &provider).map_err(|error| error.to_string())
}

fn own(names: &Names) -> Result<CertifiedKey, String> {
    let key = rcgen::KeyPair::generate().map_err(|error| error.to_string())?;
    let list = vec![names.node.to_string(), names.ip.to_string()];
    let params = rcgen::CertificateParams::new(list).map_err(|error| error.to_string())?;
    let certificate = params.self_signed(&key).map_err(|error| error.to_string())?;
    let pem = certificate.pem() + &key.serialize_pem();
    certified(pem.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_for_another_address_of_the_node_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let names = |last| Names { node: "node-1".into(), ip: [192, 0, 2, last].into() };
        let key = rcgen::KeyPair::generate().unwrap();
        let list = vec!["node-1".to_owned(), names(1).ip.to_string()];
        let signed = rcgen::CertificateParams::new(list).unwrap().self_signed(&key).unwrap();
        let pem = signed.pem() + &key.serialize_pem();
        std::fs::write(folder.path().join("kubelet-serving.pem"), pem).unwrap();
        let is_stored =
            |last| !Certificate::load(folder.path(), names(last)).unwrap().wait.is_zero();
        assert_eq!([1, 2].map(is_stored), [true, false]);
    }
}
