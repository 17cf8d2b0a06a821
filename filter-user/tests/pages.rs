//! The pages that are made from the sources: commands and exit codes, refusals, metrics. Each is compared with the
//! file in `docs`; `PULLGATE_PAGES=write` writes it.

#![expect(
    clippy::unwrap_used,
    reason = "a page that cannot be made stops the test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use clap::{Arg, Command, CommandFactory as _, Parser as _};
use pullgate::cli::{Cli, EXAMPLES};
use pullgate::gate::{Outcome, Refusal};
use pullgate::observe::{Attachment, FilterSample, FrameLabels, Metrics, Sample};
use pullgate::report::EXIT_CODES;
use pullgate::role::Role;

#[path = "pages/page.rs"]
mod page;

#[test]
fn refusals() {
    let mut text = String::from(REFUSALS);
    for refusal in Refusal::all() {
        let (label, meaning) = (refusal.label(), refusal.meaning());
        let (advice, command) = (refusal.advice(), refusal.command());
        writeln!(text, "| `{label}` | {meaning} | {advice} | `{command}` |").unwrap();
    }
    text.push_str(ADMITTED);
    for outcome in Outcome::of_admitted() {
        writeln!(text, "| `{}` | {} |", outcome.label(), outcome.meaning()).unwrap();
    }
    page::compare("docs/refusals.md", &text);
}

#[test]
fn metrics() {
    let metrics = Metrics::default();
    metrics.reattached("");
    metrics.reloaded("");
    metrics.published(Some(Duration::ZERO));
    metrics.refreshed("");
    metrics.closed("", "");
    metrics.relayed(0, 0);
    metrics.expires("", "", Some(0));
    metrics.tolerated("", "");
    metrics.gate_reloaded("");
    let sample = Sample {
        filter: Some(FilterSample {
            is_enforcing: true,
            attached: vec![Attachment {
                iface: String::new(),
                mode: "",
                is_filtered: true,
            }],
            steered: vec![("", true)],
            frames: vec![(
                FrameLabels {
                    iface: String::new(),
                    family: "",
                    verdict: "",
                    reason: "",
                },
                0,
            )],
        }),
        ..Sample::default()
    };
    let mut rows = BTreeSet::new();
    for role in Role::ALL {
        let sample = match role {
            Role::Filter => sample.clone(),
            Role::Ranges | Role::Gate => Sample::default(),
        };
        let exposition = metrics.text(role, sample).unwrap();
        rows.extend(metric_rows(&exposition));
    }
    let rows: String = rows.into_iter().collect();
    page::compare("docs/metrics.md", &METRICS.replace("@ROWS@", &rows));
}

/// A row for each metric of an OpenMetrics text: the name as Prometheus has it, its labels, and the help.
fn metric_rows(exposition: &str) -> Vec<String> {
    let mut kinds = BTreeMap::new();
    let mut rows = Vec::new();
    for line in exposition.lines() {
        if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|it| it.split_once(' '))
        {
            kinds.insert(name.to_owned(), kind.to_owned());
        }
    }
    for line in exposition.lines() {
        let Some((name, help)) = line
            .strip_prefix("# HELP ")
            .and_then(|it| it.split_once(' '))
        else {
            continue;
        };
        let kind = &kinds[name];
        let suffix = if kind == "counter" { "_total" } else { "" };
        let labels = exposition.lines().find_map(|line| {
            let labels = line.strip_prefix(&format!("{name}{suffix}{{"))?;
            Some(labels.split('}').next().unwrap().to_owned())
        });
        let labels = labels.map_or_else(String::new, |labels| {
            let labels = labels
                .split(',')
                .map(|label| label.split('=').next().unwrap());
            format!("{{{}}}", labels.collect::<Vec<_>>().join(","))
        });
        let help = help.trim_end_matches('.');
        rows.push(format!("| `{name}{suffix}{labels}` | {kind} | {help} |\n"));
    }
    rows
}

#[test]
fn commands() {
    let mut command = Cli::command();
    command.build();
    let mut rows = String::new();
    describe(&command, "", &mut rows);
    let mut codes = String::new();
    for (code, meaning) in EXIT_CODES {
        writeln!(codes, "| {code} | {meaning} |").unwrap();
    }
    let text = COMMANDS
        .replace("@COMMANDS@", &rows)
        .replace("@CODES@", &codes);
    page::compare("docs/commands.md", &text);
}

fn describe(command: &Command, above: &str, text: &mut String) {
    let name = format!("{above} {}", command.get_name()).trim().to_owned();
    let mut inner = command
        .get_subcommands()
        .filter(|it| it.get_name() != "help")
        .peekable();
    let is_leaf = inner.peek().is_none();
    if is_leaf {
        let mut usage = format!("`{name}");
        for argument in command.get_positionals() {
            let shown = values(argument);
            let optional = format!("[{}]", shown.trim_matches(['<', '>']));
            let shown = if argument.is_required_set() {
                shown
            } else {
                optional
            };
            write!(usage, " {shown}").unwrap();
        }
        usage.push('`');
        let about = command
            .get_long_about()
            .or_else(|| command.get_about())
            .unwrap();
        writeln!(text, "### {usage}\n\n{}\n", sentence(&about.to_string())).unwrap();
        let own = |it: &&Arg| {
            let is_everywhere =
                it.is_global_set() || ["help", "version"].contains(&it.get_id().as_str());
            !it.is_hide_set() && !is_everywhere
        };
        let mut arguments = command.get_arguments().filter(own).peekable();
        let has_arguments = arguments.peek().is_some();
        if has_arguments {
            text.push_str("| argument | |\n|---|---|\n");
        }
        for argument in arguments {
            let help = argument.get_help().unwrap().to_string();
            writeln!(
                text,
                "| `{}` | {} |",
                shown(argument),
                help.replace('|', "\\|")
            )
            .unwrap();
        }
        if has_arguments {
            text.push('\n');
        }
    }
    for inner in inner {
        describe(inner, &name, text);
    }
}

#[test]
fn every_command_has_an_example_that_is_understood() {
    for (line, _) in EXAMPLES {
        let parsed = Cli::try_parse_from(line.split_whitespace());
        assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
    }
    let command = Cli::command();
    for inner in command.get_subcommands() {
        let start = format!("pullgate {}", inner.get_name());
        let below = inner.get_subcommands();
        let below = below.map(|below| format!("{start} {}", below.get_name()));
        for start in below.chain([start.clone()]) {
            let mut lines = EXAMPLES.iter();
            assert!(lines.any(|(line, _)| line.starts_with(&start)), "{start}");
        }
    }
}

fn sentence(about: &str) -> String {
    let about = about.trim();
    if about.ends_with('.') {
        about.to_owned()
    } else {
        format!("{about}.")
    }
}

/// An option as it is typed, or the name of what stands by itself.
fn shown(argument: &Arg) -> String {
    match argument.get_long() {
        Some(long) if argument.get_action().takes_values() => {
            format!("--{long} {}", values(argument))
        }
        Some(long) => format!("--{long}"),
        None => values(argument),
    }
}

fn values(argument: &Arg) -> String {
    let possible = argument.get_possible_values();
    if possible.is_empty() {
        let names = argument.get_value_names().unwrap_or_default();
        let names: Vec<_> = names.iter().map(|name| format!("<{name}>")).collect();
        return names.join(" ");
    }
    let possible: Vec<_> = possible
        .iter()
        .map(|value| value.get_name().to_owned())
        .collect();
    possible.join("\\|")
}

const REFUSALS: &str = "\
# Why the gate refuses

The reason is the `outcome` in `pullgate_gate_connections_total` and the `reason` in the log, which also names the client,
the server name that it sent, the subject and issuer of its certificate, and the CA in `trust` that has the issuer's name.
`pullgate status` shows the last refusal for each reason. Every refusal is counted; a line is written for at most three per
source and reason, then one in ten seconds, and for at most 20 a second in all.

In the commands, 203.0.113.10 is this host, `client.pem` the certificate that you uploaded to Cloudflare, and `our-ca.pem`
the CA that signed it.

| reason | meaning | next step | command |
|---|---|---|---|
";
const ADMITTED: &str = "
## How an admitted connection ends

| outcome | meaning |
|---|---|
";
const METRICS: &str = include_str!("pages/metrics.md");
const COMMANDS: &str = include_str!("pages/commands.md");
