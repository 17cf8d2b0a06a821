//! The machine: everything about it that is neither XDP nor TLS.

pub mod accounts;
pub mod deadline;
pub mod file;
pub mod kernel;
pub mod netlink;
pub mod process;
pub mod sandbox;
pub mod socket;
pub mod systemd;
pub mod uplinks;
