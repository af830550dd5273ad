//! A network namespace that lives as long as its thread, in which work can be run.

use std::{
    mem,
    path::PathBuf,
    sync::{
        Mutex,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use super::place::own_namespaces;

type Work = Box<dyn FnOnce() + Send>;

/// Longest that an agent takes to go once it was told to stop.
const GOES: Duration = Duration::from_secs(60);

/// The namespace; dropping it ends its thread and with it the namespace, once nothing else is in it.
pub(crate) struct Space {
    /// Names the namespace to `ip link set … netns`.
    pub(crate) tid: i32,
    /// A BPF file system of its own, visible to work only.
    pub(crate) bpf: PathBuf,
    work: mpsc::Sender<Work>,
    /// One for each agent, on which nothing comes but its end.
    agents: Mutex<Vec<mpsc::Receiver<()>>>,
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
        Self { tid, bpf, work, agents: Mutex::default() }
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

    /// As `spawn`, for an agent, whose end `settle` waits for.
    pub(crate) fn spawn_agent(&self, work: impl FnOnce() + Send + 'static) {
        let (alive, end) = mpsc::channel();
        self.agents.lock().unwrap().push(end);
        self.spawn(move || {
            work();
            drop(alive);
        });
    }

    /// Waits until all agents of this space, which were told to stop, have gone.
    pub(crate) fn settle(&self) {
        let agents = mem::take(&mut *self.agents.lock().unwrap());
        for end in agents {
            assert_eq!(end.recv_timeout(GOES), Err(RecvTimeoutError::Disconnected), "it goes on");
        }
    }
}

/// Waits for what cannot be watched from outside.
#[expect(clippy::disallowed_methods, reason = "no runtime here whose worker could be blocked")]
pub(crate) fn pause(time: Duration) {
    thread::sleep(time);
}
