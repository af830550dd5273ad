//! `bench`: checks what is asked for and runs the measuring program, built for speed.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    exec::{cmd, run},
    image::{self, Profile},
    paths::Paths,
    setup::{self, Need},
    step,
    stop::{impossible, wrong_input},
};

/// A benchmark and what may be asked of it.
struct Bench {
    name: &'static str,
    /// What `--against` may name; Orlop itself is always measured.
    peers: &'static [&'static str],
    /// Numbers of services measured by default: with `--quick`, without. Empty: `--services` means nothing.
    services: [&'static [u32]; 2],
    /// Further numbers for Orlop alone, without `--quick` and `--services`.
    more_services: &'static [u32],
}

const BENCHES: [Bench; 5] = [
    Bench {
        name: "lb",
        peers: &["direct", "iptables", "nftables"],
        services: [&[1, 1000], &[1, 1000, 10_000]],
        more_services: &[100_000],
    },
    Bench {
        name: "packets",
        peers: &["iptables", "nftables"],
        services: [&[], &[]],
        more_services: &[],
    },
    Bench {
        name: "programming",
        peers: &["iptables", "nftables"],
        services: [&[1000, 10_000], &[1000, 10_000, 50_000]],
        more_services: &[],
    },
    Bench {
        name: "overlay",
        peers: &["direct", "kernel-vxlan"],
        services: [&[], &[]],
        more_services: &[],
    },
    Bench { name: AGENT, peers: &[], services: [&[1000], &[30_000]], more_services: &[] },
];

/// The benchmark of the whole agent, which runs the programs that nodes run.
const AGENT: &str = "agent";

/// Services that the service network and the maps have room for.
const SERVICES_MAX: u32 = 100_000;

/// What was asked for.
#[derive(Debug, clap::Args)]
pub struct Wish {
    /// What to measure: lb, packets (the part of lb without sockets), programming, overlay or agent.
    pub name: String,
    /// Peers to measure beside Orlop; default: all that the machine has.
    #[arg(long, value_delimiter = ',')]
    pub against: Option<Vec<String>>,
    /// Numbers of services; default: 1, 1000 and, without --quick, 10000, and 100000 for Orlop.
    #[arg(long, value_delimiter = ',')]
    pub services: Option<Vec<u32>>,
    /// Endpoints of each service, for agent; default: 4.
    #[arg(long)]
    pub endpoints: Option<u32>,
    /// Writes the rows here as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Draws them here as SVG.
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// Fewer rounds and services.
    #[arg(long)]
    pub quick: bool,
}

/// Measures and prints a table; with `json` also writes the rows.
///
/// # Errors
/// Wrong input for unknown names; exit code 3 without root, as network namespaces need it.
pub fn bench(paths: &Paths, wish: &Wish) -> Result<()> {
    let flags = flags(wish)?;
    if !setup::is_root() {
        let name = &wish.name;
        return Err(impossible(format!("bench {name} makes network namespaces: run it as root")));
    }
    setup::ensure(paths, &[Need::Ebpf, Need::Rules])?;
    let programs =
        (wish.name == AGENT).then(|| image::programs(paths, Profile::Fast)).transpose()?;
    step("build the measuring program");
    // Not for release, whose link-time optimisation takes longer than the measurement: what is
    // measured is mostly the kernel.
    let mut cargo = cmd("cargo", ["run", "--locked", "--profile", "fast", "--quiet"]);
    cargo.args(["--package", "bench", "--"]).args(&flags);
    if let Some(programs) = &programs {
        cargo.arg("--node-agent").arg(&programs.node_agent);
        cargo.arg("--control-plane").arg(&programs.control_plane);
    }
    for (flag, path) in [("--json", &wish.json), ("--svg", &wish.svg)] {
        if let Some(path) = path {
            // The program runs in the workspace's root, the path is meant from here.
            cargo.arg(flag).arg(std::path::absolute(path)?);
        }
    }
    run(cargo.current_dir(&paths.root))
}

/// The measuring program's command line, but for paths.
fn flags(wish: &Wish) -> Result<Vec<String>> {
    let bench = BENCHES.iter().find(|bench| bench.name == wish.name).ok_or_else(|| {
        let names: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        let names = names.join(", ");
        wrong_input(format!("bench {}: no such benchmark; there are {names}", wish.name))
    })?;
    let mut flags = vec![bench.name.to_owned(), "--against".to_owned(), subjects(bench, wish)?];
    let [quick, full] = bench.services;
    let default = if wish.quick { quick } else { full };
    if wish.services.is_some() && default.is_empty() {
        return Err(wrong_input(format!("--services: bench {} has no services", bench.name)));
    }
    let services = wish.services.as_deref().unwrap_or(default);
    if let Some(count) = services.iter().find(|count| !(1..=SERVICES_MAX).contains(*count)) {
        return Err(wrong_input(format!("--services {count}: expected 1 to {SERVICES_MAX}")));
    }
    flags.extend(numbers("--services", services));
    if let Some(endpoints) = wish.endpoints {
        if bench.name != AGENT {
            let text = format!("--endpoints: bench {} has its own numbers", bench.name);
            return Err(wrong_input(text));
        }
        flags.extend(numbers("--endpoints", &[endpoints]));
    }
    if wish.services.is_none() && !wish.quick {
        flags.extend(numbers("--more-services", bench.more_services));
    }
    if wish.quick {
        flags.push("--quick".to_owned());
    }
    Ok(flags)
}

fn subjects(bench: &Bench, wish: &Wish) -> Result<String> {
    let mut subjects = vec!["orlop"];
    let peers = wish.against.as_deref();
    for peer in peers.into_iter().flatten().map(String::as_str) {
        if peer != "orlop" && !bench.peers.contains(&peer) {
            let offered = bench.peers.join(", ");
            return Err(wrong_input(format!(
                "--against {peer}: no such peer; there are {offered}"
            )));
        }
        subjects.push(peer);
    }
    if peers.is_none() {
        subjects.extend(bench.peers);
    }
    subjects.sort_unstable();
    subjects.dedup();
    Ok(subjects.join(","))
}

fn numbers(flag: &str, values: &[u32]) -> Vec<String> {
    if values.is_empty() {
        return Vec::new();
    }
    let values: Vec<String> = values.iter().map(u32::to_string).collect();
    vec![flag.to_owned(), values.join(",")]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(name: &str) -> Wish {
        let (against, services, endpoints) = (None, None, None);
        let (name, json, svg) = (name.into(), None, None);
        Wish { name, against, services, endpoints, json, svg, quick: false }
    }

    #[test]
    fn defaults_are_every_peer_and_the_usual_numbers() {
        let full = flags(&wish("lb")).unwrap().join(" ");
        assert_eq!(
            full,
            "lb --against direct,iptables,nftables,orlop --services 1,1000,10000 \
             --more-services 100000"
        );
        let quick = flags(&Wish { quick: true, ..wish("lb") }).unwrap().join(" ");
        assert_eq!(quick, "lb --against direct,iptables,nftables,orlop --services 1,1000 --quick");
    }

    #[test]
    fn wrong_names_and_numbers_are_refused_with_what_would_be_right() {
        let refused = |wish: Wish| flags(&wish).unwrap_err().to_string();
        assert!(
            refused(wish("speed")).contains("there are lb, packets, programming, overlay, agent")
        );
        let peer = Wish { against: Some(vec!["ipvs".into()]), ..wish("lb") };
        assert!(refused(peer).contains("there are direct, iptables, nftables"));
        let none = Wish { services: Some(vec![0]), ..wish("lb") };
        assert!(refused(none).contains("expected 1 to 100000"));
        let each = Wish { endpoints: Some(2), ..wish("programming") };
        assert!(refused(each).contains("has its own numbers"));
    }
}
