//! Our server beside upstream's `kube-apiserver` over an etcd, where both programs are found: to the same requests,
//! most of them bad, both give the same status, reason, fields and warnings. The requests are in
//! `upstream/cases.txt`, whose first lines say how to read it.

#[cfg(test)]
#[path = "upstream/server.rs"]
mod server;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::server::{Answer, Server};

    const CASES: &str = include_str!("upstream/cases.txt");
    /// What stands between a case and why the two answers to it differ.
    const KNOWN: &str = " ## ";
    /// How often an object is read anew that our controllers or scheduler wrote meanwhile.
    const RETRIES: usize = 5;

    /// Both servers.
    struct Pair {
        ours: Server,
        upstream: Server,
    }

    impl Pair {
        async fn ask(&self, method: &str, path: &str, (kind, body): (&str, &str)) -> [Answer; 2] {
            let (ours, upstream) = tokio::join!(
                self.ours.ask(method, path, (kind, body)),
                self.upstream.ask(method, path, (kind, body)),
            );
            [ours, upstream]
        }
    }

    /// What of an answer has to be the same.
    #[derive(Debug, PartialEq, Eq)]
    struct Outcome {
        status: u16,
        reason: String,
        fields: BTreeSet<String>,
        warnings: BTreeSet<String>,
    }

    fn outcome(answer: Answer) -> Outcome {
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let failed = answer.status >= 300;
        let causes = body["details"]["causes"].as_array().filter(|_| failed);
        let field = |cause: &Value| cause["field"].as_str().unwrap_or_default().to_owned();
        Outcome {
            status: answer.status,
            reason: body["reason"].as_str().filter(|_| failed).unwrap_or_default().to_owned(),
            fields: causes.into_iter().flatten().map(field).collect(),
            warnings: answer.warnings,
        }
    }

    /// Sets what a case says of an object: `spec.ports[0].port=80 && metadata.name=-`, where `-` removes the field.
    fn change(object: &Value, case: &str) -> Value {
        let mut object = object.clone();
        for part in case.split(" && ") {
            let (path, value) = part.split_once('=').unwrap();
            let new = (value != "-").then(|| serde_json::from_str(value).unwrap());
            let pointer = path.replace(['.', '['], "/").replace(']', "");
            set(&mut object, &pointer, new);
        }
        object
    }

    fn set(object: &mut Value, pointer: &str, new: Option<Value>) {
        let mut place = object;
        let mut keys = pointer.split('/').peekable();
        while let Some(key) = keys.next() {
            let last = keys.peek().is_none();
            match (key.parse::<usize>(), new.is_none() && last) {
                (Err(_), true) => {
                    drop(place.as_object_mut().map(|fields| fields.remove(key)));
                    return;
                }
                (Err(_), false) => place = &mut place[key],
                (Ok(index), _) => {
                    if place.is_null() {
                        *place = json!([]);
                    }
                    let items = place.as_array_mut().unwrap();
                    if items.len() <= index {
                        items.resize(index + 1, Value::Null);
                    }
                    place = &mut items[index];
                }
            }
        }
        *place = new.unwrap_or_default();
    }

    /// An object replaced by itself with the case's change.
    async fn replaced(server: &Server, path: &str, case: &str) -> Outcome {
        for _ in 0..RETRIES {
            let stored = server.ask("GET", path, ("json", "")).await;
            let mut stored: Value = serde_json::from_slice(&stored.body).unwrap();
            drop(stored["metadata"].as_object_mut().unwrap().remove("managedFields"));
            let body = change(&stored, case).to_string();
            let answer = server.ask("PUT", &format!("{path}?dryRun=All"), ("json", &body)).await;
            if answer.status != 409 || case.contains("resourceVersion") || case.contains("uid") {
                return outcome(answer);
            }
        }
        panic!("{path} changes all the time");
    }

    /// What both said to one line of a section.
    async fn both(pair: &Pair, section: &str, case: &str) -> [Outcome; 2] {
        let (verb, rest) = section.split_once(' ').unwrap_or((section, ""));
        match verb {
            "create" => {
                let (path, base) = rest.split_once(' ').unwrap();
                let body = change(&serde_json::from_str(base).unwrap(), case).to_string();
                let path = format!("{path}?fieldValidation=Strict&dryRun=All");
                pair.ask("POST", &path, ("json", &body)).await.map(outcome)
            }
            "replace" => {
                let (ours, upstream) = tokio::join!(
                    replaced(&pair.ours, rest, case),
                    replaced(&pair.upstream, rest, case)
                );
                [ours, upstream]
            }
            _ => {
                let mut parts = case.splitn(4, ' ');
                let mut next = || parts.next().unwrap_or_default();
                let (method, path, kind, body) = (next(), next(), next(), next());
                pair.ask(method, path, (kind, body)).await.map(outcome)
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn both_servers_answer_alike() {
        let programs = skip::program("kube-apiserver")
            .and_then(|kube_apiserver| Ok((kube_apiserver, skip::program("etcd")?)));
        let (kube_apiserver, etcd) = match programs {
            Ok(both) => both,
            Err(missing) => return skip::because(&missing),
        };
        let (ours, upstream) =
            tokio::join!(Server::ours(), Server::upstream(&kube_apiserver, &etcd));
        let pair = Pair { ours, upstream };
        let (mut section, mut wrong, mut count) = ("", Vec::new(), 0);
        for line in CASES.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(given) = line.strip_prefix("given ") {
                let (path, object) = given.split_once(' ').unwrap();
                for answer in pair.ask("POST", path, ("json", object)).await {
                    let said = String::from_utf8_lossy(&answer.body);
                    assert!(answer.status < 300, "{given}: {said}");
                }
            } else if ["create ", "replace ", "send"].iter().any(|verb| line.starts_with(verb)) {
                section = line;
            } else {
                let (case, known) =
                    line.split_once(KNOWN).map_or((line, None), |(c, why)| (c, Some(why)));
                let [ours, upstream] = both(&pair, section, case).await;
                count += 1;
                match (ours == upstream, known) {
                    (true, None) | (false, Some(_)) => {}
                    (true, Some(_)) => wrong.push(format!("no longer differs: {case}")),
                    (false, None) => {
                        wrong.push(format!("{case}\n  upstream {upstream:?}\n  ours     {ours:?}"));
                    }
                }
            }
        }
        assert!(count > 900, "{count}");
        assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    }
}
