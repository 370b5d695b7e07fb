import assert from 'node:assert/strict';
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { after, before, test } from 'node:test';

import { assertRefused, read, Town, write } from './people.mjs';

let town, alice, bob;
before(async () => {
  town = await Town.open();
  alice = await town.newPersonOnline('alice');
  bob = await town.newPersonOnline('bob');
});
after(() => town?.close());

// Around the block of the cipher, around a page, around what servers and libraries like to buffer, and large.
for (const size of [0, 1, 15, 16, 17, 4095, 65_537, 1_048_576, 5_242_880]) {
  test(`an encrypted attachment of ${size} bytes comes back unchanged`, async () => {
    const file = randomBytes(size);

    const pointer = await alice.uploadAttachment(file);
    await write(alice, bob, JSON.stringify(pointer));
    const received = JSON.parse(await read(bob));

    const { bytes, headers } = await bob.call('GET', `/v1/attachments/${received.id}`);
    assert.equal(Number(headers.get('content-length')), pointer.size);
    assert.equal(headers.get('content-type'), 'application/octet-stream');
    assert.equal(headers.get('etag'), `"${received.id}"`);
    assert.equal(createHash('sha256').update(bytes).digest('base64'), received.digest);
    assert.deepEqual(await bob.downloadAttachment(received), file);
  });
}

test('a part of an attachment can be fetched', async () => {
  const { id } = await alice.uploadAttachment(randomBytes(100_000));
  const whole = (await bob.call('GET', `/v1/attachments/${id}`)).bytes;

  for (const [range, first, last] of [
    ['bytes=0-0', 0, 0],
    ['bytes=1000-1999', 1000, 1999],
    ['bytes=99000-', 99_000, whole.length - 1],
    ['bytes=-16', whole.length - 16, whole.length - 1],
  ]) {
    const { status, headers, bytes } = await bob.call('GET', `/v1/attachments/${id}`, { headers: { range } });
    assert.equal(status, 206);
    assert.equal(headers.get('content-range'), `bytes ${first}-${last}/${whole.length}`);
    assert.deepEqual(bytes, whole.subarray(first, last + 1));
  }
});

test('an attachment that nobody uploaded is not found', async () => {
  await assertRefused(bob.call('GET', `/v1/attachments/${randomUUID()}`), 404);
});

test('an attachment under another key or with another digest is refused by the client', async () => {
  const [one, other] = [await alice.uploadAttachment(randomBytes(100)), await alice.uploadAttachment(randomBytes(100))];

  await assert.rejects(bob.downloadAttachment({ ...one, id: other.id }), /changed on its way/);
  await assert.rejects(bob.downloadAttachment({ ...one, key: other.key }), /changed on its way/);
  await assert.rejects(bob.downloadAttachment({ ...one, digest: other.digest }), /changed on its way/);
});

test('attachments outlive the power cut of the server', async () => {
  const file = randomBytes(300_000);
  const pointer = await alice.uploadAttachment(file);

  await town.killAndStartServerAgain();

  assert.deepEqual(await bob.downloadAttachment(pointer), file);
});
