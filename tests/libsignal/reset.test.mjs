import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { IdentityChanged } from '../../examples/javascript/obscura.mjs';
import { assertRefused, next, read, Town, write } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

test('a reset ends all old devices: their tokens are refused and their sockets closed', async () => {
  const phone = await town.newPersonOnline('alice');
  const tablet = await town.linkDevice(phone);
  await tablet.connect();
  const tokens = [phone, tablet].map(({ session }) => session);
  const closed = [next(phone, 'closed'), next(tablet, 'closed')];

  const newPhone = await town.resetAccount(phone);

  // An empty close frame has no code; WebSocket libraries show that as 1005.
  for (const [code] of await Promise.all(closed)) assert.equal(code, 1005);
  for (const { token, refreshToken } of tokens) {
    await assertRefused(town.relay.call('GET', '/v1/devices', { token }), 401);
    await assertRefused(town.relay.call('POST', '/v1/gateway/ticket', { token }), 401);
    await assertRefused(town.relay.call('POST', '/v1/session/refresh', { json: { refreshToken } }), 401);
  }
  assert.equal(newPhone.userId, phone.userId);
  assert.deepEqual((await newPhone.devices()).map(({ deviceId }) => deviceId), [newPhone.deviceId]);
});

test('a peer sees that the identity changed, and after accepting it talks to the new device in a new session', async () => {
  const oldAlice = await town.newPersonOnline('alice');
  const bob = await town.newPersonOnline('bob');
  await write(bob, oldAlice, 'hello');
  assert.equal(await read(oldAlice), 'hello');
  await write(oldAlice, bob, 'hello, too');
  assert.equal(await read(bob), 'hello, too');

  const alice = await town.resetAccount(oldAlice);
  await alice.connect();

  const refusal = await write(bob, alice, 'is it still you?').then(assert.fail, (error) => error);
  assert.ok(refusal instanceof IdentityChanged, refusal);
  assert.equal(refusal.userId, alice.userId);
  assert.ok(refusal.offered.equals(alice.signal.identity.publicKey), 'the key that the new device shows');
  assert.ok(bob.signal.pinnedIdentity(alice.userId).equals(oldAlice.signal.identity.publicKey), 'the pin has not moved');

  bob.signal.acceptIdentity(refusal);
  await write(bob, alice, 'good to see you again');
  assert.equal(await read(alice), 'good to see you again');
  await write(alice, bob, 'thank you');
  assert.equal(await read(bob), 'thank you');
  assert.equal(alice.envelopes.length, 1, 'nothing was queued before the identity was accepted');
});

test('a message from a reset account is held back until its new identity is accepted', async () => {
  const oldAlice = await town.newPerson('alice');
  const bob = await town.newPersonOnline('bob');
  await write(oldAlice, bob, 'hello');
  assert.equal(await read(bob), 'hello');

  const alice = await town.resetAccount(oldAlice);
  await write(alice, bob, 'I lost my phone');

  const message = await bob.nextMessage();
  assert.ok(message.error instanceof IdentityChanged, message.error);
  bob.signal.acceptIdentity(message.error);
  const opened = await bob.open(message.envelope);
  assert.equal(opened.body.toString(), 'I lost my phone');
});

test('a reset drops the mail that waits for the old devices and keeps the mail that they have sent', async () => {
  const oldAlice = await town.newPersonOnline('alice');
  const bob = await town.newPerson('bob');
  await write(oldAlice, bob, 'sent before the reset');
  await oldAlice.disconnect();
  await write(bob, oldAlice, 'never read');

  const alice = await town.resetAccount(oldAlice);
  await alice.connect();

  await bob.connect();
  assert.equal(await read(bob), 'sent before the reset');
  const carol = await town.newPerson('carol');
  await write(carol, alice, 'welcome back');
  assert.equal(await read(alice), 'welcome back');
  assert.equal(alice.envelopes.length, 1);
});
