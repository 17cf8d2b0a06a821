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

impl Check {
    /// How bad its worst finding is; none, if it is OK.
    fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|it| it.severity).max()
    }
}

impl Examination {
    /// A failure, unless every question has an answer, and none is wrong.
    pub(super) fn exit_code(&self) -> ExitCode {
        let mut checks = self.checks.iter();
        if checks.any(|check| check.worst() == Some(Severity::Error) || !check.answered) {
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
            let shown = match check.worst() {
                None if !answered => '?',
                worst => worst.map_or('✓', Severity::mark),
            };
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
        let count = |worst, answered| {
            let alike = self.checks.iter();
            alike
                .filter(|it| it.worst() == worst && it.answered == answered)
                .count()
        };
        let either = |worst| count(Some(worst), true) + count(Some(worst), false);
        writeln!(
            f,
            "\n{} OK, {} could be better, {} wrong, {} not known",
            count(None, true),
            either(Severity::Warning),
            either(Severity::Error),
            count(None, false)
        )
    }
}

/// What others have written begins no line of its own, which might look like an answer.
fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}
