//! Root becomes the user of a role: the numbers, and for the filter the view of its pins alone, as the
//! package's units have them.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, chownat, openat, statat};
use rustix::thread::{CapabilitySets, capabilities, set_capabilities, set_keep_capabilities};

use super::ConfineError;
use crate::host::accounts::Account;
use crate::role::Role;

/// The user that root becomes for a role: the package's, if the role's directory, `home`, is that user's. None for who is not root.
#[must_use]
pub fn user_of(role: Role, home: &Path) -> Option<Account> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let account = Account::named(role.account())?;
    let found = std::fs::symlink_metadata(home).ok()?;
    (found.is_dir() && found.uid() == account.user).then_some(account)
}

/// Becomes that user, in its groups. All capabilities stay, until they are given up.
///
/// # Errors
///
/// Returns what the kernel refuses.
pub fn become_user(user: &Account) -> Result<(), ConfineError> {
    let groups = user.groups.iter().copied();
    let groups: Vec<_> = groups.map(Gid::from_raw).collect();
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

/// Lets this process see neither the service manager nor a bus, as `InaccessiblePaths=` in the units does:
/// both have an ear for users too.
///
/// # Errors
///
/// Returns what the kernel refuses.
pub fn hide_service_managers() -> Result<(), ConfineError> {
    hide().map_err(ConfineError::Namespace)
}

fn hide() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // What is mounted on the host later is seen here, and nothing of ours there.
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(NONE, "/", NONE, flags, NONE)?;
    for path in HIDDEN.map(Path::new) {
        match path.symlink_metadata() {
            Ok(found) if found.is_dir() => {
                let empty = Some("mode=0000,size=4k");
                mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), empty)?;
            }
            Ok(_) => mount(Some("/dev/null"), path, NONE, MsFlags::MS_BIND, NONE)?,
            Err(_) => {}
        }
    }
    Ok(())
}

/// Gives the directory of the pins to the filter's user, and lets this process see no other pins.
///
/// They are on a BPF file system whose top may be root's alone; the process is in a mount namespace of its
/// own.
///
/// # Errors
///
/// Returns whose it is, or what the kernel refuses.
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
        let text = "other programs have their pins there; name a directory in it";
        return Err(io::Error::other(text));
    }
    let directory = openat(CWD, pins, DIRECTORY, Mode::empty())?;
    let found = rustix::fs::fstat(&directory)?;
    if ![ROOT, user.user].contains(&found.st_uid) || found.st_mode & 0o022 != 0 {
        let text = format!(
            "the user {} has made that directory, or may write it; find out why, and remove it",
            found.st_uid
        );
        return Err(io::Error::other(text));
    }
    let (id, group) = numbers(user);
    rustix::fs::fchown(&directory, id, group)?;
    give_content(&directory, user, DEPTH)?;
    let empty = Some("mode=0755,size=4k");
    mount(Some("tmpfs"), &top, Some("tmpfs"), MsFlags::empty(), empty)?;
    std::fs::create_dir_all(pins)?;
    let opened = format!("/proc/self/fd/{}", directory.as_raw_fd());
    mount(Some(opened.as_str()), pins, NONE, MsFlags::MS_BIND, NONE)?;
    Ok(())
}

/// The directory at which the file system is mounted that `path` is on.
fn top_of_file_system(path: &Path) -> io::Result<PathBuf> {
    let device = std::fs::metadata(path)?.dev();
    let is_on_it = |part: &&Path| std::fs::metadata(part).is_ok_and(|found| found.dev() == device);
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
        // What is another's, or has another name elsewhere, is not root's leavings.
        let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let is_link = found.st_nlink > 1 && entry.file_type() != FileType::Directory;
        if found.st_uid != ROOT || is_link {
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
const NONE: Option<&str> = None;
/// What the units make inaccessible.
const HIDDEN: [&str; 2] = ["/run/systemd/private", "/run/dbus"];
const ROOT: u32 = 0;
/// Directories within the directory of the pins: one for each version of the program.
const DEPTH: u32 = 2;
