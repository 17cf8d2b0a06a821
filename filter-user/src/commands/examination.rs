//! What `doctor` and `probe` print: questions with their answers, which are findings.

use std::fmt::{self, Display, Formatter};
use std::process::ExitCode;

use serde::Serialize;

use crate::observe::{Finding, Severity};

/// The answers to all questions.
#[derive(Debug, Serialize)]
pub(super) struct Examination {
    /// What was examined.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) subject: String,
    pub(super) checks: Vec<Check>,
}

/// The answer to one question.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    /// Stays the same from version to version.
    pub(super) id: &'static str,
    /// What is so if it is OK.
    pub(super) about: &'static str,
    /// Whether who knows the answer has given it.
    pub(super) answered: bool,
    /// What was looked at.
    pub(super) seen: String,
    /// What is not right.
    pub(super) findings: Vec<Finding>,
}

/// The answer to a question, in a word.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Standing {
    Good,
    /// It could be better.
    Weak,
    Wrong,
    /// Who knows it did not say.
    Unknown,
}

impl Standing {
    pub(super) const ALL: [Self; 4] = [Self::Good, Self::Weak, Self::Wrong, Self::Unknown];

    fn mark(self) -> char {
        match self {
            Self::Good => '✓',
            Self::Weak => Severity::Warning.mark(),
            Self::Wrong => Severity::Error.mark(),
            Self::Unknown => '?',
        }
    }

    /// How a metric has it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Weak => "warning",
            Self::Wrong => "error",
            Self::Unknown => "unknown",
        }
    }
}

impl Check {
    pub(super) fn standing(&self) -> Standing {
        match self.findings.iter().map(|it| it.severity).max() {
            Some(Severity::Error) => Standing::Wrong,
            Some(Severity::Warning) => Standing::Weak,
            None if self.answered => Standing::Good,
            None => Standing::Unknown,
        }
    }
}

impl Examination {
    /// A failure, unless every question has an answer, and none is wrong.
    pub(super) fn exit_code(examined: &[Self]) -> ExitCode {
        let mut checks = examined.iter().flat_map(|it| &it.checks);
        if checks.any(|check| check.standing() == Standing::Wrong || !check.answered) {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}

impl Display for Examination {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if !self.subject.is_empty() {
            writeln!(f, "{}", self.subject)?;
        }
        for check in &self.checks {
            let Check {
                id,
                about,
                answered,
                seen,
                findings,
            } = check;
            let shown = check.standing().mark();
            writeln!(f, "  {shown} {id:<15} {about}")?;
            if !answered && seen.is_empty() {
                writeln!(
                    f,
                    "                    not known: no role answers that could say"
                )?;
            }
            if !seen.is_empty() {
                writeln!(f, "                    {}", one_line(seen))?;
            }
            for finding in findings {
                let bare = Finding {
                    remedy: String::new(),
                    ..finding.clone()
                };
                let text = one_line(&bare.to_string());
                writeln!(f, "      {} {text}", finding.severity.mark())?;
                if !finding.remedy.is_empty() {
                    writeln!(f, "        → {}", one_line(&finding.remedy))?;
                }
            }
        }
        let count = |standing| {
            let standings = self.checks.iter().map(Check::standing);
            standings.filter(|it| *it == standing).count()
        };
        writeln!(
            f,
            "\n{} OK, {} could be better, {} wrong, {} not known",
            count(Standing::Good),
            count(Standing::Weak),
            count(Standing::Wrong),
            count(Standing::Unknown)
        )
    }
}

/// What others have written begins no line of its own, which might look like an answer.
fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}
