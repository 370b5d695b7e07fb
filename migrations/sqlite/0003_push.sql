-- Who wakes a device, and up to where in its inbox it has been woken.

ALTER TABLE push_tokens ADD COLUMN provider INTEGER NOT NULL DEFAULT 0;      -- 0: FCM, 1: APNs, 2: Web Push
ALTER TABLE push_tokens ADD COLUMN p256dh BLOB;                              -- Web Push: what is sent is encrypted for
ALTER TABLE push_tokens ADD COLUMN auth BLOB;                                -- these two; the token is the endpoint
ALTER TABLE push_tokens ADD COLUMN pushed_to INTEGER NOT NULL DEFAULT 0;     -- a push was sent for mail up to this position …
ALTER TABLE push_tokens ADD COLUMN pushed_at INTEGER NOT NULL DEFAULT 0;     -- … at this time
ALTER TABLE push_tokens ADD COLUMN keys_pushed_at INTEGER NOT NULL DEFAULT 0; -- when one was sent for few prekeys

CREATE TABLE server_keys (                        -- keys that the server made for itself, and all nodes share
    name   TEXT PRIMARY KEY NOT NULL,
    secret BLOB NOT NULL
) STRICT, WITHOUT ROWID;
