//! What tests said of not running: each adds a line to a file (`tests/skip`), as test runners show nothing of what a
//! passed test has printed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use crate::{exec::make_parent, paths::Paths};

/// As many tests of a reason are listed by name; of more, their number by program.
const NAMED: usize = 3;

/// The file while tests run.
pub(crate) struct List {
    pub(crate) file: PathBuf,
}

impl List {
    /// An empty one.
    pub(crate) fn begin(paths: &Paths) -> Result<Self> {
        let file = paths.root.join(".orlop/skipped");
        make_parent(&file)?;
        fs::write(&file, "").with_context(|| format!("write {}", file.display()))?;
        Ok(Self { file })
    }

    /// What the tests wrote; the file goes.
    pub(crate) fn end(self) -> Result<String> {
        let Self { file } = self;
        let said = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
        Ok(said)
    }
}

/// How many tests there are in the list.
pub(crate) fn count(said: &str) -> usize {
    said.lines().map(parts).map(|(test, _)| test).collect::<BTreeSet<_>>().len()
}

/// A line for each reason, with the tests that gave it.
pub(crate) fn by_reason(said: &str) -> Vec<String> {
    let mut reasons: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (test, why) in said.lines().map(parts) {
        reasons.entry(why).or_default().insert(test);
    }
    reasons.into_iter().map(|(why, tests)| format!("{}: {why}", named(&tests))).collect()
}

/// `program::test: why`.
fn parts(line: &str) -> (&str, &str) {
    line.split_once(": ").unwrap_or((line, "no reason given"))
}

fn named(tests: &BTreeSet<&str>) -> String {
    if tests.len() <= NAMED {
        return tests.iter().copied().collect::<Vec<_>>().join(", ");
    }
    let mut programs: BTreeMap<&str, usize> = BTreeMap::new();
    for test in tests {
        let program = test.split_once("::").map_or(*test, |(program, _)| program);
        *programs.entry(program).or_default() += 1;
    }
    let programs: Vec<String> =
        programs.iter().map(|(program, count)| format!("{program} {count}")).collect();
    format!("{} tests ({})", tests.len(), programs.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tests_are_named_and_many_are_counted_by_reason() {
        let said = "cni::tests::a: not root\ncni::tests::b: not root\npackets::tests::c: not root\n\
                    cni::tests::d: not root\nkubectl::tests::e: no kubectl in PATH\n\
                    kubectl::tests::e: no kubectl in PATH\n";
        assert_eq!(
            by_reason(said),
            ["kubectl::tests::e: no kubectl in PATH", "4 tests (cni 3, packets 1): not root"]
        );
        assert_eq!(count(said), 5);
        assert!(by_reason("").is_empty());
    }

    #[test]
    fn what_is_added_while_tests_run_is_read_at_their_end() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths { root: folder.path().to_owned(), ..Paths::new() };
        let list = List::begin(&paths).unwrap();
        let file = list.file.clone();
        fs::write(&file, "a::b: no room\n").unwrap();
        assert_eq!(list.end().unwrap(), "a::b: no room\n");
        assert!(!file.exists());
        assert_eq!(List::begin(&paths).unwrap().end().unwrap(), "", "nothing of the last run");
    }
}
