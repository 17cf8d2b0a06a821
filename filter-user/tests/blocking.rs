//! Nothing blocks inside async: files, netlink and the snapshot are read and written in threads that may
//! wait.

#![expect(
    clippy::unwrap_used,
    reason = "a source that does not parse stops the test"
)]

mod sources;

use std::fs;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

#[test]
fn no_async_function_reads_a_file_or_asks_the_kernel() {
    let root = sources::root();
    let mut found = Vec::new();
    for path in sources::files(&root) {
        let text = fs::read_to_string(&path).unwrap();
        // Tests may wait.
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        search(text.parse().unwrap(), &name, &mut found);
    }

    assert_eq!(found, Vec::<String>::new());
}

/// Finds the bodies of what is asynchronous.
fn search(tokens: TokenStream, name: &str, found: &mut Vec<String>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Ident(word) if word == "async" => {
                let body = tokens[index..].iter().find_map(|token| match token {
                    TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                        Some(group.stream())
                    }
                    TokenTree::Group(_)
                    | TokenTree::Ident(_)
                    | TokenTree::Punct(_)
                    | TokenTree::Literal(_) => None,
                });
                judge(body.unwrap_or_default(), name, found);
            }
            TokenTree::Group(group) => search(group.stream(), name, found),
            TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

/// Adds the calls in a body that block, but for those that are handed to a thread.
fn judge(tokens: TokenStream, name: &str, found: &mut Vec<String>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let mut handed_over = false;
    for (index, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Ident(word) => {
                let word = word.to_string();
                handed_over = HAND_OVER.contains(&word.as_str());
                let is_path = matches!(
                    tokens.get(index + 1..index + 3),
                    Some([TokenTree::Punct(first), TokenTree::Punct(second)])
                        if first.as_char() == ':' && second.as_char() == ':'
                );
                if is_path && BLOCKING.contains(&word.as_str()) {
                    let call = tokens[index..].iter().take(4).map(ToString::to_string);
                    found.push(format!("{name}: {}", call.collect::<String>()));
                }
            }
            TokenTree::Group(_) if handed_over => handed_over = false,
            TokenTree::Group(group) => judge(group.stream(), name, found),
            TokenTree::Punct(_) | TokenTree::Literal(_) => handed_over = false,
        }
    }
}

/// Modules whose functions wait for a disk or for the kernel.
const BLOCKING: [&str; 4] = ["file", "fs", "netlink", "snapshot"];
/// What runs its argument in a thread that may wait.
const HAND_OVER: [&str; 6] = [
    "block_in_place",
    "look",
    "on_each",
    "on_state",
    "spawn_blocking",
    "unblocked",
];
