//! Counts and times requests, by the template of their route and never by what was asked for.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use crate::api::ROUTES;
use crate::app::App;
use crate::telemetry::metrics::{self, ActiveGuard, Class, Metrics, Refusal};

/// The route of a request that has none.
const UNMATCHED: &str = "unmatched";

/// Measures a request from its head to its answer's head. The innermost reason of a refusal is what counts.
pub(super) async fn record_metrics(State(app): State<App>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or(UNMATCHED, |path| template(path.as_str()));
    let method = method(request.method());
    let mut unanswered =
        Unanswered { metrics: &app.metrics, is_answered: false, _active: app.metrics.requests_active.hold(()) };
    let start = Instant::now();
    let response = next.run(request).await;
    unanswered.is_answered = true;
    app.metrics.requests.time(route, method, class(response.status()), start.elapsed());
    if let Some(refusal) = response.extensions().get::<Refusal>() {
        app.metrics.refusals.increment(*refusal);
    }
    response
}

/// A request without an answer. Dropped so, its client has hung up.
struct Unanswered<'a> {
    metrics: &'a Metrics,
    is_answered: bool,
    _active: ActiveGuard,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.metrics.refusals.increment(Refusal::Abandoned);
        }
    }
}

/// The same text, from the table of routes.
fn template(path: &str) -> &'static str {
    ROUTES.iter().find(|route| route.path == path).map_or(UNMATCHED, |route| route.path)
}

fn method(method: &Method) -> metrics::Method {
    match *method {
        Method::GET => metrics::Method::Get,
        Method::HEAD => metrics::Method::Head,
        Method::POST => metrics::Method::Post,
        Method::PUT => metrics::Method::Put,
        Method::DELETE => metrics::Method::Delete,
        _ => metrics::Method::Other,
    }
}

fn class(status: StatusCode) -> Class {
    match status.as_u16() {
        ..200 => Class::Informational,
        200..300 => Class::Success,
        300..400 => Class::Redirection,
        400..500 => Class::ClientError,
        500.. => Class::ServerError,
    }
}
