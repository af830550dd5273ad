//! Addresses and networks in fields that existed before upstream became strict about them. Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::{
    admission::service::fields::parse_ip,
    schema::{FieldError, Path},
};

/// Upstream's `IsValidIPForLegacyField`: what the stored object has already may stay.
pub(super) fn ip(errors: &mut Vec<FieldError>, path: &Path, value: &str, stored: &[String]) {
    if let Some(why) = wrong_ip(value)
        && !stored.iter().any(|old| old == value)
    {
        errors.push(FieldError::invalid(path, &json!(value), why));
    }
}

/// What programs would read in more than one way is wrong too.
fn wrong_ip(value: &str) -> Option<&'static str> {
    match (parse_ip(value), value.parse()) {
        (None, _) => Some("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
        (Some(_), Err(_)) => Some("must not have leading 0s"),
        (_, Ok(IpAddr::V6(v6))) if v6.to_ipv4_mapped().is_some() => {
            Some("must not be an IPv4-mapped IPv6 address")
        }
        (_, Ok(_)) => None,
    }
}

/// Upstream's `IsValidIP`, of fields that are strict from the beginning.
pub(super) fn strict_ip(errors: &mut Vec<FieldError>, path: &Path, value: &str) {
    let canonical = parse_ip(value).map(|address| address.to_string());
    let why = match (wrong_ip(value), canonical) {
        (Some(why), _) => why.to_owned(),
        (None, Some(form)) if form != value => format!("must be in canonical form ({form:?})"),
        (None, _) => return,
    };
    errors.push(FieldError::invalid(path, &json!(value), why));
}

/// Upstream's `IsValidCIDRForLegacyField`.
pub(super) fn cidr(errors: &mut Vec<FieldError>, path: &Path, value: &str, stored: &[String]) {
    if let Some(why) = wrong_cidr(value)
        && !stored.iter().any(|old| old == value)
    {
        errors.push(FieldError::invalid(path, &json!(value), why));
    }
}

fn wrong_cidr(value: &str) -> Option<&'static str> {
    let parsed = || {
        let (address, prefix) = value.split_once('/')?;
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let length = digits.then(|| prefix.parse().ok()).flatten()?;
        Some((IpNet::new(parse_ip(address)?, length).ok()?, address, prefix))
    };
    let Some((network, address, prefix)) = parsed() else {
        return Some("must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
    };
    let zeros = prefix.len() > 1 && prefix.starts_with('0');
    match wrong_ip(address) {
        Some("must not have leading 0s") => Some("must not have leading 0s in IP or prefix length"),
        None if zeros => Some("must not have leading 0s in IP or prefix length"),
        Some(_) => Some("must not have an IPv4-mapped IPv6 address"),
        None if network.addr() != network.network() => {
            Some("must not have bits set beyond the prefix length")
        }
        None => None,
    }
}

/// Upstream's `ValidateEndpointIP`: an address that traffic may be sent to.
pub(super) fn endpoint_ip(errors: &mut Vec<FieldError>, path: &Path, value: &str) {
    let mut refuse = |why: String| errors.push(FieldError::invalid(path, &json!(value), why));
    let Some(address) = parse_ip(value) else {
        return refuse("must be a valid IP address".to_owned());
    };
    if address.is_unspecified() {
        refuse(format!("may not be unspecified ({value})"));
    }
    if address.is_loopback() {
        refuse("may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned());
    }
    let (link_local, multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets().starts_with(&[224, 0, 0])),
        IpAddr::V6(v6) => {
            (v6.segments()[0] & 0xffc0 == 0xfe80, v6.segments()[0] & 0xff0f == 0xff02)
        }
    };
    if link_local {
        refuse("may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned());
    }
    if multicast {
        let why = "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)";
        refuse(why.to_owned());
    }
}

/// Whether two addresses or networks are of one family each.
pub(super) fn is_dual(list: &[String]) -> bool {
    matches!(list, [a, b] if a.contains(':') != b.contains(':'))
}

/// The texts of a list.
pub(super) fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(ToOwned::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_addresses_are_told_what_is_wrong() {
        let said = |value: &str| {
            let mut errors = Vec::new();
            endpoint_ip(&mut errors, &Path::new("x"), value);
            errors.iter().map(|error| error.detail.clone()).collect::<Vec<_>>().join("; ")
        };
        let cases = [
            ("10.10.10.10", ""),
            ("::1", "may not be in the loopback range (127.0.0.0/8, ::1/128)"),
            ("0.0.0.0", "may not be unspecified (0.0.0.0)"),
            ("169.254.0.1", "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
            ("fe80::1", "may not be in the link-local range (169.254.0.0/16, fe80::/10)"),
            ("224.0.0.9", "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"),
            ("224.0.1.9", ""),
            ("x", "must be a valid IP address"),
        ];
        for (value, want) in cases {
            assert_eq!(said(value), want, "{value}");
        }
    }

    #[test]
    fn networks_need_an_address_and_a_length() {
        for right in ["10.0.0.0/8", "10.0.0.1/32", "fd00::/64", "fd00:0::/64"] {
            assert_eq!(wrong_cidr(right), None, "{right}");
        }
        for wrong in ["10.0.0.0", "10.0.0.0/33", "fd00::/129", "/8", "10.0.0.0/", "10.0.0.0/+8"] {
            let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            assert_eq!(wrong_cidr(wrong), Some(why), "{wrong}");
        }
        for (wrong, why) in [
            ("010.0.0.0/8", "must not have leading 0s in IP or prefix length"),
            ("10.0.0.0/08", "must not have leading 0s in IP or prefix length"),
            ("::ffff:10.0.0.0/104", "must not have an IPv4-mapped IPv6 address"),
            ("10.0.0.1/8", "must not have bits set beyond the prefix length"),
        ] {
            assert_eq!(wrong_cidr(wrong), Some(why), "{wrong}");
        }
    }

    #[test]
    fn an_address_that_is_stored_may_stay() {
        let said = |value: &str, stored: &[String]| {
            let mut errors = Vec::new();
            ip(&mut errors, &Path::new("x"), value, stored);
            cidr(&mut errors, &Path::new("y"), &format!("{value}/8"), stored);
            errors.len()
        };
        assert_eq!(said("010.1.1.1", &[]), 2);
        assert_eq!(said("010.1.1.1", &["010.1.1.1".to_owned()]), 1);
        assert_eq!(said("010.1.1.1", &["010.1.1.1".to_owned(), "010.1.1.1/8".to_owned()]), 0);
    }

    #[test]
    fn a_strict_address_is_canonical() {
        let said = |value: &str| {
            let mut errors = Vec::new();
            strict_ip(&mut errors, &Path::new("x"), value);
            errors.iter().map(|error| error.detail.clone()).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(said("fd00::1"), "");
        assert_eq!(said("fd00:0::1"), "must be in canonical form (\"fd00::1\")");
        assert_eq!(said("::ffff:1.2.3.4"), "must not be an IPv4-mapped IPv6 address");
        assert_eq!(said("01.2.3.4"), "must not have leading 0s");
    }
}
