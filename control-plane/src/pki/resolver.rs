//! TLS with a server certificate that can be exchanged while the server runs.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SignatureScheme,
    client::ResolvesClientCert,
    crypto::ring,
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::{KeyedCert, PkiError};

/// The certificate that new connections are answered with, or begun with where we call.
pub struct ServerCert {
    current: RwLock<Arc<CertifiedKey>>,
}

impl fmt::Debug for ServerCert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCert").finish_non_exhaustive()
    }
}

impl ServerCert {
    /// # Errors
    /// When certificate and key do not parse.
    pub fn new(pair: &KeyedCert) -> Result<Arc<Self>, PkiError> {
        Ok(Arc::new(Self { current: RwLock::new(certified(pair)?) }))
    }

    /// Uses another certificate from the next connection on.
    ///
    /// # Errors
    /// When certificate and key do not parse; the old one stays.
    pub fn replace(&self, pair: &KeyedCert) -> Result<(), PkiError> {
        let fresh = certified(pair)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }
}

impl ResolvesServerCert for ServerCert {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl ResolvesClientCert for ServerCert {
    fn resolve(
        &self,
        _issuers: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

pub(super) fn client_config(
    ca_der: &[u8],
    cert: &Arc<ServerCert>,
) -> Result<ClientConfig, PkiError> {
    let tls = |source| PkiError::Tls { source };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca_der.to_vec())).map_err(tls)?;
    Ok(ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::<ServerCert>::clone(cert)))
}

pub(super) fn tls_config(ca_der: &[u8], cert: &Arc<ServerCert>) -> Result<ServerConfig, PkiError> {
    let tls = |source| PkiError::Tls { source };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca_der.to_vec())).map_err(tls)?;
    let provider = Arc::new(ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| tls(rustls::Error::General(error.to_string())))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::<ServerCert>::clone(cert));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certified(pair: &KeyedCert) -> Result<Arc<CertifiedKey>, PkiError> {
    let parse = || PkiError::Parse { path: "apiserver.crt".into() };
    let cert = CertificateDer::from_pem_slice(pair.cert_pem.as_bytes()).map_err(|_bad| parse())?;
    let key = PrivateKeyDer::from_pem_slice(pair.key_pem.as_bytes()).map_err(|_bad| parse())?;
    let key = CertifiedKey::from_der(vec![cert], key, &ring::default_provider())
        .map_err(|source| PkiError::Tls { source })?;
    Ok(Arc::new(key))
}
