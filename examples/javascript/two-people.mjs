// Two people exchange end-to-end encrypted messages and a file through a running Obscura server.
//
//   node two-people.mjs [http://127.0.0.1:3000]

import { randomBytes } from 'node:crypto';
import { Device, Relay } from './obscura.mjs';

const relay = new Relay(process.argv[2] ?? 'http://127.0.0.1:3000');
const CIPHERTEXT_TYPES = { 2: 'ordinary message', 3: 'first message, carries the PQXDH key agreement' };

/** Everything that the server was given to store, to be looked through at the end. */
const seenByServer = [];

async function story() {
  chapter('Two people sign up');
  const alice = await signUp('alice');
  const bob = await signUp('bob');

  chapter('Alice writes to Bob, who is not connected');
  const greeting = 'Hello Bob! Nobody between us can read this.';
  // `send` does these steps itself; the first is done here by hand to show what a bundle is.
  const [bundle] = await alice.bundlesOf(bob.userId);
  say(`The server hands out Bob's key bundle: one-time prekey ${bundle.oneTimePreKey?.keyId ?? 'none left'} and ` +
    `post-quantum prekey ${bundle.pqPreKey.keyId} are now spent.`);
  await alice.signal.startSession(bob.userId, bundle);
  say('Alice checks its signatures and starts a session: X25519 and Kyber-1024 together (PQXDH).');
  await alice.send(bob.userId, Buffer.from(greeting));
  say(`Alice: “${greeting}”`);

  chapter('Bob connects and finds it');
  await bob.connect();
  const first = await receive(bob);
  say(`Bob reads: “${first.body}”`);
  say('Bob acknowledges it, and the server deletes it.');

  chapter('Bob answers, Alice is connected');
  await alice.connect();
  const answer = 'Hi Alice! Now both of us have fresh keys for every message.';
  await bob.send(alice.userId, Buffer.from(answer));
  say(`Bob: “${answer}”`);
  const second = await receive(alice);
  say(`Alice reads: “${second.body}”`);

  chapter('Alice sends a picture');
  const picture = randomBytes(300_000);
  const pointer = await alice.uploadAttachment(picture);
  say(`Alice encrypts ${picture.length} bytes under a fresh key and uploads ${pointer.size} bytes of noise.`);
  await alice.send(bob.userId, Buffer.from(JSON.stringify({ picture: pointer })));
  say('Id, key and digest of the file go to Bob in an encrypted message.');
  const third = await receive(bob);
  const download = await bob.downloadAttachment(JSON.parse(third.body).picture);
  if (!download.equals(picture)) throw new Error('the picture arrived changed');
  say(`Bob downloads and decrypts it: ${download.length} bytes, the same ones.`);

  chapter('What the server saw');
  for (const { from, to, sealed } of seenByServer) {
    console.log(`  ${from} → ${to}: ${String(sealed.length).padStart(5)} bytes  ${sealed.toString('hex', 0, 16)}…`);
    console.log(`      type ${sealed[0]}: ${CIPHERTEXT_TYPES[sealed[0]]}`);
  }
  const secrets = [greeting, answer, pointer.key];
  const leaked = secrets.filter((secret) => seenByServer.some(({ request }) => request.includes(secret)));
  if (leaked.length > 0) throw new Error(`the server saw a secret: ${leaked[0]}`);
  say('Who wrote to whom, when, and how much. None of the words, and not the key of the picture.');

  await Promise.all([alice.disconnect(), bob.disconnect()]);
}

async function signUp(nickname) {
  const username = `${nickname}_${randomBytes(5).toString('hex')}`;
  const password = randomBytes(18).toString('base64');
  const stock = { preKeys: 30, pqPreKeys: 30 };
  const device = await Device.register(relay, { username, password, name: `${nickname}'s phone`, stock });
  device.on('submitted', ({ recipients, bytes }) => {
    for (const { sealed } of recipients) {
      const to = nickname === 'alice' ? 'bob' : 'alice';
      for (const message of sealed.values()) {
        seenByServer.push({ from: nickname, to, sealed: message, request: bytes });
      }
    }
  });
  device.on('trouble', (error) => fail(error));
  say(`${username} makes keys on the device and uploads the public halves: ${stock.preKeys} one-time prekeys, ` +
    `${stock.pqPreKeys} post-quantum ones and one of last resort.`);
  return device;
}

async function receive(device) {
  const message = await device.nextMessage();
  if (message.error) throw message.error;
  device.acknowledge(message);
  return message;
}

function chapter(title) {
  console.log(`\n${title}`);
}

function say(text) {
  console.log(`  ${text}`);
}

function fail(error) {
  console.error(`\nThe story ends early: ${error.message}.`);
  if (error.message.startsWith('no answer')) {
    console.error('Is the server running there? Another address can be given as the first argument.');
  }
  process.exit(1);
}

await story().catch(fail);
console.log('\nThe end.');
