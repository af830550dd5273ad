//! Which addresses this node has for others.
//!
//! Effects: asks the kernel for a route, sends nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use crate::config::Config;

/// The configured addresses, or the one from which packets to the server would be sent. `None` when
/// there is no way to the server.
pub(crate) fn node_ips(config: &Config, server: &http::Uri) -> Option<Vec<IpAddr>> {
    let said: Vec<IpAddr> = config.node_ips.into_iter().flatten().collect();
    if !said.is_empty() {
        return Some(said);
    }
    let host = server.host()?.trim_matches(['[', ']']).to_owned();
    let port = server.port_u16().unwrap_or(443);
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    any.into_iter().find_map(|any| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((host.as_str(), port)).ok()?;
        socket.local_addr().ok().map(|address| vec![address.ip()])
    })
}
