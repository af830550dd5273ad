//! `build-ebpf`: builds the object and shows what is in it.

use std::fs;

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf_object::{Function, STACK, functions},
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

/// Builds the eBPF object below the target folder and prints per function its instructions, and the stack that it
/// and what it calls take.
///
/// # Errors
/// When no compiler for BPF can be had (exit code 3), the programs do not compile, or a chain of calls takes more
/// stack than kernels have.
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
    let functions =
        functions(&bytes).context("the object is not a 64-bit little-endian ELF file")?;
    println!("{:<28} {:<24} {:>12} {:>6}", "program", "section", "instructions", "stack");
    for Function { name, section, instructions, chain: (stack, _), .. } in &functions {
        println!("{name:<28} {section:<24} {instructions:>12} {stack:>6}");
    }
    let chains = functions.iter().filter(|function| !function.is_called).map(|one| &one.chain);
    if let Some((stack, names)) = chains.max().filter(|(stack, _)| *stack > STACK) {
        bail!("{} take {stack} bytes of stack, and kernels have {STACK}", names.join(" → "));
    }
    Ok(())
}
