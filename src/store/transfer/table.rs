//! The tables that are carried over, and the form in which their rows travel.
//!
//! A row is encoded once, as PostgreSQL's binary `COPY` has it. What is sent to the target, what is read back from it
//! and what the checksums are taken over is then the same bytes, and two equal rows have no second form.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

/// What stands before the rows of a binary `COPY`: a signature, no flags, no extension.
pub(super) const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What stands behind them.
pub(super) const TRAILER: &[u8] = &[0xff, 0xff];

/// A table that both databases have.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// Those of the key come first.
    pub(super) columns: &'static [Column],
    /// How many of the columns are the key, which both databases sort in the same way.
    key: usize,
}

/// A column, with its type in PostgreSQL.
pub(super) struct Column {
    name: &'static str,
    kind: Kind,
    /// What is selected in SQLite, where that is not the column itself.
    expression: Option<&'static str>,
}

#[derive(Clone, Copy)]
enum Kind {
    Uuid,
    Bytes,
    Text,
    Bigint,
    Integer,
    Boolean,
}

/// One value of a key, to be bound.
pub(super) enum KeyValue {
    Number(i64),
    Bytes(Vec<u8>),
}

/// A row has something that this column can't hold.
pub(super) struct Unfit(pub(super) &'static str);

const fn table(name: &'static str, key: usize, columns: &'static [Column]) -> Table {
    Table { name, columns, key }
}

const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind, expression: None }
}

const fn uuid(name: &'static str) -> Column {
    column(name, Kind::Uuid)
}

const fn bytes(name: &'static str) -> Column {
    column(name, Kind::Bytes)
}

const fn text(name: &'static str) -> Column {
    column(name, Kind::Text)
}

const fn bigint(name: &'static str) -> Column {
    column(name, Kind::Bigint)
}

const fn integer(name: &'static str) -> Column {
    column(name, Kind::Integer)
}

/// PostgreSQL finds the messages of a send by the time at which they were received, which SQLite doesn't need. So the
/// time of a send becomes theirs while some of them wait.
const SENT_AT: Column = Column {
    name: "sent_at",
    kind: Kind::Bigint,
    expression: Some(
        "COALESCE((SELECT MAX(m.received_at) FROM messages m \
         WHERE m.position BETWEEN sends.first_position AND sends.last_position), sent_at)",
    ),
};

/// All tables with something in them that must survive, in an order in which each finds what it refers to.
pub(super) static TABLES: &[Table] = &[
    table(
        "users",
        1,
        &[
            uuid("id"),
            text("username"),
            text("password_hash"),
            bytes("identity_key"),
            bigint("used_on"),
            column("is_unused", Kind::Boolean),
        ],
    ),
    table("service_days", 1, &[bigint("id"), bigint("day"), bigint("number")]),
    table(
        "devices",
        1,
        &[
            bigint("no"),
            uuid("id"),
            uuid("user_id"),
            text("name"),
            integer("registration_id"),
            column("is_primary", Kind::Boolean),
            bigint("tokens_void_to"),
            bigint("tokens_issued_to"),
        ],
    ),
    table(
        "device_keys",
        1,
        &[
            bigint("device_no"),
            integer("signed_id"),
            bytes("signed_key"),
            bytes("signed_signature"),
            integer("pq_last_resort_id"),
            bytes("pq_last_resort_key"),
            bytes("pq_last_resort_signature"),
        ],
    ),
    table(
        "one_time_prekeys",
        1,
        &[
            bigint("no"),
            bigint("device_no"),
            integer("kind"),
            integer("key_id"),
            bytes("public_key"),
            bytes("signature"),
        ],
    ),
    table("spent_prekeys", 2, &[uuid("user_id"), bytes("fingerprint")]),
    table("sessions", 1, &[bigint("device_no"), bytes("family"), bytes("secret_hash"), bigint("expires_at")]),
    table("refresh_uses", 1, &[bytes("secret_hash"), bigint("device_no"), uuid("idempotency_key"), bigint("used_at")]),
    table("gateway_tickets", 1, &[bytes("hash"), bigint("device_no"), bigint("expires_at")]),
    table(
        "link_sessions",
        1,
        &[
            bytes("hash"),
            uuid("user_id"),
            bytes("approval"),
            bigint("expires_at"),
            column("proof_required", Kind::Boolean),
        ],
    ),
    table(
        "push_tokens",
        1,
        &[
            bigint("device_no"),
            text("token"),
            integer("provider"),
            bytes("p256dh"),
            bytes("auth"),
            bigint("pushed_to"),
            bigint("pushed_at"),
            bigint("keys_pushed_at"),
            bigint("missing_since"),
        ],
    ),
    table("server_keys", 1, &[text("name"), bytes("secret")]),
    table("server_time", 1, &[bigint("id"), bigint("seen_at"), bytes("database_id"), bigint("confirmations")]),
    table(
        "messages",
        2,
        &[
            bigint("device_no"),
            bigint("position"),
            uuid("id"),
            uuid("sender_user"),
            uuid("sender_device"),
            bigint("received_at"),
            bytes("body"),
        ],
    ),
    table(
        "sends",
        2,
        &[
            bigint("sender_no"),
            uuid("idempotency_key"),
            bytes("digest"),
            bytes("outcome"),
            SENT_AT,
            bigint("review_at"),
            bigint("first_position"),
            bigint("last_position"),
        ],
    ),
    table("attachments", 1, &[uuid("id"), uuid("user_id"), bigint("size"), integer("stored"), bigint("created_at")]),
    table(
        "inbox_notices",
        1,
        &[bigint("device_no"), bigint("period"), bigint("since"), bigint("expired"), bigint("refused")],
    ),
    table("send_debts", 1, &[uuid("user_id"), bigint("paid_at")]),
    table("upload_debts", 1, &[uuid("user_id"), bigint("paid_at")]),
];

impl Table {
    /// The rows in SQLite in the order of the key, those behind a key whose values are bound if `is_behind`.
    pub(super) fn select(&self, is_behind: bool) -> String {
        let expressions = self.columns.iter().map(|column| column.expression.unwrap_or(column.name));
        let (name, key) = (self.name, self.key_names());
        let values = if self.key == 1 { "?" } else { "?, ?" };
        let behind = if is_behind { format!("WHERE ({key}) > ({values})") } else { String::new() };
        format!("SELECT {} FROM {name} {behind} ORDER BY {key}", join(expressions))
    }

    /// The statement that takes rows into PostgreSQL.
    pub(super) fn copy_in(&self) -> String {
        format!(
            "COPY {} ({}) FROM STDIN (FORMAT binary)",
            self.name,
            join(self.columns.iter().map(|column| column.name))
        )
    }

    /// The statement that gives all rows in PostgreSQL, in the order of the key.
    pub(super) fn copy_out(&self) -> String {
        let columns = join(self.columns.iter().map(|column| column.name));
        format!("COPY (SELECT {columns} FROM {} ORDER BY {}) TO STDOUT (FORMAT binary)", self.name, self.key_names())
    }

    /// Appends a row that `select` has given.
    pub(super) fn encode(&self, row: &SqliteRow, into: &mut Vec<u8>) -> Result<(), Unfit> {
        let count = i16::try_from(self.columns.len()).expect("a table has few columns");
        into.extend_from_slice(&count.to_be_bytes());
        self.columns.iter().enumerate().try_for_each(|(n, column)| column.encode(row, n, into))
    }

    /// The key of a row, as it is kept between two batches.
    pub(super) fn key_of(&self, row: &SqliteRow) -> Result<Vec<u8>, Unfit> {
        let mut key = Vec::new();
        let mut columns = self.columns[..self.key].iter().enumerate();
        columns.try_for_each(|(n, column)| column.encode(row, n, &mut key))?;
        Ok(key)
    }

    /// The values of a key that was kept. `None` when it is no key of this table.
    pub(super) fn key_values(&self, mut key: &[u8]) -> Option<Vec<KeyValue>> {
        let mut values = Vec::with_capacity(self.key);
        for column in &self.columns[..self.key] {
            let (length, rest) = key.split_first_chunk::<4>()?;
            let (value, rest) = rest.split_at_checked(usize::try_from(i32::from_be_bytes(*length)).ok()?)?;
            values.push(match column.kind {
                Kind::Bigint => KeyValue::Number(i64::from_be_bytes(value.try_into().ok()?)),
                _ => KeyValue::Bytes(value.to_owned()),
            });
            key = rest;
        }
        key.is_empty().then_some(values)
    }

    fn key_names(&self) -> String {
        join(self.columns[..self.key].iter().map(|column| column.name))
    }
}

impl Column {
    /// Appends the length and the bytes of a value; nothing at all has the length -1.
    fn encode(&self, row: &SqliteRow, n: usize, into: &mut Vec<u8>) -> Result<(), Unfit> {
        let unfit = |_| Unfit(self.name);
        match self.kind {
            Kind::Uuid | Kind::Bytes => {
                let value: Option<&[u8]> = row.try_get(n).map_err(unfit)?;
                if matches!(self.kind, Kind::Uuid) && value.is_some_and(|id| id.len() != 16) {
                    return Err(Unfit(self.name));
                }
                append(value, into);
            }
            Kind::Text => append(row.try_get::<Option<&str>, _>(n).map_err(unfit)?.map(str::as_bytes), into),
            Kind::Bigint | Kind::Integer | Kind::Boolean => match row.try_get::<Option<i64>, _>(n).map_err(unfit)? {
                None => append(None, into),
                Some(number) => self.encode_number(number, into)?,
            },
        }
        Ok(())
    }

    fn encode_number(&self, number: i64, into: &mut Vec<u8>) -> Result<(), Unfit> {
        match self.kind {
            Kind::Integer => {
                let number = i32::try_from(number).map_err(|_| Unfit(self.name))?;
                append(Some(&number.to_be_bytes()), into);
            }
            Kind::Boolean => append(Some(&[u8::from(number != 0)]), into),
            _ => append(Some(&number.to_be_bytes()), into),
        }
        Ok(())
    }
}

fn append(value: Option<&[u8]>, into: &mut Vec<u8>) {
    let length = value.map_or(-1, |value| i32::try_from(value.len()).expect("SQLite has no longer values"));
    into.extend_from_slice(&length.to_be_bytes());
    into.extend_from_slice(value.unwrap_or_default());
}

fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// The tables that the migrations make, each with its columns.
    fn made_in(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
        let folder = format!("{}/migrations/{folder}", env!("CARGO_MANIFEST_DIR"));
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let text: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
        let mut tables = created(&text);
        for added in text.split("ALTER TABLE ").skip(1) {
            let words: Vec<&str> = added.split_whitespace().take(4).collect();
            match words[..] {
                [table, "ADD", "COLUMN", column] => {
                    tables.get_mut(table).unwrap().insert(column.to_owned());
                }
                // How a column is kept changes nothing about what is in it.
                [_, "ALTER", "COLUMN", _] => {}
                _ => panic!("a change that this test doesn't know: {words:?}"),
            }
        }
        for dropped in text.split("DROP TABLE ").skip(1) {
            tables.remove(dropped.split(';').next().unwrap()).unwrap();
        }
        tables
    }

    fn created(text: &str) -> BTreeMap<String, BTreeSet<String>> {
        let tables = text.split("CREATE TABLE ").skip(1);
        let table = |text: &str| {
            let (name, rest) = text.split_once(' ').unwrap();
            let columns = rest.lines().skip(1).take_while(|line| !line.starts_with(')'));
            let names = columns.filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
            let is_column = |name: &String| name.chars().next().is_some_and(char::is_lowercase);
            (name.to_owned(), names.filter(is_column).collect())
        };
        tables.map(table).collect()
    }

    #[test]
    fn every_table_comes_along_with_all_its_columns() {
        let ours: BTreeMap<String, BTreeSet<String>> = TABLES
            .iter()
            .map(|table| (table.name.to_owned(), table.columns.iter().map(|column| column.name.to_owned()).collect()))
            .collect();
        assert_eq!(ours, made_in("sqlite"));
        let mut theirs = made_in("postgres");
        theirs.retain(|name, _| !["account_locks", "jobs"].contains(&name.as_str()));
        assert_eq!(ours, theirs);
    }

    #[test]
    fn a_key_that_was_kept_is_read_back() {
        let messages = TABLES.iter().find(|table| table.name == "messages").unwrap();
        let mut key = Vec::new();
        append(Some(&7_i64.to_be_bytes()), &mut key);
        append(Some(&9_i64.to_be_bytes()), &mut key);
        let values = messages.key_values(&key).unwrap();
        assert!(matches!(values[..], [KeyValue::Number(7), KeyValue::Number(9)]));
        assert!(messages.key_values(&key[1..]).is_none() && messages.key_values(&[]).is_none());
    }
}
