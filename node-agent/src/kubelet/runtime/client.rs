//! The agent's end of a shim's socket: one task per pod owns the connection.
//!
//! Inputs: calls from [`ShimClient`]. Outputs: answers, and exits on the runtime's event channel. The task
//! connects again when the connection breaks, asks what it missed, and tells that the pod is lost when
//! nobody listens any more. It ends when the last client is dropped.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use shim::wire::{self, Body, Call, ContainerReport, ExitReport, Failure, Message, Request};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use super::{
    ContainerId, PodUid, RuntimeEvent,
    state::{self, exit},
};

/// Calls under way to one pod; more wait.
const CALLS: usize = 16;

/// Bytes read at a time.
const READ_BYTES: usize = 8 << 10;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShimError {
    #[error("the pod's shim is gone")]
    Gone,
    #[error("{}: {}", .0.step, .0.message)]
    Failed(Failure),
    #[error("the shim gave an answer to another question")]
    Unexpected,
}

/// A handle on one pod's shim.
#[derive(Clone, Debug)]
pub(super) struct ShimClient {
    calls: mpsc::Sender<(Call, oneshot::Sender<Body>)>,
    /// Set before the shim is ended on purpose.
    ending: Arc<AtomicBool>,
}

impl ShimClient {
    /// Connects to the shim whose folder is `dir`. Exits that it knows already are not told: whoever
    /// takes the pod over asks for them.
    ///
    /// # Errors
    /// When nobody listens there.
    pub(super) async fn connect(
        uid: PodUid,
        dir: &Path,
        events: mpsc::Sender<RuntimeEvent>,
    ) -> io::Result<Self> {
        let path = dir.join("shim.sock");
        let mut link = Link::new(UnixStream::connect(&path).await?);
        let told = link.list().await?.into_iter().filter(|known| known.exit.is_some());
        let told = told.map(|known| known.id).collect();
        let (calls, inbox) = mpsc::channel(CALLS);
        let ending = Arc::new(AtomicBool::new(false));
        let task = Task { uid, path, events, told, ending: Arc::clone(&ending) };
        tokio::spawn(task.run(link, inbox));
        Ok(Self { calls, ending })
    }

    /// Whether the shim is known to be gone.
    pub(super) fn is_gone(&self) -> bool {
        self.calls.is_closed()
    }

    /// From now on the end of the shim is no news.
    pub(super) fn expect_end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// When the shim is gone or says that it failed.
    pub(super) async fn call(&self, call: Call) -> Result<Body, ShimError> {
        let (answer, answered) = oneshot::channel();
        self.calls.send((call, answer)).await.map_err(|_ended| ShimError::Gone)?;
        match answered.await.map_err(|_ended| ShimError::Gone)? {
            Body::Failed { failure } => Err(ShimError::Failed(failure)),
            body @ (Body::Hello { .. }
            | Body::Started { .. }
            | Body::Done
            | Body::List { .. }
            | Body::Exited { .. }) => Ok(body),
        }
    }

    /// Every container that the shim has.
    ///
    /// # Errors
    /// As `call`.
    pub(super) async fn list(&self) -> Result<Vec<ContainerReport>, ShimError> {
        match self.call(Call::List).await? {
            Body::List { containers } => Ok(containers),
            Body::Hello { .. }
            | Body::Started { .. }
            | Body::Done
            | Body::Failed { .. }
            | Body::Exited { .. } => Err(ShimError::Unexpected),
        }
    }
}

struct Task {
    uid: PodUid,
    path: PathBuf,
    events: mpsc::Sender<RuntimeEvent>,
    /// Containers whose exit is known to the receiver of events.
    told: BTreeSet<String>,
    ending: Arc<AtomicBool>,
}

type Inbox = mpsc::Receiver<(Call, oneshot::Sender<Body>)>;

impl Task {
    async fn run(mut self, mut link: Link, mut inbox: Inbox) {
        loop {
            if self.serve(&mut link, &mut inbox).await {
                return;
            }
            match self.reconnect().await {
                Ok(again) => link = again,
                Err(error) => {
                    if !self.ending.load(Ordering::Relaxed) {
                        tracing::warn!(pod = %self.uid, %error, "pod's shim is gone");
                        if let Some(dir) = self.path.parent() {
                            state::kill_orphans(dir);
                        }
                        let lost = RuntimeEvent::SandboxLost { pod: self.uid.clone() };
                        // Nobody listens any more when the agent ends.
                        drop(self.events.send(lost).await);
                    }
                    return;
                }
            }
        }
    }

    /// Serves until the connection breaks (`false`) or nobody can ask any more (`true`).
    async fn serve(&mut self, link: &mut Link, inbox: &mut Inbox) -> bool {
        let mut waiting: BTreeMap<u64, oneshot::Sender<Body>> = BTreeMap::new();
        loop {
            tokio::select! {
                call = inbox.recv() => {
                    let Some((call, answer)) = call else { return true };
                    match link.send(call).await {
                        Ok(seq) => drop(waiting.insert(seq, answer)),
                        Err(_broken) => return false,
                    }
                }
                message = link.receive() => match message {
                    Ok(Message { body: Body::Exited { id, exit }, .. }) => self.tell(id, exit).await,
                    Ok(Message { seq, body }) => {
                        if let Some(answer) = waiting.remove(&seq) {
                            // An asker that gave up wants no answer.
                            drop(answer.send(body));
                        }
                    }
                    Err(_broken) => return false,
                }
            }
        }
    }

    async fn reconnect(&mut self) -> io::Result<Link> {
        let mut link = Link::new(UnixStream::connect(&self.path).await?);
        for container in link.list().await? {
            if let Some(exit) = container.exit {
                self.tell(container.id, exit).await;
            }
        }
        Ok(link)
    }

    async fn tell(&mut self, id: String, report: ExitReport) {
        if !self.told.insert(id.clone()) {
            return;
        }
        let event = RuntimeEvent::ContainerExited {
            pod: self.uid.clone(),
            id: ContainerId(id.into()),
            exit: exit(report),
        };
        // Nobody listens any more when the agent ends; the shim keeps the exit.
        drop(self.events.send(event).await);
    }
}

/// Frames over one connection.
struct Link {
    stream: UnixStream,
    input: Vec<u8>,
    seq: u64,
}

impl Link {
    fn new(stream: UnixStream) -> Self {
        Self { stream, input: Vec::new(), seq: 0 }
    }

    async fn send(&mut self, call: Call) -> io::Result<u64> {
        self.seq += 1;
        let bytes = wire::frame(&Request { seq: self.seq, call })?;
        self.stream.write_all(&bytes).await?;
        Ok(self.seq)
    }

    /// Can be dropped and called again: bytes of a part of a frame are kept.
    async fn receive(&mut self) -> io::Result<Message> {
        loop {
            if let Some(message) = wire::take_frame(&mut self.input)? {
                return Ok(message);
            }
            let mut space = [0; READ_BYTES];
            match self.stream.read(&mut space).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.input.extend_from_slice(space.get(..count).unwrap_or_default()),
            }
        }
    }

    async fn list(&mut self) -> io::Result<Vec<ContainerReport>> {
        let seq = self.send(Call::List).await?;
        loop {
            match self.receive().await? {
                Message { seq: found, body: Body::List { containers } } if found == seq => {
                    return Ok(containers);
                }
                // Exits that come in between are in the list too.
                _ => {}
            }
        }
    }
}
