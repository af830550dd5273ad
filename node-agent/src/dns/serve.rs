//! The sockets: queries in, answers out, over UDP and TCP.
//!
//! Effects. Cluster names are answered in the receiving task; what an upstream server must be asked
//! for gets a task of its own, of which there is a bounded number.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    answer::{Knowledge, Outcome, Transport, answer, complete, failure},
    upstream,
    zone::Zone,
};
use crate::sys::socket::take_queued;

/// Queries at upstream servers at a time; more are answered with "server failure" at once. Each
/// costs a socket and some 5 KiB.
const UPSTREAM_QUERIES: usize = 512;
/// TCP connections at a time; more wait in the listen queue.
const CONNECTIONS: usize = 128;
/// How long a TCP client may be silent (RFC 7766 section 6.2.3 asks for seconds).
const IDLE: Duration = Duration::from_secs(10);
/// Longest query taken over UDP.
const QUERY_BYTES: usize = 4096;

/// Longer than the kernel takes from choosing a socket for a datagram to queueing it there.
const HANDING_OVER: Duration = Duration::from_millis(50);

/// What all sockets share.
#[derive(Debug)]
pub(super) struct Server {
    domain: Box<str>,
    zone: watch::Receiver<Option<Arc<Zone>>>,
    servers: watch::Receiver<Arc<[SocketAddr]>>,
    upstream_queries: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    pub(super) fn new(
        domain: &str,
        zone: watch::Receiver<Option<Arc<Zone>>>,
        servers: watch::Receiver<Arc<[SocketAddr]>>,
    ) -> Self {
        Self {
            domain: domain.to_ascii_lowercase().into(),
            zone,
            servers,
            upstream_queries: Arc::new(Semaphore::new(UPSTREAM_QUERIES)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }

    /// Waits until nobody waits for an answer of ours any more.
    pub(super) async fn finished(&self) {
        let all = u32::try_from(UPSTREAM_QUERIES).unwrap_or(u32::MAX);
        // The semaphore is never closed, so this cannot fail.
        drop(self.upstream_queries.acquire_many(all).await);
        let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
        drop(self.connections.acquire_many(all).await);
    }

    fn decide(&self, query: &[u8], transport: Transport) -> Outcome {
        let zone = self.zone.borrow().clone();
        answer(query, Knowledge { zone: zone.as_deref(), domain: &self.domain }, transport)
    }

    fn permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.upstream_queries).try_acquire_owned().ok()
    }

    /// Does what was decided; `None` sends nothing.
    async fn finish(
        &self,
        outcome: Outcome,
        query: &[u8],
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let servers = Arc::clone(&self.servers.borrow());
        match outcome {
            Outcome::Reply(reply) => Some(reply),
            Outcome::Ignore => None,
            Outcome::Forward => match upstream::ask(&servers, query, transport).await {
                Some(reply) => Some(reply),
                None => failure(query, transport),
            },
            Outcome::Resolve(pending) => {
                let resolved = upstream::resolve(&servers, &pending).await;
                Some(complete(pending, resolved))
            }
        }
    }
}

/// Answers over UDP until told to stop, then what has arrived by then.
pub(super) async fn serve_udp(
    socket: UdpSocket,
    server: Arc<Server>,
    stop: CancellationToken,
) -> io::Result<()> {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; QUERY_BYTES];
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, peer)) => {
                    let query = buffer.get(..length).unwrap_or_default();
                    answer_udp(&socket, &server, query, peer);
                }
                Err(error) => {
                    tracing::warn!(%error, "query not received");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
            () = stop.cancelled() => break,
        }
    }
    // A connected socket takes no more from strangers: the kernel gives new queries to the
    // successor, which shares our address, and what is queued here is still answered.
    socket.connect(socket.local_addr()?).await?;
    // A second look for what the kernel was handing to us while we connected.
    for pause in [Duration::ZERO, HANDING_OVER] {
        tokio::time::sleep(pause).await;
        while let Some((length, peer)) = take_queued(&*socket, &mut buffer)? {
            answer_udp(&socket, &server, buffer.get(..length).unwrap_or_default(), peer);
        }
    }
    Ok(())
}

fn answer_udp(socket: &Arc<UdpSocket>, server: &Arc<Server>, query: &[u8], peer: SocketAddr) {
    let send = |reply: &[u8]| {
        // A full send buffer loses the answer, as the network may: the client asks again.
        if let Err(error) = socket.try_send_to(reply, peer) {
            tracing::debug!(%peer, %error, "answer not sent");
        }
    };
    match server.decide(query, Transport::Udp) {
        Outcome::Reply(reply) => send(&reply),
        Outcome::Ignore => {}
        outcome @ (Outcome::Forward | Outcome::Resolve(_)) => match server.permit() {
            Some(permit) => {
                let (socket, server) = (Arc::clone(socket), Arc::clone(server));
                let query = query.to_vec();
                tokio::spawn(async move {
                    let reply = server.finish(outcome, &query, Transport::Udp).await;
                    if let Some(reply) = reply
                        && let Err(error) = socket.send_to(&reply, peer).await
                    {
                        tracing::debug!(%peer, %error, "answer not sent");
                    }
                    drop(permit);
                });
            }
            None => {
                if let Some(reply) = failure(query, Transport::Udp) {
                    send(&reply);
                }
            }
        },
    }
}

/// Accepts TCP connections until told to stop.
pub(super) async fn serve_tcp(listener: TcpListener, server: Arc<Server>, stop: CancellationToken) {
    loop {
        let Ok(permit) = Arc::clone(&server.connections).acquire_owned().await else { return };
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (server, stop) = (Arc::clone(&server), stop.clone());
                    tokio::spawn(async move {
                        // How a client ends its connection is its own affair.
                        if let Err(error) = serve_connection(stream, &server, stop).await {
                            tracing::debug!(%error, "connection ended");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            () = stop.cancelled() => return,
        }
    }
}

async fn serve_connection(
    mut stream: TcpStream,
    server: &Server,
    stop: CancellationToken,
) -> io::Result<()> {
    loop {
        let query = tokio::select! {
            query = timeout(IDLE, upstream::read_message(&mut stream)) => query??,
            () = stop.cancelled() => return Ok(()),
        };
        let outcome = server.decide(&query, Transport::Tcp);
        let reply = match outcome {
            Outcome::Forward | Outcome::Resolve(_) => match server.permit() {
                Some(_permit) => server.finish(outcome, &query, Transport::Tcp).await,
                None => failure(&query, Transport::Tcp),
            },
            Outcome::Reply(reply) => Some(reply),
            Outcome::Ignore => None,
        };
        let Some(reply) = reply else { return Ok(()) };
        timeout(IDLE, upstream::write_message(&mut stream, &reply)).await??;
    }
}
