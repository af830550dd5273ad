//! The CNI protocol as values: requests and network configurations in, results and errors out.
//!
//! Pure. Follows the CNI specification 1.1.0 (<https://www.cni.dev/docs/spec/>) and answers in the
//! shapes of 0.3.0 to 1.1.0. The plugin binary hands us its environment and standard input as one
//! JSON object and prints what we answer.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    ipam::Attachment,
    wishes::{check_arguments, check_capabilities, pairs, runtime_dns, runtime_ports},
};
use crate::model::{HostPort, ObjectKey};

/// The newest version that we speak; also that of errors about an unreadable version.
pub const NEWEST: Version = Version::V1_1_0;

/// What the runtime wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

/// A protocol version that we speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

/// A request, checked as far as it can be without looking at the node.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub command: Command,
    pub version: Version,
    /// Empty container id and interface name for `GC` and `STATUS`.
    pub attachment: Attachment,
    /// Empty when the runtime gave none (only `DEL`, `GC`, `STATUS`).
    pub netns: String,
    /// Name of the network.
    pub network: String,
    /// From `CNI_ARGS`; the container id without a namespace when another runtime called us.
    pub pod: ObjectKey,
    /// `prevResult`, as it came.
    pub previous: Option<Value>,
    /// `runtimeConfig.dns`, else `dns` of the configuration: handed back in the result.
    pub dns: Option<Value>,
    /// `runtimeConfig.portMappings` of an `ADD`.
    pub host_ports: Vec<HostPort>,
    /// `cni.dev/valid-attachments` (early runtimes: `cni.dev/attachments`); `None` when absent.
    pub valid: Option<BTreeSet<Attachment>>,
}

/// What an `ADD` made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// Address and its gateway, one or two of different families.
    pub ips: Vec<(IpAddr, IpAddr)>,
    pub host_name: String,
    pub host_mac: [u8; 6],
    pub pod_mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
}

/// Error codes: up to 99 the specification's, from 100 ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    IncompatibleVersion = 1,
    UnsupportedField = 2,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidConfig = 7,
    TryAgainLater = 11,
    NotAvailable = 50,
    /// As 50, and pods that are connected may have lost something too.
    Limited = 51,
    CheckFailed = 100,
    NoAddress = 101,
    Kernel = 102,
    PortTaken = 103,
}

/// A failure as the runtime sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    pub code: Code,
    pub message: String,
    pub details: String,
}

impl CniError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)
    }
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "0.3.0" => Self::V0_3_0,
            "0.3.1" => Self::V0_3_1,
            "0.4.0" => Self::V0_4_0,
            "1.0.0" => Self::V1_0_0,
            "1.1.0" => Self::V1_1_0,
            _ => return None,
        })
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

/// The plugin's envelope: its environment, and its standard input under `config`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Envelope {
    command: String,
    #[serde(default)]
    container_id: String,
    #[serde(default)]
    netns: String,
    #[serde(default)]
    ifname: String,
    #[serde(default)]
    args: String,
    config: Value,
}

/// Reads a request.
///
/// # Errors
/// The protocol version to answer in, and what is wrong with the request. Retrying does not help.
pub fn parse_request(bytes: &[u8]) -> Result<Request, (Version, CniError)> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|error| {
        let failed = CniError::new(Code::Decode, "failed to decode the request");
        (NEWEST, failed.with_details(error.to_string()))
    })?;
    let version = parse_version(&envelope.config).map_err(|error| (NEWEST, error))?;
    request_of(envelope, version).map_err(|error| (version, error))
}

fn parse_version(config: &Value) -> Result<Version, CniError> {
    let Value::Object(config) = config else {
        return Err(CniError::new(Code::Decode, "the network configuration is no JSON object"));
    };
    // The specification's oldest readers left the key out and meant 0.1.0, which we do not speak.
    let text = config.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0");
    Version::parse(text).ok_or_else(|| {
        CniError::new(Code::IncompatibleVersion, "incompatible CNI version")
            .with_details(format!("cniVersion is {text:?}, supported are {SUPPORTED:?}"))
    })
}

/// What `VERSION` lists.
pub const SUPPORTED: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

fn request_of(envelope: Envelope, version: Version) -> Result<Request, CniError> {
    let (command, since) = match envelope.command.as_str() {
        "ADD" => (Command::Add, Version::V0_3_0),
        "DEL" => (Command::Del, Version::V0_3_0),
        "CHECK" => (Command::Check, Version::V0_4_0),
        "GC" => (Command::Gc, Version::V1_1_0),
        "STATUS" => (Command::Status, Version::V1_1_0),
        other => {
            let error = CniError::new(Code::InvalidEnvironment, "unknown CNI_COMMAND");
            return Err(error.with_details(format!("CNI_COMMAND={other:?}")));
        }
    };
    if version < since {
        let text = format!("cniVersion {} has no {}", version.as_str(), envelope.command);
        return Err(CniError::new(Code::IncompatibleVersion, text));
    }
    check_environment(command, &envelope)?;
    check_arguments(command, &envelope.args)?;
    let config = envelope.config.as_object().expect("parse_version refuses all but objects");
    check_config(command, config)?;
    let pod = pod_of(&envelope.args, &envelope.container_id);
    Ok(Request {
        command,
        version,
        previous: config.get("prevResult").cloned(),
        dns: runtime_dns(config).or_else(|| config.get("dns").cloned()),
        network: config.get("name").and_then(Value::as_str).unwrap_or_default().to_owned(),
        host_ports: if command == Command::Add { runtime_ports(config)? } else { Vec::new() },
        valid: valid_attachments(config)?,
        attachment: Attachment::new(&envelope.container_id, &envelope.ifname),
        netns: envelope.netns,
        pod,
    })
}

fn check_environment(command: Command, envelope: &Envelope) -> Result<(), CniError> {
    let (attachment, netns) = match command {
        Command::Add | Command::Check => (true, true),
        Command::Del => (true, false),
        Command::Gc | Command::Status => (false, false),
    };
    let invalid = |name: &str, value: &str| {
        let message = if value.is_empty() {
            format!("required environment variable {name} is missing")
        } else {
            format!("environment variable {name} is invalid: {value:?}")
        };
        Err(CniError::new(Code::InvalidEnvironment, message))
    };
    if attachment && !is_container_id(&envelope.container_id) {
        return invalid("CNI_CONTAINERID", &envelope.container_id);
    }
    if attachment && !is_interface_name(&envelope.ifname) {
        return invalid("CNI_IFNAME", &envelope.ifname);
    }
    if netns && !envelope.netns.starts_with('/') {
        return invalid("CNI_NETNS", &envelope.netns);
    }
    Ok(())
}

/// An alphanumeric character, then such, underscores, dots and hyphens.
fn is_container_id(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// What the kernel takes as a device name (`dev_valid_name`): 1 to 15 bytes, no slash, colon, space.
fn is_interface_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && !text.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

/// Keys that runtimes and libcni write, or that we read. Any other would change the network in a
/// way that we do not implement, so it is refused rather than ignored.
const KNOWN_KEYS: [&str; 11] = [
    "args",
    "capabilities",
    "cniVersion",
    "disableCheck",
    "disableGC",
    "dns",
    "name",
    "prevResult",
    "runtimeConfig",
    "socket",
    "type",
];

fn check_config(command: Command, config: &Map<String, Value>) -> Result<(), CniError> {
    let unknown =
        config.keys().find(|k| !KNOWN_KEYS.contains(&k.as_str()) && !k.starts_with("cni.dev/"));
    if let Some(key) = unknown {
        let value = config.get(key).map(Value::to_string).unwrap_or_default();
        return Err(CniError::new(Code::UnsupportedField, "unsupported network configuration")
            .with_details(format!("{key}: {value}")));
    }
    if config.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(CniError::new(Code::InvalidConfig, "network configuration has no name"));
    }
    if command == Command::Add {
        check_capabilities(config)?;
    }
    let invalid = |text: &str| Err(CniError::new(Code::InvalidConfig, text));
    match (command, config.get("prevResult")) {
        (_, Some(previous)) if !previous.is_object() && !previous.is_null() => {
            invalid("prevResult is no JSON object")
        }
        (Command::Check, None | Some(Value::Null)) => {
            invalid("CHECK needs prevResult in the configuration")
        }
        _ => Ok(()),
    }
}

/// Refuses a chain in which an earlier plugin made the interface that we are to make.
///
/// # Errors
/// `InvalidConfig`, naming the interface.
pub fn check_chain(request: &Request) -> Result<(), CniError> {
    let ifname = &*request.attachment.ifname;
    let taken = request.previous.iter().flat_map(|previous| list(previous, "interfaces")).any(
        |interface| {
            let text = |key: &str| interface.get(key).and_then(Value::as_str).unwrap_or_default();
            text("name") == ifname && !text("sandbox").is_empty()
        },
    );
    if taken {
        let text = format!("an earlier plugin of the chain has made {ifname} already");
        return Err(CniError::new(Code::InvalidConfig, text));
    }
    Ok(())
}

fn list<'a>(object: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    object.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn valid_attachments(
    config: &Map<String, Value>,
) -> Result<Option<BTreeSet<Attachment>>, CniError> {
    let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
    let Some(list) = keys.into_iter().find_map(|key| config.get(key)) else { return Ok(None) };
    // How Go writes a list that nobody put anything in.
    if list.is_null() {
        return Ok(Some(BTreeSet::new()));
    }
    let wrong = || {
        CniError::new(Code::InvalidConfig, "cni.dev/valid-attachments is not a list of attachments")
    };
    let read = |entry: &Value| {
        let container_id = entry.get("containerID")?.as_str()?;
        Some(Attachment::new(container_id, entry.get("ifname")?.as_str()?))
    };
    let list = list.as_array().ok_or_else(wrong)?;
    list.iter().map(|entry| read(entry).ok_or_else(wrong)).collect::<Result<_, _>>().map(Some)
}

/// Reads Kubernetes' names out of `CNI_ARGS` (`K=V;K=V`).
fn pod_of(args: &str, container_id: &str) -> ObjectKey {
    let value = |name: &str| {
        let found = pairs(args).find(|(key, _)| *key == name);
        found.map(|(_, value)| value).filter(|value| !value.is_empty())
    };
    match (value("K8S_POD_NAMESPACE"), value("K8S_POD_NAME")) {
        (Some(namespace), Some(name)) => ObjectKey::new(namespace, name),
        _ => ObjectKey::new("", container_id),
    }
}

/// The result of an `ADD` in the shape of the request's version, behind what earlier plugins of the
/// chain made.
#[must_use]
pub fn add_result(request: &Request, added: &Added) -> Value {
    let modern = request.version >= Version::V1_1_0;
    let mut host = json!({"name": added.host_name, "mac": mac_text(added.host_mac)});
    let mut pod = json!({
        "name": &*request.attachment.ifname,
        "mac": mac_text(added.pod_mac),
        "sandbox": request.netns,
    });
    if modern {
        host["mtu"] = added.mtu.into();
        pod["mtu"] = added.mtu.into();
    }
    let earlier = |key: &'static str| -> Vec<Value> {
        request.previous.iter().flat_map(|previous| list(previous, key)).cloned().collect()
    };
    let mut interfaces = earlier("interfaces");
    let (mut ips, mut routes) = (earlier("ips"), earlier("routes"));
    interfaces.extend([host, pod]);
    for (ip, gateway) in &added.ips {
        let mut entry = json!({
            "address": format!("{ip}/{}", prefix_len(*ip)),
            "gateway": gateway,
            "interface": interfaces.len() - 1,
        });
        // Until 0.4.0 an address says its family; 1.0.0 removed the key.
        if request.version < Version::V1_0_0 {
            entry["version"] = if ip.is_ipv4() { "4" } else { "6" }.into();
        }
        ips.push(entry);
        routes.push(json!({"dst": if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" }, "gw": gateway}));
    }
    let previous_dns = || request.previous.as_ref()?.get("dns").cloned();
    json!({
        "cniVersion": request.version.as_str(),
        "interfaces": interfaces,
        "ips": ips,
        "routes": routes,
        "dns": request.dns.clone().or_else(previous_dns).unwrap_or_else(|| json!({})),
    })
}

const fn prefix_len(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// An error in CNI's shape.
#[must_use]
pub fn error_result(version: Version, error: &CniError) -> Value {
    let mut result = json!({
        "cniVersion": version.as_str(),
        "code": error.code.number(),
        "msg": error.message,
    });
    if !error.details.is_empty() {
        result["details"] = error.details.clone().into();
    }
    result
}

impl Code {
    #[must_use]
    pub const fn number(self) -> u32 {
        // The discriminants are the protocol's numbers, and `repr(u32)` makes the cast exact.
        self as u32
    }
}

/// The first thing in which the previous result differs from what we made; `None` when it agrees.
/// Entries of other plugins in the chain are not ours to judge.
#[must_use]
pub fn previous_differs(request: &Request, added: &Added) -> Option<String> {
    let previous = request.previous.as_ref()?;
    let has_interface = |name: &str, mac: [u8; 6]| {
        list(previous, "interfaces").any(|entry| {
            entry.get("name").and_then(Value::as_str) == Some(name)
                && entry
                    .get("mac")
                    .and_then(Value::as_str)
                    .is_none_or(|text| text.is_empty() || text.eq_ignore_ascii_case(&mac_text(mac)))
        })
    };
    if !has_interface(&added.host_name, added.host_mac) {
        return Some(format!("prevResult lacks interface {}", added.host_name));
    }
    if !has_interface(&request.attachment.ifname, added.pod_mac) {
        return Some(format!("prevResult lacks interface {}", request.attachment.ifname));
    }
    // An address may be written in more than one way.
    let has_address = |ip: IpAddr| {
        let wanted = (ip, prefix_len(ip));
        list(previous, "ips").any(|entry| {
            let text = entry.get("address").and_then(Value::as_str).unwrap_or_default();
            let parts = text.split_once('/');
            parts.and_then(|(ip, len)| Some((ip.parse().ok()?, len.parse().ok()?))) == Some(wanted)
        })
    };
    let missing = added.ips.iter().find(|(ip, _)| !has_address(*ip));
    missing.map(|(ip, _)| format!("prevResult lacks address {ip}/{}", prefix_len(*ip)))
}

/// What the plugin gets back: whether to fail, and what to print (nothing for `null`).
#[must_use]
pub fn reply(outcome: Result<Option<Value>, (Version, CniError)>) -> Vec<u8> {
    let reply = match outcome {
        Ok(output) => json!({"failed": false, "output": output}),
        Err((version, error)) => {
            json!({"failed": true, "output": error_result(version, &error)})
        }
    };
    reply.to_string().into_bytes()
}

fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
