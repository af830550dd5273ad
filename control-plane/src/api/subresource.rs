//! Subresources that are objects: status, scale, binding, approval, finalize, token, eviction.

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
        scale, service_account,
        verbs::one,
    },
    client::ApiError,
    schema,
};

/// The life of a token if the client does not say, and the least, in seconds (upstream's).
const TOKEN_LIFE: i64 = 3600;
const TOKEN_LEAST: i64 = 600;
/// A year: the most.
const TOKEN_MOST: i64 = 31_536_000;

/// Reads a body as the subresource's kind.
type Decode<'a> = dyn Fn(&[u8]) -> Result<Value, ApiError> + Send + Sync + 'a;

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
            body::decode(&kind, format, bytes, call.options.validation).map(|(object, _)| object)
        };
        match name {
            "binding" => {
                self.api.bind(call, &decode(&bytes)?).await?;
                let done = success(&Value::Null).to_string();
                Ok(Reply::bytes(StatusCode::CREATED, "application/json", done.into()))
            }
            "eviction" => {
                let eviction = decode(&bytes)?;
                let options = deletion::Options::read(&eviction["deleteOptions"]);
                self.api.delete(call, &options).await?;
                let done = success(&Value::Null).to_string();
                Ok(Reply::bytes(StatusCode::CREATED, "application/json", done.into()))
            }
            "token" => {
                let request = self.api.token(call, decode(&bytes)?).await?;
                let bytes = request.to_string().into();
                Ok(Reply::bytes(StatusCode::CREATED, "application/json", bytes))
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
        let written = match verb {
            Verb::Get => Written::Stored(self.api.get(call).await?),
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
                let (object, _) = self.decode(asked, call, bytes)?;
                self.api.update(call, part, &|_| Ok(object.clone())).await?
            }
        };
        Ok(one(call, media, StatusCode::OK, &written))
    }

    async fn scale(
        &self,
        asked: &Asked,
        call: &Call,
        verb: Verb,
        (bytes, decode): (&Bytes, &Decode<'_>),
    ) -> Result<Reply, ApiError> {
        let owner = match verb {
            Verb::Get => self.api.get(call).await?.value(),
            Verb::Patch => {
                let patch = Patch::parse(asked.header(header::CONTENT_TYPE), bytes)?;
                let kind = schema::kind("autoscaling", "v1", "Scale");
                let kind = kind.ok_or_else(error::no_resource)?;
                let change = |current: &Value| {
                    let strictness = call.options.validation;
                    let (wanted, _) = patch.onto(&kind, &scale::of(current), strictness)?;
                    scale::onto(call, current, &wanted)
                };
                self.api.update(call, Part::Main, &change).await?.value()
            }
            Verb::List
            | Verb::Watch
            | Verb::Create
            | Verb::Update
            | Verb::Delete
            | Verb::DeleteCollection => {
                let wanted = decode(bytes)?;
                let change = |current: &Value| scale::onto(call, current, &wanted);
                self.api.update(call, Part::Main, &change).await?.value()
            }
        };
        Ok(Reply::json(&scale::of(&owner)))
    }
}

impl Api {
    /// Binds a pod to a node, once.
    ///
    /// # Errors
    /// 409 when the pod is bound or going.
    pub async fn bind(&self, call: &Call, binding: &Value) -> Result<Written, ApiError> {
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

    /// Issues a token for a service account; the request comes back with its status.
    ///
    /// # Errors
    /// 404 without the account, 409 for a pod that is another one, 422 for a time out of range.
    pub async fn token(&self, call: &Call, mut request: Value) -> Result<Value, ApiError> {
        let keys = self.service_accounts.as_ref().ok_or_else(error::no_resource)?;
        let account = self.get(call).await?.value();
        let asked = request["spec"]["expirationSeconds"].as_i64().unwrap_or(TOKEN_LIFE);
        if asked < TOKEN_LEAST {
            return Err(error::bad_request(
                "spec.expirationSeconds: Invalid value: may not specify a duration less than 10 minutes",
            ));
        }
        let bound = &request["spec"]["boundObjectRef"];
        let pod = if text(bound, "/kind") == "Pod" {
            let name = text(bound, "/name").to_owned();
            let found = self.peek("core/pods", &call.namespace, &name).await?;
            let about = error::About { group: "", plural: "pods", name: &name };
            let found = found.ok_or_else(|| about.not_found())?;
            if text(&found, "/spec/serviceAccountName") != call.name {
                return Err(error::bad_request("the pod does not use this service account"));
            }
            Some((name, text(&found, "/metadata/uid").to_owned()))
        } else {
            None
        };
        let now = Timestamp::now();
        let claims = service_account::Claims {
            namespace: call.namespace.clone(),
            account: call.name.clone(),
            account_uid: text(&account, "/metadata/uid").to_owned(),
            pod,
            node: call.user.node().map(str::to_owned),
            issued: now.as_second(),
            expires: now.as_second() + asked.min(TOKEN_MOST),
        };
        let token = keys.sign(&claims).map_err(error::internal)?;
        let end = Timestamp::from_second(claims.expires).unwrap_or(now);
        request["apiVersion"] = json!("authentication.k8s.io/v1");
        request["kind"] = json!("TokenRequest");
        request["spec"]["expirationSeconds"] = json!(asked);
        request["spec"]["audiences"] = json!([service_account::ISSUER]);
        request["status"] = json!({"token": token,
            "expirationTimestamp": schema::decode::print_time(end, false)});
        Ok(request)
    }
}
