//! Builds the schema table: reads the sources of the crates `k8s-pb` (protobuf tags, list and patch
//! markers) and `k8s-openapi` (exact JSON names, required fields, texts) and writes two files into
//! `OUT_DIR`: `schema.bin`, the table that stays mapped, and `docs.bin`, the deflated texts.

#[path = "build/emit.rs"]
mod emit;
#[path = "build/join.rs"]
mod join;
#[path = "build/openapi.rs"]
mod openapi;
#[path = "build/proto.rs"]
mod proto;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    for file in ["build.rs", "build", "Cargo.toml", "../Cargo.lock"] {
        println!("cargo:rerun-if-changed={file}");
    }
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let metadata = metadata(&here)?;
    let openapi_dir = package_dir(&metadata, "k8s-openapi")?.join("src/v1_36");
    let proto_dir = package_dir(&metadata, "k8s-pb")?.join("src");

    let definitions = openapi::read(&openapi_dir)?;
    let messages = proto::read(&proto_dir)?;
    let pointers = fs::read_to_string(here.join("build/pointers.txt"))?;
    let table = join::join(&definitions, &messages, &pointers)?;
    let (table, docs) = emit::emit(&table)?;
    fs::write(out.join("schema.bin"), table)?;
    fs::write(out.join("docs.bin"), docs)?;
    Ok(())
}

fn variable(name: &str) -> Result<std::ffi::OsString, Failure> {
    std::env::var_os(name).ok_or_else(|| format!("cargo does not set {name}").into())
}

/// `k8s-pb` is a dependency for no platform: locked and fetched, never compiled. On a machine that
/// built nothing yet it is not downloaded either, so a first offline call may fail.
fn metadata(here: &Path) -> Result<Value, Failure> {
    let mut said = String::new();
    for offline in [true, false] {
        let mut command = Command::new(variable("CARGO")?);
        command.args(["metadata", "--format-version=1"]).current_dir(here);
        if offline {
            command.arg("--offline");
        }
        let output = command.output()?;
        if output.status.success() {
            return Ok(serde_json::from_slice(&output.stdout)?);
        }
        said = String::from_utf8_lossy(&output.stderr).into_owned();
    }
    Err(format!("cargo metadata: {said}").into())
}

fn package_dir(metadata: &Value, name: &str) -> Result<PathBuf, Failure> {
    let packages = metadata.get("packages").and_then(Value::as_array);
    packages
        .into_iter()
        .flatten()
        .find(|package| package.get("name").and_then(Value::as_str) == Some(name))
        .and_then(|package| package.get("manifest_path")?.as_str())
        .and_then(|manifest| Some(Path::new(manifest).parent()?.to_path_buf()))
        .ok_or_else(|| format!("no package {name} in cargo metadata").into())
}

/// All `.rs` files under `dir`, sorted, so that the table does not depend on directory order.
fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let mut entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let path = entry.path();
        if path.is_dir() {
            rust_files(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
    Ok(())
}

/// The name by which both crates' spellings of one identifier are equal: `clusterIPs`,
/// `cluster_ips` and `cluster_i_ps` are `clusterips`; `$ref` is `ref`.
fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}
