//! The sockets of the roles: bound before anything is attached, and removed at the end.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::error::StartError;
use super::reporter::Reporter;
use super::tasks::Tasks;
use crate::config::{Boot, Target};
use crate::control::http::Listener;
use crate::control::server::{ControlService, Looks, MetricsService, StatusService};
use crate::host::socket::BoundPath;
use crate::observe::Finding;
use crate::role::Role;

/// The sockets of one role.
pub(super) struct RoleSockets {
    status: Listener,
    control: Listener,
    /// Where metrics are served, or why they are not; none, if they need not be.
    metrics: Option<Result<Listener, Finding>>,
}

impl RoleSockets {
    /// Binds them. Metrics keep no host from being protected: without them it goes on.
    pub(super) fn bind(
        role: Role,
        boot: &Boot,
        paths: &mut Vec<BoundPath>,
    ) -> Result<Self, StartError> {
        let blame = |path: &Path, source| StartError::socket(path, source);
        let path = boot.paths.socket(role);
        let status = Listener::unix(&path).map_err(|error| blame(&path, error))?;
        paths.push(BoundPath::new(&path));
        let private = boot.paths.control_socket(role);
        let control = Listener::private(&private).map_err(|error| blame(&private, error))?;
        paths.push(BoundPath::new(&private));
        let metrics = boot.metrics.get(&role).map(|target| {
            let bound = match &target.value {
                Target::Tcp(address) => Listener::tcp(*address),
                Target::Unix(named) => {
                    Listener::unix(named).inspect(|_| paths.push(BoundPath::new(named)))
                }
            };
            bound.map_err(|error| {
                let finding = metrics_disabled(&error).at(&target.place);
                finding.log();
                finding
            })
        });
        Ok(Self {
            status,
            control,
            metrics,
        })
    }

    /// Why metrics are not served, if they should be.
    pub(super) fn metrics_disabled(&self) -> Option<Finding> {
        let metrics = self.metrics.as_ref()?;
        metrics.as_ref().err().cloned()
    }

    /// Serves what a role answers.
    pub(super) fn serve(self, reporter: Reporter, tasks: &Tasks) {
        let reporter = Arc::new(reporter);
        let looks = Looks::new(Arc::clone(&reporter));
        let status = Arc::new(StatusService(looks.clone()));
        tasks.spawn(self.status.serve(status));
        let control = Arc::new(ControlService(reporter));
        tasks.spawn(self.control.serve(control));
        if let Some(Ok(listener)) = self.metrics {
            tasks.spawn(listener.serve(Arc::new(MetricsService(looks))));
        }
    }
}

/// Why metrics are not served, and what helps.
fn metrics_disabled(error: &io::Error) -> Finding {
    // systemd.exec(5), RestrictAddressFamilies=.
    let remedy = if error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error()) {
        "the service may open no such port; use a UNIX socket, or for the filter copy \
             /usr/share/doc/pullgate/monitoring/filter-metrics.conf to \
             /etc/systemd/system/pullgate-filter.service.d/"
    } else {
        "is the port free, or the socket's directory there and this role's to write?"
    };
    let text = format!("metrics endpoint disabled until restart ({error})");
    Finding::warning("metrics-disabled", text).remedy(remedy)
}
