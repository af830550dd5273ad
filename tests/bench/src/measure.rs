//! Interleaved rounds over lanes that carry traffic. Effects.

use anyhow::{Context as _, Result};

use super::{
    report::{Lane, Sample},
    traffic::Worker,
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub rounds: u32,
    /// Transactions of a kind in a round.
    pub transactions: u32,
    /// Milliseconds of bulk transfer in a round.
    pub bulk_ms: u32,
}

impl Effort {
    /// Many short rounds: neighbours on the machine disturb both of a pair or neither.
    #[must_use]
    pub const fn new(quick: bool) -> Self {
        if quick {
            Self { rounds: 15, transactions: 400, bulk_ms: 50 }
        } else {
            Self { rounds: 61, transactions: 800, bulk_ms: 150 }
        }
    }
}

/// The two ends of one lane's traffic.
#[derive(Debug)]
pub struct Ends {
    pub client: Worker,
    pub server: Worker,
}

/// What one order is called, and the metrics that it fills.
struct Kind {
    order: &'static str,
    p50: &'static str,
    p99: &'static str,
    cpu: &'static str,
}

const KINDS: [Kind; 2] = [
    Kind { order: "crr", p50: "crr_p50", p99: "crr_p99", cpu: "cpu_per_transaction" },
    Kind { order: "rr", p50: "rr_p50", p99: "rr_p99", cpu: "cpu_per_rr" },
];

/// Runs the rounds. Within a round each kind of traffic goes through all lanes, one after the other,
/// so that the samples of a pair lie close together in time.
///
/// # Errors
/// When traffic fails.
pub fn rounds(lanes: &[Lane], ends: &mut [Ends], effort: Effort) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for round in 0..effort.rounds {
        // Every other round goes backwards, so that no lane always runs after the same other.
        let mut order: Vec<usize> = (0..lanes.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for kind in KINDS {
            for lane in &order {
                let ends = ends.get_mut(*lane).context("a lane has its ends")?;
                latency(ends, &kind, (*lane, round), effort, &mut samples)?;
            }
        }
        for lane in &order {
            let ends = ends.get_mut(*lane).context("a lane has its ends")?;
            bulk(ends, (*lane, round), effort, &mut samples)?;
        }
    }
    Ok(samples)
}

fn latency(
    ends: &mut Ends,
    kind: &Kind,
    (lane, round): (usize, u32),
    effort: Effort,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    let before = ends.server.cpu_ns()?;
    let shown = ends.client.measure(&format!("{} {}", kind.order, effort.transactions))?;
    let cpu = shown.cpu_ns + ends.server.cpu_ns()?.saturating_sub(before);
    let each = micros(cpu) / f64::from(effort.transactions);
    for (metric, value) in
        [(kind.p50, micros(shown.p50_ns)), (kind.p99, micros(shown.p99_ns)), (kind.cpu, each)]
    {
        samples.push(Sample { lane, round, metric, unit: "us", value });
    }
    Ok(())
}

fn bulk(
    ends: &mut Ends,
    (lane, round): (usize, u32),
    effort: Effort,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    let before = ends.server.cpu_ns()?;
    let shown = ends.client.bulk(&format!("bulk {}", effort.bulk_ms))?;
    let cpu = shown.cpu_ns + ends.server.cpu_ns()?.saturating_sub(before);
    let bits_per_second = float(shown.bytes) * 8e9 / float(shown.elapsed_ns.max(1));
    let ns_per_byte = float(cpu) / float(shown.bytes.max(1));
    for (metric, unit, value) in
        [("throughput", "bit/s", bits_per_second), ("cpu_per_byte", "ns", ns_per_byte)]
    {
        samples.push(Sample { lane, round, metric, unit, value });
    }
    Ok(())
}

fn micros(ns: u64) -> f64 {
    float(ns) / 1000.0
}

/// As a floating-point number.
#[expect(clippy::cast_precision_loss, clippy::as_conversions, reason = "far below 2^52")]
#[must_use]
pub const fn float(value: u64) -> f64 {
    value as f64
}
