//! Root becomes the user of a role: the numbers, and for the filter the view of its pins alone, as the
//! package's units have them.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, chownat, openat};
use rustix::thread::{CapabilitySets, capabilities, set_capabilities, set_keep_capabilities};

use super::ConfineError;
use crate::accounts::Account;
use crate::cli::Role;
use crate::config::Paths;

/// The user that root becomes for a role: the package's, if the role's directory below `paths.run` is that
/// user's. None for who is not root.
#[must_use]
pub fn user_of(role: Role, paths: &Paths) -> Option<Account> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let account = Account::named(role.account())?;
    let found = std::fs::symlink_metadata(paths.home(role)).ok()?;
    (found.is_dir() && found.uid() == account.user).then_some(account)
}

/// Becomes that user. All capabilities stay, until they are given up.
///
/// # Errors
///
/// Returns what the kernel refuses.
pub fn become_user(user: &Account, more_groups: &[u32]) -> Result<(), ConfineError> {
    let all = user.groups.iter().chain(more_groups);
    let groups: Vec<_> = all.map(|group| Gid::from_raw(*group)).collect();
    let (id, group) = (Uid::from_raw(user.user), Gid::from_raw(user.group));
    let become_it = || -> io::Result<()> {
        set_keep_capabilities(true)?;
        setgroups(&groups)?;
        setresgid(group, group, group)?;
        setresuid(id, id, id)?;
        set_keep_capabilities(false)?;
        let held = capabilities(None)?;
        set_capabilities(
            None,
            CapabilitySets {
                effective: held.permitted,
                ..held
            },
        )?;
        Ok(())
    };
    become_it().map_err(|source| ConfineError::User {
        user: user.user,
        source,
    })
}

/// Gives the directory of the pins, which is on a BPF file system, to the filter's user, and lets this
/// process see no other pins: what is above them may be root's alone.
///
/// # Errors
///
/// Returns what the kernel refuses.
pub fn show_pins_alone(pins: &Path, user: &Account) -> Result<(), ConfineError> {
    show(pins, user).map_err(|source| ConfineError::Pins {
        path: pins.to_owned(),
        source,
    })
}

fn show(pins: &Path, user: &Account) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700).recursive(true).create(pins)?;
    let top = top_of_file_system(pins)?;
    if top == pins {
        // All that is there is the filter's, and whose it is shows where it is used.
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    // What is mounted on the host later is seen here, and nothing of ours there.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let directory = openat(CWD, pins, DIRECTORY, Mode::empty())?;
    let (id, group) = numbers(user);
    rustix::fs::fchown(&directory, id, group)?;
    give_content(&directory, user, DEPTH)?;
    let empty = Some("mode=0755,size=4k");
    mount(Some("tmpfs"), &top, Some("tmpfs"), MsFlags::empty(), empty)?;
    std::fs::create_dir_all(pins)?;
    let opened = format!("/proc/self/fd/{}", directory.as_raw_fd());
    mount(Some(opened.as_str()), pins, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// The directory at which the file system is mounted that `path` is on.
fn top_of_file_system(path: &Path) -> io::Result<PathBuf> {
    let device = std::fs::metadata(path)?.dev();
    let is_on_it = |path: &&Path| std::fs::metadata(path).is_ok_and(|found| found.dev() == device);
    let top = path.ancestors().take_while(is_on_it).last();
    Ok(top.unwrap_or(path).to_owned())
}

/// Gives what root has left there to the user, as the package's directories unit does. The user may change
/// all of it meanwhile, so no name is followed.
fn give_content(directory: &OwnedFd, user: &Account, depth: u32) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let (id, group) = numbers(user);
        chownat(directory, name, id, group, AtFlags::SYMLINK_NOFOLLOW)?;
        if entry.file_type() == FileType::Directory && depth > 0 {
            let below = openat(directory, name, DIRECTORY, Mode::empty())?;
            give_content(&below, user, depth - 1)?;
        }
    }
    Ok(())
}

fn numbers(user: &Account) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    let id = rustix::fs::Uid::from_raw(user.user);
    (Some(id), Some(rustix::fs::Gid::from_raw(user.group)))
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// Directories within the directory of the pins: one for each version of the program.
const DEPTH: u32 = 2;
