//! A host with a filter and without a gate, and what it reports of itself.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::daemon::{self, Pullgate};
use crate::net::{INTERFACE, Network};
use crate::pki::Pki;

/// A host with a filter and without a gate.
pub struct Origin {
    _filter: Pullgate,
    /// The configuration file.
    pub config: PathBuf,
    /// Its certificates.
    pub pki: Pki,
    /// The namespaces.
    pub network: Arc<Network>,
}

impl Origin {
    /// Rewrites the configuration, which the filter does not read again: with these lines in `[filter]`, and others.
    pub fn configure(&self, filter: &str, others: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        let text = text.split("[[gate.host]]").next().unwrap();
        let (before, rest) = text.split_once("[filter]").unwrap();
        let (_, ranges) = rest.split_once("[ranges]").unwrap();
        let interfaces = if filter.contains("interfaces") {
            String::new()
        } else {
            format!("interfaces = [\"{INTERFACE}\"]")
        };
        let text = format!("{before}[filter]\n{interfaces}\n{filter}\n[ranges]{ranges}{others}");
        fs::write(&self.config, text).unwrap();
    }

    /// A host of the gate's.
    #[must_use]
    pub fn gate(&self) -> String {
        let pki = self.network.path("pki");
        let pki = pki.display();
        format!(
            "[[gate.host]]\nnames = [\"shop.example\"]\ncertificate = \"{pki}/shop.example.pem\"\n\
             key = \"{pki}/shop.example.key\"\ntrust = [\"{pki}/ours-ca.pem\"]\nupstream = \"127.0.0.1:8080\"\n"
        )
    }

    /// What `check` warns of.
    #[must_use]
    pub fn check(&self) -> String {
        let output = daemon::output(&self.network, &self.config, &["check"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// The filter runs, and enforces.
    #[must_use]
    pub fn new() -> Self {
        let network = Arc::new(Network::new());
        let pki = Pki::new(&network.path("pki"));
        let config = network.path("pullgate.toml");
        let directory = network.path("").display().to_string();
        let directory = directory.trim_end_matches('/');
        let text = format!(
            "[paths]\nrun = \"{directory}/run\"\nstate = \"{directory}/state\"\n\
             bpf = \"{directory}/bpf/pullgate\"\nfilter = \"{directory}/filter\"\n\
             [filter]\ninterfaces = [\"{INTERFACE}\"]\n\
             [ranges]\nonly = true\nstatic = [\"173.245.48.0/20\", \"2400:cb00::/32\"]\n"
        );
        fs::write(&config, text).unwrap();
        Self {
            _filter: Pullgate::start_all(&network, &config),
            config,
            pki,
            network,
        }
    }

    /// As JSON, and as a text of all warnings.
    #[must_use]
    pub fn status(&self) -> (Value, String) {
        let output = daemon::output(&self.network, &self.config, &["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        let warnings = status["findings"].to_string();
        (status, warnings)
    }

    /// What `doctor` finds: its exit code, and its report.
    #[must_use]
    pub fn doctor(&self) -> (i32, Value) {
        let output = daemon::output(&self.network, &self.config, &["--json", "doctor"]);
        let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error}: {}", String::from_utf8_lossy(&output.stderr));
        });
        (output.status.code().unwrap(), report)
    }
}

impl Default for Origin {
    fn default() -> Self {
        Self::new()
    }
}
