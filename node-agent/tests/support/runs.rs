//! How long random tests run.

/// Cases of a random test: `ORLOP_CASES`, else so many, on an emulated processor a tenth of them.
pub(crate) fn cases(usual: usize) -> usize {
    number("ORLOP_CASES").unwrap_or_else(|| if is_emulated() { usual / 10 } else { usual })
}

/// Whether this runs on an emulated processor, some ten times slower.
pub(crate) fn is_emulated() -> bool {
    std::env::var_os("ORLOP_EMULATED").is_some()
}

/// Where chance begins: `ORLOP_SEED`, else always the same.
pub(crate) fn seed() -> u64 {
    number("ORLOP_SEED").map_or(1, |seed| u64::try_from(seed).unwrap())
}

fn number(name: &str) -> Option<usize> {
    let value = std::env::var_os(name)?;
    Some(value.to_str().unwrap().parse().expect("a number of cases"))
}
