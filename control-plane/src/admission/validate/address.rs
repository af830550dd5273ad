//! Addresses and networks in fields that existed before upstream became strict about them. Pure.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::{
    admission::service::fields::parse_ip,
    schema::{FieldError, Path},
};

/// Upstream's `IsValidIPForLegacyField`: what the stored object has already may stay.
pub(super) fn ip(errors: &mut Vec<FieldError>, path: &Path, value: &str, stored: &[String]) {
    if parse_ip(value).is_none() && !stored.iter().any(|old| old == value) {
        let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
        errors.push(FieldError::invalid(path, &json!(value), why));
    }
}

/// Upstream's `IsValidCIDRForLegacyField`.
pub(super) fn cidr(errors: &mut Vec<FieldError>, path: &Path, value: &str, stored: &[String]) {
    if !is_cidr(value) && !stored.iter().any(|old| old == value) {
        let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
        errors.push(FieldError::invalid(path, &json!(value), why));
    }
}

pub(super) fn is_cidr(value: &str) -> bool {
    let parsed = || {
        let (address, prefix) = value.split_once('/')?;
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let limit = if parse_ip(address)?.is_ipv4() { 32 } else { 128 };
        (digits && prefix.parse::<u8>().ok()? <= limit).then_some(())
    };
    parsed().is_some()
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
        for right in ["10.0.0.0/8", "10.0.0.1/32", "fd00::/64", "010.0.0.0/8"] {
            assert!(is_cidr(right), "{right}");
        }
        for wrong in ["10.0.0.0", "10.0.0.0/33", "fd00::/129", "/8", "10.0.0.0/", "10.0.0.0/+8"] {
            assert!(!is_cidr(wrong), "{wrong}");
        }
    }
}
