//! `transfer`: a stopped embedded server's data moves into an empty distributed deployment.

mod bytes;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::blobs::{Blobs, ReadOnlyFolder};
use crate::commands::transfer::bytes::Bytes;
use crate::commands::transfer::report::Report;
use crate::config::{self, Config, Secret};
use crate::files;
use crate::store::transfer::Transfer;

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Request {
    from: String,
    /// `None` takes the database of the usual options.
    to: Option<Secret>,
    attachments: bool,
    attachments_from: Option<PathBuf>,
}

/// The grammar of the command.
pub(super) fn grammar() -> Command {
    let argument = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    Command::new("transfer")
        .about("Moves the data of a stopped embedded server into an empty PostgreSQL database, and attachments with it")
        .long_about(
            "Moves the data of a stopped embedded server into an empty PostgreSQL database, and with --attachments the \
             bytes of attachments into the storage that the --storage options name.\n\n\
             The source is only read. Both sides are compared at the end, row by row and byte by byte. After an \
             interruption run the same command again: it goes on where it stopped. No server starts on the target \
             before the end, and the old one must not be started again after it.",
        )
        .next_help_heading("What to transfer")
        .arg(
            argument("from", "SOURCE", "The old database, sqlite:PATH, or the folder that was --data-dir")
                .required(true),
        )
        .arg(argument("to", "URL", "The empty database, postgres://USER:PASSWORD@HOST:PORT/NAME; without it --db-url"))
        .arg(
            Arg::new("attachments")
                .long("attachments")
                .help("Copies the bytes of attachments too; without it only their rows come along")
                .action(ArgAction::SetTrue),
        )
        .arg(argument(
            "attachments-from",
            "FOLDER",
            "The folder of the old attachments, if it is not the one named `attachments` beside the old database",
        ))
}

impl Request {
    pub(super) fn read(matches: &ArgMatches) -> Self {
        let text = |name: &str| matches.get_one::<String>(name).cloned();
        Self {
            from: text("from").unwrap_or_default(),
            to: text("to").map(Secret::new),
            attachments: matches.get_flag("attachments"),
            attachments_from: text("attachments-from").map(PathBuf::from),
        }
    }

    /// Runs the transfer to its end, and answers what the operator has to do next.
    #[tokio::main(flavor = "current_thread")]
    pub(super) async fn run(self, mut config: Config) -> anyhow::Result<String> {
        let file = self.source_file(&config)?;
        config.database.url = self.target_url(&config)?;
        if !file.exists() {
            bail!("--from: there is no database at {}", file.display());
        }
        let data_dir = (!self.from.starts_with("sqlite:")).then_some(Path::new(&self.from));
        let _lock = files::lock(&file, data_dir).await?;
        let bytes = if self.attachments { Some(self.storages(&file, &config).await?) } else { None };
        let mut report = Report::new();
        report.begin("Reading the source and preparing the target …", "copied");
        let mut transfer = Transfer::open(&file, &config.database).await?;
        let address = transfer.address().to_owned();
        let start = if transfer.is_resumed() { "Going on where the last run stopped" } else { "Copying" };
        report.begin(&format!("{start} …"), "copied");
        transfer.copy(&mut |what, done, all| report.step(what, done, all)).await?;
        if let Some(bytes) = &bytes {
            bytes.copy(&mut transfer, &mut report).await?;
        }
        report.begin("Comparing both sides …", "compared");
        let counts = transfer.verify(&mut |what, done, all| report.step(what, done, all)).await?;
        let compared = match &bytes {
            Some(bytes) => Some(bytes.verify(&mut transfer, &mut report).await?),
            None => None,
        };
        transfer.finish().await?;
        Ok(farewell(&file, &address, &counts, compared))
    }

    fn source_file(&self, config: &Config) -> anyhow::Result<PathBuf> {
        if self.from.starts_with("sqlite:") {
            let source = config::Database { url: Secret::new(self.from.as_str()), ..config.database.clone() };
            return source.file().map(Path::to_owned).context("--from takes sqlite:PATH or a folder");
        }
        if self.from.contains("://") {
            bail!("--from takes sqlite:PATH or the folder that was --data-dir; only an embedded server can be moved");
        }
        Ok(Path::new(&self.from).join("obscura.db"))
    }

    fn target_url(&self, config: &Config) -> anyhow::Result<Secret> {
        let url = self.to.clone().unwrap_or_else(|| config.database.url.clone());
        if self.to.is_none() && config.database.is_sample() {
            bail!("name the new database by --to or --db-url (OBSCURA_DATABASE_URL), one with nothing in it");
        }
        if ["postgres://", "postgresql://"].iter().any(|scheme| url.expose().starts_with(scheme)) {
            return Ok(url);
        }
        bail!("--to or --db-url takes postgres://USER:PASSWORD@HOST:PORT/NAME, a database with nothing in it")
    }

    async fn storages(&self, file: &Path, config: &Config) -> anyhow::Result<Bytes> {
        let beside = || file.parent().unwrap_or(Path::new("")).join("attachments");
        let folder = self.attachments_from.clone().unwrap_or_else(beside);
        let from = ReadOnlyFolder::open(&folder, &config.attachments.prefix).with_context(|| {
            format!("there are no attachments in {}; name their folder with --attachments-from", folder.display())
        })?;
        // Before the target is opened, which tidies up in it.
        if config.attachments.folder().is_some_and(|target| lies_in(target, from.path())) {
            bail!(
                "the attachments of the source are where the target would have them ({}); leave --attachments out to go on using that folder, or name another storage with --storage-endpoint",
                from.path().display()
            );
        }
        Ok(Bytes { from, to: Blobs::open(&config.attachments).await? })
    }
}

/// Whether a folder, which may not be there yet, is `other` or below it.
fn lies_in(folder: &Path, other: &Path) -> bool {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    absolute.ancestors().find_map(|folder| folder.canonicalize().ok()).is_some_and(|found| found.starts_with(other))
}

/// What has happened, and what is left to do.
fn farewell(file: &Path, address: &str, counts: &[(&str, u64)], bytes: Option<(u64, u64)>) -> String {
    let count = |table: &str| counts.iter().find(|(name, _)| *name == table).map_or(0, |(_, count)| *count);
    let mut text = format!(
        "Everything is in the database at {address} and compared: {} accounts, {} devices, {} waiting messages.\n",
        count("users"),
        count("devices"),
        count("messages"),
    );
    text += &match bytes {
        Some((copied, 0)) => format!("Bytes of attachments in the new storage and compared: {copied}.\n"),
        Some((copied, lost)) => format!(
            "Bytes of attachments in the new storage and compared: {copied}. Missing from the old folder or cut short in \
             it, so that nobody can download them: {lost}.\n"
        ),
        None if count("attachments") == 0 => String::new(),
        None => format!(
            "Bytes of attachments that have not been copied: {}. Copy the old folder into the new storage with other \
             means before the servers start; the names are the same in a folder and in a bucket.\n",
            count("attachments")
        ),
    };
    let secret = file.with_file_name("jwt-secret");
    let secret = if secret.exists() { format!("the content of {}", secret.display()) } else { "the old one".into() };
    text += &format!(
        "Give all servers the same --jwt-secret ({secret}), so that devices go on with their tokens.\n\
         Don't start the old server again: it would hand out prekeys and deliver messages a second time."
    );
    text
}
