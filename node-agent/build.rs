//! Builds the eBPF object that the agent carries.

use std::{env, error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?;
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?;
    let programs = Path::new(&folder).join("../ebpf-programs");
    for source in ebpf_build::sources(&programs) {
        println!("cargo:rerun-if-changed={}", source.display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    let built = match ebpf_build::build(&programs, &Path::new(&out).join("ebpf")) {
        Ok(built) => built,
        Err(error) => {
            for line in error.to_string().lines() {
                println!("cargo:error={line}");
            }
            return Err(error.into());
        }
    };
    println!("cargo:rustc-env=ORLOP_EBPF_OBJECT={}", built.object.display());
    Ok(())
}
