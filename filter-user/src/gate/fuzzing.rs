//! The gate's part of [`crate::fuzzing`].

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::tls::pem::{PemKind, sections};
use super::tls::policy::Policies;
use super::{client_hello, proxy, session};

/// What is read of a header is written and read again.
pub(crate) fn proxy_header(bytes: &[u8]) {
    let _is_one = proxy::begins(bytes);
    let Ok(Some(addresses)) = proxy::parse(bytes) else {
        return;
    };
    for written in [proxy::v2_bare(addresses), proxy::v1(addresses)] {
        let again = written.map(|header| proxy::parse(&header));
        // Families that differ have no header.
        if let Ok(Ok(Some(again))) = again {
            assert_eq!(
                again.client.ip().to_canonical(),
                addresses.client.ip().to_canonical()
            );
            assert_eq!(again.client.port(), addresses.client.port());
        }
    }
}

/// Whatever another reader finds is found, or the text is refused.
pub(crate) fn pem(text: &[u8]) {
    let Ok(sections) = sections(text) else {
        return;
    };
    let certificates = sections.iter().filter(|it| it.kind == PemKind::Certificate);
    let ours: Vec<_> = certificates.map(|it| it.content.as_slice()).collect();
    for theirs in CertificateDer::pem_slice_iter(text).flatten() {
        assert!(ours.contains(&theirs.as_ref()), "missed: {theirs:?}");
    }
}

/// Whether a client's first bytes are read on.
pub(crate) fn may_be_tls(first: &[u8]) -> bool {
    client_hello::judge(&first[..first.len().min(proxy::HEADER_BEGINS)]).is_ok()
}

/// A session, to which a client does what a script says.
pub(crate) fn session(script: &[u8]) {
    session::fuzzing::session(script);
}

/// Looks a name up that a client asks for.
pub(crate) fn find(name: Option<&str>) {
    assert!(Policies::default().find(name).is_err());
}
