// What the server lets into a key bundle: nothing that the official library would refuse later.

import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, test } from 'node:test';

import { SignalDevice } from '../../examples/javascript/obscura.mjs';
import { assertRefused, Town } from './people.mjs';

let town;
before(async () => (town = await Town.open()));
after(() => town?.close());

/** Registers with keys that were changed before, and resolves to the new session. */
async function register(change) {
  const signal = new SignalDevice();
  const keys = await signal.newDeviceKeys({ preKeys: 2, pqPreKeys: 2 });
  change(keys, (bytes) => Buffer.from(signal.identity.privateKey.sign(new Uint8Array(bytes))).toString('base64'));
  const json = { username: `user_${randomBytes(8).toString('hex')}`, password: randomBytes(16).toString('hex'), ...keys };
  return (await town.relay.call('POST', '/v1/users', { json })).json();
}

function changed(text, change) {
  const bytes = Buffer.from(text, 'base64');
  return (change(bytes) ?? bytes).toString('base64');
}

/** Gives a key other bytes, with a signature that is right for them. */
function replaceKey(preKey, sign, change) {
  preKey.publicKey = changed(preKey.publicKey, change);
  preKey.signature = sign(Buffer.from(preKey.publicKey, 'base64'));
}

const REFUSED = {
  'a one-time Kyber prekey with a wrong signature': ({ pqPreKeys }) => {
    pqPreKeys[1].signature = changed(pqPreKeys[1].signature, (bytes) => void (bytes[5] ^= 1));
  },
  'a last-resort key with a wrong signature': ({ pqLastResortPreKey: key }) => {
    key.signature = changed(key.signature, (bytes) => void (bytes[5] ^= 1));
  },
  'a Kyber signature with its sign bit flipped': ({ pqLastResortPreKey: key }) => {
    key.signature = changed(key.signature, (bytes) => void (bytes[63] ^= 0x80));
  },
  'a Kyber key without its type byte': ({ pqLastResortPreKey }, sign) => {
    replaceKey(pqLastResortPreKey, sign, (bytes) => bytes.subarray(1));
  },
  'a KEM key of another type': ({ pqLastResortPreKey }, sign) => {
    replaceKey(pqLastResortPreKey, sign, (bytes) => void (bytes[0] = 0x0a));
  },
  'two Kyber prekeys with one id': ({ pqPreKeys }) => {
    pqPreKeys[1].keyId = pqPreKeys[0].keyId;
  },
  'one-time Kyber prekeys without one of last resort': (keys) => {
    delete keys.pqLastResortPreKey;
  },
};

for (const [what, change] of Object.entries(REFUSED)) {
  test(`${what} is refused`.replace(/^(two|one-time Kyber prekeys)(.*) is /, '$1$2 are '), () =>
    assertRefused(register(change), 400));
}

test('every signature of the library is accepted, whatever its sign bit', async () => {
  // Half of all identity keys set that bit, so among 16 both kinds are as good as certain.
  for (let index = 0; index < 16; index++) assert.ok((await register(() => {})).deviceId);
});

test('a client without Kyber keys can register, and its bundle does not have the member', async () => {
  const { userId } = await register((keys) => {
    delete keys.pqLastResortPreKey;
    delete keys.pqPreKeys;
  });

  const [bundle] = await (await town.newPerson('asker')).bundlesOf(userId);

  const members = ['deviceId', 'registrationId', 'identityKey', 'signedPreKey', 'oneTimePreKey'];
  assert.deepEqual(Object.keys(bundle).sort(), members.sort());
});

test('a refused refill leaves everything as it was', async () => {
  const bob = await town.newPerson('bob', { stock: { preKeys: 3, pqPreKeys: 3 } });
  const json = await bob.signal.newPreKeys({ preKeys: 5, pqPreKeys: 5 });
  json.pqPreKeys[4].signature = json.pqPreKeys[3].signature;

  await assertRefused(bob.call('POST', '/v1/keys', { json }), 400);

  assert.deepEqual((await bob.call('GET', '/v1/keys')).json(), { oneTimePreKeyCount: 3, pqPreKeyCount: 3 });
  const [bundle] = await (await town.newPerson('asker')).bundlesOf(bob.userId);
  assert.notEqual(bundle.signedPreKey.keyId, json.signedPreKey.keyId);
});
