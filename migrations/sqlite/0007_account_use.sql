-- When an account was last used, so that unused accounts can expire. It counts days on which a server ran, not days
-- of the calendar: neither a long downtime nor a wrong clock makes an account look unused.

ALTER TABLE users ADD COLUMN used_on INTEGER;                                -- a number of `service_days`; absent: unknown
ALTER TABLE users ADD COLUMN is_unused INTEGER NOT NULL DEFAULT 0;           -- 1 until the first use after the sign-up
CREATE INDEX users_by_use ON users (is_unused, used_on);

CREATE TABLE service_days (                       -- one row
    id     INTEGER PRIMARY KEY NOT NULL,          -- always 1
    day    INTEGER NOT NULL,                      -- the latest day on which a server ran, in days since 1970
    number INTEGER NOT NULL                       -- how many such days there have been
) STRICT;
