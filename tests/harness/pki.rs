//! A PKI made on the spot: two client CAs, server certificates, and client certificates with
//! every defect.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256, PKCS_RSA_SHA512,
    RevokedCertParams, RsaKeySize, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

/// A host whose policy trusts [`Pki::ours`].
pub const SHOP: &str = "shop.example";
/// A host whose policy trusts [`Pki::other`].
pub const BLOG: &str = "blog.example";
/// One more host, which a lab may serve.
pub const WIKI: &str = "wiki.example";

/// The CAs, and the directory their files are in.
pub struct Pki {
    directory: PathBuf,
    /// Signs what the operator uploads to Cloudflare for [`SHOP`].
    pub ours: Authority,
    /// Signs what another operator uploads, and what [`BLOG`] trusts.
    pub other: Authority,
    /// Stands for Cloudflare's shared CA, whose key is nowhere else.
    pub shared: Authority,
    /// Signs the servers' certificates.
    pub web: Authority,
}

impl Pki {
    /// Makes the CAs and the server certificates, as PEM files in `directory`.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        fs::create_dir(directory).unwrap();
        let pki = Self {
            directory: directory.to_owned(),
            ours: Authority::new("Our origin-pull CA"),
            other: Authority::new("Another origin-pull CA"),
            shared: Authority::new("Shared origin-pull CA"),
            web: Authority::new("Web CA"),
        };
        for (name, authority) in [
            ("ours", &pki.ours),
            ("other", &pki.other),
            ("shared", &pki.shared),
            ("web", &pki.web),
        ] {
            pki.write(&format!("{name}-ca.pem"), &authority.pem);
        }
        for name in [SHOP, BLOG, WIKI] {
            pki.renew(name);
        }
        let feeds = ["127.0.0.1", "127.0.0.2"];
        pki.write_identity("feed", &pki.web.sign(&params("feed", &feeds)));
        pki.write_identity(
            "feed-of-another",
            &pki.web.sign(&params("feed", &["127.0.0.3"])),
        );
        pki.write_identity("feed-untrusted", &pki.other.sign(&params("feed", &feeds)));
        pki.write_identity("feed-expired", &pki.web.expired_server("127.0.0.1"));
        pki
    }

    /// Makes a server another certificate and key.
    pub fn renew(&self, name: &str) {
        self.write_chain(name, self.web.sign(&params(name, &[name])));
    }

    /// The path of a file.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes a file that no other user may read.
    pub fn write(&self, name: &str, content: &str) {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Another CA with the name of [`Self::ours`].
    #[must_use]
    pub fn namesake_of_ours(&self) -> Authority {
        Authority::new("Our origin-pull CA")
    }

    /// CAs with keys of every other kind that is verified, by name.
    #[must_use]
    pub fn authorities_of_other_kinds(&self) -> Vec<(&'static str, Authority)> {
        let kinds = [
            ("P-384", &PKCS_ECDSA_P384_SHA384),
            ("P-521", &PKCS_ECDSA_P521_SHA512),
            ("Ed25519", &PKCS_ED25519),
            ("RSA, SHA-512", &PKCS_RSA_SHA512),
        ];
        let made = kinds.into_iter().map(|(name, kind)| {
            let key = KeyPair::generate_for(kind).unwrap();
            (name, Authority::with_key(name, key))
        });
        made.collect()
    }

    /// Makes an RSA CA of 4,096 bits, as Cloudflare's is, writes it, and returns an RSA client of
    /// 2,048 bits.
    #[must_use]
    pub fn write_rsa_authority(&self, name: &str) -> Identity {
        let rsa = |size| KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, size).unwrap();
        let authority = Authority::with_key("RSA origin-pull CA", rsa(RsaKeySize::_4096));
        self.write(name, &authority.pem);
        authority.sign_key(&params("origin-pull", &[]), &rsa(RsaKeySize::_2048))
    }

    /// Writes a server's certificate for these names, and its key.
    pub fn write_server(&self, file: &str, names: &[&str]) {
        self.write_chain(file, self.web.sign(&params(names[0], names)));
    }

    /// The same with an RSA key, or an Ed25519 one.
    pub fn write_server_with(&self, file: &str, names: &[&str], algorithm: Algorithm) {
        let key = match algorithm {
            Algorithm::Rsa => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048),
            Algorithm::Ed25519 => KeyPair::generate_for(&PKCS_ED25519),
        };
        let server = self.web.sign_key(&params(names[0], names), &key.unwrap());
        self.write_chain(file, server);
    }

    /// The same for a server, whose file has its issuer's certificate too.
    fn write_chain(&self, name: &str, mut server: Identity) {
        server.certificate_pem.push_str(&self.web.pem);
        self.write_identity(name, &server);
    }

    /// Writes `<name>.pem` and `<name>.key`.
    pub fn write_identity(&self, name: &str, identity: &Identity) {
        self.write(&format!("{name}.pem"), &identity.certificate_pem);
        self.write(&format!("{name}.key"), &identity.key_pem);
    }
}

/// What a server's key is, if not ECDSA.
#[derive(Clone, Copy, Debug)]
pub enum Algorithm {
    /// RSA of 2,048 bits.
    Rsa,
    /// Ed25519.
    Ed25519,
}

/// A CA that can sign.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    /// Its certificate.
    pub der: CertificateDer<'static>,
}

impl Authority {
    fn new(name: &str) -> Self {
        Self::with_key(name, KeyPair::generate().unwrap())
    }

    fn with_key(name: &str, key: KeyPair) -> Self {
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    /// A leaf as Cloudflare's recipe makes it: neither SAN nor EKU.
    #[must_use]
    pub fn client(&self) -> Identity {
        self.sign(&params("origin-pull", &[]))
    }

    /// A client's leaf that was valid until an hour ago.
    #[must_use]
    pub fn expired_client(&self) -> Identity {
        let mut params = params("expired", &[]);
        params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(3600);
        self.sign(&params)
    }

    /// A client's leaf that will be valid in an hour.
    #[must_use]
    pub fn future_client(&self) -> Identity {
        let mut params = params("not yet valid", &[]);
        params.not_before = OffsetDateTime::now_utc() + Duration::from_secs(3600);
        self.sign(&params)
    }

    /// A client's leaf that expires in a moment; whole seconds, so up to one less than `validity`.
    #[must_use]
    pub fn short_lived_client(&self, validity: Duration) -> Identity {
        let mut params = params("short-lived", &[]);
        params.not_after = OffsetDateTime::now_utc() + validity;
        self.sign(&params)
    }

    /// A leaf that only a server may use.
    #[must_use]
    pub fn server_only_client(&self) -> Identity {
        let mut params = params("server only", &[]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(&params)
    }

    /// A server's leaf that was valid until an hour ago.
    #[must_use]
    pub fn expired_server(&self, name: &str) -> Identity {
        let mut params = params(name, &[name]);
        params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(3600);
        self.sign(&params)
    }

    /// A client's leaf with something changed.
    #[must_use]
    pub fn client_with(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = params("origin-pull", &[]);
        change(&mut params);
        self.sign(&params)
    }

    /// A CA that this one has signed.
    #[must_use]
    pub fn intermediate(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        // What its certificate does not allow, its key can do all the same.
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    /// A list of the serial numbers that are revoked, PEM.
    #[must_use]
    pub fn crl(&self, revoked: &[u64], next_update: OffsetDateTime) -> String {
        self.crl_with(revoked, next_update, |_| ())
    }

    /// The same, with something changed.
    #[must_use]
    pub fn crl_with(
        &self,
        revoked: &[u64],
        next_update: OffsetDateTime,
        change: impl FnOnce(&mut CertificateRevocationListParams),
    ) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now - Duration::from_secs(3600),
            reason_code: None,
            invalidity_date: None,
        });
        let mut params = CertificateRevocationListParams {
            this_update: next_update - Duration::from_secs(30 * 86_400),
            next_update,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut params);
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// Its certificate, PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A client's leaf with this serial number.
    #[must_use]
    pub fn client_numbered(&self, serial: u64) -> Identity {
        self.client_with(|params| params.serial_number = Some(SerialNumber::from(serial)))
    }

    fn sign(&self, params: &CertificateParams) -> Identity {
        self.sign_key(params, &KeyPair::generate().unwrap())
    }

    fn sign_key(&self, params: &CertificateParams, key: &KeyPair) -> Identity {
        let certificate = params.signed_by(key, &self.issuer).unwrap();
        Identity {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            certificate: certificate.der().clone(),
            intermediates: Vec::new(),
            key: key.serialize_der(),
        }
    }
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Identity {
    /// PEM.
    pub certificate_pem: String,
    /// PEM.
    pub key_pem: String,
    /// DER.
    pub certificate: CertificateDer<'static>,
    /// What is presented behind it, DER.
    pub intermediates: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Identity {
    /// The same, presented with these certificates behind it.
    #[must_use]
    pub fn through(mut self, intermediates: &[&Authority]) -> Self {
        self.intermediates = intermediates.iter().map(|ca| ca.der.clone()).collect();
        self
    }

    /// The private key.
    #[must_use]
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}

/// Valid from yesterday for a year.
fn params(common_name: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(86_400);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(365 * 86_400);
    params
}
