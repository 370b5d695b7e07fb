-- Fills the database of servers that are stopped, with rows as a server would have made them: accounts with one device
-- each, which are logged in and have uploaded keys, and in the inbox of each of them the same number of messages, each
-- from a send of its own. `obscura-load start` and `obscura-load growth` run it; by hand:
--
--   psql -v users=1000000 -v messages_each=0 -v size=1024 -v now=$(date +%s)000 -f load/fill-postgres.sql URL
--
-- Nobody knows the passwords and keys of these accounts. They have no one-time prekeys: a million accounts would have
-- a hundred million of them.
BEGIN;
SET LOCAL synchronous_commit = off;

-- Ids carry the time, so that they come in order, as the server's do.
CREATE FUNCTION pg_temp.next_id(millis bigint) RETURNS uuid LANGUAGE sql VOLATILE AS
$$ SELECT overlay(overlay(gen_random_uuid()::text PLACING substr(lpad(to_hex(millis), 12, '0'), 1, 8) FROM 1 FOR 8)
                  PLACING substr(lpad(to_hex(millis), 12, '0'), 9, 4) || '-7' FROM 10 FOR 6)::uuid $$;
-- Random bytes without an extension, 32 at a time.
CREATE FUNCTION pg_temp.random_bytes(size int) RETURNS bytea LANGUAGE sql VOLATILE AS
$$ SELECT substr(string_agg(sha256(uuid_send(gen_random_uuid())), ''), 1, size) FROM generate_series(1, size / 32 + 1) $$;

CREATE TEMP TABLE filled ON COMMIT DROP AS
SELECT n, nextval(pg_get_serial_sequence('devices', 'no')) AS device_no,
       pg_temp.next_id(:now + n / 100) AS user_id, pg_temp.next_id(:now + n / 100) AS device_id
FROM generate_series(1, :users) AS n;
ANALYZE filled;

INSERT INTO users (id, username, password_hash, identity_key)
SELECT user_id, 'filled_' || replace(gen_random_uuid()::text, '-', ''),
       '$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA',
       '\x05'::bytea || sha256(uuid_send(gen_random_uuid()))
FROM filled;

INSERT INTO account_locks (user_id, at_most) SELECT user_id, :messages_each FROM filled;

INSERT INTO devices (no, id, user_id, registration_id, is_primary, tokens_issued_to)
SELECT device_no, device_id, user_id, 1, true, :now / 1000 + 900 FROM filled;

INSERT INTO device_keys (device_no, signed_id, signed_key, signed_signature)
SELECT device_no, 1, '\x05'::bytea || sha256(uuid_send(gen_random_uuid())), pg_temp.random_bytes(64) FROM filled;

INSERT INTO sessions (device_no, family, secret_hash, expires_at)
SELECT device_no, sha256(uuid_send(gen_random_uuid())), sha256(uuid_send(gen_random_uuid())), :now + 30 * 86400000::bigint
FROM filled;

-- Round and round through the inboxes, as mail comes, 65536 positions to a block. All bodies are the same random bytes:
-- they are stored as they are, uncompressed, so it makes no difference.
WITH body AS MATERIALIZED (SELECT pg_temp.random_bytes(:size) AS body),
     blocks AS MATERIALIZED (
         SELECT part, nextval('message_blocks') AS block
         FROM generate_series(1, :messages_each) AS round, generate_series(0, (:users - 1) / 65536) AS part)
INSERT INTO messages (position, device_no, id, sender_user, sender_device, received_at, body)
SELECT block + (n - 1) % 65536, device_no, pg_temp.next_id(:now), user_id, device_id, :now, body
FROM blocks JOIN filled ON (n - 1) / 65536 = part CROSS JOIN body;

-- The sends that they came with. The sender is any account; what counts is that there is one row for each.
INSERT INTO sends (sender_no, idempotency_key, digest, outcome, sent_at, review_at, first_position, last_position)
SELECT m.device_no, gen_random_uuid(), substr(sha256(uuid_send(m.id)), 1, 16), '\x'::bytea, m.received_at, m.received_at + 86400000,
       m.position, m.position
FROM messages m JOIN filled USING (device_no);
COMMIT;
ANALYZE;
