//! Acting as somebody else: the `Impersonate-*` headers. Pure.

use std::collections::BTreeMap;

use http::HeaderMap;

use crate::{
    api::{
        authn::{AUTHENTICATED, MASTERS, User},
        error::{self, About},
        query::decode_path,
        service_account,
    },
    client::ApiError,
};

const UNAUTHENTICATED: &str = "system:unauthenticated";
const EXTRA: &str = "impersonate-extra-";

/// The user that the headers name, if any; only administrators may, as there are no roles yet.
///
/// # Errors
/// 403 for others, 400 for groups, uid or extra without a user.
pub(super) fn acting(user: &User, headers: &HeaderMap) -> Result<Option<User>, ApiError> {
    let values = |name: &str| -> Vec<String> {
        let all = headers.get_all(name).iter();
        all.filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    };
    let named = values("impersonate-user").into_iter().find(|name| !name.is_empty());
    let extra = extra(headers);
    let Some(name) = named else {
        let more = headers.contains_key("impersonate-group")
            || headers.contains_key("impersonate-uid")
            || !extra.is_empty();
        return if more {
            Err(error::bad_request("requested groups, uid or extra without impersonating a user"))
        } else {
            Ok(None)
        };
    };
    if !user.is_in(MASTERS) {
        let why = format!(
            "User {:?} cannot impersonate resource \"users\" in API group \"\" at the cluster scope",
            user.name
        );
        return Err(About { group: "", plural: "users", name: &name }.forbidden(&why));
    }
    let mut groups = values("impersonate-group");
    if groups.is_empty() {
        groups = service_account::groups(&name);
    }
    let anonymous = name == User::anonymous().name;
    let said = |group: &str| groups.iter().any(|one| one == group);
    if !said(AUTHENTICATED) && !said(UNAUTHENTICATED) {
        let group = if anonymous { UNAUTHENTICATED } else { AUTHENTICATED };
        groups.push(group.to_owned());
    }
    let uid = values("impersonate-uid").into_iter().next().unwrap_or_default();
    Ok(Some(User { name, uid, groups, extra }))
}

fn extra(headers: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in headers {
        if let (Some(key), Ok(value)) = (name.as_str().strip_prefix(EXTRA), value.to_str()) {
            extra.entry(decode_path(key)).or_default().push(value.to_owned());
        }
    }
    extra
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(rows: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in rows {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn administrators_act_as_others_and_others_do_not() {
        let admin = User::new("kubernetes-admin", &[MASTERS, AUTHENTICATED]);
        assert_eq!(acting(&admin, &headers(&[])), Ok(None));
        let bob = headers(&[("impersonate-user", "bob"), ("impersonate-group", "dev")]);
        let acted = acting(&admin, &bob).unwrap().unwrap();
        assert_eq!(
            (acted.name.as_str(), acted.groups),
            ("bob", vec!["dev".into(), AUTHENTICATED.into()])
        );
        let robot = headers(&[("impersonate-user", "system:serviceaccount:shop:robot")]);
        let acted = acting(&admin, &robot).unwrap().unwrap();
        assert_eq!(
            acted.groups,
            ["system:serviceaccounts", "system:serviceaccounts:shop", AUTHENTICATED]
        );
        let refused = acting(&User::new("eve", &[AUTHENTICATED]), &bob).unwrap_err();
        assert_eq!(
            (refused.code, refused.message.as_str()),
            (
                403,
                "users \"bob\" is forbidden: User \"eve\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope"
            )
        );
        let lost = headers(&[("impersonate-group", "system:masters")]);
        assert_eq!(acting(&admin, &lost).unwrap_err().code, 400);
    }
}
