//! CNI from the runtime's side: the configuration list of the node, and its plugins executed in order.
//!
//! Follows the CNI specification 1.1 (sections 1 to 5): ADD in order with each result passed on, DEL in
//! reverse order with the result of ADD, everything on stdin and in the environment.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value, json};

use crate::sys::exec;

/// Longest time for one plugin: the kubelet's limit for a whole sandbox is 4 min, and ours answers in ms.
const PLUGIN_LIMIT: Duration = Duration::from_secs(60);

/// Name of the interface in the pod (kubelet's and containerd's default).
const INTERFACE: &str = "eth0";

/// Why the network could not be made or taken down.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("cni plugin not initialized: no network config found in {}", .0.display())]
    NoConfig(PathBuf),
    #[error("cni config {} is not usable: {message}", path.display())]
    BadConfig { path: PathBuf, message: String },
    #[error("cni plugin \"{plugin}\" failed ({command}): {message}")]
    Plugin { plugin: String, command: &'static str, message: String },
    #[error("cni plugin \"{plugin}\" could not be run")]
    Run { plugin: String, source: io::Error },
    #[error("cni result has no usable address")]
    NoAddress,
}

/// The node's network: its name, version, and plugins in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Network {
    name: String,
    version: String,
    plugins: Vec<Map<String, Value>>,
}

/// A pod as its network sees it.
#[derive(Clone, Debug)]
pub(super) struct Attachment<'a> {
    pub(super) uid: &'a str,
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) netns: &'a Path,
    /// For plugins with the capability `portMappings`.
    pub(super) port_mappings: &'a Value,
}

/// The first configuration in the folder, by name, as every runtime chooses.
///
/// # Errors
/// When there is none, or it is not sound.
pub(super) fn load(dir: &Path) -> Result<Network, CniError> {
    let none = |_unreadable: io::Error| CniError::NoConfig(dir.to_owned());
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(none)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conflist" | "conf" | "json"))
        })
        .collect();
    files.sort();
    let path = files.into_iter().next().ok_or_else(|| CniError::NoConfig(dir.to_owned()))?;
    let text = std::fs::read(&path).map_err(none)?;
    parse(&text).map_err(|message| CniError::BadConfig { path, message })
}

/// A list, or a single plugin's configuration as a list of one.
pub(super) fn parse(text: &[u8]) -> Result<Network, String> {
    let mut config: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let word = |config: &Map<String, Value>, key: &str| {
        config.get(key).and_then(Value::as_str).map(str::to_owned)
    };
    let name = word(&config, "name").ok_or("it has no \"name\"")?;
    let version = word(&config, "cniVersion").unwrap_or_else(|| "0.2.0".to_owned());
    let plugins = match config.remove("plugins") {
        Some(Value::Array(plugins)) => plugins
            .into_iter()
            .map(|plugin| {
                let plugin = if let Value::Object(plugin) = plugin { plugin } else { Map::new() };
                let typed = word(&plugin, "type").is_some();
                if typed { Ok(plugin) } else { Err("a plugin has no \"type\"".to_owned()) }
            })
            .collect::<Result<Vec<_>, _>>()?,
        Some(_) => return Err("\"plugins\" is not a list".to_owned()),
        None if word(&config, "type").is_some() => vec![config],
        None => return Err("it has neither \"plugins\" nor \"type\"".to_owned()),
    };
    if plugins.is_empty() {
        return Err("it has no plugins".to_owned());
    }
    Ok(Network { name, version, plugins })
}

impl Network {
    /// Connects a pod. Returns the result, to be kept for `delete`.
    ///
    /// # Errors
    /// The plugin's own words.
    pub(super) async fn add(
        &self,
        bin_dir: &Path,
        attachment: &Attachment<'_>,
    ) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in &self.plugins {
            result = self.run(("ADD", bin_dir), plugin, attachment, result.as_ref()).await?;
        }
        result.ok_or(CniError::NoAddress)
    }

    /// Disconnects a pod; what is not there is no error, as the specification asks of plugins.
    ///
    /// # Errors
    /// The plugin's own words.
    pub(super) async fn delete(
        &self,
        bin_dir: &Path,
        attachment: &Attachment<'_>,
        result: Option<&Value>,
    ) -> Result<(), CniError> {
        for plugin in self.plugins.iter().rev() {
            self.run(("DEL", bin_dir), plugin, attachment, result).await?;
        }
        Ok(())
    }

    async fn run(
        &self,
        (command, bin_dir): (&'static str, &Path),
        plugin: &Map<String, Value>,
        attachment: &Attachment<'_>,
        previous: Option<&Value>,
    ) -> Result<Option<Value>, CniError> {
        let name = plugin.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let input = self.input(plugin, previous, attachment.port_mappings);
        let env = environment(command, bin_dir, attachment);
        let output = exec::run(&bin_dir.join(&name), &[], &env, &input, PLUGIN_LIMIT)
            .await
            .map_err(|source| CniError::Run { plugin: name.clone(), source })?;
        let said: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        if output.status.success() {
            return Ok(said);
        }
        let message = said
            .as_ref()
            .and_then(|error| {
                let part = |key: &str| error.get(key).and_then(Value::as_str);
                let (message, details) = (part("msg")?, part("details").unwrap_or_default());
                Some(if details.is_empty() {
                    message.to_owned()
                } else {
                    format!("{message}; {details}")
                })
            })
            .unwrap_or_else(|| format!("{}: {}", output.status, output.stderr));
        Err(CniError::Plugin { plugin: name, command, message })
    }

    /// A plugin's own configuration with what the list adds to it (section 3, "Deriving").
    fn input(
        &self,
        plugin: &Map<String, Value>,
        previous: Option<&Value>,
        port_mappings: &Value,
    ) -> Vec<u8> {
        let mut input = plugin.clone();
        input.insert("name".to_owned(), self.name.clone().into());
        input.insert("cniVersion".to_owned(), self.version.clone().into());
        let capabilities = input.remove("capabilities").unwrap_or_default();
        let is_wanted = port_mappings.as_array().is_some_and(|list| !list.is_empty());
        if is_wanted && capabilities["portMappings"] == Value::Bool(true) {
            input.insert("runtimeConfig".to_owned(), json!({"portMappings": port_mappings}));
        }
        if let Some(previous) = previous {
            input.insert("prevResult".to_owned(), previous.clone());
        }
        Value::Object(input).to_string().into_bytes()
    }
}

fn environment(
    command: &str,
    bin_dir: &Path,
    attachment: &Attachment<'_>,
) -> Vec<(String, String)> {
    let Attachment { uid, namespace, name, netns, port_mappings: _ } = attachment;
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
         K8S_POD_INFRA_CONTAINER_ID={uid};K8S_POD_UID={uid}"
    );
    [
        ("CNI_COMMAND", command.to_owned()),
        ("CNI_CONTAINERID", (*uid).to_owned()),
        ("CNI_NETNS", netns.display().to_string()),
        ("CNI_IFNAME", INTERFACE.to_owned()),
        ("CNI_ARGS", args),
        ("CNI_PATH", bin_dir.display().to_string()),
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The pod's addresses in a result, those of the pod's own interface, in their order. Plugins of a
/// chain may tell of others, such as loopback's.
///
/// # Errors
/// When there is none.
pub(super) fn addresses(result: &Value) -> Result<Vec<IpAddr>, CniError> {
    let ips = result.get("ips").and_then(Value::as_array).ok_or(CniError::NoAddress)?;
    let is_pods = |ip: &&Value| {
        let index = ip.get("interface").and_then(Value::as_u64).map(usize::try_from);
        let interface = index.and_then(|index| result.get("interfaces")?.get(index.ok()?));
        interface.is_none_or(|interface| {
            let text = |key: &str| interface.get(key).and_then(Value::as_str).unwrap_or_default();
            text("name") == INTERFACE && !text("sandbox").is_empty()
        })
    };
    let addresses: Vec<IpAddr> = ips
        .iter()
        .filter(is_pods)
        .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
        .collect();
    if addresses.is_empty() { Err(CniError::NoAddress) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_derives_each_plugins_configuration() {
        let text = br#"{"cniVersion": "1.0.0", "name": "net", "plugins": [
            {"type": "orlop", "mtu": 1450}, {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;
        let network = parse(text).unwrap();
        let previous = serde_json::json!({"ips": [{"address": "10.244.1.5/24"}]});
        let input = |plugin: usize, ports: &Value| -> Value {
            let input = network.input(&network.plugins[plugin], Some(&previous), ports);
            serde_json::from_slice(&input).unwrap()
        };
        let plain = json!({"type": "portmap", "name": "net", "cniVersion": "1.0.0",
                           "prevResult": {"ips": [{"address": "10.244.1.5/24"}]}});
        assert_eq!(input(1, &json!([])), plain);
        assert_eq!(input(1, &Value::Null), plain, "of a pod that an earlier agent made");
        let ports = json!([{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}]);
        assert_eq!(input(1, &ports)["runtimeConfig"], json!({"portMappings": ports}));
        assert_eq!(input(0, &ports)["runtimeConfig"], Value::Null, "it has no such capability");
        assert_eq!(addresses(&previous).unwrap(), ["10.244.1.5".parse::<IpAddr>().unwrap()]);
        addresses(&serde_json::json!({"ips": []})).unwrap_err();
        let chained = serde_json::json!({
            "interfaces": [{"name": "lo", "sandbox": "/n"}, {"name": "orl0"}, {"name": "eth0", "sandbox": "/n"}],
            "ips": [
                {"address": "127.0.0.1/8", "interface": 0},
                {"address": "192.0.2.1/24", "interface": 1},
                {"address": "fd00::5/128", "interface": 2},
                {"address": "10.244.1.5/32", "interface": 2},
            ],
        });
        let texts: Vec<_> = addresses(&chained).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["fd00::5", "10.244.1.5"]);
    }

    #[test]
    fn unsound_configurations_are_refused_with_what_is_wrong() {
        assert_eq!(parse(b"{}"), Err("it has no \"name\"".to_owned()));
        assert_eq!(parse(br#"{"name":"a","plugins":[]}"#), Err("it has no plugins".to_owned()));
        let typeless = br#"{"name":"a","plugins":[{}]}"#;
        assert_eq!(parse(typeless), Err("a plugin has no \"type\"".to_owned()));
        assert_eq!(parse(br#"{"name":"a","type":"b"}"#).unwrap().plugins.len(), 1);
    }
}
