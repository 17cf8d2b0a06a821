//! Files that others may write or read: read within bounds, watched for changes, replaced in one step.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecursiveMode, Watcher as _};
use rustix::fs::OFlags;
use rustix::process::geteuid;
use tokio::sync::mpsc;

/// Reads a regular file of at most `size_max` bytes.
///
/// # Errors
///
/// Returns the operating system's error; of kind `InvalidInput` for a pipe or the like, of kind
/// `FileTooLarge` for a file that is larger.
pub fn read(path: &Path, size_max: usize) -> io::Result<Vec<u8>> {
    read_with_metadata(path, size_max).map(|(content, _)| content)
}

/// Who may say what is in a file, besides root and ourselves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TrustedOwner {
    /// Root, or the user of this process.
    RootOrSelf,
    /// Its owner: who renews certificates may be a user of its own.
    Owner,
}

/// Reads a file as [`read`] does, with what is known of it, unless others than its owner may change
/// it or put another one in its place.
///
/// They may if they may write the directory of the file, or of a link on the way to it; directories
/// further up are not looked at.
///
/// # Errors
///
/// Returns why it cannot be read, or who may change it.
pub fn read_trusted(
    path: &Path,
    size_max: usize,
    owner: TrustedOwner,
) -> Result<(Vec<u8>, Metadata), ReadError> {
    let (content, metadata) = read_with_metadata(path, size_max)?;
    let foreign =
        |found: &Metadata| foreign_owner(found).filter(|_| owner == TrustedOwner::RootOrSelf);
    let expose = |name: &Path, foreigner: Option<String>, writer: Option<String>| {
        let (who, remedy) = match (foreigner, writer) {
            (Some(who), _) => (who, "chown root"),
            (None, Some(who)) => (who, "chmod go-w"),
            (None, None) => return Ok(()),
        };
        Err(ReadError::UntrustedFile(UntrustedFile {
            path: name.to_owned(),
            who,
            remedy,
        }))
    };
    expose(path, foreign(&metadata), other_writers(&metadata))?;
    for name in names(path) {
        let link = fs::symlink_metadata(&name)?;
        if link.is_symlink() {
            // Its mode says nothing.
            expose(&name, foreign(&link), None)?;
        }
        let directory = directory(&name);
        let above = fs::metadata(directory)?;
        // There, everybody may put files, and replace his own.
        let is_sticky = above.mode() & 0o1000 != 0;
        let writers = other_writers(&above).filter(|_| !is_sticky);
        expose(directory, foreign(&above), writers)?;
    }
    Ok((content, metadata))
}

/// The names by which a file is found: its own, and those that links lead to.
pub fn names(path: &Path) -> impl Iterator<Item = PathBuf> {
    let follow = |name: &PathBuf| {
        let target = name.read_link().ok()?;
        Some(directory(name).join(target))
    };
    std::iter::successors(Some(path.to_owned()), follow).take(NAMES_MAX)
}

/// Why a file with a trusted owner cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// As [`read`] says.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Others may change it.
    #[error(transparent)]
    UntrustedFile(UntrustedFile),
}

/// Others may change what is protected, or who gets in.
#[derive(Debug, thiserror::Error)]
#[error("{} may be changed by {who}; `{remedy}` it", path.display())]
pub struct UntrustedFile {
    path: PathBuf,
    who: String,
    remedy: &'static str,
}

fn read_with_metadata(path: &Path, size_max: usize) -> io::Result<(Vec<u8>, Metadata)> {
    // A user who may write the directory may put a pipe there, which must not hold us up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        let error = io::Error::new(ErrorKind::InvalidInput, "not a regular file");
        return Err(error);
    }
    let mut content = Vec::new();
    file.take(size_max as u64 + 1).read_to_end(&mut content)?;
    if content.len() > size_max {
        let text = format!("larger than {size_max} bytes");
        return Err(io::Error::new(ErrorKind::FileTooLarge, text));
    }
    Ok((content, metadata))
}

/// Writes a file in one step: a reader finds the old content or the new. It has this mode, whatever the umask is,
/// and this group, if one is named.
///
/// # Errors
///
/// Returns the operating system's error; what was there stays.
pub fn replace(path: &Path, content: &[u8], mode: u32, group: Option<u32>) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // What a crash has left, or another process has put there: a link would be followed.
    remove(&temporary)?;
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&temporary)
        .and_then(|mut file| {
            file.set_permissions(Permissions::from_mode(mode))?;
            if group.is_some() {
                fchown(&file, None, group)?;
            }
            file.write_all(content)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| File::open(directory(path))?.sync_all());
    if written.is_err() {
        // A half of it would only take the room that a disk lacks.
        drop(fs::remove_file(&temporary));
    }
    written
}

/// Removes a file, if it is there.
///
/// # Errors
///
/// Returns the operating system's error.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What distinguishes a file, behind all links, from another with its name or its inode:
/// device, inode, time of change and size.
pub type FileId = (u64, u64, i64, i64, u64);

/// The stamp of a file; `None` if there is none.
#[must_use]
pub fn file_id(path: &Path) -> Option<FileId> {
    let found = fs::metadata(path).ok()?;
    let changed = (found.ctime(), found.ctime_nsec());
    Some((found.dev(), found.ino(), changed.0, changed.1, found.size()))
}

/// Who may create a file of this name besides the owner of its directory and root, and the directory; a
/// sticky one as well. None, if it does not exist.
#[must_use]
pub fn who_may_create(path: &Path) -> Option<(&Path, String)> {
    let directory = directory(path);
    let metadata = fs::metadata(directory).ok()?;
    Some((directory, other_writers(&metadata)?))
}

/// Who may change a file besides its owner and root, if anybody.
fn other_writers(metadata: &Metadata) -> Option<String> {
    let mode = metadata.mode();
    if mode & 0o002 != 0 {
        return Some("every user of this host".to_owned());
    }
    // A group that may read what one role has may still hold the others.
    let is_foreign = mode & 0o020 != 0 && metadata.gid() != 0;
    is_foreign.then(|| format!("the group {}", metadata.gid()))
}

/// The owner of a file, if that is neither root nor ourselves.
fn foreign_owner(metadata: &Metadata) -> Option<String> {
    let owner = metadata.uid();
    let is_foreign = owner != 0 && owner != geteuid().as_raw();
    is_foreign.then(|| format!("the user {owner}"))
}

/// A watch on some files, whether they exist or not; their directories must.
pub struct FileWatch {
    changes: mpsc::Receiver<()>,
    /// Dropping it ends the watch.
    _watcher: notify::RecommendedWatcher,
}

impl FileWatch {
    /// Begins to watch.
    ///
    /// # Errors
    ///
    /// Returns why a directory cannot be watched.
    pub fn new(files: &[PathBuf]) -> notify::Result<Self> {
        let (sender, changes) = mpsc::channel(1);
        // Changes are reported by absolute paths, whatever was asked for.
        let files: Result<Vec<_>, _> = files.iter().map(std::path::absolute).collect();
        let files = files.map_err(notify::Error::io)?;
        let directories: Vec<_> = files
            .iter()
            .map(|file| directory(file).to_owned())
            .collect();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.map_or(true, |event| concerns(&event, &files)) {
                // Full: a change is announced already. Closed: no receiver is left.
                match sender.try_send(()) {
                    Ok(_) | Err(_) => {}
                }
            }
        })?;
        for directory in directories {
            watcher.watch(&directory, RecursiveMode::NonRecursive)?;
        }
        Ok(Self {
            changes,
            _watcher: watcher,
        })
    }

    /// Returns when a file was written and closed, replaced or removed.
    pub async fn changed(&mut self) {
        if self.changes.recv().await.is_none() {
            // The watching thread is gone; the waiting task has a timer as well.
            std::future::pending().await
        }
    }
}

/// The directory that a file is in.
#[must_use]
pub fn directory(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    }
}

/// Whether one of the files may have changed; if events were lost, each may have.
fn concerns(event: &Event, files: &[PathBuf]) -> bool {
    let is_ours = || event.paths.iter().any(|path| files.contains(path));
    event.need_rescan() || is_a_change(event.kind) && is_ours()
}

/// Whether the content is another one, and whole: not while it is being written.
fn is_a_change(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(_))
            | EventKind::Remove(_)
    )
}

/// As many as the kernel follows (path_resolution(7)), and the file.
const NAMES_MAX: usize = 41;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_too_large_or_no_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("list");
        let kind = |size| read(&path, size).map_err(|error| error.kind());
        assert_eq!(kind(4), Err(ErrorKind::NotFound));

        fs::write(&path, "12345").unwrap();
        assert_eq!(kind(4), Err(ErrorKind::FileTooLarge));
        assert_eq!(kind(5).unwrap(), b"12345");

        fs::remove_file(&path).unwrap();
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        assert_eq!(kind(4), Err(ErrorKind::InvalidInput));
    }

    #[test]
    fn what_others_may_change_is_refused() {
        use std::os::unix::fs::{PermissionsExt as _, symlink};

        let tree = tempfile::tempdir().unwrap();
        let [near, mid, far] = ["near", "mid", "far"].map(|name| tree.path().join(name));
        for directory in [&near, &mid, &far] {
            fs::create_dir(directory).unwrap();
        }
        let (target, link) = (far.join("list"), near.join("list"));
        fs::write(&target, "12345").unwrap();
        symlink("../mid/list", &link).unwrap();
        symlink(&target, mid.join("list")).unwrap();
        let allow = |path: &Path, mode| {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        };
        let said =
            || read_trusted(&link, 5, TrustedOwner::Owner).map_err(|error| error.to_string());

        for (path, mode, before) in [
            (&target, 0o646, 0o644),
            (&near, 0o757, 0o755),
            (&mid, 0o757, 0o755),
            (&far, 0o757, 0o755),
        ] {
            allow(path, before);
            assert_eq!(said().unwrap().0, b"12345");
            allow(path, mode);
            let name = if path == &target {
                "near/list".into()
            } else {
                path.file_name().unwrap().to_string_lossy()
            };
            let expected =
                format!("{name} may be changed by every user of this host; `chmod go-w` it");
            let error = said().unwrap_err();
            assert!(
                error.replace("near/../", "").ends_with(&expected),
                "{error}"
            );
            allow(path, before);
        }
        allow(&near, 0o1777);
        assert_eq!(said().unwrap().0, b"12345");
    }

    #[tokio::test]
    async fn writing_replacing_and_removing_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("list");
        let other = directory.path().join("other");
        let mut watch = FileWatch::new(std::slice::from_ref(&path)).unwrap();

        fs::write(&path, "1").unwrap();
        watch.changed().await;
        fs::write(&other, "2").unwrap();
        fs::rename(&other, &path).unwrap();
        watch.changed().await;
        fs::remove_file(&path).unwrap();
        watch.changed().await;
    }

    /// By kind, because the kernel tells of a replacement more than once.
    #[test]
    fn reading_half_of_a_writing_and_other_files_are_no_changes() {
        use notify::event::{CreateKind, DataChange, RemoveKind, RenameMode};

        let files = [PathBuf::from("/lists/list")];
        let of_ours = |kind| Event::new(kind).add_path(files[0].clone());
        for kind in [
            EventKind::Access(AccessKind::Open(AccessMode::Any)),
            EventKind::Access(AccessKind::Read),
            EventKind::Access(AccessKind::Close(AccessMode::Read)),
            EventKind::Create(CreateKind::File),
            EventKind::Modify(ModifyKind::Data(DataChange::Any)),
        ] {
            assert!(!concerns(&of_ours(kind), &files), "{kind:?}");
        }
        for kind in [
            EventKind::Access(AccessKind::Close(AccessMode::Write)),
            EventKind::Modify(ModifyKind::Name(RenameMode::To)),
            EventKind::Remove(RemoveKind::File),
        ] {
            assert!(concerns(&of_ours(kind), &files), "{kind:?}");
            let of_another = Event::new(kind).add_path(PathBuf::from("/lists/other"));
            assert!(!concerns(&of_another, &files), "{kind:?}");
        }
    }
}
