//! The DNS process: `node-agent dns`. It needs neither the agent nor the API server to answer.
//!
//! Effects. One thread. Every 200 ms it looks whether the agent has written another zone and
//! whether a successor has taken over.

use std::{
    ffi::OsString,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    net::{TcpListener, UdpSocket},
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{instance, serve, snapshot, upstream, zone::Zone};
use crate::sys::{daemon, memory, socket};

/// How often files are looked at. A change is visible after at most this and what the agent takes
/// to write it; five `stat` calls a second cost nothing that could be measured.
const LOOK: Duration = Duration::from_millis(200);
/// How long an ending process still works for clients whose names are at upstream servers.
const LAST_WORK: Duration = Duration::from_secs(5);

/// Arguments of the process.
#[derive(Clone, Debug, clap::Args)]
pub struct ProcessArgs {
    /// Folder of what lives until the next boot; the zone is `dns/zone` in it.
    #[arg(long, default_value = "/run/orlop")]
    pub run_dir: PathBuf,
    /// Folder of what outlives a boot; `dns/zone` in it is read when the other is not there.
    #[arg(long, default_value = "/var/lib/orlop")]
    pub state_dir: PathBuf,
    /// Address and port to answer on, UDP and TCP.
    #[arg(long, default_value = "169.254.20.10:53")]
    pub listen: SocketAddr,
    /// Domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    pub domain: String,
    /// Where the servers for all other names are listed.
    #[arg(long, default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// What the agent calls this build, to know when to replace it.
    #[arg(long, default_value = "")]
    pub build_id: String,
}

impl ProcessArgs {
    /// The command line that leads back to these arguments.
    #[must_use]
    pub fn to_command_line(&self) -> Vec<OsString> {
        let listen = self.listen.to_string();
        let pairs: [(&str, OsString); 6] = [
            ("--run-dir", self.run_dir.clone().into()),
            ("--state-dir", self.state_dir.clone().into()),
            ("--listen", listen.into()),
            ("--domain", self.domain.clone().into()),
            ("--resolv-conf", self.resolv_conf.clone().into()),
            ("--build-id", self.build_id.clone().into()),
        ];
        let flags = pairs.into_iter().flat_map(|(flag, value)| [flag.into(), value]);
        std::iter::once("dns".into()).chain(flags).collect()
    }
}

/// Why the process ends.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot claim {}", folder.display())]
    Claim { folder: PathBuf, source: io::Error },
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// Runs the process until it is told to end or a successor takes over.
///
/// # Errors
/// When it cannot start to serve.
pub fn run(args: ProcessArgs) -> Result<(), ProcessError> {
    // Started by hand from a shell we lead a group already, which is just as well.
    if let Err(error) = daemon::new_session() {
        tracing::debug!(%error, "no session of our own");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(ProcessError::Runtime)?.block_on(serve_until_replaced(args))
}

async fn serve_until_replaced(args: ProcessArgs) -> Result<(), ProcessError> {
    let (udp, tcp) = listen(args.listen)
        .map_err(|source| ProcessError::Listen { address: args.listen, source })?;
    let mut files = Files::new(&args);
    let zone = watch::Sender::new(files.first_zone());
    let servers = watch::Sender::new(files.servers().unwrap_or_else(|| Arc::new([])));
    let server = Arc::new(serve::Server::new(&args.domain, zone.subscribe(), servers.subscribe()));
    let stop = CancellationToken::new();
    let by_udp = tokio::spawn(serve::serve_udp(udp, Arc::clone(&server), stop.clone()));
    let by_tcp = tokio::spawn(serve::serve_tcp(tcp, Arc::clone(&server), stop.clone()));
    let folder = args.run_dir.join("dns");
    // Only who can answer claims to: the predecessor ends right after this.
    let claim = instance::claim(&folder, &args.build_id)
        .map_err(|source| ProcessError::Claim { folder, source })?;
    tracing::info!(address = %args.listen, build = args.build_id, "DNS server ready");
    let mut terminate = signal(SignalKind::terminate()).map_err(ProcessError::Signals)?;
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = ticks.tick() => {
                if let Some(fresh) = files.changed_zone() {
                    zone.send_replace(Some(fresh));
                    memory::give_back();
                }
                if let Some(fresh) = files.servers() {
                    servers.send_replace(fresh);
                }
                if claim.is_lost().unwrap_or(false) {
                    break;
                }
            }
        }
    }
    stop.cancel();
    let sockets = async { (by_udp.await, by_tcp.await) };
    if timeout(LAST_WORK, sockets).await.is_err() {
        tracing::warn!("a socket did not close in time");
    }
    if timeout(LAST_WORK, server.finished()).await.is_err() {
        tracing::warn!("ended with queries at upstream servers");
    }
    tracing::info!("DNS server ended");
    Ok(())
}

fn listen(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = UdpSocket::from_std(socket::shared_udp(address)?)?;
    let tcp = TcpListener::from_std(socket::shared_tcp(address)?)?;
    Ok((udp, tcp))
}

/// What tells one version of a file from the next.
type Stamp = (SystemTime, u64, u64);

/// The files that are looked at, with what they were when last read.
struct Files {
    zone: PathBuf,
    zone_stamp: Option<Stamp>,
    kept_zone: PathBuf,
    resolv_conf: PathBuf,
    resolv_conf_stamp: Option<Stamp>,
    ours: SocketAddr,
}

impl Files {
    fn new(args: &ProcessArgs) -> Self {
        Self {
            zone: args.run_dir.join("dns/zone"),
            zone_stamp: None,
            kept_zone: args.state_dir.join("dns/zone"),
            resolv_conf: args.resolv_conf.clone(),
            resolv_conf_stamp: None,
            ours: args.listen,
        }
    }

    /// The agent's zone, or the one from before the boot.
    fn first_zone(&mut self) -> Option<Arc<Zone>> {
        self.changed_zone().or_else(|| read_zone(&self.kept_zone))
    }

    /// The agent's zone, when it is another than last time and can be read.
    fn changed_zone(&mut self) -> Option<Arc<Zone>> {
        let stamp = stamp_of(&self.zone);
        if stamp.is_none() || stamp == self.zone_stamp {
            return None;
        }
        // Also when it is damaged: it is read again when it has changed again.
        self.zone_stamp = stamp;
        read_zone(&self.zone)
    }

    /// The upstream servers, when their list has changed. A list that is gone is an empty one.
    fn servers(&mut self) -> Option<Arc<[SocketAddr]>> {
        let stamp = stamp_of(&self.resolv_conf);
        if stamp == self.resolv_conf_stamp {
            return None;
        }
        self.resolv_conf_stamp = stamp;
        let text = fs::read_to_string(&self.resolv_conf).unwrap_or_default();
        let servers = upstream::servers_of(&text, &[self.ours.ip()]);
        tracing::info!(?servers, "upstream servers read");
        Some(servers.into())
    }
}

fn stamp_of(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.ino(), metadata.len()))
}

fn read_zone(path: &Path) -> Option<Arc<Zone>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "zone not read");
            return None;
        }
        Ok(bytes) => bytes,
    };
    match snapshot::decode(&bytes) {
        Ok(zone) => Some(Arc::new(zone)),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "zone refused, the last one serves on");
            None
        }
    }
}
