//! What commands print: results to standard output, complaints to standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd;

use anstyle::{AnsiColor, Effects};
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use serde_json::Value;

use crate::cli::OutputFormat;

pub(super) fn show(value: &(impl Display + Serialize), format: OutputFormat) -> io::Result<()> {
    match format {
        OutputFormat::Json => show_json(value),
        OutputFormat::Text => say(value.to_string().trim_end()),
    }
}

pub(super) fn show_all(
    values: &[impl Display + Serialize],
    format: OutputFormat,
) -> io::Result<()> {
    match format {
        OutputFormat::Json => show_json(values),
        OutputFormat::Text => values.iter().try_for_each(|value| say(&value.to_string())),
    }
}

/// Prints a result that is finished text for people, and something else for programs.
pub(super) fn show_either((text, value): (&str, Value), format: OutputFormat) -> io::Result<()> {
    match format {
        OutputFormat::Text => print(text),
        OutputFormat::Json => show_json(&value),
    }
}

pub(super) fn show_json(value: &(impl Serialize + ?Sized)) -> io::Result<()> {
    say(&serde_json::to_string_pretty(value)?)
}

pub(super) fn say(text: &str) -> io::Result<()> {
    print(&format!("{text}\n"))
}

/// Prints a report with marks: on a terminal in its width, and in colour unless `NO_COLOR` is set
/// (<https://no-color.org>); else a line per thing, for grep(1).
pub(super) fn show_report(text: &str) -> io::Result<()> {
    let text = harmless(text);
    if !io::stdout().is_terminal() {
        return print(text.trim_end()).and_then(|()| print("\n"));
    }
    let variable = |name| std::env::var_os(name).unwrap_or_default();
    let has_colour = variable("NO_COLOR").is_empty() && variable("TERM") != "dumb";
    let wrapped = wrap(&text, columns(io::stdout()));
    let lines = wrapped.lines().map(|line| {
        if has_colour {
            painted(line)
        } else {
            line.to_owned()
        }
    });
    writeln!(io::stdout(), "{}", lines.collect::<Vec<_>>().join("\n"))
}

/// How wide a terminal is.
fn columns(terminal: impl AsFd) -> usize {
    match tcgetwinsize(terminal) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        Ok(_) | Err(_) => COLUMNS,
    }
}

/// Breaks long lines between words; what follows is further in than the line.
fn wrap(text: &str, width: usize) -> String {
    let wrapped = text.trim_end().lines().map(|line| {
        let depth = line.len() - line.trim_start().len();
        let indent = " ".repeat(depth + 4);
        let options = textwrap::Options::new(width)
            .break_words(false)
            .word_separator(textwrap::WordSeparator::AsciiSpace)
            .word_splitter(textwrap::WordSplitter::NoHyphenation)
            .subsequent_indent(&indent);
        textwrap::fill(line, options)
    });
    wrapped.collect::<Vec<_>>().join("\n")
}

/// Columns of a terminal that does not say.
const COLUMNS: usize = 80;

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
    let text = harmless(text);
    let text = if io::stderr().is_terminal() {
        wrap(&text, columns(io::stderr()))
    } else {
        text
    };
    // Nothing can be done if this fails.
    drop(writeln!(io::stderr(), "{text}"));
}

/// A role that was taken over must not steer the terminal of a client.
fn harmless(text: &str) -> String {
    // Those that turn the direction of what follows, too (Unicode Standard Annex 9).
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_odd = |c: char| c.is_control() && !matches!(c, '\n' | '\t') || turns(c);
    text.replace(is_odd, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_break_between_words_and_paths_stay_whole() {
        let text = "PROTECTED\n  ! a finding about /etc/pullgate/pullgate.toml:14, which is long\n";

        assert_eq!(
            wrap(text, 40),
            "PROTECTED\n  ! a finding about\n      /etc/pullgate/pullgate.toml:14,\n      which is long"
        );
    }
}
