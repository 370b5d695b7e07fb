//! Where a transfer goes: a database with nothing in it, storage, and the options that start servers on both.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::harness::{Binary, Database, deployment, eventually};

/// An empty database and a place for attachments. Dropping it drops both.
pub struct Place {
    name: String,
    folder: TempDir,
}

impl Place {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let name = deployment::make_empty_database(folder.path()).await;
        Self { name, folder }
    }

    pub fn url(&self) -> String {
        deployment::database_url(&self.name)
    }

    /// The options that name the storage of the attachments.
    pub fn storage(&self) -> Vec<String> {
        vec![format!("--storage-endpoint=file:{}", self.folder.path().display())]
    }

    /// The file of an attachment in the new storage.
    pub fn attachment(&self, id: &str) -> PathBuf {
        self.folder.path().join("attachments").join(id)
    }

    /// A new server on what has been moved here. Clients of the old one go on with it.
    pub async fn start_server(&self, old: &Binary, secret: &str) -> Binary {
        let mut layout = self.storage();
        layout.extend([
            format!("--db-url={}", self.url()),
            format!("--pubsub-url={}", deployment::service("OBSCURA_TEST_VALKEY_URL")),
            format!("--channel-prefix={}:", self.name),
            format!("--jwt-secret={secret}"),
            // No notices between the mail.
            "--pre-key-refill-threshold=0".to_owned(),
        ]);
        old.start_elsewhere(layout).await
    }

    /// The database, which has to be there.
    pub async fn database(&self) -> Database {
        Database::open(&deployment::config_of(&[format!("--db-url={}", self.url())]).database).await
    }

    /// The arguments of a transfer to here, without attachments.
    pub fn transfer_arguments(&self, from: &Path) -> Vec<String> {
        let from = from.join("obscura.db");
        vec!["transfer".to_owned(), format!("--from=sqlite:{}", from.display()), format!("--to={}", self.url())]
    }

    /// Starts a transfer of everything.
    pub fn begin_transfer(&self, from: &Path) -> Binary {
        let mut arguments = self.transfer_arguments(from);
        arguments.push("--attachments".to_owned());
        arguments.extend(self.storage());
        Binary::begin(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A transfer of everything, which has to succeed within this time. Answers what it said.
    pub async fn transfer(&self, from: &Path, patience: Duration) -> String {
        let mut transfer = self.begin_transfer(from);
        let status = transfer.exit(patience).await;
        assert!(status.success(), "{}", transfer.output());
        transfer.output()
    }

    /// Waits until something of this has arrived, but not all of it.
    pub async fn wait_for_middle_of(&self, what: &str, all: i64) {
        let database = self.database().await;
        let copied = format!("SELECT COALESCE(MAX(copied), 0) FROM transfer_progress WHERE name = '{what}'");
        let exists = "SELECT count(*) FROM pg_tables WHERE tablename = 'transfer_progress'";
        eventually(what, async || database.number(exists).await == 1 && database.number(&copied).await > 0).await;
        let copied = database.number(&copied).await;
        assert!(copied < all, "all of {what} has arrived already");
        database.close().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        deployment::drop_state(self.folder.path());
    }
}
