//! What commands print: results to standard output, complaints to standard error.

use std::fmt::Display;
use std::io::{self, Write as _};

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
