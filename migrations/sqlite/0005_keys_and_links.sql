CREATE TABLE used_prekeys (                       -- one-time prekeys that were handed out, and signed ones that were replaced
    device_no   INTEGER NOT NULL,
    fingerprint BLOB NOT NULL,                    -- the first 8 bytes of SHA-256 over the account's id and the public key
    PRIMARY KEY (device_no, fingerprint)
) STRICT, WITHOUT ROWID;

-- Set by the approving device: the new one has to prove that it holds the identity key.
ALTER TABLE link_sessions ADD COLUMN proof_required INTEGER NOT NULL DEFAULT 0;
