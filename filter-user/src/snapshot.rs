//! The last known good ranges on disk.
//!
//! The file is the only thing that passes between the roles: `ranges` writes it atomically,
//! `filter` and `gate` watch it and judge it again, with the same guard that the feed met. Ranges
//! that stand in the configuration are never in it: each role has them from there.

mod content;
mod follow;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tracing::warn;

use self::content::Document;
pub use self::content::Problem;
pub use self::follow::Follower;
use crate::config::{Fallback, RangesSettings};
use crate::host::file::{self, ReadError, TrustedOwner, UntrustedFile};
use crate::ranges::{
    self, ActiveRanges, Compiled, Families, GuardLimits, List, ListError, Origin, RangeSet,
    Rejection, STATIC, SourceRanges, TableFull,
};
use crate::report::{EX_CONFIG, EX_NOPERM, EX_SOFTWARE, ExitStatus, chain};

/// The ranges that are active without a snapshot: those of the configuration, and the embedded
/// ones for sources that they are the baseline of.
///
/// # Errors
///
/// Returns why they cannot be used, which only a configuration can be to blame for.
pub fn baseline(ranges: &RangesSettings) -> Result<ActiveRanges, SnapshotError> {
    compose(ranges, Vec::new())
}

/// The active ranges by the snapshot at `path`, if there is one.
///
/// # Errors
///
/// Returns why the snapshot cannot be used.
pub fn load(path: &Path, ranges: &RangesSettings) -> Result<ActiveRanges, SnapshotError> {
    let lists = read(path, &ranges.limits)?;
    compose(ranges, lists.unwrap_or_default())
}

/// Of some lists, those of sources that are still configured, and what else is active.
///
/// # Errors
///
/// Returns why the lists cannot be used together.
pub fn compose(
    ranges: &RangesSettings,
    mut read: Vec<List>,
) -> Result<ActiveRanges, SnapshotError> {
    let mut lists = Vec::new();
    for source in ranges.sources.iter().map(|source| &source.value) {
        let found = read.iter().position(|list| list.source == source.name);
        match (found, source.fallback) {
            (Some(index), _) => lists.push(read.swap_remove(index)),
            (None, Fallback::Baseline) => lists.push(List {
                source: source.name.clone(),
                known: SourceRanges::new(embedded(&ranges.limits)?),
                origin: Origin::Baseline,
            }),
            (None, Fallback::Nothing) => {}
        }
    }
    if !ranges.static_.is_empty() {
        lists.push(List {
            source: STATIC.to_owned(),
            known: SourceRanges::new(ranges.static_.clone()),
            origin: Origin::Configured,
        });
    }
    ActiveRanges::new(lists, &ranges.limits).map_err(SnapshotError::Union)
}

/// The ranges, compiled with the operator's own rules.
///
/// # Errors
///
/// Returns that they do not fit.
pub fn compile(ranges: &RangesSettings, active: ActiveRanges) -> Result<Compiled, SnapshotError> {
    Compiled::new(active, &ranges.allow, &ranges.deny).map_err(SnapshotError::Full)
}

/// What is active, by another configuration.
///
/// # Errors
///
/// Returns why the lists cannot be used by it.
pub fn recompile(
    ranges: &RangesSettings,
    active: &ActiveRanges,
) -> Result<Compiled, SnapshotError> {
    compile(ranges, compose(ranges, active.lists().to_vec())?)
}

fn embedded(limits: &GuardLimits) -> Result<RangeSet, SnapshotError> {
    let feed = ranges::baseline().map_err(SnapshotError::Baseline)?;
    RangeSet::check(feed, Families::Both, limits).map_err(SnapshotError::Union)
}

/// Reads the snapshot at `path`, `None` if there is none, and judges each list by the guard.
fn read(path: &Path, limits: &GuardLimits) -> Result<Option<Vec<List>>, SnapshotError> {
    let path_of = || path.to_owned();
    match file::read_trusted(path, SIZE_MAX, TrustedOwner::Owner) {
        Ok((bytes, _)) => Document::parse(&bytes, limits)
            .map(Some)
            .map_err(|problem| SnapshotError::Corrupt {
                path: path_of(),
                problem,
            }),
        Err(ReadError::Io(error)) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(ReadError::Io(source)) => Err(SnapshotError::Io {
            path: path_of(),
            source,
        }),
        Err(ReadError::UntrustedFile(untrusted)) => Err(SnapshotError::UntrustedFile(untrusted)),
    }
}

/// A snapshot that parses is written and parsed again, and is the same.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8], limits: &GuardLimits) {
    let Ok(lists) = Document::parse(bytes, limits) else {
        return;
    };
    if let Ok(active) = ActiveRanges::new(lists, limits)
        && let Ok(text) = Document::text(&active)
    {
        let again = Document::parse(&text, limits);
        assert_eq!(again.ok().as_deref(), Some(active.lists()));
    }
}

/// Whether the snapshot at `path` is there and can be used, as far as this process may look.
#[must_use]
pub fn is_whole(path: &Path, limits: &GuardLimits) -> bool {
    match read(path, limits) {
        Ok(lists) => lists.is_some(),
        // Ranges that a lowered limit refuses are not spoilt by that.
        Err(SnapshotError::Corrupt { problem, .. }) => matches!(problem, Problem::Rejected(_)),
        Err(_) => true,
    }
}

/// Replaces the snapshot at `path`: a reader sees the old file or the new one, also after a crash.
///
/// An old one that cannot be used is set aside first, as `ranges.json.corrupt`.
///
/// # Errors
///
/// Returns the step that failed. The old file is then still there; or, if it was only the
/// directory that could not be written to disk, the new one.
pub fn save(path: &Path, active: &ActiveRanges, limits: &GuardLimits) -> Result<(), SnapshotError> {
    let blame = |source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    };
    let text = Document::text(active).map_err(|error| blame(error.into()))?;
    if text.len() > SIZE_MAX {
        return Err(blame(ErrorKind::FileTooLarge.into()));
    }
    if let Err(SnapshotError::Corrupt { problem, .. }) = read(path, limits) {
        set_aside(path, &problem).map_err(blame)?;
    }

    // The other roles' group may read it.
    file::replace(path, &text, 0o640, None).map_err(blame)
}

/// Gives a file that cannot be used another name, so that the next one does not replace it.
fn set_aside(path: &Path, problem: &Problem) -> io::Result<()> {
    let aside = path.with_extension("json.corrupt");
    // To a reader, no file is as good as one that cannot be used.
    fs::rename(path, &aside)?;
    let error = chain(problem);
    warn!(
        id = "snapshot-set-aside",
        error,
        aside = %aside.display(),
        "a corrupt snapshot is set aside"
    );
    Ok(())
}

/// Why a snapshot cannot be read, used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The embedded lists do not parse.
    #[error("the embedded baseline is broken")]
    Baseline(#[source] ListError),
    /// The file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is no snapshot, or one by which no client may be admitted.
    #[error("{} cannot be used", path.display())]
    Corrupt {
        /// The snapshot.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: Problem,
    },
    /// Others could say who is let in.
    #[error("{0}; it is not used until then")]
    UntrustedFile(UntrustedFile),
    /// The ranges of all sources and of the configuration do not pass the guard together.
    #[error("the ranges of all sources together are refused")]
    Union(#[source] Rejection),
    /// The ranges and the operator's rules do not fit into the table.
    #[error(transparent)]
    Full(TableFull),
    /// The directory cannot be watched.
    #[error("{} cannot be watched; is it there, and may this role enter it?", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: notify::Error,
    },
}

impl ExitStatus for SnapshotError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => EX_NOPERM,
            Self::UntrustedFile(_) => EX_NOPERM,
            Self::Watch { source, .. } if is_forbidden(source) => EX_NOPERM,
            Self::Union(_) | Self::Full(_) => EX_CONFIG,
            Self::Baseline(_) | Self::Io { .. } | Self::Corrupt { .. } | Self::Watch { .. } => {
                EX_SOFTWARE
            }
        }
    }
}

fn is_forbidden(error: &notify::Error) -> bool {
    matches!(&error.kind, notify::ErrorKind::Io(error) if error.kind() == ErrorKind::PermissionDenied)
}

/// Bytes that are read and written at most; a source's 4,096 ranges take about 100 KiB.
const SIZE_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests;
