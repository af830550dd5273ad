//! Who one is, what one may, and for whom a token is, as `kubectl` tells.

use super::{get, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_says_who_one_is_and_what_one_may() {
    let Some(server) = server().await else { return };
    let me = server.ok("auth whoami", "").await;
    assert!(me.contains("kubernetes-admin") && me.contains("system:masters"), "{me}");
    assert_eq!(server.ok("auth can-i create deployments", "").await, "yes\n");
    let all = server.ok("auth can-i --list", "").await;
    assert!(all.contains("*.*"), "{all}");

    let robot = "--as=system:serviceaccount:default:robot";
    let me = server.ok(&format!("auth whoami {robot}"), "").await;
    assert!(me.contains("system:serviceaccounts:default"), "{me}");
    let may = server.output(&format!("auth can-i create deployments {robot}"), "").await;
    assert!(String::from_utf8_lossy(&may.stdout).starts_with("no"), "{may:?}");
    let listed = server.ok(&format!("auth can-i --list {robot}"), "").await;
    assert!(listed.contains("selfsubjectreviews") && !listed.contains("*.*"), "{listed}");
    let refused = server.refused(&format!("get pods {robot}"), "").await;
    assert!(
        refused.contains("pods is forbidden: User \"system:serviceaccount:default:robot\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_for_its_audience_and_ends_with_its_account_or_pod() {
    let Some(server) = server().await else { return };
    server.ok("create serviceaccount robot", "").await;
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {serviceAccountName: robot, containers: [{name: c, image: i}]}";
    server.ok("create -f -", pod).await;
    let token = async |more: &str| server.ok(&format!("create token robot {more}"), "").await;
    let code = async |token: &str| {
        let header = format!("Authorization: Bearer {}\r\n", token.trim());
        get(&server, "/api", &header).await.0
    };
    let vault = token("--audience=vault").await;
    assert_eq!(code(&vault).await, 401);
    let review = |audiences: &str| {
        format!(
            "apiVersion: authentication.k8s.io/v1\nkind: TokenReview\nmetadata: {{name: r}}\nspec: {{token: {}, audiences: {audiences}}}",
            vault.trim()
        )
    };
    let said = server.ok("create -o yaml -f -", &review("[vault, other]")).await;
    assert!(said.contains("authenticated: true") && said.contains("- vault"), "{said}");
    let said = server.ok("create -o yaml -f -", &review("[other]")).await;
    assert!(said.contains("authenticated: false"), "{said}");

    let short = server.refused("create token robot --duration=1m", "").await;
    assert!(
        short.contains("spec.expirationSeconds: Invalid value: 60: may not specify a duration less than 10 minutes"),
        "{short}"
    );
    let wrong = "create token default --bound-object-kind=Pod --bound-object-name=p";
    let wrong = server.refused(wrong, "").await;
    assert!(wrong.contains("pod running with different serviceaccount name"), "{wrong}");

    let bound = token("--bound-object-kind=Pod --bound-object-name=p").await;
    let free = token("").await;
    assert_eq!((code(&bound).await, code(&free).await), (200, 200));
    server.ok("delete pod p --force --grace-period=0", "").await;
    assert_eq!((code(&bound).await, code(&free).await), (401, 200));
    server.ok("delete serviceaccount robot", "").await;
    server.ok("create serviceaccount robot", "").await;
    assert_eq!(code(&free).await, 401);
}
