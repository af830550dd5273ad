//! The unix socket that the CNI plugin talks to.
//!
//! Effects. One task accepts; each connection is a task that reads one request to its end, has the
//! engine do it on a blocking thread, and writes one reply. A second task follows the pod CIDR.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use super::{
    engine::{Addition, Engine},
    wire::{self, CniError, Code, Command, Request},
};
use crate::model::Programmed;

/// Longest request: a configuration with a valid-attachments list of some 5,000 pods.
const REQUEST_BYTES: u64 = 1 << 20;

/// Requests served at a time; others wait in the listen queue. The engine does one at a time, so
/// more would only hold memory, but waiting for the dataplane overlaps.
const CONNECTIONS: usize = 32;

/// How long a plugin may take to send its request; it has it in memory.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// What the connections share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    engine: Arc<Mutex<Engine>>,
    programmed: Option<watch::Receiver<Programmed>>,
    program_timeout: Duration,
}

impl Shared {
    pub(super) fn new(
        engine: Engine,
        programmed: Option<watch::Receiver<Programmed>>,
        program_timeout: Duration,
    ) -> Self {
        Self { engine: Arc::new(Mutex::new(engine)), programmed, program_timeout }
    }

    /// Blocks; only for short work or blocking threads.
    pub(super) fn engine(&self) -> MutexGuard<'_, Engine> {
        // A panic under the lock leaves at most an address without a link, which DEL and GC mend.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn with_engine<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, CniError> {
        let shared = self.clone();
        spawn_blocking(move || work(&mut shared.engine())).await.map_err(|error| {
            CniError::new(Code::Io, "the request ended early").with_details(error.to_string())
        })
    }
}

/// Listens on the socket, for the node's administrator only.
pub(super) fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Accepts until the task is aborted.
pub(super) async fn serve(listener: UnixListener, shared: Shared) {
    let limit = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    while let Ok(permit) = Arc::clone(&limit).acquire_owned().await {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = shared.clone();
                connections.spawn(async move {
                    if let Err(error) = serve_one(stream, &shared).await {
                        tracing::warn!(%error, "CNI connection failed");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "CNI connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut bounded = (&mut stream).take(REQUEST_BYTES + 1);
    timeout(READ_TIMEOUT, bounded.read_to_end(&mut bytes)).await??;
    let reply = if u64::try_from(bytes.len()).is_ok_and(|length| length > REQUEST_BYTES) {
        let text = format!("the request is longer than {REQUEST_BYTES} bytes");
        wire::reply(Err((wire::NEWEST, CniError::new(Code::Decode, text))))
    } else {
        wire::reply(answer(&bytes, shared).await)
    };
    stream.write_all(&reply).await?;
    stream.shutdown().await
}

async fn answer(bytes: &[u8], shared: &Shared) -> Result<Option<Value>, (wire::Version, CniError)> {
    let request = wire::parse_request(bytes)?;
    let version = request.version;
    let command = request.command;
    let (pod, container) = (request.pod.clone(), request.attachment.container_id.clone());
    let outcome = execute(request, shared).await;
    match &outcome {
        Ok(_) => tracing::debug!(?command, %pod, container = &*container, "CNI request done"),
        Err(error) => tracing::warn!(
            ?command, %pod, container = &*container, %error, details = error.details,
            "CNI request failed"
        ),
    }
    outcome.map_err(|error| (version, error))
}

async fn execute(request: Request, shared: &Shared) -> Result<Option<Value>, CniError> {
    match request.command {
        Command::Add => add(request, shared).await.map(Some),
        Command::Del => {
            shared.with_engine(move |engine| engine.del(&request.attachment)).await??;
            Ok(None)
        }
        Command::Check => {
            shared.with_engine(move |engine| engine.check(&request)).await??;
            Ok(None)
        }
        Command::Gc => {
            // Without the list everything would be stale: a mistake of the runtime, not its wish.
            let valid = request.valid.ok_or_else(|| {
                CniError::new(Code::InvalidConfig, "GC needs cni.dev/valid-attachments")
            })?;
            let network = request.network;
            shared.with_engine(move |engine| engine.gc(&network, &valid)).await??;
            Ok(None)
        }
        Command::Status => {
            shared.with_engine(|engine| engine.status()).await??;
            // What is programmed stays in the kernel, but nothing follows services and nodes now.
            match &shared.programmed {
                Some(programmed) if programmed.has_changed().is_err() => {
                    Err(CniError::new(Code::Limited, "the dataplane has stopped"))
                }
                _ => Ok(None),
            }
        }
    }
}

async fn add(request: Request, shared: &Shared) -> Result<Value, CniError> {
    let request = Arc::new(request);
    let asked = Arc::clone(&request);
    let addition = shared.with_engine(move |engine| engine.add(&asked)).await??;
    if let Err(error) = wait_until_programmed(&addition, shared).await {
        // A pod must not start before its network works; the runtime tries again.
        let asked = Arc::clone(&request);
        if let Err(undo) = shared.with_engine(move |engine| engine.del(&asked.attachment)).await? {
            tracing::warn!(error = %undo, "ADD not undone, DEL or GC will do it");
        }
        return Err(error);
    }
    Ok(wire::add_result(&request, &addition.added))
}

/// Waits until the dataplane has programmed the pod's row; at once when there is no dataplane.
async fn wait_until_programmed(addition: &Addition, shared: &Shared) -> Result<(), CniError> {
    let Some(mut programmed) = shared.programmed.clone() else { return Ok(()) };
    let ips = || addition.added.ips.iter().map(|(ip, _gateway)| *ip);
    let seen = programmed.wait_for(|programmed| programmed.serves(addition.revision, ips()));
    match timeout(shared.program_timeout, seen).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err(CniError::new(Code::TryAgainLater, "the dataplane has stopped")),
        Err(_) => {
            let limit = shared.program_timeout;
            let text = format!("the dataplane did not program the pod within {limit:?}");
            Err(CniError::new(Code::TryAgainLater, text))
        }
    }
}
