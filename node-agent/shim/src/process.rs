//! From a process inside the container's namespaces to the container's program: terminal, limits,
//! identity, seccomp, exec. Shared by a container's first process and by `exec`.

use std::{
    ffi::CString,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self as rfs, Access, Gid, Mode, OFlags, Uid},
    process::{Resource, Rlimit, chdir, getrlimit, setrlimit, setsid},
    thread::{
        CapabilitySet, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use shim::wire::{ContainerConfig, Failure};

use crate::{step::At as _, sys};

/// Where programs are looked for when the container sets no `PATH` (Docker's default).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Standard streams of the program to be; a terminal is all three.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// Opens a terminal of the container's own `/dev/pts`: its master, and the program's side.
pub(crate) fn open_terminal() -> io::Result<(OwnedFd, Streams)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rfs::open("/dev/pts/ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let number = rustix::pty::ptsname(&master, Vec::new())?;
    let slave = rfs::open(number.as_c_str(), flags, Mode::empty())?;
    let streams = Streams { stdin: slave.try_clone()?, stdout: slave.try_clone()?, stderr: slave };
    Ok((master, streams))
}

/// Becomes the program. Returns only on failure. The caller is in its namespaces and cgroup already.
pub(crate) fn become_program(
    config: &ContainerConfig,
    args: &[String],
    streams: Streams,
) -> Result<std::convert::Infallible, Failure> {
    let env = environment(config);
    setsid().at(|| "start a session".to_owned())?;
    connect(config, &streams).at(|| "connect the standard streams".to_owned())?;
    drop(streams);
    limits(config).at(|| "set the limit of open files".to_owned())?;
    enter_folder(config)?;
    drop_capabilities(config)?;
    if config.no_new_privileges {
        set_no_new_privs(true).at(|| "set no_new_privs".to_owned())?;
    }
    // Before the identity: without no_new_privs a filter needs CAP_SYS_ADMIN, which only root has.
    if !config.seccomp.is_empty() {
        sys::load_seccomp(&config.seccomp).at(|| "load the seccomp filter".to_owned())?;
    }
    identity(config)?;
    let program = find_program(args, &env)?;
    let strings = |list: &[String]| -> Result<Vec<CString>, Failure> {
        list.iter()
            .map(|text| CString::new(text.as_str()).at(|| "pass the arguments".to_owned()))
            .collect()
    };
    let path = CString::new(program.as_os_str().as_encoded_bytes())
        .at(|| "pass the arguments".to_owned())?;
    let (argv, envp) = (strings(args)?, strings(&env)?);
    sys::close_on_exec_from_3().at(|| "close descriptors".to_owned())?;
    sys::reset_signals();
    Err(exec_failure(args, words(&sys::execve(&path, &argv, &envp))))
}

/// Opening `/dev/stdout` anew must work for the container's user, so that the streams become its own.
fn connect(config: &ContainerConfig, streams: &Streams) -> io::Result<()> {
    for stream in [&streams.stdin, &streams.stdout, &streams.stderr] {
        let about = rfs::fstat(stream)?;
        let kind = rfs::FileType::from_raw_mode(about.st_mode);
        if kind == rfs::FileType::Fifo || (config.tty && rustix::termios::isatty(stream)) {
            rfs::fchown(stream, Some(Uid::from_raw(config.uid)), None)?;
        }
    }
    rustix::stdio::dup2_stdin(&streams.stdin)?;
    rustix::stdio::dup2_stdout(&streams.stdout)?;
    rustix::stdio::dup2_stderr(&streams.stderr)?;
    if rustix::termios::isatty(&streams.stdin) {
        rustix::process::ioctl_tiocsctty(&streams.stdin)?;
    }
    Ok(())
}

fn limits(config: &ContainerConfig) -> io::Result<()> {
    if config.open_files == 0 {
        return Ok(());
    }
    // Without CAP_SYS_RESOURCE the node's own limit is the most that there is.
    let hard = getrlimit(Resource::Nofile).maximum;
    let privileged = setrlimit(
        Resource::Nofile,
        Rlimit { current: Some(config.open_files), maximum: Some(config.open_files) },
    );
    if privileged.is_ok() {
        return Ok(());
    }
    let files = Some(hard.map_or(config.open_files, |hard| hard.min(config.open_files)));
    Ok(setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files })?)
}

/// A missing working folder is made, as runc does.
fn enter_folder(config: &ContainerConfig) -> Result<(), Failure> {
    let cwd = if config.cwd.is_empty() { "/" } else { &config.cwd };
    if !Path::new(cwd).exists() {
        fs::create_dir_all(cwd).at(|| format!("mkdir {cwd}"))?;
    }
    chdir(cwd).at(|| format!("chdir to cwd (\"{cwd}\") set in config.json failed"))
}

/// What is not in the bounding set cannot come back by any later exec.
fn drop_capabilities(config: &ContainerConfig) -> Result<(), Failure> {
    let last = fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|text| text.trim().parse::<u8>().ok())
        .unwrap_or(40);
    for number in 0..=last {
        if !config.capabilities.contains(&number) {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            rustix::thread::remove_capability_from_bounding_set(capability)
                .at(|| format!("drop capability {number}"))?;
        }
    }
    Ok(())
}

/// Leaving uid 0 clears the effective set; staying keeps what the bounding set leaves at the exec.
fn identity(config: &ContainerConfig) -> Result<(), Failure> {
    let groups: Vec<Gid> = config.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).at(|| "set groups".to_owned())?;
    let gid = Gid::from_raw(config.gid);
    set_thread_res_gid(gid, gid, gid).at(|| format!("set group {}", config.gid))?;
    let uid = Uid::from_raw(config.uid);
    set_thread_res_uid(uid, uid, uid).at(|| format!("set user {}", config.uid))
}

/// The container's environment; `HOME` from its own `/etc/passwd` when it is not set.
fn environment(config: &ContainerConfig) -> Vec<String> {
    let mut env = config.env.clone();
    if !env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    if config.tty && !env.iter().any(|entry| entry.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        env.push(format!("HOME={}", home_of(&passwd, config.uid)));
    }
    env
}

/// Home folder of `uid`, `/` when it is unknown.
fn home_of(passwd: &str, uid: u32) -> &str {
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).is_some_and(|field| field.parse() == Ok(uid)))
        .and_then(|fields| fields.get(5).copied())
        .filter(|home| !home.is_empty())
        .unwrap_or("/")
}

/// The program's file, looked for as runc does and refused in its words.
fn find_program(args: &[String], env: &[String]) -> Result<PathBuf, Failure> {
    let Some(name) = args.first().filter(|name| !name.is_empty()) else {
        return Err(exec_failure(args, "no command given".to_owned()));
    };
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match usable(&path) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(exec_failure(args, format!("stat {name}: no such file or directory")))
            }
            Err(error) => Err(exec_failure(args, words(&error))),
        };
    }
    let path = env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let mut refused = None;
    for folder in path.split(':') {
        let file = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        match usable(&file) {
            Ok(()) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused = Some(words(&error));
            }
            Err(_absent) => {}
        }
    }
    let absent = || "executable file not found in $PATH".to_owned();
    Err(exec_failure(args, refused.unwrap_or_else(absent)))
}

fn usable(file: &Path) -> io::Result<()> {
    if fs::metadata(file)?.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    Ok(rfs::access(file, Access::EXEC_OK)?)
}

/// The kernel's word for an error, in lower case and without its number, as Go prints it.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn exec_failure(args: &[String], cause: String) -> Failure {
    let name = args.first().map_or("", String::as_str);
    Failure { step: "exec".to_owned(), message: format!("exec: \"{name}\": {cause}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_comes_from_the_containers_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:\nbare:x:34:34:::\n";
        assert_eq!(home_of(passwd, 33), "/var/www");
        assert_eq!(home_of(passwd, 34), "/");
        assert_eq!(home_of(passwd, 99), "/");
        assert_eq!(home_of("", 0), "/");
    }

    #[test]
    fn a_missing_program_is_reported_as_runc_does() {
        let env = ["PATH=/nowhere:/usr/bin".to_owned()];
        let find = |name: &str| find_program(&[name.to_owned()], &env).map_err(|f| f.message);
        assert_eq!(find("env"), Ok(PathBuf::from("/usr/bin/env")));
        assert_eq!(
            find("no-such-program"),
            Err("exec: \"no-such-program\": executable file not found in $PATH".to_owned())
        );
        assert_eq!(
            find("/no/such"),
            Err("exec: \"/no/such\": stat /no/such: no such file or directory".to_owned())
        );
        assert_eq!(find("/usr"), Err("exec: \"/usr\": is a directory".to_owned()));
    }
}
