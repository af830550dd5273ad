//! Events of connections: from the programs' ring to whoever listens.
//!
//! Task [`run`] owns the ring and the listeners' queues. While there is a listener it asks, by `wanted`,
//! that programs write events; the dataplane's task sets their flag and says so by `active`. Without a
//! listener the programs write nothing.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray, RingBuf},
};
use ebpf_common::{
    conntrack::{FORWARD, Flow, FlowKey},
    event::{CLOSED, Event, PACKET},
    maps as names,
    service::Peer,
};
use rustix::time::Timespec;
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, watch},
    time,
};

use super::load::LoadError;
use crate::sys::exec;

/// Listeners at a time; one more is refused.
pub const LISTENERS: usize = 8;
/// Events that wait for a listener; what comes beyond is counted and told to it.
const QUEUE: usize = 4_096;
/// How often lost events are looked up, and listeners that have gone are let go.
const TICK: Duration = Duration::from_millis(500);
/// Messages that wait for the task.
const MESSAGES: usize = 16;

/// What a listener gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    Event(Event),
    /// So many events were lost here, since somebody was too slow.
    Lost(u64),
}

/// The programs' ring, and how often it had no room.
pub struct Ring {
    ring: RingBuf<MapData>,
    lost: PerCpuArray<MapData, u64>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// Takes the ring of a loaded object.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the object lacks it or has it in another shape.
    pub fn take(object: &mut Ebpf) -> Result<Self, LoadError> {
        let mut map = |name| object.take_map(name).ok_or(LoadError::NoMap { name });
        let (ring, lost) = (map(names::EVENTS)?, map(names::EVENTS_LOST)?);
        let failed = |name| move |source| LoadError::Map { name, source };
        Ok(Self {
            ring: RingBuf::try_from(ring).map_err(failed(names::EVENTS))?,
            lost: PerCpuArray::try_from(lost).map_err(failed(names::EVENTS_LOST))?,
        })
    }

    /// What tells that there are events.
    fn alarm(&self) -> io::Result<AsyncFd<OwnedFd>> {
        exec::watch(self.ring.as_fd().try_clone_to_owned()?)
    }

    /// The next event, if there is one.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "the ring may have more later")]
    pub fn next(&mut self) -> Option<Event> {
        self.ring.next().and_then(|item| Event::read(&item))
    }

    /// Events for which there was no room since the ring was made.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn lost(&self) -> io::Result<u64> {
        let counts = self.lost.get(&0, 0).map_err(io::Error::other)?;
        Ok(counts.iter().sum())
    }
}

/// Where listeners come to.
#[derive(Clone, Debug)]
pub struct Events {
    messages: mpsc::Sender<Message>,
    active: watch::Receiver<bool>,
}

enum Message {
    Listen(mpsc::Sender<Item>),
    Ended(Vec<Event>),
}

/// What the dataplane's task has of events.
#[derive(Debug)]
pub(super) struct Teller {
    messages: mpsc::Sender<Message>,
    /// Somebody listens.
    pub(super) wanted: watch::Receiver<bool>,
    /// Programs write events.
    pub(super) active: watch::Sender<bool>,
}

impl Teller {
    /// Tells of flows that are over since nothing comes any more, at `now` of the monotonic clock. Of
    /// those that said so themselves the programs have told.
    pub(super) fn ended(&self, now: &Timespec, rows: &[(FlowKey, Flow)], over: &[FlowKey]) {
        if !*self.wanted.borrow() || over.is_empty() {
            return;
        }
        let at = now.tv_sec.cast_unsigned().saturating_mul(1_000_000_000);
        let over: BTreeSet<&FlowKey> = over.iter().collect();
        let rows = rows.iter().filter(|(key, _)| over.contains(key));
        let quiet = rows.filter(|(_, flow)| flow.direction == FORWARD && !flow.is_closing());
        let ended = quiet.map(|(key, flow)| ended(at, key, flow)).collect();
        // Without room the listeners do without.
        let _full: Result<(), _> = self.messages.try_send(Message::Ended(ended));
    }
}

fn ended(at: u64, key: &FlowKey, flow: &Flow) -> Event {
    Event {
        at,
        key: *key,
        source: Peer { addr: flow.src, port: flow.sport, reserved: [0; 2] },
        to: Peer { addr: flow.dst, port: flow.dport, reserved: [0; 2] },
        kind: CLOSED,
        path: PACKET,
        direction: flow.direction,
        ..Event::default()
    }
}

/// Hears events until it is dropped.
#[derive(Debug)]
pub struct Listener {
    items: mpsc::Receiver<Item>,
    active: watch::Receiver<bool>,
}

impl Events {
    /// Listens from now on; `None` when the dataplane has ended.
    pub async fn listen(&self) -> Option<Listener> {
        let (sender, items) = mpsc::channel(QUEUE);
        self.messages.send(Message::Listen(sender)).await.ok()?;
        Some(Listener { items, active: self.active.clone() })
    }
}

impl Listener {
    /// Waits until programs write events. Returns whether they do: not when there are too many
    /// listeners, or the dataplane has ended.
    pub async fn ready(&mut self) -> bool {
        if self.items.is_closed() {
            return false;
        }
        self.active.wait_for(|active| *active).await.is_ok()
    }

    /// Waits for events and takes up to `limit` of them; 0 when there are no more.
    pub async fn next_many(&mut self, into: &mut Vec<Item>, limit: usize) -> usize {
        self.items.recv_many(into, limit).await
    }
}

/// The state of the task.
pub(super) struct Hub {
    messages: mpsc::Receiver<Message>,
    wanted: watch::Sender<bool>,
    queues: Vec<Queue>,
}

/// A listener's queue, and how many events did not fit into it.
struct Queue {
    sender: mpsc::Sender<Item>,
    lost: u64,
}

/// The parts of the way of events: where listeners come to, what the dataplane's task has, and what
/// [`run`] has.
pub(super) fn parts() -> (Events, Teller, Hub) {
    let (messages, received) = mpsc::channel(MESSAGES);
    let (wanted_tx, wanted) = watch::channel(false);
    let (active_tx, active) = watch::channel(false);
    (
        Events { messages: messages.clone(), active },
        Teller { messages, wanted, active: active_tx },
        Hub { messages: received, wanted: wanted_tx, queues: Vec::new() },
    )
}

/// Hands events on until the dataplane ends.
pub(super) async fn run(mut ring: Ring, mut hub: Hub) {
    let alarm = match ring.alarm() {
        Ok(alarm) => alarm,
        Err(error) => {
            tracing::warn!(%error, "events of connections cannot be followed");
            return;
        }
    };
    let mut told = ring.lost().unwrap_or(0);
    let mut tick = time::interval(TICK);
    loop {
        tokio::select! {
            ready = alarm.readable() => {
                let Ok(mut ready) = ready else { return };
                // Before they are read: what comes meanwhile rings again.
                ready.clear_ready();
                while let Some(event) = ring.next() {
                    hub.tell(Item::Event(event));
                }
            }
            message = hub.messages.recv() => match message {
                Some(message) => hub.take(message),
                None => return,
            },
            _instant = tick.tick(), if !hub.queues.is_empty() => {
                let lost = ring.lost().unwrap_or(told);
                if lost != told {
                    hub.tell(Item::Lost(lost.saturating_sub(told)));
                    told = lost;
                }
                hub.let_go();
            }
        }
    }
}

impl Hub {
    fn take(&mut self, message: Message) {
        match message {
            // Its queue closes, which tells it.
            Message::Listen(_) if self.queues.len() >= LISTENERS => {}
            Message::Listen(sender) => {
                self.queues.push(Queue { sender, lost: 0 });
                self.wanted.send_replace(true);
            }
            Message::Ended(events) => {
                events.into_iter().for_each(|event| self.tell(Item::Event(event)));
            }
        }
    }

    fn tell(&mut self, item: Item) {
        for queue in &mut self.queues {
            queue.put(item);
        }
    }

    /// Forgets who has gone, and tells the others what they lost.
    fn let_go(&mut self) {
        self.queues.retain(|queue| !queue.sender.is_closed());
        for queue in &mut self.queues {
            queue.confess();
        }
        if self.queues.is_empty() {
            self.wanted.send_replace(false);
        }
    }
}

impl Queue {
    fn put(&mut self, item: Item) {
        self.confess();
        let weight = match item {
            Item::Event(_) => 1,
            Item::Lost(count) => count,
        };
        if self.lost > 0 || self.sender.try_send(item).is_err() {
            self.lost += weight;
        }
    }

    fn confess(&mut self) {
        if self.lost > 0 && self.sender.try_send(Item::Lost(self.lost)).is_ok() {
            self.lost = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn next(listener: &mut Listener) -> Option<Item> {
        let mut items = Vec::new();
        listener.next_many(&mut items, 1).await;
        items.pop()
    }

    fn event(at: u64) -> Item {
        Item::Event(Event { at, ..Event::default() })
    }

    #[tokio::test]
    async fn programs_are_asked_for_events_while_somebody_listens() {
        let (events, teller, mut hub) = parts();
        let mut first = events.listen().await.expect("it runs");
        let message = hub.messages.recv().await.expect("a listener");
        assert!(!*teller.wanted.borrow());
        hub.take(message);
        assert!(*teller.wanted.borrow());
        teller.active.send_replace(true);
        assert!(first.ready().await);
        hub.tell(event(1));
        assert_eq!(next(&mut first).await, Some(event(1)));
        hub.let_go();
        assert!(*teller.wanted.borrow(), "it still listens");
        drop(first);
        hub.let_go();
        assert!(!*teller.wanted.borrow(), "it has gone");
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_how_much_it_lost_and_others_lose_nothing() {
        let (events, _teller, mut hub) = parts();
        let mut slow = events.listen().await.expect("it runs");
        let mut quick = events.listen().await.expect("it runs");
        for _ in 0..2 {
            let message = hub.messages.recv().await.expect("a listener");
            hub.take(message);
        }
        let many = u64::try_from(QUEUE).expect("small");
        for at in 0..many + 10 {
            hub.tell(event(at));
            assert_eq!(next(&mut quick).await, Some(event(at)));
        }
        assert_eq!(next(&mut slow).await, Some(event(0)));
        hub.let_go();
        for at in 1..many {
            assert_eq!(next(&mut slow).await, Some(event(at)), "in order");
        }
        assert_eq!(next(&mut slow).await, Some(Item::Lost(10)));
        hub.tell(event(7));
        assert_eq!(next(&mut slow).await, Some(event(7)), "and goes on");
    }

    #[tokio::test]
    async fn one_listener_too_many_is_refused() {
        let (events, _teller, mut hub) = parts();
        let mut listeners = Vec::new();
        for _ in 0..=LISTENERS {
            listeners.push(events.listen().await.expect("it runs"));
            let message = hub.messages.recv().await.expect("a listener");
            hub.take(message);
        }
        let mut last = listeners.pop().expect("one more");
        assert!(!last.ready().await);
        assert_eq!(next(&mut last).await, None);
        assert_eq!(hub.queues.len(), LISTENERS);
    }
}
