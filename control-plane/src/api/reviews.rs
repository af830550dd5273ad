//! Reviews: who am I, may I, may they. Nothing of it is stored.

use bytes::Bytes;
use http::{StatusCode, header};
use serde_json::{Value, json};

use crate::{
    api::{
        authn::User,
        authz::{self, Ask},
        body,
        core::Call,
        error,
        http::{Asked, Handler, Reply},
        prepare::text,
        route::{Target, Verb},
        service_account,
        verbs::kind_of,
    },
    client::ApiError,
    schema::{FieldError, Path},
};

/// Refuses a review that asks nothing.
fn check(call: &Call, review: &Value) -> Result<(), ApiError> {
    let (path, spec) = (Path::new("spec"), &review["spec"]);
    let plural = call.served.plural;
    if plural == "tokenreviews" && text(spec, "/token").is_empty() {
        let why = "token is required for TokenReview in authentication";
        return Err(error::bad_request(why));
    }
    if !matches!(plural, "subjectaccessreviews" | "selfsubjectaccessreviews") {
        return Ok(());
    }
    let mut errors = Vec::new();
    let (resource, other) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    if resource.is_object() && other.is_object() {
        let why = "cannot be specified in combination with resourceAttributes";
        errors.push(FieldError::invalid(&path.child("nonResourceAttributes"), other, why));
    } else if !resource.is_object() && !other.is_object() {
        let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
        errors.push(FieldError::invalid(&path.child("resourceAttributes"), &Value::Null, why));
    }
    let groups = spec["groups"].as_array().is_some_and(|groups| !groups.is_empty());
    if plural == "subjectaccessreviews" && text(spec, "/user").is_empty() && !groups {
        let why = "at least one of user or group must be specified";
        errors.push(FieldError::invalid(&path.child("user"), &json!(""), why));
    }
    match errors.as_slice() {
        [] => Ok(()),
        errors => Err(error::invalid((call.served.group, ""), "", errors)),
    }
}

impl Handler {
    pub(super) async fn review(
        &self,
        asked: &Asked,
        call: &Call,
        bytes: &Bytes,
    ) -> Result<Reply, ApiError> {
        let kind = kind_of(call.served)?;
        let format = body::format(asked.header(header::CONTENT_TYPE))?;
        let (mut review, warnings) = body::decode(&kind, format, bytes, call.options.validation)?;
        body::is_of(&kind, &review)?;
        check(call, &review)?;
        review["apiVersion"] = json!(call.served.api_version());
        review["kind"] = json!(call.served.kind);
        review["status"] = match call.served.plural {
            "selfsubjectreviews" => json!({"userInfo": call.user.to_json()}),
            "selfsubjectaccessreviews" => self.may(&call.user, &review["spec"]).await?,
            "subjectaccessreviews" => {
                let spec = &review["spec"];
                let groups = spec["groups"].as_array().into_iter().flatten();
                let groups: Vec<&str> = groups.filter_map(Value::as_str).collect();
                self.may(&User::new(text(spec, "/user"), &groups), spec).await?
            }
            "selfsubjectrulesreviews" => authz::rules(&call.user),
            "tokenreviews" => self.token_review(&review["spec"]).await?,
            "bindings" => return Ok(self.bind_named(call, &review).await?.warned(warnings)),
            _ => return Err(error::no_resource()),
        };
        let review = review.to_string().into();
        Ok(Reply::bytes(StatusCode::CREATED, "application/json", review).warned(warnings))
    }

    async fn token_review(&self, spec: &Value) -> Result<Value, ApiError> {
        let asked = spec["audiences"].as_array().into_iter().flatten();
        let mut audiences: Vec<String> =
            asked.filter_map(Value::as_str).map(str::to_owned).collect();
        if audiences.is_empty() {
            audiences.push(service_account::ISSUER.to_owned());
        }
        match self.api.token_user(text(spec, "/token"), &audiences).await {
            Ok((user, meant)) => {
                Ok(json!({"authenticated": true, "user": user.to_json(), "audiences": meant}))
            }
            Err(failure) if failure.code == 401 => {
                Ok(json!({"authenticated": false, "user": {}, "error": failure.message}))
            }
            Err(failure) => Err(failure),
        }
    }

    /// The old form of `pods/NAME/binding`.
    async fn bind_named(&self, call: &Call, binding: &Value) -> Result<Reply, ApiError> {
        let served = crate::schema::resource("", "v1", "pods").ok_or_else(error::no_resource)?;
        let name = text(binding, "/metadata/name").to_owned();
        let pod = Call { served, name, ..call.clone() };
        self.api.bind(&pod, binding).await?;
        let done = super::http::success(&Value::Null).to_string();
        Ok(Reply::bytes(StatusCode::CREATED, "application/json", done.into()))
    }

    async fn may(&self, user: &User, spec: &Value) -> Result<Value, ApiError> {
        let path = text(spec, "/nonResourceAttributes/path");
        let allowed = if path.is_empty() {
            let asked = &spec["resourceAttributes"];
            let verb = match text(asked, "/verb") {
                "get" => Verb::Get,
                "list" => Verb::List,
                "watch" => Verb::Watch,
                "update" => Verb::Update,
                "patch" => Verb::Patch,
                "delete" => Verb::Delete,
                "deletecollection" => Verb::DeleteCollection,
                // What nobody but an administrator may: as one would ask for a creation.
                _ => Verb::Create,
            };
            let owned = |pointer: &str| text(asked, pointer).to_owned();
            let target = Target {
                group: owned("/group"),
                version: owned("/version"),
                plural: owned("/resource"),
                namespace: owned("/namespace"),
                name: owned("/name"),
                subresource: owned("/subresource"),
            };
            self.api.allows(user, Ask::Resource(&target, verb)).await?
        } else {
            self.api.allows(user, Ask::Path(path)).await?
        };
        Ok(if allowed {
            json!({"allowed": true})
        } else {
            json!({"allowed": false, "reason": "no rule of this server allows it"})
        })
    }
}
