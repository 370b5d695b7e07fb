import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, test } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';

import { assertNothingElseArrives, meet, read, readAll, seal, Town } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

const QUEUED = { invalidDevices: [], mismatches: [] };

/**
 * Has the acks of a device written. On an open socket the server gathers acks for a while; when the socket is closed it
 * writes them at once, within half a second. There is no answer to an ack, so that time can only be let pass.
 */
async function disconnectAndLetAcksBeWritten(device) {
  await device.disconnect();
  await pause(500);
}

/** Two people, and a way to encrypt for the other that does not send anything yet. */
async function pair({ isBobOnline = true } = {}) {
  const alice = await town.newPerson('alice');
  const bob = await town.newPerson('bob');
  await meet(alice, bob);
  if (isBobOnline) await bob.connect();
  return { alice, bob, sealed: (text) => seal(alice, bob.userId, [bob.deviceId], text) };
}

test('a send repeated with its key, one after the other, is delivered once', async () => {
  const { alice, bob, sealed } = await pair();
  const [message, key] = [await sealed('once'), randomUUID()];

  for (let index = 0; index < 3; index++) assert.deepEqual(await alice.submit(message, key), QUEUED);

  assert.equal(await read(bob), 'once');
  await assertNothingElseArrives(bob, alice);
});

test('a send repeated with its key, all at the same time, is delivered once', async () => {
  const { alice, bob, sealed } = await pair();
  const [message, key] = [await sealed('once'), randomUUID()];

  const outcomes = await Promise.all(Array.from({ length: 16 }, () => alice.submit(message, key)));

  for (const outcome of outcomes) assert.deepEqual(outcome, QUEUED);
  assert.equal(await read(bob), 'once');
  await assertNothingElseArrives(bob, alice);
});

test('a send repeated after its message was acknowledged is not delivered again', async () => {
  const { alice, bob, sealed } = await pair();
  const [message, key] = [await sealed('once'), randomUUID()];
  await alice.submit(message, key);
  assert.equal(await read(bob), 'once');
  await disconnectAndLetAcksBeWritten(bob);

  assert.deepEqual(await alice.submit(message, key), QUEUED);

  bob.envelopes.length = 0;
  await bob.connect();
  await assertNothingElseArrives(bob, alice);
});

test('a send that was refused for a mismatch gives the same refusal again, whatever has changed', async () => {
  const { alice, bob, sealed } = await pair();
  const tablet = await town.linkDevice(bob);
  const [message, key] = [await sealed('too few'), randomUUID()];
  const refused = await alice.submit(message, key);
  assert.deepEqual(refused.mismatches, [{ userId: bob.userId, missingDevices: [tablet.deviceId] }]);

  await bob.removeDevice(tablet.deviceId);

  assert.deepEqual(await alice.submit(message, key), refused);
  await assertNothingElseArrives(bob, alice);
});

test('two people may use the same key', async () => {
  const { alice, bob, sealed } = await pair();
  const carol = await town.newPerson('carol');
  await meet(carol, bob);
  const key = randomUUID();

  await alice.submit(await sealed('from alice'), key);
  await carol.submit(await seal(carol, bob.userId, [bob.deviceId], 'from carol'), key);

  assert.deepEqual(await readAll(bob, 2), ['from alice', 'from carol']);
});

test('a send repeated after a power cut of the server is delivered once', async () => {
  const { alice, bob, sealed } = await pair({ isBobOnline: false });
  const [message, key] = [await sealed('once'), randomUUID()];
  await alice.submit(message, key);

  await town.killAndStartServerAgain();
  assert.deepEqual(await alice.submit(message, key), QUEUED);

  await bob.connect();
  assert.equal(await read(bob), 'once');
  await assertNothingElseArrives(bob, alice);
});

test('a send repeated after ack and power cut is not delivered again', async () => {
  const { alice, bob, sealed } = await pair();
  const [message, key] = [await sealed('once'), randomUUID()];
  await alice.submit(message, key);
  assert.equal(await read(bob), 'once');
  await disconnectAndLetAcksBeWritten(bob);

  await town.killAndStartServerAgain();
  assert.deepEqual(await alice.submit(message, key), QUEUED);

  bob.envelopes.length = 0;
  await bob.connect();
  await assertNothingElseArrives(bob, alice);
});

test('sends that power cuts interrupt are repeated until they are answered, and each is delivered once', async (t) => {
  const { alice, bob, sealed } = await pair({ isBobOnline: false });
  const sends = [];
  let interrupted = 0;

  // In the middle of it: some are answered, some are being written, some have not arrived.
  for (const answersBeforeCut of [1, 2, 5, 10, 20]) {
    const round = [];
    for (let index = 0; index < 60; index++) {
      const text = `message ${sends.length + round.length}`;
      round.push({ text, message: await sealed(text), key: randomUUID() });
    }
    let answers = 0;
    const submitted = round.map(async ({ message, key }) => {
      await alice.submit(message, key);
      if (++answers === answersBeforeCut) await town.server.kill();
    });
    const results = await Promise.allSettled(submitted);
    interrupted += results.filter(({ status }) => status === 'rejected').length;
    await town.startServerAgain();
    sends.push(...round);
  }
  t.diagnostic(`${interrupted} of ${sends.length} sends were interrupted`);
  assert.ok(interrupted > 0);

  for (const { message, key } of sends) assert.deepEqual(await alice.submit(message, key), QUEUED);

  await bob.connect();
  const texts = await readAll(bob, sends.length);
  assert.deepEqual(new Set(texts), new Set(sends.map(({ text }) => text)));
  assert.equal(bob.envelopes.length, sends.length);
  await assertNothingElseArrives(bob, alice);
});
