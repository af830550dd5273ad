//! `logs`: a container's log files, rotated ones included, as a stream.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use jiff::{SignedDuration, Timestamp};
use tokio::{
    fs::File,
    io::{AsyncBufRead, AsyncBufReadExt as _, BufReader},
    sync::mpsc,
};

use super::{
    Body,
    log_line::{Renderer, Wanted, parse},
    says, text, values,
};
use crate::kubelet::Directory;

/// Pieces that may wait for a slow reader.
const QUEUE: usize = 16;
/// How often a followed file is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Pieces are sent at this size or when the file has no more.
const PIECE_BYTES: usize = 32 << 10;

struct Ask {
    wanted: Wanted,
    tail: Option<u64>,
    follow: bool,
}

/// Streams the log of a container's newest instance, or of the one before.
pub(super) async fn answer(
    directory: &Directory,
    (namespace, pod, container): (&str, &str, &str),
    query: Option<&str>,
) -> Response<Body> {
    let ask = match read_query(query) {
        Ok(ask) => ask,
        Err(message) => return text(StatusCode::BAD_REQUEST, &message),
    };
    let Some(view) = directory.find(namespace, pod) else {
        return text(StatusCode::NOT_FOUND, &format!("pod \"{pod}\" does not exist"));
    };
    let Some(found) = view.containers.iter().find(|c| c.name == container) else {
        let message = format!("container \"{container}\" not found in pod \"{pod}\"");
        return text(StatusCode::NOT_FOUND, &message);
    };
    let previous = says(query, "previous");
    let number = if previous { found.newest.and_then(|n| n.checked_sub(1)) } else { found.newest };
    let Some(number) = number else {
        let message = match (previous, &found.waiting) {
            (true, _) => {
                format!("previous terminated container \"{container}\" in pod \"{pod}\" not found")
            }
            (false, waiting) => {
                let reason = match waiting.as_deref() {
                    None => "ContainerCreating",
                    Some("ErrImagePull") => "image can't be pulled",
                    Some("ImagePullBackOff") => "trying and failing to pull image",
                    Some(other) => other,
                };
                format!("container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}")
            }
        };
        return text(StatusCode::BAD_REQUEST, &message);
    };
    let folder = view.log_dir.join(container);
    let (directory, key) =
        (directory.clone(), (namespace.to_owned(), pod.to_owned(), container.to_owned()));
    // The instance writes no more once another one is newer or nothing runs.
    let writing = move || {
        let view = directory.find(&key.0, &key.1);
        let found = view.and_then(|view| view.containers.into_iter().find(|c| c.name == key.2));
        found.is_some_and(|c| c.newest == Some(number) && c.running.is_some())
    };
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let ended = send_log(&folder, number, ask, (&writing, &sender)).await;
        if let Err(error) = ended {
            // A closed queue is a reader that went away.
            let _told = sender.send(Err(error)).await;
        }
    });
    let frames = stream::unfold(receiver, |mut receiver| async {
        let next: Result<Bytes, io::Error> = receiver.recv().await?;
        Some((next.map(Frame::data), receiver))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let kind = http::HeaderValue::from_static("text/plain");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

fn read_query(query: Option<&str>) -> Result<Ask, String> {
    let number = |name: &str| -> Result<Option<u64>, String> {
        let first = values(query, name).into_iter().next().filter(|text| !text.is_empty());
        let parsed =
            first.map(|text| text.parse().map_err(|_bad| format!("invalid {name}: {text:?}")));
        parsed.transpose()
    };
    let since_time = values(query, "sinceTime").into_iter().next().filter(|text| !text.is_empty());
    let since_time = since_time
        .map(|text| text.parse().map_err(|_bad| format!("invalid sinceTime: {text:?}")))
        .transpose()?;
    let ago = number("sinceSeconds")?.and_then(|seconds| i64::try_from(seconds).ok());
    let since = ago.and_then(|s| Timestamp::now().checked_sub(SignedDuration::from_secs(s)).ok());
    Ok(Ask {
        wanted: Wanted {
            timestamps: says(query, "timestamps"),
            since: since_time.or(since),
            limit_bytes: number("limitBytes")?,
        },
        tail: number("tailLines")?,
        follow: says(query, "follow"),
    })
}

type Sender = mpsc::Sender<Result<Bytes, io::Error>>;

async fn send_log(
    folder: &Path,
    number: u32,
    ask: Ask,
    (writing, sender): (&(impl Fn() -> bool + Sync), &Sender),
) -> io::Result<()> {
    let mut files = rotated(folder, number)?;
    let current = folder.join(format!("{number}.log"));
    let mut skip = match ask.tail {
        None => 0,
        Some(tail) => {
            let mut lines = 0;
            for path in files.iter().chain([&current]) {
                lines += count(path).await?;
            }
            u64::saturating_sub(lines, tail)
        }
    };
    let mut renderer = Renderer::new(ask.wanted);
    let mut out = Output { piece: Vec::new(), sender };
    files.retain(|path| path.exists());
    for path in &files {
        let mut lines = open(path).await?;
        while let Some(line) = next_line(&mut lines, &mut Vec::new()).await? {
            if !out.add(&mut renderer, &mut skip, &line).await {
                return Ok(());
            }
        }
    }
    follow(&current, (renderer, skip), (ask.follow, writing), &mut out).await
}

/// Reads the current file to its end, and on while it is followed and the container writes; goes over
/// to the new file when it was rotated.
async fn follow(
    path: &Path,
    (mut renderer, mut skip): (Renderer, u64),
    (follow, writing): (bool, &(impl Fn() -> bool + Sync)),
    out: &mut Output<'_>,
) -> io::Result<()> {
    let Some(mut file) = open_current(path).await? else { return Ok(()) };
    let mut half = Vec::new();
    loop {
        // Asked before reading: what is written after the last read is then read in the next round.
        let more = follow && writing() && !out.sender.is_closed();
        while let Some(line) = next_line(&mut file.1, &mut half).await? {
            if !out.add(&mut renderer, &mut skip, &line).await {
                return Ok(());
            }
        }
        if !out.flush().await || !more {
            return Ok(());
        }
        let inode = std::fs::metadata(path).map(|meta| meta.ino()).ok();
        if inode.is_some_and(|inode| inode != file.0)
            && let Some(fresh) = open_current(path).await?
        {
            file = fresh;
            half.clear();
            continue;
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn open_current(path: &Path) -> io::Result<Option<(u64, BufReader<File>)>> {
    match File::open(path).await {
        Ok(file) => Ok(Some((file.metadata().await?.ino(), BufReader::new(file)))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

struct Output<'a> {
    piece: Vec<u8>,
    sender: &'a Sender,
}

impl Output<'_> {
    /// Takes a line of the file; false when nothing more is wanted.
    async fn add(&mut self, renderer: &mut Renderer, skip: &mut u64, line: &[u8]) -> bool {
        if *skip > 0 {
            *skip -= u64::from(parse(line).is_some_and(|line| !line.partial));
            return true;
        }
        self.piece.extend(renderer.render(line));
        if renderer.is_full() {
            self.flush().await;
            return false;
        }
        self.piece.len() < PIECE_BYTES || self.flush().await
    }

    /// Sends what has gathered; false when the reader went away.
    async fn flush(&mut self) -> bool {
        if self.piece.is_empty() {
            return true;
        }
        let piece = std::mem::take(&mut self.piece);
        self.sender.send(Ok(Bytes::from(piece))).await.is_ok()
    }
}

/// A whole line without its end; a line that is still being written stays in `half`.
async fn next_line(
    reader: &mut (impl AsyncBufRead + Unpin),
    half: &mut Vec<u8>,
) -> io::Result<Option<Vec<u8>>> {
    reader.read_until(b'\n', half).await?;
    if half.last() != Some(&b'\n') {
        return Ok(None);
    }
    half.pop();
    Ok(Some(std::mem::take(half)))
}

/// Lines that a reader would see in a file.
async fn count(path: &Path) -> io::Result<u64> {
    if !path.exists() {
        return Ok(0);
    }
    let mut reader = open(path).await?;
    let mut lines = 0;
    while let Some(line) = next_line(&mut reader, &mut Vec::new()).await? {
        lines += u64::from(parse(&line).is_some_and(|line| !line.partial));
    }
    Ok(lines)
}

/// Opens a rotated file, unpacking it if it is packed (in memory: rotation bounds its size).
async fn open(path: &Path) -> io::Result<Box<dyn AsyncBufRead + Unpin + Send>> {
    if path.extension().is_some_and(|end| end == "gz") {
        let path = path.to_owned();
        let unpacked = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            let file = std::fs::File::open(path)?;
            io::Read::read_to_end(&mut flate2::read::GzDecoder::new(file), &mut bytes)?;
            Ok::<_, io::Error>(bytes)
        });
        return Ok(Box::new(io::Cursor::new(unpacked.await??)));
    }
    Ok(Box::new(BufReader::new(File::open(path).await?)))
}

/// The rotated files of an instance, oldest first: `<n>.log.<time>` and `<n>.log.<time>.gz`.
fn rotated(folder: &Path, number: u32) -> io::Result<Vec<PathBuf>> {
    let prefix = format!("{number}.log.");
    let mut files = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        if name.is_some_and(|name| name.starts_with(&prefix) && !name.ends_with(".tmp")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
