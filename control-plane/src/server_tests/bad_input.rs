//! What is refused: HTTP status, reason and field are upstream's, and the store's revision does not move.

use super::{Server, WEB, server};

/// The store's revision: every write, whatever it is of, adds one.
async fn revision(server: &Server) -> String {
    let metrics = server.ok("get --raw /metrics", "").await;
    let line = metrics.lines().find(|line| line.starts_with("orlop_store_revision "));
    line.unwrap().to_owned()
}

/// What kubectl says when the request is refused with this HTTP status, and nothing is written.
pub(super) async fn refused(server: &Server, line: &str, manifest: &str, status: &str) -> String {
    let before = revision(server).await;
    let said = server.refused(&format!("{line} -v=6"), manifest).await;
    assert!(said.contains(status), "kubectl {line}: no {status} in {said}");
    assert_eq!(revision(server).await, before, "kubectl {line} wrote something");
    said
}

pub(super) const STRICT: &str = "create --validate=strict -f -";
const LENIENT: &str = "create --validate=ignore -f -";

fn deployment() -> String {
    WEB.split_once("---").unwrap().0.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_or_misspelt_field() {
    let Some(server) = server().await else { return };
    let wrong = deployment().replace("replicas: 2", "replcas: 2");
    let said = refused(&server, STRICT, &wrong, "400 Bad Request").await;
    assert!(said.contains("Error from server (BadRequest): "), "{said}");
    assert!(
        said.contains("Deployment in version \"v1\" cannot be handled as a Deployment: strict decoding error: unknown field \"spec.replcas\""),
        "{said}"
    );
    let deep = deployment().replace("name: http}]", "nam: http}]");
    let said = refused(&server, STRICT, &deep, "400 Bad Request").await;
    assert!(
        said.contains("unknown field \"spec.template.spec.containers[0].ports[0].nam\""),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_patch_of_an_unknown_field_warns() {
    let Some(server) = server().await else { return };
    server.ok(STRICT, &deployment()).await;
    let merge = r#"--type=merge -p {"spec":{"replcas":2}}"#;
    let patches = [
        r#"-p {"spec":{"replcas":2}}"#,
        merge,
        r#"--type=json -p [{"op":"add","path":"/spec/replcas","value":2}]"#,
        &format!("--subresource=status {merge}"),
        &format!("--subresource=scale {merge}"),
    ];
    for patch in patches {
        let output = server.output(&format!("patch deployment web {patch}"), "").await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{patch}: {said}");
        assert_eq!(said, "Warning: unknown field \"spec.replcas\"\n", "{patch}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_apply_of_an_unknown_field_is_refused_whatever_the_strictness() {
    let Some(server) = server().await else { return };
    let wrong = deployment().replace("replicas: 2", "replcas: 2");
    for validate in ["strict", "warn", "ignore"] {
        let apply = format!("apply --server-side --validate={validate} -f -");
        let said = refused(&server, &apply, &wrong, "400 Bad Request").await;
        assert!(
            said.contains("failed to create typed patch object (default/web; apps/v1, Kind=Deployment): .spec.replcas: field not declared in schema"),
            "{said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_type() {
    let Some(server) = server().await else { return };
    let wrong = deployment().replace("replicas: 2", "replicas: two");
    for line in [STRICT, LENIENT] {
        let said = refused(&server, line, &wrong, "400 Bad Request").await;
        assert!(said.contains("Error from server (BadRequest): "), "{said}");
        assert!(
            said.contains("json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"),
            "{said}"
        );
    }
    server.ok(STRICT, &deployment()).await;
    let patch = r#"patch deployment web -p {"spec":{"replicas":"two"}}"#;
    let said = refused(&server, patch, "", "422 Unprocessable Entity").await;
    assert!(said.contains("patch: Invalid value: "), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_quantity() {
    let Some(server) = server().await else { return };
    let wrong = deployment().replace("cpu: 100m", "cpu: lots");
    let said = refused(&server, STRICT, &wrong, "400 Bad Request").await;
    assert!(
        said.contains("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"),
        "{said}"
    );
    let more = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: i, resources: {requests: {cpu: 2}, limits: {cpu: 1}}}]}";
    let said = refused(&server, STRICT, more, "422 Unprocessable Entity").await;
    assert!(
        said.contains("The Pod \"p\" is invalid: spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_duplicate_name() {
    let Some(server) = server().await else { return };
    server.ok(STRICT, &deployment()).await;
    let said = refused(&server, STRICT, &deployment(), "409 Conflict").await;
    assert!(said.contains("Error from server (AlreadyExists): "), "{said}");
    assert!(said.contains("deployments.apps \"web\" already exists"), "{said}");
    let twice = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: i}, {name: c, image: i}]}";
    let said = refused(&server, STRICT, twice, "422 Unprocessable Entity").await;
    assert!(said.contains("spec.containers[1].name: Duplicate value: \"c\""), "{said}");
    // Of two with one name server-side apply can keep only one, which its sender would not see.
    let apply = "apply --server-side --force-conflicts -f -";
    let said = refused(&server, apply, twice, "400 Bad Request").await;
    assert!(said.contains(".spec.containers: duplicate entries for key [name=\"c\"]"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_of_resource_versions() {
    let Some(server) = server().await else { return };
    server.ok(STRICT, &deployment()).await;
    let stale = deployment().replace("{name: web,", "{name: web, resourceVersion: '1',");
    let stale = stale.replace("replicas: 2", "replicas: 5");
    let said = refused(&server, "replace -f -", &stale, "409 Conflict").await;
    assert!(
        said.contains("Error from server (Conflict): ")
            && said.contains("Operation cannot be fulfilled on deployments.apps \"web\": the object has been modified; please apply your changes to the latest version and try again"),
        "{said}"
    );
    let patch =
        r#"patch deployment web -p {"metadata":{"resourceVersion":"1"},"spec":{"replicas":5}}"#;
    let said = refused(&server, patch, "", "409 Conflict").await;
    assert!(said.contains("the object has been modified"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_out_of_range_names_every_field() {
    let Some(server) = server().await else { return };
    let wrong =
        deployment().replace("replicas: 2", "replicas: -1").replace("name: http}]", "name: HTTP}]");
    let said = refused(&server, STRICT, &wrong, "422 Unprocessable Entity").await;
    assert!(said.contains("The Deployment \"web\" is invalid: "), "{said}");
    assert!(
        said.contains("* spec.replicas: Invalid value: -1: must be greater than or equal to 0"),
        "{said}"
    );
    assert!(
        said.contains("* spec.template.spec.containers[0].ports[0].name: Invalid value: \"HTTP\""),
        "{said}"
    );
    let bare = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: q}\nspec: {template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: i}]}}}";
    let said = refused(&server, STRICT, bare, "422 Unprocessable Entity").await;
    assert!(said.contains("* spec.selector: Required value"), "{said}");
    assert!(said.contains("* spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_served() {
    let Some(server) = server().await else { return };
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: i}]}";
    server.ok(STRICT, pod).await;
    let said = refused(&server, "debug p --image=i", "", "404 Not Found").await;
    assert!(
        said.contains(
            "error: ephemeral containers are disabled for this cluster (error from server: "
        ),
        "{said}"
    );
}

/// `kubectl replace` of what is there already sends it without the defaults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_that_lacks_defaults_alone_is_no_change_of_the_spec() {
    let Some(server) = server().await else { return };
    server.ok(STRICT, &deployment()).await;
    server.ok("replace -f -", &deployment()).await;
    assert_eq!(server.json("get deployment web").await["metadata"]["generation"], 1);
}

/// Admission adds tolerations to those of the manifest; the second `kubectl apply` sends the manifest's alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_tolerations_applied_again_is_not_written() {
    let Some(server) = server().await else { return };
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {tolerations: [{key: a, operator: Exists}], containers: [{name: c, image: i}]}";
    server.ok("apply -f -", pod).await;
    let before = revision(&server).await;
    server.ok("apply -f -", pod).await;
    assert_eq!(revision(&server).await, before);
}
