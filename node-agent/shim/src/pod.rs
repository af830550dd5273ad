//! The shim of one pod: leaves its starter, then one loop over the socket, the processes and their output.
//!
//! One thread owns everything. It sleeps in `poll` and holds nothing but records, so that its memory is
//! that of a small static program.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixListener,
    },
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    process::{chdir, setsid},
    system::sethostname,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};
use shim::wire::{Body, Call, ContainerConfig, Failure, PodConfig, Request, VERSION};

use crate::{
    connection::Connection,
    record::{Container, Phase, Stream},
    step::At as _,
    sys,
};

/// Bytes read at a time from a stream: a pipe's default capacity.
const READ_BYTES: usize = 64 << 10;

/// Connections at a time; the agent needs one.
const MAX_CONNECTIONS: usize = 8;

/// A node out of memory must not take the one that would report it; as the kubelet's own.
const OOM_SCORE_ADJ: &str = "-999";

/// Prepares the pod's namespaces and socket, then leaves a shim behind and returns: whoever started this
/// knows that the socket can be used, or why not.
///
/// # Errors
/// Names the step that failed.
pub(crate) fn run(dir: &str) -> Result<(), Failure> {
    // Names in the folder stay short: a socket's path is at most 107 bytes.
    chdir(dir).at(|| format!("enter {dir}"))?;
    let text = fs::read("pod.json").at(|| "read pod.json".to_owned())?;
    let pod: PodConfig = serde_json::from_slice(&text).at(|| "read pod.json".to_owned())?;
    fs::write(format!("{}/cgroup.procs", pod.shim_cgroup), "0")
        .at(|| format!("enter cgroup {}", pod.shim_cgroup))?;
    match fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        // In a container without CAP_SYS_RESOURCE, where tests run, the shim is as likely to be killed.
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
            return Err(error).at(|| "set oom_score_adj".to_owned());
        }
        _ => {}
    }
    namespaces(&pod)?;
    drop(fs::remove_file("shim.sock"));
    let listener = UnixListener::bind("shim.sock").at(|| "bind shim.sock".to_owned())?;
    listener.set_nonblocking(true).at(|| "bind shim.sock".to_owned())?;
    if !sys::fork().at(|| "fork the shim".to_owned())? {
        return Ok(());
    }
    detach().at(|| "leave the starter".to_owned())?;
    Shim { listener, connections: Vec::new(), containers: Vec::new(), next: 1, ending: false }
        .serve()
        .at(|| "serve".to_owned())
}

/// What the pod's containers share is this process's own and passed on by fork: nothing has to be pinned
/// but the network, which is there before and after it.
fn namespaces(pod: &PodConfig) -> Result<(), Failure> {
    let mut flags = UnshareFlags::NEWIPC;
    if !pod.netns.is_empty() {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let step = || format!("enter {}", pod.netns);
        let netns = rustix::fs::open(&*pod.netns, flags, Mode::empty()).at(step)?;
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).at(step)?;
    }
    if !pod.hostname.is_empty() {
        flags |= UnshareFlags::NEWUTS;
    }
    sys::unshare(flags).at(|| "make the pod's namespaces".to_owned())?;
    if !pod.hostname.is_empty() {
        sethostname(pod.hostname.as_bytes()).at(|| "set the host name".to_owned())?;
    }
    for (name, value) in &pod.sysctls {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(path, value).at(|| format!("set sysctl {name}"))?;
    }
    Ok(())
}

fn detach() -> io::Result<()> {
    setsid()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

#[derive(Debug)]
struct Shim {
    listener: UnixListener,
    /// By a number that is never used again, so that an answer cannot reach another asker.
    connections: Vec<(u64, Connection)>,
    containers: Vec<Container>,
    next: u64,
    ending: bool,
}

/// Where something happened; containers by their place in the list, which is fixed during a round.
#[derive(Clone, Copy, Debug)]
enum Source {
    Listener,
    Connection(u64),
    Status(usize),
    Exit(usize),
    Output(usize, Stream),
}

impl Shim {
    fn serve(mut self) -> io::Result<()> {
        let mut space = vec![0; READ_BYTES];
        while !self.ending {
            for source in self.wait()? {
                self.handle(source, &mut space)?;
            }
            self.kill_overdue();
            self.connections.retain(|(_, connection)| !connection.closed);
            self.containers.retain(|container| !container.removed);
        }
        for (_, connection) in &mut self.connections {
            connection.finish();
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<Vec<Source>> {
        let sources = self.sources();
        let mut fds: Vec<PollFd<'_>> = sources
            .iter()
            .map(|(_, fd, writes)| {
                let flags = if *writes { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
                PollFd::from_borrowed_fd(*fd, flags)
            })
            .collect();
        let deadline = self.containers.iter().filter_map(|container| container.kill_at).min();
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let happened = fds.iter().zip(&sources).filter(|(fd, _)| !fd.revents().is_empty());
        Ok(happened.map(|(_, (source, ..))| *source).collect())
    }

    fn sources(&self) -> Vec<(Source, BorrowedFd<'_>, bool)> {
        let mut sources = vec![(Source::Listener, self.listener.as_fd(), false)];
        for (id, connection) in &self.connections {
            sources.push((
                Source::Connection(*id),
                connection.as_fd(),
                connection.wants_to_write(),
            ));
        }
        for (place, container) in self.containers.iter().enumerate() {
            let outputs = [Stream::Stdout, Stream::Stderr];
            sources.extend(outputs.into_iter().filter_map(|stream| {
                let fd = container.output(stream)?;
                Some((Source::Output(place, stream), fd.as_fd(), false))
            }));
            let status = container.status().map(|fd| (Source::Status(place), fd.as_fd(), false));
            let exit = container.pidfd().map(|fd| (Source::Exit(place), fd.as_fd(), false));
            sources.extend(status.into_iter().chain(exit));
        }
        sources
    }

    fn handle(&mut self, source: Source, space: &mut [u8]) -> io::Result<()> {
        match source {
            Source::Listener => self.accept(),
            Source::Connection(id) => self.converse(id, space),
            Source::Output(place, stream) => {
                if let Some(container) = self.containers.get_mut(place) {
                    container.read_output(stream, space);
                }
            }
            Source::Status(place) => self.started(place),
            Source::Exit(place) => self.exited(place, space)?,
        }
        Ok(())
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        if self.connections.len() < MAX_CONNECTIONS
            && let Ok(connection) = Connection::new(stream)
        {
            self.connections.push((self.next, connection));
            self.next += 1;
        }
    }

    fn converse(&mut self, id: u64, space: &mut [u8]) {
        let Some((_, connection)) = self.connections.iter_mut().find(|(other, _)| *other == id)
        else {
            return;
        };
        connection.flush();
        for Request { seq, call } in connection.read(space) {
            let answer = self.answer(id, seq, call);
            if let (Some(body), Some((_, connection))) =
                (answer, self.connections.iter_mut().find(|(other, _)| *other == id))
            {
                connection.send(seq, body);
            }
        }
    }

    /// `None` when the answer comes later.
    fn answer(&mut self, connection: u64, seq: u64, call: Call) -> Option<Body> {
        match call {
            Call::Hello => Some(Body::Hello { version: VERSION, pid: std::process::id() }),
            Call::Start { id } => self.start(&id, (connection, seq)),
            Call::Stop { id, grace_ms } => {
                if let Some(container) = self.find(&id) {
                    container.stop(Duration::from_millis(grace_ms));
                }
                Some(Body::Done)
            }
            Call::Remove { id } => Some(self.remove(&id)),
            Call::ReopenLog { id } => Some(match self.find(&id).map(Container::reopen_log) {
                None | Some(Ok(())) => Body::Done,
                Some(Err(error)) => failed("reopen the log", &error.to_string()),
            }),
            Call::List => Some(Body::List {
                containers: self.containers.iter().map(|known| known.report.clone()).collect(),
            }),
            Call::Shutdown => {
                let idle = self.containers.iter().all(Container::ended);
                self.ending = idle;
                Some(if idle { Body::Done } else { failed("shut down", "a container runs") })
            }
        }
    }

    fn find(&mut self, id: &str) -> Option<&mut Container> {
        self.containers.iter_mut().find(|known| known.report.id == id && !known.removed)
    }

    fn start(&mut self, id: &str, asker: (u64, u64)) -> Option<Body> {
        if let Some(container) = self.find(id) {
            return match &container.phase {
                Phase::Starting => {
                    container.waiting.push(asker);
                    None
                }
                Phase::Running | Phase::Exited => Some(started_body(container)),
                Phase::Failed(failure) => Some(Body::Failed { failure: failure.clone() }),
            };
        }
        let read = || -> Result<ContainerConfig, Failure> {
            let name = format!("{id}.json");
            let text = fs::read(&name).at(|| format!("read {name}"))?;
            serde_json::from_slice(&text).at(|| format!("read {name}"))
        };
        match read().and_then(|config| Container::start(&config)) {
            Ok(mut container) => {
                container.waiting.push(asker);
                self.containers.push(container);
                None
            }
            Err(failure) => Some(Body::Failed { failure }),
        }
    }

    fn started(&mut self, place: usize) {
        let Some(container) = self.containers.get_mut(place) else { return };
        container.read_status();
        let body = match &container.phase {
            Phase::Starting => return,
            Phase::Running | Phase::Exited => started_body(container),
            Phase::Failed(failure) => Body::Failed { failure: failure.clone() },
        };
        save(container);
        for (asker, seq) in std::mem::take(&mut container.waiting) {
            if let Some((_, connection)) =
                self.connections.iter_mut().find(|(known, _)| *known == asker)
            {
                connection.send(seq, body.clone());
            }
        }
    }

    fn exited(&mut self, place: usize, space: &mut [u8]) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(place) else { return Ok(()) };
        container.reap(space)?;
        let Some(exit) = container.report.exit.clone() else {
            // It never became the program, which was told already.
            container.removed = true;
            return Ok(());
        };
        // On disk before anybody hears of it, so that what was told is never lost.
        save(container);
        let id = container.report.id.clone();
        for (_, connection) in &mut self.connections {
            connection.send(0, Body::Exited { id: id.clone(), exit: exit.clone() });
        }
        Ok(())
    }

    fn remove(&mut self, id: &str) -> Body {
        if let Some(container) = self.find(id) {
            if !container.ended() {
                return failed("remove the container", "it runs");
            }
            // One that failed to start is still to be reaped, and is forgotten then.
            container.removed = container.phase == Phase::Exited;
        }
        for name in [format!("{id}.json"), format!("{id}.state.json")] {
            match fs::remove_file(&name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return failed(&format!("remove {name}"), &error.to_string());
                }
                _ => {}
            }
        }
        Body::Done
    }

    fn kill_overdue(&mut self) {
        let now = Instant::now();
        for container in &mut self.containers {
            if container.kill_at.is_some_and(|at| at <= now) {
                container.kill();
            }
        }
    }
}

fn started_body(container: &Container) -> Body {
    Body::Started { pid: container.report.pid, at_ns: container.report.started_ns }
}

fn failed(step: &str, message: &str) -> Body {
    Body::Failed { failure: Failure { step: step.to_owned(), message: message.to_owned() } }
}

/// Writes a container's state whole or not at all.
fn save(container: &Container) {
    let name = format!("{}.state.json", container.report.id);
    let part = format!("{name}.part");
    let written = serde_json::to_vec(&container.report)
        .map_err(io::Error::from)
        .and_then(|text| fs::write(&part, text))
        .and_then(|()| fs::rename(&part, &name));
    // A full tmpfs: the report is still told over the socket and kept in memory.
    drop(written);
}
