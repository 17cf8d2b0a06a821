//! The direction of dependencies: which part may name which other. A new edge is a line here, for the
//! reviewer to see.

#![expect(
    clippy::unwrap_used,
    reason = "a source that does not parse stops the test"
)]

mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use proc_macro2::{TokenStream, TokenTree};

/// Each part, and those that it names: from the top of the house to its ground.
const ALLOWED: [(&str, &[&str]); 19] = [
    (
        "commands",
        &[
            "cli", "config", "control", "gate", "host", "observe", "ranges", "refresh", "report",
            "role", "roles", "snapshot", "sync", "web", "xdp",
        ],
    ),
    (
        "roles",
        &[
            "config", "control", "feed", "gate", "host", "observe", "ranges", "refresh", "report",
            "role", "snapshot", "sync", "web", "xdp",
        ],
    ),
    ("fuzzing", &["config", "gate", "ranges", "snapshot"]),
    ("web", &["gate", "host", "sync"]),
    (
        "refresh",
        &[
            "config", "digest", "feed", "host", "observe", "ranges", "report", "snapshot",
        ],
    ),
    (
        "gate",
        &[
            "config", "digest", "host", "observe", "ranges", "report", "sync",
        ],
    ),
    (
        "control",
        &["config", "host", "observe", "report", "role", "sync"],
    ),
    (
        "xdp",
        &["config", "host", "observe", "ranges", "report", "role"],
    ),
    ("feed", &["config", "host", "ranges", "sync"]),
    (
        "snapshot",
        &["config", "digest", "host", "ranges", "report"],
    ),
    ("config", &["host", "ranges", "report", "role"]),
    ("cli", &["observe", "ranges", "role"]),
    ("observe", &["role", "sync"]),
    ("host", &["role"]),
    ("ranges", &[]),
    ("digest", &[]),
    ("report", &[]),
    ("role", &[]),
    ("sync", &[]),
];

/// Who may name a library that is no one else's business.
const LIBRARIES: [(&str, &[&str]); 5] = [
    ("aya", &["xdp"]),
    ("clap", &["cli", "main"]),
    ("hyper", &["control"]),
    ("reqwest", &["feed"]),
    ("netlink_sys", &["host"]),
];

#[test]
fn each_part_names_only_those_below_it() {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (part, named) in read_sources() {
        if part != "lib" && part != "main" {
            let others = named.into_iter().filter(|(root, _)| root == "crate");
            let edges = edges.entry(part.clone()).or_default();
            edges.extend(others.map(|(_, other)| other).filter(|it| *it != part));
        }
    }
    let allowed = ALLOWED.map(|(part, others)| {
        let others = others.iter().map(|other| (*other).to_owned());
        (part.to_owned(), others.collect())
    });

    assert_eq!(edges, BTreeMap::from(allowed));
}

#[test]
fn a_library_is_named_by_one_part() {
    for (part, named) in read_sources() {
        for (library, parts) in LIBRARIES {
            let names_it = named.iter().any(|(root, _)| root == library);
            assert!(
                !names_it || parts.contains(&part.as_str()),
                "{part} names {library}"
            );
        }
    }
}

#[test]
fn no_type_has_the_name_of_another() {
    let mut places: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let root = sources::root();
    for path in sources::files(&root) {
        let text = fs::read_to_string(&path).unwrap();
        let mut names = Vec::new();
        define(text.parse().unwrap(), &mut names);
        for name in names {
            places.entry(name).or_default().push(path.clone());
        }
    }

    places.retain(|_, places| places.len() > 1);

    assert_eq!(places, BTreeMap::new());
}

/// Adds the names of the types that are defined; those that belong to a trait are its own.
fn define(tokens: TokenStream, names: &mut Vec<String>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        match (token, tokens.get(index + 1)) {
            (TokenTree::Ident(word), Some(TokenTree::Ident(name)))
                if ["enum", "struct", "trait", "union"].contains(&word.to_string().as_str()) =>
            {
                names.push(name.to_string());
            }
            (TokenTree::Group(group), _) => define(group.stream(), names),
            (_, _) => {}
        }
    }
}

/// Each file's part, and the pairs of words that paths in it begin with.
fn read_sources() -> Vec<(String, BTreeSet<(String, String)>)> {
    let root = sources::root();
    let read = |path: PathBuf| {
        let part = path.strip_prefix(&root).unwrap().iter().next().unwrap();
        let part = part.to_str().unwrap().trim_end_matches(".rs").to_owned();
        let text = fs::read_to_string(&path).unwrap();
        // Tests may look at all.
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let mut named = BTreeSet::new();
        collect(text.parse().unwrap(), &mut named);
        (part, named)
    };
    sources::files(&root).into_iter().map(read).collect()
}

fn collect(tokens: TokenStream, named: &mut BTreeSet<(String, String)>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Ident(root) => match tokens.get(index + 1..index + 4) {
                Some([TokenTree::Punct(_), TokenTree::Punct(colon), next])
                    if colon.as_char() == ':' =>
                {
                    named.extend(heads(next).into_iter().map(|head| (root.to_string(), head)));
                }
                _ => {}
            },
            TokenTree::Group(group) => collect(group.stream(), named),
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

/// The words that follow `root::`, be they one or in braces.
fn heads(next: &TokenTree) -> Vec<String> {
    match next {
        TokenTree::Ident(head) => vec![head.to_string()],
        TokenTree::Group(group) => {
            let mut is_first = true;
            let mut heads = Vec::new();
            for token in group.stream() {
                match token {
                    TokenTree::Ident(head) if is_first => {
                        heads.push(head.to_string());
                        is_first = false;
                    }
                    TokenTree::Punct(comma) if comma.as_char() == ',' => is_first = true,
                    TokenTree::Ident(_)
                    | TokenTree::Group(_)
                    | TokenTree::Literal(_)
                    | TokenTree::Punct(_) => {}
                }
            }
            heads
        }
        TokenTree::Punct(_) | TokenTree::Literal(_) => Vec::new(),
    }
}
