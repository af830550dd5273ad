//! Asking a container how it is: httpGet, tcpSocket and exec probes. Effects.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use super::{
    probe::ProbeKind,
    runtime::{ContainerId, ExecSpec, Runtime},
};

/// Most output of an exec probe that is kept (kubelet's limit).
const MAX_OUTPUT_BYTES: u64 = 10 << 10;

/// The probe of a kind that a container has.
#[must_use]
pub const fn probe_of(container: &Container, kind: ProbeKind) -> Option<&Probe> {
    match kind {
        ProbeKind::Startup => container.startup_probe.as_ref(),
        ProbeKind::Liveness => container.liveness_probe.as_ref(),
        ProbeKind::Readiness => container.readiness_probe.as_ref(),
    }
}

/// Asks once. The error is what an `Unhealthy` Event says.
///
/// # Errors
/// The probe failed.
pub async fn ask<R: Runtime>(
    runtime: &Arc<R>,
    (container, id): (&Container, &ContainerId),
    probe: &Probe,
    pod_ip: std::net::IpAddr,
    timeout: Duration,
) -> Result<(), String> {
    if let Some(action) = &probe.exec {
        let command = action.command.clone().unwrap_or_default();
        return tokio::time::timeout(timeout, run(runtime, id, command))
            .await
            .unwrap_or_else(|_| Err(format!("command timed out after {}s", timeout.as_secs())));
    }
    let (host, port) = match (&probe.http_get, &probe.tcp_socket) {
        (Some(action), _) => (action.host.as_deref(), &action.port),
        (None, Some(action)) => (action.host.as_deref(), &action.port),
        (None, None) => return Err("missing probe handler".to_owned()),
    };
    let port = port_number(container, port)?;
    let host =
        host.filter(|host| !host.is_empty()).map_or_else(|| pod_ip.to_string(), str::to_owned);
    let address =
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let Some(action) = &probe.http_get else {
        return match tokio::time::timeout(timeout, dial(&address)).await {
            Ok(result) => result.map(drop),
            Err(_elapsed) => Err(format!("dial tcp {address}: i/o timeout")),
        };
    };
    let path = action.path.as_deref().unwrap_or("/");
    let url = format!("http://{address}{path}");
    match tokio::time::timeout(timeout, http_get(action, &address, path)).await {
        Ok(Ok(status)) if (200..400).contains(&status) => Ok(()),
        Ok(Ok(status)) => Err(format!("HTTP probe failed with statuscode: {status}")),
        Ok(Err(message)) => Err(format!("Get \"{url}\": {message}")),
        Err(_elapsed) => Err(format!(
            "Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        )),
    }
}

/// The number of a port that may be given by name.
fn port_number(container: &Container, port: &IntOrString) -> Result<u16, String> {
    match port {
        IntOrString::Int(number) => {
            u16::try_from(*number).map_err(|_range| format!("invalid port number: {number}"))
        }
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_deref() == Some(name))
            .and_then(|port| u16::try_from(port.container_port).ok())
            .or_else(|| name.parse().ok())
            .ok_or_else(|| format!("couldn't find port: \"{name}\"")),
    }
}

async fn dial(address: &str) -> Result<TcpStream, String> {
    TcpStream::connect(address).await.map_err(|error| {
        if error.kind() == std::io::ErrorKind::ConnectionRefused {
            format!("dial tcp {address}: connect: connection refused")
        } else {
            format!("dial tcp {address}: {error}")
        }
    })
}

async fn http_get(action: &HTTPGetAction, address: &str, path: &str) -> Result<u16, String> {
    let stream = dial(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // The connection ends with the request: nothing is kept between probes.
    let connection = tokio::spawn(connection);
    let mut request = Request::builder()
        .uri(path)
        .header(header::HOST, address)
        .header(header::USER_AGENT, "kube-probe/1.36")
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close");
    for header in action.http_headers.iter().flatten() {
        let replaced = header.name.eq_ignore_ascii_case("host");
        if let (true, Some(headers)) = (replaced, request.headers_mut()) {
            headers.remove(header::HOST);
        }
        request = request.header(&header.name, &header.value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await.map_err(|error| error.to_string());
    connection.abort();
    Ok(answer?.status().as_u16())
}

/// Runs a command in a container to its end; the error carries its output.
///
/// # Errors
/// The command could not run or did not return 0.
pub async fn run<R: Runtime>(
    runtime: &Arc<R>,
    id: &ContainerId,
    args: Vec<String>,
) -> Result<(), String> {
    let spec = ExecSpec { args, stdin: false, tty: false };
    let mut io = runtime.exec(id, &spec).await.map_err(|error| super::chain(&error))?;
    let (stdout, stderr) = (io.stdout.take(), io.stderr.take());
    let (out, err) = tokio::join!(read(stdout), read(stderr));
    match io.exit.await {
        Ok(0) => Ok(()),
        Ok(_) => Err(format!("{out}{err}")),
        Err(_closed) => Err("the command was lost".to_owned()),
    }
}

async fn read(file: Option<tokio::fs::File>) -> String {
    let Some(file) = file else { return String::new() };
    let mut bytes = Vec::new();
    let mut limited = file.take(MAX_OUTPUT_BYTES);
    // What was read before an error is still worth showing.
    let _read = limited.read_to_end(&mut bytes).await;
    let mut rest = limited.into_inner();
    // A process that writes more must not be stopped by a full pipe.
    let _drained = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ports_are_found_by_number_and_by_name() {
        let container: Container = serde_json::from_value(
            json!({"name": "a", "ports": [{"name": "web", "containerPort": 8080}]}),
        )
        .expect("a container");
        let name = |name: &str| port_number(&container, &IntOrString::String(name.to_owned()));
        assert_eq!(port_number(&container, &IntOrString::Int(80)), Ok(80));
        assert_eq!((name("web"), name("81")), (Ok(8080), Ok(81)));
        assert_eq!(name("no"), Err("couldn't find port: \"no\"".to_owned()));
        assert_eq!(
            port_number(&container, &IntOrString::Int(70_000)),
            Err("invalid port number: 70000".to_owned())
        );
    }
}
