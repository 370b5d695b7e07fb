-- When an account was last used, so that unused accounts can expire. It counts days on which a server ran, not days
-- of the calendar: neither a long downtime nor a wrong clock makes an account look unused.

ALTER TABLE users ADD COLUMN used_on bigint;                                 -- a number of `service_days`; absent: unknown
ALTER TABLE users ADD COLUMN is_unused boolean NOT NULL DEFAULT false;       -- true until the first use after the sign-up
CREATE INDEX users_by_use ON users (is_unused, used_on);

CREATE TABLE service_days (                       -- one row
    id     bigint PRIMARY KEY,                    -- always 1
    day    bigint NOT NULL,                       -- the latest day on which a server ran, in days since 1970
    number bigint NOT NULL                        -- how many such days there have been
);
