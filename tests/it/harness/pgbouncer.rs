//! A real PgBouncer for one test, in front of a PostgreSQL of its own.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpStream;

use super::postgres::{PASSWORD, give_away, other_user};
use super::{PATIENCE, Postgres, free_port};

/// A pooler that is running. Dropping it kills it.
pub struct PgBouncer {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl PgBouncer {
    /// One in this mode (`session`, `transaction` or `statement`), with nothing else set than what it needs.
    pub async fn start(postgres: &Postgres, pool_mode: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        give_away(folder.path());
        let file = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("a file");
            give_away(&path);
            path
        };
        let users = file("users.txt", format!("\"obscura\" \"{PASSWORD}\"\n"));
        let (port, database) = (free_port(), postgres.port());
        let settings = format!(
            "[databases]\npostgres = host=127.0.0.1 port={database}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
             pool_mode = {pool_mode}\nmax_client_conn = 300\ndefault_pool_size = 60\nserver_login_retry = 1\n",
            users.display()
        );
        let settings = file("pgbouncer.ini", settings);
        let program = std::env::var_os("OBSCURA_TEST_PGBOUNCER").unwrap_or_else(|| "/usr/sbin/pgbouncer".into());
        let mut command = Command::new(program);
        // It refuses to run as root, as PostgreSQL does.
        if let Some((user, group)) = other_user() {
            std::os::unix::process::CommandExt::uid(&mut command, user);
            std::os::unix::process::CommandExt::gid(&mut command, group);
        }
        command.arg("-q").arg(settings).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("there is a pgbouncer; `scripts/services` gets one");
        let pooler = Self { child, port, _folder: folder };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(pooler.address()).await.is_err() {
            assert!(Instant::now() < deadline, "PgBouncer does not start");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        pooler
    }

    /// The URL of this database behind it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://obscura:{}@127.0.0.1:{}/{database}", PASSWORD.replace(' ', "%20"), self.port)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        // It keeps nothing.
        let _ = kill_process(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}
