//! Label and field selectors: from query strings and from objects, and what they match. Pure.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "every token but the wanted ones is refused with the same words"
)]

use std::fmt;

use serde_json::Value;

use crate::names;

mod fields;

pub use fields::{FieldSelector, FieldTerm};

/// A conjunction of requirements on labels. The default matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// What must hold.
    pub operator: Operator,
    /// The values of `In` and `NotIn`; the bound of `GreaterThan` and `LessThan`.
    pub values: Vec<String>,
}

/// The relation of a [`Requirement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// The label is there and has one of the values.
    In,
    /// The label is not there or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
    /// The label is an integer above the value.
    GreaterThan,
    /// The label is an integer below the value.
    LessThan,
}

/// What is wrong with a selector, in upstream's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(String);

impl LabelSelector {
    /// Matches nothing at all, as a nil selector object does.
    pub fn nothing() -> Self {
        let requirement =
            Requirement { key: String::new(), operator: Operator::In, values: Vec::new() };
        Self { requirements: vec![requirement] }
    }

    /// A selector that wants exactly these labels.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let requirements = labels.into_iter().map(|(key, value)| Requirement {
            key: key.to_owned(),
            operator: Operator::In,
            values: vec![value.to_owned()],
        });
        Self { requirements: requirements.collect() }
    }

    /// Parses the form of `labelSelector=` and `kubectl -l`: `a=b,c!=d,e in (x,y),f notin (z),g,!h`.
    ///
    /// # Errors
    /// [`SelectorError`] with what was found and what was expected.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { tokens: tokens(text)?, at: 0 };
        let mut requirements = Vec::new();
        if parser.peek() == &Token::End {
            return Ok(Self::default());
        }
        loop {
            requirements.push(parser.requirement()?);
            match parser.next() {
                Token::End => return Ok(Self { requirements }),
                Token::Comma if parser.peek() == &Token::End => {
                    return Err(unexpected(&Token::End, "identifier after ','"));
                }
                Token::Comma => {}
                other => return Err(unexpected(&other, "',' or 'end of string'")),
            }
        }
    }

    /// Reads a `LabelSelector` object (`matchLabels`, `matchExpressions`). Null matches nothing, an
    /// empty object everything.
    ///
    /// # Errors
    /// [`SelectorError`] for an unknown operator or values that do not fit it.
    pub fn from_object(object: &Value) -> Result<Self, SelectorError> {
        if object.is_null() {
            return Ok(Self::nothing());
        }
        let mut requirements = Vec::new();
        for (key, value) in
            object.get("matchLabels").and_then(Value::as_object).into_iter().flatten()
        {
            let value = value.as_str().unwrap_or_default();
            requirements.push(checked(key, Operator::In, vec![value.to_owned()])?);
        }
        let expressions = object.get("matchExpressions").and_then(Value::as_array);
        for expression in expressions.into_iter().flatten() {
            let text = |name| expression.get(name).and_then(Value::as_str).unwrap_or_default();
            let operator = match Operator::named(text("operator")) {
                Some(Operator::GreaterThan | Operator::LessThan) | None => {
                    return Err(SelectorError(format!(
                        "{:?} is not a valid label selector operator",
                        text("operator")
                    )));
                }
                Some(operator) => operator,
            };
            let values = expression.get("values").and_then(Value::as_array).into_iter().flatten();
            let values = values.filter_map(Value::as_str).map(ToOwned::to_owned).collect();
            requirements.push(checked(text("key"), operator, values)?);
        }
        Ok(Self { requirements })
    }

    /// Whether the labels, looked up by key, fulfil every requirement.
    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches(label(&requirement.key)))
    }

    /// Whether an object's `labels` map (null for none) fulfils every requirement.
    pub fn matches_value(&self, labels: &Value) -> bool {
        self.matches(|key| labels.get(key).and_then(Value::as_str))
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The requirements.
    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }
}

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        self.operator.holds(value, self.values.iter())
    }
}

impl Operator {
    /// As objects name it. `Gt` and `Lt` are of node selectors alone.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "In" => Some(Self::In),
            "NotIn" => Some(Self::NotIn),
            "Exists" => Some(Self::Exists),
            "DoesNotExist" => Some(Self::DoesNotExist),
            "Gt" => Some(Self::GreaterThan),
            "Lt" => Some(Self::LessThan),
            _ => None,
        }
    }

    /// Whether it holds between what there is, if anything, and a requirement's values.
    pub fn holds(self, found: Option<&str>, mut values: impl Iterator<Item: AsRef<str>>) -> bool {
        match self {
            Self::In => found.is_some_and(|found| values.any(|value| value.as_ref() == found)),
            Self::NotIn => found.is_none_or(|found| values.all(|value| value.as_ref() != found)),
            Self::Exists => found.is_some(),
            Self::DoesNotExist => found.is_none(),
            Self::GreaterThan => numbers(found, values.next()).is_some_and(|(a, b)| a > b),
            Self::LessThan => numbers(found, values.next()).is_some_and(|(a, b)| a < b),
        }
    }
}

fn numbers(found: Option<&str>, bound: Option<impl AsRef<str>>) -> Option<(i64, i64)> {
    Some((found?.parse().ok()?, bound?.as_ref().parse().ok()?))
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, requirement) in self.requirements.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            let Requirement { key, operator, values } = requirement;
            match (operator, values.as_slice()) {
                (Operator::In, [value]) => write!(f, "{key}={value}")?,
                (Operator::NotIn, [value]) => write!(f, "{key}!={value}")?,
                (Operator::In, _) => write!(f, "{key} in ({})", values.join(","))?,
                (Operator::NotIn, _) => write!(f, "{key} notin ({})", values.join(","))?,
                (Operator::Exists, _) => f.write_str(key)?,
                (Operator::DoesNotExist, _) => write!(f, "!{key}")?,
                (Operator::GreaterThan, _) => write!(f, "{key}>{}", values.join(","))?,
                (Operator::LessThan, _) => write!(f, "{key}<{}", values.join(","))?,
            }
        }
        Ok(())
    }
}

fn checked(
    key: &str,
    operator: Operator,
    values: Vec<String>,
) -> Result<Requirement, SelectorError> {
    let wrong = names::qualified_name(key);
    if !wrong.is_empty() {
        return Err(SelectorError(format!("key: Invalid value: {key:?}: {}", wrong.join("; "))));
    }
    match operator {
        Operator::In | Operator::NotIn if values.is_empty() => {
            return Err(SelectorError(
                "values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty"
                    .to_owned(),
            ));
        }
        Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
            return Err(SelectorError(format!(
                "values: Invalid value: {values:?}: values set must be empty for exists and does not exist"
            )));
        }
        Operator::GreaterThan | Operator::LessThan
            if values.iter().any(|value| value.parse::<i64>().is_err()) =>
        {
            return Err(SelectorError(format!(
                "values[0]: Invalid value: {:?}: for 'Gt', 'Lt' operators, the value must be an integer",
                values.first().map_or("", String::as_str)
            )));
        }
        Operator::In
        | Operator::NotIn
        | Operator::Exists
        | Operator::DoesNotExist
        | Operator::GreaterThan
        | Operator::LessThan => {}
    }
    for (index, value) in values.iter().enumerate() {
        let wrong = names::label_value(value);
        if !wrong.is_empty() {
            return Err(SelectorError(format!(
                "values[{index}][{key}]: Invalid value: {value:?}: {}",
                wrong.join("; ")
            )));
        }
    }
    Ok(Requirement { key: key.to_owned(), operator, values })
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Comma,
    Open,
    Close,
    Not,
    Equals,
    NotEquals,
    Greater,
    Less,
    End,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Word(word) => word,
            Self::Comma => ",",
            Self::Open => "(",
            Self::Close => ")",
            Self::Not => "!",
            Self::Equals => "=",
            Self::NotEquals => "!=",
            Self::Greater => ">",
            Self::Less => "<",
            Self::End => "",
        })
    }
}

fn unexpected(found: &Token, wanted: &str) -> SelectorError {
    SelectorError(format!("unable to parse requirement: found '{found}', expected: {wanted}"))
}

fn tokens(text: &str) -> Result<Vec<Token>, SelectorError> {
    const SPECIAL: &str = "=!(),><";
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let token = match c {
            _ if c.is_ascii_whitespace() => continue,
            ',' => Token::Comma,
            '(' => Token::Open,
            ')' => Token::Close,
            '>' => Token::Greater,
            '<' => Token::Less,
            '!' if chars.next_if_eq(&'=').is_some() => Token::NotEquals,
            '!' => Token::Not,
            '=' => {
                let _second = chars.next_if_eq(&'=');
                Token::Equals
            }
            _ => {
                let mut word = String::from(c);
                while let Some(c) =
                    chars.next_if(|c| !c.is_ascii_whitespace() && !SPECIAL.contains(*c))
                {
                    word.push(c);
                }
                Token::Word(word)
            }
        };
        tokens.push(token);
        if tokens.len() > MAX_TOKENS {
            return Err(SelectorError(format!("a selector has at most {MAX_TOKENS} parts")));
        }
    }
    Ok(tokens)
}

/// A selector of a request is a line of a URL; this is far above what fits in one that people write.
const MAX_TOKENS: usize = 10_000;

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        self.tokens.get(self.at).unwrap_or(&Token::End)
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let negated = self.peek() == &Token::Not;
        if negated {
            self.next();
        }
        let key = match self.next() {
            Token::Word(word) => word,
            other => return Err(unexpected(&other, "identifier")),
        };
        if matches!(self.peek(), Token::End | Token::Comma) {
            let operator = if negated { Operator::DoesNotExist } else { Operator::Exists };
            return parsed(&key, operator, Vec::new());
        }
        if negated {
            return Err(unexpected(&self.next(), "',' or 'end of string'"));
        }
        match self.next() {
            Token::Equals => parsed(&key, Operator::In, vec![self.value()?]),
            Token::NotEquals => parsed(&key, Operator::NotIn, vec![self.value()?]),
            Token::Greater => parsed(&key, Operator::GreaterThan, vec![self.value()?]),
            Token::Less => parsed(&key, Operator::LessThan, vec![self.value()?]),
            Token::Word(word) if word == "in" => parsed(&key, Operator::In, self.values()?),
            Token::Word(word) if word == "notin" => parsed(&key, Operator::NotIn, self.values()?),
            other => Err(unexpected(&other, "in, notin, =, ==, !=, gt, lt")),
        }
    }

    fn value(&mut self) -> Result<String, SelectorError> {
        match self.peek() {
            Token::End | Token::Comma => Ok(String::new()),
            _ => match self.next() {
                Token::Word(word) => Ok(word),
                other => Err(unexpected(&other, "identifier")),
            },
        }
    }

    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        match self.next() {
            Token::Open => {}
            other => return Err(unexpected(&other, "'('")),
        }
        let mut values = Vec::new();
        loop {
            match self.next() {
                Token::Word(word) => {
                    values.push(word);
                    match self.next() {
                        Token::Comma => {}
                        Token::Close => return Ok(values),
                        other => return Err(unexpected(&other, "',' or ')'")),
                    }
                }
                Token::Comma => values.push(String::new()),
                Token::Close => {
                    values.push(String::new());
                    return Ok(values);
                }
                other => return Err(unexpected(&other, "',', ')' or identifier")),
            }
        }
    }
}

fn parsed(
    key: &str,
    operator: Operator,
    values: Vec<String>,
) -> Result<Requirement, SelectorError> {
    checked(key, operator, values)
        .map_err(|error| SelectorError(format!("unable to parse requirement: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors_match() {
        let labels = json!({"app": "web", "tier": "front", "n": "5"});
        let cases = [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app!=web", false),
            ("x!=web", true),
            ("app in (db, web)", true),
            ("app notin (db,web)", false),
            ("x notin (db)", true),
            ("app", true),
            ("!app", false),
            ("!x", true),
            ("n>4", true),
            ("n<4", false),
            ("app=", false),
            ("tier in (front),app", true),
        ];
        for (text, matches) in cases {
            let selector = LabelSelector::parse(text).unwrap();
            assert_eq!(selector.matches_value(&labels), matches, "{text}");
        }
    }

    #[test]
    fn label_selectors_are_refused() {
        for text in ["a=b,", "=b", "a in b", "a in (b", "!a=b", "a b", "a=b c", "-x=y", "a>x"] {
            assert!(LabelSelector::parse(text).err().is_some(), "{text}");
        }
        let error = LabelSelector::parse("a b").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"
        );
    }

    #[test]
    fn selector_objects() {
        let labels = json!({"app": "web"});
        assert!(!LabelSelector::from_object(&Value::Null).unwrap().matches_value(&labels));
        assert!(LabelSelector::from_object(&json!({})).unwrap().matches_value(&labels));
        let selector = json!({"matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]});
        let selector = LabelSelector::from_object(&selector).unwrap();
        assert!(selector.matches_value(&labels));
        assert_eq!(selector.to_string(), "app=web,!x");
        let bad = json!({"matchExpressions": [{"key": "x", "operator": "Near"}]});
        assert_eq!(
            LabelSelector::from_object(&bad).unwrap_err().to_string(),
            "\"Near\" is not a valid label selector operator"
        );
    }
}
