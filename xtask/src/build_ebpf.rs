//! `build-ebpf`: builds the object and shows what is in it.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{
    paths::Paths,
    setup::{self, Need},
    step,
    stop::impossible,
};

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Wish {
    /// Accepted for symmetry: the object is always optimised, as the verifier needs it so.
    #[arg(long)]
    pub release: bool,
    /// With the lines of text that the agent's feature `kernel-log` prints.
    #[arg(long)]
    pub log: bool,
}

/// Builds the eBPF object below the target folder and prints size and instructions per program.
///
/// # Errors
/// When no compiler for BPF can be had (exit code 3) or the programs do not compile.
pub fn build_ebpf(paths: &Paths, wish: Wish) -> Result<()> {
    setup::ensure(paths, &[Need::Ebpf])?;
    let features: &[&str] = if wish.log { &[ebpf_build::LOG] } else { &[] };
    step("build the eBPF programs");
    let built = match ebpf_build::build(&paths.root.join("ebpf-programs"), features) {
        Ok(built) => built,
        Err(error @ (ebpf_build::BuildError::NoCompiler | ebpf_build::BuildError::NoLinker)) => {
            return Err(impossible(error.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    let bytes =
        fs::read(&built.object).with_context(|| format!("read {}", built.object.display()))?;
    println!("{} ({} bytes), built by {}", built.object.display(), bytes.len(), built.compiler);
    let programs = programs(&bytes).context("the object is not a 64-bit little-endian ELF file")?;
    println!("{:<28} {:<24} {:>12}", "program", "section", "instructions");
    for program in programs {
        println!("{:<28} {:<24} {:>12}", program.name, program.section, program.instructions);
    }
    Ok(())
}

/// A function of the object that is a program or is called by one.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    name: String,
    section: String,
    /// eBPF instructions of 8 bytes before relocation; called functions are counted apart.
    instructions: u64,
}

/// One section header of an ELF file.
struct Section {
    name: u64,
    kind: u64,
    flags: u64,
    offset: u64,
    size: u64,
    link: u64,
}

/// Functions in executable sections, by section and name. `None` when the ELF structure is broken.
fn programs(elf: &[u8]) -> Option<Vec<Program>> {
    const SYMBOL_TABLE: u64 = 2;
    const EXECUTABLE: u64 = 4;
    const FUNCTION: u64 = 2;
    (elf.get(..6)? == b"\x7fELF\x02\x01").then_some(())?;
    let table = number(elf, 40, 8)?;
    let count = number(elf, 60, 2)?;
    let sections: Vec<Section> =
        (0..count).map(|index| section(elf, table + index * 64)).collect::<Option<_>>()?;
    let names = sections.get(usize::try_from(number(elf, 62, 2)?).ok()?)?;
    let mut found = Vec::new();
    for symbols in sections.iter().filter(|section| section.kind == SYMBOL_TABLE) {
        let strings = sections.get(usize::try_from(symbols.link).ok()?)?;
        for at in (symbols.offset..symbols.offset + symbols.size).step_by(24) {
            let Some(home) = sections.get(usize::try_from(number(elf, at + 6, 2)?).ok()?) else {
                continue;
            };
            if number(elf, at + 4, 1)? & 0xf == FUNCTION && home.flags & EXECUTABLE != 0 {
                found.push(Program {
                    name: text(elf, strings.offset + number(elf, at, 4)?)?,
                    section: text(elf, names.offset + home.name)?,
                    instructions: number(elf, at + 16, 8)? / 8,
                });
            }
        }
    }
    found.sort_by(|a, b| (&a.section, &a.name).cmp(&(&b.section, &b.name)));
    Some(found)
}

fn section(elf: &[u8], at: u64) -> Option<Section> {
    Some(Section {
        name: number(elf, at, 4)?,
        kind: number(elf, at + 4, 4)?,
        flags: number(elf, at + 8, 8)?,
        offset: number(elf, at + 24, 8)?,
        size: number(elf, at + 32, 8)?,
        link: number(elf, at + 40, 4)?,
    })
}

/// A little-endian number of `size` bytes.
fn number(bytes: &[u8], at: u64, size: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let field = bytes.get(at..at.checked_add(size)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn text(bytes: &[u8], at: u64) -> Option<String> {
    let from = bytes.get(usize::try_from(at).ok()?..)?;
    let end = from.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(from.get(..end)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_else_than_an_elf_file_has_no_programs() {
        assert_eq!(programs(b"not an object"), None);
        assert_eq!(programs(b"\x7fELF\x02\x01 cut off"), None);
    }

    #[test]
    fn numbers_are_little_endian_and_bounded_by_the_file() {
        assert_eq!(number(&[1, 2, 0, 0], 0, 4), Some(0x201));
        assert_eq!(number(&[1, 2], 1, 4), None);
    }
}
