// How to talk to an Obscura server: HTTP with its rate limits and errors, the protobuf messages, and ids in both of
// their spellings. There is no cryptography in this file.

import { fileURLToPath } from 'node:url';
import { setTimeout as pause } from 'node:timers/promises';
import protobuf from 'protobufjs';

const SCHEMA = fileURLToPath(new URL('../../proto/obscura/v1/obscura.proto', import.meta.url));
const schema = new protobuf.Root().loadSync(SCHEMA);

export const SendMessageRequest = schema.lookupType('obscura.v1.SendMessageRequest');
export const SendMessageResponse = schema.lookupType('obscura.v1.SendMessageResponse');
export const WebSocketFrame = schema.lookupType('obscura.v1.WebSocketFrame');

export function encode(type, value) {
  return type.encode(type.create(value)).finish();
}

export function decode(type, bytes) {
  return type.toObject(type.decode(bytes), { defaults: true, longs: Number });
}

/** An id as 16 bytes, the way protobuf carries it. */
export function idToBytes(id) {
  return Buffer.from(id.replaceAll('-', ''), 'hex');
}

/** An id as hyphenated lower-case text, the way JSON and URLs carry it. */
export function idFromBytes(bytes) {
  return Buffer.from(bytes).toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

/** The server answered, but not with a success. */
export class RelayError extends Error {
  constructor(method, path, status, reason) {
    super(`${method} ${path} was answered with ${status}${reason ? `: ${reason}` : ''}`);
    this.name = 'RelayError';
    this.status = status;
    this.reason = reason;
  }
}

/** One server, known by its address. */
export class Relay {
  constructor(url = 'http://127.0.0.1:3000') {
    this.url = url;
  }

  /** The address of the gateway: the same server, spoken to by WebSocket. */
  gateway() {
    return `${new URL('/v1/gateway', this.url)}`.replace(/^http/, 'ws');
  }

  /**
   * Sends one request and returns its successful answer, or throws a `RelayError`.
   *
   * A request over the rate limit was not looked at, so it is always safe to wait as long as the server says and to
   * repeat it. After a lost connection nobody knows whether the server acted: only a request marked `isRepeatable` is
   * tried again.
   */
  async call(method, path, { token, json, bytes, headers = {}, isRepeatable = false, seconds = 30 } = {}) {
    const all = { ...headers };
    if (token) all.authorization = `Bearer ${token}`;
    if (json) all['content-type'] = 'application/json';
    else if (bytes) all['content-type'] ??= 'application/octet-stream';
    const body = json ? JSON.stringify(json) : bytes;

    for (let triesLeft = isRepeatable ? 3 : 1, waitsLeft = 10; ; ) {
      let response, received;
      try {
        const signal = AbortSignal.timeout(seconds * 1000);
        response = await fetch(new URL(path, this.url), { method, headers: all, body, signal });
        received = Buffer.from(await response.arrayBuffer());
      } catch (error) {
        if (--triesLeft > 0) continue;
        throw new Error(`no answer from ${this.url}: ${error.cause?.message ?? error.message}`, { cause: error });
      }
      if (response.status === 429 && waitsLeft-- > 0) {
        await pause(1000 * Number(response.headers.get('retry-after') ?? 1));
        continue;
      }
      if (response.status >= 400) throw new RelayError(method, path, response.status, reasonIn(received));
      return { status: response.status, headers: response.headers, bytes: received, json: () => JSON.parse(received) };
    }
  }
}

function reasonIn(body) {
  try {
    return JSON.parse(body).error;
  } catch {
    return body.toString();
  }
}
