//! Pins what operators and their scripts read: the help of every command, the text of every error,
//! the id of every log event, and how `status` looks.
//!
//! A text may change; a snapshot then shows it to the reviewer. An id may not: scripts match it.

#![expect(
    clippy::unwrap_used,
    reason = "a source that does not parse stops the test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use proc_macro2::{TokenStream, TokenTree};
use pullgate::cli::Cli;
use pullgate::control::protocol::{HostStatus, Status};
use syn::visit::{self, Visit};

#[test]
fn help_of_every_command() {
    let mut text = String::new();
    let mut command = Cli::command().term_width(100);
    command.build();
    describe(&mut command, &mut text);
    insta::assert_snapshot!(text);
}

fn describe(command: &mut clap::Command, text: &mut String) {
    writeln!(text, "{}", command.render_long_help()).unwrap();
    let is_generated = |command: &&mut clap::Command| command.get_name() == "help";
    for command in command.get_subcommands_mut() {
        if !is_generated(&command) {
            describe(command, text);
        }
    }
}

#[test]
fn text_of_every_error() {
    let texts = read_sources().errors;
    assert!(texts.len() > 100, "{}", texts.len());
    insta::assert_snapshot!(texts.join("\n"));
}

/// An event without an id does not compile into this list, and two events share an id only if they
/// report the same.
#[test]
fn id_of_every_log_event() {
    let events = read_sources().events;
    assert!(events.len() > 100, "{}", events.len());
    let mut text = String::new();
    for (id, event) in &events {
        writeln!(text, "{id}: {}", event.join(" | ")).unwrap();
    }
    insta::assert_snapshot!(text);
}

#[test]
fn id_of_every_finding_is_in_the_manual() {
    let findings = read_sources().findings;
    assert!(findings.len() > 50, "{}", findings.len());
    let manual = fs::read_to_string(Path::new(ROOT).join("../docs/findings.md")).unwrap();
    let rows = manual.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<_> = rows
        .filter_map(|row| row.split('`').next())
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, findings);
}

#[test]
fn status_of_a_host() {
    let statuses = fs::read_to_string(Path::new(ROOT).join("tests/status.json")).unwrap();
    let mut report = HostStatus {
        protected: true,
        admits: None,
        findings: Vec::new(),
        roles: Vec::new(),
    };
    for status in serde_json::from_str::<Vec<Status>>(&statuses).unwrap() {
        report.add(status);
    }
    insta::assert_snapshot!("status_of_a_host", report);
    insta::assert_snapshot!("status_of_a_host_in_full", format!("{report:#}"));
}

/// What the sources hold.
#[derive(Default)]
struct Sources {
    errors: Vec<String>,
    events: BTreeMap<String, Vec<String>>,
    findings: BTreeSet<String>,
}

fn read_sources() -> Sources {
    let mut sources = Sources::default();
    for path in files(&Path::new(ROOT).join("src")) {
        let file = syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap();
        sources.visit_file(&file);
    }
    sources
}

/// All source files below a directory, in order.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let below = |path: PathBuf| {
        if path.is_dir() {
            files(&path)
        } else {
            vec![path]
        }
    };
    paths.into_iter().flat_map(below).collect()
}

impl Sources {
    fn error(&mut self, name: &str, attributes: &[syn::Attribute]) {
        for attribute in attributes.iter().filter(|it| it.path().is_ident("error")) {
            let tokens = attribute.meta.require_list().unwrap().tokens.clone();
            let text = text_in(tokens).unwrap_or_else(|| "(that of its source)".to_owned());
            self.errors.push(format!("{name}: {text}"));
        }
    }
}

impl<'ast> Visit<'ast> for Sources {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        // What tests log is read by tests alone.
        if module.ident != "tests" {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.error(&item.ident.to_string(), &item.attrs);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        for variant in &item.variants {
            let name = format!("{}::{}", item.ident, variant.ident);
            self.error(&name, &variant.attrs);
        }
    }

    fn visit_expr(&mut self, expression: &'ast syn::Expr) {
        if let syn::Expr::Call(call) = expression
            && let syn::Expr::Path(called) = &*call.func
        {
            let segments = called.path.segments.iter();
            let path: Vec<_> = segments.map(|segment| segment.ident.to_string()).collect();
            let words: Vec<_> = path.iter().map(String::as_str).collect();
            let is_finding = matches!(
                words.as_slice(),
                ["Finding", "warning" | "error"] | ["lint"]
            );
            let first = call.args.first();
            if let (true, Some(syn::Expr::Lit(literal))) = (is_finding, first)
                && let syn::Lit::Str(id) = &literal.lit
            {
                self.findings.insert(id.value());
            }
        }
        visit::visit_expr(self, expression);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let name = call.path.segments.last().unwrap().ident.to_string();
        if ["error", "warn", "info", "debug", "trace"].contains(&name.as_str()) {
            let text = text_in(call.tokens.clone()).unwrap();
            let id = id_in(call.tokens.clone()).unwrap_or_default();
            assert!(!id.is_empty(), "no `id` in {name}!({})", call.tokens);
            let is_wellformed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(id.chars().all(is_wellformed), "{id}");
            self.events
                .entry(id)
                .or_default()
                .push(format!("{name} {text}"));
        }
        // Events stand in arms of `select!` as well, whose content is no expression.
        for_macros_in(call.tokens.clone(), &mut |inner| self.visit_macro(&inner));
    }
}

/// The last text among these tokens.
fn text_in(tokens: TokenStream) -> Option<String> {
    let literals = tokens.into_iter().filter_map(|token| match token {
        TokenTree::Literal(literal) => syn::parse2::<syn::LitStr>(literal_tokens(literal)).ok(),
        TokenTree::Group(_) | TokenTree::Ident(_) | TokenTree::Punct(_) => None,
    });
    literals.last().map(|literal| literal.value())
}

fn literal_tokens(literal: proc_macro2::Literal) -> TokenStream {
    TokenTree::Literal(literal).into()
}

/// The value of the field `id`, which is the first.
fn id_in(tokens: TokenStream) -> Option<String> {
    let tokens: Vec<_> = tokens.into_iter().take(3).collect();
    match tokens.as_slice() {
        [
            TokenTree::Ident(name),
            TokenTree::Punct(equals),
            TokenTree::Literal(value),
        ] if name == "id" && equals.as_char() == '=' => {
            let value = syn::parse2::<syn::LitStr>(literal_tokens(value.clone()));
            value.ok().map(|value| value.value())
        }
        // That of a finding.
        [TokenTree::Ident(name), ..] if name == "id" => Some("finding".to_owned()),
        _ => None,
    }
}

/// Calls of macros among tokens that are no syntax of their own.
fn for_macros_in(tokens: TokenStream, visit: &mut impl FnMut(syn::Macro)) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    for window in tokens.windows(3) {
        if let [
            TokenTree::Ident(_),
            TokenTree::Punct(mark),
            TokenTree::Group(_),
        ] = window
            && mark.as_char() == '!'
        {
            let call: TokenStream = window.iter().cloned().collect();
            visit(syn::parse2(call).unwrap());
        }
    }
    for token in tokens {
        if let TokenTree::Group(group) = token {
            for_macros_in_group(group.stream(), visit);
        }
    }
}

fn for_macros_in_group(tokens: TokenStream, visit: &mut dyn FnMut(syn::Macro)) {
    for_macros_in(tokens, &mut |call| visit(call));
}

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
