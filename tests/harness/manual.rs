//! The manual's commands, as tests follow them.

/// The commands of the manual's first run, as an operator copies them, without `sudo`.
pub struct Manual {
    /// Where the package is.
    pub package: &'static str,
    /// Installs it.
    pub install: &'static str,
    /// Checks the configuration.
    pub check: &'static str,
    /// Enables and starts the filter and the ranges.
    pub start_filter: &'static str,
    /// Asks what is protected.
    pub status: &'static str,
    /// Edits the mode.
    pub enforce: &'static str,
    /// Applies it.
    pub reload: &'static str,
    /// Enables and starts the gate, where connections are steered to it.
    pub start_steered: &'static str,
    /// Enables and starts the gate, where it has the port.
    pub start_gate: &'static str,
    /// Unpacks the tarball.
    pub unpack: &'static str,
    /// What follows that.
    pub take_in: [&'static str; 3],
}

impl Manual {
    /// Reads them.
    #[must_use]
    pub fn read() -> Self {
        let readme = include_str!("../../README.md");
        let operations = include_str!("../../docs/operations.md");
        let commands = |text: &'static str, heading: &str| {
            let section = text.split(heading).nth(1).unwrap();
            let lines = section.lines().filter_map(|line| line.strip_prefix("$ "));
            lines.map(|line| line.split(" #").next().unwrap().trim())
        };
        let mut installing = commands(readme, "## Install and enforce");
        assert_eq!(installing.next(), Some("cargo xtask dist"));
        let mut next = || installing.next().unwrap().strip_prefix("sudo ").unwrap();
        let install = next();
        let (check, start_filter, status, enforce, reload) =
            (next(), next(), next(), next(), next());
        assert_eq!(next(), status);
        let mut operating = commands(operations, "## The package");
        let mut next = || operating.next().unwrap().strip_prefix("sudo ").unwrap();
        Self {
            package: install.strip_prefix("apt install ./").unwrap(),
            install,
            check,
            start_filter,
            status,
            enforce,
            reload,
            start_gate: next(),
            start_steered: next(),
            unpack: next(),
            take_in: [next(), next(), next()],
        }
    }
}
