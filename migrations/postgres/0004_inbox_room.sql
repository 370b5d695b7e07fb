-- What the receiver is told of mail that it doesn't get, what a sender has queued lately, and bytes beside numbers.

CREATE TABLE inbox_notices (                      -- devices that have not been told everything yet
    device_no bigint PRIMARY KEY,
    period    bigint NOT NULL,                    -- changes whenever the device has acknowledged what it was told
    since     bigint NOT NULL,                    -- when the first of these happened; a whole hour
    expired   bigint NOT NULL,                    -- messages that expired unread
    refused   bigint NOT NULL                     -- messages that were not queued for want of room
);

CREATE TABLE send_debts (                         -- accounts that have queued much lately
    user_id uuid PRIMARY KEY,
    paid_at bigint NOT NULL                       -- when, at the allowed bytes a day, all of it will have been allowed
);
CREATE INDEX send_debts_by_age ON send_debts (paid_at);

-- As `at_most`, in bytes. A node of a former version changes `at_most` alone: then it differs from `bytes_of`, and the bytes
-- are not known.
ALTER TABLE account_locks ADD COLUMN bytes_at_most bigint NOT NULL DEFAULT 0;
ALTER TABLE account_locks ADD COLUMN bytes_of integer NOT NULL DEFAULT 0;
