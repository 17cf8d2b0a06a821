//! What TLS proves of a client, and what is shown to it: certificates, trust, revocation, policies.

pub(super) mod canonical_name;
pub(super) mod credentials;
pub(super) mod epoch;
pub(super) mod facts;
pub(super) mod peer;
pub(super) mod pem;
pub(super) mod policy;
pub(super) mod revocation;
pub(super) mod sessions;
mod shown;
pub(super) mod signature;
pub(super) mod trust;
mod upstream_cas;
pub(super) mod validity;
