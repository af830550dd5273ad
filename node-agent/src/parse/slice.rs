//! Endpoint slices.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, EndpointSlice};

use super::{key, protocol};
use crate::model::{EndpointPort, EndpointRow, EndpointSliceRow, Family, Hints, ObjectKey};

/// Label that names a slice's service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Names of `forZones` and `forNodes` that are kept: upstream's validation lets 8 in.
const HINTS: usize = 8;

/// The key and row of a slice; `None` when it belongs to no service or holds host names.
#[must_use]
pub fn endpoint_slice(object: &EndpointSlice) -> Option<(ObjectKey, EndpointSliceRow)> {
    let key = key(&object.metadata)?;
    let family = match object.address_type.as_str() {
        "IPv6" => Family::V6,
        "FQDN" => return None,
        _ => Family::V4,
    };
    let name = object.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    let mut rejected = Vec::new();
    let ports = ports(object, &mut rejected);
    let mut endpoints = Vec::with_capacity(object.endpoints.as_ref().map_or(0, Vec::len));
    for (index, object) in object.endpoints.iter().flatten().enumerate() {
        match address(object, family) {
            Ok(ip) => endpoints.push(endpoint(object, ip)),
            Err(words) => rejected.push(format!("endpoints[{index}].addresses: {words}").into()),
        }
    }
    let rejected = rejected.into();
    let service = ObjectKey { namespace: Arc::clone(&key.namespace), name: name.as_str().into() };
    Some((key, EndpointSliceRow { service, family, ports, endpoints, rejected }))
}

/// A port without a number means every port, which nothing here can be translated to.
fn ports(object: &EndpointSlice, rejected: &mut Vec<Box<str>>) -> Vec<EndpointPort> {
    let mut found = Vec::with_capacity(object.ports.as_ref().map_or(0, Vec::len));
    for (index, port) in object.ports.iter().flatten().enumerate() {
        let number = port.port.and_then(|number| u16::try_from(number).ok());
        let Some(number) = number.filter(|number| *number != 0) else {
            rejected.push(format!("ports[{index}].port is missing or not in 1 to 65535").into());
            continue;
        };
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            rejected.push(format!("ports[{index}].protocol is not TCP, UDP or SCTP").into());
            continue;
        };
        let name = port.name.as_deref().map_or_else(Arc::default, Arc::from);
        found.push(EndpointPort { name, protocol, port: number });
    }
    found
}

fn address(object: &Endpoint, family: Family) -> Result<IpAddr, String> {
    let text = object.addresses.first().ok_or("there is none")?;
    let ip: IpAddr = text.parse().map_err(|_why| format!("{text:?} is no IP address"))?;
    if Family::of(&ip) != family {
        return Err(format!("{ip} is not of the slice's addressType {}", family.name()));
    }
    Ok(ip)
}

fn endpoint(object: &Endpoint, ip: IpAddr) -> EndpointRow {
    let conditions = object.conditions.as_ref();
    EndpointRow {
        ip,
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        hostname: object.hostname.as_deref().unwrap_or_default().into(),
        node: object.node_name.as_deref().unwrap_or_default().into(),
        hints: object.hints.as_ref().and_then(hints),
    }
}

fn hints(object: &EndpointHints) -> Option<Box<Hints>> {
    let zones = object.for_zones.iter().flatten().map(|zone| zone.name.as_str().into());
    let nodes = object.for_nodes.iter().flatten().map(|node| node.name.as_str().into());
    let hints = Hints { zones: zones.take(HINTS).collect(), nodes: nodes.take(HINTS).collect() };
    (hints != Hints::default()).then(|| Box::new(hints))
}
