//! `tidy`: what compilers and linters do not check. Rules are pure functions from a file's text to
//! findings; the walk over the files is here too.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    exec::{cmd, output},
    paths::Paths,
};

/// Longest source file, in lines: one screenful of ideas.
const MAX_LINES: usize = 500;
/// Longest file of test tables, which are data.
const MAX_TABLE_LINES: usize = 1000;
/// Longest file of one eBPF program (an entry and its `try_` function).
const MAX_PROGRAM_LINES: usize = 120;
/// `BPF_OBJ_NAME_LEN` is 16 with the NUL (kernel: include/uapi/linux/bpf.h); aya cuts longer names.
const MAX_MAP_NAME: usize = 15;
/// The map of the code is to be read in one go; what is longer is a page of `docs`.
const MAP: &str = "ARCHITECTURE.md";
const MAX_MAP_WORDS: usize = 1000;

/// Which workspace crates each crate may name. `tests` and `xtask` may name any.
const ARROWS: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("ebpf-common", &[]),
    ("ebpf-build", &[]),
    ("shim", &[]),
    ("skip", &[]),
    ("control-plane", &["api"]),
    ("node-agent", &["api", "ebpf-common", "ebpf-build", "shim"]),
];

/// Outside crates that a crate must not see.
const BANS: &[(&str, &[&str])] = &[
    ("control-plane", &["aya", "nix", "rtnetlink", "netlink-sys"]),
    ("api", &["tokio", "nix", "aya"]),
    ("ebpf-common", &["tokio", "nix"]),
    ("shim", &["tokio"]),
];

/// Checks the whole workspace.
///
/// # Errors
/// Lists every finding.
pub fn tidy(paths: &Paths) -> Result<()> {
    let mut findings = Vec::new();
    let files = sources(&paths.root)?;
    for file in &files {
        let text = fs::read_to_string(paths.root.join(file))
            .with_context(|| format!("read {}", file.display()))?;
        findings.extend(check_file(&file.to_string_lossy(), &text));
    }
    let map = fs::read_to_string(paths.root.join(MAP)).with_context(|| format!("read {MAP}"))?;
    findings.extend(check_map(&map));
    findings.extend(check_arrows(&dependencies(paths)?));
    if !findings.is_empty() {
        bail!("{} findings:\n{}", findings.len(), findings.join("\n"));
    }
    println!("tidy: {} files", files.len());
    Ok(())
}

/// Rust and shell files that git knows or would know.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(
        cmd("git", ["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root),
    )?;
    Ok(listed
        .lines()
        .filter(|name| Path::new(name).extension().is_some_and(|suffix| suffix == "rs"))
        .map(PathBuf::from)
        .filter(|file| root.join(file).is_file())
        .collect())
}

fn check_file(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let lines = text.lines().count();
    let file = name.rsplit('/').next().unwrap_or(name);
    let is_program = name.starts_with("ebpf-programs/src/")
        && ["tc_", "xdp_", "cg_"].iter().any(|prefix| file.starts_with(prefix));
    let limit = match () {
        () if is_program => MAX_PROGRAM_LINES,
        () if file == "tests.rs" => MAX_TABLE_LINES,
        () => MAX_LINES,
    };
    if lines > limit {
        findings.push(format!("{name}: {lines} lines, more than {limit}; split it by concern"));
    }
    if !text.starts_with("//!") && !text.starts_with("#!") {
        findings.push(format!("{name}: no module doc at its start"));
    }
    for (number, line) in (1_usize..).zip(text.lines()) {
        if ["TODO", "FIXME"].iter().any(|word| unowned(line, word)) {
            findings.push(format!("{name}:{number}: a TODO names its owner or issue: TODO(name)"));
        }
        if ["#[", "#!["].iter().any(|open| line.trim_start().starts_with(&format!("{open}allow(")))
        {
            findings.push(format!("{name}:{number}: use #[expect(…, reason = …)]"));
        }
    }
    if name.ends_with("ebpf-programs/src/maps.rs") {
        findings.extend(long_map_names(name, text));
    }
    findings
}

/// The map of the code stays one page.
fn check_map(text: &str) -> Option<String> {
    let words = text.split_whitespace().count();
    (words > MAX_MAP_WORDS)
        .then(|| format!("{MAP}: {words} words, more than {MAX_MAP_WORDS}; detail goes into docs"))
}

/// Whether the word stands in a comment without `(owner)` after it.
fn unowned(line: &str, word: &str) -> bool {
    line.split_once("//").is_some_and(|(_, comment)| {
        comment
            .split_once(word)
            .is_some_and(|(before, after)| !before.ends_with('`') && !after.starts_with('('))
    })
}

/// Names of `#[map] static NAME` longer than the kernel keeps.
fn long_map_names(file: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut after_map = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[map") {
            after_map = true;
        } else if let (true, Some((_, rest))) = (after_map, line.split_once("static ")) {
            let name = rest.split(':').next().unwrap_or(rest).trim();
            if name.len() > MAX_MAP_NAME {
                findings
                    .push(format!("{file}: map {name} has more than {MAX_MAP_NAME} characters"));
            }
            after_map = false;
        }
    }
    findings
}

/// Each workspace crate's direct dependencies (not for development), from `cargo metadata`.
fn dependencies(paths: &Paths) -> Result<BTreeMap<String, Vec<String>>> {
    let text = output(
        cmd("cargo", ["metadata", "--no-deps", "--format-version=1", "--offline"])
            .current_dir(&paths.root),
    )?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata")?;
    let names = |value: &serde_json::Value| -> Vec<String> {
        value
            .as_array()
            .into_iter()
            .flatten()
            .filter(|dependency| dependency["kind"] != "dev")
            .filter_map(|dependency| dependency["name"].as_str().map(str::to_owned))
            .collect()
    };
    Ok(metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|package| {
            Some((package["name"].as_str()?.to_owned(), names(&package["dependencies"])))
        })
        .collect())
}

fn check_arrows(dependencies: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, allowed) in ARROWS {
        for dependency in dependencies.get(*name).into_iter().flatten() {
            if dependencies.contains_key(dependency) && !allowed.contains(&dependency.as_str()) {
                findings.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    for (name, banned) in BANS {
        for dependency in dependencies.get(*name).into_iter().flatten() {
            if banned.contains(&dependency.as_str()) {
                findings.push(format!("{name} must not see {dependency}"));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_and_files_without_doc_are_found() {
        let of_lines = |count| format!("//! Doc.\n{}", "\n".repeat(count));
        assert_eq!(check_file("a/src/b.rs", &of_lines(MAX_LINES)).len(), 1);
        assert_eq!(check_file("ebpf-programs/src/tc_a.rs", &of_lines(200)).len(), 1);
        assert_eq!(check_file("a/src/b.rs", "fn f() {}").len(), 1);
        assert!(check_file("a/src/b.rs", "//! Doc.\nfn f() {}").is_empty());
    }

    #[test]
    fn map_of_more_than_a_page_is_found() {
        assert_eq!(check_map(&"word ".repeat(MAX_MAP_WORDS)), None);
        assert!(check_map(&"word ".repeat(MAX_MAP_WORDS + 1)).is_some());
    }

    #[test]
    fn todo_needs_an_owner_and_allow_is_not_used() {
        let check = |line: &str| check_file("a.rs", &format!("//! Doc.\n{line}")).len();
        assert_eq!(check(concat!("// TO", "DO: later")), 1);
        assert_eq!(check(concat!("// TO", "DO(ann): later")), 0);
        assert_eq!(check(concat!("#[al", "low(dead_code)]")), 1);
    }

    #[test]
    fn map_names_longer_than_the_kernel_keeps_are_found() {
        let text = "#[map]\npub(crate) static SERVICES: HashMap<A, B> = x;\n\
                    #[map]\nstatic A_NAME_OF_SIXTEEN: Array<u32> = x;\nstatic NOT_A_MAP_BUT_LONG_NAME: u8 = 1;";
        let found = long_map_names("maps.rs", text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("A_NAME_OF_SIXTEEN"));
    }

    #[test]
    fn arrows_against_the_layers_are_found() {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let crates = BTreeMap::from([
            ("api".to_owned(), names(&["serde"])),
            ("node-agent".to_owned(), names(&["api", "control-plane", "tokio"])),
            ("control-plane".to_owned(), names(&["api", "aya"])),
        ]);
        assert_eq!(
            check_arrows(&crates),
            ["node-agent must not depend on control-plane", "control-plane must not see aya"]
        );
    }
}
