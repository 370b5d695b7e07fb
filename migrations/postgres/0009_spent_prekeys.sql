-- Used prekeys by account instead of by device: devices come and go, and so of two hand-outs of one key only one can be recorded.
SET LOCAL lock_timeout = '3s';  -- Hand-outs of the other nodes queue behind it. The start ends with an error if a dump is running.
LOCK TABLE used_prekeys IN ACCESS EXCLUSIVE MODE;
CREATE TABLE spent_prekeys (                      -- one-time prekeys that were handed out, and signed ones that were replaced
    user_id     uuid NOT NULL,
    fingerprint bytea NOT NULL,                   -- the first 8 bytes of SHA-256 over the account's id and the public key
    PRIMARY KEY (user_id, fingerprint)
);
INSERT INTO spent_prekeys SELECT DISTINCT d.user_id, u.fingerprint FROM used_prekeys u JOIN devices d ON d.no = u.device_no;
DROP TABLE used_prekeys;

-- For nodes of the version before, which read and write the former table while others are upgraded.
CREATE VIEW used_prekeys AS SELECT d.no AS device_no, s.fingerprint FROM spent_prekeys s JOIN devices d ON d.user_id = s.user_id;
CREATE FUNCTION record_spent_prekey() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO spent_prekeys SELECT d.user_id, NEW.fingerprint FROM devices d WHERE d.no = NEW.device_no ON CONFLICT DO NOTHING;
    IF FOUND THEN RETURN NEW; END IF;
    RETURN NULL;  -- Not inserted, so `RETURNING` leaves it out: the key was used before.
END $$;
CREATE TRIGGER record_spent_prekey INSTEAD OF INSERT ON used_prekeys FOR EACH ROW EXECUTE FUNCTION record_spent_prekey();
-- Records outlive their device. Those of accounts that are gone are forgotten by an hourly job.
CREATE FUNCTION keep_spent_prekey() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER keep_spent_prekey INSTEAD OF DELETE ON used_prekeys FOR EACH ROW EXECUTE FUNCTION keep_spent_prekey();
