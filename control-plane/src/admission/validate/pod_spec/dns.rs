//! How a pod resolves names. Pure.

use api::names;
use serde_json::{Value, json};

use super::{address, invalid, list};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// What libc reads of `resolv.conf` (upstream's limits).
const NAMESERVERS: usize = 3;
const SEARCHES: usize = 32;
const SEARCH_BYTES: usize = 2048;
/// What the kernel keeps as a host's name (`HOST_NAME_MAX`).
const HOST_NAME: usize = 64;

/// Upstream's `validatePodDNSConfig`.
pub(super) fn config(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let config = &spec["dnsConfig"];
    let servers = address::texts(&config["nameservers"]);
    if spec["dnsPolicy"] == "None" && servers.is_empty() {
        let (path, what) = match config.is_object() {
            true => (path.child("nameservers"), "at least one DNS nameserver"),
            false => (path.clone(), "`dnsConfig`"),
        };
        let why = format!("must provide {what} when `dnsPolicy` is None");
        return errors.push(FieldError::required(&path, why));
    }
    let mut too_many = |field: &str, bound: usize, of: &str| {
        let why = format!("must not have more than {bound} {of}");
        errors.push(FieldError::invalid(&path.child(field), &config[field], why));
    };
    let searches = address::texts(&config["searches"]);
    if servers.len() > NAMESERVERS {
        too_many("nameservers", NAMESERVERS, "nameservers");
    }
    if searches.len() > SEARCHES {
        too_many("searches", SEARCHES, "search paths");
    }
    if searches.join(" ").len() > SEARCH_BYTES {
        too_many("searches", SEARCH_BYTES, "characters (including spaces) in the search list");
    }
    for (index, server) in servers.iter().enumerate() {
        address::ip(errors, &path.child("nameservers").index(index), server, &[]);
    }
    for (index, search) in searches.iter().enumerate().filter(|(_, search)| *search != ".") {
        let search = search.strip_suffix('.').unwrap_or(search);
        let reasons = names::dns1123_subdomain_with_underscore(search);
        invalid(errors, &path.child("searches").index(index), &json!(search), reasons);
    }
    for (index, option) in list(config, "options") {
        if text(option, "/name").is_empty() {
            let path = path.child("options").index(index);
            errors.push(FieldError::required(&path, "must not be empty"));
        }
    }
}

/// Upstream's `validatePodHostName`: a name that stands for all others.
pub(super) fn host_name(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let Some(name) = spec["hostnameOverride"].as_str() else { return };
    for field in ["setHostnameAsFQDN", "hostNetwork"] {
        if spec[field] == true {
            let why = format!("may not be specified when {field} is true");
            errors.push(FieldError::forbidden(path, why));
        }
    }
    if name.len() > HOST_NAME {
        errors.push(FieldError::too_long(path, HOST_NAME));
    }
    invalid(errors, path, &json!(name), names::dns1123_subdomain(name));
}

pub(super) fn host_aliases(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for (index, alias) in list(spec, "hostAliases") {
        let path = path.index(index);
        address::ip(errors, &path.child("ip"), text(alias, "/ip"), &[]);
        for (index, hostname) in list(alias, "hostnames") {
            let reasons = names::dns1123_subdomain(hostname.as_str().unwrap_or(""));
            invalid(errors, &path.child("hostnames").index(index), hostname, reasons);
        }
    }
}
