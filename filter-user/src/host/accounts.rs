//! The accounts of this host: names in, numbers out, by passwd(5) and group(5).

/// A user with its groups.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Account {
    /// Its number.
    pub user: u32,
    /// The number of its primary group.
    pub group: u32,
    /// The numbers of all its groups.
    pub groups: Vec<u32>,
}

impl Account {
    /// The account with that name, if there is one.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let (user, group) = numbers(&read(PASSWD), name)?;
        let mut all = groups(name);
        all.push(group);
        Some(Self {
            user,
            group,
            groups: all,
        })
    }
}

/// The number of a user; none, if there is no such user.
#[must_use]
pub fn user(name: &str) -> Option<u32> {
    numbers(&read(PASSWD), name).map(|(user, _)| user)
}

/// The group with the name of a user, and after it those that list the user as a member.
#[must_use]
pub fn groups(name: &str) -> Vec<u32> {
    memberships(&read(GROUP), name)
}

/// The name of a group; none, if no group has the number.
#[must_use]
pub fn group_name(number: u32) -> Option<String> {
    let groups = read(GROUP);
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(number)).then(|| name.to_owned())
    })
}

/// A file without which there are no accounts.
fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// User and primary group.
fn numbers(passwd: &str, name: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next()? == name;
        let user = fields.nth(1)?.parse().ok()?;
        let group = fields.next()?.parse().ok()?;
        is_it.then_some((user, group))
    })
}

fn memberships(group: &str, name: &str) -> Vec<u32> {
    let mut groups: Vec<(bool, u32)> = group
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let is_own = fields.next()? == name;
            let number = fields.nth(1)?.parse().ok()?;
            let is_member = fields.next()?.split(',').any(|member| member == name);
            (is_own || is_member).then_some((!is_own, number))
        })
        .collect();
    groups.sort_unstable();
    groups.into_iter().map(|(_, number)| number).collect()
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_the_whole_name() {
        let passwd = "root:x:0:0::/root:/bin/sh\nfilter:x:7:8::/:/bin/false\n\nodd\n";

        assert_eq!(numbers(passwd, "root"), Some((0, 0)));
        assert_eq!(numbers(passwd, "filter"), Some((7, 8)));
        assert_eq!(numbers(passwd, "filte"), None);
    }

    #[test]
    fn a_users_own_group_comes_before_those_that_list_the_user() {
        let group = "ssl-cert:x:3:www-data,gate\nother:x:4:gates\ngate:x:9:\nodd\n";

        assert_eq!(memberships(group, "gate"), [9, 3]);
        assert_eq!(memberships(group, "gat"), [0_u32; 0]);
    }
}
