//! What a runtime may wish for beside the configuration: `CNI_ARGS` and capabilities, handed back,
//! left alone or refused by name.
//!
//! Pure.

use serde_json::{Map, Value, json};

use super::wire::{CniError, Code, Command};
use crate::model::{HostPort, Protocol};

/// `CNI_ARGS` that ask for what we do not give: the conventions' way to choose addresses. Others are
/// the runtime's own words, such as the pod's name.
pub(super) fn check_arguments(command: Command, args: &str) -> Result<(), CniError> {
    let asked = |name: &&str| pairs(args).any(|(key, value)| key == *name && !value.is_empty());
    match ["IP", "MAC", "GATEWAY"].into_iter().find(asked) {
        Some(name) if command == Command::Add => {
            let error = CniError::new(Code::UnsupportedField, "unsupported CNI_ARGS");
            Err(error.with_details(format!("{name}: orlop chooses addresses itself")))
        }
        _ => Ok(()),
    }
}

pub(super) fn pairs(args: &str) -> impl Iterator<Item = (&str, &str)> {
    args.split(';').filter_map(|pair| pair.split_once('='))
}

/// Capabilities that we have: `dns`, which is handed back, and `portMappings`. Of the others a runtime may
/// tell without a change of the network.
const KNOWN_CAPABILITIES: [&str; 6] = [
    "aliases",
    "cgroupPath",
    "dns",
    "io.kubernetes.cri.pod-annotations",
    "podAnnotations",
    "portMappings",
];

/// The ports of the node that a runtime wants for a pod (`runtimeConfig.portMappings`).
///
/// # Errors
/// What is wrong with one.
pub(super) fn runtime_ports(config: &Map<String, Value>) -> Result<Vec<HostPort>, CniError> {
    let list = config.get("runtimeConfig").and_then(|wanted| wanted.get("portMappings"));
    let Some(list) = list else { return Ok(Vec::new()) };
    let ports = host_ports(list).map_err(|entry| {
        let error = CniError::new(Code::InvalidConfig, "unusable port mapping");
        error.with_details(format!("runtimeConfig.portMappings: {entry}"))
    })?;
    let changed =
        |port: &&HostPort| port.protocol == Protocol::Sctp && port.host_port != port.container_port;
    if let Some(port) = ports.iter().find(changed) {
        let text = "SCTP keeps its port: hostPort and containerPort must be the same";
        let error = CniError::new(Code::UnsupportedField, text);
        return Err(error.with_details(format!("hostPort {port}")));
    }
    Ok(ports)
}

/// Reads port mappings; entries without a port of the node want nothing.
///
/// # Errors
/// The entry that is none.
pub(super) fn host_ports(list: &Value) -> Result<Vec<HostPort>, Value> {
    let entries = list.as_array().into_iter().flatten();
    let wanted = entries.filter(|entry| field(entry, "hostPort").as_u64() != Some(0));
    wanted.map(|entry| host_port(entry).ok_or_else(|| entry.clone())).collect()
}

fn host_port(entry: &Value) -> Option<HostPort> {
    let port = |name: &str| {
        let number = u16::try_from(field(entry, name).as_u64()?).ok()?;
        (number != 0).then_some(number)
    };
    let protocol = field(entry, "protocol").as_str().unwrap_or("tcp").to_lowercase();
    let protocol = match protocol.as_str() {
        "tcp" | "" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    let host_ip = match field(entry, "hostIP").as_str().unwrap_or_default() {
        "" => None,
        text => Some(text.parse::<std::net::IpAddr>().ok()?),
    };
    Some(HostPort {
        host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
        host_port: port("hostPort")?,
        protocol,
        container_port: port("containerPort")?,
    })
}

/// A value by the conventions' name of its key. containerd writes the names of Go's fields (`HostPort`
/// for `hostPort`), which readers in Go take for the same.
/// <https://github.com/containerd/go-cni/blob/main/types.go>
fn field<'a>(object: &'a Value, name: &str) -> &'a Value {
    let mut entries = object.as_object().into_iter().flatten();
    let found = entries.find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map_or(&Value::Null, |(_, value)| value)
}

/// Port mappings as runtimes write them.
pub(crate) fn mappings(ports: &[HostPort]) -> Value {
    let mapping = |port: &HostPort| {
        json!({
            "hostPort": port.host_port,
            "containerPort": port.container_port,
            "protocol": port.protocol.name().to_lowercase(),
            "hostIP": port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        })
    };
    ports.iter().map(mapping).collect()
}

/// `runtimeConfig.dns` under the names that results have for it.
pub(super) fn runtime_dns(config: &Map<String, Value>) -> Option<Value> {
    let wanted = config.get("runtimeConfig")?.get("dns").filter(|dns| !dns.is_null())?;
    let names = [
        ("servers", "nameservers"),
        ("nameservers", "nameservers"),
        ("domain", "domain"),
        ("searches", "search"),
        ("search", "search"),
        ("options", "options"),
    ];
    let known = names.map(|(asked, told)| (told.to_owned(), field(wanted, asked).clone()));
    Some(known.into_iter().filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>().into())
}

/// Refuses what the runtime wants of a capability that we do not have; wanting nothing is well.
pub(super) fn check_capabilities(config: &Map<String, Value>) -> Result<(), CniError> {
    let Some(wanted) = config.get("runtimeConfig").and_then(Value::as_object) else {
        return Ok(());
    };
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    let foreign = wanted
        .iter()
        .find(|(name, value)| !KNOWN_CAPABILITIES.contains(&name.as_str()) && !empty(value));
    match foreign {
        Some((name, value)) => {
            let error = CniError::new(
                Code::UnsupportedField,
                "a capability that orlop does not have; a plugin chained behind it may",
            );
            Err(error.with_details(format!("runtimeConfig.{name}: {value}")))
        }
        None => Ok(()),
    }
}
