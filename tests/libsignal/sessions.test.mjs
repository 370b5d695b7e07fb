import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, test } from 'node:test';

import { assertRefused, next, read, Town, write } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

test('a refresh gives new tokens that work and leaves the device connected', async () => {
  const alice = await town.newPersonOnline('alice');
  const bob = await town.newPerson('bob');
  const old = alice.session;

  await alice.refresh();

  assert.notEqual(alice.session.refreshToken, old.refreshToken);
  assert.equal(alice.session.deviceId, old.deviceId);
  await assertRefused(town.relay.call('POST', '/v1/session/refresh', { json: { refreshToken: old.refreshToken } }), 401);
  await write(bob, alice, 'still there?');
  assert.equal(await read(alice), 'still there?');
});

test('a refresh whose answer was lost gives the same answer again for the same key', async () => {
  const { session } = await town.newPerson('alice');
  const headers = { 'idempotency-key': randomUUID() };
  const json = { refreshToken: session.refreshToken };
  const refresh = async () => (await town.relay.call('POST', '/v1/session/refresh', { json, headers })).json();

  const lost = await refresh();

  assert.deepEqual(await refresh(), lost);
});

test('logging out ends the session at once, and mail waits for the next log-in', async () => {
  const alice = await town.newPersonOnline('alice');
  const bob = await town.newPerson('bob');
  const { token, refreshToken } = alice.session;
  const closed = next(alice, 'closed');

  await alice.logOut();

  await closed;
  await assertRefused(town.relay.call('GET', '/v1/devices', { token }), 401);
  await assertRefused(town.relay.call('POST', '/v1/session/refresh', { json: { refreshToken } }), 401);
  await write(bob, alice, 'while you were away');
  await alice.logIn(alice.credentials);
  await alice.connect();
  assert.equal(await read(alice), 'while you were away');
});

test('a wrong password is refused, and so is the device of somebody else', async () => {
  const alice = await town.newPerson('alice');
  const bob = await town.newPerson('bob');

  await assertRefused(alice.logIn({ ...alice.credentials, password: 'not the password' }), 401);
  await assertRefused(alice.logIn(bob.credentials), 409);
});
