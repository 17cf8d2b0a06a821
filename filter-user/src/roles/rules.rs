//! From the ranges in force and the operator's rules to a table, and who needs one.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::error;

use super::error::StartError;
use super::tasks::Tasks;
use crate::config::Config;
use crate::ranges::{ActiveRanges, Table};
use crate::report::chain;
use crate::snapshot;

/// The newest compiled table; a change that cannot be compiled leaves the old one.
pub(super) fn compiled(
    mut config: watch::Receiver<Arc<Config>>,
    mut in_force: watch::Receiver<Arc<ActiveRanges>>,
    tasks: &Tasks,
) -> Result<watch::Receiver<Arc<Table>>, StartError> {
    let now = in_force.borrow_and_update().clone();
    let (_, table) = usable(&config.borrow_and_update(), now)?;
    let (sender, receiver) = watch::channel(Arc::new(table));
    tasks.spawn(async move {
        loop {
            let changed = tokio::select! {
                changed = in_force.changed() => changed,
                changed = config.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            let now = in_force.borrow_and_update().clone();
            match compile(&config.borrow_and_update(), &now) {
                Ok(table) => {
                    sender.send_replace(Arc::new(table));
                }
                Err(error) => error!(
                    id = "ranges-not-compiled",
                    error = %chain(&error),
                    "ranges not usable, the old stay"
                ),
            }
        }
    });
    Ok(receiver)
}

/// The ranges in force with their table; the baseline's, if those do not fit with the rules.
pub(super) fn usable(
    config: &Config,
    in_force: Arc<ActiveRanges>,
) -> Result<(Arc<ActiveRanges>, Table), StartError> {
    match compile(config, &in_force) {
        Ok(table) => Ok((in_force, table)),
        Err(error) => {
            error!(
                id = "baseline-compiled",
                error = %chain(&error),
                "snapshot not usable, the embedded baseline protects"
            );
            let baseline = snapshot::baseline(&config.ranges)?;
            let table = compile(config, &baseline)?;
            Ok((Arc::new(baseline), table))
        }
    }
}

pub(super) fn compile(config: &Config, in_force: &ActiveRanges) -> Result<Table, StartError> {
    let rules = config.ranges.rules(in_force.set());
    Ok(Table::compile(&rules)?)
}
