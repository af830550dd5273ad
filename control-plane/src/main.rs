//! Entry point: flags into a [`Config`], and the administrator's commands. Only wiring.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command talks to its terminal")]

use std::{
    error::Error,
    io::IsTerminal as _,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use control_plane::{
    admin::{Admin, AdminError},
    config::{Config, ControllerSet, NodeMasks},
    run::{RunError, run},
};
use ipnet::IpNet;
use jiff::SignedDuration;

/// Kubernetes API server, store, scheduler and controllers in one process.
#[derive(Debug, Parser)]
#[command(name = "control-plane", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the server until SIGTERM or SIGINT.
    Run(Box<RunArgs>),
    /// Makes a token with which nodes join, through the running server. Prints
    /// `<id>.<secret>.<sha256 of the CA certificate>`.
    Token {
        #[arg(long)]
        data_dir: PathBuf,
        /// How long it is good for, such as `24h` or `30m`; `0` for ever.
        #[arg(long, default_value = "24h", value_parser = parse_ttl)]
        ttl: SignedDuration,
    },
    /// Prints an administrator's kubeconfig.
    Kubeconfig {
        #[arg(long)]
        data_dir: PathBuf,
        /// Instead of the address that the running server bound.
        #[arg(long)]
        server: Option<String>,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Certificates, database and `run.json`; made when missing.
    #[arg(long)]
    data_dir: PathBuf,
    /// Where to listen; port 0 picks a free one.
    #[arg(long, default_value = "0.0.0.0:6443")]
    bind: SocketAddr,
    /// The address that nodes reach this server at; found by the route out when not given.
    #[arg(long)]
    advertise_address: Option<IpAddr>,
    /// One more name or address in the server's certificate; repeatable.
    #[arg(long)]
    tls_san: Vec<String>,
    /// ClusterIPs: one range, or one of each family with the preferred one first.
    #[arg(
        long,
        visible_alias = "service-cluster-ip-range",
        value_delimiter = ',',
        default_value = "10.96.0.0/16"
    )]
    service_cidr: Vec<IpNet>,
    /// Pod addresses, likewise.
    #[arg(long, value_delimiter = ',', default_value = "10.244.0.0/16")]
    cluster_cidr: Vec<IpNet>,
    /// Prefix length of one node's part of a single --cluster-cidr; 24 for IPv4 and 64 for IPv6 when not given.
    #[arg(long, conflicts_with_all = ["node_cidr_mask_size_ipv4", "node_cidr_mask_size_ipv6"])]
    node_cidr_mask_size: Option<u8>,
    /// The same of the IPv4 range.
    #[arg(long)]
    node_cidr_mask_size_ipv4: Option<u8>,
    /// The same of the IPv6 range.
    #[arg(long)]
    node_cidr_mask_size_ipv6: Option<u8>,
    /// Whether to schedule pods.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    scheduler: bool,
    /// Which controllers run, as in `*,-nodeipam`; empty for none.
    #[arg(long, default_value = "*", value_parser = ControllerSet::parse)]
    controllers: ControllerSet,
}

impl RunArgs {
    fn into_config(self) -> Config {
        let mut config = Config::new(self.data_dir);
        config.bind = self.bind;
        config.advertise_address = self.advertise_address;
        config.tls_san = self.tls_san;
        config.service_cidrs = self.service_cidr;
        config.cluster_cidrs = self.cluster_cidr;
        let masks = config.node_masks;
        let any = self.node_cidr_mask_size;
        config.node_masks = NodeMasks {
            v4: self.node_cidr_mask_size_ipv4.or(any).unwrap_or(masks.v4),
            v6: self.node_cidr_mask_size_ipv6.or(any).unwrap_or(masks.v6),
        };
        config.scheduler = self.scheduler;
        config.controllers = self.controllers;
        config
    }
}

fn parse_ttl(text: &str) -> Result<SignedDuration, String> {
    if text == "0" {
        return Ok(SignedDuration::ZERO);
    }
    match text.parse::<SignedDuration>() {
        Ok(ttl) if ttl.is_positive() => Ok(ttl),
        Ok(_) => Err("must be positive, such as 24h".to_owned()),
        Err(_not_a_duration) => Err("must be a duration such as 24h or 30m".to_owned()),
    }
}

/// Wrong input.
const USAGE: u8 = 2;
/// An environment in which it cannot work.
const ENVIRONMENT: u8 = 3;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            let text = error.to_string();
            let line: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).collect();
            eprintln!("{}", line.join(" "));
            return ExitCode::from(USAGE);
        }
        Err(help) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
    };
    match act(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => {
            eprintln!("error: {}", chain(&*error));
            ExitCode::from(code)
        }
    }
}

type Failure = (Box<dyn Error>, u8);

fn act(command: Command) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| -> Failure { (error.into(), ENVIRONMENT) })?;
    match command {
        Command::Run(args) => {
            let filter = tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_unset| "info".into());
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_ansi(std::io::stderr().is_terminal())
                .with_writer(std::io::stderr)
                .init();
            runtime.block_on(run(args.into_config())).map_err(|error| {
                let code = if matches!(error, RunError::Config(_)) { USAGE } else { ENVIRONMENT };
                (error.into(), code)
            })
        }
        Command::Token { data_dir, ttl } => {
            let ttl = (!ttl.is_zero()).then_some(ttl);
            let admin = Admin::open(&data_dir).map_err(admin_failure)?;
            println!("{}", runtime.block_on(admin.create_token(ttl)).map_err(admin_failure)?);
            Ok(())
        }
        Command::Kubeconfig { data_dir, server } => {
            let admin = Admin::open(&data_dir).map_err(admin_failure)?;
            print!("{}", admin.kubeconfig(server.as_deref()));
            Ok(())
        }
    }
}

fn admin_failure(error: AdminError) -> Failure {
    let code = match error {
        AdminError::NeverRan { .. } => USAGE,
        AdminError::RunFile { .. }
        | AdminError::Pki(_)
        | AdminError::Connect { .. }
        | AdminError::Http { .. }
        | AdminError::Refused { .. } => ENVIRONMENT,
    };
    (error.into(), code)
}

/// An error and its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
