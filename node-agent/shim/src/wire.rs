//! The protocol between the agent and a pod's shim. Pure values and their framing.
//!
//! A shim lives as long as its pod and is not replaced when the agent is upgraded, so a newer agent
//! must speak to older shims: fields are only added, with `#[serde(default)]`, and `VERSION` grows when
//! the agent must know whether the other side has them.
//!
//! **Connection.** A stream socket `shim.sock` in the pod's folder. Each frame is a little-endian `u32`
//! length (at most `MAX_FRAME_BYTES`) and that many bytes of JSON. The agent sends `Request`s; the shim
//! answers each with one `Message` that carries the request's `seq`, in any order, and tells exits on its
//! own with `Body::Exited`. Several connections may be open; each gets every exit.
//!
//! **Folder.** `<run-dir>/shim/<pod-uid>/`: `pod.json` ([`PodConfig`], written by the agent before it
//! starts the shim), `<container-id>.json` ([`ContainerConfig`]), `<container-id>.state.json`
//! ([`ContainerReport`], by the shim: after the start, and again at the exit before it is told).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of this protocol. 1: first.
pub const VERSION: u32 = 1;

/// Longest frame: a container's configuration with the kernel's longest argument list (128 KiB a
/// string, `MAX_ARG_STRLEN`) and a seccomp filter of a few KiB fits many times.
pub const MAX_FRAME_BYTES: u32 = 4 << 20;

/// Most bytes of a termination message (kubelet's `MaxContainerTerminationMessageLength`).
pub const MAX_MESSAGE_BYTES: u64 = 4096;

/// What the agent asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the asker, repeated in the answer.
    pub seq: u64,
    pub call: Call,
}

/// The calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Answered by `Body::Hello`.
    Hello,
    /// Starts the container whose configuration lies in `<id>.json`; `Body::Started` once its program
    /// runs, `Body::Failed` when a step failed. Asking again for a started one repeats the answer.
    Start { id: String },
    /// Sends the container's stop signal, and SIGKILL to its whole cgroup after `grace_ms`; a second call
    /// can only shorten the time. `Body::Done` at once, also when the container has ended.
    Stop { id: String, grace_ms: u64 },
    /// Forgets an exited container and removes its files in the pod's folder.
    Remove { id: String },
    /// Opens the container's log file anew, after it was renamed.
    ReopenLog { id: String },
    /// Answered by `Body::List`.
    List,
    /// Ends the shim when no container runs; else `Body::Failed`.
    Shutdown,
}

/// What the shim says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The request's `seq`; 0 for what nobody asked.
    pub seq: u64,
    pub body: Body,
}

/// Answers and news.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    Hello { version: u32, pid: u32 },
    Started { pid: i32, at_ns: i64 },
    Done,
    List { containers: Vec<ContainerReport> },
    Failed { failure: Failure },
    Exited { id: String, exit: ExitReport },
}

/// A step that failed, in the words of the one who met it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The operation, such as `mount /data`.
    pub step: String,
    /// The cause.
    pub message: String,
}

/// A container as its shim knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerReport {
    pub id: String,
    /// 0 before the start.
    pub pid: i32,
    /// Nanoseconds since 1970.
    pub started_ns: i64,
    pub exit: Option<ExitReport>,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// 0 to 255; 128 + signal when a signal ended it.
    pub code: i32,
    /// 0 when no signal ended it.
    pub signal: i32,
    pub oom_killed: bool,
    /// Nanoseconds since 1970.
    pub at_ns: i64,
    pub message: String,
}

/// What a shim is started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodConfig {
    pub uid: String,
    /// Set as the pod's host name in its own UTS namespace; empty: the node's namespace is kept.
    pub hostname: String,
    /// Pinned network namespace; empty: the node's.
    pub netns: String,
    /// Absolute path of the cgroup that the shim moves itself into.
    pub shim_cgroup: String,
    /// Names with dots, and values, written under `/proc/sys` in the pod's namespaces.
    pub sysctls: Vec<(String, String)>,
}

/// What a container is made from: every decision is taken, only system calls are left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerConfig {
    pub id: String,
    pub name: String,
    pub restart_count: u32,
    pub image_reference: String,
    pub image_digest: String,
    /// Folder that holds the layers, so that their names stay short: overlayfs takes at most a page
    /// of options.
    pub layers_dir: String,
    /// Names below `layers_dir`, lowest first.
    pub layers: Vec<String>,
    /// Folder of this container with `upper`, `work` and `root` in it.
    pub work_dir: String,
    /// Absolute path of its cgroup.
    pub cgroup: String,
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// In order.
    pub mounts: Vec<MountConfig>,
    /// Capability numbers of the bounding, permitted and effective sets.
    pub capabilities: Vec<u8>,
    pub privileged: bool,
    pub read_only_root: bool,
    pub no_new_privileges: bool,
    /// Classic BPF instructions as the kernel's `sock_filter` in little-endian order; empty: none.
    pub seccomp: Vec<u64>,
    pub masked_paths: Vec<String>,
    pub read_only_paths: Vec<String>,
    pub oom_score_adj: i32,
    /// Soft and hard limit of open files.
    pub open_files: u64,
    /// Asks the program to end.
    pub stop_signal: i32,
    pub stdin: bool,
    pub tty: bool,
    /// On the node; its content becomes the exit message. Empty: none.
    pub termination_file: String,
    pub log_path: String,
}

/// One mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountConfig {
    /// Path on the node; empty: a fresh tmpfs.
    pub source: String,
    /// Path in the container, resolved inside its root.
    pub destination: String,
    pub read_only: bool,
}

/// First message to `shim exec`, on its channel (descriptor 3, `SOCK_SEQPACKET`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecConfig {
    /// Path of the container's `ContainerConfig`: identity, limits and cgroup are taken from it.
    pub container: String,
    /// Its first process.
    pub pid: i32,
    pub args: Vec<String>,
    pub tty: bool,
}

/// What `shim exec` says on its channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecMessage {
    /// The program runs. With a terminal, its master side comes with this message.
    Running {
        pid: i32,
    },
    Failed {
        failure: Failure,
    },
    /// As `ExitReport::code`.
    Exited {
        code: i32,
    },
}

/// Writes one frame.
///
/// # Errors
/// When the frame is too long, or of the stream.
pub fn write_frame(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    out.write_all(&frame(value)?)
}

/// One frame's bytes.
///
/// # Errors
/// When the value is too long for a frame.
pub fn frame(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, value)?;
    let length = u32::try_from(bytes.len() - 4)
        .ok()
        .filter(|length| *length <= MAX_FRAME_BYTES)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "frame too long"))?;
    if let Some(head) = bytes.get_mut(..4) {
        head.copy_from_slice(&length.to_le_bytes());
    }
    Ok(bytes)
}

/// Takes the first whole frame off `buffer`; `None` when more bytes are needed.
///
/// # Errors
/// When the frame is too long or does not decode.
pub fn take_frame<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some(head) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*head);
    if length > MAX_FRAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let end = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(4);
    let Some(body) = buffer.get(4..end) else { return Ok(None) };
    let value = serde_json::from_slice(body)?;
    buffer.drain(..end);
    Ok(Some(value))
}

/// Reads one frame from a blocking stream.
///
/// # Errors
/// When the stream ends or the frame does not decode.
pub fn read_frame<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<T> {
    let mut head = [0; 4];
    input.read_exact(&mut head)?;
    let length = u32::from_le_bytes(head);
    if length > MAX_FRAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let mut body = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    input.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_being_cut_anywhere() {
        let message = Message { seq: 7, body: Body::Started { pid: 42, at_ns: -1 } };
        let bytes = frame(&message).unwrap();
        for cut in 0..bytes.len() {
            let mut buffer = bytes.get(..cut).unwrap().to_vec();
            assert_eq!(take_frame::<Message>(&mut buffer).unwrap(), None);
            buffer.extend_from_slice(bytes.get(cut..).unwrap());
            assert_eq!(take_frame::<Message>(&mut buffer).unwrap(), Some(message.clone()));
            assert!(buffer.is_empty());
        }
        assert_eq!(read_frame::<Message>(&mut bytes.as_slice()).unwrap(), message);
    }

    #[test]
    fn too_long_a_frame_is_refused_before_it_is_read() {
        let mut buffer = (MAX_FRAME_BYTES + 1).to_le_bytes().to_vec();
        assert_eq!(
            take_frame::<Message>(&mut buffer).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }
}
