//! Flags to commands; nothing else happens here.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use xtask::{bench, build_ebpf, ci, down, image, paths::Paths, stop, test, tidy, up};

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
    Up(Up),
    /// Ends the local cluster and removes what it stored.
    Down,
    /// Runs the tests: all that this machine can run, or one kind.
    Test(Test),
    /// Builds the eBPF object; prints its size and each program's instructions.
    BuildEbpf {
        /// Accepted for symmetry: the object is always optimised, as the verifier needs it so.
        #[arg(long)]
        release: bool,
    },
    /// Side-by-side measurements.
    Bench(Bench),
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

#[derive(Args)]
struct Up {
    /// Number of nodes; the first is the server.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// Architecture of the nodes.
    #[arg(long, default_value = "amd64")]
    arch: String,
    /// Kernel: a Debian series (6.1, 6.12) or a file.
    #[arg(long, default_value = up::DEFAULT_KERNEL)]
    kernel: String,
    /// Folder of the modules that belong to a kernel file.
    #[arg(long)]
    modules: Option<PathBuf>,
    /// Boots the VMs alone, without Orlop on them.
    #[arg(long)]
    bare: bool,
}

#[derive(Args)]
struct Test {
    /// Only what runs on this machine itself.
    #[arg(long, group = "kind")]
    host: bool,
    /// Only what runs in virtual machines.
    #[arg(long, group = "kind")]
    vm: bool,
    /// Everything; what cannot run is a failure.
    #[arg(long, group = "kind")]
    all: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

#[derive(Args)]
struct Bench {
    /// What to measure: lb.
    name: String,
    /// Peers to measure beside Orlop; default: all that the machine has.
    #[arg(long, value_delimiter = ',')]
    against: Option<Vec<String>>,
    /// Numbers of services.
    #[arg(long, value_delimiter = ',')]
    services: Option<Vec<u32>>,
    /// Writes the rows here as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fewer rounds and services.
    #[arg(long)]
    quick: bool,
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
        Command::Up(Up { nodes, arch, kernel, modules, bare }) => {
            up::up(&paths, &up::Wish { nodes, arch, kernel, modules, bare })
        }
        Command::Down => down::down(&paths),
        Command::Test(Test { host, vm, all, filter }) => {
            test::test(&paths, test::Kinds::from_flags(host, vm, all), filter.as_deref())
        }
        Command::BuildEbpf { release: _ } => build_ebpf::build_ebpf(&paths),
        Command::Bench(Bench { name, against, services, json, quick }) => {
            bench::bench(&paths, &bench::Wish { name, against, services, json, quick })
        }
        Command::Image { arch } => image::image(&paths, &arch),
        Command::Tidy => tidy::tidy(&paths),
        Command::Ci => ci::ci(&paths),
    }
}
