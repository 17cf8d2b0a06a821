//! Whether a key has signed a certificate or a list of revoked ones: by the algorithms that handshakes
//! are verified with, so that no CA is known by its certificates and not by its lists.

use rustls::crypto::aws_lc_rs;
use x509_parser::der_parser::asn1_rs::{Any, BitString};
use x509_parser::prelude::FromDer as _;

/// Whether `signed`, a certificate or a list (RFC 5280 §4.1, §5.1), is signed by the key in `key`, a
/// SubjectPublicKeyInfo. DER, both.
pub(in crate::gate) fn is_signed_by(signed: &[u8], key: &[u8]) -> bool {
    verify(signed, key).is_some()
}

fn verify(signed: &[u8], key: &[u8]) -> Option<()> {
    let (_, signed) = Any::from_der(signed).ok()?;
    let (rest, _) = Any::from_der(signed.data).ok()?;
    let message = signed.data.get(..signed.data.len() - rest.len())?;
    let (rest, algorithm) = Any::from_der(rest).ok()?;
    let (_, signature) = BitString::from_der(rest).ok()?;

    let (_, info) = Any::from_der(key).ok()?;
    let (bits, kind) = Any::from_der(info.data).ok()?;
    let (_, public_key) = BitString::from_der(bits).ok()?;

    let all = aws_lc_rs::default_provider()
        .signature_verification_algorithms
        .all;
    let mut fitting = all.iter().filter(|it| {
        it.public_key_alg_id().as_ref() == kind.data
            && it.signature_alg_id().as_ref() == algorithm.data
    });
    fitting
        .any(|it| {
            it.verify_signature(&public_key.data, message, &signature.data)
                .is_ok()
        })
        .then_some(())
}
