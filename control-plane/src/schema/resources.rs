//! The resources that the server serves: names, verbs and subresources. Pure.
//!
//! Only what is served stands here: discovery and OpenAPI are made from this list.

use super::{Kind, kind};

/// A served resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Empty for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub plural: &'static str,
    pub singular: &'static str,
    pub kind: &'static str,
    pub short_names: &'static [&'static str],
    pub categories: &'static [&'static str],
    pub namespaced: bool,
    pub verbs: &'static [&'static str],
    pub subresources: &'static [SubResource],
    /// The group and version in which objects are stored, where it is another one.
    pub storage: Option<(&'static str, &'static str)>,
}

/// A served subresource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubResource {
    pub name: &'static str,
    /// Group, version and kind of what is sent and received.
    pub kind: (&'static str, &'static str, &'static str),
    pub verbs: &'static [&'static str],
}

impl Served {
    /// The type of its objects.
    pub fn kind(&self) -> Option<Kind> {
        kind(self.group, self.version, self.kind)
    }

    /// `apps/v1`, or `v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// The kind of its lists.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    pub fn subresource(&self, name: &str) -> Option<&'static SubResource> {
        self.subresources.iter().find(|sub| sub.name == name)
    }
}

/// All served resources, in discovery's order of groups.
pub fn served() -> &'static [Served] {
    SERVED
}

/// The served resource of a path.
pub fn resource(group: &str, version: &str, plural: &str) -> Option<&'static Served> {
    SERVED.iter().find(|r| r.group == group && r.version == version && r.plural == plural)
}

/// The served resource of a kind.
pub fn resource_of_kind(group: &str, version: &str, kind: &str) -> Option<&'static Served> {
    SERVED.iter().find(|r| r.group == group && r.version == version && r.kind == kind)
}

const ALL_VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
/// A namespace is never deleted by collection.
const NAMESPACE_VERBS: &[&str] = &["create", "delete", "get", "list", "patch", "update", "watch"];
const CREATE: &[&str] = &["create"];
const GET: &[&str] = &["get"];
const GET_CREATE: &[&str] = &["create", "get"];
const UPDATE: &[&str] = &["update"];
const CHANGE: &[&str] = &["get", "patch", "update"];

const fn sub(
    name: &'static str,
    kind: (&'static str, &'static str, &'static str),
    verbs: &'static [&'static str],
) -> SubResource {
    SubResource { name, kind, verbs }
}

const fn status(group: &'static str, version: &'static str, kind: &'static str) -> SubResource {
    sub("status", (group, version, kind), CHANGE)
}

const SCALE: SubResource = sub("scale", ("autoscaling", "v1", "Scale"), CHANGE);

/// A namespaced resource with all verbs; rows below change what differs.
const BASE: Served = Served {
    group: "",
    version: "v1",
    plural: "",
    singular: "",
    kind: "",
    short_names: &[],
    categories: &[],
    namespaced: true,
    verbs: ALL_VERBS,
    subresources: &[],
    storage: None,
};

const CORE: [Served; 10] = [
    Served { plural: "bindings", singular: "binding", kind: "Binding", verbs: CREATE, ..BASE },
    Served {
        plural: "configmaps",
        singular: "configmap",
        kind: "ConfigMap",
        short_names: &["cm"],
        ..BASE
    },
    Served { plural: "events", singular: "event", kind: "Event", short_names: &["ev"], ..BASE },
    Served {
        plural: "namespaces",
        singular: "namespace",
        kind: "Namespace",
        short_names: &["ns"],
        namespaced: false,
        verbs: NAMESPACE_VERBS,
        subresources: &[
            sub("finalize", ("", "v1", "Namespace"), UPDATE),
            status("", "v1", "Namespace"),
        ],
        ..BASE
    },
    Served {
        plural: "nodes",
        singular: "node",
        kind: "Node",
        short_names: &["no"],
        namespaced: false,
        subresources: &[status("", "v1", "Node")],
        ..BASE
    },
    Served {
        plural: "pods",
        singular: "pod",
        kind: "Pod",
        short_names: &["po"],
        categories: &["all"],
        subresources: &[
            sub("attach", ("", "v1", "PodAttachOptions"), GET_CREATE),
            sub("binding", ("", "v1", "Binding"), CREATE),
            sub("eviction", ("policy", "v1", "Eviction"), CREATE),
            sub("exec", ("", "v1", "PodExecOptions"), GET_CREATE),
            sub("log", ("", "v1", "Pod"), GET),
            sub("portforward", ("", "v1", "PodPortForwardOptions"), GET_CREATE),
            status("", "v1", "Pod"),
        ],
        ..BASE
    },
    Served { plural: "secrets", singular: "secret", kind: "Secret", ..BASE },
    Served {
        plural: "serviceaccounts",
        singular: "serviceaccount",
        kind: "ServiceAccount",
        short_names: &["sa"],
        subresources: &[sub("token", ("authentication.k8s.io", "v1", "TokenRequest"), CREATE)],
        ..BASE
    },
    Served {
        plural: "services",
        singular: "service",
        kind: "Service",
        short_names: &["svc"],
        categories: &["all"],
        subresources: &[status("", "v1", "Service")],
        ..BASE
    },
    Served {
        plural: "endpoints",
        singular: "endpoints",
        kind: "Endpoints",
        short_names: &["ep"],
        ..BASE
    },
];

const APPS: [Served; 2] = [
    Served {
        group: "apps",
        plural: "deployments",
        singular: "deployment",
        kind: "Deployment",
        short_names: &["deploy"],
        categories: &["all"],
        subresources: &[SCALE, status("apps", "v1", "Deployment")],
        ..BASE
    },
    Served {
        group: "apps",
        plural: "replicasets",
        singular: "replicaset",
        kind: "ReplicaSet",
        short_names: &["rs"],
        categories: &["all"],
        subresources: &[SCALE, status("apps", "v1", "ReplicaSet")],
        ..BASE
    },
];

const OTHERS: [Served; 4] = [
    Served {
        group: "events.k8s.io",
        plural: "events",
        singular: "event",
        kind: "Event",
        short_names: &["ev"],
        storage: Some(("", "v1")),
        ..BASE
    },
    Served {
        group: "certificates.k8s.io",
        plural: "certificatesigningrequests",
        singular: "certificatesigningrequest",
        kind: "CertificateSigningRequest",
        short_names: &["csr"],
        namespaced: false,
        subresources: &[
            sub("approval", ("certificates.k8s.io", "v1", "CertificateSigningRequest"), CHANGE),
            status("certificates.k8s.io", "v1", "CertificateSigningRequest"),
        ],
        ..BASE
    },
    Served {
        group: "coordination.k8s.io",
        plural: "leases",
        singular: "lease",
        kind: "Lease",
        ..BASE
    },
    Served {
        group: "discovery.k8s.io",
        plural: "endpointslices",
        singular: "endpointslice",
        kind: "EndpointSlice",
        ..BASE
    },
];

const REVIEWS: [Served; 5] = [
    review("authentication.k8s.io", "tokenreviews", "tokenreview", "TokenReview"),
    review("authentication.k8s.io", "selfsubjectreviews", "selfsubjectreview", "SelfSubjectReview"),
    review(
        "authorization.k8s.io",
        "selfsubjectaccessreviews",
        "selfsubjectaccessreview",
        "SelfSubjectAccessReview",
    ),
    review(
        "authorization.k8s.io",
        "selfsubjectrulesreviews",
        "selfsubjectrulesreview",
        "SelfSubjectRulesReview",
    ),
    review(
        "authorization.k8s.io",
        "subjectaccessreviews",
        "subjectaccessreview",
        "SubjectAccessReview",
    ),
];

const fn review(
    group: &'static str,
    plural: &'static str,
    singular: &'static str,
    kind: &'static str,
) -> Served {
    Served { group, plural, singular, kind, namespaced: false, verbs: CREATE, ..BASE }
}

const COUNT: usize = CORE.len() + APPS.len() + OTHERS.len() + REVIEWS.len();

static SERVED: &[Served] = &{
    let mut all = [BASE; COUNT];
    let parts: [&[Served]; 4] = [&CORE, &APPS, &OTHERS, &REVIEWS];
    let (mut part, mut at) = (0, 0);
    while part < parts.len() {
        let mut row = 0;
        while row < parts[part].len() {
            all[at] = parts[part][row];
            at += 1;
            row += 1;
        }
        part += 1;
    }
    all
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_resource_has_a_type() {
        for served in served() {
            assert!(served.kind().is_some(), "{served:?}");
            assert!(!served.plural.is_empty());
            for sub in served.subresources {
                let options = sub.kind.2.ends_with("Options");
                let (group, version, name) = sub.kind;
                assert!(options || kind(group, version, name).is_some(), "{sub:?}");
            }
        }
        assert_eq!(resource("apps", "v1", "deployments").map(|r| r.kind), Some("Deployment"));
        assert_eq!(resource("apps", "v1", "statefulsets"), None);
    }
}
