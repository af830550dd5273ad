//! What a runtime may wish for beside the configuration: `CNI_ARGS` and capabilities, handed back,
//! left alone or refused by name.
//!
//! Pure.

use serde_json::{Map, Value};

use super::wire::{CniError, Code, Command};

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

/// Capabilities of which a runtime may tell without a change of the network: names, and `dns`, which
/// is handed back.
const KNOWN_CAPABILITIES: [&str; 5] =
    ["aliases", "cgroupPath", "dns", "io.kubernetes.cri.pod-annotations", "podAnnotations"];

pub(super) fn runtime_dns(config: &Map<String, Value>) -> Option<&Value> {
    config.get("runtimeConfig")?.get("dns").filter(|dns| !dns.is_null())
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
