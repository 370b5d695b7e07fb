//! The server under load: a process of our own, or one that runs already.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::database::{Database, Rows};
use crate::figures::Figures;
use crate::http::Connection;
use crate::options::{Mode, Options, Subject};
use crate::proc::{forget_peak, peak_kib, resident_kib};

/// Ports that are free.
const PORTS: &[&str] = &["--server-host=127.0.0.1", "--server-port=0", "--mgmt-port=0"];
/// Limits that are not what is measured.
const RAISED_LIMITS: &[&str] = &[
    "--rate-limit-per-second=1000000",
    "--rate-limit-burst=1000000",
    "--auth-rate-limit-per-second=1000000",
    "--auth-rate-limit-burst=1000000",
    "--account-rate-limit-per-second=0",
    "--target-rate-limit-per-second=0",
    "--prekey-fetches-per-hour=0",
    "--server-max-connections=100000",
    "--server-max-connections-per-address=100000",
    "--auth-max-devices-per-user=100",
    "--max-inbox-size=1000000",
    "--attachment-quota-bytes=0",
    "--attachment-bytes-per-day=0",
    "--storage-max-size-bytes=1073741824",
    "--access-token-ttl-secs=86400",
];

/// More of these limits, as variables: a former version that does not know them passes them over.
const UNLIMITED: &[(&str, &str)] = &[
    ("OBSCURA_MESSAGING_INBOX_MAX_BYTES", "0"),
    ("OBSCURA_MESSAGING_INBOX_SENDER_SHARE_PERCENT", "100"),
    ("OBSCURA_MESSAGING_SENDER_BYTES_PER_DAY", "0"),
    ("OBSCURA_RATE_LIMIT_ONE_TIME_PREKEYS_PER_HOUR", "0"),
    ("OBSCURA_RATE_LIMIT_SIGN_UPS_PER_HOUR", "0"),
    ("OBSCURA_RATE_LIMIT_SIGN_UPS_PER_DAY_PER_ADDRESS", "0"),
    ("OBSCURA_RATE_LIMIT_SIGN_UPS_PER_DAY_PER_NETWORK", "0"),
    ("OBSCURA_RATE_LIMIT_WRONG_PASSWORDS_PER_HOUR", "0"),
    ("OBSCURA_RATE_LIMIT_UPLOADS_PER_SECOND", "0"),
];

/// A server. Dropping it kills the process and removes the folder, if they are ours.
pub struct Server {
    pub api: SocketAddr,
    management: Option<SocketAddr>,
    process: Option<u32>,
    /// Further nodes on the same database, and where each is.
    more: Vec<SocketAddr>,
    own: Option<Own>,
    /// Where our own server keeps what it has. Fields are dropped in this order: the process goes before its folder.
    folder: Option<TempDir>,
}

struct Own {
    child: Option<Child>,
    more: Vec<Child>,
    program: PathBuf,
    has_default_limits: bool,
    /// A `resolv.conf` that only this server sees.
    resolver: Option<PathBuf>,
    options: Vec<String>,
    variables: Vec<(&'static str, String)>,
    folder: PathBuf,
    database: Database,
    /// The PostgreSQL that the database was made in, and its name there.
    made_in: Option<(String, String)>,
}

/// How long a start took, from the start of the process on.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    /// Until `/readyz` was answered with 200.
    pub ready: Duration,
    /// Until an API request was answered.
    pub answering: Duration,
}

impl Server {
    /// Starts a server on an empty folder, or takes the one that was named.
    pub async fn start(options: &Options, subject: &Subject) -> Result<Self> {
        let program = match subject {
            Subject::Target { api, process } => {
                Connection::open(*api).await?;
                return Ok(Self {
                    api: *api,
                    management: None,
                    process: *process,
                    more: Vec::new(),
                    own: None,
                    folder: None,
                });
            }
            Subject::Program(program) => program.clone(),
        };
        let folder = tempfile::Builder::new().prefix("obscura-load-").tempdir_in(&options.parent)?;
        let mut own = Own {
            child: None,
            more: Vec::new(),
            program,
            has_default_limits: options.mode == Mode::Attack,
            resolver: options.resolver.clone(),
            options: options.server_options.clone(),
            variables: Vec::new(),
            database: Database::in_folder(folder.path()),
            folder: folder.path().to_owned(),
            made_in: None,
        };
        let name = format!("obscura_load_{:x}", rand::random::<u64>());
        if let Some(url) = &options.postgres {
            own.database = Database::create(url, &name).await?;
            own.made_in = Some((url.clone(), name.clone()));
            if let Database::Postgres(url) = &own.database {
                // Variables are not seen in the list of processes, arguments are.
                own.variables.push(("OBSCURA_DATABASE_URL", url.clone()));
            }
            // The same for all nodes, each of which would make one of its own.
            own.variables.push(("OBSCURA_AUTH_JWT_SECRET", format!("{:032x}", rand::random::<u128>())));
        }
        if let Some(url) = &options.valkey {
            own.variables.push(("OBSCURA_PUBSUB_URL", url.clone()));
            own.variables.push(("OBSCURA_NOTIFICATIONS_CHANNEL_PREFIX", format!("{name}:")));
            own.variables.push(("OBSCURA_NOTIFICATIONS_PUSH_QUEUE_KEY", format!("{name}:jobs")));
        }
        let (api, management) = own.spawn()?;
        let process = own.process();
        let server =
            Self { api, management: Some(management), process, more: Vec::new(), own: Some(own), folder: Some(folder) };
        server.wait_until_ready().await?;
        Ok(server)
    }

    /// Ends our own server and removes what was made for it, except its folder, which is returned.
    pub async fn stop(mut self) -> Result<Option<TempDir>> {
        let Some(mut own) = self.own.take() else { return Ok(None) };
        own.more.drain(..).try_for_each(|node| end(node, "TERM"))?;
        own.end("TERM")?;
        if let Some((url, name)) = own.made_in.take() {
            Database::remove(&url, &name).await?;
        }
        Ok(self.folder.take())
    }

    /// The process, if it is known.
    pub fn process(&self) -> Option<u32> {
        self.process
    }

    /// The processes of all nodes, as far as they are known.
    pub fn processes(&self) -> Vec<u32> {
        let more = self.own.iter().flat_map(|own| own.more.iter().map(Child::id));
        self.process.into_iter().chain(more).collect()
    }

    /// The address of the management port of our own server.
    pub fn management(&self) -> Option<SocketAddr> {
        self.management
    }

    /// The most MiB of memory that the process has had since [`Self::forget_peak`].
    pub fn peak_mib(&self) -> Option<f64> {
        Some(peak_kib(self.process?)? / 1024.0)
    }

    /// Where all nodes are.
    pub fn nodes(&self) -> Vec<SocketAddr> {
        [&[self.api], &self.more[..]].concat()
    }

    /// Starts nodes on the same database until there are so many.
    pub async fn grow_to(&mut self, nodes: usize) -> Result<()> {
        while 1 + self.more.len() < nodes {
            let own = self.own()?;
            ensure!(own.made_in.is_some(), "several nodes need a database that they share: --postgres and --valkey");
            let folder = own.folder.join(format!("node-{}", own.more.len() + 2));
            let (child, api, management) = own.spawn_in(&folder)?;
            own.more.push(child);
            self.more.push(api);
            Connection::open(management).await?.get("/readyz").await?.expect(200)?;
        }
        Ok(())
    }

    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Ends the process with a signal and starts it again on the same folder.
    pub async fn start_again(&mut self, signal: &str) -> Result<Started> {
        self.own()?.end(signal)?;
        self.start_once_more().await
    }

    /// Stops our own server, writes rows into its database, and starts it again. Answers how long the writing took.
    pub async fn fill(&mut self, rows: Rows) -> Result<Duration> {
        let own = self.own()?;
        own.end("TERM")?;
        let took = own.database.clone().fill(rows).await?;
        self.start_once_more().await?;
        Ok(took)
    }

    fn own(&mut self) -> Result<&mut Own> {
        self.own.as_mut().context("only a server of our own can be stopped; leave --target out")
    }

    async fn start_once_more(&mut self) -> Result<Started> {
        let began = Instant::now();
        let own = self.own()?;
        let (api, management) = own.spawn()?;
        self.process = own.process();
        (self.api, self.management) = (api, Some(management));
        self.wait_until_ready().await?;
        let ready = began.elapsed();
        Connection::open(api).await?.get("/v1/devices").await?.expect(401)?;
        Ok(Started { ready, answering: began.elapsed() })
    }

    async fn wait_until_ready(&self) -> Result<()> {
        let Some(management) = self.management else { return Ok(()) };
        Connection::open(management).await?.get("/readyz").await?.expect(200)
    }

    /// KiB of memory that the process has now.
    pub fn resident_kib(&self) -> Option<f64> {
        Some(resident_kib(self.process?)?.0)
    }

    /// Adds what the process has in memory now.
    pub fn add_memory(&self, figures: &mut Figures, when: &str) {
        if let Some(kib) = self.resident_kib() {
            figures.add_of("resident_mib", when, kib / 1024.0);
        }
    }

    /// From now on the most memory that the process has is kept in mind. False when that may not be asked for.
    pub fn forget_peak(&self) -> bool {
        self.process.is_some_and(forget_peak)
    }

    /// Adds the most that the process has had in memory since [`Self::forget_peak`].
    pub fn add_peak(&self, figures: &mut Figures, when: &str) {
        if let Some(kib) = self.process.and_then(peak_kib) {
            figures.add_of("resident_mib", when, kib / 1024.0);
        }
    }

    /// The folder of our own server.
    pub fn folder(&self) -> Option<&Path> {
        Some(self.folder.as_ref()?.path())
    }

    /// Adds how long the disk takes to confirm a small write, which bounds every durable send from below.
    pub fn add_disk(&self, figures: &mut Figures) -> Result<()> {
        let Some(folder) = self.folder() else { return Ok(()) };
        let mut file = File::create(folder.join("probe"))?;
        let mut millis = Vec::new();
        for _ in 0..100 {
            let began = Instant::now();
            file.write_all(&[0; 4096])?;
            file.sync_data()?;
            millis.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        millis.sort_by(f64::total_cmp);
        figures.add("disk_ms", millis[millis.len() / 2]);
        Ok(())
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        for mut child in self.child.take().into_iter().chain(self.more.drain(..)) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Own {
    fn process(&self) -> Option<u32> {
        Some(self.child.as_ref()?.id())
    }

    fn command(&self) -> Command {
        let Some(resolver) = &self.resolver else { return Command::new(&self.program) };
        // The shell becomes the server, so the process that is measured and stopped is the right one.
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\""]);
        command.arg(resolver).arg(&self.program);
        command
    }

    fn spawn(&mut self) -> Result<(SocketAddr, SocketAddr)> {
        let (child, api, management) = self.spawn_in(&self.folder)?;
        self.child = Some(child);
        Ok((api, management))
    }

    fn spawn_in(&self, folder: &Path) -> Result<(Child, SocketAddr, SocketAddr)> {
        let mut child = self
            .command()
            .arg("--data-dir")
            .arg(folder)
            .args(PORTS)
            .args(if self.has_default_limits { &[] } else { RAISED_LIMITS })
            .envs(if self.has_default_limits { [].iter() } else { UNLIMITED.iter() }.copied())
            .args(&self.options)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("can't start {}; build it with `cargo build --release`", self.program.display())
            })?;
        let output = child.stdout.take().context("no output")?;
        let mut output = BufReader::new(output);
        let (mut api, mut management, mut line) = (None, None, String::new());
        loop {
            line.clear();
            if output.read_line(&mut line)? == 0 {
                let _ = child.wait();
                bail!("the server did not start");
            }
            let address = line.split_once("http://").and_then(|(_, rest)| rest.trim().parse().ok());
            match line.split_whitespace().next() {
                Some("API") => api = address,
                Some("management") => management = address,
                _ => {}
            }
            if let (Some(api), Some(management)) = (api, management) {
                // Kept open, so that the rest of the greeting has somewhere to go.
                child.stdout = Some(output.into_inner());
                return Ok((child, api, management));
            }
        }
    }

    fn end(&mut self, signal: &str) -> Result<()> {
        self.child.take().map_or(Ok(()), |child| end(child, signal))
    }
}

fn end(mut child: Child, signal: &str) -> Result<()> {
    let sent = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status()?;
    ensure!(sent.success(), "the server could not be stopped");
    child.wait()?;
    Ok(())
}
