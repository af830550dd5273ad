//! One small static binary, by its arguments: per-pod shim, exec helper, CNI plugin. Single-threaded.
//!
//! `shim pod --dir DIR` leaves a shim behind that serves the pod whose `pod.json` lies in DIR;
//! `shim exec` runs a process in a running container.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

mod cni;
mod connection;
mod container;
mod exec;
mod log;
mod mount;
mod pod;
mod process;
mod record;
mod rootfs;
mod step;
mod sys;

fn main() -> ExitCode {
    // Runtimes execute the plugin by the name of its network and set this variable.
    let named =
        std::env::args_os().next().is_some_and(|name| name.as_encoded_bytes().ends_with(b"orlop"));
    if named || std::env::var_os("CNI_COMMAND").is_some() {
        return cni::run();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args.as_slice() {
        ["pod", "--dir", dir] => {
            pod::run(dir).map_err(|failure| format!("{}: {}", failure.step, failure.message))
        }
        ["exec"] => exec::run().map_err(|error| error.to_string()),
        _ => return refuse("usage: shim pod --dir DIR | shim exec", 2),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => refuse(&message, 1),
    }
}

fn refuse(message: &str, code: u8) -> ExitCode {
    // Where stderr is closed, the exit code says it.
    drop(writeln!(io::stderr(), "shim: {message}"));
    ExitCode::from(code)
}
