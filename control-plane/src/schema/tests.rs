//! Decoding against the table: cases of bad input, and `k8s-openapi`'s types as an oracle.

use k8s_openapi::api::{apps::v1 as apps, core::v1 as core, discovery::v1 as discovery};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    decode::{self, DecodeError, Strictness},
    kind, kind_of, proto,
    resources::served,
    table::{Container, Element, Field, Type},
};

fn strict(api_version: &str, name: &str, body: &Value) -> Result<Value, String> {
    let kind = kind_of(api_version, name).unwrap();
    let body = body.to_string();
    match decode::json(&kind, body.as_bytes(), Strictness::Strict) {
        Ok((value, warnings)) => {
            assert_eq!(warnings, Vec::<String>::new());
            Ok(value)
        }
        Err(error) => Err(error.message(&kind)),
    }
}

#[test]
fn refuses_in_upstreams_words() {
    let deployment = |spec: Value| json!({"metadata": {"name": "web"}, "spec": spec});
    let pod = |container: Value| json!({"spec": {"containers": [container]}});
    let cases = [
        (
            "Deployment",
            deployment(json!({"replicas": "3"})),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            "Deployment",
            deployment(json!({"replicas": 1.5})),
            "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            "Deployment",
            deployment(
                json!({"foo": 1, "template": {"spec": {"containers": [{"name": "a", "imagee": "x"}]}}}),
            ),
            "strict decoding error: unknown field \"spec.foo\", unknown field \"spec.template.spec.containers[0].imagee\"",
        ),
        (
            "Pod",
            pod(json!({"env": [{"name": "A", "value": 1}]})),
            "json: cannot unmarshal number into Go struct field EnvVar.spec.containers.env.value of type string",
        ),
        (
            "Pod",
            pod(json!({"resources": {"limits": {"memory": "64MB"}}})),
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
        ),
        (
            "Pod",
            json!({"spec": {"containers": {}}}),
            "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
        ),
        (
            "Pod",
            json!({"metadata": {"labels": {"a": 1}}}),
            "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string",
        ),
        (
            "Pod",
            json!({"metadata": {"creationTimestamp": "yesterday"}}),
            "parsing time \"yesterday\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"yesterday\" as \"2006\"",
        ),
        ("Secret", json!({"data": {"a": "&"}}), "illegal base64 data at input byte 0"),
    ];
    for (name, body, text) in cases {
        let api_version = if name == "Deployment" { "apps/v1" } else { "v1" };
        let message = strict(api_version, name, &body).unwrap_err();
        let wanted = format!("{name} in version \"v1\" cannot be handled as a {name}: {text}");
        assert_eq!(message, wanted);
    }
}

#[test]
fn a_time_in_microseconds_has_six_digits() {
    let form = "2006-01-02T15:04:05.000000Z07:00";
    let at = |text: &str| strict("v1", "Event", &json!({"eventTime": text}));
    at("2020-01-01T00:00:00.123456Z").unwrap();
    at("2020-01-01T00:00:00.123456+01:00").unwrap();
    for (digits, rest, wanted) in
        [("Z", "Z", ".000000"), (".5Z", ".5Z", ".000000"), (".123456789Z", "789Z", "Z07:00")]
    {
        let text = format!("2020-01-01T00:00:00{digits}");
        assert_eq!(
            at(&text).unwrap_err(),
            format!(
                "Event in version \"v1\" cannot be handled as a Event: parsing time {text:?} as {form:?}: cannot parse {rest:?} as {wanted:?}"
            )
        );
    }
}

#[test]
fn duplicates_and_warnings() {
    let kind = kind("apps", "v1", "Deployment").unwrap();
    let body = br#"{"spec":{"replicas":1,"replicas":2,"bar":3}}"#;
    let wanted =
        ["duplicate field \"spec.replicas\"".to_owned(), "unknown field \"spec.bar\"".to_owned()];
    assert_eq!(
        decode::json(&kind, body, Strictness::Strict),
        Err(DecodeError::Strict(wanted.to_vec()))
    );
    let (value, warnings) = decode::json(&kind, body, Strictness::Warn).unwrap();
    assert_eq!(warnings, wanted);
    assert_eq!(value, json!({"spec": {"replicas": 2}}));
    let yaml = b"spec:\n  replicas: 1\n  replicas: 2\n  bar: 3\n";
    assert_eq!(decode::yaml(&kind, yaml, Strictness::Warn).unwrap(), (value, warnings));
    assert!(matches!(
        decode::json(&kind, b"{\"spec\":", Strictness::Ignore),
        Err(DecodeError::Syntax(_))
    ));
}

#[test]
fn takes_gos_form() {
    let body = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "a", "creationTimestamp": null, "labels": {}},
        "spec": {
            "hostNetwork": false, "nodeName": "", "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{
                "name": "c", "image": "i", "resources": {"limits": {"cpu": 0.5, "memory": "1024Mi"}},
                "livenessProbe": {"httpGet": {"port": "http"}, "periodSeconds": 0},
            }],
        },
        "status": {"startTime": "2026-01-02T03:04:05.9+01:00"},
    });
    let wanted = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "a"},
        "spec": {
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{
                "name": "c", "image": "i", "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}},
                "livenessProbe": {"httpGet": {"port": "http"}},
            }],
        },
        "status": {"startTime": "2026-01-02T02:04:05Z"},
    });
    assert_eq!(strict("v1", "Pod", &body).unwrap(), wanted);
}

#[test]
fn protobuf_round_trips() {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "a", "labels": {"a": "", "b": "c"}, "generation": 3,
            "creationTimestamp": "2026-01-02T02:04:05Z",
            "managedFields": [{"manager": "m", "operation": "Update", "fieldsV1": {"f:spec": {}}}]},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsUser": -1, "supplementalGroups": [1, 2]},
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "w", "configMap": {"name": "x"}}],
            "containers": [{
                "name": "c", "image": "i", "resources": {"limits": {"cpu": "500m"}},
                "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                "readinessProbe": {"tcpSocket": {"port": 80}},
                "livenessProbe": {"httpGet": {"port": "http"}, "periodSeconds": 5},
            }],
        },
    });
    let kind = kind("", "v1", "Pod").unwrap();
    let (_, decoded) = proto::decode(&proto::encode(&kind, &pod)).unwrap();
    assert_eq!(decoded, pod);
    for cut in 0..proto::encode(&kind, &pod).len() {
        // Never a panic, whatever is missing.
        let _result = proto::decode(proto::encode(&kind, &pod).get(..cut).unwrap());
    }
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "data": {"a": "aGk="}});
    let kind = super::kind("", "v1", "Secret").unwrap();
    assert_eq!(proto::decode(&proto::encode(&kind, &secret)).unwrap().1, secret);
    assert!(matches!(proto::decode(b"{}"), Err(proto::ProtoError::NoMagic)));
}

fn oracle(body: &Value) {
    let api_version = body["apiVersion"].as_str().unwrap();
    let kind = body["kind"].as_str().unwrap();
    strict(api_version, kind, body).unwrap();
}

#[test]
fn decodes_what_k8s_openapi_writes() {
    let container = core::Container {
        name: "c".into(),
        ports: Some(vec![core::ContainerPort { container_port: 80, ..Default::default() }]),
        lifecycle: Some(core::Lifecycle {
            pre_stop: Some(core::LifecycleHandler {
                exec: Some(core::ExecAction { command: Some(vec!["x".into()]) }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        env_from: Some(vec![core::EnvFromSource {
            config_map_ref: Some(core::ConfigMapEnvSource {
                name: "a".into(),
                optional: Some(true),
            }),
            ..Default::default()
        }]),
        readiness_probe: Some(core::Probe {
            grpc: Some(core::GRPCAction { port: 1, service: Some("s".into()) }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec = core::PodSpec { containers: vec![container], ..Default::default() };
    let template = core::PodTemplateSpec { spec: Some(spec), ..Default::default() };
    let deployment = apps::Deployment {
        spec: Some(apps::DeploymentSpec { template, ..Default::default() }),
        ..Default::default()
    };
    oracle(&serde_json::to_value(deployment).unwrap());
    oracle(&serde_json::to_value(discovery::EndpointSlice::default()).unwrap());
    oracle(&serde_json::to_value(core::Event::default()).unwrap());
    oracle(&serde_json::to_value(core::Node::default()).unwrap());
}

#[test]
fn every_field_of_a_served_kind_has_a_place() {
    // A kind reached by protobuf: every field has a tag, but for the envelope's two and what is newer
    // than the protobuf definitions.
    let newer = ["schedulingGroup", "workloadRef", "volumeHealth"];
    for resource in served() {
        let kind = resource.kind().unwrap();
        for field in kind.body.fields() {
            let envelope = ["apiVersion", "kind"].contains(&field.name());
            assert_eq!(
                field.tag() == 0,
                envelope || newer.contains(&field.name()),
                "{} {}",
                resource.kind,
                field.name()
            );
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_decoded(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut body = proto::encode(&kind("", "v1", "Pod").unwrap(), &json!({}));
        body.extend(bytes);
        let _result = proto::decode(&body);
    }

    #[test]
    fn decoding_is_idempotent(replicas in any::<i32>(), cpu in "[0-9]{1,6}(m|k|Mi|)", name in "[a-z]{0,5}") {
        let body = json!({"spec": {"replicas": replicas, "paused": name.is_empty(), "template": {
            "metadata": {"name": name}, "spec": {"containers": [{"name": name,
            "resources": {"requests": {"cpu": cpu}}}]}}}});
        let kind = kind("apps", "v1", "Deployment").unwrap();
        let once = decode::value(&kind, body, Strictness::Strict).unwrap().0;
        let twice = decode::value(&kind, once.clone(), Strictness::Strict).unwrap().0;
        prop_assert_eq!(&once, &twice);
        let mut whole = once;
        whole["apiVersion"] = "apps/v1".into();
        whole["kind"] = "Deployment".into();
        let (_, through) = proto::decode(&proto::encode(&kind, &whole)).unwrap();
        prop_assert_eq!(whole, through);
    }
}

/// Bodies that kubectl 1.33 posted to a server on the loopback, each by the command beside it.
#[test]
fn decodes_what_kubectl_posts() {
    let cases: [(&[u8], Value); 9] = [
        // kubectl create deployment web --image=nginx:1 --port=80 --replicas=0
        (
            include_bytes!("fixtures/deployment.pb"),
            json!({"apiVersion":"apps/v1","kind":"Deployment","metadata":{"labels":{"app":"web"},"name":"web"},"spec":{"replicas":0,"selector":{"matchLabels":{"app":"web"}},"strategy":{},"template":{"metadata":{"labels":{"app":"web"}},"spec":{"containers":[{"image":"nginx:1","name":"nginx","ports":[{"containerPort":80}],"resources":{}}]}}},"status":{}}),
        ),
        // kubectl create namespace foo
        (
            include_bytes!("fixtures/namespace.pb"),
            json!({"apiVersion":"v1","kind":"Namespace","metadata":{"name":"foo"},"spec":{},"status":{}}),
        ),
        // kubectl create configmap c --from-literal=a=b
        (
            include_bytes!("fixtures/configmap.pb"),
            json!({"apiVersion":"v1","data":{"a":"b"},"kind":"ConfigMap","metadata":{"name":"c"}}),
        ),
        // kubectl create secret generic s --from-literal=a=b
        (
            include_bytes!("fixtures/secret.pb"),
            json!({"apiVersion":"v1","data":{"a":"Yg=="},"kind":"Secret","metadata":{"name":"s"}}),
        ),
        // kubectl create serviceaccount me
        (
            include_bytes!("fixtures/serviceaccount.pb"),
            json!({"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"me"}}),
        ),
        // kubectl create service nodeport np --tcp=80:8080
        (
            include_bytes!("fixtures/service-nodeport.pb"),
            json!({"apiVersion":"v1","kind":"Service","metadata":{"labels":{"app":"np"},"name":"np"},"spec":{"ports":[{"name":"80-8080","port":80,"protocol":"TCP","targetPort":8080}],"selector":{"app":"np"},"type":"NodePort"},"status":{"loadBalancer":{}}}),
        ),
        // kubectl create service clusterip ci --clusterip=None
        (
            include_bytes!("fixtures/service-headless.pb"),
            json!({"apiVersion":"v1","kind":"Service","metadata":{"labels":{"app":"ci"},"name":"ci"},"spec":{"clusterIP":"None","selector":{"app":"ci"},"type":"ClusterIP"},"status":{"loadBalancer":{}}}),
        ),
        // kubectl create token me
        (
            include_bytes!("fixtures/token.pb"),
            json!({"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","metadata":{},"spec":{},"status":{}}),
        ),
        // kubectl auth can-i get pods
        (
            include_bytes!("fixtures/accessreview.pb"),
            json!({"apiVersion":"authorization.k8s.io/v1","kind":"SelfSubjectAccessReview","metadata":{},"spec":{"resourceAttributes":{"namespace":"default","resource":"pods","verb":"get"}},"status":{"allowed":false}}),
        ),
    ];
    for (body, wanted) in cases {
        let (kind, object) = proto::decode(body).unwrap();
        assert_eq!(object, wanted);
        assert_eq!(decode::value(&kind, object.clone(), Strictness::Strict).unwrap().0, object);
    }
}

/// A value with every field set, down to a depth.
fn sample(of: Type, depth: usize) -> Value {
    let mut object = serde_json::Map::new();
    for field in of.fields() {
        if let Some(value) = sample_field(field, depth)
            && field.tag() != 0
        {
            object.insert(field.name().to_owned(), value);
        }
    }
    Value::Object(object)
}

fn sample_field(field: Field, depth: usize) -> Option<Value> {
    let one = match field.element() {
        Element::Object(_) if depth == 0 => return None,
        Element::Object(inner) => sample(inner, depth - 1),
        Element::String => json!("text"),
        Element::Bytes => json!("aGk="),
        Element::Bool => json!(true),
        Element::Int32 => json!(-7),
        Element::Int64 => json!(1_i64 << 40),
        Element::Double => json!(1.5),
        Element::Quantity => json!("1500m"),
        Element::IntOrString => json!("25%"),
        Element::Time => json!("2026-01-02T03:04:05Z"),
        Element::MicroTime => json!("2026-01-02T03:04:05.000006Z"),
        Element::RawExtension | Element::FieldsV1 => json!({"a": 1}),
        Element::Json => json!([1, "b", null]),
        Element::StringList => json!(["a", "b"]),
        Element::Duration
        | Element::JsonSchemaPropsOrBool
        | Element::JsonSchemaPropsOrArray
        | Element::JsonSchemaPropsOrStringArray => return None,
    };
    Some(match field.container() {
        Container::One => one,
        Container::List => json!([one, one]),
        Container::Map => json!({"a": one, "b": one}),
    })
}

#[test]
fn every_served_kind_round_trips() {
    let mut fields = 0;
    for resource in served() {
        let kind = resource.kind().unwrap();
        let mut object = sample(kind.body, 7);
        object["apiVersion"] = resource.api_version().into();
        object["kind"] = resource.kind.into();
        fields += object.to_string().matches(':').count();
        let (decoded, warnings) = decode::value(&kind, object.clone(), Strictness::Strict).unwrap();
        assert_eq!((&decoded, warnings), (&object, Vec::new()), "{}", resource.kind);
        let (_, through) = proto::decode(&proto::encode(&kind, &object)).unwrap();
        assert_eq!(through, object, "{}", resource.kind);
    }
    assert!(fields > 2000, "{fields}");
}
