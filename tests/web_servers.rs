//! Verifies web servers that stand as they ever stood, with three sites each: what a client comes upon through
//! the gate is what it would come upon without it.
#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, Request, Response};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::client::Client;
use tests::gate::origin;
use tests::net::{Host, Network};
use tests::pki::{BLOG, SHOP, WIKI};
use tests::sites::{self, APPLICATION, CALLS};
use tests::web::{self, Software};
use tests::{Steered, eventually, skip};
use tokio::runtime::Runtime;

#[test]
fn nginx_is_as_it_was() {
    is_as_it_was(Software::Nginx, "nginx_is_as_it_was");
}

#[test]
fn apache_is_as_it_was() {
    is_as_it_was(Software::Apache, "apache_is_as_it_was");
}

#[test]
fn haproxy_is_as_it_was() {
    is_as_it_was(Software::Haproxy, "haproxy_is_as_it_was");
}

#[test]
fn caddy_is_as_it_was() {
    is_as_it_was(Software::Caddy, "caddy_is_as_it_was");
}

fn is_as_it_was(software: Software, test: &str) {
    if !web::is_installed(software) {
        return skip(test, "not installed");
    }
    let mut rig = Steered::start(software, "", "");
    rig.pki.write_identity("edge", &rig.pki.ours.client());
    let _application = Application::start(&rig.network);
    let _calls = answer_calls(&rig.network);
    eventually("the web server was asked for its protocols", || {
        let page = curl(&rig, Way::Gate, SHOP, "/", &[]);
        page.starts_with("HTTP/2 200").then_some(())
    });

    // curl goes without close_notify once it is answered, as nginx does then: neither has broken it off.
    eventually("a connection is counted", || {
        let ended = ["Relayed", "Aborted"].map(|outcome| rig.gate().outcomes(outcome));
        (ended.iter().sum::<u64>() > 0).then_some(())
    });
    assert_eq!(rig.gate().outcomes("Aborted"), 0);
    for name in [SHOP, WIKI] {
        for (path, options, expected) in ANSWERS {
            let through = curl(&rig, Way::Gate, name, path, options);
            let direct = curl(&rig, Way::Loopback, name, path, options);
            assert_eq!(through, direct, "{software:?} {name}{path} {options:?}");
            for words in expected {
                let words = words.replace("@NAME@", name);
                assert!(through.contains(&words), "{software:?} {path}: {through}");
            }
            let text = through.to_lowercase();
            let location = text.lines().find(|line| line.starts_with("location:"));
            for wrong in ["8080", "44300", "http:"] {
                let is_wrong = location.is_some_and(|location| location.contains(wrong));
                assert!(!is_wrong, "{software:?} {path}: {location:?}");
            }
        }
    }
    // What a site shows to the name of another is the web server's; the gate knows that it may.
    let other = ["--header", "Host: blog.example"];
    assert_eq!(
        curl(&rig, Way::Gate, SHOP, "/", &other),
        curl(&rig, Way::Loopback, SHOP, "/", &other)
    );
    assert!(finds(&rig.gate().status(), "upstream-shared"));
    // And another's client is refused.
    let refused = curl(&rig, Way::Gate, BLOG, "/", &[]);
    assert_eq!(refused, "", "{software:?}");

    speaks_websocket(&rig);
    carries_a_gibibyte(&rig);
    goes_on_after_a_reload(&rig, software);
    rig = comes_back_to_its_port(rig, software);
    let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
    assert!(page.starts_with("shop.example saw"), "{software:?}: {page}");
}

/// Paths, options of curl, and what must be in the answer.
const ANSWERS: [(&str, &[&str], &[&str]); 6] = [
    (
        "/",
        &[],
        &["200", "@NAME@ saw 127.0.0.1, https, host=@NAME@"],
    ),
    (
        "/",
        &["--http1.1"],
        &["HTTP/1.1 200", "@NAME@ saw 127.0.0.1"],
    ),
    ("/moved", &["--http1.1"], &["301", "/there"]),
    ("/secure", &[], &["HTTP/2 204"]),
    ("/app/hello", &[], &["HTTP/2 200", "hello"]),
    (
        "/test.Echo/Say",
        &[
            "--header",
            "content-type: application/grpc",
            "--header",
            "te: trailers",
            "--data-binary",
            "call",
        ],
        &[
            "HTTP/2 200",
            "content-type: application/grpc",
            "grpc-status: 0",
        ],
    ),
];

/// Where a client comes from.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// From outside, with the certificate: steered to the gate.
    Gate,
    /// From this host itself, without: to the web server as it stands.
    Loopback,
}

/// The whole answer, headers first, but for the date, and whether the web server resumed a session.
fn curl(rig: &Steered, way: Way, name: &str, path: &str, options: &[&str]) -> String {
    let (from, to) = match way {
        Way::Gate => (Host::Edge, origin().to_string()),
        Way::Loopback => (Host::Origin, "127.0.0.1".to_owned()),
    };
    let at = |file: &str| rig.pki.path(file).display().to_string();
    let (target, url) = (format!("{name}:443:{to}"), format!("https://{name}{path}"));
    let (authority, certificate, key) = (at("web-ca.pem"), at("edge.pem"), at("edge.key"));
    let mut words = vec![
        "curl",
        "--silent",
        "--dump-header",
        "-",
        "--max-time",
        "600",
    ];
    words.extend([
        "--resolve",
        &target,
        "--cacert",
        &authority,
        "--header",
        "Expect:",
    ]);
    if matches!(way, Way::Gate) {
        words.extend(["--cert", &certificate, "--key", &key]);
    }
    words.extend(options);
    words.push(&url);
    let output = rig.network.output(from, &words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines();
    let lines = lines.filter(|line| !line.to_lowercase().starts_with("date:"));
    lines
        .collect::<Vec<_>>()
        .join("\n")
        .replace("reused=r", "reused=.")
}

fn speaks_websocket(rig: &Steered) {
    let mut session = rig
        .edge()
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();
    write!(
        session,
        "GET /app/socket HTTP/1.1\r\nHost: {SHOP}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        session.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    // Its frames are the application's; what is sent comes back.
    for round in 0..100 {
        let sent = [round; 300];
        session.write_all(&sent).unwrap();
        let mut received = [0; 300];
        session.read_exact(&mut received).unwrap();
        assert_eq!(sent, received);
    }
}

fn carries_a_gibibyte(rig: &Steered) {
    let size = ["--output", "/dev/null", "--write-out", "%{size_download}"];
    let down = curl(rig, Way::Gate, SHOP, "/app/gibibyte", &size);
    assert!(down.ends_with(&GIBIBYTE.to_string()), "{down}");

    let file = rig.network.path("gibibyte");
    let sparse = std::fs::File::create(&file).unwrap();
    sparse.set_len(GIBIBYTE).unwrap();
    let file = file.display().to_string();
    let up = curl(
        rig,
        Way::Gate,
        SHOP,
        "/app/upload",
        &["--upload-file", &file],
    );
    assert!(up.ends_with(&format!("received {GIBIBYTE}")), "{up}");
}

/// Its new workers take the port while connections are steered past it.
fn goes_on_after_a_reload(rig: &Steered, software: Software) {
    let before = rig.web.processes();
    match software {
        Software::Nginx => rig.web.reload(),
        Software::Apache => rig.web.signal(Signal::SIGUSR1),
        Software::Haproxy => rig.web.signal(Signal::SIGUSR2),
        Software::Caddy => {
            let config = rig.network.path("caddy-443.conf").display().to_string();
            let words = [
                "caddy",
                "reload",
                "--force",
                "--adapter",
                "caddyfile",
                "--config",
            ];
            let output = rig
                .network
                .output(Host::Origin, &[&words[..], &[&config]].concat());
            assert!(output.status.success(), "{output:?}");
        }
    }
    let serves = || {
        let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
        assert!(page.starts_with("shop.example saw"), "{software:?}: {page}");
    };
    // The others replace their workers, if these can take the port.
    if software != Software::Caddy {
        eventually("its workers are new ones", || {
            serves();
            (rig.web.processes() != before).then_some(())
        });
    }
    for _ in 0..20 {
        serves();
    }
}

/// Stopped and started, it binds its port again; a client that comes meanwhile is closed on.
fn comes_back_to_its_port(rig: Steered, software: Software) -> Steered {
    let Steered {
        filter,
        gate,
        web,
        pki,
        config,
        network,
    } = rig;
    drop(web);
    let client = Client::new(&pki, Some(&pki.ours.client()));
    let (reply, _) = client.get(&network, Host::Edge, origin(), SHOP);
    assert_eq!(reply.brief(), "closed", "{software:?}");
    let without = Client::new(&pki, None);
    let (reply, _) = without.get(&network, Host::Edge, origin(), SHOP);
    assert_eq!(reply.brief(), "alert CertificateRequired", "{software:?}");
    let web = sites::start(&network, software);
    Steered {
        filter,
        gate,
        web,
        pki,
        config,
        network,
    }
}

fn finds(status: &Value, id: &str) -> bool {
    let findings = status["findings"].as_array().unwrap();
    findings.iter().any(|finding| finding["id"] == id)
}

/// An application behind the web servers: it greets, takes and gives a gibibyte, and echoes WebSockets.
struct Application {
    network: Arc<Network>,
    stopped: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl Application {
    fn start(network: &Arc<Network>) -> Self {
        let listener = network.on(Host::Origin, || TcpListener::bind(APPLICATION).unwrap());
        let stopped = Arc::<AtomicBool>::default();
        let is_over = Arc::clone(&stopped);
        let serving = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                let stream = stream.unwrap();
                // A web server that hangs up has had enough.
                std::thread::spawn(move || drop(serve(stream)));
            }
        });
        Self {
            network: Arc::clone(network),
            stopped,
            serving: Some(serving),
        }
    }
}

/// Answers each gRPC call, with a trailer, until the runtime is dropped.
fn answer_calls(network: &Network) -> Runtime {
    let listener = network.on(Host::Origin, || TcpListener::bind(CALLS).unwrap());
    listener.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let accepting = async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await?;
                while let Some(called) = connection.accept().await {
                    let (request, respond) = called?;
                    tokio::spawn(answer_call(request, respond));
                }
                Ok::<_, h2::Error>(())
            });
        }
    };
    runtime.spawn(accepting);
    runtime
}

/// Reads the call to its end first: a server that answers earlier resets the stream, and HAProxy drops what it had
/// of the answer.
async fn answer_call(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    let mut body = request.into_body();
    while let Some(piece) = body.data().await {
        let length = piece?.len();
        body.flow_control().release_capacity(length)?;
    }
    let answer = Response::builder().header("content-type", "application/grpc");
    let mut stream = respond.send_response(answer.body(()).unwrap(), false)?;
    stream.send_data("called\n".into(), false)?;
    let status = (HeaderName::from_static("grpc-status"), "0".parse().unwrap());
    stream.send_trailers(HeaderMap::from_iter([status]))
}

impl Drop for Application {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // The accept that waits.
        let accepting = self
            .network
            .on(Host::Origin, || TcpStream::connect(APPLICATION).ok());
        drop(accepting);
        if let Some(serving) = self.serving.take() {
            drop(serving.join());
        }
    }
}

fn serve(stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let head = head.to_lowercase();
        if head.contains("upgrade: websocket") {
            // The answer to the key of RFC 6455 §1.3.
            stream.write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                  Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
            )?;
            io::copy(&mut reader, &mut stream)?;
            return Ok(());
        }
        if head.starts_with("get /app/gibibyte") {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {GIBIBYTE}\r\n\r\n"
            )?;
            io::copy(&mut io::repeat(b'x').take(GIBIBYTE), &mut stream)?;
            continue;
        }
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let body = match length {
            Some(length) => {
                let length = length.trim().parse().unwrap();
                let received = io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
                format!("received {received}")
            }
            None => "hello".to_owned(),
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
}

const GIBIBYTE: u64 = 1 << 30;
