//! Reads what test programs and the VM's init say. Pure.

/// What is known so far.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    /// `program: test` of each that failed, and programs that ended otherwise than by their tests.
    pub(crate) failures: Vec<String>,
    /// `program: skipped: …`.
    pub(crate) skipped: Vec<String>,
    /// All programs ran.
    pub(crate) done: bool,
    /// The program that runs now, and whether its closing line came.
    current: String,
    closed: bool,
}

/// Stands before what the VM's init says.
const INIT: &str = "orlop-tests: ";
/// The exit code of libtest when a test failed (`library/test/src/lib.rs`, `ERROR_EXIT_CODE`).
const TESTS_FAILED: &str = "101";

impl Progress {
    /// Takes the next line.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(said) = line.strip_prefix(INIT) {
            let words: Vec<&str> = said.split(' ').collect();
            match words.as_slice() {
                ["begin", name] => (self.current, self.closed) = ((*name).to_owned(), false),
                ["end", name, code, seconds] => self.ended(name, code, seconds),
                ["done"] => self.done = true,
                _ => {}
            }
        } else if let Some((passed, failed)) = crate::test::counts(line) {
            self.passed += passed;
            self.failed += failed;
            self.closed = true;
        } else if line.starts_with("skipped: ") {
            self.skipped.push(format!("{}: {line}", self.current));
        } else if let Some(test) = failed_test(line) {
            self.failures.push(format!("{}: {test}", self.current));
        }
    }

    fn ended(&mut self, name: &str, code: &str, seconds: &str) {
        if !self.closed || ![TESTS_FAILED, "0"].contains(&code) {
            // Its tests are not in the numbers: killed, or it never ran.
            self.failed += 1;
            self.failures.push(format!("{name}: ended with {code} after {seconds} s"));
        }
    }
}

/// `test a::b ... FAILED` → `a::b`.
fn failed_test(line: &str) -> Option<&str> {
    let (name, how) = line.strip_prefix("test ")?.split_once(" ... ")?;
    how.ends_with("FAILED").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> Progress {
        let mut progress = Progress::default();
        for line in lines {
            progress.line(line);
        }
        progress
    }

    #[test]
    fn numbers_and_names_of_failed_tests_are_collected() {
        let progress = after(&[
            "orlop-tests: begin packets",
            "test tests::one ... ok",
            "test tests::two ... FAILED",
            "skipped: no ip",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
            "orlop-tests: end packets 101 9",
            "orlop-tests: begin cni",
            "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "orlop-tests: end cni 0 3",
            "orlop-tests: done",
        ]);
        assert_eq!((progress.passed, progress.failed, progress.done), (5, 1, true));
        assert_eq!(progress.failures, ["packets: tests::two"]);
        assert_eq!(progress.skipped, ["packets: skipped: no ip"]);
    }

    #[test]
    fn program_that_is_killed_or_never_ran_is_a_failure() {
        let progress = after(&[
            "orlop-tests: begin nodes",
            "test tests::one ... ok",
            "orlop-tests: end nodes 124 900",
            "orlop-tests: begin dns",
            "orlop-tests: end dns 127 0",
        ]);
        assert_eq!((progress.failed, progress.done), (2, false));
        assert_eq!(
            progress.failures,
            ["nodes: ended with 124 after 900 s", "dns: ended with 127 after 0 s"]
        );
    }

    #[test]
    fn crash_after_the_closing_line_is_a_failure() {
        let closing = "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
        let progress = after(&["orlop-tests: begin cni", closing, "orlop-tests: end cni 139 3"]);
        assert_eq!(progress.failures, ["cni: ended with 139 after 3 s"]);
    }
}
