//! The requests to an S3 service that `object_store` has no methods for, signed with its own signer.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsAuthorizer};
use object_store::client::{HttpClient, HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector};
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use serde::Deserialize;
use tokio::time::timeout;

use crate::blobs::error::{BlobError, OpenError};
use crate::config;

/// A service that can't be reached in this time is away.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// What is taken from the surroundings when the options name no key: who we are, and who can tell.
const CREDENTIALS: &[AmazonS3ConfigKey] = &[
    AmazonS3ConfigKey::AccessKeyId,
    AmazonS3ConfigKey::SecretAccessKey,
    AmazonS3ConfigKey::Token,
    AmazonS3ConfigKey::WebIdentityTokenFile,
    AmazonS3ConfigKey::RoleArn,
    AmazonS3ConfigKey::RoleSessionName,
    AmazonS3ConfigKey::StsEndpoint,
    AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
    AmazonS3ConfigKey::ContainerCredentialsFullUri,
    AmazonS3ConfigKey::ContainerAuthorizationTokenFile,
    AmazonS3ConfigKey::MetadataEndpoint,
    AmazonS3ConfigKey::ImdsV1Fallback,
];
/// Longest silence of the service while it has to answer or to send.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);
/// Longest time of anything but a download's body, its repetitions included.
const LIMIT: Duration = Duration::from_secs(30);
/// How often a request is repeated that the service failed to answer or answered with 5xx.
const RETRIES: usize = 2;
/// The answers that are read whole are short; a longer one isn't from such a service.
const MAX_ANSWER_BYTES: usize = 4 << 20;
/// Listing and aborting is repeated so often, since a part that was under way may come in behind an abort.
const ABORT_ROUNDS: usize = 3;

/// A bucket and the way to it.
pub(super) struct Service {
    pub store: AmazonS3,
    /// The same bucket, without requests that delete several objects and without repetition: for what must not be done
    /// twice, such as beginning an upload.
    pub once: AmazonS3,
    client: HttpClient,
    region: String,
    /// The URL of the bucket itself, for requests that are not about one object.
    root: String,
}

/// Without the keys, which the library's own form has in it.
impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Service")
    }
}

/// Where a bucket is.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    /// What comes before `/` and the name of an object.
    objects: String,
    root: String,
}

impl Service {
    /// The bucket of these options. Nothing is asked for yet.
    pub fn new(config: &config::Attachments) -> Result<Self, OpenError> {
        let unusable = || OpenError::Address { endpoint: endpoint(config), bucket: config.bucket.clone() };
        let address = address(config).ok_or_else(unusable)?;
        let options = ClientOptions::new()
            .with_allow_http(address.root.starts_with("http:"))
            .with_connect_timeout(CONNECT_LIMIT)
            .with_read_timeout(SILENCE_LIMIT)
            // A download takes as long as its client does. Everything else is limited by `limited`.
            .with_timeout_disabled();
        let builder = match (&config.access_key, &config.secret_key) {
            (Some(key), Some(secret)) => {
                AmazonS3Builder::new().with_access_key_id(key.expose()).with_secret_access_key(secret.expose())
            }
            _ => from_surroundings(),
        };
        let backoff = BackoffConfig {
            init_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(2),
            ..BackoffConfig::default()
        };
        let retry = RetryConfig { backoff, max_retries: RETRIES, ..RetryConfig::default() };
        let builder = builder
            .with_bucket_name(&config.bucket)
            .with_region(&config.region)
            .with_endpoint(&address.objects)
            // Says to the builder that the bucket is in the endpoint already.
            .with_virtual_hosted_style_request(true)
            .with_client_options(options.clone())
            .with_retry(retry);
        let store = builder.clone().build().map_err(|_| unusable())?;
        let once = builder
            .with_credentials(store.credentials().clone())
            .with_disable_bulk_delete(true)
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() });
        let once = once.build().map_err(|_| unusable())?;
        let client = ReqwestConnector::default().connect(&options).map_err(|_| unusable())?;
        Ok(Self { store, once, client, region: config.region.clone(), root: address.root })
    }

    /// Succeeds when there are credentials, right or wrong.
    pub async fn check_credentials(&self) -> Result<(), BlobError> {
        limited(self.store.credentials().get_credential()).await.map(drop)
    }

    /// Has the service say that the bucket is there.
    pub async fn head_bucket(&self) -> Result<(), BlobError> {
        self.send("HEAD", &self.root, Bytes::new()).await.map(drop)
    }

    /// Makes the bucket.
    pub async fn create_bucket(&self) -> Result<(), BlobError> {
        // The oldest region is the default, and its own name isn't allowed here.
        let body = if self.region == "us-east-1" {
            String::new()
        } else {
            let region = quick_xml::escape::escape(&self.region);
            format!(
                "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
                 <LocationConstraint>{region}</LocationConstraint></CreateBucketConfiguration>"
            )
        };
        self.send("PUT", &self.root, body.into()).await.map(drop)
    }

    /// The ids of all multipart uploads to this object that are neither complete nor aborted.
    pub async fn uploads(&self, key: &Key) -> Result<Vec<String>, BlobError> {
        // The whole name as the prefix, without which some services answer nothing.
        let url = format!("{}?uploads=&prefix={}", self.root, encoded(key.as_ref()));
        let answer = self.send("GET", &url, Bytes::new()).await?;
        let listed: Listed =
            quick_xml::de::from_reader(&answer[..]).map_err(|_| BlobError::other("an answer that is not S3's"))?;
        Ok(listed.uploads.into_iter().filter(|upload| upload.key == key.as_ref()).map(|upload| upload.id).collect())
    }

    /// Aborts all multipart uploads to this object, also those that no node remembers. When it returns, there are none.
    pub async fn abort_uploads(&self, key: &Key) -> Result<(), BlobError> {
        for _ in 0..ABORT_ROUNDS {
            let uploads = self.uploads(key).await?;
            if uploads.is_empty() {
                return Ok(());
            }
            for upload in uploads {
                match limited(self.store.abort_multipart(key, &upload)).await {
                    Err(error) if !error.is_of_missing_object() => return Err(error),
                    _ => {}
                }
            }
        }
        Err(BlobError::other("an upload does not go away when it is aborted"))
    }

    /// Sends a request once and reads its answer, which is an error unless it is a success.
    async fn send(&self, method: &str, url: &str, body: Bytes) -> Result<Bytes, BlobError> {
        let unusable = || BlobError::other("a request that can't be built");
        let credential = limited(self.store.credentials().get_credential()).await?;
        let body = if body.is_empty() { HttpRequestBody::empty() } else { HttpRequestBody::from(body) };
        let mut request = HttpRequest::new(body);
        *request.method_mut() = method.parse().map_err(|_| unusable())?;
        *request.uri_mut() = url.parse().map_err(|_| unusable())?;
        AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(&mut request, None)?;
        let exchange = async {
            let (head, body) = self.client.execute(request).await?.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|_| BlobError::other("an answer that breaks off or has no end"))?.to_bytes();
            if head.status.is_success() {
                return Ok(body);
            }
            Err(BlobError::answer(head.status.as_u16(), &String::from_utf8_lossy(&body)))
        };
        timeout(LIMIT, exchange).await.unwrap_or_else(|_| Err(BlobError::late()))
    }
}

/// What the service has to be done with in a bounded time.
pub(super) async fn limited<T>(work: impl Future<Output = object_store::Result<T>>) -> Result<T, BlobError> {
    Ok(timeout(LIMIT, work).await.map_err(|_| BlobError::late())??)
}

/// Reads the variables with credentials, and no others: how the service is spoken to is for the options to say.
fn from_surroundings() -> AmazonS3Builder {
    let found = AmazonS3Builder::from_env();
    CREDENTIALS.iter().fold(AmazonS3Builder::new(), |builder, key| match found.get_config_value(key) {
        Some(value) => builder.with_config(*key, value),
        None => builder,
    })
}

/// The service of these options in words, without what may be secret in a URL.
pub(super) fn endpoint(config: &config::Attachments) -> String {
    match config.endpoint.as_deref().and_then(|url| url.split_once("://")) {
        Some((scheme, rest)) => {
            let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
            format!("{scheme}://{}", authority.rsplit('@').next().unwrap_or_default())
        }
        None => format!("https://s3.{}.amazonaws.com", config.region),
    }
}

/// Puts the bucket into the path or before the host's name, as the options want it.
fn address(config: &config::Attachments) -> Option<Address> {
    let endpoint = config.endpoint.clone().unwrap_or_else(|| endpoint(config));
    let (scheme, rest) = endpoint.trim_end_matches('/').split_once("://")?;
    let bucket = &config.bucket;
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if bucket.is_empty() || !bucket.bytes().all(is_name) || rest.is_empty() || rest.contains(['?', '#', '@', ' ']) {
        return None;
    }
    if config.force_path_style || rest.contains('/') || has_no_subdomains(rest) {
        let root = format!("{scheme}://{rest}/{bucket}");
        return Some(Address { objects: root.clone(), root });
    }
    let objects = format!("{scheme}://{bucket}.{rest}");
    Some(Address { root: format!("{objects}/"), objects })
}

/// An address in numbers can't have a bucket before it.
fn has_no_subdomains(authority: &str) -> bool {
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let host = authority.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(authority, |(host, _)| host);
    host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

/// A value in a query, with everything encoded that could have a meaning there.
fn encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let encode = |byte: u8| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}

#[derive(Deserialize)]
struct Listed {
    #[serde(default, rename = "Upload")]
    uploads: Vec<Upload>,
}

#[derive(Deserialize)]
struct Upload {
    #[serde(rename = "Key")]
    key: String,
    #[serde(rename = "UploadId")]
    id: String,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    use super::*;

    fn settings(url: Option<&str>, force_path_style: bool) -> config::Attachments {
        let mut attachments = Config::embedded(Path::new("/nowhere")).unwrap().attachments;
        attachments.endpoint = url.map(str::to_owned);
        attachments.bucket = "bucket".into();
        attachments.region = "eu-west-1".into();
        attachments.force_path_style = force_path_style;
        attachments
    }

    #[test]
    fn the_bucket_goes_into_the_host_or_the_path() {
        for (url, path_style, objects, root) in [
            (None, false, "https://bucket.s3.eu-west-1.amazonaws.com", "https://bucket.s3.eu-west-1.amazonaws.com/"),
            (None, true, "https://s3.eu-west-1.amazonaws.com/bucket", "https://s3.eu-west-1.amazonaws.com/bucket"),
            (Some("http://minio:9000"), true, "http://minio:9000/bucket", "http://minio:9000/bucket"),
            (Some("https://s3.example/"), false, "https://bucket.s3.example", "https://bucket.s3.example/"),
            (Some("http://127.0.0.1:9000/"), false, "http://127.0.0.1:9000/bucket", "http://127.0.0.1:9000/bucket"),
            (Some("http://[::1]"), false, "http://[::1]/bucket", "http://[::1]/bucket"),
            (Some("http://localhost:1"), false, "http://localhost:1/bucket", "http://localhost:1/bucket"),
        ] {
            let expected = Address { objects: objects.into(), root: root.into() };
            assert_eq!(address(&settings(url, path_style)), Some(expected), "{url:?}");
        }
    }

    #[test]
    fn an_address_without_a_bucket_or_with_a_password_is_refused_and_not_repeated() {
        let mut nameless = settings(None, false);
        nameless.bucket = "a/b".into();
        assert!(Service::new(&nameless).is_err());
        let sentence = Service::new(&settings(Some("http://user:secret@host"), true)).unwrap_err().to_string();
        assert!(sentence.contains("http://host") && !sentence.contains("secret"), "{sentence}");
    }

    #[test]
    fn uploads_are_found_in_a_listing() {
        let text = "<?xml version=\"1.0\"?><ListMultipartUploadsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
             <Bucket>b</Bucket><IsTruncated>false</IsTruncated><Upload><Key>a&amp;b</Key><UploadId>1</UploadId>\
             <Initiator><ID>x</ID></Initiator></Upload><Upload><Key>c</Key><UploadId>2</UploadId></Upload>\
             </ListMultipartUploadsResult>";
        let listed: Listed = quick_xml::de::from_str(text).unwrap();
        let found: Vec<_> = listed.uploads.iter().map(|upload| (&*upload.key, &*upload.id)).collect();
        assert_eq!(found, [("a&b", "1"), ("c", "2")]);
        let none: Listed =
            quick_xml::de::from_str("<ListMultipartUploadsResult></ListMultipartUploadsResult>").unwrap();
        assert!(none.uploads.is_empty());
    }

    #[test]
    fn a_value_in_a_query_is_encoded() {
        assert_eq!(encoded("attachments/a b&c-ü"), "attachments%2Fa%20b%26c-%C3%BC");
    }
}
