-- The newest time that the server has seen, in whole minutes: one row. A wrong clock shows by it at the next start. It says
-- nothing about any account.

CREATE TABLE server_time (
    id            INTEGER PRIMARY KEY NOT NULL CHECK (id = 1),
    seen_at       INTEGER NOT NULL,
    database_id   BLOB NOT NULL,                  -- random, made once: another database at the same address shows by it
    confirmations INTEGER NOT NULL                -- how often a time was taken on somebody's word, and may have gone back
) STRICT;
