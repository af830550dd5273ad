//! The project's own commands as a library: `main.rs` turns flags into calls, the end-to-end tests
//! drive the same clusters and the same proof that `up` prints.
#![expect(clippy::print_stdout, reason = "progress and results are what these commands are for")]
#![expect(
    clippy::disallowed_methods,
    reason = "a single-threaded command-line program: it may sleep and read its environment"
)]

pub mod bench;
mod bpf_object;
pub mod build_ebpf;
pub mod ci;
pub mod cluster;
mod cpio;
mod deb;
mod debian;
pub mod down;
mod exec;
pub mod guest;
pub mod image;
mod kernel;
mod kernel_tests;
pub mod kubectl;
mod oci;
pub mod paths;
pub mod proof;
pub mod prove;
mod rootfs;
mod setup;
mod skipped;
pub mod stop;
pub mod test;
pub mod tidy;
pub mod up;
mod vm;
pub mod watch;

/// Prints one progress line at once, even into a pipe.
fn step(line: &str) {
    println!("==> {line}");
}

/// Does one part of a command, and says how long it took.
pub(crate) fn timed<T>(part: &str, work: impl FnOnce() -> T) -> T {
    let began = std::time::Instant::now();
    let done = work();
    println!("    {part}: {:.1} s", began.elapsed().as_secs_f64());
    done
}
