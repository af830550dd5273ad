//! The CNI plugin: hands the runtime's request to the agent and prints its answer.
//!
//! Effects. It decides nothing but what to say when there is no agent: "try again later", which
//! makes the runtime repeat an `ADD` or a `DEL`. `VERSION` it answers itself.

use std::{
    env, io,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::ExitCode,
    time::Duration,
};

use serde_json::{Value, json};

/// Where the agent listens unless the configuration has `socket`.
const SOCKET: &str = "/run/orlop/cni.sock";

/// Longest configuration and longest answer.
const LIMIT_BYTES: u64 = 1 << 20;

/// The agent answers within its own limit of a few seconds; this is for one that hangs.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Error codes of the CNI specification.
const INVALID_ENVIRONMENT: u32 = 4;
const IO: u32 = 5;
const DECODE: u32 = 6;
const TRY_AGAIN_LATER: u32 = 11;
const NOT_AVAILABLE: u32 = 50;

struct Failure {
    code: u32,
    message: &'static str,
    details: String,
}

/// Runs the plugin with the environment and standard input that CNI gives it.
pub(crate) fn run() -> ExitCode {
    let mut config = Value::Null;
    let (failed, output) = match request(&mut config) {
        Ok((failed, output)) => (failed, output),
        Err(failure) => {
            let version = config.get("cniVersion").and_then(Value::as_str).unwrap_or("1.1.0");
            let mut error = json!({
                "cniVersion": version,
                "code": failure.code,
                "msg": failure.message,
            });
            if !failure.details.is_empty() {
                error["details"] = failure.details.into();
            }
            (true, error)
        }
    };
    if !output.is_null() && writeln!(io::stdout(), "{output}").is_err() {
        return ExitCode::FAILURE;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn request(config: &mut Value) -> Result<(bool, Value), Failure> {
    *config = read_config()?;
    let command = variable("CNI_COMMAND")?;
    match command.as_str() {
        "" => Err(failure(INVALID_ENVIRONMENT, "CNI_COMMAND is missing", String::new())),
        "VERSION" => Ok((false, version(config))),
        _ => ask(&command, config),
    }
}

fn read_config() -> Result<Value, Failure> {
    let mut bytes = Vec::new();
    io::stdin()
        .take(LIMIT_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| failure(IO, "cannot read standard input", error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        failure(DECODE, "failed to decode the network configuration", error.to_string())
    })
}

fn version(config: &Value) -> Value {
    // An answer in the caller's version when it is one of ours, as the specification wants.
    let supported = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    let asked = config.get("cniVersion").and_then(Value::as_str);
    let version = asked.filter(|version| supported.contains(version)).unwrap_or("1.1.0");
    json!({"cniVersion": version, "supportedVersions": supported})
}

fn ask(command: &str, config: &Value) -> Result<(bool, Value), Failure> {
    let socket = config.get("socket").and_then(Value::as_str).unwrap_or(SOCKET);
    let absent = if command == "STATUS" { NOT_AVAILABLE } else { TRY_AGAIN_LATER };
    let envelope = json!({
        "command": command,
        "containerId": variable("CNI_CONTAINERID")?,
        "netns": variable("CNI_NETNS")?,
        "ifname": variable("CNI_IFNAME")?,
        "args": variable("CNI_ARGS")?,
        "config": config,
    });
    let reply = exchange(socket, envelope.to_string().as_bytes()).map_err(|error| {
        failure(absent, "the Orlop agent does not answer", format!("{socket}: {error}"))
    })?;
    let reply: Value = serde_json::from_slice(&reply).map_err(|error| {
        failure(absent, "the Orlop agent broke off", format!("{socket}: {error}"))
    })?;
    // An answer without a verdict is no success.
    let failed = reply.get("failed").and_then(Value::as_bool).unwrap_or(true);
    Ok((failed, reply.get("output").cloned().unwrap_or(Value::Null)))
}

fn exchange(socket: &str, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut reply = Vec::new();
    stream.take(LIMIT_BYTES).read_to_end(&mut reply)?;
    Ok(reply)
}

#[expect(clippy::disallowed_methods, reason = "CNI hands over its parameters in the environment")]
fn variable(name: &str) -> Result<String, Failure> {
    match env::var(name) {
        Ok(value) => Ok(value),
        Err(env::VarError::NotPresent) => Ok(String::new()),
        Err(env::VarError::NotUnicode(value)) => {
            let details = format!("{name}={}", value.display());
            Err(failure(INVALID_ENVIRONMENT, "an environment variable is no text", details))
        }
    }
}

const fn failure(code: u32, message: &'static str, details: String) -> Failure {
    Failure { code, message, details }
}
