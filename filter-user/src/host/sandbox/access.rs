//! What a process may reach once it is confined.

use std::collections::BTreeSet;
use std::path::PathBuf;

use rustix::thread::CapabilitySet;

use crate::role::Role;

/// What a process may reach.
#[derive(Clone, Debug)]
pub struct Access {
    /// What it does.
    pub roles: Vec<Role>,
    /// Files and directories to read.
    pub read: BTreeSet<PathBuf>,
    /// Directories to write.
    pub write: BTreeSet<PathBuf>,
    /// TCP ports to listen on.
    pub bind: BTreeSet<u16>,
    /// TCP ports to connect to.
    pub connect: Ports,
    /// Whether UNIX sockets without a file may be connected to.
    pub abstract_sockets: bool,
    /// Whether connections may be opened in another's name (IP_TRANSPARENT).
    pub transparent: bool,
}

/// TCP ports.
#[derive(Clone, Debug)]
pub enum Ports {
    /// These.
    These(BTreeSet<u16>),
    /// The environment says which.
    Any,
}

impl Access {
    /// The same, with UNIX sockets that have no file: a service manager may listen at one.
    #[must_use]
    pub fn with_abstract_sockets(self, abstract_sockets: bool) -> Self {
        Self {
            abstract_sockets,
            ..self
        }
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// What the other has within reach, and this one does not.
    pub(super) fn lacks(&self, wanted: &Self) -> Vec<String> {
        let is_within = |path: &PathBuf| {
            let mut all = self.read.iter().chain(&self.write);
            all.any(|known| path.starts_with(known))
        };
        let paths = wanted.read.iter().filter(|path| !is_within(path));
        let mut lacking: Vec<_> = paths.map(|path| path.display().to_string()).collect();
        match (&self.connect, &wanted.connect) {
            (Ports::These(known), Ports::These(wanted)) => {
                let ports = wanted.difference(known);
                lacking.extend(ports.map(|port| format!("TCP port {port}")));
            }
            (Ports::These(_), Ports::Any) => lacking.push("the environment's proxy".to_owned()),
            (Ports::Any, _) => {}
        }
        if wanted.transparent && !self.transparent {
            lacking.push("CAP_NET_RAW".to_owned());
        }
        lacking
    }
}

/// The capabilities that roles need. One that opens connections in another's name keeps CAP_NET_RAW, by which
/// it could make raw sockets too: its system calls make none.
pub(super) fn capabilities(roles: &[Role], transparent: bool) -> CapabilitySet {
    let needed = roles.iter().map(|role| match role {
        Role::Filter => CapabilitySet::BPF | CapabilitySet::NET_ADMIN | CapabilitySet::PERFMON,
        Role::Ranges => CapabilitySet::empty(),
        Role::Gate if transparent => CapabilitySet::NET_BIND_SERVICE | CapabilitySet::NET_RAW,
        Role::Gate => CapabilitySet::NET_BIND_SERVICE,
    });
    needed.fold(CapabilitySet::empty(), CapabilitySet::union)
}
