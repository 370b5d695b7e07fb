//! `make-env`: the settings without which `docker-compose.yml` doesn't start, with fresh secrets.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};

/// Each with what it is for. The names are those of the server's own variables where it has one.
const SECRETS: &[(&str, &str)] = &[
    (
        "POSTGRES_PASSWORD",
        "The server's password for PostgreSQL. PostgreSQL keeps the one that it was first started with.",
    ),
    ("VALKEY_PASSWORD", "The server's password for Valkey."),
    ("OBSCURA_STORAGE_ACCESS_KEY", "The server's name and secret for the attachment storage."),
    ("OBSCURA_STORAGE_SECRET_KEY", ""),
    ("OBSCURA_AUTH_JWT_SECRET", "Signs access tokens: the same on every node, and known to nobody else."),
];

const HEAD: &str = "\
# Settings of docker-compose.yml, which reads them from a file named .env beside it.
# These are secrets: let nobody else read this file, and keep a copy with the backups.
";

/// Prints the file or, when it is given a name, writes it for the owner's eyes alone.
pub(super) fn run(output: Option<&Path>) -> anyhow::Result<String> {
    let text = text();
    let Some(path) = output else { return Ok(text.trim_end().to_owned()) };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = match file {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(
            "{} is there already and is left as it is: the secrets in it may be in use; delete it to have new ones made",
            path.display()
        ),
        file => file.with_context(|| format!("{} cannot be made", path.display()))?,
    };
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(format!("Wrote fresh secrets to {}. Start with: docker compose up --detach --wait", path.display()))
}

fn text() -> String {
    let mut text = HEAD.to_owned();
    for (name, purpose) in SECRETS {
        if !purpose.is_empty() {
            let _ = write!(text, "\n# {purpose}\n");
        }
        let _ = writeln!(text, "{name}={}", secret());
    }
    text
}

/// 160 bits in 40 characters that mean nothing special to a shell, a URL or a compose file, and are the most that some
/// storages take.
fn secret() -> String {
    rand::random::<[u8; 20]>().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_made_twice() {
        let texts = text() + &text();
        let mut secrets: Vec<&str> = texts.lines().filter_map(|line| Some(line.split_once('=')?.1)).collect();
        assert_eq!(secrets.len(), 2 * SECRETS.len());
        assert!(secrets.iter().all(|secret| secret.len() == 40));
        secrets.sort_unstable();
        secrets.dedup();
        assert_eq!(secrets.len(), 2 * SECRETS.len());
    }
}
