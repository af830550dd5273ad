//! The two ways a command ends early on purpose: wrong input (exit code 2) and an environment in which
//! it cannot work (exit code 3). Each is one clear line.

use std::{error::Error, fmt, process::ExitCode};

/// Ends the command with `code` and one line on stderr.
#[derive(Debug)]
pub struct Stop {
    code: u8,
    line: String,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl Error for Stop {}

/// The caller asked for something that does not exist.
pub(crate) fn wrong_input(line: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Stop { code: 2, line: line.into() })
}

/// This machine lacks something that cannot be put there by this command.
pub(crate) fn impossible(line: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Stop { code: 3, line: line.into() })
}

/// The exit code for `error`: that of the `Stop` in its chain, else 1.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Stop>())
        .map_or(ExitCode::FAILURE, |stop| ExitCode::from(stop.code))
}
