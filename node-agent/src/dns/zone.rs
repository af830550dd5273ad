//! The cluster's names: services and endpoints as the DNS server needs them, and looking them up.
//!
//! Pure. Follows "Kubernetes DNS-Based Service Discovery" 1.1.0
//! (<https://github.com/kubernetes/dns/blob/master/docs/specification.md>). Rows are kept instead of
//! records: a look-up makes the few records it needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::message::{Data, Name, rtype};
use crate::model::{EndpointSliceRow, ObjectKey, Protocol, ServiceKind, ServiceRow};

/// Schema version that `dns-version.<domain>` tells.
const SCHEMA_VERSION: &str = "1.1.0";

/// Services by namespace and name, and who has which address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    services: BTreeMap<ObjectKey, Service>,
    reverse: BTreeMap<IpAddr, Vec<Box<str>>>,
}

/// A service as names see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    Cluster { ips: Vec<IpAddr>, ports: Vec<Port> },
    Headless { groups: Vec<Group> },
    External { target: Box<str> },
}

/// A named port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
}

/// Endpoints that share ports: one endpoint slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub ports: Vec<Port>,
    pub endpoints: Vec<Endpoint>,
}

/// An endpoint to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub ip: IpAddr,
    /// Never empty: the address with dashes when the endpoint has none.
    pub hostname: Box<str>,
}

/// What the zone says about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    Records(Vec<Data>),
    /// The name exists, but has no record of that type.
    NoData,
    NxDomain,
    /// The name is another name for this one.
    Alias(Box<str>),
}

impl Zone {
    /// The zone of services and their endpoint slices.
    #[must_use]
    pub fn new<'a>(
        services: impl Iterator<Item = (&'a ObjectKey, &'a ServiceRow)>,
        slices: impl Iterator<Item = &'a EndpointSliceRow>,
    ) -> Self {
        let mut by_service: BTreeMap<&ObjectKey, Vec<&EndpointSliceRow>> = BTreeMap::new();
        for slice in slices {
            by_service.entry(&slice.service).or_default().push(slice);
        }
        let services = services.map(|(key, row)| {
            let slices = by_service.get(key).map(Vec::as_slice).unwrap_or_default();
            (key.clone(), service_of(row, slices))
        });
        Self::from_services(services.collect())
    }

    /// The zone of services that are known already, as read from a snapshot.
    #[must_use]
    pub fn from_services(services: BTreeMap<ObjectKey, Service>) -> Self {
        let mut reverse: BTreeMap<IpAddr, Vec<Box<str>>> = BTreeMap::new();
        for (key, service) in &services {
            let name = format!("{}.{}.svc", key.name, key.namespace);
            match service {
                Service::Cluster { ips, .. } => {
                    for ip in ips {
                        reverse.entry(*ip).or_default().push(name.as_str().into());
                    }
                }
                Service::Headless { groups } => {
                    for endpoint in groups.iter().flat_map(|group| &group.endpoints) {
                        let name: Box<str> = format!("{}.{name}", endpoint.hostname).into();
                        let names = reverse.entry(endpoint.ip).or_default();
                        if !names.contains(&name) {
                            names.push(name);
                        }
                    }
                }
                Service::External { .. } => {}
            }
        }
        Self { services, reverse }
    }

    /// The services by their keys.
    pub fn services(&self) -> impl ExactSizeIterator<Item = (&ObjectKey, &Service)> {
        self.services.iter()
    }

    /// Looks up a name below the cluster domain, given as lower-case labels without the domain.
    #[must_use]
    pub fn lookup(&self, labels: &[&str], domain: &str, qtype: u16) -> Lookup {
        match labels {
            [] | ["svc" | "pod"] | [_, "pod"] => Lookup::NoData,
            ["dns-version"] if qtype == rtype::TXT => {
                Lookup::Records(vec![Data::Txt(SCHEMA_VERSION.into())])
            }
            ["dns-version"] => Lookup::NoData,
            [namespace, "svc"] if self.has_namespace(namespace) => Lookup::NoData,
            [address, _, "pod"] => pod_address(address, qtype),
            [name, namespace, "svc"] => {
                self.service(name, namespace).map_or(Lookup::NxDomain, |s| addresses(s, qtype))
            }
            [inner, name, namespace, "svc"] => self
                .service(name, namespace)
                .map_or(Lookup::NxDomain, |service| below_service(service, inner, qtype)),
            [port, protocol, name, namespace, "svc"] => {
                let base = format!("{name}.{namespace}.svc.{domain}");
                self.service(name, namespace)
                    .map_or(Lookup::NxDomain, |s| ports(s, (port, protocol), &base, qtype))
            }
            _ => Lookup::NxDomain,
        }
    }

    /// The names of an address, fully qualified; empty when it is none of the cluster's.
    #[must_use]
    pub fn names_of(&self, ip: IpAddr, domain: &str) -> Vec<Data> {
        let names = self.reverse.get(&ip).map(Vec::as_slice).unwrap_or_default();
        let full = names.iter().filter_map(|name| Name::from_text(&format!("{name}.{domain}")));
        full.map(Data::Ptr).collect()
    }

    fn service(&self, name: &str, namespace: &str) -> Option<&Service> {
        self.services.get(&ObjectKey::new(namespace, name))
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        let first = ObjectKey::new(namespace, "");
        self.services.range(first..).next().is_some_and(|(key, _)| *key.namespace == *namespace)
    }
}

fn service_of(row: &ServiceRow, slices: &[&EndpointSliceRow]) -> Service {
    match row.kind {
        ServiceKind::ExternalName => Service::External { target: row.external_name.clone() },
        ServiceKind::Headless => Service::Headless {
            groups: slices.iter().map(|slice| group_of(slice, row.publish_not_ready)).collect(),
        },
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => {
            let named = row.ports.iter().filter(|port| !port.name.is_empty());
            let ports = named.map(|p| port_of(&p.name, p.protocol, p.port)).collect();
            Service::Cluster { ips: row.cluster_ips.clone(), ports }
        }
    }
}

fn group_of(slice: &EndpointSliceRow, publish_not_ready: bool) -> Group {
    let named = slice.ports.iter().filter(|port| !port.name.is_empty());
    let published = slice.endpoints.iter().filter(|e| e.ready || publish_not_ready);
    Group {
        ports: named.map(|p| port_of(&p.name, p.protocol, p.port)).collect(),
        endpoints: published
            .map(|endpoint| Endpoint {
                ip: endpoint.ip,
                hostname: if endpoint.hostname.is_empty() {
                    endpoint.ip.to_string().replace(['.', ':'], "-").into()
                } else {
                    endpoint.hostname.to_ascii_lowercase().into()
                },
            })
            .collect(),
    }
}

fn port_of(name: &str, protocol: Protocol, port: u16) -> Port {
    Port { name: name.to_ascii_lowercase().into(), protocol, port }
}

/// Records of the service's own name. A headless service without published endpoints does not
/// exist (section 2.4.1 of the specification).
fn addresses(service: &Service, qtype: u16) -> Lookup {
    match service {
        Service::External { target } => Lookup::Alias(target.clone()),
        Service::Cluster { ips, .. } => address_records(ips.iter().copied(), qtype),
        Service::Headless { groups } => {
            let mut endpoints = groups.iter().flat_map(|group| &group.endpoints).peekable();
            if endpoints.peek().is_none() {
                return Lookup::NxDomain;
            }
            address_records(endpoints.map(|endpoint| endpoint.ip), qtype)
        }
    }
}

/// `<hostname>.<service>…` of a headless service, and `_tcp.<service>…`, which exists when there is
/// something below it.
fn below_service(service: &Service, label: &str, qtype: u16) -> Lookup {
    if let Some(protocol) = protocol_of(label) {
        let exists = named_ports(service).any(|port| port.protocol == protocol);
        return if exists { Lookup::NoData } else { Lookup::NxDomain };
    }
    let Service::Headless { groups } = service else { return Lookup::NxDomain };
    let endpoints = groups.iter().flat_map(|group| &group.endpoints);
    let ips: Vec<_> = endpoints.filter(|e| *e.hostname == *label).map(|e| e.ip).collect();
    if ips.is_empty() { Lookup::NxDomain } else { address_records(ips.into_iter(), qtype) }
}

/// `_<port>._<protocol>.<service>…`.
fn ports(service: &Service, wanted: (&str, &str), base: &str, qtype: u16) -> Lookup {
    let (Some(name), Some(protocol)) = (wanted.0.strip_prefix('_'), protocol_of(wanted.1)) else {
        return Lookup::NxDomain;
    };
    let matches = |port: &&Port| *port.name == *name && port.protocol == protocol;
    let targets: Vec<(u16, String)> = match service {
        Service::External { .. } => Vec::new(),
        Service::Cluster { ports, .. } => {
            ports.iter().filter(matches).map(|port| (port.port, base.to_owned())).collect()
        }
        Service::Headless { groups } => {
            let pairs = groups.iter().flat_map(|group| {
                let ports = group.ports.iter().filter(matches);
                ports.flat_map(|port| group.endpoints.iter().map(|endpoint| (port.port, endpoint)))
            });
            // The same pod stands in a slice of each family.
            let targets: BTreeSet<(u16, &str)> =
                pairs.map(|(port, endpoint)| (port, &*endpoint.hostname)).collect();
            targets.into_iter().map(|(port, host)| (port, format!("{host}.{base}"))).collect()
        }
    };
    if targets.is_empty() {
        return Lookup::NxDomain;
    }
    if qtype != rtype::SRV && qtype != rtype::ANY {
        return Lookup::NoData;
    }
    // All targets are equal; 100 in all, as resolvers add the weights up (RFC 2782).
    let weight = u16::try_from(100 / targets.len()).unwrap_or(100).max(1);
    let records = targets.into_iter().filter_map(|(port, target)| {
        Some(Data::Srv { priority: 0, weight, port, target: Name::from_text(&target)? })
    });
    Lookup::Records(records.collect())
}

fn named_ports(service: &Service) -> Box<dyn Iterator<Item = &Port> + '_> {
    match service {
        Service::Cluster { ports, .. } => Box::new(ports.iter()),
        Service::Headless { groups } => {
            let published = groups.iter().filter(|group| !group.endpoints.is_empty());
            Box::new(published.flat_map(|group| &group.ports))
        }
        Service::External { .. } => Box::new([].iter()),
    }
}

fn protocol_of(label: &str) -> Option<Protocol> {
    match label {
        "_tcp" => Some(Protocol::Tcp),
        "_udp" => Some(Protocol::Udp),
        "_sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// `10-244-1-5.<namespace>.pod` or `fd00--5.<namespace>.pod`: the address that the name spells, whoever has it.
/// Three single dashes are an IPv4 address's dots, all else is an IPv6 address's colons.
fn pod_address(label: &str, qtype: u16) -> Lookup {
    let is_v4 = label.matches('-').count() == 3 && !label.contains("--");
    match label.replace('-', if is_v4 { "." } else { ":" }).parse::<IpAddr>() {
        Ok(ip) => address_records(std::iter::once(ip), qtype),
        Err(_) => Lookup::NxDomain,
    }
}

/// Each address once: while slices are rewritten an endpoint may stand in two of them.
fn address_records(ips: impl Iterator<Item = IpAddr>, qtype: u16) -> Lookup {
    let ips: BTreeSet<IpAddr> = ips.collect();
    let records: Vec<_> = ips
        .into_iter()
        .filter_map(|ip| match ip {
            IpAddr::V4(ip) if matches!(qtype, rtype::A | rtype::ANY) => Some(Data::A(ip)),
            IpAddr::V6(ip) if matches!(qtype, rtype::AAAA | rtype::ANY) => Some(Data::Aaaa(ip)),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        })
        .collect();
    if records.is_empty() { Lookup::NoData } else { Lookup::Records(records) }
}
