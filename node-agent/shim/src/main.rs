//! One small static binary, by its arguments: per-pod shim, exec helper, CNI plugin. Single-threaded.

mod cni;

use std::process::ExitCode;

fn main() -> ExitCode {
    // Runtimes execute the plugin by the name of its network and set this variable.
    let named =
        std::env::args_os().next().is_some_and(|name| name.as_encoded_bytes().ends_with(b"orlop"));
    if named || std::env::var_os("CNI_COMMAND").is_some() {
        return cni::run();
    }
    ExitCode::from(2)
}
