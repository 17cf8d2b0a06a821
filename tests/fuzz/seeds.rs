//! Writes inputs to begin from, a directory for each target: `seeds <directory>`.

use std::path::Path;
use std::{env, fs, io};

use filter_ebpf::cases::{Table, cases};

fn main() -> io::Result<()> {
    let directory = env::args_os().nth(1).ok_or(io::ErrorKind::InvalidInput)?;
    let write = |target: &str, number: usize, seed: &[u8]| {
        let directory = Path::new(&directory).join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("seed-{number}")), seed)
    };
    for (number, case) in cases(Table::Default).iter().enumerate() {
        write("decide", number, &case.frame)?;
        write("synack", number, &case.frame)?;
    }
    for (target, seeds) in SEEDS {
        for (number, seed) in seeds.iter().enumerate() {
            write(target, number, seed)?;
        }
    }
    Ok(())
}

const SEEDS: [(&str, &[&[u8]]); 7] = [
    (
        "proxy_header",
        &[
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 443\r\n",
            b"PROXY TCP6 2001:db8::1 2001:db8::2 1 443\r\n",
            b"PROXY UNKNOWN\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\0\x01\x01\xbb",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x13\xc0\0\x02\x01\xc0\0\x02\x02\0\x01\x01\xbb\x03\0\x04\0\0\0\0",
            b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
        ],
    ),
    (
        "feed",
        &[
            include_bytes!("../../filter-user/baseline/ips-v4"),
            include_bytes!("../../filter-user/baseline/ips-v6"),
            br#"{"result":{"ipv4_cidrs":["173.245.48.0/20"],"ipv6_cidrs":["2400:cb00::/32"]},"success":true}"#,
            br#"{"prefixes":[{"ip_prefix":"3.10.17.128/25","service":"CLOUDFRONT_ORIGIN_FACING"}]}"#,
        ],
    ),
    (
        "snapshot",
        &[br#"{"version":2,"lists":[{"source":"cloudflare","way":"https://api.cloudflare.com/client/v4/ips","confirmed":1700000000,"ranges":["173.245.48.0/20","2400:cb00::/32"],"vanished":[]}]}"#],
    ),
    (
        "configuration",
        &[
            include_bytes!("../../filter-user/dist/pullgate.toml"),
            include_bytes!("../../filter-user/dist/reference.toml"),
        ],
    ),
    (
        "pem",
        &[
            include_bytes!("../../filter-user/baseline/authenticated_origin_pull_ca.pem"),
            b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
            b"text\n-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n",
        ],
    ),
    (
        "session",
        &[
            // A handshake, words of both, and the end.
            b"\x00\xff\x07\x01\x00\xff\x07\x01\x04\x09\x00\xff\x05\x01\x07\x01\x06\x01\x04\x64\x00\xff\x05\x01\x07\x01\x07\x00\x00\xff",
            // The same in pieces, and a changed record.
            b"\x00\x09\x00\x09\x00\xff\x07\x01\x00\x05\x00\xff\x04\x64\x00\x03\x05\x01\x01\x08\x00\xff\x05\x01\x07\x01",
        ],
    ),
    (
        "client_hello",
        &[b"\x16\x03\x01\0\x41\x01\0\0\x3d\x03\x03aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\0\0\x02\x13\x01\x01\0\0\x12\0\0\0\x0e\0\x0c\0\0\x09shop.test"],
    ),
];
