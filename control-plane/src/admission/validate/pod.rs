//! Pod specs, of Pods and of templates. Pure.

use std::collections::BTreeSet;

use api::{names, quantity::Quantity};
use serde_json::{Value, json};

use super::{invalid, labels, list, non_negative, one_of, port_or_name, positive};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

pub(super) fn spec(spec: &Value, path: &Path) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let volumes = volumes(&mut errors, &path.child("volumes"), spec);
    let mut seen = BTreeSet::new();
    if list(spec, "containers").next().is_none() {
        errors.push(FieldError::required(&path.child("containers"), ""));
    }
    for key in ["containers", "initContainers"] {
        for (index, container) in list(spec, key) {
            let path = path.child(key).index(index);
            name(&mut errors, &path.child("name"), container, &mut seen);
            self::container(&mut errors, &path, container, &volumes);
        }
    }
    ports_apart(&mut errors, path, spec);
    let policies = ["Always", "OnFailure", "Never"];
    one_of(&mut errors, &path.child("restartPolicy"), &spec["restartPolicy"], &policies);
    let policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    one_of(&mut errors, &path.child("dnsPolicy"), &spec["dnsPolicy"], &policies);
    labels(&mut errors, &path.child("nodeSelector"), &spec["nodeSelector"]);
    let grace = path.child("terminationGracePeriodSeconds");
    non_negative(&mut errors, &grace, &spec["terminationGracePeriodSeconds"]);
    let deadline = &spec["activeDeadlineSeconds"];
    if deadline.as_i64().is_some_and(|n| !(1..=i64::from(i32::MAX)).contains(&n)) {
        errors.push(FieldError::invalid(
            &path.child("activeDeadlineSeconds"),
            deadline,
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    for (field, check) in [
        ("serviceAccountName", names::dns1123_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns1123_subdomain),
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
    ] {
        if let Some(word) = spec[field].as_str().filter(|word| !word.is_empty()) {
            invalid(&mut errors, &path.child(field), &spec[field], check(word));
        }
    }
    tolerations(&mut errors, &path.child("tolerations"), spec);
    errors
}

fn name(errors: &mut Vec<FieldError>, path: &Path, of: &Value, seen: &mut BTreeSet<String>) {
    match text(of, "/name") {
        "" => errors.push(FieldError::required(path, "")),
        name => {
            invalid(errors, path, &of["name"], names::dns1123_label(name));
            if !seen.insert(name.to_owned()) {
                errors.push(FieldError::duplicate(path, &of["name"]));
            }
        }
    }
}

fn volumes(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for (index, volume) in list(spec, "volumes") {
        let path = path.index(index);
        name(errors, &path.child("name"), volume, &mut seen);
        let sources: Vec<&String> = volume
            .as_object()
            .into_iter()
            .flat_map(|v| v.keys())
            .filter(|k| *k != "name")
            .collect();
        for extra in sources.iter().skip(1) {
            errors.push(FieldError::forbidden(
                &path.child(extra),
                "may not specify more than 1 volume type",
            ));
        }
        for (source, field) in [
            ("hostPath", "path"),
            ("secret", "secretName"),
            ("configMap", "name"),
            ("persistentVolumeClaim", "claimName"),
        ] {
            if volume[source].is_object() && text(&volume[source], &format!("/{field}")).is_empty()
            {
                errors.push(FieldError::required(&path.child(source).child(field), ""));
            }
        }
    }
    seen
}

fn container(
    errors: &mut Vec<FieldError>,
    path: &Path,
    container: &Value,
    volumes: &BTreeSet<String>,
) {
    let image = text(container, "/image");
    if image.is_empty() {
        errors.push(FieldError::required(&path.child("image"), ""));
    } else if image.trim() != image {
        errors.push(FieldError::invalid(
            &path.child("image"),
            &container["image"],
            "must not have leading or trailing whitespace",
        ));
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    one_of(errors, &path.child("imagePullPolicy"), &container["imagePullPolicy"], &policies);
    let policies = ["FallbackToLogsOnError", "File"];
    let policy = path.child("terminationMessagePolicy");
    one_of(errors, &policy, &container["terminationMessagePolicy"], &policies);
    ports(errors, &path.child("ports"), container);
    environment(errors, path, container);
    mounts(errors, &path.child("volumeMounts"), container, volumes);
    resources(errors, &path.child("resources"), &container["resources"]);
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[name].is_object() {
            probe(errors, &path.child(name), &container[name]);
        }
    }
    for name in ["livenessProbe", "startupProbe"] {
        let threshold = &container[name]["successThreshold"];
        if threshold.as_i64().is_some_and(|count| count != 1) {
            let path = path.child(name).child("successThreshold");
            errors.push(FieldError::invalid(&path, threshold, "must be 1"));
        }
    }
    for hook in ["postStart", "preStop"] {
        if container["lifecycle"][hook].is_object() {
            handler(errors, &path.child("lifecycle").child(hook), &container["lifecycle"][hook]);
        }
    }
}

fn ports(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    let mut seen = BTreeSet::new();
    for (index, port) in list(container, "ports") {
        let path = path.index(index);
        if let Some(name) = port["name"].as_str().filter(|name| !name.is_empty()) {
            invalid(errors, &path.child("name"), &port["name"], names::port_name(name));
            if !seen.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), &port["name"]));
            }
        }
        match port["containerPort"].as_i64() {
            None | Some(0) => errors.push(FieldError::required(&path.child("containerPort"), "")),
            Some(number) => {
                let reasons = names::port_number(number);
                invalid(errors, &path.child("containerPort"), &port["containerPort"], reasons);
            }
        }
        if let Some(number) = port["hostPort"].as_i64().filter(|number| *number != 0) {
            let reasons = names::port_number(number);
            invalid(errors, &path.child("hostPort"), &port["hostPort"], reasons);
        }
        one_of(errors, &path.child("protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
    }
}

/// No two containers of a pod take the same port of the host.
fn ports_apart(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    let mut seen = BTreeSet::new();
    for (c, container) in list(spec, "containers") {
        for (p, port) in list(container, "ports") {
            let Some(number) = port["hostPort"].as_i64().filter(|number| *number != 0) else {
                continue;
            };
            let taken = format!("{}/{}/{number}", text(port, "/protocol"), text(port, "/hostIP"));
            if !seen.insert(taken) {
                let path = path.child("containers").index(c).child("ports").index(p);
                errors.push(FieldError::duplicate(&path.child("hostPort"), &port["hostPort"]));
            }
        }
    }
}

fn environment(errors: &mut Vec<FieldError>, path: &Path, container: &Value) {
    for (index, env) in list(container, "env") {
        let path = path.child("env").index(index);
        match text(env, "/name") {
            "" => errors.push(FieldError::required(&path.child("name"), "")),
            name => invalid(errors, &path.child("name"), &env["name"], names::env_var_name(name)),
        }
        if let Some(from) = env["valueFrom"].as_object() {
            let path = path.child("valueFrom");
            match from.len() {
                0 => errors.push(FieldError::invalid(
                    &path,
                    &json!(""),
                    "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
                )),
                1 if text(env, "/value").is_empty() => {}
                1 => errors.push(FieldError::invalid(
                    &path,
                    &json!(""),
                    "may not be specified when `value` is not empty",
                )),
                _ => errors.push(FieldError::invalid(
                    &path,
                    &json!(""),
                    "may not have more than one field specified at a time",
                )),
            }
        }
    }
    for (index, from) in list(container, "envFrom") {
        let path = path.child("envFrom").index(index);
        let sources = ["configMapRef", "secretRef"].iter().filter(|s| from[**s].is_object());
        match sources.count() {
            0 => errors.push(FieldError::invalid(
                &path,
                &json!(""),
                "must specify one of: `configMapRef` or `secretRef`",
            )),
            1 => {}
            _ => errors.push(FieldError::invalid(
                &path,
                &json!(""),
                "may not have more than one field specified at a time",
            )),
        }
    }
}

fn mounts(errors: &mut Vec<FieldError>, path: &Path, of: &Value, volumes: &BTreeSet<String>) {
    let mut seen = BTreeSet::new();
    for (index, mount) in list(of, "volumeMounts") {
        let path = path.index(index);
        match text(mount, "/name") {
            "" => errors.push(FieldError::required(&path.child("name"), "")),
            name if !volumes.contains(name) => {
                errors.push(FieldError::not_found(&path.child("name"), &mount["name"]));
            }
            _ => {}
        }
        match text(mount, "/mountPath") {
            "" => errors.push(FieldError::required(&path.child("mountPath"), "")),
            place if !seen.insert(place) => errors.push(FieldError::invalid(
                &path.child("mountPath"),
                &mount["mountPath"],
                "must be unique",
            )),
            _ => {}
        }
        if text(mount, "/subPath").split('/').any(|part| part == "..") {
            let path = path.child("subPath");
            errors.push(FieldError::invalid(&path, &mount["subPath"], "must not contain '..'"));
        }
    }
}

fn resources(errors: &mut Vec<FieldError>, path: &Path, resources: &Value) {
    let amount = |list: &str, name: &str| {
        resources[list][name].as_str().and_then(|text| text.parse::<Quantity>().ok())
    };
    for list in ["limits", "requests"] {
        for name in resources[list].as_object().into_iter().flat_map(|list| list.keys()) {
            let path = path.child(list).key(name);
            invalid(errors, &path, &json!(name), names::qualified_name(name));
            let standard = ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str())
                || name.starts_with("hugepages-");
            if !standard && !name.contains('/') {
                errors.push(FieldError::invalid(
                    &path,
                    &json!(name),
                    "must be a standard resource for containers",
                ));
            }
            if amount(list, name).is_some_and(|amount| amount.sign() < 0) {
                errors.push(FieldError::invalid(
                    &path,
                    &resources[list][name],
                    "must be greater than or equal to 0",
                ));
            }
        }
    }
    for name in resources["requests"].as_object().into_iter().flat_map(|list| list.keys()) {
        let (Some(request), Some(limit)) = (amount("requests", name), amount("limits", name))
        else {
            continue;
        };
        if request.minus(limit).sign() > 0 {
            errors.push(FieldError::invalid(
                &path.child("requests"),
                &resources["requests"][name],
                format!("must be less than or equal to {name} limit of {limit}"),
            ));
        }
    }
}

fn probe(errors: &mut Vec<FieldError>, path: &Path, probe: &Value) {
    handler(errors, path, probe);
    for field in [
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        non_negative(errors, &path.child(field), &probe[field]);
    }
    positive(
        errors,
        &path.child("terminationGracePeriodSeconds"),
        &probe["terminationGracePeriodSeconds"],
    );
}

fn handler(errors: &mut Vec<FieldError>, path: &Path, of: &Value) {
    let kinds = ["exec", "httpGet", "tcpSocket", "grpc", "sleep"];
    let given: Vec<&&str> = kinds.iter().filter(|kind| of[**kind].is_object()).collect();
    if given.is_empty() {
        errors.push(FieldError::required(path, "must specify a handler type"));
    }
    for extra in given.iter().skip(1) {
        let path = path.child(extra);
        errors.push(FieldError::forbidden(&path, "may not specify more than 1 handler type"));
    }
    for kind in ["httpGet", "tcpSocket"] {
        if of[kind].is_object() {
            port_or_name(errors, &path.child(kind).child("port"), &of[kind]["port"]);
        }
    }
    if of["httpGet"].is_object() {
        let scheme = path.child("httpGet").child("scheme");
        one_of(errors, &scheme, &of["httpGet"]["scheme"], &["HTTP", "HTTPS"]);
    }
    if of["exec"].is_object() && list(&of["exec"], "command").next().is_none() {
        errors.push(FieldError::required(&path.child("exec").child("command"), ""));
    }
}

fn tolerations(errors: &mut Vec<FieldError>, path: &Path, spec: &Value) {
    for (index, toleration) in list(spec, "tolerations") {
        let path = path.index(index);
        let (key, operator) = (text(toleration, "/key"), text(toleration, "/operator"));
        if key.is_empty() && operator != "Exists" {
            errors.push(FieldError::invalid(
                &path.child("operator"),
                &json!(operator),
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            ));
        } else if !key.is_empty() {
            invalid(errors, &path.child("key"), &json!(key), names::qualified_name(key));
        }
        if !matches!(operator, "" | "Equal" | "Exists") {
            let path = path.child("operator");
            errors.push(FieldError::not_supported(&path, &json!(operator), &["Equal", "Exists"]));
        }
        if operator == "Exists" && !text(toleration, "/value").is_empty() {
            errors.push(FieldError::invalid(
                &path.child("operator"),
                toleration,
                "value must be empty when `operator` is 'Exists'",
            ));
        }
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        if let Some(effect) = toleration["effect"].as_str().filter(|effect| !effect.is_empty())
            && !effects.contains(&effect)
        {
            let path = path.child("effect");
            errors.push(FieldError::not_supported(&path, &toleration["effect"], &effects));
        }
    }
}
