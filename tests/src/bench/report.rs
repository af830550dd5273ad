//! Samples of interleaved rounds into rows and ratios. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// One sample: what one subject showed for one metric in one round.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub subject: &'static str,
    /// Number of services programmed; 0 for `direct`.
    pub services: u32,
    pub round: u32,
    pub metric: &'static str,
    pub unit: &'static str,
    pub value: f64,
}

/// The samples of one subject and metric over all rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub subject: &'static str,
    pub services: u32,
    pub metric: &'static str,
    pub unit: &'static str,
    pub min: f64,
    pub median: f64,
    pub max: f64,
    pub runs: usize,
    /// Median of the quotients of this subject's value and `direct`'s in the same round; `None` for
    /// `direct` itself.
    pub ratio_to_direct: Option<f64>,
}

/// Groups samples into rows: subjects in order of first appearance, metrics likewise.
#[must_use]
pub fn rows(samples: &[Sample]) -> Vec<Row> {
    let mut order: Vec<(&'static str, u32, &'static str)> = Vec::new();
    for sample in samples {
        let key = (sample.subject, sample.services, sample.metric);
        if !order.contains(&key) {
            order.push(key);
        }
    }
    order.into_iter().filter_map(|key| row(samples, key)).collect()
}

fn row(samples: &[Sample], key: (&'static str, u32, &'static str)) -> Option<Row> {
    let (subject, services, metric) = key;
    let of = |s: &Sample| (s.subject, s.services, s.metric) == key;
    let mut values: Vec<f64> = samples.iter().filter(|s| of(s)).map(|s| s.value).collect();
    let unit = samples.iter().find(|s| of(s))?.unit;
    values.sort_by(f64::total_cmp);
    let direct: BTreeMap<u32, f64> = samples
        .iter()
        .filter(|s| s.subject == "direct" && s.metric == metric)
        .map(|s| (s.round, s.value))
        .collect();
    let mut quotients: Vec<f64> = samples
        .iter()
        .filter(|s| of(s) && subject != "direct")
        .filter_map(|s| direct.get(&s.round).filter(|d| **d > 0.0).map(|d| s.value / d))
        .collect();
    quotients.sort_by(f64::total_cmp);
    Some(Row {
        subject,
        services,
        metric,
        unit,
        min: *values.first()?,
        median: median(&values)?,
        max: *values.last()?,
        runs: values.len(),
        ratio_to_direct: median(&quotients),
    })
}

/// Middle of sorted values; the mean of the two middle ones when their number is even.
fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        return sorted.get(middle).copied();
    }
    Some(f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, *sorted.get(middle)?))
}

/// The rows as the list of objects that every benchmark writes.
#[must_use]
pub fn json(bench: &str, rows: &[Row]) -> Value {
    let object = |row: &Row| {
        json!({
            "bench": bench,
            "subject": row.subject,
            "parameters": { "services": row.services, "endpoints": 2 },
            "metric": row.metric,
            "unit": row.unit,
            "min": row.min,
            "median": row.median,
            "max": row.max,
            "runs": row.runs,
        })
    };
    Value::Array(rows.iter().map(object).collect())
}

/// The rows as a table for a person.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut out = format!(
        "{:<10} {:>9} {:<20} {:>10} {:>10} {:>10} {:<4} {:>9}\n",
        "subject", "services", "metric", "min", "median", "max", "unit", "/direct"
    );
    for row in rows {
        let ratio = row.ratio_to_direct.map_or_else(|| "-".to_owned(), |r| format!("{r:.2} x"));
        out.push_str(&format!(
            "{:<10} {:>9} {:<20} {:>10.1} {:>10.1} {:>10.1} {:<4} {:>9}\n",
            row.subject, row.services, row.metric, row.min, row.median, row.max, row.unit, ratio
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(subject: &'static str, round: u32, value: f64) -> Sample {
        Sample { subject, services: 0, round, metric: "crr_p50", unit: "us", value }
    }

    #[test]
    fn ratios_are_taken_within_a_round_not_between_medians() {
        // The machine is twice as slow in round 2; paired, orlop is 0.8 times direct in each.
        let samples = [
            sample("direct", 1, 100.0),
            sample("orlop", 1, 80.0),
            sample("orlop", 2, 160.0),
            sample("direct", 2, 200.0),
            sample("direct", 3, 100.0),
            sample("orlop", 3, 90.0),
        ];
        let rows = rows(&samples);
        let orlop = rows.iter().find(|row| row.subject == "orlop").expect("a row");
        assert_eq!((orlop.min, orlop.median, orlop.max, orlop.runs), (80.0, 90.0, 160.0, 3));
        assert_eq!(orlop.ratio_to_direct, Some(0.8));
        assert_eq!(rows.first().expect("direct first").ratio_to_direct, None);
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }
}
