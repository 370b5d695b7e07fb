//! Uploads on SQLite. A trip to the thread of the connection costs as much as a statement, so a group makes two, and one
//! when no upload asks for room.

use std::collections::HashMap;

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{FromRow, Row, Sqlite};

use crate::model::ids::{AttachmentId, UserId};
use crate::store::sqlite::SqliteStore;
use crate::store::uploads::{AccountUsage, Reservation, Reserved, Step, StepResult, began, counted, whole};
use crate::store::{Result, json_list};

macro_rules! complete {
    () => {
        "BEGIN IMMEDIATE;
         UPDATE attachments SET stored = 1
         WHERE stored = 0 AND id IN (SELECT substr($1, asked.value, 16) FROM json_each($2) asked)
         RETURNING id;"
    };
}

const COMPLETE: &str = concat!(complete!(), "COMMIT");

/// Completes, and asks what counts against the accounts of those that begin: one row for each, in their order.
const COMPLETE_AND_ASK: &str = concat!(
    complete!(),
    "SELECT COALESCE(SUM(MAX(a.size, $6)), 0),
            (SELECT d.paid_at FROM upload_debts d WHERE d.user_id = substr($3, asked.value, 16))
     FROM json_each($4) asked
     LEFT JOIN attachments a ON $5 AND a.user_id = substr($3, asked.value, 16)
     GROUP BY asked.key ORDER BY asked.key"
);

const BEGIN: &str = "
    INSERT INTO attachments (id, user_id, size, stored, created_at)
    SELECT substr($1, row.value ->> 0, 16), substr($1, (row.value ->> 0) + 16, 16), row.value ->> 1, 0, row.value ->> 2
    FROM json_each($2) row;

    INSERT INTO upload_debts (user_id, paid_at)
    SELECT substr($1, row.value ->> 0, 16), row.value ->> 1 FROM json_each($3) row WHERE true
    ON CONFLICT (user_id) DO UPDATE SET paid_at = excluded.paid_at;

    COMMIT";

/// Takes all these steps in one transaction.
pub(super) async fn take(sqlite: &SqliteStore, steps: &[Step]) -> Result<Vec<StepResult>> {
    let mut complete = Vec::with_capacity(steps.len());
    let mut begin = Vec::with_capacity(steps.len());
    for step in steps {
        match step {
            Step::Begin(upload) => begin.push(upload),
            Step::Complete(id) => complete.push(*id),
        }
    }
    let mut tx = sqlite.without_begin().await?;
    if begin.is_empty() {
        let [_begun, completed, _committed] = tx.finish(completion(COMPLETE, &complete)).await?;
        return answers(steps, &completed.rows, Vec::new());
    }
    let mut users: Vec<UserId> = begin.iter().map(|upload| upload.user).collect();
    users.sort_unstable();
    users.dedup();
    let has_quota = begin.iter().any(|upload| upload.allowance.quota_bytes > 0);
    let question = completion(COMPLETE_AND_ASK, &complete)
        .bind(users.iter().flat_map(|user| *user.as_bytes()).collect::<Vec<u8>>())
        .bind(json_list((0..users.len()).map(|n| n * 16 + 1)))
        .bind(has_quota)
        .bind(counted(0));
    let [_begun, completed, used] = tx.run(question).await?;
    let used = used.rows.iter().map(|row| Ok(AccountUsage::from_row(row)?)).collect::<Result<Vec<_>>>()?;
    let mut used: HashMap<UserId, AccountUsage> = users.into_iter().zip(used).collect();
    let (mut admitted, mut reserved) = (Vec::with_capacity(begin.len()), Vec::with_capacity(begin.len()));
    for upload in begin {
        let came = used.entry(upload.user).or_default().admit(upload);
        admitted.extend((came == Reserved::Yes).then_some(upload));
        reserved.push(came);
    }
    let [_rows, _debts, _committed] = tx.finish(beginning(&admitted, &used)).await?;
    answers(steps, &completed.rows, reserved)
}

fn completion(text: &'static str, ids: &[AttachmentId]) -> Query<'static, Sqlite, SqliteArguments> {
    sqlx::query(text)
        .bind(ids.iter().flat_map(|id| *id.as_bytes()).collect::<Vec<u8>>())
        .bind(json_list((0..ids.len()).map(|n| n * 16 + 1)))
}

/// Writes these uploads, and what their accounts owe by them. When all were refused it writes nothing, and so waits for no
/// disk.
fn beginning(
    uploads: &[&Reservation],
    used: &HashMap<UserId, AccountUsage>,
) -> Query<'static, Sqlite, SqliteArguments> {
    let (mut ids, mut rows, mut debts) = (Vec::new(), Vec::new(), HashMap::new());
    for Reservation { user, id, size, born, .. } in uploads {
        let offset = ids.len() + 1;
        rows.push(format!("[{offset},{},{}]", whole(*size), began(*born).millis()));
        ids.extend_from_slice(id.as_bytes());
        ids.extend_from_slice(user.as_bytes());
        if let Some(paid_at) = used.get(user).and_then(|used| used.paid_at) {
            // Where the account stands in the blob, once for each.
            debts.insert(*user, format!("[{},{}]", offset + 16, paid_at.millis()));
        }
    }
    sqlx::query(BEGIN).bind(ids).bind(json_list(rows.into_iter())).bind(json_list(debts.into_values()))
}

/// What came of each step, in their order.
fn answers(steps: &[Step], completed: &[SqliteRow], reserved: Vec<Reserved>) -> Result<Vec<StepResult>> {
    let completed = completed.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<Vec<AttachmentId>>>()?;
    let mut reserved = reserved.into_iter();
    let answers = steps.iter().filter_map(|step| match step {
        Step::Begin(_) => reserved.next().map(StepResult::Begun),
        Step::Complete(id) => Some(StepResult::Completed(completed.contains(id))),
    });
    Ok(answers.collect())
}

impl<'r> FromRow<'r, SqliteRow> for AccountUsage {
    fn from_row(row: &'r SqliteRow) -> sqlx::Result<Self> {
        Ok(Self { bytes: row.try_get(0)?, paid_at: row.try_get(1)? })
    }
}
