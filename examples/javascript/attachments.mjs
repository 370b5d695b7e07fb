// Attachments are encrypted by the client before the server sees them: AES-256-CBC, then HMAC-SHA256 over the result
// (encrypt-then-MAC). The keys and the digest travel inside the end-to-end encrypted message that points to the file.

import { createCipheriv, createDecipheriv, createHash, createHmac, randomBytes, timingSafeEqual } from 'node:crypto';

const CIPHER = 'aes-256-cbc';
const IV_LENGTH = 16;
const MAC_LENGTH = 32;

/** Encrypts a file under fresh keys. The layout of `sealed` is: IV, ciphertext, MAC over both. */
export function sealAttachment(plaintext) {
  const key = randomBytes(64);
  const iv = randomBytes(IV_LENGTH);
  const cipher = createCipheriv(CIPHER, key.subarray(0, 32), iv);
  const body = Buffer.concat([iv, cipher.update(plaintext), cipher.final()]);
  const sealed = Buffer.concat([body, mac(key, body)]);
  return { sealed, key, digest: createHash('sha256').update(sealed).digest() };
}

/** Checks digest and MAC and only then decrypts. Throws when a single bit differs. */
export function openAttachment(sealed, { key, digest }) {
  if (sealed.length < IV_LENGTH + MAC_LENGTH) throw new Error('the attachment is too short');
  const isExpectedFile = timingSafeEqual(createHash('sha256').update(sealed).digest(), digest);
  const body = sealed.subarray(0, -MAC_LENGTH);
  const isAuthentic = timingSafeEqual(mac(key, body), sealed.subarray(-MAC_LENGTH));
  if (!isExpectedFile || !isAuthentic) throw new Error('the attachment was changed on its way');
  const decipher = createDecipheriv(CIPHER, key.subarray(0, 32), body.subarray(0, IV_LENGTH));
  return Buffer.concat([decipher.update(body.subarray(IV_LENGTH)), decipher.final()]);
}

function mac(key, body) {
  return createHmac('sha256', key.subarray(32)).update(body).digest();
}
