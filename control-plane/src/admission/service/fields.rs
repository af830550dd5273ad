//! Reading and writing the fields of a Service that belong together. Pure.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use super::Family;
use crate::api::prepare::text;

/// `spec.type`.
pub(crate) fn kind(service: &Value) -> &str {
    text(service, "/spec/type")
}

pub(crate) fn cluster_ip(service: &Value) -> &str {
    text(service, "/spec/clusterIP")
}

/// `spec.clusterIPs`.
pub(crate) fn ips(service: &Value) -> Vec<String> {
    strings(&service["spec"]["clusterIPs"])
}

/// `spec.ipFamilies` as they are written.
pub(crate) fn families(service: &Value) -> Vec<String> {
    strings(&service["spec"]["ipFamilies"])
}

/// Empty where it is not set.
pub(crate) fn policy(service: &Value) -> &str {
    text(service, "/spec/ipFamilyPolicy")
}

fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(ToOwned::to_owned).collect()
}

/// Sets a list of texts, or removes the field for an empty one.
pub(super) fn set_list(service: &mut Value, field: &str, list: &[String]) {
    if list.is_empty() {
        remove(service, field);
    } else {
        service["spec"][field] = json!(list);
    }
}

pub(super) fn set_families(service: &mut Value, families: &[Family]) {
    let names: Vec<String> = families.iter().map(|family| family.name().to_owned()).collect();
    set_list(service, "ipFamilies", &names);
}

pub(super) fn remove(service: &mut Value, field: &str) {
    if let Some(spec) = service.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove(field);
    }
}

/// The family of `spec.ipFamilies[index]`; `None` also for a name that is none.
pub(super) fn family_named(name: &str) -> Option<Family> {
    [Family::V4, Family::V6].into_iter().find(|family| family.name() == name)
}

pub(crate) fn is_headless(service: &Value) -> bool {
    ips(service) == ["None"]
}

pub(super) fn has_selector(service: &Value) -> bool {
    service["spec"]["selector"].as_object().is_some_and(|selector| !selector.is_empty())
}

pub(crate) fn needs_cluster_ip(service: &Value) -> bool {
    kind(service) != "ExternalName"
}

pub(crate) fn needs_node_port(service: &Value) -> bool {
    matches!(kind(service), "NodePort" | "LoadBalancer")
}

pub(crate) fn needs_health_port(service: &Value) -> bool {
    kind(service) == "LoadBalancer" && service["spec"]["externalTrafficPolicy"] == "Local"
}

/// Whether clients outside may reach it: by node port, balancer or external address.
pub(crate) fn is_externally_accessible(service: &Value) -> bool {
    let listed = service["spec"]["externalIPs"].as_array().is_some_and(|list| !list.is_empty());
    needs_node_port(service) || (kind(service) == "ClusterIP" && listed)
}

/// The number of a port's `nodePort`, 0 for none.
pub(crate) fn node_port(port: &Value) -> i64 {
    port["nodePort"].as_i64().unwrap_or(0)
}

/// The node ports that a Service holds.
pub(super) fn node_ports(service: &Value) -> impl Iterator<Item = u16> + use<'_> {
    let ports = service["spec"]["ports"].as_array().into_iter().flatten();
    ports.filter_map(|port| u16::try_from(node_port(port)).ok()).filter(|port| *port > 0)
}

/// `spec.healthCheckNodePort`, 0 for none.
pub(crate) fn health_number(service: &Value) -> i64 {
    service["spec"]["healthCheckNodePort"].as_i64().unwrap_or(0)
}

pub(super) fn health_port(service: &Value) -> Option<u16> {
    u16::try_from(health_number(service)).ok().filter(|port| *port > 0)
}

/// An address as upstream's API reads it: IPv4 octets may have leading zeros and are decimal all the same.
pub(crate) fn parse_ip(value: &str) -> Option<IpAddr> {
    if let Ok(address) = value.parse() {
        return Some(address);
    }
    let mut octets = [0_u8; 4];
    let mut parts = value.split('.');
    for octet in &mut octets {
        let part = parts.next().filter(|part| part.len() <= 3)?;
        let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        *octet = digits.then(|| part.parse().ok()).flatten()?;
    }
    parts.next().is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_leading_zeros_are_decimal() {
        let read = |text| parse_ip(text).map(|address| address.to_string());
        assert_eq!(read("10.010.0.08").as_deref(), Some("10.10.0.8"));
        assert_eq!(read("fd00::01").as_deref(), Some("fd00::1"));
        for wrong in
            ["", "10.0.0", "10.0.0.0.1", "10.0.0.256", "10.0.0.x", "10.0.0.0001", "+1.2.3.4"]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
