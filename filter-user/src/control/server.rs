//! What is served at the sockets of a role: paths in, answers out.

use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use tokio::sync::{AcquireError, Semaphore};
use tokio::task::{JoinError, spawn_blocking};
use tracing::{info, warn};

use super::http::Service;
use super::instruction::{Declined, EXIT_STATUS, Instruction};
use super::protocol::{RangeUseStatus, RefreshStatus, Status};
use crate::observe::Finding;
use crate::role::Role;
use crate::sync::lock;

/// A running role, as its sockets see it.
pub trait Answers: Send + Sync + 'static {
    /// Which role it is.
    fn role(&self) -> Role;
    /// Its status. Looks at the host, and blocks.
    fn status(&self) -> Status;
    /// Its metrics, in the OpenMetrics text format. Looks at the host, and blocks.
    fn metrics(&self) -> String;
    /// What keeps it from protecting as it should; nothing, if it does. Looks at the host, and blocks.
    fn readiness(&self) -> Vec<Finding>;
    /// What of it does not answer; nothing, if all of it does.
    fn health(&self) -> impl Future<Output = Vec<Finding>> + Send;
    /// What was seen of ranges that have vanished.
    fn range_usage(&self) -> Vec<RangeUseStatus>;
    /// Does what it is instructed to, and returns when that is done.
    fn follow(
        &self,
        instruction: Instruction,
    ) -> impl Future<Output = Result<Vec<RefreshStatus>, Declined>> + Send;
}

/// A role, and how many of its looks at the host there may be at once: a client that leaves ends none.
pub struct Looks<A> {
    answers: Arc<A>,
    permits: Arc<Semaphore>,
}

impl<A> Clone for Looks<A> {
    fn clone(&self) -> Self {
        Self {
            answers: Arc::clone(&self.answers),
            permits: Arc::clone(&self.permits),
        }
    }
}

impl<A: Answers> Looks<A> {
    /// No look is under way.
    #[must_use]
    pub fn new(answers: Arc<A>) -> Self {
        let permits = Arc::new(Semaphore::new(LOOKS_MAX));
        Self { answers, permits }
    }

    /// Looks, when it is this one's turn.
    async fn look<T: Send + 'static>(&self, look: fn(&A) -> T) -> Result<T, LookError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await?;
        let answers = Arc::clone(&self.answers);
        let looking = spawn_blocking(move || {
            let _permit = permit;
            look(&answers)
        });
        Ok(looking.await?)
    }
}

/// Why a look came to nothing.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Closed(#[from] AcquireError),
    #[error(transparent)]
    Failed(#[from] JoinError),
}

/// What monitoring asks for.
pub struct MetricsService<A>(pub Looks<A>);

impl<A: Answers> Service for MetricsService<A> {
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if let Some(refusal) = read_only(&request) {
            return refusal;
        }
        match request.uri().path() {
            "/metrics" => {
                let text = self.0.look(A::metrics).await;
                text.map_or_else(failed, |text| respond(StatusCode::OK, OPEN_METRICS, text))
            }
            "/healthz" => judge(&self.0.answers.health().await),
            "/readyz" => {
                let findings = self.0.look(A::readiness).await;
                findings.map_or_else(failed, |findings| judge(&findings))
            }
            _ => unknown("/metrics, /healthz or /readyz"),
        }
    }
}

/// What anybody asks for who may.
pub struct StatusService<A>(pub Looks<A>);

impl<A: Answers> Service for StatusService<A> {
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if let Some(refusal) = read_only(&request) {
            return refusal;
        }
        match request.uri().path() {
            "/status" => {
                let status = self.0.look(A::status).await;
                status.map_or_else(failed, |status| json(&status))
            }
            "/findings" => {
                let status = self.0.look(A::status).await;
                status.map_or_else(failed, |status| json(&status.findings))
            }
            "/range-usage" => json(&self.0.answers.range_usage()),
            _ => unknown("/status, /findings or /range-usage"),
        }
    }
}

/// What root instructs a role to do.
pub struct ControlService<A>(pub Arc<A>);

impl<A: Answers> Service for ControlService<A> {
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if *request.method() != Method::POST {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "POST only\n".to_owned());
        }
        let (head, body) = request.into_parts();
        let body = match Limited::new(body, BODY_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return plain(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let path = head.uri.path();
        let instruction = match Instruction::parse(path, &body) {
            Ok(Some(instruction)) => instruction,
            Ok(None) => {
                return unknown(
                    "/reload, /confirm, /end-trial, /refresh, /approve, /log-level or /stop",
                );
            }
            Err(error) => return plain(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let role = self.0.role().label();
        info!(id = "instructed", role, instruction = path, "instructed");
        match self.0.follow(instruction).await {
            Ok(refreshed) => json(&refreshed),
            Err(declined) => {
                let (status, text, exit_status) = declined.into_parts();
                warn!(
                    id = "instruction-declined",
                    role,
                    instruction = path,
                    reason = text,
                    "declined"
                );
                let mut response = plain(status, text);
                if let Some(exit_status) = exit_status {
                    let headers = response.headers_mut();
                    headers.insert(EXIT_STATUS, HeaderValue::from(u16::from(exit_status)));
                }
                response
            }
        }
    }
}

/// Why a request that would change something is refused.
fn read_only(request: &Request<Incoming>) -> Option<Response<Full<Bytes>>> {
    let is_read_only = matches!(*request.method(), Method::GET | Method::HEAD);
    (!is_read_only).then(|| {
        let text = "GET or HEAD only\n".to_owned();
        plain(StatusCode::METHOD_NOT_ALLOWED, text)
    })
}

fn judge(findings: &[Finding]) -> Response<Full<Bytes>> {
    match findings {
        [] => plain(StatusCode::OK, "ok\n".to_owned()),
        findings => {
            let lines = findings.iter().map(|finding| format!("{finding}\n"));
            plain(StatusCode::SERVICE_UNAVAILABLE, lines.collect())
        }
    }
}

/// Metrics that were made beforehand, by a look that takes its time.
#[derive(Debug, Default)]
pub struct MetricsPage {
    text: Mutex<String>,
}

impl MetricsPage {
    /// Shows these from now on.
    pub fn replace(&self, text: String) {
        *lock(&self.text) = text;
    }
}

impl Service for MetricsPage {
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match request.uri().path() {
            "/metrics" => respond(StatusCode::OK, OPEN_METRICS, lock(&self.text).clone()),
            _ => unknown("/metrics"),
        }
    }
}

fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_string(value) {
        Ok(text) => respond(StatusCode::OK, JSON, text),
        Err(error) => failed(error),
    }
}

fn unknown(known: &str) -> Response<Full<Bytes>> {
    plain(StatusCode::NOT_FOUND, format!("{known}\n"))
}

fn failed(error: impl std::error::Error) -> Response<Full<Bytes>> {
    plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    respond(status, PLAIN, text)
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

const JSON: &str = "application/json";
const PLAIN: &str = "text/plain; charset=utf-8";
/// The OpenMetrics specification, version 1.0.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Looks at once.
const LOOKS_MAX: usize = 2;
/// Bytes of an instruction: IDs of lists.
const BODY_MAX: usize = 64 << 10;
