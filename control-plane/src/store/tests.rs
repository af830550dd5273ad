//! The store as the API server sees it: order, history, expiry, crash.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    Attributes, Change, Class, CommitError, Draft, Expect, ListRequest, Options, Scope, Store as _,
    Txn,
    embedded::{Embedded, OpenError},
    mvcc::{Batch, Mvcc, RING_EVENTS},
};
use crate::store::Key;

const CHILD_DIR: &str = "STORE_TEST_CHILD_DIR";

fn options() -> Options {
    Options {
        class: |resource| if resource == "core/events" { Class::Volatile } else { Class::Durable },
        attributes: |_, _| Attributes::default(),
    }
}

fn key(resource: &str, name: &str) -> Key {
    Key::new(&resource.into(), "default", name)
}

fn draft(name: &str, number: u64) -> Draft {
    Draft::new(&json!({"metadata": {"name": name}, "n": number}), Attributes::default())
}

fn scope(resource: &str) -> Scope {
    Scope { resource: resource.into(), namespace: None, name: None }
}

fn all(resource: &str) -> ListRequest {
    ListRequest { scope: scope(resource), at: None, after: None }
}

fn put(core: &mut Mvcc, name: &str, number: u64, now: Duration) {
    let mut batch = Batch::default();
    let txn = Txn::put(key("core/pods", name), draft(name, number), Expect::Anything);
    core.prepare(&mut batch, &txn).unwrap();
    core.publish(batch, now);
}

#[test]
fn transactions_of_one_batch_see_each_other() {
    let core = Mvcc::new(options(), 10);
    let mut batch = Batch::default();
    let pod = key("core/pods", "a");
    let first = core.prepare(&mut batch, &Txn::put(pod.clone(), draft("a", 1), Expect::Absent));
    assert_eq!(first.unwrap()[0].revision, 11);
    let again = core.prepare(&mut batch, &Txn::put(pod.clone(), draft("a", 2), Expect::Absent));
    let Err(CommitError::Precondition { current, .. }) = again else { panic!("{again:?}") };
    assert_eq!(current.unwrap().revision, 11);
    core.prepare(&mut batch, &Txn::put(pod.clone(), draft("a", 2), Expect::Revision(11))).unwrap();
    core.prepare(&mut batch, &Txn::delete(pod.clone(), Expect::Revision(12))).unwrap();
    let gone = core.prepare(&mut batch, &Txn::delete(pod, Expect::Anything));
    assert!(matches!(gone, Err(CommitError::Precondition { current: None, .. })), "{gone:?}");
    assert_eq!(core.revision(), 10, "nothing is visible before it is published");
}

#[test]
fn an_older_revision_can_be_listed_while_history_reaches_back() {
    let mut core = Mvcc::new(options(), 0);
    for (name, number) in [("a", 1), ("b", 2), ("a", 3), ("c", 4)] {
        put(&mut core, name, number, Duration::ZERO);
    }
    let listing = core.list(&scope("core/pods"), Some(2), None).unwrap();
    let rows: Vec<_> =
        listing.rows.iter().map(|(path, e)| (&**path, e.value()["n"].clone())).collect();
    assert_eq!(rows, [("default/a", json!(1)), ("default/b", json!(2))]);
    let rest = core.list(&scope("core/pods"), Some(2), Some("default/a")).unwrap();
    assert_eq!(rest.rows.len(), 1);
}

#[test]
fn history_is_bounded_and_a_reader_behind_it_is_told() {
    let mut core = Mvcc::new(options(), 0);
    let count = u64::try_from(RING_EVENTS).unwrap() + 10;
    for number in 1..=count {
        put(&mut core, "a", number, Duration::from_millis(number / 1000));
    }
    let expired = core.events(&scope("core/pods"), &mut 9).unwrap_err();
    assert_eq!((expired.asked, expired.oldest), (9, 10));
    let mut cursor = 10;
    let mut seen = 0;
    while cursor < core.revision() {
        seen += core.events(&scope("core/pods"), &mut cursor).unwrap().events.len();
    }
    assert_eq!(seen, RING_EVENTS);
    core.list(&scope("core/pods"), Some(9), None).unwrap_err();
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart_and_revisions_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let store = Embedded::open(&path, options()).unwrap();
    let event = key("core/events", "e");
    store.commit(Txn::put(event, draft("e", 1), Expect::Absent)).await.unwrap();
    let pod = key("core/pods", "a");
    store.commit(Txn::put(pod.clone(), draft("a", 1), Expect::Absent)).await.unwrap();
    assert!(matches!(Embedded::open(&path, options()), Err(OpenError::InUse { .. })));
    store.close().await.unwrap();
    let late = store.commit(Txn::delete(pod.clone(), Expect::Anything)).await;
    assert!(matches!(late, Err(CommitError::Closed)), "{late:?}");
    drop(store);

    let store = Embedded::open(&path, options()).unwrap();
    assert_eq!(store.revision(), 2);
    assert_eq!(store.get(&pod).await.unwrap().unwrap().value()["metadata"]["resourceVersion"], "2");
    assert_eq!(store.list(all("core/events")).await.unwrap().rows.len(), 1);
    let mut watcher = store.watch(scope("core/pods"), 2);
    store.commit(Txn::delete(pod, Expect::Revision(2))).await.unwrap();
    let progress = watcher.next().await.unwrap();
    assert_eq!((progress.events.len(), progress.revision), (1, 3));
    let Change::Delete { last, .. } = &progress.events[0].change else { panic!("{progress:?}") };
    assert_eq!(last.value()["metadata"]["resourceVersion"], "3");
    assert!(store.watch(scope("core/pods"), 1).next().await.is_err(), "before the restart");
}

/// Not a test of its own: the process that `kill_9_loses_no_acknowledged_write` kills.
#[tokio::test]
async fn child_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let store = Embedded::open(&Path::new(&dir).join("state.db"), options()).unwrap();
    let store = Arc::new(store);
    for round in 0_u64.. {
        let writes = (0..8).map(|lane| {
            let store = Arc::clone(&store);
            let name = format!("p{lane}-{round}");
            async move {
                let event = key("core/events", &name);
                store.commit(Txn::put(event, draft(&name, round), Expect::Absent)).await.unwrap();
                let pod = key("core/pods", &name);
                store.commit(Txn::put(pod, draft(&name, round), Expect::Absent)).await.unwrap();
                let line = format!("acknowledged {name} {}\n", store.revision());
                std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
            }
        });
        futures::future::join_all(writes).await;
    }
}

#[tokio::test]
async fn kill_9_loses_no_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::tests::child_that_writes_until_it_is_killed", "--nocapture"])
        .env(CHILD_DIR, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut acknowledged = Vec::new();
    while acknowledged.len() < 300 {
        let line = lines.next().expect("the child ended by itself");
        acknowledged.extend(line.split_once("acknowledged ").map(|(_, rest)| rest.to_owned()));
    }
    child.kill().unwrap();
    acknowledged
        .extend(lines.filter_map(|l| l.split_once("acknowledged ").map(|(_, r)| r.to_owned())));
    child.wait().unwrap();

    let store = Embedded::open(&dir.path().join("state.db"), options()).unwrap();
    let mut newest = 0;
    for line in &acknowledged {
        let (name, revision) = line.split_once(' ').unwrap();
        newest = newest.max(revision.parse::<u64>().unwrap());
        let found = store.get(&key("core/pods", name)).await.unwrap();
        let value: Arc<Value> = found.unwrap_or_else(|| panic!("{name} is lost")).value();
        assert_eq!(value["metadata"]["name"], name);
    }
    assert!(store.revision() >= newest, "revisions ran backwards");
}

/// A small file system, taken down at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None`, with a word about it, for who may not mount.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Self(dir);
        if disk.mount("size=1m") {
            return Some(disk);
        }
        skip::because("a small file system could not be mounted");
        None
    }

    fn mount(&self, options: &str) -> bool {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "small"])
            .arg(self.0.path())
            .stderr(Stdio::null())
            .status();
        mount.is_ok_and(|status| status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(self.0.path()).status());
    }
}

async fn names(store: &Embedded) -> Vec<String> {
    let rows = store.list(all("core/pods")).await.unwrap().rows;
    rows.iter().map(|(path, _)| path.trim_start_matches("default/").to_owned()).collect()
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_loses_none_that_was_acknowledged() {
    let Some(disk) = SmallDisk::new() else { return };
    let path = disk.0.path().join("state.db");
    let store = Embedded::open(&path, options()).unwrap();
    let large = |name: &str| {
        let object = json!({"metadata": {"name": name}, "n": "x".repeat(50_000)});
        Txn::put(key("core/pods", name), Draft::new(&object, Attributes::default()), Expect::Absent)
    };
    let mut written = Vec::new();
    let refused = loop {
        let name = format!("p{}", written.len());
        match store.commit(large(&name)).await {
            Ok(_) => written.push(name),
            Err(error) => break error,
        }
    };
    assert!(matches!(&refused, CommitError::Storage(why) if why.contains("full")), "{refused:?}");
    assert!(written.len() > 3, "{written:?}");
    let lost = format!("p{}", written.len());
    let mut expected = written.clone();
    expected.sort();
    let seen = names(&store).await;
    assert_eq!(seen, expected, "what was refused is not there, all else is");
    // Nothing is stuck once there is room again.
    assert!(disk.mount("remount,size=8m"));
    store.commit(large("later")).await.unwrap();
    store.commit(large(&lost)).await.unwrap();
    store.close().await.unwrap();
    drop(store);
    let store = Embedded::open(&path, options()).unwrap();
    expected.extend(["later".to_owned(), lost]);
    expected.sort();
    let seen = names(&store).await;
    assert_eq!(seen, expected);
}
