//! What an option is, and which texts it takes.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;

/// Options that stand together in `--help` and on the reference page.
#[derive(Debug)]
pub struct Group {
    /// Heading.
    pub title: &'static str,
    /// In the order in which they are shown.
    pub options: &'static [Opt],
}

/// One setting: how it is spelled, what it takes, what it means.
#[derive(Debug)]
pub struct Opt {
    /// Flag without the leading dashes.
    pub flag: &'static str,
    /// Environment variable.
    pub variable: &'static str,
    /// What holds when nothing is given; `None` means the option is then off.
    pub default: Option<&'static str>,
    /// What holds instead in embedded mode; `DIR` stands for the folder.
    pub embedded: Option<&'static str>,
    /// Another published spelling of the flag, without the leading dashes.
    pub alias_flag: Option<&'static str>,
    /// Another published spelling of the variable.
    pub alias_variable: Option<&'static str>,
    /// Which values are allowed.
    pub takes: Takes,
    /// One sentence without its full stop.
    pub help: &'static str,
    /// Never printed, and also read from the file named by the variable with `_FILE` appended.
    pub secret: bool,
    /// Known to this server alone, not published for the protocol.
    pub ours: bool,
}

/// Which texts an option takes. Numbers are whole and lie within the two limits.
#[derive(Clone, Copy, Debug)]
pub enum Takes {
    /// A span of time in days.
    Days(u64, u64),
    /// A span of time in seconds.
    Seconds(u64, u64),
    /// A span of time in milliseconds.
    Milliseconds(u64, u64),
    /// A size in bytes.
    Bytes(u64, u64),
    /// A number of things.
    Count(u64, u64),
    /// A TCP port.
    Port,
    /// A number from 0 to 1.
    Ratio,
    /// `true` or `false`; the bare flag means `true`.
    YesNo,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Some of these words, separated by commas; may be empty.
    Words(&'static [&'static str]),
    /// An IP address.
    Address,
    /// Networks or addresses separated by commas; may be empty.
    Networks,
    /// A URL that begins with one of these.
    Url(&'static [&'static str]),
    /// A text that is not empty.
    Text,
    /// Any text, the empty one included.
    AnyText,
    /// A path to a file.
    File,
    /// A path to a folder.
    Folder,
}

/// A text that was found good, as what it means.
#[derive(Clone, Debug, PartialEq, PartialOrd)]
pub enum Value {
    /// From `Bytes`, `Count` and `Port`.
    Number(u64),
    /// From `Days`, `Seconds` and `Milliseconds`.
    Duration(Duration),
    /// From `Ratio`.
    Ratio(f64),
    /// From `YesNo`.
    YesNo(bool),
    /// From `Address`.
    Address(IpAddr),
    /// From `Networks`.
    Networks(Vec<IpNet>),
    /// From `Words`.
    Words(Vec<String>),
    /// From everything else.
    Text(String),
}

/// An option with a default.
pub const fn option(
    flag: &'static str,
    variable: &'static str,
    default: &'static str,
    takes: Takes,
    help: &'static str,
) -> Opt {
    Opt { default: Some(default), ..optional(flag, variable, takes, help) }
}

/// An option that is off unless given.
pub const fn optional(flag: &'static str, variable: &'static str, takes: Takes, help: &'static str) -> Opt {
    Opt {
        flag,
        variable,
        default: None,
        embedded: None,
        alias_flag: None,
        alias_variable: None,
        takes,
        help,
        secret: false,
        ours: false,
    }
}

impl Opt {
    pub(super) const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    pub(super) const fn ours(self) -> Self {
        Self { ours: true, ..self }
    }

    pub(super) const fn embedded(self, value: &'static str) -> Self {
        Self { embedded: Some(value), ..self }
    }

    pub(super) const fn or(self, flag: &'static str) -> Self {
        Self { alias_flag: Some(flag), ..self }
    }

    pub(super) const fn or_variable(self, variable: &'static str) -> Self {
        Self { alias_variable: Some(variable), ..self }
    }

    /// The variable that names a file with the value, for secrets.
    pub fn file_variable(&self) -> Option<String> {
        self.secret.then(|| format!("{}_FILE", self.variable))
    }

    /// The meaning, beginning with a capital.
    pub(super) fn sentence(&self) -> String {
        let mut letters = self.help.chars();
        letters.next().map(|first| first.to_uppercase().to_string() + letters.as_str()).unwrap_or_default()
    }

    /// Whether an empty variable says something. Elsewhere it counts as not given, because that is what container
    /// files make of a setting left blank.
    pub(super) fn hears_empty_variable(&self) -> bool {
        !self.secret && matches!(self.takes, Takes::Networks | Takes::AnyText)
    }
}

impl Takes {
    /// What the text means, or `None` when it is not allowed.
    pub fn read(self, text: &str) -> Option<Value> {
        let within = |min, max| text.parse::<u64>().ok().filter(|number| (min..=max).contains(number));
        Some(match self {
            Self::Days(min, max) => Value::Duration(Duration::from_hours(24 * within(min, max)?)),
            Self::Seconds(min, max) => Value::Duration(Duration::from_secs(within(min, max)?)),
            Self::Milliseconds(min, max) => Value::Duration(Duration::from_millis(within(min, max)?)),
            Self::Bytes(min, max) | Self::Count(min, max) => Value::Number(within(min, max)?),
            Self::Port => Value::Number(within(0, u16::MAX.into())?),
            Self::Ratio => Value::Ratio(text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio))?),
            Self::YesNo => Value::YesNo(text.parse().ok()?),
            Self::Choice(words) => words.contains(&text).then(|| Value::Text(text.to_owned()))?,
            Self::Words(words) => Value::Words(some_of(words, text)?),
            Self::Address => Value::Address(text.parse().ok()?),
            Self::Networks => Value::Networks(networks(text)?),
            Self::Url(schemes) => is_url(text, schemes).then(|| Value::Text(text.to_owned()))?,
            // These characters have a meaning in the URL of the database inside.
            Self::Folder if text.contains(['?', '%', '#']) => return None,
            Self::Text | Self::File | Self::Folder if text.is_empty() => return None,
            Self::Text | Self::AnyText | Self::File | Self::Folder if text.contains('\0') => return None,
            Self::Text | Self::AnyText | Self::File | Self::Folder => Value::Text(text.to_owned()),
        })
    }

    /// What is allowed, to follow "it takes".
    pub fn allowed(self) -> String {
        match self {
            Self::Days(min, max) => format!("a whole number of days from {min} to {max}"),
            Self::Seconds(min, max) => format!("a whole number of seconds from {min} to {max}"),
            Self::Milliseconds(min, max) => format!("a whole number of milliseconds from {min} to {max}"),
            Self::Bytes(min, max) => format!("a whole number of bytes from {min} to {max}"),
            Self::Count(min, max) => format!("a whole number from {min} to {max}"),
            Self::Port => format!("a whole number from 0 to {}", u16::MAX),
            Self::Ratio => "a number from 0 to 1".into(),
            Self::YesNo => "true or false".into(),
            Self::Choice(words) => words.join(" or "),
            Self::Words(words) => format!("any of {}, separated by commas", words.join(" and ")),
            Self::Address => "an IP address such as 0.0.0.0 or ::".into(),
            Self::Networks => "networks or addresses separated by commas, such as 10.0.0.0/8,fd00::/8".into(),
            Self::Url(schemes) => format!("a URL that begins with {}", schemes.join(" or ")),
            Self::Text => "a text that is not empty".into(),
            Self::AnyText => "a text".into(),
            Self::File => "the path of a file".into(),
            Self::Folder => "the path of a folder, without any of the characters ? % #".into(),
        }
    }

    /// The placeholder in `--help`.
    pub(super) fn placeholder(self) -> &'static str {
        match self {
            Self::Days(..) => "DAYS",
            Self::Seconds(..) => "SECONDS",
            Self::Milliseconds(..) => "MILLISECONDS",
            Self::Bytes(..) => "BYTES",
            Self::Count(..) => "NUMBER",
            Self::Port => "PORT",
            Self::Ratio => "RATIO",
            Self::YesNo => "BOOL",
            Self::Choice(_) => "WORD",
            Self::Words(_) => "WORDS",
            Self::Address => "ADDRESS",
            Self::Networks => "NETWORKS",
            Self::Url(_) => "URL",
            Self::Text | Self::AnyText => "TEXT",
            Self::File => "FILE",
            Self::Folder => "DIR",
        }
    }
}

fn networks(text: &str) -> Option<Vec<IpNet>> {
    let network = |item: &str| item.parse().ok().or_else(|| item.parse::<IpAddr>().ok().map(IpNet::from));
    items(text).map(network).collect()
}

fn some_of(words: &[&str], text: &str) -> Option<Vec<String>> {
    items(text).map(|item| words.contains(&item).then(|| item.to_owned())).collect()
}

/// What stands between the commas.
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// Only the beginning is looked at: who uses a URL knows its grammar. `local:` is complete, the others go on.
fn is_url(text: &str, schemes: &[&str]) -> bool {
    let goes_on = |scheme: &&str| match text.strip_prefix(*scheme) {
        Some(rest) if *scheme == "local:" => rest.is_empty(),
        // A password without a user: `redis://:password@host`.
        Some(rest) if scheme.ends_with("//") => !rest.is_empty() && !rest.starts_with('?'),
        // `sqlite::memory:` would be another database for every connection.
        Some(rest) => !rest.trim_start_matches("//").is_empty() && !rest.starts_with([':', '?']),
        None => false,
    };
    schemes.iter().any(goes_on) && !text.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(takes: Takes, good: &[&str], bad: &[&str]) {
        for text in good {
            assert!(takes.read(text).is_some(), "{takes:?} refuses {text:?}");
        }
        for text in bad {
            assert_eq!(takes.read(text), None, "{takes:?} takes {text:?}");
        }
    }

    #[test]
    fn a_number_is_whole_and_within_its_limits() {
        takes(Takes::Count(1, 10), &["1", "10"], &["", "0", "11", "-1", "1.5", " 1", "one", "99999999999999999999999"]);
        takes(Takes::Port, &["0", "65535"], &["65536", "99999"]);
    }

    #[test]
    fn a_unit_rides_in_the_type() {
        assert_eq!(Takes::Days(0, 9).read("2"), Some(Value::Duration(Duration::from_hours(48))));
        assert_eq!(Takes::Seconds(0, 9).read("2"), Some(Value::Duration(Duration::from_secs(2))));
        assert_eq!(Takes::Milliseconds(0, 9).read("2"), Some(Value::Duration(Duration::from_millis(2))));
    }

    #[test]
    fn a_ratio_is_a_number_from_0_to_1() {
        takes(Takes::Ratio, &["0", "0.25", "1", "1.0"], &["", "-0.1", "1.01", "NaN", "inf", "half"]);
    }

    #[test]
    fn a_url_begins_with_a_known_scheme_and_goes_on() {
        let bus = Takes::Url(&["redis://", "local:"]);
        takes(
            bus,
            &["redis://h:1", "redis://:p@h", "local:"],
            &["", "redis://", "redis:h", "http://h", "local:x", "redis://h\n"],
        );
        takes(
            Takes::Url(&["sqlite:"]),
            &["sqlite:a.db", "sqlite:///a.db"],
            &["sqlite:", "sqlite://", "sqlite::memory:", "local:"],
        );
    }

    #[test]
    fn networks_may_be_addresses_blank_or_none() {
        takes(Takes::Networks, &["", "10.0.0.0/8, ::1", "fd00::/8,"], &["10.0.0.0/33", "here", "10.0.0.0/8;::1"]);
        assert_eq!(Takes::Networks.read("::1"), Some(Value::Networks(vec!["::1/128".parse().unwrap()])));
    }

    #[test]
    fn words_may_be_blank_or_none_and_no_others() {
        takes(Takes::Words(&["a", "b"]), &["", "a", "b, a"], &["c", "a;b", "a b"]);
        assert_eq!(Takes::Words(&["a", "b"]).read("b,"), Some(Value::Words(vec!["b".to_owned()])));
    }

    #[test]
    fn a_folder_has_a_name_that_fits_a_database_url() {
        takes(Takes::Folder, &["data", "/var/lib/my data"], &["", "a?b", "a%20", "a#b", "a\0"]);
    }
}
