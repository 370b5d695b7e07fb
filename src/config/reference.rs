//! The reference page, `docs/CONFIGURATION.md`, made from the list of options. A test keeps the file equal to it.

use crate::config::{
    option::{Group, Opt},
    table::GROUPS,
};

const INTRODUCTION: &str = "\
# Configuration

Every option is a flag and a variable. `obscura-server --help` shows the same list.

## The short way

```
obscura-server --data-dir ./data
```

is a complete server on one machine (embedded mode). Whatever is not given then takes its embedded form: the database is
`sqlite:DIR/obscura.db`, attachments are in `file:DIR/attachments`, the bus between sockets is `local:`, and the secret that signs
access tokens is made once and kept in `DIR/jwt-secret` (readable by its owner only; keep it with your backups). The folder is made
if it is missing. Each of these can still be given by itself. The characters `?`, `%` and `#` are
not allowed in the folder's path.

Without `--data-dir` the server expects PostgreSQL, Valkey and S3-compatible storage, and a secret:

```
OBSCURA_DATABASE_URL=postgres://obscura:…@db/obscura
OBSCURA_PUBSUB_URL=redis://valkey:6379
OBSCURA_STORAGE_ENDPOINT=http://minio:9000
OBSCURA_STORAGE_FORCE_PATH_STYLE=true
OBSCURA_STORAGE_ACCESS_KEY=…
OBSCURA_STORAGE_SECRET_KEY=…
OBSCURA_AUTH_JWT_SECRET=…           # for example from `openssl rand -base64 32`; the same on every node
```

## Which value holds

1. A flag wins over a variable, a variable over the default.
2. Some options have a second name, a flag or a variable, in the column *Also*. When both names are given on the same side, the first
   one wins and a warning is logged.
3. A variable that is empty counts as not given, because that is what container files make of a setting left blank. The exceptions
   are those where an empty text says something: `OBSCURA_SERVER_TRUSTED_PROXIES` (nobody is trusted) and the two prefixes.
4. Giving the same flag twice is an error, except for lists (`--trusted-proxies`, `--webpush-allowed-networks`, `--health-optional`), which are joined.
5. An option without a meaning in a deployment, such as a Valkey key in embedded mode, is accepted and ignored.

Every value is checked at start. A wrong one stops the start with a sentence such as

```
error: --server-port (OBSCURA_SERVER_PORT): \"99999\" is not allowed; it takes a whole number from 0 to 65535
```

Options are also checked against each other: a minimum is not above its maximum (a minimum that was not given gives way), the two ports
differ, and the two storage keys come together.

In Kubernetes, a service named `obscura-server` makes the cluster put a variable `OBSCURA_SERVER_PORT=tcp://…` into the pods beside
it, which stops the start. Set `enableServiceLinks: false` in the pod, or name the service differently.

## Secrets in files

Flags can be seen by other users of a machine, and variables are inherited by every process. A secret is best given as a file, by a
variable that names it:

";

const AFTER_SECRETS: &str = "
The secret is the file's content without the line break at its end; an empty file is refused. The variable and its `_FILE` form
together are an error; a flag wins over both. Secrets never appear in logs or in error messages.

`--jwt-secret` takes at least 16 bytes. The published default is refused, and so is an empty secret. How to change it without ending
sessions: [OPERATIONS.md](OPERATIONS.md#changing-the-signing-secret).

";

const LEGEND: &str = "\
## All options

An option marked † is one of this server alone; all others are published for the protocol, and other servers may know them too.
";

/// The whole page as Markdown.
pub fn reference_page() -> String {
    let mut page = INTRODUCTION.to_owned();
    page += "| Variable | Instead of |\n|---|---|\n";
    for option in GROUPS.iter().flat_map(|group| group.options) {
        if let Some(file) = option.file_variable() {
            page += &format!("| `{file}` | `--{}`, `{}` |\n", option.flag, option.variable);
        }
    }
    page += AFTER_SECRETS;
    page += LEGEND;
    for group in GROUPS {
        page += &section(group);
    }
    page
}

fn section(group: &Group) -> String {
    let rows: String = group.options.iter().map(row).collect();
    format!(
        "\n### {}\n\n| Flag | Variable | Default | Meaning | Takes | Also |\n|---|---|---|---|---|---|\n{rows}",
        group.title
    )
}

fn row(option: &Opt) -> String {
    let mark = if option.ours { " †" } else { "" };
    let default = match option.default {
        Some(default) => format!("`{default}`"),
        None => "none".into(),
    };
    let embedded = match option.embedded {
        Some("") => "; embedded: one of its own".into(),
        Some(embedded) => format!("; embedded: `{embedded}`"),
        None => String::new(),
    };
    let alias_flag = option.alias_flag.map(|flag| format!("`--{flag}`"));
    let also: Vec<String> =
        alias_flag.into_iter().chain(option.alias_variable.map(|name| format!("`{name}`"))).collect();
    format!(
        "| `--{}`{mark} | `{}` | {default}{embedded} | {} | {} | {} |\n",
        option.flag,
        option.variable,
        option.sentence(),
        option.takes.allowed(),
        also.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_a_row_for_every_option() {
        let page = reference_page();
        for option in GROUPS.iter().flat_map(|group| group.options) {
            assert!(page.contains(&format!("\n| `--{}`", option.flag)), "--{} has no row", option.flag);
        }
    }

    #[test]
    fn a_row_tells_everything_about_its_option() {
        let option = GROUPS[2].options.first().unwrap();
        assert_eq!(
            row(option),
            "| `--db-url` | `OBSCURA_DATABASE_URL` | `postgres://user:password@localhost/signal_server`; embedded: \
             `sqlite:DIR/obscura.db` | Database; `sqlite:PATH` selects the embedded store | a URL that begins with \
             postgres:// or postgresql:// or sqlite: |  |\n"
        );
    }
}
