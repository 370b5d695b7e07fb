//! What was given where: flags first, then variables, then secret files, then defaults. Every text is checked here.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Write},
    net::IpAddr,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use clap::ArgMatches;
use ipnet::IpNet;

use crate::config::{
    Secret,
    option::{Opt, Value},
    secret::read_file,
    table::GROUPS,
};

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// From the command line's grammar, among them the wish for `--help` and `--version`.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// One sentence that names the option, the value and what is allowed. No secret is in it.
    #[error("{0}")]
    Wrong(String),
}

impl ConfigError {
    /// Prints what there is to say and tells how the process should end: with success after `--help` and `--version`.
    pub fn report(&self) -> ExitCode {
        // When printing fails, the terminal is gone, and no one is left to tell.
        match self {
            Self::Usage(error) => {
                let _ = error.print();
                if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
            }
            Self::Wrong(sentence) => {
                let _ = writeln!(io::stderr(), "error: {sentence}");
                ExitCode::from(2)
            }
        }
    }
}

/// How environment variables are looked up, so that tests need not touch the real ones.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// A text that an operator wrote, and the flag or variable as it was spelled there.
struct Written {
    source: String,
    text: String,
}

/// An option with its value, which is good by itself.
struct Found {
    option: &'static Opt,
    /// `None` when the default holds.
    written: Option<Written>,
    value: Option<Value>,
}

impl Found {
    fn text(&self) -> &str {
        match &self.written {
            Some(written) => &written.text,
            None => self.option.default.unwrap_or_default(),
        }
    }
}

/// The values of all options. The readers are named after what they give and are asked by flag.
pub(super) struct Given {
    found: BTreeMap<&'static str, Found>,
    pub(super) warnings: Vec<String>,
}

impl Given {
    /// Looks up every option. Opens no file but those named by `…_FILE` variables.
    pub(super) fn find(matches: &ArgMatches, variable: Lookup) -> Result<Self, ConfigError> {
        let mut given = Self { found: BTreeMap::new(), warnings: Vec::new() };
        let mut data_dir: Option<String> = None;
        for option in GROUPS.iter().flat_map(|group| group.options) {
            let written = match on_command_line(option, matches, &mut given.warnings) {
                None => in_environment(option, variable, &mut given.warnings)?,
                flag => flag,
            };
            let default = || match (option.embedded, &data_dir) {
                (Some(embedded), Some(folder)) => Some(embedded.replace("DIR", folder)),
                _ => option.default.map(str::to_owned),
            };
            let text = written.as_ref().map(|written| written.text.clone()).or_else(default);
            let value = text.as_ref().map(|text| option.takes.read(text));
            if value == Some(None) {
                return Err(refusal(option, written.as_ref(), &option.takes.allowed()));
            }
            // Comes first in the table, because the defaults of others depend on it.
            if option.flag == "data-dir" {
                data_dir = text;
            }
            given.found.insert(option.flag, Found { option, written, value: value.flatten() });
        }
        Ok(given)
    }

    /// Whether an operator wrote this; otherwise it is a default.
    pub(super) fn is_written(&self, flag: &str) -> bool {
        self.found(flag).written.is_some()
    }

    /// A sentence about a value that is good by itself, but not beside the others.
    pub(super) fn refuse(&self, flag: &str, allowed: &str) -> ConfigError {
        let found = self.found(flag);
        refusal(found.option, found.written.as_ref(), allowed)
    }

    /// Sees that one option is not above another. A default gives way, what was written is refused.
    pub(super) fn keep_order(&mut self, low: &str, high: &str) -> Result<(), ConfigError> {
        let limit = self.found(high).value.clone();
        if self.found(low).value <= limit {
            return Ok(());
        }
        if self.is_written(low) {
            let limit = self.found(high).text();
            return Err(self.refuse(low, &format!("at most the {limit} of --{high}")));
        }
        if let Some(low) = self.found.get_mut(low) {
            low.value = limit;
        }
        Ok(())
    }

    pub(super) fn number<T: TryFrom<u64>>(&self, flag: &str) -> T {
        match self.found(flag).value {
            Some(Value::Number(number)) => T::try_from(number).ok(),
            _ => None,
        }
        .expect("the table holds numbers that fit the field")
    }

    pub(super) fn duration(&self, flag: &str) -> Duration {
        match self.found(flag).value {
            Some(Value::Duration(duration)) => Some(duration),
            _ => None,
        }
        .expect("the table has a span of time here")
    }

    pub(super) fn ratio(&self, flag: &str) -> f64 {
        match self.found(flag).value {
            Some(Value::Ratio(ratio)) => Some(ratio),
            _ => None,
        }
        .expect("the table has a ratio here")
    }

    pub(super) fn is_on(&self, flag: &str) -> bool {
        self.found(flag).value == Some(Value::YesNo(true))
    }

    pub(super) fn address(&self, flag: &str) -> IpAddr {
        self.optional_address(flag).expect("the table has an address here")
    }

    pub(super) fn optional_address(&self, flag: &str) -> Option<IpAddr> {
        match self.found(flag).value {
            Some(Value::Address(address)) => Some(address),
            _ => None,
        }
    }

    /// None when the option is off.
    pub(super) fn networks(&self, flag: &str) -> Vec<IpNet> {
        match &self.found(flag).value {
            Some(Value::Networks(networks)) => networks.clone(),
            _ => Vec::new(),
        }
    }

    /// Whether this word is among those of the option.
    pub(super) fn has_word(&self, flag: &str, word: &str) -> bool {
        matches!(&self.found(flag).value, Some(Value::Words(words)) if words.iter().any(|other| other == word))
    }

    /// `None` when the option is off.
    pub(super) fn optional(&self, flag: &str) -> Option<String> {
        match &self.found(flag).value {
            Some(Value::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }

    pub(super) fn text(&self, flag: &str) -> String {
        self.optional(flag).expect("the table has a text with a default here")
    }

    pub(super) fn secret(&self, flag: &str) -> Secret {
        Secret::new(self.text(flag))
    }

    fn found(&self, flag: &str) -> &Found {
        self.found.get(flag).expect("only options of the table are asked for")
    }
}

fn on_command_line(option: &Opt, matches: &ArgMatches, warnings: &mut Vec<String>) -> Option<Written> {
    let written = |flag: &str| {
        let texts: Vec<&str> = matches.get_many::<String>(flag)?.map(String::as_str).collect();
        Some(Written { source: format!("--{flag}"), text: texts.join(",") })
    };
    first(written(option.flag), option.alias_flag.and_then(written), warnings)
}

fn in_environment(option: &Opt, variable: Lookup, warnings: &mut Vec<String>) -> Result<Option<Written>, ConfigError> {
    let lookup = |name: &str| -> Result<Option<Written>, ConfigError> {
        let Some(text) = variable(name).filter(|text| !text.is_empty() || option.hears_empty_variable()) else {
            return Ok(None);
        };
        let text = text.into_string().map_err(|_| ConfigError::Wrong(format!("{name}: it takes UTF-8 text only")))?;
        Ok(Some(Written { source: name.to_owned(), text }))
    };
    let alias = option.alias_variable.map(lookup).transpose()?.flatten();
    let value = first(lookup(option.variable)?, alias, warnings);

    let Some(file_variable) = option.file_variable() else { return Ok(value) };
    let Some(file) = lookup(&file_variable)? else { return Ok(value) };
    if let Some(value) = value {
        return Err(ConfigError::Wrong(format!(
            "{file_variable}: it is not allowed beside {}; the secret is taken from one of the two",
            value.source
        )));
    }
    let about = |what: &str| {
        ConfigError::Wrong(format!(
            "{file_variable}: {:?} is not allowed; it takes a file with the secret in it ({what})",
            file.text
        ))
    };
    match read_file(Path::new(&file.text)) {
        Ok(text) if text.is_empty() => Err(about("this one is empty")),
        Ok(text) => Ok(Some(Written { source: file_variable, text })),
        Err(error) => Err(about(&error.to_string())),
    }
}

/// The main spelling wins over the other one.
fn first(main: Option<Written>, alias: Option<Written>, warnings: &mut Vec<String>) -> Option<Written> {
    if let (Some(main), Some(alias)) = (&main, &alias) {
        warnings.push(format!(
            "{} and {} are two names of one option: {} is used, {} is ignored",
            main.source, alias.source, main.source, alias.source
        ));
    }
    main.or(alias)
}

fn refusal(option: &Opt, written: Option<&Written>, allowed: &str) -> ConfigError {
    let name = format!("--{}", option.flag);
    let source = match written {
        None => " (by default)".into(),
        Some(written) if written.source == name => String::new(),
        Some(written) => format!(" ({})", written.source),
    };
    let text = match written {
        _ if option.secret => "***",
        Some(written) => &written.text,
        None => option.default.unwrap_or_default(),
    };
    ConfigError::Wrong(format!("{name}{source}: {text:?} is not allowed; it takes {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn given(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Given, String> {
        let matches = Config::command().try_get_matches_from([&["obscura-server"], arguments].concat()).unwrap();
        let variable =
            |name: &str| variables.iter().find(|(variable, _)| *variable == name).map(|(_, text)| OsString::from(text));
        Given::find(&matches, &variable).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_variable_counts_as_not_given() {
        let given = given(&[], &[("OBSCURA_SERVER_PORT", ""), ("OBSCURA_AUTH_JWT_SECRET", "")]).unwrap();
        assert!(!given.is_written("server-port"));
        assert!(!given.is_written("jwt-secret"));
    }

    #[test]
    fn an_empty_variable_is_a_value_where_it_says_something() {
        let given = given(&[], &[("OBSCURA_SERVER_TRUSTED_PROXIES", ""), ("OBSCURA_ATTACHMENT_PREFIX", "")]).unwrap();
        assert_eq!(given.networks("trusted-proxies"), vec![]);
        assert_eq!(given.text("attachment-prefix"), "");
    }

    #[test]
    fn a_refused_secret_is_not_repeated() {
        let sentence = given(&["--db-url", "hunter2"], &[]).err().unwrap();
        assert!(sentence.starts_with("--db-url: \"***\" is not allowed"), "{sentence}");
    }

    #[test]
    fn a_sentence_names_the_spelling_that_was_used() {
        let sentence = given(&[], &[("OBSCURA_WS_MESSAGE_FETCH_BATCH_SIZE", "0")]).err().unwrap();
        assert_eq!(
            sentence,
            "--batch-limit (OBSCURA_WS_MESSAGE_FETCH_BATCH_SIZE): \"0\" is not allowed; it takes a whole number from 1 \
             to 10000"
        );
    }

    #[test]
    fn a_variable_that_is_not_text_is_refused() {
        use std::os::unix::ffi::OsStringExt;

        let matches = Config::command().try_get_matches_from(["obscura-server"]).unwrap();
        let variable = |name: &str| (name == "OBSCURA_DATA_DIR").then(|| OsString::from_vec(vec![0xff]));
        let sentence = Given::find(&matches, &variable).err().unwrap().to_string();
        assert_eq!(sentence, "OBSCURA_DATA_DIR: it takes UTF-8 text only");
    }

    #[test]
    fn every_default_is_allowed() {
        for data_dir in [&[][..], &["--data-dir", "data"]] {
            assert!(given(data_dir, &[]).is_ok());
        }
    }
}
