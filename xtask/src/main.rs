//! Flags to commands; nothing else happens here.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::{bench, build_ebpf, ci, down, image, paths::Paths, prove, stop, test, tidy, up};

/// The project's own commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// From nothing to a cluster of virtual machines with the proven sample.
    Up(up::Wish),
    /// On the cluster that `up` made: limits, deletion under load and killed agents, each with its figures.
    Prove,
    /// Ends the local cluster and removes what it stored.
    Down {
        /// The cluster of `test` instead, which `--keep` or an interruption has left.
        #[arg(long)]
        tests: bool,
    },
    /// Runs the tests: all that this machine can run, or one kind.
    Test(test::Wish),
    /// Builds the eBPF object; prints its size and each program's instructions.
    BuildEbpf(build_ebpf::Wish),
    /// Side-by-side measurements.
    Bench(bench::Wish),
    /// OCI archives of the programs and of the sample's images.
    Image {
        /// Architecture of the images.
        #[arg(long, default_value = "amd64")]
        arch: String,
    },
    /// Checks sizes, dependency arrows, names and leftovers.
    Tidy,
    /// What CI runs, in order.
    Ci,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the one place where errors are shown")]
            {
                eprintln!("error: {error:#}");
            }
            stop::exit_code(&error)
        }
    }
}

fn run(command: Command) -> Result<()> {
    let paths = Paths::new();
    match command {
        Command::Up(wish) => up::up(&paths, &wish),
        Command::Prove => prove::prove(&paths),
        Command::Down { tests: false } => down::down(&paths),
        Command::Down { tests: true } => down::down(&Paths::for_tests()),
        Command::Test(wish) => test::test(&paths, &wish),
        Command::BuildEbpf(wish) => build_ebpf::build_ebpf(&paths, wish),
        Command::Bench(wish) => bench::bench(&paths, &wish),
        Command::Image { arch } => image::image(&paths, &arch),
        Command::Tidy => tidy::tidy(&paths),
        Command::Ci => ci::ci(&paths),
    }
}
