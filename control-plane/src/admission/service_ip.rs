//! ClusterIPs and node ports: which ones a Service gets, over the value of those in use. Pure.
//!
//! Dynamic addresses come from the upper part of the range, so that the lower part stays free for those asked for
//! by number (KEP-3070: the first `min(max(16, size/16), 256)`; KEP-3668 for node ports:
//! `min(max(16, size/32), 128)`), and from the lower part when the upper is full.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// The ranges that Services are given addresses and ports from.
#[derive(Clone, Debug)]
pub struct Networks {
    pub service_cidr: IpNet,
    /// First and last node port.
    pub node_ports: (u16, u16),
}

impl Networks {
    /// With upstream's node ports, 30000 to 32767.
    #[must_use]
    pub fn new(service_cidr: IpNet) -> Self {
        Self { service_cidr, node_ports: (30000, 32767) }
    }

    /// First address and count of addresses; network and broadcast address are not among them.
    fn addresses(&self) -> Option<(u32, u32)> {
        let IpNet::V4(net) = self.service_cidr else { return None };
        let first = u32::from(net.network()).checked_add(1)?;
        let last = u32::from(net.broadcast()).checked_sub(1)?;
        Some((first, last.checked_sub(first)?.checked_add(1)?))
    }
}

#[derive(Debug, Default)]
struct Used {
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<(u16, String)>,
}

/// Gives a Service what it lacks. `others` may contain the Service itself as it is stored.
#[must_use]
pub fn allocate(
    networks: &Networks,
    others: &[Arc<Value>],
    service: &mut Value,
    old: Option<&Value>,
) -> Vec<FieldError> {
    let used = used(others, service);
    let mut errors = Vec::new();
    if text(service, "/spec/type") == "ExternalName" {
        release(service);
        return errors;
    }
    keep(service, old);
    if let Err(error) = address(networks, &used, service) {
        errors.push(error);
    }
    errors.extend(ports(networks, &used, service));
    errors
}

fn used(others: &[Arc<Value>], service: &Value) -> Used {
    let mut used = Used::default();
    let uid = text(service, "/metadata/uid");
    for other in others.iter().filter(|other| text(other, "/metadata/uid") != uid) {
        used.addresses.extend(text(other, "/spec/clusterIP").parse::<IpAddr>());
        for port in other["spec"]["ports"].as_array().into_iter().flatten() {
            used.ports.extend(node_port(port));
        }
        let health = other["spec"]["healthCheckNodePort"].as_u64();
        let health = health.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        used.ports.extend(health.map(|port| (port, "TCP".to_owned())));
    }
    used
}

fn node_port(port: &Value) -> Option<(u16, String)> {
    let number = u16::try_from(port["nodePort"].as_u64()?).ok().filter(|number| *number > 0)?;
    Some((number, port["protocol"].as_str().unwrap_or("TCP").to_owned()))
}

/// An update that leaves them out keeps address and node ports.
fn keep(service: &mut Value, old: Option<&Value>) {
    let Some(old) = old else { return };
    if text(old, "/spec/type") == "ExternalName" {
        return;
    }
    if text(service, "/spec/clusterIP").is_empty() {
        for field in ["clusterIP", "clusterIPs"] {
            if let Some(value) = old["spec"].get(field) {
                service["spec"][field] = value.clone();
            }
        }
    }
    if !exposes(service) {
        return;
    }
    let before = old["spec"]["ports"].as_array().cloned().unwrap_or_default();
    for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
        let same =
            |other: &&Value| other["port"] == port["port"] && other["protocol"] == port["protocol"];
        let number = before.iter().find(same).map(|other| other["nodePort"].clone());
        if node_port(port).is_none()
            && let Some(number) = number.filter(Value::is_number)
        {
            port["nodePort"] = number;
        }
    }
}

/// An ExternalName has no addresses.
fn release(service: &mut Value) {
    if let Some(spec) = service["spec"].as_object_mut() {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            spec.remove(field);
        }
    }
    drop_node_ports(service);
}

fn drop_node_ports(service: &mut Value) {
    for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
        if let Some(port) = port.as_object_mut() {
            port.remove("nodePort");
        }
    }
}

fn exposes(service: &Value) -> bool {
    let kind = text(service, "/spec/type");
    let wanted = service["spec"]["allocateLoadBalancerNodePorts"] != false;
    kind == "NodePort" || (kind == "LoadBalancer" && wanted)
}

fn address(networks: &Networks, used: &Used, service: &mut Value) -> Result<(), FieldError> {
    let path = Path::new("spec.clusterIPs");
    let listed = service["spec"]["clusterIPs"].clone();
    let asked = match text(service, "/spec/clusterIP") {
        "" => listed.get(0).and_then(Value::as_str).unwrap_or("").to_owned(),
        asked => asked.to_owned(),
    };
    let given = match asked.as_str() {
        "None" => asked,
        "" => match free_address(networks, used) {
            Some(address) => address.to_string(),
            None => {
                return Err(FieldError::internal(
                    &path,
                    "failed to allocate a serviceIP: range is full",
                ));
            }
        },
        _ => {
            check_address(networks, used, &asked).map_err(|why| {
                let value = json!([asked]);
                FieldError::invalid(&path, &value, format!("failed to allocate IP {asked}: {why}"))
            })?;
            asked
        }
    };
    let spec = &mut service["spec"];
    spec["clusterIP"] = json!(given);
    spec["clusterIPs"] = json!([given]);
    if spec.get("ipFamilies").is_none() {
        spec["ipFamilies"] = json!(["IPv4"]);
    }
    if spec.get("ipFamilyPolicy").is_none() {
        spec["ipFamilyPolicy"] = json!("SingleStack");
    }
    Ok(())
}

fn check_address(networks: &Networks, used: &Used, asked: &str) -> Result<(), String> {
    let address: IpAddr = asked.parse().map_err(|error| format!("{error}"))?;
    if !networks.service_cidr.contains(&address) {
        return Err(format!(
            "the provided network does not match the current range: provided IP is not in the valid range. The range of valid IPs is {}",
            networks.service_cidr
        ));
    }
    if used.addresses.contains(&address) {
        return Err("provided IP is already allocated".to_owned());
    }
    Ok(())
}

fn free_address(networks: &Networks, used: &Used) -> Option<IpAddr> {
    let (first, count) = networks.addresses()?;
    let offset = (count / 16).clamp(16, 256).min(count);
    (offset..count).chain(0..offset).find_map(|index| {
        let address = IpAddr::V4(Ipv4Addr::from(first.checked_add(index)?));
        (!used.addresses.contains(&address)).then_some(address)
    })
}

fn ports(networks: &Networks, used: &Used, service: &mut Value) -> Vec<FieldError> {
    if !exposes(service) {
        if text(service, "/spec/type") == "ClusterIP" {
            drop_node_ports(service);
        }
        return Vec::new();
    }
    let (low, high) = networks.node_ports;
    let offset = ((high - low + 1) / 32).clamp(16, 128);
    let mut taken = used.ports.clone();
    let mut errors = Vec::new();
    let list = service["spec"]["ports"].as_array_mut().into_iter().flatten();
    let mut missing = Vec::new();
    for (index, port) in list.enumerate() {
        let path = Path::new("spec.ports").index(index).child("nodePort");
        let Some(asked) = node_port(port) else {
            missing.push((path, port));
            continue;
        };
        if asked.0 < low || asked.0 > high {
            let why = format!(
                "provided port is not in the valid range. The range of valid ports is {low}-{high}"
            );
            errors.push(FieldError::invalid(&path, &json!(asked.0), why));
        } else if taken.contains(&asked) {
            errors.push(FieldError::invalid(
                &path,
                &json!(asked.0),
                "provided port is already allocated",
            ));
        } else {
            taken.insert(asked);
        }
    }
    for (path, port) in missing {
        let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
        let mut candidates =
            (low.saturating_add(offset)..=high).chain(low..low.saturating_add(offset));
        match candidates.find(|number| !taken.contains(&(*number, protocol.clone()))) {
            Some(number) => {
                port["nodePort"] = json!(number);
                taken.insert((number, protocol));
            }
            None => errors
                .push(FieldError::internal(&path, "failed to allocate a nodePort: range is full")),
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks() -> Networks {
        Networks::new("10.96.0.0/16".parse().unwrap())
    }

    fn service(uid: &str, kind: &str, address: &str) -> Value {
        let mut service = json!({"metadata": {"uid": uid}, "spec": {"type": kind,
            "ports": [{"port": 80, "protocol": "TCP"}]}});
        if !address.is_empty() {
            service["spec"]["clusterIP"] = json!(address);
        }
        service
    }

    #[test]
    fn addresses_come_from_above_the_static_part_and_are_reused() {
        let mut first = service("a", "ClusterIP", "");
        assert_eq!(allocate(&networks(), &[], &mut first, None), []);
        // 10.96.0.0/16: 65,534 addresses, 256 of them static, beginning at .0.1.
        assert_eq!(first["spec"]["clusterIP"], "10.96.1.1");
        assert_eq!(first["spec"]["ipFamilies"], json!(["IPv4"]));
        let stored = [Arc::new(first.clone())];
        let mut second = service("b", "ClusterIP", "");
        assert_eq!(allocate(&networks(), &stored, &mut second, None), []);
        assert_eq!(second["spec"]["clusterIP"], "10.96.1.2");
        let mut third = service("c", "ClusterIP", "");
        assert_eq!(allocate(&networks(), &[Arc::new(second)], &mut third, None), []);
        assert_eq!(third["spec"]["clusterIP"], "10.96.1.1");
        let mut updated = service("a", "ClusterIP", "");
        assert_eq!(allocate(&networks(), &stored, &mut updated, Some(&first)), []);
        assert_eq!(updated["spec"]["clusterIP"], "10.96.1.1");
    }

    #[test]
    fn what_cannot_be_given_is_refused_as_upstream() {
        let stored = [Arc::new(service("a", "ClusterIP", "10.96.0.10"))];
        let mut taken = service("b", "ClusterIP", "10.96.0.10");
        let errors = allocate(&networks(), &stored, &mut taken, None);
        assert_eq!(
            errors[0].to_string(),
            "spec.clusterIPs: Invalid value: [\"10.96.0.10\"]: failed to allocate IP 10.96.0.10: provided IP is already allocated"
        );
        let mut foreign = service("b", "ClusterIP", "10.1.0.1");
        assert_eq!(allocate(&networks(), &[], &mut foreign, None).len(), 1);
        let mut headless = service("b", "ClusterIP", "None");
        assert_eq!(allocate(&networks(), &stored, &mut headless, None), []);
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    }

    #[test]
    fn node_ports() {
        let mut first = service("a", "NodePort", "");
        assert_eq!(allocate(&networks(), &[], &mut first, None), []);
        assert_eq!(first["spec"]["ports"][0]["nodePort"], 30086);
        let stored = [Arc::new(first.clone())];
        let mut same = service("b", "NodePort", "");
        same["spec"]["ports"][0]["nodePort"] = json!(30086);
        let errors = allocate(&networks(), &stored, &mut same, None);
        assert_eq!(
            errors[0].to_string(),
            "spec.ports[0].nodePort: Invalid value: 30086: provided port is already allocated"
        );
        let mut low = service("b", "NodePort", "");
        low["spec"]["ports"][0]["nodePort"] = json!(80);
        assert!(allocate(&networks(), &stored, &mut low, None)[0].detail.contains("30000-32767"));
        let mut back = service("a", "ClusterIP", "");
        back["spec"]["ports"][0]["nodePort"] = json!(30086);
        assert_eq!(allocate(&networks(), &stored, &mut back, Some(&first)), []);
        assert_eq!(back["spec"]["ports"][0].get("nodePort"), None);
    }
}
