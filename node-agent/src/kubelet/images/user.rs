//! Who a container runs as: the image's `USER`, resolved in the image's own `passwd` and `group`.

use std::{io::Read as _, path::Path};

use crate::{
    kubelet::runtime::{UnpackedImage, User},
    sys::rootdir::RootDir,
};

/// Most bytes read of `passwd` or `group`: thousands of lines.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why an image's user cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    #[error("unable to find user {0}: no matching entries in passwd file")]
    User(String),
    #[error("unable to find group {0}: no matching entries in group file")]
    Group(String),
}

/// Resolves `user` (`name`, `uid`, `name:group`, `uid:gid`; empty means root) in the image's files.
///
/// # Errors
/// When a name is in neither; the words are containerd's.
pub fn resolve_user(image: &UnpackedImage, user: &str) -> Result<User, UserError> {
    resolve(user, &read(image, "etc/passwd"), &read(image, "etc/group"))
}

/// The file in the topmost layer that has it; empty when none does.
fn read(image: &UnpackedImage, path: &str) -> String {
    let mut text = String::new();
    for layer in image.layers.iter().rev() {
        let file = RootDir::open(layer).and_then(|root| root.open_file(Path::new(path)));
        if let Ok(file) = file
            && file.take(MAX_FILE_BYTES).read_to_string(&mut text).is_ok()
        {
            break;
        }
    }
    text
}

fn resolve(user: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (name, group_name) = user.split_once(':').unwrap_or((user, ""));
    let name = if name.is_empty() { "0" } else { name };
    let entry =
        lines(passwd).find(|fields| fields.first() == Some(&name) || fields.get(2) == Some(&name));
    let number = |fields: &[&str], place: usize| fields.get(place)?.parse::<u32>().ok();
    let uid = match &entry {
        Some(fields) => number(fields, 2),
        None => name.parse().ok(),
    }
    .ok_or_else(|| UserError::User(name.to_owned()))?;
    let gid = if group_name.is_empty() {
        entry.as_ref().and_then(|fields| number(fields, 3)).unwrap_or(0)
    } else {
        lines(group)
            .find(|fields| fields.first() == Some(&group_name))
            .and_then(|fields| number(&fields, 2))
            .or_else(|| group_name.parse().ok())
            .ok_or_else(|| UserError::Group(group_name.to_owned()))?
    };
    // As Docker: an explicit group stands alone, else the user is also in the groups that name it.
    let login = entry.as_ref().and_then(|fields| fields.first().copied()).unwrap_or_default();
    let member = |fields: &Vec<&str>| {
        fields.get(3).is_some_and(|members| members.split(',').any(|member| member == login))
    };
    let additional_gids = if group_name.is_empty() && !login.is_empty() {
        lines(group).filter(member).filter_map(|fields| number(&fields, 2)).collect()
    } else {
        Vec::new()
    };
    Ok(User { uid, gid, additional_gids })
}

fn lines(file: &str) -> impl Iterator<Item = Vec<&str>> {
    file.lines().map(|line| line.split(':').collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers_of_the_images_own_files() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/:/bin/false\n";
        let group = "root:x:0:\nweb:x:34:\nlogs:x:50:other,web\n";
        let user = |text: &str| resolve(text, passwd, group);
        let made =
            |uid, gid, groups: &[u32]| Ok(User { uid, gid, additional_gids: groups.to_vec() });
        assert_eq!(user(""), made(0, 0, &[]));
        assert_eq!(user("web"), made(33, 34, &[50]));
        assert_eq!(user("33"), made(33, 34, &[50]));
        assert_eq!(user("web:logs"), made(33, 50, &[]));
        assert_eq!(user("1000"), made(1000, 0, &[]));
        assert_eq!(user("1000:2000"), made(1000, 2000, &[]));
        assert_eq!(user("ghost"), Err(UserError::User("ghost".to_owned())));
        assert_eq!(user("web:ghosts"), Err(UserError::Group("ghosts".to_owned())));
    }
}
