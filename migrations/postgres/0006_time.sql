-- The newest time that the nodes have seen, in whole minutes: one row. A wrong clock shows by it at the next start. It says
-- nothing about any account.

CREATE TABLE server_time (
    id            BIGINT PRIMARY KEY CHECK (id = 1),
    seen_at       BIGINT NOT NULL,
    database_id   BYTEA NOT NULL,                 -- random, made once: another database at the same address shows by it
    confirmations BIGINT NOT NULL                 -- how often a time was taken on somebody's word, and may have gone back
);
