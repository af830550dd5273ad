//! Answers of the debug socket as people read them: rows in columns that line up.
//!
//! Pure: rows in JSON in, text out.

use serde_json::Value;

/// Backends that stand in one line; `-o json` has them all.
const BACKENDS: usize = 8;

/// A table that is printed as its rows come. Columns keep their width from page to page, or get wider.
#[derive(Debug)]
pub struct Sheet {
    columns: &'static [&'static str],
    widths: Vec<usize>,
    has_head: bool,
}

impl Sheet {
    /// The table of a question's answers; `None` for those that are no table.
    #[must_use]
    pub fn of(question: &str) -> Option<Self> {
        Some(Self { columns: columns(question)?, widths: Vec::new(), has_head: false })
    }

    /// The text of some rows, the first time below the head.
    pub fn page(&mut self, rows: &[Value]) -> String {
        let mut lines: Vec<Vec<String>> = Vec::with_capacity(rows.len() + 1);
        if !std::mem::replace(&mut self.has_head, true) {
            let head = |column: &&str| column.replace('_', "-").to_uppercase();
            lines.push(self.columns.iter().map(head).collect());
        }
        lines
            .extend(rows.iter().map(|row| self.columns.iter().map(|one| cell(row, one)).collect()));
        self.widths.resize(self.columns.len(), 0);
        for (at, width) in self.widths.iter_mut().enumerate() {
            let longest = lines.iter().map(|line| line[at].chars().count()).max();
            *width = longest.unwrap_or(0).max(*width);
        }
        let line = |line: &Vec<String>| {
            let cells = line.iter().zip(&self.widths);
            let cells: Vec<String> = cells.map(|(cell, width)| format!("{cell:width$}")).collect();
            cells.join("   ").trim_end().to_owned() + "\n"
        };
        lines.iter().map(line).collect()
    }
}

/// Rows in JSON, as they come: one list, however many pages it takes.
#[derive(Debug, Default)]
pub struct List {
    has_rows: bool,
}

impl List {
    /// The text of some rows.
    pub fn page(&mut self, rows: &[Value]) -> String {
        let mut text = String::new();
        for row in rows {
            text += if std::mem::replace(&mut self.has_rows, true) { ",\n" } else { "[\n" };
            text += &format!("{row:#}");
        }
        text
    }

    /// What is left to say after the last one.
    #[must_use]
    pub const fn end(&self) -> &'static str {
        if self.has_rows { "\n]\n" } else { "[]\n" }
    }
}

fn columns(question: &str) -> Option<&'static [&'static str]> {
    match question {
        "conntrack" => Some(&[
            "protocol",
            "client",
            "asked",
            "source",
            "backend",
            "state",
            "idle_s",
            "expires_s",
        ]),
        "drops" => Some(&["count", "since_last", "reason"]),
        "services" => Some(&["service", "kind", "frontend", "backends", "notes"]),
        "endpoints" => Some(&["address", "pod", "node", "way"]),
        _ => None,
    }
}

fn cell(row: &Value, column: &str) -> String {
    match (column, &row[column]) {
        ("service", _) => format!("{}/{}", word(&row["namespace"]), word(&row["name"])),
        ("backends", backends) => self::backends(backends, &row["backends_left_out"]),
        ("notes", _) => notes(row),
        (_, value) => word(value),
    }
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

/// Strings of a list.
fn words(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn backends(list: &Value, left_out: &Value) -> String {
    let all = list.as_array().map_or(&[][..], Vec::as_slice);
    let backend = |one: &Value| format!("{} ({})", word(&one["address"]), word(&one["state"]));
    let mut told: Vec<String> = all.iter().take(BACKENDS).map(backend).collect();
    let rest = u64::try_from(all.len().saturating_sub(BACKENDS)).unwrap_or(u64::MAX);
    let rest = rest.saturating_add(left_out.as_u64().unwrap_or(0));
    if rest > 0 {
        told.push(format!("{rest} more"));
    }
    if told.is_empty() { "-".to_owned() } else { told.join(", ") }
}

/// What of a frontend is not as with most.
fn notes(row: &Value) -> String {
    let mut notes = Vec::new();
    if row["policy"] == "Local" {
        notes.push("policy Local".to_owned());
    }
    match row["affinity_s"].as_u64() {
        None | Some(0) => {}
        Some(seconds) => notes.push(format!("affinity {seconds} s")),
    }
    if row["source_ranges"].is_array() {
        let ranges: Vec<&str> = words(&row["source_ranges"]).collect();
        let ranges = if ranges.is_empty() { "nowhere".to_owned() } else { ranges.join(", ") };
        notes.push(format!("open to {ranges}"));
    }
    notes.extend(words(&row["problems"]).map(str::to_owned));
    notes.join("; ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_line_up_from_page_to_page() {
        let mut sheet = Sheet::of("drops").expect("columns");
        let row =
            |count, since, reason| json!({"count": count, "since_last": since, "reason": reason});
        assert_eq!(
            sheet.page(&[row(12, 0, "a b"), row(3, 3, "c")]),
            "COUNT   SINCE-LAST   REASON\n12      0            a b\n3       3            c\n"
        );
        assert_eq!(
            sheet.page(&[row(1_000_000, 0, "d"), row(1, 1, "e")]),
            "1000000   0            d\n1         1            e\n"
        );
        assert!(Sheet::of("trace").is_none());
    }

    #[test]
    fn pages_of_json_are_one_list() {
        let mut list = List::default();
        let text = list.page(&[json!({"a": 1}), json!(2)]) + &list.page(&[json!(3)]) + list.end();
        let whole: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(whole, json!([{"a": 1}, 2, 3]));
        assert_eq!(List::default().end(), "[]\n");
    }

    #[test]
    fn a_frontend_says_who_is_behind_it_and_what_is_special() {
        let backend =
            |last: u32| json!({"address": format!("10.244.1.{last}:80"), "state": "ready"});
        let plain = json!({
            "namespace": "d", "name": "web", "kind": "ClusterIP", "frontend": "10.96.0.1:80/TCP",
            "backends": (1..=10).map(backend).collect::<Vec<_>>(), "backends_left_out": 5,
            "policy": "Cluster", "affinity_s": 0, "source_ranges": null, "problems": [],
        });
        let special = json!({
            "namespace": "d", "name": "lb", "kind": "LoadBalancer", "frontend": "192.0.2.2:80/TCP",
            "backends": [], "policy": "Local", "affinity_s": 10_800,
            "source_ranges": ["10.0.0.0/8", "192.0.2.0/24"], "problems": ["spec.a: bad"],
        });
        let closed = json!({"source_ranges": []});
        let text = Sheet::of("services").expect("columns").page(&[plain, special]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("SERVICE   KIND           FRONTEND           BACKENDS"),
            "{text}"
        );
        assert!(
            lines[1]
                .starts_with("d/web     ClusterIP      10.96.0.1:80/TCP   10.244.1.1:80 (ready), ")
        );
        assert!(lines[1].ends_with("10.244.1.8:80 (ready), 7 more"), "{text}");
        assert!(
            lines[2].ends_with(
                " policy Local; affinity 10800 s; open to 10.0.0.0/8, 192.0.2.0/24; spec.a: bad"
            ),
            "{text}"
        );
        assert_eq!(notes(&closed), "open to nowhere");
    }
}
