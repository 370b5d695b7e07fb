// The people in the tests, and what they do all the time.

import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';

import { Device, DeviceLink, Relay } from '../../examples/javascript/obscura.mjs';
import { Server } from './server.mjs';
import { within } from './within.mjs';

/** A server and the `Relay` through which everybody reaches it, also after it was started again. */
export class Town {
  static async open(options) {
    const town = new Town();
    town.server = await Server.start(options);
    town.relay = new Relay(town.server.api);
    return town;
  }

  close() {
    return this.server.remove();
  }

  async startServerAgain() {
    await this.server.startAgain();
    this.relay.url = this.server.api;
  }

  async killAndStartServerAgain() {
    await this.server.kill();
    await this.startServerAgain();
  }

  /** A new account with one device, not connected yet. */
  async newPerson(nickname, { stock } = {}) {
    const username = `${nickname}_${randomBytes(6).toString('hex')}`;
    const credentials = { username, password: randomBytes(16).toString('hex') };
    const device = await Device.register(this.relay, { ...credentials, name: `${nickname}'s phone`, stock });
    return watched(this, device, credentials);
  }

  /** A person who is connected. */
  async newPersonOnline(nickname, options) {
    const device = await this.newPerson(nickname, options);
    await device.connect();
    return device;
  }

  /** A second device in the account of `primary`, joined by a link session. */
  async linkDevice(primary, { name = 'tablet', stock } = {}) {
    const link = await DeviceLink.open(this.relay, primary.credentials);
    await primary.approveLink(link.code);
    return watched(this, await link.finish({ name, stock }), primary.credentials);
  }

  /** Starts the account of `device` over. */
  async resetAccount({ credentials }) {
    return watched(this, await Device.reset(this.relay, { ...credentials, name: 'new phone' }), credentials);
  }
}

/** Notes every envelope as it comes from the socket: duplicates that the client would hide are still seen here. */
function watched(town, device, credentials) {
  device.credentials = credentials;
  device.envelopes = [];
  device.on('envelope', (envelope) => device.envelopes.push(envelope));
  device.on('trouble', (error) => {
    // A refill in the background may well be cut off when a test ends its server.
    if (town.server.isRunning) throw error;
  });
  return device;
}

/** Sends text to all devices of one or more people. */
export function write(from, to, text) {
  return from.send([to].flat().map(({ userId }) => userId), Buffer.from(text));
}

/** Encrypts text for known devices and packs it for `submit`, without asking the server whether these are all. */
export async function seal(from, userId, deviceIds, text) {
  const sealed = new Map();
  for (const deviceId of deviceIds) sealed.set(deviceId, await from.signal.encrypt(userId, deviceId, Buffer.from(text)));
  return [{ userId, sealed }];
}

/** Makes sure that `from` has a session with each device of `to`. */
export async function meet(from, to) {
  for (const bundle of await from.bundlesOf(to.userId)) await from.signal.startSession(to.userId, bundle);
}

/** The next message, which has to be readable. It is not acknowledged yet. */
export async function receive(device) {
  const message = await device.nextMessage();
  if (message.error) throw message.error;
  return message;
}

/** Reads and acknowledges one message and returns its text. */
export async function read(device) {
  const message = await receive(device);
  device.acknowledge(message);
  return message.body.toString();
}

/** Reads and acknowledges `count` messages. */
export async function readAll(device, count) {
  const texts = [];
  while (texts.length < count) texts.push(await read(device));
  return texts;
}

/**
 * Proves that nothing else is on its way: mail is delivered oldest first, so when a message that is sent now is the next
 * one to arrive, there was none before it. Takes one connected device, or several of the same account.
 */
export async function assertNothingElseArrives(devices, sender) {
  devices = [devices].flat();
  const counts = devices.map(({ envelopes }) => envelopes.length);
  const marker = `marker ${randomBytes(8).toString('hex')}`;
  await write(sender, devices[0], marker);
  for (const [index, device] of devices.entries()) {
    assert.equal(await read(device), marker);
    assert.equal(device.envelopes.length, counts[index] + 1, 'an envelope came besides the marker');
  }
}

/** The arguments of the next event of that name. Call it before causing the event. */
export function next(device, event, seconds = 10) {
  return within(seconds, once(device, event), `the event “${event}”`);
}

/** Asserts that a promise is refused by the server with that status. */
export function assertRefused(promise, status) {
  return assert.rejects(promise, (error) => {
    assert.equal(error.status, status, error.message);
    return true;
  });
}
