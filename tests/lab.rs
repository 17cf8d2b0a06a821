//! The lab: plays every scenario against a protected origin, prints what happened, and stays up.
#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::process::ExitCode;

use clap::Parser;
use serde_json::Value;
use tests::scenarios;
use tests::{Lab, Pairing, Plan};

/// A protected origin, an edge and a stranger, in network namespaces.
#[derive(Parser)]
struct Options {
    /// Exit after the scenarios: 0 only if every row is as expected.
    #[arg(long)]
    once: bool,
    /// With a web server that keeps port 443, and a gate that connections are steered to.
    #[arg(long)]
    steer: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "the lab makes network namespaces: run it as root"
    );
    tests::exit_on_interrupt()?;

    let mut lab = Lab::start(&Plan {
        pairing: if options.steer {
            Pairing::Steered
        } else {
            Pairing::Relayed
        },
        ..Plan::default()
    });
    let mark = lab.gate().mark();
    let mut rows = scenarios::edge_is_served(&lab, "nginx");
    narrate(&lab.gate().events()[mark..]);
    rows.extend(scenarios::certificates_are_judged(&lab));
    rows.extend(scenarios::sessions_stay_at_home(&lab));
    rows.extend(scenarios::defective_greetings_are_refused(&lab));
    rows.extend(scenarios::strangers_are_dropped(&lab));
    rows.extend(scenarios::the_rest_works_as_before(&lab));
    rows.extend(scenarios::probe_finds_nothing_open(&lab));
    rows.extend(scenarios::doctor_finds_nothing_wrong(&lab));
    rows.extend(scenarios::a_new_range_opens_the_way(&lab));
    rows.extend(scenarios::bad_lists_change_nothing(&lab));
    rows.extend(scenarios::killed_roles_leave_the_host_protected(&mut lab));
    rows.extend(scenarios::unload_leaves_the_gate(&mut lab));
    println!("{}", scenarios::Table(&rows));

    let matched = rows.iter().filter(|row| row.matched()).count();
    println!("{matched} of {} rows as expected", rows.len());
    if !options.once {
        println!("\nThe lab stays up until Ctrl-C. Try:\n{}", lab.hints());
        loop {
            std::thread::park();
        }
    }
    drop(lab);
    Ok(if matched == rows.len() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The steps of the first connection, as the gate logged them.
fn narrate(events: &[Value]) {
    println!("A connection of the edge, step by step, as the gate logged it:\n");
    let client = events.iter().find_map(|event| event["client"].as_str());
    let steps = events
        .iter()
        .filter(|event| event["client"].as_str() == client);
    for step in steps {
        let fields = [
            "client", "class", "host", "subject", "trust", "upstream", "outcome",
        ];
        let fields = fields
            .iter()
            .filter_map(|name| Some(format!("{name}={}", step[*name].as_str()?)));
        let message = step["message"].as_str().unwrap_or_default();
        println!("  {message}: {}", fields.collect::<Vec<_>>().join(" "));
    }
    println!();
}
