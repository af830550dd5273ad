//! Samples of interleaved rounds into rows and ratios. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// What a subject was measured with: integers and strings.
pub type Parameters = BTreeMap<&'static str, Value>;

/// One subject with its parameters. Its place in the list of lanes names it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lane {
    pub subject: &'static str,
    pub parameters: Parameters,
    /// The lane whose samples of the same round this one's are divided by.
    pub base: Option<usize>,
}

/// One sample: what one lane showed for one metric in one round.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub lane: usize,
    pub round: u32,
    pub metric: &'static str,
    pub unit: &'static str,
    pub value: f64,
}

/// The samples of one lane and metric over all rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub subject: &'static str,
    pub parameters: Parameters,
    pub metric: &'static str,
    pub unit: &'static str,
    pub min: f64,
    pub median: f64,
    pub max: f64,
    pub runs: usize,
    /// Median of the quotients of this lane's value and its base's in the same round.
    pub ratio: Option<f64>,
    /// The base's subject.
    pub base: Option<&'static str>,
}

/// Groups samples into rows, in order of lanes and of each metric's first appearance.
#[must_use]
pub fn rows(lanes: &[Lane], samples: &[Sample]) -> Vec<Row> {
    let mut metrics: Vec<&'static str> = Vec::new();
    let mut values: BTreeMap<(usize, &'static str), BTreeMap<u32, &Sample>> = BTreeMap::new();
    for sample in samples {
        if !metrics.contains(&sample.metric) {
            metrics.push(sample.metric);
        }
        values.entry((sample.lane, sample.metric)).or_default().insert(sample.round, sample);
    }
    let mut rows = Vec::new();
    for (index, lane) in lanes.iter().enumerate() {
        for metric in &metrics {
            let Some(own) = values.get(&(index, *metric)) else { continue };
            let base = lane.base.and_then(|base| values.get(&(base, *metric)));
            rows.extend(row(lanes, lane, own, base));
        }
    }
    rows
}

fn row(
    lanes: &[Lane],
    lane: &Lane,
    own: &BTreeMap<u32, &Sample>,
    base: Option<&BTreeMap<u32, &Sample>>,
) -> Option<Row> {
    let first = own.values().next()?;
    let values = sorted(own.values().map(|sample| sample.value));
    let quotients = sorted(own.iter().filter_map(|(round, sample)| {
        let below = base?.get(round)?.value;
        (below > 0.0).then(|| sample.value / below)
    }));
    Some(Row {
        subject: lane.subject,
        parameters: lane.parameters.clone(),
        metric: first.metric,
        unit: first.unit,
        min: *values.first()?,
        median: median(&values)?,
        max: *values.last()?,
        runs: values.len(),
        ratio: median(&quotients),
        base: lane.base.and_then(|base| lanes.get(base)).map(|base| base.subject),
    })
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Middle of sorted values; the mean of the two middle ones when their number is even.
#[must_use]
pub fn median(sorted: &[f64]) -> Option<f64> {
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
            "parameters": row.parameters,
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
        "{:<13} {:<42} {:<22} {:>12} {:>12} {:>12} {:<5} ratio of paired rounds\n",
        "subject", "parameters", "metric", "min", "median", "max", "unit"
    );
    for row in rows {
        let ratio = row.ratio.zip(row.base);
        let ratio = ratio.map_or_else(|| "-".to_owned(), |(r, base)| format!("{r:.3} x {base}"));
        let parameters = words(&row.parameters);
        let [min, median, max] = [row.min, row.median, row.max].map(number);
        out.push_str(&format!(
            "{:<13} {:<42} {:<22} {min:>12} {median:>12} {max:>12} {:<5} {ratio}\n",
            row.subject, parameters, row.metric, row.unit
        ));
    }
    out
}

/// `services=1000 endpoints=2`.
fn words(parameters: &Parameters) -> String {
    let word = |(name, value): (&&str, &Value)| match value.as_str() {
        Some(text) => format!("{name}={text}"),
        None => format!("{name}={value}"),
    };
    parameters.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// With as many digits as say something.
#[must_use]
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1e7 => format!("{:.1}e6", value / 1e6),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes() -> Vec<Lane> {
        let lane = |subject, base| Lane {
            subject,
            parameters: Parameters::from([("services", json!(0))]),
            base,
        };
        vec![lane("direct", None), lane("orlop", Some(0))]
    }

    fn sample(lane: usize, round: u32, value: f64) -> Sample {
        Sample { lane, round, metric: "crr_p50", unit: "us", value }
    }

    #[test]
    fn ratios_are_taken_within_a_round_not_between_medians() {
        // The machine is twice as slow in round 2; paired, orlop is 0.8 times direct in each.
        let samples = [
            sample(0, 1, 100.0),
            sample(1, 1, 80.0),
            sample(1, 2, 160.0),
            sample(0, 2, 200.0),
            sample(0, 3, 100.0),
            sample(1, 3, 90.0),
        ];
        let rows = rows(&lanes(), &samples);
        let orlop = &rows[1];
        assert_eq!((orlop.min, orlop.median, orlop.max, orlop.runs), (80.0, 90.0, 160.0, 3));
        assert_eq!((orlop.ratio, orlop.base), (Some(0.8), Some("direct")));
        assert_eq!(rows[0].ratio, None);
    }

    #[test]
    fn a_row_has_the_names_that_readers_of_the_json_rely_on() {
        let rows = rows(&lanes(), &[sample(1, 1, 80.0)]);
        let expected = json!([{
            "bench": "lb", "subject": "orlop", "parameters": { "services": 0 },
            "metric": "crr_p50", "unit": "us", "min": 80.0, "median": 80.0, "max": 80.0, "runs": 1,
        }]);
        assert_eq!(json("lb", &rows), expected);
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }
}
