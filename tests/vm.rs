//! Boots Debian's kernels in virtual machines, installs the package there as the manual says, and lets
//! edge and stranger come: the kernel matrix of `cargo xtask test --vm`.
#![expect(clippy::print_stdout, reason = "the table is what it is for")]

#[path = "vm/checks.rs"]
mod checks;
#[path = "vm/gate.rs"]
mod gate;
#[path = "vm/machine.rs"]
mod machine;
#[path = "vm/tunnels.rs"]
mod tunnels;
#[path = "vm/visitors.rs"]
mod visitors;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use self::checks::{Row, Scope};

/// Which kernels to boot, and where `cargo xtask` has prepared them.
#[derive(Parser)]
struct Options {
    /// A directory for each kernel: vmlinuz, initrd, root.img.
    #[arg(long)]
    machines: PathBuf,
    /// Only what CI does.
    #[arg(long)]
    short: bool,
    /// What takes long, too.
    #[arg(long)]
    long: bool,
    /// Only checks whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// The kernels' names.
    kernels: Vec<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "it makes network namespaces: run it as root"
    );
    tests::exit_on_interrupt()?;
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;

    let scope = Scope {
        short: options.short,
        long: options.long,
        only: &options.only,
    };
    let mut results = Vec::new();
    for name in &options.kernels {
        println!("\nkernel {name}");
        let begun = Instant::now();
        let rows = checks::run(&options.machines.join(name), scope);
        println!("kernel {name} took {} s", begun.elapsed().as_secs());
        results.push((name.as_str(), begun.elapsed().as_secs(), rows));
    }
    print_table(&results);
    let rows = results.iter().flat_map(|(_, _, rows)| rows);
    let (passed, failed): (Vec<_>, Vec<_>) = rows.partition(|row| row.failure.is_none());
    println!("{} passed, {} failed", passed.len(), failed.len());
    Ok(if failed.is_empty() && !passed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Kernels across, checks down.
fn print_table(results: &[(&str, u64, Vec<Row>)]) {
    println!();
    print!("{:<58}", "");
    for (name, seconds, _) in results {
        print!(
            "{:>26}",
            format!("{name}, {} min {} s", seconds / 60, seconds % 60)
        );
    }
    println!();
    let mut seen = BTreeSet::new();
    let names = results.iter().flat_map(|(_, _, rows)| rows);
    for check in names
        .map(|row| row.check)
        .filter(|check| seen.insert(*check))
    {
        print!("{check:<58}");
        for (_, _, rows) in results {
            let row = rows.iter().find(|row| row.check == check);
            let cell = match row {
                Some(Row {
                    failure: Some(_), ..
                }) => "FAILED",
                Some(row) if row.note.is_empty() => "ok",
                Some(row) => &row.note,
                None => "-",
            };
            print!("{cell:>26}");
        }
        println!();
    }
}
