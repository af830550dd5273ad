//! `prove`: on the cluster that `up` made, what costs minutes to show: limits are kept, and what is killed or deleted
//! under load costs no request.

use anyhow::{Context as _, Result};

use crate::{cluster::Cluster, paths::Paths, proof, step, stop::impossible};

/// Runs each proof on the running cluster and prints what it showed; ends at the first that fails.
///
/// # Errors
/// Exit code 3 when no cluster runs; else which proof failed and by what.
pub fn prove(paths: &Paths) -> Result<()> {
    let cluster = Cluster::running(paths)
        .ok_or_else(|| impossible("no cluster runs here: start one with `cargo xtask up`"))?;
    for part in &proof::PARTS {
        step(part.title);
        let shown = (part.run)(paths, &cluster).with_context(|| part.title)?;
        println!("    {shown}");
    }
    println!("\n{} proofs, all passed", proof::PARTS.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cluster_it_says_how_to_get_one() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths { cluster: folder.path().to_owned(), ..Paths::new() };
        let error = prove(&paths).unwrap_err().to_string();
        assert!(error.contains("`cargo xtask up`"), "{error}");
    }
}
