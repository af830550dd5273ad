//! Rows into a picture: panels of lines or bars as SVG that reads well on light and dark pages. Pure.

use std::fmt::Write as _;

use super::report::number;

/// A picture of panels side by side.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    pub title: String,
    /// Under the title: command, kernel, date.
    pub note: String,
    pub panels: Vec<Panel>,
}

/// One set of axes.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What is shown, with its unit.
    pub title: String,
    pub content: Content,
}

/// What stands between the axes.
#[derive(Clone, Debug)]
pub enum Content {
    /// A line a series over a logarithmic axis; `log_y` makes the other one logarithmic too.
    Lines { x_title: String, log_y: bool, series: Vec<Series> },
    /// A bar a value, labelled, from zero.
    Bars(Vec<Bar>),
}

/// A named line.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    /// Its one value is drawn across the whole panel, as what the others are compared with.
    pub across: bool,
    /// Decides the colour.
    pub subject: &'static str,
    pub points: Vec<(f64, f64)>,
}

/// A named value.
#[derive(Clone, Debug)]
pub struct Bar {
    pub name: String,
    /// Decides the colour.
    pub subject: &'static str,
    pub value: f64,
}

/// Size of a panel's place, and of the frame inside it.
const PANEL: (f64, f64) = (430.0, 330.0);
const FRAME: Frame = Frame { left: 62.0, top: 46.0, width: 340.0, height: 200.0 };
/// Room for title and note.
const HEAD: f64 = 74.0;

#[derive(Clone, Copy)]
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

/// Colours by subject: on light pages, on dark ones.
const COLOURS: [(&str, &str, &str); 6] = [
    ("orlop", "#0b7a75", "#2dd4bf"),
    ("direct", "#6b7280", "#9ca3af"),
    ("iptables", "#c2410c", "#fb923c"),
    ("nftables", "#6d28d9", "#a78bfa"),
    ("kernel-vxlan", "#b45309", "#fbbf24"),
    ("", "#374151", "#d1d5db"),
];

/// The picture as an SVG file.
#[must_use]
pub fn svg(chart: &Chart) -> String {
    // Four are two rows of two, else a page is too narrow for them.
    let count = u32::try_from(chart.panels.len()).unwrap_or(1).max(1);
    let in_row = if count == 4 { 2 } else { count };
    let rows = count.div_ceil(in_row);
    let (width, height) = (PANEL.0 * f64::from(in_row) + 16.0, HEAD + PANEL.1 * f64::from(rows));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" role=\"img\">\n<title>{}</title>\n{}\
         <rect class=\"page\" width=\"{width}\" height=\"{height}\" rx=\"8\"/>\n",
        escape(&chart.title),
        style()
    );
    text(&mut out, "title", (20.0, 32.0), &chart.title);
    text(&mut out, "note", (20.0, 54.0), &chart.note);
    for (panel, n) in chart.panels.iter().zip(0_u32..) {
        let x = 8.0 + PANEL.0 * f64::from(n % in_row);
        let y = HEAD + PANEL.1 * f64::from(n / in_row);
        line(&mut out, format_args!("<g transform=\"translate({x} {y})\">"));
        text(&mut out, "panel", (12.0, 24.0), &panel.title);
        match &panel.content {
            Content::Lines { x_title, log_y, series } => lines(&mut out, x_title, *log_y, series),
            Content::Bars(bars) => columns(&mut out, bars),
        }
        line(&mut out, format_args!("</g>"));
    }
    out.push_str("</svg>\n");
    out
}

fn style() -> String {
    let (mut light, mut dark) = (String::new(), String::new());
    for (subject, on_light, on_dark) in COLOURS {
        for (out, colour) in [(&mut light, on_light), (&mut dark, on_dark)] {
            line(out, format_args!("{0}{{stroke:{colour};fill:{colour}}}", class(subject)));
        }
    }
    format!(
        "<style>\ntext{{font:12px system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1f2937}}\n\
         .title{{font-size:18px;font-weight:600}}.note{{font-size:11px;fill:#6b7280}}\
         .panel{{font-size:13px;font-weight:600}}.small{{font-size:11px}}.mid{{text-anchor:middle}}\
         .end{{text-anchor:end}}\n.page{{fill:#fff}}.grid{{stroke:#e5e7eb}}.axis{{stroke:#9ca3af}}\n\
         polyline{{fill:none!important;stroke-width:2.2;stroke-linejoin:round}}\
         .across{{stroke-dasharray:6 4;stroke-width:1.6}}\n{light}\
         @media (prefers-color-scheme:dark){{text{{fill:#e5e7eb}}.note{{fill:#9ca3af}}.page{{fill:#0d1117}}\
         .grid{{stroke:#21262d}}.axis{{stroke:#6b7280}}\n{dark}}}\n</style>\n"
    )
}

/// The style class of a subject, as a selector of its marks (not of its text).
fn class(subject: &str) -> String {
    let name = name(subject);
    format!("polyline.{name},line.{name},circle.{name},rect.{name}")
}

fn name(subject: &str) -> String {
    let known = COLOURS.iter().any(|(one, _, _)| *one == subject);
    format!("c-{}", if known && !subject.is_empty() { subject } else { "other" })
}

fn lines(out: &mut String, x_title: &str, log_y: bool, series: &[Series]) {
    let all = || series.iter().flat_map(|one| one.points.iter());
    let wide = || series.iter().filter(|one| !one.across).flat_map(|one| &one.points);
    let x_axis = Axis::logarithmic(wide().map(|(x, _)| *x));
    let values = all().map(|(_, y)| *y);
    let y_axis = if log_y { Axis::logarithmic(values) } else { Axis::linear(values) };
    horizontal_grid(out, &y_axis);
    let bottom = FRAME.top + FRAME.height;
    for tick in x_axis.ticks() {
        let x = FRAME.left + x_axis.place(tick) * FRAME.width;
        line(
            out,
            format_args!(
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{bottom}\"/>",
                FRAME.top
            ),
        );
        text(out, "small mid", (x, bottom + 16.0), &short(tick));
    }
    let middle = FRAME.left + FRAME.width / 2.0;
    text(out, "small mid", (middle, bottom + 33.0), x_title);
    for one in series {
        draw(out, one, &x_axis, &y_axis);
    }
    legend(out, series);
}

fn draw(out: &mut String, series: &Series, x_axis: &Axis, y_axis: &Axis) {
    let class = name(series.subject);
    let y_at = |y: f64| FRAME.top + (1.0 - y_axis.place(y)) * FRAME.height;
    if let (true, [(_, y), ..]) = (series.across, &series.points[..]) {
        let (x1, x2, y) = (FRAME.left, FRAME.left + FRAME.width, y_at(*y));
        line(
            out,
            format_args!(
                "<line class=\"{class} across\" x1=\"{x1}\" x2=\"{x2}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
            ),
        );
        return;
    }
    let places: Vec<(f64, f64)> = series
        .points
        .iter()
        .map(|(x, y)| (FRAME.left + x_axis.place(*x) * FRAME.width, y_at(*y)))
        .collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    line(out, format_args!("<polyline class=\"{class}\" points=\"{}\"/>", path.join(" ")));
    for (x, y) in places {
        line(
            out,
            format_args!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.4\"/>"),
        );
    }
}

/// Names under the panel, two in a row.
fn legend(out: &mut String, series: &[Series]) {
    for (one, n) in series.iter().zip(0_u32..) {
        let x = FRAME.left + f64::from(n % 3) * 118.0 - 10.0;
        let y = FRAME.top + FRAME.height + 52.0 + f64::from(n / 3) * 17.0;
        let (class, end, above) = (name(one.subject), x + 16.0, y - 4.0);
        line(
            out,
            format_args!(
                "<line class=\"{class}\" stroke-width=\"3\" x1=\"{x}\" x2=\"{end}\" y1=\"{above}\" y2=\"{above}\"/>"
            ),
        );
        text(out, "small", (x + 21.0, y), &one.name);
    }
}

fn columns(out: &mut String, bars: &[Bar]) {
    let axis = Axis::linear(bars.iter().map(|bar| bar.value));
    horizontal_grid(out, &axis);
    let count = u32::try_from(bars.len()).unwrap_or(1).max(1);
    let step = FRAME.width / f64::from(count);
    let bottom = FRAME.top + FRAME.height;
    for (bar, n) in bars.iter().zip(0_u32..) {
        let middle = FRAME.left + step * (f64::from(n) + 0.5);
        let height = axis.place(bar.value) * FRAME.height;
        let (width, y) = ((step * 0.62).min(64.0), bottom - height);
        let (class, x) = (name(bar.subject), middle - width / 2.0);
        line(
            out,
            format_args!(
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"2\"/>"
            ),
        );
        text(out, "small mid", (middle, y - 6.0), &short(bar.value));
        for (word, row) in bar.name.split('\n').zip(0_u32..) {
            text(out, "small mid", (middle, bottom + 16.0 + 14.0 * f64::from(row)), word);
        }
    }
}

fn horizontal_grid(out: &mut String, axis: &Axis) {
    let (x1, x2) = (FRAME.left, FRAME.left + FRAME.width);
    for tick in axis.ticks() {
        let y = FRAME.top + (1.0 - axis.place(tick)) * FRAME.height;
        let class = if tick <= axis.low { "axis" } else { "grid" };
        line(
            out,
            format_args!(
                "<line class=\"{class}\" x1=\"{x1}\" x2=\"{x2}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
            ),
        );
        text(out, "small end", (x1 - 7.0, y + 4.0), &short(tick));
    }
}

/// A scale from `low` to `high`.
#[derive(Clone, Debug, PartialEq)]
struct Axis {
    low: f64,
    high: f64,
    /// Distance of ticks; on a logarithmic axis ticks are the powers of ten.
    step: Option<f64>,
}

impl Axis {
    /// From zero to a round number above all values.
    fn linear(values: impl Iterator<Item = f64>) -> Self {
        let top = values.fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.08;
        let magnitude = 10_f64.powf((top / 5.0).log10().floor());
        let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * magnitude);
        let step = steps.into_iter().find(|step| top / step <= 5.0).unwrap_or(magnitude * 10.0);
        Self { low: 0.0, high: (top / step).ceil() * step, step: Some(step) }
    }

    /// From a power of ten below all values to one above.
    fn logarithmic(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values
            .filter(|value| *value > 0.0)
            .fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), value| {
                (low.min(value), high.max(value))
            });
        if low > high {
            return Self { low: 1.0, high: 10.0, step: None };
        }
        let (low, high) = (low.log10().floor(), high.log10().ceil());
        Self { low: 10_f64.powf(low), high: 10_f64.powf(high.max(low + 1.0)), step: None }
    }

    /// 0 at the low end, 1 at the high one.
    fn place(&self, value: f64) -> f64 {
        let place = match self.step {
            Some(_) => (value - self.low) / (self.high - self.low),
            None => (value / self.low).log10() / (self.high / self.low).log10(),
        };
        place.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        let mut ticks = vec![self.low];
        // At most 20: axes are made with five steps, or span a few powers of ten.
        while let (Some(last), true) = (ticks.last().copied(), ticks.len() < 20) {
            let next = self.step.map_or(last * 10.0, |step| last + step);
            if next > self.high * 1.000_001 {
                break;
            }
            ticks.push(next);
        }
        ticks
    }
}

/// `1.2 M`, `10 k`, `0.25`.
fn short(value: f64) -> String {
    let trimmed = |value: f64, unit: &str| {
        let digits = number(value);
        let digits = if digits.contains('.') {
            digits.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            digits
        };
        format!("{digits}{unit}")
    };
    match value.abs() {
        size if size >= 1e9 => trimmed(value / 1e9, " G"),
        size if size >= 1e6 => trimmed(value / 1e6, " M"),
        size if size >= 10_000.0 => trimmed(value / 1e3, " k"),
        _ => trimmed(value, ""),
    }
}

fn text(out: &mut String, class: &str, (x, y): (f64, f64), words: &str) {
    let words = escape(words);
    line(out, format_args!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"));
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn line(out: &mut String, words: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(out, "{words}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_and_hold_all_values() {
        let axis = Axis::linear([87.0, 261.0].into_iter());
        assert_eq!((axis.low, axis.high), (0.0, 300.0));
        assert_eq!(axis.ticks(), [0.0, 100.0, 200.0, 300.0]);
        let axis = Axis::logarithmic([3.0, 50_000.0].into_iter());
        assert_eq!(axis.ticks(), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
        assert!((axis.place(100.0) - 0.4).abs() < 1e-9);
    }

    #[test]
    fn every_series_is_drawn_and_words_are_escaped() {
        let series = |subject, points: &[(f64, f64)]| Series {
            name: format!("{subject} <1>"),
            across: subject == "direct",
            subject,
            points: points.to_vec(),
        };
        let lines =
            vec![series("direct", &[(1.0, 80.0)]), series("orlop", &[(1.0, 70.0), (1000.0, 70.0)])];
        let content = Content::Lines { x_title: "services".into(), log_y: false, series: lines };
        let panel = Panel { title: "p50, us".into(), content };
        let text = svg(&Chart { title: "a & b".into(), note: String::new(), panels: vec![panel] });
        assert_eq!(text.matches("<polyline").count(), 1);
        assert_eq!(text.matches("across\"").count(), 1);
        assert!(text.contains("orlop &lt;1&gt;") && text.contains("a &amp; b"));
        assert_eq!(text.matches("<g ").count(), text.matches("</g>").count());
    }
}
