-- Fills the database of an embedded server that is stopped, with rows as the server would have made them: accounts with
-- one device each, which are logged in and have uploaded keys, and in the inbox of each of them the same number of
-- messages, each from a send of its own. `obscura-load start` and `obscura-load growth` run it; by hand:
--
--   sqlite3 -cmd '.param set :users 1000000' -cmd '.param set :messages_each 0' -cmd '.param set :size 1024' \
--     -cmd ".param set :now $(date +%s)000" DIR/obscura.db < load/fill-sqlite.sql
--
-- Nobody knows the passwords and keys of these accounts. They have no one-time prekeys: a million accounts would have
-- a hundred million of them.
PRAGMA cache_size = -262144;
BEGIN IMMEDIATE;

-- Ids carry the time, so that they come in order, as the server's do.
CREATE TEMP TABLE filled AS
WITH RECURSIVE n (n) AS (SELECT 1 WHERE :users > 0 UNION ALL SELECT n + 1 FROM n WHERE n < :users)
SELECT n,
       (SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name = 'devices') + n AS device_no,
       unhex(printf('%012x7', :now + n / 100) || substr(hex(randomblob(2)), 2) || '8' || substr(hex(randomblob(8)), 2)) AS user_id,
       unhex(printf('%012x7', :now + n / 100) || substr(hex(randomblob(2)), 2) || '8' || substr(hex(randomblob(8)), 2)) AS device_id
FROM n;

INSERT INTO users (id, username, password_hash, identity_key)
SELECT user_id, 'filled_' || lower(hex(randomblob(8))),
       '$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',
       unhex('05' || hex(randomblob(32)))
FROM filled;

INSERT INTO devices (no, id, user_id, registration_id, is_primary, tokens_issued_to)
SELECT device_no, device_id, user_id, 1, 1, :now / 1000 + 900 FROM filled;

INSERT INTO device_keys (device_no, signed_id, signed_key, signed_signature)
SELECT device_no, 1, unhex('05' || hex(randomblob(32))), randomblob(64) FROM filled;

INSERT INTO sessions (device_no, family, secret_hash, expires_at)
SELECT device_no, randomblob(32), randomblob(32), :now + 30 * 86400000 FROM filled;

-- Round and round through the inboxes, as mail comes.
INSERT INTO messages (device_no, id, sender_user, sender_device, received_at, body)
WITH RECURSIVE round (round) AS (SELECT 1 WHERE :messages_each > 0 UNION ALL SELECT round + 1 FROM round WHERE round < :messages_each)
SELECT device_no,
       unhex(printf('%012x7', :now) || substr(hex(randomblob(2)), 2) || '8' || substr(hex(randomblob(8)), 2)),
       user_id, device_id, :now, randomblob(:size)
FROM round CROSS JOIN filled;

-- The sends that they came with. The sender is any account; what counts is that there is one row for each.
INSERT INTO sends (sender_no, idempotency_key, digest, outcome, sent_at, review_at, first_position, last_position)
SELECT m.device_no, randomblob(16), randomblob(16), x'', m.received_at, m.received_at + 86400000, m.position, m.position
FROM messages m WHERE m.device_no IN (SELECT device_no FROM filled);

DROP TABLE filled;
COMMIT;
PRAGMA wal_checkpoint(TRUNCATE);
