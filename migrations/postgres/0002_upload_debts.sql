CREATE TABLE upload_debts (                       -- accounts that have uploaded lately
    user_id uuid PRIMARY KEY,
    paid_at bigint NOT NULL                       -- when, at the allowed bytes a day, all of it will have been allowed
);
CREATE INDEX upload_debts_by_age ON upload_debts (paid_at);
