//! Entry point: reads the command line and runs what it names.

use std::process::ExitCode;

use clap::Parser;
use node_agent::dns;

/// Orlop's node agent.
#[derive(Debug, Parser)]
#[command(version)]
enum Cli {
    /// Answers DNS queries of this node's pods; started by the agent itself.
    Dns(dns::ProcessArgs),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    match Cli::parse() {
        Cli::Dns(args) => match dns::process::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!(error = %chain(&error), "DNS server failed");
                ExitCode::from(3)
            }
        },
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
