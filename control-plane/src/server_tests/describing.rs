//! Discovery and OpenAPI: what is kept, and what is not served.

use super::{get, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openapi_is_kept_by_its_hash() {
    let Some(server) = server().await else { return };
    let token = server.ok("create token default", "").await;
    let bearer = format!("Authorization: Bearer {}\r\n", token.trim());
    let index = get(&server, "/openapi/v3", &bearer).await.1;
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap().to_owned();
    let (path, hash) = url.split_once("?hash=").unwrap();
    let head = super::head(&server, &url, &bearer).await;
    assert!(head.contains("cache-control: public, immutable, max-age=31536000"), "{head}");
    assert!(head.contains(&format!("etag: \"{hash}\"")), "{head}");
    let head = super::head(&server, path, &bearer).await;
    assert!(head.contains("cache-control: no-cache, private") && head.contains(hash), "{head}");
    let known = format!("{bearer}If-None-Match: \"{hash}\"\r\n");
    assert_eq!(get(&server, path, &known).await.0, 304);
    assert_eq!(get(&server, "/openapi/v3/apis/batch/v1", &bearer).await.0, 404);
    assert_eq!(get(&server, "/openapi/v2", &bearer).await.1["swagger"], "2.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kind_that_is_not_served_is_named() {
    let Some(server) = server().await else { return };
    let job = "apiVersion: batch/v1\nkind: Job\nmetadata: {name: j}\nspec: {template: {}}";
    for line in ["create -f -", "apply -f -", "apply --server-side -f -"] {
        let said = server.refused(line, job).await;
        assert!(said.contains("no matches for kind \"Job\" in version \"batch/v1\""), "{said}");
    }
    let listed = server.ok("api-resources --no-headers -o name", "").await;
    assert!(!listed.contains("jobs"), "{listed}");
}
