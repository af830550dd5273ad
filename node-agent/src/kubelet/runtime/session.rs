//! Processes beside a container's own: `kubectl exec` and exec probes.
//!
//! The helper is the agent's child and ends with it. One task per session waits for the helper's words and
//! for the caller to lose interest; either ends the session.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    process::Stdio,
};

use rustix::pipe::{PipeFlags, pipe_with};
use shim::{
    channel,
    wire::{ExecConfig, ExecMessage, Failure},
};
use tokio::{
    fs::File,
    io::{Interest, unix::AsyncFd},
    process::Child,
    sync::oneshot,
};

use super::{
    ContainerId, ExecIo, ExecSpec, RuntimeError,
    client::ShimError,
    embedded::{Inner, failed},
};
use crate::sys::exec;

/// Exit code when the helper died without saying one: what a shell gives for a killed program.
const KILLED: i32 = 137;

impl Inner {
    pub(super) async fn exec(
        &self,
        id: &ContainerId,
        spec: &ExecSpec,
    ) -> Result<ExecIo, RuntimeError> {
        let step = "exec in container";
        let Some((dir, Some(client))) = self.locate(id)? else {
            return Err(failed(step, id)("the container does not run"));
        };
        let running = client.list().await.map_err(failed(step, id))?;
        let running = running.iter().find(|known| *known.id == *id.0 && known.exit.is_none());
        let running = running.ok_or("the container does not run").map_err(failed(step, id))?;
        let config = ExecConfig {
            container: dir.join(format!("{id}.json")).display().to_string(),
            pid: running.pid,
            args: spec.args.clone(),
            tty: spec.tty,
        };
        let mut session = Session::start(self, spec, &config).map_err(failed(step, id))?;
        match session.hear().await.map_err(failed(step, id))? {
            Some((ExecMessage::Running { .. }, terminal)) => {
                session.into_io(spec, terminal).map_err(failed(step, id))
            }
            Some((ExecMessage::Failed { failure }, _)) => {
                Err(failed(step, id)(ShimError::Failed(failure)))
            }
            Some((ExecMessage::Exited { .. }, _)) => Err(failed(step, id)(ShimError::Unexpected)),
            None => {
                let message = "the helper ended without a word".to_owned();
                let failure = Failure { step: "exec".to_owned(), message };
                Err(failed(step, id)(ShimError::Failed(failure)))
            }
        }
    }
}

struct Session {
    channel: AsyncFd<OwnedFd>,
    child: Child,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Session {
    fn start(inner: &Inner, spec: &ExecSpec, config: &ExecConfig) -> io::Result<Self> {
        let (channel, far) = channel::pair()?;
        channel::send(&channel, config, None)?;
        rustix::io::ioctl_fionbio(&channel, true)?;
        let (stdin_stdio, stdin) = if spec.stdin && !spec.tty {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (Stdio::from(read), Some(write))
        } else {
            (Stdio::null(), None)
        };
        let (stdout, stdout_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr, stderr_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let streams = [stdin_stdio, Stdio::from(stdout_write), Stdio::from(stderr_write)];
        let child = exec::spawn_with_channel(&inner.shim, &["exec"], &far, streams)?;
        let channel = exec::watch(channel)?;
        Ok(Self { channel, child, stdin, stdout, stderr })
    }

    async fn hear(&mut self) -> io::Result<channel::Packet<ExecMessage>> {
        self.channel.async_io(Interest::READABLE, channel::receive).await
    }

    fn into_io(self, spec: &ExecSpec, terminal: Option<OwnedFd>) -> io::Result<ExecIo> {
        let file = |fd: OwnedFd| File::from_std(std::fs::File::from(fd));
        let (exit, ended) = oneshot::channel();
        let Self { channel, child, stdin, stdout, stderr } = self;
        let (stdin, stdout, stderr) = match &terminal {
            // Three descriptors of one terminal: input, output, and its size.
            Some(master) => {
                let copy = || master.as_fd().try_clone_to_owned();
                let stdin = if spec.stdin { Some(copy()?) } else { None };
                (stdin, copy()?, None)
            }
            None => (stdin, stdout, Some(stderr)),
        };
        tokio::spawn(wait(channel, child, exit));
        Ok(ExecIo {
            stdin: stdin.map(file),
            stdout: Some(file(stdout)),
            stderr: stderr.map(file),
            terminal,
            exit: ended,
        })
    }
}

/// Waits for the program's end, or for nobody to want it: then hanging up makes the helper kill it.
async fn wait(channel: AsyncFd<OwnedFd>, mut child: Child, mut exit: oneshot::Sender<i32>) {
    let code = tokio::select! {
        heard = channel.async_io(Interest::READABLE, channel::receive::<ExecMessage>) => {
            Some(match heard {
                Ok(Some((ExecMessage::Exited { code }, _))) => code,
                _ => KILLED,
            })
        }
        () = exit.closed() => None,
    };
    drop(channel);
    if let Some(code) = code {
        // The caller may have gone in this moment.
        exit.send(code).unwrap_or_default();
    }
    if let Err(error) = child.wait().await {
        tracing::warn!(%error, "exec helper could not be waited for");
    }
}
