//! The effects of one pod, each an async function that ends in the event to tell the machine.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Container, LifecycleHandler, Pod, PodSpec, Secret, ServiceAccount},
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::{
    ImageSource, Kubelet, chain,
    env::{self, EnvContext, Objects, ServiceView},
    events::pod_reference,
    images::{Auth, ImageError, PullPolicy},
    last_words,
    plan::containers,
    pod::{MIN_GRACE, Note, PodEvent, Role},
    prober,
    pull::{docker_auth, pull_policy},
    runtime::{self, ContainerId, Runtime, UnpackedImage},
    spec::{ContainerContext, asked_user, container_spec, identity, sandbox_spec},
    volumes::{
        self, VolumeError,
        payload::{self, PayloadContext, TokenKey},
    },
};
use crate::model::{ObjectKey, Protocol};

/// Part of a token's life after which it is renewed (upstream: 80 %), and the longest it is kept.
const TOKEN_RENEW: (f64, Duration) = (0.8, Duration::from_secs(24 * 3600));

/// What a pod's jobs share: objects and tokens that were fetched before, for times without a server.
#[derive(Debug, Default)]
pub struct Fetched {
    objects: Objects,
    tokens: BTreeMap<TokenKey, (String, Instant)>,
}

/// One pod's side of the jobs. Cloning it clones the handle.
pub struct Jobs<R, I> {
    pub kubelet: Arc<Kubelet<R, I>>,
    pub pod: Arc<Pod>,
    pub ips: Vec<IpAddr>,
    pub fetched: Arc<Mutex<Fetched>>,
}

impl<R, I> fmt::Debug for Jobs<R, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").field("pod", &self.pod.metadata.name).finish_non_exhaustive()
    }
}

impl<R, I> Clone for Jobs<R, I> {
    fn clone(&self) -> Self {
        Self {
            kubelet: Arc::clone(&self.kubelet),
            pod: Arc::clone(&self.pod),
            ips: self.ips.clone(),
            fetched: Arc::clone(&self.fetched),
        }
    }
}

impl<R: Runtime, I: ImageSource> Jobs<R, I> {
    fn spec(&self) -> PodSpec {
        self.pod.spec.clone().unwrap_or_default()
    }

    /// The container in a slot of the machine.
    #[must_use]
    pub fn container(&self, slot: usize) -> Option<(Role, &Container)> {
        containers(self.pod.spec.as_ref()?).nth(slot)
    }

    /// Writes an Event about the pod or a container of it.
    pub fn record(&self, note: Note) {
        let container = note.slot.and_then(|slot| self.container(slot));
        let container = container.map(|(role, c)| (c.name.as_str(), role != Role::Main));
        self.kubelet.recorder.record(pod_reference(&self.pod, container), note);
    }

    fn say(&self, slot: Option<usize>, reason: &'static str, message: String) {
        self.record(Note { slot, warning: false, reason, message });
    }

    /// Volumes first, then the sandbox with its network.
    pub async fn ensure_sandbox(self) -> PodEvent {
        if let Err(error) = self.ensure_volumes().await {
            return PodEvent::SandboxFailed { reason: "FailedMount", message: chain(&error) };
        }
        let spec = sandbox_spec(&self.pod, &self.kubelet.node);
        match self.kubelet.runtime.ensure_sandbox(&spec).await {
            Ok(sandbox) => PodEvent::SandboxReady { ips: sandbox.ips },
            Err(error) => PodEvent::SandboxFailed {
                reason: "FailedCreatePodSandBox",
                message: format!("Failed to create pod sandbox: {}", chain(&error)),
            },
        }
    }

    /// Fetches what the pod refers to and brings its volumes up to date.
    ///
    /// # Errors
    /// The first volume that cannot be set up.
    pub async fn ensure_volumes(&self) -> Result<BTreeMap<String, PathBuf>, VolumeError> {
        let failed = |message| VolumeError::Content { volume: String::new(), message };
        let mut fetched = self.fetched.lock().await;
        self.fetch(&mut fetched).await;
        let objects = fetched.objects.clone();
        let tokens: BTreeMap<TokenKey, String> =
            fetched.tokens.iter().map(|(key, (token, _))| (key.clone(), token.clone())).collect();
        let (pod, ips) = (Arc::clone(&self.pod), self.ips.clone());
        let (host_ip, allocatable) = (self.kubelet.config.node_ip, self.kubelet.allocatable);
        let (_, _, uid) = identity(&pod);
        let dir = volumes::pod_dir(&self.kubelet.config.state_dir, uid);
        // The lock is held over the writing, so that two jobs never write one volume.
        let written = tokio::task::spawn_blocking(move || {
            let ctx = PayloadContext {
                pod: &pod,
                objects: &objects,
                tokens: &tokens,
                pod_ips: &ips,
                host_ip,
                allocatable,
            };
            volumes::ensure(&dir, &pod, &ctx)
        });
        written.await.map_err(|error| failed(error.to_string()))?
    }

    /// Fetches config maps, secrets and tokens; what cannot be had now stays as it was.
    async fn fetch(&self, fetched: &mut Fetched) {
        let spec = self.spec();
        let (namespace, _, _) = identity(&self.pod);
        let (mut maps, mut secrets) = env::references(&spec);
        let (more_maps, more_secrets, tokens) = payload::references(&spec);
        maps.extend(more_maps);
        secrets.extend(more_secrets);
        let client = &self.kubelet.client;
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        for name in maps {
            match api.get_opt(&name).await {
                Ok(Some(object)) => {
                    fetched.objects.config_maps.insert(name, object);
                }
                Ok(None) => {
                    fetched.objects.config_maps.remove(&name);
                }
                Err(error) => tracing::debug!(%error, name, "config map not fetched"),
            }
        }
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        for name in secrets {
            match api.get_opt(&name).await {
                Ok(Some(object)) => {
                    fetched.objects.secrets.insert(name, object);
                }
                Ok(None) => {
                    fetched.objects.secrets.remove(&name);
                }
                Err(error) => tracing::debug!(%error, name, "secret not fetched"),
            }
        }
        for key in tokens {
            let fresh = fetched.tokens.get(&key).is_some_and(|(_, renew)| Instant::now() < *renew);
            if fresh {
                continue;
            }
            match self.request_token(&spec, &key).await {
                Ok(row) => {
                    fetched.tokens.insert(key, row);
                }
                Err(error) => self.record(Note {
                    slot: None,
                    warning: true,
                    reason: "FailedMount",
                    message: format!("failed to fetch token: {}", chain(&error)),
                }),
            }
        }
    }

    async fn request_token(
        &self,
        spec: &PodSpec,
        key: &TokenKey,
    ) -> Result<(String, Instant), kube::Error> {
        let (namespace, name, uid) = identity(&self.pod);
        let account = spec.service_account_name.as_deref().filter(|name| !name.is_empty());
        let audience = Some(key.audience.clone()).filter(|audience| !audience.is_empty());
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(audience.into_iter().collect()),
                expiration_seconds: Some(key.seconds),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(name.to_owned()),
                    uid: Some(uid.to_owned()),
                }),
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.kubelet.client.clone(), namespace);
        let account = account.unwrap_or("default");
        let params = PostParams::default();
        let answer: TokenRequest =
            api.create_subresource("token", account, &params, &request).await?;
        let status = answer.status.unwrap_or_default();
        let ends = status.expiration_timestamp.map_or_else(Timestamp::now, |time| time.0);
        let life = Duration::try_from(ends.duration_since(Timestamp::now())).unwrap_or_default();
        let renew = Instant::now() + life.mul_f64(TOKEN_RENEW.0).min(TOKEN_RENEW.1);
        Ok((status.token.unwrap_or_default(), renew))
    }

    /// Has the container's image on this node; says so in upstream's words.
    pub async fn pull(self, slot: usize) -> (PodEvent, Option<UnpackedImage>) {
        let Some((_, container)) = self.container(slot) else {
            return (PodEvent::no_image(slot, "ErrImagePull", String::new()), None);
        };
        let image = container.image.clone().unwrap_or_default();
        let policy = pull_policy(container, &image);
        let images = &self.kubelet.images;
        if policy != PullPolicy::Always {
            match images.ensure(&image, PullPolicy::Never, &Auth::Anonymous).await {
                Ok(found) => {
                    let message = format!("Container image \"{image}\" already present on machine");
                    self.say(Some(slot), "Pulled", message);
                    return (
                        PodEvent::ImageReady { slot, digest: found.digest.clone() },
                        Some(found),
                    );
                }
                Err(ImageError::NeverPull { .. }) if policy == PullPolicy::IfNotPresent => {}
                Err(error) => {
                    return (PodEvent::no_image(slot, error.reason(), chain(&error)), None);
                }
            }
        }
        self.say(Some(slot), "Pulling", format!("Pulling image \"{image}\""));
        let began = Instant::now();
        let auth = self.credentials(&image).await;
        match images.ensure(&image, policy, &auth).await {
            Ok(found) => {
                let took = began.elapsed().as_millis();
                let message = format!("Successfully pulled image \"{image}\" in {took}ms");
                self.say(Some(slot), "Pulled", message);
                (PodEvent::ImageReady { slot, digest: found.digest.clone() }, Some(found))
            }
            Err(error) => (PodEvent::no_image(slot, error.reason(), chain(&error)), None),
        }
    }

    /// The credentials that `imagePullSecrets` hold for the image's registry.
    async fn credentials(&self, image: &str) -> Auth {
        let (namespace, _, _) = identity(&self.pod);
        let api: Api<Secret> = Api::namespaced(self.kubelet.client.clone(), namespace);
        for reference in self.spec().image_pull_secrets.iter().flatten() {
            let Ok(Some(secret)) = api.get_opt(&reference.name).await else { continue };
            let data = secret.data.unwrap_or_default();
            let Some(config) = data.get(".dockerconfigjson") else { continue };
            if let Some(auth) = docker_auth(&config.0, image) {
                return auth;
            }
        }
        Auth::Anonymous
    }

    /// Builds the container's spec and starts it; runs `postStart`.
    pub async fn start(self, slot: usize, restart_count: u32, image: UnpackedImage) -> PodEvent {
        let failed = |reason, message| PodEvent::not_made(slot, reason, message);
        let Some((_, container)) = self.container(slot) else {
            return failed("CreateContainerConfigError", "no such container".to_owned());
        };
        let spec = match self.build(container, restart_count, image).await {
            Ok(spec) => spec,
            Err(message) => return failed("CreateContainerConfigError", message),
        };
        let started = match self.kubelet.runtime.start_container(&spec).await {
            Ok(started) => started,
            Err(error) if error.is_start_refused() => {
                let message = format!("failed to start container: {}", error.source);
                return PodEvent::refused(slot, spec.id, last_words::of_unstarted(message));
            }
            Err(error) => return failed("CreateContainerError", chain(&error)),
        };
        self.say(Some(slot), "Created", format!("Created container: {}", container.name));
        self.say(Some(slot), "Started", format!("Started container {}", container.name));
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        if let Some(hook) = hook
            && let Err(message) = self.hook(&spec.id, hook).await
        {
            self.record(Note {
                slot: Some(slot),
                warning: true,
                reason: "FailedPostStartHook",
                message: format!("PostStartHook failed: {message}"),
            });
            // A container whose hook failed is killed; its exit restarts it as the policy says.
            let stopped = self.kubelet.runtime.stop_container(&spec.id, MIN_GRACE).await;
            if let Err(error) = stopped {
                tracing::warn!(error = chain(&error), "container not stopped");
            }
        }
        PodEvent::Started { slot, id: spec.id, started }
    }

    async fn build(
        &self,
        container: &Container,
        restart_count: u32,
        image: UnpackedImage,
    ) -> Result<runtime::ContainerSpec, String> {
        let places = self.ensure_volumes().await.map_err(|error| chain(&error))?;
        let objects = self.fetched.lock().await.objects.clone();
        let spec = self.spec();
        let ctx = EnvContext {
            pod: &self.pod,
            objects: &objects,
            services: self.service_variables(&spec),
            pod_ips: &self.ips,
            host_ip: self.kubelet.config.node_ip,
            allocatable: self.kubelet.allocatable,
        };
        let variables = env::variables(container, &ctx)?;
        let (uid, gid) = asked_user(&spec, container);
        let text = match (uid, gid) {
            (Some(uid), Some(gid)) => format!("{uid}:{gid}"),
            (Some(uid), None) => uid.to_string(),
            (None, _) => image.config.user.clone(),
        };
        let mut user = self.kubelet.images.user(&image, &text)?;
        user.gid = gid.unwrap_or(user.gid);
        let id = runtime::random_id()?;
        let ctx = ContainerContext {
            pod: &self.pod,
            container,
            id,
            restart_count,
            image,
            variables,
            user,
            volumes: &places,
        };
        container_spec(ctx, &self.kubelet.node)
    }

    fn service_variables(&self, spec: &PodSpec) -> Vec<(String, String)> {
        let (namespace, _, _) = identity(&self.pod);
        let Some(table) = &self.kubelet.services else { return Vec::new() };
        let master = ObjectKey::new("default", "kubernetes");
        let links = spec.enable_service_links != Some(false);
        let rows = table.changes_since(0).upserts;
        let wanted = rows
            .iter()
            .filter(|(key, _)| *key == master || (links && &*key.namespace == namespace));
        let views: Vec<ServiceView> = wanted
            .filter_map(|(key, row)| {
                let ports = row.ports.iter().map(|port| {
                    let protocol = match port.protocol {
                        Protocol::Tcp => "TCP",
                        Protocol::Udp => "UDP",
                        Protocol::Sctp => "SCTP",
                    };
                    (port.name.to_string(), protocol, port.port)
                });
                let cluster_ip = *row.cluster_ips.first()?;
                Some(ServiceView { name: key.name.to_string(), cluster_ip, ports: ports.collect() })
            })
            .collect();
        env::service_variables(&views)
    }

    async fn hook(&self, id: &ContainerId, hook: &LifecycleHandler) -> Result<(), String> {
        if let Some(exec) = &hook.exec {
            let command = exec.command.clone().unwrap_or_default();
            return prober::run(&self.kubelet.runtime, id, command).await;
        }
        if let Some(sleep) = &hook.sleep {
            tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0)))
                .await;
        }
        Ok(())
    }

    /// `preStop` within the grace, then the stop signal with what is left of it.
    pub async fn stop(self, slot: usize, id: ContainerId, grace: Duration) -> Option<PodEvent> {
        let began = Instant::now();
        let hook = self.container(slot).and_then(|(_, container)| {
            container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.clone())
        });
        if let (Some(hook), false) = (hook, grace.is_zero()) {
            let result = tokio::time::timeout(grace, self.hook(&id, &hook)).await;
            let failure = match result {
                Ok(Ok(())) => None,
                Ok(Err(message)) => Some(message),
                Err(_elapsed) => Some(format!("timed out after {}s", grace.as_secs())),
            };
            if let Some(message) = failure {
                self.record(Note {
                    slot: Some(slot),
                    warning: true,
                    reason: "FailedPreStopHook",
                    message: format!("PreStopHook failed: {message}"),
                });
            }
        }
        let left = if grace.is_zero() {
            Duration::ZERO
        } else {
            grace.saturating_sub(began.elapsed()).max(MIN_GRACE)
        };
        // The machine asks again when no exit follows, so a failure is only worth a line.
        if let Err(error) = self.kubelet.runtime.stop_container(&id, left).await {
            tracing::warn!(container = %id, error = chain(&error), "container not stopped");
        }
        None
    }

    /// Asks the container how it is.
    pub async fn probe(
        self,
        slot: usize,
        id: ContainerId,
        (kind, timeout): (super::probe::ProbeKind, Duration),
    ) -> Option<PodEvent> {
        let (_, container) = self.container(slot)?;
        let probe = prober::probe_of(container, kind)?;
        let ip = self.ips.first().copied().unwrap_or(self.kubelet.config.node_ip);
        let result = prober::ask(&self.kubelet.runtime, (container, &id), probe, ip, timeout).await;
        let (success, message) = match result {
            Ok(()) => (true, String::new()),
            Err(message) => (false, message),
        };
        Some(PodEvent::Probed { slot, id, kind, success, message })
    }

    /// Takes the sandbox down.
    pub async fn remove_sandbox(self) -> PodEvent {
        let (_, _, uid) = identity(&self.pod);
        match self.kubelet.runtime.remove_sandbox(&runtime::PodUid(uid.into())).await {
            Ok(()) => PodEvent::SandboxRemoved,
            Err(error) => PodEvent::SandboxStuck { message: chain(&error) },
        }
    }

    /// Writes the last status, then lets the API object go.
    pub async fn delete(self, status: Value) -> Option<PodEvent> {
        let (namespace, name, uid) = identity(&self.pod);
        let api: Api<Pod> = Api::namespaced(self.kubelet.client.clone(), namespace);
        if let Err(error) = patch_status(&api, &self.pod, &status).await {
            return Some(delete_failed(&error));
        }
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        // Success is told by the watch: with finalizers the object stays.
        api.delete(name, &params).await.err().map(|error| delete_failed(&error))
    }
}

fn delete_failed(error: &kube::Error) -> PodEvent {
    if is_gone(error) { PodEvent::DeletedFromApi } else { PodEvent::DeleteFailed }
}

/// Whether an error says that the object, as this process knows it, is no more.
#[must_use]
pub fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404
        || (status.code == 409 && status.message.contains("UID")))
}

/// Writes a pod's status, unless another pod took its name.
///
/// # Errors
/// The API's; retry helps for all but those that `is_gone` names.
pub async fn patch_status(api: &Api<Pod>, pod: &Pod, status: &Value) -> Result<(), kube::Error> {
    let (_, name, uid) = identity(pod);
    let patch = json!({"metadata": {"uid": uid}, "status": status});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}
