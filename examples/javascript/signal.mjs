// The Signal Protocol side of one device: its keys, its sessions and the identities it trusts. Everything lives in
// memory; a real client keeps the same things in an encrypted database. Nothing in this file talks to a server.

import { createHash, randomInt } from 'node:crypto';
import * as signal from '@signalapp/libsignal-client';

const { CiphertextMessageType, ErrorCode, IdentityChange } = signal;

/** The address rule: a device is named by its id in lower case, and its libsignal device number is always 1. */
export function addressOf(deviceId) {
  return signal.ProtocolAddress.new(deviceId.toLowerCase(), 1);
}

/** Somebody shows another identity key than the one that is pinned for them: a reset account, or an impostor. */
export class IdentityChanged extends Error {
  constructor(userId, offered) {
    super(`the identity key of user ${userId} has changed`);
    this.name = 'IdentityChanged';
    this.userId = userId;
    this.offered = offered;
  }
}

/**
 * Pins one identity key per user.
 *
 * libsignal pins per address, and by the address rule every device is an address of its own: a new device of a known
 * user would be accepted with any key. So this store first finds the user that a device belongs to, and then compares
 * with the key of that user. A device never moves to another user.
 */
class PinnedIdentities extends signal.IdentityKeyStore {
  #own;
  #registrationId;
  #userOf = new Map();
  #pinned = new Map();
  #refused = new Map();

  constructor(own, registrationId) {
    super();
    this.#own = own;
    this.#registrationId = registrationId;
  }

  introduce(userId, deviceId) {
    const known = this.#userOf.get(deviceId);
    if (known !== undefined && known !== userId) throw new Error(`device ${deviceId} belongs to another user`);
    this.#userOf.set(deviceId, userId);
  }

  devicesOf(userId) {
    return [...this.#userOf].filter(([, owner]) => owner === userId).map(([deviceId]) => deviceId);
  }

  pin(userId, key) {
    this.#pinned.set(userId, key);
    this.#refused.delete(userId);
  }

  pinned(userId) {
    return this.#pinned.get(userId) ?? null;
  }

  refused(userId) {
    return this.#refused.get(userId) ?? null;
  }

  async getIdentityKey() {
    return this.#own.privateKey;
  }

  async getIdentityKeyPair() {
    return this.#own;
  }

  async getLocalRegistrationId() {
    return this.#registrationId;
  }

  async isTrustedIdentity(address, key) {
    const userId = this.#userOf.get(address.name());
    if (userId === undefined) return false;
    const pinned = this.#pinned.get(userId);
    if (pinned === undefined || pinned.equals(key)) return true;
    this.#refused.set(userId, key);
    return false;
  }

  async saveIdentity(address, key) {
    // Reached only after `isTrustedIdentity` agreed, so this pins at first contact and changes nothing later.
    const userId = this.#userOf.get(address.name());
    if (!this.#pinned.has(userId)) this.#pinned.set(userId, key);
    return IdentityChange.NewOrUnchanged;
  }

  async getIdentity(address) {
    return this.#pinned.get(this.#userOf.get(address.name())) ?? null;
  }
}

class Sessions extends signal.SessionStore {
  #records = new Map();

  async saveSession(address, record) {
    this.#records.set(address.name(), record.serialize());
  }

  async getSession(address) {
    const stored = this.#records.get(address.name());
    return stored === undefined ? null : signal.SessionRecord.deserialize(stored);
  }

  async getExistingSessions(addresses) {
    const records = await Promise.all(addresses.map((address) => this.getSession(address)));
    if (records.includes(null)) throw new Error('there is no session with one of the devices');
    return records;
  }

  forget(deviceId) {
    this.#records.delete(deviceId);
  }
}

class PreKeys extends signal.PreKeyStore {
  #records = new Map();

  async savePreKey(id, record) {
    this.#records.set(id, record);
  }

  async getPreKey(id) {
    return this.#records.get(id) ?? missing('one-time prekey', id);
  }

  async removePreKey(id) {
    this.#records.delete(id);
  }
}

class SignedPreKeys extends signal.SignedPreKeyStore {
  #records = new Map();

  // Old signed prekeys are kept: a first message that was encrypted with one may still wait on the server. A real
  // client deletes them after the server's message retention.
  async saveSignedPreKey(id, record) {
    this.#records.set(id, record);
  }

  async getSignedPreKey(id) {
    return this.#records.get(id) ?? missing('signed prekey', id);
  }
}

class KyberPreKeys extends signal.KyberPreKeyStore {
  #records = new Map();
  #lastResort = new Set();
  #usesOfLastResort = new Set();

  async saveKyberPreKey(id, record, { isLastResort = false } = {}) {
    this.#records.set(id, record);
    if (isLastResort) this.#lastResort.add(id);
  }

  async getKyberPreKey(id) {
    return this.#records.get(id) ?? missing('Kyber prekey', id);
  }

  async markKyberPreKeyUsed(id, signedPreKeyId, baseKey) {
    if (!this.#lastResort.has(id)) {
      this.#records.delete(id);
      return;
    }
    // A last-resort key stays, so a first message that used it could be played back. The sender's base key is new for
    // every session: seeing the same three values again means that this is such a replay.
    const use = `${id}.${signedPreKeyId}.${base64(baseKey.serialize())}`;
    if (this.#usesOfLastResort.has(use)) throw new Error('this first message was already received');
    this.#usesOfLastResort.add(use);
  }
}

function missing(kind, id) {
  throw new Error(`there is no ${kind} ${id}`);
}

export function base64(bytes) {
  return Buffer.from(bytes).toString('base64');
}

function unbase64(text) {
  return new Uint8Array(Buffer.from(text, 'base64'));
}

/** One device as libsignal sees it: makes prekeys, starts sessions, encrypts and decrypts. */
export class SignalDevice {
  identity;
  registrationId = randomInt(1, 16381);
  #address = null;
  #identities;
  #sessions = new Sessions();
  #preKeys = new PreKeys();
  #signedPreKeys = new SignedPreKeys();
  #kyberPreKeys = new KyberPreKeys();
  #nextPreKeyId = 1;
  #nextSignedPreKeyId = 1;
  // One counter for one-time and last-resort Kyber keys, because a message names its key by nothing but the id.
  #nextKyberPreKeyId = 1;
  #turn = Promise.resolve();

  constructor(identity = signal.IdentityKeyPair.generate()) {
    this.identity = identity;
    this.#identities = new PinnedIdentities(identity, this.registrationId);
  }

  /** Tells the device who it is, as soon as the server has given it an id. */
  named(userId, deviceId) {
    this.#address = addressOf(deviceId);
    this.#identities.introduce(userId, deviceId);
    this.#identities.pin(userId, this.identity.publicKey);
  }

  /** New keys to upload at registration, reset or linking. */
  async newDeviceKeys({ preKeys, pqPreKeys }) {
    return {
      identityKey: base64(this.identity.publicKey.serialize()),
      registrationId: this.registrationId,
      pqLastResortPreKey: await this.#newKyberPreKey({ isLastResort: true }),
      ...(await this.newPreKeys({ preKeys, pqPreKeys })),
    };
  }

  /** Proves, for linking, that this device holds the identity key: it signs the link session and all its own keys. */
  proofFor(linkSessionId, keys) {
    const int = (value) => {
      const bytes = Buffer.alloc(4);
      bytes.writeInt32BE(value);
      return bytes;
    };
    const key = ({ keyId, publicKey }) => Buffer.concat([int(keyId), unbase64(publicKey)]);
    const list = (keys) => [int(keys.length), ...keys.map(key)];
    const message = Buffer.concat([
      Buffer.from('obscura.v1 link proof\0', 'ascii'),
      createHash('sha256').update(linkSessionId).digest(),
      unbase64(keys.identityKey),
      int(keys.registrationId),
      key(keys.signedPreKey),
      ...list(keys.oneTimePreKeys),
      Buffer.of(1),
      key(keys.pqLastResortPreKey),
      ...list(keys.pqPreKeys),
    ]);
    return base64(this.identity.privateKey.sign(new Uint8Array(message)));
  }

  /** A new signed prekey and as many one-time prekeys as asked for. */
  async newPreKeys({ preKeys, pqPreKeys }) {
    return {
      signedPreKey: await this.#newSignedPreKey(),
      oneTimePreKeys: await times(preKeys, () => this.#newPreKey()),
      pqPreKeys: await times(pqPreKeys, () => this.#newKyberPreKey()),
    };
  }

  async #newPreKey() {
    const keyId = this.#nextPreKeyId++;
    const key = signal.PrivateKey.generate();
    await this.#preKeys.savePreKey(keyId, signal.PreKeyRecord.new(keyId, key.getPublicKey(), key));
    return { keyId, publicKey: base64(key.getPublicKey().serialize()) };
  }

  async #newSignedPreKey() {
    const keyId = this.#nextSignedPreKeyId++;
    const key = signal.PrivateKey.generate();
    const publicKey = key.getPublicKey().serialize();
    const signature = this.identity.privateKey.sign(publicKey);
    const record = signal.SignedPreKeyRecord.new(keyId, Date.now(), key.getPublicKey(), key, signature);
    await this.#signedPreKeys.saveSignedPreKey(keyId, record);
    return { keyId, publicKey: base64(publicKey), signature: base64(signature) };
  }

  async #newKyberPreKey(kind) {
    const keyId = this.#nextKyberPreKeyId++;
    const pair = signal.KEMKeyPair.generate();
    const publicKey = pair.getPublicKey().serialize();
    const signature = this.identity.privateKey.sign(publicKey);
    const record = signal.KyberPreKeyRecord.new(keyId, Date.now(), pair, signature);
    await this.#kyberPreKeys.saveKyberPreKey(keyId, record, kind);
    return { keyId, publicKey: base64(publicKey), signature: base64(signature) };
  }

  /** Starts a session (PQXDH) with the device that a bundle describes. Checks the bundle's signatures. */
  startSession(userId, bundle) {
    if (!bundle.pqPreKey) throw new Error(`device ${bundle.deviceId} has no post-quantum prekey: its client is too old`);
    const { deviceId, oneTimePreKey, signedPreKey, pqPreKey } = bundle;
    const usable = signal.PreKeyBundle.new(
      bundle.registrationId,
      1,
      oneTimePreKey?.keyId ?? null,
      oneTimePreKey ? signal.PublicKey.deserialize(unbase64(oneTimePreKey.publicKey)) : null,
      signedPreKey.keyId,
      signal.PublicKey.deserialize(unbase64(signedPreKey.publicKey)),
      unbase64(signedPreKey.signature),
      signal.PublicKey.deserialize(unbase64(bundle.identityKey)),
      pqPreKey.keyId,
      signal.KEMPublicKey.deserialize(unbase64(pqPreKey.publicKey)),
      unbase64(pqPreKey.signature),
    );
    return this.#inTurn(userId, deviceId, () =>
      signal.processPreKeyBundle(usable, addressOf(deviceId), this.#address, this.#sessions, this.#identities),
    );
  }

  /** Whether messages can be encrypted for this device without fetching a bundle first. */
  async canReach(deviceId) {
    return (await this.#sessions.getSession(addressOf(deviceId)))?.hasCurrentState() ?? false;
  }

  /** The devices of a user that this device has a session with. */
  async reachableDevicesOf(userId) {
    const devices = this.#identities.devicesOf(userId);
    const reachable = await Promise.all(devices.map((deviceId) => this.canReach(deviceId)));
    return devices.filter((_, index) => reachable[index]);
  }

  /** Encrypts for one device. The type of the ciphertext travels as one byte in front of it. */
  encrypt(userId, deviceId, plaintext) {
    return this.#inTurn(userId, deviceId, async () => {
      const to = addressOf(deviceId);
      const sealed = await signal.signalEncrypt(plaintext, to, this.#address, this.#sessions, this.#identities);
      return Buffer.concat([Buffer.of(sealed.type()), sealed.serialize()]);
    });
  }

  /** Decrypts what a device has sent. Each message can be decrypted once. */
  decrypt(userId, deviceId, sealed) {
    return this.#inTurn(userId, deviceId, () => {
      const from = addressOf(deviceId);
      const body = new Uint8Array(sealed.subarray(1));
      switch (sealed[0]) {
        case CiphertextMessageType.PreKey:
          return signal.signalDecryptPreKey(
            signal.PreKeySignalMessage.deserialize(body), from, this.#address, this.#sessions, this.#identities,
            this.#preKeys, this.#signedPreKeys, this.#kyberPreKeys,
          );
        case CiphertextMessageType.Whisper:
          return signal.signalDecrypt(
            signal.SignalMessage.deserialize(body), from, this.#address, this.#sessions, this.#identities,
          );
        default:
          throw new Error(`messages of type ${sealed[0]} are not understood`);
      }
    });
  }

  /** Forgets the session with a device, because the device is gone. */
  forget(deviceId) {
    this.#sessions.forget(deviceId);
  }

  /** The identity key pinned for a user, or null before the first contact. */
  pinnedIdentity(userId) {
    return this.#identities.pinned(userId);
  }

  /** Accepts a user's new identity. Only for a person to decide, best after comparing safety numbers. */
  acceptIdentity({ userId, offered }) {
    for (const deviceId of this.#identities.devicesOf(userId)) this.#sessions.forget(deviceId);
    this.#identities.pin(userId, offered);
  }

  // libsignal reads a session, works, and writes it back: two operations at once would lose one of the writes.
  #inTurn(userId, deviceId, operation) {
    const result = this.#turn.then(async () => {
      this.#identities.introduce(userId, deviceId);
      try {
        return await operation();
      } catch (error) {
        if (error.code !== ErrorCode.UntrustedIdentity) throw error;
        throw new IdentityChanged(userId, this.#identities.refused(userId));
      }
    });
    this.#turn = result.catch(() => {});
    return result;
  }
}

async function times(count, make) {
  const made = [];
  for (let index = 0; index < count; index++) made.push(await make());
  return made;
}
