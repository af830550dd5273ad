//! Addresses and families of a Service, and what of it an update may change. Pure.
//!
//! Follows upstream's `ValidateServiceClusterIPsRelatedFields`, `validateUpgradeDowngradeClusterIPs` and
//! `validateUpgradeDowngradeIPFamilies`.

use std::cmp::Ordering;

use serde_json::{Value, json};

use super::{address, service::balancer};
use crate::{
    admission::service::fields::{
        cluster_ip, families, health_number, ips, is_headless, kind, needs_cluster_ip,
        needs_health_port, parse_ip, policy,
    },
    schema::{FieldError, Path},
};

/// What an update may not change.
pub(super) fn service(service: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if needs_cluster_ip(service) && needs_cluster_ip(old) {
        cluster_ips(&mut errors, service, old);
        ip_families(&mut errors, service, old);
    }
    balancer(&mut errors, service, Some(old));
    if needs_health_port(old)
        && needs_health_port(service)
        && health_number(old) != health_number(service)
    {
        let path = Path::new("spec.healthCheckNodePort");
        errors.push(FieldError::forbidden(&path, "field is immutable"));
    }
    errors
}

const FIXED: &str = "may not change once set";

fn releases(service: &Value, what: &str) -> FieldError {
    let why = format!("must be set to 'SingleStack' when releasing the secondary {what}");
    FieldError::invalid(&Path::new("spec.ipFamilyPolicy"), &json!(policy(service)), why)
}

fn cluster_ips(errors: &mut Vec<FieldError>, service: &Value, old: &Value) {
    if is_headless(old) && is_headless(service) {
        return;
    }
    let (before, now) = (ips(old), ips(service));
    let path = Path::new("spec.clusterIPs");
    let mut refuse = |index: usize, why: &str| {
        errors.push(FieldError::invalid(&path.index(index), &json!(now), why));
    };
    match before.len().cmp(&now.len()) {
        Ordering::Equal => {
            for (index, _) in before.iter().zip(&now).enumerate().filter(|(_, (a, b))| a != b) {
                refuse(index, FIXED);
            }
        }
        Ordering::Greater => {
            if now.is_empty() {
                refuse(0, "primary clusterIP can not be unset");
            } else if now[0] != before[0] {
                refuse(0, FIXED);
            }
            if now.len() == 1 && policy(service) != "SingleStack" {
                errors.push(releases(service, "clusterIP"));
            }
        }
        Ordering::Less => {
            if before.first().is_some_and(|first| now[0] != *first) {
                refuse(0, FIXED);
            }
        }
    }
}

fn ip_families(errors: &mut Vec<FieldError>, service: &Value, old: &Value) {
    if is_headless(old) || is_headless(service) {
        return;
    }
    let (before, now) = (families(old), families(service));
    let path = Path::new("spec.ipFamilies").index(0);
    let (shown, addresses) = (json!(now), json!(ips(service)));
    match before.len().cmp(&now.len()) {
        Ordering::Equal => {
            for _ in before.iter().zip(&now).filter(|(a, b)| a != b) {
                errors.push(FieldError::invalid(&path, &shown, FIXED));
            }
        }
        Ordering::Greater => {
            if ips(service).is_empty() {
                let why = "primary ipFamily can not be unset";
                errors.push(FieldError::invalid(&path, &shown, why));
            }
            // Upstream shows the addresses here.
            if now.first().is_some_and(|first| *first != before[0]) {
                errors.push(FieldError::invalid(&path, &addresses, FIXED));
            }
            if now.len() == 1 && policy(service) != "SingleStack" {
                errors.push(releases(service, "ipFamily"));
            }
        }
        Ordering::Less => {
            if before.first().is_some_and(|first| *first != now[0]) {
                errors.push(FieldError::invalid(&path, &addresses, FIXED));
            }
        }
    }
}

/// Whether `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy` fit each other.
pub(in crate::admission) fn addresses(service: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if kind(service) == "ExternalName" {
        return errors;
    }
    let path = Path::new("spec.clusterIPs");
    let (single, all) = (cluster_ip(service), ips(service));
    if single.is_empty() && !all.is_empty() {
        let why = "must be empty when `clusterIP` is not specified";
        errors.push(FieldError::invalid(&path, &json!(all), why));
    } else if !single.is_empty() && all.is_empty() {
        errors.push(FieldError::required(&path, ""));
    } else if all.first().is_some_and(|first| first != single) {
        let why = "first value must match `clusterIP`";
        errors.push(FieldError::invalid(&path, &json!(all), why));
    }
    names(&mut errors, service);
    let before = errors.len();
    let stored = old.map_or_else(Vec::new, ips);
    for (index, ip) in all.iter().enumerate() {
        if index > 0 || ip != "None" {
            address::ip(&mut errors, &path.index(index), ip, &stored);
        } else if all.len() > 1 {
            let why = "'None' must be the first and only value";
            errors.push(FieldError::invalid(&path, &json!(all), why));
        }
    }
    // What follows would only say again that an address is none.
    let is_wrong = errors.len() > before;
    if all.len() > 2 {
        errors.push(FieldError::invalid(&path, &json!(all), "may only hold up to 2 values"));
    }
    if is_wrong {
        return errors;
    }
    let is_v6 = |ip: &String| parse_ip(ip).is_some_and(|address| address.is_ipv6());
    let six = all.iter().filter(|ip| is_v6(ip)).count();
    if all.len() > 1 && (six == 0 || six == all.len()) {
        let why = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(&path, &json!(all), why));
    }
    if !is_headless(service) {
        for (index, (ip, family)) in all.iter().zip(families(service)).enumerate() {
            if (family == "IPv4" && is_v6(ip)) || (family == "IPv6" && !is_v6(ip)) {
                let why =
                    format!("expected an {family} value as indicated by `ipFamilies[{index}]`");
                errors.push(FieldError::invalid(&path.index(index), &json!(ip), why));
            }
        }
    }
    errors
}

/// Families and policy by themselves.
fn names(errors: &mut Vec<FieldError>, service: &Value) {
    let path = Path::new("spec.ipFamilies");
    let all = families(service);
    for (index, family) in all.iter().enumerate() {
        let path = path.index(index);
        if family != "IPv4" && family != "IPv6" {
            errors.push(FieldError::not_supported(&path, &json!(family), &["IPv4", "IPv6"]));
        }
        if all[..index].contains(family) {
            errors.push(FieldError::duplicate(&path, &json!(family)));
        }
    }
    let policies = ["PreferDualStack", "RequireDualStack", "SingleStack"];
    let given = &service["spec"]["ipFamilyPolicy"];
    if !given.is_null() && !policies.iter().any(|policy| given == *policy) {
        let path = Path::new("spec.ipFamilyPolicy");
        errors.push(FieldError::not_supported(&path, given, &policies));
    }
}
