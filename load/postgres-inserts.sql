-- What PostgreSQL does by itself, to hold the relay's figures against: gathered inserts of 32 messages of 1 KiB into the
-- relay's own tables, each a transaction. Run on the database of a server that has stopped:
--
--   pgbench --no-vacuum --protocol=prepared --client=1 --time=10 --file=load/postgres-inserts.sql URL
--
-- Messages each second are 32 times the transactions.
INSERT INTO messages (position, device_no, id, sender_user, sender_device, body, received_at)
SELECT block + n, 1000000 + n, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(),
       decode(repeat('a5', 1024), 'hex'), 1800000000000
FROM nextval('message_blocks') AS block, generate_series(0, 31) AS n;
