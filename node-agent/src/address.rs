//! Which addresses this node has for others, and when it has lost them.
//!
//! Effects: asks the kernel for a route, sends nothing. `Loss` decides (pure).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{self, Instant},
};

use crate::{
    changes::Changes,
    config::Config,
    sys::{netlink::Netlink, netns::NetNs},
};

/// How often it is looked although nothing was heard.
const REFRESH: Duration = Duration::from_secs(10);
/// How long another address must be the node's before it counts: a restart of the network takes one away
/// and gives it back.
const LASTING: Duration = Duration::from_secs(5);

/// The addresses that the administrator gave.
fn given(config: &Config) -> Vec<IpAddr> {
    config.node_ips.into_iter().flatten().collect()
}

/// Whether the administrator has said which addresses are the node's: then they stay these.
pub(crate) fn are_given(config: &Config) -> bool {
    !given(config).is_empty()
}

/// The configured addresses, or the one from which packets to the server would be sent. `None` when
/// there is no way to the server.
pub(crate) fn node_ips(config: &Config, server: &http::Uri) -> Option<Vec<IpAddr>> {
    if are_given(config) { Some(given(config)) } else { towards(server) }
}

/// The address from which packets to the server would be sent.
fn towards(server: &http::Uri) -> Option<Vec<IpAddr>> {
    let host = server.host()?.trim_matches(['[', ']']).to_owned();
    let port = server.port_u16().unwrap_or(443);
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    any.into_iter().find_map(|any| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((host.as_str(), port)).ok()?;
        socket.local_addr().ok().map(|address| vec![address.ip()])
    })
}

/// Waits until the node has lost one of its addresses for good and others are to be had, which are given. As
/// long as the addresses are there they stay, also if the way to the server leads elsewhere.
pub async fn moved(server: &http::Uri, own: &[IpAddr]) -> Vec<IpAddr> {
    let mut changes = Changes::of(&NetNs::own());
    let mut loss = Loss::default();
    loop {
        let (server, before) = (server.clone(), own.to_vec());
        // A name of the server is looked up.
        let seen = spawn_blocking(move || instead(&server, &before)).await.ok().flatten();
        if loss.lasts(seen.as_deref(), Instant::now())
            && let Some(others) = seen
        {
            return others;
        }
        let pause = if loss.since.is_some() { LASTING } else { REFRESH };
        tokio::select! {
            () = changes.settled() => {}
            () = time::sleep(pause) => {}
        }
    }
}

/// What the node has instead of addresses that are on none of its devices.
fn instead(server: &http::Uri, own: &[IpAddr]) -> Option<Vec<IpAddr>> {
    let present = Netlink::open().and_then(|mut netlink| netlink.all_addresses()).ok()?;
    let is_there = |ip: &IpAddr| present.iter().any(|(_, one, _)| one == ip);
    if own.iter().all(is_there) { None } else { towards(server).filter(|others| others != own) }
}

/// Since when the node has had these addresses instead of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Loss {
    since: Option<(Vec<IpAddr>, Instant)>,
}

impl Loss {
    /// Notes what was seen instead, and says whether it has been so for long enough.
    fn lasts(&mut self, seen: Option<&[IpAddr]>, now: Instant) -> bool {
        match (&self.since, seen) {
            (Some((before, since)), Some(seen)) if before == seen => now >= *since + LASTING,
            (_, seen) => {
                self.since = seen.map(|seen| (seen.to_vec(), now));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_address_counts_once_it_has_lasted() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (one, two) = ([IpAddr::from([192, 0, 2, 1])], [IpAddr::from([192, 0, 2, 2])]);
        let mut loss = Loss::default();
        for (ms, seen, lasts) in [
            (0, None, false),
            (1000, Some(&one[..]), false),
            (5999, Some(&one[..]), false),
            // It was back for a moment.
            (6000, None, false),
            (6001, Some(&one[..]), false),
            (7000, Some(&two[..]), false),
            (11_500, Some(&two[..]), false),
            (12_000, Some(&two[..]), true),
        ] {
            assert_eq!(loss.lasts(seen, at(ms)), lasts, "{ms}");
        }
    }
}
