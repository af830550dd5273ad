//! Entry point: flags, logging, exit codes. Wrong input ends with 2, an impossible environment with 3.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand, ValueEnum};
use node_agent::{
    agent,
    chain::chain,
    config::RunArgs,
    debug, dns, listen,
    sheet::{List, Sheet},
    sys::memory,
    way,
};

/// The Orlop node agent.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent.
    Run {
        #[command(flatten)]
        args: Box<RunArgs>,
        /// YAML file with the same settings; flags win over it.
        #[arg(long)]
        config: Option<PathBuf>,
        /// Print the resulting configuration and end.
        #[arg(long)]
        print_config: bool,
    },
    /// Run this node's DNS server (started by `run`).
    Dns {
        #[command(flatten)]
        args: dns::ProcessArgs,
    },
    /// Show what runs and what is wrong.
    Status(ReadArgs),
    /// Show every address and port at which services answer on this node, and who is behind it.
    Services {
        #[command(flatten)]
        read: ReadArgs,
        #[command(flatten)]
        object: ObjectArgs,
    },
    /// Show this node's pods as the packet path knows them, and the way to those of other nodes.
    Endpoints {
        #[command(flatten)]
        read: ReadArgs,
        #[command(flatten)]
        object: ObjectArgs,
    },
    /// Show the flows that are translated per packet.
    Conntrack {
        #[command(flatten)]
        read: ReadArgs,
        /// Only flows of this client: ADDRESS or ADDRESS:PORT.
        #[arg(long)]
        src: Option<String>,
        /// Only flows to this service address or backend: ADDRESS or ADDRESS:PORT.
        #[arg(long)]
        dst: Option<String>,
        /// Only flows of this service: NAME or NAMESPACE/NAME.
        #[arg(long)]
        service: Option<String>,
    },
    /// Show connections as they are opened, closed, dropped and refused.
    Flows {
        #[command(flatten)]
        read: ReadArgs,
        /// Until it is interrupted; otherwise for so many seconds.
        #[arg(short, long)]
        follow: bool,
        /// How long to listen without --follow.
        #[arg(long, default_value_t = 10)]
        seconds: u32,
        /// Only from this client: ADDRESS, ADDRESS:PORT, POD, NAMESPACE/POD or this node's name.
        #[arg(long)]
        from: Option<String>,
        /// Only to this service, pod, service address or backend: as --from.
        #[arg(long)]
        to: Option<String>,
        /// Only to this service: NAME or NAMESPACE/NAME.
        #[arg(long)]
        service: Option<String>,
        /// Only what became of it: opened, closed, dropped or refused.
        #[arg(long)]
        verdict: Option<String>,
    },
    /// Show why packets were dropped and connections refused, how often, and how often since the
    /// last time this was asked.
    Drops(ReadArgs),
    /// Show which way a connection would take, by running the programs without any effect.
    Trace {
        #[command(flatten)]
        read: ReadArgs,
        /// pod/NAME or pod/NAME.NAMESPACE of this node, node, or an ADDRESS outside.
        from: String,
        /// svc/NAME[.NAMESPACE]:PORT, pod/NAME[.NAMESPACE]:PORT or ADDRESS:PORT.
        to: String,
        /// tcp, udp or sctp.
        #[arg(long, default_value = "tcp")]
        protocol: String,
    },
}

#[derive(Debug, clap::Args)]
struct ReadArgs {
    /// How to print.
    #[arg(short, long, default_value = "text")]
    output: Output,
    /// Folder of the agent's sockets.
    #[arg(long, default_value = "/run/orlop")]
    run_dir: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ObjectArgs {
    /// Only this one: NAME or NAMESPACE/NAME.
    name: Option<String>,
    /// Only those of this namespace; otherwise those of all.
    #[arg(short, long)]
    namespace: Option<String>,
}

impl ObjectArgs {
    fn pairs(self) -> [(&'static str, Option<String>); 2] {
        [("namespace", self.namespace), ("name", self.name)]
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

const WRONG_INPUT: u8 = 2;
const IMPOSSIBLE: u8 = 3;

/// What is logged unless `RUST_LOG` says otherwise. The client's libraries tell each failed call up to three times, and
/// then whoever made it does, with the object.
const LOGGED: &str = "info,kube_client=off,kube_runtime=off";

fn main() -> ExitCode {
    memory::keep_small();
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_unset| tracing_subscriber::EnvFilter::new(LOGGED));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    // Fails only when a provider is installed already, which nobody else does.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    match cli.command {
        Command::Run { args, config, print_config } => run(*args, config.as_deref(), print_config),
        Command::Dns { args } => match dns::process::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&chain(&error), 1),
        },
        Command::Status(args) => read("status", &[], &args),
        Command::Services { read: args, object } => services(&object.pairs(), &args),
        Command::Endpoints { read: args, object } => read("endpoints", &object.pairs(), &args),
        Command::Conntrack { read: args, src, dst, service } => {
            read("conntrack", &[("src", src), ("dst", dst), ("service", service)], &args)
        }
        Command::Flows { read: args, follow, seconds, from, to, service, verdict } => {
            let seconds = (!follow).then(|| seconds.to_string());
            let wanted = [("from", from), ("to", to), ("service", service), ("verdict", verdict)];
            flows(&[&wanted[..], &[("seconds", seconds)]].concat(), &args)
        }
        Command::Drops(args) => read("drops", &[], &args),
        Command::Trace { read: args, from, to, protocol } => {
            let ends = [("from", Some(from)), ("to", Some(to)), ("protocol", Some(protocol))];
            read("trace", &ends, &args)
        }
    }
}

fn run(args: RunArgs, file: Option<&Path>, print_config: bool) -> ExitCode {
    let file = match file.map(RunArgs::read).transpose() {
        Ok(file) => file.unwrap_or_default(),
        Err(error) => return fail(&chain(&error), WRONG_INPUT),
    };
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let config = match args.over(file).parse(hostname.trim()) {
        Ok(config) => config,
        Err(error) => return fail(&chain(&error), WRONG_INPUT),
    };
    if print_config {
        return print(&format!("{config}\n"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start the runtime: {error}"), 1),
    };
    let ended = runtime.block_on(agent::run(config));
    // Blocking work that still hangs must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&chain(&error), error.exit_code()),
    }
}

/// A line of the debug socket's: a word, and what was given of its arguments.
fn question(what: &str, arguments: &[(&str, Option<String>)]) -> String {
    let given = arguments.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
    let words: Vec<String> = given.map(|(name, value)| format!(" {name}={value}")).collect();
    format!("{what}{}", words.concat())
}

fn silent(socket: &Path, error: &std::io::Error) -> ExitCode {
    let message = format!("the agent does not answer at {}: {error}", socket.display());
    fail(&message, IMPOSSIBLE)
}

/// Prints each event as it comes: a line of text, or of JSON.
fn flows(arguments: &[(&str, Option<String>)], args: &ReadArgs) -> ExitCode {
    let socket = args.run_dir.join("agent.sock");
    let mut end = ExitCode::SUCCESS;
    let each = |line: serde_json::Value| {
        if let Some(error) = line["error"].as_str() {
            end = fail(error, WRONG_INPUT);
            return false;
        }
        let text = match args.output {
            Output::Json => format!("{line}\n"),
            Output::Text => listen::text(&line),
        };
        print(&text) == ExitCode::SUCCESS
    };
    match debug::follow(&socket, &question(listen::QUESTION, arguments), each) {
        Ok(()) => end,
        Err(error) => silent(&socket, &error),
    }
}

/// Asks for a page after another and prints each as it comes.
fn services(arguments: &[(&str, Option<String>)], args: &ReadArgs) -> ExitCode {
    const WHAT: &str = "services";
    let socket = args.run_dir.join("agent.sock");
    let (mut list, mut sheet) = (List::default(), Sheet::of(WHAT));
    let mut next = None;
    loop {
        let asked = [arguments, &[("after", next)]].concat();
        let value = match debug::ask(&socket, &question(WHAT, &asked)) {
            Ok(value) => value,
            Err(error) => return silent(&socket, &error),
        };
        if let Some(error) = value["error"].as_str() {
            return fail(error, WRONG_INPUT);
        }
        let rows = value["rows"].as_array().map_or(&[][..], Vec::as_slice);
        let text = match (args.output, &mut sheet) {
            (Output::Text, Some(sheet)) => sheet.page(rows),
            (Output::Json, _) | (Output::Text, None) => list.page(rows),
        };
        next = value["next"].as_str().map(str::to_owned);
        let printed = print(&text);
        if next.is_none() || printed != ExitCode::SUCCESS {
            return match args.output {
                Output::Json if printed == ExitCode::SUCCESS => print(list.end()),
                Output::Json | Output::Text => printed,
            };
        }
    }
}

fn read(what: &str, arguments: &[(&str, Option<String>)], args: &ReadArgs) -> ExitCode {
    let socket = args.run_dir.join("agent.sock");
    let value = match debug::ask(&socket, &question(what, arguments)) {
        Ok(value) => value,
        Err(error) => return silent(&socket, &error),
    };
    if let Some(error) = value["error"].as_str() {
        return fail(error, WRONG_INPUT);
    }
    match (args.output, Sheet::of(what), value.as_array()) {
        (Output::Json, _, _) => print(&format!("{value:#}\n")),
        (Output::Text, _, Some(hops)) if what == "trace" => print(&way::text(hops)),
        (Output::Text, Some(mut sheet), Some(rows)) => print(&sheet.page(rows)),
        (Output::Text, _, _) => print(&debug::text(&value)),
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader went away, as `head` does.
        Err(_closed) => ExitCode::FAILURE,
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    // Nothing better can be done when even standard error is closed.
    let _written = writeln!(std::io::stderr(), "node-agent: {message}");
    ExitCode::from(code)
}
