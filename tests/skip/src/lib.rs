//! How a test says that it cannot run here, in whole or in part, so that whoever runs many of them hears it: a test
//! that skips itself passes, and test runners show nothing of what a passed test has printed.

use std::{
    env,
    fs::OpenOptions,
    io::{self, Write as _},
    path::{Path, PathBuf},
    thread,
};

/// Names the file that every skipped test adds a line to; `cargo xtask test` sets it and reads the file.
pub const FILE: &str = "ORLOP_SKIPPED";

/// One of upstream's programs: in the folder of `KUBEBUILDER_ASSETS`, where tests of controllers have them
/// (controller-runtime's envtest), or in `PATH`, as whatever else is looked for by its name.
///
/// # Errors
/// Why the test that wants it cannot run, in words for [`because`].
pub fn program(name: &str) -> Result<PathBuf, String> {
    let folders = env::var_os("KUBEBUILDER_ASSETS").into_iter().chain(env::var_os("PATH"));
    let folders = folders.flat_map(|some| env::split_paths(&some).collect::<Vec<_>>());
    folders
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("no {name}, in the folder of KUBEBUILDER_ASSETS or in PATH"))
}

/// Says why the test that calls this is skipped, and notes it where `FILE` asks for that. To be called by the
/// test's own thread, as it has the test's name.
///
/// # Panics
/// When the file cannot be written: then nobody would hear of it.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
#[expect(clippy::expect_used, reason = "called by tests alone")]
pub fn because(why: &str) {
    eprintln!("skipped: {why}");
    if let Some(file) = env::var_os(FILE) {
        note(Path::new(&file), &line(&test(), why)).expect("ORLOP_SKIPPED is a file to write to");
    }
}

/// The test program and the test: `kubectl::tests::applies`.
fn test() -> String {
    let program = env::current_exe().unwrap_or_default();
    let program = program.file_stem().unwrap_or_default().to_string_lossy();
    // Cargo puts a hash behind the name.
    let program = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    format!("{program}::{}", thread::current().name().unwrap_or("main"))
}

/// One line, whatever is in the texts.
fn line(test: &str, why: &str) -> String {
    format!("{test}: {}\n", why.replace('\n', " "))
}

/// Adds to the file's end by one write: lines of tests that run at once do not mix.
fn note(file: &Path, line: &str) -> io::Result<()> {
    OpenOptions::new().append(true).create(true).open(file)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    #[test]
    fn notes_of_many_tests_are_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("skipped");
        thread::scope(|scope| {
            for number in 0..8 {
                let (file, line) = (&file, line(&format!("a::b{number}"), "no\nroot"));
                scope.spawn(move || (0..50).for_each(|_| note(file, &line).unwrap()));
            }
        });
        let text = fs::read_to_string(file).unwrap();
        assert_eq!(text.lines().count(), 400);
        let whole = |line: &str| line.starts_with("a::b") && line.ends_with(": no root");
        assert!(text.lines().all(whole), "{text}");
    }

    /// This program's other test, run by itself with a file to write to.
    #[test]
    fn skipped_test_is_noted_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("skipped");
        let own = env::current_exe().unwrap();
        let mut command = Command::new(own);
        command.args(["--exact", "tests::skips_itself", "--ignored"]).env(FILE, &file);
        assert!(command.output().unwrap().status.success());
        let text = fs::read_to_string(file).unwrap();
        assert_eq!(text, "skip::tests::skips_itself: it is an example\n");
    }

    #[test]
    #[ignore = "run by the test before it"]
    fn skips_itself() {
        because("it is an example");
    }
}
