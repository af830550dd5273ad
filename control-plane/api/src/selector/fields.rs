//! Field selectors: `fieldSelector=spec.nodeName=n1,status.phase!=Failed`. Pure.

use super::SelectorError;

/// A conjunction of requirements on fields, such as `spec.nodeName=n1,status.phase!=Failed`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    /// Field, whether it must be equal (or unequal), value.
    pub terms: Vec<FieldTerm>,
}

/// One requirement on a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldTerm {
    /// The path, such as `metadata.name`.
    pub field: String,
    /// Whether the field must have the value, or must not.
    pub equal: bool,
    /// The value; an absent field counts as empty.
    pub value: String,
}

impl FieldSelector {
    /// Parses the form of `fieldSelector=`. `\\`, `\,` and `\=` stand for the characters themselves.
    ///
    /// # Errors
    /// [`SelectorError`] for a term without a relation, or a wrong escape.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut terms = Vec::new();
        for term in split_unescaped(text) {
            if term.is_empty() {
                continue;
            }
            let Some(at) = term.find(['=', '!']) else {
                return Err(SelectorError(format!(
                    "invalid selector: '{text}'; can't understand '{term}'"
                )));
            };
            let (field, rest) = term.split_at_checked(at).unwrap_or((&term, ""));
            let relation = [("!=", false), ("==", true), ("=", true)];
            let found = relation
                .into_iter()
                .find_map(|(sign, equal)| rest.strip_prefix(sign).map(|value| (equal, value)));
            let Some((equal, value)) = found else {
                return Err(SelectorError(format!(
                    "invalid selector: '{text}'; can't understand '{term}'"
                )));
            };
            terms.push(FieldTerm { field: field.to_owned(), equal, value: unescape(value)? });
        }
        Ok(Self { terms })
    }

    /// Whether the fields, looked up by path, fulfil every term. An absent field is an empty one.
    pub fn matches<'a>(&self, field: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.terms
            .iter()
            .all(|term| (field(&term.field).unwrap_or_default() == term.value) == term.equal)
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// The value that a field must have, where a term says so.
    pub fn required(&self, field: &str) -> Option<&str> {
        self.terms
            .iter()
            .find(|term| term.equal && term.field == field)
            .map(|term| term.value.as_str())
    }
}

fn split_unescaped(text: &str) -> Vec<String> {
    let mut terms = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == ',' && !escaped {
            terms.push(String::new());
            continue;
        }
        escaped = c == '\\' && !escaped;
        if let Some(last) = terms.last_mut() {
            last.push(c);
        }
    }
    terms
}

fn unescape(value: &str) -> Result<String, SelectorError> {
    let mut out = String::new();
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                other => {
                    let shown = other.map(String::from).unwrap_or_default();
                    return Err(SelectorError(format!("invalid escape sequence: \\{shown}")));
                }
            },
            (',' | '=', _) => {
                return Err(SelectorError(format!(
                    "invalid field selector: unescaped character in value: {c}"
                )));
            }
            (c, _) => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_selectors() {
        let selector = FieldSelector::parse("spec.nodeName=n1,status.phase!=Failed").unwrap();
        let with = |node: &'static str, phase: &'static str| {
            selector.matches(|field| match field {
                "spec.nodeName" => Some(node),
                "status.phase" => Some(phase),
                _ => None,
            })
        };
        assert!(with("n1", "Running"));
        assert!(!with("n1", "Failed"));
        assert!(!with("n2", "Running"));
        assert_eq!(selector.required("spec.nodeName"), Some("n1"));
        assert_eq!(FieldSelector::parse(r"a=b\,c").unwrap().terms[0].value, "b,c");
        FieldSelector::parse("nonsense").unwrap_err();
        FieldSelector::parse(r"a=b\x").unwrap_err();
    }
}
