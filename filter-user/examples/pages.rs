//! Writes the man pages and the completions that the packages carry: `pages <directory>`.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use pullgate::cli::{Cli, EXAMPLES};
use pullgate::report::EXIT_CODES;

fn main() -> io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::other("name a directory"));
    };
    let (man, completions) = (directory.join("man"), directory.join("completions"));
    // What an older version has written there must not be packaged.
    if man.exists() {
        fs::remove_dir_all(&man)?;
    }
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    // Without `help`, which has no page of its own.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    write_page(&command, "pullgate", &man)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut Cli::command(), "pullgate", &completions)?;
    }
    Ok(())
}

/// The page of a command and those of its subcommands, in section 8: they administer a system.
fn write_page(command: &Command, name: &str, directory: &Path) -> io::Result<()> {
    let mut page = Vec::new();
    let man = Man::new(command.clone()).section("8").title(name);
    man.render(&mut page)?;
    writeln!(page, ".SH \"EXIT STATUS\"")?;
    for (code, meaning) in EXIT_CODES {
        let meaning = meaning.replace('-', "\\-").replace('`', "");
        writeln!(page, ".TP\n.B {code}\n{meaning}")?;
    }
    page.write_all(ENVIRONMENT.as_bytes())?;
    page.write_all(FILES.as_bytes())?;
    page.write_all(examples(name).as_bytes())?;
    page.write_all(SEE_ALSO.as_bytes())?;
    fs::write(directory.join(format!("{name}.8")), page)?;
    for inner in command.get_subcommands() {
        write_page(inner, &format!("{name}-{}", inner.get_name()), directory)?;
    }
    Ok(())
}

/// What begins like the command: all, for the page of the program.
fn examples(page: &str) -> String {
    let start = page.replace('-', " ");
    let lines = EXAMPLES
        .iter()
        .filter(|(line, _)| line.replace('-', " ").starts_with(&start));
    let lines = lines.map(|(line, about)| {
        let [line, about] = [line, about].map(|text| text.replace('-', "\\-").replace('`', ""));
        format!(".TP\n.B {line}\n{about}\n")
    });
    let lines: String = lines.collect();
    match lines.as_str() {
        "" => lines,
        lines => format!(".SH EXAMPLES\n{lines}"),
    }
}

const ENVIRONMENT: &str = "\
.SH ENVIRONMENT
.TP
PULLGATE_LOG
the level of the log: info, pullgate=debug
.TP
NO_COLOR
no colour on a terminal
";
const FILES: &str = "\
.SH FILES
.TP
/etc/pullgate/pullgate.toml
the configuration, see pullgate.toml(5)
.TP
/var/lib/pullgate/ranges.json
the last known good ranges
.TP
/run/pullgate
the sockets of the roles
.TP
/sys/fs/bpf/pullgate
the pins, which keep the filter active without a process
";
const SEE_ALSO: &str = "\
.SH \"SEE ALSO\"
pullgate(8), pullgate.toml(5), systemctl(1), /usr/share/doc/pullgate/README.md
";
