// What the tests rely on in the client itself. No server takes part.

import assert from 'node:assert/strict';
import { randomBytes, randomUUID } from 'node:crypto';
import { test } from 'node:test';

import { IdentityChanged, openAttachment, sealAttachment, SignalDevice } from '../../examples/javascript/obscura.mjs';
import { idFromBytes, idToBytes } from '../../examples/javascript/relay.mjs';

const STOCK = { preKeys: 2, pqPreKeys: 2 };

async function newDevice(userId = randomUUID()) {
  const device = new SignalDevice();
  const names = { userId, deviceId: randomUUID() };
  device.named(names.userId, names.deviceId);
  const keys = await device.newDeviceKeys(STOCK);
  const bundle = ({ isExhausted = false } = {}) => ({
    ...keys,
    deviceId: names.deviceId,
    oneTimePreKey: isExhausted ? null : keys.oneTimePreKeys[0],
    pqPreKey: isExhausted ? keys.pqLastResortPreKey : keys.pqPreKeys[0],
  });
  return { ...names, signal: device, bundle };
}

async function speak(from, to, text) {
  const sealed = await from.signal.encrypt(to.userId, to.deviceId, Buffer.from(text));
  return Buffer.from(await to.signal.decrypt(from.userId, from.deviceId, sealed)).toString();
}

test('two devices talk both ways after one of them read the bundle of the other', async () => {
  for (const isExhausted of [false, true]) {
    const [alice, bob] = [await newDevice(), await newDevice()];
    await alice.signal.startSession(bob.userId, bob.bundle({ isExhausted }));
    for (let round = 0; round < 5; round++) {
      assert.equal(await speak(alice, bob, `there ${round}`), `there ${round}`);
      assert.equal(await speak(bob, alice, `back ${round}`), `back ${round}`);
    }
  }
});

test('a message decrypts once', async () => {
  const [alice, bob] = [await newDevice(), await newDevice()];
  await alice.signal.startSession(bob.userId, bob.bundle({ isExhausted: true }));
  const sealed = await alice.signal.encrypt(bob.userId, bob.deviceId, Buffer.from('hello'));

  await bob.signal.decrypt(alice.userId, alice.deviceId, sealed);

  await assert.rejects(bob.signal.decrypt(alice.userId, alice.deviceId, sealed));
});

test('a bundle with a broken signature starts no session', async () => {
  const [alice, bob] = [await newDevice(), await newDevice()];
  for (const member of ['signedPreKey', 'pqPreKey']) {
    const bundle = bob.bundle();
    const broken = { ...bundle, [member]: { ...bundle[member], signature: randomBytes(64).toString('base64') } };
    await assert.rejects(alice.signal.startSession(bob.userId, broken));
  }
  assert.equal(await alice.signal.canReach(bob.deviceId), false);
});

test('a second device of a known user has to show the same identity key', async () => {
  const [alice, bob] = [await newDevice(), await newDevice()];
  await alice.signal.startSession(bob.userId, bob.bundle());
  const impostor = await newDevice(bob.userId);

  await assert.rejects(alice.signal.startSession(bob.userId, impostor.bundle()), IdentityChanged);

  await impostor.signal.startSession(alice.userId, alice.bundle());
  await assert.rejects(speak(impostor, alice, 'it is me, bob'), IdentityChanged);
  assert.equal(await speak(alice, bob, 'somebody plays you'), 'somebody plays you');
});

test('a device cannot be passed off as a device of another user', async () => {
  const [alice, mallory] = [await newDevice(), await newDevice()];
  await alice.signal.startSession(mallory.userId, mallory.bundle());

  await assert.rejects(alice.signal.startSession(randomUUID(), mallory.bundle()), /belongs to another user/);
});

test('a changed bit anywhere in an attachment is noticed', () => {
  const { sealed, key, digest } = sealAttachment(randomBytes(40));
  assert.equal(openAttachment(sealed, { key, digest }).length, 40);
  for (let index = 0; index < sealed.length; index++) {
    const changed = Buffer.from(sealed);
    changed[index] ^= 1;
    assert.throws(() => openAttachment(changed, { key, digest }), /changed on its way/);
  }
});

test('ids keep their value in both spellings', () => {
  const id = randomUUID();
  assert.equal(idToBytes(id).length, 16);
  assert.equal(idFromBytes(idToBytes(id)), id);
});
