//! Kubernetes quantities: `100m`, `1.5Gi`, `1e3`. Pure and exact to a billionth.
//!
//! Same results as upstream's `resource.Quantity`: what is finer than a billionth is rounded away from
//! zero, what is larger than 2^63-1 is cut to it, and printing gives the canonical form.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "JSON has six kinds of values and gets no more"
)]

use std::{cmp::Ordering, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const NANO: i128 = 1_000_000_000;
/// 2^63-1, in billionths.
const LIMIT: i128 = 9_223_372_036_854_775_807 * NANO;

/// How a quantity was written, and is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `1`, `100m`, `5k`.
    #[default]
    DecimalSi,
    /// `1Ki`, `3Gi`.
    BinarySi,
    /// `12e6`.
    DecimalExponent,
}

/// An amount of a resource.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantity {
    nano: i128,
    format: Format,
}

/// Why a text is no quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Characters in the wrong place.
    #[error(
        "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
    )]
    Form,
    /// No digits, or two points.
    #[error("unable to parse numeric part of quantity")]
    Number,
    /// A suffix that does not exist.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

impl Quantity {
    /// A whole amount.
    pub fn new(value: i64, format: Format) -> Self {
        Self { nano: i128::from(value) * NANO, format }
    }

    /// Thousandths, such as CPU time in milli-cores.
    pub fn from_milli(value: i64, format: Format) -> Self {
        Self { nano: i128::from(value) * (NANO / 1000), format }
    }

    /// How it is printed.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The whole amount, rounded up.
    pub fn value(&self) -> i64 {
        saturate(divide_up(self.nano, NANO))
    }

    /// Thousandths, rounded up.
    pub fn milli_value(&self) -> i64 {
        saturate(divide_up(self.nano, NANO / 1000))
    }

    /// Whether it is exactly nothing.
    pub fn is_zero(&self) -> bool {
        self.nano == 0
    }

    /// -1, 0 or 1.
    pub fn sign(&self) -> i32 {
        match self.nano.cmp(&0) {
            Ordering::Less => -1,
            Ordering::Equal => 0,
            Ordering::Greater => 1,
        }
    }

    /// The sum, in the format of `self` (of `other` if `self` is zero).
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let format = if self.is_zero() { other.format } else { self.format };
        Self { nano: (self.nano + other.nano).clamp(-LIMIT, LIMIT), format }
    }

    /// The difference, in the format of `self` (of `other` if `self` is zero).
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        let format = if self.is_zero() { other.format } else { self.format };
        Self { nano: (self.nano - other.nano).clamp(-LIMIT, LIMIT), format }
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let parts = Parts::split(text)?;
        let (scale, format) = scale(parts.suffix)?;
        let nano = if parts.whole.is_empty() && parts.fraction.is_empty() {
            return Err(QuantityError::Number);
        } else {
            scaled(parts.whole, parts.fraction, scale).unwrap_or(LIMIT).min(LIMIT)
        };
        // Less than one byte is no number of bytes: printed in decimal, as upstream does.
        let format = if format == Format::BinarySi && nano > 0 && nano < NANO {
            Format::DecimalSi
        } else {
            format
        };
        Ok(Self { nano: if parts.negative { -nano } else { nano }, format })
    }
}

/// A quantity's text, taken apart.
struct Parts<'a> {
    negative: bool,
    whole: &'a str,
    fraction: &'a str,
    suffix: &'a str,
}

impl<'a> Parts<'a> {
    fn split(text: &'a str) -> Result<Self, QuantityError> {
        if text.is_empty() {
            return Err(QuantityError::Form);
        }
        let negative = text.starts_with('-');
        let rest = text.strip_prefix(['-', '+']).unwrap_or(text);
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (whole, rest) = rest.split_at_checked(digits).unwrap_or((rest, ""));
        let (fraction, suffix) = match rest.strip_prefix('.') {
            None => ("", rest),
            Some(rest) => {
                let digits =
                    rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                rest.split_at_checked(digits).unwrap_or((rest, ""))
            }
        };
        let letters = suffix.trim_start_matches(|c| "eEinumkKMGTP".contains(c));
        let number = letters.strip_prefix(['-', '+']).unwrap_or(letters);
        if !number.chars().all(|c| c.is_ascii_digit()) {
            return Err(QuantityError::Form);
        }
        Ok(Self { negative, whole, fraction, suffix })
    }
}

/// What a suffix multiplies by.
#[derive(Clone, Copy)]
enum Scale {
    /// A power of ten.
    Ten(i32),
    /// A power of two.
    Two(u32),
}

fn scale(suffix: &str) -> Result<(Scale, Format), QuantityError> {
    let binary = |power| Ok((Scale::Two(power), Format::BinarySi));
    let decimal = |power| Ok((Scale::Ten(power), Format::DecimalSi));
    match suffix {
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        _ => match suffix.strip_prefix(['e', 'E']).map(str::parse) {
            Some(Ok(power)) => Ok((Scale::Ten(power), Format::DecimalExponent)),
            _ => Err(QuantityError::Suffix),
        },
    }
}

/// Digits of a fraction that are kept; what is behind them only rounds.
const FRACTION_DIGITS: usize = 18;

/// The amount in billionths, rounded up; nothing where it exceeds all bounds.
fn scaled(whole: &str, fraction: &str, scale: Scale) -> Option<i128> {
    let whole = whole.trim_start_matches('0');
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let kept = fraction.get(..FRACTION_DIGITS).unwrap_or(fraction);
    let behind = fraction.get(FRACTION_DIGITS..).unwrap_or_default();
    // At most 18 digits, so that the number fits.
    let mut part: i128 = format!("{kept:0<FRACTION_DIGITS$}").parse().ok()?;
    part += i128::from(behind.bytes().any(|b| b != b'0'));
    if whole == 0 && part == 0 {
        return Some(0);
    }
    let multiplier = match scale {
        Scale::Two(power) => 1_i128 << power,
        Scale::Ten(power @ 0..=18) => 10_i128.pow(power.unsigned_abs()),
        Scale::Ten(19..) => return None,
        Scale::Ten(power) => {
            // Below one: all digits over one denominator.
            let digits = whole.checked_mul(1_000_000_000_000_000_000)?.checked_add(part)?;
            let places = power.unsigned_abs().checked_add(9)?;
            return Some(match 10_i128.checked_pow(places) {
                Some(denominator) => divide_up(digits, denominator),
                None => 1,
            });
        }
    };
    // part is in 10^-18, the result in 10^-9.
    let fraction = divide_up(part.checked_mul(multiplier)?, NANO);
    whole.checked_mul(multiplier)?.checked_mul(NANO)?.checked_add(fraction)
}

/// Division that rounds away from zero.
fn divide_up(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by == 0 { quotient } else { quotient + value.signum() }
}

fn saturate(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        let small = self.nano > -1024 * NANO && self.nano < 1024 * NANO;
        match self.format {
            Format::BinarySi if !small => {
                let mut number = divide_up(self.nano, NANO);
                let mut power = 0_usize;
                while number % 1024 == 0 && power < 6 {
                    number /= 1024;
                    power += 1;
                }
                let suffix = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].get(power);
                write!(f, "{number}{}", suffix.unwrap_or(&""))
            }
            Format::BinarySi | Format::DecimalSi => {
                let (number, power) = self.mantissa();
                let suffix = match power {
                    -9 => "n",
                    -6 => "u",
                    -3 => "m",
                    3 => "k",
                    6 => "M",
                    9 => "G",
                    12 => "T",
                    15 => "P",
                    18 => "E",
                    _ => "",
                };
                write!(f, "{number}{suffix}")
            }
            Format::DecimalExponent => match self.mantissa() {
                (number, 0) => write!(f, "{number}"),
                (number, power) => write!(f, "{number}e{power}"),
            },
        }
    }
}

impl Quantity {
    /// The amount as an integer times a power of ten, the power a multiple of three and as large as it can be.
    fn mantissa(&self) -> (i128, i32) {
        let (mut number, mut power) = (self.nano, -9);
        while number % 1000 == 0 && power < 18 {
            number /= 1000;
            power += 3;
        }
        (number, power)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => text.parse().map_err(serde::de::Error::custom),
            serde_json::Value::Number(number) => {
                number.to_string().parse().map_err(serde::de::Error::custom)
            }
            _ => Err(serde::de::Error::custom(QuantityError::Form)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_form() {
        let cases = [
            ("0", "0"),
            ("0.5", "500m"),
            ("1000m", "1"),
            ("1.5", "1500m"),
            ("100m", "100m"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("64Mi", "64Mi"),
            ("1Ki", "1Ki"),
            ("512Ki", "512Ki"),
            ("1000Ki", "1000Ki"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("1E", "1E"),
            ("12e6", "12e6"),
            ("1000000", "1M"),
            ("1500", "1500"),
            ("0.1n", "1n"),
            ("1.0000000001", "1000000001n"),
            ("-0.5", "-500m"),
            ("-1Gi", "-1Gi"),
            ("+2", "2"),
            ("0.5Ki", "512"),
            ("0.0001Ki", "102400u"),
            ("100e-3", "100e-3"),
            ("9999999999999999999999", "9223372036854775807"),
            ("20E", "9223372036854775807"),
            (".5", "500m"),
            ("5.", "5"),
        ];
        for (text, canonical) in cases {
            assert_eq!(text.parse::<Quantity>().unwrap().to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn bad_quantities() {
        let cases = [
            ("", QuantityError::Form),
            ("1 Gi", QuantityError::Form),
            ("12x", QuantityError::Form),
            ("1.2.3", QuantityError::Form),
            ("Mi", QuantityError::Number),
            ("1GiB", QuantityError::Form),
            ("1MM", QuantityError::Suffix),
            ("1i", QuantityError::Suffix),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<Quantity>().unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn rounds_up_and_adds() {
        let q = |text: &str| text.parse::<Quantity>().unwrap();
        assert_eq!(q("100m").value(), 1);
        assert_eq!(q("1.0005").milli_value(), 1001);
        assert_eq!(q("-1500m").value(), -2);
        assert_eq!(q("1Gi").plus(q("512Mi")).to_string(), "1536Mi");
        assert_eq!(q("2").minus(q("500m")).to_string(), "1500m");
        assert!(q("1Gi") > q("1G"));
        assert_eq!(q("1024"), q("1Ki"));
        assert_eq!(q("9e18").plus(q("9e18")).value(), i64::MAX);
    }
}
