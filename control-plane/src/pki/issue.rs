//! What goes into each certificate. Pure but for key generation.

use std::{net::IpAddr, time::Duration};

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};

use super::PkiError;

/// Ten years, as kubeadm gives its CA.
pub(super) const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// One year, upstream's default for leaf certificates.
pub const LEAF_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// How far back a certificate is dated, for clocks that lag (upstream: 5 minutes).
pub const BACKDATE: Duration = Duration::from_secs(300);

/// What a leaf certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    Client,
    Server,
}

/// A leaf certificate to be made.
#[derive(Clone, Debug)]
pub(super) struct Leaf<'a> {
    pub(super) common_name: &'a str,
    pub(super) organization: Option<&'a str>,
    pub(super) usage: Usage,
    pub(super) dns_names: &'a [String],
    pub(super) ip_addresses: &'a [IpAddr],
}

/// A certificate with its private key, both PEM.
#[derive(Clone, Debug)]
pub struct KeyedCert {
    pub cert_pem: String,
    pub key_pem: String,
}

pub(super) fn ca(now: Timestamp, serial: u64) -> Result<KeyedCert, PkiError> {
    let key = generate_key()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name("orlop-ca", None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    validity(&mut params, now, CA_LIFE);
    params.serial_number = Some(SerialNumber::from(serial));
    let cert = params.self_signed(&key).map_err(|source| PkiError::Sign { source })?;
    Ok(KeyedCert { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
}

pub(super) fn leaf(
    ca: &KeyedCert,
    leaf: &Leaf<'_>,
    now: Timestamp,
    serial: u64,
) -> Result<KeyedCert, PkiError> {
    let key = generate_key()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name(leaf.common_name, leaf.organization);
    params.subject_alt_names = alt_names(leaf.dns_names, leaf.ip_addresses)?;
    restrict(&mut params, leaf.usage);
    validity(&mut params, now, LEAF_LIFE);
    params.serial_number = Some(SerialNumber::from(serial));
    let cert = params.signed_by(&key, &issuer(ca)?).map_err(|source| PkiError::Sign { source })?;
    Ok(KeyedCert { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
}

/// Signs a request that a caller has already checked: subject and alternative names are taken over,
/// everything else is ours.
pub(super) fn sign_request(
    ca: &KeyedCert,
    csr_pem: &str,
    usage: Usage,
    now: Timestamp,
    terms: (Duration, u64),
) -> Result<String, PkiError> {
    let (life, serial) = terms;
    let mut request = CertificateSigningRequestParams::from_pem(csr_pem)
        .map_err(|source| PkiError::Request { source })?;
    restrict(&mut request.params, usage);
    validity(&mut request.params, now, life);
    request.params.serial_number = Some(SerialNumber::from(serial));
    let cert = request.signed_by(&issuer(ca)?).map_err(|source| PkiError::Sign { source })?;
    Ok(cert.pem())
}

/// A new EC P-256 key.
pub(super) fn generate_key() -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|source| PkiError::Sign { source })
}

fn issuer(ca: &KeyedCert) -> Result<Issuer<'_, KeyPair>, PkiError> {
    let key = KeyPair::from_pem(&ca.key_pem).map_err(|source| PkiError::Sign { source })?;
    Issuer::from_ca_cert_pem(&ca.cert_pem, key).map_err(|source| PkiError::Sign { source })
}

fn restrict(params: &mut CertificateParams, usage: Usage) {
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![match usage {
        Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
    }];
}

fn validity(params: &mut CertificateParams, now: Timestamp, life: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    params.not_before = epoch + Duration::from_secs(seconds).saturating_sub(BACKDATE);
    params.not_after = epoch + Duration::from_secs(seconds) + life;
}

fn name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, DnValue::Utf8String(organization.to_owned()));
    }
    name.push(DnType::CommonName, DnValue::Utf8String(common_name.to_owned()));
    name
}

fn alt_names(dns_names: &[String], ips: &[IpAddr]) -> Result<Vec<SanType>, PkiError> {
    let mut names = Vec::with_capacity(dns_names.len() + ips.len());
    for dns in dns_names {
        let dns = dns.as_str().try_into().map_err(|source| PkiError::Sign { source })?;
        names.push(SanType::DnsName(dns));
    }
    names.extend(ips.iter().map(|ip| SanType::IpAddress(*ip)));
    Ok(names)
}
