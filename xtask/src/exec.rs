//! Runs other programs. An error names the program, its arguments and the end of what it said.

use std::{
    env,
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Lines of a failed program's output that are repeated in the error.
const TAIL_LINES: usize = 15;

/// A program with its arguments; the usual way to start a call. It does not see what `cargo run` says of this
/// program's package: a build that does begins anew (the build script of `ring` asks for these), and once more
/// when cargo is called by hand. Nor does it see a user's flags for the compiler: they would take the place of the
/// project's own, and what is not static does not run in VMs.
pub(crate) fn cmd<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    for (name, _) in env::vars_os().filter(|(name, _)| is_of_package(name)) {
        command.env_remove(name);
    }
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// Whether `cargo run` sets this variable for what it runs, and only then.
fn is_of_package(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let set = ["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_BIN_NAME", "CARGO_CRATE_NAME"];
    set.iter().any(|set| name.starts_with(set))
}

/// Runs to the end with output shown as it comes.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// As `run`, and each line that is shown is given to `see` too.
pub(crate) fn run_seen(command: &mut Command, mut see: impl FnMut(&str)) -> Result<()> {
    let shown = show(command);
    let (reader, writer) = std::io::pipe().context("make a pipe")?;
    let both = writer.try_clone().context("make a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(both)
        .spawn()
        .with_context(|| format!("cannot run {shown}"))?;
    // The command holds the pipe's other end open until it is given other outputs.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.with_context(|| format!("read what {shown} says"))?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        see(&line);
    }
    let status = child.wait().with_context(|| format!("wait for {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Runs to the end quietly and returns stdout; stderr is in the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let bytes = output_bytes(command)?;
    String::from_utf8(bytes).with_context(|| format!("{}: output is not UTF-8", show(command)))
}

/// Runs to the end and returns stdout, while what is said on stderr is shown.
pub(crate) fn stdout(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {shown}"))?;
    if !out.status.success() {
        bail!("{shown}: {}", out.status);
    }
    String::from_utf8(out.stdout).with_context(|| format!("{shown}: output is not UTF-8"))
}

/// As `output`, for programs that write binary data.
pub(crate) fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let shown = show(command);
    let out =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    if !out.status.success() {
        let said = [out.stdout, out.stderr].concat();
        bail!("{shown}: {}\n{}", out.status, tail(&String::from_utf8_lossy(&said), TAIL_LINES));
    }
    Ok(out.stdout)
}

/// Where `program` lies in `PATH` or the system folders that a user's `PATH` often lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The last `lines` lines of `text`.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Makes the folder that `file` lies in.
pub(crate) fn make_parent(file: &Path) -> Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    Ok(())
}

fn show(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_last_lines_and_all_of_a_short_text() {
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
        assert_eq!(tail("", 5), "");
    }

    #[test]
    fn a_program_does_not_see_this_package_and_does_see_the_rest() {
        // The test runner sets the package's variables, as `cargo run` does.
        assert!(env::var_os("CARGO_PKG_NAME").is_some());
        let seen = output(&mut cmd("env", [""; 0])).unwrap();
        let has = |name: &str| seen.lines().any(|line| line.starts_with(name));
        assert!(!has("CARGO_PKG_") && !has("CARGO_MANIFEST_DIR="), "{seen}");
        assert!(has("PATH=") && has("CARGO="), "{seen}");
    }

    #[test]
    fn failed_program_is_named_with_its_words() {
        let error = output(&mut cmd("sh", ["-c", "echo no room >&2; exit 4"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c") && text.contains("no room") && text.contains('4'), "{text}");
    }
}
