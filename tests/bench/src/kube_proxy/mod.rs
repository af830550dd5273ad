//! The set of services that every subject is given, and kube-proxy's rules for it. Pure.

pub mod iptables;
pub mod nftables;

use std::net::{Ipv4Addr, SocketAddrV4};

/// Service network; its addresses that no service has are dropped by the nftables rules.
pub const SERVICE_CIDR: &str = "10.96.0.0/12";
/// Port of every service.
const PORT: u16 = 80;
/// Endpoints that a set may have altogether; addresses from there on belong to no set.
pub const ENDPOINTS_MAX: u32 = 1_000_000;
/// Port of the endpoints that nobody has.
const ENDPOINT_PORT: u16 = 8080;

/// Transport of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// As both rule languages spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A service with one port, and its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Makes its name and its chains' names.
    pub number: u32,
    pub protocol: Protocol,
    pub address: SocketAddrV4,
    /// Answers on the node's own address too.
    pub node_port: Option<u16>,
    pub endpoints: Vec<SocketAddrV4>,
}

impl Service {
    /// `namespace/name:port`, as the comments have it.
    fn label(&self) -> String {
        format!("bench/service-{}:http", self.number)
    }
}

/// `count` TCP services on port 80 of consecutive addresses of 10.96.0.0/12, the one measured in the
/// middle, where a linear search meets it after half of the others. Only it has `real` endpoints;
/// the others have `each` endpoints at addresses that nobody has.
#[must_use]
pub fn services(count: u32, each: u32, real: &[SocketAddrV4]) -> (Vec<Service>, SocketAddrV4) {
    let middle = count / 2;
    let mut all: Vec<Service> = (0..count).map(|number| service(number, each)).collect();
    let measured = all.iter_mut().find(|one| one.number == middle && !real.is_empty());
    if let Some(measured) = measured {
        measured.endpoints = real.to_vec();
    }
    (all, address(middle))
}

/// One service of a set, with endpoints that nobody has.
#[must_use]
pub fn service(number: u32, each: u32) -> Service {
    Service {
        number,
        protocol: Protocol::Tcp,
        address: address(number),
        node_port: None,
        endpoints: (0..each).map(|i| endpoint(number * each + i)).collect(),
    }
}

fn address(number: u32) -> SocketAddrV4 {
    let base = Ipv4Addr::new(10, 96, 1, 0).to_bits();
    SocketAddrV4::new(Ipv4Addr::from_bits(base + number), PORT)
}

/// An endpoint address that nobody has: 10.32.0.0 and up, far below the services for a million.
#[must_use]
pub fn endpoint(number: u32) -> SocketAddrV4 {
    let base = Ipv4Addr::new(10, 32, 0, 0).to_bits();
    SocketAddrV4::new(Ipv4Addr::from_bits(base + number), ENDPOINT_PORT)
}

fn push(out: &mut String, line: std::fmt::Arguments<'_>) {
    use std::fmt::Write as _;
    // Writing to a String cannot fail.
    let _infallible = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_service_stands_in_the_middle_with_the_real_endpoints() {
        let real = [SocketAddrV4::new(Ipv4Addr::new(10, 244, 0, 3), 8080)];
        let (services, target) = services(1000, 2, &real);
        assert_eq!(services.len(), 1000);
        assert_eq!(services[500].address, target);
        assert_eq!(services[500].endpoints, real);
        assert_eq!(services[499].endpoints.len(), 2);
        let last = services[999].endpoints.last().unwrap();
        assert_eq!(*last, endpoint(1999), "no two services share an endpoint");
    }
}
