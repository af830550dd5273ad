//! Services that contradict themselves or each other, and pods whose ports of the node a Service has, told to
//! their owners by Events.
//!
//! Task [`tell`]: reads the dataplane's list, writes one Event for each service and set of words, and what could not
//! be written once more after a while. The rest of such a service is programmed.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Event, Pod, Service};
use kube::{Api, Client};
use tokio::{sync::watch, time};

use crate::{
    chain::chain,
    dataplane::{Problems, host_ports},
    model::ObjectKey,
    service_event::{self, AGAIN, About, warning},
};

/// Services whose problems are remembered, so that each is told once; all are forgotten when it is
/// full.
const TOLD: usize = 4_096;
/// Longest list of words in one Event; upstream cuts messages at 1,024 bytes.
const WORDS_BYTES: usize = 900;

/// Writes Events. Ends with the dataplane.
pub async fn tell(client: Client, node: String, problems: watch::Receiver<Arc<Problems>>) {
    let told = BTreeSet::new();
    Teller { client, node, told, again: AGAIN }.run(problems).await;
}

struct Teller {
    client: Client,
    node: String,
    told: BTreeSet<(ObjectKey, String)>,
    again: Duration,
}

impl Teller {
    async fn run(mut self, mut problems: watch::Receiver<Arc<Problems>>) {
        loop {
            let now = Arc::clone(&problems.borrow_and_update());
            let is_all = self.round(&now).await;
            let is_over = tokio::select! {
                changed = problems.changed() => changed.is_err(),
                () = time::sleep(self.again), if !is_all => false,
            };
            if is_over {
                return;
            }
        }
    }

    /// Tells what is not told yet. Says whether all is now.
    async fn round(&mut self, now: &Problems) -> bool {
        self.told.retain(|(key, _)| now.contains_key(key));
        let mut is_all = true;
        for (key, words) in now {
            let words = joined(words);
            if self.told.contains(&(key.clone(), words.clone())) {
                continue;
            }
            match self.write(key, &words).await {
                Ok(()) if self.told.len() < TOLD => drop(self.told.insert((key.clone(), words))),
                Ok(()) => self.told.clear(),
                Err(error) => {
                    tracing::warn!(service = %key, error = chain(&error), "cannot write an event");
                    is_all = false;
                    if service_event::is_away(&error) {
                        break;
                    }
                }
            }
        }
        is_all
    }

    async fn write(&self, key: &ObjectKey, words: &str) -> kube::Result<()> {
        let Self { client, node, .. } = self;
        // Gone meanwhile, or a pod that only a CNI runtime knows: there is nobody to tell.
        let pod = host_ports::pod(key);
        let metadata = if let Some(pod) = &pod {
            let pods = Api::<Pod>::namespaced(client.clone(), &pod.namespace);
            pods.get_opt(&pod.name).await?.map(|pod| pod.metadata)
        } else {
            let services = Api::<Service>::namespaced(client.clone(), &key.namespace);
            services.get_opt(&key.name).await?.map(|service| service.metadata)
        };
        let Some(metadata) = metadata else { return Ok(()) };
        let uid = metadata.uid.unwrap_or_default();
        let event = match &pod {
            Some(pod) => of_pod(pod, &uid, node, words),
            None => event(key, &uid, node, words),
        };
        service_event::write(client, &event).await
    }
}

fn event(key: &ObjectKey, uid: &str, node: &str, words: &str) -> Event {
    let message = format!("On node {node} the rest of the Service is programmed: {words}");
    warning(About { kind: "Service", key, uid }, node, "PartlyProgrammed", words, message)
}

fn of_pod(pod: &ObjectKey, uid: &str, node: &str, words: &str) -> Event {
    let message = format!("On node {node} not all of the pod's host ports lead to it: {words}");
    warning(About { kind: "Pod", key: pod, uid }, node, "HostPortTaken", words, message)
}

/// As many words as an Event bears.
fn joined(words: &[String]) -> String {
    let mut text = String::new();
    for (index, one) in words.iter().enumerate() {
        if text.len() + one.len() > WORDS_BYTES && index > 0 {
            let left = words.len() - index;
            return format!("{text}; and {left} more");
        }
        if index > 0 {
            text.push_str("; ");
        }
        text.push_str(one);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusing::Refusing;

    #[tokio::test]
    async fn what_a_server_refused_or_missed_is_told_when_it_takes_it() {
        let server = Refusing::start(3).await;
        let key = |name: &str| ObjectKey::new("d", name);
        let list = |names: &[&str]| {
            Arc::new(names.iter().map(|name| (key(name), vec!["spec.a".to_owned()])).collect())
        };
        // Known before anybody listens, as after a start from the snapshot.
        let (sender, problems) = watch::channel::<Arc<Problems>>(list(&["web"]));
        let (node, again) = ("n1".to_owned(), Duration::from_millis(20));
        let teller = Teller { client: server.client(), node, told: BTreeSet::new(), again };
        let task = tokio::spawn(teller.run(problems));
        assert_eq!(server.told(1).await, ["web"]);
        assert_eq!(server.refused(), 3);
        sender.send(list(&["db", "web"])).expect("the task runs");
        assert_eq!(server.told(2).await, ["web", "db"], "each once");
        drop(sender);
        task.await.expect("it ends with the dataplane");
    }

    #[test]
    fn an_event_names_what_is_wrong_and_where_and_is_the_same_after_a_restart() {
        let key = ObjectKey::new("d", "web");
        let (one, other) = (event(&key, "u", "n1", "spec.a"), event(&key, "u", "n1", "spec.a"));
        assert_eq!(one.metadata.name, other.metadata.name);
        assert_ne!(one.metadata.name, event(&key, "u", "n2", "spec.a").metadata.name);
        assert_ne!(one.metadata.name, event(&key, "u", "n1", "spec.b").metadata.name);
        let message = one.message.unwrap();
        assert!(message.contains("n1") && message.contains("spec.a"), "{message}");
    }

    #[test]
    fn what_is_wrong_with_a_pods_port_is_told_to_the_pod() {
        let event = of_pod(&ObjectKey::new("d", "web"), "u", "n1", "spec.a");
        let about = &event.involved_object;
        assert_eq!((about.kind.as_deref(), about.name.as_deref()), (Some("Pod"), Some("web")));
        let message = event.message.unwrap();
        assert!(message.contains("n1") && message.contains("spec.a"), "{message}");
    }

    #[test]
    fn many_words_are_cut_and_counted() {
        let words: Vec<String> = (0..100).map(|n| format!("{n:0>40}")).collect();
        let text = joined(&words);
        assert!(text.len() < 1_000 && text.ends_with(" more"), "{}", text.len());
        assert_eq!(joined(&words[..2]).split("; ").count(), 2);
    }
}
