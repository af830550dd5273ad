//! Which files a volume of configuration holds. Pure: the objects have been fetched before.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, KeyToPath, Pod, PodSpec, ServiceAccountTokenProjection,
    Volume,
};

use super::atomic::Files;
use crate::kubelet::{
    admit::Allocatable,
    env::{Objects, field_value, resource_value},
};

/// What volumes are made from besides the pod.
#[derive(Clone, Debug)]
pub struct PayloadContext<'a> {
    pub pod: &'a Pod,
    pub objects: &'a Objects,
    pub tokens: &'a BTreeMap<TokenKey, String>,
    pub pod_ips: &'a [IpAddr],
    pub host_ip: IpAddr,
    pub allocatable: Allocatable,
}

/// A token that a pod asks for: its audience (empty for the API server's) and life in seconds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenKey {
    pub audience: String,
    pub seconds: i64,
}

/// The files of a volume, and whether they must stay off the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    pub files: Files,
    pub secret: bool,
}

/// Mode bits where nothing is said (API default).
const DEFAULT_MODE: i32 = 0o644;

/// Config maps, secrets and tokens that a pod's volumes are made from.
#[must_use]
pub fn references(spec: &PodSpec) -> (Vec<String>, Vec<String>, Vec<TokenKey>) {
    let (mut maps, mut secrets, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    for volume in spec.volumes.iter().flatten() {
        maps.extend(volume.config_map.as_ref().map(|source| source.name.clone()));
        secrets.extend(volume.secret.as_ref().and_then(|source| source.secret_name.clone()));
        let sources = volume.projected.as_ref().and_then(|projected| projected.sources.as_ref());
        for source in sources.into_iter().flatten() {
            maps.extend(source.config_map.as_ref().map(|source| source.name.clone()));
            secrets.extend(source.secret.as_ref().map(|source| source.name.clone()));
            tokens.extend(source.service_account_token.as_ref().map(token_key));
        }
    }
    (maps, secrets, tokens)
}

fn token_key(source: &ServiceAccountTokenProjection) -> TokenKey {
    TokenKey {
        audience: source.audience.clone().unwrap_or_default(),
        // The API's default is an hour, its least ten minutes.
        seconds: source.expiration_seconds.unwrap_or(3600),
    }
}

/// The files of a volume; `None` when it is no volume of configuration.
///
/// # Errors
/// Upstream's words for what is missing.
pub fn payload(volume: &Volume, ctx: &PayloadContext<'_>) -> Result<Option<Payload>, String> {
    let mut files = Files::new();
    if let Some(source) = &volume.config_map {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let reference = (source.name.as_str(), source.optional == Some(true));
        config_map(reference, source.items.as_deref(), mode, ctx, &mut files)?;
        return Ok(Some(Payload { files, secret: false }));
    }
    if let Some(source) = &volume.secret {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let name = source.secret_name.as_deref().unwrap_or_default();
        secret(
            (name, source.optional == Some(true)),
            source.items.as_deref(),
            mode,
            ctx,
            &mut files,
        )?;
        return Ok(Some(Payload { files, secret: true }));
    }
    if let Some(source) = &volume.downward_api {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        downward(source.items.as_deref(), mode, ctx, &mut files)?;
        return Ok(Some(Payload { files, secret: false }));
    }
    let Some(source) = &volume.projected else { return Ok(None) };
    let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
    for part in source.sources.iter().flatten() {
        if let Some(source) = &part.config_map {
            let reference = (source.name.as_str(), source.optional == Some(true));
            config_map(reference, source.items.as_deref(), mode, ctx, &mut files)?;
        }
        if let Some(source) = &part.secret {
            let reference = (source.name.as_str(), source.optional == Some(true));
            secret(reference, source.items.as_deref(), mode, ctx, &mut files)?;
        }
        if let Some(source) = &part.downward_api {
            downward(source.items.as_deref(), mode, ctx, &mut files)?;
        }
        if let Some(source) = &part.service_account_token {
            let token = ctx.tokens.get(&token_key(source));
            let token = token.ok_or("failed to fetch token")?;
            files.insert(source.path.clone(), (token.clone().into_bytes(), bits(mode)));
        }
    }
    Ok(Some(Payload { files, secret: true }))
}

fn config_map(
    (name, optional): (&str, bool),
    items: Option<&[KeyToPath]>,
    mode: i32,
    ctx: &PayloadContext<'_>,
    files: &mut Files,
) -> Result<(), String> {
    let Some(object) = ctx.objects.config_maps.get(name) else {
        return if optional { Ok(()) } else { Err(format!("configmap \"{name}\" not found")) };
    };
    let text = object.data.iter().flatten().map(|(key, text)| (key.as_str(), text.as_bytes()));
    let binary =
        object.binary_data.iter().flatten().map(|(key, bytes)| (key.as_str(), bytes.0.as_slice()));
    select(text.chain(binary).collect(), items, (mode, optional), files)
        .map_err(|key| format!("configmap references non-existent config key: {key}"))
}

fn secret(
    (name, optional): (&str, bool),
    items: Option<&[KeyToPath]>,
    mode: i32,
    ctx: &PayloadContext<'_>,
    files: &mut Files,
) -> Result<(), String> {
    let Some(object) = ctx.objects.secrets.get(name) else {
        return if optional { Ok(()) } else { Err(format!("secret \"{name}\" not found")) };
    };
    let data = object.data.iter().flatten().map(|(key, bytes)| (key.as_str(), bytes.0.as_slice()));
    select(data.collect(), items, (mode, optional), files)
        .map_err(|key| format!("references non-existent secret key: {key}"))
}

/// All keys as files, or only the items; the error is a key that is missing.
fn select(
    data: BTreeMap<&str, &[u8]>,
    items: Option<&[KeyToPath]>,
    (mode, optional): (i32, bool),
    files: &mut Files,
) -> Result<(), String> {
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        let all = data.into_iter();
        files.extend(all.map(|(key, bytes)| (key.to_owned(), (bytes.to_vec(), bits(mode)))));
        return Ok(());
    };
    for item in items {
        match data.get(item.key.as_str()) {
            Some(bytes) => {
                let mode = bits(item.mode.unwrap_or(mode));
                files.insert(item.path.clone(), (bytes.to_vec(), mode));
            }
            None if optional => {}
            None => return Err(item.key.clone()),
        }
    }
    Ok(())
}

fn downward(
    items: Option<&[DownwardAPIVolumeFile]>,
    mode: i32,
    ctx: &PayloadContext<'_>,
    files: &mut Files,
) -> Result<(), String> {
    let none = Container::default();
    for item in items.into_iter().flatten() {
        let value = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => field_value(field, ctx.pod, ctx.pod_ips, ctx.host_ip)?,
            (None, Some(field)) => {
                resource_value(field, ctx.pod.spec.as_ref(), &none, ctx.allocatable)?
            }
            (None, None) => String::new(),
        };
        files.insert(item.path.clone(), (value.into_bytes(), bits(item.mode.unwrap_or(mode))));
    }
    Ok(())
}

fn bits(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0) & 0o7777
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(volume: Value) -> Result<Vec<String>, String> {
        let pod: Pod = serde_json::from_value(
            json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": {"containers": []}}),
        )
        .expect("a pod");
        let mut objects = Objects::default();
        let map = json!({"data": {"a": "1", "b": "2"}, "binaryData": {"c": "Mw=="}});
        objects.config_maps.insert("cm".to_owned(), serde_json::from_value(map).expect("a map"));
        let secret = json!({"data": {"p": "c2VjcmV0"}});
        objects.secrets.insert("s".to_owned(), serde_json::from_value(secret).expect("a secret"));
        let key = TokenKey { audience: String::new(), seconds: 3607 };
        let ctx = PayloadContext {
            pod: &pod,
            objects: &objects,
            tokens: &BTreeMap::from([(key, "jwt".to_owned())]),
            pod_ips: &[],
            host_ip: "10.0.0.1".parse().expect("an address"),
            allocatable: Allocatable { cpu_millis: 1, memory_bytes: 1, pods: 1 },
        };
        let volume: Volume = serde_json::from_value(volume).expect("a volume");
        let payload = payload(&volume, &ctx)?.expect("a volume of configuration");
        let line = |(path, (bytes, mode)): (&String, &(Vec<u8>, u32))| {
            format!("{path}={} {mode:o}", String::from_utf8_lossy(bytes))
        };
        let mut lines: Vec<String> = payload.files.iter().map(line).collect();
        lines.extend(payload.secret.then(|| "secret".to_owned()));
        Ok(lines)
    }

    #[test]
    fn volumes_hold_all_keys_or_the_ones_that_are_named() {
        let all = check(json!({"name": "v", "configMap": {"name": "cm"}}));
        assert_eq!(all.expect("files"), ["a=1 644", "b=2 644", "c=3 644"]);
        let items = json!([{"key": "b", "path": "sub/x", "mode": 256}]);
        let some = check(json!({"name": "v", "configMap": {"name": "cm", "items": items}}));
        assert_eq!(some.expect("files"), ["sub/x=2 400"]);
        let secret = check(json!({"name": "v", "secret": {"secretName": "s", "defaultMode": 256}}));
        assert_eq!(secret.expect("files"), ["p=secret 400", "secret"]);
    }

    #[test]
    fn the_volume_that_every_pod_gets_holds_token_certificate_and_namespace() {
        let sources = json!([
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "cm", "items": [{"key": "a", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace",
                "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]);
        let lines = check(json!({"name": "v", "projected": {"sources": sources}}));
        assert_eq!(
            lines.expect("files"),
            ["ca.crt=1 644", "namespace=ns 644", "token=jwt 644", "secret"]
        );
    }

    #[test]
    fn what_is_missing_is_named_unless_it_is_optional() {
        let table = [
            (json!({"name": "v", "configMap": {"name": "no"}}), "configmap \"no\" not found"),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "z", "path": "z"}]}}),
                "configmap references non-existent config key: z",
            ),
            (json!({"name": "v", "secret": {"secretName": "no"}}), "secret \"no\" not found"),
        ];
        for (volume, error) in table {
            assert_eq!(check(volume).expect_err("missing"), error);
        }
        let optional = check(json!({"name": "v", "configMap": {"name": "no", "optional": true}}));
        assert_eq!(optional.expect("nothing"), Vec::<String>::new());
    }
}
