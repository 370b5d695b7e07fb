-- What the receiver is told of mail that it doesn't get, and what a sender has queued lately.

CREATE TABLE inbox_notices (                      -- devices that have not been told everything yet
    device_no INTEGER PRIMARY KEY NOT NULL,
    period    INTEGER NOT NULL,                   -- changes whenever the device has acknowledged what it was told
    since     INTEGER NOT NULL,                   -- when the first of these happened; a whole hour
    expired   INTEGER NOT NULL,                   -- messages that expired unread
    refused   INTEGER NOT NULL                    -- messages that were not queued for want of room
) STRICT;

CREATE TABLE send_debts (                         -- accounts that have queued much lately
    user_id BLOB PRIMARY KEY NOT NULL,
    paid_at INTEGER NOT NULL                      -- when, at the allowed bytes a day, all of it will have been allowed
) STRICT, WITHOUT ROWID;
CREATE INDEX send_debts_by_age ON send_debts (paid_at);
