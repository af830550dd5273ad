//! The zone as a file: what the agent writes and the DNS process reads.
//!
//! Pure. Layout, all numbers big-endian: the magic `ORLOPDNS`, version `u32`, payload length `u64`,
//! SHA-256 of the payload, payload. The payload is a `u32` count of services; each is namespace and
//! name, a kind byte, and by kind: 0 cluster (addresses, ports), 1 headless (groups of ports and
//! endpoints), 2 external (target). A list is a `u32` count and its items; a text is a `u16` length
//! and UTF-8; an address is the byte 4 or 6 and its octets; a port is name, IP protocol byte, `u16`.

use std::{collections::BTreeMap, net::IpAddr};

use sha2::{Digest as _, Sha256};

use super::zone::{Endpoint, Group, Port, Service, Zone};
use crate::model::{ObjectKey, Protocol};

const MAGIC: &[u8; 8] = b"ORLOPDNS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 8 + 32;

/// Why bytes are no zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("it is no zone file")]
    NoZone,
    #[error("its version is {0}, this program reads {VERSION}")]
    Version(u32),
    #[error("it is cut short or damaged")]
    Damaged,
}

/// The file of a zone.
#[must_use]
pub fn encode(zone: &Zone) -> Vec<u8> {
    let mut payload = Vec::new();
    put_list(&mut payload, zone.services(), |out, (key, service)| {
        put_text(out, &key.namespace);
        put_text(out, &key.name);
        put_service(out, service);
    });
    let mut file = Vec::with_capacity(HEADER_BYTES + payload.len());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&VERSION.to_be_bytes());
    file.extend_from_slice(&u64::try_from(payload.len()).unwrap_or(u64::MAX).to_be_bytes());
    file.extend_from_slice(&Sha256::digest(&payload));
    file.extend_from_slice(&payload);
    file
}

/// The zone of a file.
///
/// # Errors
/// When the bytes are not what [`encode`] writes.
pub fn decode(file: &[u8]) -> Result<Zone, SnapshotError> {
    let mut header = Reader(file);
    if header.take(MAGIC.len()) != Some(MAGIC) {
        return Err(SnapshotError::NoZone);
    }
    let version = header.u32().ok_or(SnapshotError::Damaged)?;
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let payload = checked_payload(&mut header).ok_or(SnapshotError::Damaged)?;
    let mut reader = Reader(payload);
    let services = reader.list(Reader::service).ok_or(SnapshotError::Damaged)?;
    let services: BTreeMap<_, _> = services.into_iter().collect();
    Ok(Zone::from_services(services))
}

fn checked_payload<'a>(header: &mut Reader<'a>) -> Option<&'a [u8]> {
    let length = u64::from_be_bytes(header.take(8)?.try_into().ok()?);
    let sum = header.take(32)?;
    let payload = header.take(usize::try_from(length).ok()?)?;
    (header.0.is_empty() && Sha256::digest(payload).as_slice() == sum).then_some(payload)
}

fn put_service(out: &mut Vec<u8>, service: &Service) {
    match service {
        Service::Cluster { ips, ports } => {
            out.push(0);
            put_list(out, ips.iter(), |out, ip| put_ip(out, *ip));
            put_list(out, ports.iter(), put_port);
        }
        Service::Headless { groups } => {
            out.push(1);
            put_list(out, groups.iter(), |out, group| {
                put_list(out, group.ports.iter(), put_port);
                put_list(out, group.endpoints.iter(), |out, endpoint| {
                    put_ip(out, endpoint.ip);
                    put_text(out, &endpoint.hostname);
                });
            });
        }
        Service::External { target } => {
            out.push(2);
            put_text(out, target);
        }
    }
}

fn put_list<T>(
    out: &mut Vec<u8>,
    items: impl ExactSizeIterator<Item = T>,
    put: impl Fn(&mut Vec<u8>, T),
) {
    out.extend_from_slice(&u32::try_from(items.len()).unwrap_or(u32::MAX).to_be_bytes());
    for item in items {
        put(out, item);
    }
}

fn put_port(out: &mut Vec<u8>, port: &Port) {
    put_text(out, &port.name);
    out.push(match port.protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    });
    out.extend_from_slice(&port.port.to_be_bytes());
}

fn put_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend_from_slice(&ip.octets());
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names are at most 253 bytes (RFC 1123), which the API server checked.
    let bytes = text.as_bytes().get(..usize::from(u16::MAX)).unwrap_or(text.as_bytes());
    out.extend_from_slice(&u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<Box<str>> {
        let length = self.u16()?;
        Some(std::str::from_utf8(self.take(usize::from(length))?).ok()?.into())
    }

    /// Grows with what is really there, not with what the count claims.
    fn list<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(read(self)?);
        }
        Some(items)
    }

    fn ip(&mut self) -> Option<IpAddr> {
        match self.u8()? {
            4 => Some(IpAddr::from(<[u8; 4]>::try_from(self.take(4)?).ok()?)),
            6 => Some(IpAddr::from(<[u8; 16]>::try_from(self.take(16)?).ok()?)),
            _ => None,
        }
    }

    fn port(&mut self) -> Option<Port> {
        let name = self.text()?;
        let protocol = match self.u8()? {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            132 => Protocol::Sctp,
            _ => return None,
        };
        Some(Port { name, protocol, port: self.u16()? })
    }

    fn group(&mut self) -> Option<Group> {
        let ports = self.list(Self::port)?;
        let endpoints =
            self.list(|reader| Some(Endpoint { ip: reader.ip()?, hostname: reader.text()? }))?;
        Some(Group { ports, endpoints })
    }

    fn service(&mut self) -> Option<(ObjectKey, Service)> {
        let (namespace, name) = (self.text()?, self.text()?);
        let service = match self.u8()? {
            0 => Service::Cluster { ips: self.list(Self::ip)?, ports: self.list(Self::port)? },
            1 => Service::Headless { groups: self.list(Self::group)? },
            2 => Service::External { target: self.text()? },
            _ => return None,
        };
        Some((ObjectKey { namespace: namespace.into(), name: name.into() }, service))
    }
}
