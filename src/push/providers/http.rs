//! How providers are called: without redirects, with a limit for the time and for what is read of the answer.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, ClientBuilder, Response};

use crate::clock::Timestamp;
use crate::push::PushError;
use crate::push::providers::names::Names;

/// One call, from its start to the end of the answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// No answer that we understand is longer.
const MAX_ANSWER: usize = 64 << 10;
/// No provider makes us wait for longer.
const MAX_WAIT: Duration = Duration::from_hours(6);

/// A client that also trusts the authorities of this file.
pub(super) fn client(ca_file: Option<&Path>) -> Result<ClientBuilder, PushError> {
    let mut builder = Client::builder()
        // A proxy would look names up itself, and what is allowed to be called would no longer be ours to say.
        .no_proxy()
        // Web Push replaces it by one that looks at the addresses.
        .dns_resolver(Arc::new(Names::of_the_system()))
        .redirect(Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(TIMEOUT)
        .pool_idle_timeout(Duration::from_mins(5))
        .user_agent(concat!("obscura-server/", env!("CARGO_PKG_VERSION")));
    if let Some(file) = ca_file {
        let unusable = |what: String| PushError::File { option: "--push-ca-file", path: file.to_owned(), what };
        let pem = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
        let authorities = Certificate::from_pem_bundle(&pem).map_err(|_| unusable("it is no PEM file".to_owned()))?;
        builder = builder.tls_certs_merge(authorities);
    }
    Ok(builder)
}

/// The body of an answer; what is longer than any that we understand is cut.
pub(super) async fn body(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = MAX_ANSWER - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() >= room {
            break;
        }
    }
    body
}

/// How long the answer asks to wait: a number of seconds, or a date.
pub(super) fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let until = httpdate::parse_http_date(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
            until.saturating_sub(now.since_epoch())
        }
    };
    Some(wait.min(MAX_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_asked_for_in_seconds_or_by_a_date_and_has_a_limit() {
        let now = Timestamp::from_seconds(1_445_412_480);
        let wait = |text: &str| {
            let headers = [(RETRY_AFTER, text.parse().unwrap())].into_iter().collect();
            retry_after(&headers, now)
        };
        assert_eq!(wait("120"), Some(Duration::from_mins(2)));
        assert_eq!(wait("Wed, 21 Oct 2015 07:28:30 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(wait("Wed, 21 Oct 2015 07:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wait("99999999"), Some(MAX_WAIT));
        assert_eq!(wait("soon"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
