//! The accounts of this host: names in, numbers out, by passwd(5).

/// The number of a user; none, if there is no such user.
#[must_use]
pub fn user(name: &str) -> Option<u32> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    number(&text, name)
}

fn number(passwd: &str, name: &str) -> Option<u32> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next()? == name;
        let number = fields.nth(1)?.parse().ok()?;
        is_it.then_some(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_the_whole_name() {
        let passwd = "root:x:0:0::/root:/bin/sh\nfilter:x:7:8::/:/bin/false\n\nodd\n";

        assert_eq!(number(passwd, "root"), Some(0));
        assert_eq!(number(passwd, "filter"), Some(7));
        assert_eq!(number(passwd, "filte"), None);
    }
}
