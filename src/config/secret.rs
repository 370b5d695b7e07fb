//! Secrets: a type that cannot be printed by accident, and the file in which embedded mode keeps one of its own.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::config::{Config, ConfigError};

/// The published default of `--jwt-secret`.
const SAMPLE: &str = "change_me_in_production";
/// Fewer bytes than this are guessed too easily.
const MIN_BYTES: usize = 16;
/// A kept secret is longer; anything below is what a broken write or a slip of the hand has left.
const MIN_KEPT_BYTES: usize = 32;
/// No secret is this long; a file beyond it was named by mistake.
const MAX_FILE_BYTES: u64 = 65_536;
/// The file in the data folder in which the secret is kept that the server made for itself.
pub const KEPT_SECRET: &str = "jwt-secret";
/// Where an operator moves the kept secret to have a new one made.
const PREVIOUS_IN: &str = "jwt-secret-previous";

/// A text that prints as `***`.
#[derive(Clone, Default)]
pub struct Secret(String);

impl Secret {
    /// Takes the text out of sight.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Config {
    /// Makes the data folder if it is missing and, unless a signing secret was given, takes the one kept there or makes
    /// it. Does nothing outside embedded mode. It waits for the disk.
    pub fn open_data_dir(&mut self) -> Result<(), ConfigError> {
        let Some(folder) = &self.data_dir else { return Ok(()) };
        make_folder(folder).map_err(|error| {
            let folder = folder.display();
            ConfigError::Wrong(format!(
                "--data-dir: \"{folder}\" cannot be used ({error}); it takes a folder in which the user that runs the \
                 server may write: make it, change its owner, or name another one"
            ))
        })?;
        if self.auth.jwt_secret.expose().is_empty() {
            // The database comes first: a folder with a secret and no database is refused as one whose database is missing.
            let database = self.database.file().map_or(Ok(()), make_empty);
            database.map_err(|error| {
                ConfigError::Wrong(format!("--data-dir: the database in it cannot be made ({error}); check the folder"))
            })?;
            self.auth.jwt_secret = kept_secret(folder)?;
        }
        if self.auth.jwt_secret_previous.is_none() {
            self.auth.jwt_secret_previous = previous_secret(folder)?;
        }
        Ok(())
    }

    /// Refuses a secret that is published, empty or short.
    pub fn check_secret(&self) -> Result<(), ConfigError> {
        if let Some(problem) = self.auth.jwt_secret_previous.as_ref().and_then(problem_of) {
            return Err(ConfigError::Wrong(format!(
                "--jwt-secret-previous: the secret that signed access tokens before {problem}, so anybody could make \
                 tokens with it; leave it out (devices then refresh their tokens once)"
            )));
        }
        let Some(problem) = problem_of(&self.auth.jwt_secret) else { return Ok(()) };
        Err(ConfigError::Wrong(format!(
            "--jwt-secret: the secret that signs access tokens {problem}; it takes at least {MIN_BYTES} bytes that \
             nobody else knows, such as `openssl rand -base64 32` gives, in OBSCURA_AUTH_JWT_SECRET or in a file named by \
             OBSCURA_AUTH_JWT_SECRET_FILE (to try the server on this machine alone, start it with `--data-dir DIR`: it \
             then makes a secret of its own)"
        )))
    }
}

/// What is wrong with a signing secret.
fn problem_of(secret: &Secret) -> Option<&'static str> {
    match secret.expose().len() {
        _ if secret.expose() == SAMPLE => Some("is still the published default"),
        0 => Some("is empty"),
        length if length < MIN_BYTES => Some("is too short"),
        _ => None,
    }
}

/// The content of a secret file without the line break at its end.
pub(super) fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    if File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)? as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("longer than {MAX_FILE_BYTES} bytes")));
    }
    text.truncate(text.trim_end_matches(['\r', '\n']).len());
    Ok(text)
}

/// The folder and its missing parents are made for their owner alone. Writing is tried: the permission bits do not
/// tell of read-only mounts.
fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let probe = folder.join(unused_name("probe"));
    create_private(&probe)?;
    fs::remove_file(probe)
}

fn kept_secret(folder: &Path) -> Result<Secret, ConfigError> {
    let path = folder.join(KEPT_SECRET);
    let wrong = |what: String| {
        let path = path.display();
        ConfigError::Wrong(format!("--data-dir: the secret that signs access tokens, in \"{path}\", {what}"))
    };
    let kept = match read_file(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            make_secret(folder, &path).map_err(|error| wrong(format!("cannot be made ({error})")))?;
            read_file(&path)
        }
        found => found,
    };
    let kept = kept.map_err(|error| wrong(format!("cannot be read ({error}); let the server read it")))?;
    if kept.len() < MIN_KEPT_BYTES {
        return Err(wrong(format!(
            "has {} bytes, and {MIN_KEPT_BYTES} are the least; restore the file, or delete it to have a new secret \
             made (devices then refresh their tokens once)",
            kept.len()
        )));
    }
    Ok(Secret::new(kept))
}

/// The secret that the operator has moved aside, if there is one.
fn previous_secret(folder: &Path) -> Result<Option<Secret>, ConfigError> {
    let path = folder.join(PREVIOUS_IN);
    match read_file(&path) {
        Ok(secret) => Ok(Some(Secret::new(secret))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => {
            let path = path.display();
            Err(ConfigError::Wrong(format!(
                "--data-dir: the previous secret, in \"{path}\", cannot be read ({error}); let the server read it, or \
                 delete it (devices then refresh their tokens once)"
            )))
        }
    }
}

/// Whole or not at all: written under another name, forced to the disk, then given its name. Of two servers that start
/// in the same instant one makes the secret and both use it.
fn make_secret(folder: &Path, path: &Path) -> io::Result<()> {
    let bytes: [u8; 32] = rand::random();
    let unfinished = folder.join(unused_name("jwt-secret"));
    let mut file = create_private(&unfinished)?;
    file.write_all(format!("{}\n", STANDARD.encode(bytes)).as_bytes())?;
    file.sync_all()?;
    match fs::hard_link(&unfinished, path) {
        Ok(()) => fs::remove_file(&unfinished)?,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => fs::remove_file(&unfinished)?,
        // Some file systems have no links. Renaming replaces what is there, which can only be the work of this instant.
        Err(_) => fs::rename(&unfinished, path)?,
    }
    File::open(folder)?.sync_all()
}

/// Makes the file if there is none.
fn make_empty(path: &Path) -> io::Result<()> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn unused_name(stem: &str) -> String {
    format!(".{stem}-{:016x}", rand::random::<u64>())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, path::PathBuf};

    use super::*;

    fn opened(folder: &Path) -> Result<Config, String> {
        let mut config = Config::embedded(folder).unwrap();
        config.open_data_dir().map(|()| config).map_err(|error| error.to_string())
    }

    fn mode(path: PathBuf) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_secret_is_never_printed() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "***");
    }

    #[test]
    fn a_new_folder_and_its_secret_belong_to_their_owner_alone() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("a/b");
        let config = opened(&folder).unwrap();
        config.check_secret().unwrap();
        assert_eq!((mode(folder.clone()), mode(folder.join(KEPT_SECRET))), (0o700, 0o600));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "nothing unfinished is left behind");
    }

    #[test]
    fn a_secret_made_once_is_kept() {
        let home = tempfile::tempdir().unwrap();
        let [first, second] = [(); 2].map(|()| opened(home.path()).unwrap().auth.jwt_secret.expose().to_owned());
        assert_eq!(first, second);
        assert_eq!(STANDARD.decode(first).unwrap().len(), 32);
    }

    #[test]
    fn servers_that_start_in_the_same_instant_share_one_secret() {
        let home = tempfile::tempdir().unwrap();
        let start = || opened(home.path()).unwrap().auth.jwt_secret.expose().to_owned();
        let secrets: Vec<String> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(secrets.iter().all(|secret| *secret == secrets[0]));
    }

    #[test]
    fn a_given_secret_is_used_and_not_kept() {
        let home = tempfile::tempdir().unwrap();
        let mut config = Config::embedded(home.path()).unwrap();
        config.auth.jwt_secret = Secret::new("a secret of sixteen bytes or more");
        config.open_data_dir().unwrap();
        assert!(!home.path().join(KEPT_SECRET).exists());
    }

    #[test]
    fn a_kept_secret_that_was_cut_short_is_not_replaced() {
        for left in ["", "\n", "only a part of it"] {
            let home = tempfile::tempdir().unwrap();
            fs::write(home.path().join(KEPT_SECRET), left).unwrap();
            let sentence = opened(home.path()).unwrap_err();
            assert!(sentence.contains("restore the file"), "{sentence}");
            assert_eq!(fs::read_to_string(home.path().join(KEPT_SECRET)).unwrap(), left);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_named() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        fs::write(&file, "").unwrap();
        let sentence = opened(&file).unwrap_err();
        assert!(sentence.starts_with(&format!("--data-dir: {file:?} cannot be used (")), "{sentence}");
    }

    #[test]
    fn a_known_or_guessable_secret_is_refused() {
        let mut config = Config::embedded(Path::new("nowhere")).unwrap();
        for (secret, problem) in [("", "is empty"), (SAMPLE, "published default"), ("fifteen bytes..", "too short")] {
            config.auth.jwt_secret = Secret::new(secret);
            let sentence = config.check_secret().unwrap_err().to_string();
            assert!(sentence.contains(problem) && sentence.contains("--data-dir"), "{sentence}");
        }
        config.auth.jwt_secret = Secret::new("sixteen bytes...");
        config.check_secret().unwrap();
        for secret in ["", SAMPLE, "fifteen bytes.."] {
            config.auth.jwt_secret_previous = Some(Secret::new(secret));
            let sentence = config.check_secret().unwrap_err().to_string();
            assert!(sentence.starts_with("--jwt-secret-previous: "), "{sentence}");
        }
    }

    #[test]
    fn a_kept_secret_that_is_moved_aside_is_the_previous_one_and_a_new_one_is_made() {
        let home = tempfile::tempdir().unwrap();
        let first = opened(home.path()).unwrap().auth;
        assert!(first.jwt_secret_previous.is_none());
        fs::rename(home.path().join(KEPT_SECRET), home.path().join(PREVIOUS_IN)).unwrap();
        let second = opened(home.path()).unwrap().auth;
        assert_eq!(second.jwt_secret_previous.unwrap().expose(), first.jwt_secret.expose());
        assert_ne!(second.jwt_secret.expose(), first.jwt_secret.expose());
    }
}
