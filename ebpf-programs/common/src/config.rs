//! The one row of settings that programs read.

/// Settings of this node. All addresses and masks in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Network address of the service CIDR.
    pub service_net: [u8; 4],
    /// Its mask; all zero bits mean that the range is unknown and nothing is refused for being in it.
    pub service_mask: [u8; 4],
    /// The node's gateway address: source of what the node itself translates towards pods.
    pub gateway: [u8; 4],
    /// Interface index of the VXLAN device; 0 while there is none.
    pub vxlan_ifindex: u32,
    /// VXLAN network identifier of the cluster.
    pub vni: u32,
    /// First node port, host order.
    pub node_port_first: u16,
    /// Last node port, host order.
    pub node_port_last: u16,
}
const _: () = assert!(size_of::<Config>() == 24 && align_of::<Config>() == 4);

impl Config {
    /// Whether `addr` lies in the service CIDR.
    #[inline(always)]
    #[must_use]
    pub fn is_service_address(&self, addr: [u8; 4]) -> bool {
        let mask = u32::from_ne_bytes(self.service_mask);
        mask != 0 && u32::from_ne_bytes(addr) & mask == u32::from_ne_bytes(self.service_net)
    }

    /// Whether a port (host order) lies in the node port range.
    #[inline(always)]
    #[must_use]
    pub const fn is_node_port(&self, port: u16) -> bool {
        port >= self.node_port_first && port <= self.node_port_last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_range_has_its_edges_where_the_mask_says() {
        let config = Config {
            service_net: [10, 96, 0, 0],
            service_mask: [255, 255, 0, 0],
            node_port_first: 30_000,
            node_port_last: 32_767,
            ..Config::default()
        };
        assert!(config.is_service_address([10, 96, 0, 0]));
        assert!(config.is_service_address([10, 96, 255, 255]));
        assert!(!config.is_service_address([10, 97, 0, 0]));
        assert!(!config.is_service_address([10, 95, 255, 255]));
        assert!(!Config::default().is_service_address([0, 0, 0, 0]), "no range is no range");
        assert!(config.is_node_port(30_000) && config.is_node_port(32_767));
        assert!(!config.is_node_port(29_999) && !config.is_node_port(32_768));
    }
}
