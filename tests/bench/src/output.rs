//! What every benchmark leaves: a table on standard output, JSON and a chart if asked for. Effects.

use std::{io::Write as _, path::PathBuf};

use anyhow::{Context as _, Result};

use super::{
    chart::{self, Chart},
    report::{self, Row},
};

/// Where results go beside standard output.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Output {
    /// Writes the rows here as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Draws them here as SVG.
    #[arg(long)]
    pub svg: Option<PathBuf>,
}

impl Output {
    /// Prints the rows, and writes what was asked for; `chart` is given kernel and date.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(
        &self,
        bench: &str,
        rows: &[Row],
        chart: impl FnOnce(&str) -> Chart,
    ) -> Result<()> {
        let text = format!("{}\n{}\n", machine(), report::table(rows));
        std::io::stdout().write_all(text.as_bytes()).context("print")?;
        if let Some(path) = &self.json {
            let text = serde_json::to_string_pretty(&report::json(bench, rows))?;
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        }
        if let Some(path) = &self.svg {
            let text = chart::svg(&chart(&machine()));
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Says how far a benchmark is, on standard error.
#[expect(clippy::print_stderr, reason = "progress for a person, beside the results")]
pub fn progress(words: &str) {
    eprintln!("  {words}");
}

/// Date, kernel, cores and load: what the numbers depend on beside the code.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("?");
    let date = jiff::Timestamp::now().strftime("%Y-%m-%d");
    format!("{date}, Linux {kernel}, {cores} cores, load average {load} at the end")
}
