//! The look, again and again: printed each time, and served to Prometheus as it was last.

use std::fmt;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::target::ProbeError;
use crate::commands::examination::{Examination, Standing};
use crate::commands::output::complain;
use crate::control::http::Listener;
use crate::control::server::MetricsPage;
use crate::report::Failure;

/// Looks until SIGTERM or SIGINT, and returns what the last look came to.
pub(super) fn repeat(
    interval: Duration,
    metrics: Option<SocketAddr>,
    look: impl Fn() -> Result<Vec<Examination>, Failure> + Send + Sync + 'static,
) -> Result<ExitCode, Failure> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|_without| ProbeError::Ended)?;
    let code = runtime.block_on(watch(interval, metrics, Arc::new(look)));
    // A look that is under way is not waited for.
    runtime.shutdown_background();
    code
}

async fn watch(
    interval: Duration,
    metrics: Option<SocketAddr>,
    look: Arc<impl Fn() -> Result<Vec<Examination>, Failure> + Send + Sync + 'static>,
) -> Result<ExitCode, Failure> {
    let last = Arc::new(MetricsPage::default());
    let _serving = match metrics {
        Some(address) => {
            let listener = Listener::tcp(address);
            let listener = listener.map_err(|source| ProbeError::Metrics { address, source })?;
            Some(AbortOnDropHandle::new(tokio::spawn(
                listener.serve(Arc::clone(&last)),
            )))
        }
        None => None,
    };
    let signals = signal(SignalKind::terminate())
        .and_then(|terminate| Ok((terminate, signal(SignalKind::interrupt())?)));
    let (mut terminate, mut interrupt) = signals.map_err(|_without| ProbeError::Ended)?;
    let (mut code, mut is_first) = (ExitCode::SUCCESS, true);
    loop {
        let looking = spawn_blocking({
            let look = Arc::clone(&look);
            move || look()
        });
        tokio::select! {
            looked = looking => {
                match looked.map_err(|_panic| ProbeError::Ended)? {
                    Ok(examined) => {
                        code = Examination::exit_code(&examined);
                        last.replace(metrics_of(&examined).map_err(|_unwritable| ProbeError::Ended)?);
                        is_first = false;
                    }
                    Err(failure) if is_first => return Err(failure),
                    // A file may be there again at the next look; the metric of the last one has its time.
                    Err(failure) => complain(&failure.text),
                }
            }
            _ = terminate.recv() => return Ok(code),
            _ = interrupt.recv() => return Ok(code),
        }
        tokio::select! {
            () = sleep(interval) => {}
            _ = terminate.recv() => return Ok(code),
            _ = interrupt.recv() => return Ok(code),
        }
    }
}

/// What a look has shown, as Prometheus reads it.
fn metrics_of(examined: &[Examination]) -> Result<String, fmt::Error> {
    let answers: Family<AnswerLabels, Gauge> = Family::default();
    for examination in examined {
        for check in &examination.checks {
            for standing in Standing::ALL {
                let labels = AnswerLabels {
                    subject: examination.subject.clone(),
                    question: check.id,
                    answer: standing.label(),
                };
                let is_so = i64::from(check.standing() == standing);
                answers.get_or_create(&labels).set(is_so);
            }
        }
    }
    let time: Gauge<f64, AtomicU64> = Gauge::default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    time.set(now.unwrap_or_default().as_secs_f64());
    let mut registry = Registry::with_prefix("pullgate_probe");
    registry.register(
        "answer",
        "1 for the answer to a question, 0 for all others",
        answers,
    );
    let about = "When the last look ended, since 1970";
    registry.register_with_unit("last_look_timestamp", about, Unit::Seconds, time);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct AnswerLabels {
    subject: String,
    question: &'static str,
    answer: &'static str,
}
