//! `ipFamilyPolicy` and `ipFamilies` of a Service: what is said, and what follows from it. Pure.
//!
//! Follows upstream's `initIPFamilyFields` (`pkg/registry/core/service/storage/alloc.go`).

use serde_json::{Value, json};

use super::{
    Family, Networks, Refusal,
    fields::{
        cluster_ip, families, family_named, has_selector, ips, kind, needs_cluster_ip, parse_ip,
        policy, set_families, set_list,
    },
};
use crate::{
    admission::validate,
    schema::{FieldError, Path},
};

const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";

/// Sets policy and families of every Service but an ExternalName.
pub(super) fn init(
    networks: &Networks,
    service: &mut Value,
    old: Option<&Value>,
) -> Result<(), Refusal> {
    if !needs_cluster_ip(service) || is_settled(service, old) {
        return Ok(());
    }
    let bare_headless = cluster_ip(service) == "None" && !has_selector(service);
    if policy(service).is_empty() {
        let before = old.map(policy).filter(|policy| !policy.is_empty());
        let default = if bare_headless { REQUIRE } else { SINGLE };
        service["spec"]["ipFamilyPolicy"] = json!(before.unwrap_or(default));
    }
    refuse(validate::service_addresses(service, old))?;
    let mut errors = Vec::new();
    if let Some(old) = old {
        reduce(&mut errors, service, old);
    }
    single(&mut errors, service);
    infer(networks, &mut errors, service);
    refuse(errors)?;
    if bare_headless {
        headless(networks, service);
        return Ok(());
    }
    refuse(configured(networks, service))?;
    let mut all: Vec<Family> = families(service).iter().filter_map(|f| family_named(f)).collect();
    if all.is_empty() {
        all.push(networks.default_family());
    }
    if policy(service) != SINGLE
        && networks.is_dual()
        && let [one] = all[..]
    {
        all.push(one.other());
    }
    set_families(service, &all);
    Ok(())
}

fn refuse(errors: Vec<FieldError>) -> Result<(), Refusal> {
    if errors.is_empty() { Ok(()) } else { Err(Refusal::Fields(errors)) }
}

/// A `PreferDualStack` Service that stays as it is: it gains or loses no address when the cluster's ranges changed
/// meanwhile.
pub(super) fn is_settled(service: &Value, old: Option<&Value>) -> bool {
    let Some(old) = old else { return false };
    let prefers = |service: &Value| policy(service) == PREFER;
    kind(service) == kind(old)
        && matches!(kind(service), "ClusterIP" | "NodePort" | "LoadBalancer")
        && prefers(service)
        && (policy(old).is_empty() || prefers(old))
        && ips(service) == ips(old)
        && families(service) == families(old)
}

/// Going back to one family: asked for by the policy alone, or refused.
fn reduce(errors: &mut Vec<FieldError>, service: &mut Value, old: &Value) {
    let (new_ips, new_families) = (ips(service), families(service));
    if policy(service) == SINGLE {
        if new_ips == ips(old) && new_ips.len() > 1 {
            set_list(service, "clusterIPs", &new_ips[..1]);
        }
        if new_families == families(old) && new_families.len() > 1 {
            set_list(service, "ipFamilies", &new_families[..1]);
        }
        return;
    }
    let fewer = |new: &[String], old: &[String]| !new.is_empty() && new.len() < old.len();
    for (reduced, what) in [
        (fewer(&new_ips, &ips(old)), "cluster IP"),
        (fewer(&new_families, &families(old)), "IP family"),
    ] {
        if reduced {
            let why = format!("must be 'SingleStack' to release the secondary {what}");
            errors.push(policy_error(service, why));
        }
    }
}

fn single(errors: &mut Vec<FieldError>, service: &Value) {
    if policy(service) != SINGLE {
        return;
    }
    for (count, what) in
        [(ips(service).len(), "cluster IPs"), (families(service).len(), "IP families")]
    {
        if count == 2 {
            let why = format!(
                "must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"
            );
            errors.push(policy_error(service, why));
        }
    }
}

fn policy_error(service: &Value, why: impl Into<String>) -> FieldError {
    FieldError::invalid(&Path::new("spec.ipFamilyPolicy"), &json!(policy(service)), why)
}

/// Families of addresses that were asked for by number.
fn infer(networks: &Networks, errors: &mut Vec<FieldError>, service: &mut Value) {
    let (asked, mut named) = (ips(service), families(service));
    for (index, ip) in asked.iter().enumerate() {
        if ip == "None" {
            break;
        }
        let Some(family) = parse_ip(ip).map(|address| Family::of(&address)) else { continue };
        if index < named.len() {
            continue;
        }
        if networks.has(family) {
            named.push(family.name().to_owned());
        } else {
            errors.push(FieldError::invalid(
                &Path::new("spec.clusterIPs").index(index),
                &json!(asked),
                format!("{} is not configured on this cluster", family.name()),
            ));
        }
    }
    set_list(service, "ipFamilies", &named);
}

/// Headless without selector: its endpoints are the user's own, so it may have families that the cluster has not.
fn headless(networks: &Networks, service: &mut Value) {
    let mut all: Vec<Family> = families(service).iter().filter_map(|f| family_named(f)).collect();
    if all.is_empty() {
        all.push(networks.default_family());
    }
    if policy(service) != SINGLE
        && let [one] = all[..]
    {
        all.push(one.other());
    }
    set_families(service, &all);
}

fn configured(networks: &Networks, service: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if policy(service) == REQUIRE && !networks.is_dual() {
        let why = "this cluster is not configured for dual-stack services";
        errors.push(policy_error(service, why));
    }
    for (index, name) in families(service).iter().enumerate() {
        if !family_named(name).is_some_and(|family| networks.has(family)) {
            let path = Path::new("spec.ipFamilies").index(index);
            errors.push(FieldError::invalid(&path, &json!(name), "not configured on this cluster"));
        }
    }
    errors
}
