import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';

import { assertNothingElseArrives, read, readAll, receive, Town, write } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

/** Acks are written within this time after the socket is closed. They are not answered: it can only be let pass. */
const ACKS_ARE_WRITTEN_MS = 500;

function numbered(name, count) {
  return Array.from({ length: count }, (_, index) => `${name} ${index + 1}`);
}

test('fifty messages each way, sent and read at the same time, arrive once and in order', async () => {
  const alice = await town.newPersonOnline('alice');
  const bob = await town.newPersonOnline('bob');
  const [fromAlice, fromBob] = [numbered('from alice', 50), numbered('from bob', 50)];
  const sendAll = async (from, to, texts) => {
    for (const text of texts) await write(from, to, text);
  };

  const [readByBob, readByAlice] = await Promise.all([
    readAll(bob, 50), readAll(alice, 50), sendAll(alice, bob, fromAlice), sendAll(bob, alice, fromBob),
  ]);

  assert.deepEqual(readByBob, fromAlice);
  assert.deepEqual(readByAlice, fromBob);
  await assertNothingElseArrives(alice, bob);
  await assertNothingElseArrives(bob, alice);
});

test('fifty messages each way, one answering the other, turn the ratchet every time', async () => {
  const alice = await town.newPersonOnline('alice');
  const bob = await town.newPersonOnline('bob');

  for (let round = 1; round <= 50; round++) {
    await write(alice, bob, `question ${round}`);
    assert.equal(await read(bob), `question ${round}`);
    await write(bob, alice, `answer ${round}`);
    assert.equal(await read(alice), `answer ${round}`);
  }

  const types = [...bob.envelopes, ...alice.envelopes].map(({ sealed }) => sealed[0]);
  assert.equal(types.filter((type) => type === 3).length, 1, 'only the very first message carries the key agreement');
});

test('mail for somebody offline waits, comes in order, comes again until the ack, and never after it', async () => {
  const alice = await town.newPerson('alice');
  const bob = await town.newPerson('bob');
  // More than one batch of 50, and one message that is large.
  const texts = [...numbered('letter', 59), 'x'.repeat(200_000)];
  for (const text of texts) await write(alice, bob, text);

  await bob.connect();
  const messages = [];
  for (const text of texts) {
    const message = await receive(bob);
    assert.equal(message.body.toString(), text);
    messages.push(message);
  }
  const ids = messages.map(({ id }) => id);
  assert.equal(new Set(ids).size, texts.length);

  await bob.disconnect();
  bob.envelopes.length = 0;
  await bob.connect();
  await write(alice, bob, 'after the reconnect');
  assert.equal(await read(bob), 'after the reconnect', 'the client hides what it has already decrypted');
  assert.deepEqual(bob.envelopes.slice(0, -1).map(({ id }) => id), ids, 'the server has sent everything again, in order');

  bob.acknowledge(...messages);
  await bob.disconnect();
  await pause(ACKS_ARE_WRITTEN_MS);
  bob.envelopes.length = 0;
  await bob.connect();
  await assertNothingElseArrives(bob, alice);
});

test('an envelope names the sending user and device and the time of the server', async () => {
  const alice = await town.newPerson('alice');
  const bob = await town.newPersonOnline('bob');

  const earliest = Date.now();
  await write(alice, bob, 'who is this?');
  const message = await receive(bob);

  assert.equal(message.userId, alice.userId);
  assert.equal(message.deviceId, alice.deviceId);
  assert.ok(message.receivedByServer >= earliest && message.receivedByServer <= Date.now());
});

test('one send reaches several people, and people who are not named hear nothing', async () => {
  const alice = await town.newPerson('alice');
  const friends = [];
  for (const name of ['bob', 'carol', 'dave']) friends.push(await town.newPersonOnline(name));
  const eve = await town.newPersonOnline('eve');

  await write(alice, friends, 'to all of you');

  for (const friend of friends) assert.equal(await read(friend), 'to all of you');
  await assertNothingElseArrives(eve, alice);
});
