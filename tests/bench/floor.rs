//! What a handshake cannot cost less than: its TLS alone, in memory, and its two connections alone, in clear text.

use std::io::{self, Read as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig,
    ServerConnection, SideData,
};
use tests::pki::{Pki, SHOP};
use tests::web;

use crate::cpu::of_thread;

/// Microseconds of a server's CPU time per full handshake in memory, with the certificates that all proxies have.
pub(crate) fn tls(pki: &Pki, client: &ClientConfig, count: u32) -> f64 {
    let server = Arc::new(server(pki));
    let client = Arc::new(client.clone());
    let name = ServerName::try_from(SHOP).unwrap();
    let mut spent = 0.0;
    for _ in 0..count {
        let mut client = ClientConnection::new(Arc::clone(&client), name.clone()).unwrap();
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        let mut answer = Vec::new();
        let begun = of_thread();
        let mut server = ServerConnection::new(Arc::clone(&server)).unwrap();
        serve(&mut server, &wire, &mut answer);
        spent += of_thread() - begun;
        while client.is_handshaking() || client.wants_write() {
            take(&mut client, &answer);
            wire.clear();
            answer.clear();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            let begun = of_thread();
            serve(&mut server, &wire, &mut answer);
            spent += of_thread() - begun;
        }
        assert!(!server.is_handshaking());
    }
    spent / f64::from(count)
}

/// Microseconds of a relay's CPU time per connection that it accepts, for which it opens one to the web server, and that
/// ends.
pub(crate) fn connections(count: u32) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let relay = thread::spawn(move || {
        let begun = of_thread();
        for _ in 0..count {
            let (mut client, _) = listener.accept().unwrap();
            let upstream = TcpStream::connect(web::ADDRESS).unwrap();
            let mut rest = [0; 16];
            assert_eq!(client.read(&mut rest).unwrap(), 0);
            drop((client, upstream));
        }
        (of_thread() - begun) / f64::from(count)
    });
    (0..count).for_each(|_| come_and_go(to).unwrap());
    relay.join().unwrap()
}

fn come_and_go(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

fn server(pki: &Pki) -> ServerConfig {
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(pki.path("rsa-ca.pem"));
    roots.add(authority.unwrap()).unwrap();
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
    let chain = CertificateDer::pem_file_iter(pki.path(&format!("{SHOP}.pem")));
    let chain = chain.unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{SHOP}.key")));
    ServerConfig::builder()
        .with_client_cert_verifier(verifier.unwrap())
        .with_single_cert(chain, key.unwrap())
        .unwrap()
}

fn serve(server: &mut ServerConnection, wire: &[u8], answer: &mut Vec<u8>) {
    take(server, wire);
    while server.wants_write() {
        server.write_tls(answer).unwrap();
    }
}

fn take<S: SideData>(connection: &mut ConnectionCommon<S>, mut wire: &[u8]) {
    while !wire.is_empty() {
        connection.read_tls(&mut wire).unwrap();
        connection.process_new_packets().unwrap();
    }
}
