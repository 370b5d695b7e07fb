import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, test } from 'node:test';

import { DeviceLink } from '../../examples/javascript/obscura.mjs';
import { assertNothingElseArrives, assertRefused, next, read, seal, Town, write } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

test('a second device joins by a link session, and then both devices read and write everything', async () => {
  const phone = await town.newPersonOnline('alice');
  const tablet = await town.linkDevice(phone);
  await tablet.connect();
  const bob = await town.newPersonOnline('bob');

  const expected = [
    { deviceId: phone.deviceId, name: phone.credentials.username.replace(/_.*/, "'s phone"), isPrimary: true },
    { deviceId: tablet.deviceId, name: 'tablet', isPrimary: false },
  ];
  assert.deepEqual(await tablet.devices(), expected);
  assert.equal(tablet.userId, phone.userId);

  await write(bob, phone, 'to both of your devices');
  assert.equal(await read(phone), 'to both of your devices');
  assert.equal(await read(tablet), 'to both of your devices');

  // To write to oneself is to tell one's other devices what one has written.
  await write(tablet, [bob, tablet], 'from the tablet');
  assert.equal(await read(bob), 'from the tablet');
  assert.equal(await read(phone), 'from the tablet');
  await write(phone, [bob, phone], 'from the phone');
  assert.equal(await read(bob), 'from the phone');
  assert.equal(await read(tablet), 'from the phone');

  await assertNothingElseArrives([phone, tablet], await town.newPerson('carol'));
});

test('a link session waits for approval, carries the identity sealed, and makes one device', async () => {
  const phone = await town.newPerson('alice');
  const link = await DeviceLink.open(town.relay, phone.credentials);
  const [linkSessionId] = link.code.split('.');
  const path = `/v1/link-sessions/${linkSessionId}`;

  assert.equal((await town.relay.call('GET', path)).status, 204, 'not approved yet');
  await phone.approveLink(link.code);
  const approved = await town.relay.call('GET', path);
  assert.equal(approved.status, 200);
  assert.ok(!approved.bytes.includes(Buffer.from(phone.signal.identity.privateKey.serialize())));

  await link.finish();

  await assertRefused(town.relay.call('GET', path), 404);
  await assertRefused(link.finish(), 404);
  assert.equal((await phone.devices()).length, 2);
});

test('a device that does not know the identity of the account cannot join it', async () => {
  const phone = await town.newPerson('alice');
  const stranger = await town.newPerson('mallory');
  const link = await DeviceLink.open(town.relay, phone.credentials);
  await phone.approveLink(link.code);
  const [linkSessionId] = link.code.split('.');
  const json = { linkSessionId, ...(await stranger.signal.newDeviceKeys({ preKeys: 1, pqPreKeys: 1 })) };

  await assertRefused(town.relay.call('POST', '/v1/devices', { json }), 403);

  await link.finish();
  assert.equal((await phone.devices()).length, 2);
});

test('a thief of the link id cannot join with signatures out of a bundle', async () => {
  const phone = await town.newPerson('alice');
  const thief = await town.newPerson('mallory');
  const link = await DeviceLink.open(town.relay, phone.credentials);
  await phone.approveLink(link.code);
  const [linkSessionId] = link.code.split('.');
  const { identityKey, signedPreKey } = await thief.bundleOf(phone.userId, phone.deviceId);
  const stolen = { linkSessionId, identityKey, signedPreKey, registrationId: 1, oneTimePreKeys: [] };

  await assertRefused(town.relay.call('POST', '/v1/devices', { json: stolen }), 403);
  const identitySignature = signedPreKey.signature;
  await assertRefused(town.relay.call('POST', '/v1/devices', { json: { ...stolen, identitySignature } }), 400);

  await link.finish();
  assert.equal((await phone.devices()).length, 2);
});

test('a send that misses a new device queues nothing, names the device, and succeeds when it is corrected', async () => {
  const phone = await town.newPersonOnline('alice');
  const bob = await town.newPerson('bob');
  await write(bob, phone, 'before');
  assert.equal(await read(phone), 'before');
  const tablet = await town.linkDevice(phone);
  await tablet.connect();

  const outcome = await bob.submit(await seal(bob, phone.userId, [phone.deviceId], 'too few'), randomUUID());

  assert.deepEqual(outcome, {
    invalidDevices: [],
    mismatches: [{ userId: phone.userId, missingDevices: [tablet.deviceId] }],
  });
  const report = await bob.send(phone.userId, Buffer.from('complete'));
  assert.deepEqual(report, { attempts: 2, invalidDevices: [], addedDevices: [tablet.deviceId] });
  // What was refused was encrypted before, so it would have been delivered before.
  assert.equal(await read(phone), 'complete');
  assert.equal(await read(tablet), 'complete');
  assert.deepEqual([phone.envelopes.length, tablet.envelopes.length], [2, 1]);
});

test('a mismatch for one recipient does not keep the message from another', async () => {
  const phone = await town.newPersonOnline('alice');
  const carol = await town.newPersonOnline('carol');
  const bob = await town.newPerson('bob');
  await write(bob, [phone, carol], 'before');
  const tablet = await town.linkDevice(phone);
  await tablet.connect();

  const report = await bob.send([phone.userId, carol.userId], Buffer.from('to everybody'));

  assert.deepEqual(report, { attempts: 2, invalidDevices: [], addedDevices: [tablet.deviceId] });
  assert.equal(await read(tablet), 'to everybody');
  for (const device of [phone, carol]) {
    assert.deepEqual([await read(device), await read(device)], ['before', 'to everybody']);
  }
  await assertNothingElseArrives(carol, bob);
  await assertNothingElseArrives([phone, tablet], bob);
});

test('a device that was removed is reported as invalid, and the others get the message at once', async () => {
  const phone = await town.newPersonOnline('alice');
  const tablet = await town.linkDevice(phone);
  await tablet.connect();
  const bob = await town.newPerson('bob');
  await write(bob, phone, 'to both');
  assert.equal(await read(phone), 'to both');
  assert.equal(await read(tablet), 'to both');

  const closed = next(tablet, 'closed');
  await phone.removeDevice(tablet.deviceId);
  await closed;
  await assertRefused(tablet.devices(), 401);

  const report = await bob.send(phone.userId, Buffer.from('to one'));
  assert.deepEqual(report, { attempts: 1, invalidDevices: [tablet.deviceId], addedDevices: [] });
  assert.equal(await read(phone), 'to one');
  const nextReport = await bob.send(phone.userId, Buffer.from('once more'));
  assert.deepEqual(nextReport.invalidDevices, [], 'the sender has forgotten the removed device');
  assert.equal(await read(phone), 'once more');
});

test('a replaced device is reported as invalid and its successor as missing, and one correction is enough', async () => {
  const phone = await town.newPersonOnline('alice');
  const oldTablet = await town.linkDevice(phone);
  const bob = await town.newPerson('bob');
  await write(bob, phone, 'to the old tablet');
  await phone.removeDevice(oldTablet.deviceId);
  const newTablet = await town.linkDevice(phone, { name: 'new tablet' });
  await newTablet.connect();

  const report = await bob.send(phone.userId, Buffer.from('to the new tablet'));

  assert.deepEqual(report, {
    attempts: 2,
    invalidDevices: [oldTablet.deviceId],
    addedDevices: [newTablet.deviceId],
  });
  assert.equal(await read(newTablet), 'to the new tablet');
  assert.equal(await read(phone), 'to the old tablet');
  assert.equal(await read(phone), 'to the new tablet');
});
