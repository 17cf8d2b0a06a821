//! Processes of this host and settings of its kernel, as proc(5) shows them.

use std::fs;
use std::ops::RangeInclusive;

use procfs::process::{FDTarget, Process, all_processes};

/// The inodes of a process's sockets; none, if it cannot be looked at.
#[must_use]
pub fn sockets_of(process: u32) -> Vec<u64> {
    let Ok(Ok(process)) = i32::try_from(process).map(Process::new) else {
        return Vec::new();
    };
    inodes(&process).collect()
}

/// The process that a process descends from.
#[must_use]
pub fn parent_of(process: u32) -> Option<u32> {
    let process = Process::new(i32::try_from(process).ok()?).ok()?;
    u32::try_from(process.stat().ok()?.ppid).ok()
}

/// The process with the lowest number that holds a socket: its number and name; none, if it cannot be looked at.
#[must_use]
pub fn holder_of(inode: u32) -> Option<(u32, String)> {
    let processes = all_processes().ok()?.flatten();
    let holders = processes.filter(|it| inodes(it).any(|held| held == u64::from(inode)));
    let holder = holders.min_by_key(Process::pid)?;
    Some((u32::try_from(holder.pid()).ok()?, holder.stat().ok()?.comm))
}

fn inodes(process: &Process) -> impl Iterator<Item = u64> {
    let descriptors = process.fd().into_iter().flatten().flatten();
    descriptors.filter_map(|descriptor| {
        if let FDTarget::Socket(inode) = descriptor.target {
            Some(inode)
        } else {
            None
        }
    })
}

/// The ports that the kernel gives to this host's own outgoing connections (ip-sysctl.rst).
pub struct OutgoingPorts {
    /// `net.ipv4.ip_local_port_range`.
    range: RangeInclusive<u16>,
    /// `net.ipv4.ip_local_reserved_ports`, as the kernel writes it.
    reserved: String,
}

impl OutgoingPorts {
    /// Reads them; none, if the kernel does not show them.
    #[must_use]
    pub fn read() -> Option<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
        let reserved = read("ip_local_reserved_ports").unwrap_or_default();
        Some(Self {
            range: port_range(read("ip_local_port_range")?.split_whitespace())?,
            reserved: reserved.trim().to_owned(),
        })
    }

    /// Whether an outgoing connection may get this port.
    #[must_use]
    pub fn has(&self, port: u16) -> bool {
        let mut reserved = self.reserved.split(',');
        let is_reserved =
            |part: &str| port_range(part.split('-')).is_some_and(|few| few.contains(&port));
        self.range.contains(&port) && !reserved.any(is_reserved)
    }

    /// What to reserve, so that these ports are reserved too.
    #[must_use]
    pub fn reserved_with(&self, ports: &str) -> String {
        match self.reserved.as_str() {
            "" => ports.to_owned(),
            reserved => format!("{reserved},{ports}"),
        }
    }
}

/// One number, or two.
fn port_range(mut words: impl Iterator<Item = impl AsRef<str>>) -> Option<RangeInclusive<u16>> {
    let first = words.next()?.as_ref().parse().ok()?;
    let last = words
        .next()
        .map_or(Some(first), |last| last.as_ref().parse().ok())?;
    Some(first..=last)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn our_parent_is_found() {
        assert_eq!(
            parent_of(std::process::id()),
            Some(std::os::unix::process::parent_id())
        );
        assert_eq!(parent_of(u32::MAX), None);
    }

    #[test]
    fn our_own_sockets_are_found() {
        let before = sockets_of(std::process::id()).len();
        let _listener = TcpListener::bind("127.0.0.1:0").unwrap();

        assert!(sockets_of(std::process::id()).len() > before);
    }

    #[test]
    fn ranges_of_ports_are_read_as_the_kernel_writes_them() {
        assert_eq!(
            port_range("32768\t60999\n".split_whitespace()),
            Some(32768..=60999)
        );
        assert_eq!(port_range("8443".split('-')), Some(8443..=8443));
        assert_eq!(port_range("2083-2087".split('-')), Some(2083..=2087));
        assert_eq!(port_range("".split('-')), None);

        let ports = OutgoingPorts {
            range: 1024..=60999,
            reserved: "2083-2087,8443".to_owned(),
        };
        let outgoing = [443, 2053, 2083, 2096, 8443].into_iter();
        let outgoing: Vec<_> = outgoing.filter(|port| ports.has(*port)).collect();
        assert_eq!(outgoing, [2053, 2096]);
        assert_eq!(ports.reserved_with("2053"), "2083-2087,8443,2053");
    }
}
