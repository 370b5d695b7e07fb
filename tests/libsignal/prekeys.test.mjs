import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { meet, next, read, Town, write } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

/** The server asks for more when a device has fewer one-time prekeys than this. */
const THRESHOLD = 20;

async function assertTheyCanTalk(person, other) {
  await write(person, other, 'can you read this?');
  assert.equal(await read(other), 'can you read this?');
  await write(other, person, 'yes, and you?');
  assert.equal(await read(person), 'yes, and you?');
}

test('each one-time prekey is handed out at most once, also to many who ask at the same time', async () => {
  const stock = { preKeys: 12, pqPreKeys: 6 };
  const bob = await town.newPerson('bob', { stock });
  const askers = await Promise.all(['a', 'b', 'c'].map((name) => town.newPerson(`asker_${name}`)));

  const bundles = await Promise.all(
    Array.from({ length: 30 }, async (_, index) => {
      const asker = askers[index % askers.length];
      // Both ways to ask take from the same stock.
      return index % 2 ? (await asker.bundlesOf(bob.userId))[0] : asker.bundleOf(bob.userId, bob.deviceId);
    }),
  );

  const preKeys = bundles.flatMap(({ oneTimePreKey }) => oneTimePreKey ?? []);
  assert.equal(preKeys.length, stock.preKeys, 'all of them, and then none');
  assert.equal(new Set(preKeys.map(({ keyId }) => keyId)).size, stock.preKeys);
  assert.equal(new Set(preKeys.map(({ publicKey }) => publicKey)).size, stock.preKeys);

  const uses = groupByKyberKey(bundles);
  const lastResorts = [...uses.values()].filter((users) => users.length > 1);
  assert.equal(uses.size, stock.pqPreKeys + 1, 'all one-time Kyber keys and the one of last resort');
  assert.equal(lastResorts.length, 1, 'only the last-resort key is handed out more than once');
  assert.equal(lastResorts[0].length, bundles.length - stock.pqPreKeys);
});

function groupByKyberKey(bundles) {
  const groups = new Map();
  for (const bundle of bundles) groups.set(bundle.pqPreKey.keyId, [...(groups.get(bundle.pqPreKey.keyId) ?? []), bundle]);
  return groups;
}

test('a power cut in the middle of fetches does not bring a one-time prekey back', async () => {
  const bob = await town.newPerson('bob', { stock: { preKeys: 60, pqPreKeys: 60 } });
  const asker = await town.newPerson('asker');
  const bundles = [];
  const fetchAll = (count) =>
    Promise.allSettled(
      Array.from({ length: count }, async () => {
        bundles.push(await asker.bundleOf(bob.userId, bob.deviceId));
        if (bundles.length === 10) await town.server.kill();
      }),
    );

  await fetchAll(40);
  await town.startServerAgain();
  await fetchAll(60);

  const preKeys = bundles.flatMap(({ oneTimePreKey }) => oneTimePreKey?.keyId ?? []);
  assert.ok(preKeys.length >= 10);
  assert.equal(new Set(preKeys).size, preKeys.length);
  const lastResort = bundles.at(-1).pqPreKey.keyId;
  const pqPreKeys = bundles.map(({ pqPreKey }) => pqPreKey.keyId).filter((keyId) => keyId !== lastResort);
  assert.equal(new Set(pqPreKeys).size, pqPreKeys.length);
});

test('without one-time prekeys left, bundles come with the last-resort Kyber key alone, and they work', async () => {
  const bob = await town.newPersonOnline('bob', { stock: { preKeys: 3, pqPreKeys: 2 } });
  bob.refillsByItself = false;
  const asker = await town.newPerson('asker');
  for (let index = 0; index < 3; index++) await asker.bundlesOf(bob.userId);

  const [first] = await asker.bundlesOf(bob.userId);
  const second = await asker.bundleOf(bob.userId, bob.deviceId);
  for (const bundle of [first, second]) {
    assert.equal(bundle.oneTimePreKey, null, 'the member is there and says that there is none');
    assert.equal(bundle.pqPreKey.keyId, first.pqPreKey.keyId);
  }

  for (const name of ['carol', 'dave', 'erin']) await assertTheyCanTalk(await town.newPersonOnline(name), bob);
});

test('EC and Kyber one-time prekeys run out independently of each other', async () => {
  const asker = await town.newPersonOnline('asker');

  const withoutPreKeys = await town.newPersonOnline('ec_less', { stock: { preKeys: 0, pqPreKeys: 3 } });
  withoutPreKeys.refillsByItself = false;
  const [first] = await asker.bundlesOf(withoutPreKeys.userId);
  const [second] = await asker.bundlesOf(withoutPreKeys.userId);
  assert.deepEqual([first.oneTimePreKey, second.oneTimePreKey], [null, null]);
  assert.notEqual(first.pqPreKey.keyId, second.pqPreKey.keyId);
  await assertTheyCanTalk(asker, withoutPreKeys);

  const withoutKyber = await town.newPersonOnline('pq_less', { stock: { preKeys: 3, pqPreKeys: 0 } });
  withoutKyber.refillsByItself = false;
  const [third] = await asker.bundlesOf(withoutKyber.userId);
  const [fourth] = await asker.bundlesOf(withoutKyber.userId);
  assert.notEqual(third.oneTimePreKey.keyId, fourth.oneTimePreKey.keyId);
  assert.deepEqual(third.pqPreKey, fourth.pqPreKey);
  await assertTheyCanTalk(asker, withoutKyber);
});

test('a device with few prekeys hears of it when it connects, fills up, and spends the new ones next', async () => {
  const bob = await town.newPerson('bob', { stock: { preKeys: 2, pqPreKeys: 1 } });
  bob.refillsByItself = false;
  const asker = await town.newPerson('asker');
  const seen = [];
  for (let index = 0; index < 4; index++) seen.push(...(await asker.bundlesOf(bob.userId)));

  const asked = next(bob, 'preKeyStatus');
  await bob.connect();
  const [status] = await asked;
  assert.deepEqual(status, { oneTimePreKeyCount: 0, minThreshold: THRESHOLD, pqPreKeyCount: 0 });
  await bob.refill({ preKeys: 30, pqPreKeys: 10 });

  const [bundle] = await asker.bundlesOf(bob.userId);
  const old = new Set(seen.map(({ oneTimePreKey }) => oneTimePreKey?.publicKey));
  assert.ok(bundle.oneTimePreKey && !old.has(bundle.oneTimePreKey.publicKey), 'a new EC one-time prekey');
  assert.ok(seen.every(({ pqPreKey }) => pqPreKey.publicKey !== bundle.pqPreKey.publicKey), 'a new Kyber prekey');
  assert.ok(bundle.signedPreKey.keyId > seen[0].signedPreKey.keyId, 'the newest signed prekey');
  await assertTheyCanTalk(await town.newPersonOnline('carol'), bob);
});

for (const [kind, stock] of [
  ['EC', { preKeys: THRESHOLD + 1, pqPreKeys: 40 }],
  ['Kyber', { preKeys: 40, pqPreKeys: THRESHOLD + 1 }],
]) {
  test(`a connected device hears of fetches that leave it with few ${kind} prekeys, and fills up by itself`, async () => {
    const bob = await town.newPersonOnline('bob', { stock });
    const asker = await town.newPerson('asker');
    const statuses = [];
    bob.on('preKeyStatus', (status) => statuses.push(status));
    const refilled = next(bob, 'refilled');

    await asker.bundlesOf(bob.userId);
    await asker.bundlesOf(bob.userId);

    assert.deepEqual((await refilled)[0], { preKeys: 2, pqPreKeys: 2 });
    const expected = { oneTimePreKeyCount: stock.preKeys - 2, minThreshold: THRESHOLD, pqPreKeyCount: stock.pqPreKeys - 2 };
    assert.deepEqual(statuses, [expected]);
    assert.deepEqual((await bob.call('GET', '/v1/keys')).json(), {
      oneTimePreKeyCount: stock.preKeys,
      pqPreKeyCount: stock.pqPreKeys,
    });
  });
}

test('a session started before a refill, but used only after it, still works', async () => {
  const bob = await town.newPersonOnline('bob');
  const alice = await town.newPersonOnline('alice');
  await meet(alice, bob);

  await bob.refill();

  await assertTheyCanTalk(alice, bob);
});

test('a device can ask how many one-time prekeys it has left', async () => {
  const bob = await town.newPerson('bob', { stock: { preKeys: 9, pqPreKeys: 4 } });
  const asker = await town.newPerson('asker');
  await asker.bundlesOf(bob.userId);

  const counts = (await bob.call('GET', '/v1/keys')).json();

  assert.deepEqual(counts, { oneTimePreKeyCount: 8, pqPreKeyCount: 3 });
});
