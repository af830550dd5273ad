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
    table::Table,
};
use tokio::{sync::watch, time};

use super::{hosts::Pod, kube_proxy};

/// Programming the largest quick set takes far less.
const TIMEOUT: Duration = Duration::from_secs(60);

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
        host_ifindex: ifindex.parse().with_context(|| format!("index {ifindex}"))?,
        host_mac: mac(host)?,
        pod_mac: mac(pod)?,
    })
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect::<Result<_, _>>()
        .with_context(|| format!("Ethernet address {text}"))?;
    <[u8; 6]>::try_from(bytes).ok().with_context(|| format!("Ethernet address {text}"))
}

/// The child's life: programs `count` services, the measured one leading to `real`.
///
/// # Errors
/// When the dataplane cannot start or does not finish in time.
pub async fn node(
    cgroup: PathBuf,
    count: u32,
    real: SocketAddrV4,
    pods: Vec<LocalEndpoint>,
) -> Result<()> {
    let node_ip = std::net::Ipv4Addr::new(10, 244, 0, 1);
    let config = DataplaneConfig {
        cgroup: Some(cgroup),
        pins: None,
        devices: vec!["lo".to_owned()],
        service_cidr: None,
        node_local: None,
        ..DataplaneConfig::new(node_ip)
    };
    let (services, slices, endpoints) = (Table::new(), Table::new(), Table::new());
    for (n, service) in kube_proxy::services(count, &[real]).0.iter().enumerate() {
        let key = ObjectKey::new("bench", &format!("service-{n}"));
        slices.upsert(key.clone(), slice(&key, service));
        services.upsert(key, row(service));
    }
    for pod in pods {
        endpoints.upsert(pod.ip, pod);
    }
    for table in [&services as &dyn Synced, &slices, &endpoints] {
        table.mark();
    }
    let revision = *endpoints.subscribe().borrow();
    let tunnels = Table::new();
    tunnels.mark_synced();
    let (_no_overlay, overlay) = watch::channel(None);
    let tables = Tables { services, slices, endpoints, tunnels, overlay };
    let mut handle = dataplane::start(config, tables).context("start the dataplane")?;
    time::timeout(TIMEOUT, handle.programmed.wait_for(|done| *done >= revision))
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

/// Tables of any row can be marked.
trait Synced {
    fn mark(&self);
}

impl<K: Ord + Clone, V: PartialEq> Synced for Table<K, V> {
    fn mark(&self) {
        self.mark_synced();
    }
}

fn row(service: &kube_proxy::Service) -> ServiceRow {
    ServiceRow {
        kind: ServiceKind::ClusterIp,
        cluster_ips: vec![IpAddr::V4(*service.address.ip())],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: service.address.port(),
            node_port: 0,
        }],
        ..ServiceRow::default()
    }
}

fn slice(key: &ObjectKey, service: &kube_proxy::Service) -> EndpointSliceRow {
    let port = service.endpoints.first().map_or(0, SocketAddrV4::port);
    EndpointSliceRow {
        service: key.clone(),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port }],
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
