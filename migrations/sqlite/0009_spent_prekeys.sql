-- Used prekeys by account instead of by device: devices come and go, and so of two hand-outs of one key only one can be recorded.
CREATE TABLE spent_prekeys (                      -- one-time prekeys that were handed out, and signed ones that were replaced
    user_id     BLOB NOT NULL,
    fingerprint BLOB NOT NULL,                    -- the first 8 bytes of SHA-256 over the account's id and the public key
    PRIMARY KEY (user_id, fingerprint)
) STRICT, WITHOUT ROWID;
INSERT INTO spent_prekeys SELECT DISTINCT d.user_id, u.fingerprint FROM used_prekeys u JOIN devices d ON d.no = u.device_no;
DROP TABLE used_prekeys;
