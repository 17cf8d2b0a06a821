//! The active ranges with the operator's rules, and the table that they compile to.

use ipnet::IpNet;

use super::{ActiveRanges, Rules, Table, TableFull};

/// Active ranges that can be published.
///
/// [`Self::new`] is the only constructor, so holding one proves that its table was compiled from its
/// ranges and rules.
#[derive(Debug)]
pub struct Compiled {
    ranges: ActiveRanges,
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
    table: Table,
}

impl Compiled {
    /// Compiles the ranges with the operator's own rules.
    ///
    /// # Errors
    ///
    /// Returns that they do not fit.
    pub fn new(ranges: ActiveRanges, allow: &[IpNet], deny: &[IpNet]) -> Result<Self, TableFull> {
        let rules = Rules {
            ranges: ranges.set(),
            allow,
            deny,
        };
        let table = Table::compile(&rules)?;
        Ok(Self {
            ranges,
            allow: allow.to_vec(),
            deny: deny.to_vec(),
            table,
        })
    }

    /// The active ranges, list by list.
    #[must_use]
    pub fn ranges(&self) -> &ActiveRanges {
        &self.ranges
    }

    /// What the table was compiled from.
    #[must_use]
    pub fn rules(&self) -> Rules<'_> {
        Rules {
            ranges: self.ranges.set(),
            allow: &self.allow,
            deny: &self.deny,
        }
    }

    /// The table that packets and peers are judged by.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Whether both judge every address alike, whatever else their lists say.
    #[must_use]
    pub fn judges_like(&self, other: &Self) -> bool {
        self.ranges.set() == other.ranges.set() && self.has_rules(&other.allow, &other.deny)
    }

    /// Whether these are the operator's rules in it.
    #[must_use]
    pub fn has_rules(&self, allow: &[IpNet], deny: &[IpNet]) -> bool {
        self.allow == allow && self.deny == deny
    }
}
