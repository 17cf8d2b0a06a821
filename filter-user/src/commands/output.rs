//! What commands print: results to standard output, complaints to standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};

use anstyle::{AnsiColor, Effects};
use serde::Serialize;

pub(super) fn show(value: &(impl Display + Serialize), json: bool) -> io::Result<()> {
    if json {
        say(&serde_json::to_string_pretty(value)?)
    } else {
        say(value.to_string().trim_end())
    }
}

pub(super) fn show_all(values: &[impl Display + Serialize], json: bool) -> io::Result<()> {
    if json {
        return say(&serde_json::to_string_pretty(values)?);
    }
    values.iter().try_for_each(|value| say(&value.to_string()))
}

pub(super) fn say(text: &str) -> io::Result<()> {
    print(&format!("{text}\n"))
}

/// Prints a status: in colour on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
pub(super) fn show_status(value: &(impl Display + Serialize), json: bool) -> io::Result<()> {
    let has_colour = std::env::var_os("NO_COLOR").is_none_or(|it| it.is_empty());
    if json || !has_colour || !io::stdout().is_terminal() {
        return show(value, json);
    }
    let text = harmless(&value.to_string());
    let painted: Vec<_> = text.trim_end().lines().map(painted).collect();
    writeln!(io::stdout(), "{}", painted.join("\n"))
}

/// A line of a status with its mark or its verdict in colour.
fn painted(line: &str) -> String {
    let style = |colour: AnsiColor| colour.on_default().effects(Effects::BOLD);
    let parts = [
        ("PROTECTED", AnsiColor::Green),
        ("NOT PROTECTED", AnsiColor::Red),
        ("  ✗", AnsiColor::Red),
        ("  !", AnsiColor::Yellow),
    ];
    let found = parts.iter().find_map(|(part, colour)| {
        let rest = line.strip_prefix(part)?;
        let style = style(*colour);
        Some(format!("{style}{part}{style:#}{rest}"))
    });
    found.unwrap_or_else(|| line.to_owned())
}

/// Who has read enough closes the pipe; what was to be done is done all the same.
pub(super) fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(harmless(text).as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

/// Writes a line to standard error.
pub fn complain(text: &str) {
    // Nothing can be done if this fails.
    drop(writeln!(io::stderr(), "{}", harmless(text)));
}

/// A role that was taken over must not steer the terminal of a client.
fn harmless(text: &str) -> String {
    let is_odd = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    text.replace(is_odd, "\u{fffd}")
}
