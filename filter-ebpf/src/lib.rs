//! The decision of the filter: a frame in, a [`Verdict`] with its [`Reason`] out.
//!
//! The same code runs in the kernel (compiled into the XDP program of `main.rs`) and on the host
//! (unit tests, the verification of a published range table, `pullgate`'s own source check). It
//! therefore knows neither maps nor sockets nor clocks: the frame, the settings and the ranges
//! are traits, and the caller of [`decide`] says where their bytes come from.
//!
//! Byte order is settled once, in [`Frame`]: every multi-byte read returns the value that the
//! network order denotes, and addresses are [`core::net::IpAddr`].
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "cases"))]
extern crate std;

pub mod abi;
#[cfg(any(test, feature = "cases"))]
pub mod cases;
pub mod nested;
pub mod packet;
pub mod steering;
pub mod synack;
pub mod table;
pub mod verdict;

pub use crate::packet::{Frame, Headers};
pub use crate::table::{Class, Ranges};
pub use crate::verdict::{Family, Judgement, Reason, Settings, Slot, Verdict, decide};
