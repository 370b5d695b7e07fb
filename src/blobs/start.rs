//! The first look at a bucket: a service that is away is waited for, and what is wrong with the options is said at once.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::blobs::Keys;
use crate::blobs::error::{BlobError, OpenError};
use crate::blobs::s3::{Service, endpoint};
use crate::config;
use crate::model::ids::AttachmentId;
use crate::tasks::jittered;

/// The pause between two looks at a service that is away, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// For so long, from when it is first missed, a bucket that the server makes is waited for: one that was just made, here or
/// by another node, is not seen everywhere at once.
const SEEN_WITHIN: Duration = Duration::from_secs(60);

/// What an answer means for the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StartError {
    /// The service will be there again, or a bucket that was just made will be seen.
    Passing,
    NoBucket,
    Credentials,
    Denied,
    Options,
}

/// Ends when the bucket can be used. Only what an operator has to put right is an error.
pub(super) async fn until_usable(
    service: &Service,
    config: &config::Attachments,
    keys: &Keys,
) -> Result<(), OpenError> {
    let (bucket, endpoint) = (config.bucket.clone(), endpoint(config));
    if let Err(cause) = service.check_credentials().await {
        return Err(OpenError::Credentials { endpoint, cause });
    }
    let (mut pause, mut made, mut until) = (FIRST_PAUSE, false, None);
    loop {
        let Err(mut cause) = probe(service, keys).await else { return Ok(()) };
        let mut trouble = StartError::of(&cause);
        let is_missing = trouble == StartError::NoBucket && config.create_bucket;
        // The time counts from when the service first says so: it may have been away for long.
        if is_missing && Instant::now() < *until.get_or_insert_with(|| Instant::now() + SEEN_WITHIN) {
            match service.create_bucket().await {
                Ok(()) if !made => {
                    info!(bucket, "the bucket was made");
                    made = true;
                    continue;
                }
                // Made before, and still not seen.
                Ok(()) => trouble = StartError::Passing,
                Err(error) => {
                    trouble = StartError::of(&error);
                    cause = error;
                }
            }
        }
        match trouble {
            StartError::Passing => warn!(endpoint, %cause, "the attachment storage is waited for"),
            StartError::NoBucket => return Err(OpenError::Missing { bucket, endpoint }),
            StartError::Credentials => return Err(OpenError::Credentials { endpoint, cause }),
            StartError::Denied => return Err(OpenError::Denied { bucket, endpoint, cause }),
            StartError::Options => return Err(OpenError::Options { bucket, endpoint, cause }),
        }
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Asks what will be asked later, and whether the bucket is there: not every service says so when it lists.
async fn probe(service: &Service, keys: &Keys) -> Result<(), BlobError> {
    service.uploads(&keys.of(AttachmentId::random())).await?;
    service.head_bucket().await
}

impl StartError {
    fn of(cause: &BlobError) -> Self {
        if cause.is_no_answer() {
            return Self::Passing;
        }
        match (cause.status(), cause.code()) {
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken") | (Some(401), _) => {
                Self::Credentials
            }
            (_, "RequestTimeTooSkewed" | "AuthorizationHeaderMalformed" | "PermanentRedirect") => Self::Options,
            (Some(403), _) => Self::Denied,
            (Some(404), _) => Self::NoBucket,
            // 409: another node has made the bucket meanwhile.
            (Some(409 | 429 | 500 | 502 | 503 | 504), _) => Self::Passing,
            _ => Self::Options,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_waited_out_or_reported_to_the_operator() {
        for (status, code, expected) in [
            (503, "SlowDown", StartError::Passing),
            (409, "BucketAlreadyOwnedByYou", StartError::Passing),
            (404, "NoSuchBucket", StartError::NoBucket),
            (403, "SignatureDoesNotMatch", StartError::Credentials),
            (403, "AccessDenied", StartError::Denied),
            (403, "RequestTimeTooSkewed", StartError::Options),
            (301, "PermanentRedirect", StartError::Options),
            (501, "NotImplemented", StartError::Options),
        ] {
            let cause = BlobError::answer(status, &format!("<Code>{code}</Code>"));
            assert_eq!(StartError::of(&cause), expected, "{code}");
        }
        assert_eq!(StartError::of(&BlobError::late()), StartError::Passing);
        assert_eq!(StartError::of(&BlobError::other("not S3")), StartError::Options);
    }
}
