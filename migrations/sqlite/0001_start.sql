-- Times are Unix milliseconds. Ids that clients see are 16-byte UUIDs. Secrets are kept as SHA-256 only.
-- No column says when an account or device was made.

CREATE TABLE users (
    id            BLOB PRIMARY KEY NOT NULL,
    username      TEXT NOT NULL UNIQUE,           -- lower case
    password_hash TEXT NOT NULL,                  -- Argon2id, PHC form
    identity_key  BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE devices (
    no              INTEGER PRIMARY KEY AUTOINCREMENT,
    id              BLOB NOT NULL UNIQUE,
    user_id         BLOB NOT NULL REFERENCES users (id),
    name            TEXT,
    registration_id INTEGER NOT NULL,
    is_primary      INTEGER NOT NULL,
    tokens_void_to  INTEGER NOT NULL DEFAULT 0,   -- access tokens that expire at or before this second are void
    tokens_issued_to INTEGER NOT NULL DEFAULT 0   -- the latest second in which one of its access tokens expires
) STRICT;
CREATE INDEX devices_of_user ON devices (user_id, no);

CREATE TABLE device_keys (
    device_no               INTEGER PRIMARY KEY NOT NULL,
    signed_id               INTEGER NOT NULL,
    signed_key              BLOB NOT NULL,
    signed_signature        BLOB NOT NULL,
    pq_last_resort_id        INTEGER,              -- the three together or none
    pq_last_resort_key       BLOB,
    pq_last_resort_signature BLOB
) STRICT;

CREATE TABLE one_time_prekeys (
    no         INTEGER PRIMARY KEY AUTOINCREMENT, -- the order of upload
    device_no  INTEGER NOT NULL,
    kind       INTEGER NOT NULL,                  -- 0: elliptic curve, 1: post-quantum
    key_id     INTEGER NOT NULL,
    public_key BLOB NOT NULL,
    signature  BLOB,                              -- post-quantum keys only
    UNIQUE (device_no, kind, key_id)
) STRICT;
CREATE INDEX one_time_prekeys_in_order ON one_time_prekeys (device_no, kind, no);

CREATE TABLE sessions (                           -- a device's live refresh token, one at the most
    device_no   INTEGER PRIMARY KEY NOT NULL,
    family      BLOB NOT NULL UNIQUE,             -- the half of the token that stays through refreshes
    secret_hash BLOB NOT NULL,                    -- of the half that changes
    expires_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX sessions_by_age ON sessions (expires_at);

CREATE TABLE refresh_uses (                       -- refresh tokens used a moment ago
    secret_hash     BLOB PRIMARY KEY NOT NULL,
    device_no       INTEGER NOT NULL,
    idempotency_key BLOB,
    used_at         INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX refresh_uses_by_age ON refresh_uses (used_at);
CREATE INDEX refresh_uses_of_device ON refresh_uses (device_no);

CREATE TABLE gateway_tickets (
    hash       BLOB PRIMARY KEY NOT NULL,
    device_no  INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX gateway_tickets_by_age ON gateway_tickets (expires_at);
CREATE INDEX gateway_tickets_of_device ON gateway_tickets (device_no);

CREATE TABLE link_sessions (
    hash       BLOB PRIMARY KEY NOT NULL,
    user_id    BLOB NOT NULL,
    approval   BLOB,                              -- absent until a primary device approves
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX link_sessions_of_user ON link_sessions (user_id);
CREATE INDEX link_sessions_by_age ON link_sessions (expires_at);

CREATE TABLE push_tokens (
    device_no INTEGER PRIMARY KEY NOT NULL,
    token     TEXT NOT NULL
) STRICT;

-- The inboxes. `position` only grows and is never used again, and SQLite has one writer at a time: so rows become
-- visible in the order of `position`. Time of receipt follows it as well as the clock does.
CREATE TABLE messages (
    position      INTEGER PRIMARY KEY AUTOINCREMENT,
    device_no     INTEGER NOT NULL,
    id            BLOB NOT NULL,
    sender_user   BLOB NOT NULL,
    sender_device BLOB NOT NULL,
    received_at   INTEGER NOT NULL,
    body          BLOB NOT NULL
) STRICT;
CREATE INDEX messages_of_device ON messages (device_no, position);
CREATE INDEX messages_by_age ON messages (received_at);

CREATE TABLE sends (                              -- outcomes, for requests that come again
    sender_no       INTEGER NOT NULL,
    idempotency_key BLOB NOT NULL,
    digest          BLOB NOT NULL,                -- of the request body
    outcome         BLOB NOT NULL,                -- empty when everything was queued
    sent_at         INTEGER NOT NULL,
    review_at       INTEGER NOT NULL,             -- when to look whether it can be forgotten
    first_position  INTEGER NOT NULL,             -- its messages; an empty range when none were queued
    last_position   INTEGER NOT NULL,
    PRIMARY KEY (sender_no, idempotency_key)
) STRICT, WITHOUT ROWID;
CREATE INDEX sends_to_review ON sends (review_at);

CREATE TABLE attachments (
    id         BLOB PRIMARY KEY NOT NULL,
    user_id    BLOB NOT NULL,                     -- whose quota it counts against
    size       INTEGER NOT NULL,                  -- bytes
    stored     INTEGER NOT NULL,                  -- 0 while it is being uploaded, 1 complete, 2 given up
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX attachments_of_user ON attachments (user_id, size);
CREATE INDEX attachments_by_age ON attachments (created_at);
CREATE INDEX attachments_incomplete ON attachments (created_at) WHERE stored <> 1;

CREATE TABLE upload_debts (                       -- accounts that have uploaded lately
    user_id BLOB PRIMARY KEY NOT NULL,
    paid_at INTEGER NOT NULL                      -- when, at the allowed bytes a day, all of it will have been allowed
) STRICT, WITHOUT ROWID;
CREATE INDEX upload_debts_by_age ON upload_debts (paid_at);
