-- Since when a Web Push service has said that it doesn't know a subscription: only when that lasts is it deleted.

ALTER TABLE push_tokens ADD COLUMN missing_since INTEGER NOT NULL DEFAULT 0;  -- Unix milliseconds of a whole hour; 0: it is known
