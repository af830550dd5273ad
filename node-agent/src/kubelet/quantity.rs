//! Reading resource quantities as the two numbers that the node needs. Pure.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths, rounded up, as the scheduler and the kubelet count CPU. `None` if it is no quantity.
#[must_use]
pub fn cpu_millis(quantity: &Quantity) -> Option<u64> {
    scaled(&quantity.0, 3)
}

/// Whole units, rounded up: bytes, pods. `None` if it is no quantity.
#[must_use]
pub fn bytes(quantity: &Quantity) -> Option<u64> {
    scaled(&quantity.0, 0)
}

/// The value times 10^`scale`, rounded up; negative values and overflow are no quantity here.
fn scaled(text: &str, scale: i32) -> Option<u64> {
    let end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && *c == '+')))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at_checked(end)?;
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    // Past 18 digits a fraction cannot change a 64-bit result by more than the rounding does.
    let kept = fraction.get(..fraction.len().min(18))?;
    let digits: u128 = format!("{whole}{kept}").parse().ok()?;
    let (binary, decimal) = multiplier(suffix)?;
    let exponent = decimal + scale - i32::try_from(kept.len()).ok()?;
    let mut value = digits.checked_mul(binary)?;
    for _ in 0..exponent.max(0) {
        value = value.checked_mul(10)?;
    }
    let divisor = 10_u128.checked_pow(u32::try_from((-exponent).max(0)).ok()?)?;
    u64::try_from(value.div_ceil(divisor)).ok()
}

/// Binary factor and power of ten of a suffix.
fn multiplier(suffix: &str) -> Option<(u128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok()?;
            (1, Some(exponent).filter(|e| (-18..=18).contains(e))?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_and_rounded_up() {
        let table = [
            ("100m", Some(100), Some(1)),
            ("1", Some(1000), Some(1)),
            ("1.5", Some(1500), Some(2)),
            ("0.0001", Some(1), Some(1)),
            ("64Mi", Some(67_108_864_000), Some(67_108_864)),
            ("1.5Gi", Some(1_610_612_736_000), Some(1_610_612_736)),
            ("1e3", Some(1_000_000), Some(1000)),
            ("12E", None, Some(12_000_000_000_000_000_000)),
            ("500n", Some(1), Some(1)),
            ("", None, None),
            ("-1", None, None),
            ("1x", None, None),
            (".", None, None),
        ];
        for (text, millis, units) in table {
            let quantity = Quantity(text.to_owned());
            assert_eq!((cpu_millis(&quantity), bytes(&quantity)), (millis, units), "{text}");
        }
    }
}
