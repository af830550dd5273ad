//! The four kinds of PATCH, as changes of a stored object. Pure.

use serde_json::{Value, json};

use crate::{
    api::{
        error,
        patch::{self, PatchError},
        prepare::text,
    },
    client::ApiError,
    schema::{
        FieldError, Kind, Path,
        decode::{self, DecodeError, Strictness, Warning},
    },
};

const ACCEPTED: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";

/// The body of a PATCH.
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    form: Form,
    value: Value,
    /// Keys that stand twice in it, and fields that no operation has.
    found: Vec<Warning>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Json,
    Merge,
    Strategic,
    Apply,
}

impl Patch {
    /// Reads a patch by its `Content-Type`.
    ///
    /// # Errors
    /// 415 for another type, 400 for what does not parse.
    pub fn parse(content_type: Option<&str>, bytes: &[u8]) -> Result<Self, ApiError> {
        let media = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
        let form = match media.trim() {
            "application/json-patch+json" => Form::Json,
            "application/merge-patch+json" => Form::Merge,
            "application/strategic-merge-patch+json" => Form::Strategic,
            "application/apply-patch+yaml" | "application/apply-patch+json" => Form::Apply,
            _ => return Err(error::unsupported_media_type(ACCEPTED)),
        };
        let (parsed, what) = match form {
            Form::Apply => (decode::parse_yaml(bytes), "YAML"),
            Form::Json | Form::Merge | Form::Strategic => (decode::parse_json(bytes), "patch"),
        };
        let (value, duplicates) = parsed
            .map_err(|failure| error::bad_request(format!("error decoding {what}: {failure}")))?;
        if form == Form::Merge && !value.is_object() && !value.is_null() {
            return Err(error::bad_request(format!(
                "error decoding patch: json: cannot unmarshal {} into Go value of type map[string]interface {{}}",
                decode::go_value(&value)
            )));
        }
        let found = match form {
            Form::Apply => duplicates.iter().map(|path| already_set(path)).collect(),
            Form::Merge | Form::Strategic => duplicates.iter().map(|path| twice(path)).collect(),
            Form::Json => {
                let found = duplicates.iter().map(|path| twice(path)).chain(strange(&value));
                found.map(|found| format!("json patch {found}")).collect()
            }
        };
        Ok(Self { form, value, found })
    }

    /// The configuration of a server-side apply; nothing for the other kinds of patch.
    ///
    /// # Errors
    /// 400 for keys that stand twice, where the request is strict.
    pub fn configuration(
        &self,
        strictness: Strictness,
    ) -> Result<Option<(&Value, Vec<Warning>)>, ApiError> {
        match strictness {
            _ if self.form != Form::Apply => Ok(None),
            Strictness::Strict if !self.found.is_empty() => Err(error::bad_request(format!(
                "error strict decoding YAML: error converting YAML to JSON: yaml: unmarshal errors:\n  {}",
                self.found.join("\n  ")
            ))),
            Strictness::Warn => Ok(Some((&self.value, self.found.clone()))),
            Strictness::Strict | Strictness::Ignore => Ok(Some((&self.value, Vec::new()))),
        }
    }

    /// The patched object, checked against its kind.
    ///
    /// # Errors
    /// 400 or 422, as upstream.
    pub fn onto(
        &self,
        kind: &Kind,
        current: &Value,
        strictness: Strictness,
    ) -> Result<(Value, Vec<Warning>), ApiError> {
        // Upstream answers a patched object that does not decode with 422, and shows the object; of a
        // strategic patch it shows the patch. What is shown is made for a refusal alone.
        let shown = || match self.form {
            Form::Strategic => Ok(printed(&self.value)),
            Form::Json | Form::Merge | Form::Apply => {
                self.patched(kind, current).map(|patched| patched.to_string())
            }
        };
        let refused = |failure: &DecodeError| {
            let shown = match shown() {
                Ok(shown) => Value::String(shown),
                Err(error) => return error,
            };
            let path = Path::new("patch");
            let error = FieldError::invalid(&path, &shown, failure.to_string());
            ApiError {
                code: 422,
                reason: "Invalid",
                message: format!(" \"\" is invalid: {error}"),
                details: json!({"causes": [error.cause()]}),
            }
        };
        let mut patched = self.patched(kind, current)?;
        for field in ["apiVersion", "kind"] {
            let (new, own) = (text(&patched, &format!("/{field}")), &current[field]);
            if new.is_empty() || *own == new || !patched.is_object() {
                continue;
            }
            // Upstream reads what a strategic patch made as what it was before.
            if self.form != Form::Strategic {
                return Err(refused(&DecodeError::Type(format!(
                    "no kind {:?} is registered for version {:?}",
                    text(&patched, "/kind"),
                    text(&patched, "/apiVersion")
                ))));
            }
            patched[field] = own.clone();
        }
        let decoded = decode::value(kind, patched, Strictness::Warn);
        let (object, unknown) = decoded.map_err(|failure| refused(&failure))?;
        let found: Vec<Warning> = self.found.iter().cloned().chain(unknown).collect();
        match strictness {
            Strictness::Strict if !found.is_empty() => Err(refused(&DecodeError::Strict(found))),
            Strictness::Warn => Ok((object, found)),
            Strictness::Strict | Strictness::Ignore => Ok((object, Vec::new())),
        }
    }

    fn patched(&self, kind: &Kind, current: &Value) -> Result<Value, ApiError> {
        let refused = |failure: PatchError| match failure {
            PatchError::Malformed(text) => error::bad_request(text),
            PatchError::Unfit(text) => ApiError {
                code: 422,
                reason: "Invalid",
                message: format!(
                    "the server rejected our request due to an error in our request: {text}"
                ),
                details: Value::Null,
            },
        };
        match self.form {
            Form::Json => patch::json::patch(current.clone(), &self.value).map_err(refused),
            Form::Merge => Ok(patch::merge::patch(current.clone(), &self.value)),
            Form::Strategic => {
                patch::strategic::patch(kind.body, current.clone(), &self.value).map_err(refused)
            }
            Form::Apply => Err(error::unsupported_media_type(
                "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json",
            )),
        }
    }
}

fn twice(path: &str) -> Warning {
    format!("duplicate field {path:?}")
}

/// The YAML decoder's words, which name the key only.
fn already_set(path: &str) -> Warning {
    let key = path.rsplit('.').next().unwrap_or(path);
    format!("key {key:?} already set in map")
}

/// Fields that the operations of a JSON patch do not have.
fn strange(operations: &Value) -> Vec<Warning> {
    let operations = operations.as_array().into_iter().flatten().enumerate();
    let fields = operations.flat_map(|(index, operation)| {
        operation.as_object().into_iter().flatten().map(move |(field, _)| (index, field))
    });
    fields
        .filter(|(_, field)| !["op", "path", "from", "value"].contains(&field.as_str()))
        .map(|(index, field)| format!("unknown field \"[{index}].{field}\""))
        .collect()
}

/// As Go prints a map (`%+v`): `map[spec:map[replicas:2]]`.
fn printed(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(printed).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|(key, value)| format!("{key}:{}", printed(value))).collect();
            format!("map[{}]", fields.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    const MERGE: &str = "application/merge-patch+json";
    const STRATEGIC: &str = "application/strategic-merge-patch+json";
    const JSON: &str = "application/json-patch+json";

    fn onto(media: &str, body: &str, how: Strictness) -> Result<(Value, Vec<Warning>), ApiError> {
        let kind = schema::kind("apps", "v1", "Deployment").unwrap();
        let current = json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web"}, "spec": {"replicas": 1}});
        Patch::parse(Some(media), body.as_bytes())?.onto(&kind, &current, how)
    }

    #[test]
    fn unknown_and_duplicate_fields_are_warnings_or_a_refusal_of_the_patch() {
        let unknown = "unknown field \"spec.replcas\"";
        let twice = "duplicate field \"spec.replicas\"";
        let both = r#"{"spec":{"replicas":2,"replicas":3,"replcas":4}}"#;
        let operation = r#"[{"op":"add","op":"add","path":"/spec/replcas","value":1,"valeu":2}]"#;
        let of_operation = [
            "json patch duplicate field \"[0].op\"",
            "json patch unknown field \"[0].valeu\"",
            unknown,
        ];
        let object = r#"{\"apiVersion\":\"apps/v1\","#;
        let cases: [(&str, &str, &[&str], &str); 3] = [
            (MERGE, both, &[twice, unknown], object),
            (STRATEGIC, both, &[twice, unknown], "map[spec:map[replcas:4 replicas:3]]"),
            (JSON, operation, &of_operation, object),
        ];
        for (media, body, found, shown) in cases {
            let (patched, warnings) = onto(media, body, Strictness::Warn).unwrap();
            assert_eq!(warnings, found, "{media}");
            assert!(patched["spec"].get("replcas").is_none(), "{patched}");
            let (_, ignored) = onto(media, body, Strictness::Ignore).unwrap();
            assert_eq!(ignored, Vec::<Warning>::new(), "{media}");
            let refused = onto(media, body, Strictness::Strict).unwrap_err();
            assert_eq!((refused.code, refused.reason), (422, "Invalid"), "{media}");
            let start = format!(" \"\" is invalid: patch: Invalid value: \"{shown}");
            assert!(refused.message.starts_with(&start), "{}", refused.message);
            let end = format!("strict decoding error: {}", found.join(", "));
            assert!(refused.message.ends_with(&end), "{}", refused.message);
            assert_eq!(refused.details["causes"][0]["field"], "patch");
        }
    }

    #[test]
    fn keys_that_stand_twice_in_a_configuration_are_warnings_or_a_bad_request() {
        let body = b"spec: {replicas: 1, replicas: 2}";
        let patch = Patch::parse(Some("application/apply-patch+yaml"), body).unwrap();
        let (config, warnings) = patch.configuration(Strictness::Warn).unwrap().unwrap();
        assert_eq!(config["spec"]["replicas"], 2);
        assert_eq!(warnings, ["key \"replicas\" already set in map"]);
        let refused = patch.configuration(Strictness::Strict).unwrap_err();
        assert_eq!(refused.code, 400);
        assert!(refused.message.starts_with("error strict decoding YAML: "), "{}", refused.message);
        assert!(refused.message.ends_with("key \"replicas\" already set in map"));
        assert_eq!(
            patch.configuration(Strictness::Ignore).unwrap().unwrap().1,
            Vec::<Warning>::new()
        );
    }
}
