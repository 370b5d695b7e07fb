CREATE TABLE upload_debts (                       -- accounts that have uploaded lately
    user_id BLOB PRIMARY KEY NOT NULL,
    paid_at INTEGER NOT NULL                      -- when, at the allowed bytes a day, all of it will have been allowed
) STRICT, WITHOUT ROWID;
CREATE INDEX upload_debts_by_age ON upload_debts (paid_at);
