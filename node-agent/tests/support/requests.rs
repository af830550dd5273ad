//! Clients that ask all the time servers that answer with a number.

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use super::space::{Space, pause};

/// How long an answer may take. A lost first packet of a connection is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two requests that may each open a flow: so few that the connection table holds what has not been
/// collected yet.
pub(crate) const BREATH: Duration = Duration::from_millis(3);
/// Requests of one connected socket, before another one takes its place.
const REQUESTS: usize = 40;

/// Ports of sockets that are not connected, apart from those that the kernel gives to connected ones: an
/// answer to a datagram that was translated at its socket is still taken for one of a flow that had the same
/// port to the same backend before (`packets/meeting.rs`).
const FIRST_PORT: u16 = 10_000;
const PORTS: u16 = 10_000;
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

/// How a client asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// A connection of TCP for each request.
    Connection,
    /// A connected socket of UDP that goes on for a while.
    Connected,
    /// A socket of UDP that says with each datagram where it goes.
    Datagram,
}

/// What became of the requests.
#[derive(Debug)]
pub(crate) struct Outcome {
    #[expect(dead_code, reason = "printed")]
    pub(crate) kind: Kind,
    pub(crate) answered: usize,
    /// The first few that were not answered.
    pub(crate) failures: Vec<String>,
    /// Who answered.
    pub(crate) backends: BTreeSet<u8>,
}

/// A client that asks until it is stopped.
pub(crate) struct Requests {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    outcome: mpsc::Receiver<Outcome>,
}

impl Requests {
    /// Begins to ask, with so long a pause between two requests.
    pub(crate) fn start(space: &Space, kind: Kind, to: Vec<SocketAddr>, breath: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (done, outcome) = mpsc::channel();
        let answered = Arc::new(AtomicUsize::new(0));
        let so_far = (Arc::clone(&stop), Arc::clone(&answered));
        space.spawn(move || {
            done.send(ask_until((&so_far.0, &so_far.1), kind, &to, breath)).unwrap();
        });
        Self { stop, answered, outcome }
    }

    /// How many requests were answered so far.
    pub(crate) fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    pub(crate) fn stop(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        self.outcome.recv().expect("a client ends without a panic")
    }
}

fn ask_until(
    (stop, answered): (&AtomicBool, &AtomicUsize),
    kind: Kind,
    to: &[SocketAddr],
    breath: Duration,
) -> Outcome {
    let mut outcome =
        Outcome { kind, answered: 0, failures: Vec::new(), backends: BTreeSet::new() };
    let mut sockets: Vec<Option<UdpSocket>> = to.iter().map(|_| None).collect();
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) || outcome.failures.len() > 4 {
            break;
        }
        let at = turn % to.len();
        let address = to[at];
        if turn % (REQUESTS * to.len()) == 0 {
            sockets.fill_with(|| None);
        }
        let answer = match kind {
            Kind::Connection => connection(address),
            Kind::Connected => connected(address, &mut sockets[at]),
            Kind::Datagram => datagram(address, &mut sockets[at]),
        };
        match answer {
            Ok(backend) => {
                outcome.answered += 1;
                answered.store(outcome.answered, Ordering::Relaxed);
                outcome.backends.insert(backend);
            }
            Err(error) => outcome.failures.push(format!("{turn} to {address}: {error}")),
        }
        pause(breath);
    }
    outcome
}

fn connection(to: SocketAddr) -> io::Result<u8> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = *b"?";
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    Ok(byte[0])
}

/// A socket of UDP for this address, with this port of its own; 0 leaves that to the kernel.
fn udp(to: SocketAddr, port: u16) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn connected(to: SocketAddr, kept: &mut Option<UdpSocket>) -> io::Result<u8> {
    if kept.is_none() {
        let socket = udp(to, 0)?;
        socket.connect(to)?;
        *kept = Some(socket);
    }
    let Some(socket) = kept else { unreachable!("it was made just now") };
    let mut byte = *b"?";
    socket.send(&byte)?;
    socket.recv(&mut byte)?;
    Ok(byte[0])
}

fn datagram(to: SocketAddr, kept: &mut Option<UdpSocket>) -> io::Result<u8> {
    if kept.is_none() {
        let port = FIRST_PORT + NEXT_PORT.fetch_add(1, Ordering::Relaxed) % PORTS;
        *kept = Some(udp(to, port)?);
    }
    let Some(socket) = kept else { unreachable!("it was made just now") };
    let mut byte = *b"?";
    socket.send_to(&byte, to)?;
    let (_, from) = socket.recv_from(&mut byte)?;
    if from != to {
        return Err(io::Error::other(format!("an answer of {from}")));
    }
    Ok(byte[0])
}
