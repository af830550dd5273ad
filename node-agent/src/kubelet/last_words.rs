//! The termination message of a container that left none: the end of its log, where its
//! `terminationMessagePolicy` says so. Reads one file's end.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::Path,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::{
    runtime::Exit,
    server::log_line::{Renderer, Wanted},
    spec::pod_log_dir,
};

/// What is kept of the log (kubelet: `MaxContainerTerminationMessageLogLength` and `…LogLines`).
const MAX_BYTES: usize = 2048;
const MAX_LINES: usize = 80;
/// What is read of the file: the kept bytes with the head of each of their lines.
const READ_BYTES: u64 = 32 << 10;

/// Completes how a container ended; `number` is the instance's restart count.
pub(super) fn complete(
    exit: Exit,
    pod: &Pod,
    (container, number): (&str, u32),
    logs: &Path,
) -> Exit {
    if exit.code == 0 || !exit.message.is_empty() || !falls_back(pod, container) {
        return exit;
    }
    let path = pod_log_dir(logs, pod).join(container).join(format!("{number}.log"));
    match end_of(&path) {
        Ok(end) => Exit { message: tail(&end), ..exit },
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), "no log for a termination message");
            exit
        }
    }
}

/// The exit of a container whose process could not be started, for the reason that `message` says: upstream's
/// `StartError`, with the code that it has there.
pub(super) fn of_unstarted(message: String) -> Exit {
    let (code, at) = (128, Timestamp::now());
    Exit { code, signal: 0, oom_killed: false, unstarted: true, at, message }
}

fn falls_back(pod: &Pod, container: &str) -> bool {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|spec| spec.init_containers.as_ref()).into_iter().flatten();
    let mut all = spec.into_iter().flat_map(|spec| &spec.containers).chain(init);
    let policy = all.find(|one| one.name == container);
    policy.and_then(|one| one.termination_message_policy.as_deref())
        == Some("FallbackToLogsOnError")
}

/// The last part of a log file, from the beginning of a line.
fn end_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(READ_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    file.take(READ_BYTES).read_to_end(&mut end)?;
    if start > 0 {
        let cut = end.iter().position(|byte| *byte == b'\n').map_or(end.len(), |at| at + 1);
        end.drain(..cut);
    }
    Ok(end)
}

/// The last lines of a log in the CRI format, as their writer wrote them.
fn tail(log: &[u8]) -> String {
    let mut renderer = Renderer::new(Wanted::default());
    let plain: Vec<u8> =
        log.split(|byte| *byte == b'\n').flat_map(|line| renderer.render(line)).collect();
    let lines: Vec<&[u8]> = plain.split_inclusive(|byte| *byte == b'\n').collect();
    let kept = lines.get(lines.len().saturating_sub(MAX_LINES)..).unwrap_or_default().concat();
    let kept = kept.get(kept.len().saturating_sub(MAX_BYTES)..).unwrap_or_default();
    String::from_utf8_lossy(kept).into_owned()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_failed_container_without_words_gets_the_end_of_its_log() {
        let logs = tempfile::tempdir().unwrap();
        let pod = |policy: &str| -> Pod {
            let container = json!({"name": "c", "terminationMessagePolicy": policy});
            let meta = json!({"name": "p", "namespace": "n", "uid": "u"});
            serde_json::from_value(json!({"metadata": meta, "spec": {"containers": [container]}}))
                .unwrap()
        };
        let fallback = pod("FallbackToLogsOnError");
        let folder = pod_log_dir(logs.path(), &fallback).join("c");
        std::fs::create_dir_all(&folder).unwrap();
        let text: String =
            (0..500).map(|n| format!("2026-01-01T00:00:00Z stderr F line {n:03}\n")).collect();
        std::fs::write(folder.join("1.log"), text).unwrap();
        let message = |code: i32, said: &str, pod: &Pod, number: u32| {
            let at = Timestamp::UNIX_EPOCH;
            let exit = Exit {
                code,
                signal: 0,
                oom_killed: false,
                unstarted: false,
                at,
                message: said.to_owned(),
            };
            complete(exit, pod, ("c", number), logs.path()).message
        };
        let words = message(1, "", &fallback, 1);
        assert_eq!(
            (words.lines().next(), words.lines().last()),
            (Some("line 420"), Some("line 499"))
        );
        assert_eq!(words.lines().count(), 80);
        assert_eq!(message(0, "", &fallback, 1), "", "it succeeded");
        assert_eq!(message(1, "own", &fallback, 1), "own", "it left words");
        assert_eq!(message(1, "", &fallback, 2), "", "there is no log");
        assert_eq!(message(1, "", &pod("File"), 1), "", "it does not want it");
    }

    #[test]
    fn the_end_is_bounded_in_bytes() {
        let line = format!("2026-01-01T00:00:00Z stdout F {}\n", "x".repeat(1500));
        assert_eq!(tail(line.repeat(3).as_bytes()).len(), 2048);
    }
}
