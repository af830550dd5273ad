//! Checks of names, labels and keys, with upstream's messages. Pure.
//!
//! Each check returns what is wrong; nothing wrong is an empty list.
//! Texts and rules: <https://github.com/kubernetes/apimachinery/tree/master/pkg/api/validate/content>.

const LABEL_FORM: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const SUBDOMAIN_FORM: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
const QUALIFIED_FORM: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";

/// A DNS label: at most 63 bytes of `a-z`, `0-9` and inner `-`.
pub fn dns1123_label(value: &str) -> Vec<String> {
    let mut wrong = too_long(value, 63, "characters");
    if !is_label(value) {
        if is_subdomain(value) {
            wrong.push("must not contain dots".into());
        } else {
            wrong.push(form_error(
                "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character",
                LABEL_FORM,
                &["my-name", "123-abc"],
            ));
        }
    }
    wrong
}

/// DNS labels joined by dots, at most 253 bytes.
pub fn dns1123_subdomain(value: &str) -> Vec<String> {
    subdomain(value, "characters")
}

fn subdomain(value: &str, unit: &str) -> Vec<String> {
    let mut wrong = too_long(value, 253, unit);
    if !is_subdomain(value) {
        wrong.push(form_error(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
            SUBDOMAIN_FORM,
            &["example.com"],
        ));
    }
    wrong
}

/// As [`dns1123_subdomain`], but labels may have underscores, as names of services in DNS do.
pub fn dns1123_subdomain_with_underscore(value: &str) -> Vec<String> {
    let mut wrong = too_long(value, 253, "characters");
    let is_form = |label: &str| {
        let label = label.strip_prefix('_').unwrap_or(label);
        let end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        label.starts_with(end)
            && label.ends_with(end)
            && label.bytes().all(|b| b"-_".contains(&b) || end(char::from(b)))
    };
    if !value.split('.').all(is_form) {
        wrong.push(form_error(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', and must start and end with an alphanumeric character",
            r"_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?(\._?[a-z0-9]([-_a-z0-9]*[a-z0-9])?)*",
            &["example.com"],
        ));
    }
    wrong
}

/// A name that has a place of its own in a path, which is all that upstream asks of an Event's.
pub fn path_segment(value: &str) -> Vec<String> {
    if matches!(value, "." | "..") {
        return vec![format!("may not be '{value}'")];
    }
    let signs = ["/", "%"].iter().filter(|sign| value.contains(**sign));
    signs.map(|sign| format!("may not contain '{sign}'")).collect()
}

/// A label or annotation key: a name of at most 63 bytes, optionally behind a DNS subdomain and `/`.
pub fn qualified_name(value: &str) -> Vec<String> {
    const WORDS: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
    const EXAMPLES: [&str; 3] = ["MyName", "my.name", "123-abc"];
    let mut wrong = Vec::new();
    let mut parts = value.split('/');
    let (first, second, third) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let name = match (second, third) {
        (None, _) => first,
        (Some(name), None) => {
            if first.is_empty() {
                wrong.push("prefix part must be non-empty".to_owned());
            } else {
                let said = subdomain(first, "bytes");
                wrong.extend(said.into_iter().map(|text| format!("prefix part {text}")));
            }
            name
        }
        (Some(_), Some(_)) => {
            let text = form_error(WORDS, QUALIFIED_FORM, &EXAMPLES);
            return vec![format!(
                "a valid label key {text} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        wrong.push("name part must be non-empty".into());
    } else {
        wrong.extend(
            too_long(name, 63, "bytes").into_iter().map(|text| format!("name part {text}")),
        );
    }
    if !is_qualified(name) {
        wrong.push(format!("name part {}", form_error(WORDS, QUALIFIED_FORM, &EXAMPLES)));
    }
    wrong
}

/// A label's value: empty, or at most 63 bytes of letters, digits and inner `-_.`.
pub fn label_value(value: &str) -> Vec<String> {
    let mut wrong = too_long(value, 63, "bytes");
    if !value.is_empty() && !is_qualified(value) {
        wrong.push(form_error(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
            "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?",
            &["MyValue", "my_value", "12345"],
        ));
    }
    wrong
}

/// The name of a container's or Service's port: at most 15 bytes.
pub fn port_name(value: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if value.len() > 15 {
        wrong.push("must be no more than 15 characters".to_owned());
    }
    if value.is_empty()
        || !value.bytes().all(|b| b == b'-' || b.is_ascii_lowercase() || b.is_ascii_digit())
    {
        wrong.push(
            "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned(),
        );
    }
    if !value.bytes().any(|b| b.is_ascii_lowercase()) {
        wrong.push("must contain at least one letter (a-z)".to_owned());
    }
    if value.contains("--") {
        wrong.push("must not contain consecutive hyphens".to_owned());
    }
    if value.starts_with('-') || value.ends_with('-') {
        wrong.push("must not begin or end with a hyphen".to_owned());
    }
    wrong
}

/// A port: 1 to 65535.
pub fn port_number(value: i64) -> Vec<String> {
    if (1..=65535).contains(&value) {
        Vec::new()
    } else {
        vec!["must be between 1 and 65535, inclusive".to_owned()]
    }
}

/// The key of a ConfigMap's or Secret's entry, which becomes a file name.
pub fn config_map_key(value: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if value.len() > 253 {
        wrong.push("must be no more than 253 characters".to_owned());
    }
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if value.is_empty() || !value.bytes().all(fine) {
        wrong.push(form_error(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
            "[-._a-zA-Z0-9]+",
            &["key.name", "KEY_NAME", "key-name"],
        ));
    }
    wrong.extend(dot_dot(value));
    wrong
}

/// The name of an environment variable: printable ASCII without `=`.
pub fn env_var_name(value: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if value.is_empty() {
        wrong.push("environment variable name must be non-empty".to_owned());
    }
    if !value.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
        wrong.push(
            "a valid environment variable name must consist only of printable ASCII characters other than '='"
                .to_owned(),
        );
    }
    wrong
}

/// The name of an HTTP header: letters, digits and `-`.
pub fn http_header_name(value: &str) -> Vec<String> {
    if !value.is_empty() && value.bytes().all(|b| b == b'-' || b.is_ascii_alphanumeric()) {
        return Vec::new();
    }
    vec![form_error(
        "a valid HTTP header must consist of alphanumeric characters or '-'",
        "[-A-Za-z0-9]+",
        &["X-Header-Name"],
    )]
}

/// Whether a ConfigMap key may be the name of an environment variable taken by `envFrom` in the strict
/// (C identifier) sense.
pub fn c_identifier(value: &str) -> Vec<String> {
    let head = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    let fine = value.bytes().next().is_some_and(head)
        && value.bytes().all(|b| head(b) || b.is_ascii_digit());
    if fine {
        Vec::new()
    } else {
        vec![form_error(
            "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_'",
            "[A-Za-z_][A-Za-z0-9_]*",
            &["my_name", "MY_NAME", "MyName"],
        )]
    }
}

fn dot_dot(value: &str) -> Option<String> {
    match value {
        "." => Some("must not be '.'".to_owned()),
        ".." => Some("must not be '..'".to_owned()),
        _ if value.starts_with("..") => Some("must not start with '..'".to_owned()),
        _ => None,
    }
}

/// Upstream counts bytes everywhere, and calls them characters in names but not in keys and values of labels.
fn too_long(value: &str, limit: usize, unit: &str) -> Vec<String> {
    if value.len() > limit {
        vec![format!("must be no more than {limit} {unit}")]
    } else {
        Vec::new()
    }
}

fn form_error(words: &str, form: &str, examples: &[&str]) -> String {
    let quoted: Vec<String> = examples.iter().map(|e| format!("'{e}', ")).collect();
    format!("{words} (e.g. {}regex used for validation is '{form}')", quoted.join(" or "))
}

fn is_label(value: &str) -> bool {
    let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    end(value.bytes().next())
        && end(value.bytes().last())
        && value.bytes().all(|b| b == b'-' || b.is_ascii_lowercase() || b.is_ascii_digit())
}

fn is_subdomain(value: &str) -> bool {
    value.split('.').all(is_label)
}

fn is_qualified(value: &str) -> bool {
    let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    end(value.bytes().next())
        && end(value.bytes().last())
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_subdomains() {
        for good in ["a", "web-1", "0a", &"a".repeat(63)] {
            assert_eq!(dns1123_label(good), Vec::<String>::new(), "{good}");
        }
        assert_eq!(dns1123_label("a.b"), ["must not contain dots"]);
        assert_eq!(
            dns1123_label("My_App"),
            [
                "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
            ]
        );
        assert_eq!(dns1123_label(&"a".repeat(64)), ["must be no more than 63 characters"]);
        assert_eq!(label_value(&"a".repeat(64)), ["must be no more than 63 bytes"]);
        assert!(dns1123_subdomain("a.b-c.d").is_empty());
        assert!(dns1123_subdomain("a..b")[0].contains("(e.g. 'example.com', regex used"));
        assert!(path_segment("A_b.1").is_empty());
        assert_eq!(path_segment("a/b%"), ["may not contain '/'", "may not contain '%'"]);
        assert_eq!(path_segment(".."), ["may not be '..'"]);
    }

    #[test]
    fn keys_and_values() {
        for good in ["app", "app.kubernetes.io/name", "A_b.c"] {
            assert_eq!(qualified_name(good), Vec::<String>::new(), "{good}");
        }
        assert_eq!(qualified_name("/x"), ["prefix part must be non-empty"]);
        assert_eq!(qualified_name("a/b/c").len(), 1);
        assert_eq!(qualified_name("x y").len(), 1);
        assert!(label_value("").is_empty());
        assert!(label_value("v1.2_3").is_empty());
        assert!(label_value("-x")[0].starts_with("a valid label must be an empty string or"));
    }

    #[test]
    fn ports_and_keys() {
        assert!(port_name("http").is_empty());
        assert_eq!(port_name("80"), ["must contain at least one letter (a-z)"]);
        assert_eq!(port_number(0), ["must be between 1 and 65535, inclusive"]);
        assert!(config_map_key("nginx.conf").is_empty());
        assert_eq!(config_map_key(".."), ["must not be '..'"]);
        assert_eq!(env_var_name("A=B").len(), 1);
        assert!(c_identifier("A_1").is_empty());
    }
}
