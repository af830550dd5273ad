//! The one row of settings that programs read.

use crate::addr::{Addr, Net};

/// Pods' IPv4 traffic to the outside gets the node's address.
pub const MASQUERADE_V4: u32 = 1;
/// Pods' IPv6 traffic to the outside gets the node's address.
pub const MASQUERADE_V6: u32 = 2;
/// Somebody listens to the ring of events.
pub const EVENTS: u32 = 4;

/// Pods have ports at the node's loopback addresses: the node's sockets are to look for them.
pub const LOOPBACK_PORTS: u32 = 8;

/// Settings of this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Service CIDRs: their addresses that no service has are refused.
    pub services: [Net; 2],
    /// The node's gateway addresses by family (IPv4, IPv6): source of what the node itself translates
    /// towards pods. Zero: none.
    pub gateway: [Addr; 2],
    /// Interface index of the VXLAN device; 0 while there is none.
    pub vxlan_ifindex: u32,
    /// VXLAN network identifier of the cluster.
    pub vni: u32,
    /// Interface index of the host device, by which the node's own packets to services leave and by
    /// which answers come back; 0 while there is none.
    pub host_ifindex: u32,
    /// [`MASQUERADE_V4`], [`MASQUERADE_V6`], [`EVENTS`], [`LOOPBACK_PORTS`].
    pub flags: u32,
    /// First node port, host order.
    pub node_port_first: u16,
    /// Last node port, host order.
    pub node_port_last: u16,
    /// UDP port of the tunnel, host order.
    pub vxlan_port: u16,
    /// Zero.
    pub reserved: u16,
}
const _: () = assert!(size_of::<Config>() == 120 && align_of::<Config>() == 4);

impl Config {
    /// Whether what a pod asks at an address outside goes under the node's address.
    #[inline(always)]
    #[must_use]
    pub const fn masquerades(&self, dst: &Addr) -> bool {
        let flag = if dst.is_v4() { MASQUERADE_V4 } else { MASQUERADE_V6 };
        self.flags & flag != 0
    }

    /// Whether `addr` lies in a service CIDR.
    #[inline(always)]
    #[must_use]
    pub const fn is_service_address(&self, addr: &Addr) -> bool {
        self.services[0].contains(addr) || self.services[1].contains(addr)
    }

    /// The gateway address of `addr`'s family; zero if there is none.
    #[inline(always)]
    #[must_use]
    pub const fn gateway_for(&self, addr: &Addr) -> Addr {
        if addr.is_v4() { self.gateway[0] } else { self.gateway[1] }
    }

    /// Whether `addr` is one of the gateway addresses.
    #[inline(always)]
    #[must_use]
    pub fn is_gateway(&self, addr: &Addr) -> bool {
        !addr.is_zero() && self.gateway_for(addr) == *addr
    }

    /// Whether a port (host order) lies in the node port range.
    #[inline(always)]
    #[must_use]
    pub const fn is_node_port(&self, port: u16) -> bool {
        port >= self.node_port_first && port <= self.node_port_last
    }
}

/// Under this address of `addr`'s family the node's own processes hear the node, when it asks them by a service and no
/// socket translates it. It is nobody's: who answers a datagram by a socket of all addresses answers under the one that
/// the route to the asker names, and the route to this one names the node's own, at which the question came in.
#[inline(always)]
#[must_use]
pub const fn asker_for(addr: &Addr) -> Addr {
    if addr.is_v4() {
        Addr::v4([169, 254, 21, 2])
    } else {
        Addr::from_octets([0xfd, 0x6f, 0x72, 0x6c, 0x6f, 0x70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_their_edges() {
        let config = Config {
            services: [Net::new([10, 96, 0, 0].into(), 16), Net::default()],
            gateway: [Addr::v4([10, 244, 0, 1]), Addr::default()],
            node_port_first: 30_000,
            node_port_last: 32_767,
            ..Config::default()
        };
        assert!(config.is_service_address(&Addr::v4([10, 96, 255, 255])));
        assert!(!config.is_service_address(&Addr::v4([10, 97, 0, 0])));
        assert!(!Config::default().is_service_address(&Addr::ANY_V4), "no range is no range");
        assert!(config.is_gateway(&Addr::v4([10, 244, 0, 1])));
        assert!(!config.is_gateway(&Addr::ANY_V6), "no gateway of that family");
        assert!(config.is_node_port(30_000) && config.is_node_port(32_767));
        assert!(!config.is_node_port(29_999) && !config.is_node_port(32_768));
    }
}
