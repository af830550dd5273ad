//! What the dataplane counts, in Prometheus' text format (version 0.0.4).
//!
//! Pure: values in, text out.

use std::{fmt::Write as _, time::Duration};

use ebpf_common::verdict::DropReason;

use super::{
    look::Fill,
    status::{Evicting, Full},
};

/// What a scrape shows.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub drops: Vec<(DropReason, u64)>,
    pub fill: Vec<Fill>,
    /// Maps without room.
    pub full: Vec<Full>,
    /// Maps that are about to forget rows in use.
    pub evicting: Vec<Evicting>,
    /// Attached programs by path: `("socket", "cg_connect4")`.
    pub programs: Vec<(&'static str, String)>,
    /// Rounds of programming so far, the time they took, and how many left something undone.
    pub rounds: Rounds,
}

/// How long writing services takes, from when their changes are taken up to the last row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rounds {
    pub count: u64,
    pub failed: u64,
    pub total_us: u64,
    pub last_us: u64,
}

impl Metrics {
    /// The text of a scrape.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let name = "dataplane_dropped_total";
        head(&mut out, name, "counter", "Packets dropped and connections refused, by reason.");
        for (reason, count) in &self.drops {
            sample(&mut out, name, &[("reason", reason.words())], count);
        }
        let name = "dataplane_map_rows";
        head(&mut out, name, "gauge", "Rows in a map of the kernel; of AFFINITY, those in use.");
        for fill in &self.fill {
            sample(&mut out, name, &[("map", fill.map)], &fill.rows);
        }
        let name = "dataplane_map_max_rows";
        head(&mut out, name, "gauge", "Rows for which a map of the kernel has room.");
        for fill in &self.fill {
            sample(&mut out, name, &[("map", fill.map)], &fill.max);
        }
        let name = "dataplane_map_missing_rows";
        head(
            &mut out,
            name,
            "gauge",
            "Rows for which a full map of the kernel has no room; of CONNTRACK, packets dropped for that.",
        );
        for full in &self.full {
            sample(&mut out, name, &[("map", full.map)], &full.missing);
        }
        let name = "dataplane_map_evicting_rows";
        head(
            &mut out,
            name,
            "gauge",
            "Rows in use of a map that forgets the least recently used, where they take most of it.",
        );
        for one in &self.evicting {
            sample(&mut out, name, &[("map", one.map)], &one.rows);
        }
        let name = "dataplane_program_attached";
        head(&mut out, name, "gauge", "Programs that run, by the path that they serve.");
        for (path, program) in &self.programs {
            sample(&mut out, name, &[("path", path), ("program", program)], &1);
        }
        self.rounds.text(&mut out);
        out
    }
}

impl Rounds {
    /// Adds a round that took so long, and whether all is written.
    pub fn add(&mut self, took: Duration, is_whole: bool) {
        self.count += 1;
        self.failed += u64::from(!is_whole);
        self.last_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.total_us = self.total_us.saturating_add(self.last_us);
    }

    fn text(&self, out: &mut String) {
        #[expect(
            clippy::cast_precision_loss,
            clippy::as_conversions,
            reason = "microseconds of 285 years fit into the mantissa"
        )]
        let seconds = |us: u64| us as f64 / 1e6;
        let name = "dataplane_programming_seconds";
        head(
            out,
            name,
            "summary",
            "Time from when changes of services are taken up to the last row written.",
        );
        sample(out, "dataplane_programming_seconds_sum", &[], &seconds(self.total_us));
        sample(out, "dataplane_programming_seconds_count", &[], &self.count);
        let name = "dataplane_programming_last_seconds";
        head(out, name, "gauge", "The same for the last change.");
        sample(out, name, &[], &seconds(self.last_us));
        let name = "dataplane_programming_failed_total";
        head(out, name, "counter", "Rounds that left something to be tried again.");
        sample(out, name, &[], &self.failed);
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string cannot fail.
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}").unwrap_or_default();
}

fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: &dyn std::fmt::Display) {
    let pairs: Vec<String> = labels
        .iter()
        .map(|(label, value)| {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            format!("{label}=\"{value}\"")
        })
        .collect();
    let labels = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
    writeln!(out, "{name}{labels} {value}").unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_names_reasons_maps_programs_and_times() {
        let mut rounds = Rounds::default();
        rounds.add(Duration::from_millis(2499), true);
        rounds.add(Duration::from_millis(1), false);
        let metrics = Metrics {
            drops: vec![(DropReason::NoBackend, 3)],
            fill: vec![Fill { map: "CONNTRACK", rows: 8, max: 131_072 }],
            full: vec![Full { map: "SERVICES", max: 8, most: 8, missing: 3 }],
            evicting: vec![Evicting { map: "AFFINITY", rows: 7, max: 8 }],
            programs: vec![("socket", "a \"b\"".to_owned())],
            rounds,
        };
        let text = metrics.text();
        for line in [
            "# TYPE dataplane_dropped_total counter",
            "dataplane_dropped_total{reason=\"service has no ready endpoint\"} 3",
            "dataplane_map_rows{map=\"CONNTRACK\"} 8",
            "dataplane_map_max_rows{map=\"CONNTRACK\"} 131072",
            "dataplane_map_missing_rows{map=\"SERVICES\"} 3",
            "dataplane_map_evicting_rows{map=\"AFFINITY\"} 7",
            "dataplane_program_attached{path=\"socket\",program=\"a \\\"b\\\"\"} 1",
            "dataplane_programming_seconds_sum 2.5",
            "dataplane_programming_seconds_count 2",
            "dataplane_programming_last_seconds 0.001",
            "dataplane_programming_failed_total 1",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} not in\n{text}");
        }
    }
}
