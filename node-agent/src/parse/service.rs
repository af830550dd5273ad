//! Services.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::core::v1::{Service, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{key, protocol};
use crate::model::{Few, ObjectKey, Protocol, ServiceKind, ServicePort, ServiceRow, TrafficPolicy};

/// How long a client stays with its backend when `sessionAffinityConfig` does not say: three hours
/// (`DefaultClientIPServiceAffinitySeconds` in upstream's `core/v1`).
const AFFINITY_S: u32 = 10_800;
/// The longest that upstream's validation lets in: a day.
const AFFINITY_MAX_S: u32 = 86_400;

/// Parts that were left out, in words.
type Rejected = Vec<Box<str>>;

/// The key and row of a service; `None` without a name.
#[must_use]
pub fn service(object: &Service) -> Option<(ObjectKey, ServiceRow)> {
    let key = key(&object.metadata)?;
    let spec = object.spec.as_ref()?;
    let (mut rejected, mut unsupported) = (Rejected::new(), Rejected::new());
    let texts: Vec<&str> = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(many), _) if !many.is_empty() => many.iter().map(String::as_str).collect(),
        (_, Some(one)) => vec![one],
        (_, None) => vec![],
    };
    let is_headless = texts.first() == Some(&"None");
    let addressed = texts.into_iter().filter(|text| !["", "None"].contains(text));
    let cluster_ips = addresses("spec.clusterIPs", addressed, &mut rejected);
    let kind = kind(spec, is_headless);
    let external = spec.external_ips.iter().flatten().map(String::as_str);
    let mut row = ServiceRow {
        kind,
        cluster_ips,
        external_ips: addresses("spec.externalIPs", external, &mut rejected).into(),
        ingress_ips: ingress_ips(object, &mut rejected).into(),
        external_name: spec.external_name.as_deref().unwrap_or_default().into(),
        ports: ports((kind, spec), &mut rejected, &mut unsupported),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        affinity_s: affinity_s(spec),
        internal_policy: policy(spec.internal_traffic_policy.as_deref()),
        external_policy: TrafficPolicy::Cluster,
        health_check_port: 0,
        source_ranges: Few::default(),
        is_closed: false,
        created_s: object.metadata.creation_timestamp.as_ref().map_or(0, |at| at.0.as_second()),
        unsupported: Few::default(),
        rejected: Few::default(),
    };
    let asked = spec.load_balancer_source_ranges.iter().flatten().count();
    let ranges = source_ranges(spec, &mut rejected);
    row.is_closed = ranges.len() < asked;
    row.source_ranges = ranges.into();
    // Upstream looks at the type, not at whether a node port or an ingress address is there yet.
    let outside = matches!(kind, ServiceKind::NodePort | ServiceKind::LoadBalancer);
    if outside || !row.external_ips.is_empty() {
        row.external_policy = policy(spec.external_traffic_policy.as_deref());
    }
    if kind == ServiceKind::LoadBalancer && row.external_policy == TrafficPolicy::Local {
        row.health_check_port =
            spec.health_check_node_port.and_then(|port| u16::try_from(port).ok()).unwrap_or(0);
    }
    (row.rejected, row.unsupported) = (rejected.into(), unsupported.into());
    Some((key, row))
}

fn kind(spec: &ServiceSpec, is_headless: bool) -> ServiceKind {
    match spec.type_.as_deref() {
        Some("ExternalName") => ServiceKind::ExternalName,
        Some("NodePort") => ServiceKind::NodePort,
        Some("LoadBalancer") => ServiceKind::LoadBalancer,
        _ if is_headless => ServiceKind::Headless,
        _ => ServiceKind::ClusterIp,
    }
}

/// Where a load balancer lets packets through unchanged. With `ipMode: Proxy` the address is the
/// load balancer's own and the node must not answer for it (KEP-1860).
fn ingress_ips(object: &Service, rejected: &mut Rejected) -> Vec<IpAddr> {
    let balancer = object.status.iter().filter_map(|status| status.load_balancer.as_ref());
    let ips = balancer
        .flat_map(|balancer| balancer.ingress.iter().flatten())
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|ingress| ingress.ip.as_deref());
    addresses("status.loadBalancer.ingress", ips, rejected)
}

fn addresses(
    field: &str,
    texts: impl Iterator<Item = impl AsRef<str>>,
    rejected: &mut Rejected,
) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for (index, text) in texts.enumerate() {
        let text = text.as_ref();
        match text.parse() {
            Ok(ip) => found.push(ip),
            Err(_) => rejected.push(format!("{field}[{index}] {text:?} is no IP address").into()),
        }
    }
    found.shrink_to_fit();
    found
}

/// Upstream's validation lets blanks around a range in.
fn source_ranges(spec: &ServiceSpec, rejected: &mut Rejected) -> Vec<IpNet> {
    let mut found = Vec::new();
    for (index, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match text.trim().parse::<IpNet>() {
            Ok(range) => found.push(range.trunc()),
            Err(_) => rejected
                .push(format!("spec.loadBalancerSourceRanges[{index}] {text:?} is no CIDR").into()),
        }
    }
    found.shrink_to_fit();
    found
}

/// Ports whose target is not led to are left out, and their field told as not supported. Services without an address
/// of their own keep them: DNS answers for those.
fn ports(
    (kind, spec): (ServiceKind, &ServiceSpec),
    rejected: &mut Rejected,
    unsupported: &mut Rejected,
) -> Vec<ServicePort> {
    let is_led = !matches!(kind, ServiceKind::ExternalName | ServiceKind::Headless);
    let mut found: Vec<ServicePort> = Vec::with_capacity(spec.ports.as_ref().map_or(0, Vec::len));
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let field = format!("spec.ports[{index}]");
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            let name = port.protocol.as_deref().unwrap_or_default();
            rejected.push(format!("{field}.protocol {name:?} is not TCP, UDP or SCTP").into());
            continue;
        };
        let Some(number) = u16::try_from(port.port).ok().filter(|number| *number != 0) else {
            rejected.push(format!("{field}.port {} is not in 1 to 65535", port.port).into());
            continue;
        };
        let node_port = u16::try_from(port.node_port.unwrap_or(0)).unwrap_or_else(|_| {
            rejected.push(format!("{field}.nodePort is not in 1 to 65535").into());
            0
        });
        let name: Arc<str> = port.name.as_deref().map_or_else(Arc::default, Arc::from);
        if found.iter().any(|other| other.protocol == protocol && other.name == name) {
            rejected.push(format!("{field}.name {name:?} stands twice").into());
            continue;
        }
        if is_led && !is_translated(protocol, port) {
            unsupported.push(format!("{field}.targetPort").into());
            continue;
        }
        found.push(ServicePort { name, protocol, port: number, node_port });
    }
    found
}

fn affinity_s(spec: &ServiceSpec) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let client_ip = spec.session_affinity_config.as_ref().and_then(|it| it.client_ip.as_ref());
    let seconds = client_ip.and_then(|client_ip| client_ip.timeout_seconds);
    let seconds = seconds.and_then(|seconds| u32::try_from(seconds).ok());
    seconds.filter(|seconds| *seconds > 0).unwrap_or(AFFINITY_S).min(AFFINITY_MAX_S)
}

fn policy(name: Option<&str>) -> TrafficPolicy {
    match name {
        Some("Local") => TrafficPolicy::Local,
        _ => TrafficPolicy::Cluster,
    }
}

/// Whether the port can be led to its target by number; what a named one stands for, slices tell. SCTP's
/// checksum covers its ports and is a CRC that no program can compute, so that only addresses are translated.
fn is_translated(protocol: Protocol, port: &k8s_openapi::api::core::v1::ServicePort) -> bool {
    let target = port.target_port.as_ref();
    protocol != Protocol::Sctp
        || !matches!(target, Some(IntOrString::Int(target)) if *target != port.port)
}
