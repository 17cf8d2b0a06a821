//! pullgate: makes a web origin behind Cloudflare reachable only through Cloudflare.
//!
//! Three flows, each one way:
//!
//! - **ranges**: feed bytes → [`ranges::Feed`] → guard → [`ranges::RangeSet`] → what each source is
//!   [`ranges::SourceRanges`] by → [`ranges::ActiveRanges`], their union → [`ranges::Table`] → published to the
//!   kernel's maps ([`xdp`]) and to the gate's source check. [`refresh`] drives it, [`feed`] fetches,
//!   [`snapshot`] carries it from role to role.
//! - **frames**: decided in the kernel, by the crate `filter_ebpf`; [`xdp`] puts it there.
//! - **connections**: [`gate`], from the accepted socket to its outcome.
//!
//! What is deliberately absent: only [`xdp`] names aya; only [`feed`] names reqwest; only
//! [`host::netlink`] speaks netlink; only [`roles`] spawns tasks that live as long as the process; nothing
//! below it reads the wall clock or the environment; nothing dials an upstream without a
//! [`gate::VerifiedPeer`]; a failed refresh never shrinks the set.
#![deny(unsafe_code)]
#![warn(
    clippy::too_many_lines,
    reason = "a function is read as a whole: 70, see clippy.toml"
)]
#![warn(
    clippy::shadow_unrelated,
    reason = "one name is one thing, as far as one can see"
)]

pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod digest;
pub mod feed;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod gate;
pub mod host;
pub mod observe;
pub mod ranges;
pub mod refresh;
pub mod report;
pub mod role;
pub mod roles;
pub mod snapshot;
mod sync;
pub mod web;
pub mod xdp;
