//! The whole control plane in one process: start order, stop order, and nothing else.
//!
//! Start: certificates, listener, store, API, controllers, scheduler, `run.json`. Stop, on the returned
//! handle or a signal: controllers and scheduler first, then the server, the store last, so that whatever was
//! acknowledged is written.
//!
//! Tasks beside those of the parts: one that looks at the server's certificate every hour.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::Arc,
};

use jiff::Timestamp;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Networks,
    api::{
        attributes, bootstrap::bootstrap, core::Api, local::Local, proxy::Kubelets,
        service_account::Keys,
    },
    client::{Client, Resource},
    config::{Config, RunFile},
    controllers::{self, Kind, Settings},
    pki::{Pki, PkiError, RENEW_CHECK, ServerCert, ServerNames, write_file},
    scheduler, schema,
    server::{ServerConfig, serve},
    store::{
        Options, Store,
        embedded::{Embedded, OpenError},
    },
};

/// Why a control plane could not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{0}")]
    Config(String),
    #[error("cannot make the data directory {path}")]
    DataDir { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error("cannot create what every cluster starts with: {message}")]
    Bootstrap { message: String },
    #[error("cannot wait for signals")]
    Signal { source: io::Error },
    #[error("the server failed")]
    Serve { source: io::Error },
    #[error("the store did not close: {message}")]
    Close { message: String },
}

/// A control plane that runs.
pub struct Running {
    /// The address that was bound, with its real port.
    pub bound: SocketAddr,
    pub pki: Arc<Pki>,
    /// The API without transport.
    pub client: Arc<dyn Client>,
    store: Arc<dyn Store>,
    deciding: CancellationToken,
    serving: CancellationToken,
    deciders: Vec<JoinHandle<()>>,
    server: JoinHandle<io::Result<()>>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("bound", &self.bound).finish_non_exhaustive()
    }
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// [`RunError::Config`] for wrong input; all others are the environment's.
pub async fn run(config: Config) -> Result<(), RunError> {
    let started = std::time::Instant::now();
    let wait = |kind| signal(kind).map_err(|source| RunError::Signal { source });
    let (mut terminate, mut interrupt) =
        (wait(SignalKind::terminate())?, wait(SignalKind::interrupt())?);
    let mut running = start(config).await?;
    let took_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(address = %running.bound, took_ms, "control plane ready");
    tokio::select! {
        _ = terminate.recv() => (),
        _ = interrupt.recv() => (),
        ended = &mut running.server => {
            let failed = io::Error::other("it ended by itself");
            let source = ended.map_err(io::Error::other).and_then(|end| end).err();
            return Err(RunError::Serve { source: source.unwrap_or(failed) });
        }
    }
    tracing::info!("control plane stopping");
    running.stop().await
}

/// Starts everything; returns when requests are answered.
///
/// # Errors
/// As [`run`].
pub async fn start(config: Config) -> Result<Running, RunError> {
    config.check().map_err(RunError::Config)?;
    let dir = &config.data_dir;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| RunError::DataDir { path: dir.clone(), source })?;
    let pki = Arc::new(Pki::open(dir, Timestamp::now())?);
    let listener = TcpListener::bind(config.bind)
        .await
        .map_err(|source| RunError::Bind { address: config.bind, source })?;
    let bound =
        listener.local_addr().map_err(|source| RunError::Bind { address: config.bind, source })?;
    let advertise = config.advertise_address.unwrap_or_else(|| own_address(bound.ip()));
    let names = server_names(&config, advertise);
    let cert = ServerCert::new(&pki.server_cert(&names, Timestamp::now())?)?;

    let kubelet_cert = ServerCert::new(&pki.kubelet_client)?;

    let options = Options { class: attributes::class, attributes: attributes::attributes };
    let store: Arc<dyn Store> = Arc::new(Embedded::open(&dir.join("state.db"), options)?);
    let keys = Keys::new(&pki.sa_key_pem).map_err(|source| PkiError::Sign { source })?;
    let networks = Networks::new(config.service_cidrs.clone());
    let api = Arc::new(Api::new(Arc::clone(&store), networks, Some(keys)));
    bootstrap(&api, advertise, bound.port())
        .await
        .map_err(|error| RunError::Bootstrap { message: error.to_string() })?;
    let client_of =
        |component| -> Arc<dyn Client> { Arc::new(Local::new(Arc::clone(&api), component)) };
    let (client, of_scheduler) =
        (client_of("kube-controller-manager"), client_of("kube-scheduler"));
    let serving = CancellationToken::new();
    let server = tokio::spawn(serve(ServerConfig {
        listener,
        tls: Arc::new(pki.tls_config(&cert)?),
        api,
        kubelets: Some(Kubelets::new(Arc::new(pki.client_config(&kubelet_cert)?))),
        shutdown: serving.clone(),
    }));

    let deciding = CancellationToken::new();
    let certs = Certs { data_dir: dir.clone(), names, server: cert, kubelet_client: kubelet_cert };
    let mut deciders = vec![tokio::spawn(renew(certs, deciding.clone()))];
    if !config.controllers.is_empty() {
        let settings = settings(&config, &pki, SocketAddr::new(advertise, bound.port()));
        let signer = Arc::<Pki>::clone(&pki);
        let (set, stop) = (&config.controllers, deciding.clone());
        deciders.push(controllers::start(Arc::clone(&client), signer, settings, set, stop));
    }
    if config.scheduler {
        deciders.push(scheduler::start(of_scheduler, deciding.clone()));
    }
    write_run_file(&config, bound, advertise)?;
    Ok(Running { bound, pki, client, store, deciding, serving, deciders, server })
}

impl Running {
    /// Stops all parts in order.
    ///
    /// # Errors
    /// When the store could not write out what it held.
    pub async fn stop(self) -> Result<(), RunError> {
        self.deciding.cancel();
        for decider in self.deciders {
            if decider.await.is_err() {
                tracing::error!("a controller or the scheduler had ended before its time");
            }
        }
        self.serving.cancel();
        if let Ok(Err(error)) = self.server.await {
            tracing::error!(%error, "the server ended badly");
        }
        self.store.close().await.map_err(|error| RunError::Close { message: error.to_string() })
    }
}

fn settings(config: &Config, pki: &Pki, server: SocketAddr) -> Settings {
    Settings {
        cluster_cidrs: config.cluster_cidrs.clone(),
        node_masks: config.node_masks,
        ca_pem: pki.ca_pem().to_owned(),
        server_url: format!("https://{server}"),
        kinds: kinds(),
    }
}

/// All served kinds that are stored, each once.
fn kinds() -> Vec<Kind> {
    schema::served()
        .iter()
        .filter(|served| served.storage.is_none() && served.allows("watch"))
        .map(|served| Kind {
            resource: Resource {
                group: served.group,
                version: served.version,
                plural: served.plural,
            },
            kind: served.kind,
            namespaced: served.namespaced,
        })
        .collect()
}

/// The address that this host reaches others from. Nothing is sent: connecting a UDP socket only
/// looks up the route; 192.0.2.1 is kept for documentation (RFC 5737).
fn own_address(bound: IpAddr) -> IpAddr {
    if !bound.is_unspecified() {
        return bound;
    }
    let route = || {
        let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0))?;
        socket.connect((IpAddr::from([192, 0, 2, 1]), 9))?;
        socket.local_addr()
    };
    route().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address: SocketAddr| address.ip())
}

fn server_names(config: &Config, advertise: IpAddr) -> ServerNames {
    let mut extra = config.tls_san.clone();
    extra.push(advertise.to_string());
    if !config.bind.ip().is_unspecified() {
        extra.push(config.bind.ip().to_string());
    }
    if let Ok(hostname) = fs::read_to_string("/proc/sys/kernel/hostname") {
        let hostname = hostname.trim();
        if !hostname.is_empty() && hostname != "(none)" {
            extra.push(hostname.to_owned());
        }
    }
    ServerNames::new(config.service_ip(), extra)
}

fn write_run_file(config: &Config, bound: SocketAddr, advertise: IpAddr) -> Result<(), RunError> {
    let file = RunFile { bound, advertise, pid: std::process::id() };
    let text = serde_json::to_string(&file).expect("addresses and a number are JSON");
    Ok(write_file(&RunFile::path(&config.data_dir), &text)?)
}

/// The certificates in use, which can be exchanged.
struct Certs {
    data_dir: PathBuf,
    names: ServerNames,
    server: Arc<ServerCert>,
    kubelet_client: Arc<ServerCert>,
}

/// Renews certificates in their last third, and uses them for new connections.
async fn renew(certs: Certs, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RENEW_CHECK) => (),
        }
        if let Err(error) = certs.renew(Timestamp::now()) {
            tracing::error!(%error, "cannot renew a certificate");
        }
    }
}

impl Certs {
    fn renew(&self, now: Timestamp) -> Result<(), PkiError> {
        let pki = Pki::open(&self.data_dir, now)?;
        self.kubelet_client.replace(&pki.kubelet_client)?;
        self.server.replace(&pki.server_cert(&self.names, now)?)
    }
}
