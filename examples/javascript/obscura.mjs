// A small Obscura client: everything that an app on a phone does with the server, in memory and in one place.
// `signal.mjs` holds the cryptography of messages, `attachments.mjs` that of files, `relay.mjs` the plain HTTP.

import { EventEmitter, once } from 'node:events';
import { randomUUID } from 'node:crypto';
import { setTimeout as pause } from 'node:timers/promises';
import { IdentityKeyPair, PrivateKey, PublicKey } from '@signalapp/libsignal-client';
import WebSocket from 'ws';

import { openAttachment, sealAttachment } from './attachments.mjs';
import {
  decode, encode, idFromBytes, idToBytes, Relay, RelayError, SendMessageRequest, SendMessageResponse, WebSocketFrame,
} from './relay.mjs';
import { IdentityChanged, SignalDevice } from './signal.mjs';

export { IdentityChanged, openAttachment, Relay, RelayError, sealAttachment, SignalDevice };

const LINK_PURPOSE = 'Obscura link session';
const ATTEMPTS_TO_SEND = 5;

/**
 * How many one-time prekeys a device likes to have on the server. Both numbers are above the server's threshold of 20, or
 * it would ask for more after every fetch. Kyber keys are big, and there is a last resort: a smaller stock is enough.
 */
const STOCK = { preKeys: 60, pqPreKeys: 30 };

/**
 * One device of one account.
 *
 * Events: `envelope` (as it came, before decryption), `submitted` (what the server gets to see of a send),
 * `preKeyStatus` (the server counts few prekeys), `refilled` (new prekeys were uploaded), `trouble` (a background task
 * failed), `closed` (the gateway socket is gone, with code and reason).
 */
export class Device extends EventEmitter {
  relay;
  userId;
  deviceId;
  signal;
  /** Set to false to upload prekeys only by calling `refill`. */
  refillsByItself = true;
  #session;
  #stock;
  #socket = null;
  #refreshing = null;
  #refreshKey = null;
  #refilling = null;
  #reading = Promise.resolve();
  #inbox = [];
  // Envelope ids that were handled, and whether the app is done with them. A real client writes this to its database
  // together with the message, and forgets ids that are older than the server's retention.
  #handled = new Map();

  constructor(relay, signal, session, stock) {
    super();
    this.relay = relay;
    this.signal = signal;
    this.#stock = stock;
    this.userId = session.userId;
    this.deviceId = session.deviceId;
    this.#session = session;
    signal.named(this.userId, this.deviceId);
  }

  // ── Accounts and sessions ──────────────────────────────────────────────────────────────────────────────────────

  /** Creates an account. This device becomes its primary one. */
  static async register(relay, { username, password, name, stock = STOCK }) {
    const signal = new SignalDevice();
    const json = { username, password, name, ...(await signal.newDeviceKeys(stock)) };
    return new Device(relay, signal, (await relay.call('POST', '/v1/users', { json })).json(), stock);
  }

  /** Starts an account over with a new identity and this as its only device. Peers will see that the key changed. */
  static async reset(relay, { username, password, name, stock = STOCK }) {
    const signal = new SignalDevice();
    const json = { username, password, name, ...(await signal.newDeviceKeys(stock)) };
    return new Device(relay, signal, (await relay.call('POST', '/v1/users/reset', { json })).json(), stock);
  }

  /** Logs this device in again, for instance after `logOut`. */
  async logIn({ username, password }) {
    const json = { username, password, deviceId: this.deviceId };
    this.#session = (await this.relay.call('POST', '/v1/session', { json })).json();
    this.#refreshKey = null;
  }

  /** Ends the session of this device. Its keys and the messages that wait for it stay on the server. */
  async logOut() {
    await this.call('DELETE', '/v1/session');
  }

  /** The tokens of this device: `token`, `refreshToken`, `expiresAt`. To be stored as safely as the keys. */
  get session() {
    return this.#session;
  }

  /** Exchanges the refresh token for a new pair of tokens. */
  refresh() {
    this.#refreshing ??= this.#refresh().finally(() => (this.#refreshing = null));
    return this.#refreshing;
  }

  async #refresh() {
    // The server takes a refresh token once. When its answer is lost, the same key fetches the same answer again.
    this.#refreshKey ??= randomUUID();
    const headers = { 'idempotency-key': this.#refreshKey };
    const json = { refreshToken: this.#session.refreshToken };
    const options = { json, headers, isRepeatable: true };
    this.#session = (await this.relay.call('POST', '/v1/session/refresh', options)).json();
    this.#refreshKey = null;
  }

  /** One request in the name of this device. Refreshes the access token when it is about to expire or refused. */
  async call(method, path, options = {}) {
    if (this.#session.expiresAt * 1000 < Date.now() + 30_000) await this.refresh();
    const token = this.#session.token;
    try {
      return await this.relay.call(method, path, { ...options, token });
    } catch (error) {
      if (error.status !== 401) throw error;
      if (token === this.#session.token) await this.refresh();
      return this.relay.call(method, path, { ...options, token: this.#session.token });
    }
  }

  // ── Prekeys ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Uploads a new signed prekey and, if wanted, one-time prekeys. The last-resort Kyber key stays as it is. */
  async refill({ preKeys = this.#stock.preKeys, pqPreKeys = this.#stock.pqPreKeys } = {}) {
    const json = await this.signal.newPreKeys({ preKeys, pqPreKeys });
    await this.call('POST', '/v1/keys', { json });
    this.emit('refilled', { preKeys, pqPreKeys });
  }

  /** The bundles of all devices of a user, each with a one-time prekey that is spent by asking. */
  async bundlesOf(userId) {
    return (await this.call('GET', `/v1/keys/${userId}`)).json().bundles;
  }

  /** The bundle of one device. */
  async bundleOf(userId, deviceId) {
    return (await this.call('GET', `/v1/keys/${userId}/devices/${deviceId}`)).json();
  }

  #answerPreKeyStatus(status) {
    this.emit('preKeyStatus', status);
    if (!this.refillsByItself || this.#refilling) return;
    const preKeys = Math.max(0, this.#stock.preKeys - status.oneTimePreKeyCount);
    const pqPreKeys = Math.max(0, this.#stock.pqPreKeys - status.pqPreKeyCount);
    if (preKeys === 0 && pqPreKeys === 0) return;
    this.#refilling = this.refill({ preKeys, pqPreKeys })
      .catch((error) => this.emit('trouble', error))
      .finally(() => (this.#refilling = null));
  }

  // ── Sending ────────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Encrypts `plaintext` for every device of the given users and has it queued for all of them.
   *
   * Names of devices come from the server: a send that misses a device is refused for that user with the ids that are
   * missing, and is then corrected here. A user's id may be this device's own; that reaches the account's other devices.
   * Throws `IdentityChanged` when a new device shows another identity key than the pinned one.
   */
  async send(userIds, plaintext) {
    const recipients = [userIds].flat().map((userId) => ({ userId, sealed: new Map() }));
    let unfinished = recipients;
    const report = { attempts: 0, invalidDevices: [], addedDevices: [] };
    for (const { userId } of recipients) await this.#meet(userId);
    while (unfinished.length > 0) {
      if (report.attempts++ === ATTEMPTS_TO_SEND) throw new Error('the devices of the recipients keep changing');
      for (const recipient of unfinished) await this.#sealFor(recipient, plaintext);
      // A corrected send is another send, so it gets a key of its own.
      const outcome = await this.submit(unfinished, randomUUID());
      for (const deviceId of outcome.invalidDevices) this.signal.forget(deviceId);
      for (const { userId, missingDevices } of outcome.mismatches) {
        for (const deviceId of missingDevices) {
          await this.signal.startSession(userId, await this.bundleOf(userId, deviceId));
        }
        report.addedDevices.push(...missingDevices);
      }
      report.invalidDevices.push(...outcome.invalidDevices);
      const mismatched = new Set(outcome.mismatches.map(({ userId }) => userId));
      unfinished = unfinished.filter(({ userId }) => mismatched.has(userId));
    }
    return report;
  }

  /** Makes sure that there is a session with somebody, before the first message to them. */
  async #meet(userId) {
    // For our own account the server tells the other devices by a mismatch; a fetch would spend our own prekeys too.
    if (userId === this.userId || (await this.signal.reachableDevicesOf(userId)).length > 0) return;
    for (const bundle of await this.bundlesOf(userId)) await this.signal.startSession(userId, bundle);
  }

  /** Encrypts for the devices that a recipient has, keeping what was already encrypted for the same plaintext. */
  async #sealFor({ userId, sealed }, plaintext) {
    const devices = await this.signal.reachableDevicesOf(userId);
    for (const deviceId of sealed.keys()) if (!devices.includes(deviceId)) sealed.delete(deviceId);
    for (const deviceId of devices) {
      if (!sealed.has(deviceId)) sealed.set(deviceId, await this.signal.encrypt(userId, deviceId, plaintext));
    }
  }

  /**
   * Hands encrypted messages to the server: `[{ userId, sealed: Map(deviceId → bytes) }]`.
   *
   * Repeating a call with the same key delivers nothing twice, so a lost connection is simply tried again.
   */
  async submit(recipients, idempotencyKey) {
    const request = recipients.map(({ userId, sealed }) => ({
      userId: idToBytes(userId),
      submissions: [...sealed].map(([deviceId, message]) => ({ deviceId: idToBytes(deviceId), message })),
    }));
    const bytes = encode(SendMessageRequest, { recipients: request });
    const headers = { 'idempotency-key': idempotencyKey, 'content-type': 'application/x-protobuf' };
    const response = await this.call('POST', '/v1/messages', { bytes, headers, isRepeatable: true });
    this.emit('submitted', { recipients, bytes });
    const { invalidDeviceIds, deviceMismatches } = decode(SendMessageResponse, response.bytes);
    return {
      invalidDevices: invalidDeviceIds.map(idFromBytes),
      mismatches: deviceMismatches.map(({ userId, missingDeviceIds }) => ({
        userId: idFromBytes(userId),
        missingDevices: missingDeviceIds.map(idFromBytes),
      })),
    };
  }

  // ── Receiving ──────────────────────────────────────────────────────────────────────────────────────────────────

  /** Opens the gateway socket. Everything that waits on the server arrives without asking. */
  async connect() {
    const { ticket } = (await this.call('POST', '/v1/gateway/ticket')).json();
    const headers = { authorization: `Ticket ${ticket}` };
    const socket = new WebSocket(this.relay.gateway(), { headers, perMessageDeflate: false, handshakeTimeout: 10_000 });
    this.#socket = socket;
    // Before the opening `once` throws what goes wrong; afterwards every error is followed by `close`.
    socket.on('error', () => {});
    socket.on('message', (data, isBinary) => isBinary && this.#takeFrame(data));
    socket.on('close', (code, reason) => this.emit('closed', code, reason.toString()));
    await once(socket, 'open');
  }

  /** Closes the gateway socket and resolves when it is closed. */
  async disconnect() {
    if (!this.#socket || this.#socket.readyState === WebSocket.CLOSED) return;
    const closed = once(this.#socket, 'close');
    this.#socket.close(1000);
    await closed;
  }

  #takeFrame(data) {
    const frame = decode(WebSocketFrame, data);
    if (frame.preKeyStatus) this.#answerPreKeyStatus(frame.preKeyStatus);
    for (const raw of frame.envelopeBatch?.envelopes ?? []) {
      const envelope = {
        id: idFromBytes(raw.id),
        userId: idFromBytes(raw.senderUserId),
        deviceId: idFromBytes(raw.senderDeviceId),
        receivedByServer: new Date(raw.timestamp),
        sealed: raw.message,
      };
      this.emit('envelope', envelope);
      // One after the other, so that messages come out in the order in which they came in.
      this.#reading = this.#reading.then(() => this.#takeEnvelope(envelope));
    }
  }

  async #takeEnvelope(envelope) {
    const handled = this.#handled.get(envelope.id);
    // Sent again because an earlier ack was lost: acknowledged again, and never decrypted a second time.
    if (handled === 'acknowledged') this.acknowledge(envelope);
    if (handled !== undefined) return;
    this.#handled.set(envelope.id, 'waiting');
    this.#inbox.push(await this.open(envelope).catch((error) => ({ ...envelope, envelope, error })));
    this.emit('inbox');
  }

  /** Decrypts an envelope. Useful for an app only to try again after it accepted a new identity. */
  async open(envelope) {
    const { userId, deviceId, sealed } = envelope;
    return { ...envelope, envelope, body: Buffer.from(await this.signal.decrypt(userId, deviceId, sealed)) };
  }

  /**
   * The next message, waiting for it if there is none yet. It has a `body`, or an `error` if it could not be decrypted.
   * The server keeps it until `acknowledge` is called.
   */
  async nextMessage({ seconds = 10 } = {}) {
    const signal = AbortSignal.timeout(seconds * 1000);
    while (this.#inbox.length === 0) {
      await once(this, 'inbox', { signal }).catch(() => {
        throw new Error(`no message came within ${seconds} s`);
      });
    }
    return this.#inbox.shift();
  }

  /** Tells the server to delete messages. To be called when the app has them in safe keeping. */
  acknowledge(...messages) {
    for (const { id } of messages) this.#handled.set(id, 'acknowledged');
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    this.#socket.send(encode(WebSocketFrame, { ack: { messageIds: messages.map(({ id }) => idToBytes(id)) } }));
  }

  // ── Attachments ────────────────────────────────────────────────────────────────────────────────────────────────

  /** Encrypts and uploads a file. The returned pointer belongs into an encrypted message; it holds the key. */
  async uploadAttachment(plaintext) {
    const { sealed, key, digest } = sealAttachment(plaintext);
    const { id } = (await this.call('POST', '/v1/attachments', { bytes: sealed, seconds: 120 })).json();
    return { id, size: sealed.length, key: key.toString('base64'), digest: digest.toString('base64') };
  }

  /** Downloads, checks and decrypts the file that a pointer names. */
  async downloadAttachment({ id, key, digest }) {
    const { bytes } = await this.call('GET', `/v1/attachments/${id}`, { isRepeatable: true, seconds: 120 });
    return openAttachment(bytes, { key: Buffer.from(key, 'base64'), digest: Buffer.from(digest, 'base64') });
  }

  // ── Devices of one account ─────────────────────────────────────────────────────────────────────────────────────

  async devices() {
    return (await this.call('GET', '/v1/devices')).json().devices;
  }

  async removeDevice(deviceId) {
    await this.call('DELETE', `/v1/devices/${deviceId}`);
  }

  /** Lets a new device into this account. `code` is what the new device shows, usually as a QR code. */
  async approveLink(code) {
    const [id, key] = code.split('.');
    const newDevice = PublicKey.deserialize(new Uint8Array(Buffer.from(key, 'base64url')));
    const bytes = newDevice.seal(this.signal.identity.serialize(), LINK_PURPOSE, new Uint8Array(Buffer.from(id)));
    // The server then takes only a device that proves that it holds the identity key. The id is a secret, so it stands in a
    // header and not in the path, which proxies write down.
    const headers = { 'obscura-link-id': id, 'obscura-require-proof': 'true' };
    await this.call('PUT', '/v1/link-sessions', { bytes, headers });
  }
}

/**
 * A new device on its way into an existing account.
 *
 * The account's identity key comes from the primary device, sealed (HPKE) to a key that exists only here. That key goes
 * from screen to camera and never through the server, so the server can neither read the identity nor slip in another.
 */
export class DeviceLink {
  code;
  #relay;
  #session;
  #key;

  constructor(relay, session, key) {
    this.#relay = relay;
    this.#session = session;
    this.#key = key;
    this.code = `${session.id}.${Buffer.from(key.getPublicKey().serialize()).toString('base64url')}`;
  }

  /** Opens a link session; show its `code` to the primary device. */
  static async open(relay, { username, password }) {
    const session = (await relay.call('POST', '/v1/link-sessions', { json: { username, password } })).json();
    return new DeviceLink(relay, session, PrivateKey.generate());
  }

  /** Waits for the primary device's approval and joins the account. */
  async finish({ name, stock = STOCK } = {}) {
    const { id } = this.#session;
    const approval = new Uint8Array(await this.#approval());
    const identity = this.#key.open(approval, LINK_PURPOSE, new Uint8Array(Buffer.from(id)));
    const signal = new SignalDevice(IdentityKeyPair.deserialize(identity));
    const keys = await signal.newDeviceKeys(stock);
    const json = { linkSessionId: id, name, ...keys, identitySignature: signal.proofFor(id, keys) };
    return new Device(this.#relay, signal, (await this.#relay.call('POST', '/v1/devices', { json })).json(), stock);
  }

  async #approval() {
    while (Date.now() < this.#session.expiresAt * 1000) {
      const headers = { 'obscura-link-id': this.#session.id };
      const { status, bytes } = await this.#relay.call('GET', '/v1/link-sessions', { headers });
      if (status === 200) return bytes;
      await pause(1000);
    }
    throw new Error('nobody approved the new device in time');
  }
}
