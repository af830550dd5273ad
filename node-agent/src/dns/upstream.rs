//! The servers that know the names outside the cluster.
//!
//! `servers_of` is pure; the exchanges are effects.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{
    answer::{Pending, Transport},
    message::{Record, encode_query, is_answer_to, parse_upstream},
};

/// Servers taken from the file: as many as libc takes (`MAXNS`).
const SERVERS: usize = 3;
/// One try. Two of them end before libc's own five seconds do.
const TRY: Duration = Duration::from_secs(2);
const TRIES: usize = 2;
/// Longest answer over UDP that we take: the payload size that clients announce at most.
const ANSWER_BYTES: usize = 4096;

/// The servers of a `resolv.conf`, without those that are ourselves.
#[must_use]
pub fn servers_of(resolv_conf: &str, ours: &[IpAddr]) -> Vec<SocketAddr> {
    let servers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let keyword = words.next().filter(|word| *word == "nameserver");
        keyword.and_then(|_| words.next())?.parse::<IpAddr>().ok()
    });
    servers.filter(|ip| !ours.contains(ip)).take(SERVERS).map(|ip| (ip, 53).into()).collect()
}

/// Asks the servers in turn until one answers; `None` when none does.
pub(super) async fn ask(
    servers: &[SocketAddr],
    query: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    for server in servers.iter().cycle().take(TRIES.max(servers.len()).min(servers.len() * TRIES)) {
        let exchange = async {
            match transport {
                Transport::Udp => ask_by_udp(*server, query).await,
                Transport::Tcp => ask_by_tcp(*server, query).await,
            }
        };
        match timeout(TRY, exchange).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::debug!(%server, %error, "upstream server failed"),
            Err(_) => tracing::debug!(%server, "upstream server did not answer"),
        }
    }
    None
}

/// Resolves the target of an alias; `None` when no server answers.
pub(super) async fn resolve(
    servers: &[SocketAddr],
    pending: &Pending,
) -> Option<(u16, Vec<Record>)> {
    let query = encode_query(0, &pending.target, pending.qtype);
    let mut read = parse_upstream(&ask(servers, &query, Transport::Udp).await?)?;
    if read.truncated {
        read = parse_upstream(&ask(servers, &query, Transport::Tcp).await?)?;
    }
    Some((read.rcode, read.answers))
}

/// A socket and an id of its own for each query: whoever wants to forge an answer must guess both.
async fn ask_by_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any = match server {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let sent = with_id(query, RandomState::new().build_hasher().finish().to_ne_bytes());
    socket.send(&sent).await?;
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        if is_answer_to(answer, &sent) {
            return Ok(with_id(answer, query));
        }
    }
}

async fn ask_by_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    if is_answer_to(&answer, query) {
        return Ok(answer);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question"))
}

/// The message with its first two bytes, the id, taken from `id`.
fn with_id(message: &[u8], id: impl AsRef<[u8]>) -> Vec<u8> {
    let mut message = message.to_vec();
    for (slot, byte) in message.iter_mut().take(2).zip(id.as_ref()) {
        *slot = *byte;
    }
    message
}

/// Reads a message with its length in front (RFC 1035 section 4.2.2).
pub(super) async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message with its length in front.
pub(super) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_as_libc_reads_them_and_never_ourselves() {
        let file = "# comment\nsearch a b\nnameserver 192.0.2.1\nnameserver\t169.254.20.10\n\
                    nameserver bogus\nnameserver 2001:db8::1\nnameserver 192.0.2.3\n\
                    nameserver 192.0.2.4\noptions ndots:5\n";
        let ours = ["169.254.20.10".parse().unwrap()];
        let servers: Vec<_> = servers_of(file, &ours).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.3:53"]);
        assert_eq!(servers_of("", &ours), []);
    }
}
