//! What can go wrong with the storage, told without the names of objects.

use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};

use object_store::client::{HttpError, HttpErrorKind};

use crate::limits::NoRoom;

/// The storage could not do what it was asked.
///
/// The library's own errors name the object, and who knows the name of an attachment may read it. So only what is
/// harmless of them is kept.
pub struct BlobError(Cause);

enum Cause {
    /// The operating system failed.
    System(io::Error),
    /// The storage service answered, with this status and, if it gave one, code.
    Answer { status: u16, code: Option<String> },
    /// No answer came. The text is that of the lowest layer.
    Network { kind: HttpErrorKind, text: String },
    /// The service did not do it within our own limit.
    Late,
    /// Something that is not foreseen.
    Other(&'static str),
}

impl BlobError {
    /// An answer that says no.
    pub(super) fn answer(status: u16, body: &str) -> Self {
        Self(Cause::Answer { status, code: code_in(body) })
    }

    /// A request that took longer than it may.
    pub(super) fn late() -> Self {
        Self(Cause::Late)
    }

    fn network(error: &HttpError) -> Self {
        let mut lowest: &dyn Error = error;
        while let Some(cause) = lowest.source() {
            lowest = cause;
        }
        Self(Cause::Network { kind: error.kind(), text: lowest.to_string() })
    }

    pub(super) fn other(text: &'static str) -> Self {
        Self(Cause::Other(text))
    }

    /// True when the disk or a quota stopped a write.
    pub fn is_full(&self) -> bool {
        match &self.0 {
            Cause::System(error) => matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded),
            Cause::Answer { status: 507, .. } => true,
            Cause::Answer { code: Some(code), .. } => {
                matches!(code.as_str(), "XMinioStorageFull" | "XMinioAdminBucketQuotaExceeded" | "QuotaExceeded")
            }
            _ => false,
        }
    }

    /// True when the storage may still carry out what it did not answer. Whatever is tidied up now may then come too
    /// early.
    pub fn may_still_happen(&self) -> bool {
        match &self.0 {
            Cause::Network { kind, .. } => *kind != HttpErrorKind::Connect,
            Cause::Late | Cause::Answer { status: 500 | 502 | 504, .. } => true,
            _ => false,
        }
    }

    /// True when the service could not be reached, or did not answer in time.
    pub(super) fn is_no_answer(&self) -> bool {
        matches!(self.0, Cause::Network { .. } | Cause::Late)
    }

    /// True when an answer came that is no refusal, and not what was asked for.
    pub(super) fn is_misunderstood(&self) -> bool {
        matches!(self.0, Cause::Other(_))
    }

    /// The status of the service's answer, if there was one.
    pub(super) fn status(&self) -> Option<u16> {
        if let Cause::Answer { status, .. } = &self.0 { Some(*status) } else { None }
    }

    /// The code of the service's answer, or nothing.
    pub(super) fn code(&self) -> &str {
        if let Cause::Answer { code: Some(code), .. } = &self.0 { code } else { "" }
    }

    /// True when the answer says that an upload or object isn't there, as opposed to the bucket.
    pub(super) fn is_of_missing_object(&self) -> bool {
        self.status() == Some(404) && self.code() != "NoSuchBucket"
    }
}

impl fmt::Display for BlobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the attachment storage failed: ")?;
        match &self.0 {
            Cause::System(error) => fmt::Display::fmt(error, f),
            Cause::Answer { status, code: Some(code) } => write!(f, "it answered {status} {code}"),
            Cause::Answer { status, code: None } => write!(f, "it answered {status}"),
            Cause::Network { text, .. } => write!(f, "no answer ({text})"),
            Cause::Late => f.write_str("no answer in time"),
            Cause::Other(text) => f.write_str(text),
        }
    }
}

impl fmt::Debug for BlobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobError({self})")
    }
}

impl Error for BlobError {}

impl From<object_store::Error> for BlobError {
    fn from(error: object_store::Error) -> Self {
        if let Some(error) = within::<HttpError>(&error) {
            return Self::network(error);
        }
        if let Some(error) = within::<io::Error>(&error) {
            let copy = error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
            return Self(Cause::System(copy));
        }
        let text = error.to_string();
        match (status_in(&text), code_in(&text), error) {
            (Some(status), code, _) => Self(Cause::Answer { status, code }),
            // S3 has answers that begin well and turn out to be errors.
            (None, code @ Some(_), _) => Self(Cause::Answer { status: 200, code }),
            (None, None, object_store::Error::NotFound { .. }) => Self::other("not found"),
            (None, None, _) => Self::other("an unexpected answer"),
        }
    }
}

impl From<HttpError> for BlobError {
    fn from(error: HttpError) -> Self {
        Self::network(&error)
    }
}

impl From<io::Error> for BlobError {
    fn from(error: io::Error) -> Self {
        Self(Cause::System(error))
    }
}

/// The first cause of this type.
fn within<T: Error + 'static>(error: &object_store::Error) -> Option<&T> {
    let mut cause: &(dyn Error + 'static) = error;
    loop {
        match cause.downcast_ref() {
            Some(found) => return Some(found),
            None => cause = cause.source()?,
        }
    }
}

/// The library tells the status of an answer in words only.
fn status_in(text: &str) -> Option<u16> {
    let (_, behind) = text.rsplit_once("status code: ")?;
    behind.get(..3)?.parse().ok()
}

/// S3's own word for what is wrong, from its answer or from the library's words about one object of several.
fn code_in(text: &str) -> Option<String> {
    let between = |begin, end| Some(text.split_once(begin)?.1.split_once(end)?.0);
    let code = between("<Code>", "</Code>").or_else(|| between("(code: ", ")"))?;
    let is_a_word = code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (is_a_word && !code.is_empty()).then(|| code.to_owned())
}

/// Why an upload came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The client broke it off, or sent fewer or more bytes than it had announced.
    #[error("the upload was broken off or has not the announced length")]
    Body,
    /// Other uploads hold all the memory that there is for them.
    #[error("there is no room for another upload at the moment")]
    NoRoom,
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] BlobError),
}

impl From<NoRoom> for UploadError {
    fn from(_: NoRoom) -> Self {
        Self::NoRoom
    }
}

/// Why the storage could not be opened. Each says in one sentence what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder can't be made, read or written.
    #[error(
        "the attachment folder {path} can't be used: {cause}; check that it is a writable folder, or choose another with --storage-endpoint file:PATH"
    )]
    Unusable {
        /// The folder.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// An object can't have such a name.
    #[error("--attachment-prefix {prefix:?} can't begin the name of an object: {cause}")]
    Prefix {
        /// What was given.
        prefix: String,
        /// What is wrong with it.
        cause: object_store::path::Error,
    },
    /// The options don't describe a bucket.
    #[error("--storage-endpoint {endpoint} and --storage-bucket {bucket} don't make the address of a bucket")]
    Address {
        /// What was given, or Amazon's.
        endpoint: String,
        /// What was given.
        bucket: String,
    },
    /// There is no such bucket.
    #[error(
        "the bucket {bucket} does not exist at {endpoint}; create it, name another with --storage-bucket, or have the server make it with --storage-create-bucket"
    )]
    Missing {
        /// The bucket.
        bucket: String,
        /// Where it should be.
        endpoint: String,
    },
    /// There are no credentials, or not these.
    #[error(
        "the attachment storage at {endpoint} can't be used with these credentials: {cause}; check --storage-access-key and --storage-secret-key or, without them, what the surroundings give (AWS_ACCESS_KEY_ID and so on, or the role of this machine)"
    )]
    Credentials {
        /// The service.
        endpoint: String,
        /// What it said.
        cause: BlobError,
    },
    /// The credentials are right, but not enough.
    #[error(
        "the bucket {bucket} at {endpoint} refuses these credentials ({cause}); they have to be allowed to list the bucket and its multipart uploads, to get, put and delete objects, to abort multipart uploads and, for --storage-create-bucket, to create buckets"
    )]
    Denied {
        /// The bucket.
        bucket: String,
        /// The service.
        endpoint: String,
        /// What it said.
        cause: BlobError,
    },
    /// Something else is wrong with the options.
    #[error(
        "the bucket {bucket} can't be used at {endpoint}: {cause}; check --storage-endpoint, --storage-region, --storage-force-path-style and the clock of this machine"
    )]
    Options {
        /// The bucket.
        bucket: String,
        /// The service.
        endpoint: String,
        /// What it said.
        cause: BlobError,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, code: &str) -> BlobError {
        BlobError::answer(status, &format!("<Error><Code>{code}</Code><Key>secret</Key></Error>"))
    }

    #[test]
    fn a_full_disk_is_told_apart_from_other_trouble() {
        let error = |kind: ErrorKind| BlobError::from(io::Error::from(kind));
        assert!(error(ErrorKind::StorageFull).is_full());
        assert!(error(ErrorKind::QuotaExceeded).is_full());
        assert!(!error(ErrorKind::PermissionDenied).is_full());
        assert!(answer(507, "Anything").is_full());
        assert!(answer(503, "XMinioStorageFull").is_full());
        assert!(!answer(503, "SlowDown").is_full());
    }

    #[test]
    fn only_what_was_not_answered_may_still_happen() {
        assert!(BlobError::late().may_still_happen());
        assert!(answer(504, "").may_still_happen());
        assert!(!answer(503, "SlowDown").may_still_happen());
        assert!(!answer(403, "AccessDenied").may_still_happen());
        assert!(!BlobError::from(io::Error::from(ErrorKind::StorageFull)).may_still_happen());
    }

    #[test]
    fn an_answer_is_told_by_its_status_and_code_alone() {
        assert!(answer(403, "AccessDenied").to_string().ends_with("it answered 403 AccessDenied"));
        assert!(answer(403, "not/a word").to_string().ends_with("it answered 403"));
        let library = object_store::Error::Generic {
            store: "S3",
            source: "Error performing PUT http://x/secret - Server returned non-2xx status code: 503 Service \
                     Unavailable: <Error><Code>SlowDown</Code></Error>"
                .into(),
        };
        assert!(BlobError::from(library).to_string().ends_with("it answered 503 SlowDown"));
    }
}
