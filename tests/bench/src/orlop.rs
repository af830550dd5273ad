//! Orlop's dataplane as a subject: a child process in the node's namespace. Effects.
//!
//! It fills the same tables that the watches fill, starts the agent's own dataplane with nothing
//! pinned, says `ready` when all services and pods are programmed, and lives until its standard
//! input ends; the programs end with it.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddrV4},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use node_agent::{
    dataplane::{self, DataplaneConfig, Tables},
    model::{
        EndpointPort, EndpointRow, EndpointSliceRow, LocalEndpoint, ObjectKey, Protocol,
        ServiceKind, ServicePort, ServiceRow,
    },
    overlay::OverlayDevice,
    table::Table,
};
use tokio::{sync::watch, time};

use super::{hosts::Pod, kube_proxy};

/// Programming the largest quick set takes far less.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// The node's address, which nothing has.
const NODE_IP: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 244, 0, 1);

/// How a pod is handed to the child: `ip,ifindex,host mac,pod mac`.
#[must_use]
pub fn pod_flag(pod: &Pod) -> String {
    format!("{},{},{},{}", pod.ip, pod.host_ifindex, pod.macs.0, pod.macs.1)
}

/// The reverse of [`pod_flag`].
///
/// # Errors
/// When a part is missing or malformed.
pub fn endpoint(flag: &str) -> Result<LocalEndpoint> {
    let parts: Vec<&str> = flag.split(',').collect();
    let [ip, ifindex, host, pod] = parts[..] else { anyhow::bail!("{flag}: four parts expected") };
    Ok(LocalEndpoint {
        pod: ObjectKey::new("bench", ip),
        ip: ip.parse().with_context(|| format!("address {ip}"))?,
        netns_cookie: 0,
        host_ifindex: ifindex.parse().with_context(|| format!("index {ifindex}"))?,
        host_mac: mac(host)?,
        pod_mac: mac(pod)?,
        host_ports: [].into(),
    })
}

/// An Ethernet address as `ip` prints it.
///
/// # Errors
/// When it is none.
pub fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect::<Result<_, _>>()
        .with_context(|| format!("Ethernet address {text}"))?;
    <[u8; 6]>::try_from(bytes).ok().with_context(|| format!("Ethernet address {text}"))
}

/// Runs a child's life on tokio.
///
/// # Errors
/// When it fails.
pub fn run(life: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Runtime::new().context("start tokio")?.block_on(life)
}

/// What a child of the role `node` is told.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct NodeFlags {
    /// Below which connections are translated.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    #[arg(long)]
    pub services: u32,
    /// Of each service that is not measured.
    #[arg(long)]
    pub endpoints: u32,
    /// Where the measured service leads.
    #[arg(long)]
    pub real: Option<SocketAddrV4>,
    /// As [`pod_flag`] writes it.
    #[arg(long = "pod")]
    pub pods: Vec<String>,
}

impl NodeFlags {
    /// As the command line that is parsed into it.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            format!("--services={}", self.services),
            format!("--endpoints={}", self.endpoints),
        ];
        args.extend(self.cgroup.iter().map(|dir| format!("--cgroup={}", dir.display())));
        args.extend(self.real.iter().map(|real| format!("--real={real}")));
        args.extend(self.pods.iter().map(|pod| format!("--pod={pod}")));
        args
    }
}

/// The tables of one node: services and slices of the set, synced if asked for, and its pods.
#[derive(Debug)]
pub struct Filled {
    pub tables: Tables,
    pub overlay: watch::Sender<Option<OverlayDevice>>,
}

/// Fills tables as the watches would; services and slices are left to be marked synced.
#[must_use]
pub fn fill(all: impl Iterator<Item = kube_proxy::Service>, pods: Vec<LocalEndpoint>) -> Filled {
    let (services, slices, endpoints) = (Table::new(), Table::new(), Table::new());
    for service in all {
        let key = key(&service);
        slices.upsert(key.clone(), slice(&service));
        services.upsert(key, row(&service));
    }
    for pod in pods {
        endpoints.upsert(pod.ip, pod);
    }
    endpoints.mark_synced();
    let tunnels = Table::new();
    tunnels.mark_synced();
    let (sender, overlay) = watch::channel(None);
    Filled { tables: Tables { services, slices, endpoints, tunnels, overlay }, overlay: sender }
}

/// The settings of a node that has nothing pinned and nothing to do with this machine.
#[must_use]
pub fn config(cgroup: Option<PathBuf>) -> DataplaneConfig {
    DataplaneConfig {
        cgroup,
        pins: None,
        devices: vec!["lo".to_owned()],
        service_cidrs: Vec::new(),
        node_local: None,
        ..DataplaneConfig::new(NODE_IP.into())
    }
}

/// The child's life: programs `services`, the measured one leading to `real`.
///
/// # Errors
/// When the dataplane cannot start or does not finish in time.
pub async fn node(flags: NodeFlags) -> Result<()> {
    let real: Vec<SocketAddrV4> = flags.real.into_iter().collect();
    let pods = flags.pods.iter().map(|flag| endpoint(flag)).collect::<Result<_>>()?;
    let all = kube_proxy::services(flags.services, flags.endpoints, &real).0;
    let Filled { tables, overlay: _no_overlay } = fill(all.into_iter(), pods);
    tables.services.mark_synced();
    tables.slices.mark_synced();
    let revision = *tables.endpoints.subscribe().borrow();
    let mut handle =
        dataplane::start(config(flags.cgroup), tables).context("start the dataplane")?;
    time::timeout(TIMEOUT, handle.programmed.wait_for(|done| done.revision >= revision))
        .await
        .context("pods are not programmed in time")?
        .context("the dataplane ended")?;
    let report = handle.report().await.context("the dataplane ended")?;
    ensure!(report.trouble.is_empty(), "{:?}", report.trouble);
    super::traffic::say("ready")?;
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    handle.stop().await;
    Ok(())
}

/// The name of a service of the set, and of its slice.
#[must_use]
pub fn key(service: &kube_proxy::Service) -> ObjectKey {
    ObjectKey::new("bench", &format!("service-{}", service.number))
}

const fn protocol(service: &kube_proxy::Service) -> Protocol {
    match service.protocol {
        kube_proxy::Protocol::Tcp => Protocol::Tcp,
        kube_proxy::Protocol::Udp => Protocol::Udp,
    }
}

/// A service as the watch would give it.
#[must_use]
pub fn row(service: &kube_proxy::Service) -> ServiceRow {
    ServiceRow {
        kind: if service.node_port.is_some() {
            ServiceKind::NodePort
        } else {
            ServiceKind::ClusterIp
        },
        cluster_ips: vec![IpAddr::V4(*service.address.ip())],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: protocol(service),
            port: service.address.port(),
            node_port: service.node_port.unwrap_or(0),
        }],
        ..ServiceRow::default()
    }
}

/// Its slice, likewise.
#[must_use]
pub fn slice(service: &kube_proxy::Service) -> EndpointSliceRow {
    let port = service.endpoints.first().map_or(0, SocketAddrV4::port);
    EndpointSliceRow {
        service: key(service),
        ports: vec![EndpointPort { name: "http".into(), protocol: protocol(service), port }],
        endpoints: service
            .endpoints
            .iter()
            .map(|endpoint| EndpointRow {
                ip: IpAddr::V4(*endpoint.ip()),
                ..EndpointRow::default()
            })
            .collect(),
        ..EndpointSliceRow::default()
    }
}
