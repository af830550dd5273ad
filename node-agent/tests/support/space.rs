//! A network namespace that lives as long as its thread, in which work can be run.

use std::{path::PathBuf, sync::mpsc, thread, time::Duration};

use super::place::own_namespaces;

type Work = Box<dyn FnOnce() + Send>;

/// The namespace; dropping it ends its thread and with it the namespace, once nothing else is in it.
pub(crate) struct Space {
    /// Names the namespace to `ip link set … netns`.
    pub(crate) tid: i32,
    /// A BPF file system of its own, visible to work only.
    pub(crate) bpf: PathBuf,
    work: mpsc::Sender<Work>,
}

impl Space {
    pub(crate) fn new() -> Self {
        let (work, todo) = mpsc::channel::<Work>();
        let (born, birth) = mpsc::channel();
        let _thread = thread::spawn(move || {
            let bpf = own_namespaces();
            born.send((nix::unistd::gettid().as_raw(), bpf)).unwrap();
            while let Ok(work) = todo.recv() {
                work();
            }
        });
        let (tid, bpf) = birth.recv().unwrap();
        Self { tid, bpf, work }
    }

    /// Runs work inside and waits for its value. A panic in there fails the caller.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.spawn(move || done.send(work()).unwrap());
        result.recv().expect("the work ends without a panic")
    }

    /// Runs long work inside, on a thread of its own, and does not wait.
    pub(crate) fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        // Threads inherit the namespaces of the thread that makes them.
        let start = move || drop(thread::spawn(work));
        self.work.send(Box::new(start)).unwrap();
    }

    /// Waits until agents that were told to stop have gone.
    pub(crate) fn settle(&self) {
        pause(Duration::from_millis(200));
        self.run(|| ());
    }
}

/// Waits for what cannot be watched from outside.
#[expect(clippy::disallowed_methods, reason = "no runtime here whose worker could be blocked")]
pub(crate) fn pause(time: Duration) {
    thread::sleep(time);
}
