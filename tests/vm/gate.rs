//! The gate on a kernel: activated by its socket, steered to, and crowded as few hosts let a process be.

use std::io::{self, IoSlice};
use std::net::{IpAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{anyhow, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustls::version::TLS12;
use tests::client::{Client, connect_from};
use tests::manual::Manual;
use tests::net::{Host, INTERFACE};
use tests::pki::{Pki, SHOP};

use crate::checks::{start, start_with};
use crate::machine::{Machine, VIRTIO};
use crate::visitors::knock;

pub(crate) fn activated(machine: &mut Machine<'_>, pki: &Pki) -> anyhow::Result<String> {
    start_gate(machine, "", "", WEB)?;
    let network = machine.network();
    let ask =
        |client: &Client, from: Host, to: IpAddr| client.get(network, from, to, SHOP).0.brief();
    let ours = Client::new(pki, Some(&pki.ours.client()));
    let without = Client::new(pki, None);
    for origin in Host::Origin.addresses() {
        let (served, refused) = (
            ask(&ours, Host::Edge, origin),
            ask(&without, Host::Edge, origin),
        );
        ensure!(served == "200", "{origin}: {served}");
        ensure!(
            refused.contains("CertificateRequired"),
            "{origin}: {refused}"
        );
    }
    ensure!(!knock(network, VIRTIO.mac(), None)?.stranger, "answered");
    // Its socket outlives it.
    machine.run("systemctl kill --signal=KILL pullgate-gate")?;
    let served = ask(&ours, Host::Edge, Host::Origin.addresses()[0]);
    ensure!(served == "200", "after a kill: {served}");
    machine.eventually("PROTECTED", "pullgate status")?;
    Ok(String::new())
}

/// Few hosts let a process open so many files, so it takes a machine of its own.
pub(crate) fn crowd(machine: &mut Machine<'_>, pki: &Pki) -> anyhow::Result<String> {
    let [origin, _] = Host::Origin.addresses();
    let many = format!("hellos = {CROWD}\nconnections = {CROWD}");
    start_gate(
        machine,
        &format!("\"{origin}\""),
        &format!(
            "handshake_timeout = \"600s\"\nmax_connections = {MOST}\nmax_handshakes = {MOST}\n\
             [gate.per_source]\n{many}\n[gate.per_network]\n{many}\n"
        ),
        WEB,
    )?;
    // Each says the first byte of a record, and no more.
    machine.run(&format!(
        "systemd-run --quiet --unit=crowd --property=LimitNOFILE={MOST} bash -c 'for _ in $(seq {CROWD}); do \
         exec {{it}}<>/dev/tcp/{origin}/443; printf \\\\x16 >&$it; done; touch /run/crowd; exec sleep infinity' && \
         until test -e /run/crowd; do systemctl --quiet is-active crowd || exit 1; sleep 1; done"
    ))?;
    let are_held = has_open(CROWD);
    machine.eventually("all are held", &are_held)?;
    let client = Client::new(pki, Some(&pki.ours.client()));
    for origin in Host::Origin.addresses() {
        let reply = client.get(machine.network(), Host::Edge, origin, SHOP).0;
        ensure!(reply.brief() == "200", "{origin}: {}", reply.brief());
    }
    // None gave way.
    machine.run(&are_held)?;
    machine.run("systemctl stop crowd")?;
    Ok(String::new())
}

/// As many visitors as a large zone has, who say nothing: what they cost, and that others are served.
pub(crate) fn idle(machine: &mut Machine<'_>, pki: &Pki) -> anyhow::Result<String> {
    machine.run(&format!(
        "printf 'server {{ listen unix:{IDLE_SOCKET} proxy_protocol; client_header_timeout 1h; return 200; }}' \
         >/etc/nginx/conf.d/idle.conf && printf 'worker_rlimit_nofile {ALL};' >/etc/nginx/modules-enabled/files.conf && \
         sed --in-place 's/worker_connections .*/worker_connections {ALL};/' /etc/nginx/nginx.conf && \
         systemctl --quiet restart nginx && \
         mkdir -p {LIMITS} && printf '[Service]\\nLimitNOFILE={FILES}\\n' >{LIMITS}/files.conf && systemctl daemon-reload"
    ))?;
    let many = format!("hellos = {ALL}\nconnections = {ALL}\nhandshakes_per_second = {ALL}");
    start_gate(
        machine,
        "",
        &format!(
            "idle_timeout = \"1h\"\nhandshake_timeout = \"60s\"\nmax_connections = {ALL}\n\
             [gate.per_source]\n{many}\n[gate.per_network]\n{many}\n"
        ),
        // A port of loopback has fewer connections.
        &format!("unix:{IDLE_SOCKET}"),
    )?;
    let network = machine.network();
    // A session that is resumed costs an emulated processor least.
    let client = Client::speaking(pki, Some(&pki.ours.client()), &[&TLS12]);
    let sources: Vec<_> = (1..=IDLE_SOURCES)
        .map(|number| IpAddr::from([173, 245, 49, number]))
        .collect();
    for source in &sources {
        let host_only = format!("{source}/32");
        let words = ["ip", "address", "add", &host_only, "dev", INTERFACE];
        ensure!(network.output(Host::Edge, &words).status.success());
    }
    let [origin, _] = Host::Origin.addresses();
    let begun = resident(machine)?;

    let parked = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let clients = sources.iter().map(|source| {
            scope.spawn(|| {
                while next.fetch_add(PARKED, Ordering::Relaxed) < IDLE {
                    let sessions = (0..PARKED).map(|_| {
                        let stream = connect_from(network, *source, origin);
                        let mut session = client.over(stream, SHOP);
                        session.conn.complete_io(&mut session.sock)?;
                        Ok(session.sock)
                    });
                    let streams: Vec<_> = sessions.collect::<io::Result<_>>()?;
                    parked
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(park(&streams)?);
                }
                anyhow::Ok(())
            })
        });
        let clients: Vec<_> = clients.collect();
        for client in clients {
            client
                .join()
                .map_err(|_panic| anyhow!("a client panicked"))??;
        }
        anyhow::Ok(())
    })?;
    // Each is relayed to the web server.
    let are_held = has_open(2 * IDLE);
    machine.eventually("all are held", &are_held)?;
    let each = (resident(machine)? - begun) / IDLE as u64;
    ensure!(each < EACH_MAX, "{each} B each");
    for origin in Host::Origin.addresses() {
        let reply = client.get(network, Host::Edge, origin, SHOP).0;
        ensure!(reply.brief() == "200", "{origin}: {}", reply.brief());
    }
    machine.run(&are_held)?;
    machine.run(&format!(
        "systemctl --quiet disable --now pullgate-gate.socket pullgate-gate nginx && \
         rm -r /etc/nginx/conf.d/idle.conf /etc/nginx/modules-enabled/files.conf {LIMITS} && systemctl daemon-reload"
    ))?;
    Ok(format!("{each} B each"))
}

/// Leaves connections in a socket's queue (unix(7), `SCM_RIGHTS`): they stay open, and are no files of this
/// process, which may not have so many.
fn park(streams: &[TcpStream]) -> anyhow::Result<(UnixStream, UnixStream)> {
    let (place, other_end) = UnixStream::pair()?;
    let files: Vec<_> = streams.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&files)];
    let byte = [IoSlice::new(b"x")];
    sendmsg::<()>(place.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None)?;
    Ok((place, other_end))
}

/// The gate's memory, in bytes: proc_pid_status(5).
fn resident(machine: &Machine<'_>) -> anyhow::Result<u64> {
    let kib = machine.run(&format!("awk '/^VmRSS/ {{ print $2 }}' /proc/{PID}/status"))?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}

/// A script that fails until the gate has so many files open.
fn has_open(files: usize) -> String {
    format!(
        "files=$(ls -U /proc/{PID}/fd | wc -l); echo \"$files are open\"; [ \"$files\" -ge {files} ]"
    )
}

/// Starts the filter from nothing, and a gate in front of nginx.
fn start_gate(
    machine: &Machine<'_>,
    allow: &str,
    settings: &str,
    upstream: &str,
) -> anyhow::Result<()> {
    machine.run("cp /root/shop.example.* /root/ours-ca.pem /etc/pullgate/ && cd /etc/pullgate && \
                 chmod 640 *.key && chgrp pullgate-gate *.key && systemctl --quiet enable --now nginx")?;
    start_with(
        machine,
        &format!(
            "interfaces = [\"wan0\"]\n[gate]\nlisten = [\"0.0.0.0:443\", \"[::]:443\"]\n{settings}\
             [[gate.host]]\nnames = [\"{SHOP}\"]\ncertificate = \"shop.example.pem\"\n\
             key = \"shop.example.key\"\ntrust = [\"ours-ca.pem\"]\nupstream = \"{upstream}\"\n"
        ),
        allow,
    )?;
    machine.run(Manual::read().start_gate).map(drop)
}

pub(crate) fn steer(machine: &mut Machine<'_>, pki: &Pki) -> anyhow::Result<String> {
    machine.run(
        "cp /root/shop.example.* /root/ours-ca.pem /etc/pullgate/ && cd /etc/pullgate && \
         chmod 640 *.key && chgrp pullgate-gate *.key",
    )?;
    machine.run(&format!(
        "printf '{STEERED}' >/etc/nginx/conf.d/steered.conf"
    ))?;
    machine.run("systemctl --quiet restart nginx")?;
    let network = machine.network();
    let ask =
        |client: &Client, from: Host, to: IpAddr| client.get(network, from, to, SHOP).0.brief();
    let ours = Client::new(pki, Some(&pki.ours.client()));
    let without = Client::new(pki, None);
    // Where XDP drops nothing, steering alone keeps clients from nginx.
    for client_address in ["loopback", "transparent"] {
        start(
            machine,
            &format!(
                "interfaces = [\"wan0\"]\n[gate]\nsteer = true\nclient_address = \"{client_address}\"\n\
                 [[gate.host]]\nnames = [\"{SHOP}\"]\ncertificate = \"shop.example.pem\"\n\
                 key = \"shop.example.key\"\ntrust = [\"ours-ca.pem\"]\n"
            ),
        )?;
        machine.run(Manual::read().start_steered)?;
        for origin in Host::Origin.addresses() {
            let served = ask(&ours, Host::Edge, origin);
            let refused = ask(&without, Host::Edge, origin);
            ensure!(served == "200", "{client_address}, {origin}: {served}");
            ensure!(
                refused.contains("CertificateRequired"),
                "{client_address}, {origin}: {refused}"
            );
        }
        machine.run("systemctl kill --signal=KILL pullgate-gate")?;
        let served = ask(&ours, Host::Edge, Host::Origin.addresses()[0]);
        ensure!(served == "200", "{client_address}, after a kill: {served}");
        machine.eventually("PROTECTED", "pullgate status")?;
        machine.run(
            "systemctl stop pullgate-gate && mkdir -p /etc/systemd/system/pullgate-gate.service.d && \
             cp /usr/share/doc/pullgate/steering/transparent.conf \
             /etc/systemd/system/pullgate-gate.service.d/ && systemctl daemon-reload",
        )?;
    }
    machine.run(
        "pullgate unload && systemctl --quiet disable --now pullgate-steer.socket pullgate-gate",
    )?;
    let served = ask(&without, Host::Edge, Host::Origin.addresses()[0]);
    ensure!(served == "200", "nginx has its port again: {served}");
    machine.run(
        "rm -r /etc/nginx/conf.d/steered.conf /etc/systemd/system/pullgate-gate.service.d && \
         systemctl daemon-reload && systemctl stop nginx",
    )?;
    Ok(String::new())
}

/// For printf(1).
const STEERED: &str = "server { listen 443 ssl; listen [::]:443 ssl; server_name shop.example; \
    ssl_certificate /etc/pullgate/shop.example.pem; ssl_certificate_key /etc/pullgate/shop.example.key; \
    location / { return 200 ok; } }";

/// Handshakes in flight.
const CROWD: usize = 20_000;
/// More than those, and clients that are served.
const MOST: usize = 25_000;

/// Connections that say nothing.
const IDLE: usize = 100_000;
/// The gate's memory for each, in bytes: twice what it was in the release build.
const EACH_MAX: u64 = 12 << 10;
/// The addresses that they come from at the same time: each has some 28,000 ports.
const IDLE_SOURCES: u8 = 16;
/// Connections of one message: at most `SCM_MAX_FD`, 253.
const PARKED: usize = 200;
/// More than what all those connections take of anything.
const ALL: usize = 250_000;
/// Files that the gate may open: two for each connection, and others.
const FILES: usize = 600_000;
const LIMITS: &str = "/etc/systemd/system/pullgate-gate.service.d";
/// Where nginx listens for them.
const IDLE_SOCKET: &str = "/run/idle.sock";
/// The web server's port, see the seed of the machine.
const WEB: &str = "127.0.0.1:8080";
/// In a script: the gate's process.
const PID: &str = "$(systemctl show --value --property=MainPID pullgate-gate)";
