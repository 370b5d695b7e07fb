//! A real S3 service, and a look into its buckets.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::client::{ClientOptions, HttpConnector, HttpError, HttpRequest, ReqwestConnector};
use obscura_server::config::{Attachments, Secret};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use super::{free_port, unique_name};

/// Starting takes some seconds, more on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Where an S3 service is and who may use it.
#[derive(Clone, Debug)]
pub struct S3 {
    pub endpoint: String,
    pub access_key: String,
    pub secret_key: String,
}

impl S3 {
    /// The one that all tests of this run share. Each has buckets of its own in it.
    pub async fn shared() -> Self {
        static STARTED: OnceCell<(S3, Option<S3Process>)> = OnceCell::const_new();
        let start = async || {
            let Ok(endpoint) = std::env::var("OBSCURA_TEST_S3_ENDPOINT") else {
                let process = S3Process::start().await;
                return (process.service.clone(), Some(process));
            };
            let key =
                |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} goes with OBSCURA_TEST_S3_ENDPOINT"));
            let (access_key, secret_key) = (key("OBSCURA_TEST_S3_ACCESS_KEY"), key("OBSCURA_TEST_S3_SECRET_KEY"));
            (S3 { endpoint, access_key, secret_key }, None)
        };
        STARTED.get_or_init(start).await.0.clone()
    }

    /// A bucket that no other test uses.
    pub async fn bucket(&self) -> Bucket {
        let bucket = self.missing_bucket();
        assert_eq!(bucket.request("PUT", "").await.0, 200);
        bucket
    }

    /// A bucket that isn't there yet.
    pub fn missing_bucket(&self) -> Bucket {
        let name = format!("{}-{}", unique_name("test").replace('_', "-"), std::process::id());
        Bucket { service: self.clone(), name }
    }
}

/// A bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    pub service: S3,
    pub name: String,
}

impl Bucket {
    /// The one in which a server keeps its attachments.
    pub fn of(attachments: &Attachments) -> Self {
        let text = |secret: &Option<Secret>| secret.as_ref().expect("a key").expose().to_owned();
        let service = S3 {
            endpoint: attachments.endpoint.clone().expect("an endpoint"),
            access_key: text(&attachments.access_key),
            secret_key: text(&attachments.secret_key),
        };
        Self { service, name: attachments.bucket.clone() }
    }

    /// Has a server keep its attachments here.
    pub fn configure(&self, attachments: &mut Attachments) {
        attachments.endpoint = Some(self.service.endpoint.clone());
        attachments.bucket = self.name.clone();
        attachments.access_key = Some(Secret::new(&*self.service.access_key));
        attachments.secret_key = Some(Secret::new(&*self.service.secret_key));
        attachments.force_path_style = true;
    }

    /// The same for the program.
    pub fn options(&self) -> Vec<String> {
        vec![
            format!("--storage-endpoint={}", self.service.endpoint),
            format!("--storage-bucket={}", self.name),
            format!("--storage-access-key={}", self.service.access_key),
            format!("--storage-secret-key={}", self.service.secret_key),
            "--storage-force-path-style".to_owned(),
        ]
    }

    /// The same bucket behind another address, such as that of a proxy.
    pub fn at(&self, endpoint: &str) -> Self {
        let mut bucket = self.clone();
        bucket.service.endpoint = endpoint.to_owned();
        bucket
    }

    /// The names of all objects.
    pub async fn objects(&self) -> Vec<String> {
        all_between(&self.request("GET", "?list-type=2").await.1, "<Key>", "</Key>")
    }

    /// The ids of all multipart uploads that were neither completed nor aborted.
    pub async fn uploads(&self) -> Vec<String> {
        all_between(&self.request("GET", "?uploads=").await.1, "<UploadId>", "</UploadId>")
    }

    /// The objects that multipart uploads are under way for, and whose names begin like this.
    pub async fn uploads_below(&self, prefix: &str) -> Vec<String> {
        let listed = self.request("GET", "?uploads=").await.1;
        all_between(&listed, "<Key>", "</Key>").into_iter().filter(|key| key.starts_with(prefix)).collect()
    }

    /// True when there is nothing in it, not even half of something.
    pub async fn is_empty(&self) -> bool {
        self.objects().await.is_empty() && self.uploads().await.is_empty()
    }

    /// Begins a multipart upload to this object, and forgets it.
    pub async fn begin_upload(&self, key: &str) {
        assert_eq!(self.request("POST", &format!("/{key}?uploads=")).await.0, 200);
    }

    /// Deletes the bucket and all that is in it.
    pub async fn destroy(&self) {
        for key in self.objects().await {
            self.request("DELETE", &format!("/{key}")).await;
        }
        let (status, body) = self.request("DELETE", "").await;
        assert_eq!(status, 204, "{body}");
    }

    /// Whether the bucket is there.
    pub async fn exists(&self) -> bool {
        self.request("HEAD", "").await.0 == 200
    }

    /// Sends a signed request. The answer is its status and body.
    async fn request(&self, method: &str, target: &str) -> (u16, String) {
        self.try_request(method, target).await.expect("the service answers")
    }

    async fn try_request(&self, method: &str, target: &str) -> Result<(u16, String), HttpError> {
        let S3 { endpoint, access_key, secret_key } = self.service.clone();
        let credential = AwsCredential { key_id: access_key, secret_key, token: None };
        let mut request = HttpRequest::new(Bytes::new().into());
        *request.method_mut() = method.parse().unwrap();
        *request.uri_mut() = format!("{endpoint}/{}{target}", self.name).parse().unwrap();
        AwsAuthorizer::new(&credential, "s3", "us-east-1").try_authorize(&mut request, None).unwrap();
        let client = ReqwestConnector::default().connect(&ClientOptions::new().with_allow_http(true)).unwrap();
        let (head, body) = client.execute(request).await?.into_parts();
        Ok((head.status.as_u16(), String::from_utf8_lossy(&body.bytes().await?).into_owned()))
    }
}

fn all_between(text: &str, begin: &str, end: &str) -> Vec<String> {
    text.split(begin).skip(1).filter_map(|rest| Some(rest.split_once(end)?.0.to_owned())).collect()
}

/// A SeaweedFS of its own. Dropping it kills it, and so does the end of this process.
pub struct S3Process {
    pub service: S3,
    child: Option<Child>,
    arguments: Vec<String>,
    folder: TempDir,
}

impl S3Process {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let mut process = Self::prepare();
        process.launch().await;
        process
    }

    /// One that does not run yet. Its address is known already.
    pub fn prepare() -> Self {
        let folder = tempfile::tempdir().expect("a folder for the service");
        let service = S3 {
            endpoint: String::new(),
            access_key: unique_name("access").replace('_', ""),
            secret_key: unique_name("secret").replace('_', ""),
        };
        let identity = serde_json::json!({"identities": [{
            "name": "tests",
            "credentials": [{"accessKey": service.access_key, "secretKey": service.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        let identities = folder.path().join("identities.json");
        std::fs::write(&identities, identity.to_string()).expect("a file for the keys");
        let ports = distinct_ports(8);
        let names = ["master", "volume", "filer", "s3"];
        let mut arguments: Vec<_> = names
            .iter()
            .zip(ports.chunks(2))
            .flat_map(|(name, ports)| [format!("-{name}.port={}", ports[0]), format!("-{name}.port.grpc={}", ports[1])])
            .collect();
        arguments.extend([format!("-dir={}", folder.path().display()), format!("-s3.config={}", identities.display())]);
        for name in ["filer", "s3"] {
            arguments.push(format!("-{name}.localSocket={}", folder.path().join(name).display()));
        }
        arguments.extend(OPTIONS.iter().map(|option| (*option).to_owned()));
        let endpoint = format!("http://127.0.0.1:{}", ports[6]);
        Self { service: S3 { endpoint, ..service }, child: None, arguments, folder }
    }

    /// Starts it, for the first time or again on the same port and folder, and waits until it answers.
    pub async fn launch(&mut self) {
        let log = std::fs::File::create(self.folder.path().join("log")).expect("a file for the log");
        // The shell ends the service when this process is gone, which closes its standard input.
        let script = "exec 3<&0; \"$@\" </dev/null 3<&- & service=$!; cat <&3 >/dev/null; kill -9 $service";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(weed()).arg("server").args(&self.arguments);
        // Each bucket has files of its own; one is enough for a test.
        command.env("WEED_MASTER_VOLUME_GROWTH_COPY_1", "1");
        command.stdin(Stdio::piped()).stdout(log.try_clone().expect("the log")).stderr(log);
        self.child = Some(command.spawn().expect("a shell"));
        let deadline = Instant::now() + PATIENCE;
        let probe = self.service.missing_bucket();
        while !self.answers(&probe).await {
            assert!(Instant::now() < deadline, "the S3 service does not start:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ready is who can store, which takes longer than listening.
    async fn answers(&self, probe: &Bucket) -> bool {
        let succeeds = async |method, target| matches!(probe.try_request(method, target).await, Ok((200, _)));
        (succeeds("HEAD", "").await || succeeds("PUT", "").await) && succeeds("PUT", "/ready").await
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        log.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }

    /// Kills it at once.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.stdin.take());
        let _ = child.wait();
    }
}

impl Drop for S3Process {
    fn drop(&mut self) {
        self.kill();
    }
}

const OPTIONS: &[&str] = &[
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-filer",
    "-s3",
    // Ports that would be the same for all of them.
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.iam=false",
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=64",
    "-volume.max=0",
];

fn distinct_ports(count: usize) -> Vec<u16> {
    let mut ports = BTreeSet::new();
    while ports.len() < count {
        ports.insert(free_port());
    }
    ports.into_iter().collect()
}

/// The program of SeaweedFS.
fn weed() -> PathBuf {
    if let Some(path) = std::env::var_os("OBSCURA_TEST_WEED") {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("weed")).find(|file| file.is_file());
    found.expect("these tests need an S3 service: run them through scripts/services, or name `weed` of SeaweedFS in OBSCURA_TEST_WEED")
}
