//! The scenarios: what is tried against the origin, what is to happen, and what did.
//!
//! Each is a function from a running [`Lab`] to [`Row`]s; the lab prints them, the tests assert
//! that every row matched.

mod gate;
mod lifecycle;
mod proofs;
mod ranges;
mod strangers;

use std::fmt::{self, Display, Formatter};
use std::ops::RangeInclusive;

use filter_ebpf::verdict::{Reason, Verdict};

pub use self::gate::{
    certificates_are_judged, defective_greetings_are_refused, edge_is_served, sessions_stay_at_home,
};
pub use self::lifecycle::{killed_roles_leave_the_host_protected, unload_leaves_the_gate};
pub use self::proofs::{doctor_finds_nothing_wrong, probe_finds_nothing_open};
pub use self::ranges::{a_new_range_opens_the_way, bad_lists_change_nothing};
pub use self::strangers::{strangers_are_dropped, the_rest_works_as_before};

use crate::{Lab, within_patience};

/// One thing that was tried.
#[derive(Clone, Debug)]
pub struct Row {
    /// Number of the scenario.
    pub scenario: u32,
    /// Who tried.
    pub who: String,
    /// What.
    pub what: String,
    /// What was to be seen.
    pub expected: String,
    /// What was seen.
    pub seen: String,
    /// The layer and reason that decided.
    pub decided: String,
    /// The counter of that reason, before and after.
    pub counter: (u64, u64),
    /// How far the counter was to move: exactly, or at least.
    pub steps: RangeInclusive<u64>,
}

impl Row {
    /// Whether all was as expected.
    #[must_use]
    pub fn matched(&self) -> bool {
        let moved = self.counter.1 - self.counter.0;
        self.seen == self.expected && self.steps.contains(&moved)
    }
}

impl Row {
    /// The cells of the table, in its order.
    fn cells(&self) -> [String; 8] {
        let (before, after) = self.counter;
        [
            self.scenario.to_string(),
            if self.matched() { "ok" } else { "NOT" }.to_owned(),
            self.who.clone(),
            self.what.clone(),
            self.expected.clone(),
            self.seen.clone(),
            self.decided.clone(),
            format!("{before} → {after}"),
        ]
    }
}

/// Rows as one table, as wide as they need.
pub struct Table<'a>(pub &'a [Row]);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let header = [
            "",
            "",
            "who",
            "what",
            "expected",
            "seen",
            "decided by",
            "counter",
        ];
        let rows = self.0.iter().map(Row::cells);
        let lines: Vec<_> = [header.map(str::to_owned)]
            .into_iter()
            .chain(rows)
            .collect();
        let widths: [usize; 8] = std::array::from_fn(|column| {
            let widths = lines.iter().map(|cells| cells[column].chars().count());
            widths.max().unwrap_or(0)
        });
        for cells in lines {
            let cells = cells.iter().zip(widths);
            let cells: Vec<_> = cells
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// The words of an attempt, before it is made.
struct Attempt<'a> {
    scenario: u32,
    who: &'a str,
    what: &'a str,
    expected: &'a str,
}

impl Attempt<'_> {
    /// Makes the attempt, and reads the counter of the kernel's verdict before and after it.
    fn frames(
        &self,
        lab: &Lab,
        verdict: Verdict,
        steps: RangeInclusive<u64>,
        attempt: impl FnOnce() -> String,
    ) -> Row {
        let layer = format!("filter: {}", verdict.reason().label());
        self.counted(&layer, steps, || lab.frames(verdict), attempt)
    }

    /// Makes the attempt, and reads the gate's counter of the outcome before and after it.
    fn outcome(&self, lab: &Lab, outcome: &str, attempt: impl FnOnce() -> String) -> Row {
        let layer = format!("gate: {outcome}");
        self.counted(&layer, 1..=1, || lab.gate().outcomes(outcome), attempt)
    }

    fn counted(
        &self,
        decided: &str,
        steps: RangeInclusive<u64>,
        counter: impl Fn() -> u64,
        attempt: impl FnOnce() -> String,
    ) -> Row {
        let before = counter();
        let seen = attempt();
        // What the client has seen the counter may yet have to learn.
        let goal = before + steps.start();
        let reached = within_patience(|| Some(counter()).filter(|value| *value >= goal));
        let after = reached.unwrap_or_else(&counter);
        Row {
            scenario: self.scenario,
            who: self.who.to_owned(),
            what: self.what.to_owned(),
            expected: self.expected.to_owned(),
            seen,
            decided: decided.to_owned(),
            counter: (before, after),
            steps,
        }
    }
}

/// What becomes of a stranger's packet.
const NOT_LISTED: Verdict = Verdict::Drop(Reason::NotListed);
