//! Rows as bytes and back. Pure.
//!
//! Fields stand in the order of the lists below; a change of any of them is a new [`VERSION`], and a
//! file of another version is not read: the server's list replaces it within seconds anyway.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::{Rows, Snapshot};
use crate::{
    model::{
        EndpointPort, EndpointRow, EndpointSliceRow, Family, Few, Hints, NodeRow, ObjectKey,
        Protocol, ServiceKind, ServicePort, ServiceRow, TrafficPolicy,
    },
    table::Table,
};

const MAGIC: &[u8; 8] = b"ORLOPNET";
const VERSION: u32 = 3;

/// Why bytes are no snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("it is no snapshot of a network")]
    NoSnapshot,
    #[error("its version is {0}, this program reads {VERSION}")]
    Version(u32),
    #[error("it is cut short or damaged")]
    Damaged,
}

/// The file of the tables as they are.
#[must_use]
pub fn encode(
    services: &Table<ObjectKey, ServiceRow>,
    slices: &Table<ObjectKey, EndpointSliceRow>,
    nodes: &Table<ObjectKey, NodeRow>,
) -> Vec<u8> {
    let mut payload = Vec::new();
    put_table(services, &mut payload);
    put_table(slices, &mut payload);
    put_table(nodes, &mut payload);
    let mut file = Vec::with_capacity(payload.len() + 52);
    file.extend_from_slice(MAGIC);
    VERSION.put(&mut file);
    u64::try_from(payload.len()).unwrap_or(u64::MAX).put(&mut file);
    file.extend_from_slice(&Sha256::digest(&payload));
    file.append(&mut payload);
    file
}

/// What a file holds.
///
/// # Errors
///
/// When the bytes are not what [`encode`] writes.
pub fn decode(file: &[u8]) -> Result<Snapshot, SnapshotError> {
    let mut header = Reader(file);
    if header.take(MAGIC.len()) != Some(MAGIC) {
        return Err(SnapshotError::NoSnapshot);
    }
    let version = u32::read(&mut header).ok_or(SnapshotError::Damaged)?;
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    read_payload(&mut header).ok_or(SnapshotError::Damaged)
}

fn read_payload(header: &mut Reader<'_>) -> Option<Snapshot> {
    let length = usize::try_from(u64::read(header)?).ok()?;
    let sum = header.take(32)?;
    let payload = header.take(length)?;
    if !header.0.is_empty() || Sha256::digest(payload).as_slice() != sum {
        return None;
    }
    let mut reader = Reader(payload);
    let (services, slices) = (Rows::read(&mut reader)?, Rows::read(&mut reader)?);
    Some(Snapshot { services, slices, nodes: Rows::read(&mut reader)? })
}

fn put_table<V: Wire + PartialEq>(table: &Table<ObjectKey, V>, out: &mut Vec<u8>) {
    let rows = table.changes_since(0).upserts;
    put_length(rows.len(), out);
    for (key, row) in rows {
        key.put(out);
        row.put(out);
    }
}

/// What can stand in a file.
trait Wire: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn read(reader: &mut Reader<'_>) -> Option<Self>;
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }
}

macro_rules! numbers {
    ($($name:ty),*) => {
        $(impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }

            fn read(reader: &mut Reader<'_>) -> Option<Self> {
                Some(Self::from_be_bytes(reader.take(size_of::<Self>())?.try_into().ok()?))
            }
        })*
    };
}

macro_rules! texts {
    ($($name:ty),*) => {
        $(impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                put_length(self.len(), out);
                out.extend_from_slice(self.as_bytes());
            }

            fn read(reader: &mut Reader<'_>) -> Option<Self> {
                let length = usize::try_from(u32::read(reader)?).ok()?;
                Some(std::str::from_utf8(reader.take(length)?).ok()?.into())
            }
        })*
    };
}

macro_rules! parsed {
    ($($name:ty),*) => {
        $(impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                self.to_string().put(out);
            }

            fn read(reader: &mut Reader<'_>) -> Option<Self> {
                String::read(reader)?.parse().ok()
            }
        })*
    };
}

macro_rules! rows {
    ($($name:ident { $($field:ident),* })*) => {
        $(impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                let Self { $($field),* } = self;
                $($field.put(out);)*
            }

            fn read(reader: &mut Reader<'_>) -> Option<Self> {
                // Fields are read in the order in which they were put.
                Some(Self { $($field: Wire::read(reader)?),* })
            }
        })*
    };
}

macro_rules! choices {
    ($($name:ident { $($variant:ident = $value:literal),* })*) => {
        $(impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                out.push(match self {
                    $(Self::$variant => $value,)*
                });
            }

            fn read(reader: &mut Reader<'_>) -> Option<Self> {
                match u8::read(reader)? {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }
        })*
    };
}

numbers!(u8, u16, u32, u64, i64);
texts!(Box<str>, Arc<str>, String);
parsed!(IpAddr, IpNet);

choices! {
    Protocol { Tcp = 6, Udp = 17, Sctp = 132 }
    Family { V4 = 4, V6 = 6 }
    TrafficPolicy { Cluster = 0, Local = 1 }
    ServiceKind { ClusterIp = 0, Headless = 1, NodePort = 2, LoadBalancer = 3, ExternalName = 4 }
}

rows! {
    ObjectKey { namespace, name }
    ServicePort { name, protocol, port, node_port }
    ServiceRow {
        kind, cluster_ips, external_ips, ingress_ips, external_name, ports, publish_not_ready,
        affinity_s, internal_policy, external_policy, health_check_port, source_ranges, is_closed,
        created_s, unsupported, rejected
    }
    EndpointPort { name, protocol, port }
    Hints { zones, nodes }
    EndpointRow { ip, ready, serving, terminating, hostname, node, hints }
    EndpointSliceRow { service, family, ports, endpoints, rejected }
    NodeRow { internal_ips, pod_cidrs, ready, leaving, labels }
}

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        match u8::read(reader)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

impl<T: Wire> Wire for Few<T> {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        self.iter().for_each(|one| one.put(out));
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Vec::read(reader)?.into())
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        self.iter().for_each(|item| item.put(out));
    }

    /// Grows with what is really there, not with what the count claims.
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let count = u32::read(reader)?;
        let mut items = Self::new();
        for _ in 0..count {
            items.push(T::read(reader)?);
        }
        items.shrink_to_fit();
        Some(items)
    }
}

impl<T: Wire> Wire for Box<[T]> {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        self.iter().for_each(|item| item.put(out));
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Vec::read(reader)?.into())
    }
}

impl<T: Wire> Wire for Option<Box<T>> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        self.iter().for_each(|inner| inner.put(out));
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        if bool::read(reader)? { Some(Some(Box::new(T::read(reader)?))) } else { Some(None) }
    }
}

impl<T: Wire, U: Wire> Wire for (T, U) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some((T::read(reader)?, U::read(reader)?))
    }
}

impl Wire for BTreeMap<String, String> {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        for (key, value) in self {
            key.put(out);
            value.put(out);
        }
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Vec::<(String, String)>::read(reader)?.into_iter().collect())
    }
}

fn put_length(length: usize, out: &mut Vec<u8>) {
    u32::try_from(length).unwrap_or(u32::MAX).put(out);
}
