//! Cluster addresses of a Service. Pure.
//!
//! Follows upstream's `allocClusterIPs` and `updateClusterIPs` (`pkg/registry/core/service/storage/alloc.go`).
//! Nothing is released by hand: what no stored Service names is free.

use serde_json::{Value, json};

use super::{
    Networks, Refusal, Taken,
    families::is_settled,
    fields::{families, family_named, ips, kind, needs_cluster_ip, parse_ip, set_list},
    networks::{Family, free},
};
use crate::schema::{FieldError, Path};

/// Gives every family of the Service an address, where the write asks for new ones.
pub(super) fn assign(
    networks: &Networks,
    taken: &Taken<'_>,
    service: &mut Value,
    old: Option<&Value>,
) -> Result<(), Refusal> {
    if !needs_cluster_ip(service) || is_settled(service, old) {
        return Ok(());
    }
    let from = match old {
        // New, or given its first addresses.
        None => 0,
        Some(old) if kind(old) == "ExternalName" => 0,
        // A headless Service stays one.
        Some(old) if ips(old).first().is_some_and(|ip| ip == "None") => return Ok(()),
        // Upgraded by one family.
        Some(old) if families(old).len() == 1 && families(service).len() == 2 => 1,
        Some(_) => return Ok(()),
    };
    if ips(service).first().is_some_and(|ip| ip == "None") {
        return Ok(());
    }
    let mut all = ips(service);
    let asked = all.clone();
    for (index, name) in families(service).iter().enumerate().skip(from) {
        let Some(family) = family_named(name) else { continue };
        if let Some(ip) = asked.get(index) {
            take(networks, taken, (family, ip, &asked))?;
        } else {
            let range = networks.range(family);
            let address = range.and_then(|range| free(range, taken)).ok_or_else(|| {
                Refusal::Internal("failed to allocate a serviceIP: range is full".to_owned())
            })?;
            all.push(address.to_string());
        }
    }
    if from == 0
        && let Some(first) = all.first()
    {
        service["spec"]["clusterIP"] = json!(first);
    }
    set_list(service, "clusterIPs", &all);
    Ok(())
}

/// Takes an address that was asked for by number.
fn take(
    networks: &Networks,
    taken: &Taken<'_>,
    (family, ip, asked): (Family, &str, &[String]),
) -> Result<(), Refusal> {
    let refused = |why: &str| {
        let path = Path::new("spec.clusterIPs");
        FieldError::invalid(&path, &json!(asked), format!("failed to allocate IP {ip}: {why}"))
    };
    let foreign = || refused("the provided network does not match the current range");
    let address = parse_ip(ip).ok_or_else(foreign)?;
    let range = networks.range(family).ok_or_else(foreign)?;
    let given = range.contains(&address)
        && address != range.network()
        && (address.is_ipv6() || address != range.broadcast());
    if !given {
        return Err(foreign().into());
    }
    if taken.has_address(address) {
        return Err(refused("provided IP is already allocated").into());
    }
    Ok(())
}
