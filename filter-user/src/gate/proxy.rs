//! The PROXY protocol: what load balancers tell us, and what we tell the upstream.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>

use std::io::{self, ErrorKind, Write as _};
use std::net::SocketAddr;

use ppp::v2::{self, AddressFamily, Builder, Command, Protocol, Type, Version};
use ppp::{HeaderResult, v1};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use super::refusal::Refusal;
use super::tls::trust::Identity;
use crate::config::{HostSettings, ProxyProtocol};

/// The two ends of the client's connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ConnectionAddrs {
    /// The client's address.
    pub(super) client: SocketAddr,
    /// The address that it connected to.
    pub(super) local: SocketAddr,
}

/// Reads the header that a load balancer must send first, and not a byte more.
///
/// One that speaks for no client (v1 `UNKNOWN`, v2 `LOCAL`) is a health check of the balancer's own,
/// which may go on in TLS: there are no ends but the connection's own.
pub(super) async fn read(stream: &mut TcpStream) -> Result<Option<ConnectionAddrs>, Refusal> {
    let header = read_header(stream).await.map_err(|error| {
        let is_gone = super::refusal::is_disconnect(error.kind());
        if is_gone {
            Refusal::Closed
        } else {
            Refusal::BadProxyHeader
        }
    })?;
    parse(&header)
}

async fn read_header(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let invalid = || io::Error::from(ErrorKind::InvalidData);
    let mut header = vec![0; v2::PROTOCOL_PREFIX.len()];
    stream.read_exact(&mut header).await?;
    if header == v2::PROTOCOL_PREFIX {
        let mut rest = [0; 4];
        stream.read_exact(&mut rest).await?;
        header.extend(rest);
        let length = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        if length > V2_MAX {
            return Err(invalid());
        }
        let begun = header.len();
        header.resize(begun + length, 0);
        stream.read_exact(&mut header[begun..]).await?;
        return Ok(header);
    }
    if !header.starts_with(b"PROXY ") {
        return Err(invalid());
    }
    // What lies behind the line's end belongs to TLS.
    while !header.ends_with(b"\r\n") {
        if header.len() == V1_MAX {
            return Err(invalid());
        }
        header.push(stream.read_u8().await?);
    }
    Ok(header)
}

pub(super) fn parse(header: &[u8]) -> Result<Option<ConnectionAddrs>, Refusal> {
    let (client, local) = match HeaderResult::parse(header) {
        HeaderResult::V1(Ok(header)) => match header.addresses {
            v1::Addresses::Tcp4(ip) => (
                SocketAddr::from((ip.source_address, ip.source_port)),
                SocketAddr::from((ip.destination_address, ip.destination_port)),
            ),
            v1::Addresses::Tcp6(ip) => (
                SocketAddr::from((ip.source_address, ip.source_port)),
                SocketAddr::from((ip.destination_address, ip.destination_port)),
            ),
            v1::Addresses::Unknown => return Ok(None),
        },
        // Whatever else it says is to be ignored; section 2.2.
        HeaderResult::V2(Ok(header)) if header.command == Command::Local => return Ok(None),
        HeaderResult::V2(Ok(v2)) if !is_intact(header, &v2) => {
            return Err(Refusal::BadProxyHeader);
        }
        HeaderResult::V2(Ok(header)) if header.protocol == Protocol::Stream => {
            match header.addresses {
                v2::Addresses::IPv4(ip) => (
                    SocketAddr::from((ip.source_address, ip.source_port)),
                    SocketAddr::from((ip.destination_address, ip.destination_port)),
                ),
                v2::Addresses::IPv6(ip) => (
                    SocketAddr::from((ip.source_address, ip.source_port)),
                    SocketAddr::from((ip.destination_address, ip.destination_port)),
                ),
                v2::Addresses::Unspecified | v2::Addresses::Unix(_) => {
                    return Err(Refusal::BadProxyHeader);
                }
            }
        }
        HeaderResult::V1(Err(_)) | HeaderResult::V2(_) => return Err(Refusal::BadProxyHeader),
    };
    Ok(Some(ConnectionAddrs { client, local }))
}

/// Whether the TLVs of a header of version 2 are whole, and the checksum is right if there is one
/// (section 2.2.3): over the whole header, with zeros in place of the checksum.
fn is_intact(bytes: &[u8], header: &v2::Header<'_>) -> bool {
    // `ppp` takes what stands behind no addresses for an address.
    let addresses = match header.addresses {
        v2::Addresses::Unspecified => 0,
        v2::Addresses::IPv4(_) => 12,
        v2::Addresses::IPv6(_) => 36,
        v2::Addresses::Unix(_) => 216,
    };
    let mut at = V2_FIXED + addresses;
    while at < bytes.len() {
        let Some([kind, high, low]) = bytes.get(at..).and_then(|rest| rest.first_chunk()) else {
            return false;
        };
        let value = at + TLV_HEADER;
        let end = value + usize::from(u16::from_be_bytes([*high, *low]));
        let Some(content) = bytes.get(value..end) else {
            return false;
        };
        if *kind == Type::CRC32C as u8 {
            let mut cleared = bytes.to_vec();
            cleared[value..end].fill(0);
            return content == crc32c::crc32c(&cleared).to_be_bytes();
        }
        at = end;
    }
    true
}

/// Whether these first bytes are those of a header, of either version.
pub(super) fn begins(bytes: &[u8]) -> bool {
    let begins_with = |whole: &[u8]| bytes.starts_with(&whole[..whole.len().min(HEADER_BEGINS)]);
    begins_with(b"PROXY ") || begins_with(v2::PROTOCOL_PREFIX)
}

/// What the header has about a client.
pub(super) struct ProxyInfo<'a> {
    pub(super) addresses: ConnectionAddrs,
    /// The protocol that was agreed on, if one was.
    pub(super) alpn: Option<&'a [u8]>,
    /// The server name that was asked for.
    pub(super) authority: Option<&'a str>,
    /// `TLSv1.3` or the like.
    pub(super) tls_version: &'a str,
    /// The cipher suite's name, as OpenSSL has it.
    pub(super) cipher: &'a str,
    /// Who the client is, if that was verified.
    pub(super) identity: Option<&'a Identity>,
    /// Whether it was verified in an earlier session too.
    pub(super) resumed: bool,
    /// What logs know the connection by.
    pub(super) unique_id: &'a str,
}

/// The header of version 1, section 2.1.
pub(super) fn v1(addresses: ConnectionAddrs) -> io::Result<Vec<u8>> {
    let (client, local) = (canonical(addresses.client), canonical(addresses.local));
    let family = match (client.is_ipv4(), local.is_ipv4()) {
        (true, true) => "TCP4",
        (false, false) => "TCP6",
        (true, false) | (false, true) => return Ok(V1_UNKNOWN.to_vec()),
    };
    let mut header = Vec::with_capacity(V1_MAX);
    write!(
        header,
        "PROXY {family} {} {} {} {}\r\n",
        client.ip(),
        local.ip(),
        client.port(),
        local.port()
    )?;
    Ok(header)
}

/// The header of version 2, section 2.2, with as many of its TLVs as a receiver takes: Apache's
/// mod_remoteip refuses a header of more than [`V2_SENT_MAX`] bytes.
pub(super) fn v2(info: &ProxyInfo<'_>) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    for shed in Shed::ALL {
        header = v2_without(info, shed)?;
        if header.len() <= V2_SENT_MAX {
            return Ok(header);
        }
    }
    Ok(header)
}

/// The same with the addresses alone.
pub(super) fn v2_bare(addresses: ConnectionAddrs) -> io::Result<Vec<u8>> {
    addressed(addresses).build()
}

fn addressed(addresses: ConnectionAddrs) -> Builder {
    let addresses = (canonical(addresses.client), canonical(addresses.local));
    Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
}

/// What is left out of a header that is too long, each with all before it.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
enum Shed {
    Nothing,
    CommonName,
    Digest,
    Cipher,
    Authority,
}

impl Shed {
    const ALL: [Self; 5] = [
        Self::Nothing,
        Self::CommonName,
        Self::Digest,
        Self::Cipher,
        Self::Authority,
    ];
}

fn v2_without(info: &ProxyInfo<'_>, shed: Shed) -> io::Result<Vec<u8>> {
    let mut header = addressed(info.addresses);
    if let Some(alpn) = info.alpn {
        header = header.write_tlv(Type::ALPN as u8, alpn)?;
    }
    if let Some(authority) = info.authority.filter(|_| shed < Shed::Authority) {
        header = header.write_tlv(Type::Authority as u8, authority.as_bytes())?;
    }
    header = header
        .write_tlv(Type::UniqueId as u8, info.unique_id.as_bytes())?
        .write_tlv(Type::SSL as u8, &ssl(info, shed))?;
    if let Some(identity) = info.identity.filter(|_| shed < Shed::Digest) {
        header = header.write_tlv(CERTIFICATE_DIGEST, &identity.digest)?;
    }
    header.build()
}

/// What an upstream is sent in front of everything else.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum HeaderKind {
    /// Nothing.
    None,
    /// Version 1.
    V1,
    /// Version 2 with what is known of client and session.
    V2,
    /// Version 2 with the addresses alone.
    BareV2,
}

impl HeaderKind {
    /// What says most comes first.
    pub(super) const ALL: [Self; 4] = [Self::V2, Self::BareV2, Self::V1, Self::None];

    /// What a host's upstream is sent.
    pub(super) fn of(host: &HostSettings) -> Self {
        match host.proxy_protocol {
            ProxyProtocol::None => Self::None,
            ProxyProtocol::V1 => Self::V1,
            ProxyProtocol::V2 if host.proxy_tlvs => Self::V2,
            ProxyProtocol::V2 => Self::BareV2,
        }
    }

    /// The header of a health check of ours, which names no client; of version 2, as long as any that does: a receiver
    /// with less room refuses it as it would refuse a client's.
    pub(super) fn without_client(self) -> io::Result<Vec<u8>> {
        match self {
            Self::None => Ok(Vec::new()),
            Self::V1 => Ok(V1_UNKNOWN.to_vec()),
            Self::V2 => v2_local(V2_SENT_MAX),
            Self::BareV2 => v2_local(V2_FIXED + ADDRESSES_V6),
        }
    }
}

/// A header of version 2 that is so long, and says nothing: section 2.2.7.
fn v2_local(length: usize) -> io::Result<Vec<u8>> {
    let no_addresses = AddressFamily::Unspecified | Protocol::Unspecified;
    let filling = vec![0; length - V2_FIXED - TLV_HEADER];
    Builder::new(Version::Two | Command::Local, no_addresses)
        .write_tlv(Type::NoOp as u8, &filling)?
        .build()
}

/// A header of version 1 that names no client.
const V1_UNKNOWN: &[u8] = b"PROXY UNKNOWN\r\n";

/// `struct pp2_tlv_ssl`, section 2.2.6.
fn ssl(info: &ProxyInfo<'_>, shed: Shed) -> Vec<u8> {
    let (client, verify) = match info.identity {
        Some(_) if info.resumed => (CLIENT_SSL | CLIENT_CERT_SESS, 0_u32),
        Some(_) => (CLIENT_SSL | CLIENT_CERT_CONN | CLIENT_CERT_SESS, 0),
        // Anything but zero: nothing was verified.
        None => (CLIENT_SSL, 1),
    };
    let mut value = vec![client];
    value.extend(verify.to_be_bytes());
    let mut add = |kind: Type, text: &str| {
        if let Ok(length) = u16::try_from(text.len()) {
            value.push(kind as u8);
            value.extend(length.to_be_bytes());
            value.extend(text.as_bytes());
        }
    };
    add(Type::SSLVersion, info.tls_version);
    if shed < Shed::Cipher {
        add(Type::SSLCipher, info.cipher);
    }
    let name = info
        .identity
        .and_then(|identity| identity.common_name.as_deref());
    // Upstreams put it into log lines and header fields.
    let name = name.filter(|name| name.len() <= NAME_MAX && !name.contains(char::is_control));
    if let Some(name) = name.filter(|_| shed < Shed::CommonName) {
        add(Type::SSLCommonName, name);
    }
    value
}

/// A dual-stack socket reports IPv4 clients as IPv4-mapped; both ends are then.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Bytes that distinguish a header from anything else.
pub(super) const HEADER_BEGINS: usize = 6;
/// Bytes of a header of version 1, with its line's end; section 2.1.
const V1_MAX: usize = 107;
/// Bytes of a header of version 2 that Apache takes: the fixed part, and the addresses of UNIX
/// sockets (mod_remoteip.c, `proxy_v2`).
const V2_SENT_MAX: usize = V2_FIXED + 216;
/// Bytes of the fixed part of a header of version 2; section 2.2.
const V2_FIXED: usize = 16;
/// Bytes of two addresses of IPv6 with their ports; section 2.2.
const ADDRESSES_V6: usize = 36;
/// Bytes in front of a TLV's value; section 2.2.
const TLV_HEADER: usize = 3;
/// Bytes behind the fixed part of a header of version 2; section 2.2 asks for 520 at least.
const V2_MAX: usize = 2048;
/// PP2_TYPE_MIN_CUSTOM: SHA-256 of the client certificate, 32 bytes.
const CERTIFICATE_DIGEST: u8 = 0xe0;
/// PP2_CLIENT_SSL.
const CLIENT_SSL: u8 = 1;
/// PP2_CLIENT_CERT_CONN: the client presented a certificate over this connection.
const CLIENT_CERT_CONN: u8 = 2;
/// PP2_CLIENT_CERT_SESS: over this session, perhaps in an earlier connection.
const CLIENT_CERT_SESS: u8 = 4;
/// RFC 5280, ub-common-name, in bytes of UTF-8.
const NAME_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_mapped_client_is_announced_as_ipv4() {
        let addresses = between("[::ffff:192.0.2.1]:4660", "[::ffff:192.0.2.2]:443");

        let header = v2(&info(addresses)).unwrap();

        assert_eq!(header[..14], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        let bytes = [192, 0, 2, 1, 192, 0, 2, 2, 0x12, 0x34, 0x01, 0xbb];
        assert_eq!(header[16..28], bytes);
        assert_eq!(
            v1(addresses).unwrap(),
            b"PROXY TCP4 192.0.2.1 192.0.2.2 4660 443\r\n"
        );
    }

    #[test]
    fn what_is_told_is_understood_again() {
        let identity = Identity {
            subject: "CN=origin-pull".to_owned(),
            common_name: Some("origin-pull".to_owned()),
            trust: "ours.pem".to_owned(),
            digest: [7; 32],
        };
        let addresses = between("[2001:db8::1]:4660", "[2001:db8::2]:443");
        let header = v2(&ProxyInfo {
            identity: Some(&identity),
            ..info(addresses)
        })
        .unwrap();

        let parsed = v2::Header::try_from(header.as_slice()).unwrap();
        let tlvs: Vec<_> = parsed.tlvs().map(Result::unwrap).collect();

        let value = |kind: u8| {
            let tlv = tlvs.iter().find(|tlv| tlv.kind == kind);
            tlv.map(|tlv| tlv.value.to_vec()).unwrap_or_default()
        };
        assert_eq!(parse(&header), Ok(Some(addresses)));
        assert_eq!(value(Type::ALPN as u8), b"h2");
        assert_eq!(value(Type::Authority as u8), b"shop.example");
        assert_eq!(value(Type::UniqueId as u8), b"1-2");
        assert_eq!(value(CERTIFICATE_DIGEST), [7; 32]);
        let mut ssl = b"\x07\0\0\0\0\x21\0\x07TLSv1.3\x23\0\x0dTLS_SOMETHING".to_vec();
        ssl.extend(b"\x22\0\x0borigin-pull");
        assert_eq!(value(Type::SSL as u8), ssl);
    }

    #[test]
    fn a_name_that_would_break_a_line_is_not_told() {
        let identity = Identity {
            subject: String::new(),
            common_name: Some("a\r\nX-Forged: 1".to_owned()),
            trust: String::new(),
            digest: [0; 32],
        };
        let addresses = between("192.0.2.1:1", "192.0.2.2:443");

        let header = v2(&ProxyInfo {
            identity: Some(&identity),
            ..info(addresses)
        });

        let header = header.unwrap();
        assert!(!header.windows(6).any(|window| window == b"Forged"));
    }

    #[test]
    fn headers_of_either_version_are_read_and_others_refused() {
        let theirs = between("198.51.100.1:4660", "203.0.113.1:443");
        let cases = [
            (
                b"PROXY TCP4 198.51.100.1 203.0.113.1 4660 443\r\n".as_slice(),
                Ok(Some(theirs)),
            ),
            (b"PROXY UNKNOWN\r\n".as_slice(), Ok(None)),
            (
                b"PROXY TCP4 198.51.100.1\r\n".as_slice(),
                Err(Refusal::BadProxyHeader),
            ),
            (
                b"PROXY UDP4 198.51.100.1 203.0.113.1 4660 443\r\n".as_slice(),
                Err(Refusal::BadProxyHeader),
            ),
            (
                b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc6\x33\x64\x01\xcb\0\x71\x01\x12\x34\x01\xbb"
                    .as_slice(),
                Ok(Some(theirs)),
            ),
            (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".as_slice(), Ok(None)),
            // A datagram, an address that is cut off, another version.
            (
                b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\xc6\x33\x64\x01\xcb\0\x71\x01\x12\x34\x01\xbb"
                    .as_slice(),
                Err(Refusal::BadProxyHeader),
            ),
            (
                b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x04\xc6\x33\x64\x01".as_slice(),
                Err(Refusal::BadProxyHeader),
            ),
            (
                b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\0".as_slice(),
                Err(Refusal::BadProxyHeader),
            ),
        ];

        for (header, expected) in cases {
            assert_eq!(parse(header), expected, "{}", header.escape_ascii());
        }
    }

    #[test]
    fn a_header_of_version_2_without_a_client_is_as_long_as_any_with_one() {
        for (kind, length) in [
            (HeaderKind::BareV2, V2_FIXED + ADDRESSES_V6),
            (HeaderKind::V2, V2_SENT_MAX),
        ] {
            let header = kind.without_client().unwrap();
            let payload = u8::try_from(length - V2_FIXED).unwrap();
            let (fixed, tlv) = header.split_at(V2_FIXED);
            let expected = [b"\r\n\r\n\0\r\nQUIT\n\x20\0\0".as_slice(), &[payload]].concat();
            assert_eq!(fixed, expected, "{kind:?}");
            assert_eq!(tlv[..TLV_HEADER], [Type::NoOp as u8, 0, payload - 3]);
            assert_eq!(tlv.len(), usize::from(payload));
            assert_eq!(parse(&header), Ok(None));
        }
        let far = between("[2001:db8::1]:65535", "[2001:db8::2]:443");
        assert_eq!(v2_bare(far).unwrap().len(), V2_FIXED + ADDRESSES_V6);
    }

    #[test]
    fn a_checksum_is_verified_if_there_is_one() {
        let theirs = between("198.51.100.1:4660", "203.0.113.1:443");
        let mut header = v2(&info(theirs)).unwrap();
        header.extend(b"\x03\0\x04\0\0\0\0");
        let at = header.len() - 4;
        let length = u16::try_from(header.len() - V2_FIXED).unwrap();
        header[14..16].copy_from_slice(&length.to_be_bytes());
        let sum = crc32c::crc32c(&header);
        header[at..].copy_from_slice(&sum.to_be_bytes());

        assert_eq!(parse(&header), Ok(Some(theirs)));
        for changed in [17, 35, at] {
            let mut header = header.clone();
            header[changed] ^= 1;
            assert_eq!(parse(&header), Err(Refusal::BadProxyHeader), "{changed}");
        }
    }

    #[test]
    fn a_header_is_never_longer_than_its_receiver_takes() {
        let identity = Identity {
            subject: String::new(),
            common_name: Some("origin-pull.cloudflare.net".to_owned()),
            trust: String::new(),
            digest: [7; 32],
        };
        let addresses = between("[2001:db8::1]:4660", "[2001:db8::2]:443");
        let authority = "a".repeat(253);
        for length in 0..=authority.len() {
            let header = v2(&ProxyInfo {
                identity: Some(&identity),
                authority: Some(&authority[..length]),
                cipher: "ECDHE-ECDSA-CHACHA20-POLY1305",
                unique_id: "0123456789abcdef-ffffffffffffffff",
                ..info(addresses)
            });

            let header = header.unwrap();
            assert!(header.len() <= V2_SENT_MAX, "{length}: {}", header.len());
            let has = |text: &[u8]| header.windows(text.len()).any(|part| part == text);
            assert_eq!(parse(&header), Ok(Some(addresses)));
            // The name goes first, then the digest.
            assert!(!has(b"origin-pull") || has(&[7; 32]), "{length}");
            assert!(length > 20 || has(&[7; 32]), "{length}");
        }
        assert_eq!(v2_bare(addresses).unwrap().len(), 16 + 36);
    }

    fn between(client: &str, local: &str) -> ConnectionAddrs {
        ConnectionAddrs {
            client: client.parse().unwrap(),
            local: local.parse().unwrap(),
        }
    }

    fn info(addresses: ConnectionAddrs) -> ProxyInfo<'static> {
        ProxyInfo {
            addresses,
            alpn: Some(b"h2"),
            authority: Some("shop.example"),
            tls_version: "TLSv1.3",
            cipher: "TLS_SOMETHING",
            identity: None,
            resumed: false,
            unique_id: "1-2",
        }
    }
}
