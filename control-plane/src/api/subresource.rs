//! Subresources that are objects: status, scale, binding, approval, finalize, token, eviction.

use std::sync::OnceLock;

use bytes::Bytes;
use http::{StatusCode, header};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    api::{
        body,
        core::{Api, Call, Written},
        deletion, error,
        http::{Asked, Handler, Reply, success},
        patching::Patch,
        prepare::{Part, text},
        render::Media,
        route::{Target, Verb},
        scale,
        verbs::one,
    },
    client::ApiError,
    schema::{self, decode::Warning},
};

/// Reads a body as the subresource's kind.
type Decode<'a> = dyn Fn(&[u8]) -> Result<(Value, Vec<Warning>), ApiError> + Send + Sync + 'a;

impl Handler {
    pub(super) async fn subresource(
        &self,
        asked: &Asked,
        call: &Call,
        target: &Target,
        (verb, bytes): (Verb, Bytes),
    ) -> Result<Reply, ApiError> {
        let name = target.subresource.as_str();
        let sub = call.served.subresource(name).ok_or_else(error::no_resource)?;
        if !sub.verbs.contains(&verb.name()) {
            return Err(error::method_not_allowed());
        }
        let (group, version, kind) = sub.kind;
        let decode = |bytes: &[u8]| {
            let kind = schema::kind(group, version, kind).ok_or_else(error::no_resource)?;
            let format = body::format(asked.header(header::CONTENT_TYPE))?;
            let (object, warnings) = body::decode(&kind, format, bytes, call.options.validation)?;
            body::is_of(&kind, &object)?;
            Ok((object, warnings))
        };
        let done = |warnings| {
            let done = success(&Value::Null).to_string().into();
            Ok(Reply::bytes(StatusCode::CREATED, "application/json", done).warned(warnings))
        };
        match name {
            "binding" => {
                let (binding, warnings) = decode(&bytes)?;
                meant(call, sub.kind.2, &binding)?;
                self.api.bind(call, &binding).await?;
                done(warnings)
            }
            "eviction" => {
                let (eviction, warnings) = decode(&bytes)?;
                meant(call, sub.kind.2, &eviction)?;
                let options = deletion::Options::read(&eviction["deleteOptions"])?;
                self.api.delete(call, &options).await?;
                done(warnings)
            }
            "token" => {
                let (request, warnings) = decode(&bytes)?;
                let made = self.api.token(call, request).await?.to_string().into();
                Ok(Reply::bytes(StatusCode::CREATED, "application/json", made).warned(warnings))
            }
            "scale" => self.scale(asked, call, verb, (&bytes, &decode)).await,
            "status" => self.part(asked, call, Part::Status, (verb, &bytes)).await,
            "approval" => self.part(asked, call, Part::Approval, (verb, &bytes)).await,
            "finalize" => self.part(asked, call, Part::Finalize, (verb, &bytes)).await,
            _ => Err(error::no_resource()),
        }
    }

    async fn part(
        &self,
        asked: &Asked,
        call: &Call,
        part: Part,
        (verb, bytes): (Verb, &Bytes),
    ) -> Result<Reply, ApiError> {
        let media = Media::negotiate(asked.header(header::ACCEPT), None)?;
        let (written, warnings) = match verb {
            Verb::Get => (Written::Stored(self.api.get(call).await?), Vec::new()),
            Verb::Patch => {
                let patch = Patch::parse(asked.header(header::CONTENT_TYPE), bytes)?;
                self.patch(call, part, &patch).await?
            }
            Verb::List
            | Verb::Watch
            | Verb::Create
            | Verb::Update
            | Verb::Delete
            | Verb::DeleteCollection => {
                let (object, warnings) = self.decode(asked, call, bytes)?;
                (self.api.update(call, part, &|_| Ok(object.clone())).await?, warnings)
            }
        };
        Ok(one(call, media, StatusCode::OK, &written).warned(warnings))
    }

    async fn scale(
        &self,
        asked: &Asked,
        call: &Call,
        verb: Verb,
        (bytes, decode): (&Bytes, &Decode<'_>),
    ) -> Result<Reply, ApiError> {
        let (owner, warnings) = match verb {
            Verb::Get => (self.api.get(call).await?.value(), Vec::new()),
            Verb::Patch => {
                let patch = Patch::parse(asked.header(header::CONTENT_TYPE), bytes)?;
                let kind = schema::kind("autoscaling", "v1", "Scale");
                let kind = kind.ok_or_else(error::no_resource)?;
                let warnings = OnceLock::new();
                let change = |current: &Value| {
                    let strictness = call.options.validation;
                    let (wanted, found) = patch.onto(&kind, &scale::of(current), strictness)?;
                    warnings.get_or_init(|| found);
                    scale::onto(call, current, &wanted)
                };
                let written = self.api.update(call, Part::Main, &change).await?;
                (written.value(), warnings.into_inner().unwrap_or_default())
            }
            Verb::List
            | Verb::Watch
            | Verb::Create
            | Verb::Update
            | Verb::Delete
            | Verb::DeleteCollection => {
                let (wanted, warnings) = decode(bytes)?;
                let change = |current: &Value| scale::onto(call, current, &wanted);
                (self.api.update(call, Part::Main, &change).await?.value(), warnings)
            }
        };
        Ok(Reply::json(&scale::of(&owner)).warned(warnings))
    }
}

/// Refuses an object that is about another pod than the path.
fn meant(call: &Call, kind: &str, object: &Value) -> Result<(), ApiError> {
    let namespace = text(object, "/metadata/namespace");
    if text(object, "/metadata/name") != call.name {
        return Err(error::bad_request(format!(
            "name in URL does not match name in {kind} object"
        )));
    }
    if !namespace.is_empty() && namespace != call.namespace {
        return Err(error::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

impl Api {
    /// Binds a pod to a node, once.
    ///
    /// # Errors
    /// 409 when the pod is bound or going.
    pub async fn bind(&self, call: &Call, binding: &Value) -> Result<Written, ApiError> {
        let kind = text(binding, "/target/kind");
        if !matches!(kind, "" | "Node") {
            return Err(error::bad_request(format!(
                "target.kind: Unsupported value: {kind:?}: supported values: \"Node\", \"<empty>\""
            )));
        }
        let node = text(binding, "/target/name").to_owned();
        let uid = text(binding, "/metadata/uid").to_owned();
        if node.is_empty() {
            return Err(error::bad_request("target.name: Required value"));
        }
        let about = call.about();
        let refuse = |why: String| {
            let mut failure = about.conflict(&why);
            failure.message = failure.message.replacen("on pods", "on pods/binding", 1);
            failure
        };
        let now = schema::decode::print_time(Timestamp::now(), false);
        let change = |pod: &Value| {
            let stored = text(pod, "/metadata/uid");
            if !uid.is_empty() && uid != stored {
                return Err(refuse(format!(
                    "Precondition failed: UID in precondition: {uid}, UID in object meta: {stored}"
                )));
            }
            if !text(pod, "/metadata/deletionTimestamp").is_empty() {
                return Err(refuse(format!(
                    "pod {} is being deleted, cannot be assigned to a host",
                    call.name
                )));
            }
            let bound = text(pod, "/spec/nodeName");
            if !bound.is_empty() {
                return Err(refuse(format!(
                    "pod {} is already assigned to node {bound:?}",
                    call.name
                )));
            }
            let revision = text(binding, "/metadata/resourceVersion");
            if !revision.is_empty() && revision != text(pod, "/metadata/resourceVersion") {
                return Err(about.modified());
            }
            let mut pod = pod.clone();
            pod["spec"]["nodeName"] = json!(node);
            let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let mut conditions: Vec<Value> =
                conditions.into_iter().filter(|c| c["type"] != "PodScheduled").collect();
            conditions.push(json!({"type": "PodScheduled", "status": "True",
                "lastProbeTime": null, "lastTransitionTime": now}));
            pod["status"]["conditions"] = json!(conditions);
            Ok(pod)
        };
        self.update(call, Part::Binding, &change).await
    }
}
