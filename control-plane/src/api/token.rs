//! `serviceaccounts/NAME/token`: who may be given which token.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    api::{
        core::{Api, Call},
        error::{self, About},
        prepare::text,
        service_account::{self, Claims},
    },
    client::ApiError,
    schema::{
        self, FieldError,
        field::{self, Path},
    },
};

/// The life of a token if the client does not say, and the least, in seconds (upstream's).
const LIFE: i64 = 3600;
const LEAST: i64 = 600;
/// A year: what longer wishes are cut to.
const MOST: i64 = 31_536_000;
/// Upstream's bound of a wish: 2^32 seconds.
const ABSURD: i64 = 1 << 32;

impl Api {
    /// Issues a token for a service account; the request comes back with its status.
    ///
    /// # Errors
    /// 404 without the account or the pod, 403 for a node and a pod that is not its own, 409 for a pod of
    /// another uid, 422 for a time out of range.
    pub async fn token(&self, call: &Call, mut request: Value) -> Result<Value, ApiError> {
        let keys = self.service_accounts.as_ref().ok_or_else(error::no_resource)?;
        let account = self.get(call).await?.value();
        let life = life(&request)?;
        let named = text(&request, "/metadata/name");
        if !named.is_empty() && named != call.name {
            let why = "must match the service account name if specified";
            let error = FieldError::invalid(&Path::new("metadata.name"), &json!(named), why);
            let kind = ("authentication.k8s.io", "TokenRequest");
            return Err(error::invalid(kind, &call.name, &[error]));
        }
        let pod = self.bound_pod(call, &request["spec"]["boundObjectRef"]).await?;
        restrict(call, pod.as_deref())?;
        let wanted = request["spec"]["audiences"].as_array().into_iter().flatten();
        let mut audiences: Vec<String> =
            wanted.filter_map(Value::as_str).map(str::to_owned).collect();
        if audiences.is_empty() {
            audiences.push(service_account::ISSUER.to_owned());
        }
        let of = |object: &Value| {
            let part = |pointer: &str| text(object, pointer).to_owned();
            (part("/metadata/name"), part("/metadata/uid"))
        };
        let node = match pod.as_deref().map(|pod| text(pod, "/spec/nodeName")) {
            None | Some("") => None,
            Some(name) => self.peek("core/nodes", "", name).await?.map(|node| of(&node)),
        };
        let now = Timestamp::now();
        let claims = Claims {
            namespace: call.namespace.clone(),
            account: call.name.clone(),
            account_uid: text(&account, "/metadata/uid").to_owned(),
            pod: pod.as_deref().map(of),
            node,
            audiences,
            issued: now.as_second(),
            expires: now.as_second() + life.min(MOST),
        };
        let token = keys.sign(&claims).map_err(error::internal)?;
        let end = Timestamp::from_second(claims.expires).unwrap_or(now);
        request["apiVersion"] = json!("authentication.k8s.io/v1");
        request["kind"] = json!("TokenRequest");
        request["metadata"]["name"] = json!(call.name);
        request["metadata"]["namespace"] = json!(call.namespace);
        request["spec"]["expirationSeconds"] = json!(life.min(MOST));
        request["spec"]["audiences"] = json!(claims.audiences);
        request["status"] = json!({"token": token,
            "expirationTimestamp": schema::decode::print_time(end, false)});
        Ok(request)
    }

    /// The pod that the token shall end with.
    async fn bound_pod(
        &self,
        call: &Call,
        bound: &Value,
    ) -> Result<Option<std::sync::Arc<Value>>, ApiError> {
        let (version, kind) = (text(bound, "/apiVersion"), text(bound, "/kind"));
        match (version, kind) {
            ("", "") => return Ok(None),
            ("v1" | "", "Pod") => {}
            _ => {
                return Err(error::bad_request(format!(
                    "cannot bind token to object of type {version}, Kind={kind}"
                )));
            }
        }
        let (name, uid) = (text(bound, "/name"), text(bound, "/uid"));
        let about = About { group: "", plural: "pods", name };
        let found = self.peek("core/pods", &call.namespace, name).await?;
        let found = found.ok_or_else(|| about.not_found())?;
        let stored = text(&found, "/metadata/uid");
        if !uid.is_empty() && uid != stored {
            return Err(about.conflict(&format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
            )));
        }
        if text(&found, "/spec/serviceAccountName") != call.name {
            return Err(error::bad_request(format!(
                "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                call.name
            )));
        }
        Ok(Some(found))
    }
}

/// Upstream's NodeRestriction: a node is given tokens for its own pods only.
fn restrict(call: &Call, pod: Option<&Value>) -> Result<(), ApiError> {
    let Some(node) = call.user.node() else { return Ok(()) };
    let refuse = |why: &str| Err(call.about().forbidden(why));
    match pod {
        None => refuse("node requested token not bound to a pod"),
        Some(pod) if text(pod, "/spec/nodeName") != node => {
            refuse("node requested token bound to a pod scheduled on a different node")
        }
        Some(_) => Ok(()),
    }
}

fn life(request: &Value) -> Result<i64, ApiError> {
    let asked = &request["spec"]["expirationSeconds"];
    let seconds = asked.as_i64().unwrap_or(LIFE);
    let why = if seconds < LEAST {
        "may not specify a duration less than 10 minutes"
    } else if seconds > ABSURD {
        "may not specify a duration larger than 2^32 seconds"
    } else {
        return Ok(seconds);
    };
    let wrong = FieldError::invalid(&Path::new("spec.expirationSeconds"), asked, why);
    let status = field::invalid_status(
        "authentication.k8s.io",
        "TokenRequest",
        "",
        std::slice::from_ref(&wrong),
    );
    Err(ApiError {
        code: 422,
        reason: "Invalid",
        message: text(&status, "/message").to_owned(),
        details: status["details"].clone(),
    })
}
