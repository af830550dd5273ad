//! Label and field selectors of requests. Pure.

use api::names;

use crate::store::Attributes;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

/// `labelSelector`: `a=b,c!=d,e in (f,g),h,!i`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<(String, Test)>);

impl LabelSelector {
    /// # Errors
    /// The text says what is wrong where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = split(text);
        if parts.is_empty() && text.contains(',') {
            return Err("found ',', expected: !, identifier, or 'end of string'".to_owned());
        }
        parts.into_iter().map(requirement).collect::<Result<_, _>>().map(Self)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[must_use]
    pub fn matches(&self, attributes: &Attributes) -> bool {
        self.0.iter().all(|(key, test)| holds(test, attributes.label(key)))
    }
}

fn holds(test: &Test, value: Option<&str>) -> bool {
    match test {
        Test::In(values) => value.is_some_and(|value| values.iter().any(|v| v == value)),
        Test::NotIn(values) => value.is_none_or(|value| values.iter().all(|v| v != value)),
        Test::Exists => value.is_some(),
        Test::Absent => value.is_none(),
        Test::Greater(bound) => {
            value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *bound)
        }
        Test::Less(bound) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *bound),
    }
}

/// Cuts at commas outside parentheses.
fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_u32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..));
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect()
}

fn requirement(text: &str) -> Result<(String, Test), String> {
    if let Some(key) = text.strip_prefix('!') {
        return checked(key.trim(), Test::Absent);
    }
    if let Some((head, list)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) {
        let values = || list.split(',').map(|value| value.trim().to_owned()).collect();
        let mut words = head.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => checked(key, Test::In(values())),
            (Some(key), Some("notin"), None) => checked(key, Test::NotIn(values())),
            _ => Err(format!("found '{head}', expected: 'in', 'notin'")),
        };
    }
    for operator in ["!=", "==", "=", ">", "<"] {
        let Some((key, value)) = text.split_once(operator) else { continue };
        let value = value.trim();
        let number = || {
            value.parse().map_err(|_parse| {
                format!("for 'Gt', 'Lt' operators, the value must be an integer: {value:?}")
            })
        };
        let test = match operator {
            "!=" => Test::NotIn(vec![value.to_owned()]),
            ">" => Test::Greater(number()?),
            "<" => Test::Less(number()?),
            _ => Test::In(vec![value.to_owned()]),
        };
        return checked(key.trim(), test);
    }
    checked(text, Test::Exists)
}

fn checked(key: &str, test: Test) -> Result<(String, Test), String> {
    if let Some(why) = names::qualified_name(key).first() {
        return Err(format!("key: Invalid value: {key:?}: {why}"));
    }
    if let Test::In(values) | Test::NotIn(values) = &test {
        for (index, value) in values.iter().enumerate() {
            if let Some(why) = names::label_value(value).first() {
                return Err(format!("values[{index}][{key}]: Invalid value: {value:?}: {why}"));
            }
        }
    }
    Ok((key.to_owned(), test))
}

/// `fieldSelector`: `spec.nodeName=n,status.phase!=Failed`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<(String, Equal, String)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Equal {
    Yes,
    No,
}

impl FieldSelector {
    /// # Errors
    /// The text names the part that is no comparison.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut terms = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, equal, value) = if let Some((key, value)) = part.split_once("!=") {
                (key, Equal::No, value)
            } else if let Some((key, value)) =
                part.split_once("==").or_else(|| part.split_once('='))
            {
                (key, Equal::Yes, value)
            } else {
                return Err(format!("invalid selector: '{text}'; can't understand '{part}'"));
            };
            terms.push((key.to_owned(), equal, value.replace('\\', "")));
        }
        Ok(Self(terms))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first field that `known` does not name.
    #[must_use]
    pub fn unknown<'a>(&'a self, known: &[&str]) -> Option<&'a str> {
        self.0.iter().map(|(key, ..)| key.as_str()).find(|key| !known.contains(key))
    }

    /// The value that a field must have, if the selector says so.
    #[must_use]
    pub fn required(&self, field: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, equal, _)| key == field && *equal == Equal::Yes)
            .map(|(_, _, value)| value.as_str())
    }

    /// `path` is the object's `namespace/name`.
    #[must_use]
    pub fn matches(&self, path: &str, attributes: &Attributes) -> bool {
        let (namespace, name) = path.split_once('/').unwrap_or(("", path));
        self.0.iter().all(|(key, equal, value)| {
            let found = match key.as_str() {
                "metadata.name" => name,
                "metadata.namespace" => namespace,
                other => attributes.field(other),
            };
            (found == value) == (*equal == Equal::Yes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes() -> Attributes {
        Attributes {
            labels: [("app", "web"), ("n", "5")].map(|(k, v)| (k.into(), v.into())).into(),
            fields: [("spec.nodeName", "n1".into())].into(),
        }
    }

    #[test]
    fn label_selectors() {
        let table = [
            ("", true),
            ("app=web", true),
            ("app==web,n!=4", true),
            ("app in (db, web)", true),
            ("app notin (db,web),n", false),
            ("!tier", true),
            ("tier!=x", true),
            ("tier", false),
            ("n>4,n<6", true),
        ];
        for (text, want) in table {
            assert_eq!(LabelSelector::parse(text).unwrap().matches(&attributes()), want, "{text}");
        }
        for bad in ["a b", "=x", "a of (b)", "a=b c", "n>x"] {
            LabelSelector::parse(bad).expect_err(bad);
        }
    }

    #[test]
    fn field_selectors() {
        let table = [
            ("metadata.name=p", true),
            ("metadata.namespace!=a", false),
            ("spec.nodeName=n1,status.phase!=Failed", true),
            ("spec.nodeName=", false),
            ("status.phase=", true),
        ];
        for (text, want) in table {
            let selector = FieldSelector::parse(text).unwrap();
            assert_eq!(selector.matches("a/p", &attributes()), want, "{text}");
        }
        FieldSelector::parse("x").unwrap_err();
        assert_eq!(FieldSelector::parse("a=1,b=2").unwrap().unknown(&["a"]), Some("b"));
    }
}
