//! The overlay: pods of other nodes through a VXLAN device or by routes.
//!
//! Task: `follow` reads the node table, hears of changes of devices and addresses, owns devices, addresses and routes, and writes the tunnel table
//! and the device for the dataplane and the pod network for the CNI server. It ends with the [`Handle`].
//! With [`Mode::Off`] only the host device is kept.

mod apply;
pub mod host;
pub mod plan;

use std::{collections::BTreeMap, io, net::IpAddr, time::Duration};

use ipnet::{IpNet, Ipv4Net};
use tokio::{sync::watch, task::JoinSet, time};

pub use plan::Mode;

use crate::{
    address,
    chain::chain,
    changes::Changes,
    config::{Component, Config, OverlayMode},
    model::{FarEnd, NodeRow, ObjectKey, PodNetwork},
    sys::{netlink::Netlink, netns::NetNs, sysctl::SettingError},
    table::Table,
};

/// [`OverlayConfig::refresh`] as usual.
const REFRESH: Duration = Duration::from_secs(30);
/// How soon a failed round is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// What this node's overlay is like.
#[derive(Clone, Debug)]
pub struct OverlayConfig {
    pub node_name: String,
    /// The node's addresses on the network that connects nodes, the main one first, at most one of a
    /// family.
    pub node_ips: Vec<IpAddr>,
    /// The administrator has said so, and nobody looks for others.
    pub node_ips_are_given: bool,
    pub mode: Mode,
    /// Name of the VXLAN device.
    pub device: String,
    /// VXLAN network identifier, the same on all nodes.
    pub vni: u32,
    /// UDP port of the tunnel, the same on all nodes.
    pub port: u16,
    /// The cluster's service ranges, at most one of a family.
    pub service_cidrs: Vec<IpNet>,
    /// Where the host device has its addresses from for a family without a pod CIDR.
    pub link_cidrs: Vec<IpNet>,
    /// How often the kernel is looked at although nothing was heard of it.
    pub refresh: Duration,
}

impl OverlayConfig {
    /// The usual numbers: VXLAN device `orlop.vxlan`, VNI 1, port 8472 (Linux's default), services in
    /// 10.96.0.0/16.
    #[must_use]
    pub fn new(node_name: &str, node_ips: Vec<IpAddr>) -> Self {
        Self {
            node_name: node_name.to_owned(),
            node_ips,
            node_ips_are_given: true,
            mode: Mode::Vxlan,
            device: "orlop.vxlan".to_owned(),
            vni: 1,
            port: 8472,
            service_cidrs: vec![Ipv4Net::new_assert([10, 96, 0, 0].into(), 16).into()],
            link_cidrs: plan::usual_link_cidrs(),
            refresh: REFRESH,
        }
    }
}

impl OverlayConfig {
    /// What the agent's configuration says; without the overlay part somebody else connects pods.
    #[must_use]
    pub fn from_config(config: &Config, node_ips: Vec<IpAddr>) -> Self {
        let mode = match config.overlay {
            _ if !config.components.contains(&Component::Overlay) => Mode::Off,
            OverlayMode::Vxlan => Mode::Vxlan,
            OverlayMode::L3 => Mode::L3,
            OverlayMode::Auto => Mode::Auto,
        };
        let service_cidrs = config.service_cidrs.clone();
        let node_ips_are_given = address::are_given(config);
        let usual = Self::new(&config.node_name, node_ips);
        Self { mode, service_cidrs, node_ips_are_given, ..usual }
    }
}

/// The overlay once it can carry packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayDevice {
    /// The VXLAN device; 0 if there is none.
    pub ifindex: u32,
    /// This node's gateway addresses by family (IPv4, IPv6): the first host of its pod CIDR.
    pub gateways: [Option<IpAddr>; 2],
    pub vni: u32,
    /// UDP port of the tunnel.
    pub port: u16,
    /// The device by which the node's own packets to services leave; 0 if there is none.
    pub host_ifindex: u32,
    /// The other end of that device, where our program is; 0 if there is none.
    pub host_peer_ifindex: u32,
}

/// What is wrong with the overlay. The round is tried again.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("no device has the node address {node_ip}: {remedy}")]
    NoUnderlay { node_ip: IpAddr, remedy: &'static str },
    #[error("device {name} is somebody else's: it is no {wanted}; rename or remove it")]
    Foreign { name: String, wanted: &'static str },
    #[error("cannot make VXLAN device {name} at UDP port {port}, which another device may have")]
    Vxlan {
        name: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("cannot list devices")]
    Links(#[source] io::Error),
    #[error("cannot set up device {name}")]
    Device {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot set gateway address {gateway}")]
    Gateway {
        gateway: IpAddr,
        #[source]
        source: io::Error,
    },
    #[error("cannot list routes")]
    Routes(#[source] io::Error),
    #[error("cannot change the route to {destination}")]
    Route {
        destination: IpNet,
        #[source]
        source: io::Error,
    },
    #[error("the kernel's settings")]
    Setting(#[source] SettingError),
    #[error("cannot open a netlink socket")]
    Netlink(#[source] io::Error),
}

/// The running overlay; dropping it stops the task and leaves the network as it is.
#[derive(Debug)]
pub struct Handle {
    /// Pod CIDR to node address, for the dataplane.
    pub tunnels: Table<IpNet, FarEnd>,
    /// The device, for the dataplane.
    pub device: watch::Receiver<Option<OverlayDevice>>,
    /// This node's pod CIDRs and the MTU of its pods, for the CNI server.
    pub network: watch::Receiver<Option<PodNetwork>>,
    /// What is wrong at the moment, in words with causes: this node cannot connect pods.
    pub trouble: watch::Receiver<Option<String>>,
    /// What is wrong with single nodes or ranges, in words; the rest works.
    pub conditions: watch::Receiver<Vec<String>>,
    tasks: JoinSet<()>,
}

impl Handle {
    /// Stops the task; tunnels and routes stay.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Starts to follow the nodes. Call it in a tokio runtime.
///
/// # Errors
///
/// [`OverlayError::Netlink`]; everything later is retried and told by [`Handle::trouble`].
pub fn start(
    config: OverlayConfig,
    nodes: Table<ObjectKey, NodeRow>,
) -> Result<Handle, OverlayError> {
    let netlink = Netlink::open().map_err(OverlayError::Netlink)?;
    let (device_tx, device) = watch::channel(None);
    let (network_tx, network) = watch::channel(None);
    let (trouble_tx, trouble) = watch::channel(None);
    let (conditions_tx, conditions) = watch::channel(Vec::new());
    let tunnels = Table::new();
    let task = Follow {
        config,
        nodes,
        netlink,
        changes: Changes::of(&NetNs::own()),
        tunnels: tunnels.clone(),
        device: device_tx,
        network: network_tx,
        trouble: trouble_tx,
        conditions: conditions_tx,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(task.run());
    Ok(Handle { tunnels, device, network, trouble, conditions, tasks })
}

struct Follow {
    config: OverlayConfig,
    nodes: Table<ObjectKey, NodeRow>,
    netlink: Netlink,
    changes: Changes,
    tunnels: Table<IpNet, FarEnd>,
    device: watch::Sender<Option<OverlayDevice>>,
    network: watch::Sender<Option<PodNetwork>>,
    trouble: watch::Sender<Option<String>>,
    conditions: watch::Sender<Vec<String>>,
}

impl Follow {
    async fn run(mut self) {
        let mut changed = self.nodes.subscribe();
        loop {
            changed.mark_unchanged();
            let outcome = self.round();
            let pause = if outcome.is_ok() { self.config.refresh } else { RETRY };
            let words = outcome.err().map(|error| chain(&error));
            self.trouble.send_if_modified(|old| {
                let differs = *old != words;
                if differs {
                    if let Some(words) = &words {
                        tracing::warn!(trouble = words, "overlay");
                    }
                    old.clone_from(&words);
                }
                differs
            });
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                () = self.changes.settled() => {}
                () = time::sleep(pause) => {}
            }
        }
    }

    fn round(&mut self) -> Result<(), OverlayError> {
        let underlay = apply::prepare(&mut self.netlink, &self.config)?;
        let delta = self.nodes.changes_since(0);
        // Without the whole list a missing node may only be late: its routes stay. Where the overlay
        // is off nobody's are.
        let is_whole = delta.synced || self.config.mode == Mode::Off;
        let absent = if is_whole { apply::Absent::Removed } else { apply::Absent::Kept };
        let rows: BTreeMap<_, _> = delta.upserts.into_iter().collect();
        let nodes = rows.iter().map(|(key, row)| (key, row.as_ref()));
        let desired = plan::desired(nodes, &self.place(), &underlay);
        // Before the server answers, the nodes of the last snapshot are reached; without them nothing is known.
        if !is_whole && desired.pod_cidrs.is_empty() {
            return Ok(());
        }
        for condition in &desired.conditions {
            if !self.conditions.borrow().contains(condition) {
                tracing::warn!(condition, "overlay");
            }
        }
        publish(&self.conditions, desired.conditions.clone());
        // Tunnels first: a route into the device without a tunnel drops packets.
        match absent {
            apply::Absent::Removed => self.tunnels.replace(desired.tunnels.clone()),
            apply::Absent::Kept => desired.tunnels.iter().for_each(|(net, far)| {
                self.tunnels.upsert(*net, *far);
            }),
        }
        let device = apply::apply(&mut self.netlink, &self.config, &underlay, &desired, absent)?;
        publish(&self.device, Some(device));
        let (cidrs, mtu) = (desired.pod_cidrs, desired.pod_mtu);
        publish(&self.network, (!cidrs.is_empty()).then_some(PodNetwork { cidrs, mtu }));
        Ok(())
    }

    fn place(&self) -> plan::Place {
        let config = &self.config;
        plan::Place {
            name: config.node_name.clone(),
            mode: config.mode,
            service_cidrs: config.service_cidrs.clone(),
            link_cidrs: config.link_cidrs.clone(),
        }
    }
}

fn publish<T: PartialEq>(channel: &watch::Sender<T>, value: T) {
    channel.send_if_modified(|old| {
        let differs = *old != value;
        if differs {
            *old = value;
        }
        differs
    });
}
