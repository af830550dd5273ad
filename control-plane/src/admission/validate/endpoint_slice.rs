//! EndpointSlices, and the Endpoints that are mirrored into them. Pure.
//!
//! Follows upstream's `pkg/apis/discovery/validation` and `ValidateEndpoints`.

use std::collections::BTreeSet;

use api::names;
use serde_json::{Value, json};

use super::{address, immutable, invalid, list, one_of};
use crate::{
    admission::service::fields::parse_ip,
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Upstream's bounds of one slice, of one endpoint, and of its hints of each kind.
const ENDPOINTS: usize = 1000;
const PORTS: usize = 20_000;
const ADDRESSES: usize = 100;
const HINTS: usize = 8;

pub(super) fn slice(slice: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let (path, family) = (Path::new("addressType"), &slice["addressType"]);
    one_of(&mut errors, &path, family, &["FQDN", "IPv4", "IPv6"]);
    let path = Path::new("endpoints");
    let count = list(slice, "endpoints").count();
    let before = errors.len();
    if count > ENDPOINTS {
        errors.push(FieldError::too_many(&path, count, ENDPOINTS));
    } else {
        let own = is_servers_own(slice);
        for (index, one) in list(slice, "endpoints") {
            let family = family.as_str().unwrap_or("");
            endpoint(&mut errors, &path.index(index), one, (family, own));
        }
    }
    // Upstream was less strict once.
    if old.is_some_and(|old| old["endpoints"] == slice["endpoints"]) {
        errors.truncate(before);
    }
    let path = Path::new("ports");
    let count = list(slice, "ports").count();
    if count > PORTS {
        errors.push(FieldError::too_many(&path, count, PORTS));
    } else {
        let mut names = BTreeSet::new();
        for (index, one) in list(slice, "ports") {
            let path = path.index(index);
            port(&mut errors, &path, one);
            if !names.insert(text(one, "/name")) {
                errors.push(FieldError::duplicate(&path.child("name"), &one["name"]));
            }
        }
    }
    if let Some(old) = old {
        immutable(&mut errors, &Path::new("addressType"), family, &old["addressType"]);
    }
    errors
}

/// A server that listens on loopback only, for one machine's use, says so in the slice of its own Service.
fn is_servers_own(slice: &Value) -> bool {
    slice["metadata"]["namespace"] == "default" && slice["metadata"]["name"] == "kubernetes"
}

fn endpoint(
    errors: &mut Vec<FieldError>,
    path: &Path,
    endpoint: &Value,
    (family, own): (&str, bool),
) {
    let addresses = path.child("addresses");
    match list(endpoint, "addresses").count() {
        0 => errors.push(FieldError::required(&addresses, "must contain at least 1 address")),
        count if count > ADDRESSES => {
            errors.push(FieldError::too_many(&addresses, count, ADDRESSES));
        }
        _ => {}
    }
    for (index, value) in list(endpoint, "addresses") {
        let (path, said) = (addresses.index(index), value.as_str().unwrap_or(""));
        let before = errors.len();
        match family {
            "IPv4" => address::ip(errors, &path, said, &[]),
            "IPv6" => address::strict_ip(errors, &path, said),
            "FQDN" => {
                let name = said.strip_suffix('.').unwrap_or(said);
                invalid(errors, &path, value, names::dns1123_subdomain(name));
                if !name.contains('.') {
                    let why = "should be a domain with at least two segments separated by dots";
                    errors.push(FieldError::invalid(&path, value, why));
                }
                continue;
            }
            _ => continue,
        }
        if errors.len() > before {
            continue;
        }
        if parse_ip(said).is_some_and(|ip| ip.is_ipv4() != (family == "IPv4")) {
            // Upstream does not say which.
            let why = format!("must be an {family} address");
            errors.push(FieldError::invalid(&addresses, value, why));
        }
        if !own {
            address::endpoint_ip(errors, &path, said);
        }
    }
    if let Some(node) = endpoint["nodeName"].as_str() {
        let reasons = names::dns1123_subdomain(node);
        invalid(errors, &path.child("nodeName"), &endpoint["nodeName"], reasons);
    }
    if let Some(host) = endpoint["hostname"].as_str() {
        let reasons = names::dns1123_label(host);
        invalid(errors, &path.child("hostname"), &endpoint["hostname"], reasons);
    }
    let path = path.child("hints");
    hints(errors, &path.child("forZones"), &endpoint["hints"], "forZones", names::label_value);
    hints(
        errors,
        &path.child("forNodes"),
        &endpoint["hints"],
        "forNodes",
        names::dns1123_subdomain,
    );
}

fn hints(
    errors: &mut Vec<FieldError>,
    path: &Path,
    hints: &Value,
    field: &str,
    check: fn(&str) -> Vec<String>,
) {
    let count = list(hints, field).count();
    if count > HINTS {
        errors.push(FieldError::too_many(path, count, HINTS));
        return;
    }
    let mut seen = BTreeSet::new();
    for (index, hint) in list(hints, field) {
        let (path, name) = (path.index(index).child("name"), text(hint, "/name"));
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&path, &json!(name)));
        }
        invalid(errors, &path, &json!(name), check(name));
    }
}

fn port(errors: &mut Vec<FieldError>, path: &Path, port: &Value) {
    let name = text(port, "/name");
    if !name.is_empty() {
        invalid(errors, &path.child("name"), &json!(name), names::dns1123_label(name));
    }
    if let Some(number) = port["port"].as_i64() {
        invalid(errors, &path.child("port"), &port["port"], names::port_number(number));
    }
    one_of(errors, &path.child("protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
    if let Some(app) = port["appProtocol"].as_str() {
        let path = path.child("appProtocol");
        invalid(errors, &path, &port["appProtocol"], names::qualified_name(app));
    }
}

pub(super) fn endpoints(endpoints: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if old.is_some_and(|old| old["subsets"] == endpoints["subsets"]) {
        return errors;
    }
    for (index, subset) in list(endpoints, "subsets") {
        let path = Path::new("subsets").index(index);
        let lists = ["addresses", "notReadyAddresses"];
        if lists.iter().all(|field| list(subset, field).next().is_none()) {
            let why = "must specify `addresses` or `notReadyAddresses`";
            errors.push(FieldError::required(&path, why));
        }
        for field in lists {
            for (index, one) in list(subset, field) {
                let (path, ip) = (path.child(field).index(index), text(one, "/ip"));
                let before = errors.len();
                address::ip(&mut errors, &path.child("ip"), ip, &[]);
                if errors.len() == before {
                    address::endpoint_ip(&mut errors, &path.child("ip"), ip);
                }
                if let Some(node) = one["nodeName"].as_str() {
                    let reasons = names::dns1123_subdomain(node);
                    invalid(&mut errors, &path.child("nodeName"), &one["nodeName"], reasons);
                }
                let host = text(one, "/hostname");
                if !host.is_empty() {
                    let path = path.child("hostname");
                    invalid(&mut errors, &path, &json!(host), names::dns1123_label(host));
                }
            }
        }
        let several = list(subset, "ports").count() > 1;
        for (index, one) in list(subset, "ports") {
            let path = path.child("ports").index(index);
            if several && text(one, "/name").is_empty() {
                errors.push(FieldError::required(&path.child("name"), ""));
            }
            if one["port"].is_null() {
                let reasons = names::port_number(0);
                invalid(&mut errors, &path.child("port"), &json!(0), reasons);
            }
            port(&mut errors, &path, one);
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::field::aggregate;

    fn with(endpoint: &Value) -> Value {
        let mut one = json!({"addresses": ["10.1.2.3"], "hostname": "valid-123"});
        for (key, value) in endpoint.as_object().unwrap() {
            one[key] = value.clone();
        }
        json!({"addressType": "IPv4", "endpoints": [one],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80}]})
    }

    /// Names follow upstream's `TestValidateEndpointSlice`.
    #[test]
    #[expect(clippy::too_many_lines, reason = "one table")]
    fn validate_endpoint_slice() {
        let hints =
            |names: &[&str]| -> Value { names.iter().map(|n| json!({"name": n})).collect() };
        let nine: Vec<String> = (0..9).map(|n| format!("z{n}")).collect();
        let nine: Vec<&str> = nine.iter().map(String::as_str).collect();
        let path = "endpoints[0]";
        let cases = [
            ("good-slice", json!({}), String::new()),
            (
                "good-hints",
                json!({"hints": {"forZones": hints(&["a"]), "forNodes": hints(&["n-1"])}}),
                String::new(),
            ),
            (
                "empty-addresses",
                json!({"addresses": []}),
                format!("{path}.addresses: Required value: must contain at least 1 address"),
            ),
            (
                "bad-ip",
                json!({"addresses": ["123.456.789.012"]}),
                format!(
                    "{path}.addresses[0]: Invalid value: \"123.456.789.012\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
                ),
            ),
            (
                "bad-ipv4",
                json!({"addresses": ["2001:db8::1"]}),
                format!(
                    "{path}.addresses: Invalid value: \"2001:db8::1\": must be an IPv4 address"
                ),
            ),
            (
                "reserved-ip",
                json!({"addresses": ["127.0.0.1"]}),
                format!(
                    "{path}.addresses[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range (127.0.0.0/8, ::1/128)"
                ),
            ),
            (
                "bad-hostname",
                json!({"hostname": "--INVALID"}),
                format!(
                    "{path}.hostname: Invalid value: \"--INVALID\": a lowercase RFC 1123 label"
                ),
            ),
            (
                "duplicate-hints",
                json!({"hints": {"forZones": hints(&["a", "a"])}}),
                format!("{path}.hints.forZones[1].name: Duplicate value: \"a\""),
            ),
            (
                "too-many-hints",
                json!({"hints": {"forZones": hints(&nine)}}),
                format!("{path}.hints.forZones: Too many: 9: must have at most 8 items"),
            ),
            (
                "invalid node hint",
                json!({"hints": {"forNodes": hints(&["_"])}}),
                format!("{path}.hints.forNodes[0].name: Invalid value: \"_\""),
            ),
        ];
        for (name, endpoint, want) in cases {
            let errors = slice(&with(&endpoint), None);
            let said = if errors.is_empty() { String::new() } else { aggregate(&errors) };
            assert!(
                said.starts_with(&want) && said.is_empty() == want.is_empty(),
                "{name}: {said}"
            );
        }
        let bad = with(&json!({"addresses": ["010.1.1.1"]}));
        assert!(aggregate(&slice(&bad, None)).contains("must not have leading 0s"));
        assert_eq!(slice(&bad, Some(&bad)), []);
        let mut six = with(&json!({}));
        six["addressType"] = json!("IPv6");
        assert!(aggregate(&slice(&six, None)).contains(
            "endpoints[0].addresses: Invalid value: \"10.1.2.3\": must be an IPv6 address"
        ));
        assert!(
            aggregate(&slice(&six, Some(&with(&json!({})))))
                .contains("addressType: Invalid value: \"IPv6\": field is immutable")
        );
        let mut ports = with(&json!({}));
        ports["ports"] = json!([{"name": "", "protocol": "TCP"}, {"name": "", "protocol": "foo", "port": 65_536}]);
        assert_eq!(
            aggregate(&slice(&ports, None)),
            "[ports[1].port: Invalid value: 65536: must be between 1 and 65535, inclusive, ports[1].protocol: Unsupported value: \"foo\": supported values: \"SCTP\", \"TCP\", \"UDP\", ports[1].name: Duplicate value: \"\"]"
        );
    }

    #[test]
    fn validate_endpoints() {
        let said = |subset: Value| aggregate(&endpoints(&json!({"subsets": [subset]}), None));
        let right =
            json!({"addresses": [{"ip": "10.10.1.1"}], "ports": [{"port": 1, "protocol": "TCP"}]});
        assert_eq!(said(right), "[]");
        assert_eq!(
            said(json!({})),
            "subsets[0]: Required value: must specify `addresses` or `notReadyAddresses`"
        );
        let unnamed = json!({"addresses": [{"ip": "10.10.1.1"}], "ports": [{"port": 1, "protocol": "TCP"}, {"name": "b", "port": 2, "protocol": "TCP"}]});
        assert_eq!(said(unnamed), "subsets[0].ports[0].name: Required value");
        let bare = json!({"addresses": [{"ip": "10.10.1.1", "nodeName": "X_"}], "ports": [{"protocol": "TCP"}]});
        let bare = said(bare);
        assert!(bare.contains("subsets[0].addresses[0].nodeName: Invalid value: \"X_\""), "{bare}");
        assert!(bare.contains("subsets[0].ports[0].port: Invalid value: 0"), "{bare}");
        let wrong = json!({"addresses": [{"ip": "[2001:0db8]"}], "ports": []});
        assert!(said(wrong).starts_with(
            "subsets[0].addresses[0].ip: Invalid value: \"[2001:0db8]\": must be a valid IP address"
        ));
    }
}
