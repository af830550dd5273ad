//! `bench`: checks what is asked for and runs the measuring program, built for release.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    exec::{cmd, run},
    paths::Paths,
    setup::{self, Need},
    step,
    stop::{impossible, wrong_input},
};

/// What `--against` may name for `lb`; `orlop` is always measured.
const PEERS: [&str; 2] = ["direct", "iptables"];

/// What was asked for.
#[derive(Debug, clap::Args)]
pub struct Wish {
    /// What to measure: lb.
    pub name: String,
    /// Peers to measure beside Orlop; default: all that the machine has.
    #[arg(long, value_delimiter = ',')]
    pub against: Option<Vec<String>>,
    /// Numbers of services; default: 1, 1000 and, without --quick, 10000.
    #[arg(long, value_delimiter = ',')]
    pub services: Option<Vec<u32>>,
    /// Writes the rows here as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Fewer rounds and services.
    #[arg(long)]
    pub quick: bool,
}

/// Measures and prints a table; with `json` also writes the rows.
///
/// # Errors
/// Wrong input for unknown names; exit code 3 without root, as network namespaces need it.
pub fn bench(paths: &Paths, wish: &Wish) -> Result<()> {
    if wish.name != "lb" {
        return Err(wrong_input(format!("bench {}: no such benchmark; there is lb", wish.name)));
    }
    let mut subjects = vec!["orlop".to_owned()];
    for peer in wish.against.clone().unwrap_or_else(|| PEERS.map(str::to_owned).to_vec()) {
        if peer != "orlop" && !PEERS.contains(&peer.as_str()) {
            let offered = PEERS.join(", ");
            return Err(wrong_input(format!(
                "--against {peer}: no such peer; there are {offered}"
            )));
        }
        subjects.push(peer);
    }
    subjects.sort();
    subjects.dedup();
    let default = if wish.quick { vec![1, 1000] } else { vec![1, 1000, 10_000] };
    let services = wish.services.clone().unwrap_or(default);
    if let Some(zero) = services.iter().find(|count| !(1..=60_000).contains(*count)) {
        return Err(wrong_input(format!("--services {zero}: expected 1 to 60000")));
    }
    if !setup::is_root() {
        return Err(impossible("bench lb makes network namespaces: run it as root"));
    }
    setup::ensure(paths, &[Need::Ebpf, Need::Rules])?;
    step("build the measuring program for release");
    let services: Vec<String> = services.iter().map(u32::to_string).collect();
    let mut cargo = cmd("cargo", ["run", "--locked", "--release", "--quiet", "--package", "tests"]);
    cargo.args(["--bin", "bench-lb", "--", "run"]);
    cargo.args(["--against", &subjects.join(","), "--services", &services.join(",")]);
    if wish.quick {
        cargo.arg("--quick");
    }
    if let Some(json) = &wish.json {
        // The program runs in the workspace's root, the path is meant from here.
        cargo.arg("--json").arg(std::path::absolute(json)?);
    }
    run(cargo.current_dir(&paths.root))
}
