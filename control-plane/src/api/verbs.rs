//! Requests on resources: decode, call `core`, render.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::{StatusCode, header};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    admission::warnings,
    api::{
        authz::Ask,
        body,
        core::{Call, Deleted, Written},
        deletion, error, event_form,
        http::{Asked, Handler, Reply, success},
        list,
        patching::Patch,
        prepare::{self, Part, text},
        query::{ListOptions, WriteOptions},
        render::{Media, only_metadata, outward, outward_value},
        route::{Target, Verb},
    },
    client::ApiError,
    schema::{self, FieldError, Kind, Path, Served, decode::Warning, proto},
    store::Entry,
};

impl Handler {
    pub(super) async fn resource(
        &self,
        asked: &Asked,
        target: &Target,
        verb: Verb,
        bytes: Bytes,
    ) -> Result<Reply, ApiError> {
        let served = schema::resource(&target.group, &target.version, &target.plural)
            .ok_or_else(error::no_resource)?;
        let call = Call {
            served,
            namespace: if served.namespaced { target.namespace.clone() } else { String::new() },
            name: target.name.clone(),
            user: Arc::clone(&asked.user),
            options: WriteOptions {
                agent: agent(asked),
                ..WriteOptions::parse(&asked.query, verb)?
            },
        };
        if !target.subresource.is_empty() {
            return self.subresource(asked, &call, target, (verb, bytes)).await;
        }
        let named = !served.namespaced || !call.namespace.is_empty();
        if !served.allows(verb.name()) || (verb == Verb::Create && !(named && call.name.is_empty()))
        {
            return Err(error::method_not_allowed());
        }
        if served.verbs == ["create"] {
            return self.review(asked, &call, &bytes).await;
        }
        let media =
            Media::negotiate(asked.header(header::ACCEPT), asked.query.first("includeObject"))?;
        match verb {
            Verb::Get => {
                let entry = self.api.get(&call).await?;
                Ok(one(&call, media, StatusCode::OK, &Written::Stored(entry)))
            }
            Verb::List => {
                let options = ListOptions::parse(&asked.query)?;
                let page = self.api.list(&call, &options).await?;
                Ok(many(served, media, &page))
            }
            Verb::Watch => {
                let options = ListOptions::parse(&asked.query)?;
                let shutdown = self.shutdown.clone();
                let lines = self.api.watch(call, options, media, shutdown).await?;
                Ok(Reply::lines(watch_type(media), lines))
            }
            Verb::Create => self.create(asked, &call, media, &bytes).await,
            Verb::Update => {
                let (status, written, warnings) = self.replace(asked, &call, &bytes).await?;
                Ok(one(&call, media, status, &written).warned(warnings))
            }
            Verb::Patch => {
                let patch = Patch::parse(asked.header(header::CONTENT_TYPE), &bytes)?;
                let (written, warnings) = self.patch(&call, Part::Main, &patch).await?;
                Ok(one(&call, media, StatusCode::OK, &written).warned(warnings))
            }
            Verb::Delete => {
                let options = delete_options(asked, &bytes)?;
                let deleted = self.api.delete(&call, &options).await?;
                Ok(self.deleted(&call, media, &deleted))
            }
            Verb::DeleteCollection => self.delete_collection(asked, &call, media, &bytes).await,
        }
    }

    async fn create(
        &self,
        asked: &Asked,
        call: &Call,
        media: Media,
        bytes: &Bytes,
    ) -> Result<Reply, ApiError> {
        let (mut object, found) = self.decode(asked, call, bytes)?;
        if call.served.plural == "certificatesigningrequests" {
            super::signing::stamp(&call.user, &mut object);
        }
        let written = self.api.create(call, object).await?;
        let said = warnings::of(call.served, &written.value(), warnings::Written::New);
        let warnings = found.into_iter().chain(said).collect();
        Ok(one(call, media, StatusCode::CREATED, &written).warned(warnings))
    }

    async fn replace(
        &self,
        asked: &Asked,
        call: &Call,
        bytes: &Bytes,
    ) -> Result<(StatusCode, Written, Vec<Warning>), ApiError> {
        let (object, mut warnings) = self.decode(asked, call, bytes)?;
        prepare::named(call.about(), &object)?;
        let before = OnceLock::new();
        let change = |current: &Value| {
            before.get_or_init(|| generation(current));
            Ok(object.clone())
        };
        let written = match self.api.update(call, Part::Main, &change).await {
            // What has no revision was not read before.
            Err(failure)
                if failure.code == 404
                    && created_by_put(call.served)
                    && text(&object, "/metadata/resourceVersion").is_empty()
                    && text(&object, "/metadata/uid").is_empty() =>
            {
                let target = Target {
                    group: call.served.group.to_owned(),
                    version: call.served.version.to_owned(),
                    plural: call.served.plural.to_owned(),
                    namespace: call.namespace.clone(),
                    ..Target::default()
                };
                self.api.authorize(&call.user, Ask::Resource(&target, Verb::Create)).await?;
                let made = Call { name: String::new(), ..call.clone() };
                let written = self.api.create(&made, object.clone()).await?;
                warnings.extend(warnings::of(
                    call.served,
                    &written.value(),
                    warnings::Written::New,
                ));
                return Ok((StatusCode::CREATED, written, warnings));
            }
            outcome => outcome?,
        };
        warnings.extend(told(call, before, &written));
        Ok((StatusCode::OK, written, warnings))
    }

    pub(super) fn decode(
        &self,
        asked: &Asked,
        call: &Call,
        bytes: &[u8],
    ) -> Result<(Value, Vec<Warning>), ApiError> {
        let kind = kind_of(call.served)?;
        let format = body::format(asked.header(header::CONTENT_TYPE))?;
        let (object, warnings) = body::decode(&kind, format, bytes, call.options.validation)?;
        let object = event_form::inward(call.served, object);
        Ok((object, warnings))
    }

    pub(super) async fn patch(
        &self,
        call: &Call,
        part: Part,
        patch: &Patch,
    ) -> Result<(Written, Vec<Warning>), ApiError> {
        let kind = kind_of(call.served)?;
        let strictness = call.options.validation;
        if let Some((config, warnings)) = patch.configuration(strictness)? {
            return Ok((self.api.apply(call, part, config).await?, warnings));
        }
        if call.options.force.is_some() {
            let why = "may not be specified for non-apply patch";
            let error = FieldError::forbidden(&Path::new("force"), why);
            return Err(error::invalid(("meta.k8s.io", "PatchOptions"), "", &[error]));
        }
        let served = call.served;
        // Every try finds the same.
        let (warnings, before) = (OnceLock::new(), OnceLock::new());
        let change = |current: &Value| {
            before.get_or_init(|| generation(current));
            let shown = outward_value(served, current);
            let (patched, found) = patch.onto(&kind, &shown, strictness)?;
            warnings.get_or_init(|| found);
            // Of a PUT it is a precondition.
            let uid = text(&patched, "/metadata/uid");
            if !uid.is_empty() && uid != text(current, "/metadata/uid") {
                return Err(prepare::fixed(served, "metadata.uid", (uid, &call.name)));
            }
            Ok(event_form::inward(served, patched))
        };
        let written = self.api.update(call, part, &change).await?;
        let mut warnings = warnings.into_inner().unwrap_or_default();
        if part == Part::Main {
            warnings.extend(told(call, before, &written));
        }
        Ok((written, warnings))
    }

    fn deleted(&self, call: &Call, media: Media, deleted: &Deleted) -> Reply {
        // Upstream returns these kinds' last state, and a Status for others that are gone.
        let shown =
            matches!(call.served.plural, "pods" | "services" | "namespaces" | "serviceaccounts");
        match deleted {
            Deleted::Removed(written) if !shown => {
                let value = written.value();
                let mut details = json!({"name": call.name, "kind": call.served.plural,
                    "uid": text(&value, "/metadata/uid")});
                if !call.served.group.is_empty() {
                    details["group"] = json!(call.served.group);
                }
                Reply::json(&success(&details))
            }
            Deleted::Removed(written) | Deleted::Waiting(written) => {
                one(call, media, StatusCode::OK, written)
            }
        }
    }

    async fn delete_collection(
        &self,
        asked: &Asked,
        call: &Call,
        media: Media,
        bytes: &Bytes,
    ) -> Result<Reply, ApiError> {
        let options = delete_options(asked, bytes)?;
        let mut page = self.api.list(call, &ListOptions::parse(&asked.query)?).await?;
        let mut entries = Vec::new();
        for entry in &page.entries {
            let value = entry.value();
            let one = Call {
                namespace: text(&value, "/metadata/namespace").to_owned(),
                name: text(&value, "/metadata/name").to_owned(),
                ..call.clone()
            };
            match self.api.delete(&one, &options).await {
                Ok(Deleted::Removed(Written::Stored(e)) | Deleted::Waiting(Written::Stored(e))) => {
                    entries.push(e);
                }
                Ok(Deleted::Removed(Written::Dry(_)) | Deleted::Waiting(Written::Dry(_))) => {
                    entries.push(Arc::clone(entry));
                }
                Err(failure) if failure.code == 404 => {}
                Err(failure) => return Err(failure),
            }
        }
        page.entries = entries;
        Ok(many(call.served, media, &page))
    }
}

/// Upstream's `AllowCreateOnUpdate`.
fn created_by_put(served: &Served) -> bool {
    matches!(served.plural, "leases" | "services" | "events" | "endpoints")
}

fn generation(object: &Value) -> i64 {
    object["metadata"]["generation"].as_i64().unwrap_or(0)
}

/// What admission has to say of an update of an object that had this generation.
fn told(call: &Call, before: OnceLock<i64>, written: &Written) -> Vec<Warning> {
    let object = written.value();
    let what = match before.into_inner() {
        Some(before) if before != generation(&object) => warnings::Written::Changed,
        _ => warnings::Written::Same,
    };
    warnings::of(call.served, &object, what)
}

/// The program's name in `User-Agent`; upstream cuts it at 128 bytes too.
fn agent(asked: &Asked) -> String {
    let text = asked.header(header::USER_AGENT).unwrap_or_default();
    text.split('/').next().unwrap_or_default().chars().take(128).collect()
}

pub(super) fn kind_of(served: &Served) -> Result<Kind, ApiError> {
    served.kind().ok_or_else(error::no_resource)
}

/// Options come in the body, some also in the query.
fn delete_options(asked: &Asked, bytes: &[u8]) -> Result<deletion::Options, ApiError> {
    let kind = schema::kind("", "v1", "DeleteOptions").ok_or_else(error::no_resource)?;
    let mut body = json!({});
    if !bytes.is_empty() {
        let format = body::format(asked.header(header::CONTENT_TYPE))?;
        body = body::decode(&kind, format, bytes, schema::decode::Strictness::Ignore)?.0;
        let given = text(&body, "/kind");
        if !given.is_empty() && given != "DeleteOptions" {
            let version = text(&body, "/apiVersion");
            let why = format!("no kind {given:?} is registered for version {version:?}");
            return Err(error::bad_request(why));
        }
    }
    if let Some(policy) = asked.query.first("propagationPolicy") {
        body["propagationPolicy"] = json!(policy);
    }
    if let Some(grace) = asked.query.first("gracePeriodSeconds") {
        let seconds: i64 = grace.parse().map_err(|_parse| {
            error::bad_request(format!("gracePeriodSeconds: {grace:?} is not a number"))
        })?;
        body["gracePeriodSeconds"] = json!(seconds);
    }
    deletion::Options::read(&body)
}

fn watch_type(media: Media) -> &'static str {
    match media {
        Media::Table(_) => "application/json;as=Table;v=v1;g=meta.k8s.io;stream=watch",
        Media::Json | Media::Yaml | Media::Protobuf | Media::Metadata => {
            "application/json;stream=watch"
        }
    }
}

/// One object in the form asked for.
pub(super) fn one(call: &Call, media: Media, status: StatusCode, written: &Written) -> Reply {
    let value = || outward_value(call.served, &written.value());
    match media {
        Media::Json => {
            let bytes = match written {
                Written::Stored(entry) => outward(call.served, entry),
                Written::Dry(_) => Bytes::from(value().to_string()),
            };
            Reply::bytes(status, "application/json", bytes)
        }
        Media::Table(view) => {
            let table = view.one(call.served, &value(), Timestamp::now());
            Reply::bytes(status, "application/json", Bytes::from(table.to_string()))
        }
        Media::Metadata => {
            let object = only_metadata(&value());
            Reply::bytes(status, "application/json", Bytes::from(object.to_string()))
        }
        Media::Yaml | Media::Protobuf => other(call.served, media, status, &value()),
    }
}

fn other(served: &Served, media: Media, status: StatusCode, value: &Value) -> Reply {
    match (media, served.kind()) {
        (Media::Protobuf, Some(kind)) => Reply::bytes(
            status,
            "application/vnd.kubernetes.protobuf",
            Bytes::from(proto::encode(&kind, value)),
        ),
        _ => {
            let yaml = serde_yaml_ng::to_string(value).unwrap_or_default();
            Reply::bytes(status, "application/yaml", Bytes::from(yaml))
        }
    }
}

fn many(served: &'static Served, media: Media, page: &list::Page) -> Reply {
    let shown = |entry: &Arc<Entry>| outward_value(served, &entry.value());
    let body = match media {
        Media::Json => {
            let items: Vec<Bytes> = page.entries.iter().map(|e| outward(served, e)).collect();
            list::body(&served.list_kind(), &served.api_version(), page, &items)
        }
        Media::Table(view) => {
            let values: Vec<Value> = page.entries.iter().map(shown).collect();
            Bytes::from(view.many(served, page.metadata(), &values, Timestamp::now()).to_string())
        }
        Media::Metadata => {
            let items: Vec<Bytes> = page
                .entries
                .iter()
                .map(|entry| Bytes::from(only_metadata(&shown(entry)).to_string()))
                .collect();
            list::body("PartialObjectMetadataList", "meta.k8s.io/v1", page, &items)
        }
        Media::Yaml => {
            let items: Vec<Value> = page.entries.iter().map(shown).collect();
            let list = json!({"kind": served.list_kind(), "apiVersion": served.api_version(),
                "metadata": page.metadata(), "items": items});
            let yaml = serde_yaml_ng::to_string(&list).unwrap_or_default();
            return Reply::bytes(StatusCode::OK, "application/yaml", Bytes::from(yaml));
        }
        Media::Protobuf => {
            let values: Vec<Value> = page.entries.iter().map(shown).collect();
            let refs: Vec<&Value> = values.iter().collect();
            let Some(kind) = served.kind() else { return Reply::json(&json!({})) };
            let bytes = proto::encode_list(&kind, &page.metadata(), &refs);
            let media = "application/vnd.kubernetes.protobuf";
            return Reply::bytes(StatusCode::OK, media, Bytes::from(bytes));
        }
    };
    Reply::bytes(StatusCode::OK, "application/json", body)
}
