//! The sample's client: requests with a DNS look-up each and a line for every one; also what takes
//! memory on purpose, and a clock that can be compared with the host's.
//!
//! Static and alone in an image, so it uses nothing but the standard library: its own DNS query (the
//! C library cannot load its name services when linked statically) and its own HTTP/1.1 request.

mod dns;

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// A connection or an answer that takes longer counts as failed. Three segments lost one after the other, as when a
/// VM stands still, cost 7 s (Linux sends a SYN again after 1, 3 and 7 s); a flow that is lost for good never comes.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for one answer of the DNS server before the next try (resolv.conf's default).
const DNS_TIMEOUT: Duration = Duration::from_secs(5);

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "its output is its result")]
fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.split_first() {
        Some((&"http", rest)) => http(rest),
        Some((&"memory", rest)) => memory(rest),
        Some((&"clock", [])) => {
            println!("{}", now_ms());
            Ok(())
        }
        _ => Err("usage: load http --host H [--port 80] [--count N] [--seconds S] [--pause-ms 0] \
                  [--parallel 1] [--until FILE] | load memory --mib N | load clock"
            .to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("load: {line}");
            ExitCode::from(2)
        }
    }
}

/// The value after `--name`, or the default.
fn flag(args: &[&str], name: &str, default: Option<u64>) -> Result<u64, String> {
    match text(args, name) {
        Some(value) => value.parse().map_err(|error| format!("{name} {value}: {error}")),
        None => default.ok_or_else(|| format!("{name} is missing")),
    }
}

fn text<'a>(args: &[&'a str], name: &str) -> Option<&'a str> {
    args.iter().position(|arg| *arg == name).and_then(|at| args.get(at + 1)).copied()
}

/// One line a request: `<start, ms since 1970> <connection, µs after it> <duration, µs> ok <first line>` or
/// `… failed <why>`. `-` stands for a connection that never began, as the name was not found. Ends by itself, or when
/// the file of `--until` is there.
#[expect(clippy::print_stdout, reason = "its output is its result")]
#[expect(clippy::disallowed_methods, reason = "plain threads that pace themselves")]
fn http(args: &[&str]) -> Result<(), String> {
    let host = text(args, "--host").ok_or("--host is missing")?;
    let port = flag(args, "--port", Some(80))?;
    let port = u16::try_from(port).map_err(|error| format!("--port {port}: {error}"))?;
    let count = flag(args, "--count", Some(u64::MAX))?;
    let seconds = flag(args, "--seconds", Some(3600))?;
    let pause = Duration::from_millis(flag(args, "--pause-ms", Some(0))?);
    let end = text(args, "--until").map(Path::new);
    let parallel = flag(args, "--parallel", Some(1))?;
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let one_after_the_other = || {
        while began.elapsed() < Duration::from_secs(seconds) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || end.is_some_and(Path::exists) {
                break;
            }
            let start = now_ms();
            let clock = Instant::now();
            let micros = || clock.elapsed().as_micros();
            let (connection, answer) = match resolve(host, number) {
                Ok(ip) => (micros().to_string(), request((ip, port).into(), host)),
                Err(why) => ("-".to_owned(), Err(why)),
            };
            let outcome = match answer {
                Ok(line) => format!("ok {line}"),
                Err(why) => format!("failed {why}"),
            };
            println!("{start} {connection} {} {outcome}", micros());
            thread::sleep(pause);
        }
    };
    thread::scope(|scope| {
        for _ in 1..parallel {
            scope.spawn(one_after_the_other);
        }
        one_after_the_other();
    });
    Ok(())
}

/// Connection, request, reply; the body's first line.
fn request(address: SocketAddr, host: &str) -> Result<String, String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)
        .map_err(|error| format!("connect to {address}: {error}"))?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(|error| format!("set time limit: {error}"))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        .map_err(|error| format!("send to {address}: {error}"))?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).map_err(|error| format!("read from {address}: {error}"))?;
    let (head, body) =
        reply.split_once("\r\n\r\n").ok_or_else(|| format!("short reply from {address}"))?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(format!("{address}: {}", head.lines().next().unwrap_or_default()));
    }
    Ok(body.lines().next().unwrap_or_default().to_owned())
}

/// As the C library does it: `/etc/resolv.conf`, its search list, two tries a server.
fn resolve(host: &str, number: u64) -> Result<Ipv4Addr, String> {
    if let Ok(ip) = host.parse() {
        return Ok(ip);
    }
    let text =
        fs::read_to_string("/etc/resolv.conf").map_err(|error| format!("resolv.conf: {error}"))?;
    let conf = dns::ResolvConf::parse(&text);
    let mut why = format!("{host}: no name server in resolv.conf");
    for name in conf.candidates(host) {
        for server in conf.servers.iter().chain(&conf.servers) {
            let id = u16::try_from((now_ms() ^ number) & 0xffff).unwrap_or_default();
            match ask(*server, &dns::query(id, &name), id) {
                Ok(dns::Answer::Address(ip)) => return Ok(ip),
                Ok(dns::Answer::None(code)) => {
                    why = format!("{name}: no address, code {code}");
                    break;
                }
                Err(error) => why = format!("{name} from {server}: {error}"),
            }
        }
    }
    Err(why)
}

fn ask(server: Ipv4Addr, query: &[u8], id: u16) -> Result<dns::Answer, String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|error| error.to_string())?;
    socket.set_read_timeout(Some(DNS_TIMEOUT)).map_err(|error| error.to_string())?;
    socket.send_to(query, (server, 53)).map_err(|error| error.to_string())?;
    let mut reply = [0; 1500];
    let (size, from) = socket.recv_from(&mut reply).map_err(|error| error.to_string())?;
    if from.ip() != server {
        return Err(format!("the answer came from {from}"));
    }
    dns::parse(reply.get(..size).unwrap_or_default(), id)
        .ok_or_else(|| "a broken answer".to_owned())
}

/// Takes memory and touches each page, 1 MiB at a time; the kernel ends it at its limit.
#[expect(clippy::print_stdout, reason = "its output is its result")]
fn memory(args: &[&str]) -> Result<(), String> {
    let mut held: Vec<Vec<u8>> = Vec::new();
    for taken in 1..=flag(args, "--mib", None)? {
        held.push(vec![1; 1 << 20]);
        println!("holding {taken} MiB");
    }
    println!("held {} MiB without being ended", held.len());
    Ok(())
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
